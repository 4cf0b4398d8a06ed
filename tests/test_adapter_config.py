"""What `adapter_config.json` may say: plain LoRA in PEFT's words, everything else is refused by name."""

import dataclasses
import json

import pytest
from peft import LoraConfig

from builders import CONFIG, assert_names, edit_config, llama_modules, refusal
from heterofusion import AdapterError, load_adapter
from heterofusion.adapters import config as adapter_config
from heterofusion.experts.models import find_adapter


def test_missing_config_raises(folder):
    (folder / CONFIG).unlink()
    assert_names(refusal(folder), folder / CONFIG, "is missing")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b'{"r": 4,', "is not JSON: .*line 1, column 9"),
        (b"", "is not JSON"),
        (b"[1, 2]", "holds list, a JSON object was expected"),
        (b'"LORA"', "holds str, a JSON object was expected"),
        ('{"peft_type": "LORA", "x": "é"}'.encode("latin-1"), "cannot be read: .*utf-8"),
        (b'{"r": ' + b"9" * 5000 + b"}", "cannot be read: .*digits"),
        (b"[" * 200_000, "cannot be read"),
    ],
    ids=["cut", "empty", "list", "string", "latin-1", "digits", "nested"],
)
def test_unreadable_config_raises(folder, content, found):
    (folder / CONFIG).write_bytes(content)
    with pytest.raises(AdapterError, match=found) as caught:
        load_adapter(folder)
    assert_names(str(caught.value), folder / CONFIG)


# Configs that are no plain LoRA.


@pytest.mark.parametrize("peft_type", ["LOHA", "ADALORA", "lora", None, 5, ["LORA"]])
def test_other_peft_type_raises(folder, peft_type):
    edit_config(folder, peft_type=peft_type)
    assert_names(refusal(folder), folder / CONFIG, f"peft_type is {peft_type!r}", "only 'LORA'")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("lora_bias", True),
        ("target_parameters", ["mlp.experts.gate_up_proj"]),
        ("layer_replication", [[0, 2], [1, 2]]),
        ("trainable_token_indices", [1, 2]),
        ("trainable_token_indices", {"embed_tokens": [1]}),
        ("alora_invocation_tokens", [5, 6]),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("use_bdlora", {}),
        ("kasa_config", {"beta": 1e-4}),
        ("kasa_config", {}),
        ("corda_config", {"corda_method": "kpm"}),
        ("lora_ga_config", {"direction": "ArB2r"}),
        ("loftq_config", {"loftq_bits": 4}),
        ("arrow_config", {"top_k": 3}),
        ("monteclora_config", {"sigma": 1}),
        ("velora_config", {"num_groups": 2}),
        ("megatron_config", {"tensor_model_parallel_size": 2}),
    ],
    ids=str,
)
def test_lora_variant_raises(folder, field, value):
    edit_config(folder, **{field: value})
    assert_names(refusal(folder), folder / CONFIG, f"{field} is set", json.dumps(value)[:40], "only plain LoRA")


@pytest.mark.parametrize("bias", ["all", "lora_only", True])
def test_trained_bias_raises(folder, bias):
    edit_config(folder, bias=bias)
    assert_names(refusal(folder), folder / CONFIG, f"bias is {bias!r}", "bias='none'")


@pytest.mark.parametrize(
    "init", ["pissa", "pissa_niter_4", "PiSSA", "olora", "corda", "loftq", "lora_ga", "unheard", ["gaussian"], 1]
)
def test_initialization_that_alters_the_base_raises(folder, init):
    edit_config(folder, init_lora_weights=init)
    assert_names(refusal(folder), folder / CONFIG, f"init_lora_weights is {json.dumps(init)}", "convert the adapter")


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "Gaussian", "eva", "orthogonal", "mica"])
def test_initialization_that_keeps_the_base_is_read(folder, init):
    edit_config(folder, init_lora_weights=init)
    assert load_adapter(folder).modules.keys() == llama_modules().keys()
    assert find_adapter(str(folder)).only_adds  # it can be taken off a loaded base again


