"""One row of benchmark.py, measured in a process of its own; launched on two ranks it measures what they exchange.

python recipes/benchmark_row.py --shape demo --row compact --output row.json
"""

import itertools
import json
import logging
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# what libraries warn of while they are imported must not stand in the way
logging.getLogger().addHandler(logging.NullHandler())

import torch
import torch.distributed as dist
from peft import PeftModel
from transformers import Trainer, TrainerCallback, TrainingArguments

from benchmark_shapes import DEMO, SHAPES, RandomRows, Workload, prepare
from heterofusion import HeteroFusionConfig, HeteroFusionModel, HeteroFusionTrainer, load_adapter
from heterofusion.runtime.flags import flag
from heterofusion.runtime.program import command, parse_arguments, set_up_logging

LORA = "lora"
WARM_UP = 2  # steps that are not counted


@dataclass
class RowArguments(Workload):
    """The row."""

    row: str = flag(LORA, help="What is trained: lora, or a preset of the fusion.")
    ddp_reduce: str | None = flag(None, help="On several ranks: what they exchange; it does not matter to lora.")
    output: str = flag("row.json", help="JSON file for the figures.")


class StepTimer(TrainerCallback):
    """Wall-clock seconds of whole optimizer steps and of the optimizer alone."""

    def __init__(self):
        self.steps: list[float] = []
        self.optimizer: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = now()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.update = now()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.optimizer.append(now() - self.update)

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(now() - self.started)


class LoopbackMeter(TrainerCallback):
    """Bytes that pass the loopback interface from the end of one optimizer step to that of the next."""

    def __init__(self):
        self.readings: list[int] = []

    def on_step_end(self, args, state, control, **kwargs):
        dist.barrier()  # nothing of this step is on its way any more
        self.readings.append(loopback_bytes())
        dist.barrier()  # and nothing of the next one before it is read; a barrier itself sends about a kilobyte

    def per_step(self) -> list[int]:
        """One figure per counted optimizer step; DDP sets itself up in those before."""
        counted = self.readings[WARM_UP - 1 :]
        return [after - before for before, after in itertools.pairwise(counted)]


def rank_count() -> int:
    """Processes of this launch."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def now() -> float:
    """Seconds, with everything done that was launched on a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def loopback_bytes() -> int:
    """Bytes that the loopback interface has sent so far, of all processes of this machine."""
    for line in Path("/proc/net/dev").read_text(encoding="ascii").splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[8])  # 8 columns about receiving come first
    raise OSError("/proc/net/dev has no interface lo: what ranks exchange is read there")


