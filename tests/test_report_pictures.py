"""Pictures: the arrays that are drawn, and that nothing in a picture overlaps or is missing."""

import math
import random
import sys
from itertools import combinations

import numpy as np
import pytest

from heterofusion.report import draw_scores, draw_training
from heterofusion.report.fusion import alignment_matrix, attention_shares, module_values, parse_fusion
from heterofusion.report.fusion_pictures import (
    alignment_panels,
    draw_alignment,
    draw_attention,
    draw_delta_ratio,
    draw_gate_sparsity,
)
from heterofusion.report.intervals import Estimate
from heterofusion.report.method import draw_method, main
from heterofusion.report.score_pictures import draw_curve, draw_score_map
from heterofusion.report.sensitivity import Curve, Lines
from heterofusion.report.style import fill, short_names, shorten, stroke, wrap
from heterofusion.report.training import grouped, series_of

ROLES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TASKS = ["NER_mit-movie", "NER_TweetNER7", "NER_New-York-Times", "RE_conll04", "ET_FindVehicle", "ET_FabNER"]
METHODS = ["base model", "HeteroFusion (single source)", "target SFT on replay", "Task Arithmetic", "TIES",
           "DARE (TIES)", "FuseLLM", "expert of the task"]  # fmt: skip


def link(source, layer, attention=1.0):
    return {"source": source, "layer": layer, "attention": attention}


def module(role, layer, *sources, delta=0.1, gate=0.5):
    return {"role": role, "layer": layer, "delta_ratio": delta, "gate_sparsity": gate, "sources": list(sources)}


def diagnostics(modules, layers=3, depths=(2, 4)):
    sources = [{"name": f"Qwen2.5-7B-Instruct-NER_New-York-Times-r8-{i}", "layers": d} for i, d in enumerate(depths)]
    return {"target": {"name": "target", "layers": layers}, "sources": sources, "modules": modules}


def fusion(*args, **kwargs):
    return parse_fusion(diagnostics(*args, **kwargs), "diagnostics x")


def large(layers, depths, roles=ROLES):
    """A whole model, aligned from the last layer."""
    rng = random.Random(0)
    modules = []
    for layer in range(layers):
        links = [link(i, layer - layers + d, 1 / len(depths)) for i, d in enumerate(depths) if layer >= layers - d]
        if links:
            modules += [module(role, layer, *links, delta=rng.random(), gate=rng.random()) for role in roles]
    return fusion(modules, layers, depths)


SMALL = [
    module("q_proj", 1, link(0, 0, 0.25), link(1, 2, 0.75), delta=0.2),
    module("q_proj", 2, link(0, 1, 0.5), link(1, 3, 0.5), delta=0.4),
    module("down_proj", 1, link(1, 2), delta=float("nan"), gate=None),
]


# ---- arrays -----------------------------------------------------------------------------------------------------


def test_alignment_matrix_per_role():
    made = fusion(SMALL)
    assert made.roles == ["q_proj", "down_proj"]
    matrix = alignment_matrix(made, "q_proj", 1)
    assert matrix.shape == (3, 4) and np.argwhere(matrix).tolist() == [[1, 2], [2, 3]]
    assert not alignment_matrix(made, "down_proj", 0).any()


def test_attention_shares_are_means_over_modules_that_sum_to_one():
    shares = attention_shares(fusion(SMALL))
    np.testing.assert_allclose(shares, [[np.nan, 0.125, 0.5], [np.nan, 0.875, 0.5]])
    unknown = [*SMALL, module("v_proj", 2, link(0, 1, None), link(1, 3, 1.0))]
    np.testing.assert_allclose(attention_shares(fusion(unknown)), shares)  # what is unknown is no zero


def test_values_of_missing_modules_are_nan():
    np.testing.assert_allclose(
        module_values(fusion(SMALL), "delta_ratio"), [[np.nan, 0.2, 0.4], [np.nan, np.nan, np.nan]]
    )
    twice = fusion([*SMALL, module("q_proj", 1, link(0, 0), delta=0.6)])  # two experts of a mixture
    assert module_values(twice, "delta_ratio")[0, 1] == pytest.approx(0.4)


def test_roles_and_sources_that_are_aligned_alike_share_a_panel():
    panels = alignment_panels(large(6, (4, 6, 4)))
    assert [(panel.sources, panel.roles) for panel in panels] == [((0, 2), ROLES), ((1,), ROLES)]
    panels = alignment_panels(fusion(SMALL))
    assert [(panel.sources, panel.roles) for panel in panels] == [
        ((0,), ("q_proj",)), ((1,), ("q_proj",)), ((1,), ("down_proj",)),
    ]  # fmt: skip


