"""What a run took: wall-clock seconds and peak memory, for records beside adapters and results."""

import resource
import sys
from typing import Any

import torch


def peak_memory() -> int:
    """Most bytes that this process has held so far: on the GPUs if it used any, else in main memory."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        reserved = [torch.cuda.max_memory_reserved(device) for device in range(torch.cuda.device_count())]
        if any(reserved):
            return sum(reserved)
    high = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return high if sys.platform == "darwin" else high * 1024


def cost_record(seconds: float) -> dict[str, Any]:
    """What the records of all methods hold as `cost`.

    Args:
        seconds: wall-clock seconds of the method, without imports and the loading of models.

    Returns:
        `seconds`, `peak_memory_bytes` of this process, and `device`: the GPU's name, or `cpu`.
    """
    used_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    return {
        "seconds": round(seconds, 3),
        "peak_memory_bytes": peak_memory(),
        "device": torch.cuda.get_device_name() if used_gpu else "cpu",
    }