def peak_memory() -> int:
    """Peak bytes: of the GPU where there is one, else resident memory of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would count what the parent held before this program was started
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS


def build_trainer(arguments: RowArguments, folder: Path, callbacks: list[TrainerCallback]) -> Trainer:
    """The trainer of a row: plain LoRA (A and B), or a fusion."""
    base, anchor, sources = prepare(arguments, folder)
    steps = WARM_UP + arguments.steps
    settings: dict[str, Any] = {
        "output_dir": str(folder / "out"), "max_steps": steps, "save_strategy": "no",
        "per_device_train_batch_size": arguments.micro_batch, "gradient_accumulation_steps": arguments.accumulation,
        "logging_steps": 10**6, "max_grad_norm": 0.0, "report_to": "none", "optim": "adamw_torch_fused",
        "bf16": arguments.shape != DEMO and SHAPES[arguments.shape].dtype == torch.bfloat16,
        "use_cpu": not torch.cuda.is_available(), "ddp_find_unused_parameters": False,
        "activation_checkpointing": arguments.activation_checkpointing,
        "activation_checkpointing_kwargs": {"use_reentrant": False},
    }  # fmt: skip
    count = steps * arguments.accumulation * arguments.micro_batch * rank_count()
    rows = RandomRows(count, arguments.token_count(), base.config.vocab_size)
    if arguments.row == LORA:
        base.requires_grad_(False)
        model = PeftModel.from_pretrained(base, anchor, is_trainable=True)
        return Trainer(model, TrainingArguments(**settings), train_dataset=rows, callbacks=callbacks)
    if arguments.ddp_reduce is not None:
        settings["ddp_reduce"] = arguments.ddp_reduce
    args = HeteroFusionConfig(preset=arguments.row, **settings)
    model = HeteroFusionModel.from_adapters(
        base, load_adapter(anchor), [load_adapter(source) for source in sources], args
    )
    return HeteroFusionTrainer(model, args, train_dataset=rows, callbacks=callbacks)


def measure_step(arguments: RowArguments) -> dict[str, Any]:
    """Seconds and memory of an optimizer step of one process."""
    timer = StepTimer()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = build_trainer(arguments, Path(scratch), [timer])
        trainer.train()
    memory = peak_memory()
    parameters = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    states = [value for state in trainer.optimizer.state.values() for value in state.values()]
    seconds, optimizer = (statistics.median(part[WARM_UP:]) for part in (timer.steps, timer.optimizer))
    hypernetworks = 0.0
    if arguments.row != LORA:
        hypernetworks = hypernetwork_seconds(trainer.model, arguments.accumulation > 1)
    return {
        "trainable_parameters": sum(parameter.numel() for parameter in parameters),
        # a gradient is as large as its weight; between steps there is none to be counted
        "state_bytes": 2 * tensor_bytes(parameters) + tensor_bytes(states),
        "seconds_per_step": seconds,
        "lm_seconds": seconds - optimizer - hypernetworks,
        "hypernetwork_seconds": hypernetworks,
        "optimizer_seconds": optimizer,
        "all_seconds": timer.steps,
        "peak_memory_bytes": memory,
    }


def tensor_bytes(values: list[Any]) -> int:
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))


def hypernetwork_seconds(model: HeteroFusionModel, twice: bool) -> float:
    """Seconds of what an optimizer step runs of the hypernetworks, timed alone.

    That is one forward and backward with RDM, whatever the accumulation, and with accumulation one forward without
    gradient.
    """
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


def measure_exchange(arguments: RowArguments) -> dict[str, Any]:
    """Bytes that each rank sends per optimizer step; all ranks run this together."""
    meter = LoopbackMeter()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = build_trainer(arguments, Path(scratch), [meter])
        trainer.train()
    ranks = dist.get_world_size()
    # ranks that reduce in a ring send 2 (n - 1) / n of the tensor each: all of it once if there are two
    return {
        "ranks": ranks,
        "bytes_per_step": statistics.median(meter.per_step()) / ranks,
        "computed_bytes": reduced_bytes(trainer.model, arguments) * 2 * (ranks - 1) / ranks,
        "all_bytes": meter.per_step(),
    }


def reduced_bytes(model: Any, arguments: RowArguments) -> int:
    """Size of what is reduced over ranks once per optimizer step, from shapes alone."""
    if arguments.row == LORA or arguments.ddp_reduce == "parameters":
        return tensor_bytes([parameter for parameter in model.parameters() if parameter.requires_grad])
    block_size = model.hypernetworks.config.block_size
    contexts = model.updates.predictor.contexts.values()
    # T * b * r of every group, in float32
    return 4 * sum(sum(context.b_blocks) * block_size * context.members[0].target.module.rank for context in contexts)


@command
def main(argv: list[str]) -> None:
    (arguments,) = parse_arguments((RowArguments,), argv, __doc__)
    set_up_logging(logging.WARNING)
    arguments.check()
    several = rank_count() > 1
    measure: Callable[[RowArguments], dict[str, Any]] = measure_exchange if several else measure_step
    figures = {"row": arguments.row, **measure(arguments)}
    if not several or dist.get_rank() == 0:
        Path(arguments.output).write_text(json.dumps(figures), encoding="utf-8")
    if several:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
