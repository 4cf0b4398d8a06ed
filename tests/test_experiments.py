"""Tables, comparisons, pictures and the report: statistics against their formulas, and what a reader sees."""

import json
import math
import re

import numpy as np
import pytest

from heterofusion.experiments import RunArguments, Runs
from heterofusion.experiments.comparison import Comparison, Method
from heterofusion.experiments.page import Page
from heterofusion.experiments.pictures import draw_alignment, draw_curves, draw_fusion, draw_scores, draw_training
from heterofusion.experiments.tables import (
    NO_SEED,
    Gain,
    Row,
    by_seed,
    case_table,
    difference,
    difference_table,
    estimate,
    gain_text,
    score_frame,
    score_table,
)
from heterofusion.runtime.errors import UserError
from recipe_runner import error_line, recipe


def result(name="fused", scores=None, seed=None, control=None, labels=None, sha=None, **more) -> dict:
    """Content of a results.json."""
    made = {"kind": "fusion", "method": "heterofusion", "seed": seed, "source_control": control}
    scores = {"a": 0.5, "b": 0.7} if scores is None else scores
    return {
        "name": name, "labels": labels or {}, "models_at_inference": 1, "needs_task_id": False, "seconds": 2.0,
        "peak_memory_bytes": 2**30, "mean": sum(scores.values()) / len(scores),
        "made_by": {**made, "ran_source_models": False, "cost": {"seconds": 3.0, "peak_memory_bytes": 2**31}},
        "datasets": {task: {"score": score, "primary": "f1", "sha256": sha or task} for task, score in scores.items()},
        **more,
    }  # fmt: skip


def rows(name: str, *means: float, case: str = "", **more) -> list[Row]:
    """A row per seed with that mean score."""
    return [
        Row(name, [result(name, {"a": mean, "b": mean}, seed, **more)], seed, {"case": case})
        for seed, mean in enumerate(means)
    ]


# ---- statistics -------------------------------------------------------------------------------------------------


def test_estimate_is_the_t_interval():
    found = estimate([0.5, 0.6, 0.9])
    assert found.mean == pytest.approx(2 / 3)
    assert found.half_width == pytest.approx(4.302653 * np.std([0.5, 0.6, 0.9], ddof=1) / math.sqrt(3), rel=1e-6)
    assert str(found) == "0.667 ± 0.517" and found.verdict == "above 0"
    alone = estimate([0.25])
    assert str(alone) == "0.250" and math.isnan(alone.half_width) and alone.verdict == "one seed"
    assert estimate([]) is None and estimate([-1e-9]).text("+") == "0.000"
    assert estimate([0.1, -0.1]).verdict == "undecided" and estimate([-0.1, -0.1001]).verdict == "below 0"


def test_differences_are_paired_by_seed():
    frame = score_frame([*rows("ours", 0.5, 0.7, 0.9), *rows("theirs", 0.4, 0.5), Row("anchor", [result("anchor")])])
    part = dict(iter(frame.groupby("name")))
    incomplete = score_frame([*rows("ours", 0.5), Row("ours", [result(scores={"a": 1.0})], 2, {"case": ""})])
    assert list(by_seed(incomplete)) == [0.5] and list(by_seed(incomplete, "a")) == [0.5, 1.0]
    assert difference(part["ours"], part["theirs"]).tolist() == pytest.approx([0.1, 0.2])
    assert difference(part["ours"], part["anchor"]).tolist() == pytest.approx([-0.1, 0.1, 0.3])  # with every seed
    assert difference(part["anchor"], part["theirs"], "a").tolist() == pytest.approx([0.1, 0.0])


