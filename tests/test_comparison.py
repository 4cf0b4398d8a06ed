"""recipes/compare.py: equal budgets, the best values for every seed, controls under the same settings, one table."""

import json
import re
import shutil

import pytest
import yaml

from comparison_builders import EVAL, FUSION, MAKER, flags_of, plan, sections
from heterofusion.comparison import SECTIONS, check_datasets, choose, final_runs, search_runs
from recipe_runner import RECIPES, error_line, recipe

pytestmark = pytest.mark.usefixtures("logging_restored")
compare = recipe("compare")


# ---- the runs ---------------------------------------------------------------------------------------------------


def test_search_runs_are_of_the_search_seed_and_validation_data(tmp_path):
    runs = search_runs(plan(tmp_path))
    trained = flags_of(runs, "fusion")
    assert [flags["learning_rate"] for flags in trained] == [0.001, 0.003, 0.01]
    assert {flags["seed"] for flags in trained} == {100}
    scored = [run.steps[1].flags for run in runs if run.name == "fusion"]
    assert all(flags["dataset_name"] == ["valid.jsonl"] for flags in scored)
    (merge,) = flags_of(runs, "arithmetic")
    assert merge["search"] == ["merge_lambda=0.2,0.4,1.0"] and merge["dataset_name"] == ["valid.jsonl"]
    assert "dtype" not in merge  # of a merge, it is that of the weights that are written


def test_final_runs_take_what_was_chosen_and_controls_what_their_method_chose(tmp_path):
    chosen = {"fusion": {"learning_rate": 0.01}, "arithmetic": {"merge_lambda": 0.4}}
    runs = final_runs(plan(tmp_path), chosen)
    assert [(flags["learning_rate"], flags["seed"]) for flags in flags_of(runs, "fusion")] == [
        (0.01, s) for s in range(3)
    ]
    noise = flags_of(runs, "noise")
    assert all(flags["source_control"] == "noise" and flags["learning_rate"] == 0.01 for flags in noise)
    assert [flags["seed"] for flags in noise] == [0, 1, 2]
    assert [flags["merge_lambda"] for flags in flags_of(runs, "arithmetic")] == [0.4]  # nothing in it is random
    (anchor,) = [run for run in runs if run.name == "anchor"]
    assert anchor.steps[0].flags["dataset_name"] == ["a.jsonl", "b.jsonl"]


