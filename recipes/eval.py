r"""Score a base model, adapters and fused adapters on data sets: greedy answers, F1, accuracy or exact match.

    accelerate launch --config_file accelerate_configs/single.yaml recipes/eval.py \
        --model_name_or_path BASE --adapters none ANCHOR FUSED --dataset_name a.jsonl b.jsonl --output_dir eval

Data sets have the columns of a fusion's replay; the column `kind` (and `task`) that recipes/uie/prepare.py and
recipes/glue/prepare.py write chooses the metric, or --metric does. Several processes share the examples. In
--output_dir are results.json and the predictions, per adapter in a folder of its own if there are several. A run that
was interrupted goes on with --resume true, with any number of processes.

With --adapter_per_dataset true the i-th adapter answers the i-th data set alone. With --ensemble gac or unite all
adapters, each on its own base of --ensemble_models, write every answer together. Both give one row of results.
"""

import logging
import sys

# what libraries warn of while they are imported must not stand beside an error
logging.getLogger().addHandler(logging.NullHandler())

from heterofusion.evaluation.results import results_table
from heterofusion.evaluation.rows import EVAL_ARGUMENTS, EvalArguments, expert_rows
from heterofusion.evaluation.run import Evaluation
from heterofusion.rivals.ensemble_row import EnsembleArguments, ensemble_rows
from heterofusion.runtime.program import command, parse_arguments, release_logging, set_up_logging
from heterofusion.runtime.ranks import all_together, start_ranks


@command
def main(argv: list[str]) -> None:
    *flags, ensemble = parse_arguments((*EVAL_ARGUMENTS, EnsembleArguments), argv, __doc__)
    arguments = EvalArguments(*flags)
    set_up_logging(logging.INFO, hold=True)
    ranks = start_ranks(arguments.model.use_cpu)
    try:
        # everything that can be checked is checked before the base model is loaded
        with all_together(ranks):
            joined = ensemble.ensemble is not None
            rows = ensemble_rows(ensemble, arguments, ranks.device) if joined else expert_rows(arguments, ranks.device)
        evaluation = Evaluation(arguments, rows, ranks, ensemble.settings())
        release_logging()
        results = evaluation.run()
    finally:
        if ranks.num_processes > 1:
            ranks.destroy_process_group()
    if results:
        print(results_table(results))


if __name__ == "__main__":
    sys.exit(main())
