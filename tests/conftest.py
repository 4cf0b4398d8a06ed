"""Shared fixtures: the tiny golden adapters and their base, token batches for them, a process left as it was."""

import contextlib
import gc
import logging
import os
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import huggingface_hub
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from builders import write_adapter
from heterofusion import HeteroFusionConfig, HeteroFusionModel, HeteroFusionTrainer, MethodConfig, load_adapter

# Models here are tiny, and runs of several tests are compared bit for bit: a sum over two threads is another one.
torch.set_num_threads(1)

TINY = {"preset": "paper", "block_size": 32, "embed_dim": 32, "num_heads": 4, "max_position_embeddings": 64}
GOLDEN = Path(__file__).parent / "golden"

pytest_plugins = ["recipe_runner"]


def pytest_collection_finish() -> None:
    """What was imported stays: every Trainer collects garbage, and would look through all of it."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def folder(tmp_path) -> Path:
    """A small adapter written by hand."""
    return write_adapter(tmp_path / "adapter")


@pytest.fixture
def base():
    return AutoModelForCausalLM.from_pretrained(GOLDEN / "base_llama")


@pytest.fixture(scope="session")
def target():
    return load_adapter(GOLDEN / "target_llama")


@pytest.fixture(scope="session")
def sources():
    return [load_adapter(GOLDEN / name) for name in ("source_qwen2", "source_mistral")]


@pytest.fixture
def model(base, target, sources):
    """A fusion whose hypernetworks no longer predict zero."""
    return perturb(HeteroFusionModel.from_adapters(base, target, sources, MethodConfig(**TINY)))


@contextlib.contextmanager
def restored_logging():
    """A recipe sets up logging for its whole process; here it must not outlive the test."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)
    transformers_logging.enable_default_handler()
    transformers_logging.disable_propagation()


@pytest.fixture
def logging_restored():
    with restored_logging():
        yield


@pytest.fixture
def offline_datasets(tmp_path, monkeypatch):
    """No data set comes from the Hub or from the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def perturb(model: HeteroFusionModel, seed: int = 0) -> HeteroFusionModel:
    """Give the decoders' zero layers some weight, so that updates are not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for network in model.hypernetworks.networks.values():
            weight = network.decoder.output.weight
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.02)
    return model


def make_args(folder: Path, **changes) -> HeteroFusionConfig:
    """Arguments of two training steps on the CPU."""
    settings = {
        **TINY,
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
    }
    return HeteroFusionConfig(**(settings | changes))


def make_model(args: MethodConfig, names: Sequence[str] = ("source_qwen2", "source_mistral")) -> HeteroFusionModel:
    """A fusion of golden adapters as training begins it."""
    sources = [load_adapter(GOLDEN / name) for name in names]
    return HeteroFusionModel.from_adapters(fresh_base(), load_adapter(GOLDEN / "target_llama"), sources, args)


def make_trainer(folder: Path, model=None, rows=None, trainer_options=None, **changes) -> HeteroFusionTrainer:
    """A trainer with the arguments of `make_args`, of a model whose hypernetworks no longer predict zero."""
    args = make_args(folder, **changes)
    rows = TokenRows() if rows is None else rows
    return HeteroFusionTrainer(model or perturb(make_model(args)), args, train_dataset=rows, **(trainer_options or {}))


def first_gradients(monkeypatch, trainer) -> list[torch.Tensor]:
    """Gradients of the first optimizer step, which is not taken, of a trainer that is run."""
    captured: list[torch.Tensor] = []

    def keep(optimizer, *args, **kwargs):
        captured.extend(p.grad.clone() for group in optimizer.param_groups for p in group["params"])

    monkeypatch.setattr(torch.optim.AdamW, "step", keep)
    trainer.train()
    return captured


def token_batch(rows: int = 4, length: int = 10, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tokens of the golden vocabulary; the first three of each row carry no label."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(4, 64, (rows, length), generator=generator)
    labels = input_ids.clone()
    labels[:, :3] = -100
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}


class TokenRows(torch.utils.data.Dataset):
    """Rows of `token_batch` with different numbers of labels."""

    def __init__(self, count: int = 16, seed: int = 0):
        batch = token_batch(count, seed=seed)
        for row in range(count):
            batch["labels"][row, 3 : 3 + row % 5] = -100
        self.rows = [{name: tensor[row] for name, tensor in batch.items()} for row in range(count)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def fresh_base():
    """A new copy of the golden base."""
    return AutoModelForCausalLM.from_pretrained(GOLDEN / "base_llama")


def logits(model, batch=None):
    """Logits of a model in float32, without gradient."""
    batch = batch or token_batch()
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
