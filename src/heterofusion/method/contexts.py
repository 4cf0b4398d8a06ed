"""An alignment plan becomes tensors: blocks of A^T and B, their singular values, masks (METHOD: contexts).

Everything here is a constant of a fusion and is computed once. The modules of one group form one padded batch:
M modules, at most N blocks each, of block_size b and rank r.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from heterofusion.adapters.alignment import AlignedSlice, AlignmentPlan, RoleSlice
from heterofusion.adapters.factors import canonical_factors
from heterofusion.adapters.lora import AdapterError
from heterofusion.method.expansion import extra_rank
from heterofusion.method.hypernet import HypernetworkInput

LAYER_NORM_EPS = 1e-5


@dataclass(frozen=True)
class GroupContext:
    """All constants of one (role, rank) group of M modules."""

    members: tuple[AlignedSlice, ...]  # in batch order
    inputs: HypernetworkInput  # what the group's hypernetwork reads
    target_mask: Tensor | None  # (M, N_t) bool, True at real blocks; None if all are
    real_blocks: tuple[Tensor | None, Tensor | None]  # positions of the real blocks of targets and sources, or None
    source_of_block: Tensor  # (M, N_s) index of the source adapter a source block comes from, -1 at padding
    b_blocks: tuple[int, ...]  # per module, the number of B blocks; they sum to T
    rows: tuple[Tensor | None, ...]  # per module, the rows that a role of a fused projection has in it, or None
    ragged: bool  # whether modules have different numbers of source blocks

    def to(self, device: torch.device) -> "GroupContext":
        """The same with its tensors on another device."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        members = values.pop("members")
        return GroupContext(members, **send_to_device(values, device))


