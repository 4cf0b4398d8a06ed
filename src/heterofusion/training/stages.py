"""Runs of one fusion, or of several in a row, where the fused adapter of a stage is the target of the next.

A run without stages is one stage without a name. Earlier stages write into folders of their names in the output_dir,
the last one into the output_dir itself. What is there already when a run starts is the matter of `progress.py`.
"""

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from heterofusion.adapters.alignment import AdapterArguments, AlignmentPlan, load_plan
from heterofusion.adapters.controls import control_kind, control_record
from heterofusion.adapters.lora import LoraAdapter
from heterofusion.cli import parse_arguments
from heterofusion.cli_before import stage_arguments
from heterofusion.data.labels import SourceLabelArguments, labels_control
from heterofusion.data.replay import DataArguments
from heterofusion.method.config import HypernetworkConfig
from heterofusion.method.expansion import expand_plan, plain_adapter
from heterofusion.method.initialization import Initialization, check_sizes
from heterofusion.method.model import hypernetwork_config
from heterofusion.publish.record import PROVENANCE_FILE, initial_control, whole_control
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.files import read_json_object
from heterofusion.runtime.loading import ModelArguments
from heterofusion.training.checkpoints import checkpoint_step, read_identity, read_initialization, shorten
from heterofusion.training.config import HeteroFusionConfig, RunArguments
from heterofusion.training.mixture import Mixture

ARGUMENTS = (ModelArguments, AdapterArguments, DataArguments, SourceLabelArguments, RunArguments, HeteroFusionConfig)
WHOLE_RUN = (
    *ModelArguments.__dataclass_fields__, "target_adapter", "target_revision", "source_control", "output_dir",
    "overwrite", "dry_run", "resume_from_checkpoint", "init_hypernetwork_from", "push_to_hub", "hub_model_id",
    "hub_token", "hub_private_repo", "hub_revision",
)  # fmt: skip
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")
# What a run writes into its output_dir, where the folders of the earlier stages lie too.
_TAKEN = re.compile(
    r"checkpoint-\d+|runs|additional_chat_templates|.*\.(json|safetensors|md|jinja|txt|model|bin)", re.I
)


@dataclass
class Stage:
    """One fusion: a stage of a sequence, or all of a run without stages.

    Attributes:
        argv: its complete command line.
        base: flags of the base model.
        adapters: flags of the adapters; the target is the one of this stage.
        data: flags of the data.
        labels: flags of the source labels.
        run: flags of the run.
        args: flags of method and training; `output_dir` is this stage's.
        name: its name, empty in a run without stages.
        number: its place in the sequence, from 1.
        count: stages of the sequence.
        previous: the stage before.
        is_carried: whether the next stage starts from the hypernetworks of this one.
        plan: the alignment, against a stand-in until the target is there.
        sizes: of the hypernetworks.
        finished: whether an earlier run finished it.
        resume: checkpoint to resume from.
        start: hypernetworks to start from.
        replay: training examples; with source labels a mixture of both.
        replay_record: plain values about the replay.
        labels_record: the same about the source labels; None without.
        evaluation: examples for the evaluation loss.
        remains: what an earlier run left and goes when this stage starts.
    """

    argv: list[str]
    base: ModelArguments
    adapters: AdapterArguments
    data: DataArguments
    labels: SourceLabelArguments
    run: RunArguments
    args: HeteroFusionConfig
    name: str = ""
    number: int = 1
    count: int = 1
    previous: "Stage | None" = None
    is_carried: bool = False
    plan: AlignmentPlan = field(init=False)
    sizes: HypernetworkConfig = field(init=False)
    finished: bool = False
    resume: Path | None = None
    start: Initialization | None = None
    replay: Dataset | Mixture | None = None
    replay_record: dict[str, Any] = field(default_factory=dict)
    labels_record: dict[str, Any] | None = None
    evaluation: Dataset | None = None
    remains: list[Path] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """Where it writes."""
        return Path(str(self.args.output_dir)).absolute()

    @property
    def title(self) -> str:
        """Its name and place, for messages."""
        return f"stage {self.name!r} ({self.number} of {self.count})" if self.name else "the run"

    @contextlib.contextmanager
    def named_errors(self) -> Iterator[None]:
        """Put the stage's name before the message of a user's error."""
        try:
            yield
        except ValueError as error:
            if not self.name:
                raise
            raise UserError(f"{self.title}: {error}") from error

    def align(self, target: LoraAdapter | None = None) -> None:
        """Read the adapters and align them.

        Args:
            target: stands for the target adapter.

        Raises:
            ValueError: an adapter or a setting cannot be used.
        """
        base, seed = self.base, self.args.seed
        plan = load_plan(self.adapters, self.args, base.model_name_or_path, base.model_revision, target, seed)
        self.plan = expand_plan(plan, self.args, seed)
        self.sizes = hypernetwork_config(self.plan, self.args)

    def renew(self) -> None:
        """Get a stage ready when its turn comes: its target is there now.

        TrainingArguments set process-wide state of accelerate (device, engine, precision) when they are made, and
        trainers add to it. Those of another stage were made last, so this stage's are made anew.
        """
        if self.name:
            self.args = parse_arguments(ARGUMENTS, self.argv, "")[-1]
        if self.previous is not None:
            self.align()

    def check_control(self) -> None:
        """Refuse what earlier runs left if it was made with another source control than this run has.

        Hypernetworks to start from must be of the same kind of control, whatever its seed: those of real sources
        would bring into a control what it is to leave out, and those of a control must not end in a fusion that does
        not say so. A finished stage must be of the same draw.

        Raises:
            ValueError: names the control there and here.
        """
        control = control_record(self.plan.sources)
        if self.start is not None:
            found = control_kind(read_identity(self.start.file.parent).get("source_control"))
            if found != control_kind(control):
                raise UserError(
                    f"the hypernetworks in {self.start.file.parent} were trained with source_control "
                    f"{found or 'none'}, this run has {control_kind(control) or 'none'}; start from hypernetworks of "
                    "the same --source_control, or fresh"
                )
        if self.finished:
            recorded = read_json_object(self.folder / PROVENANCE_FILE).get("source_control")
            if recorded != control:
                raise UserError(
                    f"{self.folder / PROVENANCE_FILE} is of a finished stage with another source_control: "
                    f"{shorten(recorded)}, this run has {shorten(control)}; resume with the same flags, or start in a "
                    "new output_dir"
                )

    def control(self) -> str | None:
        """Of what kind of control it is, once its data are there: see `whole_control`."""
        labels, initial = labels_control(self.labels_record), initial_control(self.plan.target)
        return whole_control(control_record(self.plan.sources), labels, initial)

    def record(self) -> dict[str, Any]:
        """For the provenance: source labels, where it was resumed, its place in a sequence, what it started from."""
        record: dict[str, Any] = {}
        if self.resume is not None:
            record["resumed_from_step"] = checkpoint_step(self.resume)
        if self.name:
            record["sequence"] = {"stage": self.name, "number": self.number, "stages": self.count}
        if self.labels_record is not None:
            record["source_labels"] = self.labels_record
        start = read_initialization(self.folder)
        return record | ({"initialization": start} if start else {})


