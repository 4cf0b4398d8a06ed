"""Score a base model, adapters and fused adapters on data sets: greedy answers, F1, accuracy or exact match.

    accelerate launch --config_file accelerate_configs/single.yaml recipes/eval.py \
        --model_name_or_path BASE --adapters none ANCHOR FUSED --dataset_name a.jsonl b.jsonl --output_dir eval

Data sets have the columns of a fusion's replay; the column `kind` (and `task`) that recipes/uie/prepare.py and
recipes/glue/prepare.py write chooses the metric, or --metric does. Several processes share the examples. In
--output_dir are results.json and the predictions, per adapter in a folder of its own if there are several. A run that
was interrupted goes on with --resume true, with any number of processes.
"""

import logging
import sys

# what libraries warn of while they are imported must not stand beside an error
logging.getLogger().addHandler(logging.NullHandler())

from heterofusion.cli import command, parse_arguments, release_logging, set_up_logging
from heterofusion.evaluation.arguments import EVAL_ARGUMENTS
from heterofusion.evaluation.ranks import start_ranks
from heterofusion.evaluation.results import results_table
from heterofusion.evaluation.runner import Evaluation


@command
def main(argv: list[str]) -> None:
    model, data, generation, output = parse_arguments(EVAL_ARGUMENTS, argv, __doc__)
    set_up_logging(logging.INFO, hold=True)
    ranks = start_ranks(model.use_cpu)
    try:
        # everything that can be checked is checked before the base model is loaded
        evaluation = Evaluation(model, data, generation, output, ranks)
        release_logging()
        results = evaluation.run()
    finally:
        if ranks.num_processes > 1:
            ranks.destroy_process_group()
    if results:
        print(results_table(results))


if __name__ == "__main__":
    sys.exit(main())
