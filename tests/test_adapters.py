"""Reading adapters: what PEFT writes is read as PEFT means it, and everything else is refused by name."""

import json
import math
import os
import pickle
import shutil
import subprocess

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from builders import (
    CONFIG,
    LLAMA_ROLES,
    WEIGHTS,
    assert_names,
    edit_config,
    input_ids,
    llama_modules,
    lora_folder,
    refusal,
    tiny_model,
    write_adapter,
    write_config,
)
from heterofusion import load_adapter

Q0 = "model.layers.0.self_attn.q_proj"
A0, B0 = (f"base_model.model.{Q0}.lora_{name}.weight" for name in "AB")


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


def edit_tensors(folder, **changes):
    """Replace tensors (None drops one); keys as in the file."""
    state = {**load_file(folder / WEIGHTS), **changes}
    save_file({key: tensor for key, tensor in state.items() if tensor is not None}, folder / WEIGHTS)


# What PEFT writes is read as PEFT means it.


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
        {"rank_pattern": {r".*\.1\..*proj": 3}, "alpha_pattern": {r".*self_attn\.[qk]_proj": 7}},
        {"init_lora_weights": "gaussian"},
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


def test_scaling_formulas(tmp_path):
    plain = load_adapter(write_adapter(tmp_path / "plain", r=4, lora_alpha=6)).modules[Q0]
    stabilized = load_adapter(write_adapter(tmp_path / "rs", r=4, lora_alpha=6, use_rslora=True)).modules[Q0]
    assert plain.scaling == 1.5
    assert stabilized.scaling == 6 / math.sqrt(4)


