"""Soft labels from recipes/label.py to a training: read, aligned, mapped, kept, recorded; and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoTokenizer, PretrainedConfig

from heterofusion.data.labels import (
    SOFT_COLUMNS,
    SOFT_IDS,
    SOFT_POSITIONS,
    SOFT_PROBS,
    SourceLabelArguments,
    build_labels,
)
from heterofusion.data.replay import DataArguments
from heterofusion.experts.soft import add_soft_labels
from heterofusion.experts.token_alignment import Aligner
from heterofusion.runtime.loading import check_token_ids
from heterofusion.zoo import zoo_path
from label_runner import COUNT, read_labels
from recipe_runner import SIZES, flags, succeeds, train, write_replay

pytest_plugins = ["label_runner"]
pytestmark = pytest.mark.usefixtures("logging_restored")


@pytest.fixture(scope="module")
def labelled(whole) -> Path:
    """Labels of two tasks by experts of two families, with soft labels."""
    return whole[1]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(zoo_path("llama"))


def arguments(folder: Path, cache: Path, *names: str) -> SourceLabelArguments:
    files = [str(folder / f"{name}.jsonl") for name in names or ("ner_garden", "re_market")]
    return SourceLabelArguments(files, label_loss="soft", logits_cache=str(cache))


def softened(folder: Path, cache: Path, tokenizer, *names: str, max_length: int = 256) -> tuple[Dataset, dict, str]:
    args = arguments(folder, cache, *names)
    return add_soft_labels(build_labels(args, DataArguments(max_length=max_length), tokenizer), args, tokenizer)


def test_soft_labels_are_of_the_tokens_that_they_stand_at(labelled, tokenizer, tmp_path):
    """Labels are greedy: what the source finds most probable is the label's token, in the target's vocabulary too."""
    examples, record, line = softened(labelled, tmp_path, tokenizer)
    number = 0
    for row in examples:
        assert row[SOFT_POSITIONS] == sorted(set(row[SOFT_POSITIONS]))
        assert len(row[SOFT_POSITIONS]) == len(row[SOFT_IDS]) == len(row[SOFT_PROBS])
        for place, ids, probs in zip(*(row[name] for name in SOFT_COLUMNS), strict=True):
            assert ids[0] == row["labels"][place] == row["input_ids"][place]
            assert sum(probs) == pytest.approx(1, abs=1e-5) and max(probs) == probs[0] and min(probs) >= 0
            number += 1
    tokens = sum(label != -100 for row in examples for label in row["labels"])
    assert record["soft"] == pytest.approx(number / tokens) and 0.5 < record["soft"] <= record["one_to_one"]
    assert record["examples"] == {"ner_garden": COUNT, "re_market": COUNT}
    assert (record["weight"], record["top_k"]) == (0.5, 4)
    assert f"soft labels of {2 * COUNT} examples: {record['one_to_one']:.1%}" in line


def test_soft_label_that_the_base_has_no_embedding_for_raises():
    rows = Dataset.from_list([{"input_ids": [1, 2], "labels": [-100, 2], SOFT_IDS: [[2, 70]]}])
    with pytest.raises(ValueError, match="gave token id 70, but the vocabulary"):
        check_token_ids([rows], PretrainedConfig(vocab_size=70))


def test_result_is_kept_and_made_anew_for_other_labels(labelled, tokenizer, tmp_path, monkeypatch):
    examples, record, _ = softened(labelled, tmp_path, tokenizer)
    with monkeypatch.context() as patched:
        patched.setattr(Aligner, "distributions", None)
        again, found, _ = softened(labelled, tmp_path, tokenizer)
        assert again[:] == examples[:] and found == record
    one, record, _ = softened(labelled, tmp_path, tokenizer, "ner_garden")
    assert len(one) == COUNT and record["examples"] == {"ner_garden": COUNT}
    wanted = {tuple(row["input_ids"]): row for row in examples}
    assert all(row == wanted[tuple(row["input_ids"])] for row in one)


def change_label(folder: Path) -> None:
    rows = read_labels(folder, "ner_garden")
    rows[2]["completion"] = " None"
    (folder / "ner_garden.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


DAMAGES = {
    "no store": (lambda f: shutil.rmtree(f / "soft"), r"no soft labels beside the files in .*--top_k_logits"),
    "other label": (change_label, r"ner_garden\.jsonl, line 3 is not a label that the soft labels"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "soft/tokenizers/ner_garden"), r"tokenizer of .* cannot be loaded"),
    "unknown file": (lambda f: (f / "re_market.jsonl").rename(f / "mine.jsonl"), r"mine\.jsonl.* is not a label"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_store_of_other_labels_raises(labelled, tokenizer, tmp_path, damage):
    change, words = DAMAGES[damage]
    copied = Path(shutil.copytree(labelled, tmp_path / "copy"))
    change(copied)
    with pytest.raises(ValueError, match=words):
        softened(copied, tmp_path / "cache", tokenizer, *(path.stem for path in copied.glob("*.jsonl")))
    assert not list(tmp_path.glob("cache/soft-targets*"))


def run_values(labelled: Path, folder: Path) -> dict:
    return {
        "model_name_or_path": zoo_path("llama"), "dataset_name": [write_replay(folder / "replay.json")],
        "source_labels": [labelled / "ner_garden.jsonl", labelled / "re_market.jsonl"], "label_loss": "soft",
        "soft_weight": 0.25, "logits_cache": folder / "cache", "output_dir": folder / "out", "use_cpu": True,
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 2, "logging_steps": 1,
    }  # fmt: skip


def test_fusion_is_trained_and_recorded(labelled, tmp_path):
    values = run_values(labelled, tmp_path) | SIZES | {
        "target_adapter": zoo_path("llama", "ner_kitchen"), "source_adapters": [zoo_path("qwen2", "ner_garden")],
    }  # fmt: skip
    log = succeeds(train.main, flags(values))
    assert f"soft labels of {2 * COUNT} examples" in log
    record = json.loads((tmp_path / "out" / "fusion.json").read_text())["training"]["source_labels"]
    assert record["loss"] == "soft" and record["soft"]["weight"] == 0.25 and record["soft"]["soft"] > 0.5
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"At {record['soft']['soft']:.1%} of the labels' tokens" in card and "weight 0.25" in card
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert sum({"loss_replay", "loss_labels", "loss_soft"} <= set(line) for line in history) == 2


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"label_loss": "soft"}, ["--label_loss is soft", "no soft labels beside", "--top_k_logits"]),
        ({"label_loss": "soft", "soft_weight": 2}, ["--soft_weight is 2.0", "at least 0 and at most 1"]),
        ({"label_loss": "soft", "label_smoothing_factor": 0.1}, ["--label_smoothing_factor is 0.1"]),
        ({"label_loss": "soft", "logits_cache": "FILE"}, ["--logits_cache", "is a file"]),
        ({"soft_weight": 0.2}, ["--soft_weight is 0.2", "--label_loss is hard"]),
        ({"label_loss": "soft", "source_labels": None}, ["--label_loss is soft", "--source_labels is not given"]),
    ],
    ids=str,
)
def test_training_refuses(fails, tmp_path, changed, words):
    file = tmp_path / "labels.jsonl"
    file.write_text(json.dumps({"prompt": "w10 w4 w5", "completion": " w10 w6"}) + "\n")
    values = {"source_labels": [file], **changed}
    fails(*words, **{name: file if value == "FILE" else value for name, value in values.items()})
