"""Extra rows that fit real inputs: their size, and with `--extra_basis activations` where they lie.

Every pass runs examples through the model one by one, without padding and without gradient, with hooks on the LoRA
modules. Only sums are kept: second moments along a few directions, never a covariance (in x in) of a module.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate.utils import broadcast
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import TrainerCallback

from heterofusion.method.expansion import (
    INPUTS,
    ExpandedAdapter,
    anchor_norm,
    orthogonal_rows,
    random_directions,
    with_rows,
)
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.ranks import is_main_process

logger = logging.getLogger(__name__)

BASIS_EXAMPLES = 64  # of the training data: some thousand tokens, where a rank has some tens of directions
_OVERSAMPLING = 8  # directions of the sketch beside the wanted ones
_SKETCHES = 3  # passes over the examples
_UNREACHED = 1e-5  # of the largest RMS; below it is the rounding of float32


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


def sample_examples(dataset: Dataset | Sequence, seed: int, device: torch.device) -> list[Tensor]:
    """Token ids of `BASIS_EXAMPLES` examples drawn from all of a data set, each (1, tokens); the same for a seed.

    A data set may come in parts, such as replay and then source labels: its first examples would be of one alone.
    """
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))  # type: ignore[arg-type]
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
        directions = {path: random_directions(rows, count, seed, path) for path, rows in A.items()}
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
    return with_rows(adapter, rows, expansion)


def _principal_directions(
    model: PeftModel, anchor_rows: Mapping[str, Tensor], count: int, seed: int, examples: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Leading eigenvectors of the inputs' second moment in the orthogonal complement of the anchor's rows.

    Randomized subspace iteration, then the Nystrom form (Halko, Martinsson, Tropp, arXiv 0909.4061, sections 4.5 and
    5.5): a pass over the data gives C Q for the second moment C and an orthonormal Q (in x (count + 8)), which is
    random in the first pass, and the C Q of the pass before, orthonormalized, in two more. Memory per module: two such
    matrices in float32. Gives orthonormal rows, (count, in_features) float64 on the CPU, largest first.
    """
    width = {path: min(count + _OVERSAMPLING, A.shape[1] - A.shape[0]) for path, A in anchor_rows.items()}
    basis = {path: random_directions(A, width[path], seed, path) for path, A in anchor_rows.items()}
    products, _ = _moments(model, basis, examples)
    for _ in range(_SKETCHES - 1):
        basis = {path: orthogonal_rows(A, products[path]) for path, A in anchor_rows.items()}
        products, _ = _moments(model, basis, examples)
    return {
        path: orthogonal_rows(A, _nystrom(A, basis[path], products[path])[:count]) for path, A in anchor_rows.items()
    }


def _moments(
    model: PeftModel, directions: Mapping[str, Tensor], examples: Sequence[Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One pass over the inputs x of every module, with some directions for each, (width, in_features).

    Returns:
        The second moment (sum of x x^T over tokens) times the directions, (width, in_features) float32, and the sums
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
    # Silent for the first seconds, and on all ranks but the first.
    bar = tqdm(examples, desc="Extra rank: inputs", delay=3, leave=False, disable=not is_main_process())
    try:
        with torch.no_grad():
            for ids in bar:
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
    reached = extra > _UNREACHED * largest
    wanted = float(own.mean())
    if wanted <= 0:  # a lora_A of zeros
        reached = torch.zeros_like(reached)
    lengths = torch.where(reached, wanted / extra.clamp_min(1e-300), anchor_norm(A))
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
