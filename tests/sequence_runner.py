"""Sequences of fusions in the tests: a finished one to damage and resume, and what a run does while it runs.

A plugin of conftest.py, so that its fixtures are known everywhere.
"""

import gc
import json
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file

from recipe_runner import (
    MISTRAL,
    QWEN,
    SIZES,
    TARGET,
    copy_adapter,
    flags,
    save_tokenizer,
    succeeds,
    train,
    write_replay,
)

ADAPTER = "adapter_model.safetensors"
HYPERNETWORKS = "hypernetworks.safetensors"
ONE = {"name": "one", "source_adapters": [QWEN], "seed": 1}
TWO = {"name": "two", "source_adapters": [MISTRAL], "max_steps": 3}


def write_yaml(path: Path, stages: object, **values: object) -> Path:
    path.write_text(yaml.safe_dump({**values, "stages": stages}))
    return path


def record(folder: Path) -> dict:
    return json.loads((folder / "fusion.json").read_text())


def same_weights(first: Path, second: Path) -> bool:
    one, two = load_file(first), load_file(second)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


class Watch:
    """What a run does: which objects outlive their stage, and the hypernetworks before a stage's first step."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.begun: dict[str, dict[str, torch.Tensor]] = {}
        self.left_over: list[str] = []
        self.seen: list[weakref.ref] = []
        load_base, begin_stage, fit = train.load_base, train.begin_stage, train.HeteroFusionTrainer.train

        def watched_load(*args):
            self.left_over += [type(ref()).__name__ for ref in self.seen if ref() is not None]
            return load_base(*args)

        def watched_begin(stage, model):
            begin_stage(stage, model)
            self.begun[stage.name] = {name: p.detach().clone() for name, p in model.hypernetworks.named_parameters()}
            self.seen += map(weakref.ref, (model, model.hypernetworks, model.get_base_model()))

        def watched_fit(trainer, *args, **kwargs):
            result = fit(trainer, *args, **kwargs)
            self.seen += map(weakref.ref, (trainer, trainer.accelerator, trainer.optimizer, trainer.model_wrapped))
            return result

        patch.setattr(train, "load_base", watched_load)
        patch.setattr(train, "begin_stage", watched_begin)
        patch.setattr(train.HeteroFusionTrainer, "train", watched_fit)


@pytest.fixture
def watch(monkeypatch) -> Watch:
    return Watch(monkeypatch)


def stop_at(patch: pytest.MonkeyPatch, name: str, step: int) -> None:
    """Interrupt a stage (by the name of its folder) after so many optimizer steps."""
    original = train.HeteroFusionTrainer.training_step

    def step_or_stop(self, *args, **kwargs):
        if Path(self.args.output_dir).name == name and self.state.global_step == step:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    patch.setattr(train.HeteroFusionTrainer, "training_step", step_or_stop)


def remove(folder: Path, *names: str) -> None:
    for path in [path for name in names for path in folder.glob(name)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def only_stage_one(out: Path) -> None:
    """Leave of a sequence in `out` what stage one has made."""
    remove(out, *(path.name for path in out.iterdir() if path.name != "one"))


# ---- fixtures -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def common(base_dir, tmp_path_factory) -> dict:
    """Flags of all runs here."""
    folder = tmp_path_factory.mktemp("sequences")
    return {
        "model_name_or_path": base_dir, "dataset_name": [write_replay(folder / "replay.json")], "use_cpu": True,
        "max_steps": 2, "gradient_accumulation_steps": 2, "learning_rate": 0.01, "save_steps": 2, **SIZES,
    }  # fmt: skip


@pytest.fixture(scope="session")
def two(common, tmp_path_factory) -> SimpleNamespace:
    """A finished sequence of two stages that carries hypernetworks; the target has a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("two")
    target = copy_adapter(folder / "target", TARGET)
    save_tokenizer(target)
    config = write_yaml(folder / "run.yaml", [ONE, TWO], carry_hypernetworks=True, target_adapter=str(target))
    values = {"config": config, "output_dir": folder / "out", **common}
    del values["max_steps"]  # the command line would override that of stage two
    config.write_text(config.read_text() + "max_steps: 2\n")
    gc.disable()  # what is gone must be gone by intention
    try:
        with pytest.MonkeyPatch.context() as patch:
            watch = Watch(patch)
            log = succeeds(train.main, flags(values))
    finally:
        gc.enable()
    return SimpleNamespace(folder=folder, out=folder / "out", values=values, log=log, watch=watch, config=config)


@pytest.fixture
def copied(two, tmp_path) -> SimpleNamespace:
    """The finished sequence again, for a test to damage and resume."""
    shutil.copytree(two.out, tmp_path / "out")
    return SimpleNamespace(
        out=tmp_path / "out", values={**two.values, "output_dir": tmp_path / "out", "resume_from_checkpoint": True}
    )


@pytest.fixture
def single(common, tmp_path) -> dict:
    """Flags of a single run."""
    return {
        **common, "target_adapter": TARGET, "source_adapters": [QWEN], "output_dir": tmp_path / "out", "max_steps": 1,
    }  # fmt: skip