def test_update_is_scaling_times_B_A(llama, tmp_path):
    """The dense update, rebuilt from what is read, is what PEFT merges into the base."""
    lora_folder(llama, tmp_path, ["q_proj", "down_proj"], rank_pattern={"down_proj": 2}, use_rslora=True)
    merged = PeftModel.from_pretrained(tiny_model("llama"), tmp_path).merge_and_unload()
    base = llama.state_dict()
    for path, module in load_adapter(tmp_path).modules.items():
        update = module.scaling * module.lora_B @ module.lora_A
        actual = merged.state_dict()[f"{path}.weight"] - base[f"{path}.weight"]
        torch.testing.assert_close(update, actual, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_real_adapter_round_trips(llama, tmp_path, dtype):
    lora_folder(llama, tmp_path, ["q_proj", "up_proj"], dtype=dtype)
    file = load_file(tmp_path / WEIGHTS)
    state = load_adapter(tmp_path).state_dict()
    assert state.keys() == file.keys()
    for key, tensor in file.items():
        assert state[key].dtype == dtype
        assert torch.equal(state[key], tensor)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_saved_modules_and_embeddings_are_extra_tensors(llama, tmp_path):
    lora_folder(llama, tmp_path, ["q_proj", "lm_head"], modules_to_save=["embed_tokens"])
    file = load_file(tmp_path / WEIGHTS)
    adapter = load_adapter(tmp_path)
    assert "base_model.model.model.embed_tokens.weight" in adapter.extra_tensors
    assert all("lora_" not in key for key in adapter.extra_tensors)
    assert adapter.state_dict().keys() == file.keys()
    for key, tensor in file.items():
        assert torch.equal(adapter.state_dict()[key], tensor), key
    assert "lm_head" in adapter.modules


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_trained_embedding_adapters_are_extra_tensors(llama, tmp_path):
    lora_folder(llama, tmp_path, ["q_proj", "embed_tokens"])
    adapter = load_adapter(tmp_path)
    assert any(".lora_embedding_A" in key for key in adapter.extra_tensors)
    assert set(adapter.modules) == {Q0, Q0.replace("0", "1")}
    assert adapter.state_dict().keys() == load_file(tmp_path / WEIGHTS).keys()


def test_conv1d_of_gpt2_has_A_and_B_like_a_linear_layer(tmp_path):
    model = tiny_model("gpt2")
    lora_folder(model, tmp_path, ["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True)
    modules = load_adapter(tmp_path).modules
    shapes = {path: (module.in_features, module.out_features) for path, module in modules.items()}
    # Conv1D holds (in, out): the base weight's shape is the pair itself
    assert shapes == {path: tuple(model.get_submodule(path).weight.shape) for path in modules}
    assert shapes["transformer.h.0.attn.c_attn"] == (32, 96)
    merged = PeftModel.from_pretrained(tiny_model("gpt2"), tmp_path).merge_and_unload()
    for path, module in modules.items():
        actual = merged.get_submodule(path).weight - model.get_submodule(path).weight
        torch.testing.assert_close(module.scaling * (module.lora_B @ module.lora_A).T, actual, atol=1e-6, rtol=0)


def test_order_of_tensors_in_the_file_does_not_matter(tmp_path):
    modules = llama_modules(layers=12, roles=("q_proj", "v_proj"))
    first = load_adapter(write_adapter(tmp_path / "first", modules))
    second = tmp_path / "second"
    shutil.copytree(tmp_path / "first", second)
    (second / WEIGHTS).unlink()
    # a pickle keeps the order it was given
    torch.save(dict(reversed(load_file(tmp_path / "first" / WEIGHTS).items())), second / "adapter_model.bin")
    reordered = load_adapter(second, allow_pickle=True)
    assert list(first.modules) == list(reordered.modules)
    assert [path.split(".")[2] for path in first.modules] == [str(layer) for layer in range(12) for _ in range(2)]
    for path, module in first.modules.items():
        assert torch.equal(module.lora_B, reordered.modules[path].lora_B)


def test_identity_is_the_hash_of_the_weights(folder, tmp_path):
    expected = subprocess.run(["sha256sum", folder / WEIGHTS], capture_output=True, text=True, check=True).stdout
    assert load_adapter(folder).sha256 == expected.split()[0]
    other = write_adapter(tmp_path / "other", seed=1)
    assert load_adapter(other).sha256 != load_adapter(folder).sha256


def test_pickle_is_read_when_allowed(folder):
    expected = load_adapter(folder).state_dict()
    parameters = {key: torch.nn.Parameter(tensor) for key, tensor in load_file(folder / WEIGHTS).items()}
    torch.save(parameters, folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    state = load_adapter(folder, allow_pickle=True).state_dict()
    assert state.keys() == expected.keys()
    for key, tensor in state.items():
        assert torch.equal(tensor, expected[key])
        assert not tensor.requires_grad


# Files that cannot be read.


def test_missing_folder_raises(tmp_path):
    message = refusal(tmp_path / "nowhere")
    assert_names(message, tmp_path / "nowhere", "does not exist", "name a folder that holds adapter_config.json")


def test_file_instead_of_folder_raises(folder):
    message = refusal(folder / WEIGHTS)
    assert_names(message, folder / WEIGHTS, "is a file", "name the adapter's folder")


def test_missing_weights_raises(folder):
    (folder / WEIGHTS).unlink()
    assert_names(refusal(folder), folder / WEIGHTS, "is missing", "save_pretrained")


@pytest.mark.parametrize("content", [b"", b"no safetensors", b"\xff" * 64], ids=["empty", "text", "huge header"])
def test_corrupt_weights_raises(folder, content):
    (folder / WEIGHTS).write_bytes(content)
    assert_names(refusal(folder), folder / WEIGHTS, "damaged or truncated", "download or save it again")


def test_truncated_weights_raises(folder):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-100])
    assert_names(refusal(folder), folder / WEIGHTS, "damaged or truncated")


def test_pickle_only_raises(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    assert_names(refusal(folder), folder, "adapter_model.bin", "could run code", "--allow_pickle")


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("allow_pickle", [False, True])
def test_malicious_pickle_raises_and_runs_nothing(folder, tmp_path, allow_pickle):
    (folder / WEIGHTS).unlink()
    trace = tmp_path / "trace"
    torch.save({A0: Payload(trace)}, folder / "adapter_model.bin")
    assert_names(refusal(folder, allow_pickle=allow_pickle), folder, "adapter_model.bin")
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Payload(trace)))
    assert_names(refusal(folder, allow_pickle=allow_pickle), folder, "adapter_model.bin")
    assert "ask for a safetensors file" in refusal(folder, allow_pickle=True)
    assert "set to `False`" not in refusal(folder, allow_pickle=True)  # torch's own advice is not passed on
    assert not trace.exists()


@pytest.mark.parametrize("content", [[torch.ones(2)], {A0: 1.0}, {3: torch.ones(2)}, {A0: torch.eye(4).to_sparse()}])
def test_pickle_of_something_else_raises(folder, content):
    (folder / WEIGHTS).unlink()
    torch.save(content, folder / "adapter_model.bin")
    assert_names(refusal(folder, allow_pickle=True), folder / "adapter_model.bin", "names and dense tensors")


# Tensors that do not make an adapter.


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_non_finite_tensor_raises(tmp_path, value, dtype):
    folder = write_adapter(tmp_path, dtype=dtype)
    broken = load_file(folder / WEIGHTS)[B0]
    broken[3, 1] = value
    edit_tensors(folder, **{B0: broken})
    assert_names(refusal(folder), folder / WEIGHTS, B0, "NaN or Inf", "earlier checkpoint")


@pytest.mark.parametrize(("dropped", "held", "missing"), [(B0, "lora_A", "lora_B"), (A0, "lora_B", "lora_A")])
def test_missing_partner_raises(folder, dropped, held, missing):
    edit_tensors(folder, **{dropped: None})
    assert_names(refusal(folder), folder / WEIGHTS, f"{Q0} has {held} but no {missing}", "incomplete")


def test_rank_unlike_config_raises(folder):
    edit_config(folder, rank_pattern={"layers.0.self_attn.q_proj": 8})
    assert_names(refusal(folder), folder / WEIGHTS, "lora_A (4, 32) and lora_B (32, 4)", "gives rank 8", Q0)


def test_ranks_of_A_and_B_that_differ_raise(folder):
    edit_tensors(folder, **{B0: torch.ones(32, 3)})
    assert_names(refusal(folder), folder / WEIGHTS, Q0, "lora_A (4, 32) and lora_B (32, 3)", "rank 4")


@pytest.mark.parametrize("shape", [(0,), (0, 4), (32, 0)])
def test_empty_tensor_of_zero3_raises(folder, shape):
    edit_tensors(folder, **{B0: torch.empty(shape)})
    assert_names(refusal(folder), folder / WEIGHTS, B0, str(shape), "ZeRO-3", "save it again")


def test_empty_extra_tensor_raises(folder):
    edit_tensors(folder, **{"base_model.model.lm_head.weight": torch.empty(0)})
    assert_names(refusal(folder), folder / WEIGHTS, "base_model.model.lm_head.weight", "ZeRO-3")


@pytest.mark.parametrize(
    ("tensor", "found"),
    [
        (torch.ones(32, 4, 1), "torch.float32 of shape (32, 4, 1)"),
        (torch.ones(32), "torch.float32 of shape (32,)"),
        (torch.ones(32, 4, dtype=torch.int8), "torch.int8 of shape (32, 4)"),
        (torch.ones(32, 4, dtype=torch.bool), "torch.bool of shape (32, 4)"),
        (torch.ones(32, 4).to(torch.float8_e4m3fn), "torch.float8_e4m3fn of shape (32, 4)"),
    ],
    ids=["convolution", "vector", "integer", "bool", "float8"],
)
def test_tensor_that_is_no_float_matrix_raises(folder, tensor, found):
    edit_tensors(folder, **{B0: tensor})
    assert_names(refusal(folder), folder / WEIGHTS, f"{Q0}.lora_B", found, "cannot be fused")


def test_names_without_layer_index_raise(tmp_path):
    folder = write_adapter(tmp_path, {"model.encoder.q_proj": (8, 8), "lm_head": (8, 16)})
    assert_names(refusal(folder), folder / WEIGHTS, "no tensor name has a layer index", "lm_head")


def test_absurd_layer_index_raises(tmp_path):
    folder = write_adapter(tmp_path, {"model.layers.100000000.self_attn.q_proj": (8, 8)})
    assert_names(refusal(folder), folder / WEIGHTS, "layer index 100000000", "damaged")


@pytest.mark.parametrize("layers", [1, [1], [1, 5]])
def test_layers_unlike_config_raise(folder, layers):
    edit_config(folder, layers_to_transform=layers)
    message = refusal(folder)
    assert_names(message, folder / WEIGHTS, "holds layers [0, 1]", "layers_to_transform", "do not belong together")


def test_layers_of_config_that_the_file_lacks_are_a_warning(folder, caplog):
    edit_config(folder, layers_to_transform=[0, 1, 2, 3])
    assert len(load_adapter(folder).modules) == 14
    assert "layers_to_transform names layers that it does not hold: [2, 3]" in caplog.text


def test_layers_pattern_that_matches_nothing_raises(folder):
    edit_config(folder, layers_to_transform=[0, 1], layers_pattern=["h", "blocks"])
    assert_names(
        refusal(folder), folder / WEIGHTS, "layers_pattern ['h', 'blocks']", "matches no tensor", "model.layers.0."
    )


@pytest.mark.parametrize(
    "key",
    [
        f"{Q0}.lora_A.weight",
        f"base_model.model.{Q0}.lora_A.default.weight",
        f"base_model.model.{Q0}.lora_magnitude_vector",
        f"base_model.model.{Q0}.lora_B.bias",
        f"base_model.model.{Q0}.weight",
        "base_model.model.lm_head.lora_B.bias",
        "base_model.model.my_lm_heads.weight",
        "something",
    ],
)
def test_unexpected_tensor_name_raises(folder, key):
    edit_tensors(folder, **{key: torch.ones(4, 32)})
    assert_names(refusal(folder), folder / WEIGHTS, f"unexpected tensor {key} (4, 32)")


def test_file_without_lora_pairs_raises(folder):
    save_file({"base_model.model.lm_head.weight": torch.ones(4, 4)}, folder / WEIGHTS)
    assert_names(refusal(folder), folder / WEIGHTS, "no lora_A / lora_B pair")


def test_adapter_of_the_builders_loads_into_peft(llama, tmp_path):
    """The hand-written folders of these tests are what PEFT itself reads."""
    write_adapter(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    for key, tensor in state.items():
        assert torch.equal(loaded.get_parameter(key.replace(".weight", ".default.weight")), tensor)
    ids = input_ids(1, 6)
    assert not torch.allclose(loaded(input_ids=ids).logits, llama(input_ids=ids).logits, atol=1e-4)
    keys = json.loads((lora_folder(llama, tmp_path / "peft", ["q_proj"]) / CONFIG).read_text()).keys()
    assert json.loads(write_config(tmp_path).read_text()).keys() == keys
