"""Hypernetworks and alphas on disk, tied to the adapters they were trained for.

A checkpoint never holds a fused adapter: loaded as the target it would add the update twice. The last file written to
a checkpoint lists all others with their sizes; a folder without it, or that disagrees with it, was cut short.
"""

import contextlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints

from heterofusion.adapters.alignment import AlignmentPlan
from heterofusion.adapters.controls import control_record
from heterofusion.method.config import HypernetworkConfig, MethodConfig
from heterofusion.method.expansion import ExpandedAdapter, read_rows, write_rows
from heterofusion.method.initialization import Initialization
from heterofusion.method.model import HeteroFusionModel
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.files import is_failed_write
from heterofusion.runtime.sharding import load_whole_tensors, whole_tensors
from heterofusion.training.nonfinite import NonFiniteError

INITIALIZATION_FILE = "initialization.json"


logger = logging.getLogger(__name__)

HYPERNETWORKS_FILE = "hypernetworks.safetensors"
IDENTITY_FILE = "fusion_state.json"
COMPLETE_FILE = "checkpoint_complete.json"


def fusion_identity(plan: AlignmentPlan, sizes: HypernetworkConfig, method: MethodConfig) -> dict[str, Any]:
    """What must agree for hypernetworks to fit: hashes of all adapters, source control, sizes, and the alignment."""
    expansion = plan.target.expansion if isinstance(plan.target, ExpandedAdapter) else None
    return {
        "target_sha256": plan.target.sha256,
        "extra_rank": expansion.extra_rank if expansion else 0,
        "extra_basis": expansion.extra_basis if expansion else None,
        "source_sha256": [source.sha256 for source in plan.sources],
        "source_control": control_record(plan.sources),
        "hypernetwork": sizes.to_dict(),
        "canonicalize": method.canonicalize,
        "layer_alignment": plan.layer_alignment,
        "transfer_ratio": str(plan.transfer_ratio),
        "groups": {key.name: [item.target.module.path for item in members] for key, members in plan.groups.items()},
    }


def save_hypernetworks(
    model: HeteroFusionModel, folder: str | Path, engine: Mapping[str, Any] | None = None, write: bool = True
) -> None:
    """Write hypernetworks, alphas, extra rows and the identity of the fusion into a folder. All ranks together.

    Args:
        model: the model.
        folder: made if it is missing.
        engine: plain values about the engine whose states stand beside; recorded, and compared when resuming.
        write: whether this rank writes.

    Raises:
        NonFiniteError: a weight is not finite, and nothing was written; names the roles. A step whose loss and
            gradient are finite makes such weights if its learning rate is out of proportion.
    """
    state = whole_tensors(model.hypernetworks.named_parameters(), keep=write)
    if not write:
        return
    folder = Path(folder)
    bad = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if bad:
        names = [name.split(".")[1] if name.startswith("networks.") else "the shared factors" for name in bad]
        raise NonFiniteError(
            f"{folder.absolute()} is not saved: weights of {', '.join(dict.fromkeys(names))} are not finite; "
            f"{last_good(folder.parent)}. Lower --learning_rate"
        )
    folder.mkdir(parents=True, exist_ok=True)
    identity = {**fusion_identity(model.plan, model.hypernetworks.config, model.method), **(engine or {})}
    write_rows(folder, model.plan.target)
    partial = folder / f"{HYPERNETWORKS_FILE}.partial"
    try:
        save_file(state, partial, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"{folder / HYPERNETWORKS_FILE} could not be written ({error})") from error
    (folder / IDENTITY_FILE).write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")
    partial.replace(folder / HYPERNETWORKS_FILE)


@contextlib.contextmanager
def new_checkpoint(folder: Path, main: bool, wait_for_everyone: Callable[[], None]) -> Iterator[None]:
    """Save a checkpoint in here, on all ranks together; its last file then says that it is complete.

    Args:
        folder: the checkpoint; what a killed run left there goes, it must not mix with this one.
        main: whether this rank clears and marks.
        wait_for_everyone: barrier of all ranks, which write their own parts.

    Raises:
        OSError: it could not be written.
    """
    if main and folder.exists():
        shutil.rmtree(folder)
    wait_for_everyone()
    with failing_writes(folder):
        yield
        wait_for_everyone()
        if main:
            mark_complete(folder)


@contextlib.contextmanager
def rotated_checkpoint(
    run_dir: Path, state: TrainerState, args: TrainingArguments, wait_for_everyone: Callable[[], None]
) -> Iterator[None]:
    """As `new_checkpoint`, in a run's folder; older ones go (`save_total_limit`) once this one is complete.

    Args:
        run_dir: the run's folder.
        state: tells the step, and which checkpoint is the best.
        args: of the run.
        wait_for_everyone: barrier of all ranks.

    Raises:
        OSError: it could not be written.
    """
    limit, args.save_total_limit = args.save_total_limit, None  # Trainer would rotate too early
    try:
        with new_checkpoint(run_dir / f"checkpoint-{state.global_step}", args.should_save, wait_for_everyone):
            yield
    finally:
        args.save_total_limit = limit
    if args.should_save:
        rotate_checkpoints(str(run_dir), limit, state.best_model_checkpoint, use_mtime=True)