def test_adapter_variable_is_what_the_recipe_made(tmp_path):
    content = sections()
    content["methods"][1] = {
        "name": "emr", "recipe": "merge", "flags": {**content["methods"][1]["flags"], "method": "emr"},
        "eval": {"adapter_per_dataset": True, "adapters": [{"for_each": "tasks", "value": "{adapter}/{item}"}]},
    }  # fmt: skip
    run = next(run for run in final_runs(plan(tmp_path, content), {}) if run.name == "emr")
    made = run.steps[0].folder
    assert run.steps[1].flags["adapters"] == [f"{made}/a", f"{made}/b"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"methods": None}, "no section methods"),
        ({"test": None}, "no section test"),
        ({"validation": None}, "no section validation"),
        ({"normalize_by": "nobody"}, "normalize_by is 'nobody'"),
        ({"gains": [{"name": "g", "row": "fusion", "over": "nobody"}]}, "'nobody', which is no method"),
        ({"gains": [{"name": "g", "row": "fusion"}]}, "each of gains must have"),
        ({"methods": [{"name": "x", "recipe": "dance"}]}, "recipe is 'dance'"),
        ({"methods": [{"name": "x", "colour": 1}]}, "unknown keys: colour"),
        ({"methods": [{"name": "x", "like": "y"}]}, "must name a method above it"),
        ({"methods": [{"name": "a b"}, {"name": "a-b"}]}, "two methods are called 'a-b'"),
        ({"methods": [{"name": "x", "flags": {"seed": 1}}]}, "no recipe that they are of"),
        ({"methods": [{"name": "x", "parts": [{}], "recipe": "merge"}]}, "parts and a recipe"),
        ({"methods": [{"name": "x", "recipe": "train", "search": {"rdm_mu": [1, 2, 1]}}]}, "value of rdm_mu twice"),
        ({"methods": [{"name": "x", "recipe": "train", "search": {"seed": [1, 2, 3]}}]}, "seed is no hyper-parameter"),
        ({"methods": [{"name": "x", "recipe": "merge", "flags": {"search": ["a=1"]}}]}, "write it beside flags"),
        ({"normalize_by": ["anchor"]}, r"normalize_by is \['anchor'\]"),
        ({"gains": [{"name": "g", "row": ["fusion"], "over": "noise"}]}, r"\['fusion'\], which is no method"),
        ({"test": {"adapters": ["T"], "dataset_name": ["a.jsonl"]}}, "test: adapters is set for each row"),
        ({"validation": {"labels": ["a=b"]}}, "validation: labels is set for each row"),
    ],
)
def test_bad_files_are_refused(changes, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        plan(tmp_path, {**sections(), "gains": [], "normalize_by": None, **changes})


def test_searches_of_different_size_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'arithmetic': its search has 3 combinations, .* 5 validation runs"):
        plan(tmp_path, budget=5)


def test_wrong_flags_of_a_method_are_refused_before_anything_runs(tmp_path):
    content = sections()
    content["methods"][2]["flags"] = {**FUSION, "learning_speed": 1}
    with pytest.raises(ValueError, match=r"method 'fusion', train has unknown keys: learning_speed"):
        search_runs(plan(tmp_path, content))


def test_values_that_are_searched_cannot_be_replaced(tmp_path):
    content = sections()
    content["methods"][3]["flags"] = {"source_control": "noise", "learning_rate": 0.5}
    with pytest.raises(ValueError, match="'noise' sets learning_rate, which is searched in 'fusion'"):
        plan(tmp_path, content)


@pytest.mark.parametrize(
    ("evaluation", "words"),
    [
        ({"adapters": ["T", "S"]}, "--name is for one adapter, but --adapters has 2"),
        ({"adapters": ["T"], "adapter_per_dataset": True}, "1 adapters for 2 data sets"),
        ({"adapters": ["T", "S"], "ensemble": "gac", "names": ["t", "s"]}, "--ensemble puts all of them into one row"),
    ],
)
def test_wrong_evaluations_are_refused_before_anything_runs(evaluation, words, tmp_path):
    content = sections()
    content["methods"][0]["eval"] = evaluation
    with pytest.raises(ValueError, match=f"method 'anchor', eval.*{words}"):
        final_runs(plan(tmp_path, content), {})


def test_what_was_made_is_scored_on_its_own_base(tmp_path):
    content = sections()
    content["methods"][2]["flags"] = {**FUSION, "model_name_or_path": "OTHER"}
    comparison = plan(tmp_path, content)
    for runs in (search_runs(comparison), final_runs(comparison, {})):
        scored = {run.name: run.steps[-1].flags["model_name_or_path"] for run in runs}
        assert scored["fusion"] == "OTHER" and scored.get("anchor", "BASE") == "BASE"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"validation": {"model_name_or_path": "BASE", "dataset_name": ["./x/../a.jsonl"]}}, "chosen by test data"),
        ({"test": {"model_name_or_path": "BASE", "dataset_name": ["r.jsonl"]}}, "trained on test data"),
        ({"validation": {"model_name_or_path": "BASE", "dataset_name": ["r.jsonl"]}}, "by data that is trained on"),
        (
            {name: {"model_name_or_path": "BASE", "dataset_name": ["owner/data"]} for name in ("validation", "test")},
            "chosen by test data: owner/data default test",
        ),
    ],
)
def test_data_of_training_search_and_report_stay_apart(changes, words, workplace, capsys):
    file = workplace / "compare.yaml"
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **changes}))
    error_line(capsys, compare.main, ["--config", str(file), "--dry_run", "true"], words)


def test_training_is_not_evaluated_on_test_data(workplace, capsys):
    """With `load_best_model_at_end` its step would be chosen by them; validation data may be used for that."""
    file = workplace / "compare.yaml"
    content = yaml.safe_load(file.read_text())
    (fusion,) = [method for method in content["methods"] if method["name"] == "fusion"]
    for name, code in (("valid.jsonl", 0), ("./a.jsonl", 2)):
        fusion["flags"] |= {"eval_dataset_name": [name], "eval_strategy": "steps", "load_best_model_at_end": True}
        file.write_text(yaml.safe_dump(content))
        assert compare.main(["--config", str(file), "--dry_run", "true"]) == code
    assert (
        "a training is evaluated, and may be stopped or its best step chosen, by test data" in capsys.readouterr().err
    )


