r"""Distil source experts into the target's LoRA adapter, as FuseLLM does: a baseline that runs every expert.

    accelerate launch --config_file accelerate_configs/single.yaml recipes/distill.py \
        --model_name_or_path BASE --init_adapter ANCHOR \
        --teacher_models BASE1 BASE2 --teacher_adapters EXPERT1 EXPERT2 \
        --dataset_name replay_a.json replay_b.json --output_dir student

Teachers may be of any family; each runs once over the replay, in its own tokenizer and chat template, and what it
thinks of the answers is kept in --logits_cache, memory-mapped, for further runs. The first process runs them while
others wait. Data flags are those of a fusion, training flags those of recipes/expert.py. The result is an ordinary
PEFT adapter with distillation.json beside it. With --push_to_hub true --hub_model_id NAME it goes to the Hub in the
end.
"""

import logging
import sys
from functools import partial
from pathlib import Path

# what libraries warn of while they are imported must not stand beside an error
logging.getLogger().addHandler(logging.NullHandler())

from heterofusion.data.replay import build_eval, examples_sha256, make_collator
from heterofusion.experts.expert import BaseArguments
from heterofusion.experts.soft_labels import cache_folder, collect_soft_labels, find_teacher
from heterofusion.publish.hub import push_output
from heterofusion.publish.record import control_of, refuse_push
from heterofusion.rivals.distillation import DISTILL_ARGUMENTS, DistillationTrainer, export_student
from heterofusion.rivals.fusellm import fuse_labels
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.loading import base_skeleton, check_token_ids, load_base
from heterofusion.runtime.program import command, parse_arguments, release_logging, set_up_logging
from heterofusion.runtime.ranks import is_main_process
from heterofusion.training.checkpoints import checkpoint_step, clear_remains, find_checkpoint
from heterofusion.training.config import LoraArguments, check_run_flags
from heterofusion.training.engines import refuse_data_parallel
from heterofusion.training.expert import choose_lora

logger = logging.getLogger("heterofusion.distill")


@command
def main(argv: list[str]) -> None:
    base, distill, data, output, args = parse_arguments(DISTILL_ARGUMENTS, argv, __doc__)
    set_up_logging(logging.INFO if args.log_level == "passive" else args.get_process_log_level(), hold=True)

    # everything that can be checked is checked before any model is loaded
    check_run_flags(args, data)
    refuse_data_parallel(args)
    cache = cache_folder(distill.logits_cache)
    skeleton = base_skeleton(base, base.trust_remote_code)
    names = ("init_adapter", "init_revision", "lora_dropout")
    lora = choose_lora(skeleton, LoraArguments(**{name: getattr(distill, name) for name in names}))
    folder = Path(args.output_dir).absolute()
    if lora.initial.folder == folder.resolve():
        raise UserError(f"--output_dir {folder} is the --init_adapter itself, which would be lost; name another")
    if args.push_to_hub:
        refuse_push(control_of(lora.initial))
    target, report = find_teacher(BaseArguments(**vars(base), use_cpu=args.use_cpu), str(lora.initial.folder), data)
    evaluation = build_eval(data, target.expert.tokenizer)[0] if data.eval_dataset_name else None
    check_token_ids([evaluation], skeleton.config)
    models = [target]
    for name, adapter in zip(distill.bases(), distill.teacher_adapters, strict=True):
        models.append(find_teacher(target.expert.base.base(name), adapter, data, report)[0])
    state = {  # what a run that is resumed must agree with
        "distill_lambda": args.distill_lambda,
        "top_k_logits": distill.top_k_logits,
        "teachers": [[*model.record().values()] for model in models],
        "examples": examples_sha256(target.examples),
    }
    resume = find_checkpoint(args, output.overwrite, partial(lora.check_checkpoint, data=state))

    release_logging()
    logger.info("replay data:\n%s", "\n".join(report.summary()))
    soft_labels = collect_soft_labels(models, cache, distill.top_k_logits, distill.teacher_batch_size, args.device)
    examples, fusion = fuse_labels(models, soft_labels, cache)
    for model, picked, entropy in zip(models, fusion.picked, fusion.mean_cross_entropy, strict=True):
        logger.info("%s: picked for %d examples, %.2f nats per answer", model.expert.name, picked, entropy)
    logger.info(
        "%.1f%% of the answers' tokens are aligned one to one, %.1f%% have a model's distribution",
        100 * fusion.one_to_one,
        100 * fusion.soft,
    )
    weights = load_base(base, args.use_cpu, base.trust_remote_code)
    weights.config.use_cache = False
    clear_remains(folder, args.should_save, resume)
    trainer = DistillationTrainer(
        lora.put_on(weights, args.seed),
        args,
        train_dataset=examples,
        eval_dataset=evaluation,
        processing_class=target.expert.tokenizer,
        data_collator=make_collator(target.expert.tokenizer),
    )
    trainer.add_to_checkpoint = partial(lora.write_state, data=state)
    start = None if resume is None else checkpoint_step(resume)  # --save_total_limit may remove it
    metrics = trainer.run(resume)
    k, used = distill.top_k_logits, report.to_dict()
    export_student(trainer, folder, lora.initial, models, fusion, k, used, metrics, start)
    logger.info("student written to %s", folder)
    if args.push_to_hub and is_main_process():
        logger.info("pushed: %s", push_output(args))


if __name__ == "__main__":
    sys.exit(main())
