"""What a sequence of fusions refuses: its YAML, its adapters and sizes, and results of another run in its folder."""

import json
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from heterofusion.runtime.files import file_sha256
from recipe_runner import (
    MISTRAL,
    QWEN,
    ROOT,
    TARGET,
    copy_adapter,
    error_line,
    flags,
    plan,
    succeeds,
    train,
    write_replay,
)
from sequence_runner import (
    ADAPTER,
    HYPERNETWORKS,
    ONE,
    TWO,
    only_stage_one,
    record,
    remove,
    same_weights,
    stop_at,
    write_yaml,
)

pytestmark = pytest.mark.usefixtures("logging_restored")


# ---- stages in YAML ---------------------------------------------------------------------------------------------


def entry(**values: object) -> dict:
    return {"name": "one", "source_adapters": [QWEN], **values}


BAD_STAGES = {
    "no stage": ([], ["stages", "list of mappings"]),
    "a text": ("one", ["stages", "'one'"]),
    "a mapping": ({"one": 1}, ["stages", "list of mappings"]),
    "a list of texts": ([entry(), "two"], ["stage 2 of 2 is a str"]),
    "an empty stage": ([None], ["stage 1 of 1 is a NoneType"]),
    "an unknown key": ([entry(), entry(name="two", learning_rates=1)], ["stage 'two'", "learning_rates"]),
    "a word for a number": ([entry(max_steps="many")], ["stage 'one'", "--max_steps", "many"]),
    "a value out of range": ([entry(learning_rate=-1)], ["stage 'one'", "--learning_rate is -1"]),
    "an empty list": ([entry(source_adapters=[])], ["stage 'one'", "empty list", "source_adapters"]),
    "an empty list for a switch": ([entry(bf16=[])], ["stage 'one'", "empty list", "bf16"]),
    "no sources": ([{"name": "one"}], ["stage 'one'", "--source_adapters"]),
    "a flag in a list": ([entry(source_adapters=["--overwrite"])], ["stage 'one'", "--overwrite"]),
    "debug": ([entry(debug=True)], ["stage 'one'", "--debug true"]),
    "a slash in a name": ([entry(name="a/b")], ["stage 'a/b'", "letters"]),
    "a hidden name": ([entry(name="..")], ["stage '..'", "letters"]),
    "an empty name": ([entry(name="")], ["stage ''", "letters"]),
    "a name that is no text": ([entry(name=[1])], ["stage [1]", "letters"]),
    "a name that is a switch": ([entry(name=True)], ["stage True", "letters"]),
    "the name of a checkpoint": ([entry(name="checkpoint-3")], ["stage 'checkpoint-3'", "another name"]),
    "the name of a file": ([entry(name="fusion.json")], ["stage 'fusion.json'", "another name"]),
    "one name for two": ([entry(), entry(name="One")], ["stage 'One'", "earlier stage"]),
    "a default name for two": ([entry(name="stage-2"), {"source_adapters": [QWEN]}], ["stage 'stage-2'", "earlier"]),
    **{
        key: ([entry(), entry(name="two", **{key: "x"})], ["stage 'two'", f"has {key},", "whole run"])
        for key in (
            "target_adapter", "output_dir", "init_hypernetwork_from", "push_to_hub", "config", "stages", "hub_token",
            "model_name_or_path", "resume_from_checkpoint", "overwrite", "dry_run",
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_STAGES)
def test_bad_stages_raises(case, fails, tmp_path):
    stages, words = BAD_STAGES[case]
    path = write_yaml(tmp_path / "run.yaml", stages)
    fails(path, *words, config=path, source_adapters=None, max_steps=None, learning_rate=None)


BAD_LATER = {
    "an adapter that is missing": ({"source_adapters": ["./nowhere"]}, ["nowhere", "does not exist"]),
    "a data set that is missing": ({"dataset_name": ["nowhere.json"]}, ["nowhere.json", "does not exist"]),
    "no evaluation data": ({"eval_strategy": "epoch"}, ["--eval_dataset_name"]),
    "an unknown integration": ({"report_to": "nobody"}, ["nobody"]),
    "sizes that are not carried": ({"embed_dim": 64}, ["embed_dim 32", "64", "--embed_dim", "stage 'one' (1 of 2)"]),
    "a form that is not carried": ({"preset": "compact"}, ["form paper", "compact", "--preset"]),
}


@pytest.mark.parametrize("case", BAD_LATER)
def test_error_of_a_later_stage_is_found_before_the_first_starts(case, fails, tmp_path):
    changed, words = BAD_LATER[case]
    first = {"dataset_name": [str(write_replay(tmp_path / "replay.json"))], "embed_dim": 32}
    stages = [{**ONE, **first}, {**TWO, **first, **changed}]
    path = write_yaml(tmp_path / "run.yaml", stages)
    left_out = dict.fromkeys(("source_adapters", "dataset_name", "embed_dim", "max_steps"))
    fails("stage 'two' (2 of 2)", *words, config=path, carry_hypernetworks=True, **left_out)


def test_stage_that_would_write_over_an_adapter_raises(fails, tmp_path, arguments):
    path = write_yaml(tmp_path / "run.yaml", [ONE, TWO])
    for place, changed in (("one", {"target_adapter": None}), (".", {"source_adapters": None})):
        adapter = tmp_path / "out" / place
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        copy_adapter(adapter, TARGET)
        name = next(iter(changed))
        value = str(adapter) if name == "target_adapter" else [QWEN, str(adapter)]
        fails(adapter, "lies where", config=path, overwrite=True, **{name: value})


def test_file_in_place_of_a_stage_raises(fails, tmp_path, arguments):
    arguments["output_dir"].mkdir()
    (arguments["output_dir"] / "one").write_text("")
    path = write_yaml(tmp_path / "run.yaml", [ONE, TWO])
    fails(arguments["output_dir"] / "one", "is a file", config=path, overwrite=True, source_adapters=None)


def test_stages_belong_to_training(capsys, tmp_path):
    path = write_yaml(tmp_path / "run.yaml", [ONE], target_adapter=TARGET)
    error_line(capsys, plan.main, ["--config", str(path)], path, "unknown keys: stages")


def test_carry_without_stages_raises(fails):
    fails("--carry_hypernetworks", "stages:", carry_hypernetworks=True)


def test_stages_of_the_readme_parse(tmp_path):
    page = (ROOT / "README.md").read_text()
    path = tmp_path / "run.yaml"
    path.write_text(re.search(r"```yaml\n(.*?)```", page, re.DOTALL)[1])
    first, second = train.read_stages(["--config", str(path), "--use_cpu", "true"], "")
    assert (first.name, second.name, first.is_carried) == ("kitchen", "town", True)
    assert second.adapters.source_adapters == ["EXPERT2", "EXPERT3"] and second.args.learning_rate == 2e-5


def test_one_stage_writes_into_the_output_dir(tmp_path):
    path = write_yaml(tmp_path / "run.yaml", [ONE], output_dir="out", model_name_or_path="b", target_adapter="t")
    (stage,) = train.read_stages(["--config", str(path), "--carry_hypernetworks", "true"], "")
    assert (stage.args.output_dir, stage.title, stage.is_carried) == ("out", "stage 'one' (1 of 1)", False)


def test_values_of_a_stage_override_the_file_and_the_command_line_overrides_both(tmp_path):
    stages = [{**ONE, "learning_rate": "1e-4", "embed_dim": None}, {**TWO, "max_examples": [3]}]
    top = {"learning_rate": 1, "max_steps": 9, "embed_dim": 64, "weight_decay": 0.5, "output_dir": "o"}
    path = write_yaml(tmp_path / "run.yaml", stages, **top)
    argv = ["--model_name_or_path=b", "--target_adapter=t", f"--config={path}", "--weight_decay=0.25"]
    first, second = train.read_stages([*argv, "--init_hypernetwork_from", "i"], "")
    assert (first.args.learning_rate, second.args.learning_rate) == (1e-4, 1.0)
    assert (first.args.max_steps, second.args.max_steps) == (9, 3)
    assert (first.args.embed_dim, second.args.embed_dim) == (None, 64)
    assert first.args.weight_decay == second.args.weight_decay == 0.25
    assert (first.data.max_examples, second.data.max_examples) == ([300], [3])
    assert (first.args.output_dir, second.args.output_dir) == (str(Path("o", "one")), "o")
    assert (first.adapters.target_adapter, second.adapters.target_adapter) == ("t", str(Path("o", "one").absolute()))
    assert (first.run.init_hypernetwork_from, second.run.init_hypernetwork_from) == ("i", None)


# ---- what a resumed sequence refuses ----------------------------------------------------------------------------


def edit(path: Path, *keys: str, value: object) -> None:
    content = json.loads(path.read_text())
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(json.dumps(content))


OTHER_FLAGS = {
    "learning_rate": ({"learning_rate": 0.02}, ["learning_rate: 0.01, this run has 0.02"]),
    "num_train_epochs": ({"num_train_epochs": 5}, ["num_train_epochs"]),
    "seed of stage one": ({"seed": 7}, ["seed: 1, this run has 7"]),
    "alpha_init": ({"alpha_init": 0.5}, ["alpha_init"]),
    "embed_dim": ({"embed_dim": 64}, ["embed_dim: 32, this run has 64"]),
    "transfer_ratio": ({"transfer_ratio": "1/2"}, ["transfer_ratio"]),
    "canonicalize": ({"canonicalize": True}, ["canonicalize"]),
    "sources": ({"source_adapters": [MISTRAL]}, ["source_sha256"]),
    "target": ({"target_adapter": MISTRAL}, ["target_sha256"]),
    "replay": ({"max_examples": 4}, ["replay"]),
}


@pytest.mark.parametrize("case", OTHER_FLAGS)
def test_finished_stage_of_other_flags_raises(case, copied, capsys, monkeypatch):
    monkeypatch.setattr(train, "load_base", lambda *args: pytest.fail("the base was loaded"))
    changed, words = OTHER_FLAGS[case]
    error_line(capsys, train.main, flags({**copied.values, **changed}), "stage 'one' (1 of 2)", *words)


def test_started_stage_of_another_target_raises(copied, capsys, tmp_path):
    """Stage one was made again, with another result; what stage two holds belongs to the old one."""
    remove(copied.out, "fusion.json")
    weights = load_file(copied.out / "one" / ADAPTER)
    save_file({name: tensor * 1.5 for name, tensor in weights.items()}, copied.out / "one" / ADAPTER)
    error_line(capsys, train.main, flags(copied.values), "stage 'one' (1 of 2)", ADAPTER, "not the file")
    provenance = copied.out / "one" / "fusion.json"
    record = json.loads(provenance.read_text())
    record["weights_sha256"] = file_sha256(copied.out / "one" / ADAPTER)
    provenance.write_text(json.dumps(record))
    error_line(capsys, train.main, flags(copied.values), "stage 'two' (2 of 2)", "checkpoint-3", "target_sha256")


def test_results_of_a_later_stage_without_those_before_raises(copied, capsys):
    remove(copied.out, "one")
    line = error_line(capsys, train.main, flags(copied.values), copied.out, "'two'", "'one'", "not finished")
    assert "--overwrite true" in line
    remove(copied.out, "fusion.json")  # its checkpoints are enough
    error_line(capsys, train.main, flags(copied.values), copied.out, "not finished")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", ["damaged"]),
        ("[]", ["no JSON object"]),
        ('{"target": 3, "sources": 4}', ["sha256"]),
        ('{"target": {}, "sources": [4]}', ["sha256"]),
    ],
)
def test_damaged_provenance_raises(text, words, copied, capsys):
    (copied.out / "one" / "fusion.json").write_text(text)
    error_line(capsys, train.main, flags(copied.values), copied.out / "one" / "fusion.json", *words)


