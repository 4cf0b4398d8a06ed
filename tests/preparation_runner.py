"""Running the preparation recipes in the tests: small data for them, and what every prepared folder must hold to."""

import json
from pathlib import Path

from heterofusion.data.replay import build_replay
from recipe_runner import contents, error_line, flags, recipe, succeeds
from replay_builders import args_for, byte_level

uie, glue = recipe("uie/prepare"), recipe("glue/prepare")  # two files of one name


def prepare(main, output: Path, **values) -> tuple[dict, str]:
    """Run a recipe that must succeed: its manifest, and what it wrote to stderr."""
    log = succeeds(main, flags({"output_dir": output, **values}))
    return json.loads((output / "manifest.json").read_text(encoding="utf-8")), log


def fails(main, capsys, data: Path, *words: object, **values) -> None:
    """Run a recipe that must end with one line, and leave what is there as it was."""
    output = data.parent / "out"
    before = contents(output)
    error_line(capsys, main, flags({"dataset_path": data, "output_dir": output, **values}), *words)
    assert contents(output) == before


def written(folder: Path, name: str) -> list[dict]:
    """Records of one prepared file, such as `replay/NER_films`."""
    text = (folder / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n")[:-1]]


def texts(folder: Path, name: str) -> list[str]:
    """What the prompts of a file ask about: all between the options and `Answer:`."""
    return [row["prompt"].split("\nOption: ")[-1].split("\n", 1)[1].removesuffix("\nAnswer:") for row in
            written(folder, name)]  # fmt: skip


def check_accounts(manifest: dict) -> None:
    """Every record that was read is left out for a reason or kept, and the files have what the manifest says."""
    for name, task in manifest["tasks"].items():
        reasons = ("without_text", "without_answer", "repeated", "in_test", "in_validation", "cut_for_validation",
                   "in_unlabelled", "cut_for_unlabelled")  # fmt: skip
        for counts in task["splits"].values():
            assert counts["read"] == counts["kept"] + sum(counts.get(reason, 0) for reason in reasons)
        records = {file.split("/")[0]: entry["records"] for file, entry in task["files"].items()}
        assert records["train"] == task["splits"]["train"]["kept"]
        assert records["replay"] == min(manifest["num_replay"], records["train"])
        assert set(task["files"]) == {f"{purpose}/{name}.jsonl" for purpose in records}


def check_replay_keeps_all(folder: Path) -> None:
    """Training reads every file that was written, and drops no record of it."""
    for path in sorted(folder.rglob("*.jsonl")):
        _, report = build_replay(args_for(path, max_examples=10_000, max_length=4096), byte_level())
        counts = report.datasets[0]
        assert counts.format == "prompt_completion"
        assert counts.kept == counts.read == len(written(path.parent, path.stem)) and counts.cut == 0


# ---- data in the InstructUIE layout ----------------------------------------------------------------------------

FILMS = ["title", "year", "actor"]


def film(number: int, **fields) -> dict:
    """A record of named entities; every third has none."""
    entities = [{"name": f"Film {number}", "type": "title", "pos": [5, 11]}, {"name": "1960 s", "type": "year"}]
    return {"sentence": f"show Film {number} of 1960 s", "entities": entities if number % 3 else [], **fields}


def town(number: int, **fields) -> dict:
    """A record of relations."""
    relation = {"head": {"name": f"Ann {number}", "type": "person"}, "type": "lives in", "tail": {"name": "Rome"}}
    return {"sentence": f"Ann {number} lives in Rome .", "relations": [relation], **fields}


def write_task(folder: Path, labels=None, **splits) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in {**splits, **({} if labels is None else {"labels": labels})}.items():
        (folder / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder


def write_uie(root: Path) -> Path:
    """Two tasks in the InstructUIE layout: films with three splits, towns without dev.json."""
    films = [film(i) for i in range(40)]
    write_task(root / "NER" / "films", FILMS, train=films[:24], dev=films[24:32], test=films[32:])
    write_task(root / "RE" / "towns", ["lives in"], train=[town(i) for i in range(30)], test=[town(99), town(100)])
    return root


def run_uie(data: Path, output: Path, **values) -> tuple[dict, str]:
    return prepare(uie.main, output, dataset_path=data, **{"num_replay": 10, **values})
