"""How glibc keeps freed memory while something is timed, and gives it back."""

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1  # of glibc's mallopt
GROWN = 2**25, 2**26  # bytes that its thresholds have once they have grown by themselves


@contextmanager
def buffers_kept() -> Iterator[None]:
    """Let glibc keep freed buffers for the next step, as torch does on GPUs.

    By default glibc gives buffers above 32 MiB back at once, and to get them anew takes time. In a
    large batch DeiT's are above, those of an A-ViT whose tokens have halted are not: the allocator
    would add to the speed-up. Afterwards the thresholds are as large as they grow. Where there is
    no glibc, or MALLOC_MMAP_THRESHOLD_ is set (as our Makefile does), nothing changes.
    """
    _set_thresholds(2**30, -1)
    try:
        yield
    finally:
        _set_thresholds(*GROWN)


def give_back() -> None:
    """Let glibc give freed buffers back to the system.

    What it keeps falls to pieces from model to model: 65 models in turn came to 20 GB.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _set_thresholds(mmap: int, trim: int) -> None:
    if platform.libc_ver()[0] == "glibc" and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        glibc = ctypes.CDLL(None)
        if not glibc.mallopt(M_MMAP_THRESHOLD, mmap):  # an older one takes 32 MiB at most
            glibc.mallopt(M_MMAP_THRESHOLD, GROWN[0])
        glibc.mallopt(M_TRIM_THRESHOLD, trim)
        give_back()
