"""Comparisons in several cases from runs to the table: what methods share comes first, and what becomes without it."""

import json
import os
import re
import shutil

import pytest
import yaml

from comparison_builders import CASES, EVAL, EXTRA, FUSION, LABEL, LABELS, MAKER, sections_with_cases, with_method
from heterofusion.comparison import check_apart
from heterofusion.sweeps import Run, Step
from recipe_runner import error_line, recipe

pytestmark = pytest.mark.usefixtures("logging_restored")
compare = recipe("compare")


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A comparison file with cases, and recipes that only pretend."""
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    for name, text in {**dict.fromkeys(("train", "merge", "expert"), MAKER), "eval": EVAL, "label": LABEL}.items():
        (recipes / f"{name}.py").write_text(text)
    monkeypatch.setattr(compare, "FOLDER", recipes)
    write(tmp_path)
    return tmp_path


def write(workplace, **changes):
    content = {
        "output_dir": str(workplace / "out"), "search_budget": 3, "seeds": [0], **sections_with_cases(), **changes
    }  # fmt: skip
    (workplace / "compare.yaml").write_text(yaml.safe_dump(content, sort_keys=False))


def run(workplace, *argv):
    return compare.main(["--config", str(workplace / "compare.yaml"), "--jobs", "2", *argv])


def read(workplace) -> dict:
    return json.loads((workplace / "out" / "comparison.json").read_text())


def rows_of(content) -> dict:
    return {(row["name"], row["case"]): row for row in content["rows"]}


def test_whole_comparison_has_a_row_for_each_method_and_case(workplace):
    assert run(workplace) == 0
    content = read(workplace)
    rows = rows_of(content)
    assert content["cases"] == ["N=0", "N=30"] and content["search_case"] == "N=30" and content["missing"] == []
    assert list(rows) == [
        ("anchor", None), ("tuned", "N=30"), ("fusion", "N=0"), ("fusion", "N=30"), ("noise", "N=30"),
        ("merged", "N=0"), ("merged", "N=30"),
    ]  # fmt: skip
    assert [run["seed"] for run in rows["fusion", "N=0"]["runs"]] == [0, 1]
    assert rows["fusion", "N=0"]["settings"] == rows["fusion", "N=30"]["settings"] == {"learning_rate": 0.003}
    assert rows["fusion", "N=0"]["made"] == ["labels"] and rows["tuned", "N=30"]["made"] == []
    assert {run["made_seconds"] for run in rows["fusion", "N=0"]["runs"]} == {11.0}
    assert rows["merged", "N=0"]["made"] == ["labels", "extra"]
    assert rows["merged", "N=0"]["ran_source_models"] and not rows["tuned", "N=30"]["ran_source_models"]
    assert rows["tuned", "N=30"]["runs"][0]["made_seconds"] is None
    assert "labels etc., s" in (workplace / "out" / "report" / "report.md").read_text()


def test_seconds_of_all_that_was_made_are_told_if_they_are_known(workplace):
    record = '(folder / "expert.json").write_text(json.dumps({"made_by": {"cost": {"seconds": 4.0}}}))\n'
    (workplace / "recipes" / "expert.py").write_text(MAKER + record)
    assert run(workplace, "--only", "merged") == 0
    rows = rows_of(read(workplace))
    assert rows["merged", "N=0"]["runs"][0]["made_seconds"] == 15.0
    (workplace / "out/made/labels/n=30/labels/labels.json").unlink()
    assert run(workplace, "--only", "merged") == 0
    rows = rows_of(read(workplace))
    assert rows["merged", "N=30"]["runs"][0]["made_seconds"] is None
    assert rows["merged", "N=0"]["runs"][0]["made_seconds"] == 15.0


def test_row_with_the_anchors_own_labels_runs_no_sources(workplace):
    own = {**LABELS, "flags": {**LABELS["flags"], "anchor_labels": True}}
    write(workplace, made={"labels": own, "extra": EXTRA})
    assert run(workplace, "--only", "merged") == 0
    row = rows_of(read(workplace))["merged", "N=0"]
    assert row["made"] == ["labels", "extra"] and not row["ran_source_models"]


def test_what_belongs_to_some_cases_has_a_row_in_each_of_them(workplace):
    """Three cases with a method that is run once, but shown in two."""
    cases = [*CASES, {**CASES[1], "name": "N=90"}]
    write(workplace, cases=cases, **with_method("anchor", cases=["N=0", "N=90"]))
    assert run(workplace, "--only", "anchor") == 0
    assert [(row["name"], row["case"]) for row in read(workplace)["rows"]] == [("anchor", "N=0"), ("anchor", "N=90")]
    assert (workplace / "out/methods/anchor/eval/results.json").is_file()


def test_dry_run_shows_what_is_made(workplace, capsys):
    assert run(workplace, "--dry_run", "true") == 0
    told = capsys.readouterr().out
    assert "==== made: extra case=N=0,seed=1 ====" in told
    assert told.endswith("5 runs to make what methods share, 3 runs to choose hyper-parameters by, 9 to report\n")


def test_methods_that_need_what_could_not_be_made_are_not_run_and_all_others_are(workplace, capsys):
    (workplace / "recipes" / "broken_label").touch()  # without replay
    assert run(workplace) == 2
    captured = capsys.readouterr()
    assert "no source is good enough" in captured.out and "4 of 9 runs did not finish" in captured.err
    assert re.search(
        r"compare: merged case=N=0,seed=1 .* it needs what is not there: made: labels case=N=0", captured.out
    )
    content = read(workplace)
    assert list(rows_of(content)) == [
        ("anchor", None), ("tuned", "N=30"), ("fusion", "N=30"), ("noise", "N=30"), ("merged", "N=30")
    ]  # fmt: skip
    assert content["missing"] == [f"{name}, N=0, seed {seed}" for name in ("fusion", "merged") for seed in (0, 1)]
    (workplace / "recipes" / "broken_label").unlink()
    assert run(workplace) == 0 and read(workplace)["missing"] == []


def test_methods_whose_search_lacks_something_are_not_run(workplace, capsys):
    write(workplace, search_case="N=0")
    (workplace / "recipes" / "broken_label").touch()
    assert run(workplace) == 2
    captured = capsys.readouterr()
    assert "the hyper-parameters of 'fusion' were not searched" in captured.out
    assert list(rows_of(read(workplace))) == [("anchor", None), ("tuned", "N=30"), ("merged", "N=30")]
    assert not (workplace / "out" / "search").exists()


def test_what_was_made_with_other_flags_is_not_reported(workplace, capsys):
    assert run(workplace, "--only", "merged", "anchor") == 0
    flags = {**LABELS["flags"], "max_prompts": 7}
    write(workplace, made={"labels": {**LABELS, "flags": flags}, "extra": EXTRA})
    assert run(workplace, "--only", "merged", "anchor") == 2
    assert "was made with another max_prompts: None, this sweep has 7" in capsys.readouterr().out
    assert list(rows_of(read(workplace))) == [("anchor", None)]


def test_what_is_made_again_is_used_again(workplace):
    assert run(workplace, "--only", "merged", "anchor") == 0
    out = workplace / "out"
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.done")}
    assert run(workplace, "--only", "merged", "anchor") == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.done")} == before
    shutil.rmtree(out / "made/labels/n=30")
    assert run(workplace, "--only", "merged", "anchor") == 0
    again = {os.path.relpath(path.parent, out) for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert again == {"made/labels/n=30", "made/extra/n=30/seed=0", "methods/merged/n=30/seed=0"}


def labels_of(prompts) -> dict:
    return {"labels": {**LABELS, "flags": {**LABELS["flags"], "prompts": [prompts]}}}


def expert_on(**data) -> dict:
    return {"extra": {"recipe": "expert", "flags": {"model_name_or_path": "BASE", **data}}}


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (labels_of("a.jsonl"), "trained on test data: .*/a.jsonl"),
        (labels_of("./x/../valid.jsonl"), "chosen by data that is trained on: .*/valid.jsonl"),
        (expert_on(dataset_name=["valid.jsonl"]), "chosen by data that is trained on: .*/valid.jsonl"),
        (expert_on(source_labels=["b.jsonl"]), "trained on test data: .*/b.jsonl"),
        (
            {"extra": {"recipe": "merge", "flags": {"model_name_or_path": "BASE", "adapters": ["T", "S"],
             "dataset_name": ["a.jsonl"], "search": ["merge_lambda=0.2,0.4"]}}},
            "chosen by test data: .*/a.jsonl",
        ),
    ],
)  # fmt: skip
def test_data_of_what_is_made_stays_apart(made, words, workplace, capsys):
    write(workplace, made={"labels": LABELS, "extra": EXTRA} | made)
    assert run(workplace, "--dry_run", "true") == 2
    assert re.search(words, capsys.readouterr().err)


def test_folders_of_source_labels_hold_no_test_data(workplace, capsys):
    folder = workplace / "labels"
    folder.mkdir()
    (folder / "a.jsonl").touch()
    test = {"model_name_or_path": "BASE", "dataset_name": [str(folder / "a.jsonl")]}
    flags = {**FUSION, "dataset_name": "{replay}", "source_labels": [str(folder)]}
    write(workplace, test=test, **with_method("fusion", flags=flags))
    assert run(workplace, "--dry_run", "true") == 2
    assert "trained on test data" in capsys.readouterr().err


def test_stages_of_a_sequence_are_not_trained_on_test_data(tmp_path):
    stages = {"dataset_name": ["r.jsonl"], "stages": [{"name": "one"}, {"name": "two", "dataset_name": ["a.jsonl"]}]}
    trained, scored = Step("train", stages, tmp_path), Step("eval", {"dataset_name": ["a.jsonl"]}, tmp_path)
    with pytest.raises(ValueError, match=r"x: something is trained on test data: .*/a\.jsonl"):
        check_apart([], [Run("compare", "m", {}, tmp_path, (trained, scored))], "x")


def test_gain_of_a_data_set_that_is_not_scored_is_refused(workplace, capsys):
    write(workplace, gains=[{"name": "g", "row": "fusion", "over": "anchor", "dataset": "c"}])
    error_line(
        capsys, compare.main, ["--config", str(workplace / "compare.yaml"), "--dry_run", "true"],
        "gain 'g': dataset is 'c', which 'fusion' is not scored on; there is a, b",
    )  # fmt: skip
