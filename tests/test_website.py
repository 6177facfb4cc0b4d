"""`scripts/website.py`: pages of the site lead to each other as those of the repository do."""

import re
import runpy
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_markdown_cell, new_notebook

SCRIPT = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "website.py"))
NOTEBOOK = (
    "# By hand\n\n$$\\frac{1}{N}$$ [code](../../../lib/one.py), [back](../../../README.md#a-b)"
)


@pytest.fixture
def site(tmp_path, monkeypatch):
    """The site of a small repository."""
    monkeypatch.setitem(SCRIPT["build"].__globals__, "ROOT", tmp_path)
    files = {
        "README.md": "# One & two\n\n## A, b!\n\n[n](notebooks/01_one.ipynb) [l](lib) ![p](p.png)",
        "lib/one.py": "text = '[no](link)'\n",
        "p.png": "",
    }
    executed = tmp_path / "results/mine/notebooks/01_one.ipynb"
    for path in (executed, tmp_path / "notebooks/01_one.ipynb"):
        path.parent.mkdir(parents=True)
        nbformat.write(new_notebook(cells=[new_markdown_cell(NOTEBOOK)]), path)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    SCRIPT["build"]("mine", tmp_path / "site")
    return tmp_path / "site"


def test_every_link_leads_to_a_file_of_the_site(site):
    pages = {page: page.read_text() for page in site.rglob("*.html")}
    assert len(pages) == 4
    for page, text in pages.items():
        for name, heading in re.findall(r'(?:href|src)="([^"#]+)(?:#([^"]*))?"', text):
            target = (page.parent / name).resolve()
            assert target.is_file(), (page, name)
            assert not heading or f'id="{heading}"' in pages[target]


def test_a_link_to_a_notebook_shows_its_executed_copy(site):
    assert 'href="results/mine/notebooks/01_one.html">n<' in (site / "index.html").read_text()


def test_code_is_shown_and_formulas_are_drawn(site):
    assert "[no](link)" in (site / "lib/one.py.html").read_text()
    notebook = (site / "results/mine/notebooks/01_one.html").read_text()
    assert "<mfrac>" in notebook and "<title>01 By hand</title>" in notebook


def test_a_folder_that_is_no_site_is_kept(tmp_path, monkeypatch):
    (tmp_path / "letter.txt").touch()
    monkeypatch.setattr("sys.argv", ["website.py", "--output", str(tmp_path)])
    with pytest.raises(SystemExit):
        SCRIPT["main"]()
    assert (tmp_path / "letter.txt").is_file()
