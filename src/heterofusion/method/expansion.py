"""Basis expansion: a target adapter of rank r gets k more rows of lora_A, so that training can leave its subspace.

A fusion changes lora_B alone, so what it learns lies in the row space of the anchor's lora_A. `--extra_rank k` adds k
rows to every lora_A, orthogonal to the anchor's and to each other, whose columns of lora_B are zero: the expanded
adapter computes what the anchor computes, the first r rows keep their bits and their scaling, and it is still a plain
LoRA adapter. k = 0 is the published method. How large the rows are, and where those of `--extra_basis activations`
lie, is measured on data: see `basis_inputs.py`.
"""

import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import TrainerCallback

from heterofusion.adapters.alignment import AlignmentPlan, GroupKey
from heterofusion.adapters.config import AdapterError, rank_and_scaling
from heterofusion.adapters.lora import LoraAdapter, LoraModule
from heterofusion.method.config import BasisArguments
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.ranks import is_main_process

BASIS_FILE = "extra_rows.safetensors"


logger = logging.getLogger(__name__)


BASIS_EXAMPLES = 64  # of the training data: some thousand tokens, where a rank has some tens of directions


_OVERSAMPLING = 8  # directions of the sketch beside the wanted ones


_SKETCHES = 3  # passes over the examples


_UNREACHED = 1e-5  # of the largest RMS; below it is the rounding of float32


class FitBasis(TrainerCallback):
    """Fits the extra rows when training begins, on the first examples of a data set: all engines are in place then.

    A run that resumes has its rows from the checkpoint.

    Args:
        fit: gets the examples' token ids, each (1, tokens), on the device of the run.
        examples: rows with `input_ids`.
    """

    def __init__(self, fit: Callable[[Sequence[Tensor]], None], examples: Any) -> None:
        self.fit = fit
        self.examples = examples

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.fit(first_examples(self.examples, args.device))


ANCHOR_NORM, INPUTS = "norm of the anchor's rows", "inputs"
_DEFAULT_NORM = 3**-0.5  # mean norm of a row of PEFT's first lora_A: uniform up to 1 / sqrt(in_features)


