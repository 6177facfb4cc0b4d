"""The only writer of results/: tables as CSV and Markdown, figures as PNG, metrics as JSON, each
with provenance.

Also of the pages that show them: results/<name>/README.md, and the tables in the README of the
project.
"""

import hashlib
import io
import json
import os
import platform
import re
import subprocess
import sys
import time
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from matplotlib.figure import Figure

from avit_lib.data import project_root
from avit_lib.errors import UserError
from avit_lib.study.settings import Profile
from avit_lib.training import read_json, write_atomically, write_json

PACKAGES = ("torch", "torchvision", "timm", "torchmetrics", "numpy", "pandas", "seaborn")
BY_NOTEBOOK = re.compile(
    r"\d\d_\w+"
)  # what the provenance of a notebook's results calls its source
# Set while `make` runs a notebook; results of one that is run by hand go aside, not over those
RUNNER = "AVIT_RUNNER"
FIGURE_DPI = 120
FOLDED = 40  # rows; in pages longer tables are folded away until a reader opens them


def results_dir(name: str) -> Path:
    """Where the results of a profile lie: results/<profile>/ under $AVIT_RESULTS or in the
    checkout.
    """
    return Path(os.environ.get("AVIT_RESULTS") or project_root() / "results") / name


def show_tables_rounded() -> None:
    """In a notebook, let data frames look as in the pages of results: rounded, without an index
    that only counts.
    """
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell:
        shell.display_formatter.formatters["text/html"].for_type(pd.DataFrame, to_html)


def to_html(frame: pd.DataFrame) -> str:
    """A data frame as an HTML table: numbers with four significant digits, an index only if it is
    no number.
    """
    index = not pd.api.types.is_integer_dtype(frame.index)
    with pd.option_context("display.max_colwidth", None):
        return frame.map(_cell).to_html(index=index, border=0, max_rows=60)


class Sentence(str):
    """Words that a notebook shows as a paragraph."""

    def _repr_markdown_(self) -> str:
        return str(self)


class Results:
    """The results folder of one profile and seed: ``table``, ``figure`` and ``metrics`` write into
    it.
    """

    def __init__(self, name: str, seed: int, source: str):
        """``source`` names what makes these results, a notebook say; the clock of their duration
        starts here.
        """
        self.name, self.seed, self.source = name, seed, source
        by_hand = BY_NOTEBOOK.fullmatch(source) and RUNNER not in os.environ
        self.folder = results_dir(name) / ("by_hand" if by_hand else "")
        self._started = time.perf_counter()
        _git_state()  # as the code is now that these results come from

    def table(self, frame: pd.DataFrame, name: str, caption: str) -> pd.DataFrame:
        """Write ``frame`` to tables/<name>.csv and .md; returns it, so that a cell can end in
        it.
        """
        path = self.folder / "tables" / name
        write_atomically(
            path.with_suffix(".csv"), frame.to_csv(index=False, float_format="%.6g").encode()
        )
        write_atomically(path.with_suffix(".md"), (to_markdown(frame) + "\n").encode())
        self._describe(path, caption)
        return frame

    def read(self, name: str) -> pd.DataFrame:
        """The table that an earlier notebook wrote, by hand or by make; raises UserError when there
        is none.
        """
        for folder in (self.folder, results_dir(self.name)):
            if (path := folder / "tables" / f"{name}.csv").is_file():
                return pd.read_csv(path)
        raise UserError(
            f"{path} is missing; run the notebooks before this one: `make notebooks PROFILE={self.name}`"
        )

    def figure(self, figure: Figure, name: str, caption: str) -> Figure:
        """Write ``figure`` to figures/<name>.png; returns it, so that a cell can end in it."""
        path, png = self.folder / "figures" / f"{name}.png", io.BytesIO()
        figure.savefig(png, format="png", dpi=FIGURE_DPI, bbox_inches="tight", facecolor="white")
        write_atomically(path, png.getvalue())
        self._describe(path, caption)
        return figure

    def finding(self, words: str, name: str) -> "Sentence":
        """Write a sentence on what was found, computed from the numbers, to findings/<name>.md;
        returns it, shown.
        """
        path, words = self.folder / "findings" / f"{name}.md", " ".join(words.split())
        write_atomically(path, (words + "\n").encode())
        self._describe(path, words)
        return Sentence(words)

    def metrics(self, values: dict[str, Any], name: str) -> None:
        """Write ``values`` to metrics/<name>.json with the provenance inside."""
        write_json(
            self.folder / "metrics" / f"{name}.json", {**values, "provenance": self._provenance()}
        )

    def _describe(self, path: Path, caption: str) -> None:
        write_json(
            path.with_suffix(".json"), {"caption": caption, "provenance": self._provenance()}
        )

    def _provenance(self) -> dict[str, Any]:
        seconds = round(time.perf_counter() - self._started, 1)
        return {
            "source": self.source,
            **provenance(self.name, self.seed),
            "seconds_since_start": seconds,
        }


def provenance(profile: str, seed: int) -> dict[str, Any]:
    """Where a number comes from: commit and whether the code differed from it, seed, versions,
    hardware, date.
    """
    date, packages = (
        time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        {name: version(name) for name in PACKAGES},
    )
    code = dict(zip(("commit", "dirty"), _git_state(), strict=True))
    computer = {"python": platform.python_version(), "packages": packages, "hardware": hardware()}
    return {"profile": profile, "seed": seed, **code, "date": date, **computer}


