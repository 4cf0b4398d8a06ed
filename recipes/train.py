"""Fuse source adapters into a target adapter.

    accelerate launch --config_file accelerate_configs/single.yaml recipes/train.py \
        --model_name_or_path BASE --target_adapter ANCHOR --source_adapters EXPERT1 EXPERT2 \
        --dataset_name replay_a.json replay_b.json --output_dir fused

Any flag may stand in a YAML file given with --config; flags of the command line override it. The result in
--output_dir is an ordinary PEFT adapter. With --push_to_hub true --hub_model_id NAME it goes to the Hub at the end.
"""

import logging
import sys
from pathlib import Path

# what libraries warn of while they are imported must not stand beside an error
logging.getLogger().addHandler(logging.NullHandler())

from transformers import set_seed
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_utils import get_last_checkpoint

from heterofusion import HeteroFusionConfig, HeteroFusionModel, HeteroFusionTrainer
from heterofusion.checkpoints import check_checkpoint
from heterofusion.cli import command, is_main_process, parse_arguments, release_logging, set_up_logging
from heterofusion.config import AdapterArguments, DataArguments, ModelArguments, RunArguments
from heterofusion.data import build_eval, build_replay, make_collator
from heterofusion.loading import (
    check_base,
    check_output_dir,
    check_token_ids,
    load_base,
    load_plan,
    load_tokenizer,
)
from heterofusion.modeling import hypernetwork_config
from heterofusion.plan_summary import format_plan, plan_summary
from heterofusion.trainer import refuse_data_parallel

logger = logging.getLogger("heterofusion.train")
ARGUMENTS = (ModelArguments, AdapterArguments, DataArguments, RunArguments, HeteroFusionConfig)


@command
def main(argv: list[str]) -> None:
    base_args, adapters, data, run, args = parse_arguments(ARGUMENTS, argv, __doc__)
    set_up_logging(logging.INFO if args.log_level == "passive" else args.get_process_log_level(), hold=True)
    set_seed(args.seed)

    # everything that can be checked is checked before the base model is loaded
    plan = load_plan(adapters, args, base_args.model_name_or_path, base_args.model_revision)
    sizes = hypernetwork_config(plan, args)
    if run.dry_run:
        if is_main_process():
            print(format_plan(plan_summary(plan, args)))
        return
    resume = resume_path(args)
    if resume is not None:
        check_checkpoint(resume, plan, sizes, args)
    check_output_dir(str(args.output_dir), resuming=resume is not None, overwrite=run.overwrite)
    if args.eval_strategy != "no" and not data.eval_dataset_name:
        raise ValueError(
            f"--eval_strategy is {args.eval_strategy.value}, but --eval_dataset_name is not given; name one"
        )
    check_reporting(args)
    refuse_data_parallel(args)
    base_config = check_base(base_args, plan.target, adapters.trust_remote_code)
    tokenizer = load_tokenizer(base_args, plan.target, adapters.trust_remote_code)
    replay, report = build_replay(data, tokenizer)
    logger.info("replay:\n%s", "\n".join(report.summary()))
    evaluation = build_eval(data, tokenizer)[0] if data.eval_dataset_name else None
    check_token_ids([replay, evaluation], base_config)
    collator = make_collator(tokenizer)

    release_logging()
    base = load_base(base_args, args.use_cpu, adapters.trust_remote_code)
    model = HeteroFusionModel(base, plan, args, args.seed)
    trainer = HeteroFusionTrainer(
        model,
        args,
        train_dataset=replay,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        data_collator=collator,
        replay_record=report.to_dict(),
    )
    trainable = sum(parameter.numel() for parameter in model.hypernetworks.parameters())
    logger.info("hypernetworks: %s trainable parameters", f"{trainable:,}")
    result = trainer.train(resume_from_checkpoint=resume)
    metrics = {key: value for key, value in result.metrics.items() if key != "total_flos"}
    if evaluation is not None:
        metrics |= trainer.evaluate()
    trainer.log_metrics("all", metrics)
    trainer.save_state()
    folder = trainer.export(args.output_dir, metrics)
    logger.info("fused adapter written to %s", folder.resolve())
    if args.push_to_hub:
        logger.info("pushed: %s", trainer.push_to_hub())


def check_reporting(args: HeteroFusionConfig) -> None:
    """Refuse `--report_to` integrations that are unknown or not installed; Trainer would once the base is loaded."""
    try:
        for callback in get_reporting_integration_callbacks(args.report_to):
            callback()
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"--report_to is {', '.join(args.report_to)}: {error}") from error


def resume_path(args: HeteroFusionConfig) -> str | None:
    """Folder to resume from: `--resume_from_checkpoint` may be a folder, or true for the last one in output_dir."""
    wanted = args.resume_from_checkpoint
    if wanted is None or str(wanted).lower() in ("false", "no", "0"):
        return None
    if str(wanted).lower() not in ("true", "yes", "1"):
        return str(wanted)
    folder = Path(str(args.output_dir)).absolute()
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if last is None:
        raise ValueError(
            f"--resume_from_checkpoint is true, but --output_dir {folder} holds no checkpoint-N folder; leave the "
            "flag out to start anew, or name the checkpoint"
        )
    return last


if __name__ == "__main__":
    sys.exit(main())
