"""Merge LoRA experts of one base model into one LoRA adapter: what a fusion is compared with, and what to try first.

    python recipes/merge.py --model_name_or_path BASE --adapters EXPERT1 EXPERT2 --method ties --output_dir merged

No training and no data: arithmetic on the experts' updates, module by module. The result is an ordinary PEFT adapter;
`emr` gives one per expert, in a folder of its name, and needs the task at inference. With --dataset_name (validation
data, with the columns that recipes/eval.py takes; not for emr) the result is scored, with --dense true also before its
rank is cut, and hyper-parameters can be chosen by their scores: --search lambda=0.1:1.0:0.1 density=0.1,0.2 tries all.
merge.json beside the adapter records everything. Any flag may stand in a YAML file given with --config.
"""

import logging
import sys

# what libraries warn of while they are imported must not stand beside an error
logging.getLogger().addHandler(logging.NullHandler())

from heterofusion.merging.config import MERGE_ARGUMENTS, methods_text
from heterofusion.merging.merge import MergeRun
from heterofusion.runtime.program import command, parse_arguments, release_logging, set_up_logging


@command
def main(argv: list[str]) -> None:
    flags, hyperparameters, data, generation = parse_arguments(MERGE_ARGUMENTS, argv, f"{__doc__}\n{methods_text()}")
    set_up_logging(logging.INFO, hold=True)
    # everything that can be checked is checked before the base model is loaded and before anything is written
    run = MergeRun(flags, vars(hyperparameters), data, generation)
    release_logging()
    print(run.run())


if __name__ == "__main__":
    sys.exit(main())
