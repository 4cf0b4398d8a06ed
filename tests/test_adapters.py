"""Reading adapters: what PEFT writes is read as PEFT means it, and everything else is refused by name."""

import dataclasses
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from builders import (
    CONFIG,
    LLAMA_ROLES,
    WEIGHTS,
    assert_names,
    edit_config,
    llama_modules,
    lora_folder,
    refusal,
    tiny_config,
    tiny_model,
    write_adapter,
)
from heterofusion import load_adapter
from heterofusion.adapters import config as adapter_config
from heterofusion.experts.expert import find_adapter

Q0 = "model.layers.0.self_attn.q_proj"
A0, B0 = (f"base_model.model.{Q0}.lora_{name}.weight" for name in "AB")


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


# ---- what PEFT writes is read as PEFT means it -----------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True},
        {"lora_alpha": 3},
        {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6}},
        # the first match counts ("roj" is none: names match as a whole), in the order of the file, which PEFT sorts
        {"rank_pattern": {"layers.0.mlp.gate_proj": 5, "mlp.gate_proj": 3, "roj": 2}},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"proj": 5, "v_proj": 32}, "use_rslora": True},
        {"layers_to_transform": 1},
        {"layers_to_transform": [0]},
        {"layers_to_transform": [0, 1], "layers_pattern": "layers"},
        {"layers_to_transform": []},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match")
def test_rank_and_scaling_are_those_of_peft(llama, tmp_path, config):
    lora_folder(llama, tmp_path, list(LLAMA_ROLES), r=4, **config)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    expected = {
        path.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for path, module in loaded.named_modules()
        if hasattr(module, "lora_A") and len(module.lora_A)
    }
    adapter = load_adapter(tmp_path)
    assert {path: (module.rank, module.scaling) for path, module in adapter.modules.items()} == expected
    assert len(expected) == (7 if config.get("layers_to_transform") in (1, [0]) else 14)


@pytest.mark.parametrize(
    ("family", "names", "config"),
    [
        ("llama", ["q_proj", "down_proj"], {"rank_pattern": {"down_proj": 2}, "use_rslora": True}),
        ("gpt2", ["c_attn", "c_fc", "c_proj"], {"fan_in_fan_out": True}),  # Conv1D holds (in, out)
    ],
)
def test_update_is_scaling_times_B_A(tmp_path, family, names, config):
    """The dense update, rebuilt from what is read, is what PEFT merges into the base."""
    base = tiny_model(family)
    lora_folder(base, tmp_path, names, **config)
    merged = PeftModel.from_pretrained(tiny_model(family), tmp_path).merge_and_unload()
    for path, module in load_adapter(tmp_path).modules.items():
        actual = merged.get_submodule(path).weight - base.get_submodule(path).weight
        update = module.scaling * module.lora_B @ module.lora_A
        assert update.shape == (module.out_features, module.in_features)
        torch.testing.assert_close(update.T if family == "gpt2" else update, actual, atol=1e-6, rtol=0)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_real_adapter_round_trips_with_its_embeddings(llama, tmp_path, dtype):
    lora_folder(llama, tmp_path, ["q_proj", "lm_head"], dtype=dtype, modules_to_save=["embed_tokens"])
    file, adapter = load_file(tmp_path / WEIGHTS), load_adapter(tmp_path)
    assert "base_model.model.model.embed_tokens.weight" in adapter.extra_tensors and "lm_head" in adapter.modules
    assert all("lora_" not in key for key in adapter.extra_tensors)
    assert all(module.lora_A.dtype == module.lora_B.dtype == dtype for module in adapter.modules.values())
    assert adapter.state_dict().keys() == file.keys()
    assert all(torch.equal(adapter.state_dict()[key], tensor) for key, tensor in file.items())


