"""Comparison files with several cases, and things that their methods share: which runs they become."""

import pytest

from comparison_builders import (
    CASES,
    EXTRA,
    FUSION,
    LABELS,
    flags_of,
    plan,
    sections_with_cases,
    with_method,
)
from heterofusion.comparison import final_runs, made_runs, search_runs


def planned(tmp_path, only=(), **changes):
    return plan(tmp_path, sections_with_cases(**changes), seeds=(0,), only=only)


def places(runs, comparison) -> list[str]:
    return [str(run.folder.relative_to(comparison.folder)) for run in runs]


# ---- the runs ---------------------------------------------------------------------------------------------------


def test_methods_run_in_their_cases_with_the_seeds_of_each(tmp_path):
    comparison = planned(tmp_path)
    runs = final_runs(comparison, {"fusion": {"learning_rate": 0.01}})
    assert places(runs, comparison) == [
        "methods/anchor", "methods/tuned/n=30/seed=0",
        *(f"methods/{name}" for name in ("fusion/n=0/seed=0", "fusion/n=0/seed=1", "fusion/n=30/seed=0")),
        "methods/noise/n=30/seed=0",
        *(f"methods/{name}" for name in ("merged/n=0/seed=0", "merged/n=0/seed=1", "merged/n=30/seed=0")),
    ]  # fmt: skip
    without, _, with_replay = flags_of(runs, "fusion")
    assert "dataset_name" not in without and with_replay["dataset_name"] == ["r.jsonl"]
    assert {flags["learning_rate"] for flags in flags_of(runs, "fusion")} == {0.01}  # chosen once, for all cases
    assert without["source_labels"] == [str(comparison.folder / "made/labels/n=0/labels/p.jsonl")]
    fusion = next(run for run in runs if run.name == "fusion")
    assert fusion.title == "compare: fusion case=N=0,seed=0" and fusion.steps[1].flags["labels"] == [
        "case=N=0",
        "seed=0",
    ]


def test_searches_run_in_the_search_case_alone(tmp_path):
    comparison = planned(tmp_path)
    runs = search_runs(comparison)
    assert len(runs) == 3 and all(run.steps[0].flags["dataset_name"] == ["r.jsonl"] for run in runs)
    labels = comparison.folder / "made/labels/n=30"
    assert {run.needs for run in runs} == {(labels,)}
    assert runs[0].steps[0].flags["source_labels"] == [str(labels / "labels/p.jsonl")]


def test_shared_things_are_made_once_for_each_case_and_seed_that_they_depend_on(tmp_path):
    comparison = planned(tmp_path)
    runs = made_runs(comparison)
    assert places(runs, comparison) == [
        "made/labels/n=30", "made/labels/n=0",
        "made/extra/n=0/seed=0", "made/extra/n=0/seed=1", "made/extra/n=30/seed=0",
    ]  # fmt: skip
    with_replay, without = flags_of(runs, "labels")
    assert with_replay["dataset_name"] == ["r.jsonl"] and "routing" not in with_replay
    assert without["routing"] == "map.yaml" and "dataset_name" not in without
    extra = runs[2]
    assert extra.needs == (comparison.folder / "made/labels/n=0",) and extra.steps[0].flags["seed"] == 0
    merged = next(run for run in final_runs(comparison, {}) if run.name == "merged")
    assert merged.needs == (comparison.folder / "made/labels/n=0", extra.folder)
    assert merged.steps[0].flags["adapters"] == ["T", str(extra.folder / "adapter")]


def test_search_has_shared_things_of_its_own_seed(tmp_path):
    comparison = planned(
        tmp_path, made={"labels": {**LABELS, "flags": {**LABELS["flags"], "seed": "{seed}"}}, "extra": EXTRA}
    )
    made = places(made_runs(comparison), comparison)
    assert made[0] == "made/labels/n=30/seed=100" and "made/labels/n=0/seed=1" in made


