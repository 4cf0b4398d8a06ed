"""Losses and gradients that are not finite: noticed on the device without waiting for it, told with step and role."""

from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from heterofusion.method.hypernet import HyperNetworks
from heterofusion.runtime.errors import UserError


class NonFiniteError(UserError):
    """A loss, gradient or weight that is not finite."""


def gradient_norms(hypernetworks: HyperNetworks) -> dict[str, Tensor]:
    """L2 norms of the gradients by group (and of `shared` factors); empty where an engine holds them in parts."""
    parts: dict[str, nn.Module] = dict(hypernetworks.networks.items())
    if hypernetworks.shared is not None:
        parts["shared"] = hypernetworks.shared
    norms = {}
    for name, part in parts.items():
        gradients = [parameter.grad for parameter in part.parameters() if parameter.grad is not None]
        if not gradients or any(isinstance(gradient, DTensor) for gradient in gradients):
            return {}
        norms[name] = get_total_norm(gradients)
    return norms


class FiniteGuard:
    """Remembers the first optimizer step at which something was not finite, on the device.

    `first_bad` waits for the device: call it at logging steps and before anything is kept.
    """

    def __init__(self, groups: Sequence[str]) -> None:
        self.groups = tuple(groups)
        self.forget()

    def forget(self) -> None:
        """Start anew."""
        self._first: Tensor | None = None  # (3 + 2 * groups,): its step or -1, then what was bad at it

    def note(
        self,
        step: int,
        loss: Tensor,
        grad_norm: Tensor | float | None,
        finite: Mapping[str, Tensor],
        finite_updates: Mapping[str, Tensor],
    ) -> None:
        """Look at an optimizer step, counted from 1: the window's loss, and the gradients' norm if it is known.

        `finite` tells of every group, as far as known, whether its gradient was; `finite_updates` the same of the
        updates that it predicted.
        """
        good = torch.ones((), dtype=torch.bool, device=loss.device)
        norm = good if grad_norm is None else torch.as_tensor(grad_norm, device=loss.device).isfinite()
        parts = [each.get(name, good).to(loss.device) for each in (finite, finite_updates) for name in self.groups]
        flags = ~torch.stack([loss.detach().isfinite().view(()), norm.view(()), *parts])
        found = torch.cat([torch.where(flags.any(), step, -1).view(1), flags.long()])
        if self._first is None:
            self._first = torch.full_like(found, -1)
        self._first = torch.where(self._first[0] < 0, found, self._first)

    def first_bad(self, accelerator: Accelerator) -> str | None:
        """What was not finite first, on any rank, in words. All ranks together; waits for the device."""
        if self._first is None:
            return None
        ranks = accelerator.gather(self._first.unsqueeze(0)).cpu()  # (ranks, 3 + 2 * groups)
        steps = [int(step) for step in ranks[:, 0] if step >= 0]
        if not steps:
            return None
        loss, norm, *parts = ranks[ranks[:, 0] == min(steps)][:, 1:].bool().any(dim=0).tolist()
        gradients = [name for name, bad in zip(self.groups, parts, strict=False) if bad]
        updates = [name for name, bad in zip(self.groups, parts[len(self.groups) :], strict=True) if bad]
        if updates:  # the first cause: loss and gradients pass through them, and those of all groups are bad then
            what = [f"the update of {', '.join(updates)}"]
        else:
            what = ["the loss"] if loss else []
            what += [f"the gradient of {', '.join(gradients)}"] if gradients else ["the gradient norm"] * norm
        return f"step {min(steps)}: {' and '.join(what)} {'is' if len(what) == 1 else 'are'} not finite"
