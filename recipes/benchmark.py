"""What a fusion step costs beside a plain LoRA step of the same model, measured in one run.

    python recipes/benchmark.py --shape llama8b-2layers [--presets compact paper] [--output benchmark.json]
    python recipes/benchmark.py --shape llama8b-2layers --vary sources=1,5,20 rank=8,16,64 accumulation=1,8,32
    python recipes/benchmark.py --shape demo --exchange true

Each row runs in a process of its own, one after the other: the target model with a trainable LoRA (A and B), then the
same model under fusion with each preset; same batch, accumulation, tokens, threads, optimizer and Trainer. Printed
per optimizer step: the median of the seconds after two steps that are not counted, their ratio to the plain step,
the part spent in the hypernetworks (what a step runs of them, timed alone) and in the optimizer, and peak memory of
the process. "above / w+g+s" is the memory above the plain step over the weights, gradients and optimizer states of
the row.

`--vary` prints a table per setting instead, with a row per value and a plain step of its own wherever the setting
changes that. `--exchange true` trains on two CPU processes and counts what passes the loopback interface in an
optimizer step, beside what shapes alone give; keep other traffic off it meanwhile.
"""

import json
import logging
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

# what libraries warn of while they are imported must not stand in the way
logging.getLogger().addHandler(logging.NullHandler())

import torch

from benchmark_shapes import DEMO, GIB, SHAPES, Workload
from heterofusion.data.markdown import markdown_table
from heterofusion.method.config import HypernetworkConfig
from heterofusion.publish.record import library_versions
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.flags import flag
from heterofusion.runtime.program import command, parse_arguments, set_up_logging

FOLDER = Path(__file__).resolve().parent
LORA = "lora"
VARIED = ("sources", "rank", "accumulation")
DDP_REDUCE = ("updates", "parameters")

Row = dict[str, Any]


@dataclass
class BenchmarkArguments(Workload):
    """What is measured."""

    presets: list[str] = flag(
        default_factory=list,
        help="Presets of the fusion rows; compact and paper if none is given, only compact with --vary, and "
        "with --exchange on a large shape.",
    )
    vary: list[str] = flag(
        default_factory=list, help="Settings to vary one at a time: sources=1,5,20 rank=8,16,64 accumulation=1,8,32."
    )
    exchange: bool = flag(False, help="Measure what two data-parallel CPU ranks exchange per optimizer step.")
    ddp_reduce: list[str] = flag(
        default_factory=lambda: list(DDP_REDUCE),
        help="What the ranks of --exchange reduce: updates, parameters, or both in turn.",
    )
    output: str | None = flag(None, help="JSON file for the figures.")

    def workload(self) -> Workload:
        """The settings that every row has."""
        return Workload(**{item.name: getattr(self, item.name) for item in fields(Workload)})


def parse_vary(values: list[str]) -> dict[str, list[int]]:
    """Values to measure by setting.

    Raises:
        ValueError: not of the form `NAME=VALUE,VALUE,...`, or another setting than those that can be varied.
    """
    varied = {}
    for text in values:
        name, _, numbers = text.partition("=")
        if name not in VARIED or not re.fullmatch(r"\d+(,\d+)*", numbers):
            raise UserError(f"--vary has {text!r}; give NAME=NUMBER,NUMBER,... with NAME one of {', '.join(VARIED)}")
        varied[name] = [int(number) for number in numbers.split(",")]
    return varied


def check(arguments: BenchmarkArguments) -> None:
    """Refuse what cannot be measured, before anything is.

    Raises:
        ValueError: names the flag and what to set instead.
    """
    for preset in arguments.presets:
        HypernetworkConfig.fitted(preset, 4096)  # refuses an unknown one
    for reduce in arguments.ddp_reduce:
        if reduce not in DDP_REDUCE:
            raise UserError(f"--ddp_reduce is {reduce!r}; choose from {', '.join(DDP_REDUCE)}")
    if arguments.vary and arguments.exchange:
        raise UserError("--vary and --exchange exclude each other; run them one after the other")
    if arguments.exchange and arguments.shape != DEMO and SHAPES[arguments.shape].gpu_gib:
        raise UserError(f"--exchange runs on a CPU, which cannot hold --shape {arguments.shape}; choose another")
    arguments.check()
    for name, values in parse_vary(arguments.vary).items():
        for value in values:
            replace(arguments.workload(), **{name: value}).check()