def test_roles_that_all_differ_are_counted_in_one_panel():
    modules = [
        module(role, layer, link(0, layer), link(1, layer))
        for index, role in enumerate(ROLES)
        for layer in range(index + 1)
    ]
    panels = alignment_panels(fusion(modules, layers=7, depths=(7, 8)))
    assert [panel.matrix.diagonal().tolist() for panel in panels] == [[7, 6, 5, 4, 3, 2, 1]] * 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"modules": []}, "is empty"),
        ({"modules": [module("q_proj", 3, link(0, 0))]}, r"modules\[0\]\.layer is 3; 0 to 2"),
        ({"modules": [module("q_proj", 0, link(2, 0))]}, r"sources\[0\]\.source is 2"),
        ({"modules": [module("q_proj", 0, link(0, 9))]}, r"layer is 9"),
        ({"modules": [module(None, 0, link(0, 0))]}, r"role is null"),
        ({"target": {"name": "t", "layers": 0}}, "at least 1"),
    ],
)
def test_diagnostics_that_cannot_be_right_raise(changes, words):
    with pytest.raises(ValueError, match=words):
        parse_fusion(diagnostics(SMALL) | changes, "diagnostics x")


def test_series_of_a_log():
    history = [
        {"step": 1, "lm_loss": 2.0, "alpha/q": 0.3},
        {"step": 2, "eval_loss": 1.0},
        {"step": 3, "lm_loss": None},
    ]
    assert series_of(history, "lm_loss")[0] == (1, 2.0) and math.isnan(series_of(history, "lm_loss")[1][1])
    assert grouped(history, "alpha") == {"q": [(1, 0.3)]}
    history = [{"step": 1} | dict.fromkeys(("a/10-x", "a/2-y", "b/up_proj", "b/q_proj"), 0.1)]
    assert list(grouped(history, "a")) == ["2-y", "10-x"] and list(grouped(history, "b")) == ["q_proj", "up_proj"]


# ---- names ------------------------------------------------------------------------------------------------------


def test_names_are_cut_in_the_middle_and_stay_apart():
    assert shorten("NER_New-York-Times", 10) == "NER_Ne…mes" and shorten("short", 10) == "short"
    names = short_names(["a" * 30 + "x" + "b" * 30, "a" * 30 + "y" + "b" * 30, "c"], 12)
    assert len(set(names)) == 3 and all(len(name) <= 12 for name in names)
    assert wrap("NER_New-York-Times", 10) == "NER_New-\nYork-Times"
    for text in ("a" * 99, "a_" * 50, "NER_New-York-Times-of-a-very-long-name"):
        lines = wrap(text, 10).split("\n")
        assert len(lines) <= 3 and all(len(line) <= 10 for line in lines)


def test_bars_and_lines_differ_without_colour():
    bars = [(fill(i)["facecolor"], fill(i)["hatch"]) for i in range(10)]
    lines = [(stroke(i, 10)["marker"], stroke(i, 10)["markerfacecolor"]) for i in range(10)]
    assert len(set(bars)) == len(set(lines)) == 10
    assert all(0 <= float(face) <= 1 for face, _ in bars)  # greys


# ---- pictures ---------------------------------------------------------------------------------------------------


def ticks(axis):
    """Labels that are drawn: those of ticks in the range that is shown."""
    low, high = sorted(axis.get_view_interval())
    return [
        tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high and tick.label1.get_visible()
    ]


def texts(figure):
    """Everything that is written in a picture."""
    found = [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]
    for axes in figure.axes:
        if axes.get_visible():
            found += [*ticks(axes.xaxis), *ticks(axes.yaxis), *axes.texts, axes.title, axes._left_title]
            found += [axes.xaxis.label, axes.yaxis.label]
            found += axes.get_legend().get_texts() if axes.get_legend() else []
    return found


def boxes(figure):
    figure.draw_without_rendering()
    return [(text.get_text(), text.get_window_extent()) for text in texts(figure) if text.get_text().strip()]


def check_texts(figure):
    """No two texts overlap by more than half a pixel, and none sticks out of the picture."""
    found = boxes(figure)
    assert [
        (first, second)
        for (first, a), (second, b) in combinations(found, 2)
        if min(a.x1, b.x1) - max(a.x0, b.x0) > 0.5 and min(a.y1, b.y1) - max(a.y0, b.y0) > 0.5
    ] == []
    width, height = figure.bbox.size
    assert [name for name, b in found if min(b.x0, b.y0) < -1 or b.x1 > width + 1 or b.y1 > height + 1] == []


def check(figure, path=None):
    check_texts(figure)
    assert all(figure.get_size_inches() <= (11.01, 14))
    if path is not None:
        assert path.read_bytes().startswith(b"\x89PNG")


def scores(methods, tasks):
    rng = random.Random(1)
    return {method: {task: rng.random() for task in tasks} for method in methods}


