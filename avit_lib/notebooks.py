"""The notebooks as files: run them, tell which are out of date, stamp the repository's address into them."""

import argparse
import ast
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nbformat
import papermill
from papermill.exceptions import PapermillExecutionError
from tqdm import tqdm

from avit_lib import reporting
from avit_lib.checkpoints import read_json, write_atomically, write_json
from avit_lib.config import PROFILES, Profile, StudyError, get_profile, project_root, results_dir
from avit_lib.study import fingerprint, imported_modules, sources

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KERNEL = "python3"
WIDGET = "application/vnd.jupyter.widget-view+json"
BY_NOTEBOOK = re.compile(r"\d\d_\w+")  # what the provenance of a notebook's results calls its source
README_TABLE = "04_summary"  # the table of each profile that README.md shows

GITHUB = "https://github.com/"
BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
BOOTSTRAP = """\
# On Colab this installs the library of the study; elsewhere it does nothing.
import subprocess
import sys
from importlib import invalidate_caches, metadata, util
from pathlib import Path

if not all(util.find_spec(name) for name in ("avit_lib", "timm", "torchmetrics")):
    if not (util.find_spec("google") and util.find_spec("google.colab")):
        sys.exit("the library of the study is not installed: run `make setup`, and choose the kernel of .venv")
    found = [folder for folder in (Path.cwd().parent, Path.cwd()) if (folder / "avit_lib" / "study.py").is_file()]
{without_checkout}
    pins = [f"{{name}}=={{metadata.version(name)}}" for name in ("torch", "torchvision")]  # Colab's own
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", str(found[0]), *pins], check=True)
    invalidate_caches()"""
ASK_FOR_CHECKOUT = """\
    if not found:
        sys.exit("no checkout here: upload or clone the repository, `%cd` to its notebooks folder, run this again")"""


class NotebookFailed(Exception):
    """A cell failed; the message names the notebook, the error and the failed copy."""


