r"""Fuse source adapters into a target adapter.

    accelerate launch --config_file accelerate_configs/single.yaml recipes/train.py \
        --model_name_or_path BASE --target_adapter ANCHOR --source_adapters EXPERT1 EXPERT2 \
        --dataset_name replay_a.json replay_b.json --output_dir fused

Any flag may stand in a YAML file given with --config; flags of the command line override it. The result in
--output_dir is an ordinary PEFT adapter. With --push_to_hub true --hub_model_id NAME it goes to the Hub at the end.
Several fusions in a row are several runs: the --output_dir of one is the --target_adapter of the next, which may go on
with its hypernetworks (--init_hypernetwork_from).
--extra_rank K lets the update leave the row space of the anchor's lora_A: every module gets K rows more.
--source_labels FILES of prompts that the source experts answered (recipes/label.py) join the replay; --label_loss soft
also holds the model to what the sources thought of other tokens.
--source_control noise|shuffle|zero makes a control instead: what the same run gives without what the sources know.
"""

import logging
import sys
from pathlib import Path

# what libraries warn of while they are imported must not stand beside an error
logging.getLogger().addHandler(logging.NullHandler())

from transformers import set_seed

from heterofusion import HeteroFusionModel, HeteroFusionTrainer
from heterofusion.adapters.alignment import load_plan
from heterofusion.adapters.controls import control_kind, control_record
from heterofusion.adapters.lora import check_base_fits
from heterofusion.data.labels import check_label_flags
from heterofusion.data.replay import build_eval
from heterofusion.method.expansion import expand_plan
from heterofusion.method.initialization import initialize_hypernetworks
from heterofusion.method.model import hypernetwork_config
from heterofusion.method.plan import format_plan, plan_summary
from heterofusion.publish.hub import push_output
from heterofusion.publish.record import control_of, join_controls, label_control, refuse_push
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.files import read_json
from heterofusion.runtime.loading import base_skeleton, check_token_ids, load_base, load_tokenizer
from heterofusion.runtime.program import command, parse_arguments, release_logging, set_up_logging
from heterofusion.runtime.ranks import is_main_process
from heterofusion.training.checkpoints import (
    INITIALIZATION_FILE,
    check_checkpoint,
    check_same,
    check_start,
    checkpoint_step,
    clear_remains,
    find_checkpoint,
    find_start,
    fusion_identity,
    read_identity,
)
from heterofusion.training.config import FUSION_ARGUMENTS, check_run_flags
from heterofusion.training.engines import refuse_data_parallel
from heterofusion.training.mixture import build_training_data

logger = logging.getLogger("heterofusion.train")


@command
def main(argv: list[str]) -> None:
    base, adapters, data, labels, run, args = parse_arguments(FUSION_ARGUMENTS, argv, __doc__)
    set_up_logging(logging.INFO if args.log_level == "passive" else args.get_process_log_level(), hold=True)
    if adapters.source_control is not None and args.push_to_hub:
        raise UserError(
            f"--push_to_hub is true together with --source_control {adapters.source_control}: a control is no fusion "
            "of its sources and is not published; leave one of the two out"
        )

    # everything that can be checked is checked before the base model is loaded
    plan = load_plan(
        adapters,
        base.model_name_or_path,
        base.model_revision,
        layer_alignment=args.layer_alignment,
        transfer_ratio=args.transfer_ratio,
        seed=args.seed,
    )
    plan = expand_plan(plan, args, args.seed)
    if run.dry_run:
        if is_main_process():
            print(format_plan(plan_summary(plan, args)))
        return
    sizes, folder = hypernetwork_config(plan, args), Path(args.output_dir).absolute()
    identity = fusion_identity(plan, sizes, args)
    resume = find_checkpoint(args, run.overwrite, lambda found: check_checkpoint(found, identity))
    start = find_start(run.init_hypernetwork_from, plan, sizes, folder) if resume is None else None
    check_run_flags(args, data)
    check_label_flags(labels, data, args)
    refuse_data_parallel(args)
    skeleton = base_skeleton(base, adapters.trust_remote_code)
    check_base_fits(skeleton, plan.target)
    tokenizer = load_tokenizer(base, plan.target.folder, adapters.trust_remote_code)
    training = build_training_data(data, labels, tokenizer, args)
    labelled = label_control(training.labels_record)
    control = join_controls(control_kind(control_record(plan.sources)), labelled, control_of(plan.target))
    if resume is not None:
        check_same(resume, read_identity(resume), training.state)
    if start is not None:
        check_start(start, control)
    if args.push_to_hub:
        refuse_push(control)
    if adapters.source_control is not None and training.labels_record is not None and labelled is None:
        logger.warning("--source_control replaces the sources' tensors alone: the source labels are still theirs")
    evaluation = build_eval(data, tokenizer)[0] if data.eval_dataset_name else None
    check_token_ids([*training.parts, evaluation], skeleton.config)

    release_logging()
    for part, lines in training.summary.items():
        logger.info("%s:\n%s", part, "\n".join(lines))
    set_seed(args.seed)
    weights = load_base(base, args.use_cpu, adapters.trust_remote_code, args.base_in_bf16)
    model = HeteroFusionModel(weights, plan, args, args.seed)
    if start is not None:
        initialize_hypernetworks(model, start)
    clear_remains(folder, args.should_save, resume, start)
    record = {"replay": training.replay_record}
    if training.labels_record is not None:
        record["source_labels"] = training.labels_record
    if resume is not None:
        record["resumed_from_step"] = checkpoint_step(resume)
    if begun := read_json(folder / INITIALIZATION_FILE):
        record["initialization"] = begun
    trainer = HeteroFusionTrainer(
        model,
        args,
        train_dataset=training.examples,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        run_record=record,
        checkpoint_record=training.state | {"control": control},
    )
    trainable = sum(parameter.numel() for parameter in model.hypernetworks.parameters())
    logger.info("hypernetworks: %s trainable parameters", f"{trainable:,}")
    metrics = trainer.run(resume)
    trainer.export(folder, metrics)
    logger.info("%s written to %s", f"CONTROL ({control})" if control else "fused adapter", folder)
    if args.push_to_hub and is_main_process():
        logger.info("pushed: %s", push_output(args))


if __name__ == "__main__":
    sys.exit(main())