def digest(value: Any) -> str:
    """A short hash of a value that can be JSON."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def hardware() -> str:
    """The processor, its threads, and the GPU if one is visible, in words."""
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    processor = named[1] if named else platform.processor() or platform.machine()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{processor}, {torch.get_num_threads()} threads{gpu}"


def to_markdown(frame: pd.DataFrame) -> str:
    """A data frame as a Markdown table: numbers with four significant digits, right-aligned."""
    right = [pd.api.types.is_numeric_dtype(frame[column]) for column in frame.columns]
    rows = [list(frame.columns), ["---:" if number else ":---" for number in right]]
    rows += [[_cell(value) for value in row] for row in frame.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if pd.isna(value) else f"{value:.4g}"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


@cache
def _git_state() -> tuple[str, bool | None]:
    """The commit at the first call, and whether anything but results differed; ("unknown", None)
    outside git.
    """
    git = ["git", "-C", str(project_root())]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = [*git, "status", "--porcelain", "--", ":/", ":!/results", ":!/README.md"]
        return commit, bool(
            subprocess.run(changed, capture_output=True, text=True, check=True).stdout.strip()
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown", None


# --- pages ----------------------------------------------------------------------------------------


class Collection(NamedTuple):
    """Results that belong to no profile: the name of their folder, what they are, the command that
    makes them.
    """

    name: str
    purpose: str
    command: str
    notes: tuple[str, ...] = ()


def write_page(about: Profile | Collection) -> Path:
    """Write results/<name>/README.md: every table inline, every figure shown, provenance at the
    end.
    """
    folder, command = (
        results_dir(about.name),
        getattr(about, "command", f"make reproduce PROFILE={about.name}"),
    )
    lines = [f"# Results: {about.name}", "", f"{about.purpose[0].upper()}{about.purpose[1:]}.", ""]
    lines += [f"Made by `{command}`; this page is generated, do not edit it.", ""]
    found = [path.read_text() for path in sorted((folder / "findings").glob("*.md"))]
    lines += ["## Findings", "", *found] if found else []
    made = []
    for kind, suffix in (("tables", ".md"), ("figures", ".png")):
        lines += [f"## {kind.capitalize()}", ""]
        for path in sorted((folder / kind).glob(f"*{suffix}")):
            facts = read_json(path.with_suffix(".json"))
            made.append({"file": path.name} | facts["provenance"])
            lines += [f"### {path.stem.replace('_', ' ')}", "", facts["caption"], ""]
            if kind == "figures":
                lines += [f"![{path.stem}]({kind}/{path.name})", ""]
                continue
            table = path.read_text().splitlines()
            if len(table) - 2 > FOLDED:
                table = [
                    "<details>",
                    f"<summary>{len(table) - 2} rows</summary>",
                    "",
                    *table,
                    "",
                    "</details>",
                ]
            lines += [*table, "", f"[CSV]({kind}/{path.stem}.csv)", ""]
    columns = [
        "file",
        "source",
        "seed",
        "commit",
        "dirty",
        "date",
        "python",
        "hardware",
        "seconds_since_start",
    ]
    origins = pd.DataFrame(made, columns=columns)
    lines += [
        "## Provenance",
        "",
        to_markdown(origins.assign(commit=origins["commit"].str[:10])),
        "",
    ]
    packages = made[0]["packages"] if made else {}
    lines += [
        "Packages: " + ", ".join(f"{name} {number}" for name, number in packages.items()) + ".",
        "",
    ]
    lines += [f"- {note}" for note in about.notes]
    target = folder / "README.md"
    write_atomically(target, ("\n".join(lines).rstrip() + "\n").encode())
    return target


def stamp_pages() -> None:
    """``stamp_page`` for README.md, results/README.md and notebooks/README.md."""
    for page in ("README.md", "results/README.md", "notebooks/README.md"):
        stamp_page(project_root() / page)


def stamp_page(page: Path) -> None:
    """Put tables and findings into a page, each between its markers, such as ``<!-- begin
    caltech24/04_summary -->``.

    Below each table stands the command that made it, and below those of the benchmark what it was
    measured on.
    """
    before = text = page.read_text() if page.is_file() else ""
    for begin, name, table in re.findall(r"(<!-- begin (\w+)/(\w+) -->)", before):
        path, end = results_dir(name) / "tables" / f"{table}.md", f"<!-- end {name}/{table} -->"
        finding = results_dir(name) / "findings" / f"{table}.md"
        if end in text and finding.is_file():
            text = f"{text.split(begin)[0]}{begin}\n{finding.read_text()}{end}{text.split(end)[1]}"
        if end not in text or not path.is_file():
            continue
        described = read_json(path.with_suffix(".json"))
        facts = described["provenance"]
        command = "sweep" if table.startswith("sweep") else "reproduce"
        made = (
            facts["source"]
            if name == "benchmark"
            else f"make {command} PROFILE={name} SEED={facts['seed']}"
        )
        note = f"\n\n{described['caption']}" if name == "benchmark" else ""
        line = f"Made by `{made}`, commit {facts['commit'][:10]}, {facts['date']}, on {facts['hardware']}."
        content = f"{begin}\n{path.read_text().strip()}{note}\n\n{line}\n{end}"
        text = text.split(begin)[0] + content + text.split(end)[1]
    if text != before:
        write_atomically(page, text.encode())