@dataclass(frozen=True)
class Runner:
    """Runs the notebooks in ``folder`` for one profile and seed; executed copies go to ``results``/notebooks."""

    profile: Profile
    seed: int
    folder: Path
    results: Path

    def run_all(self) -> None:
        """Run every notebook."""
        self._run_each(lambda name: "running")

    def run_stale(self) -> None:
        """Run the notebooks whose results are out of date, by what they depend on and not by the age of files."""
        self._run_each(self.why_stale)

    def run_fresh(self) -> None:
        """Run every notebook from scratch, or go on with such a run that was interrupted.

        Results are replaced one by one; what earlier notebooks made and these no longer do is removed at the end.
        """
        marker = self.results / ".reproduce.json"
        code = {name: self._code_state(name) for name in self.names()}
        progress = read_json(marker) if marker.is_file() else {}
        if progress.get("code") == code:
            print(f"going on with the run that was interrupted: {len(progress['finished'])} of {len(code)} done")
        else:
            for folder in (self.results / "checkpoints").glob("*"):
                if folder.name != "search" and not folder.name.startswith("seed"):  # these are not the notebooks'
                    shutil.rmtree(folder)
            progress = {"started": time.time(), "code": code, "finished": []}
            write_json(marker, progress)

        def finished(name: str) -> None:
            progress["finished"].append(name)
            write_json(marker, progress)

        self._run_each(lambda name: "" if name in progress["finished"] else "running", finished)
        self._remove_older(progress["started"])
        marker.unlink()

    def names(self) -> list[str]:
        """The notebooks in the order in which they run; raises StudyError when there are none."""
        names = sorted(path.stem for path in self.folder.glob("*.ipynb"))
        if not names:
            raise StudyError(f"no notebooks in {self.folder}; run this in the repository")
        return names

    def why_stale(self, name: str) -> str:
        """What changed since the notebook last ran, in words; empty if it is up to date."""
        record = self._records().get(name)
        if record is None or not self._executed(name).is_file():
            return "not run yet"
        changed = [key for key, value in self._state(name).items() if record["state"].get(key) != value]
        return f"out of date ({', '.join(changed)} changed)" if changed else ""

    def _run_each(self, why: Callable[[str], str], finished: Callable[[str], None] = lambda name: None) -> None:
        """Run the notebooks for which ``why`` gives a reason; call ``finished`` after each."""
        names = self.names()
        for number, name in enumerate(names, start=1):
            label = f"[{number}/{len(names)}] {name}"
            reason = why(name)
            if not reason:
                print(f"{label}: up to date", flush=True)
                continue
            print(f"{label}: {reason}{self._estimate([name, *filter(why, names[number:])])}", flush=True)
            started = time.perf_counter()
            self._execute(name)
            seconds = round(time.perf_counter() - started, 1)
            self._record(name, seconds)
            finished(name)
            print(f"{label}: done in {_duration(seconds)}", flush=True)

    def _execute(self, name: str) -> None:
        """Run one notebook; the last good copy gives way only to a good one. Raises NotebookFailed."""
        executed = self._executed(name)
        running, failed = executed.with_suffix(".running.ipynb"), executed.with_suffix(".failed.ipynb")
        executed.parent.mkdir(parents=True, exist_ok=True)
        os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"  # this environment's kernel, though the user may have others
        try:
            papermill.execute_notebook(
                self.folder / f"{name}.ipynb",
                running,
                parameters={"PROFILE": self.profile.name, "SEED": self.seed},
                kernel_name=KERNEL,
                language="python",
                cwd=self.folder,
                progress_bar={"desc": name, "leave": False, "disable": None},
                stdout_file=_Echo(),
                start_timeout=300,  # seconds, for busy machines
                extra_arguments=["--log-level=CRITICAL"],  # the kernel's own log; errors of cells come by another way
            )
        except (PapermillExecutionError, RuntimeError) as error:  # RuntimeError: the kernel died or did not start
            if running.is_file():
                running.replace(failed)
            raise NotebookFailed(f"{name}{_in_words(error)}\n  the failed copy: {os.path.relpath(failed)}") from None
        except KeyboardInterrupt:
            running.unlink(missing_ok=True)
            raise
        write_atomically(running, tidy(running.read_text(), self.folder.parent).encode())
        running.replace(executed)
        failed.unlink(missing_ok=True)

    def _executed(self, name: str) -> Path:
        return self.results / "notebooks" / f"{name}.ipynb"

    def _state(self, name: str) -> dict:
        """All that the results of a notebook depend on."""
        return {**self._code_state(name), "checkpoints": self._checkpoints(name)}

    def _code_state(self, name: str) -> dict:
        notebook = nbformat.read(self.folder / f"{name}.ipynb", as_version=4)
        stamp_notebook(notebook, "")  # the address does not count
        modules = {module for code in _code(notebook) for module in imported_modules(code)}
        return {
            "cells": _digest([(cell.cell_type, cell.source) for cell in notebook.cells]),
            "library": fingerprint(sources(["__init__", *modules])),
            "settings": _digest(self.profile.settings()),
            "seed": self.seed,
        }

    def _checkpoints(self, name: str) -> dict[str, str | None]:
        """The checksums of the checkpoints that this notebook and those before it train; None: not there."""
        trained = set()
        for earlier in [other for other in self.names() if other <= name]:
            notebook = nbformat.read(self.folder / f"{earlier}.ipynb", as_version=4)
            trained |= _trained(notebook, {run.name for run in self.profile.runs})
        return {run: self._checksum(run) for run in sorted(trained)}

    def _checksum(self, run: str) -> str | None:
        weights = self.results / "checkpoints" / run / "last.safetensors"
        return read_json(weights.with_suffix(".json"))["sha256"] if weights.is_file() else None

    def _records(self) -> dict[str, dict]:
        """Of each notebook that ran: what its results depend on, how long it took, provenance."""
        path = self.results / "metrics" / "notebooks.json"
        return read_json(path) if path.is_file() else {}

    def _record(self, name: str, seconds: float) -> None:
        record = {
            "state": self._state(name),
            "seconds": seconds,
            "provenance": reporting.provenance(self.profile.name, self.seed),
        }
        records = {key: value for key, value in self._records().items() if key in self.names()}
        write_json(self.results / "metrics" / "notebooks.json", dict(sorted({**records, name: record}.items())))

    def _estimate(self, names: list[str]) -> str:
        """How many notebooks are left and, if all of them ran before, how long they took then."""
        more = f", {len(names) - 1} more to come" if len(names) > 1 else ""
        records = self._records()
        if not all(name in records for name in names):
            return more
        return f"{more}; last time this took {_duration(sum(records[name]['seconds'] for name in names))}"

    def _remove_older(self, started: float) -> None:
        """Remove results of notebooks written before ``started``, and executed copies of notebooks that are gone.

        A table, figure or metric is a notebook's if its provenance says so; all others stay.
        """
        for kind in ("tables", "figures", "metrics"):
            for path in (self.results / kind).glob("*.json"):
                source = str(read_json(path).get("provenance", {}).get("source", ""))
                if BY_NOTEBOOK.fullmatch(source) and path.stat().st_mtime < started:
                    for suffix in (".csv", ".md", ".png", ".json"):
                        path.with_suffix(suffix).unlink(missing_ok=True)
        for path in (self.results / "notebooks").glob("*.ipynb"):
            if path.stem not in self.names():
                path.unlink()


