"""`make reproduce` in a small tree, with a stub for papermill: what runs again, and when."""

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT
from nbformat.v4 import new_code_cell, new_notebook

NOTEBOOKS = {  # name to what it imports
    "01_algorithm": "from avit_lib import halting",
    "02_finetune_deit": "from avit_lib.study import Study",
    "03_train_avit": "from avit_lib.study import Study",
    "04_evaluation": "from avit_lib.report.tables import summary",
    "05_halting_analysis": "import avit_lib.report.figures as figures",
    "06_efficiency": "def late():\n    from avit_lib.report import figures",
    "07_adapt": "%matplotlib inline\n",  # a cell that is no Python
    "08_seeds": "import pandas",
    "09_paper": "import pandas",
    "10_verdicts": "import pandas",
    "11_ablations": "import pandas",
}
LIBRARY = {
    "__init__.py": "from avit_lib import halting\n",
    "halting.py": "",
    "unused.py": "import avit_lib.halting\n",
    "study/__init__.py": "from avit_lib.study.study import Study\n",
    "study/study.py": "class Study: ...\n",
    "study/profiles/base.toml": 'purpose = "x"\n[runs.a]\nextends = "other"\n',
    "study/profiles/small.toml": 'extends = "base"\n',
    "report/__init__.py": "",
    "report/figures.py": "",
    "report/tables.py": "def summary():\n    import avit_lib.report.figures\n",
    "report/theme.mplstyle": "",
}
STUB = f"""#!/bin/sh
if [ "$2" != papermill ]; then
    case $1 in *dependencies.py) exec {sys.executable} "$@";; esac
    exit 0
fi
echo "papermill $*" >> calls
cp "$3" "$4"
grep -q raise "$3" || exit 0
echo "ValueError: no such thing" >&2
echo >&2
exit 1
"""
EVERY = {name for name in NOTEBOOKS if name < "08"}
AFTER_02 = EVERY - {"01_algorithm"}
WITH_FIGURES = {"04_evaluation", "05_halting_analysis", "06_efficiency", "07_adapt"}

CHANGES = {  # a file to what runs again when it changes
    "notebooks/01_algorithm.ipynb": {"01_algorithm"},
    "notebooks/02_finetune_deit.ipynb": AFTER_02,
    "notebooks/04_evaluation.ipynb": WITH_FIGURES,
    "notebooks/draft.ipynb": set(),
    "avit_lib/halting.py": EVERY,
    "avit_lib/study/study.py": AFTER_02,
    "avit_lib/report/figures.py": WITH_FIGURES,
    "avit_lib/report/theme.mplstyle": WITH_FIGURES,
    "avit_lib/unused.py": set(),
    "avit_lib/study/profiles/base.toml": EVERY,
    "avit_lib/study/profiles/small.toml": set(),
    "README.md": set(),
}


def write_notebook(name, code):
    nbformat.write(new_notebook(cells=[new_code_cell(code)]), f"notebooks/{name}.ipynb")


