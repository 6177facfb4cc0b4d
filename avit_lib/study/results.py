"""The only writer of results/: tables as CSV and Markdown, figures as PNG, metrics as JSON.

Where they come from stands once a notebook, in provenance/<notebook>.json.
"""

import io
import json
import platform
import re
import shlex
import subprocess
import time
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from avit_lib.errors import UserError
from avit_lib.places import find_folder
from avit_lib.training import read_json, write_atomically, write_json

# At the end of a table's page; some name the notebook as one.
MADE_BY = re.compile(r"^Made by (?:notebook )?(\S+)\.$", re.MULTILINE)
OF_FILES = ("seed", "commit", "dirty", "date", "hardware")  # facts that each file has by itself
PACKAGES = ("torch", "torchvision", "timm", "torchmetrics", "numpy", "pandas", "seaborn")


def results_dir(profile: str) -> Path:
    """Where the results of a profile lie: under $AVIT_RESULTS, or results/ in the checkout."""
    return find_folder("AVIT_RESULTS", "results") / profile


class Sentence(str):
    """Words that a notebook shows as a paragraph."""

    def _repr_markdown_(self) -> str:
        return str(self)


class Results:
    """Writes what a notebook finds into the results folder of a profile."""

    def __init__(self, profile: str, seed: int, source: str, started: float | None = None):
        """``source`` names the notebook, or what else makes these results.

        ``started``: when, by ``time.perf_counter``; default: now.
        """
        self.profile = profile
        self.seed = seed
        self.source = source
        self.folder = results_dir(profile)
        self._started = started or time.perf_counter()

    def table(self, frame: pd.DataFrame, name: str, caption: str) -> pd.DataFrame:
        """Write ``frame`` to tables/<name>.csv and .md; returns it, so that a cell can end in it.

        In the Markdown the first line is the caption, the last one names what made it.
        """
        page = f"{' '.join(caption.split())}\n\n{to_markdown(frame)}\n\nMade by {self.source}.\n"
        self._write(f"tables/{name}.csv", frame.to_csv(index=False, float_format="%.6g"))
        self._write(f"tables/{name}.md", page)
        return frame

    def read(self, name: str, here: bool = True) -> pd.DataFrame:
        """The table that an earlier notebook wrote; if it has times, ``here``, on this machine.

        Raises UserError when there is none, or one of another seed or machine.
        """
        path = self.folder / "tables" / f"{name}.csv"
        remedy = "run the notebooks before this one: `make reproduce`"
        if not path.is_file():
            raise UserError(f"{path} is missing; {remedy}")
        table = pd.read_csv(path)
        source = MADE_BY.search(path.with_suffix(".md").read_text())[1]
        facts = read_json(self.folder / "provenance" / f"{source}.json")
        made = find_origin(facts, f"tables/{name}.csv")
        now = {"seed": self.seed, "hardware": hardware()}
        timed = here and {"images_per_second", "change"} & {*table}
        for what in ("seed", "hardware") if timed else ("seed",):
            known = made.get(what, "unknown")
            if known != now[what]:
                raise UserError(
                    f"{path} is of {what} {known}, not {now[what]}; run notebook {source} again, "
                    f"or all: `make reproduce`"
                )
        return table

    def figure(self, figure: Figure, name: str, caption: str) -> Figure:
        """Write ``figure`` to figures/<name>.png, caption and source in its metadata."""
        png = io.BytesIO()
        about = {"Description": " ".join(caption.split()), "Source": self.source}
        figure.savefig(png, dpi=120, bbox_inches="tight", facecolor="white", metadata=about)
        self._write(f"figures/{name}.png", png.getvalue())
        return figure

    def finding(self, words: str, name: str) -> Sentence:
        """Write what was found, computed from the numbers, to findings/<name>.md; returns it."""
        found = Sentence(" ".join(words.split()))
        self._write(f"findings/{name}.md", f"{found}\n")
        return found

    def metrics(self, values: dict[str, Any], name: str) -> None:
        """Write ``values`` to metrics/<name>.json."""
        self._write(f"metrics/{name}.json", f"{json.dumps(values, indent=1)}\n")

    def _write(self, place: str, content: str | bytes) -> None:
        """Write a file, and of this notebook where its results come from."""
        whole = content.encode() if isinstance(content, str) else content
        write_atomically(self.folder / place, whole)
        path = self.folder / "provenance" / f"{Path(self.source).stem}.json"
        facts = {"source": self.source, **provenance(self.profile, self.seed)}
        facts["seconds"] = round(time.perf_counter() - self._started, 1)
        facts["files"] = read_json(path).get("files", {}) if path.is_file() else {}
        facts["files"][place] = {name: facts[name] for name in OF_FILES}
        write_json(path, facts)


def find_origin(facts: dict[str, Any], place: str) -> dict[str, Any]:
    """Where a file comes from: its own facts; of a run that wrote none for each file, those of it.

    Empty for a file that the run did not write.
    """
    return facts.get("files", {place: facts}).get(place, {})


def describe_origin(made: dict[str, Any]) -> str:
    """Commit, date and machine of what ``find_origin`` found, in words."""
    commit = made["commit"][:10] + (" with changes" if made["dirty"] else "")
    return f"commit {commit}, {made['date']}, on {made['hardware']}"


def provenance(profile: str, seed: int) -> dict[str, Any]:
    """Where a number comes from: seed, commit, whether the code differed, versions, hardware."""
    commit, dirty = _git_state()
    return {
        "profile": profile,
        "seed": seed,
        "commit": commit,
        "dirty": dirty,
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "hardware": hardware(),
    }


def hardware() -> str:
    """The processor, its threads, and the GPU if one is visible, in words."""
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    processor = named[1] if named else platform.machine()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{processor}, {torch.get_num_threads()} threads{gpu}"


def to_markdown(frame: pd.DataFrame) -> str:
    """A data frame as a Markdown table: numbers with four significant digits, right-aligned."""
    known = frame.astype(object).where(frame.notna(), None)
    # Words stay words: the commit 12345e6789 is no number.
    words = [not pd.api.types.is_numeric_dtype(kind) for kind in frame.dtypes]
    return known.to_markdown(
        index=False,
        floatfmt=".4g",
        missingval="",
        disable_numparse=np.flatnonzero(words).tolist() if len(frame) else True,
    )


@cache
def _git_state() -> tuple[str, bool | None]:
    """The commit at the first call, and whether anything but results differed from it.

    ("unknown", None) outside git.
    """
    command = shlex.split("git status --porcelain=v2 --branch -- :/ :!/results :!/README.md")
    code = Path(__file__).resolve().parents[2]  # the checkout that runs, wherever we stand
    try:
        if not (code / "pyproject.toml").is_file():
            return "unknown", None
        told = subprocess.check_output(command, cwd=code, stderr=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        return "unknown", None
    head, *lines = told.decode().splitlines()  # "# branch.oid <commit>", then others
    return head.split()[-1], any(not line.startswith("#") for line in lines)
