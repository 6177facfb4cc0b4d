"""Files that are whole or not there, whatever happens while they are written."""

import errno
import hashlib
import io
import json
import os
import pickle
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from avit_lib.errors import UserError


def write_atomically(path: Path, content: bytes, previous: Path | None = None) -> None:
    """Write a file under a temporary name, then move it: a reader sees the old content or the new,
    never half.

    The old content is kept as ``previous``, if given. Raises UserError when the disk is full or may
    not be written to; the old content is then untouched.
    """
    temporary = path.parent / f"{path.name}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(
                file.fileno()
            )  # on the disk before it takes the name, or a power cut could leave it empty
        if previous and path.is_file():
            os.replace(path, previous)
        os.replace(temporary, path)
    except OSError as error:
        raise _unwritable(path, error) from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def make_writable(folder: Path) -> None:
    """Make ``folder`` and try whether files can be written there; raises UserError when not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise _unwritable(folder, error) from None


def _unwritable(path: Path, error: OSError) -> UserError:
    remedy = (
        "free some space"
        if error.errno == errno.ENOSPC
        else "name another folder, or allow writing there"
    )
    return UserError(
        f"{path} cannot be written ({error.strerror}); {remedy}, then run the same command again"
    )


def write_state(path: Path, state: dict[str, Any], previous: Path) -> None:
    """Write the state of a training, and after it its SHA-256, atomically; the old file is kept as
    ``previous``.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    write_atomically(path, content + hashlib.sha256(content).digest(), previous)


def read_state(path: Path, device: torch.device) -> dict[str, Any]:
    """Read what ``write_state`` wrote; raises UserError when the checksum does not fit or more than
    data is in it.
    """
    content = path.read_bytes()
    content, checksum = content[:-32], content[-32:]
    if hashlib.sha256(content).digest() != checksum:
        raise UserError(f"{path} is damaged: its checksum does not fit")
    try:
        return torch.load(io.BytesIO(content), map_location=device, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(
            f"{path} is not the state of a training ({str(error).splitlines()[0]})"
        ) from None


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file; raises UserError when it is missing, damaged or no object."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is missing; make it again, or name another checkpoint") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); delete it and make it again") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds a {type(found).__name__}; delete it and make it again")
    return found
