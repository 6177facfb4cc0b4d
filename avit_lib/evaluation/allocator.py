"""How glibc keeps freed memory while something is timed."""

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1  # of glibc's mallopt
GROWN = 2**25, 2**26  # bytes that its thresholds have once they have grown, if nobody set them


@contextmanager
def buffers_kept() -> Iterator[None]:
    """Let glibc keep freed buffers for the next step, as torch does on GPUs.

    By default glibc gives buffers above 32 MiB back at once, and to get them anew takes time. In a
    large batch DeiT's are above, those of an A-ViT whose tokens have halted are not: the allocator
    would add to the speed-up. Afterwards the thresholds are those of the environment, or else as
    large as they grow. Where there is no glibc, nothing changes.
    """
    _set_thresholds(2**30, -1)
    try:
        yield
    finally:
        _set_thresholds(*environment_thresholds())


def environment_thresholds() -> tuple[int, int]:
    """From how many bytes glibc maps a buffer, and gives back free memory, by the environment."""
    mmap = _read_size("MALLOC_MMAP_THRESHOLD_", GROWN[0])
    return mmap, _read_size("MALLOC_TRIM_THRESHOLD_", GROWN[1])


def _read_size(name: str, default: int) -> int:
    size = int(os.environ.get(name) or str(default), 0)
    return size if size < 2**31 else -1  # mallopt takes an int; -1: never


def _set_thresholds(mmap: int, trim: int) -> None:
    if platform.libc_ver()[0] == "glibc":
        glibc = ctypes.CDLL(None)
        glibc.mallopt(M_MMAP_THRESHOLD, mmap)
        glibc.mallopt(M_TRIM_THRESHOLD, trim)
        glibc.malloc_trim(0)
