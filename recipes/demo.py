"""The whole way on the embedded zoo, on a CPU, in minutes: `make demo`, or `python recipes/demo.py`.

A Llama-family anchor that knows one extraction task is fused with Qwen2- and Mistral-family experts of five others,
on 30 replay examples a task. It is set beside the base, the anchor, the experts, what else could be done (tuning on
the replay, a merge) and its control, noise in place of the sources; a few short fusions show how the first alpha and
the gate's shift matter. All by the recipes themselves. Writes report.md with pictures, and the fused adapter.
"""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from heterofusion.experiments import RunArguments, Runs
from heterofusion.experiments.comparison import Comparison, Method, describe
from heterofusion.experiments.page import Page
from heterofusion.experiments.pictures import draw_bars, draw_curves
from heterofusion.experiments.tables import Gain, Row, score_frame, score_table
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.flags import flag
from heterofusion.runtime.program import command, parse_arguments, set_up_logging
from heterofusion.zoo import DEMO_ANCHOR, DEMO_SOURCES, TASKS, write_splits, zoo_path

CONFIG = Path(__file__).parent / "demo" / "fuse.yaml"
SCORE = {"max_new_tokens": 48, "batch_size": "50", "dtype": "float32", "use_cpu": True}
# The values that the search of recipes/demo/compare.yaml chose; the merge searches by itself.
TUNING = {"train_only": "lora_B", "lora_dropout": 0.0, "learning_rate": 0.005}
MERGE = {"method": "task_arithmetic", "search": ["lambda=0.1,0.2,0.3,0.4,0.6,1.0"], "device": "cpu"}
SETTINGS = [(0.3, 0.1), (0.05, 0.1), (0.9, 0.1), (0.3, -0.4), (0.3, 0.15)]  # alpha_init and mu_gate; the default first

INTRO = """Anchor `{anchor}` (Llama family), sources {sources}; {options.replay_examples} replay examples a task,
{options.test_examples} test sentences a task, seed {options.seed}. The fused adapter is one ordinary PEFT adapter of
the Llama base. What it gained over the anchor it may owe to the replay as well as to the sources: `noise sources` is
the same fusion with noise in their place. One seed decides nothing; recipes/demo/RESULTS.md has three."""


@dataclass
class DemoArguments(RunArguments):
    """Size of the demo."""

    output_dir: str = flag("outputs/demo", help="Folder for everything the demo writes.")
    jobs: int | None = flag(2, help="Runs at a time.", range="[1, inf)")
    replay_examples: int = flag(30, help="Replay examples per task.", range="[1, inf)")
    validation_examples: int = flag(20, help="Examples that the merge's factor is chosen by.", range="[1, inf)")
    test_examples: int = flag(50, help="Test examples per task.", range="[1, inf)")
    preset: str | None = flag(None, help="Preset of the fusion.")
    max_steps: int = flag(120, help="Optimizer steps of the fusion and of its rivals.", range="[1, inf)")
    sensitivity_steps: int = flag(15, help="Steps of the short fusions with other alphas and mus; 0 leaves them out.")
    seed: int = flag(42, help="Seed of replay, tests and training.")


