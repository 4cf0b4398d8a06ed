"""Checkpoints: written as a whole or not at all, tied to what they were made of, found again by a run that resumes.

One of a fusion holds hypernetworks, never a fused adapter: loaded as the target it would add the update twice.
"""

import contextlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints

from heterofusion.adapters.alignment import AlignmentPlan
from heterofusion.adapters.controls import control_record
from heterofusion.adapters.lora import LoraAdapter
from heterofusion.method.config import HypernetworkConfig, MethodConfig
from heterofusion.method.expansion import ExpandedAdapter, read_rows, write_rows
from heterofusion.method.initialization import Initialization, plan_initialization
from heterofusion.method.model import HeteroFusionModel
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.files import (
    check_output_dir,
    display_name,
    is_failed_write,
    read_json_object,
    told_writes,
    write_json,
)
from heterofusion.runtime.ranks import is_main_process
from heterofusion.runtime.sharding import load_whole_tensors, whole_tensors
from heterofusion.training.nonfinite import NonFiniteError

logger = logging.getLogger(__name__)

HYPERNETWORKS_FILE = "hypernetworks.safetensors"
IDENTITY_FILE = "fusion_state.json"
COMPLETE_FILE = "checkpoint_complete.json"
INITIALIZATION_FILE = "initialization.json"  # beside the checkpoints: what the hypernetworks started from


# ---- what a checkpoint belongs to -------------------------------------------------------------------------------


def fusion_identity(plan: AlignmentPlan, sizes: HypernetworkConfig, method: MethodConfig) -> dict[str, Any]:
    """What must agree for hypernetworks to fit: weights and configs of all adapters, control, sizes, alignment."""

    def settings(adapter: LoraAdapter) -> dict[str, Any]:  # without where its base lies, which may be moved
        return {name: value for name, value in adapter.config.items() if name != "base_model_name_or_path"}

    target, expansion = plan.target, None
    if isinstance(plan.target, ExpandedAdapter):
        target, expansion = plan.target.anchor, plan.target.expansion
    identity = {
        "target_sha256": target.sha256,
        "target_config": settings(target),
        "extra_rank": expansion.extra_rank if expansion else 0,
        "extra_basis": expansion.extra_basis if expansion else None,
        "source_sha256": [source.sha256 for source in plan.sources],
        "source_config": [settings(source) for source in plan.sources],
        "source_control": control_record(plan.sources),
        "hypernetwork": sizes.to_dict(),
        "canonicalize": method.canonicalize,
        "layer_alignment": plan.layer_alignment,
        "transfer_ratio": str(plan.transfer_ratio),
        "groups": {key.name: [item.target.module.path for item in members] for key, members in plan.groups.items()},
    }
    return json.loads(json.dumps(identity))  # as it comes back from a file