@dataclass(frozen=True)
class Expansion:
    """What was added to an adapter.

    Attributes:
        extra_rank: rows that every module got.
        extra_basis: `random` or `activations`.
        seed: of the random rows.
        scaled_by: `inputs` if the rows have the size of the anchor's on real inputs; else they have the anchor's norm.
        examples: examples whose inputs were seen.
        tokens: their tokens.
        unreached: rows that no input reached; they have the anchor's norm.
    """

    extra_rank: int
    extra_basis: str
    seed: int
    scaled_by: str = ANCHOR_NORM
    examples: int = 0
    tokens: int = 0
    unreached: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class ExpandedAdapter(LoraAdapter):
    """An adapter with extra rows; name, folder, file and `sha256` are the anchor's.

    Attributes:
        anchor: the adapter as it was read.
        expansion: what was added.
    """

    anchor: LoraAdapter
    expansion: Expansion

    def expanded_sha256(self) -> str:
        """Hex SHA-256 over the paths and bytes of every lora_A, in layer order."""
        digest = hashlib.sha256()
        for path, module in self.modules.items():
            digest.update(path.encode())
            digest.update(module.lora_A.contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def extra_rows(self) -> dict[str, Tensor]:
        """The added rows by module path, each (k, in_features), in the file's dtype."""
        count = self.expansion.extra_rank
        return {path: module.lora_A[-count:].clone() for path, module in self.modules.items()}


# ---- adapters and plans -----------------------------------------------------------------------------------------


def extra_rank(adapter: LoraAdapter) -> int:
    """Rows that were added to an adapter since it was read; 0 for one that was not expanded."""
    return adapter.expansion.extra_rank if isinstance(adapter, ExpandedAdapter) else 0


def expand_adapter(anchor: LoraAdapter, settings: BasisArguments, seed: int) -> ExpandedAdapter:
    """Add rows to every lora_A and zero columns to every lora_B of an adapter.

    The rows are random (Haar) in the orthogonal complement of the anchor's, the same for the same seed and path, and
    each has the mean norm of the anchor's rows. `fit_basis` gives them the size, and with `activations` the place,
    that belongs to real inputs.

    Args:
        anchor: the adapter as it was read.
        settings: `extra_rank` (at least 1) and `extra_basis`.
        seed: of the rows, at least 0.

    Returns:
        The expanded adapter, of the same scaling and dtypes. Its config has `lora_alpha` and patterns to go with the
        new ranks.

    Raises:
        AdapterError: a module has too few inputs for so high a rank; names it.
        ValueError: the settings are out of range.
    """
    settings.check_basis()
    count = settings.extra_rank
    # More rows than out_features are no waste while lora_A is frozen: they are what an update can react to.
    path, least = min(anchor.modules.items(), key=lambda item: item[1].in_features - item[1].rank)
    room = max(0, least.in_features - least.rank)
    if count > room:
        raise AdapterError(
            f"--extra_rank is {count}, but {path} of {anchor.name} has {least.in_features} input features and rank "
            f"{least.rank} already, so no more than {room} rows are orthogonal to its own; give at most {room}"
        )
    config = expanded_config(anchor, count)
    modules = {}
    # Silent for the first seconds, and on all ranks but the first.
    bar = tqdm(anchor.modules.items(), desc="Extra rank", delay=3, leave=False, disable=not is_main_process())
    for path, module in bar:
        rows = random_directions(module.lora_A, count, seed, path) * anchor_norm(module.lora_A)
        modules[path] = replace(
            _with_rows(module, rows),
            lora_B=torch.cat([module.lora_B, module.lora_B.new_zeros(module.out_features, count)], dim=1),
            scaling=rank_and_scaling(config, path)[1],
        )
    own = {item.name: getattr(anchor, item.name) for item in fields(LoraAdapter)}
    expansion = Expansion(count, settings.extra_basis, seed)
    return ExpandedAdapter(**{**own, "config": config, "modules": modules}, anchor=anchor, expansion=expansion)


def with_rows(adapter: ExpandedAdapter, rows: Mapping[str, Tensor], expansion: Expansion) -> ExpandedAdapter:
    """An expanded adapter with other extra rows.

    Args:
        adapter: the adapter.
        rows: (k, in_features) by module path; cast to the dtype of the module's lora_A.
        expansion: tells where they are from.
    """
    modules = {
        path: replace(
            _with_rows(adapter.anchor.modules[path], rows[path]), lora_B=module.lora_B, scaling=module.scaling
        )
        for path, module in adapter.modules.items()
    }
    return replace(adapter, modules=modules, expansion=expansion)


def plain_adapter(adapter: LoraAdapter) -> LoraAdapter:
    """An expanded adapter as one that was read from a file: its rank is its own then."""
    return LoraAdapter(**{item.name: getattr(adapter, item.name) for item in fields(LoraAdapter)})


def expand_plan(plan: AlignmentPlan, settings: BasisArguments, seed: int) -> AlignmentPlan:
    """The plan with its target expanded as the settings say; one whose target is expanded so already stays as it is.

    Raises:
        AdapterError: a module is too small; see `expand_adapter`.
        ValueError: the target was expanded otherwise, or the settings are out of range.
    """
    settings.check_basis()
    target = plan.target
    if isinstance(target, ExpandedAdapter):
        found = (target.expansion.extra_rank, target.expansion.extra_basis)
        wanted = (settings.extra_rank, settings.extra_basis)
        if found != wanted:
            raise UserError(
                f"the target of the plan was expanded with extra_rank, extra_basis {found}, the settings have "
                f"{wanted}; make the plan with the same settings"
            )
        return plan
    if settings.extra_rank == 0:
        return plan
    return with_target(plan, expand_adapter(target, settings, seed))


def with_target(plan: AlignmentPlan, target: LoraAdapter) -> AlignmentPlan:
    """The plan with the modules of another target, which has the same paths; ranks of groups follow it."""
    groups = {}
    for key, members in plan.groups.items():
        items = tuple(
            replace(item, target=replace(item.target, module=target.modules[item.target.module.path]))
            for item in members
        )
        groups[GroupKey(key.role, items[0].target.module.rank)] = items
    return replace(plan, target=target, groups=groups)


def _with_rows(module: LoraModule, rows: Tensor) -> LoraModule:
    return replace(module, lora_A=torch.cat([module.lora_A, rows.to(module.lora_A)]))


# ---- the config -------------------------------------------------------------------------------------------------


def expanded_config(anchor: LoraAdapter, count: int) -> dict[str, Any]:
    """`adapter_config.json` of an adapter whose every rank grows by `count`, with every module's scaling as it was.

    `lora_alpha` is what most modules need; the others are named in `alpha_pattern`, by role where all modules of a
    role need the same, else by path.
    """
    config = dict(anchor.config)
    alphas = {
        path: scaled_alpha(module.scaling, module.rank + count, config["use_rslora"])
        for path, module in anchor.modules.items()
    }
    default = Counter(alphas.values()).most_common(1)[0][0]
    by_role: dict[str, set[float]] = {}
    for path, alpha in alphas.items():
        by_role.setdefault(path.rpartition(".")[2], set()).add(alpha)
    pattern = {}
    for path, alpha in alphas.items():
        role = path.rpartition(".")[2]
        if by_role[role] != {default}:  # a role with several values is listed whole: the first match counts
            pattern[role if len(by_role[role]) == 1 else path] = alpha
    return config | {
        "r": config["r"] + count,
        "rank_pattern": {name: rank + count for name, rank in config["rank_pattern"].items()},
        "lora_alpha": default,
        "alpha_pattern": pattern,
    }


def set_ranks(config: LoraConfig, adapter: LoraAdapter) -> None:
    """Give PEFT's config of an adapter's file the ranks and alphas that the adapter has if it was expanded."""
    if isinstance(adapter, ExpandedAdapter):
        for name in ("r", "lora_alpha", "rank_pattern", "alpha_pattern"):
            setattr(config, name, adapter.config[name])


def scaled_alpha(scaling: float, rank: int, use_rslora: bool) -> float:
    """The `lora_alpha` that gives a scaling at a rank, exactly if a floating-point number does.

    Where none does in float64, the result is one that does in float32, in which PEFT applies it.
    """
    divisor = math.sqrt(rank) if use_rslora else rank
    alpha = scaling * divisor
    near = (alpha, math.nextafter(alpha, 0.0), math.nextafter(alpha, math.inf))
    best = min(near, key=lambda a: (np.float32(a / divisor) != np.float32(scaling), abs(a / divisor - scaling)))
    return int(best) if best.is_integer() else best


# ---- rows -------------------------------------------------------------------------------------------------------


def random_directions(A: Tensor, count: int, seed: int, path: str) -> Tensor:
    """Random orthonormal rows orthogonal to those of A: (count, in_features) float64, a stream per (seed, path)."""
    state = np.random.SeedSequence([seed, *path.encode()]).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(state))
    gaussian = torch.randn(count, A.shape[1], dtype=torch.float64, generator=generator)
    return orthogonal_rows(A, gaussian)


