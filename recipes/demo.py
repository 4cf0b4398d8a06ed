"""The whole way on the embedded zoo, on a CPU, in minutes: `make demo`, or `python recipes/demo.py`.

A Llama-family anchor that knows one extraction task is fused with Qwen2- and Mistral-family experts of five others,
on 30 replay examples a task. Base, anchor, experts and the fused adapter are scored on unseen sentences, a few short
fusions show how the first alpha and the gate's shift matter, and a table sets the fusion beside what else could be
done (tuning on the replay, a merge) and beside its control, noise in place of the sources. All by the recipes
themselves. Writes adapters, results, report.md and pictures to outputs/demo.
"""

import json
import logging
import shlex
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

# what libraries warn of while they are imported must not stand in the way
logging.getLogger().addHandler(logging.NullHandler())

import torch
from transformers.utils import logging as transformers_logging

import eval as evaluation
import expert
import merge
import report
import train
from heterofusion.cli import command, parse_arguments, set_up_logging
from heterofusion.comparison import COMPARISON_FILE, comparison_row
from heterofusion.evaluation.results import join_results
from heterofusion.report.fields import Fields
from heterofusion.runtime.errors import UserError
from heterofusion.zoo import DEMO_ANCHOR, DEMO_SOURCES, TASKS, write_splits, zoo_path

MARK = ".heterofusion-demo"  # in a folder that a demo may write over
CONFIG = Path(__file__).parent / "demo" / "fuse.yaml"
# The values that the search of recipes/demo/compare.yaml chose; the merge searches by itself.
TUNING = ("--train_only=lora_B", "--lora_dropout=0", "--learning_rate=0.005")
MERGE = ("--method=task_arithmetic", "--search", "lambda=0.1,0.2,0.3,0.4,0.6,1.0")
SETTINGS = {"alpha_init": (0.05, 0.9), "mu_gate": (-0.4, 0.15)}  # beside the defaults, 0.3 and 0.1

INTRO = """Anchor `{anchor}` (Llama family), sources {sources}; {replay} replay examples a task, {test} test sentences
a task, seed {seed}. The fusion took {seconds:.0f} s. `expert` is the expert of each task on its own base: what the
sources know. The fused adapter is one ordinary PEFT adapter of the Llama base. What it gained over the anchor it may
owe to the replay as well as to the sources: `noise sources` is the same fusion with noise in their place. One seed
decides nothing; recipes/demo/RESULTS.md has three."""
ABOUT = {
    "base": "the Llama base without an adapter",
    "anchor": "the target adapter before the fusion",
    "expert": "each expert on its own base, asked about its own task",
    "best merge": "Task Arithmetic of the six Llama experts, its factor searched on validation data; it needs experts "
    "on the target's own base",
    "direct tuning": "the anchor's lora_B tuned on the replay, with as many steps; no source is looked at",
    "fused": "HeteroFusion",
    "noise sources": "HeteroFusion with noise of the same norms and spectra in place of the sources",
}