def block_count(rows: int, block_size: int) -> int:
    """Blocks that a matrix of so many rows is cut into."""
    return -(-rows // block_size)


def cut_blocks(matrix: Tensor, block_size: int) -> Tensor:
    """Zero-pad the rows of a (rows, r) matrix and cut them into blocks: (ceil(rows / b), b, r)."""
    padding = -matrix.shape[0] % block_size
    return F.pad(matrix, (0, 0, 0, padding)).view(-1, block_size, matrix.shape[1])


def context_blocks(A: Tensor, B: Tensor, block_size: int) -> Tensor:
    """Context of a module, (N, b, r) in float32: blocks of A^T, then blocks of B (see METHOD 3)."""
    return torch.cat([cut_blocks(A.float().T, block_size), cut_blocks(B.float(), block_size)])


def describe_blocks(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """What the encoder reads of raw blocks, (..., b, r).

    Gives the blocks (..., b * r), flattened row-major and standardized to mean 0 and variance 1 (the fixed half of the
    encoder's LayerNorm), and descriptors (..., r): singular values, largest first.
    """
    descriptors = torch.linalg.svdvals(blocks.float())
    missing = blocks.shape[-1] - descriptors.shape[-1]  # only if b < r
    flat = blocks.float().flatten(-2)
    return F.layer_norm(flat, flat.shape[-1:], eps=LAYER_NORM_EPS), F.pad(descriptors, (0, missing))


def source_factors(
    source: RoleSlice, rank: int, target_scaling: float, canonicalize: bool
) -> tuple[Tensor, Tensor, float]:
    """A source slice at the target's rank, its scaling folded into B relative to the target's: A, B, truncated energy.

    Equal ranks keep the raw tensors, apart from the factor on B, unless `canonicalize` asks for the canonical form.
    """
    A, B = source.module.lora_A.float(), source.lora_B.float()
    scale = source.module.scaling / target_scaling
    if not torch.isfinite(B * scale).all():
        raise AdapterError(
            f"{source.module.path}: its update times {scale:g} (scaling {source.module.scaling:g} over the target's "
            f"{target_scaling:g}) is beyond float32; check lora_alpha of both adapters"
        )
    if canonicalize:
        return canonical_factors(A, B.double() * scale, rank)
    truncated = 0.0
    if source.module.rank != rank:
        A, B, truncated = canonical_factors(A, B, rank)
    return A, B * scale, truncated


def build_contexts(plan: AlignmentPlan, block_size: int, canonicalize: bool = False) -> dict[str, GroupContext]:
    """Contexts of every group of a plan, by group name.

    `canonicalize` replaces each (A, B) by its canonical pair; the predicted update is always one of the actual B. The
    extra rows of an expanded target stay; its sources come at the anchor's rank and are padded with zeros to its own.
    """
    extra = extra_rank(plan.target)
    return {
        key.name: _build_group(members, key.rank - extra, extra, block_size, canonicalize)
        for key, members in plan.groups.items()
    }


def predicted_blocks(plan: AlignmentPlan, block_size: int) -> dict[str, int]:
    """Blocks of B that each group's hypernetwork predicts, over all of its modules, by group name."""
    return {
        key.name: sum(block_count(item.target.out_features, block_size) for item in members)
        for key, members in plan.groups.items()
    }


def sequence_lengths(plan: AlignmentPlan, block_size: int) -> dict[str, int]:
    """The longest block sequence of every group, from shapes alone."""

    def blocks(item: RoleSlice) -> int:
        return block_count(item.module.in_features, block_size) + block_count(item.out_features, block_size)

    return {
        key.name: max(max(blocks(item.target), sum(blocks(source) for _, source in item.sources)) for item in members)
        for key, members in plan.groups.items()
    }


def _build_group(
    members: tuple[AlignedSlice, ...], own: int, extra: int, block_size: int, canonicalize: bool
) -> GroupContext:
    """Constants of a group whose modules have rank `own`, at which sources come, and so many extra rows."""
    targets, sources, origins = [], [], []
    for item in members:
        A, B = item.target.module.lora_A.float(), item.target.lora_B.float()
        if canonicalize:
            canonical_A, canonical_B, _ = canonical_factors(A[:own], B[:, :own])
            A, B = torch.cat([canonical_A, A[own:]]), torch.cat([canonical_B, B[:, own:]], dim=1)
        targets.append(context_blocks(A, B, block_size))
        parts = []
        for index, source in item.sources:
            A, B, _ = source_factors(source, own, item.target.module.scaling, canonicalize)
            A, B = F.pad(A, (0, 0, 0, extra)), F.pad(B, (0, extra))  # (r + k, in), (out, r + k)
            parts.append(context_blocks(A, B, block_size))
            origins.append(torch.full((len(parts[-1]),), index))
        sources.append(torch.cat(parts))
    (target, target_mask), (sources_batch, source_mask) = _pad(targets), _pad(sources)
    b_blocks = tuple(block_count(item.target.out_features, block_size) for item in members)
    positions = torch.arange(target.shape[0] * target.shape[1]).view(target.shape[:2])
    decode_index = [
        row[len(blocks) - count : len(blocks)] for row, blocks, count in zip(positions, targets, b_blocks, strict=True)
    ]
    blocks, descriptors = describe_blocks(torch.cat([target.flatten(0, 1), sources_batch.flatten(0, 1)]))
    padded_from = own if extra else None
    inputs = HypernetworkInput(
        blocks, descriptors, len(members), target.shape[1], source_mask, torch.cat(decode_index), padded_from
    )
    lengths = [len(blocks) for blocks in sources]
    return GroupContext(
        members,
        inputs,
        target_mask,
        real_blocks=(_real_index(target_mask), _real_index(source_mask)),
        source_of_block=pad_sequence(torch.cat(origins).split(lengths), batch_first=True, padding_value=-1),
        b_blocks=b_blocks,
        rows=tuple(item.target.rows for item in members),
        ragged=len(set(lengths)) > 1,
    )


def _pad(sequences: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Pad (N_i, b, r) blocks to one (M, N, b, r) batch, with its (M, N) mask if anything was padded."""
    lengths = torch.tensor([len(blocks) for blocks in sequences])
    mask = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)
    return pad_sequence(list(sequences), batch_first=True), None if mask.all() else mask


def _real_index(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.flatten().nonzero().squeeze(1)
