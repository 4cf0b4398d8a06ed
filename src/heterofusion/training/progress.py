"""What earlier runs left: per stage, whether it is finished, where it resumes, and which hypernetworks it starts from.

The provenance is the last file of a fused adapter, so where it stands the stage is finished. Nothing is written before
`begin_stage`.
"""

import json
import logging
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainingArguments

from heterofusion.adapters.lora import WEIGHTS_FILE
from heterofusion.data.labels import labels_control
from heterofusion.method.initialization import Initialization, initialize_hypernetworks, plan_initialization
from heterofusion.method.model import HeteroFusionModel
from heterofusion.publish.record import PROVENANCE_FILE
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.files import check_output_dir, display_name, file_sha256
from heterofusion.training.checkpoints import (
    HYPERNETWORKS_FILE,
    IDENTITY_FILE,
    INITIALIZATION_FILE,
    check_checkpoint,
    check_hypernetworks,
    find_hypernetworks,
    fusion_identity,
    last_complete_checkpoint,
    read_identity,
    shorten,
    write_initialization,
)
from heterofusion.training.mixture_data import check_data_state, data_state
from heterofusion.training.stages import Stage

logger = logging.getLogger(__name__)


def find_progress(stages: Sequence[Stage]) -> None:
    """Find out per stage whether it is finished, resumes, or starts anew, and from which hypernetworks.

    Raises:
        ValueError: what is there is of another run or must not be written over, or hypernetworks to start from do
            not fit.
    """
    wish = resume_wish(stages[0].args)
    overwrite = stages[0].run.overwrite
    if isinstance(wish, Path) and stages[0].name:
        raise UserError(
            f"--resume_from_checkpoint names a folder ({wish}), but the run has stages; give true, and every stage "
            "goes on from where it was"
        )
    for stage in stages:
        with stage.named_errors():
            if wish is not None:
                _find_stage(stage, wish, overwrite)
            check_output_dir(str(stage.folder), resuming=wish is not None, overwrite=overwrite)
            if not stage.finished and stage.resume is None:
                _find_start(stage)
    if overwrite:
        _plan_removal(stages)


def resume_wish(args: TrainingArguments) -> Path | bool | None:
    """What `--resume_from_checkpoint` asks for: a folder, True for the last checkpoint, None to start anew."""
    wanted = str(args.resume_from_checkpoint)
    if args.resume_from_checkpoint is None or wanted.lower() in ("false", "no", "0"):
        return None
    return True if wanted.lower() in ("true", "yes", "1") else Path(wanted)


def _find_stage(stage: Stage, wish: Path | bool, overwrite: bool) -> None:
    if isinstance(wish, Path):
        stage.resume = wish
    elif not stage.name:
        stage.resume = last_checkpoint(stage.folder)
        if stage.resume is None:
            return
    elif stage.previous is not None and not stage.previous.finished:
        if not overwrite and (_is_marked(stage) or last_complete_checkpoint(stage.folder)):
            raise UserError(
                f"{stage.folder} holds results, but {stage.previous.title} before it is not finished: they are of "
                "another run; name another --output_dir, or pass --overwrite true"
            )
        return
    else:
        if stage.previous is not None:
            stage.align()  # its target is there
        if _is_marked(stage):
            check_finished(stage)
            stage.finished = True
            return
        stage.resume = last_complete_checkpoint(stage.folder)
        if stage.resume is None:
            logger.info("%s: no complete checkpoint in %s, it starts anew", stage.title, stage.folder)
            return
    check_checkpoint(stage.resume, stage.plan, stage.sizes, stage.args)


