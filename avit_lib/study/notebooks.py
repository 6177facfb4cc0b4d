"""The notebooks as files: run them, tell which are out of date, stamp the repository's address into
them.
"""

import ast
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import msgspec
import nbformat
import papermill
from papermill.exceptions import PapermillExecutionError
from tqdm import tqdm

from avit_lib.errors import UserError
from avit_lib.model import register
from avit_lib.study.fingerprint import fingerprint, used_by
from avit_lib.study.results import BY_NOTEBOOK, RUNNER, digest, provenance, results_dir
from avit_lib.study.settings import Profile, get_profile
from avit_lib.training import read_json, write_atomically, write_json

RECORDS = Path("metrics", "notebooks.json")
WIDGET = "application/vnd.jupyter.widget-view+json"
ASIDE = ("sweep", "sweep_seeds", "notes")  # settings of a profile that no notebook sees
COLAB = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
COLAB += "(https://colab.research.google.com/github/{place}/blob/main/notebooks/{name}.ipynb)"


class NotebookFailed(Exception):
    """A cell failed; the message names the notebook, the error and the failed copy."""


@dataclass(frozen=True)
class Runner:
    """Runs the notebooks in ``folder`` for a profile, by name or file; executed copies go to its
    results.
    """

    source: str
    seed: int
    folder: Path

    @cached_property
    def profile(self) -> Profile:
        """The profile."""
        return get_profile(self.source)

    @property
    def results(self) -> Path:
        """The results folder of the profile."""
        return results_dir(self.profile.name)

    @property
    def names(self) -> list[str]:
        """The notebooks in the order in which they run; raises UserError when there are none."""
        if names := sorted(path.stem for path in self.folder.glob("*.ipynb")):
            return names
        raise UserError(f"no notebooks in {self.folder}; run this in the repository")

    @property
    def records(self) -> dict[str, dict]:
        """Of each notebook that ran: what its results depend on (state), how long it took,
        provenance.
        """
        path = self.results / RECORDS
        return read_json(path) if path.is_file() else {}

    def run_fresh(self) -> None:
        """Run every notebook from scratch, or go on with such a run that was interrupted.

        Results are replaced one by one; what earlier notebooks made and these no longer do is
        removed at the end.
        """
        marker = self.results / ".reproduce.json"
        code = {name: self._code(name) for name in self.names}
        begun = read_json(marker) if marker.is_file() else {}
        if begun.get("code") == code:
            print("going on with the run that was interrupted")
        else:
            for folder in (self.results / "checkpoints").glob("*"):
                if not folder.name.startswith("seed"):  # these are not the notebooks'
                    shutil.rmtree(folder)
            write_json(
                self.results / RECORDS,
                {name: known | {"state": {}} for name, known in self.records.items()},
            )
            begun = {"started": time.time(), "code": code}
            write_json(marker, begun)
        self.run_stale()
        self._remove_older(begun["started"])
        marker.unlink()

    def run_stale(self) -> None:
        """Run the notebooks whose results are out of date, by what they depend on and not by the
        age of files.
        """
        for name in self.names:
            self._renew_text(name)
        for number, name in enumerate(self.names, start=1):
            label = f"[{number}/{len(self.names)}] {name}"
            reason = self.why_stale(name)
            if not reason:
                print(f"{label}: up to date", flush=True)
                continue
            left = [name, *filter(self.why_stale, self.names[number:])]
            last_time = [self.records.get(one, {}).get("seconds") for one in left]
            estimate = f"; last time {_duration(sum(last_time))}" if all(last_time) else ""
            print(f"{label}: {reason}, {len(left) - 1} more to come{estimate}", flush=True)
            started = time.perf_counter()
            self._execute(name)
            seconds = round(time.perf_counter() - started, 1)
            origin = provenance(self.profile.name, self.seed)
            record = {"state": self._state(name), "seconds": seconds, "provenance": origin}
            known = self.records | {name: record}
            write_json(
                self.results / RECORDS, {one: known[one] for one in self.names if one in known}
            )
            print(f"{label}: done in {_duration(seconds)}", flush=True)

    def why_stale(self, name: str) -> str:
        """What changed since the notebook last ran, in words; empty if it is up to date."""
        if not self.records.get(name, {}).get("state") or not self._executed(name).is_file():
            return "to be run"
        changed = self._changed(name)
        return f"out of date ({', '.join(changed)} changed)" if changed else ""

    def _changed(self, name: str) -> list[str]:
        """The parts of a notebook's state that are not those with which it last ran."""
        known = self.records.get(name, {}).get("state", {})
        return [key for key, value in self._state(name).items() if known.get(key) != value]

    def _renew_text(self, name: str) -> None:
        """Give the executed copy the text of the notebook, where nothing but text has changed since
        it ran.
        """
        executed, records = self._executed(name), self.records
        if self._changed(name) != ["text"] or not executed.is_file():
            return
        copy, notebook = (
            nbformat.read(path, as_version=4) for path in (executed, self.folder / f"{name}.ipynb")
        )
        code = (cell for cell in copy.cells if cell.cell_type == "code")
        copy.cells = [next(code) if cell.cell_type == "code" else cell for cell in notebook.cells]
        write_atomically(executed, (nbformat.writes(copy) + "\n").encode())
        write_json(
            self.results / RECORDS, records | {name: records[name] | {"state": self._state(name)}}
        )

    def _execute(self, name: str) -> None:
        """Run one notebook; the last good copy gives way only to a good one. Raises
        NotebookFailed.
        """
        executed = self._executed(name)
        running, failed = (
            executed.with_suffix(".running.ipynb"),
            executed.with_suffix(".failed.ipynb"),
        )
        executed.parent.mkdir(parents=True, exist_ok=True)
        os.environ["JUPYTER_PREFER_ENV_PATH"] = (
            "1"  # this environment's kernel, though the user may have others
        )
        os.environ[RUNNER] = "make"
        try:
            papermill.execute_notebook(
                self._with_parameters(name),
                running,
                kernel_name="python3",
                language="python",
                cwd=self.folder,
                stdout_file=_Echo(),
                progress_bar={"desc": name, "leave": False, "disable": None},
                start_timeout=300,  # seconds, for busy machines
                extra_arguments=[
                    "--log-level=CRITICAL"
                ],  # the kernel's own log; errors of cells come by another way
            )
        except (
            PapermillExecutionError,
            RuntimeError,
        ) as error:  # RuntimeError: the kernel died or did not start
            if running.is_file():
                running.replace(failed)
            words = f"could not be run:\n  {error}"
            if isinstance(error, PapermillExecutionError):  # of a UserError only its message
                kind = "" if error.ename in ("UserError", "SystemExit") else f"{error.ename}: "
                words = f"failed in cell [{error.exec_count}]:\n  {kind}{error.evalue}"
            raise NotebookFailed(
                f"{name} {words}\n  the failed copy: {os.path.relpath(failed)}"
            ) from None
        except KeyboardInterrupt:
            running.unlink(missing_ok=True)
            raise
        write_atomically(running, tidy(running.read_text(), self.folder.parent).encode())
        running.replace(executed)
        failed.unlink(missing_ok=True)

    def _with_parameters(self, name: str) -> nbformat.NotebookNode:
        """The notebook with this profile and seed in its parameters cell, so that the copy says
        what was run.
        """
        profile = (
            os.path.relpath(self.source, self.folder)
            if self.source.endswith(".toml")
            else self.source
        )
        notebook = nbformat.read(self.folder / f"{name}.ipynb", as_version=4)
        for cell in notebook.cells:
            if "parameters" in cell.metadata.get("tags", []):
                cell.source = f"PROFILE = {json.dumps(profile)}\nSEED = {self.seed}"
        return notebook

    def _executed(self, name: str) -> Path:
        return self.results / "notebooks" / f"{name}.ipynb"

    def _state(self, name: str) -> dict:
        """All that the results of a notebook depend on: its code, the runs that it and those before
        it train, and the tables of others that it reads."""
        runs = {run.name for run in self.profile.runs}
        trained = set().union(
            *(_trained(self._read(one)[1], runs) for one in self.names if one <= name)
        )
        paths = {
            run: self.results / "checkpoints" / run / "last.safetensors" for run in sorted(trained)
        }
        known = {
            run: path.is_file() and read_json(path.with_suffix(".json"))["sha256"]
            for run, path in paths.items()
        }
        tables = {
            one: self.results / "tables" / f"{one}.csv"
            for one in _names_given(self._read(name)[1], "read")
        }
        read = {one: path.is_file() and digest(path.read_text()) for one, path in tables.items()}
        text = digest(self._read(name)[0])
        return self._code(name) | {"text": text, "checkpoints": known, "tables": read}

    @cached_property
    def _library(self) -> Callable[..., str]:
        """The fingerprint of what pieces of code use of the library, for each looked up once in a
        run.
        """
        return cache(lambda *code: fingerprint(register, *used_by(code)))

    def _code(self, name: str) -> dict:
        """What decides on the results of a notebook before it runs."""
        cells, code = self._read(name)
        settings = {
            key: value
            for key, value in msgspec.to_builtins(self.profile).items()
            if key not in ASIDE
        }
        library = self._library(*code)
        ran = digest([source for kind, source in cells if kind == "code"])
        return {"cells": ran, "library": library, "settings": digest(settings), "seed": self.seed}

    def _read(self, name: str) -> tuple[list, list[str]]:
        """The cells, and the code of those that are Python: one that is not will fail when it
        runs.
        """
        notebook, code = nbformat.read(self.folder / f"{name}.ipynb", as_version=4), []
        stamp_notebook(notebook, "")  # the address does not count
        for cell in notebook.cells:
            with suppress(SyntaxError):
                code += [cell.source] if cell.cell_type == "code" and ast.parse(cell.source) else []
        return [(cell.cell_type, cell.source) for cell in notebook.cells], code

    def _remove_older(self, started: float) -> None:
        """Remove what notebooks (as its provenance says) made before ``started``, and copies of
        notebooks not there.
        """
        for path in self.results.glob("*/*.json"):
            source = str(read_json(path).get("provenance", {}).get("source", ""))
            if BY_NOTEBOOK.fullmatch(source) and path.stat().st_mtime < started:
                for suffix in (".csv", ".md", ".png", ".json"):
                    path.with_suffix(suffix).unlink(missing_ok=True)
        for path in (self.results / "notebooks").glob("*.ipynb"):
            if path.stem not in self.names:
                path.unlink()