def orthogonal_rows(A: Tensor, directions: Tensor) -> Tensor:
    """Directions made orthonormal, in their order, and orthogonal to the rows of A.

    They are the last columns of Q in the (Householder) QR form of [A^T, directions^T]: orthonormal even where the rows
    of A are not independent. The signs are those of the directions.

    Args:
        A: (rank, in_features).
        directions: (count, in_features); rank + count is at most in_features.

    Returns:
        (count, in_features) float64.
    """
    stacked = torch.cat([A.to(directions.device).double(), directions.double()])
    Q, R = torch.linalg.qr(stacked.T)  # (in, rank + count), (rank + count, rank + count)
    signs = torch.where(R.diagonal() < 0, -1.0, 1.0)
    return (Q * signs)[:, A.shape[0] :].T.contiguous()


def anchor_norm(A: Tensor) -> float:
    """Mean norm of the rows of A; that of a new lora_A if they are all zero."""
    norm = float(A.double().norm(dim=1).mean())
    return norm if norm > 0 else _DEFAULT_NORM


def first_examples(dataset: Dataset | Sequence, device: torch.device) -> list[Tensor]:
    """Token ids of the first `BASIS_EXAMPLES` examples, each (1, tokens)."""
    count = min(BASIS_EXAMPLES, len(dataset))  # type: ignore[arg-type]
    return [torch.as_tensor(dataset[i]["input_ids"], device=device).unsqueeze(0) for i in range(count)]


