"""A linear layer for weights so large that allocating their gradient is what a CPU step spends its time on."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class LargeLinear(nn.Linear):
    """`nn.Linear` whose weight gradient lies in one buffer for all steps.

    On a CPU a large gradient is given back to the kernel by `zero_grad`, and the next one has all its pages faulted in
    and cleared again (3 GB per step with `paper` on a 4096-wide model). Elsewhere allocators keep memory by
    themselves, and engines that shard gradients have buffers of their own: there this is `nn.Linear`.

    A gradient is valid until the next backward after `zero_grad`: clone it to keep it longer.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self._gradient: Tensor | None = None
        self._handed_out = False

    def forward(self, x: Tensor) -> Tensor:
        plain = type(self.weight) is nn.Parameter and not hasattr(self.weight, "ds_id")
        if plain and x.is_cpu and self.weight.requires_grad and torch.is_grad_enabled():
            self._handed_out = False
            return _LinearWithBuffer.apply(x, self.weight, self.bias, self)
        return F.linear(x, self.weight, self.bias)

    def gradient_buffer(self) -> Tensor:
        """Where the next gradient goes, (out_features, in_features): the buffer, or a new tensor if it is in use."""
        if self.weight.grad is not None or self._handed_out:  # by an earlier backward, or another use in this one
            return torch.empty_like(self.weight)
        if self._gradient is None:
            self._gradient = torch.empty_like(self.weight)
        self._handed_out = True
        return self._gradient


class _LinearWithBuffer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, layer: LargeLinear) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.layer = layer
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        buffer = ctx.layer.gradient_buffer()
        torch.mm(rows.T, x.reshape(-1, x.shape[-1]), out=buffer)
        # autograd takes a tensor that nobody else holds as the gradient without copying: an alias of the buffer
        return gradient @ weight if ctx.needs_input_grad[0] else None, buffer.detach(), rows.sum(0), None
