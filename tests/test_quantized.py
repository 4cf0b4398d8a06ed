"""A quantized target base: whatever holds its weights, the update is added behind lora_B."""

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from builders import LLAMA_ROLES, lora_folder, tiny_model
from conftest import GOLDEN, TINY, TokenRows, perturb, token_batch
from heterofusion import HeteroFusionConfig, HeteroFusionModel, HeteroFusionTrainer, load_adapter


class Int8Linear(nn.Linear):
    """A linear layer with int8 weights and one scale per row, as weight-only quantizers make them."""

    @classmethod
    def quantize(cls, linear: nn.Linear) -> "Int8Linear":
        layer = cls(linear.in_features, linear.out_features, bias=False)
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        layer.register_buffer("scale", scale)
        layer.weight = nn.Parameter((linear.weight / scale).round().to(torch.int8), requires_grad=False)
        return layer

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype))


def int8_base(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in LLAMA_ROLES:
            model.set_submodule(name, Int8Linear.quantize(module))
    return model


def bitsandbytes_base(folder, **settings):
    pytest.importorskip("bitsandbytes", reason="pip install 'heterofusion[quantization]' to test bitsandbytes")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(**settings)
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32, device_map={"": "cpu"}
    )


BASES = {
    "int8 weights": (int8_base, 1e-4),
    "bitsandbytes 8 bit": (lambda folder: bitsandbytes_base(folder, load_in_8bit=True), 3e-2),
    "bitsandbytes nf4": (
        lambda folder: bitsandbytes_base(
            folder, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        ),
        3e-2,  # bitsandbytes computes part of it in bfloat16
    ),
}


@pytest.mark.parametrize("kind", BASES)
def test_quantized_base_trains_exports_and_reloads(tmp_path, kind):
    load, tolerance = BASES[kind]
    plain = tiny_model("llama", hidden_size=64, intermediate_size=128, num_hidden_layers=3, initializer_range=0.2)
    plain.save_pretrained(tmp_path / "base")
    anchor = lora_folder(plain, tmp_path / "anchor", list(LLAMA_ROLES), r=4, std=0.3)
    base = load(tmp_path / "base")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    args = HeteroFusionConfig(
        output_dir=str(tmp_path / "fused"), **TINY, max_steps=2, learning_rate=1e-2, use_cpu=True, disable_tqdm=True,
        save_strategy="no", gradient_accumulation_steps=2,
    )  # fmt: skip
    model = HeteroFusionModel.from_adapters(base, load_adapter(anchor), [load_adapter(GOLDEN / "source_qwen2")], args)
    trainer = HeteroFusionTrainer(perturb(model), args, train_dataset=TokenRows())
    trainer.train()
    trainer.save_model()
    kept = {name.replace(".base_layer", ""): tensor for name, tensor in model.get_base_model().state_dict().items()}
    if kind == "int8 weights":  # bitsandbytes repacks its weights at the first forward on a CPU
        for name, tensor in before.items():
            assert torch.equal(kept[name], tensor), name
    ids = token_batch()["input_ids"]
    with torch.no_grad():
        live = model(input_ids=ids).logits
        reloaded = PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "fused")(input_ids=ids).logits
        anchored = PeftModel.from_pretrained(load(tmp_path / "base"), anchor)(input_ids=ids).logits
    torch.testing.assert_close(reloaded, live, atol=tolerance, rtol=0)
    assert (live - anchored).abs().max() > 3 * tolerance
