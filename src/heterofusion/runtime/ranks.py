"""Processes: an error of one reaches all, ZeRO-3's initialization, and what a process took."""

import contextlib
import datetime
import logging
import os
import resource
import sys
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from transformers.integrations import deepspeed as deepspeed_integration

from heterofusion.runtime.errors import UserError, one_line

logger = logging.getLogger(__name__)


def is_main_process() -> bool:
    """Whether this is rank 0 of a launch (or the only process)."""
    return int(os.environ.get("RANK", "0")) == 0


def start_ranks(use_cpu: bool) -> PartialState:
    """Join the other processes of the launch, if there are any."""
    # Processes wait for the slowest one at the end of an adapter; the default would end the run after minutes.
    return PartialState(cpu=use_cpu, timeout=datetime.timedelta(days=7))


@contextlib.contextmanager
def all_together(ranks: PartialState) -> Iterator[None]:
    """Let all processes leave this block, or none: an error of one is raised on all, a user's error as one.

    Processes without an error first finish their own part, so that their answers are kept. The block itself must not
    wait for other processes.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    if ranks.num_processes > 1:
        rank = ranks.process_index
        if failure is not None and rank > 0:  # rank 0 may need long to get here
            logger.error("rank %d failed: %s", rank, one_line(failure))
        own = None if failure is None else (f"rank {rank}: {one_line(failure)}", isinstance(failure, UserError))
        told = next((each for each in gather_object([own]) if each is not None), None)
        if failure is None and told is not None:
            raise UserError(told[0]) if told[1] else RuntimeError(told[0])
    if failure is not None:
        raise failure


def from_main(ranks: PartialState, value: Any) -> Any:
    """Give all processes the value of rank 0."""
    return broadcast_object_list([value])[0] if ranks.num_processes > 1 else value


def set_zero_init_dtype(dtype: torch.dtype) -> None:
    """Let ZeRO-3 hold a base that is about to be loaded in this dtype; nothing happens without DeepSpeed.

    `zero.Init` takes the dtype of DeepSpeed's config: float32, since mixed precision would cast the hypernetworks as
    well. The engine does not see this change.
    """
    config = deepspeed_integration.deepspeed_config()
    if config is not None:
        config["bf16"] = {"enabled": dtype == torch.bfloat16}
        config["fp16"] = {"enabled": dtype == torch.float16}


@contextlib.contextmanager
def without_zero_init() -> Iterator[None]:
    """Models made in here are not partitioned by ZeRO-3's `zero.Init`, which cannot take the meta device."""
    reference = deepspeed_integration._hf_deepspeed_config_weak_ref
    deepspeed_integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed_integration._hf_deepspeed_config_weak_ref = reference


def peak_memory() -> int:
    """Most bytes that this process has held so far: on the GPUs if it used any, else in main memory."""
    if torch.cuda.is_initialized():
        reserved = [torch.cuda.max_memory_reserved(device) for device in range(torch.cuda.device_count())]
        if any(reserved):
            return sum(reserved)
    high = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return high if sys.platform == "darwin" else high * 1024


def cost_record(seconds: float) -> dict[str, Any]:
    """What the records of all methods hold as `cost`; the seconds are without imports and the loading of models."""
    device = torch.cuda.get_device_name() if torch.cuda.is_initialized() else "cpu"
    return {"seconds": round(seconds, 3), "peak_memory_bytes": peak_memory(), "device": device}