class _Echo:
    """Shows what the cells print, above the progress bar where there is one."""

    def write(self, text: str) -> None:
        tqdm.write(text, end="")

    def flush(self) -> None:
        sys.stdout.flush()


def tidy(text: str, root: Path) -> str:
    """An executed notebook without times of day, paths of this machine and progress bars that are over."""
    notebook = nbformat.reads(text, as_version=4)
    notebook.metadata.pop("papermill", None)
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
        for output in cell.get("outputs", []):
            texts = output if "text" in output else output.get("data", {})
            for key, value in texts.items():
                if isinstance(value, str) and key.startswith("text"):
                    texts[key] = value.replace(f"{root}/", "").replace(str(root), ".").replace(str(Path.home()), "~")
    return nbformat.writes(notebook) + "\n"


def repository_address(root: Path) -> str:
    """The public address of the repository from pyproject.toml; empty while it has none."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    return project.get("urls", {}).get("Repository", "").removesuffix("/").removesuffix(".git")


def stamp_notebook(notebook: nbformat.NotebookNode, address: str, name: str = "") -> None:
    """Put the badge that opens the notebook in Colab into its title cell, and the bootstrap cell below it."""
    title = notebook.cells[0]
    lines = title.source.splitlines()
    if lines and lines[0].startswith(BADGE):
        lines = lines[2:]
    if address.startswith(GITHUB):
        place = f"{address.removeprefix(GITHUB)}/blob/main/notebooks/{name}.ipynb"
        lines = [f"{BADGE}(https://colab.research.google.com/github/{place})", "", *lines]
    title.source = "\n".join(lines)
    for cell in notebook.cells:
        if "bootstrap" in cell.metadata.get("tags", []):
            cell.source = bootstrap(address)


def bootstrap(address: str) -> str:
    """The code of the bootstrap cell."""
    return BOOTSTRAP.format(without_checkout=f'    found.append("git+{address}")' if address else ASK_FOR_CHECKOUT)


def stamp(folder: Path, address: str, check: bool = False) -> list[str]:
    """Stamp the notebooks in ``folder``; returns the names of those that were not up to date (``check``: only that)."""
    outdated = []
    for path in sorted(folder.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        before = nbformat.writes(notebook)
        stamp_notebook(notebook, address, path.stem)
        after = nbformat.writes(notebook)
        if after != before:
            outdated.append(path.stem)
            if not check:
                write_atomically(path, (after + "\n").encode())
    return outdated


def stamp_readme(readme: Path) -> None:
    """Put the table of each profile between the markers results-<profile> of README.md, where both are there.

    Likewise its sweep over seeds, between those called sweep-<profile>; and the benchmark's, measured on a CPU: its
    summary, and the cost of training on ImageNet.
    """
    places = [(f"results-{name}", name, README_TABLE) for name in PROFILES]
    places += [(f"sweep-{name}", name, "sweep_summary") for name in PROFILES]
    places += [("results-benchmark", "benchmark", "summary_cpu"), ("cost", "benchmark", "cost_cpu")]
    for marker, name, table_name in places:
        table = results_dir(name) / "tables" / f"{table_name}.md"
        if readme.is_file() and f"<!-- begin {marker} -->" in readme.read_text() and table.is_file():
            described = read_json(table.with_suffix(".json"))
            facts = described["provenance"]
            command = "sweep" if marker.startswith("sweep") else "reproduce"
            made = f"make {command} PROFILE={name} SEED={facts['seed']}" if name in PROFILES else facts["source"]
            line = f"Made by `{made}`, commit {facts['commit'][:10]}, {facts['date']}, on {facts['hardware']}."
            note = "" if name in PROFILES else f"\n\n{described['caption']}"
            reporting.stamp(readme, marker, f"{table.read_text().strip()}{note}\n\n{line}")


def summarise(profile: Profile) -> None:
    """Write the page of a profile's results and the tables in README.md."""
    print(f"results: {reporting.write_summary(profile)}")
    stamp_readme(project_root() / "README.md")