def last_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint true` means; None if a run was killed inside its first one.

    Raises:
        ValueError: there is no checkpoint at all.
    """
    last = last_complete_checkpoint(folder)
    if last is None and not checkpoint_folders(folder):
        raise UserError(
            f"--resume_from_checkpoint is true, but --output_dir {folder} holds no checkpoint-N folder; leave "
            "the flag out to start anew, or name the checkpoint"
        )
    if last is None:
        logger.warning("no checkpoint in %s was finished: the run starts anew", folder)
    return last


def checkpoint_folders(folder: Path) -> list[Path]:
    """All `checkpoint-N` folders, complete or not."""
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in paths if path.is_dir() and re.fullmatch(r"checkpoint-\d+", path.name)]


def _is_marked(stage: Stage) -> bool:
    return (stage.folder / PROVENANCE_FILE).is_file()


# ---- finished stages --------------------------------------------------------------------------------------------


def check_finished(stage: Stage) -> None:
    """Check that the adapter in a stage's folder is what the stage would make, as far as its provenance records it.

    Raises:
        ValueError: the provenance is damaged, or of another run; names the field that differs.
    """
    record = _read_provenance(stage.folder)
    method, plan, sizes, training = (_section(record, name) for name in ("method", "plan", "hypernetwork", "training"))
    sources = record.get("sources")
    if not isinstance(sources, list):
        sources = []
    found = {
        **method, **plan, **sizes, **training,
        "target_sha256": _section(record, "target").get("sha256"),
        "source_sha256": [source.get("sha256") if isinstance(source, dict) else None for source in sources],
        "carry_hypernetworks or init_hypernetwork_from": "initialization" in training,
    }  # fmt: skip
    as_sizes = {
        "preset",
        "block_size",
        "embed_dim",
        "num_heads",
        "max_position_embeddings",
        "mu_gate",
        "residual_scale",
    }
    wanted = {
        **{name: value for name, value in stage.args.method_dict().items() if name not in as_sizes},
        "layer_alignment": stage.plan.layer_alignment,
        "transfer_ratio": str(stage.plan.transfer_ratio),
        **stage.sizes.to_dict(),
        **stage.args.training_dict(),
        "target_sha256": stage.plan.target.sha256,
        "source_sha256": [source.sha256 for source in stage.plan.sources],
        "carry_hypernetworks or init_hypernetwork_from": _starts_from_others(stage),
    }
    for name, expected in wanted.items():
        if name in found and found[name] != expected:
            raise _other_run(stage, name, found[name], expected)
    weights_file = stage.folder / WEIGHTS_FILE
    if not weights_file.is_file() or file_sha256(weights_file) != record.get("weights_sha256"):
        raise UserError(
            f"{weights_file} is missing, or not the file that {PROVENANCE_FILE} beside it was written for; remove "
            f"{PROVENANCE_FILE} to resume from the last checkpoint"
        )


def check_data(stage: Stage) -> None:
    """Check that what is gone on with was trained on the replay and source labels that the stage's flags give.

    Also that hypernetworks that it starts from are of the same kind of control of labels: those of real labels would
    bring into a control what it is to leave out, and the other way round.

    Raises:
        ValueError: it was on others; names the first thing that differs.
    """
    wanted = data_state(stage.replay_record, stage.labels_record)
    if stage.finished:
        training = _section(_read_provenance(stage.folder), "training")
        found = data_state(training.get("replay", stage.replay_record), training.get("source_labels"))
        check_data_state(stage.folder / PROVENANCE_FILE, found, wanted)
    elif stage.resume is not None:
        check_data_state(stage.resume, read_identity(stage.resume).get("data"), wanted)
    elif stage.start is not None and stage.previous is None:
        folder = stage.start.file.parent
        there, here = (
            (labels_control(_section(data, "source_labels")) or {}).get("kind")
            for data in (_section(read_identity(folder), "data"), wanted)
        )
        if there != here:
            raise UserError(
                f"the hypernetworks in {folder} were trained on source labels of the control {there or 'none'}, this "
                f"run's are of {here or 'none'}; start from hypernetworks of the same kind of labels, or fresh"
            )


def _other_run(stage: Stage, name: str, found: Any, expected: Any) -> ValueError:
    return UserError(
        f"{stage.folder / PROVENANCE_FILE} is of a finished stage with another {name}: {shorten(found)}, this run "
        f"has {shorten(expected)}; resume with the same flags, or start in a new output_dir"
    )


def _read_provenance(folder: Path) -> dict[str, Any]:
    path = folder / PROVENANCE_FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it to resume from the last checkpoint") from error
    if not isinstance(record, dict):
        raise UserError(f"{path} is damaged (no JSON object); remove it to resume from the last checkpoint")
    return record


def _section(record: dict[str, Any], name: str) -> dict[str, Any]:
    section = record.get(name)
    return section if isinstance(section, dict) else {}


# ---- hypernetworks to start from --------------------------------------------------------------------------------


def _starts_from_others(stage: Stage) -> bool:
    carries = stage.previous is not None and stage.previous.is_carried
    return carries or stage.run.init_hypernetwork_from is not None


def _find_start(stage: Stage) -> None:
    """Check the hypernetworks that a stage starts from, if they are there already."""
    name = stage.run.init_hypernetwork_from
    if stage.previous is not None and stage.previous.is_carried and stage.previous.finished:
        stage.start = _carried(stage, stage.previous)
    elif name is not None:
        try:
            label = display_name(str(Path(name).expanduser().absolute()))
            folder = find_hypernetworks(name)
            sizes = read_identity(folder).get("hypernetwork")
            stage.start = plan_initialization(label, folder / HYPERNETWORKS_FILE, sizes, stage.plan, stage.sizes)
        except ValueError as error:
            raise UserError(f"--init_hypernetwork_from {name}: {error}") from error


def _carried(stage: Stage, previous: Stage) -> Initialization:
    if not (previous.folder / HYPERNETWORKS_FILE).is_file():
        raise UserError(
            f"carry_hypernetworks is true, but {previous.folder} holds no {HYPERNETWORKS_FILE}: {previous.title} was "
            "run without; leave carry_hypernetworks out, or start in a new output_dir"
        )
    check_hypernetworks(previous.folder, fusion_identity(previous.plan, previous.sizes, previous.args))
    found = read_identity(previous.folder).get("hypernetwork")
    file = previous.folder / HYPERNETWORKS_FILE
    return plan_initialization(previous.title, file, found, stage.plan, stage.sizes, need_common=False)


# ---- the start --------------------------------------------------------------------------------------------------


def _plan_removal(stages: Sequence[Stage]) -> None:
    """With `--overwrite true`: what a later resume would take for its own goes when the first stage of ours starts."""
    remains: list[Path] = []
    for stage in stages:
        if not stage.finished and stage.resume is None:
            marks = (PROVENANCE_FILE, HYPERNETWORKS_FILE, IDENTITY_FILE, INITIALIZATION_FILE) if stage.name else ()
            remains += checkpoint_folders(stage.folder)
            remains += [path for name in marks if (path := stage.folder / name).is_file()]
    start = stages[0].start
    if start is not None and any(path in (start.file, *start.file.parents) for path in remains):
        raise UserError(
            f"--init_hypernetwork_from {start.file.parent} is among what --overwrite true removes; name another "
            "--output_dir"
        )
    for stage in [stage for stage in stages if not stage.finished][:1]:
        stage.remains = remains


def begin_stage(stage: Stage, model: HeteroFusionModel) -> None:
    """Give a stage that does not resume the hypernetworks it starts from, and clear its folder. All ranks together.

    Args:
        stage: the stage; its target is there.
        model: its model, not wrapped by an engine yet.

    Raises:
        ValueError: the hypernetworks cannot be read.
    """
    if stage.resume is None:
        if stage.previous is not None and stage.previous.is_carried:
            stage.start = _carried(stage, stage.previous)
        if stage.start is not None:
            initialize_hypernetworks(model, stage.start)
    ranks = PartialState()
    ranks.wait_for_everyone()  # nobody may still look at what goes
    if stage.args.should_save:
        stage.folder.mkdir(parents=True, exist_ok=True)
        for path in stage.remains:
            logger.info("--overwrite: removing %s", path)
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if stage.resume is None:
            write_initialization(stage.folder, stage.start)
    ranks.wait_for_everyone()