def mark_complete(folder: str | Path) -> None:
    """Write the list of a finished checkpoint's files, with their sizes in bytes, as its last file."""
    folder = Path(folder)
    sizes = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != COMPLETE_FILE
    }
    partial = folder / f"{COMPLETE_FILE}.partial"
    with partial.open("w", encoding="utf-8") as file:
        json.dump({"files": sizes}, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / COMPLETE_FILE)


@contextlib.contextmanager
def failing_writes(folder: Path) -> Iterator[None]:
    """Name the checkpoint in what torch and other libraries say of a full disk, and clear what there is of it.

    Raises:
        OSError: it could not be written.
    """
    try:
        yield
    except Exception as error:
        if not (is_failed_write(error) or isinstance(error, RuntimeError)):
            raise
        shutil.rmtree(folder, ignore_errors=True)
        message = f"checkpoint {folder} could not be written ({error}); {last_good(folder.parent)}"
        if os.environ.get("LOCAL_RANK", "0") != "0":  # programs print the errors of the first rank alone
            logger.error("rank %s: %s", os.environ.get("RANK"), message)
        raise OSError(message) from error


def checkpoint_to_resume(output_dir: str | Path) -> Path:
    """The last complete checkpoint of a run.

    Raises:
        ValueError: there is none.
    """
    folder = Path(output_dir).absolute()
    last = last_complete_checkpoint(folder)
    if last is None:
        raise UserError(f"{folder} holds no complete checkpoint-N folder to resume from")
    return last


def stopped_early(folder: str | Path) -> bool:
    """Whether a checkpoint was the last of a run that a callback had stopped before its last step."""
    path = Path(folder) / TRAINER_STATE_NAME
    state = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    control = state.get("stateful_callbacks", {}).get("TrainerControl", {}).get("args", {})
    return bool(control.get("should_training_stop")) and state["global_step"] < state["max_steps"]


def nonfinite_error(reason: str | None, output_dir: str | Path) -> NonFiniteError:
    """The error of a run that something not finite ends, with what is left and what to do."""
    return NonFiniteError(
        f"{reason}; {last_good(output_dir)}. Lower --learning_rate, clip with --max_grad_norm, look at the replay, or "
        "tolerate such steps with --skip_nonfinite_steps"
    )


def last_good(output_dir: str | Path) -> str:
    """For the end of an error message: which checkpoint is there to resume from."""
    last = last_complete_checkpoint(output_dir)
    return "no checkpoint was saved before" if last is None else f"the last good checkpoint is {last}"


