"""The whole way on the embedded zoo, on a CPU, in minutes: `make demo`, or `python recipes/demo.py`.

A Llama-family anchor that knows one extraction task is fused with Qwen2- and Mistral-family experts of five others,
on 30 replay examples a task. Base, anchor, experts and the fused adapter are scored on unseen sentences, and a few
short fusions show how the first alpha and the gate's shift matter. All by recipes/train.py, recipes/eval.py and
recipes/report.py themselves. Writes adapter, results, report.md and pictures to outputs/demo.
"""

import json
import logging
import shlex
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

# what libraries warn of while they are imported must not stand in the way
logging.getLogger().addHandler(logging.NullHandler())

import torch
from transformers.utils import logging as transformers_logging

import eval as evaluation
import report
import train
from heterofusion.cli import command, parse_arguments, set_up_logging
from heterofusion.zoo import DEMO_ANCHOR, DEMO_SOURCES, TASKS, make_examples, write_dataset, zoo_path

MARK = ".heterofusion-demo"  # in a folder that a demo may write over
CONFIG = Path(__file__).parent / "demo" / "fuse.yaml"
SETTINGS = {"alpha_init": (0.05, 0.9), "mu_gate": (-0.4, 0.15)}  # beside the defaults, 0.3 and 0.1

INTRO = """Anchor `{anchor}` (Llama family), sources {sources}; {replay} replay examples a task, {test} test sentences
a task, seed {seed}. The fusion took {seconds:.0f} s. `expert` is the expert of each task on its own base: what the
sources know. The fused adapter is one ordinary PEFT adapter of the Llama base. What it gained over the anchor it may
owe to the replay as well as to the sources; only a control with noise in place of the sources can tell them apart."""


@dataclass
class DemoArguments:
    """Size of the demo."""

    output_dir: str = field(default="outputs/demo", metadata={"help": "Folder for everything the demo writes."})
    replay_examples: int = field(default=30, metadata={"help": "Replay examples per task."})
    test_examples: int = field(default=50, metadata={"help": "Test examples per task."})
    preset: str = field(default="", metadata={"help": "Preset of the fusion; the default one if empty."})
    max_steps: int = field(default=0, metadata={"help": "Optimizer steps; those of recipes/demo/fuse.yaml if 0."})
    sensitivity_steps: int = field(
        default=30, metadata={"help": "Optimizer steps of the short fusions with other alphas and mus; 0 leaves them."}
    )
    seed: int = field(default=42, metadata={"help": "Seed of replay, tests and training."})


def run(main: Callable[[Sequence[str]], int], flags: Iterable[object]) -> None:
    """Run a recipe in this process.

    Raises:
        RuntimeError: it failed; it has said why.
    """
    flags = [str(flag) for flag in flags]
    name = Path(sys.modules[main.__module__].__file__ or "").name
    shown = [textwrap.shorten(flag, 100, placeholder=" ...") for flag in flags]  # one of them is a whole text
    print(f"$ python recipes/{name} {shlex.join(shown)}", flush=True)
    if main(flags) != 0:
        raise RuntimeError(f"recipes/{name} failed; see the error above")


def write_data(options: DemoArguments, folder: Path) -> None:
    """Replay and test files of every task."""
    for task in TASKS:
        for split, count in (("replay", options.replay_examples), ("test", options.test_examples)):
            write_dataset(folder / split / f"{task}.jsonl", make_examples(task, split, count, options.seed))


def fuse(options: DemoArguments, data: Path, output: Path, *flags: str) -> None:
    """Fuse the demo's sources into its anchor."""
    command_line = [
        f"--config={CONFIG}", f"--model_name_or_path={zoo_path(DEMO_ANCHOR[0])}",
        f"--target_adapter={zoo_path(*DEMO_ANCHOR)}",
        "--source_adapters", *(zoo_path(*source) for source in DEMO_SOURCES),
        "--dataset_name", *(data / "replay" / f"{task}.jsonl" for task in TASKS),
        f"--max_examples={options.replay_examples}", f"--seed={options.seed}", f"--output_dir={output}",
        "--overwrite=true", *flags,
    ]  # fmt: skip
    run(train.main, command_line)


