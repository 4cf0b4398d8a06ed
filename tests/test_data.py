"""Replay data: what gets loss, what is sampled, cut and dropped, and what a user reads when a file is bad."""

import copy
import json
from pathlib import Path

import datasets
import huggingface_hub
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import HfArgumentParser, PreTrainedTokenizer, PreTrainedTokenizerFast

from heterofusion.config import DataArguments
from heterofusion.data import build_eval, build_replay, make_collator
from heterofusion.formats import detect_format, render, to_conversation, tokenize
from heterofusion.records import load_records

SPECIAL = ["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Two marked ranges per answer, and a tail between them that no one should learn.
TWO_MARKS = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{% generation %}think{% endgeneration %} |{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{% else %}<|user|>{{ m['content'] }}<|assistant|>{% endif %}{% endfor %}"
)
# Like the templates of reasoning models: only the last answer is written with its (empty) reasoning.
LAST_DIFFERS = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if loop.last and m['role'] == 'assistant' %}(thinks) {% endif %}"
    "{{ m['content'] }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ALTERNATES = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
)
# The shape of information-extraction data: the instruction holds the input already, the output starts with a space.
UIE = {
    "instruction": "List the entities.\nText: Ann met Bob .\nAnswer:",
    "input": "Ann met Bob .",
    "output": " person: Ann; person: Bob",
    "history": [["List the entities.\nText: Rome is old .\nAnswer:", " place: Rome"]],
}


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def byte_level(single: str = "<s> $A", template: str | None = None, trim: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE that was trained on a few words; adds what `single` says."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=trim)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([json.dumps(UIE)] * 3 + ["the answer is yes", "the answer is no"] * 3, trainer)
    pieces = [(name, SPECIAL.index(name)) for name in ("<s>", "</s>")]
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=trim),
            processors.TemplateProcessing(single=single, special_tokens=pieces),
        ]
    )
    return wrap(backend, template)


def word_level(template: str | None = None) -> PreTrainedTokenizerFast:
    """One token a word, white space dropped, nothing added."""
    words = ["q0", "q1", "q2", "a", "b", "c", "d"]
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, "[UNK]", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(SPECIAL)
    return wrap(backend, template)


