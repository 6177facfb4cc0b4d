"""Where images come from: what lies on disk is what a data set holds; what is missing is named."""

import shutil
from pathlib import Path

import pytest
from conftest import read_files, refused
from msgspec.structs import replace
from small_sets import COLOUR, carried, write_images

from avit_lib import data
from avit_lib.data import Data, check_embedded, datasets
from avit_lib.errors import UserError
from avit_lib.places import digest_file, project_root

ANTS = "caltech101/101_ObjectCategories"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Data sets lie in a folder of their own, and none can be downloaded."""
    monkeypatch.setenv("AVIT_DATA", str(tmp_path))
    monkeypatch.setenv("no_proxy", "")
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")


def test_caltech256(tmp_path):
    folder = tmp_path / "caltech256" / "256_ObjectCategories"
    # As in the archive: folders that are none of its classes.
    write_images(folder, {"001.ak47": 12, "056.dog": 12, "056.dog/greg": 2, "257.clutter": 12})
    settings = replace(COLOUR, dataset="Caltech256", classes=("001.ak47", "056.dog"))
    found = data.training_data(settings, 0)
    assert found.train.classes == ("001.ak47", "056.dog")
    sizes = len(found.train), len(found.validation), len(data.test_data(settings))
    assert sizes == (12, 6, 6)


def test_a_pool_that_is_not_whole_says_so(tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(datasets.POOLS, "Caltech256", ("caltech256", 2, set()))
    write_images(tmp_path / "caltech256", {"001.ak47": 12, "056.dog": 12})
    settings = replace(COLOUR, dataset="Caltech256", classes=())
    data.training_data(settings, 0)
    assert "has 24 images, and Caltech256 as published 29780" in capfd.readouterr().err
    monkeypatch.setitem(datasets.PUBLISHED, "Caltech256", 24)
    data.training_data(settings, 0)
    assert not capfd.readouterr().err
    with pytest.raises(ValueError, match="train_per_class must be a number"):
        replace(settings, train_per_class="all")


def test_imagenet(tmp_path, monkeypatch):
    classes = ("n01440764", "n01443537", "n01484850")
    for part, count in (("train", 8), ("val", 2)):
        write_images(tmp_path / "imagenet" / part, dict.fromkeys(classes, count))
    imagenet = Data(dataset="ImageNet", image_size=16, validation_per_class=2)
    with refused("imagenet has 3 classes, and ImageNet has 1000: unpack the others"):
        data.training_data(imagenet, 0)
    monkeypatch.setattr(datasets, "IMAGENET_CLASSES", 3)
    found = data.training_data(imagenet, 0)
    assert found.train.classes == classes
    assert (len(found.train), len(found.validation)) == (18, 6)
    assert not set(carried(found.train)) & set(carried(found.validation))
    assert data.test_data(imagenet).labels.tolist() == [0, 0, 1, 1, 2, 2]
    # A million training images are not listed.
    assert found.split["files"] == {"validation": found.split["files"]["validation"]}
    with pytest.raises(ValueError, match="of ImageNet all classes and images take part"):
        replace(imagenet, train_per_class=3)
    val = tmp_path / "imagenet" / "val"
    (val / "n01443537").rename(val / "1")
    with refused("other classes than the model or the training images: 1"):
        data.test_data(imagenet)
    shutil.rmtree(val / "1")
    found = data.test_data(imagenet)
    assert found.classes == classes and found.labels.tolist() == [0, 0, 2, 2]


@pytest.mark.parametrize("name", ["ImageNet", "Caltech256"])
def test_data_that_are_missing_are_named(name, tmp_path):
    number = "all" if name == "ImageNet" else 6
    settings = Data(dataset=name, image_size=16, validation_per_class=2, train_per_class=number)
    with refused(rf"{tmp_path}/{name.lower()}/\w+/<class>.* set AVIT_DATA"):
        data.test_data(settings)


@pytest.mark.parametrize(
    ("fault", "told"), [(OSError("cut off"), UserError), (KeyboardInterrupt, KeyboardInterrupt)]
)
def test_a_data_set_is_whole_or_not_there(fault, told, tmp_path, monkeypatch):
    def download(root, download):
        write_images(Path(root) / "caltech256" / "256_ObjectCategories", {"001.ak47": 12})
        if fault:
            raise fault

    monkeypatch.setattr(datasets.torchvision_sets, "Caltech256", download)
    settings = replace(COLOUR, dataset="Caltech256", classes=("001.ak47",))
    with pytest.raises(told):
        data.training_data(settings, 0)
    assert not read_files(tmp_path)
    fault = None
    assert data.training_data(settings, 0).train.classes == ("001.ak47",)


def test_classes_that_a_pool_lacks_are_named(tmp_path):
    write_images(tmp_path / "caltech101" / "101_ObjectCategories", {"ant": 9, "bee": 9})
    for classes, lacking in ((("ant", "wasp"), "wasp"), ((), "99 of its classes")):
        with refused(f"{tmp_path}.* it lacks {lacking};"):
            data.training_data(replace(COLOUR, classes=classes), 0)


# --- what is embedded -----------------------------------------------------------------------------


def test_what_is_embedded_is_as_published():
    embedded = project_root() / "data"
    assert len((embedded / "SHA256SUMS").read_text().splitlines()) == 1723
    check_embedded(embedded)


@pytest.fixture
def embedded(tmp_path, monkeypatch):
    """The data/ of a checkout in which we are, with twelve ants."""
    folder = tmp_path / "data"
    write_images(folder / ANTS, {"ant": 12})
    files = sorted(folder.rglob("*.png"))
    sums = [f"{digest_file(path)}  {path.relative_to(folder)}\n" for path in files]
    (folder / "SHA256SUMS").write_text("".join(sums))
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "avit_lib").mkdir()
    monkeypatch.chdir(tmp_path)
    return folder


def test_another_folder_with_other_images_than_the_embedded_is_told(embedded, tmp_path, capsys):
    write_images(tmp_path / ANTS, {"ant": 13, "bee": 12})
    for classes in (("ant",), ("bee",)):
        data.training_data(replace(COLOUR, classes=classes), 0)
    assert capsys.readouterr().err.count("lacks or adds images of these classes (1): ant/") == 1
    (tmp_path / ANTS / "ant" / "image_0012.png").unlink()
    data.training_data(replace(COLOUR, classes=("ant",)), 0)
    assert "lacks" not in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, b"other"])
def test_an_embedded_file_that_is_not_as_published_is_named(
    content, embedded, tmp_path, monkeypatch
):
    monkeypatch.delenv("AVIT_DATA")
    check_embedded(embedded)
    name = "caltech101/101_ObjectCategories/ant/image_0001.png"
    (embedded / name).unlink()
    if content is not None:
        (embedded / name).write_bytes(content)
    (tmp_path / "link").symlink_to(embedded)
    for folder in ("", "avit_lib/../data", "link"):
        monkeypatch.setenv("AVIT_DATA", folder)
        with refused(rf"damaged in .*: {name}; .*git checkout -- data"):
            data.training_data(replace(COLOUR, classes=("ant",)), 0)
    check_embedded(embedded / "weights")  # of which there are no checksums
