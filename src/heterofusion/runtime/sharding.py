"""Whole tensors of modules that ZeRO-3 or FSDP2 leave each rank a part of; all ranks call these together."""

import contextlib
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from heterofusion.runtime.errors import UserError


def is_sharded(module: nn.Module) -> bool:
    """Whether a rank holds a part of the parameters only (ZeRO-3, FSDP2)."""
    return any(hasattr(parameter, "ds_id") or isinstance(parameter, DTensor) for parameter in module.parameters())


def _gathered(parameter: Tensor, modified: bool = False) -> contextlib.AbstractContextManager[None]:
    """A parameter, whole in here if ZeRO-3 partitioned it; what rank 0 writes goes to all ranks if `modified`."""
    if not hasattr(parameter, "ds_id"):  # what DeepSpeed's own code asks
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0 if modified else None)


@torch.no_grad()
def whole_tensors(parameters: Iterable[tuple[str, Tensor]], keep: bool = True) -> dict[str, Tensor]:
    """Copies of parameters as whole tensors on the CPU, one gathered at a time. All ranks together, in one order.

    A rank that does not `keep` them only takes part, and gets an empty dictionary.
    """
    state = {}
    for name, parameter in parameters:
        with _gathered(parameter):
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            if keep:
                state[name] = whole.to("cpu", copy=True)
    return {name: tensor.contiguous() for name, tensor in state.items()}


@torch.no_grad()
def load_whole_tensors(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load whole tensors into the parameters of a module, or none if names or shapes differ. All ranks together."""
    parameters = dict(module.named_parameters())
    if parameters.keys() != state.keys():
        raise UserError(f"other tensors than expected: {sorted(parameters.keys() ^ state.keys())[:3]}")
    for name, parameter in parameters.items():
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        if tuple(state[name].shape) != shape:
            raise UserError(f"{name} is {tuple(state[name].shape)}, {shape} was expected")
    for name, parameter in parameters.items():
        value = state[name].to(parameter.dtype)
        if isinstance(parameter, DTensor):
            value = distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
        with _gathered(parameter, modified=True):
            parameter.copy_(value)


@torch.no_grad()
def broadcast_parameters(module: nn.Module) -> None:
    """Give every rank the (unsharded) parameters of rank 0. All ranks together."""
    for parameter in module.parameters():
        dist.broadcast(parameter.data, src=0)
