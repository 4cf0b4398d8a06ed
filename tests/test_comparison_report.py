"""Comparisons over cases: the grid, lines over the cases, the report's files."""

import json
import re

import pytest

from heterofusion.report.comparison import comparison_section, comparison_table, parse_comparison
from heterofusion.report.comparison_curves import case_lines, draw_cases
from heterofusion.report.comparison_picture import comparison_drawings, draw_comparison
from recipe_runner import error_line, flags, recipe, succeeds
from report_builders import CASES, cells, comparison, gain, parsed, row, write
from report_builders import content as result_content

report = recipe("report")
pytestmark = pytest.mark.usefixtures("logging_restored")


# ---- tables -----------------------------------------------------------------------------------------------------


def test_grid_has_a_column_per_case_and_repeats_what_no_case_enters():
    text = comparison_table(parsed())
    assert text.splitlines()[0] == "|  | N=0 | N=10 | N=30 |"
    assert cells(text, "experts") == [["0.800"] * 3]
    assert cells(text, "tuning") == [["-", "0.320 ± 0.050", "0.553 ± 0.137"]]
    assert cells(text, "noise")[0][:2] == ["-", "-"]
    assert [line for line in text.splitlines() if line.startswith("| **")] == [
        f"| **{group}** |  |  |  |" for group in ("bounds", "tuned", "controls")
    ]


def test_groups_stay_together_when_rows_come_case_by_case():
    rows = sorted(comparison()["rows"], key=lambda each: CASES.index(each["case"] or "N=30"))
    text = comparison_table(parsed(rows=rows))
    assert text.count("**tuned**") == 1


def test_section_has_a_detailed_table_per_case_with_its_own_gains():
    content = comparison(gains=[gain(over="tuning"), gain(name="h", over="noise", cases=["N=30"])], search_budget=4)
    content |= {"search_case": "N=10", "normalize_by": "experts"}
    text = comparison_section(parse_comparison(content, "x"), [("t", "x.png")], "##", {"N=30": [("u", "y.png")]})
    head, zero, ten, thirty = re.split(r"\n### N=\d+\n", text)
    assert "![t](x.png)" in head and "![u](y.png)" in thirty and "y.png" not in ten
    assert "4 validation runs, on data of their own and in the case N=10" in head
    assert head.count("**fusion**: about fusion") == 1 and "about" not in zero
    assert "**g** = fusion - tuning = **" not in zero and "noise" not in zero
    assert "- **g** = fusion - tuning = **+0.190 ±" in ten and "**h**" not in ten
    assert "- **g** = fusion - tuning = **+0.087 ±" in thirty and "**h** = fusion - noise = **+0.290 ±" in thirty
    mean = (0.31 / 0.7 + 0.51 / 0.9) / 2  # of fusion at N=0
    assert cells(zero, "fusion") == [
        ["0.310", "0.510", "0.410 ± 0.127", f"{mean:.3f}", "2", "1.0", "-", "1.0", "-", "1", "no", "no"]
    ]


def test_searches_are_shown_once_for_all_cases():
    content = comparison()
    for entry in content["rows"]:
        if entry["name"] == "fusion":
            tried = [{"settings": {"learning_rate": 0.1}, "score": 0.5}]
            entry |= {"settings": {"learning_rate": 0.1}, "search": {"runs": 1, "seconds": 2.0, "tried": tried}}
    text = comparison_section(parse_comparison(content, "x"), [], "##")
    assert text.count("| fusion | learning_rate 0.1 | 1 | learning_rate 0.1: 0.500 |") == 1


@pytest.mark.parametrize(("chosen", "told"), [(0.1, "0.1"), (0.3, "0.3 (at the edge)"), (0.01, "0.01 (at the edge)")])
def test_value_at_the_edge_of_what_was_tried_is_marked(chosen, told):
    content = comparison()
    tried = [{"settings": {"learning_rate": rate}, "score": 0.5} for rate in (0.01, 0.3, 0.1)]
    content["rows"][1] |= {
        "settings": {"learning_rate": chosen}, "search": {"runs": 3, "seconds": 2.0, "tried": tried}
    }  # fmt: skip
    assert f"| fusion | learning_rate {told} | 3 | " in comparison_section(parse_comparison(content, "x"), [], "##")


# ---- pictures ---------------------------------------------------------------------------------------------------


def test_lines_are_methods_in_three_cases_and_what_no_case_changes():
    lines = case_lines(parsed(gains=[gain(over="distilling")]))
    assert [(line.name, list(line.rows), line.is_flat) for line in lines] == [
        ("fusion", [0, 1, 2], False),
        ("distilling", [0, 1, 2], False),
        ("experts", [0, 1, 2], True),
    ]
    figure = draw_cases(lines, CASES, None, "mean F1")
    (axes,) = figure.axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == CASES
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["experts", "fusion", "distilling"]  # as they end
    drawn = {tuple(round(y, 3) for y in line.get_ydata()) for line in axes.lines}
    assert {(0.41, 0.51, 0.64), (0.21, 0.35, 0.43), (0.8, 0.8)} <= drawn


