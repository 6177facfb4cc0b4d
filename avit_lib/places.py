"""Where data sets and weights lie; what of them is embedded, and whether it is whole."""

import hashlib
import os
from pathlib import Path

from avit_lib.errors import UserError

SHOWN = 3  # damaged files that a message names
POINTER = b"version https://git-lfs"  # how a Git LFS pointer begins


def project_root() -> Path:
    """The checkout in which we are (the nearest folder upward with avit_lib beside pyproject.toml).

    Else that of this file; else, where the package is installed without one, the current folder.
    """
    upward = (Path.cwd(), *Path.cwd().parents, Path(__file__).resolve().parents[1])
    found = (
        path
        for path in upward
        if (path / "pyproject.toml").is_file() and (path / "avit_lib").is_dir()
    )
    return next(found, upward[0])


def data_dir() -> Path:
    """Where data sets lie: $AVIT_DATA, or data/ in the checkout."""
    return Path(os.environ.get("AVIT_DATA") or project_root() / "data")


def weights_dir() -> Path:
    """Where pretrained weights lie: $AVIT_WEIGHTS, or data/weights/ in the checkout."""
    return Path(os.environ.get("AVIT_WEIGHTS") or project_root() / "data" / "weights")


def weights_file(timm_name: str) -> Path:
    """Where the pretrained weights of a timm name belong; embedded ones are checked."""
    path = weights_dir() / f"{timm_name}.safetensors"
    check_embedded(path)
    return path


def no_weights(timm_name: str) -> str:
    """What to say where the weights of a timm name are missing and can't be downloaded."""
    return (
        f"no weights of {timm_name}: {weights_file(timm_name)} is missing and timm's hub is out of "
        f"reach; work in a clone of the repository, put the file there, or name its folder in AVIT_WEIGHTS"
    )


def check_embedded(place: Path) -> int:
    """Compare what is embedded in the checkout's data/, at or below ``place``, with its checksums.

    Returns how many files that are. Raises UserError for one that is missing or not as published.
    """
    data = project_root() / "data"
    sums = data / "SHA256SUMS"
    lines = sums.read_text().splitlines() if sums.is_file() else []
    listed = {data / line[66:]: line[:64] for line in lines}
    place = place.absolute()
    chosen = {path: wanted for path, wanted in listed.items() if place in (path, *path.parents)}
    wrong = {
        path.relative_to(data): fault
        for path, wanted in chosen.items()
        if (fault := _fault(path, wanted))
    }
    if wrong:
        named = ", ".join(f"{path} ({fault})" for path, fault in list(wrong.items())[:SHOWN])
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise UserError(
            f"{data} is not as published: {named}{more}; bring it back with `git checkout -- data`"
        )
    return len(chosen)


def _fault(path: Path, wanted: str) -> str:
    """What is wrong with a file, in words; empty if its SHA-256 is the ``wanted`` one."""
    if not path.is_file():
        return "missing"
    content = path.read_bytes()
    if content.startswith(POINTER):
        return "a Git LFS pointer"
    return "" if hashlib.sha256(content).hexdigest() == wanted else "damaged"


def digest_file(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
