"""The hypernetwork: encoder with an SVD-guided gate, cross-attention, decoder (METHOD section "Hypernetwork").

Notation: M modules, N_t target and N_s source blocks, b block size, r rank, e embedding width, h heads.

Two forms share gate, positions and attention. `paper` reads and writes a block through dense b*r x e matrices, so
its size grows with the rank. `compact` factorizes them: rows go through one b x k matrix and columns through one
r x m matrix, both shared by all roles, so its size hardly depends on the rank.

Whatever holds a parameter here is a module that uses it in its own forward: engines that shard gather by module.
"""

from collections.abc import Mapping
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heterofusion.method.config import HypernetworkConfig


class HypernetworkInput(NamedTuple):
    """What one hypernetwork reads. Blocks of target and sources are one batch, so that each matrix is used once."""

    blocks: Tensor  # (M * N_t + M * N_s, b * r), standardized; those of the target first
    descriptors: Tensor  # (M * N_t + M * N_s, r) singular values
    modules: int  # M
    target_length: int  # N_t
    source_mask: Tensor | None = None  # (M, N_s) bool, True at real blocks; None if all are
    decode_index: Tensor | None = None  # (T,) positions in the flattened (M * N_t) batch to decode; None for all
    padded_from: int | None = None  # from this column on those of a source block are equal, as sources were padded

    def split(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Cut a batch like `blocks` into that of the target, (M, N_t, ...), and that of the sources, (M, N_s, ...)."""
        target, source = batch.split(self.lengths())
        return target.unflatten(0, (self.modules, -1)), source.unflatten(0, (self.modules, -1))

    def lengths(self) -> tuple[int, int]:
        """Blocks of the target and of the sources in the batch: M * N_t and M * N_s."""
        first = self.modules * self.target_length
        return first, len(self.blocks) - first


class HypernetworkOutput(NamedTuple):
    """What one hypernetwork gives back; what may be None is given for diagnostics."""

    update: Tensor  # (T, b, r) alpha times the predicted blocks, and the free ones, in the order of `decode_index`
    target_embedding: Tensor  # (M, N_t, e), before positions
    source_embedding: Tensor  # (M, N_s, e), before positions
    attention: Tensor | None = None  # (M, N_t, N_s) averaged over heads
    source_gate: Tensor | None = None  # (M, N_s, e) in [0, 1]
    alpha: Tensor | None = None  # (1,)


def _linear(inputs: int, outputs: int, bias: bool = True, kind: type[nn.Linear] = nn.Linear) -> nn.Linear:
    layer = kind(inputs, outputs, bias=bias)
    nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def _zero_linear(inputs: int, outputs: int) -> nn.Linear:
    """A layer of zeros: predictions start at 0, so training starts from the target adapter exactly."""
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _cat(parts: list[Tensor]) -> Tensor:
    """Join along the first dimension; one part alone is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class SharedFactors(nn.Module):
    """Row and column projections of the compact form, shared by all roles (columns by all groups of one rank)."""

    def __init__(self, ranks: set[int], config: HypernetworkConfig) -> None:
        super().__init__()
        b, k, m = config.block_size, config.row_features, config.column_features
        self.rows_in = _linear(b, k)
        self.rows_out = _linear(k, b, bias=False)
        self.columns_in = nn.ModuleDict({str(rank): _linear(rank, m, kind=ColumnProjection) for rank in sorted(ranks)})
        self.columns_out = nn.ModuleDict({str(rank): _linear(m, rank, bias=False) for rank in sorted(ranks)})


class ColumnProjection(nn.Linear):
    """Columns of a block from r to m."""

    def forward(self, columns: Tensor) -> Tensor:
        """(..., c, k) to (..., m, k); where c < r, the last column stands for itself and all that are missing."""
        weight = self.weight  # (m, r)
        count = columns.shape[-2]
        if count < self.in_features:
            weight = torch.cat([weight[:, : count - 1], weight[:, count - 1 :].sum(1, keepdim=True)], dim=1)
        return weight @ columns + self.bias.unsqueeze(1)


class DenseFeatures(nn.Module):
    """Feature of a block by its row view and its column view: GELU(W x + c) + GELU(W' x' + c').

    x' is x with its (b, r) entries in column-major order. W' is stored with its columns in row-major order, so both
    views are one matrix product.
    """

    def __init__(self, rank: int, config: HypernetworkConfig) -> None:
        super().__init__()
        size, e = config.block_size * rank, config.embed_dim
        self.norm_weight = nn.Parameter(torch.ones(size))  # the affine half of the input LayerNorm
        self.norm_bias = nn.Parameter(torch.zeros(size))
        self.views = nn.Linear(size, 2 * e)
        for half in self.views.weight.detach().split(e):
            nn.init.xavier_uniform_(half)
        nn.init.zeros_(self.views.bias)

    def forward(self, inputs: HypernetworkInput, shared: SharedFactors | None) -> Tensor:
        row, column = self.views(inputs.blocks * self.norm_weight + self.norm_bias).chunk(2, dim=-1)  # (..., e) each
        return F.gelu(row) + F.gelu(column)


class FactorizedFeatures(nn.Module):
    """Feature of a block of the compact form: rows to k, columns to m, then dense k*m to e."""

    def __init__(self, rank: int, config: HypernetworkConfig) -> None:
        super().__init__()
        self.rank = rank
        self.mix = _linear(config.row_features * config.column_features, config.embed_dim)

    def forward(self, inputs: HypernetworkInput, shared: SharedFactors) -> Tensor:
        columns = inputs.blocks.unflatten(-1, (-1, self.rank)).transpose(-1, -2)  # (K, r, b)
        parts = [columns]
        if inputs.padded_from is not None and inputs.padded_from + 1 < self.rank:
            target, source = columns.split(inputs.lengths())
            parts = [target, source[:, : inputs.padded_from + 1]]  # one column stands for all that are padded
        rows = F.gelu(shared.rows_in(_cat([part.flatten(0, 1) for part in parts])))  # of all columns: (., k)
        split = rows.split([part.shape[0] * part.shape[1] for part in parts])
        project = shared.columns_in[str(self.rank)]
        mixed = [project(own.unflatten(0, part.shape[:2])) for own, part in zip(split, parts, strict=True)]
        return F.gelu(self.mix(F.gelu(_cat(mixed)).flatten(-2)))  # (K, m, k) to (K, e)


class Decoder(nn.Module):
    """Embedding to a delta block: a dense e x b*r matrix, or a (k, m) core that shared factors expand to (b, r)."""

    def __init__(self, rank: int, config: HypernetworkConfig) -> None:
        super().__init__()
        compact = config.form == "compact"
        self.rank = rank
        self.columns = config.column_features if compact else rank
        self.hidden = _linear(config.embed_dim, config.embed_dim)
        self.output = _zero_linear(
            config.embed_dim, (config.row_features if compact else config.block_size) * self.columns
        )

    def forward(self, z: Tensor, shared: SharedFactors | None) -> Tensor:
        blocks = self.output(F.gelu(self.hidden(z))).unflatten(-1, (-1, self.columns))  # (..., b, r) or (..., k, m)
        if shared is None:
            return blocks
        core = shared.columns_out[str(self.rank)](blocks).transpose(-1, -2)  # (..., r, k)
        return shared.rows_out(core).transpose(-1, -2)  # (..., b, r)


class PositionTable(nn.Module):
    """Learned embeddings of positions."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(length, width))

    def forward(self, length: int) -> Tensor:
        """The first `length` rows, (length, e)."""
        return self.weight[:length]


class FreeUpdate(nn.Module):
    """Blocks of updates that depend on no adapter."""

    def __init__(self, blocks: int, rank: int, config: HypernetworkConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(blocks, config.block_size, rank))

    def forward(self, update: Tensor, scale: float) -> Tensor:
        """Add the blocks, (T, b, r), to those that were predicted."""
        return update + scale * self.weight


class HyperNetwork(nn.Module):
    """Predicts the blocks of a target module's B update from the target's and the sources' blocks.

    With a `residual_scale` c above 0 an update is alpha * dB + c * R, where R (T = `blocks` blocks, at first 0) is
    trained freely. Adam's steps do not depend on the scale of a gradient: R moves c times the learning rate.
    """

    def __init__(self, rank: int, config: HypernetworkConfig, alpha_init: float = 0.3, blocks: int = 0) -> None:
        super().__init__()
        e = config.embed_dim
        compact = config.form == "compact"
        self.num_heads = config.num_heads
        self.mu_gate = config.mu_gate
        self.features = FactorizedFeatures(rank, config) if compact else DenseFeatures(rank, config)
        self.gate = nn.Sequential(_linear(rank, e // 4), nn.ReLU(), _linear(e // 4, e))
        self.fusion_norm = nn.LayerNorm(e)
        self.positions = PositionTable(config.max_position_embeddings, e)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (_linear(e, e) for _ in range(4))
        self.decoder = Decoder(rank, config)
        # shape (1,): FSDP2 refuses 0-dimensional parameters
        self.alpha = nn.Parameter(torch.full((1,), float(alpha_init)))
        self.residual_scale = config.residual_scale
        self.residual = FreeUpdate(blocks, rank, config) if blocks and config.residual_scale else None

    def encode(self, inputs: HypernetworkInput, shared: SharedFactors | None) -> tuple[Tensor, Tensor]:
        """Embedding and gate of the blocks, each (M * N_t + M * N_s, e)."""
        gate = torch.clamp(torch.relu(self.gate(inputs.descriptors) + self.mu_gate), 0.0, 1.0)
        return self.fusion_norm(self.features(inputs, shared) * gate), gate

    def forward(
        self, inputs: HypernetworkInput, shared: SharedFactors | None = None, diagnostics: bool = False
    ) -> HypernetworkOutput:
        """Predict delta blocks, and for `diagnostics` also give attention map, source gate and alpha."""
        embedding, gate = self.encode(inputs, shared)
        z_target, z_source = (z.clone() for z in inputs.split(embedding))  # FSDP2 takes no views for outputs
        queries = self._heads(self.q_proj(z_target + self.positions(z_target.shape[1])))
        located = z_source + self.positions(z_source.shape[1])
        keys, values = self._heads(self.k_proj(located)), self._heads(self.v_proj(located))
        mask = None if inputs.source_mask is None else inputs.source_mask[:, None, None, :]  # (M, 1, 1, N_s)
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)  # (M, h, N_t, e / h)
        mixed = mixed.transpose(1, 2).flatten(0, 1).flatten(-2)  # (M * N_t, e)
        if inputs.decode_index is not None:
            mixed = mixed[inputs.decode_index]
        update = self.alpha * self.decoder(self.out_proj(mixed), shared)
        if self.residual is not None:
            update = self.residual(update, self.residual_scale)
        output = HypernetworkOutput(update, z_target, z_source)
        if not diagnostics:
            return output
        scores = queries @ keys.transpose(-1, -2) * queries.shape[-1] ** -0.5  # (M, h, N_t, N_s)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        attention = scores.softmax(dim=-1).mean(dim=1)
        return output._replace(
            attention=attention, source_gate=inputs.split(gate)[1], alpha=self.alpha.detach().clone()
        )

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (M, h, N, e / h)


class HyperNetworks(nn.Module):
    """A hypernetwork with its alpha per group, and what the compact form shares; from every group's rank by name."""

    def __init__(
        self,
        ranks: Mapping[str, int],
        config: HypernetworkConfig,
        alpha_init: float = 0.3,
        blocks: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.shared = SharedFactors(set(ranks.values()), config) if config.form == "compact" else None
        blocks = blocks or {}
        self.networks = nn.ModuleDict(
            {name: HyperNetwork(rank, config, alpha_init, blocks.get(name, 0)) for name, rank in ranks.items()}
        )

    def forward(
        self, groups: Mapping[str, HypernetworkInput], diagnostics: bool = False
    ) -> dict[str, HypernetworkOutput]:
        """Run all hypernetworks, in float32 whatever autocast is on; see `HyperNetwork.forward`."""
        device = next(iter(groups.values())).blocks.device
        with torch.autocast(device.type, enabled=False):
            return {
                name: network(groups[name], shared=self.shared, diagnostics=diagnostics)
                for name, network in self.networks.items()
            }

    @property
    def alphas(self) -> dict[str, Tensor]:
        """Every alpha, (1,), by group name."""
        return {name: cast("HyperNetwork", network).alpha for name, network in self.networks.items()}
