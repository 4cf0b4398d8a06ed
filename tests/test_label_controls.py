"""Labels by the anchor, controls of labels, and that whoever trains on a control says so and is not pushed."""

import json
import shutil
from pathlib import Path

import pytest

from heterofusion.experiments.pictures import draw_routing
from heterofusion.labelling.routing import exchange, route, with_control
from heterofusion.labelling.run import labels_table
from heterofusion.publish.record import join_controls, label_control
from heterofusion.zoo import zoo_path
from label_runner import COUNT, label, read_labels, run_label
from recipe_runner import MISTRAL, QWEN, SIZES, TARGET, error_line, flags, recipe, succeeds, train, write_replay
from test_source_labels import label as line
from test_source_labels import write_labels

pytest_plugins = ["label_runner"]
pytestmark = pytest.mark.usefixtures("logging_restored")
expert, push = recipe("expert"), recipe("push").main
SERVED = ("ner_garden", "re_market")


# ---- who labels what --------------------------------------------------------------------------------------------


def test_the_anchor_labels_what_no_source_serves_if_it_is_good_at_it():
    scores = {"anchor": {"a": 0.5, "b": 0.8, "c": 0.49}, "x": {"a": 0.9, "b": 0.85, "c": 0.1}}
    assert route(["a", "b", "c"], ["x"], scores, 0.1, {}, 0.5).chosen == {"a": ["x"], "b": ["anchor"], "c": []}
    assert route(["a", "b", "c"], ["x"], scores, 0.1, {}).chosen == {"a": ["x"], "b": [], "c": []}
    routing = route(["a", "b", "c"], ["x"], scores, 0.1, {"b": []}, 0.8)
    assert routing.chosen["b"] == []  # the map says so
    assert routing.reason("c").endswith("; the anchor is below --anchor_min_score 0.8")


def test_exchange_gives_every_task_sources_of_another_and_none_of_its_own():
    served = {"a": ["x"], "b": ["x", "y"], "c": ["z"], "d": ["z"], "e": ["y"]}
    drawn = set()
    for seed in range(40):
        found = exchange(served, seed)
        assert sorted(map(str, found.values())) == sorted(map(str, served.values()))
        assert all(not set(found[task]) & set(served[task]) for task in served)
        drawn.add(str(found))
    assert exchange(served, 3) == exchange(served, 3) and len(drawn) > 2


def test_a_control_takes_the_place_of_sources_and_not_of_the_anchor():
    mapped = {"a": ["x"], "b": ["y", "anchor"], "c": ["anchor"], "d": []}
    routing = route([*mapped], ["x", "y"], {}, 0.1, mapped)
    found = {kind: with_control(routing, kind, 0).labelled_by for kind in ("bases", "shuffle", "anchor")}
    assert found["bases"] == mapped
    assert found["shuffle"] == {"a": ["y"], "b": ["x", "anchor"], "c": ["anchor"], "d": []}
    assert found["anchor"] == {"a": ["anchor"], "b": ["anchor"], "c": ["anchor"], "d": []}
    control = with_control(routing, "anchor", 0)
    assert control.chosen == mapped and control.record(dict.fromkeys(mapped))["control"] == "anchor"
    assert control.table().splitlines()[0] == "| CONTROL anchor | a | b | c | d |"
    assert control.table().splitlines()[2] == "| anchor | **control** | **control** | **control** | - |"
    figure = draw_routing({name: {} for name in control.models}, control.labelled_by, control.tasks, "anchor")
    assert figure.get_suptitle().startswith("CONTROL (anchor): score on the replay")
    with pytest.raises(ValueError, match="no source labels any task"):
        with_control(route(["c"], ["x"], {}, 0.1, {"c": ["anchor"]}), "bases", 0)


# ---- recipes/label.py -------------------------------------------------------------------------------------------


@pytest.fixture
def again(whole, tmp_path):
    """Label once more, where the answers of `whole` are known; gives labels.json."""
    values, folder, _ = whole
    shutil.copytree(folder, tmp_path / "out")
    return lambda **changes: run_label(values, output_dir=tmp_path / "out", resume=True, **changes)


def test_anchor_labels_its_own_task_and_stores_what_it_thinks(again, whole, tmp_path):
    found = again(anchor_labels=True, top_k_logits=4)
    own = read_labels(tmp_path / "out", "ner_kitchen")
    assert {record["source"] for record in own} == {"anchor"} and len(own) == COUNT
    assert found["tasks"]["ner_kitchen"]["sources"] == {"anchor": COUNT} and found["control"] is None
    assert found["routing"]["tasks"]["ner_kitchen"]["chosen"] == ["anchor"]
    assert found["routing"]["anchor_min_score"] == 0.5
    for task in SERVED:
        assert read_labels(tmp_path / "out", task) == read_labels(whole[1], task)
    index = json.loads((tmp_path / "out/soft/index.json").read_text())
    assert index["sources"]["anchor"]["labels"] == [["ner_kitchen", i] for i in range(COUNT)]
    run = {
        "model_name_or_path": zoo_path("llama"), "init_adapter": zoo_path("llama", "ner_kitchen"), "max_steps": 1,
        "source_labels": [tmp_path / "out" / f"{task}.jsonl" for task in ("ner_garden", "ner_kitchen")],
        "label_loss": "soft", "logits_cache": tmp_path / "cache", "output_dir": tmp_path / "tuned", "use_cpu": True,
    }  # fmt: skip
    succeeds(expert.main, flags(run))
    record = json.loads((tmp_path / "tuned/expert.json").read_text())
    assert record["training"]["source_labels"]["soft"]["examples"] == {"anchor": COUNT, "ner_garden": COUNT}
    assert record["made_by"]["source_control"] is None
    assert f"{COUNT} of them are the anchor's own answers" in (tmp_path / "tuned/README.md").read_text()


