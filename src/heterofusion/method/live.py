"""The updates of a fusion while it trains: predicted, scaled by alpha, and live where every lora_B computes.

The forward of a module's `lora_B` gives `(B + U) x`, with `U = alpha * dB`, and with a residual scale c a free update
beside it, `alpha * dB + c * R`. The update stays in place until the next forward, so activation checkpointing
recomputes with the same one.
"""

import contextlib
import time
from collections.abc import Iterator
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from heterofusion.method.hypernet import HypernetworkOutput
from heterofusion.method.predictor import BlockPredictor
from heterofusion.runtime.sharding import is_sharded


class LiveUpdates:
    """Updates of every aligned module of one model.

    Attributes:
        by_module: the updates U by module path, each (out_features, rank) float32; `LiveLinear` reads it.
        average_over_ranks: whether `close_window` averages the updates' gradients over all ranks, so that those of
            the hypernetworks need no reduction: every rank computes the same from it.
        finite: per group, whether the gradient of the last closed window was finite: (,) bool, on the device.
        finite_updates: the same of the updates that the last training forward predicted.
        seconds: wall-clock time of the hypernetworks' training forwards (on a GPU, of launching them) since its reader
            set it to 0.
    """

    def __init__(self, predictor: BlockPredictor, by_module: dict[str, Tensor]) -> None:
        self.predictor = predictor
        self.by_module = by_module
        self.average_over_ranks = False
        self.finite: dict[str, Tensor] = {}
        self.finite_updates: dict[str, Tensor] = {}
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
        outputs = self.predictor.predict()
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
        networks = self.predictor.networks
        if is_sharded(networks):  # gathering and freeing change pointers, and not on all ranks alike
            return ("sharded",)
        return tuple((id(p), p._version, p.data_ptr()) for p in networks.parameters())

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
                outputs = self.predictor.predict()
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
        self.by_module.update(self.predictor.module_updates(updates))

    def rdm(self, step: int) -> Tensor:
        """RDM of the last prediction with gradients on that were not collected, see `BlockPredictor.rdm`."""
        return self.predictor.rdm(self._outputs, step)


class LiveLinear(nn.Linear):
    """A `lora_B` with the same weight, under the same name, that adds a live update where there is one: B x + dB x.

    In float32 the two weights are added first, which saves a product in forward and two in backward; in lower
    precision the sum would round small updates away.
    """

    def __init__(self, lora_B: nn.Linear, path: str, by_module: dict[str, Tensor]) -> None:
        super().__init__(lora_B.in_features, lora_B.out_features, bias=False, device="meta")
        self.weight = lora_B.weight
        self._path = path
        self._by_module = by_module
        self.train(lora_B.training)

    def forward(self, x: Tensor) -> Tensor:
        update = self._by_module.get(self._path)
        if update is None:
            return super().forward(x)
        if x.dtype == self.weight.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type):
            return F.linear(x, self.weight + update)
        return super().forward(x) + F.linear(x, update.to(x))
