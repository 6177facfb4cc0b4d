"""The picture of the command ``visualize``: it says what it shows."""

import pytest
import timm
import torch
from conftest import small_model
from PIL import Image

from avit_lib.errors import UserError
from avit_lib.study import inspecting

CPU = torch.device("cpu")


@pytest.fixture
def photographs(tmp_path):
    paths = [tmp_path / name for name in ("wide.jpg", "high.png")]
    for path, size in zip(paths, ((60, 30), (30, 90)), strict=True):
        Image.new("RGB", size, "red").save(path)
    return [str(path) for path in paths]


def test_the_picture_says_what_the_model_sees_of_a_photograph(photographs):
    model, classes = timm.create_model("avit_nano", num_classes=3).eval(), ["coat", "dress", "bag"]
    figure = inspecting.picture(model, {"classes": classes}, photographs, lambda: None, CPU)
    words = " ".join(figure.get_suptitle().split())
    assert "scaled to 28 x 28 pixels" in words and "knows 3 classes: coat, dress, bag." in words
    assert "Blue covers tokens that left the computation" in words
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert [title.split("/")[-1].split()[0] for title in titles] == ["wide.jpg", "high.png"]


def test_a_model_of_timm_s_that_is_not_square_is_drawn_as_it_sees(photographs):
    model = timm.create_model("avit_tiny_patch16_224", img_size=(32, 64), depth=2).eval()
    figure = inspecting.picture(model, {"classes": []}, photographs, lambda: None, CPU)
    assert "scaled to 32 x 64 pixels" in " ".join(figure.get_suptitle().split())
    shapes = [axis.images[0].get_array().shape for axis in figure.axes if axis.images]
    assert shapes[0] == (32, 64, 3) and shapes[2] == (2, 4, 3)


@pytest.mark.parametrize(("beta", "all_gone"), [(-1e4, False), (1e4, True)])
def test_the_picture_says_when_no_token_reached_the_last_layer(photographs, beta, all_gone):
    model = timm.create_model("avit_nano", num_classes=3, beta=beta).eval()
    figure = inspecting.picture(model, {"classes": ["a", "b", "c"]}, photographs, lambda: None, CPU)
    assert figure.get_suptitle().endswith("last layer, here all.") == all_gone


def test_of_many_classes_the_number_is_said():
    model = timm.create_model("avit_nano", num_classes=1000)
    assert inspecting.what_it_sees(model, [str(number) for number in range(1000)]).endswith(
        "It knows 1,000 classes."
    )
    assert inspecting.what_it_sees(model, []).endswith("It knows 1,000 classes.")


def test_where_no_images_are_named_six_classes_are_shown():
    labels = torch.arange(24).repeat_interleave(3)
    chosen = [int(number) for number in inspecting.one_of_each_class(labels)]
    assert chosen == [3 * label for label in (0, 4, 9, 13, 18, 23)]
    assert inspecting.one_of_each_class(torch.tensor([1, 1, 0])) == ["2", "0"]


def test_a_model_without_test_images_asks_for_photographs():
    model = small_model("avit", num_classes=3).eval()
    with pytest.raises(UserError, match="name image files by --images"):
        inspecting.picture(model, {"classes": []}, [], lambda: None, CPU)