def test_carrying_from_a_stage_that_left_no_hypernetworks_raises(copied, capsys):
    only_stage_one(copied.out)
    remove(copied.out / "one", HYPERNETWORKS)
    error_line(capsys, train.main, flags(copied.values), HYPERNETWORKS, "stage 'one' (1 of 2) was run without")


def test_finished_stage_that_carried_nothing_raises_with_carry(copied, capsys):
    content = json.loads((copied.out / "fusion.json").read_text())
    del content["training"]["initialization"]
    (copied.out / "fusion.json").write_text(json.dumps(content))
    error_line(capsys, train.main, flags(copied.values), copied.out / "fusion.json", "carry_hypernetworks")


def test_resuming_a_sequence_from_a_folder_raises(copied, capsys):
    other = {**copied.values, "resume_from_checkpoint": copied.out / "checkpoint-2"}
    error_line(capsys, train.main, flags(other), "--resume_from_checkpoint", copied.out / "checkpoint-2", "give true")


def test_new_sequence_does_not_write_over_an_old_one(copied, capsys):
    again = {**copied.values, "resume_from_checkpoint": None}
    error_line(capsys, train.main, flags(again), copied.out, "not empty", "--overwrite true")


def test_overwritten_sequence_is_not_resumed_from_the_old_one(copied, two, monkeypatch):
    """Killed in its first stage: nothing that the old sequence left is taken for its own."""
    other = {**copied.values, "learning_rate": 0.02}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, "one", 1)
        train.main(flags({**other, "resume_from_checkpoint": None, "overwrite": True}))
    assert not list(copied.out.rglob("checkpoint-*")) and not list(copied.out.rglob("fusion.json"))
    log = succeeds(train.main, flags(other))
    assert "stage 'one' (1 of 2): no complete checkpoint" in log
    assert record(copied.out)["training"]["learning_rate"] == 0.02
    assert not same_weights(copied.out / ADAPTER, two.out / ADAPTER)