@pytest.mark.parametrize(
    "gain, text",
    [
        (Gain("g", "ours", "weak"), "+0.400 ± 0.127 (above 0)"),
        (Gain("g", "weak", "ours", at_least=0.1), "-0.400 ± 0.127 (below 0; **not met**)"),
        (Gain("g", "ours", ["weak", "strong"], at_least=0.05), "+0.100 ± 0.127 (over strong; undecided; **not met**)"),
        (Gain("g", "ours", "weak", at_least=0.4, above=0.2), "+0.400 ± 0.127 (above 0; **met**)"),
        (Gain("g", "ours", "weak", at_least=0.4, above=0.3), "+0.400 ± 0.127 (above 0; **not met**)"),
        (Gain("g", "ours", ["weak", "lost"], at_least=0.1),
         "+0.400 ± 0.127 (over weak; above 0; without lost; **not met**)"),
        (Gain("g", "ours", ["weak", "half"], at_least=0.1),
         "+0.400 ± 0.127 (over weak; above 0; half without some seeds; **not met**)"),
        (Gain("g", "half", "weak", at_least=0.1), "+0.590 (one seed; **not met**)"),
        (Gain("g", "ours", "lost"), "missing: lost"),
        (Gain("g", "ours", "anchor", dataset="b"), "-0.090 ± 0.127 (undecided)"),
    ],
)  # fmt: skip
def test_gain_tells_sign_rival_and_target(gain, text):
    frame = score_frame(
        [*rows("ours", 0.6, 0.62), *rows("weak", 0.21, 0.21), *rows("strong", 0.51, 0.51), *rows("half", 0.8),
         Row("anchor", [result("anchor")], labels={"case": ""})]
    )  # fmt: skip
    assert gain_text(frame, gain) == text


# ---- tables -----------------------------------------------------------------------------------------------------


def test_score_table_has_groups_intervals_and_costs():
    parts = [result("experts", {"a": 1.0}), result("experts", {"b": 0.8})]
    frame = score_frame(
        [Row("experts", parts, group="References"), *rows("fused", 0.4, 0.6),
         Row("ensemble", [result("ensemble", models_at_inference=3)], searched=12.0, shared=4.0)]
    )  # fmt: skip
    lines = score_table(frame, normalize_by="experts").splitlines()
    assert lines[0].startswith("|  | a (f1) | b (f1) | mean (f1) | normalized | n | making, s | search, s |")
    assert lines[2].startswith("| **References** |  |")
    assert lines[3] == "| experts | 1.000 | 0.800 | 0.900 | 1.000 | 1 | 3 | - | - | 4 | 2 | 2 | yes | yes |"
    assert lines[4] == "| fused | 0.500 | 0.500 | 0.500 ± 1.271 | 0.562 | 2 | 3 | - | - | 2 | 2 | 1 | no | no |"
    assert lines[5].endswith("| 3 | 12 | 4 | 2 | 2 | 3 | no | yes |")


def test_tables_of_cases_and_differences():
    frame = score_frame([*rows("x", 0.2, 0.2, case="N=0"), *rows("x", 0.4, case="N=5"), *rows("y", 0.1, case="N=5")])
    assert case_table(frame).startswith("| mean f1 | N=0 | N=5 |")
    assert case_table(frame).splitlines()[2:] == ["| x | 0.200 ± 0.000 | 0.400 |", "| y | - | 0.100 |"]
    assert difference_table(frame, "y", ("name", "case")).splitlines()[2:] == [
        "| x (case N=0) | - | - | - |",
        "| x (case N=5) | +0.300 | +0.300 | +0.300 |",
    ]


def test_data_that_changed_is_refused():
    with pytest.raises(UserError, match="of another data set a"):
        score_frame([Row("x", [result()]), Row("y", [result(sha="other")])])
    with pytest.raises(UserError, match="two results of a"):
        score_frame([Row("x", [result()]), Row("x", [result()])])


# ---- comparisons ------------------------------------------------------------------------------------------------

MAKER = """
import pathlib, sys, yaml
flags = yaml.safe_load(open(sys.argv[sys.argv.index("--config") + 1]))
output = pathlib.Path(flags["output_dir"])
output.mkdir(parents=True, exist_ok=True)
if flags.get("rate") == 9:
    sys.exit("error: this rate is too large")
score = flags.get("rate", 5) / 10 + flags.get("seed", 0) / 100 - 0.1 * ("control" in flags)
(output / "score").write_text(str(score))
"""
SCORER = """
import json, os, pathlib, sys, yaml
flags = yaml.safe_load(open(sys.argv[sys.argv.index("--config") + 1]))
output = pathlib.Path(flags["output_dir"])
output.mkdir(parents=True, exist_ok=True)
(adapter,) = flags["adapters"]
score = float(open(adapter + "/score").read()) if os.path.isdir(adapter) else 0.1
result = json.loads(%r)
tasks = [pathlib.Path(name).stem for name in flags["dataset_name"]]
result["datasets"] = {task: {"score": score, "primary": "f1", "sha256": task} for task in tasks}
(output / "results.json").write_text(json.dumps(result | {"mean": score}))
"""


