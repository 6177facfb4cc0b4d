"""Profiles as files: TOML tables, laid over those of the profile that they extend.

Imports nothing slow, so that the command line can tell at once what is not there.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from avit_lib.errors import UserError

PROFILES = Path(__file__).resolve().with_name("profiles")


def profile_names() -> list[str]:
    """The profiles that come with the library."""
    return sorted(path.stem for path in PROFILES.glob("*.toml"))


def find_profile(name: str, folder: Path = Path()) -> Path:
    """The file of a profile, by its name or its path from ``folder``; UserError if missing."""
    path = folder / name if name.endswith(".toml") else PROFILES / f"{name}.toml"
    if path.is_file():
        return path.resolve()
    known = ", ".join(profile_names())
    raise UserError(
        f"unknown profile {name!r}; choose from {known}, or name a file that ends in .toml"
    )


def read_profile(name: str) -> tuple[Path, dict[str, Any]]:
    """The file of a profile and its tables, among them ``runs``; what they say is not checked.

    Raises UserError, one line that names the file, when it is missing or no TOML.
    """
    path = find_profile(name)
    if path.parent != PROFILES and path.stem in profile_names():
        raise UserError(
            f"{path} would share the results of the profile {path.stem}: give the file another name"
        )
    tables = _read_tables(path)
    tables["runs"] = checked(path, "runs", tables.get("runs", {}), dict[str, dict])
    return path, tables


def check_run(profile: str, runs: Iterable[str], name: str) -> None:
    """Raise UserError unless ``name`` is among the ``runs`` of a profile."""
    if name not in runs:
        raise UserError(f"profile {profile!r} has no run {name!r}; choose from {', '.join(runs)}")


def _read_tables(path: Path) -> dict[str, Any]:
    """The tables of a file, laid over those of the profile it extends."""
    try:
        tables = msgspec.toml.decode(path.read_text("utf-8-sig"))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}; mend this line") from None
    if "extends" not in tables:
        return tables
    base = find_profile(tables.pop("extends"), path.parent)
    return lay_over(_read_tables(base), tables)


def lay_over(base: dict[str, Any], tables: dict[str, Any]) -> dict[str, Any]:
    """``base`` with what ``tables`` say in its place; tables inside of them likewise."""
    merged = dict(base)
    for name, value in tables.items():
        if isinstance(value, dict) and isinstance(base.get(name), dict):
            value = lay_over(base[name], value)
        merged[name] = value
    return merged


def checked(path: Path | str, key: str, tables: Any, kind: Any) -> Any:
    """``tables`` as settings of a ``kind``.

    Raises UserError, one line that names ``path``, the key below ``key``, and what is wrong.
    """
    try:
        return msgspec.convert(tables, kind)
    except msgspec.ValidationError as error:
        what, _, place = str(error).partition(" - at `$")
        key = f"{key}{place.rstrip('`')}".lstrip(".")
        words = f"{key}: {what[0].lower()}{what[1:]}" if key else f"{what[0].lower()}{what[1:]}"
        raise UserError(f"{path}: {words}") from None