def checkpoint_step(folder: str | Path) -> int:
    """The optimizer step that a complete checkpoint is of."""
    state = json.loads((Path(folder) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    return int(state["global_step"])


def missing_part(folder: str | Path) -> str | None:
    """What a checkpoint folder lacks to be complete, in words; None if nothing."""
    folder = Path(folder)
    try:
        content = json.loads((folder / COMPLETE_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{COMPLETE_FILE}, the last file to be written, is missing"
    except (OSError, ValueError, RecursionError) as error:
        return f"{COMPLETE_FILE} is damaged ({error})"
    sizes = content.get("files") if isinstance(content, dict) else None
    if not isinstance(sizes, dict) or not sizes:
        return f"{COMPLETE_FILE} is damaged (it lists no files)"
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        found = path.stat().st_size
        if found != size:
            return f"{name} has {found} bytes instead of {size}"
    return None


def last_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """The complete `checkpoint-N` folder with the highest N, None if there is none; says what it passes over."""
    folder = Path(output_dir)
    steps = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and path.is_dir():
            steps[int(match[1])] = path
    for step in sorted(steps, reverse=True):
        lack = missing_part(steps[step])
        if lack is None:
            return steps[step]
        if os.environ.get("RANK", "0") == "0":
            logger.warning("passing over %s, which was not finished: %s", steps[step], lack)
    return None


def check_checkpoint(
    folder: str | Path,
    plan: AlignmentPlan,
    sizes: HypernetworkConfig,
    method: MethodConfig,
    engine: Mapping[str, Any] | None = None,
) -> None:
    """Check that a checkpoint to resume from is complete and of this fusion (and engine, if given); reads no weights.

    Raises:
        ValueError: files are missing or damaged, or belong to another fusion; names the field that differs.
    """
    folder = Path(folder).absolute()
    check_hypernetworks(folder, {**fusion_identity(plan, sizes, method), **(engine or {})})
    if read_identity(folder).get("save_only_model"):
        raise UserError(
            f"{folder} was saved with --save_only_model and holds no optimizer to resume with; start anew from its "
            "hypernetworks with --init_hypernetwork_from"
        )
    lack = missing_part(folder)
    if lack is not None:
        raise UserError(f"{folder} is not a complete checkpoint: {lack}; resume from another one")


def read_identity(folder: Path) -> dict[str, Any]:
    """What `save_hypernetworks` recorded in a folder, beside hypernetworks that must be there.

    Raises:
        ValueError: files are missing or damaged.
    """
    identity_file = folder / IDENTITY_FILE
    for path in (identity_file, folder / HYPERNETWORKS_FILE):
        if not path.is_file():
            raise UserError(
                f"{path} is missing; {folder} is not a complete HeteroFusion checkpoint, name a checkpoint-N folder"
            )
    try:
        found = json.loads(identity_file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{identity_file} is damaged ({error}); resume from another checkpoint") from error
    if not isinstance(found, dict):
        raise UserError(f"{identity_file} is damaged (no JSON object); resume from another checkpoint")
    return found


def check_hypernetworks(folder: Path, identity: Mapping[str, Any]) -> None:
    """Check that a folder holds hypernetworks and what `save_hypernetworks` recorded beside them.

    Args:
        folder: the folder.
        identity: fields that must agree.

    Raises:
        ValueError: files are missing or damaged, or belong to another fusion; names the field that differs.
    """
    found = read_identity(folder)
    for name, expected in identity.items():
        if found.get(name) != expected:
            field, there, here = first_difference(name, found.get(name), expected)
            raise UserError(
                f"{folder} was trained with another {field}: {shorten(there)}, this run has {shorten(here)}; resume "
                "with the same adapters and settings, or start in a new output_dir"
            )


def first_difference(name: str, found: Any, expected: Any) -> tuple[str, Any, Any]:
    """Where two different values differ first, as `hypernetwork.embed_dim` or `source_sha256[1]`, and both there."""
    if isinstance(found, dict) and isinstance(expected, dict):
        shared = found.keys() & expected.keys()
        key = next(key for key in {**expected, **found} if key not in shared or found[key] != expected[key])
        return first_difference(f"{name}.{key}", found.get(key), expected.get(key))
    if isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        index = next(i for i, (there, here) in enumerate(zip(found, expected, strict=True)) if there != here)
        return first_difference(f"{name}[{index}]", found[index], expected[index])
    return name, found, expected


def load_hypernetworks(model: HeteroFusionModel, folder: str | Path) -> None:
    """Load what `save_hypernetworks` wrote, the extra rows too. All ranks together.

    Raises:
        ValueError: as `check_checkpoint`, or the weights do not load.
    """
    folder = Path(folder).absolute()
    check_hypernetworks(folder, fusion_identity(model.plan, model.hypernetworks.config, model.method))
    restore_basis(model, folder)
    weights_file = folder / HYPERNETWORKS_FILE
    try:
        state = load_file(weights_file)
        load_whole_tensors(model.hypernetworks, state)
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{weights_file} cannot be loaded: {error}") from error
    model.updates.invalidate()


def restore_basis(model: HeteroFusionModel, folder: str | Path) -> None:
    """Give an expanded target the extra rows that are in a checkpoint. All ranks together.

    `load_hypernetworks` does so too. DeepSpeed, which reads weights from files of its own, needs it before training.

    Raises:
        ValueError: they cannot be read.
    """
    if isinstance(model.plan.target, ExpandedAdapter):
        model.set_basis(read_rows(folder, model.plan.target))


def shorten(value: Any) -> str:
    """A plain value as JSON for an error message, cut at 120 characters."""
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."


def find_hypernetworks(name: str | Path) -> Path:
    """The folder of hypernetworks that a user means: a checkpoint, or the last complete one of an output_dir.

    Raises:
        ValueError: there are none.
    """
    folder = Path(name).expanduser().absolute()
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; name a checkpoint-N folder or an output_dir")
    if (folder / HYPERNETWORKS_FILE).is_file() and (folder / IDENTITY_FILE).is_file():
        return folder
    last = last_complete_checkpoint(folder)
    if last is None:
        raise UserError(
            f"{folder} holds neither {HYPERNETWORKS_FILE} with {IDENTITY_FILE} nor a complete checkpoint-N folder; "
            "name a checkpoint of a fusion"
        )
    return last


def write_initialization(folder: Path, start: Initialization | None) -> None:
    """Leave the record beside the checkpoints, for a run that resumes from one; None removes an older one."""
    path = folder / INITIALIZATION_FILE
    if start is None:
        path.unlink(missing_ok=True)
    else:
        path.write_text(json.dumps(start.record(), indent=2) + "\n", encoding="utf-8")


def read_initialization(folder: Path) -> dict[str, Any] | None:
    """What `write_initialization` left, None if nothing.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / INITIALIZATION_FILE
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it, the record will lack it") from error
