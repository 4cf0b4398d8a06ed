"""Running the recipes in the tests: a small base, replay and flags that are in order, and what an error looks like.

A plugin of conftest.py, so that its fixtures are known everywhere.
"""

import contextlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from builders import WEIGHTS, edit_config
from conftest import GOLDEN, restored_logging
from heterofusion.experts.generation import AnswerGenerator

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes"
TARGET, QWEN, MISTRAL = (str(GOLDEN / name) for name in ("target_llama", "source_qwen2", "source_mistral"))
ADAPTER, HYPERNETWORKS = WEIGHTS, "hypernetworks.safetensors"
SIZES = {"block_size": 32, "embed_dim": 32, "num_heads": 4, "max_position_embeddings": 64, "rdm_projections": 16}


def recipe(name: str):
    """A recipe as a module; recipes/ is not a package."""
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


train, plan = recipe("train"), recipe("plan")


# ---- what a run needs -------------------------------------------------------------------------------------------


def save_tokenizer(folder: Path, prefix: str = "w", size: int = 64) -> None:
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"{prefix}{i}": i for i in range(4, size)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)


def write_replay(path: Path, count: int = 6, first: int = 4, words: int = 4) -> Path:
    prompts = [" ".join(f"w{first + (row + i) % 40}" for i in range(words)) for row in range(count)]
    answers = [f" w{first + row} w{first + row + 1}" for row in range(count)]
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in zip(prompts, answers, strict=True)]
    path.write_text(json.dumps(rows))
    return path


