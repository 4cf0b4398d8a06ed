"""The updates of a fusion while it trains: predicted, scaled by alpha, and installed where every lora_B reads its own.

The forward of a module's `lora_B` gives `(B + U) x`, with `U = alpha * dB`, and with a residual scale c a free update
beside it, `alpha * dB + c * R`. The update stays in place until the next forward, so
activation checkpointing recomputes with the same one.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from heterofusion.method.config import MethodConfig
from heterofusion.method.contexts import GroupContext
from heterofusion.method.hypernet import HypernetworkInput, HypernetworkOutput, HyperNetworks
from heterofusion.method.rdm import rdm_loss
from heterofusion.runtime.sharding import is_sharded


@dataclass(frozen=True)
class _Constants:
    """Constants of one group on the hypernetworks' device.

    Attributes:
        inputs: what its hypernetwork reads.
        real_blocks: positions of the real target and source blocks, for RDM over all modules as one set.
        rows: per module, the rows that a role of a fused projection has in it; None if it has them all.
    """

    inputs: HypernetworkInput
    real_blocks: tuple[Tensor | None, Tensor | None]
    rows: tuple[Tensor | None, ...]


class LiveUpdates:
    """Updates of every aligned module of one model.

    Args:
        networks: the hypernetworks; they stay the model's.
        contexts: constants of every group, by group name.
        method: settings of RDM.
        seed: seed of RDM's draws.

    Attributes:
        by_module: the installed updates U by module path, each (out_features, rank) float32.
        device: where the hypernetworks run, if that is not where their parameters lie: engines may offload those.
        average_over_ranks: whether `close_window` averages the updates' gradients over all ranks, so that those of
            the hypernetworks need no reduction: every rank computes the same from it.
        finite: per group, whether the gradient of the last closed window was finite: (,) bool, on the device.
        finite_updates: the same of the updates that the last training forward predicted.
        seconds: wall-clock time of the hypernetworks' training forwards so far (on a GPU, of launching them); reset
            by whoever reads it.
    """

    def __init__(
        self, networks: HyperNetworks, contexts: dict[str, GroupContext], method: MethodConfig, seed: int
    ) -> None:
        self.networks = networks
        self.contexts = contexts
        self.method = method
        self.seed = seed
        self.by_module: dict[str, Tensor] = {}
        self.device: torch.device | None = None
        self.average_over_ranks = False
        self.finite: dict[str, Tensor] = {}
        self.finite_updates: dict[str, Tensor] = {}
        self.seconds = 0.0
        self._constants: dict[str, _Constants] = {}
        self._placed_on: torch.device | None = None
        self._cached_versions: tuple | None = None
        self._outputs: dict[str, HypernetworkOutput] = {}
        self._leaves: dict[str, Tensor] = {}
        self._collecting = False
        self._closing = False

    def refresh(self) -> None:
        """Compute the updates: with their graph where gradients are on, else once until a parameter changes."""
        live = torch.is_grad_enabled()
        if live and self._collecting:
            self._cached_versions = None
            self._install(self._leaf_updates())
            return
        versions = None if live else self._parameter_versions()
        if versions is not None and versions == self._cached_versions:
            return
        self._cached_versions = versions
        start = time.perf_counter()
        outputs = self.predict()
        updates = {name: output.update for name, output in outputs.items()}
        if live and self._closing:
            self._hand_over_window(updates)
        self._install(updates)
        self._outputs = outputs if live else {}
        if live:
            self.finite_updates = {name: update.detach().isfinite().all() for name, update in updates.items()}
            self.seconds += time.perf_counter() - start

    def invalidate(self) -> None:
        """Compute the updates anew at the next forward: parameters changed in a way that torch does not count.

        In-place operations are noticed; `.data`, fused optimizers, sharded parameters and copies into flat buffers
        are not.
        """
        self._cached_versions = None

    def _parameter_versions(self) -> tuple:
        if is_sharded(self.networks):  # gathering and freeing change pointers, and not on all ranks alike
            return ("sharded",)
        return tuple((id(p), p._version, p.data_ptr()) for p in self.networks.parameters())

    @contextlib.contextmanager
    def collect_gradients(self) -> Iterator[None]:
        """Forwards in here use one detached copy of the updates, whose gradient adds up over their backwards.

        A forward in `close_window` gives the sum to the hypernetworks, in the one backward that they need: the
        updates depend on the parameters alone, so by linearity this equals a backward per micro-batch.
        """
        self._collecting = True
        try:
            yield
        finally:
            self._collecting = False

    @contextlib.contextmanager
    def close_window(self) -> Iterator[None]:
        """The forward in here also hands over what `collect_gradients` added up, averaged over ranks if asked for."""
        self._closing = True
        try:
            yield
        finally:
            self._closing = False

    def discard_gradients(self) -> None:
        """Forget what `collect_gradients` added up (of a window that was not finished)."""
        self._leaves.clear()

    def _leaf_updates(self) -> dict[str, Tensor]:
        if not self._leaves:
            start = time.perf_counter()
            with torch.no_grad():
                outputs = self.predict()
            self._leaves = {name: output.update.detach().requires_grad_() for name, output in outputs.items()}
            self.seconds += time.perf_counter() - start
        return self._leaves

    def _hand_over_window(self, updates: dict[str, Tensor]) -> None:
        """Let the window's gradient flow into the live updates, in place of that of its last micro-batch."""
        for name, update in updates.items():
            leaf = self._leaves.get(name)
            update.register_hook(partial(self._window_gradient, name, None if leaf is None else leaf.grad))
        self._leaves = {}

    def _window_gradient(self, name: str, collected: Tensor | None, last: Tensor) -> Tensor:
        """Gradient of a group's updates over the whole window (and all ranks), (T, b, r)."""
        total = last.clone() if collected is None else last + collected
        if self.average_over_ranks:
            dist.all_reduce(total)
            total /= dist.get_world_size()
        self.finite[name] = total.isfinite().all()
        return total

    def _install(self, updates: dict[str, Tensor]) -> None:
        self.by_module.clear()
        self.by_module.update(self._module_deltas(updates))

    def predict(self, diagnostics: bool = False) -> dict[str, HypernetworkOutput]:
        """Run every hypernetwork, in float32. Where parameters are sharded, all ranks must call this together.

        Args:
            diagnostics: also give attention maps and gates.
        """
        constants = self._placed()
        return self.networks({name: constant.inputs for name, constant in constants.items()}, diagnostics)

    def _placed(self) -> dict[str, _Constants]:
        """The constants on the device of the hypernetworks, moved there once."""
        device = self.device or next(self.networks.parameters()).device
        if device != self._placed_on:
            self.contexts = {name: context.to(device) for name, context in self.contexts.items()}
            self._constants = {}
            for name in self.contexts:
                self.contexts[name], self._constants[name] = _joined(self.contexts[name])
            self._placed_on = device
        return self._constants

    def _module_deltas(self, updates: dict[str, Tensor]) -> dict[str, Tensor]:
        deltas: dict[str, Tensor] = {}
        for name, update in updates.items():
            context = self.contexts[name]
            parts = zip(context.members, update.split(context.b_blocks), self._constants[name].rows, strict=True)
            for item, blocks, rows in parts:
                part = blocks.flatten(0, 1)[: item.target.out_features]  # (out, r): padded rows dropped
                path = item.target.module.path
                if rows is not None:  # a role of a fused projection
                    whole = part.new_zeros(item.target.module.out_features, part.shape[1])
                    part = whole.index_copy(0, rows, part)
                deltas[path] = deltas[path] + part if path in deltas else part
        return deltas

    def rdm(self, step: int) -> Tensor:
        """RDM of the last live prediction: mean over groups of target and source terms. Same draws on all ranks.

        Raises:
            RuntimeError: there was no live prediction: gradients are off, or are being collected.
        """
        if not self._outputs:
            raise RuntimeError("RDM needs a forward with gradients on; leave rdm_step out of this one")
        total = torch.zeros((), device=self._placed_on)
        method = self.method
        with torch.autocast(total.device.type, enabled=False):
            for index, (name, output) in enumerate(self._outputs.items()):
                context = self.contexts[name]
                generator = torch.Generator(total.device).manual_seed(_mix(self.seed, step, index))
                for z, mask, real in (
                    (output.target_embedding, context.target.mask, self._constants[name].real_blocks[0]),
                    (output.source_embedding, context.source.mask, self._constants[name].real_blocks[1]),
                ):
                    if not context.ragged:  # all modules as one set
                        z, mask = z.flatten(0, 1) if real is None else z.flatten(0, 1)[real], None
                        z = z.unsqueeze(0)  # (1, K, e)
                    total = total + rdm_loss(
                        z,
                        mu=method.rdm_mu,
                        sigma=method.rdm_sigma,
                        num_projections=method.rdm_projections,
                        generator=generator,
                        mask=mask,
                    )
        return total / len(self._outputs)

    def install(self, path: str, lora_B: nn.Module) -> "InstalledUpdate":
        """Add the update of a module to what its `lora_B` computes."""
        return InstalledUpdate(lora_B, path, self.by_module)