def fit_basis(model: PeftModel, adapter: ExpandedAdapter, examples: Sequence[Tensor]) -> ExpandedAdapter:
    """Give the extra rows the size, and for `activations` the direction, that belongs to a model's real inputs.

    Each row gets the length at which its RMS over the inputs of its module is the mean RMS of the anchor's rows.
    `random` directions stay where `expand_adapter` put them: one pass. `activations` are the leading eigenvectors of
    the second moment of the inputs (not centred: LoRA does not centre them) in the orthogonal complement of the
    anchor's rows, found in three passes before that one: see `principal_directions`.

    All ranks together, each with the same examples; what rank 0 found counts.

    Args:
        model: the model with the adapter in place, as it is to be trained; it may be sharded. Not changed.
        adapter: the adapter.
        examples: token ids, each (1, tokens), on the model's device.

    Returns:
        The adapter with fitted rows, which are not in the model yet.

    Raises:
        ValueError: there are no examples, or inputs are not finite; names the module.
    """
    if not examples:
        raise UserError(
            "--extra_rank fits its rows to training data, but there are no examples; give some with --dataset_name"
        )
    count, seed = adapter.expansion.extra_rank, adapter.expansion.seed
    A = {path: module.lora_A for path, module in adapter.anchor.modules.items()}
    if adapter.expansion.extra_basis == "activations":
        directions = principal_directions(model, A, count, seed, examples)
    else:
        directions = {path: random_directions(rows, count, seed, path) for path, rows in A.items()}
    moments, tokens = second_moments(model, A, directions, examples)
    rows, unreached = {}, 0
    for path, unit in directions.items():
        lengths, missed = _row_lengths(A[path], (moments[path] / tokens).sqrt())
        unreached += missed
        rows[path] = broadcast((unit * lengths.unsqueeze(1)).float().to(examples[0].device)).cpu()
    expansion = replace(
        adapter.expansion, scaled_by=INPUTS, examples=len(examples), tokens=tokens, unreached=unreached
    )
    logger.info(
        "extra rank %d (%s): rows fitted to %d tokens of %d examples%s",
        count, expansion.extra_basis, tokens, len(examples),
        f"; {unreached} rows that no input reaches have the norm of the anchor's" if unreached else "",
    )  # fmt: skip
    return with_rows(adapter, rows, expansion)