def test_only_what_is_needed_is_made(tmp_path):
    assert made_runs(planned(tmp_path, only=["anchor", "tuned"])) == []
    comparison = planned(tmp_path, only=["fusion"])
    assert places(made_runs(comparison), comparison) == ["made/labels/n=30", "made/labels/n=0"]
    methods = with_method("fusion", cases=["N=30"])
    comparison = planned(tmp_path, only=["fusion", "noise"], **methods)
    assert places(made_runs(comparison), comparison) == ["made/labels/n=30"]


def test_variables_of_a_case_may_name_what_is_made(tmp_path):
    cases = [{**CASES[0], "labels_of_case": ["{labels}/p.jsonl"]}, {**CASES[1], "labels_of_case": None}]
    flags = {**FUSION, "dataset_name": "{replay}", "source_labels": "{labels_of_case}"}
    comparison = planned(tmp_path, only=["fusion"], cases=cases, **with_method("fusion", flags=flags))
    assert places(made_runs(comparison), comparison) == ["made/labels/n=0"]
    assert ["source_labels" in flags for flags in flags_of(final_runs(comparison, {}), "fusion")] == [
        True,
        True,
        False,
    ]


def test_evaluations_may_depend_on_cases_and_seeds_and_on_what_is_made(tmp_path):
    comparison = planned(tmp_path, only=["anchor"], **with_method("anchor", eval={"adapters": ["{extra}"]}))
    runs = final_runs(comparison, {})
    assert places(runs, comparison) == [
        f"methods/anchor/{name}" for name in ("n=0/seed=0", "n=0/seed=1", "n=30/seed=0")
    ]
    assert runs[2].steps[0].flags["adapters"] == [str(comparison.folder / "made/extra/n=30/seed=0/adapter")]


def test_controls_are_run_in_the_cases_of_their_method(tmp_path):
    methods = with_method("fusion", cases=["N=0"])
    methods["methods"][3].pop("cases")
    runs = final_runs(planned(tmp_path, **methods), {})
    assert {run.variables["case"] for run in runs if run.name == "noise"} == {"N=0"}


def test_what_depends_on_the_seed_alone_is_run_once_for_all_cases(tmp_path):
    flags = {**FUSION, "source_labels": ["l.jsonl"]}
    cases = [{**CASES[0], "seeds": [0, 3]}, {**CASES[1], "seeds": [0, 1]}]
    comparison = planned(
        tmp_path, only=["fusion"], cases=cases, search_case=None, **with_method("fusion", flags=flags)
    )
    runs = final_runs(comparison, {})
    assert places(runs, comparison) == [f"methods/fusion/seed={seed}" for seed in (0, 3, 1)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cases": []}, "cases must be a list of mappings"),
        ({"cases": [{"seeds": [1]}]}, "each with a name; found {'seeds'"),
        ({"cases": [CASES[0], {**CASES[1], "name": "n=0"}]}, "two cases are called 'n=0'"),
        ({"cases": [{**CASES[0], "seeds": 3}, CASES[1]]}, r"case 'N=0': seeds is 3; give a list"),
        (
            {"cases": [{**CASES[0], "seeds": [True]}, CASES[1]]},
            r"seeds is \[True\]; give a list of one or more integers",
        ),
        ({"cases": [{**CASES[0], "seeds": [1, 1]}, CASES[1]]}, r"seeds is \[1, 1\]; they must all be different"),
        ({"cases": [{**CASES[0], "seeds": [1, 100]}, CASES[1]]}, "--search_seed 100 is one of its seeds"),
        (
            {"cases": [{**CASES[0], "shots": 3}, CASES[1]]},
            "case 'N=30': shots is a variable of only one of it and 'N=0'",
        ),
        ({"cases": [{**CASES[0], "seed": 3}, CASES[1]]}, "'seed' is a variable already"),
        ({"cases": [{**CASES[0], "a b": 3}, CASES[1]]}, "'a b' cannot be a variable"),
        ({"search_case": "N=9"}, "search_case names 'N=9', which is no case of it; there is N=0, N=30"),
        ({"search_case": None}, "search_case is missing: the search of 'fusion' .* of N=0, N=30"),
        ({"made": {"labels": "x"}}, "made 'labels' must be a mapping of recipe and flags; found 'x'"),
        ({"made": {"labels": {**LABELS, "seeds": 1}}}, "must be a mapping of recipe and flags"),
        ({"made": {"labels": {"recipe": "eval"}}}, "recipe is 'eval'; it can be label, expert"),
        ({"made": {"replay": LABELS}}, "made 'replay' has the name of a variable of the cases"),
        ({"made": {"adapter": LABELS}}, "'adapter' is a variable already"),
        ({"made": {"extra": EXTRA, "labels": LABELS}}, "made 'extra' has {labels}, but there is no variable labels"),
        (with_method("anchor", cases=["N=9"]), "method 'anchor': cases names 'N=9', which is no case of it"),
        (with_method("anchor", cases=[]), r"cases is \[\]; a list of one or more names"),
        (with_method("anchor", cases=["N=0", "N=0"]), "names 'N=0' twice"),
    ],
)
def test_bad_files_are_refused(changes, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        planned(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (with_method("fusion", flags={**FUSION, "dataset_name": ["x/{replay}"]}), r"method 'fusion', case 'N=0' has "
         r"'x/{replay}', but replay is \[\], which is no part of a text"),
        (with_method("fusion", flags={**FUSION, "dataset_name": ["x/{routing}"]}), "case 'N=30' has "
         "'x/{routing}', but routing is null"),
        (with_method("tuned", cases=["N=0"], flags={"model_name_or_path": "BASE", "dataset_name": "{replay}",
         "learning_speed": 1}), "method 'tuned', case 'N=0', expert has unknown keys: learning_speed"),
        ({"made": {"labels": {**LABELS, "flags": {**LABELS["flags"], "prompts": None}}, "extra": EXTRA}},
         "made 'labels', case=N=30, label: give either --prompts"),
    ],
)  # fmt: skip
def test_wrong_flags_are_refused_before_anything_runs(changes, words, tmp_path):
    comparison = planned(tmp_path, **changes)
    with pytest.raises(ValueError, match=words):
        made_runs(comparison) + final_runs(comparison, {})


