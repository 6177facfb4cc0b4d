"""How glibc keeps freed memory while something is timed."""

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1  # of glibc's mallopt


@contextmanager
def buffers_kept() -> Iterator[None]:
    """Let glibc keep freed buffers for the next step, as torch does on GPUs; where there is no
    glibc nothing changes.

    By default it gives buffers above 32 MiB back at once, and to get them anew takes time. In a
    large batch DeiT's are above, those of an A-ViT whose tokens have halted are not: the allocator
    would add to the speed-up. Afterwards the thresholds are again those of the environment.
    """
    _set_thresholds(2**30, -1)
    try:
        yield
    finally:
        _set_thresholds(*allocator_thresholds())


def _set_thresholds(mmap: int, trim: int) -> None:
    if platform.libc_ver()[0] == "glibc":
        glibc = ctypes.CDLL(None)
        glibc.mallopt(M_MMAP_THRESHOLD, mmap)
        glibc.mallopt(M_TRIM_THRESHOLD, trim)
        glibc.malloc_trim(0)


def allocator_thresholds() -> tuple[int, int]:
    """The bytes from which glibc maps a buffer, and from which it gives free memory back, by the
    environment.

    Where nothing is set they grow with what is freed, which no program can turn on again: then
    where growth ends.
    """
    tunables = dict(
        part.partition("=")[::2] for part in os.environ.get("GLIBC_TUNABLES", "").split(":")
    )
    names = (
        "mmap_threshold",
        "trim_threshold",
        "top_pad",
        "mmap_max",
    )  # any of them ends growth, where it began
    said = [
        tunables.get(f"glibc.malloc.{name}") or os.environ.get(f"MALLOC_{name.upper()}_")
        for name in names
    ]
    grown = (2**17, 2**17) if any(said) else (2**25, 2**26)
    sizes = [int(value, 0) if value else size for value, size in zip(said, grown, strict=False)]
    return tuple(size if size < 2**31 else -1 for size in sizes)  # mallopt takes an int; -1: never
