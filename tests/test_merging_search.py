"""The values that a search of merges tries, and dense updates put on a base for a time."""

import pytest
import torch

from builders import tiny_model
from heterofusion.merging.config import search_candidates
from heterofusion.merging.export import added
from heterofusion.merging.rules.ties import Ties
from heterofusion.runtime.errors import UserError


def test_ranges_include_their_stop():
    found = search_candidates(["lambda=0.1:1.0:0.1"], "ties", {"density": 0.3})
    assert found == [
        Ties(merge_lambda=value, density=0.3) for value in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    ]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["lambda"], r"--search lambda: write name=start:stop:step"),
        (["rank=1,2"], r"--rank 1.0: the hyper-parameters of ties are --merge_lambda, --density"),
        (["seed=1,2"], r"seed is given too, or is a seed"),
        (["lambda=0.1:x:0.1"], r"lambda=0.1:x:0.1: write name=start:stop:step, rising, or name=value,value"),
        (["lambda=0.1:1"], r"write name=start:stop:step"),
        (["lambda=1:0.1:0.1"], r"start:stop:step, rising"),
        (["lambda=0:1:0.00001"], r"has 1001 combinations, more than 1000"),
        (["lambda=0.1:1:0.01", "density=0.01:1:0.01"], r"has 9100 combinations, more than 1000"),
        (["lambda=0.1,0.1"], r"all different numbers"),
        (["lambda=0.1", "merge_lambda=0.2"], r"merge_lambda is given too"),
        (["density=0.5,1.5"], r"--density is 1.5; it must be above 0 and at most 1"),
        (["lambda=nan"], r"--merge_lambda is nan; it must be above 0"),
    ],
)
def test_a_search_that_has_no_meaning_raises(entries, message):
    with pytest.raises(UserError, match=message):
        search_candidates(entries, "ties", {})


def test_a_dense_update_leaves_the_base_as_it_was():
    model = tiny_model("llama", tie_word_embeddings=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    update = torch.full((128, 32), 0.25)
    with added(model, lambda path: update, ["lm_head"]):
        assert torch.equal(model.lm_head.weight, before["lm_head.weight"] + 0.25)
        assert torch.equal(model.get_input_embeddings().weight, before["lm_head.weight"])
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
