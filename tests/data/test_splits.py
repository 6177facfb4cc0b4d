"""How images are told apart: every one in its part, the same for the same seed, and on record."""

import json
import shutil
from functools import partial

import pytest
import torch
from conftest import refused
from PIL import Image
from small_sets import COLOUR, carried, write_images

from avit_lib import data
from avit_lib.data import folder_test_data, folder_training_data, pick_per_class
from avit_lib.data.datasets import official_images
from avit_lib.data.splits import draw, plan_pool
from avit_lib.places import project_root
from avit_lib.study import get_profile

ROLES = ("train", "validation", "test")


def test_of_each_class_as_many_are_picked_as_it_has():
    labels = torch.tensor([0, 0, 0, 1])
    assert labels[pick_per_class(labels, 2, torch.Generator())].tolist() == [0, 0, 1]


def test_a_folder_without_validation_images_gives_some_up(tmp_path):
    write_images(tmp_path / "train", {"ants": 20, "bees": 25})
    found = folder_training_data(tmp_path, COLOUR, seed=0)
    assert found.validation.labels.bincount().tolist() == [2, 2]
    assert found.train.labels.bincount().tolist() == [18, 23]
    assert len({*carried(found.validation), *carried(found.train)}) == 45
    write_images(tmp_path / "train", {"wasps": 1})
    with refused(r"class wasps has too few images \(1\)"):
        folder_training_data(tmp_path, COLOUR, seed=0)


def test_validation_images_that_are_not_used_are_told(tmp_path, capsys):
    write_images(tmp_path / "train", {"ants": 3, "bees": 3})
    write_images(tmp_path / "VALID", {"ants": 3})
    folder_training_data(tmp_path, COLOUR, seed=0)
    assert capsys.readouterr().err.startswith(f"{tmp_path}/VALID is not used")
    (tmp_path / "val").symlink_to("nowhere")
    with refused(f"{tmp_path}/val holds no images"):
        folder_training_data(tmp_path, COLOUR, seed=0)


def test_validation_classes_are_among_those_of_training(tmp_path, capsys):
    write_images(tmp_path / "train", {"ants": 3, "bees": 3})
    write_images(tmp_path / "val", {"bees": 2})
    found = folder_training_data(tmp_path, COLOUR, seed=0)
    assert len(found.train) == 6 and found.validation.labels.tolist() == [1, 1]
    assert capsys.readouterr().err.startswith(f"{tmp_path / 'val'} holds no images of ants\n")


def test_a_photograph_in_two_parts_or_in_two_classes_is_told(tmp_path, capsys):
    for part in ("train", "val", "test"):
        write_images(tmp_path / part, {"ants": 3, "bees": 3})
        for index, path in enumerate(sorted((tmp_path / part).rglob("*.png"))):
            Image.new("RGB", (20, 30), (index, len(part), 0)).save(path)
    train = folder_training_data(tmp_path, COLOUR, seed=0)
    folder_test_data(tmp_path, 16, train.train.classes, train)
    assert not capsys.readouterr().err
    ant = tmp_path / "train" / "ants" / "image_0000.png"
    for copy in ("train/bees/a.png", "val/ants/b.png", "test/bees/c.png", "test/bees/d.png"):
        shutil.copy(ant, tmp_path / copy)
    shutil.copy(tmp_path / "val" / "bees" / "image_0001.png", tmp_path / "test" / "bees" / "e.png")
    train = folder_training_data(tmp_path, COLOUR, seed=0)
    folder_test_data(tmp_path, 16, train.train.classes, train)
    told = "images in {} have a copy in another part or class: {}; remove one of both"
    assert capsys.readouterr().err.splitlines() == [
        "2 train " + told.format(tmp_path / "train", "ants/image_0000.png, bees/a.png"),
        "1 validation " + told.format(tmp_path / "val", "ants/b.png"),
        "3 test " + told.format(tmp_path / "test", "bees/c.png, bees/d.png, bees/e.png"),
    ]


@pytest.fixture
def caltech(tmp_path, monkeypatch):
    """Caltech-101 with a large class, one that is just large enough, and two small ones."""
    folder = tmp_path / "caltech101" / "101_ObjectCategories"
    write_images(folder, {"ant": 40, "Faces": 12, "bass": 9, "emu": 3, "BACKGROUND_Google": 4})
    (folder / "BACKGROUND_Google" / "tmp").write_text("torchvision's archive holds this")
    monkeypatch.setenv("AVIT_DATA", str(tmp_path))
    return folder


def test_a_pool_gives_training_validation_and_test_images(caltech):
    found, held_out = data.training_data(COLOUR, seed=0), data.test_data(COLOUR, seed=0)
    parts = dict(zip(ROLES, (found.train, found.validation, held_out), strict=True))
    # Sorted as torchvision sorts.
    assert found.train.classes == held_out.classes == ("Faces", "ant", "bass", "emu")
    counts = [part.labels.bincount().tolist() for part in parts.values()]
    assert counts == [[6, 6, 6, 1], [3, 3, 1, 1], [3, 5, 2, 1]]
    assert len({image for part in parts.values() for image in carried(part)}) == 12 + 14 + 9 + 3
    for role, part in parts.items():
        pairs = zip(part.labels.tolist(), carried(part), strict=True)
        names = [f"{part.classes[label]}/image_{index:04d}.png" for label, (_, index) in pairs]
        assert found.split["files"][role] == names
    again, other = (data.training_data(COLOUR, seed).split for seed in (0, 1))
    assert again == found.split
    assert again["sha256"] != other["sha256"]


def test_the_split_on_record_is_drawn_again():
    """The default study's results are of these images."""
    place = project_root() / "results" / "caltech24" / "metrics" / "split.json"
    recorded = json.loads(place.read_text())["files"]
    settings = get_profile("caltech24").data
    parts = draw(official_images(settings, train=True), 0, partial(plan_pool, settings))
    assert {role: part.images.names.tolist() for role, part in parts.items()} == recorded


@pytest.mark.parametrize("role", ROLES)
def test_other_images_than_on_record_are_noticed(caltech, role):
    recorded = data.training_data(COLOUR, 0).split
    path = caltech / recorded["files"][role][0]
    Image.new("RGB", (20, 30), "red").save(path)
    changed = data.training_data(COLOUR, 0).split
    differs = {one for one in ROLES if changed["content"].get(one) != recorded["content"][one]}
    assert differs == {role} and changed["sha256"] == recorded["sha256"]
    path.rename(path.with_stem("image_0100"))
    assert data.training_data(COLOUR, 0).split["sha256"] != recorded["sha256"]


def test_damage_in_any_part_of_a_pool_is_named_before_training(caltech):
    split = data.training_data(COLOUR, 0).split
    lost, text, cut = [caltech / split["files"][role][0] for role in ROLES]
    lost.unlink()
    lost.symlink_to("nowhere.png")
    text.write_text("not an image")
    cut.write_bytes(cut.read_bytes()[:60])
    with refused("cannot be read as images: ") as error:
        data.training_data(COLOUR, 0)
    message = str(error.value)
    assert f"{lost} (No such file or directory)" in message and f"{text} (not an" in message
    assert str(cut) in message
