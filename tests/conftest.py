"""Shared fixtures: the tiny golden adapters and their base, and token batches for them."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from transformers import AutoModelForCausalLM

from heterofusion import HeteroFusionModel, MethodConfig, load_adapter

TINY = {"preset": "paper", "block_size": 32, "embed_dim": 32, "num_heads": 4, "max_position_embeddings": 64}
GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden() -> Path:
    return GOLDEN


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
    model = HeteroFusionModel.from_adapters(base, target, sources, MethodConfig(**TINY))
    return perturb(model)


def perturb(model: HeteroFusionModel, seed: int = 0) -> HeteroFusionModel:
    """Give the decoders' zero layers some weight, so that updates are not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for network in model.hypernetworks.networks.values():
            weight = network.decoder.output.weight
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.02)
    return model


def token_batch(rows: int = 4, length: int = 10, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tokens of the golden vocabulary; the first three of each row carry no label."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(4, 64, (rows, length), generator=generator)
    labels = input_ids.clone()
    labels[:, :3] = -100
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}


class TokenRows(torch.utils.data.Dataset):
    """Rows of `token_batch` with different numbers of labels."""

    def __init__(self, count: int = 16, length: int = 10, seed: int = 0, uneven: bool = True):
        batch = token_batch(count, length, seed)
        if uneven:
            for row in range(count):
                batch["labels"][row, 3 : 3 + row % 5] = -100
        self.rows = [{name: tensor[row] for name, tensor in batch.items()} for row in range(count)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]
