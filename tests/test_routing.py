"""Which source labels which task, as a user reads it: rules, map, table and picture."""

import numpy as np
import pytest

from heterofusion.experiments.pictures import draw_routing
from heterofusion.experts.generation import Answer as Label
from heterofusion.labelling.routing import most_confident, read_map, route
from heterofusion.labelling.tasks import format_check

TASKS, SOURCES = ["a", "b"], ["x", "y"]
SCORES = {"anchor": {"a": 0.5, "b": 0.8}, "x": {"a": 0.6, "b": 0.85}, "y": {"a": 0.9, "b": 0.2}}


@pytest.mark.parametrize(
    ("margin", "chosen"),
    [
        (0.0, {"a": ["x", "y"], "b": ["x"]}),
        (0.1, {"a": ["x", "y"], "b": []}),  # 0.6 is 0.5 + 0.1, whatever floating point says
        (0.2, {"a": ["y"], "b": []}),
        (0.5, {"a": [], "b": []}),
    ],
)
def test_a_source_has_to_beat_the_anchor_by_the_margin(margin, chosen):
    assert route(TASKS, SOURCES, SCORES, margin, {}).chosen == chosen
    assert route(["a"], ["x"], {"anchor": {"a": 0.5}, "x": {"a": 0.5}}, 0.0, {}).chosen == {"a": []}  # no better


def test_a_source_far_behind_the_best_one_is_left_out():
    scores = {"anchor": {"a": 0.1}, "x": {"a": 0.3}, "y": {"a": 0.9}, "z": {"a": 0.5}}
    for share, chosen in ((0.0, ["x", "y", "z"]), (0.5, ["y", "z"]), (0.6, ["y"]), (1.0, ["y"])):
        routing = route(["a"], ["x", "y", "z"], scores, 0.1, {}, share=share)
        assert routing.chosen == {"a": chosen}
        assert routing.record({"a": None})["share"] == share


def test_the_map_overrides_the_scores():
    scores = {name: {"b": row["b"]} for name, row in SCORES.items()}
    routing = route(TASKS, SOURCES, scores, 0.0, {"a": ["x"]})
    assert routing.chosen == {"a": ["x"], "b": ["x"]}
    record = routing.record({"a": "NER", "b": None})
    assert record["tasks"]["a"] == {"metric": "NER", "scores": {}, "chosen": ["x"], "labelled_by": ["x"], "by": "map"}
    assert record["tasks"]["b"]["by"] == "scores" and record["tasks"]["b"]["scores"]["x"] == 0.85
    assert routing.table().splitlines() == [
        "|  | a | b |", "|---|---|---|", "| anchor | - | 0.800 |", "| x | **map** | **0.850** |", "| y | - | 0.200 |"
    ]  # fmt: skip


def test_map_file(tmp_path):
    path = tmp_path / "map.yaml"
    path.write_text("a: x\nb: [y, x]\n")
    assert read_map(str(path), TASKS, SOURCES) == {"a": ["x"], "b": ["x", "y"]}
    path.write_text("a: none\nb:\n")
    assert read_map(str(path), TASKS, SOURCES) == {"a": [], "b": []}
    path.write_text("a: 7\nb: [7, x]\n")  # a source may have a number for a name
    assert read_map(str(path), TASKS, ["x", "7"]) == {"a": ["7"], "b": ["x", "7"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("c: x", r"--routing .*map\.yaml names the task 'c', which is none of a, b"),
        ("a: z", "'a': 'z' is no source; name x, y, anchor or none"),
        ("a: [x, none]", "'a': 'none' is no source"),
        ("- a", "holds a list, a mapping of tasks to sources was expected"),
        ("a: [", "cannot be read as YAML"),
        (None, "does not exist"),
    ],
)
def test_map_file_that_is_wrong_raises(tmp_path, content, message):
    path = tmp_path / "map.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_map(str(path), TASKS, SOURCES)


# ---- several sources of one task --------------------------------------------------------------------------------


def test_most_confident_of_several():
    """The same text with the same probability is as sure in 2 tokens of one vocabulary as in 10 of another."""
    short, long = Label(0, " tool: axe", 2, -1.0), Label(0, " tool: axe", 10, -1.0)
    assert short.confidence == long.confidence == pytest.approx(-1.0 / 11)
    check = format_check("NER", ["tool: axe"])
    sure, unsure = Label(0, "tool: axe", 4, -0.1), Label(0, "tool: saw", 4, -0.2)
    malformed = Label(0, "axe", 1, -0.0001)
    assert most_confident({"x": unsure, "y": sure}, "", check) == "y"
    assert most_confident({"x": sure, "y": sure}, "", check) == "x"
    assert most_confident({"x": unsure, "y": malformed}, "", check) == "x"
    assert most_confident({"x": malformed}, "", check) == "x"


def test_picture_marks_chosen_cells():
    axes = draw_routing({**SCORES, "y": {"b": 0.2}}, {"a": ["x", "y"], "b": []}, TASKS, None).axes[0]
    framed = {text.get_position(): text.get_text() for text in axes.texts if text.get_bbox_patch() is not None}
    assert framed == {(0, 1): "0.60", (0, 2): "map"}
    missing = np.ma.getmaskarray(axes.collections[0].get_array()).reshape(3, 2)
    assert missing.tolist() == [[False, False], [False, False], [True, False]]
