"""recipes/glue/prepare.py: the GLUE data sets become verbalized question answering."""

import functools
import hashlib
import json
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from heterofusion.evaluation.glue import GLUE_LABELS
from heterofusion.evaluation.metrics import GLUEText
from preparation_runner import check_accounts, check_replay_keeps_all, fails, glue, prepare, written
from recipe_runner import flags
from replay_builders import write

pytestmark = pytest.mark.usefixtures("logging_restored", "offline_datasets")
glue_fails = functools.partial(fails, glue.main, tasks=["cola"])


def rows_of(task: str, count: int, first: int = 0) -> list[dict]:
    """Records of a task as GLUE has them."""
    labels = len(GLUE_LABELS[task])
    return [
        {
            **{column: f"{title} number {i} ." for column, title in glue.QUESTIONS[task][1].items()},
            "label": i % labels if labels else (i % 26) / 5,
            "idx": i,
        }
        for i in range(first, first + count)
    ]


def write_task(root: Path, task: str, train=None, test=None, suffix: str = ".jsonl") -> Path:
    folder = root / task
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", train), (glue.TEST_SPLITS[task], test)):
        if rows is not None:
            write(folder / f"{split}{suffix}", rows)
    return folder


def as_dataset(task: str, rows: list[dict], names: list[str] | None = None) -> Dataset:
    """Rows with the features that the Hub's files have."""
    names = names or [label.replace(" ", "_") for label in GLUE_LABELS[task]]
    features = {column: Value("string") for column in glue.QUESTIONS[task][1]}
    features["label"] = ClassLabel(names=names) if names else Value("float32")
    return Dataset.from_list(rows, features=Features({**features, "idx": Value("int32")}))


@pytest.fixture
def data(tmp_path) -> Path:
    """Two of the tasks, with 40 and 8 records each."""
    root = tmp_path / "glue"
    for task in ("cola", "rte"):
        write_task(root, task, rows_of(task, 40), rows_of(task, 8, 100))
    return root


def run(data: Path | None, output: Path, **values) -> tuple[dict, str]:
    return prepare(glue.main, output, dataset_path=data, **{"num_replay": 10, "tasks": ["cola", "rte"], **values})


# ---- what is written --------------------------------------------------------------------------------------------


def test_prompts_and_answers(data, tmp_path):
    out = tmp_path / "out"
    run(data, out)
    assert written(out, "test/cola")[:2] == [
        {
            "prompt": "Is this sentence acceptable English grammar?\nOption: unacceptable, acceptable\n"
            f"Sentence: Sentence number {number} .\nAnswer:",
            "completion": completion,
            "task": "cola",
            "kind": "GLUE",
        }
        for number, completion in ((100, " unacceptable"), (101, " acceptable"))
    ]


def test_files_and_manifest(data, tmp_path, capsys):
    manifest, log = run(data, tmp_path / "out", num_test=5)
    assert list(manifest["tasks"]) == ["cola", "rte"] and log == ""
    for name, task in manifest["tasks"].items():
        records = {file.split("/")[0]: entry["records"] for file, entry in task["files"].items()}
        assert records == {"replay": 10, "train": 36, "validation": 4, "test": 5}  # a tenth of train is validation
        assert task["labels"] == list(GLUE_LABELS[name]) and task["source"] == name
        train = (data / name / "train.jsonl").read_bytes()
        assert task["inputs"]["train.jsonl"] == hashlib.sha256(train).hexdigest() and len(task["inputs"]) == 2
    check_accounts(manifest)
    assert str(tmp_path) not in (tmp_path / "out" / "manifest.json").read_text()
    capsys.readouterr()
    assert glue.main(flags({"dataset_path": data, "output_dir": tmp_path / "table", "tasks": ["rte"]})) == 0
    assert capsys.readouterr().out.splitlines() == [
        "| task | read | cut for validation | replay | train | validation | test |",
        "|---|---|---|---|---|---|---|",
        "| rte | 40 + 8 | 4 | 36 | 36 | 4 | 8 |",
        f"written to {tmp_path / 'table'}",
    ]


@pytest.mark.parametrize("task", list(glue.QUESTIONS))
def test_every_task_is_read_whole_and_answers_itself(tmp_path, task):
    write_task(tmp_path / "glue", task, rows_of(task, 60), rows_of(task, 30, 100))
    out = tmp_path / "out"
    manifest, _ = run(tmp_path / "glue", out, tasks=[task])
    check_accounts(manifest)
    check_replay_keeps_all(out)
    answers = [row["completion"] for row in written(out, f"test/{task}")]
    assert len(answers) == 30
    scores = GLUEText(task).compute(predictions=answers, references=answers)
    assert scores["format_failure_rate"] == 0
    assert scores.get("accuracy", scores.get("pearson")) == pytest.approx(1)
    if task != "stsb":
        assert set(answers) == {f" {label}" for label in GLUE_LABELS[task]}
        for answer in set(answers):
            assert GLUEText(task).compute(predictions=[answer], references=[answer])["accuracy"] == 1