class _Echo:
    """Shows what the cells print, above the progress bar where there is one."""

    def write(self, text: str) -> None:
        tqdm.write(text, end="")

    def flush(self) -> None:
        sys.stdout.flush()


def tidy(text: str, root: Path) -> str:
    """An executed notebook without times of day, paths of this machine and progress bars that are
    over.
    """
    notebook = nbformat.reads(text, as_version=4)
    for part in (notebook, *notebook.cells):
        for key in ("papermill", "widgets", "execution"):
            part.metadata.pop(key, None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [
                output for output in cell.outputs if WIDGET not in output.get("data", {})
            ]
        for output in cell.get("outputs", []):
            texts = output if "text" in output else output.get("data", {})
            for key, value in texts.items():
                if isinstance(value, str) and key.startswith("text"):
                    texts[key] = (
                        value.replace(f"{root}/", "")
                        .replace(str(root), ".")
                        .replace(str(Path.home()), "~")
                    )
    return nbformat.writes(notebook) + "\n"


def repository_address(root: Path) -> str:
    """The public address of the repository from pyproject.toml; empty while it has none."""
    project = msgspec.toml.decode((root / "pyproject.toml").read_bytes())["project"]
    return project.get("urls", {}).get("Repository", "").removesuffix("/").removesuffix(".git")


def stamp_notebook(notebook: nbformat.NotebookNode, address: str, name: str = "") -> None:
    """Put the badge that opens the notebook in Colab into its title cell, and the address into its
    bootstrap cell.
    """
    title = notebook.cells[0]
    title.source = re.sub(r"\A\[!\[Open in Colab.*\n\n", "", title.source)
    if place := address.partition("https://github.com/")[2]:
        title.source = f"{COLAB.format(place=place, name=name)}\n\n{title.source}"
    for cell in notebook.cells:
        if "bootstrap" in cell.metadata.get("tags", []):
            cell.source = re.sub(r'(?m)^address = ".*"', f'address = "{address}"', cell.source)


def stamp(folder: Path, address: str, check: bool = False) -> list[str]:
    """Stamp the notebooks in ``folder``; returns the names of those that were not up to date
    (``check``: only that).
    """
    outdated = []
    for path in sorted(folder.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        before = nbformat.writes(notebook)
        stamp_notebook(notebook, address, path.stem)
        if nbformat.writes(notebook) != before:
            outdated.append(path.stem)
            if not check:
                write_atomically(path, (nbformat.writes(notebook) + "\n").encode())
    return outdated


def _trained(code: list[str], runs: set[str]) -> set[str]:
    """Those of ``runs`` that a notebook trains: the names it gives to ``train``, all if one is not
    written out.
    """
    named = _names_given(code, "train")
    return runs if None in named else runs & named


def _names_given(code: list[str], method: str) -> set[str | None]:
    """What a notebook gives first to the calls of a method: names, and None for what is not written
    out.
    """
    nodes = [
        node
        for piece in code
        for node in ast.walk(ast.parse(piece))
        if isinstance(node, ast.Call) and node.args
    ]
    given = [
        call.args[0]
        for call in nodes
        if isinstance(call.func, ast.Attribute) and call.func.attr == method
    ]
    return {argument.value if isinstance(argument, ast.Constant) else None for argument in given}


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