def check_same(where: str | Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse to go on with what was made of something else; names the first field of `wanted` that differs."""
    for name, here in wanted.items():
        if (there := found.get(name)) != here:
            name, *values = _first_difference(name, there, here)
            there, here = (f"{text:.117}..." if len(text) > 120 else text for text in map(json.dumps, values))
            raise UserError(
                f"{where} was trained with another {name}: {there}, this run has {here}; resume with the same "
                "adapters, data and flags, or start in a new output_dir"
            )


def _first_difference(name: str, found: Any, wanted: Any) -> tuple[str, Any, Any]:
    """Where two values differ first, as `hypernetwork.embed_dim` or `source_sha256[1]`, and both there."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        key = next(key for key in {**wanted, **found} if key not in found or found[key] != wanted.get(key))
        return _first_difference(f"{name}.{key}", found.get(key), wanted.get(key))
    if isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        index = next(i for i, (there, here) in enumerate(zip(found, wanted, strict=True)) if there != here)
        return _first_difference(f"{name}[{index}]", found[index], wanted[index])
    return name, found, wanted


def check_checkpoint(folder: str | Path, identity: Mapping[str, Any]) -> None:
    """Check that a checkpoint to resume from is complete and of this fusion (and engine); reads no weights."""
    folder = Path(folder).absolute()
    found = read_identity(folder)
    check_same(folder, found, identity)
    if found.get("save_only_model"):
        raise UserError(
            f"{folder} was saved with --save_only_model and holds no optimizer to resume with; start anew from its "
            "hypernetworks with --init_hypernetwork_from"
        )
    check_complete(folder)


def read_identity(folder: Path) -> dict[str, Any]:
    """What `save_hypernetworks` recorded in a folder, beside hypernetworks that must be there."""
    for path in (folder / IDENTITY_FILE, folder / HYPERNETWORKS_FILE):
        if not path.is_file():
            raise UserError(
                f"{path} is missing; {folder} is not a complete HeteroFusion checkpoint, name a checkpoint-N folder"
            )
    return read_json_object(folder / IDENTITY_FILE)


# ---- hypernetworks ----------------------------------------------------------------------------------------------


def save_hypernetworks(
    model: HeteroFusionModel, folder: str | Path, record: Mapping[str, Any] | None = None, write: bool = True
) -> None:
    """Write hypernetworks, extra rows and the identity of the fusion with a `record` of more; all ranks together."""
    state = whole_tensors(model.hypernetworks.named_parameters(), keep=write)
    if not write:
        return
    folder = Path(folder)
    # a finite loss and gradient make weights that are not finite if the learning rate is out of proportion
    bad = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if bad:
        names = [name.split(".")[1] if name.startswith("networks.") else "the shared factors" for name in bad]
        raise NonFiniteError(
            f"{folder.absolute()} is not saved: weights of {', '.join(dict.fromkeys(names))} are not finite; "
            f"{last_good(folder.parent)}. Lower --learning_rate"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder, model.plan.target)
    with told_writes(f"{folder / HYPERNETWORKS_FILE} could not be written"):
        save_file(state, folder / HYPERNETWORKS_FILE, metadata={"format": "pt"})
    identity = fusion_identity(model.plan, model.hypernetworks.config, model.method) | dict(record or {})
    write_json(folder / IDENTITY_FILE, identity)


def load_hypernetworks(model: HeteroFusionModel, folder: str | Path) -> None:
    """Load what `save_hypernetworks` wrote of this fusion, the extra rows too. All ranks together."""
    folder = Path(folder).absolute()
    identity = fusion_identity(model.plan, model.hypernetworks.config, model.method)
    check_same(folder, read_identity(folder), identity)
    restore_basis(model, folder)
    try:
        load_whole_tensors(model.hypernetworks, load_file(folder / HYPERNETWORKS_FILE))
    except (SafetensorError, UserError) as error:
        raise UserError(f"{folder / HYPERNETWORKS_FILE} cannot be loaded: {error}") from error
    model.updates.invalidate()


def restore_basis(model: HeteroFusionModel, folder: str | Path) -> None:
    """Give an expanded target a checkpoint's extra rows; DeepSpeed needs them before it reads files of its own."""
    if isinstance(model.plan.target, ExpandedAdapter):
        model.set_basis(read_rows(folder, model.plan.target))


# ---- whole or not at all ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def whole_checkpoint(
    run_dir: Path, state: TrainerState, args: TrainingArguments, wait_for_everyone: Callable[[], None]
) -> Iterator[Path]:
    """Save a checkpoint in here, on all ranks together, which replaces what a killed run left in its place.

    Older checkpoints go (`save_total_limit`) once this one is complete, and this one if it cannot be written.
    """
    folder = run_dir / f"checkpoint-{state.global_step}"
    limit, args.save_total_limit = args.save_total_limit, None  # Trainer would rotate too early
    try:
        if args.should_save and folder.exists():
            shutil.rmtree(folder)
        wait_for_everyone()
        yield folder
        wait_for_everyone()
        if args.should_save:
            mark_complete(folder)
    except Exception as error:
        if not (is_failed_write(error) or isinstance(error, RuntimeError)):  # torch's of a full disk
            raise
        shutil.rmtree(folder, ignore_errors=True)
        raise OSError(f"checkpoint {folder} could not be written ({error}); {last_good(run_dir)}") from error
    finally:
        args.save_total_limit = limit
    if args.should_save:
        rotate_checkpoints(str(run_dir), limit, state.best_model_checkpoint, use_mtime=True)


