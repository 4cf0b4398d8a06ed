"""Extra rank: a target adapter of rank r gets k more rows of lora_A, so that training can leave its row space.

A fusion changes lora_B alone, so what it learns lies in the row space of the anchor's lora_A. `--extra_rank k` adds k
rows to every lora_A, orthogonal to the anchor's and to each other, whose columns of lora_B are zero: the expanded
adapter computes what the anchor computes, the first r rows keep their bits and their scaling, and it is still a plain
LoRA adapter. How large the rows are, and with `--extra_basis activations` where they lie, is then fitted to the inputs
that the modules see on training data. k = 0 is the published method.
"""

import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import TrainerCallback

from heterofusion.adapters.alignment import AlignmentPlan, GroupKey
from heterofusion.adapters.config import AdapterError, rank_and_scaling
from heterofusion.adapters.lora import LoraAdapter
from heterofusion.method.config import BasisArguments
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.ranks import is_main_process

logger = logging.getLogger(__name__)

ANCHOR_NORM, INPUTS = "norm of the anchor's rows", "inputs"
BASIS_FILE = "extra_rows.safetensors"  # in a checkpoint: a resumed run has the rows of the run that it goes on with
BASIS_EXAMPLES = 64  # of the training data: some thousand tokens, where a rank has some tens of directions
_DEFAULT_NORM = 3**-0.5  # mean norm of a row of PEFT's first lora_A: uniform up to 1 / sqrt(in_features)
_OVERSAMPLING = 8  # directions of the sketch beside the wanted ones
_SKETCHES = 3  # passes over the examples
_UNREACHED = 1e-5  # of the largest RMS; below it is the rounding of float32


@dataclass(frozen=True)
class Expansion:
    """What was added to every module of an adapter, and on how many examples and tokens it was fitted."""

    extra_rank: int
    extra_basis: str
    seed: int
    scaled_by: str = ANCHOR_NORM
    examples: int = 0
    tokens: int = 0
    unreached: int = 0  # rows that no input reached; they have the anchor's norm

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class ExpandedAdapter(LoraAdapter):
    """An adapter with extra rows; name, folder, file and `sha256` are those of the anchor, as it was read."""

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

    def with_rows(self, rows: Mapping[str, Tensor], expansion: Expansion) -> "ExpandedAdapter":
        """The same with other extra rows, (k, in_features) by module path."""
        return _expanded(self.anchor, rows, expansion)


def extra_rank(adapter: LoraAdapter) -> int:
    """Rows that were added to an adapter since it was read; 0 for one that was not expanded."""
    return adapter.expansion.extra_rank if isinstance(adapter, ExpandedAdapter) else 0


# ---- an expanded adapter ----------------------------------------------------------------------------------------


def expand_adapter(anchor: LoraAdapter, settings: BasisArguments, seed: int) -> ExpandedAdapter:
    """Add rows to every lora_A and zero columns to every lora_B of an adapter; scalings and dtypes stay.

    The rows are random (Haar) in the orthogonal complement of the anchor's, the same for the same seed and path, and
    each has the mean norm of the anchor's rows, until `fit_basis` fits them.
    """
    count = settings.extra_rank
    # More rows than out_features are no waste while lora_A is frozen: they are what an update can react to.
    path, least = min(anchor.modules.items(), key=lambda item: item[1].in_features - item[1].rank)
    room = max(0, least.in_features - least.rank)
    if count > room:
        raise AdapterError(
            f"--extra_rank is {count}, but {path} of {anchor.name} has {least.in_features} input features and rank "
            f"{least.rank} already, so no more than {room} rows are orthogonal to its own; give at most {room}"
        )
    rows = {
        path: _random_directions(module.lora_A, count, seed, path) * _anchor_norm(module.lora_A)
        for path, module in _progress(anchor.modules.items(), "Extra rank")
    }
    return _expanded(anchor, rows, Expansion(count, settings.extra_basis, seed))


def _progress(items: Any, what: str) -> tqdm:
    """A bar that is silent for the first seconds, and on all ranks but the first."""
    return tqdm(items, desc=what, delay=3, leave=False, disable=not is_main_process())