def score(
    data: Path, family: str, adapters: Sequence[object], names: Sequence[str], tasks: Sequence[str], output: Path,
    *labels: str,
) -> None:  # fmt: skip
    """Score adapters of a family on some tasks."""
    command_line = [
        f"--model_name_or_path={zoo_path(family)}", "--adapters", *adapters, "--names", *names,
        "--dataset_name", *(data / "test" / f"{task}.jsonl" for task in tasks), "--max_new_tokens=48",
        "--batch_size=50", "--dtype=float32", "--use_cpu=true", f"--output_dir={output}", "--overwrite=true",
        "--labels", *labels,
    ]  # fmt: skip
    run(evaluation.main, command_line)


def score_experts(data: Path, folder: Path) -> None:
    """Score each expert on its own task, and join the scores to one result."""
    parts = []
    for family, task in (DEMO_ANCHOR, *DEMO_SOURCES):
        score(data, family, [zoo_path(family, task)], ["expert"], [task], folder / "experts" / task, "experiment=demo")
        path = folder / "experts" / task / "results.json"
        parts.append(json.loads(path.read_text(encoding="utf-8")))
        path.unlink()  # the predictions stay
    datasets = {name: record for part in parts for name, record in part["datasets"].items()}
    joined = {
        **parts[0],
        "adapter": None,
        "base_model": "the expert's own",
        "datasets": {task: datasets[task] for task in TASKS},
        "mean": sum(record["score"] for record in datasets.values()) / len(datasets),
        "seconds": sum(part["seconds"] for part in parts),
        "new_tokens": sum(part["new_tokens"] for part in parts),
    }
    (folder / "experts" / "results.json").write_text(json.dumps(joined, indent=2) + "\n", encoding="utf-8")


def show_sensitivity(options: DemoArguments, data: Path, folder: Path) -> None:
    """Short fusions with other values of one setting at a time, each scored on all tasks."""
    variants = [(), *(f"--{name}={value}" for name, values in SETTINGS.items() for value in values)]
    for index, variant in enumerate(variants):
        adapter = folder / f"adapter-{index}"
        flags = (variant,) if variant else ()
        fuse(options, data, adapter, f"--max_steps={options.sensitivity_steps}", *flags)
        name = f"{options.sensitivity_steps} steps"
        output = folder / f"eval-{index}"
        score(data, DEMO_ANCHOR[0], [adapter], [name.replace(" ", "_")], list(TASKS), output, "experiment=sensitivity")


@command
def main(argv: list[str]) -> None:
    (options,) = parse_arguments((DemoArguments,), argv, __doc__)
    set_up_logging(logging.INFO)
    transformers_logging.disable_progress_bar()  # of loading tiny models, many times
    torch.set_num_threads(1)  # tensors are so small that a second thread costs more than it gives
    start = time.perf_counter()
    folder = Path(options.output_dir)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARK).is_file():
        raise ValueError(f"--output_dir {folder} holds something that no demo made; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()
    data, adapter = folder / "data", folder / "adapter"
    write_data(options, data)
    flags = [f"--preset={options.preset}"] if options.preset else []
    fuse(options, data, adapter, *flags, *([f"--max_steps={options.max_steps}"] if options.max_steps else []))
    adapters = ["none", zoo_path(*DEMO_ANCHOR), adapter]
    family, names = DEMO_ANCHOR[0], ["base", "anchor", "fused"]
    score(data, family, adapters, names, list(TASKS), folder / "eval" / "target", "experiment=demo")
    score_experts(data, folder / "eval")
    if options.sensitivity_steps:
        show_sensitivity(options, data, folder / "sensitivity")
    record = json.loads((adapter / "fusion.json").read_text(encoding="utf-8"))
    intro = INTRO.format(
        anchor="/".join(DEMO_ANCHOR),
        sources=", ".join(f"`{'/'.join(source)}`" for source in DEMO_SOURCES),
        replay=options.replay_examples,
        test=options.test_examples,
        seed=options.seed,
        seconds=record["metrics"]["train_runtime"],
    )
    results = [folder / "eval", *([folder / "sensitivity"] if options.sensitivity_steps else [])]
    order = ["--rows", *names, "expert", "--columns", *TASKS]
    words = ["--title=HeteroFusion demo", f"--intro={intro}", f"--output_dir={folder / 'report'}", "--overwrite=true"]
    run(report.main, ["--results", *results, "--adapters", adapter, *order, *words])
    print(f"the demo took {time.perf_counter() - start:.0f} s; look at {folder.resolve() / 'report' / 'report.md'}")


if __name__ == "__main__":
    sys.exit(main())
