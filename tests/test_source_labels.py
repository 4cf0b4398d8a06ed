"""Source labels as data: which are kept, what is counted, recorded and refused; recipes/train.py with them."""

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from heterofusion.data.labels import SourceLabelArguments, build_labels
from heterofusion.data.replay import DataArguments
from recipe_runner import (
    MISTRAL,
    QWEN,
    SIZES,
    TARGET,
    flags,
    save_tokenizer,
    succeeds,
    train,
    write_replay,
)

pytestmark = pytest.mark.usefixtures("logging_restored")


def label(number: int, source: str = "qwen", task: str = "town", sure: float = -0.1, good: bool = True) -> dict:
    """A line as recipes/label.py writes it."""
    return {
        "prompt": f"w{number} w4 w5", "completion": f" w{number} w6", "task": task, "kind": "RE", "source": source,
        "log_probability": sure, "format_ok": good,
    }  # fmt: skip


def write_labels(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def build(tokenizer, *files: Path, max_length: int = 64, **values):
    arguments = SourceLabelArguments(source_labels=list(map(str, files)), **values)
    found = build_labels(arguments, DataArguments(max_length=max_length), tokenizer)
    return found.examples, found.reports


def prompts(dataset, tokenizer) -> set[str]:
    return {tokenizer.decode(ids[:1]) for ids in dataset["input_ids"]}


def test_folder_of_labels_stands_for_its_files(tokenizer, tmp_path):
    """Those of tasks that got some; a limit per name holds for each of them."""
    for name, first in (("a", 10), ("b", 13)):
        write_labels(tmp_path / f"{name}.jsonl", *(label(number) for number in range(first, first + 3)))
    tasks = {"a": {"labels": 3}, "b": {"labels": 3}, "c": {"labels": 0}}
    (tmp_path / "labels.json").write_text(json.dumps({"tasks": tasks}))
    dataset, reports = build(tokenizer, tmp_path)
    assert prompts(dataset, tokenizer) == {f"w{number}" for number in range(10, 16)}
    assert [Path(report.name).name for report in reports] == ["a.jsonl", "b.jsonl"]
    assert len(build(tokenizer, tmp_path, source_labels_max_examples=[2])[0]) == 4
    (tmp_path / "labels.json").write_text(json.dumps({"tasks": {"c": {"labels": 0}}}))
    with pytest.raises(ValueError, match=r"tells of no labels; label more prompts"):
        build(tokenizer, tmp_path)


MIXED = [
    label(10), label(11, sure=-2.0), label(12, good=False), label(13, task="stage"),
    label(14, source="mistral"),
    label(15, good=False, sure=-2.0), label(16, source="mistral", sure=-0.3),
]  # fmt: skip


@pytest.mark.parametrize(
    ("values", "kept", "malformed", "unsure"),
    [
        ({}, "w10 w11 w13 w14 w16", 2, 0),
        ({"min_log_probability": -0.3}, "w10 w13 w14 w16", 2, 1),
        ({"keep_malformed": True}, "w10 w11 w12 w13 w14 w15 w16", 0, 0),
        ({"keep_malformed": True, "min_log_probability": -0.2}, "w10 w12 w13 w14", 0, 3),
    ],
    ids=str,
)
def test_labels_that_are_not_good_enough_are_dropped_and_counted(tokenizer, tmp_path, values, kept, malformed, unsure):
    dataset, (report,) = build(tokenizer, write_labels(tmp_path / "labels.jsonl", *MIXED), **values)
    assert prompts(dataset, tokenizer) == set(kept.split())
    assert (report.read, report.malformed, report.unsure, report.kept) == (7, malformed, unsure, len(kept.split()))


def test_kept_labels_are_counted_by_source_and_task(tokenizer, tmp_path):
    rows = [*MIXED, {"prompt": "w20", "completion": " w21"}, {"prompt": "w20", "completion": " "}]
    _, (report,) = build(tokenizer, write_labels(tmp_path / "labels.jsonl", *rows))
    assert report.by_source == {"mistral": {"town": 2}, "not named": {"not named": 1}, "qwen": {"stage": 1, "town": 2}}
    assert (report.kept, report.dropped_empty) == (6, 1)


def test_examples_are_those_of_the_replay(tokenizer, tmp_path):
    """The loss is on the answers only, and what is cut is counted as for the replay."""
    dataset, (report,) = build(tokenizer, write_labels(tmp_path / "labels.jsonl", label(10), label(11)), max_length=5)
    row = dataset[0]
    assert len(row["input_ids"]) == 5 and row["labels"] == [-100, -100, -100, *row["input_ids"][3:]]
    assert (report.cut, report.cut_tokens, report.dropped) == (2, 2, 0)


def test_sample_is_taken_of_the_good_ones_for_each_file(tokenizer, tmp_path):
    rows = [label(10 + i, good=i % 2 == 0) for i in range(20)]
    first, second = (write_labels(tmp_path / name, *rows) for name in ("a.jsonl", "b.jsonl"))
    dataset, reports = build(tokenizer, first, second, source_labels_max_examples=[4, 7])
    assert [report.kept for report in reports] == [4, 7] and len(dataset) == 11
    again, reports = build(tokenizer, first, second, source_labels_max_examples=4)
    assert [report.kept for report in reports] == [4, 4]
    assert prompts(again, tokenizer) <= prompts(dataset, tokenizer)  # a larger number only adds


# ---- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"format_ok": "yes"}, "line 2: `format_ok` is 'yes'"),
        ({"log_probability": "high"}, "line 2: `log_probability` is 'high'"),
        ({"log_probability": True}, "line 2: `log_probability` is True"),
        ({"log_probability": float("nan")}, "line 2: `log_probability` is nan"),
        ({"completion": None}, "line 2: `completion` is null"),
    ],
    ids=str,
)
def test_broken_label_raises(tokenizer, tmp_path, row, words):
    path = write_labels(tmp_path / "labels.jsonl", label(10), {**label(11), **row})
    with pytest.raises(ValueError, match=words):
        build(tokenizer, path)


