"""Flags of benchmark.py, and the measurement of one row in a process of its own."""

import itertools
import os
import re
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Trainer, TrainerCallback, TrainingArguments

from heterofusion import HeteroFusionConfig, HeteroFusionModel, HeteroFusionTrainer, load_adapter
from heterofusion.method.config import HypernetworkConfig
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.flags import check_ranges, flag
from heterofusion.zoo import DEMO_ANCHOR, DEMO_SOURCES, zoo_path

LORA, DEMO, DEMO_RANK, GIB = "lora", "demo", 8, 1024**3
WARM_UP = 2  # steps that are not counted
VARIED, DDP_REDUCE = ("sources", "rank", "accumulation"), ("updates", "parameters")
LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
QWEN_7B = {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4}
ROLES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

Row = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """Sizes of a target and its sources."""

    target: dict[str, Any]
    source: dict[str, Any]
    tokens: int
    dtype: torch.dtype = torch.float32
    gpu_gib: int = 0


SHAPES = {
    DEMO: Shape({}, {}, tokens=96),
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
class BenchmarkArguments:
    """What is measured."""

    shape: str = flag("llama8b-2layers", help="Model and adapters to measure; llama8b needs a GPU.", choices=[*SHAPES])
    presets: list[str] = flag(
        default_factory=list, help="Presets of the rows; without any compact and, unless that takes long, paper."
    )
    vary: list[str] = flag(
        default_factory=list, help="Settings to vary one at a time: sources=1,5,20 rank=8,16,64 accumulation=1,8,32."
    )
    sources: int = flag(2, help="Source adapters (the demo's are repeated).", range="[1, inf)")
    rank: int = flag(8, help="Rank of the random adapters (the demo's have rank 8).", range="[1, inf)")
    accumulation: int = flag(8, help="Micro-batches per optimizer step.", range="[1, inf)")
    micro_batch: int = flag(1, help="Examples per micro-batch.", range="[1, inf)")
    tokens: int | None = flag(None, help="Tokens per example (256; 1024 in llama8b; 96 in demo).", range="[2, inf)")
    steps: int = flag(5, help="Optimizer steps measured, after two that are not.", range="[1, inf)")
    activation_checkpointing: bool = flag(False, help="Compute activations again in the backward, in every row.")
    exchange: bool = flag(False, help="Measure what two data-parallel CPU ranks exchange per optimizer step.")
    ddp_reduce: list[str] = flag(
        default_factory=lambda: [*DDP_REDUCE], help="What the ranks of --exchange reduce.", choices=DDP_REDUCE
    )
    output: str | None = flag(None, help="JSON file for the figures.")
    row: str | None = flag(None, help="Measure this row (lora, or a preset) in this process, into --output.")

    def __post_init__(self) -> None:
        check_ranges(self)
        for preset in self.presets:
            HypernetworkConfig.fitted(preset, 4096)  # refuses an unknown one
        if self.vary and self.exchange:
            raise UserError("--vary and --exchange exclude each other; run them one after the other")
        shape = SHAPES[self.shape]
        if self.shape == DEMO and (self.rank != DEMO_RANK or self.token_count > shape.tokens):
            told = f"--rank is {self.rank} and --tokens is {self.token_count}, but the demo's adapters have rank"
            raise UserError(f"{told} {DEMO_RANK} and its model {shape.tokens} positions; use another --shape")
        has_gpu = torch.cuda.is_available() and not self.exchange
        found = torch.cuda.get_device_properties(0).total_memory / GIB if has_gpu else 0
        if found < shape.gpu_gib:
            told = f"--shape {self.shape} needs a GPU with {shape.gpu_gib} GiB, but there are {found:.1f}"
            raise UserError(f"{told}{' for --exchange' * self.exchange}; use --shape llama8b-2layers")
        for name, values in self.varied.items():
            for value in values:
                replace(self, vary=[], **{name: value})  # refuses one out of range

    @property
    def token_count(self) -> int:
        """Tokens per example."""
        return self.tokens or SHAPES[self.shape].tokens

    @property
    def varied(self) -> dict[str, list[int]]:
        """Values to measure by setting."""
        varied = {}
        for text in self.vary:
            name, _, numbers = text.partition("=")
            if name not in VARIED or not re.fullmatch(r"\d+(,\d+)*", numbers):
                raise UserError(f"--vary has {text!r}; give NAME=NUMBER,... with NAME one of {', '.join(VARIED)}")
            varied[name] = [int(number) for number in numbers.split(",")]
        return varied


def write_random_adapter(folder: Path, config: LlamaConfig | Qwen2Config, rank: int, seed: int) -> Path:
    """A random LoRA adapter on all seven roles of a model, without that model's weights."""
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=ROLES, task_type="CAUSAL_LM")
    with torch.device("meta"):
        model = get_peft_model(AutoModelForCausalLM.from_config(config), lora)
    generator = torch.Generator().manual_seed(seed)
    state = {
        name: torch.randn(each.shape, generator=generator) * (0.01 if "lora_B" in name else each.shape[1] ** -0.5)
        for name, each in get_peft_model_state_dict(model).items()
    }
    lora.save_pretrained(folder)
    save_file(state, folder / "adapter_model.safetensors")
    return folder


