"""Make replay, train, validation and test files of GLUE, as verbalized question answering.

    python recipes/glue/prepare.py --output_dir data/glue
    python recipes/glue/prepare.py --output_dir data/glue --dataset_path GLUE --tasks cola rte

Reads nyu-mll/glue on the Hub, or a local folder laid out like it. GLUE's test split has no labels: the validation
split is the test here, and validation is cut from train. Writes output_dir/{replay,train,validation,test}/cola.jsonl
and so on, prompts with their answers, and manifest.json. The same data, flags and seed give the same files.
"""

import logging
import sys
from dataclasses import dataclass, field

# what libraries warn of while they are imported must not stand beside an error
logging.getLogger().addHandler(logging.NullHandler())

from tqdm import tqdm

from heterofusion.cli import command, parse_arguments, release_logging, set_up_logging
from heterofusion.preparation import Sizes, check_output, make_splits, read_glue_task, summary_table, write_tasks
from heterofusion.preparation.glue import PAPER_TASKS


@dataclass
class PrepareArguments:
    """What is read and written."""

    output_dir: str = field(metadata={"help": "Folder for the files."})
    dataset_path: str | None = field(
        default=None,
        metadata={
            "help": "Local folder with a folder per task: cola/train-00000-of-00001.parquet as on the Hub, or "
            "cola/train.jsonl; nyu-mll/glue of the Hub by default."
        },
    )
    dataset_revision: str | None = field(
        default=None, metadata={"help": "Commit, branch or tag of the data set on the Hub."}
    )
    tasks: list[str] = field(
        default_factory=lambda: list(PAPER_TASKS),
        metadata={"help": "Tasks of GLUE; the paper's five by default, and mnli, qqp, stsb and wnli."},
    )
    seed: int = field(default=42, metadata={"help": "Seed of the samples."})
    num_replay: int = field(default=300, metadata={"help": "Records of train in a replay file, at most."})
    num_validation: int = field(
        default=300,
        metadata={"help": "Records in a validation file, at most; cut from train, a tenth of it at most; 0: none."},
    )
    num_test: int | None = field(default=None, metadata={"help": "Records in a test file, at most; all by default."})
    overwrite: bool = field(
        default=False,
        metadata={"help": "Write into an output_dir that is not empty; files that its manifest.json lists go."},
    )


@command
def main(argv: list[str]) -> None:
    (options,) = parse_arguments((PrepareArguments,), argv, __doc__)
    set_up_logging(logging.INFO, hold=True)
    sizes = Sizes(options.num_replay, options.num_validation, options.num_test)
    folder = check_output(options.output_dir, options.overwrite)
    tasks = []
    for name in tqdm(list(dict.fromkeys(options.tasks)), desc="Reading", delay=3):
        source = read_glue_task(name, options.dataset_path, options.dataset_revision)
        tasks.append(make_splits(source, sizes, options.seed))
    settings = {name: getattr(options, name) for name in ("seed", "num_replay", "num_validation", "num_test")}
    write_tasks(folder, tasks, {"layout": "GLUE", **settings})
    release_logging()
    print(summary_table(tasks))
    print(f"written to {folder}")


if __name__ == "__main__":
    sys.exit(main())