def test_pickle_is_read_when_allowed_and_the_order_of_its_tensors_does_not_matter(tmp_path):
    first = load_adapter(write_adapter(tmp_path, llama_modules(layers=12, roles=("q_proj", "v_proj"))))
    parameters = {key: torch.nn.Parameter(tensor) for key, tensor in load_file(tmp_path / WEIGHTS).items()}
    torch.save(dict(reversed(parameters.items())), tmp_path / "adapter_model.bin")
    (tmp_path / WEIGHTS).unlink()
    reordered = load_adapter(tmp_path, allow_pickle=True)
    assert list(first.modules) == list(reordered.modules)
    assert [path.split(".")[2] for path in first.modules] == [str(layer) for layer in range(12) for _ in range(2)]
    for path, module in first.modules.items():
        assert torch.equal(module.lora_B, reordered.modules[path].lora_B)
        assert not reordered.modules[path].lora_B.requires_grad


# ---- pickles: files that are broken in other ways stand in test_bad_input ------------------------------------------


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("write", [torch.save, pickle.dump])
def test_malicious_pickle_raises_and_runs_nothing(folder, tmp_path, write):
    (folder / WEIGHTS).unlink()
    with open(folder / "adapter_model.bin", "wb") as file:
        write({A0: Payload(tmp_path / "trace")}, file)
    assert_names(refusal(folder), folder, "adapter_model.bin", "could run code", "--allow_pickle")
    message = refusal(folder, allow_pickle=True)
    assert_names(message, folder, "adapter_model.bin", "ask for a safetensors file")
    assert "set to `False`" not in message  # torch's own advice is not passed on
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("content", [[torch.ones(2)], {A0: 1.0}, {3: torch.ones(2)}, {A0: torch.eye(4).to_sparse()}])
def test_pickle_of_something_else_raises(folder, content):
    (folder / WEIGHTS).unlink()
    torch.save(content, folder / "adapter_model.bin")
    assert_names(refusal(folder, allow_pickle=True), folder / "adapter_model.bin", "names and dense tensors")


# ---- tensors that do not make an adapter -----------------------------------------------------------------------


def test_non_finite_tensor_in_half_precision_raises(tmp_path):
    broken = torch.ones(32, 4, dtype=torch.bfloat16)
    broken[3, 1] = -float("inf")
    folder = write_adapter(tmp_path, dtype=torch.bfloat16, tensors={B0: broken})
    assert_names(refusal(folder), folder / WEIGHTS, B0, "NaN or Inf", "earlier checkpoint")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({A0: None}, (f"{Q0} has lora_B but no lora_A", "incomplete")),
        ({B0: torch.ones(32, 3)}, (Q0, "lora_A (4, 32) and lora_B (32, 3)", "rank 4")),
        ({"base_model.model.lm_head.weight": torch.empty(0)}, ("base_model.model.lm_head.weight", "ZeRO-3")),
        ({B0: torch.ones(32, 4, 1)}, (f"{Q0}.lora_B", "torch.float32 of shape (32, 4, 1)", "cannot be fused")),
        ({B0: torch.ones(32, 4, dtype=torch.int8)}, (f"{Q0}.lora_B", "torch.int8 of shape (32, 4)")),
        ({B0: torch.ones(32, 4).to(torch.float8_e4m3fn)}, (f"{Q0}.lora_B", "torch.float8_e4m3fn of shape (32, 4)")),
        *(
            ({key: torch.ones(4, 32)}, (f"unexpected tensor {key} (4, 32)",))
            for key in (
                f"{Q0}.lora_A.weight",
                f"base_model.model.{Q0}.lora_A.default.weight",
                f"base_model.model.{Q0}.lora_magnitude_vector",
                f"base_model.model.{Q0}.weight",
                "base_model.model.lm_head.lora_B.bias",
                "base_model.model.my_lm_heads.weight",
                "something",
            )
        ),
    ],
    ids=str,
)
def test_tensor_that_does_not_belong_raises(folder, changes, words):
    """Tensors that are replaced (None drops one), by their keys in the file."""
    state = {**load_file(folder / WEIGHTS), **changes}
    save_file({key: tensor for key, tensor in state.items() if tensor is not None}, folder / WEIGHTS)
    assert_names(refusal(folder), folder / WEIGHTS, *words)