def read_stages(argv: Sequence[str], description: str) -> list[Stage]:
    """Parse the command line and its YAML file into stages; one, without a name, if the file has no `stages:`.

    Args:
        argv: the command line without the program's name.
        description: shown by `--help`.

    Raises:
        ValueError: a flag, a YAML key or the name of a stage is not what it has to be, or a control is to be pushed.
    """
    stages = _parse_stages(argv, description)
    control = stages[0].adapters.source_control
    if control is not None and stages[0].args.push_to_hub:
        raise UserError(
            f"--push_to_hub is true together with --source_control {control}: a control is no fusion of its sources "
            "and is not published; leave one of the two out"
        )
    return stages


def _parse_stages(argv: Sequence[str], description: str) -> list[Stage]:
    lines = stage_arguments(ARGUMENTS, argv, WHOLE_RUN)
    if not lines:
        stage = Stage(list(argv), *parse_arguments(ARGUMENTS, argv, description))
        if stage.run.carry_hypernetworks:
            raise UserError(
                "--carry_hypernetworks is true, but there is no stage before; it belongs to a YAML file with "
                "`stages:`, or did you mean --init_hypernetwork_from?"
            )
        return [stage]
    stages: list[Stage] = []
    names: list[str] = []
    output_dir = ""
    for number, line in enumerate(lines, start=1):
        names.append(_checked_name(line.name, names, line.where))
        try:
            if not stages:
                output_dir = str(parse_arguments(ARGUMENTS, line.argv, description)[-1].output_dir)
            folder = Path(output_dir, names[-1]) if number < len(lines) else Path(output_dir)
            words = [*line.argv, f"--output_dir={folder}"]
            if stages:
                words.append(f"--target_adapter={stages[-1].folder}")
            stage = Stage(words, *parse_arguments(ARGUMENTS, words, description))
        except ValueError as error:
            raise UserError(f"{line.where}: {error}") from error
        stage.name, stage.number, stage.count = names[-1], number, len(lines)
        if stages:
            stage.previous = stages[-1]
            stages[-1].is_carried = stage.run.carry_hypernetworks
            stage.adapters.target_revision = stage.run.init_hypernetwork_from = None  # of the first stage
        stages.append(stage)
    return stages


def _checked_name(name: Any, earlier: Sequence[str], where: str) -> str:
    text = str(name)
    if isinstance(name, bool) or not isinstance(name, (str, int)) or not _NAME.fullmatch(text):
        raise UserError(f"{where}: the name must be of letters, digits, '.', '_' and '-', without '.' in front")
    if _TAKEN.fullmatch(text):
        raise UserError(f"{where}: the name is that of a file or folder that a run writes; choose another name")
    if text.casefold() in map(str.casefold, earlier):  # some file systems do not tell them apart
        raise UserError(f"{where}: an earlier stage has that name; choose another name")
    return text


def plan_stages(stages: Sequence[Stage]) -> None:
    """Read the adapters of all stages and align them; a later stage's target, which is not there yet, has a stand-in.

    A fused adapter has the modules, shapes and config of its target, so the target of the stage before stands for it.
    It has the rank that `--extra_rank` gave that; the next stage takes all of it for the target's own, and adds to it.

    Raises:
        ValueError: an adapter or a setting cannot be used, a stage would write over an adapter that is read, or
            hypernetworks that are carried have other sizes.
    """
    writers = {stage.folder.resolve(): stage for stage in stages if stage.name}
    for stage in stages:
        with stage.named_errors():
            target = None
            if stage.previous is not None:
                folder = stage.previous.folder.resolve()
                before = plain_adapter(stage.previous.plan.target)
                target = replace(before, name=stage.adapters.target_adapter, folder=folder, sha256="")
            stage.align(target)
            for adapter in (*([] if target else [stage.plan.target]), *stage.plan.sources):
                if (writer := writers.get(adapter.folder)) is not None:
                    raise UserError(
                        f"adapter {adapter.name} lies where {writer.title} writes; name another --output_dir"
                    )
            if stage.previous is not None and stage.previous.is_carried:
                check_sizes(stage.previous.title, stage.previous.sizes.to_dict(), stage.sizes)
