"""What a reader touches in the notebooks answers."""

from pathlib import Path
from unittest.mock import Mock

import ipywidgets
import nbformat
import pytest
from PIL import Image

from avit_lib.data import read_image

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


@pytest.mark.parametrize("name", ["05_halting_analysis", "07_adapt"])
def test_the_picture_follows_the_slider(name):
    cells = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4).cells
    [code] = [cell.source for cell in cells if ".observe(" in cell.source]
    known = {"widgets": ipywidgets, "display": Mock(), "draw_at": "drawn at {}".format}
    known |= {"trained": 0.5, "ends": {"min": 0.0, "max": 1.0}}  # of notebook 05
    known |= {"share": 0.5, "budgets": [0.25, 0.5]}  # of notebook 07
    exec(code, known)
    known["display"].assert_called_with("drawn at 0.5", display_id=True)
    known["slider"].value = 0.25
    known["picture"].update.assert_called_once_with("drawn at 0.25")


@pytest.mark.parametrize("name", ["05_halting_analysis", "07_adapt"])
def test_a_photograph_of_one_s_own_is_read(name, tmp_path):
    cells = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4).cells
    [code] = [cell.source for cell in cells if "PHOTOGRAPH" in cell.source]
    Image.new("RGB", (90, 60)).save(tmp_path / "my.jpg")
    known = {"read_image": read_image, "model": Mock(), "study": Mock()}
    known["model"].patch_embed.img_size = (32, 32)
    known["study"].data.image_size = 32
    exec(code.replace('PHOTOGRAPH = ""', f"PHOTOGRAPH = {str(tmp_path / 'my.jpg')!r}"), known)
    assert known["photograph"].shape == (1, 3, 32, 32) and known["about"] == "my.jpg"
