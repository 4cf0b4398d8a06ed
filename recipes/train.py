"""Fuse source adapters into a target adapter.

    accelerate launch --config_file accelerate_configs/single.yaml recipes/train.py \
        --model_name_or_path BASE --target_adapter ANCHOR --source_adapters EXPERT1 EXPERT2 \
        --dataset_name replay_a.json replay_b.json --output_dir fused

Any flag may stand in a YAML file given with --config; flags of the command line override it. The result in
--output_dir is an ordinary PEFT adapter. With --push_to_hub true --hub_model_id NAME it goes to the Hub at the end.
A list `stages:` in the YAML file makes several fusions in a row: the fused adapter of one is the target of the next.
--extra_rank K lets the update leave the row space of the anchor's lora_A: every module gets K rows more.
--source_labels FILES of prompts that the source experts answered (recipes/label.py) join the replay; --label_loss soft
also holds the model to what the sources thought of other tokens.
--source_control noise|shuffle|zero makes a control instead: what the same run gives without what the sources know.
"""

import logging
import sys

# what libraries warn of while they are imported must not stand beside an error
logging.getLogger().addHandler(logging.NullHandler())

from accelerate.utils.memory import clear_device_cache
from transformers import PretrainedConfig, PreTrainedTokenizerBase, set_seed

from heterofusion import HeteroFusionModel, HeteroFusionTrainer
from heterofusion.adapters.lora import check_base
from heterofusion.cli import command, release_logging, set_up_logging
from heterofusion.data.labels import check_label_flags, labels_control
from heterofusion.data.replay import build_eval, make_collator
from heterofusion.experts.soft_targets import add_soft_labels
from heterofusion.method.plan import format_plan, plan_summary
from heterofusion.publish.hub import push_output
from heterofusion.publish.record import refuse_push
from heterofusion.runtime.loading import check_token_ids, load_base, load_tokenizer
from heterofusion.runtime.ranks import is_main_process
from heterofusion.training.config import check_run_flags
from heterofusion.training.engines import refuse_data_parallel
from heterofusion.training.metrics import run_metrics
from heterofusion.training.mixture_data import build_training_data, data_state
from heterofusion.training.progress import begin_stage, check_data, find_progress
from heterofusion.training.stages import Stage, plan_stages, read_stages

logger = logging.getLogger("heterofusion.train")


@command
def main(argv: list[str]) -> None:
    stages = read_stages(argv, __doc__)  # one, unless a YAML file has `stages:`
    first = stages[0]
    level = logging.INFO if first.args.log_level == "passive" else first.args.get_process_log_level()
    set_up_logging(level, hold=True)

    # everything that can be checked is checked before the first base model is loaded
    plan_stages(stages)
    if first.run.dry_run:
        if is_main_process():
            for stage in stages:
                heading = f"==== {stage.title} ====\n" if stage.name else ""
                print(heading + format_plan(plan_summary(stage.plan, stage.args)))
        return
    find_progress(stages)
    for stage in stages:
        with stage.named_errors():
            stage.check_control()
            check_run_flags(stage.args, stage.data)
            check_label_flags(stage.labels, stage.data, stage.args)
            refuse_data_parallel(stage.args)
    base_config = check_base(first.base, first.plan.target, first.adapters.trust_remote_code)
    tokenizer = load_tokenizer(first.base, first.plan.target.folder, first.adapters.trust_remote_code)
    for stage in stages:
        with stage.named_errors():
            load_data(stage, tokenizer, base_config)

    release_logging()
    for stage in stages:
        if stage.finished:
            logger.info("%s is finished: %s", stage.title, stage.folder)
            continue
        with stage.named_errors():
            fuse(stage, tokenizer)
        clear_device_cache(garbage_collection=True)  # room for the next stage's model
    if stages[-1].args.push_to_hub and is_main_process():
        logger.info("pushed: %s", push_output(stages[-1].args))


def load_data(stage: Stage, tokenizer: PreTrainedTokenizerBase, base_config: PretrainedConfig) -> None:
    """Read replay, source labels and evaluation data of a stage."""
    of_stage = f" of {stage.title}" if stage.name else ""
    data = build_training_data(stage.data, stage.labels, tokenizer, stage.args, add_soft_labels)
    for part, lines in data.summary.items():
        logger.info("%s%s:\n%s", part, of_stage, "\n".join(lines))
    real = data.labels_record is not None and labels_control(data.labels_record) is None
    if real and stage.adapters.source_control is not None:
        logger.warning("--source_control replaces the sources' tensors alone: the source labels are still theirs")
    stage.replay, stage.replay_record, stage.labels_record = data.examples, data.replay_record, data.labels_record
    check_data(stage)
    if stage.args.push_to_hub:
        refuse_push(stage.control())
    elif stage.previous is None or stage.previous.finished:  # its target is there: a damaged record is told now
        stage.control()
    if stage.data.eval_dataset_name:
        stage.evaluation = build_eval(stage.data, tokenizer)[0]
    check_token_ids([*data.parts, stage.evaluation], base_config)


def fuse(stage: Stage, tokenizer: PreTrainedTokenizerBase) -> None:
    """Train the hypernetworks of one fusion and write the fused adapter."""
    if stage.name:
        logger.info("%s begins", stage.title)
    stage.renew()
    args = stage.args
    set_seed(args.seed)
    base = load_base(stage.base, args.use_cpu, stage.adapters.trust_remote_code, args.base_in_bf16)
    model = HeteroFusionModel(base, stage.plan, args, args.seed)
    begin_stage(stage, model)
    trainer = HeteroFusionTrainer(
        model,
        args,
        train_dataset=stage.replay,
        eval_dataset=stage.evaluation,
        processing_class=tokenizer,
        data_collator=make_collator(tokenizer),
        replay_record=stage.replay_record,
        run_record=stage.record(),
        checkpoint_record={"data": data_state(stage.replay_record, stage.labels_record)},
    )
    trainable = sum(parameter.numel() for parameter in model.hypernetworks.parameters())
    logger.info("hypernetworks: %s trainable parameters", f"{trainable:,}")
    result = trainer.train(resume_from_checkpoint=None if stage.resume is None else str(stage.resume))
    metrics = run_metrics(result.metrics, trainer.state.log_history)
    if stage.evaluation is not None:
        metrics |= trainer.evaluate()
    trainer.log_metrics("all", metrics)
    try:
        trainer.save_state()
    except OSError as error:  # of a full disk, without the file's name
        raise OSError(f"the trainer's state could not be written to {args.output_dir} ({error})") from error
    if stage.is_carried:
        trainer.save_model(str(stage.folder), _internal_call=True)  # the hypernetworks; the adapter ends the stage
    folder = trainer.export(args.output_dir, metrics)
    logger.info("fused adapter written to %s", folder.resolve())
    trainer.accelerator.wait_for_everyone()  # the next stage reads it
    trainer.accelerator.free_memory()


if __name__ == "__main__":
    sys.exit(main())
