"""The notebook runner, on small notebooks in a project of their own; the bootstrap cell, where
nothing is installed.
"""

import difflib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import venv
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import torch
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from avit_lib import cli
from avit_lib.errors import UserError
from avit_lib.study import Study, fingerprint, notebooks, results
from avit_lib.study.figures import batch_axis
from avit_lib.study.results import Results, stamp_page
from avit_lib.training import read_json

ROOT = Path(__file__).parents[2]
ADDRESS = "https://github.com/someone/avit"
SMOKE = ("--profile", "smoke")
BOOTSTRAP = 'address = ""  # of the repository\nassert address is not None'


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project without notebooks, as the current folder."""
    (tmp_path / "avit_lib").mkdir()
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "pyproject.toml").write_text(
        f'[project]\n[project.urls]\nRepository = "{ADDRESS}"\n'
    )
    monkeypatch.delenv("AVIT_RESULTS", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    taken = signal.getsignal(signal.SIGTERM)
    yield tmp_path
    signal.signal(signal.SIGTERM, taken)


def write(project: Path, name: str, *code: str) -> Path:
    """A notebook of a title, a bootstrap cell, the parameters and ``code``."""
    cells = [
        new_markdown_cell(f"# {name}"),
        new_code_cell(BOOTSTRAP, metadata={"tags": ["bootstrap"]}),
        new_code_cell('PROFILE = "caltech24"\nSEED = 0', metadata={"tags": ["parameters"]}),
        *[new_code_cell(textwrap.dedent(text)) for text in code],
    ]
    path = project / "notebooks" / f"{name}.ipynb"
    nbformat.write(new_notebook(cells=cells), path)
    return path


def run(*options: str) -> int:
    return cli.main(["notebooks", *SMOKE, *options])


def executed(project: Path, name: str) -> Path:
    return project / "results" / "smoke" / "notebooks" / f"{name}.ipynb"


def ran(capsys) -> list[str]:
    """The notebooks that ran since the output was last read."""
    lines = [line for line in capsys.readouterr().out.splitlines() if ": done in" in line]
    return [line.split()[1].rstrip(":") for line in lines]


FAKE_TRAINING = """
    import json
    from pathlib import Path
    class Fake:
        def train(self, run):
            folder = Path("../results/smoke/checkpoints") / run
            folder.mkdir(parents=True, exist_ok=True)
            trained = folder.exists() and (folder / "last.json").exists()
            (folder / "last.safetensors").touch()
            if not trained:
                (folder / "last.json").write_text(json.dumps({"sha256": "one"}))
            print("found" if trained else "trained", run)
    study = Fake()