@pytest.mark.parametrize(
    ("modules", "config", "words"),
    [
        ({"model.encoder.q_proj": (8, 8), "lm_head": (8, 16)}, {}, ("no tensor name has a layer index", "lm_head")),
        ({"model.layers.100000000.self_attn.q_proj": (8, 8)}, {}, ("layer index 100000000", "damaged")),
        (None, {"rank_pattern": {"layers.0.self_attn.q_proj": 8}}, ("lora_A (4, 32) and lora_B (32, 4)", "rank 8")),
        (None, {"layers_to_transform": [1, 5]}, ("holds layers [0, 1]", "layers_to_transform")),
        (
            None,
            {"layers_to_transform": [0, 1], "layers_pattern": ["h", "blocks"]},
            ("layers_pattern ['h', 'blocks']", "matches no tensor", "model.layers.0."),
        ),
    ],
    ids=str,
)
def test_layers_and_ranks_that_do_not_fit_raise(tmp_path, modules, config, words):
    folder = write_adapter(tmp_path, modules)
    edit_config(folder, **config)
    assert_names(refusal(folder), folder / WEIGHTS, *words)


def test_layers_of_config_that_the_file_lacks_are_a_warning(folder, caplog):
    edit_config(folder, layers_to_transform=[0, 1, 2, 3])
    assert len(load_adapter(folder).modules) == 14
    assert "layers_to_transform names layers that it does not hold: [2, 3]" in caplog.text


# ---- adapter_config.json: plain LoRA in PEFT's words, everything else is refused by name -----------------------


VARIANTS = {
    "use_dora": True, "lora_bias": True, "target_parameters": ["mlp.experts.gate_up_proj"],
    "layer_replication": [[0, 2], [1, 2]], "trainable_token_indices": {"embed_tokens": [1]},
    "alora_invocation_tokens": [5, 6], "use_qalora": True, "use_bdlora": {}, "kasa_config": {},
    "corda_config": {"corda_method": "kpm"}, "lora_ga_config": {"direction": "ArB2r"},
    "loftq_config": {"loftq_bits": 4}, "arrow_config": {"top_k": 3}, "monteclora_config": {"sigma": 1},
    "velora_config": {"num_groups": 2}, "megatron_config": {"tensor_model_parallel_size": 2},
}  # fmt: skip


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "Gaussian", "eva", "orthogonal", "mica"])
def test_initialization_that_keeps_the_base_is_read(folder, init):
    edit_config(folder, init_lora_weights=init)
    assert load_adapter(folder).modules.keys() == llama_modules().keys()
    assert find_adapter(str(folder)).only_adds  # it can be taken off a loaded base again


def test_unknown_empty_fields_are_a_warning(folder, caplog):
    empty = {"null": None, "false": False, "text": "", "list": [], "object": {}}
    edit_config(folder, **empty)
    load_adapter(folder)
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    for name in empty:
        assert sum(f"{folder / CONFIG}: unknown field {name!r}" in text for text in told) == 1