@pytest.mark.parametrize(("split", "code"), [(None, 2), ("test", 2), ("validation", 0)])
def test_split_that_a_training_is_evaluated_on_by_default_is_that_of_tests(split, code, workplace, capsys):
    file = workplace / "compare.yaml"
    content = yaml.safe_load(file.read_text())
    content["test"] = {"model_name_or_path": "BASE", "dataset_name": ["owner/data"]}
    (fusion,) = [method for method in content["methods"] if method["name"] == "fusion"]
    fusion["flags"] |= {"eval_dataset_name": ["owner/data"], "eval_strategy": "steps"}
    fusion["flags"] |= {"eval_split": split} if split else {}
    file.write_text(yaml.safe_dump(content))
    assert compare.main(["--config", str(file), "--dry_run", "true"]) == code
    assert ("by test data: owner/data default test" in capsys.readouterr().err) == (code == 2)


def test_rows_of_other_data_sets_are_refused(tmp_path):
    content = sections()
    content["methods"][0] = {"name": "anchor", "parts": [{"adapters": ["T"], "dataset_name": ["a.jsonl"]}]}
    comparison = plan(tmp_path, content)
    words = "method 'arithmetic': it is scored on a, b, but 'anchor' on a; all rows"
    with pytest.raises(ValueError, match=words):
        check_datasets((), final_runs(comparison, {}), "file")
    content["methods"][0]["parts"] *= 2
    comparison = plan(tmp_path, content)
    with pytest.raises(ValueError, match="method 'anchor': it is scored on a twice"):
        check_datasets((), final_runs(comparison, {}), "file")


def test_a_method_like_one_of_parts_has_them_too(tmp_path):
    content = sections()
    parts = [{"adapters": ["T"], "dataset_name": ["a.jsonl"]}, {"adapters": ["S"], "dataset_name": ["b.jsonl"]}]
    content["methods"] = [
        {"name": "anchor", "parts": parts},
        {"name": "merged", "like": "anchor", "eval": {"merge_adapters": True}},
    ]
    content |= {"gains": [], "normalize_by": None}
    runs = [run for run in final_runs(plan(tmp_path, content), {}) if run.name == "merged"]
    assert [run.steps[0].flags["adapters"] for run in runs] == [["T"], ["S"]]
    assert all(run.steps[0].flags["merge_adapters"] for run in runs)


def test_splits_of_one_data_set_are_apart(workplace):
    file = workplace / "compare.yaml"
    data = {"model_name_or_path": "BASE", "dataset_name": ["owner/data"]}
    content = {**yaml.safe_load(file.read_text()), "test": data, "validation": {**data, "dataset_split": "dev"}}
    file.write_text(yaml.safe_dump(content))
    assert compare.main(["--config", str(file), "--dry_run", "true"]) == 0


def test_only_some_methods(tmp_path):
    some = plan(tmp_path, only=["anchor", "fusion"])
    assert [method.name for method in some.methods] == ["anchor", "fusion"] and not some.gains
    with pytest.raises(ValueError, match="takes its hyper-parameters of 'fusion': name both"):
        plan(tmp_path, only=["noise"])
    with pytest.raises(ValueError, match="'nobody' is no method"):
        plan(tmp_path, only=["nobody"])


@pytest.mark.parametrize(
    "file",
    sorted([*RECIPES.rglob("compare.yaml"), *RECIPES.rglob("sources.yaml")]),
    ids=lambda path: f"{path.parent.name}-{path.stem}",
)
def test_shipped_comparisons_have_valid_flags_and_equal_budgets(file, tmp_path, monkeypatch):
    for name in ("MODEL_ROOT", "ADAPTER_ROOT", "DATA_ROOT"):
        monkeypatch.setenv(name, "x")
    content = yaml.safe_load(file.read_text())
    argv = ["--config", str(file), "--dry_run", "true"]
    assert compare.main(argv) == 0
    searched = [method for method in content["methods"] if "search" in method]
    assert len(searched) >= 8 and {"like", "search"} <= {key for method in content["methods"] for key in method}
    assert set(content) - set(SECTIONS) <= {
        "output_dir",
        "seeds",
        "search_seed",
        "search_budget",
        "search_case",
        "title",
    }