def _expanded(anchor: LoraAdapter, rows: Mapping[str, Tensor], expansion: Expansion) -> ExpandedAdapter:
    config = _expanded_config(anchor, expansion.extra_rank)
    modules = {
        path: replace(
            module,
            lora_A=torch.cat([module.lora_A, rows[path].to(module.lora_A)]),
            lora_B=torch.cat([module.lora_B, module.lora_B.new_zeros(module.out_features, len(rows[path]))], dim=1),
            scaling=rank_and_scaling(config, path)[1],
        )
        for path, module in anchor.modules.items()
    }
    own = {item.name: getattr(anchor, item.name) for item in fields(LoraAdapter)}
    return ExpandedAdapter(**own | {"config": config, "modules": modules}, anchor=anchor, expansion=expansion)


def _expanded_config(anchor: LoraAdapter, count: int) -> dict[str, Any]:
    """The adapter's config with every rank larger by `count` and every module's scaling as it was.

    `lora_alpha` is what most modules need; the others are named in `alpha_pattern`.
    """
    config = dict(anchor.config)
    alphas = {
        path: _scaled_alpha(module.scaling, module.rank + count, config["use_rslora"])
        for path, module in anchor.modules.items()
    }
    default = Counter(alphas.values()).most_common(1)[0][0]
    return config | {
        "r": config["r"] + count,
        "rank_pattern": {name: rank + count for name, rank in config["rank_pattern"].items()},
        "lora_alpha": default,
        "alpha_pattern": {path: alpha for path, alpha in alphas.items() if alpha != default},
    }


def _scaled_alpha(scaling: float, rank: int, use_rslora: bool) -> float:
    """The `lora_alpha` that gives a scaling at a rank: exactly in float32, in which PEFT applies it, if not in 64."""
    divisor = math.sqrt(rank) if use_rslora else rank
    alpha = scaling * divisor
    near = (alpha, math.nextafter(alpha, 0.0), math.nextafter(alpha, math.inf))
    best = min(near, key=lambda a: (np.float32(a / divisor) != np.float32(scaling), abs(a / divisor - scaling)))
    return int(best) if best.is_integer() else best


def set_ranks(config: LoraConfig, adapter: LoraAdapter) -> None:
    """Give PEFT's config of an adapter's file the ranks and alphas that the adapter has if it was expanded."""
    if isinstance(adapter, ExpandedAdapter):
        for name in ("r", "lora_alpha", "rank_pattern", "alpha_pattern"):
            setattr(config, name, adapter.config[name])


def expand_plan(plan: AlignmentPlan, settings: BasisArguments, seed: int) -> AlignmentPlan:
    """The plan with its target expanded as the settings say, unless it is expanded already."""
    if settings.extra_rank == 0 or isinstance(plan.target, ExpandedAdapter):
        return plan
    return with_target(plan, expand_adapter(plan.target, settings, seed))


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


def write_rows(folder: Path, adapter: LoraAdapter) -> None:
    """Write the extra rows of an adapter, and where they are from; nothing of one that was not expanded."""
    if isinstance(adapter, ExpandedAdapter):
        metadata = {"format": "pt", "expansion": json.dumps(adapter.expansion.to_dict())}
        save_file(adapter.extra_rows(), folder / BASIS_FILE, metadata)


def read_rows(folder: str | Path, adapter: ExpandedAdapter) -> ExpandedAdapter:
    """The adapter with the extra rows that `write_rows` wrote."""
    file = Path(folder).absolute() / BASIS_FILE
    try:
        with safe_open(file, "pt") as content:
            rows = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
            return adapter.with_rows(rows, Expansion(**json.loads(content.metadata()["expansion"])))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read ({error}); resume from another checkpoint") from error


# ---- directions -------------------------------------------------------------------------------------------------


def _random_directions(A: Tensor, count: int, seed: int, path: str) -> Tensor:
    """Random orthonormal rows orthogonal to those of A: (count, in_features) float64, a stream per (seed, path)."""
    state = np.random.SeedSequence([seed, *path.encode()]).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(state))
    gaussian = torch.randn(count, A.shape[1], dtype=torch.float64, generator=generator)
    return _orthogonal_rows(A, gaussian)


