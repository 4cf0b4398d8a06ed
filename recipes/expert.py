r"""Train a LoRA expert on a base model: supervised fine-tuning with the loss on the answers only.

    accelerate launch --config_file accelerate_configs/single.yaml recipes/expert.py \
        --model_name_or_path BASE --dataset_name task.json --output_dir expert

LoRA flags have PEFT's names, data flags are those of a fusion. With --init_adapter ANCHOR [--train_only lora_B] an
adapter is trained on instead of a new one: what a fusion has to be compared with; --extra_rank K adds the rows that it
adds to the target of a fusion. --source_labels FILES (recipes/label.py) join the training data as they join the replay
of a fusion: the same flags of data, seed, batch and accumulation give the same examples in the same order (a fusion's
--max_examples is 300 by default, here it takes all). Any flag may stand in a YAML file given with --config; flags of
the command line override it. The result in --output_dir is an ordinary PEFT adapter that can be a source or a target
of `recipes/train.py`. With --push_to_hub true --hub_model_id NAME it goes to the Hub at the end.
"""

import logging
import sys
from functools import partial
from pathlib import Path

# what libraries warn of while they are imported must not stand beside an error
logging.getLogger().addHandler(logging.NullHandler())

from heterofusion.data.labels import check_label_flags
from heterofusion.data.replay import build_eval, make_collator
from heterofusion.method.expansion import FitBasis
from heterofusion.publish.hub import push_output
from heterofusion.publish.record import control_of, join_controls, label_control, refuse_push
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.loading import base_skeleton, check_token_ids, load_base, load_tokenizer
from heterofusion.runtime.program import command, parse_arguments, release_logging, set_up_logging
from heterofusion.runtime.ranks import is_main_process
from heterofusion.training.base import AdapterTrainer
from heterofusion.training.checkpoints import checkpoint_step, clear_remains, find_checkpoint
from heterofusion.training.config import EXPERT_ARGUMENTS, check_run_flags
from heterofusion.training.engines import refuse_data_parallel
from heterofusion.training.expert import check_basis_engine, choose_lora, export_expert
from heterofusion.training.mixture import build_training_data

logger = logging.getLogger("heterofusion.expert")


@command
def main(argv: list[str]) -> None:
    base, lora, data, labels, output, args = parse_arguments(EXPERT_ARGUMENTS, argv, __doc__)
    set_up_logging(logging.INFO if args.log_level == "passive" else args.get_process_log_level(), hold=True)

    # everything that can be checked is checked before the base model is loaded
    check_run_flags(args, data)
    check_label_flags(labels, data, args)
    refuse_data_parallel(args)
    skeleton = base_skeleton(base, base.trust_remote_code)
    config = skeleton.config
    planned = choose_lora(skeleton, lora, args.seed)
    check_basis_engine(planned, args)
    folder = Path(args.output_dir).absolute()
    if planned.initial is not None and planned.initial.folder == folder.resolve():
        raise UserError(f"--output_dir {folder} is the --init_adapter itself, which would be lost; name another")
    resume = find_checkpoint(args, output.overwrite, planned.check_checkpoint)
    tokenizer = load_tokenizer(base, planned.initial and planned.initial.folder, base.trust_remote_code)
    training = build_training_data(data, labels, tokenizer, args, kind="training")
    if resume is not None:
        planned.check_checkpoint(resume, training.state)
        planned.restore_basis(resume)
    control = join_controls(label_control(training.labels_record), control_of(planned.initial))
    if args.push_to_hub:
        refuse_push(control)
    evaluation = build_eval(data, tokenizer)[0] if data.eval_dataset_name else None
    check_token_ids([*training.parts, evaluation], config)

    release_logging()
    for part, lines in training.summary.items():
        logger.info("%s data:\n%s", part, "\n".join(lines))
    weights = load_base(base, args.use_cpu, base.trust_remote_code)
    weights.config.use_cache = False
    model = planned.put_on(weights, args.seed)
    logger.info("LoRA: %s trainable parameters of %s", *(f"{n:,}" for n in model.get_nb_trainable_parameters()))
    clear_remains(folder, args.should_save, resume)
    trainer = AdapterTrainer(
        model,
        args,
        train_dataset=training.examples,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        data_collator=make_collator(tokenizer),
    )
    trainer.add_to_checkpoint = partial(planned.write_state, data=training.state)
    if planned.expansion is not None:
        trainer.add_callback(FitBasis(partial(planned.fit_basis, model), training.examples))
    start = None if resume is None else checkpoint_step(resume)  # --save_total_limit may remove it
    metrics = trainer.run(resume)
    export_expert(trainer, folder, base.model_name_or_path, planned, training, metrics, start)
    logger.info("expert written to %s", folder)
    if args.push_to_hub and is_main_process():
        logger.info("pushed: %s", push_output(args))


if __name__ == "__main__":
    sys.exit(main())
