"""Reports: what is read, tables over seeds, paired differences, and the recipe from end to end."""

import json
import math
import re
import shutil
import statistics
from urllib.parse import unquote

import pytest
import yaml
from scipy import stats

from heterofusion.data.markdown import markdown_table
from heterofusion.report.document import column_sentence, details_table, difference_table, group_table
from heterofusion.report.intervals import differences, estimate, mean_per_seed
from heterofusion.report.results import MEAN, find_results, parse_result
from heterofusion.report.rows import baseline_difference, make_groups, make_rows
from heterofusion.report.sensitivity import find_curves
from heterofusion.report.write import read_adapters
from recipe_runner import error_line, flags, recipe, succeeds
from report_builders import OVER, TASKS, content, paired_results, result, write

pytestmark = pytest.mark.usefixtures("logging_restored")

report = recipe("report")
# ---- intervals --------------------------------------------------------------------------------------------------


def test_interval_is_scipys():
    values = [0.51, 0.55, 0.56, 0.60]
    low, high = stats.t.interval(0.95, 3, loc=statistics.fmean(values), scale=stats.sem(values))
    found = estimate(values)
    assert found.interval == pytest.approx((low, high))
    by_hand = 3.182446305284263 * statistics.stdev(values) / 2  # t(0.975, 3)
    assert found.half_width == pytest.approx(by_hand)
    assert found.text() == f"0.555 ± {by_hand:.3f}"


def test_one_value_has_no_interval():
    found = estimate([0.5])
    assert (found.mean, found.half_width, found.interval, found.text()) == (0.5, None, None, "0.500")
    assert estimate([]) is None
    assert estimate([-0.0001]).text(signed=True) == "0.000"


def test_differences_are_paired_and_seedless_results_stand_for_all_seeds():
    left = {("a",): {"0": 0.5, "1": 0.6, "2": 0.9}, ("b",): {"0": 0.1}}
    right = {("a",): {"0": 0.4, "1": 0.4}, ("c",): {"0": 0.0}}
    assert differences(left, right) == {("a",): {"0": pytest.approx(0.1), "1": pytest.approx(0.2)}}
    base = {("a",): {None: 0.5}}
    assert differences(left, base)["a",] == {"0": 0.0, "1": pytest.approx(0.1), "2": pytest.approx(0.4)}
    assert differences(base, left)["a",]["2"] == pytest.approx(-0.4)


def test_seed_that_a_combination_lacks_is_left_out():
    means, dropped = mean_per_seed({("a",): {"0": 0.2, "10": 0.4, "2": 0.3}, ("b",): {"2": 0.5, "10": 0.6}})
    assert means == {"2": pytest.approx(0.4), "10": pytest.approx(0.5)} and list(means) == ["2", "10"]
    assert dropped == ["0"]


# ---- reading ----------------------------------------------------------------------------------------------------

BAD = [
    ({"name": None}, "name is null"), ({"datasets": {}}, "datasets is empty"), ({"labels": []}, "labels is []"),
    ({"labels": {"a": [1]}}, "labels.a"), ({"fusion": {"alpha_init": []}}, "fusion.alpha_init is []"),
    ({"datasets": {"x": {"metric": "NER"}}}, "datasets.x.scores is missing"), ({"seconds": "long"}, "seconds"),
    ({"datasets": {"x": 1}}, "datasets.x is 1"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "words"), BAD, ids=lambda value: str(value)[:30])
def test_field_that_is_wrong_raises(changes, words, tmp_path):
    write(tmp_path, {**content(), **changes})
    with pytest.raises(ValueError, match=re.escape(words)) as raised:
        find_results([tmp_path])
    assert str(tmp_path / "00" / "results.json") in str(raised.value)


def test_score_that_is_not_finite_raises():
    made = content()
    made["datasets"]["re_town"]["score"] = math.nan
    with pytest.raises(ValueError, match=r"datasets\.re_town\.score is nan"):
        parse_result(made, "x", "results x")


