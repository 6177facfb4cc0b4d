"""The one error that a user can mend, and what its messages are made of."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

SHOWN = 5


class UserError(Exception):
    """A fault that the user can mend: one line that says what is wrong and what to do."""


def name_some(names: Sequence[str]) -> str:
    """The first few names, printable even if they are not UTF-8, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]).encode(errors="backslashreplace").decode() + more


@contextmanager
def fitting_memory(images: int, remedy: str) -> Iterator[None]:
    """Turn what a CPU or GPU without memory for ``images`` at once raises into a UserError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        known = "out of memory|allocate memory|not enough memory"  # torch has no type for a CPU's
        if not isinstance(error, MemoryError) and not re.search(known, str(error)):
            raise
        raise UserError(f"out of memory with {images} images at once; {remedy}") from None