def principal_directions(
    model: PeftModel, anchor_rows: Mapping[str, Tensor], count: int, seed: int, examples: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Leading eigenvectors of the inputs' second moment in the orthogonal complement of the anchor's rows.

    Randomized subspace iteration, then the Nystrom form (Halko, Martinsson, Tropp, arXiv 0909.4061, sections 4.5 and
    5.5): a pass over the data gives C Q for the second moment C and an orthonormal Q (in x (count + 8)), which is
    random in the first pass, and the C Q of the pass before, orthonormalized, in two more. Memory per module: two such
    matrices in float32.

    Args:
        model: see `fit_basis`.
        anchor_rows: (rank, in_features) by module path.
        count: wanted directions.
        seed: of the first Q.
        examples: see `fit_basis`.

    Returns:
        Orthonormal rows by module path, (count, in_features) float64 on the CPU, largest first.
    """
    width = {path: min(count + _OVERSAMPLING, A.shape[1] - A.shape[0]) for path, A in anchor_rows.items()}
    basis = {path: random_directions(A, width[path], seed, path) for path, A in anchor_rows.items()}
    products = _moment_times(model, basis, examples)
    _check_finite(products)
    for _ in range(_SKETCHES - 1):
        basis = {path: orthogonal_rows(A, products[path].cpu()) for path, A in anchor_rows.items()}
        products = _moment_times(model, basis, examples)
    return {
        path: orthogonal_rows(A, _nystrom(A, basis[path], products[path].cpu())[:count])
        for path, A in anchor_rows.items()
    }


def second_moments(
    model: PeftModel, anchor_rows: Mapping[str, Tensor], directions: Mapping[str, Tensor], examples: Sequence[Tensor]
) -> tuple[dict[str, Tensor], int]:
    """Sums of squares of a module's inputs along the anchor's rows and then some directions, in one pass.

    Returns:
        (rank + count,) float64 on the CPU by module path, and the number of tokens.
    """
    device = examples[0].device
    rows = {path: torch.cat([A.double(), directions[path]]).float().to(device) for path, A in anchor_rows.items()}
    sums = {path: torch.zeros(len(stack), dtype=torch.float64) for path, stack in rows.items()}

    def add(path: str, inputs: Tensor) -> None:
        sums[path] += (inputs @ rows[path].T).square().sum(0).cpu()  # not every device has float64

    tokens = _visit_inputs(model, list(rows), examples, add)
    _check_finite(sums)
    return sums, tokens


def _row_lengths(A: Tensor, rms: Tensor) -> tuple[Tensor, int]:
    """Length of every extra row, (count,), and how many of them are only those of the anchor's rows.

    Args:
        A: (rank, in_features).
        rms: (rank + count,) root mean squares of the inputs along the rows of A and the unit directions.
    """
    own, extra = rms[: A.shape[0]], rms[A.shape[0] :]
    largest = max(float((own / A.double().norm(dim=1).clamp_min(1e-300)).max()), float(extra.max()))
    reached = extra > _UNREACHED * largest
    wanted = float(own.mean())
    if wanted <= 0:  # a lora_A of zeros
        reached = torch.zeros_like(reached)
    lengths = torch.where(reached, wanted / extra.clamp_min(1e-300), anchor_norm(A))
    return lengths, int((~reached).sum())


def _moment_times(model: PeftModel, basis: Mapping[str, Tensor], examples: Sequence[Tensor]) -> dict[str, Tensor]:
    """Second moment (sum of x x^T over tokens) times the rows of a basis, (width, in_features) each, in one pass."""
    device = examples[0].device
    rows = {path: directions.float().to(device) for path, directions in basis.items()}
    products = {path: torch.zeros_like(directions) for path, directions in rows.items()}

    def add(path: str, inputs: Tensor) -> None:
        products[path].addmm_((inputs @ rows[path].T).T, inputs)  # (width, tokens) @ (tokens, in)

    _visit_inputs(model, list(rows), examples, add)
    return products


def _nystrom(A: Tensor, basis: Tensor, product: Tensor) -> Tensor:
    """Eigenvectors, largest first, of the Nystrom form Y (Q^T Y)^-1 Y^T of a positive semidefinite matrix.

    Args:
        A: (rank, in_features); the matrix is taken in the orthogonal complement of its rows.
        basis: Q^T, (width, in_features).
        product: Y^T = (C Q)^T, (width, in_features).

    Returns:
        (width, in_features) float64.
    """
    inside = torch.linalg.qr(A.double().T).Q  # (in, rank)
    Y = product.double()
    Y = Y - (Y @ inside) @ inside.T
    shift = torch.finfo(torch.float32).eps * Y.norm()  # the sums were taken in float32
    Y = Y + shift * basis
    core = Y @ basis.T
    values, vectors = torch.linalg.eigh((core + core.T) / 2)
    half = (vectors / values.clamp_min(shift.clamp_min(1e-300)).sqrt()).T @ Y
    return torch.linalg.svd(half, full_matrices=False).Vh


def _check_finite(sums: Mapping[str, Tensor]) -> None:
    for path, total in sums.items():
        if not total.isfinite().all():
            raise UserError(
                f"the inputs of {path} are not finite on the training data, so --extra_rank cannot be fitted to them; "
                "load the base in another --dtype (bfloat16 or float32)"
            )


def _visit_inputs(
    model: PeftModel, paths: Sequence[str], examples: Sequence[Tensor], visit: Callable[[str, Tensor], None]
) -> int:
    """Show every module's inputs, (tokens, in_features) float32, example by example; gives the number of tokens."""
    base: Any = model.get_base_model()
    hooks = []
    for path in paths:

        def show(module: nn.Module, args: tuple[Tensor, ...], path: str = path) -> None:
            inputs = args[0].detach().flatten(0, -2).float()
            with torch.autocast(inputs.device.type, enabled=False):  # the forward may be inside accelerate's
                visit(path, inputs)

        hooks.append(base.get_submodule(path).register_forward_pre_hook(show))
    # Silent for the first seconds, and on all ranks but the first.
    bar = tqdm(examples, desc="Extra rank: inputs", delay=3, leave=False, disable=not is_main_process())
    try:
        with torch.no_grad(), _evaluating(model):
            for ids in bar:
                model(input_ids=ids, attention_mask=torch.ones_like(ids))
    finally:
        for hook in hooks:
            hook.remove()
    return sum(ids.numel() for ids in examples)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def write_rows(folder: Path, adapter: LoraAdapter) -> None:
    """Write the extra rows of an adapter, and where they are from; nothing of one that was not expanded.

    Raises:
        OSError: the file cannot be written.
    """
    if not isinstance(adapter, ExpandedAdapter):
        return
    file = folder / BASIS_FILE
    partial = file.with_name(f"{file.name}.partial")
    try:
        expansion = json.dumps(adapter.expansion.to_dict())
        save_file(adapter.extra_rows(), partial, metadata={"format": "pt", "expansion": expansion})
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"{file} could not be written ({error})") from error
    partial.replace(file)


def read_rows(folder: str | Path, adapter: ExpandedAdapter) -> ExpandedAdapter:
    """The adapter with the extra rows that `write_rows` wrote.

    Raises:
        ValueError: the file is missing, damaged, or of another adapter.
    """
    file = Path(folder).absolute() / BASIS_FILE
    try:
        with safe_open(file, "pt") as content:
            rows = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
            recorded = json.loads((content.metadata() or {})["expansion"])
        expansion = Expansion(**{item.name: recorded[item.name] for item in fields(Expansion)})
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({error}); resume from another checkpoint") from error
    expected = {path: tuple(part.shape) for path, part in adapter.extra_rows().items()}
    if {path: tuple(part.shape) for path, part in rows.items()} != expected:
        raise UserError(f"{file} has other modules or shapes than the adapter; resume from another checkpoint")
    return with_rows(adapter, rows, expansion)
