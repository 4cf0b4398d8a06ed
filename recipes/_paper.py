"""Flags of paper.py, and the fusions and evaluations that it asks for."""

from collections.abc import Sequence
from dataclasses import dataclass

from heterofusion.experiments import Run, Runs
from heterofusion.experiments.comparison import ExperimentArguments
from heterofusion.experiments.tables import NO_SEED
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.flags import flag

Expert = tuple[str, str]  # family and task
NAMES = ["single_source", "multi_source", "noise", "sensitivity", "sequence"]


@dataclass
class PaperArguments(ExperimentArguments):
    """Experts, data and settings of the experiments."""

    experiments: list[str] = flag(default_factory=lambda: [*NAMES], help="Which of them.", choices=NAMES)
    families: list[str] = flag(default_factory=list, help="Family of the target, of the sources, and a third one.")
    both_ways: bool = flag(False, help="single_source with target and sources exchanged too.")
    adapters: str = flag("", help="Folder with an expert FAMILY/TASK for each.")
    models: str = flag("", help="Folder, or organization on the Hub, with the base FAMILY.")
    base_folder: str = flag("", help="Folder below FAMILY that holds the base, if it is one.")
    third_tasks: list[str] = flag(default_factory=list, help="Those whose expert is of the third family.")
    noise_tasks: list[str] = flag(default_factory=list, help="Tasks of the noise experiment; all.")
    irrelevant_tasks: list[str] = flag(default_factory=list, help="Of irrelevant experts of the target's family.")
    alphas: list[float] = flag(default_factory=lambda: [0.05, 0.15, 0.3, 0.6, 0.9], help="alpha_init.")
    mus: list[float] = flag(default_factory=lambda: [-0.4, -0.2, -0.05, 0.1, 0.15], help="mu_gate.")
    seeds: list[int] = flag(default_factory=lambda: [42], help="Seeds of sample, start and order.")

    def __post_init__(self) -> None:
        super().__post_init__()
        needed = 3 if {"multi_source", "sequence"} & {*self.experiments} else 2
        if not (self.adapters and self.models and self.data and self.tasks) or len(self.families) < needed:
            raise UserError(f"--adapters, --models, --data, --tasks and {needed} --families are needed; see --help")


class Paper:
    """Asks for fusions and evaluations, and collects the rows of an experiment."""

    def __init__(self, options: PaperArguments):
        self.options, self.runs = options, Runs(options)
        self.rows: list[tuple[str, Run, int, dict]] = []

    def base(self, family: str) -> str:
        return "/".join(filter(None, (self.options.models, family, self.options.base_folder)))

    def fuse(self, target: Expert | Run, sources: Sequence[Expert], tasks: Sequence[str], seed: int, **flags) -> Run:
        """A fusion on the replay of some tasks."""
        family, adapters = self.options.families[0] if isinstance(target, Run) else target[0], self.options.adapters
        return self.runs.run(
            "train", f"fuse {len(sources)} sources into {target} seed {seed} {flags}", config=self.options.fuse_config,
            model_name_or_path=self.base(family), seed=seed, dataset_seed=seed, max_steps=self.options.max_steps,
            target_adapter=target if isinstance(target, Run) else f"{adapters}/{'/'.join(target)}",
            source_adapters=[f"{adapters}/{'/'.join(source)}" for source in sources],
            dataset_name=self.options.files("replay", tasks), **flags,
        )  # fmt: skip

    def score(self, name: str, family: str, adapter: Expert | Run, seed: int = NO_SEED, tasks=(), **labels) -> None:
        """A row of the experiment's table."""
        path = adapter if isinstance(adapter, Run) else f"{self.options.adapters}/{'/'.join(adapter)}"
        files = self.options.files("test", tasks)
        base = {"config": self.options.eval_config, "model_name_or_path": self.base(family)}
        run = self.runs.run("eval", f"test {name} {labels} seed {seed}", adapters=[path], dataset_name=files, **base)
        self.rows.append((name, run, seed, labels))
