"""How images are told apart: every one in its part, the same for the same seed, and on record."""

import hashlib
import json

import pytest
import torch
from msgspec.structs import replace
from PIL import Image
from small_sets import COLOUR, assert_named, carried, write_images, write_pool

from avit_lib.data import (
    Images,
    check_split,
    folder_test_data,
    folder_training_data,
    pick_per_class,
    test_data,
    training_data,
)
from avit_lib.data.images import ImageFiles
from avit_lib.data.splits import split_pool
from avit_lib.errors import UserError

test_data.__test__ = False  # a function of the library, not a test
CALTECH = replace(COLOUR, train_per_class=30, validation_per_class=5, test_per_class=50)


def test_too_few_images_of_a_class():
    labels = torch.tensor([0, 0, 0, 1])
    with pytest.raises(UserError, match="fewer than the 2"):
        pick_per_class(labels, 2, torch.Generator())
    assert pick_per_class(labels, 1, torch.Generator())[1].item() == 3


def test_a_folder_without_validation_images_gives_some_up(tmp_path):
    write_images(tmp_path / "train", {"ants": 20, "bees": 25})
    data = folder_training_data(tmp_path, COLOUR, seed=0)
    assert data.validation.labels.bincount().tolist() == [2, 2]
    assert data.train.labels.bincount().tolist() == [18, 23]
    held, kept = (
        set(zip(part.labels.tolist(), part.images[:, 0, 0, 0].tolist(), strict=True))
        for part in (data.validation, data.train)
    )
    assert len(held) == 4 and not held & kept


def test_a_folder_with_validation_images_keeps_them_apart(tmp_path):
    write_images(tmp_path / "train", {"ants": 3, "bees": 3})
    write_images(tmp_path / "val", {"ants": 1, "bees": 2})
    data = folder_training_data(tmp_path, COLOUR, seed=0)
    assert (len(data.train), data.validation.labels.tolist()) == (6, [0, 1, 1])


def test_validation_classes_are_among_those_of_training(tmp_path, capsys):
    write_images(tmp_path / "train", {"ants": 3, "bees": 3})
    write_images(tmp_path / "val", {"bees": 2})
    data = folder_training_data(tmp_path, COLOUR, seed=0)
    assert (
        data.validation.labels.tolist() == [1, 1] and data.validation.classes == data.train.classes
    )
    assert capsys.readouterr().err == f"{tmp_path / 'val'} holds no images of ants\n"
    write_images(tmp_path / "val", {"wasps": 2})
    with pytest.raises(UserError, match=r"other classes than .*: ants, wasps; rename"):
        folder_training_data(tmp_path, COLOUR, seed=0)


@pytest.mark.parametrize("decode", [True, False])
def test_test_images_of_a_folder_are_of_the_classes_of_the_model(tmp_path, decode):
    write_images(tmp_path / "test", {"ants": 2, "bees": 3})
    data = folder_test_data(tmp_path, 16, ("ants", "bees"), decode)
    assert isinstance(data.images, torch.Tensor if decode else ImageFiles)
    assert data.labels.tolist() == [0, 0, 1, 1, 1]
    more = folder_test_data(tmp_path, 16, ("wasps", "bees", "ants"), decode)
    assert more.labels.tolist() == [2, 2, 1, 1, 1] and len(more.classes) == 3
    with pytest.raises(UserError, match=r"other classes than the model .*: ants, wasps") as error:
        folder_test_data(tmp_path, 16, ("bees", "wasps"), decode)
    assert_named(error, tmp_path / "test")


@pytest.fixture
def caltech(tmp_path, monkeypatch, no_network):
    """Caltech-101 with a large class, one that is just large enough, and two small ones; class
    names out of order.
    """
    folder = tmp_path / "caltech101" / "101_ObjectCategories"
    write_pool(folder, {"ant": 40, "Faces": 12, "bass": 9, "emu": 3})
    write_images(folder, {"BACKGROUND_Google": 4})
    (folder / "BACKGROUND_Google" / "tmp").write_text("torchvision's archive holds this")
    monkeypatch.setenv("AVIT_DATA", str(tmp_path))
    return folder


def test_a_pool_gives_training_validation_and_test_images(caltech):
    data, held_out = training_data(COLOUR, seed=0), test_data(COLOUR, seed=0)
    assert (
        data.train.classes == held_out.classes == ("Faces", "ant", "bass", "emu")
    )  # sorted as torchvision sorts
    assert data.train.labels.bincount().tolist() == [6, 6, 6, 1]
    assert data.validation.labels.bincount().tolist() == [3, 3, 1, 1]
    assert held_out.labels.bincount().tolist() == [3, 5, 2, 1]
    parts = [carried(part) for part in (data.train, data.validation, held_out)]
    for part, source in zip(parts, (data.train, data.validation, held_out), strict=True):
        assert [label for label, _ in part] == source.labels.tolist()
    together = [image for part in parts for image in part]
    assert len(set(together)) == len(together) == 12 + 14 + 9 + 3


