"""What benchmark.py measures: target models with random weights, random adapters, random examples."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel, Qwen2Config

from heterofusion.runtime.errors import UserError
from heterofusion.runtime.flags import check_ranges, flag
from heterofusion.zoo import DEMO_ANCHOR, DEMO_SOURCES, zoo_path

GIB = 1024**3
DEMO = "demo"
DEMO_TOKENS = 96
DEMO_RANK = 8
LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
QWEN_7B = {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4}
MLP_ROLES = ("gate_proj", "up_proj", "down_proj")
ROLES = ("q_proj", "k_proj", "v_proj", "o_proj", *MLP_ROLES)


@dataclass(frozen=True)
class Shape:
    """Sizes of a target and its sources.

    Attributes:
        target: fields of the target's LlamaConfig.
        source: fields of the sources' Qwen2Config.
        tokens: tokens per example, if not given.
        dtype: of the frozen base; bfloat16 comes with mixed precision.
        gpu_gib: GPU memory it needs, in GiB; 0 if a CPU will do.
    """

    target: dict[str, Any]
    source: dict[str, Any]
    tokens: int
    dtype: torch.dtype = torch.float32
    gpu_gib: int = 0


SHAPES = {
    "llama8b-2layers": Shape(
        {**LLAMA_8B, "num_hidden_layers": 2, "vocab_size": 1024}, {**QWEN_7B, "num_hidden_layers": 2}, tokens=256
    ),
    # 15 GiB of weights; measured on an H200, by nvidia-smi: 25 for plain LoRA, 23 `compact`, 32 `paper`
    "llama8b": Shape(
        {**LLAMA_8B, "num_hidden_layers": 32, "vocab_size": 128256}, {**QWEN_7B, "num_hidden_layers": 28},
        tokens=1024, dtype=torch.bfloat16, gpu_gib=34,
    ),
}  # fmt: skip


@dataclass
class Workload:
    """What all rows of a table have in common."""

    shape: str = flag(
        "llama8b-2layers", help="Model and adapters to measure; llama8b needs a GPU.", choices=[DEMO, *SHAPES]
    )
    sources: int = flag(2, help="Source adapters (the demo's are repeated).", range="[1, inf)")
    rank: int = flag(8, help="Rank of the random adapters (the demo's have rank 8).", range="[1, inf)")
    accumulation: int = flag(8, help="Micro-batches per optimizer step.", range="[1, inf)")
    micro_batch: int = flag(1, help="Examples per micro-batch.", range="[1, inf)")
    tokens: int | None = flag(
        None, help="Tokens per example (256; 1024 in llama8b; 96 at most in demo).", range="[2, inf)"
    )
    steps: int = flag(5, help="Optimizer steps measured, after two that are not.", range="[1, inf)")
    activation_checkpointing: bool = flag(False, help="Compute activations again in the backward, in every row.")

    def check(self) -> None:
        """Check the ranges, and that the machine can hold the shape.

        Raises:
            ValueError: names the flag, its value and what to set instead.
        """
        check_ranges(self)
        if self.shape == DEMO:
            if self.rank != DEMO_RANK:
                raise UserError(
                    f"--rank is {self.rank}, but the demo's adapters have rank {DEMO_RANK}; choose another --shape"
                )
            if self.token_count() > DEMO_TOKENS:
                raise UserError(
                    f"--tokens is {self.tokens}, but the demo's model has {DEMO_TOKENS} positions; give fewer"
                )
            return
        needed = SHAPES[self.shape].gpu_gib
        if needed and not torch.cuda.is_available():
            raise UserError(
                f"--shape {self.shape} needs a GPU with {needed} GiB, but there is none; use --shape llama8b-2layers"
            )
        if needed:
            gpu = torch.cuda.get_device_properties(0)
            if gpu.total_memory < needed * GIB:
                raise UserError(
                    f"--shape {self.shape} needs a GPU with {needed} GiB, but {gpu.name} has "
                    f"{gpu.total_memory / GIB:.1f}; use --shape llama8b-2layers"
                )

    def token_count(self) -> int:
        """Tokens per example, as given or as the shape has it."""
        if self.tokens is not None:
            return self.tokens
        return DEMO_TOKENS if self.shape == DEMO else SHAPES[self.shape].tokens


class RandomRows(torch.utils.data.Dataset):
    """Random token rows; every token after the first counts in the loss."""

    def __init__(self, count: int, tokens: int, vocabulary: int):
        self.ids = torch.randint(0, vocabulary, (count, tokens), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        ids = self.ids[index]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def write_random_adapter(folder: Path, config: PretrainedConfig, rank: int, seed: int) -> Path:
    """A random LoRA adapter on all seven roles of a Llama- or Qwen2-shaped model, without building that model."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    head = config.hidden_size // config.num_attention_heads
    width, mlp, kv = config.hidden_size, config.intermediate_size, config.num_key_value_heads * head
    shapes = {"q_proj": (width, width), "k_proj": (width, kv), "v_proj": (width, kv), "o_proj": (width, width),
              "gate_proj": (width, mlp), "up_proj": (width, mlp), "down_proj": (mlp, width)}  # fmt: skip
    state = {}
    for layer in range(config.num_hidden_layers):
        for role, (inputs, outputs) in shapes.items():
            part = "mlp" if role in MLP_ROLES else "self_attn"
            key = f"base_model.model.model.layers.{layer}.{part}.{role}"
            state[f"{key}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator) / inputs**0.5
            state[f"{key}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator) * 0.01
    save_file(state, folder / "adapter_model.safetensors")
    LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(ROLES), task_type="CAUSAL_LM").save_pretrained(folder)
    return folder


def prepare(workload: Workload, folder: Path) -> tuple[PreTrainedModel, Path, list[Path]]:
    """Base model, anchor folder and source folders; what is random is written into `folder`."""
    if workload.shape == DEMO:
        base = AutoModelForCausalLM.from_pretrained(zoo_path("llama"), dtype=torch.float32)
        sources = [zoo_path(*DEMO_SOURCES[index % len(DEMO_SOURCES)]) for index in range(workload.sources)]
        return base, zoo_path(*DEMO_ANCHOR), sources
    shape = SHAPES[workload.shape]
    target, source = LlamaConfig(**shape.target), Qwen2Config(**shape.source)
    torch.manual_seed(0)
    with torch.device("cuda" if shape.gpu_gib else "cpu"):  # made where it is used: 16 GB need not pass the CPU
        base = AutoModelForCausalLM.from_config(target, dtype=shape.dtype)
    anchor = write_random_adapter(folder / "anchor", target, workload.rank, seed=1)
    sources = [
        write_random_adapter(folder / f"source{index}", source, workload.rank, seed=1 + index)
        for index in range(1, workload.sources + 1)
    ]
    return base, anchor, sources