def test_every_field_of_peft_is_classified():
    """A PEFT release with a new field fails here, so that someone decides what it means."""
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert VARIANTS.keys() == adapter_config._REFUSED.keys()
    groups = (adapter_config._NEUTRAL, adapter_config._READ, set(adapter_config._REFUSED))
    assert fields - set.union(*groups) == set()
    assert sum(map(len, groups)) == len(set.union(*groups)), "a field stands in two groups"
    assert set.union(*groups) - fields == set(), "a field that PEFT does not have"


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        *(({field: value}, f"{field} is set ({json.dumps(value)[:40]}") for field, value in VARIANTS.items()),
        *(
            ({"init_lora_weights": init}, f"init_lora_weights is {json.dumps(init)}: it changes the base weights")
            for init in ("pissa_niter_4", "PiSSA", "olora", "corda", "unheard", ["gaussian"], 1)
        ),
        *(
            ({"a_new_one": value, "peft_version": "9"}, f"'a_new_one' = {json.dumps(value)} (written by peft 9)")
            for value in ("on", True, 1, 0, 0.5, [0], {"a": 1})
        ),
        *(({"bias": bias}, f"bias is {bias!r}: trained") for bias in ("all", "lora_only", True)),
        *(({"r": r}, f"r is {json.dumps(r)}, a positive integer") for r in ("4", True, 0, -4, 4.0, None, [4])),
        *(({"lora_alpha": alpha}, "lora_alpha is ") for alpha in ("8", True, 0, -1, None, float("nan"), 10**400)),
        *(({"peft_type": kind}, f"peft_type is {kind!r}; only 'LORA'") for kind in ("LOHA", "lora", None, ["LORA"])),
        ({"use_rslora": "yes"}, 'use_rslora is "yes", true or false'),
        ({"rank_pattern": [4]}, "rank_pattern is [4], an object"),
        ({"rank_pattern": {"q_proj": "4"}}, "rank_pattern['q_proj'] is \"4\", a positive integer"),
        ({"alpha_pattern": {"q_proj": 0}}, "alpha_pattern['q_proj'] is 0, a positive number"),
        ({"rank_pattern": {"q_(proj": 4}}, 'rank_pattern has an invalid pattern "q_(proj"'),
        ({"rank_pattern": {"(?i)q": 4}}, 'rank_pattern has an invalid pattern "(?i)q"'),
        ({"alpha_pattern": {"a{99999999999}": 4}}, "alpha_pattern has an invalid pattern"),
        ({"layers_to_transform": "0"}, 'layers_to_transform is "0"'),
        ({"layers_to_transform": [0, "1"]}, 'layers_to_transform is [0, "1"]'),
        ({"layers_to_transform": -1}, "layers_to_transform is -1"),
        ({"layers_pattern": 3}, "layers_pattern is 3"),
        ({"layers_pattern": "(h"}, 'layers_pattern has an invalid pattern "(h"'),
        ({"modules_to_save": "lm_head"}, 'modules_to_save is "lm_head", a list'),
        ({"base_model_name_or_path": {"a": 1}}, 'base_model_name_or_path is {"a": 1}'),
    ],
    ids=lambda value: str(value)[:40],
)
def test_field_that_no_plain_lora_has_raises(folder, fields, found):
    edit_config(folder, **fields)
    assert_names(refusal(folder), folder / CONFIG, found)


# ---- adapters and base models named by their Hub id ----------------------------------------------------------

PROBE = """
import sys, time
from heterofusion import load_adapter
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.loading import load_base_config
for name in ("nobody/nothing", "cached/both"):
    for read in (load_adapter, lambda name: load_base_config(name, "target adapter")):
        start = time.monotonic()
        try:
            result = type(read(name)).__name__
        except UserError as error:
            result = error
        print(time.monotonic() - start, result)
"""


def test_hub_ids_without_a_network_are_settled_within_seconds(tmp_path):
    """What is cached is read, the rest refused. The Hub client reads its environment when imported: a new process."""
    cache = tmp_path / "hub" / "models--cached--both"
    snapshot = write_adapter(cache / "snapshots" / ("0" * 40))
    tiny_config("llama").save_pretrained(snapshot)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    hidden = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN")
    kept = {key: value for key, value in os.environ.items() if key not in hidden and "_proxy" not in key.lower()}
    environment = {**kept, "HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}  # nothing listens there
    command = [sys.executable, "-c", PROBE]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    seconds, answers = zip(*(line.split(" ", 1) for line in result.stdout.splitlines()), strict=True)
    assert max(map(float, seconds)) < 15
    assert f"adapter 'nobody/nothing' is neither a local folder ({tmp_path / 'nobody/nothing'} does" in answers[0]
    assert "check the name and the network" in answers[0]
    assert "config.json of base model 'nobody/nothing' cannot be read" in answers[1]
    assert answers[2:] == ("LoraAdapter", "LlamaConfig")