def test_at_most_eight_lines_and_those_that_gains_are_of_come_first():
    rows = [row(f"m{index}", case, [0.1 * index, 0.1]) for index in range(10) for case in CASES]
    for entry in rows[:6]:
        entry["source_control"] = "noise"
    table = parsed(rows=rows, gains=[gain(row="m9", over="m1")])
    names = [line.name for line in case_lines(table)]
    assert names == ["m9", "m2", "m3", "m4", "m5", "m6", "m7", "m8"]  # m0 and m1 are controls
    assert [drawing.case for drawing in comparison_drawings(table, "score")] == [None, *CASES]  # with m0 and m1


def test_bars_of_two_seeds_do_not_stretch_the_picture():
    table = parsed(rows=[row("fusion", case, [0.2, 0.9]) for case in CASES])
    (axes,) = draw_cases(case_lines(table), CASES, None, "score").axes
    assert axes.get_ylim()[0] > -0.1 and axes.get_ylim()[1] < 1.1
    (axes,) = draw_comparison(table.of_case("N=0"), None, "score").axes
    (label,) = [text for text in axes.texts if text.get_text() == "0.550"]
    assert label.xy[0] == axes.get_xlim()[1]  # beside the picture, not outside it


def test_cases_with_rows_that_no_line_shows_have_a_picture_of_their_own():
    drawings = comparison_drawings(parsed(), "mean score")
    assert [drawing.case for drawing in drawings] == [None, "N=10", "N=30"]  # tuning is in two cases, noise in one
    assert drawings[0].title == (
        "Mean score over the cases, mean and 95% interval; without marks: methods that no case changes"
    )
    (axes,) = drawings[2].draw(None).axes
    names = [tick.get_text() for tick in axes.get_yticklabels()]
    assert names == ["experts", "fusion", "tuning", "distilling", "noise"] and "N=30" in axes.get_xlabel()


def test_two_cases_make_no_lines():
    rows = [each for each in comparison()["rows"] if each["case"] != "N=10"]
    drawings = comparison_drawings(parsed(rows=rows, cases=["N=0", "N=30"]), "score")
    assert [drawing.case for drawing in drawings] == ["N=0", "N=30"]
    flat = [row("experts", None, {None: 0.8})]
    assert [drawing.case for drawing in comparison_drawings(parsed(rows=flat), "score")] == [None]


# ---- the recipe -------------------------------------------------------------------------------------------------


def test_report_shows_two_comparisons_and_their_pictures_have_names_of_their_own(tmp_path):
    files = []
    plain = {"rows": [row("a method", None, [0.5])], "title": "Without cases"}
    like_it = comparison(cases=["N=0", "N 0", "N=30"], title="With cases")  # two that make one name of a file
    for entry in like_it["rows"]:
        entry["case"] = "N 0" if entry["case"] == "N=10" else entry["case"]
    like_it["rows"].append(row("control", "N=0", [0.1, 0.2]))
    for name, content in (("plain", plain), ("cases", like_it)):
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps(content))
    results = write(tmp_path / "results", result_content(experiment="x"))
    output = tmp_path / "report"
    succeeds(report.main, flags({"results": [results], "comparisons": files, "output_dir": output}))
    text = (output / "report.md").read_text()
    names = ["comparison-1", "comparison-2", "comparison-2-n-0", "comparison-2-n-0-2", "comparison-2-n-30"]
    for name in names:
        assert text.count(f"(pictures/{name}.png)") == 1
        assert (output / "pictures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert text.index("## Without cases") < text.index("## With cases") < text.index("### N=30")
    assert json.loads((output / "report.json").read_text())["comparisons"] == [plain, like_it]
    assert "\n\nMade from 1 result on cpu and 2 comparisons, with " in text


def test_report_of_a_comparison_alone_tells_its_versions(tmp_path):
    file = tmp_path / "comparison.json"
    file.write_text(json.dumps(comparison(versions={"torch": "2.13.0", "peft": "0.21.2"})))
    succeeds(report.main, flags({"comparisons": [file], "output_dir": tmp_path / "report"}))
    text = (tmp_path / "report" / "report.md").read_text()
    assert "\n\nMade from 1 comparison, with torch 2.13.0, peft 0.21.2.\n\n" in text
    numbers = json.loads((tmp_path / "report" / "report.json").read_text())
    assert numbers["groups"] == [] and len(numbers["comparisons"]) == 1


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, ["nothing to report", "--results", "--comparisons", "--adapters"]),
        ({"claims": "claims.yaml"}, ["--claims is about --results"]),
        ({"baseline": "base"}, ["--baseline is about --results"]),
        ({"rows": ["base"]}, ["--rows is about --results"]),
    ],
)
def test_report_without_results_refuses_what_is_about_them(given, words, tmp_path, capsys):
    file = tmp_path / "comparison.json"
    file.write_text(json.dumps(comparison()))
    comparisons = {"comparisons": [file]} if given else {}
    argv = flags({**comparisons, **given, "output_dir": tmp_path / "report"})
    error_line(capsys, report.main, argv, *words)
    assert not (tmp_path / "report").exists()


def test_report_refuses_a_comparison_of_unknown_cases(tmp_path, capsys):
    file = tmp_path / "comparison.json"
    file.write_text(json.dumps(comparison(cases=["N=0"])))
    results = write(tmp_path / "results", result_content(experiment="x"))
    output = tmp_path / "report"
    argv = flags({"results": [results], "comparisons": [file], "output_dir": output})
    error_line(capsys, report.main, argv, f"comparison {file}: rows[2].case is 'N=10'")
    assert not output.exists()
