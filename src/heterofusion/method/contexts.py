"""An alignment plan becomes tensors: blocks of A^T and B, their singular values, masks (METHOD: contexts).

Everything here is a constant of a fusion run and is computed once. The modules of one group form one padded batch:
M modules, at most N blocks each, of block_size b and rank r.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from heterofusion.adapters.alignment import AlignedSlice, AlignmentPlan, GroupKey, RoleSlice
from heterofusion.adapters.factors import canonical_factors
from heterofusion.adapters.lora import AdapterError
from heterofusion.method.expansion import extra_rank

LAYER_NORM_EPS = 1e-5


@dataclass(frozen=True)
class BlockSequences:
    """A padded batch of block sequences.

    Attributes:
        blocks: (M, N, b * r) float32, each block standardized to mean 0 and variance 1 (the fixed half of the
            encoder's LayerNorm).
        descriptors: (M, N, r) singular values of the blocks before standardizing, largest first.
        mask: (M, N) bool, True at real blocks; None if every sequence has N.
    """

    blocks: Tensor
    descriptors: Tensor
    mask: Tensor | None

    def to(self, device: torch.device) -> "BlockSequences":
        """The same on another device."""
        mask = None if self.mask is None else self.mask.to(device)
        return BlockSequences(self.blocks.to(device), self.descriptors.to(device), mask)

    def real_index(self) -> Tensor | None:
        """(K,) positions of the real blocks in the flattened (M * N) batch; None if all are real."""
        return None if self.mask is None else self.mask.flatten().nonzero().squeeze(1)


@dataclass(frozen=True)
class GroupContext:
    """All constants of one (role, rank) group.

    Attributes:
        key: the group.
        members: the aligned slices, in batch order.
        target: contexts of the target modules.
        source: contexts of the matched source modules, concatenated in the user's order.
        decode_index: (T,) positions, in the flattened (M * N) target batch, of the blocks that belong to B.
        b_blocks: per module, the number of B blocks; they sum to T.
        source_of_block: (M, N) index of the source adapter a source block comes from, -1 at padding.
        ragged: whether modules have different numbers of source blocks.
        padded_from: first of the zero columns that bring the sources to the rank of an expanded target; None without.
    """

    key: GroupKey
    members: tuple[AlignedSlice, ...]
    target: BlockSequences
    source: BlockSequences
    decode_index: Tensor
    b_blocks: tuple[int, ...]
    source_of_block: Tensor
    ragged: bool
    padded_from: int | None

    def to(self, device: torch.device) -> "GroupContext":
        """The same with its tensors on another device."""
        return replace(
            self,
            target=self.target.to(device),
            source=self.source.to(device),
            decode_index=self.decode_index.to(device),
            source_of_block=self.source_of_block.to(device),
        )


def cut_blocks(matrix: Tensor, block_size: int) -> Tensor:
    """Zero-pad the rows of a (rows, r) matrix and cut them into blocks: (ceil(rows / b), b, r)."""
    padding = -matrix.shape[0] % block_size
    return F.pad(matrix, (0, 0, 0, padding)).view(-1, block_size, matrix.shape[1])


def context_blocks(A: Tensor, B: Tensor, block_size: int) -> Tensor:
    """Context of a module: blocks of A^T, then blocks of B.

    Args:
        A: (r, in_features).
        B: (out_features, r).
        block_size: b.

    Returns:
        (ceil(in_features / b) + ceil(out_features / b), b, r) in float32.
    """
    return torch.cat([cut_blocks(A.float().T, block_size), cut_blocks(B.float(), block_size)])


def describe_blocks(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """What the encoder reads of raw blocks.

    Args:
        blocks: (..., b, r).

    Returns:
        Standardized blocks (..., b * r), flattened row-major, and descriptors (..., r).
    """
    descriptors = torch.linalg.svdvals(blocks.float())
    missing = blocks.shape[-1] - descriptors.shape[-1]  # only if b < r
    flat = blocks.float().flatten(-2)
    return F.layer_norm(flat, flat.shape[-1:], eps=LAYER_NORM_EPS), F.pad(descriptors, (0, missing))


def source_factors(
    source: RoleSlice, rank: int, target_scaling: float, canonicalize: bool
) -> tuple[Tensor, Tensor, float]:
    """A source slice at the target's rank, its scaling folded into B relative to the target's.

    Equal ranks without `canonicalize` keep the raw tensors, apart from the factor on B.

    Args:
        source: the slice.
        rank: the target module's rank.
        target_scaling: the target module's scaling, the unit that B comes in.
        canonicalize: write the scaled update in its canonical form at equal ranks too.

    Returns:
        A (rank, in), B (out, rank) in float32, and the truncated energy (0 unless the rank shrinks).

    Raises:
        AdapterError: the scaled B leaves float32.
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

    The extra rows of an expanded target stay as they are in its context, whatever the form of the anchor's own. Its
    sources come at the anchor's rank and are padded with zeros to that of the target.

    Args:
        plan: the alignment.
        block_size: b.
        canonicalize: replace each (A, B) by its canonical pair before cutting; the target's A and B themselves are
            not changed, and the predicted update is always one of its actual B.
    """
    extra = extra_rank(plan.target)
    return {
        key.name: _build_group(key, members, block_size, canonicalize, extra) for key, members in plan.groups.items()
    }


def predicted_blocks(plan: AlignmentPlan, block_size: int) -> dict[str, int]:
    """Blocks of B that each group's hypernetwork predicts, over all of its modules, by group name."""
    return {
        key.name: sum(-(-item.target.out_features // block_size) for item in members)
        for key, members in plan.groups.items()
    }


def sequence_lengths(plan: AlignmentPlan, block_size: int) -> dict[str, int]:
    """The longest block sequence of every group, from shapes alone."""

    def blocks(item: RoleSlice) -> int:
        return -(-item.module.in_features // block_size) - (-item.out_features // block_size)

    return {
        key.name: max(max(blocks(item.target), sum(blocks(source) for _, source in item.sources)) for item in members)
        for key, members in plan.groups.items()
    }


def _build_group(
    key: GroupKey, members: tuple[AlignedSlice, ...], block_size: int, canonicalize: bool, extra: int
) -> GroupContext:
    targets, sources, origins, b_blocks = [], [], [], []
    own = key.rank - extra  # of the anchor, that the sources come at
    for item in members:
        A, B = item.target.module.lora_A.float(), item.target.lora_B.float()
        if canonicalize:
            canonical_A, canonical_B, _ = canonical_factors(A[:own], B[:, :own])
            A, B = torch.cat([canonical_A, A[own:]]), torch.cat([canonical_B, B[:, own:]], dim=1)
        targets.append(context_blocks(A, B, block_size))
        b_blocks.append(-(-item.target.out_features // block_size))
        parts = []
        for index, source in item.sources:
            A, B, _ = source_factors(source, own, item.target.module.scaling, canonicalize)
            A, B = F.pad(A, (0, 0, 0, extra)), F.pad(B, (0, extra))  # (r + k, in), (out, r + k)
            parts.append(context_blocks(A, B, block_size))
            origins.append(torch.full((len(parts[-1]),), index))
        sources.append(torch.cat(parts))
    target_batch, source_batch = _pad(targets), _pad(sources)
    lengths = [len(blocks) for blocks in targets]
    width = target_batch.blocks.shape[1]
    decode_index = torch.cat(
        [
            torch.arange(row * width + length - count, row * width + length)
            for row, (length, count) in enumerate(zip(lengths, b_blocks, strict=True))
        ]
    )
    source_of_block = torch.full(source_batch.blocks.shape[:2], -1)
    real = source_batch.mask if source_batch.mask is not None else torch.ones_like(source_of_block, dtype=torch.bool)
    source_of_block[real] = torch.cat(origins)
    ragged = len({len(blocks) for blocks in sources}) > 1
    padded_from = own if extra else None
    return GroupContext(
        key, members, target_batch, source_batch, decode_index, tuple(b_blocks), source_of_block, ragged, padded_from
    )


def _pad(sequences: Sequence[Tensor]) -> BlockSequences:
    """Pad (N_i, b, r) blocks to one (M, N, b, r) batch and describe them."""
    lengths = torch.tensor([len(blocks) for blocks in sequences])
    batch = torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True)
    blocks, descriptors = describe_blocks(batch)
    mask = torch.arange(batch.shape[1]) < lengths.unsqueeze(1)
    return BlockSequences(blocks, descriptors, None if mask.all() else mask)