def mark_complete(folder: Path) -> None:
    """Write the list of a finished checkpoint's files, with their sizes in bytes, as its last file."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != COMPLETE_FILE]
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    write_json(folder / COMPLETE_FILE, {"files": sizes})


def missing_part(folder: Path) -> str | None:
    """What a checkpoint folder lacks to be complete, in words; None if nothing."""
    if not (folder / COMPLETE_FILE).is_file():
        return f"{COMPLETE_FILE}, the last file to be written, is missing"
    try:
        sizes = read_json_object(folder / COMPLETE_FILE).get("files")
    except UserError:
        sizes = None
    if not sizes:
        return f"{COMPLETE_FILE} is damaged"
    for name, size in sizes.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (found := (folder / name).stat().st_size) != size:
            return f"{name} has {found} bytes instead of {size}"
    return None


def check_complete(folder: Path) -> None:
    """Refuse a checkpoint that was cut short."""
    if (lack := missing_part(folder)) is not None:
        raise UserError(f"{folder} is not a complete checkpoint: {lack}; resume from another one")


def checkpoint_folders(folder: Path) -> list[Path]:
    """All `checkpoint-N` folders, complete or not, by their steps."""
    paths = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(filter(Path.is_dir, paths), key=lambda path: int(path.name.removeprefix("checkpoint-")))


def last_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """The complete `checkpoint-N` folder with the highest N, None if there is none; says what it passes over."""
    for path in reversed(checkpoint_folders(Path(output_dir))):
        if (lack := missing_part(path)) is None:
            return path
        if is_main_process():
            logger.warning("passing over %s, which was not finished: %s", path, lack)
    return None


def last_good(output_dir: str | Path) -> str:
    """For the end of an error message: which checkpoint is there to resume from."""
    last = last_complete_checkpoint(output_dir)
    return "no checkpoint was saved before" if last is None else f"the last good checkpoint is {last}"


def checkpoint_step(folder: Path) -> int:
    """The optimizer step that a complete checkpoint is of."""
    return read_json_object(folder / TRAINER_STATE_NAME)["global_step"]


def stopped_early(folder: Path) -> bool:
    """Whether a checkpoint was the last of a run that a callback had stopped before its last step."""
    state = read_json_object(folder / TRAINER_STATE_NAME)
    control = state.get("stateful_callbacks", {}).get("TrainerControl", {}).get("args", {})
    return bool(control.get("should_training_stop")) and state["global_step"] < state["max_steps"]


# ---- the start of a run -----------------------------------------------------------------------------------------


def find_checkpoint(args: TrainingArguments, overwrite: bool, check: Callable[[Path], None]) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` asks for, None to start anew; `check` refuses another run's."""
    wish = str(args.resume_from_checkpoint).lower()
    resuming = wish not in ("none", "false", "no", "0")
    folder = Path(str(args.output_dir)).absolute()
    check_output_dir(str(folder), resuming=resuming, overwrite=overwrite)
    if not resuming:
        return None
    if wish not in ("true", "yes", "1"):
        found: Path | None = Path(str(args.resume_from_checkpoint))
    elif (found := last_complete_checkpoint(folder)) is None:
        if not checkpoint_folders(folder):
            raise UserError(
                f"--resume_from_checkpoint is true, but --output_dir {folder} holds no checkpoint-N folder; leave "
                "the flag out to start anew, or name the checkpoint"
            )
        logger.warning("no checkpoint in %s was finished: the run starts anew", folder)
    if found is not None:
        check(found)
    return found


def find_start(
    name: str | None, plan: AlignmentPlan, sizes: HypernetworkConfig, output_dir: Path
) -> Initialization | None:
    """The hypernetworks that `--init_hypernetwork_from` names: a checkpoint, or the last complete one of a run."""
    if name is None:
        return None
    folder = Path(name).expanduser().absolute()
    try:
        if not folder.is_dir():
            raise UserError("it is no folder; name a checkpoint-N folder or an output_dir")
        found = folder if (folder / HYPERNETWORKS_FILE).is_file() else last_complete_checkpoint(folder)
        if found is None:
            raise UserError(f"it holds neither {HYPERNETWORKS_FILE} nor a complete checkpoint-N folder")
        if found in checkpoint_folders(output_dir):
            raise UserError("it is among what --overwrite true removes; name another --output_dir")
        recorded = read_identity(found).get("hypernetwork")
        return plan_initialization(display_name(str(folder)), found / HYPERNETWORKS_FILE, recorded, plan, sizes)
    except UserError as error:
        raise UserError(f"--init_hypernetwork_from {name}: {error}") from error


def check_start(start: Initialization, control: str | None) -> None:
    """Refuse hypernetworks of another kind of control: they would bring into a control what it is to leave out."""
    found = read_identity(start.file.parent).get("control")
    if found != control:
        raise UserError(
            f"the hypernetworks in {start.file.parent} are of the control {found or 'none'}, this run is of "
            f"{control or 'none'}; start from hypernetworks of the same kind of control, or fresh"
        )


def clear_remains(folder: Path, main: bool, resume: Path | None, start: Initialization | None = None) -> None:
    """Remove what an earlier run left, and record what a new one starts from. All ranks together, `main` removes."""
    ranks = PartialState()
    ranks.wait_for_everyone()  # nobody may still look at what goes
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        if resume is None:
            for path in checkpoint_folders(folder):
                logger.info("--overwrite: removing %s", path)
                shutil.rmtree(path)
            (folder / INITIALIZATION_FILE).unlink(missing_ok=True)
        if start is not None:
            write_json(folder / INITIALIZATION_FILE, start.record())
    ranks.wait_for_everyone()
