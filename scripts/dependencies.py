"""Print the files that a notebook's results depend on, for the Makefile.

    python scripts/dependencies.py PROFILE [NOTEBOOK]

First come the TOML files of the profile: its own, then those it extends. With a NOTEBOOK, such as
04_evaluation, follow the library's files that it imports, directly or not, with what lies beside
them. Only the standard library is used, for this runs before the environment is made.
"""

import ast
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "avit_lib"
PROFILES = LIBRARY / "study" / "profiles"
EXTENDS = re.compile(r"""^\s*["']?extends["']?\s*=\s*["'](.+?)["']""", re.MULTILINE)


def list_profile_files(profile: str) -> list[Path]:
    """The TOML file of a profile, by name or path, then those that it extends, in order."""
    files: list[Path] = []
    folder = Path()
    while True:
        path = folder / profile if profile.endswith(".toml") else PROFILES / f"{profile}.toml"
        if not path.is_file():
            known = ", ".join(sorted(path.stem for path in PROFILES.glob("*.toml")))
            sys.exit(
                f"error: unknown profile {profile!r}; choose from {known}, "
                "or name a file that ends in .toml"
            )
        if path in files:
            return files  # they extend each other in a circle: the notebook says so
        files.append(path)
        head = re.split(r"^\s*\[", path.read_text("utf-8-sig"), maxsplit=1, flags=re.MULTILINE)[0]
        extended = EXTENDS.search(head)
        if extended is None:
            return files
        profile, folder = extended[1], path.parent


def read_cells(notebook: Path) -> Iterator[ast.Module]:
    """The code cells of a notebook, parsed; one that is not Python will fail when it runs."""
    for cell in json.loads(notebook.read_text("utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            try:
                yield ast.parse("".join(cell["source"]))
            except SyntaxError:
                continue


def list_imports(tree: ast.Module) -> Iterator[str]:
    """The dotted names that code imports; of ``from a import b`` both a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def find_files(name: str) -> Iterator[Path]:
    """The library's files that importing a dotted name runs; none for other packages."""
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        place = ROOT.joinpath(*parts[:count])
        for path in (place / "__init__.py", place.with_suffix(".py")):
            if path.is_relative_to(LIBRARY) and path.is_file():
                yield path


def list_library_files(notebook: Path) -> list[Path]:
    """The library's files that a notebook uses, and the files beside them that are no code."""
    found: set[Path] = set()
    waiting = list(read_cells(notebook))
    while waiting:
        for name in list_imports(waiting.pop()):
            for path in set(find_files(name)) - found:
                found.add(path)
                waiting.append(ast.parse(path.read_text("utf-8")))
    beside = {path for folder in {path.parent for path in found} for path in folder.glob("*.*")}
    return sorted(found | {path for path in beside if path.suffix != ".py"})


def main() -> None:
    profile, *notebooks = sys.argv[1:]
    files = list_profile_files(profile)
    for name in notebooks:
        files += list_library_files(ROOT / "notebooks" / f"{name}.ipynb")
    print(*(os.path.relpath(path) for path in files))


if __name__ == "__main__":
    main()