# ---- measuring --------------------------------------------------------------------------------------------------


def run_row(workload: Workload, row: str, ddp_reduce: str | None = None) -> Row:
    """Measure a row in a fresh process, or what ranks exchange in two of them if `ddp_reduce` is given.

    Raises:
        ChildProcessError: the process failed; what it said is on stderr.
    """
    given = {name: value for name, value in asdict(workload).items() if value is not None} | {"row": row}
    launcher = [sys.executable]
    environment = dict(os.environ)
    if ddp_reduce is not None:
        given["ddp_reduce"] = ddp_reduce
        config = FOLDER.parent / "accelerate_configs" / "cpu_ddp.yaml"
        launcher += ["-m", "accelerate.commands.launch", "--config_file", str(config), "--main_process_port", "0"]
        environment |= {"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
        environment.setdefault("OMP_NUM_THREADS", "1")
    elif torch.cuda.device_count() > 1:  # on several GPUs Trainer would use DataParallel
        environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    print("measuring", " ".join(f"{name}={value}" for name, value in given.items()), file=sys.stderr, flush=True)
    with tempfile.NamedTemporaryFile("r", suffix=".json") as result:
        flags = [f"--{name}={value}" for name, value in given.items()]
        done = subprocess.run(
            [*launcher, str(FOLDER / "benchmark_row.py"), *flags, f"--output={result.name}"],
            env=environment, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        if done.returncode:
            reason = "killed, perhaps for want of memory" if done.returncode == -9 else f"exit code {done.returncode}"
            raise ChildProcessError(f"the measurement of {row} did not finish: {reason}")
        return json.load(result)


class Measured:
    """Measures rows, each once: prints a row when it is there, and keeps it beside --output for the next start."""

    def __init__(self, output: str | None, device: str):
        self.path = None if output is None else Path(output).with_suffix(".rows.jsonl")
        self.machine = [device, library_versions()]  # a row of another machine is measured again
        self.rows: dict[str, Row] = {}
        if self.path is not None and self.path.is_file():
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            self.rows = dict(json.loads(line) for line in lines if line.endswith("\n"))  # not one that was cut short

    def __call__(self, workload: Workload, row: str, ddp_reduce: str | None = None) -> Row:
        """The figures of a row."""
        key = json.dumps([row, ddp_reduce, asdict(workload), self.machine])
        if key not in self.rows:
            self.rows[key] = run_row(workload, row, ddp_reduce)
            if self.path is not None:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps([key, self.rows[key]]) + "\n")
            figures = {name: value for name, value in self.rows[key].items() if isinstance(value, (int, float))}
            print(row, *(f"{name} {value:.4g}" for name, value in figures.items()), sep=", ", flush=True)
        return self.rows[key]


def compare(workload: Workload, presets: list[str], measure: Callable[[Workload, str], Row]) -> list[Row]:
    """Rows of the plain step and of each preset, with their figures relative to the plain step."""
    plain = measure(workload, LORA)
    rows = []
    for figures in (plain, *(measure(workload, preset) for preset in presets)):
        above = figures["peak_memory_bytes"] - plain["peak_memory_bytes"]
        relative = {
            "ratio": figures["seconds_per_step"] / plain["seconds_per_step"],
            "memory_above_plain_bytes": above,
            "memory_above_plain_over_state": above / figures["state_bytes"],
        }
        rows.append({**figures, **relative})
    return rows


def measure_growth(
    workload: Workload, presets: list[str], varied: dict[str, list[int]], measure: Measured
) -> dict[str, list[Row]]:
    """Rows by varied setting; what is measured once serves all tables."""

    def once(setting: Workload, row: str) -> Row:
        return measure(replace(setting, sources=1) if row == LORA else setting, row)  # a plain step knows no sources

    return {
        name: [
            {name: value, **row}
            for value in values
            for row in compare(replace(workload, **{name: value}), presets, once)
        ]
        for name, values in varied.items()
    }


def measure_exchange(workload: Workload, presets: list[str], ways: list[str], measure: Measured) -> list[Row]:
    """Rows of plain LoRA, and of each preset with each way to reduce."""
    rows = [{"ddp_reduce": None, **measure(workload, LORA, DDP_REDUCE[0])}]
    return rows + [{"ddp_reduce": way, **measure(workload, preset, way)} for preset in presets for way in ways]


# ---- tables -----------------------------------------------------------------------------------------------------


def over_state(row: Row) -> str:
    """Memory above plain LoRA in units of the row's weights, gradients and optimizer states."""
    return "-" if row["row"] == LORA else f"{row['memory_above_plain_over_state']:.2f}"


def format_rows(rows: list[Row]) -> str:
    """The table of one workload."""
    header = [
        "row", "trainable", "s / step", "ratio", "LM s", "hypernetwork s", "optimizer s", "peak GiB",
        "above plain GiB", "w+g+s GiB", "above / w+g+s",
    ]  # fmt: skip
    cells = [
        [
            r["row"], f"{r['trainable_parameters']:,}", f"{r['seconds_per_step']:.3f}", f"{r['ratio']:.2f}",
            f"{r['lm_seconds']:.3f}", f"{r['hypernetwork_seconds']:.3f}", f"{r['optimizer_seconds']:.3f}",
            f"{r['peak_memory_bytes'] / GIB:.2f}", f"{r['memory_above_plain_bytes'] / GIB:+.2f}",
            f"{r['state_bytes'] / GIB:.2f}", over_state(r),
        ]
        for r in rows
    ]  # fmt: skip
    return markdown_table(header, cells)


def format_growth(name: str, rows: list[Row]) -> str:
    """The table of one varied setting: a row per value and preset."""
    header = [
        name,
        "preset",
        "plain s / step",
        "s / step",
        "ratio",
        "hypernetwork s",
        "above plain GiB",
        "above / w+g+s",
    ]
    plain = {r[name]: r["seconds_per_step"] for r in rows if r["row"] == LORA}
    cells = [
        [
            str(r[name]), r["row"], f"{plain[r[name]]:.3f}", f"{r['seconds_per_step']:.3f}", f"{r['ratio']:.2f}",
            f"{r['hypernetwork_seconds']:.3f}", f"{r['memory_above_plain_bytes'] / GIB:+.2f}", over_state(r),
        ]
        for r in rows
        if r["row"] != LORA
    ]  # fmt: skip
    return markdown_table(header, cells)


def format_exchange(rows: list[Row]) -> str:
    """The table of what ranks exchange."""
    header = ["row", "ddp_reduce", "MiB sent per rank and step", "computed from shapes"]
    cells = [
        [r["row"], r["ddp_reduce"] or "-", f"{r['bytes_per_step'] / 2**20:.2f}", f"{r['computed_bytes'] / 2**20:.2f}"]
        for r in rows
    ]
    return markdown_table(header, cells)


@command
def main(argv: list[str]) -> None:
    (arguments,) = parse_arguments((BenchmarkArguments,), argv, __doc__)
    set_up_logging(logging.WARNING)
    check(arguments)
    workload, varied = arguments.workload(), parse_vary(arguments.vary)
    small = not varied and not (arguments.exchange and arguments.shape != DEMO)
    presets = arguments.presets or (["compact", "paper"] if small else ["compact"])
    on_gpu = torch.cuda.is_available() and not arguments.exchange
    device = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    if arguments.exchange:
        device = "CPU, 2 processes"
    measure = Measured(arguments.output, device)
    if arguments.exchange:
        results = {"exchange": measure_exchange(workload, presets, arguments.ddp_reduce, measure)}
        tables = [format_exchange(results["exchange"])]
    elif varied:
        results = {"growth": measure_growth(workload, presets, varied, measure)}
        tables = [format_growth(name, rows) for name, rows in results["growth"].items()]
    else:
        results = {"rows": compare(workload, presets, measure)}
        tables = [format_rows(results["rows"])]
    print(
        f"shape {workload.shape}, {device}, {workload.sources} sources, rank {workload.rank}, accumulation "
        f"{workload.accumulation}, micro-batch {workload.micro_batch}, {workload.token_count()} tokens, "
        f"{'activation checkpointing, ' * workload.activation_checkpointing}median of {workload.steps} steps\n"
    )
    print("\n\n".join(tables))
    if arguments.output:
        content = {"arguments": asdict(arguments), "device": device, **results, "versions": library_versions()}
        Path(arguments.output).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
