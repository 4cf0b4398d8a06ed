"""Flags of sources.py, and the labels that it asks for."""

from dataclasses import dataclass
from pathlib import Path

import yaml

from heterofusion.experiments import Run
from heterofusion.experiments.comparison import Comparison, ComparisonArguments
from heterofusion.runtime.files import write_whole
from heterofusion.runtime.flags import flag


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
    irrelevant_adapters: list[str] = flag(default_factory=list, help="Sources of other tasks, on the target's base.")
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
        bases = [options.source_models[0] if isinstance(each, Run) else options.model_name_or_path for each in others]
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
