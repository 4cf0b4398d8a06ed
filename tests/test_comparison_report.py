"""The report of a comparison over cases: grid, gains with targets, pictures."""

import pytest

from heterofusion.report.comparison import comparison_section, comparison_table, gain_sentences, parse_comparison
from heterofusion.report.comparison_curves import case_lines
from heterofusion.report.comparison_gains import gain_table
from heterofusion.report.comparison_picture import comparison_drawings

CASES = ["N=0", "N=10", "N=30"]


def row(name, case, means, group="methods", control=None):
    """A row with two data sets, of which b is 0.1 better."""
    runs = [
        {
            "seed": seed if len(means) > 1 else None, "scores": {"a": mean - 0.05, "b": mean + 0.05},
            "making_seconds": 2.0, "made_seconds": 3.0, "evaluation_seconds": 1.0, "peak_memory_bytes": 2**30,
        }
        for seed, mean in enumerate(means)
    ]  # fmt: skip
    return {
        "name": name, "case": case, "group": group, "runs": runs, "models_at_inference": 1, "needs_task_id": False,
        "ran_source_models": False, "source_control": control, "made": ["labels"],
    }  # fmt: skip


def comparison(gains=()):
    rows = [row("anchor", None, [0.2])]
    for index, case in enumerate(CASES):
        rows.append(row("fused", case, [0.8 + 0.05 * index, 0.82 + 0.05 * index, 0.81 + 0.05 * index]))
        rows.append(row("tuned", case, [0.79 + 0.05 * index, 0.80 + 0.05 * index, 0.80 + 0.05 * index]))
    for case in CASES[1:]:
        rows.append(row("noise", case, [0.50, 0.51, 0.52], "controls", "noise"))
        rows.append(row("shuffled", case, [0.60, 0.40, 0.35], "controls", "shuffle"))
    content = {"title": "T", "rows": rows, "gains": list(gains), "cases": CASES, "normalize_by": None, "missing": []}
    return parse_comparison(content, "x")


def line(text, beginning):
    (found,) = [each for each in text.splitlines() if each.startswith(beginning)]
    return [cell.strip() for cell in found.split("|")[1:-1]]


def test_grid_has_a_column_per_case_and_a_method_without_cases_in_all():
    text = comparison_table(comparison())
    assert line(text, "|  |") == ["", *CASES]
    assert line(text, "| anchor")[1:] == ["0.200"] * 3
    cells = line(text, "| fused")[1:]
    assert [cell.split(" ± ")[0] for cell in cells] == ["0.810", "0.860", "0.910"] and "±" in cells[0]
    assert line(text, "| noise")[1:] == ["-", line(text, "| noise")[2], line(text, "| noise")[2]]


def test_every_case_has_the_detailed_table_too():
    text = comparison_section(comparison(), [], "##")
    assert text.count("labels etc., s") == len(CASES)
    for case in CASES:
        assert f"N={case[2:]}" in text
    assert text.count("| noise |") >= 2


@pytest.mark.parametrize(
    ("gain", "told"),
    [
        # noise is 0.51, shuffled 0.45 by their means
        ({"over_best_of": ["noise", "shuffled"], "at_least": 0.3}, ["which is noise", "+0.350", "**met**"]),
        ({"over_best_of": ["noise", "shuffled"], "at_least": 0.36}, ["+0.350", "mean at least 0.36", "**not met**"]),
        ({"over": "tuned", "at_least": 0.0}, ["+0.013", "above 0", "**not met**"]),  # its interval has 0 in it
        ({"over": "tuned", "at_least": 0.0, "interval_above": -0.005}, ["interval above -0.005", "**met**"]),
        ({"over": "anchor", "dataset": "b"}, ["+0.660", "the whole 95% interval is above 0"]),
        ({"over": "gone"}, ["gone is missing"]),
    ],
)
def test_gain_is_told_whatever_it_is(gain, told):
    (sentence,) = gain_sentences(comparison([{"name": "g", "row": "fused", "cases": ["N=10"], **gain}]))
    assert sentence.startswith("N=10: **g**")
    for part in told:
        assert part in sentence, sentence


def test_gains_of_all_cases_are_a_table():
    gains = [
        {"name": "g", "row": "fused", "over": "tuned"},
        {"name": "c", "row": "fused", "over_best_of": ["noise", "shuffled"], "cases": ["N=30"], "at_least": 0.9},
    ]
    text = gain_table(comparison(gains))
    assert line(text, "| **g**")[1:4] == [line(text, "| **g**")[1]] * 3
    last = line(text, "| **c**")
    assert last[1:3] == ["-", "-"] and "over noise" in last[3] and "**not met**" in last[3]


def test_gain_without_over_is_refused():
    with pytest.raises(ValueError, match=r"gains\[0\]"):
        comparison([{"name": "g", "row": "fused"}])


def test_pictures_are_curves_and_one_per_case_with_controls(tmp_path):
    table = comparison([{"name": "g", "row": "fused", "over": "tuned"}])
    lines = {each.name: each for each in case_lines(table)}
    assert set(lines) == {"fused", "tuned", "anchor"}  # the controls are in two cases
    assert lines["anchor"].is_flat and lines["fused"].is_main and list(lines["tuned"].rows) == [0, 1, 2]
    drawings = comparison_drawings(table, "mean score")
    assert [drawing.case for drawing in drawings] == [None, "N=10", "N=30"]
    figure = drawings[0].draw(tmp_path / "curves.png")
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == CASES
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {"fused", "tuned", "anchor"}
    assert (tmp_path / "curves.png").stat().st_size > 5000
