"""Basis expansion in checkpoints: the rows come back, others are refused by name."""

import json

import pytest
from safetensors.torch import load_file, save_file

from conftest import fresh_base, make_trainer
from heterofusion import HeteroFusionModel
from heterofusion.method.expansion import BASIS_FILE
from heterofusion.training.checkpoints import load_hypernetworks
from test_basis import K, sequences, settings


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Of a fusion whose rows were fitted."""
    folder = tmp_path_factory.mktemp("expanded")
    trainer = make_trainer(folder, extra_rank=K, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.fusion_model.fit_basis(sequences())
    trainer.train()
    return folder / "checkpoint-1", trainer.fusion_model.plan.target


def test_checkpoint_brings_the_rows_back(checkpoint, tmp_path):
    folder, wanted = checkpoint
    again = make_trainer(tmp_path, extra_rank=K, max_steps=1)
    assert again.fusion_model.plan.target.expanded_sha256() != wanted.expanded_sha256()
    again.train(resume_from_checkpoint=str(folder))
    found = again.fusion_model.plan.target
    assert found.expanded_sha256() == wanted.expanded_sha256() and found.expansion == wanted.expansion


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra_rank": 3}, "another extra_rank: 5, this run has 3"),
        ({"extra_rank": 0}, "another extra_rank: 5, this run has 0"),
        ({"extra_rank": K, "extra_basis": "activations"}, 'another extra_basis: "random", this run has "activations"'),
    ],
)
def test_checkpoint_of_another_basis_raises(checkpoint, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **changes).train(resume_from_checkpoint=str(checkpoint[0]))


def test_damaged_rows_raise(checkpoint, tmp_path, target, sources):
    folder, adapter = checkpoint
    model = HeteroFusionModel.from_adapters(fresh_base(), target, sources, settings())
    for name in ("hypernetworks.safetensors", "fusion_state.json", BASIS_FILE):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    save_file(load_file(folder / BASIS_FILE), tmp_path / BASIS_FILE)  # without what they are
    with pytest.raises(ValueError, match=rf"{BASIS_FILE} cannot be read"):
        load_hypernetworks(model, tmp_path)
    metadata = {"expansion": json.dumps(adapter.expansion.to_dict())}
    rows = adapter.extra_rows()
    save_file(dict(list(rows.items())[1:]), tmp_path / BASIS_FILE, metadata)
    with pytest.raises(ValueError, match="other modules or shapes than the adapter"):
        load_hypernetworks(model, tmp_path)
    (tmp_path / BASIS_FILE).unlink()
    with pytest.raises(ValueError, match=rf"{BASIS_FILE} cannot be read"):
        load_hypernetworks(model, tmp_path)