def plan(options: DemoArguments, runs: Runs, data: Path) -> Comparison:
    """The rows of the table."""

    def files(split: str) -> list[Path]:
        return [data / split / f"{task}.jsonl" for task in TASKS]

    base, anchor = zoo_path(DEMO_ANCHOR[0]), zoo_path(*DEMO_ANCHOR)
    trained = {"config": CONFIG, "model_name_or_path": base, "dataset_name": files("replay"), "seed": options.seed,
               "max_examples": options.replay_examples, "max_steps": options.max_steps}  # fmt: skip
    sources = [zoo_path(*source) for source in DEMO_SOURCES]
    fusion = {**trained, "target_adapter": anchor, "source_adapters": sources, "preset": options.preset}
    merge = {"model_name_or_path": base, "adapters": [zoo_path(DEMO_ANCHOR[0], task) for task in TASKS], **MERGE,
             "dataset_name": files("validation"), "max_new_tokens": 48, "batch_size": "60"}  # fmt: skip
    experts = [
        {"model_name_or_path": zoo_path(family), "adapters": [zoo_path(family, task)],
         "dataset_name": [data / "test" / f"{task}.jsonl"]}
        for family, task in (DEMO_ANCHOR, *DEMO_SOURCES)
    ]  # fmt: skip
    table = Comparison(
        runs, {}, {**SCORE, "model_name_or_path": base, "dataset_name": files("test")}, {"": [options.seed]}, 1
    )
    for method in (
        Method("base", "", "the Llama base without an adapter", scored=lambda _: [{"adapters": ["none"]}]),
        Method("anchor", "", "the target adapter before the fusion", scored=lambda _: [{"adapters": [anchor]}]),
        Method("expert", "", "each expert on its own base, asked about its own task", scored=lambda _: experts),
        Method("best merge", "", "Task Arithmetic of six Llama experts, its factor searched on validation data; needs "
               "experts on the target's own base", "merge", lambda *_: merge),
        Method("direct tuning", "", "the anchor's lora_B tuned on the replay with as many steps; no source is used",
               "expert", lambda *_: {**trained, **TUNING, "init_adapter": anchor}),
        Method("fused", "", "HeteroFusion", "train", lambda *_: fusion),
        Method("noise sources", "", "HeteroFusion with noise of the same norms and spectra in place of the sources",
               "train", lambda *_: {**fusion, "source_control": "noise"}),
    ):  # fmt: skip
        table.add(method)
    return table


@command
def main(argv: list[str]) -> None:
    (options,) = parse_arguments((DemoArguments,), argv, __doc__)
    set_up_logging()
    folder = Path(options.output_dir)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "runs").is_dir():
        raise UserError(f"--output_dir {folder} holds something that no demo made; name another folder")
    sizes = options.replay_examples, options.validation_examples, options.test_examples
    write_splits(folder / "data", *sizes, options.seed)
    runs = Runs(options)
    table = plan(options, runs, folder / "data")
    fused = table.methods["fused"].flags("", options.seed)
    short = []
    for alpha, mu in SETTINGS if options.sensitivity_steps else ():
        labels = {"alpha_init": alpha, "mu_gate": mu}
        title = f"short fusion, {describe(labels)}"
        made = runs.run("train", title, **{**fused, "max_steps": options.sensitivity_steps, **labels})
        short.append((labels, runs.run("eval", f"test {title}", **table.test, adapters=[made])))
    frame = table.run()
    runs.finish()
    sources = ", ".join(f"`{'/'.join(source)}`" for source in DEMO_SOURCES)
    intro = INTRO.format(anchor="/".join(DEMO_ANCHOR), sources=sources, options=options)
    page = Page(folder, "HeteroFusion demo", intro)
    table.write(page, frame, [Gain("source gain", "fused", "noise sources")], normalize_by="expert")
    shown = frame[frame["name"].isin(["anchor", "expert", "direct tuning", "fused"])]
    page.add_picture(draw_bars(shown), "scores", "Scores by task")
    if short:
        page.add("## Other settings", f"Fusions of {options.sensitivity_steps} steps, one setting changed at a time.")
        rows = [Row(f"{options.sensitivity_steps} steps", [run.results()], labels=labels) for labels, run in short]
        points = score_frame(rows)
        for label, other, fixed in (("alpha_init", "mu_gate", "0.1"), ("mu_gate", "alpha_init", "0.3")):
            page.add_picture(draw_curves(points[points[other] == fixed], label), label, f"Mean score over {label}")
    adapter = folder / "adapter"
    shutil.copytree(runs.run("train", **fused).output, adapter, dirs_exist_ok=True)
    page.add_fusions([adapter])
    print(f"\n{score_table(frame, costs=False)}\n")
    print(f"The fused adapter is in {adapter}; the report, with what the rows are and pictures, is {page.write()}")


if __name__ == "__main__":
    sys.exit(main())