class InstalledUpdate:
    """The update of one module in the forward of its `lora_B`: B x + dB x.

    In float32 the two weights are added first, which saves a product in forward and two in backward; in lower
    precision the sum would round small updates away.

    Args:
        lora_B: the module, without bias.
        path: of the LoRA module that it belongs to.
        by_module: the updates, read at every forward.
    """

    def __init__(self, lora_B: nn.Module, path: str, by_module: dict[str, Tensor]) -> None:
        self._lora_B = lora_B
        plain = lora_B.forward

        def forward(x: Tensor) -> Tensor:
            update = by_module.get(path)
            if update is None:
                return plain(x)
            weight: Tensor = lora_B.weight  # type: ignore[assignment]
            if x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type):
                return F.linear(x, weight + update)
            return plain(x) + F.linear(x, update.to(x))

        lora_B.forward = forward

    def remove(self) -> None:
        """Give the module its own forward again."""
        del self._lora_B.forward


def _joined(context: GroupContext) -> tuple[GroupContext, _Constants]:
    """The context with its tensors as views of one batch, and what the hypernetwork reads of it."""
    device = context.decode_index.device
    target, source = context.target, context.source
    inputs = HypernetworkInput(
        torch.cat([target.blocks.flatten(0, 1), source.blocks.flatten(0, 1)]),
        torch.cat([target.descriptors.flatten(0, 1), source.descriptors.flatten(0, 1)]),
        target.blocks.shape[0],
        target.blocks.shape[1],
        source.mask,
        context.decode_index,
        context.padded_from,
    )
    blocks, descriptors = inputs.split(inputs.blocks), inputs.split(inputs.descriptors)
    views = [
        replace(part, blocks=blocks[index], descriptors=descriptors[index])
        for index, part in enumerate((target, source))
    ]
    rows = tuple(None if item.target.rows is None else item.target.rows.to(device) for item in context.members)
    constants = _Constants(inputs, (target.real_index(), source.real_index()), rows)
    return replace(context, target=views[0], source=views[1]), constants


def _mix(seed: int, step: int, index: int) -> int:
    """One generator seed of (seed, optimizer step, group), far apart for neighbours."""
    return (seed * 1_000_003 + step * 10_007 + index * 101 + 17) % (2**63)
