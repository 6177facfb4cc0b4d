"""What the files of the repository promise: tidy notebooks, data as published, pages in order."""

import ast
import re
import subprocess
from pathlib import Path

import msgspec
import nbformat
import pytest
from conftest import ROOT

import avit_lib

SOURCES = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
EXECUTED = sorted((ROOT / "results").glob("*/notebooks/*.ipynb"))
EXECUTED = [path for path in EXECUTED if path.suffixes == [".ipynb"]]  # neither running nor failed
HEADLINE = Path("results/caltech101/models")
HEAVY = {Path("data/weights"), HEADLINE / "deit", HEADLINE / "avit_finetuned"}

each_notebook = pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def tagged(path, tag):
    return [cell.source for cell in read(path).cells if tag in cell.metadata.get("tags", [])]


def tracked():
    """The files under version control, relative to the root."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-z"]
    listing = subprocess.check_output(command, cwd=ROOT, text=True)
    return [Path(name) for name in listing.split("\0") if name]


@each_notebook
def test_a_notebook_is_valid_and_carries_nothing_that_running_it_adds(path):
    notebook = read(path)
    nbformat.validate(notebook)
    known = {"kernelspec": {"name": "python3"}, "language_info": {"name": "python"}}
    assert {key: {"name": value["name"]} for key, value in notebook.metadata.items()} == known
    for cell in notebook.cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None


@each_notebook
def test_a_notebook_is_short_plain_code_for_what_make_passes(path):
    codes = [cell.source for cell in read(path).cells if cell.cell_type == "code"]
    for code in codes:
        assert len(code.splitlines()) <= 15, code
        assert "sys.path" not in code
        nodes = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
        strings = [node.value for node in nodes if isinstance(node.value, str)]
        assert not [text for text in strings if re.match(r"(/|~/|[A-Za-z]:\\)\w", text)]
    assert tagged(path, "parameters") == ['PROFILE = "caltech24"\nSEED = 0']
    assert re.search(rf'Study\(PROFILE, SEED, (source=)?"{path.stem}"', "\n".join(codes))
    assert tagged(path, "bootstrap") == tagged(SOURCES[0], "bootstrap")


@pytest.mark.parametrize("path", EXECUTED, ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_an_executed_notebook_names_no_home(path):
    assert not re.search(r"/(home|Users|root)/", path.read_text())
    assert str(ROOT) not in path.read_text()


def test_no_tracked_file_is_heavy():
    """But the weights in data/, and two headline models, in half precision."""
    sizes = {path: (ROOT / path).stat().st_size for path in tracked() if (ROOT / path).is_file()}
    assert {path.parent for path in sizes if sizes[path] > 3 * 2**20} <= HEAVY
    assert max(sizes.values()) <= 12 * 2**20


def links(path):
    """The relative links of a page, or of a notebook's text."""
    text = path.read_text()
    if path.suffix == ".ipynb":
        cells = [cell for cell in read(path).cells if cell.cell_type == "markdown"]
        text = "\n\n".join(cell.source for cell in cells)
    return re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)


def test_what_pages_and_notebooks_link_to_is_there():
    pages = [ROOT / path for path in tracked() if path.suffix == ".md"]
    checked = {path: links(path) for path in [*pages, *SOURCES, *EXECUTED]}
    broken = [
        f"{path.relative_to(ROOT)}: {target}"
        for path, targets in checked.items()
        for target in targets
        if not (path.parent / target).exists()
    ]
    assert not broken


def test_of_the_data_only_what_has_a_checksum_is_tracked():
    listed = {
        Path("data", line[66:]) for line in (ROOT / "data/SHA256SUMS").read_text().splitlines()
    }
    facts = {Path("data", name) for name in ("README.md", "SHA256SUMS", "weights/rounding.json")}
    assert {path for path in tracked() if path.parts[0] == "data"} == listed | facts


def test_everything_that_is_no_code_is_packaged():
    """Profiles among it; setuptools leaves out what package-data does not name."""
    settings = msgspec.toml.decode((ROOT / "pyproject.toml").read_bytes())["tool"]["setuptools"]
    packaged = {
        path
        for package, patterns in settings["package-data"].items()
        for pattern in patterns
        for path in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    files = (ROOT / "avit_lib").rglob("*.*")
    assert {path for path in files if path.suffix not in (".py", ".pyc")} == packaged


def test_every_target_is_phony_and_in_the_help():
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split()
    assert re.findall(r"^([a-z][a-z-]*):(?!=)", makefile, re.MULTILINE) == phony
    listed = subprocess.check_output(["make"], cwd=ROOT, text=True)
    assert re.findall(r"^  ([a-z-]+) {2,}\S", listed, re.MULTILINE) == phony


def test_the_citation_is_of_this_version():
    assert f"\nversion: {avit_lib.__version__}\n" in (ROOT / "CITATION.cff").read_text()
