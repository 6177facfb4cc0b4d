"""Profiles as files: TOML tables, laid over those of the profile that they extend.

What the tables may say stands in ``study.settings``. This imports nothing slow, so that the command
line can tell at once what is not there.
"""

from pathlib import Path
from typing import Any

import msgspec

from avit_lib.errors import UserError

PROFILES = Path(__file__).resolve().parent / "study" / "profiles"


def find_profile(name: str, folder: Path = Path()) -> Path:
    """The file of a profile, by its name or its path from ``folder``; UserError if missing."""
    path = folder / name if name.endswith(".toml") else PROFILES / f"{name}.toml"
    if path.is_file():
        return path.resolve()
    known = ", ".join(sorted(path.stem for path in PROFILES.iterdir()))
    raise UserError(
        f"unknown profile {name!r}; choose from {known}, or name a file that ends in .toml"
    )


def read_tables(path: Path) -> dict[str, Any]:
    """The tables of a file, laid over those of the profile it extends."""
    try:
        tables = msgspec.toml.decode(path.read_text("utf-8-sig"))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}; mend this line") from None
    if "extends" not in tables:
        return tables
    base = find_profile(tables.pop("extends"), path.parent)
    return lay_over(read_tables(base), tables)


def lay_over(base: dict[str, Any], tables: dict[str, Any]) -> dict[str, Any]:
    """``base`` with what ``tables`` say in its place; tables inside of them likewise."""
    merged = dict(base)
    for name, value in tables.items():
        inside = isinstance(value, dict) and isinstance(base.get(name), dict)
        merged[name] = lay_over(base[name], value) if inside else value
    return merged
