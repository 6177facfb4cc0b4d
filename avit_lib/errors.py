"""The one error that a user can mend."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A fault that the user can mend; its message is one line that says what is wrong and what to
    do.
    """


@contextmanager
def fitting_memory(images: int, remedy: str) -> Iterator[None]:
    """Turn the error of a CPU or GPU without memory for so many ``images`` at once into a UserError
    with a remedy.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        known = (
            "out of memory",
            "allocate memory",
            "not enough memory",
        )  # torch has no type for a CPU's
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in known):
            raise
        raise UserError(f"out of memory with {images} images at once; {remedy}") from None
