"""Take out of an executed notebook what only belongs to the machine and the moment it ran.

    python scripts/tidy.py NOTEBOOK

The file is changed in place: without times of day, progress bars that are over and paths of this
machine; its links lead from results/PROFILE/notebooks to where those from notebooks/ led.
"""

import re
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).parents[1]
MOMENT = ("papermill", "widgets", "execution")  # keys of metadata that say when and how it ran
WIDGET = "application/vnd.jupyter.widget-view+json"


def shorten_paths(text: str) -> str:
    """Name files of the repository from its root, those of the user from ~."""
    home = Path.home()
    for place, short in ((f"{ROOT}/", ""), (f"{ROOT}", "."), (f"{home}", "~")):
        if place != "/":  # the home of a user who has none
            end = "" if place.endswith("/") else r"(?![\w.-])"
            text = re.sub(rf"(?<![\w.-]){re.escape(place)}{end}", short, text)
    return text


def tidy_output(output: nbformat.NotebookNode) -> None:
    """Shorten paths in the text of an output: printed, or of a result, or of an error."""
    texts = output if "text" in output else output.get("data", {})
    for key, value in texts.items():
        if isinstance(value, str) and key.startswith("text"):
            texts[key] = shorten_paths(value)


def tidy(notebook: nbformat.NotebookNode) -> None:
    """Tidy a notebook in place."""
    for part in (notebook, *notebook.cells):
        for key in MOMENT:
            part.metadata.pop(key, None)
    for cell in notebook.cells:
        if cell.cell_type != "code":
            cell.source = re.sub(r"\]\(\.\./(?!\.)", "](../../../", cell.source)
            continue
        cell.source = shorten_paths(cell.source)  # of a profile of one's own
        cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
        for output in cell.outputs:
            tidy_output(output)


def main() -> None:
    path = Path(sys.argv[1])
    notebook = nbformat.read(path, as_version=4)
    tidy(notebook)
    nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
