"""Train the experts of an experiment, score each on its own test set, and put them where the other programs look.

    python recipes/experts.py --config recipes/uie/experts.yaml --gpus 0 1 2 3

Every expert is a run of recipes/expert.py; what is finished is skipped. Its score is the upper bound of its task.
"""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from heterofusion.experiments import RunArguments, Runs
from heterofusion.experiments.page import Page
from heterofusion.experiments.tables import Row, score_frame, score_table
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.flags import flag
from heterofusion.runtime.program import command, parse_arguments, set_up_logging


@dataclass
class ExpertsArguments(RunArguments):
    """Which experts."""

    experts: list[str] = flag(default_factory=list, help="MODEL/TASK of each expert.")
    models: str = flag("", help="Folder, or organization on the Hub, that has the MODELs.")
    adapters: str = flag("", help="Folder that the experts go to, as MODEL/TASK.")
    data: str = flag("", help="Folder with train/TASK.jsonl and test/TASK.jsonl.")
    expert_config: str = flag("", help="YAML file with the flags of every training.")
    eval_config: str = flag("", help="YAML file with the flags of every evaluation.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("experts", "models", "adapters", "data"):
            if not getattr(self, name):
                raise UserError(f"--{name} is missing; see --help")
        for name in self.experts:
            if name.count("/") != 1:
                raise UserError(f"--experts has {name!r}; give MODEL/TASK")


@command
def main(argv: list[str]) -> None:
    (options,) = parse_arguments((ExpertsArguments,), argv, __doc__)
    set_up_logging()
    runs, made = Runs(options), {}
    for name in options.experts:
        model, task = name.split("/")
        base, (train, test) = (
            f"{options.models}/{model}",
            [f"{options.data}/{x}/{task}.jsonl" for x in ("train", "test")],
        )
        trained = {"config": options.expert_config or None, "model_name_or_path": base, "dataset_name": [train]}
        expert = runs.run("expert", f"expert {name}", **trained)
        scored = {"config": options.eval_config or None, "model_name_or_path": base, "dataset_name": [test]}
        made[name] = expert, runs.run("eval", f"test {name}", adapters=[expert], **scored)
    runs.wait()
    rows = []
    for name, (expert, scored) in made.items():
        if expert.is_finished and not (target := Path(options.adapters) / name).exists():
            shutil.copytree(expert.output, target, ignore=shutil.ignore_patterns("checkpoint-*"))
        if scored.is_finished:
            rows.append(Row(name, [scored.results() or {}]))
    if rows:
        page = Page(options.output_dir, "Experts, each on its own test set")
        page.add(*(score_table(score_frame([row])) for row in rows))
        print(f"written to {page.write()}; the experts are in {options.adapters}")
    runs.finish()


if __name__ == "__main__":
    sys.exit(main())
