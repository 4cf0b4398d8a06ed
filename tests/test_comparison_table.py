"""The table of a comparison: intervals, gains that are paired by seed, what a method needs, the picture."""

import re

import pytest

from heterofusion.report.comparison import comparison_section, comparison_table, gain_sentences, parse_comparison
from heterofusion.report.comparison_gains import find_gain
from heterofusion.report.comparison_picture import draw_comparison
from heterofusion.report.comparison_record import Gain


def table(**changes):
    """Two rows with three seeds and one without."""

    def row(name, means, **more):
        runs = [
            {"seed": seed, "scores": {"a": mean, "b": mean}, "making_seconds": 1.0, "evaluation_seconds": 1.0,
             "peak_memory_bytes": 2**30}
            for seed, mean in means.items()
        ]  # fmt: skip
        fixed = {"models_at_inference": 1, "needs_task_id": False, "ran_source_models": False, "source_control": None}
        return {"name": name, "group": "", "runs": runs, **fixed, **more}

    rows = [
        row("real", {0: 0.5, 1: 0.6, 2: 0.7}),
        row("noise", {0: 0.45, 1: 0.62, 2: 0.69}, source_control="noise"),
        row("merge", {None: 0.3}, needs_task_id=True),
    ]
    gains = [{"name": "source_gain", "row": "real", "over": "noise"}, {"name": "g", "row": "real", "over": "gone"}]
    return {"rows": rows, "gains": gains, "search_budget": 5, "normalize_by": None, "missing": [], **changes}


def test_undecided_gain_is_called_so_and_a_missing_row_too():
    told = gain_sentences(parse_comparison(table(), "x"))
    assert told[0].endswith("(n = 3; the 95% interval contains 0: undecided).") and "+0.013 ± " in told[0]
    assert told[1].endswith("real - gone: gone is missing.")


def test_gains_are_paired_by_seed():
    parsed = parse_comparison(table(), "x")
    found = find_gain(parsed, Gain("g", "real", ("noise",))).estimate
    assert found.values == pytest.approx((0.05, -0.02, 0.01))
    unseeded = find_gain(parsed, Gain("g", "real", ("merge",))).estimate
    assert unseeded.values == pytest.approx((0.2, 0.3, 0.4))


def test_table_says_what_a_method_needs():
    text = comparison_table(parse_comparison(table(), "x"))
    (merge,) = [line for line in text.splitlines() if line.startswith("| merge")]
    assert [cell.strip() for cell in merge.split("|")][-4:-1] == ["1", "yes", "no"]


def test_rows_of_other_data_are_refused():
    content = table()
    content["rows"][1]["runs"] = [{"seed": 0, "scores": {"a": 0.1}}]
    with pytest.raises(ValueError, match="noise is scored on a, others on other data sets"):
        parse_comparison(content, "x")


@pytest.mark.parametrize(("content", "words"), [([], "an object"), ({"rows": []}, "no rows"), ({}, "rows is missing")])
def test_damaged_comparison_is_refused(content, words):
    with pytest.raises(ValueError, match=words):
        parse_comparison(content, "comparison x")


def test_picture_shows_every_row_and_marks_controls(tmp_path):
    parsed = parse_comparison(table(), "x")
    figure = draw_comparison(parsed, tmp_path / "x.png", "mean F1")
    (axes,) = figure.axes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["real", "noise", "merge"]
    hollow = [line for line in axes.lines if line.get_marker() == "o" and line.get_markerfacecolor() == "white"]
    assert len(hollow) == 1 and "hollow: controls" in axes.get_xlabel()
    assert "## Methods side by side" in comparison_section(parsed, [("t", "x.png")], "##")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("models_at_inference", None, "rows[0].models_at_inference is null"),
        ("needs_task_id", "no", "true or false was"),
    ],
)
def test_row_without_what_the_table_shows_is_refused(name, value, words):
    content = table()
    content["rows"][0][name] = value
    with pytest.raises(ValueError, match=re.escape(words)):
        parse_comparison(content, "comparison x")
    with pytest.raises(ValueError, match=re.escape("gains[0].over is missing")):
        parse_comparison({**table(), "gains": [{"name": "g", "row": "real"}]}, "comparison x")


def test_seconds_that_are_not_known_are_left_out():
    content = table()
    content["rows"][0] |= {"settings": {"x": 1}, "search": {"runs": 1, "seconds": None, "tried": []}}
    content["rows"][0]["runs"] = [{**run, "making_seconds": None} for run in content["rows"][0]["runs"]]
    (line,) = [line for line in comparison_table(parse_comparison(content, "x")).splitlines() if "real" in line]
    assert [cell.strip() for cell in line.split("|")][5:8] == ["3", "-", "-"]


def test_seconds_of_what_methods_share_have_a_column_if_there_are_any():
    content = table()
    assert "labels etc." not in comparison_section(parse_comparison(content, "x"), [], "##")
    content["rows"][0]["runs"] = [{**run, "made_seconds": 60.0 + run["seed"]} for run in content["rows"][0]["runs"]]
    text = comparison_section(parse_comparison(content, "x"), [], "##")
    header, *lines = [line.split("|") for line in text.splitlines() if line.startswith("|")]
    place = [cell.strip() for cell in header].index("labels etc., s")
    assert {line[1].strip(): line[place].strip() for line in lines[1:]} == {"real": "61.0", "noise": "-", "merge": "-"}