def test_test_images_can_be_left_on_disk(caltech):
    decoded, on_disk = test_data(COLOUR, 0), test_data(COLOUR, 0, decode=False)
    assert isinstance(decoded.images, torch.Tensor) and isinstance(on_disk.images, ImageFiles)
    assert torch.equal(
        torch.stack([image for image, _ in on_disk]), torch.stack([image for image, _ in decoded])
    )
    assert torch.equal(on_disk.labels, decoded.labels)


def test_the_split_of_a_pool_names_its_files(caltech):
    data, held_out = training_data(COLOUR, seed=0), test_data(COLOUR, seed=0)
    split = json.loads(json.dumps(data.split))
    for role, part in (("train", data.train), ("validation", data.validation), ("test", held_out)):
        names = [f"{part.classes[label]}/image_{index:04d}.jpg" for label, index in carried(part)]
        assert split["files"][role] == names and split[f"{role}_images"] == len(names)
    assert split["sha256"] == hashlib.sha256(json.dumps(split["files"]).encode()).hexdigest()


def test_the_split_of_a_pool_follows_the_seed(caltech):
    first, again, other = (training_data(COLOUR, seed).split for seed in (0, 0, 1))
    assert first == again != other
    assert first["sha256"] != other["sha256"]
    check_split(again, first)
    assert carried(test_data(COLOUR, 0)) != carried(test_data(COLOUR, 1))


def test_other_files_than_on_record_are_noticed(caltech):
    recorded = training_data(COLOUR, 0).split
    (caltech / "bass" / "image_0000.jpg").rename(caltech / "bass" / "image_0100.jpg")
    with pytest.raises(UserError, match="bass/image_0") as error:
        check_split(recorded, training_data(COLOUR, 0).split)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("role", ["train", "validation", "test"])
def test_other_pictures_under_the_names_on_record_are_noticed(caltech, role):
    recorded = training_data(COLOUR, 0).split
    Image.new("RGB", (20, 30), "red").save(caltech / recorded["files"][role][0], "PNG")
    found = training_data(COLOUR, 0).split
    assert found["sha256"] == recorded["sha256"]
    changed = dict(found["content"].items() - recorded["content"].items())
    assert list(changed) == [role]
    with pytest.raises(UserError, match=f"such as the content of {role}") as error:
        check_split(recorded, found)
    assert "\n" not in str(error.value)
    assert check_split(found, found) == "content"
    del recorded["content"]
    assert check_split(recorded, found) == "names"  # all that older records say


def test_classes_that_changed_their_folders_are_noticed(tmp_path):
    write_images(tmp_path / "train", {"ants": 3})
    write_images(tmp_path / "train", {"bees": 3}, size=(30, 20))
    before = folder_training_data(tmp_path, COLOUR, seed=0).split
    for name, target in (("ants", "x"), ("bees", "ants"), ("x", "bees")):
        (tmp_path / "train" / name).rename(tmp_path / "train" / target)
    after = folder_training_data(tmp_path, COLOUR, seed=0).split
    assert (
        before["sha256"] == after["sha256"]
        and before["content"]["train"] != after["content"]["train"]
    )


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (500, (30, 5, 50)),
        (86, (30, 5, 50)),
        (40, (30, 5, 5)),
        (39, (30, 4, 5)),
        (35, (30, 2, 3)),
        (32, (30, 1, 1)),
        (31, (29, 1, 1)),
        (5, (3, 1, 1)),
        (3, (1, 1, 1)),
    ],
)
def test_small_classes_are_in_every_part(images, expected):
    pool = images_of_classes(torch.zeros(images, dtype=torch.long), ("thing",))
    parts = split_pool(pool, CALTECH, seed=0)
    assert tuple(len(parts[role]) for role in ("train", "validation", "test")) == expected
    assert len(torch.cat(list(parts.values())).unique()) == sum(expected)


def images_of_classes(labels, classes):
    """Empty images with these labels."""
    return Images(torch.zeros(len(labels), 1, 1, 1), labels, classes, None)


def test_a_class_of_two_images_is_named():
    pool = images_of_classes(torch.tensor([0, 0, 0, 1, 1]), ("ant", "bee"))
    with pytest.raises(UserError, match="class bee of Caltech101"):
        split_pool(pool, CALTECH, seed=0)


def test_only_training_images_are_augmented(caltech):
    plain, augmented = (
        training_data(replace(COLOUR, augmentation=word), 0) for word in ("none", "standard")
    )
    assert plain.split == augmented.split and augmented.augmentation == "standard"
    noise = torch.randint(0, 256, (2, 3, 17, 17), dtype=torch.uint8)
    assert torch.equal(plain.train.transform(noise), plain.validation.transform(noise))
    assert torch.equal(augmented.validation.transform(noise), plain.validation.transform(noise))
    assert not torch.equal(augmented.train.transform(noise), plain.train.transform(noise))


def test_damage_in_any_part_of_a_pool_is_named_before_training(caltech):
    split = training_data(COLOUR, 0).split
    broken = [caltech / split["files"][role][0] for role in ("train", "validation", "test")]
    for path in broken:
        path.write_text("not an image")
    with pytest.raises(UserError) as error:
        training_data(COLOUR, 0)
    assert_named(error, broken[0])
    with pytest.raises(UserError) as error:
        test_data(COLOUR, 0)
    assert_named(error, broken[2])
