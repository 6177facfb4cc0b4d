"""What the files of the repository promise: tidy notebooks, the data as published, no heavy or
private files.
"""

import ast
import json
import re
import runpy
import subprocess
from pathlib import Path
from types import SimpleNamespace

import msgspec
import nbformat
import pytest
from nbformat.v4 import new_output

from avit_lib.study import notebooks
from avit_lib.study.settings import get_profile, profile_names

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "notebooks").glob("*.ipynb"))
EXECUTED = sorted((ROOT / "results").glob("*/notebooks/*.ipynb"))
EXECUTED = [
    path for path in EXECUTED if path.suffixes == [".ipynb"]
]  # neither running nor failed ones
WEIGHTS = Path("data/weights")
MODELS = Path("results/caltech101/models")  # the headline models, in half precision
MEGABYTE = 2**20

each_notebook = pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(path: Path) -> list[str]:
    return [cell.source for cell in read(path).cells if cell.cell_type == "code"]


def tagged(path: Path, tag: str) -> list[str]:
    return [cell.source for cell in read(path).cells if tag in cell.metadata.get("tags", [])]


def tracked() -> list[Path]:
    """The files under version control, relative to the root."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return [Path(name) for name in listing.split("\0") if name]


@each_notebook
def test_a_notebook_is_valid_and_carries_no_outputs(path):
    notebook = read(path)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@each_notebook
def test_a_notebook_is_saved_without_what_running_it_added(path):
    """In the JupyterLab of `make lab`; and so the file is as that one writes it."""
    config = SimpleNamespace(FileContentsManager=SimpleNamespace())
    runpy.run_path(
        ROOT / "notebooks/.jupyter/jupyter_server_config.py", {"get_config": lambda: config}
    )
    notebook = read(path)
    assert notebook.metadata.accelerator == "GPU"  # asked for on Colab
    notebook.metadata.language_info |= {"version": "3.99", "mimetype": "text/x-python"}
    notebook.metadata |= {"kernelspec": {"display_name": "Python 3 (ipykernel)"}, "widgets": {}}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [new_output("stream", text="words")], 7
    model = {"type": "notebook", "content": notebook}
    config.FileContentsManager.pre_save_hook(model=model, path="notebooks/my_own.ipynb")
    assert "widgets" in notebook.metadata
    config.FileContentsManager.pre_save_hook(model=model, path=f"notebooks/{path.name}")
    assert nbformat.writes(notebook) + "\n" == path.read_text()


@each_notebook
def test_code_cells_are_short_plain_python(path):
    for code in code_cells(path):
        assert len(code.splitlines()) <= 15, code
        ast.parse(code)


@each_notebook
def test_a_notebook_neither_patches_paths_nor_names_absolute_ones(path):
    for code in code_cells(path):
        assert "sys.path" not in code
        strings = [
            node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)
        ]
        assert not [
            text
            for text in strings
            if isinstance(text, str) and re.match(r"(/|~/|[A-Za-z]:\\)\w", text)
        ]


@each_notebook
def test_classes_belong_to_the_library(path):
    if not path.stem.startswith("01"):
        nodes = [node for code in code_cells(path) for node in ast.walk(ast.parse(code))]
        assert not [node.name for node in nodes if isinstance(node, ast.ClassDef)]


@each_notebook
def test_the_parameters_are_what_the_runner_passes(path):
    (code,) = tagged(path, "parameters")
    assert code == 'PROFILE = "caltech24"\nSEED = 0'
    assert "caltech24" in profile_names()


@each_notebook
def test_the_bootstrap_cell_and_badge_are_up_to_date(path):
    assert path.stem not in notebooks.stamp(
        path.parent, notebooks.repository_address(ROOT), check=True
    ), "make badges"


def test_all_notebooks_begin_with_the_same_short_folded_bootstrap_cell():
    cells = [
        cell
        for path in SOURCES
        for cell in read(path).cells
        if "bootstrap" in cell.metadata.get("tags", [])
    ]
    ((code, looks),) = {(cell.source, json.dumps(cell.metadata)) for cell in cells}
    assert len(cells) == len(SOURCES) >= 6 and len(code.splitlines()) <= 15
    assert len(re.findall(r'^address = ".*"', code, re.MULTILINE)) == 1  # the line that is stamped
    assert (
        code.startswith("# @title ") and json.loads(looks)["cellView"] == "form"
    )  # on Colab only the title is seen
    assert json.loads(looks)["jupyter"] == {"source_hidden": True}


@pytest.mark.parametrize("path", EXECUTED, ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_an_executed_notebook_names_no_home(path):
    assert not re.search(r"/(home|Users|root)/", path.read_text())
    assert str(ROOT) not in path.read_text()


def test_no_tracked_file_is_heavy():
    files = [path for path in tracked() if (ROOT / path).is_file() and path.parent != WEIGHTS]
    heavy = [path for path in files if (ROOT / path).stat().st_size > 3 * MEGABYTE]
    models = [path for path in heavy if path.parent == MODELS and path.suffix == ".safetensors"]
    assert heavy == models and len(models) <= 2
    assert all((ROOT / path).stat().st_size <= 12 * MEGABYTE for path in models)


def test_the_readme_is_read_in_a_minute():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", ["README.md", "results/README.md", "notebooks/README.md"])
def test_what_a_page_links_to_is_there(page):
    """In the repository; of results, files of their folder that git keeps."""
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / page).read_text())
    assert not [target for target in targets if not ((ROOT / page).parent / target).exists()]


def test_of_the_data_only_what_has_a_checksum_is_tracked():
    listed = {
        Path("data", line[66:]) for line in (ROOT / "data/SHA256SUMS").read_text().splitlines()
    }
    facts = {Path("data", name) for name in ("README.md", "SHA256SUMS", "weights/rounding.json")}
    assert {path for path in tracked() if path.parts[0] == "data"} == listed | facts


def test_the_photographs_are_those_of_the_default_study():
    photographs = {
        path.parent.name for path in (ROOT / "data/caltech101/101_ObjectCategories").glob("*/*.jpg")
    }
    assert photographs >= set(get_profile("caltech24").data.classes)


def test_no_file_of_the_library_is_long():
    lengths = {
        path: len(path.read_text().splitlines()) for path in (ROOT / "avit_lib").rglob("*.py")
    }
    assert len(lengths) > 30 and not {
        path: length for path, length in lengths.items() if length > 350
    }


def test_everything_that_is_no_code_is_packaged():
    """Profiles among it; setuptools leaves out what package-data does not name."""
    settings = msgspec.toml.decode((ROOT / "pyproject.toml").read_bytes())["tool"]["setuptools"]
    packaged = set()
    for package, patterns in settings["package-data"].items():
        for pattern in patterns:
            found = set((ROOT / package.replace(".", "/")).glob(pattern))
            assert found, f"{pattern} of {package} names nothing"
            packaged |= found
    files = {
        path for path in (ROOT / "avit_lib").rglob("*.*") if path.suffix not in (".py", ".pyc")
    }
    assert (
        {path.stem for path in packaged if path.parent.name == "profiles"}
        == set(profile_names())
        >= {"smoke"}
    )
    assert files == packaged


def test_help_lists_every_target():
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    listed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"^  ([a-z-]+) {2,}\S", listed, re.MULTILINE) == phony


def test_every_target_is_phony():
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split()
    assert re.findall(r"^([a-z][a-z-]*):(?!=)", makefile, re.MULTILINE) == phony


def test_result_files_that_need_a_caption_have_one():
    for kind, suffix in (("tables", ".csv"), ("figures", ".png")):
        for path in (ROOT / "results").glob(f"*/{kind}/*{suffix}"):
            assert json.loads(path.with_suffix(".json").read_text())["caption"], path
