"""What a fusion step costs beside a plain LoRA step of the same model, measured in one run.

    python recipes/benchmark.py --shape llama8b-2layers [--presets compact paper] [--output benchmark.json]

Each row runs in a process of its own, one after the other: the target model with a trainable LoRA (A and B), then the
same model under fusion with each preset; same batch, accumulation, tokens, optimizer and Trainer. Printed per
optimizer step: seconds, their ratio to the plain step, the part spent in the hypernetworks (what a step runs of
them, timed alone) and in the optimizer, and peak memory of the process. The first step
is not counted.
"""

import json
import logging
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

# what libraries warn of while they are imported must not stand in the way
logging.getLogger().addHandler(logging.NullHandler())

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Trainer, TrainerCallback, TrainingArguments

from heterofusion import HeteroFusionConfig, HeteroFusionModel, HeteroFusionTrainer, load_adapter
from heterofusion.cli import command, parse_arguments, set_up_logging
from heterofusion.export import library_versions
from heterofusion.hypernet import HypernetworkConfig
from heterofusion.zoo import DEMO_ANCHOR, DEMO_SOURCES, zoo_path

ROLES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass
class BenchmarkArguments:
    """What is measured."""

    shape: str = field(
        default="llama8b-2layers",
        metadata={"help": "Model and adapters to measure.", "choices": ["demo", "llama8b-2layers"]},
    )
    presets: list[str] = field(
        default_factory=lambda: ["compact", "paper"], metadata={"help": "Presets of the fusion rows."}
    )
    steps: int = field(default=3, metadata={"help": "Optimizer steps measured, after one that is not."})
    accumulation: int = field(default=8, metadata={"help": "Micro-batches of one example per optimizer step."})
    tokens: int = field(default=256, metadata={"help": "Tokens per example (at most 96 in the demo shape)."})
    rank: int = field(default=8, metadata={"help": "Rank of the random adapters (the demo's have rank 8)."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the figures."})
    row: str | None = field(
        default=None, metadata={"help": "Measure one row in this process: lora, compact or paper."}
    )


class StepTimer(TrainerCallback):
    """Wall-clock seconds of whole optimizer steps and of the optimizer alone."""

    def __init__(self):
        self.steps: list[float] = []
        self.optimizer: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = _now()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.update = _now()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.optimizer.append(_now() - self.update)

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(_now() - self.started)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class RandomRows(torch.utils.data.Dataset):
    """Random token rows; every token after the first counts in the loss."""

    def __init__(self, count: int, tokens: int, vocabulary: int):
        self.ids = torch.randint(0, vocabulary, (count, tokens), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        ids = self.ids[index]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def write_random_adapter(folder: Path, config: LlamaConfig | Qwen2Config, rank: int, seed: int) -> Path:
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
            part = "mlp" if role in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            key = f"base_model.model.model.layers.{layer}.{part}.{role}"
            state[f"{key}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator) / inputs**0.5
            state[f"{key}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator) * 0.01
    save_file(state, folder / "adapter_model.safetensors")
    LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=ROLES, task_type="CAUSAL_LM").save_pretrained(folder)
    return folder


def prepare(arguments: BenchmarkArguments, folder: Path):
    """Base model, anchor folder, source folders and vocabulary of a shape."""
    if arguments.shape == "demo":
        base = AutoModelForCausalLM.from_pretrained(zoo_path("llama"), dtype=torch.float32)
        sources = [zoo_path(*source) for source in DEMO_SOURCES]
        return base, zoo_path(*DEMO_ANCHOR), sources, base.config.vocab_size
    llama = LlamaConfig(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8,
                        num_hidden_layers=2, vocab_size=1024)  # fmt: skip
    qwen = Qwen2Config(hidden_size=3584, intermediate_size=18944, num_attention_heads=28, num_key_value_heads=4,
                       num_hidden_layers=2, vocab_size=1024)  # fmt: skip
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(llama, dtype=torch.float32)
    anchor = write_random_adapter(folder / "anchor", llama, arguments.rank, 1)
    sources = [write_random_adapter(folder / f"source{i}", qwen, arguments.rank, 1 + i) for i in (1, 2)]
    return base, anchor, sources, llama.vocab_size


def measure_row(arguments: BenchmarkArguments) -> dict:
    """Measure one row in this process."""
    with tempfile.TemporaryDirectory() as scratch:
        base, anchor, sources, vocabulary = prepare(arguments, Path(scratch))
        settings = {
            "output_dir": str(Path(scratch) / "out"), "max_steps": arguments.steps + 1, "save_strategy": "no",
            "per_device_train_batch_size": 1, "gradient_accumulation_steps": arguments.accumulation,
            "logging_steps": 10**6, "max_grad_norm": 0.0, "report_to": "none",
            "use_cpu": not torch.cuda.is_available(),
        }  # fmt: skip
        tokens = min(arguments.tokens, 96) if arguments.shape == "demo" else arguments.tokens
        rows = RandomRows((arguments.steps + 1) * arguments.accumulation, tokens, vocabulary)
        timer = StepTimer()
        if arguments.row == "lora":
            base.requires_grad_(False)
            model = PeftModel.from_pretrained(base, anchor, is_trainable=True)
            trainer = Trainer(model, TrainingArguments(**settings), train_dataset=rows, callbacks=[timer])
        else:
            args = HeteroFusionConfig(preset=arguments.row, **settings)
            model = HeteroFusionModel.from_adapters(
                base, load_adapter(anchor), [load_adapter(source) for source in sources], args
            )
            trainer = HeteroFusionTrainer(model, args, train_dataset=rows, callbacks=[timer])
        trainer.train()
        memory = peak_memory()
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        figures = {
            "row": arguments.row,
            "trainable_parameters": parameters,
            "seconds_per_step": median(timer.steps[1:]),
            "optimizer_seconds": median(timer.optimizer[1:]),
            "peak_memory_bytes": memory,
            "hypernetwork_seconds": 0.0,
        }
        if arguments.row != "lora":
            figures["hypernetwork_seconds"] = hypernetwork_seconds(model, arguments.accumulation > 1)
        rest = figures["optimizer_seconds"] + figures["hypernetwork_seconds"]
        figures["lm_seconds"] = figures["seconds_per_step"] - rest
        return figures


def hypernetwork_seconds(model: HeteroFusionModel, twice: bool, repeats: int = 3) -> float:
    """Seconds of what an optimizer step runs of the hypernetworks, timed alone.

    That is one forward and backward with RDM, whatever the accumulation, and with accumulation one forward without
    gradient.
    """
    times = []
    for _ in range(repeats):
        model.zero_grad()
        start = _now()
        if twice:
            with torch.no_grad():
                model.updates.predict()
        model.updates.refresh()
        losses = [update.sum() for update in model.updates.by_module.values()]
        torch.autograd.backward([*losses, model.updates.rdm(0)])
        times.append(_now() - start)
    return median(times)


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def peak_memory() -> int:
    """Peak bytes: of the GPU where there is one, else resident memory of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_rows(arguments: BenchmarkArguments) -> list[dict]:
    """Measure all rows, each in a fresh process."""
    results = []
    for row in ("lora", *arguments.presets):
        print(f"measuring {row} ...", file=sys.stderr, flush=True)
        with tempfile.NamedTemporaryFile("r", suffix=".json") as result:
            flags = [
                f"--{name}={getattr(arguments, name)}" for name in ("shape", "steps", "accumulation", "tokens", "rank")
            ]
            subprocess.run(
                [sys.executable, __file__, *flags, f"--row={row}", f"--output={result.name}"],
                check=True, stdout=subprocess.DEVNULL,
            )  # fmt: skip
            results.append(json.load(result))
    plain = results[0]
    for figures in results:
        figures["ratio"] = figures["seconds_per_step"] / plain["seconds_per_step"]
        figures["memory_above_plain_bytes"] = figures["peak_memory_bytes"] - plain["peak_memory_bytes"]
    return results


def format_table(results: list[dict]) -> str:
    gib = 1024**3
    lines = [
        "| row | trainable | s / step | ratio | LM s | hypernetwork s | optimizer s | peak GiB | above plain GiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['row']} | {r['trainable_parameters']:,} | {r['seconds_per_step']:.3f} | {r['ratio']:.2f} | "
        f"{r['lm_seconds']:.3f} | {r['hypernetwork_seconds']:.3f} | {r['optimizer_seconds']:.3f} | "
        f"{r['peak_memory_bytes'] / gib:.2f} | {r['memory_above_plain_bytes'] / gib:+.2f} |"
        for r in results
    ]
    return "\n".join(lines)


@command
def main(argv: list[str]) -> None:
    (arguments,) = parse_arguments((BenchmarkArguments,), argv, __doc__)
    set_up_logging(logging.WARNING)
    if arguments.row is not None:
        Path(arguments.output).write_text(json.dumps(measure_row(arguments)))
        return
    for preset in arguments.presets:
        HypernetworkConfig.from_preset(preset, 4096)  # refuses an unknown one
    results = run_rows(arguments)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"shape {arguments.shape}, {device}, accumulation {arguments.accumulation}, {arguments.tokens} tokens\n")
    print(format_table(results))
    if arguments.output:
        content = {"arguments": asdict(arguments), "device": device, "rows": results, "versions": library_versions()}
        Path(arguments.output).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