@pytest.mark.parametrize("value", ["on", True, 1, 0, 0.5, [0], {"a": 1}], ids=repr)
def test_unknown_field_with_value_raises(folder, value):
    edit_config(folder, use_lora_next=value, peft_version="9.9")
    assert_names(
        refusal(folder), folder / CONFIG, "'use_lora_next'", json.dumps(value), "peft 9.9", "remove the field"
    )


@pytest.mark.parametrize("value", [None, False, "", [], {}], ids=repr)
def test_unknown_empty_field_is_a_warning(folder, caplog, value):
    edit_config(folder, use_lora_next=value)
    load_adapter(folder)
    (record,) = [record for record in caplog.records if "use_lora_next" in record.getMessage()]
    assert record.levelname == "WARNING"
    assert str(folder / CONFIG) in record.getMessage()


def test_plain_adapter_gives_no_warning(folder, caplog):
    load_adapter(folder)
    assert not caplog.records


def test_every_field_of_peft_is_classified():
    """A PEFT release with a new field fails here, so that someone decides what it means."""
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    groups = (adapter_config._NEUTRAL, adapter_config._READ, set(adapter_config._REFUSED))
    assert fields - set.union(*groups) == set()
    assert sum(map(len, groups)) == len(set.union(*groups)), "a field stands in two groups"
    assert set.union(*groups) - fields == set(), "a field that PEFT does not have"


@pytest.mark.parametrize("r", ["4", True, 0, -4, 4.0, None, [4]], ids=repr)
def test_rank_of_wrong_type_raises(folder, r):
    edit_config(folder, r=r)
    assert_names(refusal(folder), folder / CONFIG, f"r is {json.dumps(r)}", "positive integer")


@pytest.mark.parametrize(
    "alpha", ["8", True, 0, -1, None, float("nan"), float("inf"), 10**400], ids=lambda v: str(v)[:5]
)
def test_alpha_of_wrong_type_raises(folder, alpha):
    edit_config(folder, lora_alpha=alpha)
    assert_names(refusal(folder), folder / CONFIG, "lora_alpha is ", "positive number")


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"use_rslora": "yes"}, 'use_rslora is "yes", true or false'),
        ({"rank_pattern": [4]}, "rank_pattern is [4], an object"),
        ({"rank_pattern": {"q_proj": "4"}}, "rank_pattern['q_proj'] is \"4\", a positive integer"),
        ({"alpha_pattern": {"q_proj": 0}}, "alpha_pattern['q_proj'] is 0, a positive number"),
        ({"rank_pattern": {"q_(proj": 4}}, 'rank_pattern has an invalid pattern "q_(proj"'),
        ({"rank_pattern": {"*": 4}}, 'rank_pattern has an invalid pattern "*"'),
        ({"rank_pattern": {"(?i)q": 4}}, 'rank_pattern has an invalid pattern "(?i)q"'),
        ({"alpha_pattern": {"a{99999999999}": 4}}, "alpha_pattern has an invalid pattern"),
        ({"layers_to_transform": "0"}, 'layers_to_transform is "0"'),
        ({"layers_to_transform": [0, "1"]}, 'layers_to_transform is [0, "1"]'),
        ({"layers_to_transform": True}, "layers_to_transform is true"),
        ({"layers_to_transform": -1}, "layers_to_transform is -1"),
        ({"layers_pattern": 3}, "layers_pattern is 3"),
        ({"layers_pattern": "(h"}, 'layers_pattern has an invalid pattern "(h"'),
        ({"modules_to_save": "lm_head"}, 'modules_to_save is "lm_head", a list'),
        ({"modules_to_save": 3}, "modules_to_save is 3, a list"),
        ({"base_model_name_or_path": {"a": 1}}, 'base_model_name_or_path is {"a": 1}'),
    ],
    ids=lambda value: str(value)[:40],
)
def test_field_of_wrong_type_raises(folder, fields, found):
    edit_config(folder, **fields)
    assert_names(refusal(folder), folder / CONFIG, found)