# ---- from runs to the table -------------------------------------------------------------------------------------


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A comparison file, and recipes that only pretend."""
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    for name in ("train", "merge"):
        (recipes / f"{name}.py").write_text(MAKER)
    (recipes / "eval.py").write_text(EVAL)
    content = {"output_dir": str(tmp_path / "out"), "search_budget": 3, **sections()}
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    monkeypatch.setattr(compare, "FOLDER", recipes)
    return tmp_path


def run(workplace, *argv):
    return compare.main(["--config", str(workplace / "compare.yaml"), "--jobs", "2", *argv])


def read_rows(workplace) -> list[dict]:
    return json.loads((workplace / "out" / "comparison.json").read_text())["rows"]


def test_whole_comparison(workplace, capsys):
    assert run(workplace) == 0
    content = json.loads((workplace / "out" / "comparison.json").read_text())
    rows = {row["name"]: row for row in content["rows"]}
    assert list(rows) == ["anchor", "arithmetic", "fusion", "noise"]
    assert rows["fusion"]["settings"] == {"learning_rate": 0.003} and rows["fusion"]["search"]["runs"] == 3
    assert rows["fusion"]["search"]["seconds"] == 3 * (5.0 + 2.0)
    assert rows["arithmetic"]["settings"] == {"merge_lambda": 0.4} and rows["arithmetic"]["search"]["seconds"] == 7.0
    assert rows["noise"]["settings"] == {"learning_rate": 0.003} and rows["noise"]["search"] is None
    assert [run["mean"] for run in rows["fusion"]["runs"]] == pytest.approx([0.75, 0.76, 0.77])
    assert content["missing"] == []
    text = (workplace / "out" / "report" / "report.md").read_text()
    assert text.count("| fusion |") == 2  # scores, and hyper-parameters
    shown = re.search(
        r"\| fusion \| 0\.710 \| 0\.810 \| 0\.760 ± 0\.025 \| ([\d.]+) \| 3 \| 5\.0 \| 21\.0 \| 2\.0 \| 3\.00 ", text
    )
    assert shown and float(shown[1]) == pytest.approx((0.71 / 0.2 + 0.81 / 0.3) / 2, abs=1e-3)
    assert "**source_gain** = fusion - noise = **+0.100 ± 0.000** (n = 3; the whole 95% interval is above 0)" in text
    assert "learning_rate 0.001: 0.500, learning_rate 0.003: 0.700" not in text  # the search has a seed of its own
    assert (workplace / "out" / "report" / "pictures" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "source_gain" in capsys.readouterr().out
    before = (workplace / "out" / "methods" / "fusion" / "seed=0" / "train.done").stat().st_mtime_ns
    assert run(workplace) == 0  # nothing is run twice
    assert (workplace / "out" / "methods" / "fusion" / "seed=0" / "train.done").stat().st_mtime_ns == before


def test_failed_runs_leave_a_table_that_says_so(workplace, capsys):
    (workplace / "recipes" / "broken").touch()
    assert run(workplace) == 2
    captured = capsys.readouterr()
    assert "no memory" in captured.out and "2 of 8 runs did not finish" in captured.err
    text = (workplace / "out" / "report" / "report.md").read_text()
    assert "> **Warning.** Runs are missing: fusion, seed 1; noise, seed 1." in text
    (workplace / "recipes" / "broken").unlink()
    assert run(workplace) == 0
    assert "Warning" not in (workplace / "out" / "report" / "report.md").read_text()


def test_a_search_that_fails_costs_its_method_alone(workplace, capsys):
    """As one whose learning rate makes the loss infinite: it fails however often it is tried."""
    maker = workplace / "recipes" / "train.py"
    diverges = 'if flags.get("learning_rate") == 0.01: sys.exit("error: not finite")\n'
    maker.write_text(MAKER + diverges)
    assert run(workplace) == 2
    captured = capsys.readouterr()
    assert (
        "the hyper-parameters of 'fusion' were not searched, for not all of its runs have ended well" in captured.out
    )
    assert "6 of 8 runs did not finish" in captured.err
    assert [row["name"] for row in read_rows(workplace)] == ["anchor", "arithmetic"]
    maker.write_text(MAKER)
    assert run(workplace) == 0
    assert [row["name"] for row in read_rows(workplace)] == ["anchor", "arithmetic", "fusion", "noise"]


def test_results_of_values_that_are_no_longer_chosen_are_not_reported(workplace, capsys):
    """A search that comes out otherwise than before: what was made with other values must not stand under these."""
    assert run(workplace) == 0
    better = workplace / "out" / "search" / "fusion" / "learning_rate=0.01" / "eval" / "results.json"
    better.write_text(json.dumps({**json.loads(better.read_text()), "mean": 9.9}))
    assert run(workplace) == 2
    captured = capsys.readouterr()
    assert "was made with another learning_rate: 0.003, this sweep has 0.01" in captured.out
    assert "6 of 8 runs did not finish" in captured.err
    content = json.loads((workplace / "out" / "comparison.json").read_text())
    assert [row["name"] for row in content["rows"]] == ["anchor", "arithmetic"]
    assert content["missing"] == [f"{name}, seed {seed}" for name in ("fusion", "noise") for seed in range(3)]
    for name in ("fusion", "noise"):
        shutil.rmtree(workplace / "out" / "methods" / name)
    assert run(workplace) == 0
    (fusion,) = [row for row in read_rows(workplace) if row["name"] == "fusion"]
    assert fusion["settings"] == {"learning_rate": 0.01} and fusion["runs"][0]["scores"]["a"] == pytest.approx(0.6)


def test_unknown_seconds_are_no_obstacle(workplace):
    """A run that was resumed after its last step does not know what it took."""
    eval_stub = workplace / "recipes" / "eval.py"
    unknown = '"seconds": None if made.get("learning_rate") == 0.01 else 5.0, "peak_memory_bytes"'
    eval_stub.write_text(EVAL.replace('"seconds": 5.0, "peak_memory_bytes"', unknown))
    assert run(workplace) == 0
    rows = {row["name"]: row for row in read_rows(workplace)}
    assert rows["fusion"]["search"]["seconds"] is None and rows["fusion"]["runs"][0]["making_seconds"] == 5.0
    eval_stub.write_text(EVAL.replace('"seconds": 5.0,', '"seconds": 5.0, "resumed_from_step": 3,'))
    shutil.rmtree(workplace / "out" / "methods")
    assert run(workplace) == 0
    assert all(each["making_seconds"] is None for row in read_rows(workplace)[2:] for each in row["runs"])


@pytest.mark.parametrize("place", ["search/fusion/learning_rate=0.01", "methods/noise/seed=1"])
def test_data_that_changed_between_two_runs_are_refused(place, workplace, capsys):
    assert run(workplace) == 0
    file = workplace / "out" / place / "eval" / "results.json"
    file.write_text(file.read_text().replace('"sha256": "ab"', '"sha256": "cd"'))
    assert run(workplace) == 2
    assert re.search(rf"{place}.* are of different data sets \w+ .*'cd'", capsys.readouterr().err)


def test_nothing_finished_is_told_in_one_line(workplace, capsys):
    (workplace / "recipes" / "eval.py").write_text("import sys; sys.exit('error: no disk')")
    assert run(workplace, "--only", "anchor") == 2
    assert "1 of 1 runs did not finish" in capsys.readouterr().err
    assert not (workplace / "out" / "comparison.json").exists()


def test_dry_run_makes_nothing(workplace, capsys):
    assert run(workplace, "--dry_run", "true") == 0
    assert "4 runs to choose hyper-parameters by, 8 to report" in capsys.readouterr().out
    assert not (workplace / "out").exists()


def test_ties_go_to_the_first_value(workplace):
    assert run(workplace, "--only", "fusion", "anchor") == 0
    comparison = plan(workplace, only=["fusion", "anchor"])
    for file in (workplace / "out" / "search" / "fusion").glob("*/eval/results.json"):
        content = json.loads(file.read_text())
        file.write_text(json.dumps({**content, "mean": 0.5}))
    assert choose(comparison)["fusion"]["settings"] == {"learning_rate": 0.001}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--seeds", "0", "0"], "all different"),
        (["--seeds", "0", "100"], "--search_seed 100 is one of --seeds"),
        (["--search_budget", "0"], "--search_budget is 0"),
    ],
)
def test_bad_flags(argv, words, workplace, capsys):
    error_line(capsys, compare.main, ["--config", str(workplace / "compare.yaml"), *argv], words)


def test_config_is_needed(capsys):
    error_line(capsys, compare.main, [], "--config is missing")
