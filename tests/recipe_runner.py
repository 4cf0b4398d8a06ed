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

import pytest
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from builders import WEIGHTS, edit_config
from conftest import GOLDEN, restored_logging

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes"
TARGET, QWEN, MISTRAL = (str(GOLDEN / name) for name in ("target_llama", "source_qwen2", "source_mistral"))
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
    rows = [
        {
            "prompt": " ".join(f"w{first + (row + i) % 40}" for i in range(words)),
            "completion": f" w{first + row} w{first + row + 1}",
        }
        for row in range(count)
    ]
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


def shell(*command: object, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PATH": shell_path(), **variables}
    return subprocess.run([*map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def shell_path() -> str:
    return os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