def prepare(arguments: BenchmarkArguments, folder: Path) -> tuple[Any, Path, list[Path]]:
    """Base model, anchor folder and source folders; what is random is written into `folder`."""
    numbers = range(arguments.sources)
    if arguments.shape == DEMO:
        base = AutoModelForCausalLM.from_pretrained(zoo_path("llama"), dtype=torch.float32)
        sources = [zoo_path(*DEMO_SOURCES[number % len(DEMO_SOURCES)]) for number in numbers]
        return base, zoo_path(*DEMO_ANCHOR), sources
    shape = SHAPES[arguments.shape]
    target, source = LlamaConfig(**shape.target), Qwen2Config(**shape.source)
    torch.manual_seed(0)
    with torch.device("cuda" if shape.gpu_gib else "cpu"):  # made where it is used: 16 GB need not pass the CPU
        base = AutoModelForCausalLM.from_config(target, dtype=shape.dtype)
    anchor = write_random_adapter(folder / "anchor", target, arguments.rank, seed=1)
    sources = [
        write_random_adapter(folder / f"source{each}", source, arguments.rank, seed=2 + each) for each in numbers
    ]
    return base, anchor, sources


def build_trainer(arguments: BenchmarkArguments, folder: Path, callback: TrainerCallback) -> Trainer:
    """The trainer of a row: plain LoRA (A and B), or a fusion."""
    base, anchor, sources = prepare(arguments, folder)
    steps = WARM_UP + arguments.steps
    settings: dict[str, Any] = {
        "output_dir": str(folder / "out"), "max_steps": steps, "save_strategy": "no",
        "per_device_train_batch_size": arguments.micro_batch, "gradient_accumulation_steps": arguments.accumulation,
        "logging_steps": 10**6, "max_grad_norm": 0.0, "report_to": "none", "optim": "adamw_torch_fused",
        "bf16": SHAPES[arguments.shape].dtype == torch.bfloat16,
        "use_cpu": not torch.cuda.is_available(), "ddp_find_unused_parameters": False,
        "activation_checkpointing": arguments.activation_checkpointing,
        "activation_checkpointing_kwargs": {"use_reentrant": False},
    }  # fmt: skip
    count = steps * arguments.accumulation * arguments.micro_batch * int(os.environ.get("WORLD_SIZE", "1"))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, base.config.vocab_size, (count, arguments.token_count), generator=generator).numpy()
    rows = Dataset.from_dict({"input_ids": ids, "attention_mask": ids * 0 + 1, "labels": ids}).with_format("torch")
    if arguments.row == LORA:
        base.requires_grad_(False)
        model = PeftModel.from_pretrained(base, anchor, is_trainable=True)
        return Trainer(model, TrainingArguments(**settings), train_dataset=rows, callbacks=[callback])
    args = HeteroFusionConfig(preset=arguments.row, ddp_reduce=arguments.ddp_reduce[0], **settings)
    model = HeteroFusionModel.from_adapters(base, load_adapter(anchor), [load_adapter(each) for each in sources], args)
    return HeteroFusionTrainer(model, args, train_dataset=rows, callbacks=[callback])