@pytest.mark.parametrize(
    ("rows", "values", "words"),
    [
        ([label(10), {"prompt": "w4", "completion": " w5"}], {"min_log_probability": -1.0},
         r"line 2: --min_log_probability is -1\.0, but the label has no"),
        ([label(10, good=False), label(11, sure=-3.0)], {"min_log_probability": -1.0},
         r"of 2 1 are malformed \(--keep_malformed true keeps them\) and 1 below --min_log_probability -1\.0"),
        ([label(10)], {"max_length": 3}, r"too long for --max_length 3.*raise it to 4 at least"),
        ([{**label(10), "completion": ""}], {}, "every sampled answer is empty"),
    ],
    ids=str,
)  # fmt: skip
def test_nothing_left_raises(tokenizer, tmp_path, rows, values, words):
    with pytest.raises(ValueError, match=words):
        build(tokenizer, write_labels(tmp_path / "labels.jsonl", *rows), **values)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"source_labels": ["missing.jsonl"]}, ["--source_labels", "missing.jsonl", "does not exist"]),
        ({"source_labels": ["."]}, ["--source_labels", "is a folder without labels.json"]),
        ({"keep_malformed": True}, ["--keep_malformed is True", "--source_labels is not given"]),
        ({"source_labels": "FILE", "replay_fraction": 1.0}, ["--replay_fraction is 1.0", "below 1"]),
        ({"source_labels": "FILE", "replay_fraction": 0}, ["--replay_fraction is 0", "--dataset_name"]),
        ({"source_labels": "FILE", "dataset_name": None, "replay_fraction": 0.5}, ["no replay", "--dataset_name"]),
        ({"source_labels": "FILE", "min_log_probability": 0.5}, ["--min_log_probability is 0.5", "at most 0"]),
        ({"source_labels": "FILE", "source_labels_max_examples": 0}, ["--source_labels_max_examples", "at least 1"]),
        ({"source_labels": "FILE", "source_labels_max_examples": [1, 2]}, ["has 2 values", "has 1"]),
        ({"source_labels": "FILE", "train_sampling_strategy": "sequential"}, ["--train_sampling_strategy"]),
        ({"source_labels": "FILE", "use_liger_kernel": True}, ["--use_liger_kernel"]),
        ({"source_labels": "BROKEN"}, ["no known columns (found: question, source)", "`prompt` and `completion`"]),
        ({"dataset_name": None}, ["--dataset_name is missing"]),
    ],
    ids=str,
)
def test_training_refuses(fails, tmp_path, changed, words):
    files = {
        "FILE": write_labels(tmp_path / "labels.jsonl", label(10)),
        "BROKEN": write_labels(tmp_path / "broken.jsonl", {"question": "w4", "source": "qwen"}),
    }
    if isinstance(changed.get("source_labels"), str):
        changed = {**changed, "source_labels": [files[changed["source_labels"]]]}
    fails(*words, **changed)


