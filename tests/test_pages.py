"""`scripts/pages.py` writes pages of results, `scripts/tidy.py` tidies executed notebooks."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from conftest import ROOT
from matplotlib.figure import Figure
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from avit_lib.study.results import Results
from avit_lib.training import read_json, write_json

PAGES = runpy.run_path(str(ROOT / "scripts" / "pages.py"))
TABLE = "| model   |\n|:--------|\n| DeiT    |"
LINE = "Made by `make reproduce PROFILE=smoke SEED=3`, commit 0123456789, 2026-01-02 03:04 UTC"


@pytest.fixture
def results(tmp_path, monkeypatch):
    """The results of a profile, as its notebooks write them."""
    monkeypatch.setenv("AVIT_RESULTS", str(tmp_path))
    made = Results("smoke", 3, "04_evaluation")
    made.table(pd.DataFrame({"model": ["DeiT"]}), "speed", "How fast.")
    made.finding("It is fast.", "04_words")
    made.figure(Figure(figsize=(1, 1)), "04_points", "Accuracy ± error.")
    origin = tmp_path / "smoke" / "provenance" / "04_evaluation.json"
    facts = read_json(origin) | {"commit": "0123456789abcdef", "dirty": False, "seconds": 12.5}
    facts |= {"date": "2026-01-02 03:04 UTC", "python": "3.11.7", "hardware": "two cores"}
    del facts["files"]  # what is so for each
    write_json(origin, facts | {"packages": {"torch": "2.10"}})
    for kind in ("notebooks", ".stamps"):
        (tmp_path / "smoke" / kind).mkdir()
    (tmp_path / "smoke" / "notebooks" / "04_evaluation.ipynb").touch()
    return tmp_path / "smoke"


def test_a_page_has_what_a_notebook_found(results):
    page = PAGES["write_page"](PAGES["describe_page"]("smoke"))
    text = page.read_text()
    section = text.partition("## 04_evaluation\n")[2].partition("## Provenance")[0]
    assert "It is fast." in section
    assert "[executed notebook](notebooks/04_evaluation.ipynb)" in section
    assert "[speed](tables/speed.md)" in section
    assert "![04_points](figures/04_points.png)\n\nAccuracy ± error.\n" in section
    row = [cell.strip() for cell in text.splitlines()[-3].split("|")]
    assert row[2:6] == ["3", "0123456789", "no", "2026-01-02 03:04 UTC"]
    assert "Packages: torch 2.10." in text
    assert "failed" not in section
    (results / "notebooks" / "04_evaluation.failed.ipynb").touch()
    failed = PAGES["write_page"](PAGES["describe_page"]("smoke")).read_text()
    assert "## 04_evaluation\n\nIts last run failed: " in failed


def test_markers_are_filled_with_tables_and_findings(results, tmp_path):
    page = tmp_path / "README.md"
    empty = "a\n<!-- begin smoke/{0} -->\n<!-- end smoke/{0} -->\nb\n"
    unknown = empty.format("gone").replace("-->\n<", "-->\nkept\n<")
    page.write_text(empty.format("speed") + empty.format("04_words") + unknown)
    stamp_page = PAGES["stamp_page"]
    stamp_page(page)
    once = page.read_text()
    assert f"a\n<!-- begin smoke/speed -->\n{TABLE}\n\n{LINE}, on two cores.\n<!-- end" in once
    assert "<!-- begin smoke/04_words -->\nIt is fast.\n<!-- end smoke/04_words -->\nb\n" in once
    assert once.endswith(unknown)
    stamp_page(page)
    assert page.read_text() == once
    table = results / "tables" / "speed.md"
    table.write_text(table.read_text().replace("DeiT", "another"))
    stamp_page(page)
    assert page.read_text() == once.replace("DeiT", "another")


def test_the_address_of_the_repository_stands_where_it_is_cloned_or_opened():
    show_address = PAGES["show_address"]
    text = "!git clone -q --depth 1 REPOSITORY avit\n<!-- begin colab --><!-- end colab -->: run"
    shown = show_address(text, "https://github.com/some/one")
    assert "git clone -q --depth 1 https://github.com/some/one avit\n" in shown
    assert "](https://colab.research.google.com/github/some/one))<!-- end colab -->: run" in shown
    assert show_address(shown, "https://github.com/some/one") == shown
    assert show_address(shown, "") == text


def test_what_a_notebook_makes_no_longer_is_removed(results):
    stamp = results / ".stamps" / "04_evaluation"
    stamp.touch()
    old, new = results / "tables" / "speed.md", results / "figures" / "04_points.png"
    os.utime(old, (0, 0))
    for later in (new, results / "findings" / "04_words.md"):
        os.utime(later, (stamp.stat().st_mtime + 1,) * 2)
    PAGES["remove_stale"](results)
    assert not old.exists() and not old.with_suffix(".csv").exists()
    assert new.exists() and (results / "findings" / "04_words.md").exists()


def test_a_home_at_the_top_shortens_nothing_else(monkeypatch):
    script = runpy.run_path(str(ROOT / "scripts" / "tidy.py"))
    monkeypatch.setenv("HOME", "/")
    monkeypatch.setitem(script["shorten_paths"].__globals__, "ROOT", Path("/avit"))
    said = "wrote /avit/results/x.csv in '/avit'; runs/avit/last and /avit2 are others, a / b"
    expected = "wrote results/x.csv in '.'; runs/avit/last and /avit2 are others, a / b"
    assert script["shorten_paths"](said) == expected


def test_an_executed_notebook_is_kept_without_moment_and_machine(tmp_path):
    widget = {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "0%"}
    outputs = [
        new_output("stream", text=f"wrote {ROOT}/results/x.csv and {Path.home()}/y\n"),
        new_output("execute_result", data={"text/plain": f"'{ROOT}'", "image/png": "abc"}),
        new_output("display_data", data=widget),
    ]
    cell = new_code_cell("x", outputs=outputs, metadata={"execution": {}, "tags": ["t"]})
    text = new_markdown_cell("[code](../avit_lib/x.py), [another](02.ipynb)")
    notebook = new_notebook(cells=[cell, text], metadata={"papermill": {}, "widgets": {}})
    path = tmp_path / "x.ipynb"
    nbformat.write(notebook, path)
    subprocess.run([sys.executable, ROOT / "scripts" / "tidy.py", path], check=True)
    tidied = nbformat.read(path, as_version=4)
    assert tidied.metadata == {}
    assert tidied.cells[0].metadata == {"tags": ["t"]}
    assert tidied.cells[1].source == "[code](../../../avit_lib/x.py), [another](02.ipynb)"
    printed, shown = tidied.cells[0].outputs
    assert printed.text == "wrote results/x.csv and ~/y\n"
    assert shown.data == {"text/plain": "'.'", "image/png": "abc"}


def test_pages_of_the_repository_show_no_results_of_another_folder(results, monkeypatch, capsys):
    root = results.parent / "repository"
    root.mkdir()
    marked = "<!-- begin smoke/speed -->\nas it was\n<!-- end smoke/speed -->\n"
    (root / "README.md").write_text(marked)
    monkeypatch.setitem(PAGES["main"].__globals__, "project_root", lambda: root)
    monkeypatch.setattr(sys, "argv", ["pages.py", "--profile", "smoke"])
    PAGES["main"]()
    assert (results / "README.md").is_file() and (root / "README.md").read_text() == marked
    assert "AVIT_RESULTS names another folder" in capsys.readouterr().out
