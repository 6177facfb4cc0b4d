"""Files that are whole or not there, whatever happens while they are written."""

import hashlib
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from avit_lib.errors import UserError


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Keep other processes from training into ``folder``; raises UserError where one does."""
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise UserError(
            f"another process trains into {folder}; wait for it, or name another folder"
        ) from None


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, then move it: readers see it old or new, never half.

    Of a link what it leads to is written. Raises UserError when the file cannot be written, and for
    a folder or device; the old content is then untouched.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no file that can be replaced; name another")
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # on the disk before it takes the name: power may fail
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(
            f"{path} cannot be written ({error.strerror}); free some space or name another "
            f"folder, then run the same command again"
        ) from None


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write the state of a training, then its SHA-256, atomically."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    write_atomically(path, content + hashlib.sha256(content).digest())


def read_state(path: Path, device: torch.device) -> dict[str, Any]:
    """Read what ``write_state`` wrote; raises UserError when the file is damaged."""
    content = path.read_bytes()
    state, digest = content[:-32], content[-32:]
    if hashlib.sha256(state).digest() != digest:
        raise UserError(f"{path} is damaged; delete its folder to train from the start")
    return torch.load(io.BytesIO(state), map_location=device, weights_only=True)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file; raises UserError when it is damaged."""
    try:
        found = json.loads(path.read_text("utf-8-sig"))
        if not isinstance(found, dict):
            raise ValueError("it holds no object")
        return found
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); delete it and make it again") from None
