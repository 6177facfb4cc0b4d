"""Where data sets and weights lie."""

import os
from pathlib import Path


def project_root() -> Path:
    """The checkout in which we are (the nearest folder upward with avit_lib beside pyproject.toml).

    Else that of this file; else, where the package is installed without one, the current folder.
    """
    upward = (Path.cwd(), *Path.cwd().parents, Path(__file__).resolve().parents[1])
    found = (path for path in upward if (path / "pyproject.toml").is_file() and (path / "avit_lib").is_dir())
    return next(found, upward[0])


def data_dir() -> Path:
    """Where data sets lie: $AVIT_DATA, or data/ in the checkout."""
    return Path(os.environ.get("AVIT_DATA") or project_root() / "data")


def weights_dir() -> Path:
    """Where pretrained weights lie: $AVIT_WEIGHTS, or data/weights/ in the checkout."""
    return Path(os.environ.get("AVIT_WEIGHTS") or project_root() / "data" / "weights")