@pytest.mark.parametrize(
    ("kind", "sources"),
    [
        ("bases", {"ner_garden": "ner_garden-base", "re_market": "re_market-base"}),
        ("shuffle", {"ner_garden": "re_market", "re_market": "ner_garden"}),
        ("anchor", {"ner_garden": "anchor", "re_market": "anchor"}),
    ],
)
def test_controls_are_of_somebody_else_and_say_so(again, whole, tmp_path, kind, sources):
    found = again(control=kind, anchor_labels=True)
    assert found["control"] == kind and found["settings"]["seed"] == 42
    chosen = {task: found["routing"]["tasks"][task]["chosen"] for task in SERVED}
    assert chosen == {task: [task] for task in SERVED}  # by the real experts
    for task, source in sources.items():
        records, real = (read_labels(folder, task) for folder in (tmp_path / "out", whole[1]))
        assert {(record["source"], record["control"]) for record in records} == {(source, kind)}
        assert [record["prompt"] for record in records] == [record["prompt"] for record in real]
        assert [record["completion"] for record in records] != [record["completion"] for record in real]
    assert {record["source"] for record in read_labels(tmp_path / "out", "ner_kitchen")} == {"anchor"}
    assert labels_table(found).startswith(f"| CONTROL {kind}: task | labels")


def test_labels_that_cannot_be_made_are_refused(labelling, tmp_path, capsys):
    def refused(*words, **changes):
        error_line(capsys, label.main, flags({**labelling, **changes}), *words)
        assert not labelling["output_dir"].exists()

    mapping = tmp_path / "map.yaml"
    mapping.write_text("ner_garden: anchor\nre_market: re_market\nner_kitchen: none")
    refused("--target_adapter is missing", "ner_garden:", routing=mapping, target_adapter=None)
    refused("--control shuffle", "re_market cannot be exchanged", routing=mapping, control="shuffle")
    mapping.write_text("ner_garden: re_market\nre_market: re_market\nner_kitchen: none")
    refused("--control shuffle", "cannot be exchanged", routing=mapping, control="shuffle", target_adapter=None)
    refused("--target_adapter is missing", "--model_name", routing=mapping, control="anchor", target_adapter=None)
    refused("--anchor_min_score is 2.0", "at least 0 and at most 1", anchor_labels=True, anchor_min_score=2)
    refused("--control", "bases", "shuffle", "anchor", control="noise")
    bare = [labelling["source_adapters"][0], "none"]
    refused("--control bases needs sources with adapters", source_adapters=bare, control="bases")


# ---- training on them -------------------------------------------------------------------------------------------


ROWS = [line(10 + i) for i in range(6)]


def labels_of(folder: Path, kind: str | None, name: str = "labels") -> Path:
    """A file of labels as recipes/label.py leaves it."""
    folder.mkdir()
    return write_labels(folder / f"{name}.jsonl", *(row if kind is None else {**row, "control": kind} for row in ROWS))


def test_kind_of_a_whole_training():
    """What is made from a control is that control, however often: nothing is chained."""
    labels = label_control({"files": [{"name": "a", "control": "shuffle"}, {"name": "b"}]})
    assert labels == "labels:shuffle" and label_control(None) is join_controls(None, None) is None
    assert join_controls("noise", labels, "noise") == "noise+labels:shuffle"
    assert join_controls(None, labels, "zero+labels:bases") == "labels:shuffle+zero+labels:bases"


