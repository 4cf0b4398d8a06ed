r"""Let source experts label prompts of the tasks that they are good at: what a fusion's replay lacks.

    accelerate launch --config_file accelerate_configs/single.yaml recipes/label.py \
        --model_name_or_path BASE --target_adapter ANCHOR \
        --source_models BASE1 BASE2 --source_adapters EXPERT1 EXPERT2 \
        --dataset_name replay_a.json replay_b.json --prompts unlabelled_a.json unlabelled_b.json --output_dir labels

Every source runs on its own base, in its own tokenizer and chat template, one model in memory at a time; several
processes share the prompts. First all answer the replay, each task's metric scores them, and a source labels a task
only if it beats the anchor there by --routing_margin and is not far behind the best source (--routing_share);
--routing map.yaml decides instead. --anchor_labels true gives tasks that no source serves to the anchor itself, if it
is good at them. The labels of a task are in --output_dir/TASK.jsonl, in the columns of the replay with `source`,
`log_probability` (mean per token) and `format_ok`. Prompts are files, the replay's own (--prompts replay), or invented
by the sources (--self_prompt 300). With --top_k_logits 10 the sources' distributions are stored beside. --control
bases|shuffle|anchor makes a control instead: labels of somebody who was not chosen for what it knows. A run that was
interrupted goes on with --resume true, with any number of processes.
"""

import logging
import sys
from pathlib import Path

# what libraries warn of while they are imported must not stand beside an error
logging.getLogger().addHandler(logging.NullHandler())

from heterofusion.labelling.arguments import LABEL_ARGUMENTS, LabelArguments
from heterofusion.labelling.routing import Routing
from heterofusion.labelling.run import ROUTING_PICTURE, label, labels_table
from heterofusion.runtime.program import command, parse_arguments, set_up_logging
from heterofusion.runtime.ranks import start_ranks

logger = logging.getLogger("heterofusion.label")


@command
def main(argv: list[str]) -> None:
    arguments = LabelArguments(*parse_arguments(LABEL_ARGUMENTS, argv, __doc__))
    set_up_logging(logging.INFO, hold=True)
    ranks = start_ranks(arguments.model.use_cpu)
    try:
        routing, record = label(arguments, ranks)
    finally:
        if ranks.num_processes > 1:
            ranks.destroy_process_group()
    if ranks.is_main_process:
        folder = Path(arguments.output.output_dir).expanduser().absolute()
        draw(routing, folder / ROUTING_PICTURE)
        print(f"{routing.table()}\n\n{labels_table(record)}")
        logger.info("labels written to %s", folder)


def draw(routing: Routing, path: Path) -> None:
    """Draw the routing, where matplotlib is installed: labels are worth more than their picture."""
    scores = {name: routing.scores.get(name, {}) for name in routing.models}
    try:
        from heterofusion.experiments.pictures import draw_routing, save_picture

        save_picture(draw_routing(scores, routing.labelled_by, routing.tasks, routing.control), path)
    except ImportError as error:
        logger.warning("the routing is not drawn: %s", error)


if __name__ == "__main__":
    sys.exit(main())
