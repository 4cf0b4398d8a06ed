"""Comparisons over cases: the grid, gains and their targets in each case, lines over the cases, the report's files."""

import json
import re

import pytest

from heterofusion.report.comparison import comparison_section, comparison_table, gain_sentences, parse_comparison
from heterofusion.report.comparison_curves import case_lines, draw_cases
from heterofusion.report.comparison_picture import comparison_drawings, draw_comparison
from recipe_runner import error_line, flags, recipe, succeeds
from report_builders import content as result_content
from report_builders import write

CASES = ["N=0", "N=10", "N=30"]
report = recipe("report")
pytestmark = pytest.mark.usefixtures("logging_restored")


def row(name, case, means, group="tuned", **more):
    """A row whose data sets are 0.1 below and above its mean."""
    runs = [
        {"seed": seed, "scores": {"a": mean - 0.1, "b": mean + 0.1}, "making_seconds": 1.0, "evaluation_seconds": 1.0}
        for seed, mean in (means if isinstance(means, dict) else dict(enumerate(means))).items()
    ]
    fixed = {"models_at_inference": 1, "needs_task_id": False, "ran_source_models": False, "source_control": None}
    return {"name": name, "case": case, "group": group, "about": f"about {name}", "runs": runs, **fixed, **more}


def comparison(**changes):
    """Two methods in all cases, one without N=0, one that nothing enters, and a control in one case."""
    rows = [
        row("experts", None, {None: 0.8}, group="bounds"),
        row("fusion", "N=0", [0.40, 0.42]),
        row("fusion", "N=10", [0.50, 0.52, 0.51]),
        row("fusion", "N=30", [0.60, 0.70, 0.62]),
        row("tuning", "N=10", [0.30, 0.32, 0.34]),
        row("tuning", "N=30", [0.50, 0.61, 0.55]),
        row("distilling", "N=0", [0.20, 0.22]),
        row("distilling", "N=10", [0.35, 0.36, 0.34]),
        row("distilling", "N=30", [0.40, 0.47, 0.42]),
        row("noise", "N=30", [0.30, 0.42, 0.33], group="controls", source_control="noise"),
    ]
    return {"cases": CASES, "rows": rows, "gains": [], "missing": [], **changes}


def parsed(**changes):
    return parse_comparison(comparison(**changes), "comparison x")


def cells(text, name):
    """Cells of the row of a method, or of the gain of a name, in the first table that has one."""
    return [
        [cell.strip() for cell in line.split("|")[2:-1]]
        for line in text.splitlines()
        if re.match(rf"\| (\*\*)?{re.escape(name)}(\*\*| \|)", line)
    ]


def gain(**keys):
    return {"name": "g", "row": "fusion", **keys}


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


# ---- gains ------------------------------------------------------------------------------------------------------


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
