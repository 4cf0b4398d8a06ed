"""Replay data: what is sampled, mixed, cut and dropped, how it is padded, and the flags that say so."""

import copy
import json
import sys

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from heterofusion.data.replay import DataArguments, build_eval, build_replay, make_collator
from heterofusion.runtime.program import parse_arguments
from replay_builders import answers, args_for, byte_level, numbered, refused, word_level, write

pytestmark = pytest.mark.usefixtures("offline_datasets")


# ---- sampling, mixing, cutting ----------------------------------------------------------------------------------


def test_mixture_takes_max_examples_of_each_and_is_shuffled(tmp_path):
    tokenizer = byte_level()
    a, b = write(tmp_path / "a.json", numbered(20, "a")), write(tmp_path / "b.jsonl", numbered(30, "b"))
    dataset, report = build_replay(args_for(a, b, max_examples=[5, 12]), tokenizer)
    found = answers(dataset, tokenizer)
    assert sorted(text[0] for text in found) == ["a"] * 5 + ["b"] * 12
    assert len(set(found)) == 17 and [text[0] for text in found] != sorted(text[0] for text in found)
    assert [(r.read, r.sampled, r.kept) for r in report.datasets] == [(20, 5, 5), (30, 12, 12)]
    assert dataset.column_names == ["input_ids", "attention_mask", "labels"]
    assert sum(r.tokens for r in report.datasets) == sum(map(len, dataset["input_ids"]))
    labels = [label for labels in dataset["labels"] for label in labels if label != -100]
    assert sum(r.label_tokens for r in report.datasets) == len(labels)
    assert json.loads(json.dumps(report.to_dict()))["datasets"][1]["format"] == "prompt_completion"
    titles = [line.split(":")[0] for line in report.summary()]
    assert titles == [f"{a} (prompt_completion)", f"{b} (prompt_completion)", "all 2 data sets"]


def test_same_arguments_give_the_same_data_and_another_seed_does_not(tmp_path):
    tokenizer = byte_level()
    a, b = write(tmp_path / "a.json", numbered(50, "a")), write(tmp_path / "b.json", numbered(50, "b"))
    first, _ = build_replay(args_for(a, b, max_examples=10), tokenizer)
    again, _ = build_replay(args_for(a, b, max_examples=10), tokenizer)
    other, _ = build_replay(args_for(a, b, max_examples=10, dataset_seed=7), tokenizer)
    assert first.to_dict() == again.to_dict()
    assert set(answers(first, tokenizer)) != set(answers(other, tokenizer))
    # What else is in the mixture does not change what is drawn from a data set, and a larger sample holds the smaller.
    alone, _ = build_replay(args_for(a, max_examples=10), tokenizer)
    more, _ = build_replay(args_for(a, max_examples=20), tokenizer)
    from_a = {text for text in answers(first, tokenizer) if text.startswith("a")}
    assert set(answers(alone, tokenizer)) == from_a < set(answers(more, tokenizer))


def test_ratio_is_applied_before_the_cap(tmp_path):
    path = write(tmp_path / "a.json", numbered(40))
    for ratio, cap, expected in ((0.25, 300, 10), (0.29, 300, 12), (0.5, 7, 7), (0.001, 5, 1)):
        _, report = build_replay(args_for(path, dataset_ratio=[ratio], max_examples=[cap]), byte_level())
        assert report.datasets[0].sampled == report.datasets[0].kept == expected


def test_cut_and_dropped_are_counted(tmp_path, caplog):
    tokenizer = word_level()
    records = [
        {"prompt": "q0 q1", "completion": " a"},  # 4 tokens: fits
        {"prompt": "q0 q1", "completion": " a b c d"},  # 7 tokens: 2 cut, 3 labels stay
        {"prompt": "q0 q1 q2 q0 q1 q2", "completion": " a"},  # 8 tokens: no label stays
        {"prompt": "q0", "completion": " \n"},  # empty answers: never a label
        {"prompt": "q0", "completion": ""},
    ]
    dataset, report = build_replay(args_for(write(tmp_path / "a.jsonl", records), max_length=5), tokenizer)
    [r] = report.datasets
    assert (r.read, r.sampled, r.cut, r.cut_tokens, r.dropped, r.dropped_empty, r.kept) == (5, 5, 2, 2 + 3, 3, 2, 2)
    assert sorted(map(len, dataset["input_ids"])) == [4, 5] and r.tokens == 9
    assert sorted(answers(dataset, tokenizer)) == ["a", "a b c"] and r.label_tokens == 2 + 3
    [line] = report.summary()
    assert "5 sampled, 2 cut to 5 tokens (5 tokens removed), 3 dropped without label tokens (2 with an" in line


