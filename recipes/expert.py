"""Train a LoRA expert on a base model: supervised fine-tuning with the loss on the answers only.

    accelerate launch --config_file accelerate_configs/single.yaml recipes/expert.py \
        --model_name_or_path BASE --dataset_name task.json --output_dir expert

LoRA flags have PEFT's names, data flags are those of a fusion. With --init_adapter ANCHOR [--train_only lora_B] an
adapter is trained on instead of a new one: what a fusion has to be compared with. Any flag may stand in a YAML file
given with --config; flags of the command line override it. The result in --output_dir is an ordinary PEFT adapter that
can be a source or a target of `recipes/train.py`. With --push_to_hub true --hub_model_id NAME it goes to the Hub at
the end.
"""

import logging
import shutil
import sys
from pathlib import Path

# what libraries warn of while they are imported must not stand beside an error
logging.getLogger().addHandler(logging.NullHandler())

from accelerate import PartialState
from peft import PeftModel
from safetensors import SafetensorError
from transformers import Trainer

from heterofusion.cli import command, is_main_process, parse_arguments, release_logging, set_up_logging
from heterofusion.data import build_eval, build_replay, make_collator
from heterofusion.diagnostics import DIAGNOSTICS_FILE, run_metrics
from heterofusion.engines import refuse_data_parallel
from heterofusion.expert import (
    EXPERT_ARGUMENTS,
    ExpertCallback,
    ExpertConfig,
    ExpertModelArguments,
    check_finite,
    is_at_end,
)
from heterofusion.expert_lora import ExpertLora, check_expert_checkpoint, choose_lora
from heterofusion.expert_record import expert_record, write_record
from heterofusion.hub import push_adapter
from heterofusion.loading import (
    base_skeleton,
    check_output_dir,
    check_run_flags,
    check_token_ids,
    load_base,
    load_tokenizer,
)
from heterofusion.progress import checkpoint_folders, last_checkpoint, resume_wish
from heterofusion.provenance import EXPERT_FILE, PROVENANCE_FILE

logger = logging.getLogger("heterofusion.expert")


@command
def main(argv: list[str]) -> None:
    base, lora, data, output, args = parse_arguments(EXPERT_ARGUMENTS, argv, __doc__)
    set_up_logging(logging.INFO if args.log_level == "passive" else args.get_process_log_level(), hold=True)

    # everything that can be checked is checked before the base model is loaded
    check_run_flags(args, data)
    refuse_data_parallel(args)
    skeleton = base_skeleton(base, base.trust_remote_code)
    config = skeleton.config
    planned = choose_lora(skeleton, lora)
    folder = Path(args.output_dir).absolute()
    if planned.initial is not None and planned.initial.folder == folder.resolve():
        raise ValueError(f"--output_dir {folder} is the --init_adapter itself, which would be lost; name another")
    resume = find_checkpoint(args, folder, output.overwrite, planned)
    tokenizer = load_tokenizer(base, planned.initial, base.trust_remote_code)
    examples, report = build_replay(data, tokenizer, kind="training")
    evaluation = build_eval(data, tokenizer)[0] if data.eval_dataset_name else None
    check_token_ids([examples, evaluation], config)

    release_logging()
    logger.info("training data:\n%s", "\n".join(report.summary()))
    model = load_model(base, planned, args)
    clear_remains(folder, args.should_save, keep_checkpoints=resume is not None)
    push, args.push_to_hub = args.push_to_hub, False  # Trainer would push the folder with its local paths
    trainer = Trainer(
        model,
        args,
        train_dataset=examples,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        data_collator=make_collator(tokenizer),
        callbacks=[ExpertCallback(planned.write_state)],
    )
    metrics = train(trainer, resume)
    check_finite(model)
    try:
        trainer.save_model()  # the tokenizer too
    except SafetensorError as error:  # of a full disk
        raise OSError(f"the adapter could not be written to {folder} ({error})") from error
    if args.should_save:
        record = expert_record(
            base.model_name_or_path, planned, args, trainer.state.global_step, report.to_dict(), metrics
        )
        write_record(folder, record)
    logger.info("expert written to %s", folder)
    trainer.accelerator.wait_for_everyone()
    if push and is_main_process():
        address = push_adapter(
            folder,
            args.hub_model_id or folder.resolve().name,
            token=args.hub_token,
            private=args.hub_private_repo,
            revision=args.hub_revision,
            commit_message="Upload LoRA expert",
        )
        logger.info("pushed: %s", address)


def find_checkpoint(args: ExpertConfig, folder: Path, overwrite: bool, lora: ExpertLora) -> Path | None:
    """The checkpoint that the run resumes from, None to start anew."""
    wish = resume_wish(args)
    check_output_dir(args.output_dir, resuming=wish is not None, overwrite=overwrite)
    resume = last_checkpoint(folder) if wish is True else wish
    if isinstance(resume, Path):
        check_expert_checkpoint(resume, lora)
        return resume
    return None


def clear_remains(folder: Path, main: bool, keep_checkpoints: bool) -> None:
    """Remove what an earlier run left and a later one would take for this run's. All ranks together."""
    ranks = PartialState()
    ranks.wait_for_everyone()
    if main:
        for path in [] if keep_checkpoints else checkpoint_folders(folder):
            logger.info("--overwrite: removing %s", path)
            shutil.rmtree(path)
        for name in (EXPERT_FILE, PROVENANCE_FILE, DIAGNOSTICS_FILE):
            (folder / name).unlink(missing_ok=True)
    ranks.wait_for_everyone()


def load_model(base: ExpertModelArguments, lora: ExpertLora, args: ExpertConfig) -> PeftModel:
    """Load the base and give it the LoRA, the same for the same seed."""
    model = load_base(base, args.use_cpu, base.trust_remote_code)
    model.config.use_cache = False
    expert = lora.put_on(model, args.seed)
    trainable, total = expert.get_nb_trainable_parameters()
    logger.info("LoRA: %s trainable parameters of %s", f"{trainable:,}", f"{total:,}")
    return expert


def train(trainer: Trainer, resume: Path | None) -> dict[str, float]:
    """Train and evaluate; gives the metrics."""
    if resume is not None and is_at_end(resume, trainer.args):
        logger.info("%s is of the last step: nothing is left to train", resume)
        trainer.state = trainer.state.load_from_json(str(resume / "trainer_state.json"))
        best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
        trainer.model.load_adapter(best or str(resume), "default", is_trainable=True)
        metrics = {}
    else:
        metrics = trainer.train(resume_from_checkpoint=None if resume is None else str(resume)).metrics
    metrics = run_metrics(metrics, trainer.state.log_history)
    if trainer.eval_dataset is not None:
        metrics |= trainer.evaluate()
    trainer.log_metrics("all", metrics)
    trainer.save_state()
    return metrics


if __name__ == "__main__":
    sys.exit(main())