def copy_adapter(folder: Path, name: str = QWEN, config: dict | None = None, tensors=None) -> Path:
    """Copy an adapter with other config fields and with `tensors(dict)` applied to its weights."""
    shutil.copytree(name, folder)
    edit_config(folder, **(config or {}))
    if tensors is not None:
        weights = load_file(folder / WEIGHTS)
        tensors(weights)
        save_file(weights, folder / WEIGHTS, {"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory) -> Path:
    """The golden base with a tokenizer."""
    folder = tmp_path_factory.mktemp("bases") / "llama"
    shutil.copytree(GOLDEN / "base_llama", folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def bare_base(base_dir) -> Path:
    """A base without weights: enough for every check."""
    folder = base_dir.parent / "bare"
    shutil.copytree(base_dir, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


@pytest.fixture(scope="session")
def replay(tmp_path_factory) -> Path:
    return write_replay(tmp_path_factory.mktemp("replay") / "replay.json")


@pytest.fixture
def arguments(bare_base, replay, tmp_path) -> dict:
    """Flags of a training run that is in order, but for the weights of its base."""
    return {
        "model_name_or_path": bare_base, "target_adapter": TARGET, "source_adapters": [QWEN],
        "dataset_name": [replay], "output_dir": tmp_path / "out", "use_cpu": True, "max_steps": 1,
        "gradient_accumulation_steps": 2, "learning_rate": 0.01, **SIZES,
    }  # fmt: skip


@pytest.fixture(scope="session")
def common(base_dir, replay) -> dict:
    """Flags of small fusions, without adapters and folder."""
    return {
        "model_name_or_path": base_dir, "dataset_name": [replay], "use_cpu": True, "max_steps": 2,
        "gradient_accumulation_steps": 2, "learning_rate": 0.01, "save_steps": 2, **SIZES,
    }  # fmt: skip


@pytest.fixture
def single(common, tmp_path) -> dict:
    """Flags of a single run of one step."""
    return {
        **common, "target_adapter": TARGET, "source_adapters": [QWEN], "output_dir": tmp_path / "out", "max_steps": 1,
    }  # fmt: skip


@pytest.fixture(scope="session")
def two(common, tmp_path_factory) -> SimpleNamespace:
    """Two fusions in a row: that in `out` has the result of that in `out/one` for its target and goes on with its
    hypernetworks; the first target has a tokenizer of its own.
    """
    folder = tmp_path_factory.mktemp("two")
    out = folder / "out"
    target = copy_adapter(folder / "target", TARGET)
    save_tokenizer(target)
    one = {**common, "target_adapter": target, "source_adapters": [QWEN], "seed": 1, "output_dir": out / "one"}
    succeeds(train.main, flags(one))
    last = {
        **common, "target_adapter": out / "one", "source_adapters": [MISTRAL], "init_hypernetwork_from": out / "one",
        "max_steps": 3, "output_dir": out, "overwrite": True,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        watch = Watch(patch)
        log = succeeds(train.main, flags(last))
    return SimpleNamespace(out=out, values=last, log=log, watch=watch)


class Watch:
    """The hypernetworks before a run's first step, by the name of its folder."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.begun: dict[str, dict[str, torch.Tensor]] = {}
        fit = train.HeteroFusionTrainer.train

        def watched(trainer, *args, **kwargs):
            parameters = trainer.fusion_model.hypernetworks.named_parameters()
            self.begun[Path(trainer.args.output_dir).name] = {name: p.detach().clone() for name, p in parameters}
            return fit(trainer, *args, **kwargs)

        patch.setattr(train.HeteroFusionTrainer, "train", watched)


@pytest.fixture
def watch(monkeypatch) -> Watch:
    return Watch(monkeypatch)


def stop_at(patch: pytest.MonkeyPatch, step: int) -> None:
    """Interrupt a run after so many optimizer steps."""
    original = train.HeteroFusionTrainer.training_step

    def step_or_stop(self, *args, **kwargs):
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    patch.setattr(train.HeteroFusionTrainer, "training_step", step_or_stop)


def record(folder: Path) -> dict:
    """The provenance of a fusion."""
    return json.loads((folder / "fusion.json").read_text())


def same_weights(first: Path, second: Path) -> bool:
    one, two = load_file(first), load_file(second)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def remove(folder: Path, *names: str) -> None:
    for path in [path for name in names for path in folder.glob(name)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


# ---- running ----------------------------------------------------------------------------------------------------


def flags(values: dict) -> list[str]:
    """Command line of a dictionary; None leaves a flag out."""
    argv = []
    for name, value in values.items():
        if isinstance(value, (list, tuple)):
            argv += [f"--{name}", *map(str, value)]
        elif value is not None:
            argv += [f"--{name}", str(value).lower() if isinstance(value, bool) else str(value)]
    return argv


def contents(folder: Path) -> dict[Path, bytes | None] | None:
    """Files and folders in a folder, None if it is missing."""
    if not folder.exists():
        return None
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@pytest.fixture
def fails(capsys, arguments, monkeypatch):
    """Run training with some flags changed; it must fail as a user's error does. Gives the line on stderr."""

    def no_weights(*args, **kwargs):
        raise AssertionError("the base model was loaded before the error")

    monkeypatch.setattr(train, "load_base", no_weights)

    def run(*words: object, **changed: object) -> str:
        output = arguments["output_dir"]
        before = contents(output)
        line = error_line(capsys, train.main, flags({**arguments, **changed}), *words)
        assert contents(output) == before
        return line

    return run


def error_line(capsys, main, argv: list[str], *words: object) -> str:
    capsys.readouterr()
    code = main(argv)
    out, err = capsys.readouterr()
    check_error(code, out, err, *words)
    return err.splitlines()[0]


def check_error(code: int, out: str, err: str, *words: object) -> None:
    assert code == 2, err
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert err.startswith("error: ")
    for word in words:
        assert str(word) in err, f"{word!r} is not in: {err}"


def late_error(capsys, main, argv: list[str], *words: object) -> str:
    """Run what fails when it has begun its work; beside its log and progress bars the error is one line."""
    capsys.readouterr()
    code = main(argv)
    captured = capsys.readouterr()
    (line,) = re.findall(r"error: .*", captured.err)  # after a progress bar that was left there
    check_error(code, "", line, *words)  # metrics are on stdout
    assert "Traceback" not in captured.err
    return line


def succeeds(main, argv: list[str]) -> str:
    """Run a recipe that must succeed; gives what it wrote to stderr."""
    err, out = io.StringIO(), io.StringIO()
    with restored_logging(), contextlib.redirect_stderr(err), contextlib.redirect_stdout(out):
        code = main(argv)
    assert code == 0, err.getvalue()
    return err.getvalue()


class Killed(BaseException):
    """Stands for a kill: nothing that a program does about errors helps."""


def is_killed(main, argv: list[str]) -> None:
    """Run a recipe that dies of something that is no user's error."""
    with restored_logging(), pytest.raises(Killed):
        main(argv)


@pytest.fixture
def kill_after(monkeypatch):
    """Kill the program in a batch; gives the numbers of prompts that were generated for, batch by batch."""
    generate = AnswerGenerator._generate

    def after(batches: int | None) -> list[int]:
        sizes: list[int] = []

        def killed(self, prompts, config, choice):
            if batches is not None and len(sizes) == batches:
                raise Killed
            sizes.append(len(prompts))
            return generate(self, prompts, config, choice)

        monkeypatch.setattr(AnswerGenerator, "_generate", killed)
        return sizes

    return after


def shell(*command: object, **variables: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PATH": path, **variables}
    return subprocess.run([*map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
