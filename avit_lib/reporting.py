"""The only writer of results/: tables as CSV and Markdown, figures as PNG, metrics as JSON, each with provenance."""

import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure

from avit_lib.checkpoints import read_json, write_atomically, write_json
from avit_lib.config import Profile, project_root, results_dir

PACKAGES = ("torch", "torchvision", "timm", "torchmetrics", "numpy", "pandas", "seaborn", "papermill")
FIGURE_DPI = 120


@dataclass(frozen=True)
class Collection:
    """Results that belong to no profile: the name of their folder, what they are, the command that makes them."""

    name: str
    purpose: str
    command: str
    notes: tuple[str, ...] = ()


class Results:
    """The results folder of one profile and seed: ``table``, ``figure`` and ``metrics`` write into it."""

    def __init__(self, profile: Profile | Collection, seed: int, source: str):
        """``source`` names what makes these results, a notebook say; the clock of their duration starts here."""
        self.profile, self.seed, self.source = profile, seed, source
        self.folder = results_dir(profile.name)
        self._started = time.perf_counter()

    def table(self, frame: pd.DataFrame, name: str, caption: str) -> pd.DataFrame:
        """Write ``frame`` to tables/<name>.csv and .md; returns it, so that a cell can end in it."""
        path = self.folder / "tables" / name
        write_atomically(path.with_suffix(".csv"), frame.to_csv(index=False, float_format="%.6g").encode())
        write_atomically(path.with_suffix(".md"), (to_markdown(frame) + "\n").encode())
        self._describe(path, caption)
        return frame

    def figure(self, figure: Figure, name: str, caption: str) -> Figure:
        """Write ``figure`` to figures/<name>.png; returns it, so that a cell can end in it."""
        path = self.folder / "figures" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        figure.savefig(temporary, format="png", dpi=FIGURE_DPI, bbox_inches="tight", facecolor="white")
        temporary.replace(path)
        self._describe(path, caption)
        return figure

    def metrics(self, values: dict[str, Any], name: str) -> None:
        """Write ``values`` to metrics/<name>.json with the provenance inside."""
        write_json(self.folder / "metrics" / f"{name}.json", {**values, "provenance": self._provenance()})

    def read_metrics(self, name: str) -> dict[str, Any]:
        """Read metrics/<name>.json; raises StudyError when it is missing."""
        return read_json(self.folder / "metrics" / f"{name}.json")

    def _describe(self, path: Path, caption: str) -> None:
        write_json(path.with_suffix(".json"), {"caption": caption, "provenance": self._provenance()})

    def _provenance(self) -> dict[str, Any]:
        seconds = round(time.perf_counter() - self._started, 1)
        return {"source": self.source, **provenance(self.profile.name, self.seed), "seconds_since_start": seconds}


def provenance(profile: str, seed: int) -> dict[str, Any]:
    """Where a number comes from: commit and whether the code differed from it, seed, versions, hardware, date."""
    commit, dirty = _git_state()
    return {
        "profile": profile,
        "seed": seed,
        "commit": commit,
        "dirty": dirty,
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "python": platform.python_version(),
        "packages": _versions(),
        "hardware": hardware(),
    }


def hardware() -> str:
    """The processor, its threads, and the GPU if one is visible, in words."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{_processor()}, {torch.get_num_threads()} threads{gpu}"


def to_markdown(frame: pd.DataFrame) -> str:
    """A data frame as a Markdown table: numbers with four significant digits, right-aligned."""
    numeric = [pd.api.types.is_numeric_dtype(frame[column]) for column in frame.columns]
    rows = [list(frame.columns), ["---:" if right else ":---" for right in numeric]]
    rows += [[_cell(value) for value in row] for row in frame.itertuples(index=False)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def write_summary(profile: Profile | Collection) -> Path:
    """Write results/<profile>/README.md: every table inline, every figure shown, provenance at the end."""
    folder = results_dir(profile.name)
    command = profile.command if isinstance(profile, Collection) else f"make reproduce PROFILE={profile.name}"
    title = f"Results: {profile.name}" if isinstance(profile, Collection) else f"Results of profile `{profile.name}`"
    lines = [f"# {title}", "", f"{profile.purpose[0].upper()}{profile.purpose[1:]}.", ""]
    lines += [f"Made by `{command}`; this page is generated, do not edit it.", ""]
    described = []
    for kind, suffix in (("tables", ".md"), ("figures", ".png")):
        lines += [f"## {kind.capitalize()}", ""]
        for path in sorted((folder / kind).glob(f"*{suffix}")):
            facts = read_json(path.with_suffix(".json"))
            described.append((path, facts["provenance"]))
            lines += [f"### {path.stem.replace('_', ' ')}", "", facts["caption"], ""]
            if kind == "tables":
                lines += [*_foldable(path.read_text().strip()), "", f"[CSV]({kind}/{path.stem}.csv)", ""]
            else:
                lines += [f"![{path.stem}]({kind}/{path.name})", ""]
    lines += ["## Provenance", "", to_markdown(_provenance_table(described)), ""]
    if described:
        packages = described[0][1]["packages"]
        lines += ["Packages: " + ", ".join(f"{name} {number}" for name, number in packages.items()) + ".", ""]
    lines += [f"- {note}" for note in profile.notes]
    target = folder / "README.md"
    write_atomically(target, ("\n".join(lines).rstrip() + "\n").encode())
    return target


def _foldable(table: str, most: int = 40) -> list[str]:
    """The lines of a Markdown table; one of more than ``most`` is folded away until a reader opens it."""
    lines = table.splitlines()
    rows = len(lines) - 2
    if rows <= most:
        return lines
    return ["<details>", f"<summary>{rows} rows</summary>", "", *lines, "", "</details>"]


def stamp(document: Path, name: str, content: str) -> None:
    """Replace what stands between ``<!-- begin NAME -->`` and ``<!-- end NAME -->`` in a Markdown file."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    text = document.read_text()
    if begin not in text or end not in text:
        raise ValueError(f"{document} has no markers {begin} ... {end}")
    before, rest = text.split(begin, 1)
    after = rest.split(end, 1)[1]
    write_atomically(document, f"{before}{begin}\n{content.strip()}\n{end}{after}".encode())


def _provenance_table(described: list[tuple[Path, dict]]) -> pd.DataFrame:
    columns = ("source", "seed", "commit", "dirty", "date", "python", "hardware", "seconds_since_start")
    rows = [{"file": path.name} | {column: facts[column] for column in columns} for path, facts in described]
    frame = pd.DataFrame(rows, columns=["file", *columns])
    return frame.assign(commit=frame["commit"].str[:10])


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return "" if pd.isna(value) else f"{value:.4g}"
    return str(value)


def _git_state() -> tuple[str, bool | None]:
    """The commit checked out, and whether anything but results differs from it; ("unknown", None) outside git."""
    git = ["git", "-C", str(project_root())]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = [*git, "status", "--porcelain", "--", ":/", ":!/results", ":!/README.md"]
        return commit, bool(subprocess.run(changed, capture_output=True, text=True, check=True).stdout.strip())
    except (OSError, subprocess.CalledProcessError):
        return "unknown", None


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "absent"
    return versions


def _processor() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