@pytest.fixture
def tree(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("avit_lib/study/profiles", "avit_lib/report", "notebooks", "scripts", "env/bin"):
        Path(folder).mkdir(parents=True)
    for name, code in LIBRARY.items():
        Path("avit_lib", name).write_text(code)
    for name, code in NOTEBOOKS.items():
        write_notebook(name, code)
    write_notebook("draft", "")
    for name in ("Makefile", "pyproject.toml", "requirements.lock", "scripts/dependencies.py"):
        shutil.copy(ROOT / name, name)
    python = Path("env/bin/python")
    python.write_text(STUB)
    python.chmod(0o755)
    Path("env/.avit-setup").touch()
    own = ("AVIT_RESULTS", "AVIT_DATA", "AVIT_WEIGHTS", "PROFILE", "SEED", "VENV")
    for name in ("MAKEFLAGS", "MAKEOVERRIDES", *own):
        monkeypatch.delenv(name, raising=False)


def reproduce(*arguments, profile="base"):
    command = ["make", "reproduce", "VENV=env", f"PROFILE={profile}", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def named(done):
    """The notebooks that a run, or a dry one, says it runs."""
    assert done.returncode == 0, done.stderr
    lines = [line.removeprefix('echo "') for line in done.stdout.splitlines()]
    return [line.split()[1].rstrip(":") for line in lines if line.startswith("notebook ")]


def test_a_fresh_clone_runs_everything_in_order_and_then_nothing(tree):
    dry = reproduce("-n")
    assert "has not run yet" in dry.stdout and not Path("calls").exists()
    assert set(named(dry)) == EVERY
    assert named(reproduce()) == sorted(EVERY)
    executed = {path.stem for path in Path("results/base/notebooks").iterdir()}
    assert executed == EVERY
    assert named(reproduce()) == named(reproduce("-n")) == []
    copy = Path("results/base/notebooks/05_halting_analysis.ipynb")
    for change in (copy.unlink, partial(copy.write_text, "as `git checkout` brings it back")):
        change()
        assert named(reproduce()) == ["05_halting_analysis"]
    call = Path("calls").read_text().splitlines()[0]
    assert "--cwd notebooks --kernel python3 -r PROFILE base -p SEED 0" in call
    last = ["08_seeds", "10_verdicts", "09_paper", "11_ablations"]
    assert named(reproduce("seeds", "paper")) == last
    assert set(named(reproduce("SEED=1"))) == EVERY
    assert named(reproduce("SEED=1")) == []
    given = ["SEED=1"]
    for name in ("AVIT_DATA", "AVIT_WEIGHTS"):
        given.append(f"{name}=/other")
        assert set(named(reproduce(*given))) == EVERY
    assert named(reproduce(*given)) == []


def test_a_change_runs_what_depends_on_it_and_nothing_else(tree):
    Path("README.md").touch()
    named(reproduce())
    for changed, expected in CHANGES.items():
        os.utime(changed)  # now, which is later than all stamps
        dry = reproduce("-n")
        assert set(named(dry)) == expected, changed
        assert not expected or f"since its last run: {changed}" in dry.stdout
        assert set(named(reproduce())) == expected, changed


def test_a_profile_depends_on_those_that_it_extends(tree):
    Path("mine.toml").write_text('extends = "small"\n')
    assert set(named(reproduce(profile="mine.toml"))) == EVERY
    assert "-r PROFILE ../mine.toml" in Path("calls").read_text()
    Path("other").mkdir()
    Path("other/mine.toml").write_text("'extends' = 'small'\n")
    os.utime("other/mine.toml", (0, 0))  # older than what the first of its name has made
    assert set(named(reproduce(profile="other/mine.toml"))) == EVERY
    for changed in ("mine.toml", "avit_lib/study/profiles/base.toml", "mine.toml"):
        os.utime(changed)
        assert set(named(reproduce(profile="mine.toml"))) == EVERY


def test_a_failing_notebook_says_so_and_leaves_the_last_good_copy(tree):
    named(reproduce())
    copies = Path("results/base/notebooks")
    good = (copies / "03_train_avit.ipynb").read_text()
    write_notebook("03_train_avit", "raise ValueError")
    done = reproduce()
    assert done.returncode != 0
    failed = copies / "03_train_avit.failed.ipynb"
    words = f"error: notebook 03_train_avit failed: ValueError: no such thing; see {failed}"
    assert words in done.stderr.splitlines()
    assert failed.read_text() == Path("notebooks/03_train_avit.ipynb").read_text()
    assert (copies / "03_train_avit.ipynb").read_text() == good
    write_notebook("03_train_avit", "")
    assert set(named(reproduce())) == AFTER_02 - {"02_finetune_deit"}
    assert sorted(copies.glob("*.*.ipynb")) == []


def test_what_changes_while_a_notebook_runs_is_newer_than_it(tree):
    python = Path("env/bin/python")
    python.write_text(STUB.replace('cp "$3"', 'sleep 0.02; touch "$3"; cp "$3"', 1))
    named(reproduce())
    python.write_text(STUB)
    assert set(named(reproduce())) == EVERY


def test_an_unknown_profile_is_named_and_help_needs_no_environment(tree):
    done = reproduce(profile="nonsense")
    assert done.returncode != 0 and not Path("results").exists()
    assert "unknown profile 'nonsense'" in done.stderr.splitlines()[0]
    shutil.rmtree("env")
    done = subprocess.run(["make", "PROFILE=nonsense"], capture_output=True, text=True)
    assert done.returncode == 0 and "reproduce" in done.stdout and not done.stderr