@pytest.fixture(scope="module")
def shared(base_dir, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("control")
    return {
        "model_name_or_path": base_dir, "dataset_name": [write_replay(folder / "replay.json")], "use_cpu": True,
        "source_labels": [labels_of(folder / "labels", "bases")], "max_steps": 2, "save_strategy": "steps",
        "save_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1,
    }  # fmt: skip


@pytest.fixture(scope="module")
def fused(shared, tmp_path_factory) -> dict:
    """Flags of a fusion on a control's labels, which has run."""
    values = {
        **shared, **SIZES, "target_adapter": TARGET, "source_adapters": [QWEN, MISTRAL],
        "output_dir": tmp_path_factory.mktemp("fused") / "out",
    }  # fmt: skip
    succeeds(train.main, flags(values))
    return values


@pytest.fixture(scope="module")
def tuned(shared, fused, tmp_path_factory) -> dict:
    """Flags of an expert that begins as a control and is trained on real labels, which has run."""
    folder = tmp_path_factory.mktemp("tuned")
    values = {
        **shared, "init_adapter": fused["output_dir"], "source_labels": [labels_of(folder / "labels", None)],
        "output_dir": folder / "out",
    }  # fmt: skip
    succeeds(expert.main, flags(values))
    return values


def test_what_is_trained_on_a_control_or_begins_as_one_is_a_control(fused, tuned, capsys):
    for out, name, title in ((fused, "fusion.json", "Fused LoRA adapter"), (tuned, "expert.json", "LoRA expert")):
        out = out["output_dir"]
        record = json.loads((out / name).read_text())
        assert record["made_by"]["source_control"] == "labels:bases"
        card = (out / "README.md").read_text()
        assert f"# CONTROL (labels:bases): {title}" in card and "- control" in card
        argv = flags({"adapter": out, "hub_model_id": "me/it"})
        error_line(capsys, push, argv, out, f"holds a control (source_control labels:bases in {name})")
    card = (fused["output_dir"] / "README.md").read_text()
    assert "the source labels are those of the sources' base models without their adapters" in card


def test_control_is_not_pushed_and_not_mixed(fused, tuned, shared, tmp_path, capsys, monkeypatch):
    for name, main in (("train", train), ("expert", expert)):
        monkeypatch.setattr(main, "load_base", lambda *args: pytest.fail("the base was loaded"))
        values = {**(fused if name == "train" else tuned), "output_dir": tmp_path / name}
        error_line(capsys, main.main, flags({**values, "push_to_hub": True}), "--push_to_hub is true", "labels:bases")
    real = {**fused, "source_labels": [labels_of(tmp_path / "labels", None)]}
    words = "checkpoint-2 was trained with another source_labels.files[0]"
    error_line(capsys, train.main, flags({**real, "resume_from_checkpoint": True}), words)
    start = {**real, "output_dir": tmp_path / "new", "init_hypernetwork_from": fused["output_dir"] / "checkpoint-1"}
    error_line(capsys, train.main, flags(start), "are of the control labels:bases, this run is of none")


# ---- a run that goes on -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"replay_fraction": 0.25}, "another replay_fraction: 0.5, this run has 0.25"),
        ({"min_log_probability": -2}, "source_labels.min_log_probability: null, this run has -2.0"),
        ({"label_loss": "soft"}, "source_labels.loss"),
        ({"source_labels": "OTHER"}, "source_labels.files[0].sha256"),
        ({"source_labels": None}, "source_labels"),
        ({"dataset_name": "OTHER"}, "replay.sha256"),
        ({"dataset_seed": 7}, "source_labels.sha256"),
    ],
    ids=str,
)
def test_resuming_with_other_data_is_refused(fused, tuned, tmp_path, capsys, monkeypatch, changed, name):
    others = {
        "source_labels": write_labels(tmp_path / "labels.jsonl", *ROWS[1:], line(30)),
        "dataset_name": write_replay(tmp_path / "replay.json", first=9),
    }
    changed = {flag: [others[flag]] if value == "OTHER" else value for flag, value in changed.items()}
    if changed.get("label_loss"):  # what it would be with soft labels of these files
        record = {"weight": 0.5, "top_k": 4, "examples": {}, "one_to_one": 1.0, "soft": 1.0}
    for values, main in ((fused, train), (tuned, expert)):
        monkeypatch.setattr(main, "load_base", lambda *args: pytest.fail("the base was loaded"))
        monkeypatch.setattr(
            "heterofusion.training.mixture.add_soft_labels", lambda labels, *args: (labels.examples, record, "")
        )
        argv = flags({**values, **changed, "resume_from_checkpoint": values["output_dir"] / "checkpoint-1"})
        error_line(capsys, main.main, argv, "checkpoint-1 was trained with another", name)


# ---- without replay ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("basis", ["random", "activations"])
def test_labels_alone_train_a_fusion_and_its_twin(fused, tuned, tmp_path, basis):
    """As one file of flags has them for any number of replay examples, with `dataset_name: []` for none."""
    config = tmp_path / "run.yaml"
    config.write_text("dataset_name: []\nmax_examples: [5]\ndataset_seed: 3\n")
    rows = {}
    for name, values, main in (("fusion", fused, train), ("expert", tuned, expert)):
        run = {
            **values, "config": config, "dataset_name": None, "output_dir": tmp_path / name, "extra_rank": 2,
            "extra_basis": basis, "eval_dataset_name": fused["dataset_name"], "save_strategy": "no", "max_steps": 1,
            "source_labels": fused["source_labels"],
        }  # fmt: skip
        run |= {"train_only": "lora_B", "init_adapter": TARGET} if name == "expert" else {}
        succeeds(main.main, flags(run))
        record = json.loads((tmp_path / name / f"{name}.json").read_text())
        assert record["basis"]["examples"] == len(ROWS) and record["basis"]["extra_basis"] == basis
        assert record["training"]["source_labels"]["replay_fraction"] == 0
        assert record["training"]["replay" if name == "fusion" else "data"] == {}
        assert record["metrics"]["eval_loss"] > 0
        rows[name] = record["basis"]["lora_A_sha256"]
    assert rows["fusion"] == rows["expert"]
