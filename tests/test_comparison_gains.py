"""Gains of a comparison and their targets in each case, and what of a comparison with cases cannot be read."""

import re

import pytest

from heterofusion.report.comparison import comparison_section, gain_sentences, parse_comparison
from report_builders import CASES, cells, comparison, gain, parsed, row


def test_gains_with_cases_are_a_table_with_the_case_in_front_of_each_sentence():
    table = parsed(gains=[gain(over="tuning")])
    (found,) = cells(comparison_section(table, [], "##"), "g")
    assert found[0] == "-" and found[1].startswith("+0.190 ± ") and found[1].endswith("(above 0)")
    assert [sentence.split(":")[0] for sentence in gain_sentences(table)] == ["N=10", "N=30"]


def test_best_of_several_is_chosen_in_each_case_by_its_mean():
    table = parsed(gains=[gain(over_best_of=["tuning", "distilling"])])
    zero, ten, thirty = gain_sentences(table)
    assert "best of (tuning; distilling), which is distilling (0.210 ± 0.127; tuning not compared), = **+0.200" in zero
    assert "which is distilling (0.350 ± 0.025), = **+0.160" in ten
    assert "which is tuning (0.553 ± 0.137), = **+0.087" in thirty
    (found,) = cells(comparison_section(table, [], "##"), "g")
    assert "(over distilling; above 0; without tuning)" in found[0] and "(over tuning; " in found[2]


def test_gain_of_one_data_set_is_of_that_alone():
    content = comparison(gains=[gain(over="tuning", dataset="b", cases=["N=10"])])
    for entry in content["rows"]:
        if (entry["name"], entry["case"]) == ("fusion", "N=10"):
            for each in entry["runs"]:
                each["scores"]["b"] += 0.05
    (told,) = gain_sentences(parse_comparison(content, "x"))
    assert told.startswith("N=10: **g** = fusion - tuning, on b = **+0.240 ± ")


@pytest.mark.parametrize(
    ("target", "words", "met"),
    [
        ({"at_least": 0.08}, "mean at least 0.08 and interval above 0", True),
        ({"at_least": 0.09}, "mean at least 0.09 and interval above 0", False),  # the mean is 0.0867
        ({"at_least": 0.08, "interval_above": 0.05}, "mean at least 0.08 and interval above 0.05", True),
        ({"at_least": 0.08, "interval_above": 0.08}, "mean at least 0.08 and interval above 0.08", False),
        ({"at_least": -1, "interval_above": -0.5}, "mean at least -1 and interval above -0.5", True),
    ],
)
def test_target_needs_the_mean_and_the_interval(target, words, met):
    rows = [row("fusion", "N=30", [0.60, 0.71, 0.64]), row("tuning", "N=30", [0.51, 0.63, 0.55])]
    table = parsed(rows=rows, gains=[gain(over="tuning", **target)])
    (told,) = gain_sentences(table)  # 0.09, 0.08, 0.09: 0.087 ± 0.014
    assert told.endswith(f"target: {words}: **{'met' if met else 'not met'}**.")
    (found,) = cells(comparison_section(table, [], "##"), "g")
    assert found[2].endswith("; **met**)" if met else "; **not met**)") and found[3] == words


def test_mean_that_is_the_target_but_for_rounding_meets_it():
    rows = [row("fusion", None, [0.3, 0.4, 0.5]), row("tuning", None, [0.15, 0.25, 0.35])]
    (told,) = gain_sentences(parsed(rows=rows, cases=[], gains=[gain(over="tuning", at_least=0.15)]))
    assert told.endswith("**met**.")


def test_target_is_not_met_if_the_interval_reaches_0_or_there_is_none():
    rows = [row("fusion", "N=0", [0.9]), row("fusion", "N=10", [0.9, 0.3]), row("tuning", None, {None: 0.2})]
    table = parsed(rows=rows, gains=[gain(over="tuning", at_least=0.1)])
    one, two = gain_sentences(table)
    assert "= **+0.700** (n = 1; one seed: undecided); " in one and one.endswith("**not met**.")
    assert "contains 0: undecided); " in two and two.endswith("**not met**.")


def test_target_is_not_met_while_something_that_it_is_over_is_missing():
    """What is missing may be the strongest of all."""
    rows = [row("fusion", "N=30", [0.60, 0.71, 0.64]), row("tuning", "N=30", [0.1, 0.21, 0.14])]
    table = parsed(rows=rows, gains=[gain(over_best_of=["tuning", "noise"], at_least=0.1)])
    (told,) = [told for told in gain_sentences(table) if told.startswith("N=30")]
    assert "noise not compared" in told and told.endswith("**not met**.")
    (found,) = cells(comparison_section(table, [], "##"), "g")
    assert found[2].endswith("(over tuning; above 0; without noise; **not met**)")


def test_the_best_of_several_is_the_best_of_the_same_seeds():
    """A row with one lucky seed is not better than one with all, nor are seeds that the other row lacks counted."""
    rows = [
        row("fusion", "N=30", [0.80, 0.81, 0.82]),
        row("lucky", "N=30", [0.90]),
        row("tuning", "N=30", [0.70, 0.72, 0.71]),
        row("other", "N=30", {0: 0.60, 1: 0.62, 2: 0.61, 3: 0.99, 4: 0.99}),
    ]
    table = parsed(rows=rows, gains=[gain(over_best_of=["lucky", "other", "tuning"])])
    (told,) = [told for told in gain_sentences(table) if told.startswith("N=30")]
    assert "which is tuning (0.710 ± 0.025; lucky without some of its seeds), = **+0.100 ± " in told
    assert "(n = 3; " in told