def main(arguments: list[str] | None = None) -> int:
    """The command line: ``python -m avit_lib.notebooks {run,stamp,summary}``; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options) or 0
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except NotebookFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m avit_lib.notebooks", description=__doc__)
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run", help="run the notebooks by papermill")
    run.add_argument("--seed", type=int, default=0, help="seed of everything random (default 0)")
    which = run.add_mutually_exclusive_group()
    which.add_argument("--fresh", action="store_true", help="train again too; goes on after an interruption")
    which.add_argument("--stale", action="store_true", help="only the notebooks that are out of date")
    run.set_defaults(command=_run)
    badge = commands.add_parser("stamp", help="stamp the repository's address into the notebooks")
    badge.add_argument("--check", action="store_true", help="change nothing; exit 1 if a notebook is not up to date")
    badge.set_defaults(command=_stamp)
    summary = commands.add_parser("summary", help="write the pages of results again")
    summary.set_defaults(command=lambda options: summarise(get_profile(options.profile)))
    for command in (run, summary):
        command.add_argument("--profile", default="fashion", help=f"one of {', '.join(PROFILES)} (default fashion)")
    return parser


def _run(options: argparse.Namespace) -> int:
    profile = get_profile(options.profile)
    runner = Runner(profile, options.seed, project_root() / "notebooks", results_dir(profile.name))
    if options.fresh:
        runner.run_fresh()
    elif options.stale:
        runner.run_stale()
    else:
        runner.run_all()
    summarise(profile)
    return 0


def _stamp(options: argparse.Namespace) -> int:
    root = project_root()
    outdated = stamp(root / "notebooks", repository_address(root), options.check)
    print(f"{'out of date' if options.check else 'stamped'}: {', '.join(outdated) or 'none'}")
    return int(options.check and bool(outdated))


def _code(notebook: nbformat.NotebookNode) -> list[str]:
    """The code cells; one that is not Python is left out, it will fail when it runs."""
    return [cell.source for cell in notebook.cells if cell.cell_type == "code" and _parses(cell.source)]


def _parses(code: str) -> bool:
    try:
        ast.parse(code)
    except SyntaxError:
        return False
    return True


def _trained(notebook: nbformat.NotebookNode, runs: set[str]) -> set[str]:
    """Those of ``runs`` that a notebook trains: the names it gives to ``train``, all if one is not written out."""
    nodes = [node for code in _code(notebook) for node in ast.walk(ast.parse(code))]
    calls = [node for node in nodes if isinstance(node, ast.Call) and node.args]
    given = [call.args[0] for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "train"]
    if not all(isinstance(argument, ast.Constant) for argument in given):
        return runs
    return runs & {argument.value for argument in given}


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _in_words(error: Exception) -> str:
    """The error of a cell: where, and what; of a StudyError only its message."""
    if not isinstance(error, PapermillExecutionError):
        return f" could not be run:\n  {error}"
    what = error.evalue if error.ename in ("StudyError", "SystemExit") else f"{error.ename}: {error.evalue}"
    return f" failed in cell [{error.exec_count}]:\n  {what}"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # to be terminated is to be interrupted
    sys.exit(main())