def _orthogonal_rows(A: Tensor, directions: Tensor) -> Tensor:
    """Directions made orthonormal, in their order, and orthogonal to the rows of A: (count, in_features) float64.

    They are the last columns of Q in the (Householder) QR form of [A^T, directions^T]: orthonormal even where the rows
    of A are not independent. The signs are those of the directions.
    """
    stacked = torch.cat([A.to(directions.device).double(), directions.double()])
    Q, R = torch.linalg.qr(stacked.T)  # (in, rank + count), (rank + count, rank + count)
    signs = torch.where(R.diagonal() < 0, -1.0, 1.0)
    return (Q * signs)[:, A.shape[0] :].T.contiguous()


def _anchor_norm(A: Tensor) -> float:
    """Mean norm of the rows of A; that of a new lora_A if they are all zero."""
    return float(A.double().norm(dim=1).mean()) or _DEFAULT_NORM


# ---- the fit to inputs: examples one by one, hooks on the modules, and sums only, never a covariance (in x in) --


class FitBasis(TrainerCallback):
    """Fits the extra rows when training begins, on a sample of its data: all engines are in place then.

    A run that resumes has its rows from the checkpoint.
    """

    def __init__(self, fit: Callable[[Sequence[Tensor]], None], dataset: Any) -> None:
        self.fit = fit
        self.dataset = dataset

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.fit(sample_examples(self.dataset, args.seed, args.device))


def sample_examples(dataset: Any, seed: int, device: torch.device) -> list[Tensor]:
    """Token ids of `BASIS_EXAMPLES` examples drawn from all of a data set, each (1, tokens); the same for a seed.

    A data set may come in parts, such as replay and then source labels: its first examples would be of one alone.
    """
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    chosen = order[:BASIS_EXAMPLES].sort().values.tolist()
    return [torch.as_tensor(dataset[i]["input_ids"], device=device).unsqueeze(0) for i in chosen]


def fit_basis(model: PeftModel, adapter: ExpandedAdapter, examples: Sequence[Tensor]) -> ExpandedAdapter:
    """The adapter with extra rows of the size, and for `activations` the direction, that belongs to real inputs.

    Each row gets the length at which its RMS over the inputs of its module is the mean RMS of the anchor's rows.
    `random` directions stay where `expand_adapter` put them: one pass. `activations` are the leading eigenvectors of
    the second moment of the inputs (not centred: LoRA does not centre them) in the orthogonal complement of the
    anchor's rows, found in three passes before that one.

    All ranks together, each with the same examples, token ids of (1, tokens) each; what rank 0 found counts. The
    model, with the adapter in place as it is to be trained, may be sharded; it is not changed.
    """
    count, seed = adapter.expansion.extra_rank, adapter.expansion.seed
    A = {path: module.lora_A for path, module in adapter.anchor.modules.items()}
    if adapter.expansion.extra_basis == "activations":
        directions = _principal_directions(model, A, count, seed, examples)
    else:
        directions = {path: _random_directions(rows, count, seed, path) for path, rows in A.items()}
    tokens = sum(ids.numel() for ids in examples)
    rows, unreached = {}, 0
    stacked = {path: torch.cat([A[path].double(), unit]) for path, unit in directions.items()}
    for path, squares in _moments(model, stacked, examples)[1].items():
        lengths, missed = _row_lengths(A[path], (squares / tokens).sqrt())
        unreached += missed
        unit = directions[path] * lengths.unsqueeze(1)
        rows[path] = broadcast(unit.float().to(examples[0].device)).cpu()
    expansion = replace(
        adapter.expansion, scaled_by=INPUTS, examples=len(examples), tokens=tokens, unreached=unreached
    )
    logger.info(
        "extra rank %d (%s): rows fitted to %d tokens of %d examples%s",
        count, expansion.extra_basis, tokens, len(examples),
        f"; {unreached} rows that no input reaches have the norm of the anchor's" if unreached else "",
    )  # fmt: skip
    return adapter.with_rows(rows, expansion)


