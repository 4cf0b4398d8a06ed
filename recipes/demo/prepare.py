"""Make the data of the demo's sweeps and of its comparison: files of the embedded zoo's six tasks.

    python recipes/demo/prepare.py --output_dir outputs/rehearsal/data

Writes output_dir/{replay,validation,test}/ner_garden.jsonl and so on, in the layout of recipes/uie/prepare.py. No
sentence is in two of them, nor in unlabelled/ner_garden.jsonl, prompts for the experts to label. foreign/ holds such
prompts about sentences of another task, chores/ what the irrelevant experts are trained on.
"""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path

# what libraries warn of while they are imported must not stand beside an error
logging.getLogger().addHandler(logging.NullHandler())

from heterofusion.runtime.flags import flag
from heterofusion.runtime.program import command, parse_arguments, set_up_logging
from heterofusion.zoo import write_chores, write_splits, write_unlabelled


@dataclass
class PrepareArguments:
    """What is written."""

    output_dir: str = flag("outputs/rehearsal/data", help="Folder for the files.")
    num_replay: int = flag(300, help="Records in a replay file.")
    num_validation: int = flag(50, help="Records in a validation file.")
    num_test: int = flag(100, help="Records in a test file.")
    num_unlabelled: int = flag(300, help="Prompts in a file for experts to label.")
    num_chores: int = flag(600, help="Records in a file of an irrelevant expert.")
    seed: int = flag(0, help="Seed of the records.")


@command
def main(argv: list[str]) -> None:
    (options,) = parse_arguments((PrepareArguments,), argv, __doc__)
    set_up_logging(logging.INFO)
    folder = Path(options.output_dir)
    write_splits(folder, options.num_replay, options.num_validation, options.num_test, options.seed)
    write_unlabelled(folder, options.num_unlabelled, options.seed)
    write_chores(folder, options.num_chores, options.seed)
    print(f"written to {folder}")


if __name__ == "__main__":
    sys.exit(main())
