"""The course of a LoRA training with `Trainer`, shared by recipes: where it resumes, what goes first, its metrics."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import Trainer, TrainingArguments

from heterofusion.method.diagnostics import DIAGNOSTICS_FILE
from heterofusion.publish.record import RECORD_FILES
from heterofusion.runtime.files import check_output_dir
from heterofusion.training.expert import is_at_end
from heterofusion.training.metrics import run_metrics
from heterofusion.training.progress import checkpoint_folders, last_checkpoint, resume_wish

logger = logging.getLogger(__name__)


def find_checkpoint(args: TrainingArguments, overwrite: bool, check: Callable[[Path], None]) -> Path | None:
    """The checkpoint that a run resumes from, None to start anew.

    Args:
        args: of the run.
        overwrite: whether what is in its output_dir may be replaced.
        check: refuses a checkpoint of another run.

    Raises:
        ValueError: the checkpoint is not there or refused, or output_dir must not be written into.
    """
    wish = resume_wish(args)
    check_output_dir(str(args.output_dir), resuming=wish is not None, overwrite=overwrite)
    resume = last_checkpoint(Path(str(args.output_dir)).absolute()) if wish is True else wish
    if not isinstance(resume, Path):
        return None
    check(resume)
    return resume


def clear_remains(folder: Path, main: bool, keep_checkpoints: bool) -> None:
    """Remove what an earlier run left and a later one would take for this run's. All ranks together.

    Args:
        folder: output_dir.
        main: whether this rank removes it.
        keep_checkpoints: whether the run resumes.
    """
    ranks = PartialState()
    ranks.wait_for_everyone()
    if main:
        for path in [] if keep_checkpoints else checkpoint_folders(folder):
            logger.info("--overwrite: removing %s", path)
            shutil.rmtree(path)
        for name in (*RECORD_FILES, DIAGNOSTICS_FILE):
            (folder / name).unlink(missing_ok=True)
    ranks.wait_for_everyone()


def run_training(trainer: Trainer, resume: Path | None) -> dict[str, float]:
    """Train and evaluate.

    Args:
        trainer: the trainer, of a PEFT model.
        resume: checkpoint to go on from; one of the last step is only loaded.

    Returns:
        The metrics of the run.
    """
    if resume is not None and is_at_end(resume, trainer.args):
        logger.info("%s is of the last step: nothing is left to train", resume)
        trainer.state = trainer.state.load_from_json(str(resume / "trainer_state.json"))
        best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
        model: Any = trainer.model
        model.load_adapter(best or str(resume), "default", is_trainable=True)
        metrics = {}
    else:
        metrics = trainer.train(resume_from_checkpoint=None if resume is None else str(resume)).metrics
    metrics = run_metrics(metrics, trainer.state.log_history)
    if trainer.eval_dataset is not None:
        metrics |= trainer.evaluate()
    trainer.log_metrics("all", metrics)
    trainer.save_state()
    return metrics
