"""Make replay, train, validation and test files of data in the InstructUIE layout.

    python recipes/uie/prepare.py --dataset_path IE_INSTRUCTIONS --output_dir data/uie \
        --tasks NER/mit-movie NER/TweetNER7 RE/New-York-Times-RE RE/conll04 ET/FindVehicle ET/FabNER

Writes output_dir/{replay,train,validation,test}/NER_mit-movie.jsonl and so on, prompts with their answers, and
manifest.json. The same data, flags and seed give the same files, byte for byte.
"""

import logging
import sys
from dataclasses import dataclass, field

# what libraries warn of while they are imported must not stand beside an error
logging.getLogger().addHandler(logging.NullHandler())

from tqdm import tqdm

from heterofusion.cli import command, parse_arguments, release_logging, set_up_logging
from heterofusion.preparation import (
    Sizes,
    check_output,
    find_tasks,
    make_splits,
    read_task,
    select_tasks,
    summary_table,
    write_tasks,
)


@dataclass
class PrepareArguments:
    """What is read and written."""

    dataset_path: str = field(metadata={"help": "Folder in the InstructUIE layout: it holds NER, RE or ET."})
    output_dir: str = field(metadata={"help": "Folder for the files."})
    tasks: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Tasks such as NER/mit-movie, all by default; ET/NAME is also made of NER/NAME where there is no "
            "folder of that name in ET."
        },
    )
    seed: int = field(default=42, metadata={"help": "Seed of the samples and of the choice between wordings."})
    num_replay: int = field(default=300, metadata={"help": "Records of train in a replay file, at most."})
    num_validation: int = field(
        default=300,
        metadata={"help": "Records in a validation file, at most: of dev.json, else cut from train; 0 writes none."},
    )
    num_test: int | None = field(default=None, metadata={"help": "Records in a test file, at most; all by default."})
    num_unlabelled: int = field(
        default=0,
        metadata={"help": "Prompts without answers for recipes/label.py, cut from train, a tenth of it at most."},
    )
    overwrite: bool = field(
        default=False,
        metadata={"help": "Write into an output_dir that is not empty; files that its manifest.json lists go."},
    )


@command
def main(argv: list[str]) -> None:
    (options,) = parse_arguments((PrepareArguments,), argv, __doc__)
    set_up_logging(logging.INFO, hold=True)
    sizes = Sizes(options.num_replay, options.num_validation, options.num_test, options.num_unlabelled)
    folder = check_output(options.output_dir, options.overwrite)
    tasks = []
    for task in tqdm(select_tasks(find_tasks(options.dataset_path), options.tasks), desc="Reading", delay=3):
        tasks.append(make_splits(read_task(task, options.seed), sizes, options.seed))
    names = ("seed", "num_replay", "num_validation", "num_test", "num_unlabelled")
    settings = {name: getattr(options, name) for name in names}
    write_tasks(folder, tasks, {"layout": "InstructUIE", **settings})
    release_logging()
    print(summary_table(tasks))
    print(f"written to {folder}")


if __name__ == "__main__":
    sys.exit(main())
