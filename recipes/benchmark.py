"""What a fusion step costs beside a plain LoRA step of the same model, measured in one run.

    python recipes/benchmark.py --shape llama8b-2layers [--presets compact paper] [--output benchmark.json]
    python recipes/benchmark.py --shape llama8b-2layers --vary sources=1,5,20 rank=8,16,64 accumulation=1,8,32
    python recipes/benchmark.py --shape demo --exchange true

Each row is measured in a process of its own: the target model with a trainable LoRA (A and B), then the same model
under fusion with each preset, all else being equal. Printed per optimizer step: the median of the seconds after two
steps that are not counted, their ratio to the plain step, the part spent in the hypernetworks (timed alone) and in the
optimizer, and peak memory; "above / w+g+s" is the memory above the plain step over the row's weights, gradients and
optimizer states. `--vary` prints a table per setting instead. `--exchange true` trains on two CPU processes and counts
what passes the loopback interface, beside what shapes alone give; keep other traffic off it meanwhile.
"""

import json
import logging
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from _benchmark import DDP_REDUCE, DEMO, GIB, LORA, VARIED, BenchmarkArguments, Row, measure_exchange, measure_step
from heterofusion.data.markdown import markdown_table
from heterofusion.publish.record import library_versions
from heterofusion.runtime.program import command, parse_arguments, set_up_logging