def test_eval_keeps_the_order_of_the_files(tmp_path):
    tokenizer = byte_level()
    a, b = write(tmp_path / "a.json", numbered(9, "a")), write(tmp_path / "b.json", numbered(9, "b"))
    args = DataArguments(eval_dataset_name=[a, b], eval_max_examples=[9, 4])
    dataset, report = build_eval(args, tokenizer)
    found = answers(dataset, tokenizer)
    assert found == sorted(found) and found[:9] == [f"a{i}" for i in range(9)]
    assert len(found) == 13 == sum(r.kept for r in report.datasets)


def test_all_examples_too_long_raises(tmp_path):
    records = [{"prompt": "q0 " * n, "completion": " a"} for n in (9, 7, 8)]
    path = write(tmp_path / "a.json", records)
    refused(path, r"all examples are too long for --max_length 5, .* raise it to 8 at least", max_length=5)
    dataset, _ = build_replay(args_for(path, max_length=8), word_level())  # the remedy works
    assert len(dataset) == 1
    refused(write(tmp_path / "b.json", [{"prompt": "q0", "completion": " "}]), r"every sampled answer is empty")


# ---- collator ---------------------------------------------------------------------------------------------------


def test_collator_pads_on_the_right_and_leaves_the_tokenizer_alone(tmp_path):
    tokenizer = word_level()
    tokenizer.padding_side = "left"
    before = copy.deepcopy(tokenizer.special_tokens_map)
    records = [{"prompt": "q0", "completion": " a"}, {"prompt": "q0 q1", "completion": " a b"}]
    dataset, _ = build_eval(DataArguments(eval_dataset_name=[write(tmp_path / "a.json", records)]), tokenizer)
    batch = make_collator(tokenizer)([dataset[0], dataset[1]])
    eos = tokenizer.eos_token_id
    ids = tokenizer.convert_tokens_to_ids
    assert batch["input_ids"].tolist() == [[*ids(["q0", "a"]), eos, eos, eos], [*ids(["q0", "q1", "a", "b"]), eos]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, ids("a"), eos, -100, -100], [-100, -100, *ids(["a", "b"]), eos]]
    assert batch["labels"].dtype == torch.int64
    assert make_collator(tokenizer, pad_to_multiple_of=8)([dataset[0], dataset[1]])["labels"].shape == (2, 8)
    assert tokenizer.special_tokens_map == before and tokenizer.pad_token is None
    assert tokenizer.padding_side == "left"


def test_tokenizer_without_pad_and_eos_raises():
    backend = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(ValueError, match="neither a pad_token nor an eos_token"):
        make_collator(PreTrainedTokenizerFast(tokenizer_object=backend))


# ---- flags ------------------------------------------------------------------------------------------------------


def test_flags_come_from_the_command_line():
    line = "--dataset_name a.json b.json --max_examples 5 0 --dataset_ratio 0.5 --max_length 64"
    [args] = parse_arguments((DataArguments,), line.split(), "")
    first, second = args.replay_sets()
    assert (first.name, first.split, first.max_examples, first.ratio) == ("a.json", "train", 5, 0.5)
    assert (second.name, second.split, second.max_examples, second.ratio) == ("b.json", "train", sys.maxsize, 0.5)
    assert (args.max_length, args.dataset_seed, args.eval_sets()) == (64, 42, [])
    single = DataArguments(dataset_name="a.json", max_examples=5, dataset_ratio=1)  # as in YAML
    assert (single.dataset_name, single.max_examples, single.replay_sets()[0].ratio) == (["a.json"], [5], 1.0)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"max_examples": [1, 2, 3]}, r"--max_examples has 3 values, but --dataset_name has 2: give one"),
        ({"max_examples": [-1]}, r"--max_examples is -1; it must be at least 0"),
        ({"dataset_ratio": [0.0]}, r"--dataset_ratio is 0\.0; it must be above 0 and at most 1"),
        ({"dataset_ratio": [float("nan")]}, r"--dataset_ratio is nan"),
        ({"dataset_split": [""]}, r"--dataset_split is \[''\]; none of its values may be empty"),
        ({"eval_dataset_name": ["x"], "eval_split": ["a", "b"]}, r"--eval_split has 2 values, but --eval_dataset_n"),
    ],
)
def test_flag_out_of_range_raises(values, match):
    with pytest.raises(ValueError, match=match):
        DataArguments(**{"dataset_name": ["a.json", "b.json"], **values})