@pytest.fixture
def comparison(tmp_path):
    """Makes a comparison of fake recipes."""
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    (recipes / "train.py").write_text(MAKER)
    (recipes / "eval.py").write_text(SCORER % json.dumps(result()))
    for name in ("validation", "test", "replay"):
        (tmp_path / f"{name}.jsonl").write_text(name)

    def make(validation="validation", **more) -> Comparison:
        runs = Runs(RunArguments(str(tmp_path / "out"), jobs=2), recipes)
        flags = [{"dataset_name": [str(tmp_path / f"{name}.jsonl")]} for name in (validation, "test")]
        return Comparison(runs, *flags, **{"cases": {"": [0, 1]}, "budget": 2, **more})

    return make


def method(name="fusion", search=(0, 1), data=(), **more) -> Method:
    def flags(_, seed):
        return {"seed": seed, "dataset_name": list(data)}

    return Method(name, recipe="train", flags=flags, search={"rate": list(search)}, **more)


def test_comparison_searches_then_reports(comparison, tmp_path):
    table = comparison()
    table.add(Method("anchor", scored=lambda _: [{"adapters": ["none"]}], about="before anything"))
    table.add(method(search=(3, 6)))
    table.add(Method("control", like="fusion", flags=lambda *_: {"control": "noise"}))
    table.add(method("lost", search=(3, 9)))
    frame = table.run()
    assert table.chosen == {"fusion": {"rate": 6}}
    assert table.missing == ["lost: the search of lost did not finish"]
    found = {name: by_seed(part).to_dict() for name, part in frame.groupby("name")}
    assert found["anchor"] == {NO_SEED: 0.1}  # no seed enters it: it ran once
    assert found["fusion"] == pytest.approx({0: 0.6, 1: 0.61}) and found["control"] == pytest.approx({0: 0.5, 1: 0.51})
    seeds = [run.flags["seed"] for run in table.runs.all.values() if run.recipe == "train"]
    assert sorted(seeds) == [0, 0, 1, 1, 100, 100, 100]  # what two methods try is one run
    page = Page(tmp_path / "page", "A comparison")
    table.write(page, frame, [Gain("source gain", "fusion", "control")], "anchor")
    text = page.write().read_text()
    assert "| **source gain** = fusion - control | +0.100 ± 0.000 (above 0) | - |" in text
    assert "| fusion | rate 6 | rate 3: 1.300, rate 6: 1.600 |" in text
    assert "- **anchor**: before anything" in text and "- lost: the search" in text
    assert all((tmp_path / "page" / name).is_file() for name in re.findall(r"\]\((pictures/[^)]+)\)", text))
    assert (tmp_path / "page" / "scores.csv").is_file()
    with pytest.raises(ChildProcessError, match="2 of"):
        table.runs.finish()


def test_what_no_case_changes_runs_once(comparison):
    table = comparison(cases={"N=0": [0], "N=5": [0, 1]})
    table.add(Method("anchor", scored=lambda _: [{"adapters": ["none"]}]))
    frame = table.run()
    assert len(table.runs.all) == 1 and frame["case"].tolist() == ["N=0", "N=5"]


def test_unequal_budgets_and_reported_seeds_are_refused(comparison):
    with pytest.raises(UserError, match="3 combinations, but every method gets --search_budget 2"):
        comparison().add(method(search=(1, 2, 3)))
    with pytest.raises(UserError, match="--search_seed 1 is one of the reported seeds"):
        comparison(search_seed=1).run()


@pytest.mark.parametrize(
    "validation, trained, message",
    [
        ("test", "replay", "hyper-parameters are chosen by test data"),
        ("validation", "test", "something is trained on test data"),
        ("validation", "validation", "hyper-parameters are chosen by data that is trained on"),
    ],
)
def test_data_is_kept_apart(comparison, tmp_path, validation, trained, message):
    table = comparison(validation)
    table.add(method(data=[str(tmp_path / f"{trained}.jsonl")]))
    with pytest.raises(UserError, match=message):
        table.run()