def run_row(arguments: BenchmarkArguments) -> Row:
    """Measure `arguments.row` in a fresh process, or in two of them what ranks exchange."""
    launcher, environment = [sys.executable], dict(os.environ)
    if arguments.exchange:
        config = Path(__file__).resolve().parents[1] / "accelerate_configs" / "cpu_ddp.yaml"
        launcher += ["-m", "accelerate.commands.launch", "--config_file", str(config), "--main_process_port", "0"]
        environment |= {"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
        environment.setdefault("OMP_NUM_THREADS", "1")
    elif torch.cuda.device_count() > 1:  # on several GPUs Trainer would use DataParallel
        environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    print("measuring", arguments.row, file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        config, result = Path(scratch) / "flags.yaml", Path(scratch) / "row.json"
        given = {name: value for name, value in asdict(arguments).items() if value not in (None, [])}
        config.write_text(json.dumps({**given, "output": str(result)}), encoding="utf-8")
        words = [*launcher, __file__, "--config", str(config)]
        done = subprocess.run(words, env=environment, stdout=subprocess.DEVNULL)
        if done.returncode:
            reason = "killed, perhaps for want of memory" if done.returncode == -9 else f"exit code {done.returncode}"
            raise ChildProcessError(f"the measurement of {arguments.row} did not finish: {reason}")
        return json.loads(result.read_text(encoding="utf-8"))


class Measured:
    """Measures rows, each once: prints a row when it is there, and keeps it beside --output for the next start."""

    def __init__(self, output: str | None, device: str):
        self.path = None if output is None else Path(output).with_suffix(".rows.jsonl")
        self.machine = [device, library_versions()]  # a row of another machine is measured again
        self.rows: dict[str, Row] = {}
        if self.path is not None and self.path.is_file():
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            self.rows = dict(json.loads(line) for line in lines if line.endswith("\n"))  # not one that was cut short

    def __call__(self, arguments: BenchmarkArguments, row: str, **changes: Any) -> Row:
        """The figures of a row."""
        asked = replace(arguments, row=row, presets=[], vary=[], output=None, **changes)
        if row == LORA and not asked.exchange:
            asked.sources = 1  # a plain step knows no sources
        key = json.dumps([asdict(asked), self.machine])
        if key not in self.rows:
            self.rows[key] = {"row": row, **run_row(asked)}
            if self.path is not None:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps([key, self.rows[key]]) + "\n")
            figures = {name: value for name, value in self.rows[key].items() if isinstance(value, (int, float))}
            print(row, *(f"{name} {value:.4g}" for name, value in figures.items()), sep=", ", flush=True)
        return self.rows[key]


def compare(measure: Measured, arguments: BenchmarkArguments, presets: list[str], **changes: Any) -> list[Row]:
    """Rows of the plain step and of each preset, with their figures relative to the plain step."""
    rows = [{**changes, **measure(arguments, row, **changes)} for row in (LORA, *presets)]
    for row in rows:
        above = row["peak_memory_bytes"] - rows[0]["peak_memory_bytes"]
        row |= {"plain_seconds": rows[0]["seconds_per_step"], "memory_above_plain_bytes": above,
                "ratio": row["seconds_per_step"] / rows[0]["seconds_per_step"],
                "memory_above_plain_over_state": above / row["state_bytes"]}  # fmt: skip
    return rows


# A column's heading, the figure that it shows, its format, and its unit
COLUMNS = {
    "row": ("row", "", 1), "preset": ("row", "", 1), **{name: (name, "", 1) for name in (*VARIED, "ddp_reduce")},
    "trainable": ("trainable_parameters", ",", 1), "plain s / step": ("plain_seconds", ".3f", 1),
    "s / step": ("seconds_per_step", ".3f", 1), "ratio": ("ratio", ".2f", 1), "LM s": ("lm_seconds", ".3f", 1),
    "hypernetwork s": ("hypernetwork_seconds", ".3f", 1), "optimizer s": ("optimizer_seconds", ".3f", 1),
    "peak GiB": ("peak_memory_bytes", ".2f", GIB), "above plain GiB": ("memory_above_plain_bytes", "+.2f", GIB),
    "w+g+s GiB": ("state_bytes", ".2f", GIB), "above / w+g+s": ("memory_above_plain_over_state", ".2f", 1),
    "MiB sent per rank and step": ("bytes_per_step", ".2f", 2**20),
    "computed from shapes": ("computed_bytes", ".2f", 2**20),
}  # fmt: skip
ROW = "row,trainable,s / step,ratio,LM s,hypernetwork s,optimizer s,peak GiB,above plain GiB,w+g+s GiB,above / w+g+s"
GROWTH = "preset,plain s / step,s / step,ratio,hypernetwork s,above plain GiB,above / w+g+s"
EXCHANGE = "row,ddp_reduce,MiB sent per rank and step,computed from shapes"


def table(columns: str, rows: list[Row]) -> str:
    """Rows in Markdown."""
    header, cells = columns.split(","), []
    for row in rows:
        figures = [(row[name], form, unit) for name, form, unit in map(COLUMNS.__getitem__, header)]
        cells.append([f"{value if unit == 1 else value / unit:{form}}" for value, form, unit in figures])
    return markdown_table(header, cells)


def measure_all(arguments: BenchmarkArguments, device: str) -> tuple[dict[str, Any], list[str]]:
    """The figures and their tables."""
    measure = Measured(arguments.output, device)
    takes_long = arguments.vary or (arguments.exchange and arguments.shape != DEMO)
    presets = arguments.presets or (["compact"] if takes_long else ["compact", "paper"])
    if arguments.exchange:
        asked = [(LORA, DDP_REDUCE[0]), *((preset, way) for preset in presets for way in arguments.ddp_reduce)]
        rows = [{**measure(arguments, row, ddp_reduce=[way]), "ddp_reduce": way} for row, way in asked]
        rows[0]["ddp_reduce"] = "-"  # it does not matter
        return {"exchange": rows}, [table(EXCHANGE, rows)]
    if not arguments.vary:
        return {"rows": (rows := compare(measure, arguments, presets))}, [table(ROW, rows)]
    growth = {
        name: [row for value in values for row in compare(measure, arguments, presets, **{name: value})]
        for name, values in arguments.varied.items()
    }
    shown = {name: [row for row in rows if row["row"] != LORA] for name, rows in growth.items()}
    return {"growth": growth}, [table(f"{name},{GROWTH}", rows) for name, rows in shown.items()]


@command
def main(argv: list[str]) -> None:
    (arguments,) = parse_arguments((BenchmarkArguments,), argv, __doc__)
    set_up_logging(logging.WARNING)
    if arguments.row:
        figures = measure_exchange(arguments) if arguments.exchange else measure_step(arguments)
        if os.environ.get("RANK", "0") == "0":
            Path(arguments.output).write_text(json.dumps(figures), encoding="utf-8")
        if arguments.exchange:
            dist.destroy_process_group()
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    device = "CPU, 2 processes" if arguments.exchange else device
    results, tables = measure_all(arguments, device)
    print(
        f"shape {arguments.shape}, {device}, {arguments.sources} sources, rank {arguments.rank}, accumulation "
        f"{arguments.accumulation}, micro-batch {arguments.micro_batch}, {arguments.token_count} tokens, "
        f"{'activation checkpointing, ' * arguments.activation_checkpointing}median of {arguments.steps} steps\n"
    )
    print("\n\n".join(tables))
    if arguments.output:
        content = {"arguments": asdict(arguments), "device": device, **results, "versions": library_versions()}
        Path(arguments.output).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
