"""The whole way on the embedded zoo, on a CPU, in minutes: `make demo`, or `python recipes/demo.py`.

A Llama-family anchor that knows one extraction task is fused with Qwen2- and Mistral-family experts of five others,
on 30 replay examples a task, by recipes/train.py itself. Anchor, experts and the fused adapter are then scored on
unseen sentences. Writes the adapter, results.json, report.md and pictures to outputs/demo.
"""

import json
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

# what libraries warn of while they are imported must not stand in the way
logging.getLogger().addHandler(logging.NullHandler())

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

import train
from heterofusion.cli import command, parse_arguments, set_up_logging
from heterofusion.export import library_versions
from heterofusion.report import draw_scores, draw_training, score_table
from heterofusion.zoo import DEMO_ANCHOR, DEMO_SOURCES, TASKS, make_examples, write_dataset, zoo_path
from heterofusion.zoo.build import score_tasks

CONFIG = Path(__file__).parent / "demo" / "fuse.yaml"


@dataclass
class DemoArguments:
    """Size of the demo."""

    output_dir: str = field(default="outputs/demo", metadata={"help": "Folder for everything the demo writes."})
    replay_examples: int = field(default=30, metadata={"help": "Replay examples per task."})
    test_examples: int = field(default=50, metadata={"help": "Test examples per task."})
    preset: str = field(default="", metadata={"help": "Preset of the fusion; the default one if empty."})
    max_steps: int = field(default=0, metadata={"help": "Optimizer steps; those of recipes/demo/fuse.yaml if 0."})
    seed: int = field(default=42, metadata={"help": "Seed of replay, tests and training."})


def score(options: DemoArguments, family: str, adapter: Path | None, tasks: Sequence[str], what: str) -> dict:
    """Micro-F1 per task of a base model with an adapter."""
    print(f"scoring {what} on {len(tasks)} task(s)", flush=True)
    base = AutoModelForCausalLM.from_pretrained(zoo_path(family), dtype=torch.float32)
    model = base if adapter is None else PeftModel.from_pretrained(base, adapter)
    tokenizer = AutoTokenizer.from_pretrained(zoo_path(family))
    return score_tasks(model, tokenizer, tasks, options.test_examples, options.seed)


def fuse(options: DemoArguments, folder: Path) -> float:
    """Run recipes/train.py; returns the seconds it took."""
    replay = []
    for task in TASKS:
        replay.append(folder / "replay" / f"{task}.jsonl")
        write_dataset(replay[-1], make_examples(task, "replay", options.replay_examples, options.seed))
    flags = [
        f"--config={CONFIG}", f"--model_name_or_path={zoo_path('llama')}",
        f"--target_adapter={zoo_path(*DEMO_ANCHOR)}",
        "--source_adapters", *(str(zoo_path(*source)) for source in DEMO_SOURCES),
        "--dataset_name", *map(str, replay), f"--max_examples={options.replay_examples}", f"--seed={options.seed}",
        f"--output_dir={folder / 'adapter'}", "--overwrite=true",
    ]  # fmt: skip
    flags += [f"--preset={options.preset}"] if options.preset else []
    flags += [f"--max_steps={options.max_steps}"] if options.max_steps else []
    print("fusing: python recipes/train.py " + " ".join(flags), flush=True)
    start = time.perf_counter()
    if train.main(flags) != 0:
        raise RuntimeError("the fusion failed; see the error above")
    return time.perf_counter() - start


@command
def main(argv: list[str]) -> None:
    (options,) = parse_arguments((DemoArguments,), argv, __doc__)
    set_up_logging(logging.INFO)
    transformers_logging.disable_progress_bar()  # of loading tiny models, many times
    torch.set_num_threads(1)  # tensors are so small that a second thread costs more than it gives
    start = time.perf_counter()
    folder = Path(options.output_dir)
    (folder / "replay").mkdir(parents=True, exist_ok=True)
    seconds = fuse(options, folder)
    family, task = DEMO_ANCHOR
    scores = {
        "base model": score(options, family, None, list(TASKS), "the target's base model"),
        f"anchor ({task})": score(options, family, zoo_path(*DEMO_ANCHOR), list(TASKS), "the anchor"),
        "fused adapter": score(options, family, folder / "adapter", list(TASKS), "the fused adapter"),
    }
    experts = {}
    for family, task in (DEMO_ANCHOR, *DEMO_SOURCES):
        experts |= score(options, family, zoo_path(family, task), [task], f"the {family} expert of {task}")
    scores["expert of the task"] = {task: experts[task] for task in TASKS}
    write_report(folder, options, scores, seconds, time.perf_counter() - start)


def write_report(folder: Path, options: DemoArguments, scores: dict, fusion_seconds: float, seconds: float) -> None:
    """results.json, report.md and the pictures; prints the table."""
    tasks = list(TASKS)
    provenance = json.loads((folder / "adapter" / "fusion.json").read_text(encoding="utf-8"))
    state = json.loads((folder / "adapter" / "trainer_state.json").read_text(encoding="utf-8"))
    draw_scores(scores, tasks, folder / "scores.png", "micro-F1 on unseen sentences")
    draw_training(state["log_history"], folder / "training.png")
    results = {
        "metric": "micro-F1",
        "scores": scores,
        "mean": {name: sum(row.values()) / len(row) for name, row in scores.items()},
        "seconds_fusion": fusion_seconds,
        "seconds_total": seconds,
        "settings": vars(options),
        "preset": provenance["method"]["preset"],
        "hypernetwork": provenance["hypernetwork"],
        "anchor": "/".join(DEMO_ANCHOR),
        "sources": ["/".join(source) for source in DEMO_SOURCES],
        "versions": library_versions(),
    }
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    table = score_table(scores, tasks)
    replay = options.replay_examples
    text = f"""# HeteroFusion demo

Anchor `{results["anchor"]}` (Llama family), sources {", ".join(f"`{name}`" for name in results["sources"])};
{replay} replay examples a task, {options.test_examples} test sentences a task, seed {options.seed}, preset
`{results["preset"]}` ({results["hypernetwork"]["parameters"]:,} parameters). Fusion took {fusion_seconds:.0f} s,
the demo {seconds:.0f} s. Micro-F1:

{table}

The fused adapter is one ordinary PEFT adapter of the Llama base. What it gained over the anchor it may owe to the
replay as well as to the sources; only a control with noise in place of the sources can tell them apart.

![scores](scores.png)
![training](training.png)
"""
    (folder / "report.md").write_text(text, encoding="utf-8")
    print(f"\n{table}\n\nfusion {fusion_seconds:.0f} s, total {seconds:.0f} s; written to {folder.resolve()}:")
    print("  adapter/ (PEFT), results.json, report.md, scores.png, training.png")


if __name__ == "__main__":
    sys.exit(main())
