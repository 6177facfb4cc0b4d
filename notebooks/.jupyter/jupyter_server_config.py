"""JupyterLab as `make lab` starts it: a notebook of the study is saved without what running it adds to the file.

So git shows what somebody wrote, and nothing else. Notebooks of other names and executed copies are saved as they are.
"""

import re


def without_outputs(model, path, **_):
    """Take outputs, progress bars and the version of Python out of a notebook that is about to be saved."""
    if model["type"] != "notebook" or not re.fullmatch(r"notebooks/\d\d_\w+\.ipynb", path):
        return
    metadata = model["content"]["metadata"]
    metadata.pop("widgets", None)
    metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata["language_info"] = {"name": "python"}
    for cell in model["content"]["cells"]:
        if cell["cell_type"] == "code":
            cell["metadata"].pop("execution", None)
            cell.update(outputs=[], execution_count=None)


get_config().FileContentsManager.pre_save_hook = without_outputs  # noqa: F821, defined by Jupyter
