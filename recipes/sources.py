"""Do the sources matter? Fusions with and without their labels, with N replay examples a task, beside their controls.

    python recipes/demo/prepare.py --output_dir outputs/sources/data --seed 1
    python recipes/sources.py --config recipes/demo/sources.yaml --jobs 2

The published method, the recommended one and direct tuning run on the replay alone, and with what the source experts
answered to the prompts in unlabelled/TASK.jsonl. Controls have everything but what the sources know. Hyper-parameters
are searched in the case --search_examples, with equal budgets. Runs that are finished are skipped.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

from heterofusion.experiments import Run
from heterofusion.experiments.comparison import Comparison, ComparisonArguments, Method
from heterofusion.experiments.page import Page
from heterofusion.experiments.tables import Gain
from heterofusion.runtime.files import write_whole
from heterofusion.runtime.flags import flag
from heterofusion.runtime.program import command, parse_arguments, set_up_logging

CONTROLLED = ("N=10", "N=30")  # cases of the controls
WITHOUT, WITH = "Without source labels", "With labels of the source experts"
NO_KNOWLEDGE, NEEDS = "Controls (without what the sources know)", "What the labels need"
BEST, NOISE = "recommended + labels", {"source_control": "noise"}
OWN = "recommended, labels of its own task"
OTHERS = [f"labels of {name}" for name in ("bases", "shuffled experts", "the anchor")]


@dataclass
class SourcesArguments(ComparisonArguments):
    """What is compared."""

    title: str = flag("Do the sources matter?", help="Heading of the report.")
    search_budget: int = flag(3, help="Validation runs of each method with hyper-parameters.")
    examples: list[int] = flag(default_factory=lambda: [10, 30], help="The cases: replay of a task.")
    few_seeds: list[int] = flag(default_factory=list, help="Cases that have the first two seeds only.")
    search_examples: int = flag(30, help="The case that hyper-parameters are chosen in.")
    tuning_rates: list[float] = flag(default_factory=lambda: [1e-4, 2e-4, 5e-4], help="Of direct r.")
    expanded_rates: list[float] = flag(default_factory=lambda: [1e-4, 2e-4, 5e-4], help="Of all r+k.")
    published_rates: list[float] = flag(default_factory=lambda: [2e-5, 5e-5, 2e-4], help="Of published.")
    label_rate_factor: float = flag(1.0, help="Rates with labels over those without.")
    same_time_steps: int = flag(0, help="Steps of a direct tuning as long as the fusion.")
    irrelevant_adapters: list[str] = flag(default_factory=list, help="Sources of other tasks.")
    irrelevant_models: list[str] = flag(default_factory=list, help="The base of each.")
    irrelevant_data: list[str] = flag(default_factory=list, help="Data of such experts on the first source's base.")


class Labels:
    """Labels of the source experts, and those of their controls, by case and seed."""

    def __init__(self, table: Comparison, options: SourcesArguments):
        self.runs, self.options = table.runs, options
        experts = {**{task: task for task in options.source_tasks}, options.target_task: "anchor"}
        self.routing = self.write_map("routing", experts)
        self.own = self.write_map("own_task", {options.target_task: "anchor"})

    def write_map(self, name: str, routes: dict[str, str]) -> Path:
        path = Path(self.options.output_dir) / f"{name}.yaml"
        write_whole(path, yaml.safe_dump({task: routes.get(task, "none") for task in self.options.tasks}))
        return path

    def irrelevant(self) -> list[str | Run]:
        """Experts that have nothing to do with the tasks."""
        flags = {"config": self.options.tuning_config, "model_name_or_path": self.options.source_models[0]}
        return [*self.options.irrelevant_adapters] + [
            self.runs.run("expert", f"expert of {file}", dataset_name=[file], learning_rate=3e-3, seed=0, **flags)
            for file in self.options.irrelevant_data
        ]

    def __call__(self, at: tuple[str, int], split: str = "unlabelled", more: bool = False, **flags) -> list[Run]:
        """Labels in a case and with a seed, routed by the replay of the case, or by a map where there is none."""
        options, others = self.options, self.irrelevant() if more else []
        bases = (options.irrelevant_models or options.source_models[:1] * len(others))[: len(others)]
        replay = {} if "routing" in flags else replay_of(options, at)
        routed = {**replay, "anchor_labels": True} if replay else {"routing": self.routing}
        labels = self.runs.run(
            "label", f"labels {at} {split} {flags}", config=options.eval_config, prompts=options.files(split),
            model_name_or_path=options.model_name_or_path, target_adapter=options.target_adapter,
            source_models=[*options.source_models, *bases], source_adapters=[*options.source_adapters, *others],
            source_names=[*options.source_tasks, *(f"irrelevant-{number}" for number in range(len(others)))],
            **{**routed, **flags},
        )  # fmt: skip
        return [labels]


def replay_of(options: SourcesArguments, at: tuple[str, int]) -> dict:
    """Flags of the replay in a case, none for N=0."""
    count = int(at[0].removeprefix("N="))
    return {"dataset_name": options.files("replay"), "max_examples": [count], "dataset_seed": at[1]} if count else {}


def add_methods(table: Comparison, options: SourcesArguments, labels: Labels, with_replay: list[str]) -> None:
    """Direct tuning and fusions, without and with the labels."""
    expanded = {"train_only": "lora_B", "extra_rank": 40, "extra_basis": "activations"}
    forms = {
        "direct r": ("expert", {}, options.tuning_rates, "the anchor's lora_A and lora_B are tuned"),
        "direct r+k": ("expert", expanded, options.expanded_rates, "lora_B alone, with 40 rows of lora_A more"),
        "published": ("train", {"preset": "paper"}, options.published_rates, "the preset paper"),
        "recommended": ("train", {"preset": "recommended"}, options.expanded_rates, "the preset recommended"),
    }
    for end, group in (("", WITHOUT), (" + labels", WITH)):
        for name, (recipe, own, rates, about) in forms.items():
            factor = options.label_rate_factor if end and name != "published" else 1.0
            fixed = {**(options.fusion if recipe == "train" else options.tuning), **own}

            def flags(*at, fixed: dict = fixed, end: str = end) -> dict:
                return {**fixed, **replay_of(options, at), "seed": at[1], "source_labels": labels(at) if end else None}

            search = {"learning_rate": [round(rate * factor, 10) for rate in rates]}
            table.add(Method(name + end, group, about, recipe, flags, search, cases=() if end else with_replay))


def add_variants(table: Comparison, options: SourcesArguments, labels: Labels, cases: list[str]) -> None:
    """Controls, and what the labels need: each like a method above but for a few flags."""

    def add(name: str, group: str, about: str, flags, like: str = BEST) -> None:
        table.add(Method(name, group, about, flags=flags, like=like, cases=cases))

    add("recommended, noise sources", NO_KNOWLEDGE, "noise for the matrices", lambda *_: NOISE, like="recommended")
    add(OWN, NO_KNOWLEDGE, "the anchor labels its own task, and nobody the others",
        lambda *at: {"source_labels": labels(at, routing=labels.own), "replay_fraction": 0.875})  # fmt: skip
    for name, control in zip(OTHERS, ("bases", "shuffle", "anchor"), strict=True):

        def controlled(*at, control: str = control) -> dict:
            seed = at[1] if control == "shuffle" else None
            made = labels(at, routing=labels.routing, control=control, seed=seed)
            return {"source_labels": made, "keep_malformed": True}

        add(name, NO_KNOWLEDGE, f"--control {control} of recipes/label.py", controlled)
    add(f"{BEST}, noise sources", NEEDS, "real labels, but noise for the matrices", lambda *_: NOISE)
    for count in (30, 100):
        flags = {"source_labels_max_examples": count}
        add(f"{count} prompts a task", NEEDS, f"{count} labels of each task", lambda *_, flags=flags: flags)
    if Path(options.files("foreign")[0]).is_file():
        add("prompts of another distribution", NEEDS, "the prompts ask about sentences of another task",
            lambda *at: {"source_labels": labels(at, "foreign", routing=labels.routing)})  # fmt: skip
    if labels.irrelevant():
        add("irrelevant experts", NEEDS, "more sources, of other tasks; routing has to leave them out",
            lambda *at: {"source_adapters": [*options.source_adapters, *labels.irrelevant()],
                         "source_labels": labels(at, more=True)})  # fmt: skip
    if options.same_time_steps:
        add("direct r+k + labels, same time", WITH, f"{options.same_time_steps} steps, as long as the fusion takes",
            lambda *_: {"max_steps": options.same_time_steps}, like="direct r+k + labels")  # fmt: skip


@command
def main(argv: list[str]) -> None:
    (options,) = parse_arguments((SourcesArguments,), argv, __doc__)
    set_up_logging()
    seeds = {f"N={count}": options.seeds[: 2 if count in options.few_seeds else None] for count in options.examples}
    table = options.comparison(seeds, f"N={options.search_examples}")
    labels = Labels(table, options)
    add_methods(table, options, labels, [case for case in seeds if case != "N=0"])
    add_variants(table, options, labels, [case for case in seeds if case in CONTROLLED])
    frame = table.run()
    controls = ["recommended", "recommended, noise sources", OWN, *OTHERS]
    gains = [
        Gain("source gain", BEST, controls, at_least=0.15, cases=["N=30"]),
        Gain("source gain", BEST, controls, at_least=0.35, cases=["N=10"]),
        Gain("matrices alone", "recommended", "recommended, noise sources"),
        Gain("matrices beside labels", BEST, f"{BEST}, noise sources"),
        Gain("over direct tuning with the same labels", BEST, "direct r+k + labels", at_least=0.0, above=-0.005),
        Gain("over direct tuning for the same time", BEST, "direct r+k + labels, same time", at_least=0, above=-0.005),
        Gain("over the published form with the same labels", BEST, "published + labels"),
        Gain("on the anchor's own task", BEST, "anchor", options.target_task, at_least=-0.01, above=-1.0),
        Gain("with irrelevant experts", "irrelevant experts", BEST, at_least=-0.02, above=-1.0),
    ]  # fmt: skip
    if not frame.empty:
        page = Page(options.output_dir, options.title)
        table.write(page, frame, [gain for gain in gains if gain.row in table.methods], "source experts")
        print(f"written to {page.write()}")
    table.runs.finish()


if __name__ == "__main__":
    sys.exit(main())