# ---- gains ------------------------------------------------------------------------------------------------------


def test_gains_are_passed_on_with_what_is_asked_of_them(tmp_path):
    gain = {
        "name": "g", "row": "fusion", "over_best_of": ["tuned", "merged"], "cases": ["N=30"], "dataset": "a",
        "at_least": 0.15, "interval_above": 0.1,
    }  # fmt: skip
    plain = {"name": "h", "row": "fusion", "over": "anchor"}
    assert [each.plain() for each in planned(tmp_path, gains=[gain, {**plain, "at_least": None}]).gains] == [
        gain,
        plain,
    ]
    some = planned(tmp_path, gains=[gain, plain], only=["fusion", "tuned", "anchor"])
    assert [each.name for each in some.gains] == ["h"]  # the best of fewer methods would be another gain


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"over": None}, "name, row, and over or over_best_of"),
        ({"over_best_of": ["tuned"]}, "name, row, and over or over_best_of"),
        ({"over": None, "over_best_of": ["nobody"]}, "over_best_of names 'nobody', which is no method"),
        ({"over": None, "over_best_of": "tuned"}, "over_best_of is 'tuned'; a list"),
        ({"over": "fusion"}, "compares 'fusion' with itself"),
        ({"over": "nobody"}, "names 'nobody', which is no method"),
        ({"cases": ["N=5"]}, "cases names 'N=5', which is no case"),
        ({"cases": ["N=0"], "over": "noise"}, "of case 'N=0', in which nothing that it is compared with is run"),
        ({"cases": ["N=0"], "row": "noise"}, "of case 'N=0', in which 'noise' is not run"),
        ({"at_least": "much"}, "at_least is 'much'; a number"),
        ({"at_least": float("nan")}, "at_least is nan; a number"),
        ({"interval_above": 0.1}, "interval_above goes with at_least"),
        ({"colour": 1}, "unknown keys: colour"),
    ],
)
def test_bad_gains_are_refused(changes, words, tmp_path):
    gain = {"name": "g", "row": "fusion", "over": "merged", **changes}
    with pytest.raises(ValueError, match=words):
        planned(tmp_path, gains=[gain])