# ---- recipes/train.py -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(base_dir, tmp_path_factory) -> SimpleNamespace:
    """Two steps on replay and source labels."""
    folder = tmp_path_factory.mktemp("labelled")
    values = {
        "model_name_or_path": base_dir, "target_adapter": TARGET, "source_adapters": [QWEN, MISTRAL],
        "dataset_name": [write_replay(folder / "replay.json")], "output_dir": folder / "out", "use_cpu": True,
        "source_labels": [write_labels(folder / "labels.jsonl", *MIXED)], "min_log_probability": -1, "max_steps": 2,
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "logging_steps": 1, **SIZES,
    }  # fmt: skip
    log = succeeds(train.main, flags(values))
    return SimpleNamespace(
        folder=folder, out=folder / "out", log=log, values=values,
        record=json.loads((folder / "out" / "fusion.json").read_text()),
    )  # fmt: skip


def test_record_says_what_the_labels_were(finished):
    record = finished.record["training"]["source_labels"]
    (file,) = record["files"]
    assert (record["replay_fraction"], record["loss"], record["kept"]) == (0.6, "hard", 4)
    assert file["name"] == "labels.jsonl" and str(finished.folder) not in json.dumps(finished.record)
    assert file["sha256"] == hashlib.sha256((finished.folder / "labels.jsonl").read_bytes()).hexdigest()
    assert (file["read"], file["malformed"], file["unsure"], file["kept"]) == (7, 2, 1, 4)
    assert file["by_source"] == {"mistral": {"town": 2}, "qwen": {"stage": 1, "town": 1}}
    assert finished.record["training"]["replay"]["datasets"][0]["kept"] == 6
    assert finished.record["made_by"]["ran_source_models"] is True


def test_log_and_card_name_them(finished):
    assert "2 malformed and 1 not sure enough dropped; 7 read, 4 sampled" in finished.log
    assert "kept by source and task: mistral: 2 town; qwen: 1 stage, 1 town" in finished.log
    card = (finished.out / "README.md").read_text()
    assert "4 source labels (labels.jsonl)" in card and "60.0% of the examples" in card
    history = json.loads((finished.out / "trainer_state.json").read_text())["log_history"]
    assert sum({"loss_replay", "loss_labels"} <= set(line) for line in history) == 2


def test_labels_alone_are_enough(finished, tmp_path):
    values = {**finished.values, "dataset_name": None, "output_dir": tmp_path / "out", "source_control": "noise"}
    log = succeeds(train.main, flags({**values, "max_steps": 1}))
    assert "the source labels are still theirs" in log
    record = json.loads((tmp_path / "out" / "fusion.json").read_text())["training"]
    assert record["replay"] == {} and record["source_labels"]["replay_fraction"] == 0
    assert "without any replay" in (tmp_path / "out" / "README.md").read_text()
