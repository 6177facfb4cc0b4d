"""``python -m avit_lib``."""

import io
import os
import sys

from avit_lib.cli import main


def run() -> int:
    """``main``, for any terminal, and for a pipe that nobody reads to its end: then 141."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return main(sys.argv[1:])
    except BrokenPipeError:
        # Or Python would complain when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


if __name__ == "__main__":
    raise SystemExit(run())