def merging() -> PreTrainedTokenizerFast:
    """Characters, and the merge `ab`, wherever prompt and answer meet."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, "a", "b", "x", "z", "ab"])}
    return wrap(Tokenizer(models.BPE(vocabulary, merges=[("a", "b")])), None)


def wrap(backend: Tokenizer, template: str | None) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=template)


class SlowTokenizer(PreTrainedTokenizer):
    """Characters and the merge `ab`, without offsets."""

    def __init__(self, **kwargs):
        self.vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", "ab", *map(chr, range(32, 127))])}
        super().__init__(bos_token="<s>", eos_token="</s>", **kwargs)

    @property
    def vocab_size(self):
        return len(self.vocabulary)

    def get_vocab(self):
        return dict(self.vocabulary)

    def _tokenize(self, text, **kwargs):
        tokens = []
        while text:
            token = "ab" if text.startswith("ab") else text[0]
            tokens.append(token)
            text = text[len(token) :]
        return tokens

    def _convert_token_to_id(self, token):
        return self.vocabulary[token]

    def _convert_id_to_token(self, index):
        return list(self.vocabulary)[index]


def write(path: Path, records) -> str:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    else:
        path.write_text(json.dumps(records), encoding="utf-8")
    return str(path)


def encode(record: dict, tokenizer) -> tuple[list[int], list[int]]:
    format = detect_format(record)
    return tokenize(render(*to_conversation(record, format), format, tokenizer), tokenizer)


def labelled(record: dict, tokenizer) -> list[str]:
    """The stretches of text that get loss, exactly as decoded."""
    ids, labels = encode(record, tokenizer)
    assert len(ids) == len(labels) and all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    stretches: list[list[int]] = [[]]
    for label in labels:
        if label == -100:
            stretches.append([])
        else:
            stretches[-1].append(label)
    return [tokenizer.decode(stretch) for stretch in stretches if stretch]


def whole(record: dict, tokenizer) -> str:
    return tokenizer.decode(encode(record, tokenizer)[0])


def numbered(count: int, prefix: str = "") -> list[dict]:
    return [{"prompt": f"the answer {prefix}{i} is", "completion": f" {prefix}{i}"} for i in range(count)]


def answers(dataset, tokenizer) -> list[str]:
    texts = [tokenizer.decode([t for t in labels if t != -100]) for labels in dataset["labels"]]
    return [text.removesuffix("</s>").strip() for text in texts]


def args_for(*names, **kwargs) -> DataArguments:
    return DataArguments(dataset_name=list(map(str, names)), **kwargs)


# What gets loss


def test_prompt_completion_strings_get_loss_on_completion_and_eos():
    record = {"prompt": "the answer is", "completion": " yes"}
    for tokenizer in (byte_level(), byte_level(template=CHAT)):  # strings are never templated
        assert whole(record, tokenizer) == "<s>the answer is yes</s>"
        assert labelled(record, tokenizer) == [" yes</s>"]


def test_text_gets_loss_on_everything_but_bos():
    assert labelled({"text": "the answer is yes"}, byte_level()) == ["the answer is yes</s>"]
    # Without a BOS the first token has nothing before it to be predicted from.
    assert encode({"text": "a b c"}, word_level())[1][0] == -100


@pytest.mark.parametrize("trim", [True, False])
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("the answer is", "  yes\n\n  no "),
        ("the answer is ", "yes"),
        ("the answer is  ", "no"),
        ("", "yes"),
        ("Ann: ä€", "ö 漢字 yes"),
        ("the answer is\n", "\tyes"),
    ],
)
def test_labels_decode_to_the_completion_whatever_the_white_space(prompt, completion, trim):
    tokenizer = byte_level(trim=trim)
    [text] = labelled({"prompt": prompt, "completion": completion}, tokenizer)
    # A token that straddles the border (` yes` after `is `) holds answer characters and gets loss as a whole.
    assert text.removesuffix("</s>").lstrip() == completion.lstrip()
    assert prompt.endswith(text[: len(text) - len(completion + "</s>")])


def test_token_across_the_border_gets_loss():
    record = {"prompt": "xa", "completion": "bz"}
    tokenizer = merging()
    ids, labels = encode(record, tokenizer)
    assert tokenizer.convert_ids_to_tokens(ids) == ["x", "ab", "z", "</s>"]
    assert [label != -100 for label in labels] == [False, True, True, True]
    ids, labels = encode({"prompt": "xab", "completion": "z"}, tokenizer)
    assert [label != -100 for label in labels] == [False, False, True, True]


def test_slow_tokenizer_gets_the_same_labels():
    tokenizer = SlowTokenizer()
    assert not tokenizer.is_fast
    ids, labels = encode({"prompt": "xa", "completion": "bz"}, tokenizer)
    assert tokenizer.convert_ids_to_tokens(ids) == ["x", "ab", "z", "</s>"]
    assert [label != -100 for label in labels] == [False, True, True, True]
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['content'] }}]{% endfor %}{% if add_generation_prompt %}[{% endif %}"
    )
    turns = [{"role": role, "content": c} for role, c in zip(("user", "assistant") * 2, "xzab", strict=True)]
    ids, labels = encode({"messages": turns}, tokenizer)
    assert tokenizer.convert_ids_to_tokens(ids) == list("[x][z][a][b]")
    assert [t for t, label in zip("[x][z][a][b]", labels, strict=True) if label != -100] == list("z]b]")
    # A token across the end of a marked range holds characters of the answer, and gets loss.
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
        "{% else %}{{ m['content'] }}{% endif %}b{% endfor %}"
    )
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "za"}]
    ids, labels = encode({"messages": turns}, tokenizer)
    assert tokenizer.convert_ids_to_tokens(ids) == ["x", "b", "z", "ab"]
    assert [label != -100 for label in labels] == [False, False, True, True]


@pytest.mark.parametrize("single", ["$A", "<s> $A", "<s> $A </s>"])
@pytest.mark.parametrize("text", ["the answer is yes", "<s>the answer is yes", "the answer is yes</s>"])
def test_bos_and_eos_are_there_once(single, text):
    ids, labels = encode({"text": text}, byte_level(single))
    assert ids.count(1) == 1 and ids[-1] == labels[-1] == 1
    assert ids.count(0) == ("<s>" in single or "<s>" in text)


@pytest.mark.parametrize("template", [CHAT, MARKED])
def test_messages_get_loss_on_every_assistant_turn(template):
    turns = [("system", "be brief"), ("user", "yes?"), ("assistant", "yes"), ("user", "no?"), ("assistant", "no")]
    record = {"messages": [{"role": role, "content": content} for role, content in turns], "id": 7}
    tokenizer = byte_level(template=template)
    assert labelled(record, tokenizer) == ["yes</s>", "no</s>"]
    expected = "<s><|system|>be brief</s><|user|>yes?</s><|assistant|>yes</s><|user|>no?</s><|assistant|>no</s>"
    assert whole(record, tokenizer) == expected


@pytest.mark.parametrize("template", [CHAT, MARKED])
def test_conversational_prompt_completion_gets_loss_on_completion_only(template):
    prompt = [{"role": role, "content": c} for role, c in (("user", "yes?"), ("assistant", "yes"), ("user", "no?"))]
    record = {"prompt": prompt, "completion": [{"role": "assistant", "content": "no"}]}
    assert labelled(record, byte_level(template=template)) == ["no</s>"]


@pytest.mark.parametrize("template", [CHAT, MARKED])
def test_empty_assistant_turn_gets_no_loss(template):
    turns = [("user", "yes?"), ("assistant", " "), ("user", "no?"), ("assistant", "no")]
    record = {"messages": [{"role": role, "content": content} for role, content in turns]}
    assert labelled(record, byte_level(template=template)) == ["no</s>"]


def test_template_with_several_marks_in_a_turn():
    turns = [{"role": "user", "content": "yes?"}, {"role": "assistant", "content": "yes"}]
    assert labelled({"messages": turns}, byte_level(template=TWO_MARKS)) == ["think", "yes"]


def test_marks_find_turns_that_the_template_rewrites():
    content = "{{ m['content'] }}{{ eos_token }}"
    marked = "{% if m['role'] == 'assistant' %}{% generation %}" + content + "{% endgeneration %}{% else %}"
    template = LAST_DIFFERS.replace(content, marked + content + "{% endif %}")
    turns = [("assistant", " "), ("user", "yes?"), ("assistant", "yes"), ("user", "no?"), ("assistant", "(no)")]
    record = {"messages": [{"role": role, "content": content} for role, content in turns]}
    tokenizer = byte_level(template=template)
    assert "</s><|assistant|>(thinks) (no)</s>" in whole(record, tokenizer)
    assert [text.strip() for text in labelled(record, tokenizer)] == ["yes</s>", "(no)</s>"]


def test_chat_with_word_level_tokenizer():
    turns = [{"role": "user", "content": " q0 "}, {"role": "assistant", "content": " a b "}]
    assert labelled({"messages": turns}, word_level(MARKED)) == ["a b </s>"]
    assert labelled({"messages": turns}, word_level(CHAT)) == ["a b </s>"]


@pytest.mark.parametrize(
    ("template", "bos", "thinks"), [(CHAT, "<s>", ""), (MARKED, "<s>", ""), (LAST_DIFFERS, "", "(thinks) ")]
)
def test_alpaca_with_template(template, bos, thinks):
    tokenizer = byte_level(template=template)
    # The template's own words after the generation prompt are part of what the model has to write.
    assert labelled(UIE, tokenizer) == [f"{thinks}person: Ann; person: Bob</s>"]
    assert whole(UIE, tokenizer) == (
        f"{bos}<|user|>List the entities.\nText: Rome is old .\nAnswer:</s><|assistant|>place: Rome</s>"
        "<|user|>List the entities.\nText: Ann met Bob .\nAnswer:</s>"
        f"<|assistant|>{thinks}person: Ann; person: Bob</s>"
    )


def test_alpaca_without_template_is_plain_text():
    tokenizer = byte_level()
    assert labelled(UIE, tokenizer) == [" person: Ann; person: Bob</s>"]
    assert whole(UIE, tokenizer) == (
        "<s>List the entities.\nText: Rome is old .\nAnswer: place: Rome\n"
        "List the entities.\nText: Ann met Bob .\nAnswer: person: Ann; person: Bob</s>"
    )


@pytest.mark.parametrize(
    ("instruction", "extra", "output", "expected"),
    [
        ("Say", "it", "yes", "Say\nit yes"),  # one space where neither side has white space
        ("Say it:", "it", "yes", "Say it: yes"),  # contained already
        ("Say\n", "", "yes", "Say\nyes"),
        ("Say", None, "\nyes", "Say\nyes"),
        ("Say", "  ", " yes", "Say yes"),
    ],
)
def test_alpaca_input_and_spacing(instruction, extra, output, expected):
    record = {"instruction": instruction, "input": extra, "output": output}
    assert whole(record, byte_level()) == f"<s>{expected}</s>"
    assert labelled(record, byte_level())[0].strip().startswith("yes")
    del record["input"]
    if not extra:
        assert whole(record, byte_level()) == f"<s>{expected}</s>"


def test_precedence_of_formats():
    columns = ["text", "output", "instruction", "completion", "prompt", "messages"]
    found = []
    while columns:
        found.append(detect_format(columns))
        columns.pop()
    assert found == ["messages", "prompt_completion", "alpaca", "alpaca", "text", "text"]
    assert detect_format(["prompt", "output"]) is None


# Sampling, mixing, cutting


def test_mixture_takes_max_examples_of_each_and_is_shuffled(tmp_path):
    tokenizer = byte_level()
    a, b = write(tmp_path / "a.json", numbered(20, "a")), write(tmp_path / "b.jsonl", numbered(30, "b"))
    dataset, report = build_replay(args_for(a, b, max_examples=[5, 12]), tokenizer)
    found = answers(dataset, tokenizer)
    assert sorted(text[0] for text in found) == ["a"] * 5 + ["b"] * 12
    assert len(set(found)) == 17 and [text[0] for text in found] != sorted(text[0] for text in found)
    assert [(r.read, r.sampled, r.kept, r.cut, r.dropped) for r in report.datasets] == [
        (20, 5, 5, 0, 0),
        (30, 12, 12, 0, 0),
    ]
    assert report.total("kept") == 17
    assert dataset.column_names == ["input_ids", "attention_mask", "labels"]
    assert report.total("tokens") == sum(map(len, dataset["input_ids"]))
    assert report.total("label_tokens") == sum(label != -100 for labels in dataset["labels"] for label in labels)
    assert json.loads(json.dumps(report.to_dict()))["datasets"][1]["format"] == "prompt_completion"
    assert [line.split(":")[0] for line in report.summary()] == [
        f"{a} (prompt_completion)",
        f"{b} (prompt_completion)",
        "all 2 data sets",
    ]


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


@pytest.mark.parametrize(("ratio", "cap", "expected"), [(0.25, 300, 10), (0.29, 300, 12), (0.5, 7, 7), (0.001, 5, 1)])
def test_ratio_is_applied_before_the_cap(tmp_path, ratio, cap, expected):
    path = write(tmp_path / "a.json", numbered(40))
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


def test_one_data_set_dropped_whole_is_a_warning(tmp_path, caplog):
    good = write(tmp_path / "good.json", [{"prompt": "q0", "completion": " a"}])
    long = write(tmp_path / "long.json", [{"prompt": "q0 q1 q2 q0 q1", "completion": " a"}])
    dataset, report = build_replay(args_for(good, long, max_length=4), word_level())
    assert len(dataset) == 1 and report.datasets[1].dropped == 1
    assert f"{long} gives no example" in caplog.text


def test_eval_keeps_the_order_of_the_files(tmp_path):
    tokenizer = byte_level()
    a, b = write(tmp_path / "a.json", numbered(9, "a")), write(tmp_path / "b.json", numbered(9, "b"))
    args = DataArguments(eval_dataset_name=[a, b], eval_max_examples=[9, 4])
    dataset, report = build_eval(args, tokenizer)
    found = answers(dataset, tokenizer)
    assert found == sorted(found) and found[:9] == [f"a{i}" for i in range(9)] and report.total("kept") == 13


# Files


def test_file_forms_give_the_same_records(tmp_path):
    records = [{"prompt": "ä\u2028?", "completion": "42"}, {"prompt": 'q, "q"\nq', "completion": "NA"}]
    whole_list, lines = json.dumps(records, ensure_ascii=False), [json.dumps(r, ensure_ascii=False) for r in records]
    files = {
        "list.json": whole_list,
        "bom.json": "\ufeff" + json.dumps(records, indent=1).replace("\n", "\r\n"),
        "wrapped.json": json.dumps({"version": 1, "data": records}),
        "wrapped.jsonl": json.dumps({"data": records}),
        "lines.json": "\n".join(lines),
        "lines.jsonl": "\ufeff" + "\r\n".join(["", lines[0], "", lines[1], ""]),
        "list.jsonl": whole_list,
        "table.csv": '\ufeffprompt,completion\r\nä\u2028?,42\r\n"q, ""q""\nq",NA\r\n',
    }
    for name, text in files.items():
        (tmp_path / name).write_bytes(text.encode("utf-8"))
        assert load_records(str(tmp_path / name)).rows == records, name
    datasets.Dataset.from_list(records).to_parquet(tmp_path / "table.parquet")
    assert load_records(str(tmp_path / "table.parquet")).rows.to_list() == records


def test_single_record_with_messages_is_not_taken_for_a_wrapper(tmp_path):
    record = {"messages": [{"role": "user", "content": "yes?"}, {"role": "assistant", "content": "yes"}]}
    (tmp_path / "one.json").write_text(json.dumps(record, indent=1))
    (tmp_path / "one.jsonl").write_text(json.dumps(record))
    assert load_records(str(tmp_path / "one.json")).rows == load_records(str(tmp_path / "one.jsonl")).rows == [record]


def test_folders(tmp_path):
    splits = datasets.DatasetDict({s: datasets.Dataset.from_list(numbered(3, s)) for s in ("train", "test")})
    splits.save_to_disk(tmp_path / "dict")
    splits["train"].save_to_disk(tmp_path / "single")
    (tmp_path / "files").mkdir()
    write(tmp_path / "files" / "train.jsonl", numbered(3, "train"))
    write(tmp_path / "files" / "test.jsonl", numbered(2, "test"))
    assert load_records(str(tmp_path / "dict"), split="test").rows.to_list() == numbered(3, "test")
    assert load_records(str(tmp_path / "single")).rows.to_list() == numbered(3, "train")
    assert load_records(str(tmp_path / "files"), split="test").rows.to_list() == numbered(2, "test")
    tokenizer = byte_level()
    dataset, _ = build_replay(args_for(tmp_path / "dict", tmp_path / "files"), tokenizer)
    assert sorted(answers(dataset, tokenizer)) == sorted([f"train{i}" for i in range(3)] * 2)


def test_messages_from_parquet(tmp_path):
    # Arrow fills keys that some messages lack with null: that is no error unless the key is role or content.
    turns = [{"role": "user", "content": "yes?", "name": "Ann"}, {"role": "assistant", "content": "yes"}]
    datasets.Dataset.from_list([{"messages": turns}]).to_parquet(tmp_path / "chat.parquet")
    tokenizer = byte_level(template=CHAT)
    dataset, _ = build_replay(args_for(tmp_path / "chat.parquet"), tokenizer)
    assert answers(dataset, tokenizer) == ["yes"]


# Collator


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


def test_tokenizer_without_eos_warns(tmp_path, caplog):
    tokenizer = word_level()
    tokenizer.eos_token = None
    dataset, _ = build_replay(args_for(write(tmp_path / "a.json", [{"text": "a b"}])), tokenizer)
    assert len(dataset[0]["input_ids"]) == 2 and "no EOS token" in caplog.text


# Flags


def test_flags_come_from_the_command_line():
    parser = HfArgumentParser(DataArguments)
    line = "--dataset_name a.json b.json --max_examples 5 7 --dataset_ratio 0.5 --max_length 64"
    [args] = parser.parse_args_into_dataclasses(line.split())
    first, second = args.replay_sets()
    assert (first.name, first.split, first.max_examples, first.ratio) == ("a.json", "train", 5, 0.5)
    assert (second.name, second.split, second.max_examples, second.ratio) == ("b.json", "train", 7, 0.5)
    assert (args.max_length, args.dataset_seed, args.eval_sets()) == (64, 42, [])
    defaults = DataArguments(dataset_name=["a.json"])
    assert (defaults.max_examples, defaults.max_length) == ([300], 1024)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"max_examples": [1, 2, 3]}, r"--max_examples has 3 values, but --dataset_name has 2: give one"),
        ({"dataset_split": []}, r"--dataset_split has 0 values, but --dataset_name has 2"),
        ({"max_examples": [0]}, r"--max_examples has the value 0: give an integer of at least 1"),
        ({"max_examples": [2.5]}, r"--max_examples has the value 2\.5"),
        ({"max_examples": True}, r"--max_examples has the value True"),
        ({"dataset_ratio": [0.0]}, r"--dataset_ratio has the value 0\.0: give a fraction"),
        ({"dataset_ratio": [0.5, 1.5]}, r"--dataset_ratio has the value 1\.5"),
        ({"dataset_ratio": [float("nan")]}, r"--dataset_ratio has the value nan"),
        ({"dataset_split": [""]}, r"--dataset_split has the value ''"),
        ({"dataset_config": ["x", None]}, r"--dataset_config has the value None"),
        ({"dataset_split": None}, r"--dataset_split is None: give one or more values"),
        ({"max_length": 1}, r"--max_length is 1: give an integer of at least 2"),
        ({"max_length": "1024"}, r"--max_length is '1024'"),
        ({"dataset_seed": -1}, r"--dataset_seed is -1: give an integer of at least 0"),
        (
            {"eval_dataset_name": ["x"], "eval_split": ["a", "b"]},
            r"--eval_split has 2 values, but --eval_dataset_name",
        ),
    ],
)
def test_flag_out_of_range_raises(values, match):
    with pytest.raises(ValueError, match=match):
        DataArguments(**{"dataset_name": ["a.json", "b.json"], **values})


def test_single_value_for_a_list_flag_is_a_list_of_one():
    args = DataArguments(dataset_name="a.json", max_examples=5, dataset_ratio=1)
    assert (args.dataset_name, args.max_examples, args.replay_sets()[0].ratio) == (["a.json"], [5], 1.0)


def test_no_data_set_raises():
    with pytest.raises(ValueError, match="--dataset_name is missing"):
        build_replay(DataArguments(), word_level())
    with pytest.raises(ValueError, match="--eval_dataset_name is missing"):
        build_eval(DataArguments(), word_level())


# Bad input


def refused(path, match, tokenizer=None, **kwargs):
    """The message is one line, holds the full path, and says what `match` says."""
    with pytest.raises(ValueError, match=match) as caught:
        build_replay(args_for(path, **kwargs), tokenizer or word_level())
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["gone.json", "gone.jsonl", "gone.txt", "sub/gone.csv"])
def test_missing_file_raises(tmp_path, name, monkeypatch):
    refused(tmp_path / name, "replay file .* does not exist: check the path")
    monkeypatch.chdir(tmp_path)
    for relative in (name, f"./{name}"):
        with pytest.raises(ValueError, match=f"replay file {tmp_path / name} does not exist"):
            load_records(relative)
    with pytest.raises(ValueError, match=f"eval file {tmp_path / name} does not exist"):
        build_eval(DataArguments(eval_dataset_name=[name]), word_level())


@pytest.mark.parametrize("name", ["user/nowhere", "nowhere"])
def test_hub_id_offline_raises(name):
    with pytest.raises(
        ValueError, match=f"data set '{name}' is neither a local file or folder nor reachable on the Hub"
    ):
        build_replay(args_for(name), word_level())


@pytest.mark.parametrize("content", ["", " \n\n", "\ufeff"])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv"])
def test_empty_file_raises(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    refused(tmp_path / name, "is empty: leave it out or fill it")


@pytest.mark.parametrize(("name", "content"), [("a.json", "[]"), ("b.json", '{"data": []}'), ("a.csv", "text\n")])
def test_file_without_records_raises(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    refused(tmp_path / name, "holds no records")


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.jsonl", '{"text": "a"}\n\n{"text": b}\n', r"not valid JSON at line 3, column 10 \(Expecting value\)"),
        ("b.json", '{"text": "a"}\n{"text": "b"\n', r"not valid JSON at line 2, column 13"),
        ("c.json", '[\n {"text": "a"},\n {"text" "b"}\n]', r"not valid JSON at line 3, column 10 \(Expecting ':'"),
        ("d.json", "hello", r"not valid JSON at line 1, column 1"),
        ("e.jsonl", '{"text": "a"}\n["b"]\n', r"line 2 is of type list, not an object"),
        (
            "f.json",
            '[{"text": "a"}, "b"]',
            r"item at index 1 is of type str, not an object",
        ),
        ("g.json", "[null]", r"index 0"),
        ("h.json", "3", r"is of type int: make it a list of objects"),
        ("i.json", '{"a": [{}], "b": [{}]}', r"an object with 2 lists and no known columns \(found: a, b\)"),
        ("j.json", "[" * 100_000, r"nested too deeply"),
        ("k.json", f"[{'9' * 5000}]", r"holds a value that cannot be read"),
        ("l.csv", 'text,id\na,1\n"b\nc,2\n', r"not valid CSV from line 3 on"),
        ("m.csv", "prompt,completion\na,b\na,b,c\n", r"line 3 has 3 fields, but the header has 2: quote fields"),
        ("n.csv", "prompt,completion\na\n", r"line 2 has 1 fields, but the header has 2"),
        ("o.parquet", "", r"is empty: leave it out or fill it"),
        ("o.parquet", "hello", r"not a readable parquet file"),
        ("p.txt", "hello", r"has the extension '.txt': give one of .json, .jsonl, .csv, .parquet"),
    ],
)
def test_unparseable_file_raises(tmp_path, name, content, match):
    (tmp_path / name).write_text(content)
    refused(tmp_path / name, match)


def test_file_that_is_not_utf8_raises(tmp_path):
    (tmp_path / "a.json").write_bytes('[{"text": "ä"}]'.encode("latin-1"))
    refused(tmp_path / "a.json", r"not UTF-8 \(byte 0xe4 at offset 11\): convert it")


def test_no_known_columns_raises(tmp_path):
    path = write(tmp_path / "a.json", [{"question": "q0", "answer": "a"}])
    refused(path, r"no known columns \(found: question, answer\): give it `messages`, `prompt` and `completion`")
    refused(write(tmp_path / "b.json", [{}]), r"no known columns \(found: none\)")


GOOD = {"prompt": "q0", "completion": " a"}
USER = {"role": "user", "content": "q0"}


@pytest.mark.parametrize(
    ("first", "second", "match"),
    [
        (GOOD, {"prompt": "q0", "completion": None}, r"`completion` is null: make it a string"),
        (GOOD, {"prompt": 3, "completion": "a"}, r"`prompt` is of type int"),
        (GOOD, {"prompt": "q0"}, r"the column `completion` is missing \(found: prompt\), but the first record has it"),
        (
            GOOD,
            {"prompt": [USER], "completion": "a"},
            r"`prompt` and `completion` are of type list and of type str: make both",
        ),
        (GOOD, {"prompt": "\ud800", "completion": "a"}, r"`prompt` holds half a surrogate pair at character 0"),
        ({"text": "a"}, {"text": ["a"]}, r"`text` is of type list"),
        (UIE, {**UIE, "output": None}, r"`output` is null"),
        (UIE, {**UIE, "input": 1.5}, r"`input` is of type float"),
        (UIE, {**UIE, "history": "x"}, r"`history` is of type str: make it a list of \[prompt, answer\] pairs"),
        (UIE, {**UIE, "history": [["x"]]}, r"`history\[0\]` is a list of 1: make it a pair"),
        (UIE, {**UIE, "history": [["x", None]]}, r"`history\[0\]\[1\]` is null"),
        ({"messages": [USER]}, {"messages": "x"}, r"`messages` is of type str: make it a list of messages"),
        ({"messages": [USER]}, {"messages": ["x"]}, r"`messages\[0\]` is of type str: make it an object"),
        ({"messages": [USER]}, {"messages": [{"role": "user"}]}, r"`messages\[0\]` has no `content` \(found: role\)"),
        ({"messages": [USER]}, {"messages": [USER, {**USER, "content": None}]}, r"`messages\[1\].content` is null"),
    ],
)
def test_bad_field_raises(tmp_path, first, second, match):
    # Whether the record would be drawn or not: the message is the same for every seed.
    records = [first, second, *[first] * 20]
    refused(write(tmp_path / "a.json", records), rf"a\.json, record 2: {match}", max_examples=1)
    lines = write(tmp_path / "b.jsonl", records)
    refused(lines, rf"b\.jsonl, line 2: {match}", max_examples=1)


def test_bad_field_in_parquet_raises(tmp_path):
    datasets.Dataset.from_list([GOOD, {**GOOD, "completion": None}]).to_parquet(tmp_path / "a.parquet")
    refused(tmp_path / "a.parquet", r"a\.parquet, record 2: `completion` is null")
    datasets.Dataset.from_list([{"text": 1}]).to_parquet(tmp_path / "b.parquet")
    refused(tmp_path / "b.parquet", r"record 1: `text` is of type int")


def test_all_examples_too_long_raises(tmp_path):
    records = [{"prompt": "q0 " * n, "completion": " a"} for n in (9, 7, 8)]
    path = write(tmp_path / "a.json", records)
    refused(path, r"all examples are too long for --max_length 5, .* raise it to 8 at least", max_length=5)
    dataset, _ = build_replay(args_for(path, max_length=8), word_level())  # the remedy works
    assert len(dataset) == 1


def test_all_answers_empty_raises(tmp_path):
    path = write(tmp_path / "a.json", [{"prompt": "q0", "completion": " "}])
    refused(path, r"every sampled answer is empty")


def test_messages_without_template_raises(tmp_path):
    turns = [USER, {"role": "assistant", "content": "a"}]
    match = r"needs a chat template, and this tokenizer has none: use `prompt` and `completion` strings"
    refused(write(tmp_path / "a.json", [{"messages": turns}]), match)
    refused(write(tmp_path / "b.json", [{"prompt": turns[:1], "completion": turns[1:]}]), match)


def test_template_that_rewrites_earlier_turns_raises(tmp_path):
    turns = [USER, {"role": "assistant", "content": "a"}, USER, {"role": "assistant", "content": "b"}]
    match = r"record 1: .* writes message 2 differently .* mark them with \{% generation %\}"
    refused(write(tmp_path / "a.json", [{"messages": turns}]), match, word_level(LAST_DIFFERS))
    # The last turn alone can be found.
    split = {"prompt": turns[:3], "completion": turns[3:]}
    assert labelled(split, byte_level(template=LAST_DIFFERS)) == ["(thinks) b</s>"]


def test_template_that_refuses_the_conversation_raises(tmp_path):
    turns = [USER, USER, {"role": "assistant", "content": "a"}]
    path = write(tmp_path / "a.jsonl", [{"messages": turns}])
    refused(path, r"line 1: .* refuses the conversation \(roles must alternate\)", word_level(ALTERNATES))


def test_assistant_first_raises(tmp_path):
    path = write(tmp_path / "a.json", [{"messages": [{"role": "assistant", "content": "a"}, USER]}])
    refused(path, "starts with an assistant turn", word_level(CHAT))


def test_slice_of_a_local_file_raises(tmp_path):
    path = write(tmp_path / "a.json", [GOOD])
    refused(path, r"has no splits, but --dataset_split slices one \('train\[:10%\]'\)", dataset_split="train[:10%]")


def test_bad_folder_raises(tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "replay folder .* holds no data set that can be read")
    splits = datasets.DatasetDict({"test": datasets.Dataset.from_list([GOOD])})
    splits.save_to_disk(tmp_path / "dict")
    refused(tmp_path / "dict", r"has no split 'train': set --dataset_split to one of test")
    (tmp_path / "files").mkdir()
    write(tmp_path / "files" / "test.jsonl", [GOOD])
    refused(
        tmp_path / "files", r"no configuration None with split 'train' .* check --dataset_config and --dataset_split"
    )
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.jsonl").write_text('{"text": \n')
    refused(tmp_path / "broken", "holds a file that cannot be read")
