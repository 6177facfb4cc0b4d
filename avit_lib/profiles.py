"""Profiles as files: TOML tables, laid over those of the profile that they extend.

What the tables may say stands in ``study.settings``. What is wrong is told in one line that names
file and key.
"""

from pathlib import Path
from typing import Any

import msgspec

from avit_lib.errors import UserError

PROFILES = Path(__file__).resolve().parent / "study" / "profiles"
OF_ONE = ("notes", "licence")  # what a profile says of itself: not of those that extend it
WHOLE = {"peers", "sweep_peers", "recalibrated", "budgets"}  # lists of names: one replaces another


def find_profile(name: str, folder: Path = Path()) -> Path:
    """The file of a profile, by its name or its path from ``folder``; UserError if missing."""
    path = folder / name if name.endswith(".toml") else PROFILES / f"{name}.toml"
    if path.is_file():
        return path.resolve()
    known = ", ".join(sorted(path.stem for path in PROFILES.iterdir()))
    raise UserError(
        f"unknown profile {name!r}; choose from {known}, or name a file that ends in .toml"
    )


def read_profile(name: str) -> tuple[Path, dict[str, Any]]:
    """The file of a profile, and its tables with complete runs, a list.

    A run lies over the one that it extends, else over the section ``training`` for all. Raises
    UserError when something is missing, or named where nothing is.
    """
    path = find_profile(name)
    taken = (PROFILES / path.name).is_file() or path.stem == "benchmark"
    if path.parent != PROFILES and taken:
        raise UserError(
            f"{path} would share the results of the profile {path.stem}: give the file another name"
        )
    tables = read_tables(path)
    shared = {"training": check(path, "training", tables.get("training", {}), dict)}
    given = check(path, "runs", tables.get("runs", {}), dict[str, dict])
    if any("name" in table for table in (tables, *given.values())):
        raise UserError(f"{path}: name: a profile is called like its file, a run like its section")
    runs: dict[str, dict] = {}  # by name, those of which a later one may say that it extends them
    for run, table in given.items():
        extends = table.pop("extends", None)
        if extends not in (None, *runs):
            raise UserError(f"{path}: runs.{run}.extends: there is no run {extends!r} before it")
        runs[run] = lay_over(runs[extends] if extends else shared, table) | {"name": run}
    for section in ("recalibrated", "budgets"):
        for run in check(path, section, tables.get(section, {}), dict).keys() - runs:
            raise UserError(f"{path}: {section}.{run}: there is no run {run!r}")
    return path, tables | {"name": path.stem, "runs": list(runs.values())}


def check(path: Path | str, key: str, tables: Any, kind: Any) -> Any:
    """``tables`` as settings of a ``kind``.

    Raises UserError, one line that names ``path``, the key below ``key``, and what is wrong.
    """
    try:
        return msgspec.convert(tables, kind)
    except msgspec.ValidationError as error:
        what, _, place = str(error).partition(" - at `$")
        key = f"{key}{place.rstrip('`')}".lstrip(".")
        raise UserError(f"{path}: {key}{': ' if key else ''}{what}") from None


def read_tables(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The tables of a file, laid over those of the profile it extends; ``above`` extend it."""
    try:
        tables = msgspec.toml.decode(path.read_text("utf-8-sig"))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}; mend this line") from None
    if "extends" not in tables:
        return tables
    base = find_profile(check(path, "extends", tables.pop("extends"), str), path.parent)
    if base in (path, *above):
        raise UserError(f"{path}: extends: {base} extends this file, too")
    inherited = read_tables(base, (path, *above))
    for key in (*OF_ONE, *WHOLE & tables.keys()):
        inherited.pop(key, None)
    return lay_over(inherited, {"purpose": f"{base.stem} with other settings"} | tables)


def lay_over(base: dict[str, Any], tables: dict[str, Any]) -> dict[str, Any]:
    """``base`` with what ``tables`` say in its place; tables inside of them likewise."""
    merged = dict(base)
    for name, value in tables.items():
        inside = isinstance(value, dict) and isinstance(base.get(name), dict)
        merged[name] = lay_over(base[name], value) if inside else value
    return merged
