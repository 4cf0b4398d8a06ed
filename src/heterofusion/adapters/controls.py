"""Source controls: what a fusion gives when its sources hold nothing, or the wrong thing, in the right shapes.

`score(real sources) - score(noise sources)`, over several seeds, is what the sources contributed to a fusion.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from heterofusion.adapters.config import AdapterError
from heterofusion.adapters.lora import LoraAdapter, LoraModule
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.ranks import is_main_process

logger = logging.getLogger(__name__)

SOURCE_CONTROLS = {
    "noise": "the tensors of source adapters were replaced by random directions of the same norms and spectra",
    "shuffle": "the tensors of source adapters were moved to other modules of the same shapes",
    "zero": "the tensors of source adapters were replaced by zeros",
}


def control_sources(sources: Sequence[LoraAdapter], kind: str, seed: int) -> list[LoraAdapter]:
    """Sources with other tensors, for the control of a fusion; everything else of them stays, and so do their hashes.

    - `noise`: every module's update is rotated at random, `B' = P B` and `A' = A O` with Haar-random orthogonal P
      (out x out) and O (in x in) of its own. Shapes, dtypes, scalings, norms and the singular values of A, B and B A
      stay, so re-factoring cuts the same energy; directions, and with them all that the source had learned, are gone.
    - `shuffle`: within each source a random permutation without fixed points among modules whose A and B have the
      same shapes, whatever their role and layer. A, B and scaling move together. A module alone in its shapes stays.
    - `zero`: A and B are zero.

    The same arguments give the same tensors on any device and rank. Exports of the result say that they are controls,
    and cannot be pushed.

    Args:
        sources: the source adapters, in the order of the fusion; each has a random stream of its own.
        kind: `noise`, `shuffle` or `zero`.
        seed: of the random draws, at least 0; `zero` has none.

    Returns:
        One adapter per source, whose `control` says what was done, such as `noise, seed 42`.

    Raises:
        UserError: unknown kind, a seed that is none, or a source that is a control already.
        AdapterError: a source without two modules of the same shapes cannot be shuffled.
    """
    if kind not in SOURCE_CONTROLS:
        raise UserError(f"source control {kind!r} is unknown; choose one of {', '.join(SOURCE_CONTROLS)}")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise UserError(f"the seed of the source control is {seed!r}; give an integer of at least 0")
    for source in sources:
        if source.control is not None:
            raise UserError(f"source {source.name} is a control already ({source.control}); give it as it was read")
    control = kind if kind == "zero" else f"{kind}, seed {seed}"
    controlled = []
    # Silent for the first seconds, and on all ranks but the first.
    bar = tqdm(sources, desc=f"Source control {kind}", delay=3, leave=False, disable=not is_main_process())
    for index, source in enumerate(bar):
        # a stream of its own for each (seed, source), on the CPU: the same wherever the fusion runs
        state = np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0]))
        if kind == "shuffle":
            modules = _shuffled(source, generator)
        else:
            modules = {path: _changed(module, kind, generator) for path, module in source.modules.items()}
        controlled.append(replace(source, modules=modules, control=control))
    logger.info("source control: %s", describe_control(control))
    return controlled


def control_record(sources: Sequence[LoraAdapter]) -> str | None:
    """The control among sources as ONE string, such as `noise, seed 42`; None if all are what their files hold."""
    return "+".join(dict.fromkeys(source.control for source in sources if source.control)) or None


def control_kind(control: str | None) -> str | None:
    """A control without its seed: `noise`."""
    return None if control is None else "+".join(part.partition(",")[0] for part in control.split("+"))


def describe_control(control: str) -> str:
    """A control of sources in words."""
    kinds = (control_kind(control) or "").split("+")
    return f"{'; '.join(SOURCE_CONTROLS[kind] for kind in kinds)} ({control})"


def _changed(module: LoraModule, kind: str, generator: torch.Generator) -> LoraModule:
    if kind == "zero":
        return replace(module, lora_A=torch.zeros_like(module.lora_A), lora_B=torch.zeros_like(module.lora_B))
    A = rotate_rows(module.lora_A.T, generator).T.contiguous()
    return replace(module, lora_A=A, lora_B=rotate_rows(module.lora_B, generator))


def rotate_rows(matrix: Tensor, generator: torch.Generator) -> Tensor:
    """A matrix times a Haar-random orthogonal matrix from the left, which is never formed.

    With the thin QR form `M = Q R` the product is `Q' R`, where Q' is a Haar-random orthonormal frame: the Q of a
    Gaussian matrix, once the diagonal of its R is made positive (Mezzadri, arXiv math-ph/0609050). R, and so every
    inner product of columns, stays.

    Args:
        matrix: (rows, columns).
        generator: of the CPU.

    Returns:
        (rows, columns) in the dtype of the matrix; the work is done in float64.
    """
    R = torch.linalg.qr(matrix.double(), mode="r").R  # (k, columns), k = min(rows, columns)
    gaussian = torch.randn(matrix.shape[0], R.shape[0], dtype=torch.float64, generator=generator)
    frame, triangle = torch.linalg.qr(gaussian)  # (rows, k), (k, k)
    frame = frame * torch.where(triangle.diagonal() < 0, -1.0, 1.0)
    return (frame @ R).to(matrix.dtype)


def _shuffled(source: LoraAdapter, generator: torch.Generator) -> dict[str, LoraModule]:
    """Modules with the tensors of others of the same shapes; those that have no other stay."""
    classes: dict[tuple[torch.Size, torch.Size], list[str]] = {}
    for path, module in source.modules.items():
        classes.setdefault((module.lora_A.shape, module.lora_B.shape), []).append(path)
    alone = [paths[0] for paths in classes.values() if len(paths) == 1]
    if len(alone) == len(source.modules):
        raise AdapterError(
            f"source {source.name} cannot be shuffled: no two of its {len(alone)} modules have the same shapes; "
            "choose noise or zero"
        )
    if alone:
        logger.warning(
            "source %s: %d of %d modules stay, no other has their shapes, such as %s",
            source.name, len(alone), len(source.modules), alone[0],
        )  # fmt: skip
    moved: dict[str, LoraModule] = {}
    for paths in classes.values():
        order = derangement(len(paths), generator) if len(paths) > 1 else [0]
        moved |= {path: replace(source.modules[paths[i]], path=path) for path, i in zip(paths, order, strict=True)}
    return {path: moved[path] for path in source.modules}


def derangement(count: int, generator: torch.Generator) -> list[int]:
    """A permutation of 0 .. count - 1 without fixed points, all of them equally likely; count is at least 2.

    Permutations are drawn until one has none: each has none with a probability of about 1/e.
    """
    while True:
        order = torch.randperm(count, generator=generator).tolist()
        if all(index != place for place, index in enumerate(order)):
            return order