def test_search_passes_over_other_programs_and_keeps_an_order(tmp_path, caplog):
    write(tmp_path, content(seed=1), content(seed=0), {"scores": {}})
    found = find_results([tmp_path, tmp_path / "01" / "results.json"])
    assert [each.seed for each in found] == ["1", "0"]
    assert [each.origin for each in found] == [f"{tmp_path.name}/00/results.json", f"{tmp_path.name}/01/results.json"]
    assert "02/results.json" in caplog.text
    with pytest.raises(ValueError, match="labels is missing"):
        find_results([tmp_path / "02" / "results.json"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no results\.json"):
        find_results([tmp_path / "empty"])


# ---- rows and tables --------------------------------------------------------------------------------------------


def test_rows_average_over_seeds_and_say_only_labels_that_differ():
    results = [
        result(scores=(0.5 + 0.1 * seed, 0.7), seed=seed, experiment="noise", anchor="x", case=case)
        for case in ("clean", "noisy")
        for seed in (0, 1, 2)
    ] + [result("base", scores=(0.2, 0.3), experiment="noise", anchor="x", case="clean")]
    (group,) = make_groups(results, "experiment", row_order=["fused"])
    assert group.value == "noise" and group.common == {"anchor": "x"} and group.columns == list(TASKS)
    assert [group.text(row, "experiment") for row in group.rows] == [
        "fused (case clean)", "fused (case noisy)", "base (case clean)",
    ]  # fmt: skip
    table = group_table(group, "experiment").splitlines()
    assert table[0] == "|  | ner_kitchen | re_town | mean | n | fusion, s | evaluation, s |"
    half = stats.t.ppf(0.975, 2) * 0.1 / math.sqrt(3)
    expected = f"0.600 ± {half:.3f} | 0.700 ± 0.000 | 0.650 ± {half / 2:.3f} | 3 | - | 12.0 |"
    assert table[2] == f"| fused (case clean) | {expected}"
    assert table[4] == "| base (case clean) | 0.200 | 0.300 | 0.250 | 1 | - | 12.0 |"
    assert "ner_kitchen: micro-F1 of NE, 100 examples; re_town: micro-F1 of RE" in column_sentence(group)
    assert "| base (case clean) | re_town | 0.300 | 0.150 |" in details_table(group, "experiment")


def test_seed_and_seconds_come_from_the_fusion():
    row = make_rows([result(fusion={"seed": 3}), result(fusion={"seed": 4, "train_seconds": 60.0})])
    assert [each.seed for each in row[0].results] == ["3", "4"] and row[0].seconds(of_fusion=True) == 50.0


def test_fusions_of_other_settings_are_other_rows():
    rows = make_rows([result(fusion={"alpha_init": alpha}) for alpha in (0.05, 0.3)])
    assert [dict(row.labels) for row in rows] == [{"alpha_init": "0.05"}, {"alpha_init": "0.3"}]


def test_same_row_and_seed_twice_raises():
    with pytest.raises(ValueError, match="are both 'fused' with the same labels and seed 1"):
        make_rows([result(seed=1), result(seed=1)])


def test_missing_data_set_leaves_the_mean_out_and_says_so():
    short = result("sft", scores=(0.4,), tasks=TASKS[:1], seed=0)
    (group,) = make_groups([result(seed=0), short], "experiment")
    assert "| sft | 0.400 | - | - | 1 |" in group_table(group, "experiment")
    assert [warning for warning in group.warnings if "sft lacks re_town: it has no mean, for one over" in warning]
    part = result(scores=(0.4,), tasks=TASKS[:1], seed=1)
    (group,) = make_groups([result(seed=0), part], "experiment")
    assert "its mean is over 1 of 2 seeds" in group.warnings[0] and "re_town of seed 1" in group.warnings[0]
    assert group.rows[0].estimate(MEAN, group.columns).values == (0.6,)


def test_columns_that_cannot_be_compared_are_warned_of():
    other = content("sft")
    other["datasets"]["re_town"] |= {"metric": "NER", "examples": 50}
    (group,) = make_groups([result(), parse_result(other, "x", "x")], "experiment")
    assert "different metrics (f1 of NER, f1 of RE)" in group.warnings[0]
    assert "different numbers of examples (50, 100)" in group.warnings[1]


def test_order_with_an_unknown_name_raises():
    with pytest.raises(ValueError, match=r"--columns has 'x', which no result has; there is ner_kitchen, re_town"):
        make_groups([result()], "experiment", column_order=["x"])


def test_markdown_cells_cannot_end_a_cell():
    assert markdown_table(["a|b"], [["x\ny"], [0.5], [None]]).splitlines() == [
        "| a\\|b |", "|---|", "| x y |", "| 0.500 |", "| - |",
    ]  # fmt: skip


def test_difference_to_a_baseline_is_paired_by_labels_and_seed():
    (group,) = make_groups(paired_results(), "experiment")
    row = next(row for row in group.rows if row.name == "fused" and row.labels["anchor"] == "y")
    found = baseline_difference(row, group, "sft", MEAN, "experiment")
    assert found.mean == pytest.approx(0.03) and found.half_width == pytest.approx(0, abs=1e-12)
    assert len(found.values) == 3
    table = difference_table(group, "experiment", "sft")
    assert "| fused (anchor y) | **+0.020 ± 0.000** | **+0.040 ± 0.000** | **+0.030 ± 0.000** |" in table
    assert "| sft" not in table
    by_text = baseline_difference(row, group, "fused (anchor x)", MEAN, "experiment")
    assert by_text.mean == pytest.approx(0.2)


def test_curve_of_a_setting_that_was_varied():
    results = [
        result(scores=(0.5 + alpha / 10 + seed / 100, 0.7), seed=seed, fusion={"alpha_init": alpha}, case=f"a{alpha}")
        for alpha in (0.9, 0.05, 0.3)
        for seed in (0, 1)
    ]
    results.append(result("base"))
    (group,) = make_groups(results, "experiment")
    (curve,) = find_curves(group)
    assert curve.setting == "alpha_init" and curve.default == 0.3 and list(curve.series) == ["fused"]
    lines = curve.series["fused"]
    assert [x for x, _ in lines.mean] == [0.05, 0.3, 0.9]
    assert lines.mean[1][1].mean == pytest.approx((0.535 + 0.7) / 2) and lines.mean[1][1].half_width > 0
    assert lines.tasks["ner_kitchen"][2][1].values == pytest.approx((0.59, 0.60))
    assert find_curves(make_groups(results[:4], "experiment")[0]) == []  # two values make no curve


# ---- the recipe -------------------------------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path):
    """Two seeds of a noise and a sensitivity experiment, and a fused adapter."""
    made = []
    for seed in (0, 1):
        for case, score in (("clean", 0.6), ("noisy", 0.59)):
            scores = (score + seed / 100, score)
            made.append(content("fused", scores, seed, {}, experiment="noise", case=case))
        made += [
            content("fused", (0.5 + a / 10, 0.6), seed, {"alpha_init": a}, experiment="sensitivity")
            for a in (0.05, 0.3, 0.9)
        ]
    made.append(content("base", (0.1, 0.2), experiment="noise"))
    folder = tmp_path / "fused"
    folder.mkdir()
    modules = [
        {
            "path": f"model.layers.{layer}.self_attn.q_proj", "role": "q_proj", "layer": layer, "rank": 8,
            "delta_ratio": 0.02, "gate_sparsity": 0.3,
            "sources": [{"source": 0, "layer": layer, "attention": 1.0}],
        }
        for layer in range(2)
    ]  # fmt: skip
    diagnostics = {"target": {"name": "t", "layers": 2}, "sources": [{"name": "s", "layers": 2}], "modules": modules}
    (folder / "diagnostics.json").write_text(json.dumps(diagnostics))
    log = [{"step": 1, "lm_loss": 2.0, "rdm_loss": 0.5, "alpha/q_proj": 0.3}, {"step": 2, "lm_loss": 1.0}]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    return {"results": [write(tmp_path / "runs", *made)], "adapters": [folder], "output_dir": tmp_path / "out"}


def test_recipe_writes_report_numbers_and_pictures(runs, tmp_path):
    (tmp_path / "claims.yaml").write_text(yaml.safe_dump([{**OVER, "at_least": -0.02}]))
    document = tmp_path / "pages" / "RESULTS (new).md"
    more = {
        "claims": tmp_path / "claims.yaml", "baseline": "base", "output_file": document, "title": "A title",
        "intro": "Some words.", "command": "python recipes/report.py", "details": True,
    }  # fmt: skip
    succeeds(report.main, flags({**runs, **more}))
    text = document.read_text()
    for words in (
        "# A title", "Some words.", "```bash\npython recipes/report.py\n```", "## experiment: noise",
        "## experiment: sensitivity", "| fused (case clean) | 0.605 ± ", "**agrees**", "Difference to `base`",
        "All scores of the metrics:", "## The fusion fused", "There is no row `base` here", "40.0 | 12.0 |",
    ):  # fmt: skip
        assert words in text, words
    assert str(tmp_path) not in text
    targets = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert len(targets) == 1 + 2 + 5
    for target in targets:
        assert (document.parent / unquote(target)).read_bytes().startswith(b"\x89PNG"), target
    numbers = json.loads((runs["output_dir"] / "report.json").read_text())
    row = numbers["groups"][0]["rows"][1]
    assert row["labels"] == {"experiment": "noise", "case": "clean"} and row["seeds"] == ["0", "1"]
    assert row["scores"]["ner_kitchen"]["values"] == pytest.approx([0.6, 0.61])
    assert row["differences"]["mean"]["mean"] == pytest.approx(0.6025 - 0.15)
    assert numbers["claims"][0]["verdict"] == "agrees" and str(tmp_path) not in json.dumps(numbers)
    assert sorted(numbers["pictures"]) == sorted(path.name for path in (runs["output_dir"] / "pictures").iterdir())


def test_adapters_of_the_same_name_are_told_apart(runs, tmp_path):
    folders = [tmp_path / name / "adapter" for name in ("seed=0", "seed=1")]
    for folder in folders:
        shutil.copytree(runs["adapters"][0], folder)
    assert [adapter.name for adapter in read_adapters(folders)] == ["seed_0/adapter", "seed_1/adapter"]
    assert [adapter.name for adapter in read_adapters(folders[:1] * 2)] == ["adapter"]


def test_recipe_replaces_only_what_it_wrote(runs, tmp_path, capsys):
    config = tmp_path / "report.yaml"
    config.write_text(yaml.safe_dump({"results": [str(runs["results"][0])], "output_dir": str(runs["output_dir"])}))
    succeeds(report.main, [f"--config={config}"])
    pictures = runs["output_dir"] / "pictures"
    (pictures / "method.png").write_bytes(b"mine")
    assert (pictures / "scores-noise.png").exists()
    error_line(capsys, report.main, [f"--config={config}"], "is not empty", "--overwrite true")
    again = ["--group_by", "case", "--overwrite", "true"]
    succeeds(report.main, [f"--config={config}", *again])
    assert (pictures / "method.png").read_bytes() == b"mine" and not (pictures / "scores-noise.png").exists()
    assert "case: clean" in (runs["output_dir"] / "report.md").read_text()
    assert not list(runs["output_dir"].glob(".report-*"))


def test_recipe_refuses_what_cannot_be_right(runs, capsys, tmp_path):
    def fails(*words, **changed):
        error_line(capsys, report.main, flags({**runs, **changed}), *words)
        assert not runs["output_dir"].exists()

    fails("--results", "does not exist", results=["nowhere"])
    fails("--baseline 'x'", "base, fused", baseline="x")
    fails("--adapters", "neither", adapters=[tmp_path / "runs"])
    fails("--rows has 'x'", rows=["x"])
    fails("--claims", "cannot be read", claims=tmp_path / "none.yaml")
    (tmp_path / "there.md").write_text("words")
    fails("--output_file", "exists", output_file=tmp_path / "there.md")


def test_help_has_a_sentence_for_every_flag():
    for field in report.ReportArguments.__dataclass_fields__.values():
        assert re.fullmatch(r"[A-Z].*\.", field.metadata["help"]), field.name
