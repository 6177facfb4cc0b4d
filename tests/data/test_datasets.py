"""Where images come from: what lies on disk is what a data set holds, and what is missing or
damaged is named.
"""

import hashlib
import shutil

import pytest
import torch
from msgspec.structs import replace
from small_sets import COLOUR, assert_named, carried, write_images, write_pool

from avit_lib.data import Data, check_embedded, project_root, test_data, to_pixels, training_data
from avit_lib.data.datasets import folder_images
from avit_lib.data.images import load
from avit_lib.errors import UserError

test_data.__test__ = False  # a function of the library, not a test


def test_images_of_a_folder_become_squares(tmp_path):
    write_images(tmp_path / "test", {"ants": 2, "bees": 3})
    data = load(folder_images(tmp_path / "test", 16))[0]
    assert data.images.shape == (5, 3, 17, 17) and data.images.dtype == torch.uint8
    assert data.classes == ("ants", "bees") and data.labels.tolist() == [0, 0, 1, 1, 1]
    assert data.images[1, :, 8, 8].tolist() == [10, 200, 100]
    image, _ = data[1]
    torch.testing.assert_close(
        to_pixels(image), data.images[1, :, :16, :16] / 255, rtol=0, atol=1e-6
    )


def test_faults_of_a_folder_are_named(tmp_path):
    with pytest.raises(UserError) as error:
        load(folder_images(tmp_path / "train", 16))[0]
    assert_named(error, tmp_path / "train")
    write_images(tmp_path / "train", {"ants": 2})
    broken = tmp_path / "train" / "ants" / "00.png"
    broken.write_bytes(broken.read_bytes()[:40])
    with pytest.raises(UserError) as error:
        load(folder_images(tmp_path / "train", 16))[0]
    assert_named(error, broken)


def test_caltech256(tmp_path, monkeypatch, no_network):
    folder = tmp_path / "caltech256" / "256_ObjectCategories"
    write_pool(folder, {"001.ak47": 12, "056.dog": 12, "257.clutter": 12})
    (folder / "056.dog" / "greg").mkdir()  # as in the archive: files that are none of its images
    shutil.copy(
        folder / "056.dog" / "image_0000.jpg", folder / "056.dog" / "greg" / "image_0099.jpg"
    )
    (folder / "001.ak47" / "RENAME2").write_text("a script")
    monkeypatch.setenv("AVIT_DATA", str(tmp_path))
    settings = replace(COLOUR, dataset="Caltech256", classes=("001.ak47", "056.dog"))
    data = training_data(settings, 0)
    assert data.train.classes == ("001.ak47", "056.dog")
    assert (len(data.train), len(data.validation), len(test_data(settings))) == (12, 6, 6)
    assert not [name for names in data.split["files"].values() for name in names if "greg" in name]


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("Caltech101", "101_ObjectCategories/<class>"),
        ("Caltech256", "256_ObjectCategories/<class>"),
    ],
)
def test_what_cannot_be_downloaded_is_said_to_be_missing(
    name, place, tmp_path, monkeypatch, no_network, capsys
):
    settings = replace(COLOUR, dataset=name)
    monkeypatch.setenv("AVIT_DATA", str(tmp_path))
    for call in (lambda: training_data(settings, 0), lambda: test_data(settings)):
        with pytest.raises(UserError, match=place) as error:
            call()
        assert_named(error, tmp_path)


@pytest.fixture
def imagenet(tmp_path, monkeypatch):
    """ImageNet with three classes."""
    for split, count in (("train", 8), ("val", 2)):
        write_pool(
            tmp_path / "imagenet" / split,
            dict.fromkeys(("n01440764", "n01443537", "n01484850"), count),
        )
    monkeypatch.setenv("AVIT_DATA", str(tmp_path))
    return Data(dataset="ImageNet", image_size=16, validation_per_class=2)


def test_imagenet(imagenet):
    data = training_data(imagenet, 0)
    assert data.train.classes == ("n01440764", "n01443537", "n01484850")
    assert (len(data.train), len(data.validation)) == (18, 6)
    assert not set(carried(data.train)) & set(carried(data.validation))
    assert (
        test_data(imagenet, 0).labels.tolist()
        == test_data(imagenet, 1).labels.tolist()
        == [0, 0, 1, 1, 2, 2]
    )
    assert data.split["files"].keys() == {"validation"}  # a million training images are not listed
    with pytest.raises(ValueError, match="of ImageNet all classes and images take part"):
        replace(imagenet, train_per_class=3)


def test_a_missing_imagenet_is_not_looked_for_elsewhere(imagenet, tmp_path):
    shutil.rmtree(tmp_path / "imagenet" / "val")
    with pytest.raises(UserError) as error:
        test_data(imagenet)
    assert_named(error, tmp_path / "imagenet" / "val")


@pytest.mark.parametrize("classes", [("ant", "wasp"), ()])
def test_classes_that_a_pool_lacks_are_named(classes, tmp_path, monkeypatch):
    write_pool(tmp_path / "caltech101" / "101_ObjectCategories", {"ant": 9, "bee": 9})
    monkeypatch.setenv("AVIT_DATA", str(tmp_path))
    with pytest.raises(
        UserError, match="it lacks wasp;" if classes else "it lacks 99 of its classes;"
    ) as error:
        training_data(replace(COLOUR, classes=classes), 0)
    assert_named(error, tmp_path)


# --- what is embedded -----------------------------------------------------------------------------


def test_what_is_embedded_is_as_published():
    data = project_root() / "data"
    listed = len((data / "SHA256SUMS").read_text().splitlines())
    assert check_embedded(data) == listed > 1700
    assert check_embedded(data / "weights") == 1


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """The data of a checkout in which we are: three images and weights, with their checksums."""
    data = tmp_path / "data"
    folder = data / "caltech101" / "101_ObjectCategories"
    write_pool(folder, {"ant": 3})
    (data / "weights").mkdir()
    (data / "weights" / "deit.safetensors").write_bytes(b"weights")
    files = sorted(path for path in data.rglob("*") if path.is_file())
    sums = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(data)}"
        for path in files
    ]
    (data / "SHA256SUMS").write_text("\n".join(sums) + "\n")
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "avit_lib").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AVIT_DATA", raising=False)
    return data


def lose(path):
    path.unlink()


def truncate(path):
    path.write_bytes(path.read_bytes()[:4])


def change(path):
    path.write_bytes(path.read_bytes() + b"x")


def point(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


@pytest.mark.parametrize(
    "name", ["caltech101/101_ObjectCategories/ant/image_0001.jpg", "weights/deit.safetensors"]
)
@pytest.mark.parametrize(
    ("harm", "words"),
    [(lose, "missing"), (truncate, "damaged"), (change, "damaged"), (point, "a Git LFS pointer")],
)
def test_an_embedded_file_that_is_not_as_published_is_named(checkout, name, harm, words):
    assert check_embedded(checkout) == 4
    harm(checkout / name)
    with pytest.raises(UserError, match=f"{name} .{words}.; .*git checkout -- data") as error:
        check_embedded(checkout)
    assert_named(error, checkout)
    if name.startswith("weights"):
        assert check_embedded(checkout / "caltech101") == 3
    else:
        with pytest.raises(UserError, match=words):
            training_data(replace(COLOUR, classes=("ant",)), 0)


def test_data_elsewhere_have_no_checksums(checkout, tmp_path, monkeypatch):
    change(checkout / "weights" / "deit.safetensors")
    monkeypatch.setenv("AVIT_WEIGHTS", str(tmp_path / "elsewhere"))
    assert check_embedded(tmp_path / "elsewhere") == 0
