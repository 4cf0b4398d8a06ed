"""The updates of a fusion while it trains: predicted, scaled by alpha, and installed where the hooks read them.

The update of a module is an activation: a forward hook on its `lora_B` gives `lora_B(x) + F.linear(x, alpha * dB)`. It
stays in place until the next forward, so activation checkpointing recomputes with the same update.
"""

import contextlib
import time
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heterofusion.config import MethodConfig
from heterofusion.contexts import GroupContext
from heterofusion.hypernet import HypernetworkOutput, HyperNetworks
from heterofusion.rdm import rdm_loss


class LiveUpdates:
    """Updates of every aligned module of one model.

    Args:
        networks: the hypernetworks; they stay the model's.
        contexts: constants of every group, by group name.
        method: settings of RDM.
        seed: seed of RDM's draws.

    Attributes:
        by_module: the installed updates `alpha * dB` by module path, each (out_features, rank) float32.
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
        self.seconds = 0.0
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
        updates = self._scale(outputs)
        if live and self._closing:
            self._hand_over_window(updates)
        self._install(updates)
        self._outputs = outputs if live else {}
        if live:
            self.seconds += time.perf_counter() - start

    def invalidate(self) -> None:
        """Compute the updates anew at the next forward: parameters changed in a way that torch does not count.

        In-place operations are noticed; `.data`, fused optimizers and copies into flat buffers are not.
        """
        self._cached_versions = None

    def _parameter_versions(self) -> tuple:
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
        """The forward in here also hands over what `collect_gradients` added up."""
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
                updates = self._scale(self.predict())
            self._leaves = {name: update.detach().requires_grad_() for name, update in updates.items()}
            self.seconds += time.perf_counter() - start
        return self._leaves

    def _hand_over_window(self, updates: dict[str, Tensor]) -> None:
        """Add the gradients collected in this window to those that the live updates will get."""
        for name, leaf in self._leaves.items():
            if leaf.grad is not None:
                updates[name].register_hook(partial(torch.add, leaf.grad))
        self._leaves = {}

    def _install(self, updates: dict[str, Tensor]) -> None:
        self.by_module.clear()
        self.by_module.update(self._module_deltas(updates))

    def predict(self, diagnostics: bool = False) -> dict[str, HypernetworkOutput]:
        """Run every hypernetwork, in float32.

        Args:
            diagnostics: also give attention maps and gates.
        """
        networks = self.networks
        device = next(networks.parameters()).device
        outputs = {}
        with torch.autocast(device.type, enabled=False):
            for name, context in self._placed_contexts(device).items():
                outputs[name] = networks.networks[name](
                    context.target.blocks,
                    context.target.descriptors,
                    context.source.blocks,
                    context.source.descriptors,
                    context.source.mask,
                    context.decode_index,
                    shared=networks.shared,
                    diagnostics=diagnostics,
                )
        return outputs

    def _placed_contexts(self, device: torch.device) -> dict[str, GroupContext]:
        if any(context.decode_index.device != device for context in self.contexts.values()):
            self.contexts = {name: context.to(device) for name, context in self.contexts.items()}
        return self.contexts

    def _scale(self, outputs: dict[str, HypernetworkOutput]) -> dict[str, Tensor]:
        """`alpha * dB` of every group as blocks, (T, b, r)."""
        return {name: self.networks.alphas[name] * output.delta for name, output in outputs.items()}

    def _module_deltas(self, updates: dict[str, Tensor]) -> dict[str, Tensor]:
        deltas: dict[str, Tensor] = {}
        for name, update in updates.items():
            context = self.contexts[name]
            for item, blocks in zip(context.members, update.split(context.b_blocks), strict=True):
                rows = blocks.flatten(0, 1)[: item.target.out_features]  # (out, r): padded rows dropped
                path = item.target.module.path
                if item.target.rows is None:
                    deltas[path] = rows
                else:  # a role of a fused projection
                    whole = rows.new_zeros(item.target.module.out_features, rows.shape[1])
                    part = whole.index_copy(0, item.target.rows.to(rows.device), rows)
                    deltas[path] = deltas[path] + part if path in deltas else part
        return deltas

    def rdm(self, step: int) -> Tensor:
        """RDM of the last live prediction: mean over groups of target and source terms. Same draws on all ranks."""
        total = next(self.networks.parameters()).new_zeros(())
        method = self.method
        with torch.autocast(total.device.type, enabled=False):
            for index, (name, output) in enumerate(self._outputs.items()):
                context = self.contexts[name]
                generator = torch.Generator(total.device).manual_seed(_mix(self.seed, step, index))
                for z, mask in (
                    (output.target_embedding, context.target.mask),
                    (output.source_embedding, context.source.mask),
                ):
                    total = total + rdm_loss(
                        z,
                        mu=method.rdm_mu,
                        sigma=method.rdm_sigma,
                        num_projections=method.rdm_projections,
                        generator=generator,
                        mask=mask,
                        per_module=context.ragged,
                    )
        return total / len(self._outputs)

    def hook(self, path: str, lora_B: nn.Module) -> torch.utils.hooks.RemovableHandle:
        """Add the update of a module to the output of its `lora_B`."""
        by_module = self.by_module

        def add_update(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            update = by_module.get(path)
            return output if update is None else output + F.linear(args[0], update.to(args[0]))

        return lora_B.register_forward_hook(add_update)


def _mix(seed: int, step: int, index: int) -> int:
    """One generator seed of (seed, optimizer step, group), far apart for neighbours."""
    return (seed * 1_000_003 + step * 10_007 + index * 101 + 17) % (2**63)
