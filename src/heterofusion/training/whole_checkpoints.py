"""A `Trainer` whose checkpoints are there as a whole or not at all; the recipes' trainers are built on it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer

from heterofusion.training.checkpoints import rotated_checkpoint


class WholeCheckpointTrainer(Trainer):
    """transformers' `Trainer`; the last file of a checkpoint lists all others, and only then older ones may go.

    Attributes:
        add_to_checkpoint: gets the folder of a new checkpoint, on the main process, to add files to it.
    """

    add_to_checkpoint: Callable[[Path], None] | None = None

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = Path(self._get_output_dir(trial=trial))
        with rotated_checkpoint(run_dir, self.state, self.args, self.accelerator.wait_for_everyone):
            super()._save_checkpoint(model, trial)
            if self.args.should_save and self.add_to_checkpoint is not None:
                self.add_to_checkpoint(run_dir / f"checkpoint-{self.state.global_step}")
