"""Memory of a training process on a CPU: pages of freed tensors are kept for the next ones."""

import ctypes
import platform
import sys

import torch

# parameters of glibc's mallopt, from malloc.h
_TRIM_THRESHOLD = -1
_MMAP_MAX = -4


def keep_freed_pages() -> bool:
    """Let glibc keep the pages of freed tensors, for the rest of this process.

    By default it maps every large block anew and gives it back when it is freed, so that each optimizer step has the
    kernel fault in and clear the pages of all gradients again (3 GB with `paper` on a 4096-wide model). Call it
    before anything large is allocated.

    It works in the main thread, where a CPU's backward runs if it was called there. Large blocks of other threads are
    mapped and given back as before.

    The price: what was used once stays with the process, and a block just freed does not always do for one of the same
    size (seen with glibc 2.36, which asks for a little more than it needs where memory is aligned). In training the
    peak grows by a few percent; one tensor allocated and freed over and over took up to six times its size, then
    no more.

    Returns:
        Whether it took effect: not beside a GPU, whose memory torch keeps anyway, and not with another C library
        than glibc.
    """
    if torch.cuda.is_available() or sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # a threshold of -1 switches trimming off; the largest int would still trim above 2 GiB
    return all(mallopt(parameter, value) == 1 for parameter, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1)))