@pytest.mark.parametrize(
    ("methods", "tasks"),
    [(METHODS, [*TASKS, "mean"]), (METHODS[:2], [f"NER_New-York-Times-{i}" for i in range(20)]), (METHODS[:1], ["x"])],
    ids=["many", "wide", "one"],
)
def test_bars_have_no_overlapping_labels(methods, tasks, tmp_path):
    made = scores(methods, tasks)
    halves = {method: dict.fromkeys(tasks, 0.03) for method in methods}
    figure = draw_scores(made, tasks, tmp_path / "scores.png", "micro-F1", halves)
    check(figure, tmp_path / "scores.png")
    heights = [bar.get_height() for axes in figure.axes for bar in axes.patches]
    assert sorted(heights) == pytest.approx(sorted(value for row in made.values() for value in row.values()))


def test_missing_and_nan_scores_have_no_bar():
    figure = draw_scores({"a": {"x": 0.5}, "b": {"x": math.nan, "y": 0.2}}, ["x", "y"], None, "F1")
    assert [bar.get_height() for bar in figure.axes[0].patches] == [0.5, 0.2]
    check(figure)


def test_score_map_of_many_rows():
    names = [f"{method} (anchor NER_New-York-Times {i})" for method in METHODS for i in range(4)]
    made = scores(names, TASKS)
    del made[names[0]][TASKS[0]]
    check(draw_score_map(made, TASKS, None, "micro-F1"))


@pytest.mark.parametrize("series", [1, 4])
def test_curve_marks_the_default_and_has_an_error_band(series):
    points = [(0.05 * i, Estimate(0.5 + 0.01 * i, 0.02, (0.5,))) for i in range(1, 19)]
    lines = Lines(points, dict.fromkeys(TASKS, points))
    names = [f"fused (anchor NER_New-York-Times {i}, case clean)" for i in range(series)]
    figure = draw_curve(Curve("alpha_init", "alpha", 0.3, dict.fromkeys(names, lines)), None, "micro-F1")
    check(figure)
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ["default 0.3"]
    assert axes.lines[-1].get_xdata()[0] == 0.3 and len(axes.collections) == 1


FUSIONS = {
    "tiny": fusion(SMALL),
    "llama8b": large(32, (28, 32) * 4 + (28,)),
    "deep": large(80, (28, 32, 80, 64, 28, 32, 80, 64, 48, 40)),
    "one": large(1, (1,), ("q_proj",)),
    "unknown": fusion([module("q_proj", 0, link(0, 0, None), delta=None, gate=math.nan)]),
}


@pytest.mark.parametrize("name", FUSIONS)
@pytest.mark.parametrize("draw", [draw_alignment, draw_attention, draw_gate_sparsity, draw_delta_ratio])
def test_pictures_of_a_fusion_are_clean(draw, name, tmp_path):
    check(draw(FUSIONS[name], tmp_path / "picture.png"), tmp_path / "picture.png")


def test_training_curves(tmp_path):
    sources = [f"{i}-Qwen2.5-7B-Instruct-NER_New-York-Times-r8-{i}" for i in range(1, 11)]
    history = [
        {"step": 10 * step, "lm_loss": 2 / step, "rdm_loss": 0.5}
        | {f"{name}/{role}": 0.1 * step for name in ("alpha", "delta_ratio", "gate_sparsity") for role in ROLES}
        | {f"attention/{source}": 0.1 for source in sources}
        for step in range(1, 40)
    ]
    history += [{"step": 200, "eval_loss": 1.0}, {"step": 390, "train_loss": 1.0}]
    figure = draw_training(history, tmp_path / "training.png")
    check(figure, tmp_path / "training.png")
    assert [len(axes.lines) for axes in figure.axes] == [2, 1, 7, 7, 7, 10]
    parts = [{"step": i, "lm_loss": 1.0 / i, "loss_replay": 0.8 / i, "loss_labels": 1.2 / i} for i in range(1, 6)]
    figure = draw_training(parts, tmp_path / "parts.png")
    check(figure, tmp_path / "parts.png")
    (axes,) = figure.axes
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts == ["training", "of it replay", "of it source labels"]
    assert axes.lines[2].get_ydata().tolist() == [1.2 / i for i in range(1, 6)]
    for short in ([], [{"step": 1, "lm_loss": math.nan}], [{"step": 5, "lm_loss": 1.0}]):
        check(draw_training(short, None))


def test_method_picture(tmp_path, capsys):
    path = tmp_path / "method.png"
    assert main([str(path)]) == 0
    assert int.from_bytes(path.read_bytes()[16:20], "big") == 1600
    check_texts(draw_method(None))
    assert main([]) == 2 and "usage" in capsys.readouterr().err


def test_pictures_leave_matplotlib_as_it_was():
    import matplotlib

    before = dict(matplotlib.rcParams)
    draw_scores({"a": {"x": 0.5}}, ["x"], None, "F1")
    assert dict(matplotlib.rcParams) == before


def test_missing_matplotlib_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'heterofusion\[report\]'"):
        draw_scores({"a": {"x": 0.5}}, ["x"], None, "F1")