def test_target_is_not_met_while_something_that_it_is_over_lacks_seeds():
    rows = [
        row("fusion", "N=30", [0.60, 0.71, 0.64]),
        row("tuning", "N=30", [0.1, 0.21, 0.14]),
        row("noise", "N=30", [0.9, 0.9]),
    ]
    table = parsed(rows=rows, gains=[gain(over_best_of=["tuning", "noise"], at_least=0.1)])
    (told,) = [told for told in gain_sentences(table) if told.startswith("N=30")]
    assert "noise without some of its seeds" in told and told.endswith("**not met**.")
    (found,) = cells(comparison_section(table, [], "##"), "g")
    assert found[2].endswith("(over tuning; above 0; noise without some seeds; **not met**)")


@pytest.mark.parametrize("seedless", [["merge"], ["merge", "other merge"]])
def test_best_of_several_may_depend_on_no_seed(seedless):
    rows = [
        row("fusion", None, [0.50, 0.52, 0.51]),
        row("tuning", None, [0.30, 0.31, 0.32]),
        *(row(name, None, {None: 0.9 - 0.1 * i}) for i, name in enumerate(reversed(seedless))),
    ]
    (told,) = gain_sentences(
        parsed(rows=rows, cases=[], gains=[gain(over_best_of=["tuning", *seedless], at_least=0.1)])
    )
    assert f"which is {seedless[-1]} (0.900), = **-0.390 ± " in told and told.endswith("**not met**.")


def test_best_of_several_for_a_row_that_depends_on_no_seed():
    rows = [
        row("merge", None, {None: 0.9}),
        row("tuning", None, [0.30, 0.31, 0.32]),
        row("fusion", None, [0.50, 0.52, 0.51]),
    ]
    asked = gain(row="merge", over_best_of=["tuning", "fusion"])
    (told,) = gain_sentences(parsed(rows=rows, cases=[], gains=[asked]))
    assert "which is fusion (0.510 ± 0.025), = **+0.390 ± " in told


def test_loss_is_told_as_one():
    rows = [row("fusion", "N=0", [0.3, 0.31]), row("tuning", "N=0", [0.5, 0.51])]
    (told,) = gain_sentences(parsed(rows=rows, gains=[gain(over="tuning", at_least=0.1)]))
    assert "**-0.200 ± 0.000** (n = 2; the whole 95% interval is below 0)" in told and told.endswith("**not met**.")


def test_gain_whose_rows_are_missing_says_which():
    asked = gain(over="noise", cases=["N=0"]), gain(over_best_of=["x", "y"]), gain(row="z", over="tuning")
    table = parsed(gains=list(asked))
    told = gain_sentences(table)
    assert told[0] == "N=0: **g** = fusion - noise: noise is missing."
    assert told[1:4] == [f"{case}: **g** = fusion - best of (x; y): x and y are missing." for case in CASES]
    assert told[-1] == "N=30: **g** = z - tuning: z is missing."
    assert cells(comparison_section(table, [], "##"), "g")[0] == ["missing", "-", "-"]


def test_rows_without_a_common_seed_have_no_gain():
    rows = [row("fusion", "N=0", {0: 0.5}), row("tuning", "N=0", {1: 0.4})]
    told = gain_sentences(parsed(rows=rows, gains=[gain(over="tuning", cases=["N=0"])]))
    assert told == ["N=0: **g** = fusion - tuning: fusion and tuning have no seed in common."]


# ---- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"over": "noise", "over_best_of": ["tuning"]}, "gains[0].over and over_best_of exclude each other"),
        ({}, "gains[0].over is missing"),
        ({"over_best_of": []}, "gains[0].over_best_of is empty"),
        ({"over_best_of": ["tuning", 3]}, "a list of different names was expected"),
        ({"over": "noise", "cases": ["N=99"]}, "gains[0].cases names 'N=99'; there is N=0, N=10, N=30"),
        ({"over": "noise", "dataset": "c"}, "gains[0].dataset names 'c'; there is a, b"),
        ({"over": "noise", "at_least": "0.1"}, "gains[0].at_least is '0.1'; a number was expected"),
        ({"over": "noise", "at_least": 0.1, "interval_above": float("nan")}, "interval_above is nan; a finite number"),
    ],
)
def test_gain_that_cannot_be_read_is_refused(keys, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        parsed(gains=[gain(**keys)])


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (row("fusion", "N=30", [0.5]), "has two rows 'fusion' for the same case"),
        (row("experts", "N=0", [0.5]), "has two rows 'experts' for the same case"),
        (row("tuning", None, [0.5]), "has two rows 'tuning' for the same case"),
        (row("new", "N=99", [0.5]), "rows[10].case is 'N=99', which is not one of its cases: N=0, N=10, N=30"),
        (row("new", "N=0", {}), "rows[10] has no runs"),
        (row("new", "N=0", [0.5]) | {"runs": [{"seed": 0, "scores": {}}]}, "rows[10] must each have a seed"),
        (
            row("new", "N=0", [0.5]) | {"runs": [{"seed": 0, "scores": {"a": 0.1}}] * 2},
            "the runs of rows[10] must each have a seed of their own",
        ),
        (
            row("new", "N=0", [0.5]) | {"runs": [{"seed": 0, "scores": {"a": 0.1}, "made_seconds": "3"}]},
            "rows[10].runs.made_seconds is '3'; a number was expected",
        ),
    ],
)
def test_row_that_does_not_fit_is_refused(entry, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        parsed(rows=[*comparison()["rows"], entry])


def test_case_named_twice_is_refused():
    with pytest.raises(ValueError, match=r"cases is .*; a list of different names was expected"):
        parsed(cases=["N=0", "N=0"])