def _principal_directions(
    model: PeftModel, anchor_rows: Mapping[str, Tensor], count: int, seed: int, examples: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Leading eigenvectors of the inputs' second moment in the orthogonal complement of the anchor's rows.

    Randomized subspace iteration, then the Nystrom form (Halko, Martinsson, Tropp, arXiv 0909.4061, sections 4.5 and
    5.5): a pass over the data gives C Q for the second moment C and an orthonormal Q (in x (count + 8)), which is
    random in the first pass, and the C Q of the pass before, orthonormalized, in two more. Gives orthonormal rows,
    (count, in_features) float64 on the CPU, largest first.
    """
    width = {path: min(count + _OVERSAMPLING, A.shape[1] - A.shape[0]) for path, A in anchor_rows.items()}
    basis = {path: _random_directions(A, width[path], seed, path) for path, A in anchor_rows.items()}
    products, _ = _moments(model, basis, examples)
    for _ in range(_SKETCHES - 1):
        basis = {path: _orthogonal_rows(A, products[path]) for path, A in anchor_rows.items()}
        products, _ = _moments(model, basis, examples)
    return {
        path: _orthogonal_rows(A, _nystrom(A, basis[path], products[path])[:count]) for path, A in anchor_rows.items()
    }


def _moments(
    model: PeftModel, directions: Mapping[str, Tensor], examples: Sequence[Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One pass over the inputs x of every module, with some directions for each, (width, in_features).

    Gives the second moment (sum of x x^T over tokens) times the directions, (width, in_features) float32, and the sums
    of squares along them, (width,) float64; on the CPU.
    """
    device = examples[0].device
    rows = {path: each.float().to(device) for path, each in directions.items()}
    products = {path: torch.zeros_like(each) for path, each in rows.items()}
    squares = {path: torch.zeros(len(each), dtype=torch.float64) for path, each in rows.items()}

    def show(path: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs = args[0].detach().flatten(0, -2).float()
        with torch.autocast(inputs.device.type, enabled=False):  # the forward may be inside accelerate's
            along = inputs @ rows[path].T  # (tokens, width)
            products[path].addmm_(along.T, inputs)
            squares[path] += along.square().sum(0).cpu()  # not every device has float64

    base: Any = model.get_base_model()
    hooks = [base.get_submodule(path).register_forward_pre_hook(partial(show, path)) for path in rows]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for ids in _progress(examples, "Extra rank: inputs"):
                model(input_ids=ids, attention_mask=torch.ones_like(ids))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    for path, total in squares.items():
        if not total.isfinite().all():
            raise UserError(
                f"the inputs of {path} are not finite on the training data, so --extra_rank cannot be fitted to them; "
                "load the base in another --dtype (bfloat16 or float32)"
            )
    return {path: product.cpu() for path, product in products.items()}, squares


def _row_lengths(A: Tensor, rms: Tensor) -> tuple[Tensor, int]:
    """Length of every extra row, (count,), and how many of them are only those of the anchor's rows.

    `rms` are root mean squares of the inputs along the rows of A and then the unit directions, (rank + count,).
    """
    own, extra = rms[: A.shape[0]], rms[A.shape[0] :]
    largest = max(float((own / A.double().norm(dim=1).clamp_min(1e-300)).max()), float(extra.max()))
    wanted = float(own.mean())  # 0 for a lora_A of zeros
    reached = (extra > _UNREACHED * largest) & (wanted > 0)
    lengths = torch.where(reached, wanted / extra.clamp_min(1e-300), _anchor_norm(A))
    return lengths, int((~reached).sum())


def _nystrom(A: Tensor, basis: Tensor, product: Tensor) -> Tensor:
    """Eigenvectors, largest first, of the Nystrom form Y (Q^T Y)^-1 Y^T of C in the complement of the rows of A.

    `basis` is Q^T and `product` Y^T = (C Q)^T; all are (width, in_features), and so is the result, float64.
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