def test_parquet_parts_give_the_same_files_as_json_lines(data, tmp_path):
    other = tmp_path / "parquet" / "cola"
    other.mkdir(parents=True)
    rows = rows_of("cola", 40)
    as_dataset("cola", rows[:25]).to_parquet(str(other / "train-00000-of-00002.parquet"))
    as_dataset("cola", rows[25:]).to_parquet(str(other / "train-00001-of-00002.parquet"))
    as_dataset("cola", rows_of("cola", 8, 100)).to_parquet(str(other / "validation-00000-of-00001.parquet"))
    as_dataset("cola", [{**rows[0], "label": -1}]).to_parquet(str(other / "test-00000-of-00001.parquet"))
    run(data, tmp_path / "a", tasks=["cola"])
    manifest, _ = run(other.parent, tmp_path / "b", tasks=["cola"])
    for name in ("replay", "train", "validation", "test"):
        assert written(tmp_path / "a", f"{name}/cola") == written(tmp_path / "b", f"{name}/cola")
    assert sorted(manifest["tasks"]["cola"]["inputs"]) == [
        "train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "validation-00000-of-00001.parquet",
    ]  # fmt: skip


def test_data_set_of_the_hub(data, tmp_path, monkeypatch):
    asked = []

    def load_dataset(name, config, split, revision):
        asked.append((name, config, split, revision))
        return as_dataset(config, rows_of(config, *((40,) if split == "train" else (8, 100))))

    monkeypatch.setattr("heterofusion.data.files.load_dataset", load_dataset)
    manifest, _ = run(None, tmp_path / "hub", dataset_revision="main")
    assert asked == [
        ("nyu-mll/glue", task, split, "main") for task in ("cola", "rte") for split in ("train", "validation")
    ]
    run(data, tmp_path / "local")
    for name in ("replay/cola", "train/rte", "test/rte"):
        assert written(tmp_path / "hub", name) == written(tmp_path / "local", name)
    task = manifest["tasks"]["cola"]
    assert task["source"] == "nyu-mll/glue/cola" and list(task["inputs"]) == ["train", "validation"]


def test_records_without_text_or_label_are_counted(data, tmp_path):
    rows = rows_of("rte", 8, 100)
    rows[0]["sentence1"], rows[1]["sentence2"], rows[2]["label"], rows[3]["label"] = " ", None, -1, None
    write_task(data, "rte", test=rows)
    manifest, _ = run(data, tmp_path / "out", tasks=["rte"])
    assert manifest["tasks"]["rte"]["splits"]["test"] == {
        "read": 8, "without_text": 2, "without_answer": 2, "kept": 4,
    }  # fmt: skip


# ---- refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"label": 2}, ["`label` is 2", "one of 0 (unacceptable), 1 (acceptable)"]),
        ({"label": "acceptable"}, ["`label` is of type str", "one of 0 (unacceptable), 1 (acceptable)"]),
        ({"sentence": 3}, ["`sentence` is of type int"]),
        ("sentence", ["the column `sentence` is missing (found: label, idx)"]),
    ],
)
def test_bad_record(data, capsys, changes, words):
    rows = rows_of("cola", 40)
    if isinstance(changes, str):
        del rows[2][changes]
    else:
        rows[2] |= changes
    write_task(data, "cola", rows)
    glue_fails(capsys, data, data / "cola" / "train.jsonl", "line 3", *words)
    write_task(data, "stsb", [{**rows_of("stsb", 1)[0], "label": 5.2}], rows_of("stsb", 2, 100))
    glue_fails(capsys, data, "train.jsonl, line 1", "`label` is 5.2: make it a number from 0 to 5", tasks=["stsb"])


def test_labels_numbered_otherwise(data, capsys):
    (data / "cola" / "train.jsonl").unlink()
    path = data / "cola" / "train.parquet"
    as_dataset("cola", rows_of("cola", 4), ["acceptable", "unacceptable"]).to_parquet(str(path))
    glue_fails(capsys, data, path, "numbers its labels as acceptable, unacceptable, GLUE as unacceptable, acceptable")


def test_bad_files(data, capsys):
    train = data / "cola" / "train.jsonl"
    write_task(data, "cola", rows_of("cola", 2))
    write_task(data, "cola", rows_of("cola", 2), suffix=".json")
    glue_fails(capsys, data, data / "cola", "train split more than once (train.jsonl, train.json)")
    train.unlink()
    (data / "cola" / "train.json").unlink()
    glue_fails(capsys, data, data / "cola", "holds no train split", "put train.parquet")
    write(data / "cola" / "train-00001-of-00002.jsonl", rows_of("cola", 2))
    glue_fails(capsys, data, "1 of the parts of train (train-00001-of-00002.jsonl), not all of them")


def test_bad_flags(data, capsys):
    glue_fails(capsys, data, "--tasks has 'glue'", "choose of cola, mnli", tasks=["cola", "glue"])
    glue_fails(capsys, data, data / "mrpc", "is no folder", tasks=["mrpc"])
    glue_fails(capsys, data, "--dataset_revision is main", dataset_revision="main")
    glue_fails(capsys, data, "--num_replay is 0", num_replay=0)
    write_task(data, "cola", [{**row, "label": -1} for row in rows_of("cola", 4)])
    glue_fails(capsys, data, "cola: no record of train can be used (4 read, 4 without_answer)")
    out = data.parent / "out"
    out.mkdir()
    (out / "notes.txt").write_text(json.dumps("mine"))
    glue_fails(capsys, data, "not empty", "--overwrite true", tasks=["rte"])
    run(data, out, tasks=["rte"], overwrite=True)
    assert (out / "notes.txt").is_file()
