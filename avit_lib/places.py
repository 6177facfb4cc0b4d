"""Where data sets and weights lie; what of them is embedded, and whether it is whole."""

import hashlib
import os
from pathlib import Path

from avit_lib.errors import UserError, name_some


def project_root() -> Path:
    """The checkout in which we are: the nearest folder upward with avit_lib and pyproject.toml.

    Else that of this file; else, where the package is installed without one, the current folder.
    """
    for folder in (Path.cwd(), *Path.cwd().parents, Path(__file__).resolve().parents[1]):
        if (folder / "pyproject.toml").is_file() and (folder / "avit_lib").is_dir():
            return folder
    return Path.cwd()


def find_folder(variable: str, default: str) -> Path:
    """The folder that an environment ``variable`` names, or ``default`` in the checkout."""
    return Path(os.environ.get(variable) or project_root() / default).expanduser()


def data_dir() -> Path:
    """Where data sets lie: $AVIT_DATA, or data/ in the checkout."""
    return find_folder("AVIT_DATA", "data")


def weights_path(timm_name: str) -> Path:
    """Where the pretrained weights of a timm name belong.

    In the folder $AVIT_WEIGHTS, or data/weights/ in the checkout.
    """
    return find_folder("AVIT_WEIGHTS", "data/weights") / f"{timm_name}.safetensors"


def weights_file(timm_name: str) -> Path:
    """``weights_path``; embedded weights are checked, as ``check_embedded`` does."""
    path = weights_path(timm_name)
    check_embedded(path)
    return path


def digest_file(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def list_embedded(place: Path) -> list[tuple[str, str]]:
    """Checksum and name of what SHA256SUMS of the checkout's data/ lists at or below ``place``."""
    data = project_root() / "data"
    sums = data / "SHA256SUMS"
    lines = sums.read_text().splitlines() if sums.is_file() else []
    listed = [line.split(maxsplit=1) for line in lines]
    real, target = data.resolve(), place.resolve()  # links and .. may lead here
    return [
        (checksum, name)
        for checksum, name in listed
        if (data / name).is_relative_to(place.absolute()) or (real / name).is_relative_to(target)
    ]


def check_embedded(place: Path) -> None:
    """Raise UserError for embedded files at or below ``place`` that are missing or damaged."""
    data, wrong = project_root() / "data", []
    for checksum, name in list_embedded(place):
        if not (data / name).is_file() or digest_file(data / name) != checksum:
            wrong.append(name)
    if wrong:
        raise UserError(
            f"missing or damaged in {data}: {name_some(wrong)}; bring it back with "
            f"`git checkout -- data`"
        )