"""


def test_a_notebook_runs_with_the_parameters_in_its_folder_and_in_this_environment(
    project, monkeypatch, capsys
):
    kernels = (
        project / "user" / "kernels" / "python3"
    )  # of a user who has another kernel of that name
    kernels.mkdir(parents=True)
    kernels.joinpath("kernel.json").write_text(
        json.dumps({"argv": ["false"], "display_name": "x", "language": "x"})
    )
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(project / "user"))
    write(
        project,
        "01_one",
        "import os, sys\nprint(sys.executable, PROFILE, SEED)",
        "print('in', os.getcwd())",
    )
    assert run("--seed", "3") == 0
    output = capsys.readouterr().out
    assert f"{sys.executable} smoke 3" in output
    assert f"in {project / 'notebooks'}" in output
    assert "[1/1] 01_one" in output
    copy = executed(project, "01_one").read_text()
    assert "in notebooks" in copy
    assert str(project) not in copy
    assert "papermill" not in json.loads(copy)["metadata"]


def test_only_the_runner_writes_to_the_results_of_the_profile(project, monkeypatch):
    """A notebook run by hand writes beside them, and uses the same checkpoints."""
    use = """
        from avit_lib.study import Study
        study = Study(PROFILE, SEED, source="01_one")
        study.results.finding(f"checkpoints in {study.folder('deit')}", "01_words")
    """
    write(project, "01_one", use)
    assert run() == 0
    results = project / "results" / "smoke"
    by_make = (results / "findings" / "01_words.md").read_text()
    monkeypatch.delenv("AVIT_RUNNER")
    exec(textwrap.dedent(use), {"PROFILE": "smoke", "SEED": 1})
    assert (
        json.loads((results / "findings" / "01_words.json").read_text())["provenance"]["seed"] == 0
    )
    by_hand = (results / "by_hand" / "findings" / "01_words.md").read_text()
    assert (
        by_hand.split()
        == by_make.split()
        == ["checkpoints", "in", str(results / "checkpoints" / "deit")]
    )


def test_results_name_the_commit_at_which_they_were_begun(monkeypatch, tmp_path):
    monkeypatch.setenv("AVIT_RESULTS", str(tmp_path))
    monkeypatch.setattr(results, "_git_state", cache(results._git_state.__wrapped__))
    git = SimpleNamespace(stdout="before")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: git)
    begun = Results("smoke", 0, "a test")
    git.stdout = "after"
    begun.metrics({}, "found")
    assert (
        read_json(tmp_path / "smoke" / "metrics" / "found.json")["provenance"]["commit"] == "before"
    )


def test_training_by_hand_leaves_what_make_trained(monkeypatch, tmp_path):
    monkeypatch.setenv("AVIT_RESULTS", str(tmp_path))
    monkeypatch.setenv("AVIT_RUNNER", "make")
    Study("smoke", 0, "02_deit").train("deit")
    usual = tmp_path / "smoke" / "checkpoints" / "deit"
    before = (usual / "last.safetensors").read_bytes()
    monkeypatch.delenv("AVIT_RUNNER")
    for seed, folder in (
        (0, usual),
        (1, tmp_path / "smoke" / "by_hand" / "checkpoints" / "deit"),
        (0, usual),
    ):
        study = Study("smoke", seed, "02_deit")
        study.train("deit")
        assert study.folder("deit") == folder and study.checkpoint("deit").is_file()
    assert (usual / "last.safetensors").read_bytes() == before


def test_the_copy_says_in_one_place_what_was_run(project):
    write(project, "01_one", "print(PROFILE)")
    assert run("--seed", "3") == 0
    codes = [cell.source for cell in nbformat.read(executed(project, "01_one"), as_version=4).cells]
    assert 'PROFILE = "smoke"\nSEED = 3' in codes and "caltech24" not in "".join(codes)


def test_new_text_needs_no_run(project, capsys):
    write(project, "01_one", "print('ran')")
    assert run() == 0
    copy = executed(project, "01_one").read_bytes()
    assert (
        run() == 0 and executed(project, "01_one").read_bytes() == copy
    )  # nothing changed, nothing is written
    path, before = (
        project / "notebooks" / "01_one.ipynb",
        nbformat.read(executed(project, "01_one"), as_version=4),
    )
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.insert(1, new_markdown_cell("in other words"))
    nbformat.write(notebook, path)
    capsys.readouterr()
    assert run() == 0 and "up to date" in capsys.readouterr().out
    after = nbformat.read(executed(project, "01_one"), as_version=4)
    assert after.cells.pop(1).source == "in other words" and after.cells[1:] == before.cells[1:]


def test_tables_are_shown_rounded_and_without_an_index_that_only_counts(project):
    frames = """
        import pandas as pd
        from avit_lib.study import Study
        Study(PROFILE, SEED, source="01_one")
        counted = pd.DataFrame({"words": ["one"], "value": [0.123456]}, index=[77])
        display(counted, counted.set_index("words"))
    """
    write(project, "01_one", frames)
    assert run() == 0
    outputs = nbformat.read(executed(project, "01_one"), as_version=4).cells[-1].outputs
    counted, named = (output.data["text/html"] for output in outputs)
    assert "0.1235" in counted and "one" in counted and "77" not in counted
    assert "0.1235" in named and "one" in named


def test_the_copy_is_without_progress_bars_that_are_over(project):
    bar = "from tqdm.auto import tqdm\nfor _ in tqdm(range(3), leave=False, desc='bar'): print('step')\n'value'"
    write(project, "01_one", bar)
    assert run() == 0
    copy = nbformat.read(executed(project, "01_one"), as_version=4)
    assert "widgets" not in copy.metadata
    kinds = [output.output_type for output in copy.cells[-1].outputs]
    assert "display_data" not in kinds and {"stream", "execute_result"} <= set(kinds)


def test_a_failing_cell_leaves_the_last_good_copy(project, capsys):
    write(project, "01_one", "print('good')")
    write(project, "02_two", "print('never reached')")
    assert run() == 0
    good = executed(project, "01_one").read_text()
    write(project, "01_one", "class UserError(Exception): ...", "raise UserError('the remedy')")
    capsys.readouterr()
    assert run() == 1
    captured = capsys.readouterr()
    failed = executed(project, "01_one").with_suffix(".failed.ipynb")
    assert executed(project, "01_one").read_text() == good
    assert "the remedy" in failed.read_text()
    assert captured.err.splitlines() == [
        "error: 01_one failed in cell [4]:",
        "  the remedy",
        f"  the failed copy: {os.path.relpath(failed)}",
    ]
    assert "02_two" not in captured.out.replace("more to come", "")
    assert not list(failed.parent.glob("*.running.ipynb"))
    write(project, "01_one", "print('mended')")
    assert run() == 0
    assert not failed.exists()


@pytest.mark.parametrize(
    ("cell", "message"),
    [("1 / 0", "ZeroDivisionError: division by zero"), ("import os\nos._exit(1)", "Kernel died")],
)
def test_the_error_is_in_sight(project, capsys, cell, message):
    write(project, "01_one", cell)
    assert run() == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_an_unknown_profile_touches_nothing(project, capsys):
    write(project, "01_one", "print(1)")
    assert cli.main(["notebooks", "--profile", "nonsense", "--fresh"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown profile 'nonsense'; choose from ")
    assert not (project / "results").exists()


def test_a_project_without_notebooks_is_refused(project, capsys):
    assert run() == 2
    assert "error: no notebooks in" in capsys.readouterr().err


def test_only_what_changed_runs_again(project, capsys):
    paths = [write(project, name, "print(1)") for name in ("01_one", "02_two")]
    assert run() == 0
    assert ran(capsys) == ["01_one", "02_two"]
    for path in (*paths, executed(project, "01_one")):
        os.utime(path, (1, 1))
    assert run() == 0
    assert ran(capsys) == []
    write(project, "02_two", "print(2)")
    assert run() == 0
    assert ran(capsys) == ["02_two"]
    assert cli.main(["badges"]) == 0
    assert run() == 0
    assert ran(capsys) == []
    executed(project, "01_one").unlink()
    assert run() == 0
    assert ran(capsys) == ["01_one"]
    assert run("--seed", "1") == 0
    assert ran(capsys) == ["01_one", "02_two"]


def test_a_changed_checkpoint_makes_the_notebooks_from_its_training_on_stale(project, capsys):
    write(project, "01_one", "print(1)")
    write(project, "02_train", FAKE_TRAINING, "study.train('deit')")
    write(project, "03_use", "print(3)")
    write(project, "04_train", FAKE_TRAINING, "study.train('avit')")
    assert run() == 0
    ran(capsys)
    assert run() == 0
    assert ran(capsys) == []
    checkpoints = project / "results" / "smoke" / "checkpoints"
    (checkpoints / "avit" / "last.json").write_text('{"sha256": "two"}')
    assert run() == 0
    assert ran(capsys) == ["04_train"]
    (checkpoints / "deit" / "last.safetensors").unlink()
    assert run() == 0
    assert ran(capsys) == ["02_train"]  # it trains the same weights again: those after it stand


def test_a_changed_table_makes_the_notebook_that_reads_it_stale(project, capsys):
    write(project, "01_read", "def never(study):\n    study.results.read('speed')")
    table = project / "results" / "smoke" / "tables" / "speed.csv"
    table.parent.mkdir(parents=True)
    for content, again in (("one", ["01_read"]), ("one", []), ("two", ["01_read"])):
        table.write_text(content)
        assert run() == 0
        assert ran(capsys) == again


def test_a_table_that_no_notebook_has_written_is_named(project):
    with pytest.raises(UserError, match=r"speed.csv is missing; run the notebooks before this one"):
        Results("smoke", 0, "06_efficiency").read("speed")


def test_what_a_notebook_uses_of_the_library_counts_and_nothing_else(project, monkeypatch, capsys):
    for name, function in (("01_axis", "batch_axis"), ("02_other", "percent")):  # read, not run
        write(
            project,
            name,
            f"def never():\n    from avit_lib.study import figures\n    figures.{function}",
        )
    write(project, "03_unused", "def never():\n    from avit_lib.study.figures import batch_axis")
    assert run() == 0
    ran(capsys)
    sources = fingerprint.source

    def changed(thing):
        code = sources(thing)
        return code.replace("base=2", "base=10") if thing is batch_axis else code

    assert changed(batch_axis) != sources(batch_axis)
    monkeypatch.setattr(fingerprint, "source", changed)
    assert run() == 0
    output = capsys.readouterr().out
    assert "[1/3] 01_axis: out of date (library changed), 0 more to come" in output
    assert "[2/3] 02_other: up to date" in output and "[3/3] 03_unused: up to date" in output


def test_settings_that_no_notebook_sees_do_not_put_them_out_of_date(project, capsys):
    write(project, "01_one", "print(1)")
    profile = project / "mine.toml"
    profile.write_text('extends = "smoke"')
    for content, again in (
        ("", ["01_one"]),
        ('notes = ["another"]', []),
        ("sweep_seeds = [5]", []),
        ("runs.avit.halting.beta = -1.5", ["01_one"]),
        ("data.train_per_class = 3", ["01_one"]),
        ("recalibrated = {}", ["01_one"]),
    ):
        profile.write_text(f'extends = "smoke"\n{content}\n')
        assert cli.main(["notebooks", "--profile", "mine.toml"]) == 0
        assert ran(capsys) == again, content


def test_a_profile_of_ones_own_is_taken_by_the_notebooks(project, tmp_path_factory, capsys):
    write(
        project,
        "01_one",
        "import msgspec\nprint(msgspec.toml.decode(open(PROFILE, 'rb').read())['purpose'])",
    )
    files = project / "mine.toml", tmp_path_factory.mktemp("elsewhere") / "other.toml"
    for file in files:
        file.write_text(f'extends = "smoke"\npurpose = "purpose of {file.stem}"')
        assert cli.main(["notebooks", "--profile", os.path.relpath(file)]) == 0
        assert f"purpose of {file.stem}" in capsys.readouterr().out
        copy = (project / "results" / file.stem / "notebooks" / "01_one.ipynb").read_text()
        assert f"purpose of {file.stem}" in copy and str(project) not in copy
        assert (project / "results" / file.stem / "README.md").is_file()
    assert not (project / "results" / "smoke").exists()


def test_a_fresh_run_goes_on_after_an_interruption_and_else_begins_anew(project, capsys):
    write(project, "01_train", FAKE_TRAINING, "study.train('deit')")
    write(project, "02_two", "from pathlib import Path\nassert Path('../flag').exists(), 'no flag'")
    assert run("--fresh") == 1
    assert "trained deit" in capsys.readouterr().out
    (project / "flag").touch()
    assert run("--fresh") == 0
    output = capsys.readouterr().out
    assert "going on with the run that was interrupted" in output
    assert "[1/2] 01_train: up to date" in output
    assert not (project / "results" / "smoke" / ".reproduce.json").exists()
    assert run("--fresh") == 0
    assert "trained deit" in capsys.readouterr().out


def test_a_fresh_run_keeps_the_checkpoints_of_other_seeds(project):
    write(project, "01_one", "print(1)")
    folders = [project / "results" / "smoke" / "checkpoints" / name for name in ("seed1", "deit")]
    for folder in folders:
        folder.mkdir(parents=True)
    assert run("--fresh") == 0
    assert [folder.exists() for folder in folders] == [True, False]


def test_an_interrupted_fresh_run_of_other_code_is_not_gone_on_with(project, capsys):
    write(project, "01_train", FAKE_TRAINING, "study.train('deit')")
    write(project, "02_two", "1 / 0")
    assert run("--fresh") == 1
    write(project, "02_two", "1 / 1")
    capsys.readouterr()
    assert run("--fresh") == 0
    assert "trained deit" in capsys.readouterr().out


def test_a_complete_fresh_run_leaves_no_results_of_earlier_notebooks(project):
    results = project / "results" / "smoke"

    def figure(name: str, source: str) -> Path:
        path = results / "figures" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        facts = dict.fromkeys(
            ("seed", "commit", "dirty", "date", "python", "hardware", "seconds_since_start"), "x"
        )
        facts |= {"source": source, "packages": {}}
        path.with_suffix(".json").write_text(json.dumps({"caption": "", "provenance": facts}))
        os.utime(path.with_suffix(".json"), (1, 1))
        return path

    kept, old, renamed = (
        figure("kept", "01_one"),
        figure("old", "01_one"),
        figure("renamed", "01_before"),
    )
    foreign = figure("foreign", "benchmark")
    gone = executed(project, "00_gone")
    gone.parent.mkdir()
    gone.write_text("{}")
    touch = "from pathlib import Path\nPath('../results/smoke/figures/kept.json').touch()"
    write(project, "01_one", touch, "assert Path('../results/smoke/figures/old.png').exists()")
    assert run("--fresh") == 0
    assert kept.exists() and foreign.exists()
    assert not any(path.exists() for path in (old, renamed, old.with_suffix(".json"), gone))


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_an_interruption_is_one_line_and_leaves_no_kernel(project):
    write(
        project,
        "01_one",
        "import os\nprint('kernel', os.getpid(), flush=True)",
        "import time\ntime.sleep(600)",
    )
    command = [sys.executable, "-m", "avit_lib", "notebooks", *SMOKE]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("kernel"):
            break
    # Taken like Ctrl-C, which a process started in the background would not get
    process.terminate()
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130
    assert error.strip().splitlines()[-1] == "stopped; run the same command again to resume"
    assert "Traceback" not in error
    assert not list(executed(project, "x").parent.glob("*"))
    deadline = time.monotonic() + 60
    while is_alive(int(line.split()[1])) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_alive(int(line.split()[1]))


def test_stamping_is_idempotent_and_can_be_undone(project, capsys):
    path = write(project, "01_one")
    assert cli.main(["badges", "--check"]) == 1
    assert "out of date: 01_one" in capsys.readouterr().out
    assert cli.main(["badges"]) == 0
    stamped = path.read_text()
    title, code = nbformat.read(path, as_version=4).cells[:2]
    assert title.source.splitlines()[0].endswith(
        "(https://colab.research.google.com/github/someone/avit/blob/main/notebooks/01_one.ipynb)"
    )
    assert title.source.splitlines()[1:] == ["", "# 01_one"]
    assert code.source == BOOTSTRAP.replace('""', f'"{ADDRESS}"')
    assert cli.main(["badges", "--check"]) == 0
    assert cli.main(["badges"]) == 0
    assert path.read_text() == stamped
    (project / "pyproject.toml").write_text("[project]\n")
    assert cli.main(["badges", "--check"]) == 1
    assert path.read_text() == stamped
    assert cli.main(["badges"]) == 0
    title, code = nbformat.read(path, as_version=4).cells[:2]
    assert title.source == "# 01_one" and code.source == BOOTSTRAP


def test_stamping_the_notebooks_of_the_study_changes_a_line_and_the_badge_and_can_be_undone(
    project,
):
    originals = sorted((ROOT / "notebooks").glob("*.ipynb"))
    for path in originals:
        shutil.copy(path, project / "notebooks")
    notebooks.stamp(project / "notebooks", "")
    before = {path: path.read_text() for path in sorted((project / "notebooks").iterdir())}
    assert len(before) == len(originals) >= 6
    assert notebooks.stamp(project / "notebooks", ADDRESS) == [path.stem for path in originals]
    for path, text in before.items():
        old, new = text.splitlines(), path.read_text().splitlines()
        lines = [line for line in difflib.ndiff(old, new) if line[0] in "+-"]
        removed, added = ([line[2:].strip() for line in lines if line[0] == sign] for sign in "-+")
        assert len(removed) == 1 and 'address = \\"\\"' in removed[0]
        badge, gap, address = sorted(added)
        assert (
            gap == '"\\n",'
            and badge.startswith('"[![Open in Colab]')
            and f"/{path.stem}.ipynb)" in badge
        )
        assert address == removed[0].replace('\\"\\"', f'\\"{ADDRESS}\\"')
    assert notebooks.stamp(project / "notebooks", ADDRESS) == []
    assert notebooks.stamp(project / "notebooks", "") == [path.stem for path in originals]
    assert {path: path.read_text() for path in before} == before


def test_the_address_is_that_of_pyproject(project):
    assert notebooks.repository_address(project) == ADDRESS
    content = (project / "pyproject.toml").read_text()
    for suffix in (".git", "/"):
        (project / "pyproject.toml").write_text(content.replace(ADDRESS, ADDRESS + suffix))
        assert notebooks.repository_address(project) == ADDRESS
    (project / "pyproject.toml").write_text("[project]\n")
    assert notebooks.repository_address(project) == ""


def test_the_readme_is_stamped_only_where_markers_and_results_are(project, monkeypatch):
    readme = project / "README.md"
    stamp_page(readme)
    assert not readme.exists()
    readme.write_text(
        "before\n<!-- begin caltech24/04_summary -->\nold\n<!-- end caltech24/04_summary -->\nafter\n"
    )
    stamp_page(readme)
    assert "old" in readme.read_text()
    table = project / "results" / "caltech24" / "tables" / "04_summary.md"
    table.parent.mkdir(parents=True)
    table.write_text("| a |\n| ---: |\n| 1 |\n")
    facts = {"seed": 0, "commit": "0123456789abcdef", "date": "today", "hardware": "a computer"}
    table.with_suffix(".json").write_text(json.dumps({"provenance": facts}))
    stamp_page(readme)
    text = readme.read_text()
    assert "old" not in text
    assert (
        "| 1 |\n\nMade by `make reproduce PROFILE=caltech24 SEED=0`, commit 0123456789, today, on a computer."
        in text
    )
    readme.write_text(
        "In short: <!-- begin caltech24/04_models -->\nold\n<!-- end caltech24/04_models --> and so on\n"
    )
    monkeypatch.setenv("AVIT_RUNNER", "make")
    found = Results("caltech24", 0, "04_evaluation").finding("One model  saves\nhalf.", "04_models")
    assert found == found._repr_markdown_() == "One model saves half."
    stamp_page(readme)
    assert "-->\nOne model saves half.\n<!-- end" in readme.read_text()
    readme.write_text(
        "<!-- begin caltech24/sweep_summary -->\nold\n<!-- end caltech24/sweep_summary -->\n"
    )
    for suffix in (".md", ".json"):
        table.with_suffix(suffix).rename(table.with_name(f"sweep_summary{suffix}"))
    stamp_page(readme)
    assert "Made by `make sweep PROFILE=caltech24 SEED=0`, commit" in readme.read_text()


def test_the_readme_gets_the_table_of_the_benchmark(project):
    readme = project / "README.md"
    readme.write_text("<!-- begin benchmark/summary_cpu -->\n<!-- end benchmark/summary_cpu -->\n")
    table = project / "results" / "benchmark" / "tables" / "summary_cpu.md"
    table.parent.mkdir(parents=True)
    table.write_text("| a |\n| ---: |\n| 1 |\n")
    facts = {
        "source": "make benchmark",
        "seed": 0,
        "commit": "0123456789abcdef",
        "date": "today",
        "hardware": "a computer",
    }
    table.with_suffix(".json").write_text(
        json.dumps({"caption": "What it is.", "provenance": facts})
    )
    stamp_page(readme)
    assert (
        "| 1 |\n\nWhat it is.\n\nMade by `make benchmark`, commit 0123456789, today, on a computer."
        in readme.read_text()
    )


# ---- the bootstrap cell ----

EXECUTE = """
import sys, nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
nbclient.NotebookClient(notebook, kernel_name="python3", timeout=300).execute()
print("".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])))
"""


@pytest.fixture
def fresh_python(tmp_path, monkeypatch):
    """An environment with all packages of this one but the study's own library, and a stand-in for
    Colab's.
    """
    folder = tmp_path / "environment"
    venv.create(folder, symlinks=True)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "colab.pth").write_text(
        next(path for path in sys.path if path.endswith("site-packages")) + "\n"
    )
    (site / "google" / "colab").mkdir(parents=True)
    (site / "google" / "colab" / "__init__.py").touch()
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "no-user-kernels"))
    python = folder / "bin" / "python"
    missing = subprocess.run(
        [python, "-c", "import avit_lib"], cwd=tmp_path, capture_output=True, text=True
    )
    assert "No module named 'avit_lib'" in missing.stderr
    return python


def first_cells(folder: Path, address: str = "") -> Path:
    """The cells of a real notebook up to its imports, and one that says what they brought."""
    notebook = nbformat.read(sorted((ROOT / "notebooks").glob("*.ipynb"))[0], as_version=4)
    notebooks.stamp_notebook(notebook, address)
    last = next(i for i, cell in enumerate(notebook.cells) if "from avit_lib" in cell.source)
    says = "import avit_lib, torch\nfrom avit_lib.places import project_root\n"
    says += "print(avit_lib.__file__, torch.__version__, project_root())"
    notebook.cells = [*notebook.cells[: last + 1], new_code_cell(says)]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "first_cells.ipynb"
    nbformat.write(notebook, path)
    return path


def execute(python: Path, notebook: Path) -> subprocess.CompletedProcess:
    command = [python, "-c", EXECUTE, notebook.name]
    return subprocess.run(command, cwd=notebook.parent, capture_output=True, text=True, timeout=300)


def committed(checkout: Path) -> str:
    """A copy of what the first cell and a later notebook need of the repository, committed; returns
    its address.
    """
    for folder in ("avit_lib", "notebooks"):
        shutil.copytree(
            ROOT / folder, checkout / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, checkout)
    git = ["git", "-C", str(checkout), "-c", "user.name=x", "-c", "user.email=x"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *command], check=True)
    return checkout.as_uri()


@pytest.mark.parametrize(
    "arrival", ["a bare notebook", "beside a clone", "in the notebooks folder"]
)
def test_on_colab_the_first_cell_brings_the_study_and_leaves_torch_alone(
    tmp_path, fresh_python, arrival
):
    content = tmp_path / "content"  # where notebooks run on Colab
    if arrival == "a bare notebook":
        notebook = first_cells(content, committed(tmp_path / "published"))
    else:
        committed(content / "study")
        notebook = first_cells(
            content / ("study/notebooks" if arrival == "in the notebooks folder" else "")
        )
    done = execute(fresh_python, notebook)
    if "No matching distribution found for setuptools" in done.stderr:
        pytest.skip("pip cannot reach a package index")
    assert done.returncode == 0, done.stderr
    assert "vanishes with the runtime" in done.stdout
    library, version, root = done.stdout.split()[-3:]
    assert Path(library).is_relative_to(fresh_python.parents[1])
    assert version == torch.__version__
    assert not list(fresh_python.parents[1].glob("lib/python*/site-packages/torch"))
    clone = content / ("avit" if arrival == "a bare notebook" else "study")
    assert Path(root) == clone


def test_on_colab_without_a_checkout_or_address_the_first_cell_says_how_to_bring_one(
    tmp_path, fresh_python
):
    done = execute(fresh_python, first_cells(tmp_path / "elsewhere"))
    assert done.returncode != 0
    assert "Error" in done.stderr and ": not installed: run `make setup`" in done.stderr
    assert "on Colab, clone the repository" in done.stderr


def test_elsewhere_without_the_library_the_first_cell_names_make_setup(tmp_path, fresh_python):
    shutil.rmtree(next(fresh_python.parents[1].glob("lib/python*/site-packages/google")))
    done = execute(fresh_python, first_cells(tmp_path / "elsewhere", ADDRESS))
    assert done.returncode != 0
    assert "Error" in done.stderr and ": not installed: run `make setup`" in done.stderr