# ---- pictures and the report ------------------------------------------------------------------------------------


def diagnostics() -> dict:
    links = [{"source": 0, "layer": 1, "attention": 0.25}, {"source": 1, "layer": 0, "attention": 0.75}]
    module = {"path": "p", "rank": 8, "delta_ratio": 0.5, "gate_sparsity": 0.2, "sources": links}
    sources = [{"name": "x", "layers": 3}, {"name": "y", "layers": 2, "control": "noise"}]
    modules = [{**module, "role": role, "layer": 1} for role in ("v_proj", "q_proj")]
    return {"target": {"name": "t", "layers": 2}, "sources": sources, "modules": modules}


def test_fusion_is_drawn_module_by_module():
    attention, update, gates = draw_fusion(diagnostics()).axes[:3]
    assert [text.get_text() for text in attention.get_yticklabels()] == ["1 x", "2 y [noise]"]
    assert [text.get_text() for text in update.get_yticklabels()] == ["q", "v"]
    values = attention.collections[0].get_array()
    assert values[:, 1].tolist() == [0.25, 0.75] and np.ma.getmaskarray(values)[:, 0].all()
    assert gates.collections[0].get_array()[0, 1] == 0.2
    panels = draw_alignment(diagnostics()).axes
    assert panels[0].collections[0].get_array().reshape(2, 3).tolist() == [[0, 0, 0], [0, 1, 0]]


def test_training_curves_show_what_is_logged():
    entry = {"loss": 1.0, "alpha/v_proj": 0.3, "alpha/q_proj": 0.2, "attention/2-y": 0.5}
    history = [{"step": step, "lm_loss": 1.0 / step, **entry} for step in (1, 2, 3)]
    loss, alpha, attention = draw_training([*history, {"step": 3, "train_loss": 1.0}]).axes
    assert [line.get_label() for line in alpha.lines] == ["q", "v"]
    assert loss.lines[0].get_ydata().tolist() == pytest.approx([1, 1 / 2, 1 / 3])
    assert attention.get_title(loc="left") == "attention (share by source)"


def test_many_rows_are_ranked_and_curves_need_three_points():
    few = draw_scores(score_frame(rows("x", 0.4, 0.6))).axes[0]
    assert len(few.patches) == 2 and few.get_ylabel() == "f1"
    many = score_frame([row for number in range(12) for row in rows(f"x{number}", 0.4)])
    ranking = draw_scores(many).axes[0]
    assert len(ranking.get_yticklabels()) == 12 and ranking.get_xlabel() == "mean f1"
    points = score_frame(
        [*(row for n in (0, 5, 30) for row in rows("x", n / 100, n / 50, case=n)), *rows("y", 1, case=0)]
    )
    axes = draw_curves(points, "case").axes[0]
    assert [container.get_label() for container in axes.containers] == ["x"]


def test_report_has_tables_differences_and_fusions(tmp_path, capsys):
    for name, label in (("anchor", {}), ("fused", {"alpha_init": "0.1"}), ("fused", {"alpha_init": "0.3"})):
        folder = tmp_path / "eval" / f"{name}-{label.get('alpha_init')}"
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(result(name, labels={"experiment": "one", **label})))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "diagnostics.json").write_text(json.dumps(diagnostics()))
    report = recipe("report").main
    arguments = [f"--results={tmp_path / 'eval'}", f"--adapters={adapter}", f"--output_dir={tmp_path / 'out'}"]
    assert report([*arguments, "--baseline=anchor"]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "## one" in text and "| fused (alpha_init 0.1) | 0.500 | 0.700 | 0.600 |" in text
    assert "| fused (alpha_init 0.3) | 0.000 | 0.000 | 0.000 |" in text
    assert "2 aligned modules" in text and "pictures/alignment-1.png" in text
    capsys.readouterr()
    error_line(capsys, report, [*arguments, "--baseline=other"], "--baseline 'other'", "anchor, fused")
    error_line(capsys, report, [f"--output_dir={tmp_path}"], "nothing to report")
    error_line(capsys, report, [*arguments, f"--results={tmp_path / 'no'}"], "no holds no results.json")