class StepTimer(TrainerCallback):
    """Wall-clock seconds of whole optimizer steps and of the optimizer alone."""

    def __init__(self):
        self.steps, self.optimizer = [], []

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = now()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.update = now()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.optimizer.append(now() - self.update)

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(now() - self.started)


class LoopbackMeter(TrainerCallback):
    """What the loopback interface had sent at the end of each optimizer step."""

    def __init__(self):
        self.readings: list[int] = []

    def on_step_end(self, args, state, control, **kwargs):
        dist.barrier()  # nothing of this step is on its way any more
        lines = Path("/proc/net/dev").read_text(encoding="ascii").splitlines()
        counters = next(line.split(":")[1].split() for line in lines if line.strip().startswith("lo:"))
        self.readings.append(int(counters[8]))  # 8 columns about receiving come first
        dist.barrier()  # and nothing of the next one before it is read; a barrier itself sends about a kilobyte


def now() -> float:
    """Seconds, with everything done that was launched on a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory() -> int:
    """Peak bytes: of the GPU where there is one, else resident memory of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # getrusage would count what the parent held before this program was started
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def measure_step(arguments: BenchmarkArguments) -> Row:
    """Seconds and memory of an optimizer step of one process."""
    timer = StepTimer()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = build_trainer(arguments, Path(scratch), timer)
        trainer.train()
    memory = peak_memory()
    parameters = trainable(trainer)
    states = [value for state in trainer.optimizer.state.values() for value in state.values()]
    seconds, optimizer = (statistics.median(part[WARM_UP:]) for part in (timer.steps, timer.optimizer))
    hypernetworks = 0.0 if arguments.row == LORA else hypernetwork_seconds(trainer.model, arguments.accumulation > 1)
    # a gradient is as large as its weight; between steps there is none to be counted
    state = 2 * tensor_bytes(parameters) + tensor_bytes(states)
    return {
        "trainable_parameters": sum(parameter.numel() for parameter in parameters), "state_bytes": state,
        "seconds_per_step": seconds, "lm_seconds": seconds - optimizer - hypernetworks,
        "hypernetwork_seconds": hypernetworks, "optimizer_seconds": optimizer,
        "all_seconds": timer.steps, "peak_memory_bytes": memory,
    }  # fmt: skip


def trainable(trainer: Trainer) -> list[Any]:
    return [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]


def tensor_bytes(values: list[Any]) -> int:
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))


def hypernetwork_seconds(model: HeteroFusionModel, twice: bool) -> float:
    """Seconds of a forward and backward with RDM, and of the forward without gradient that accumulation adds."""
    times = []
    for _ in range(6):  # the first one warms up
        model.zero_grad()
        start = now()
        if twice:
            with torch.no_grad():
                model.updates.predictor.predict()
        model.updates.refresh()
        losses = [update.sum() for update in model.updates.by_module.values()]
        torch.autograd.backward([*losses, model.updates.rdm(0)])
        times.append(now() - start)
    return statistics.median(times[1:])


def measure_exchange(arguments: BenchmarkArguments) -> Row:
    """Bytes that each rank sends per optimizer step, beside the size of what is reduced; all ranks run this."""
    meter = LoopbackMeter()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = build_trainer(arguments, Path(scratch), meter)
        trainer.train()
    if arguments.row == LORA or arguments.ddp_reduce[0] == "parameters":
        reduced = tensor_bytes(trainable(trainer))
    else:  # T * b * r of every group, in float32
        contexts = trainer.model.updates.predictor.contexts.values()
        rows = sum(sum(context.b_blocks) * context.members[0].target.module.rank for context in contexts)
        reduced = 4 * rows * trainer.model.hypernetworks.config.block_size
    ranks = dist.get_world_size()
    sent = [after - before for before, after in itertools.pairwise(meter.readings[WARM_UP - 1 :])]
    # ranks that reduce in a ring send 2 (n - 1) / n of the tensor each: all of it once if there are two
    computed = reduced * 2 * (ranks - 1) / ranks
    median = statistics.median(sent) / ranks
    return {"ranks": ranks, "bytes_per_step": median, "computed_bytes": computed, "all_bytes": sent}
