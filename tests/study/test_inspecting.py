"""The picture of the command ``visualize``: it says what it shows."""

import pytest
import timm
import torch
from PIL import Image

from avit_lib.study import inspecting

CPU = torch.device("cpu")


@pytest.fixture
def photographs(tmp_path):
    paths = [tmp_path / name for name in ("wide.jpg", "high.png")]
    for path, size in zip(paths, ((60, 30), (30, 90)), strict=True):
        Image.new("RGB", size, "red").save(path)
    return [str(path) for path in paths]


def test_the_picture_says_what_the_model_sees_of_a_photograph(photographs):
    model, classes = timm.create_model("avit_nano_patch7_28", num_classes=3).eval(), ["coat", "dress", "bag"]
    figure = inspecting.picture(model, {"classes": classes}, photographs, lambda: None, CPU)
    words = " ".join(figure.get_suptitle().split())
    assert "scaled to 28 x 28 grey pixels" in words and "knows 3 classes: coat, dress, bag." in words
    assert "Blue covers tokens that left the computation" in words
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert [title.split("/")[-1].split()[0] for title in titles] == ["wide.jpg", "high.png"]


@pytest.mark.parametrize(("beta", "all_gone"), [(-1e4, False), (1e4, True)])
def test_the_picture_says_when_no_token_reached_the_last_layer(photographs, beta, all_gone):
    model = timm.create_model("avit_nano_patch7_28", num_classes=3, beta=beta).eval()
    figure = inspecting.picture(model, {"classes": ["a", "b", "c"]}, photographs, lambda: None, CPU)
    assert figure.get_suptitle().endswith("last layer, here all.") == all_gone


def test_of_many_classes_the_number_is_said():
    model = timm.create_model("avit_nano_patch7_28", num_classes=1000)
    assert inspecting.what_it_sees(model, [str(number) for number in range(1000)]).endswith("It knows 1,000 classes.")
    assert inspecting.what_it_sees(model, []).endswith("It knows 1,000 classes.")