@dataclass
class DemoArguments:
    """Size of the demo."""

    output_dir: str = field(default="outputs/demo", metadata={"help": "Folder for everything the demo writes."})
    replay_examples: int = field(default=30, metadata={"help": "Replay examples per task."})
    validation_examples: int = field(
        default=20, metadata={"help": "Examples per task by which the merge's factor is chosen."}
    )
    test_examples: int = field(default=50, metadata={"help": "Test examples per task."})
    preset: str = field(default="", metadata={"help": "Preset of the fusion; the default one if empty."})
    max_steps: int = field(default=120, metadata={"help": "Optimizer steps of the fusion and of its rivals."})
    sensitivity_steps: int = field(
        default=15, metadata={"help": "Optimizer steps of the short fusions with other alphas and mus; 0 leaves them."}
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
    joined = join_results(parts)
    joined |= {"base_model": "the expert's own", "datasets": {task: joined["datasets"][task] for task in TASKS}}
    (folder / "experts" / "results.json").write_text(json.dumps(joined, indent=2) + "\n", encoding="utf-8")


def make_rivals(
    options: DemoArguments, data: Path, folder: Path, preset: Sequence[str], steps: Sequence[str]
) -> dict[str, Path]:
    """Make and score what the fusion is set beside; gives the folder of each one's results."""
    family, anchor = DEMO_ANCHOR[0], zoo_path(*DEMO_ANCHOR)
    replay = [data / "replay" / f"{task}.jsonl" for task in TASKS]
    base = f"--model_name_or_path={zoo_path(family)}"
    tuned, merged, noise = (folder / name for name in ("tuned", "merged", "noise"))
    run(
        expert.main,
        [f"--config={CONFIG}", base, f"--init_adapter={anchor}", "--dataset_name", *replay, *TUNING,
         f"--max_examples={options.replay_examples}", f"--seed={options.seed}", f"--output_dir={tuned}",
         "--overwrite=true", *steps],
    )  # fmt: skip
    run(
        merge.main,
        [base, "--adapters", *(zoo_path(family, task) for task in TASKS), *MERGE, "--dataset_name",
         *(data / "validation" / f"{task}.jsonl" for task in TASKS), "--max_new_tokens=48", "--batch_size=60",
         "--device=cpu", f"--output_dir={merged}", "--overwrite=true"],
    )  # fmt: skip
    fuse(options, data, noise, "--source_control=noise", *preset, *steps)
    adapters = {"best merge": merged, "direct tuning": tuned, "noise sources": noise}
    names = [name.replace(" ", "_") for name in adapters]
    score(data, family, list(adapters.values()), names, list(TASKS), folder / "eval", "experiment=rivals")
    return {name: folder / "eval" / file for name, file in zip(adapters, names, strict=True)}


def write_comparison(path: Path, results: Mapping[str, Path]) -> None:
    """Write the table's record from the results of each row."""
    rows = []
    for name, folder in results.items():
        file = folder / "results.json"
        content = Fields(json.loads(file.read_text(encoding="utf-8")), f"results {file}")
        rows.append(comparison_row(name, {None: content}, about=ABOUT[name]))
    gain = {"name": "source_gain", "row": "fused", "over": "noise sources"}
    content = {"title": "Beside what else could be done", "rows": rows, "gains": [gain], "normalize_by": "expert"}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


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
        raise UserError(f"--output_dir {folder} holds something that no demo made; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()
    data, adapter = folder / "data", folder / "adapter"
    write_splits(data, options.replay_examples, options.validation_examples, options.test_examples, options.seed)
    steps = [f"--max_steps={options.max_steps}"]
    preset = [f"--preset={options.preset}"] if options.preset else []
    fuse(options, data, adapter, *preset, *steps)
    adapters = ["none", zoo_path(*DEMO_ANCHOR), adapter]
    family, names = DEMO_ANCHOR[0], ["base", "anchor", "fused"]
    score(data, family, adapters, names, list(TASKS), folder / "eval" / "target", "experiment=demo")
    score_experts(data, folder / "eval")
    if options.sensitivity_steps:
        show_sensitivity(options, data, folder / "sensitivity")
    rivals = make_rivals(options, data, folder / "rivals", preset, steps)
    target = folder / "eval" / "target"
    found = {name: target / name for name in names} | {"expert": folder / "eval" / "experts"} | rivals
    write_comparison(folder / COMPARISON_FILE, {name: found[name] for name in ABOUT})
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
    compared = ["--comparisons", folder / COMPARISON_FILE]
    run(report.main, ["--results", *results, *compared, "--adapters", adapter, *order, *words])
    print(f"the demo took {time.perf_counter() - start:.0f} s; look at {folder.resolve() / 'report' / 'report.md'}")


if __name__ == "__main__":
    sys.exit(main())
