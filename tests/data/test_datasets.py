"""Where images come from: what lies on disk is what a data set holds, and what is missing or damaged is named."""

import hashlib
import pickle
import shutil

import numpy as np
import pytest
import torch
import torchvision
from msgspec.structs import replace
from small_sets import COLOUR, SMOKE, assert_named, carried, write_fashion, write_images, write_pool
from torchvision.datasets.utils import check_md5

from avit_lib.data import loader, project_root, test_data, to_pixels, training_data
from avit_lib.data.datasets import folder_images
from avit_lib.data.images import load
from avit_lib.errors import UserError

test_data.__test__ = False  # a function of the library, not a test
EMBEDDED = project_root() / "data" / "FashionMNIST" / "raw"


@pytest.fixture
def small(tmp_path, monkeypatch, no_network):
    """The raw folder of a small Fashion-MNIST."""
    monkeypatch.setenv("AVIT_DATA", str(tmp_path))
    return write_fashion(tmp_path)


def test_items_are_normalised(small):
    image, label = training_data(SMOKE, 0).train[0]
    assert image.shape == (3, 28, 28) and image.dtype == torch.float32
    assert image[0, -1, -1].item() == pytest.approx(-0.286 / 0.353, rel=1e-3)  # a black pixel
    assert 0 <= label < 10


def test_missing_files(tmp_path, monkeypatch, no_network, capsys):
    monkeypatch.setenv("AVIT_DATA", str(tmp_path))
    with pytest.raises(UserError) as error:
        training_data(SMOKE, 0)
    assert_named(error, tmp_path)


def test_a_damaged_archive(tmp_path, monkeypatch, no_network, capsys):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for path in EMBEDDED.glob("*.gz"):
        shutil.copy(path, raw)
    archive = raw / "t10k-labels-idx1-ubyte.gz"
    archive.write_bytes(archive.read_bytes()[:1000])
    monkeypatch.setenv("AVIT_DATA", str(tmp_path))
    with pytest.raises(UserError) as error:
        test_data(SMOKE)
    assert_named(error, raw)


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"])
@pytest.mark.parametrize("kept", [0, 10, 300])
def test_a_damaged_unpacked_file(small, name, kept):
    path = small / name
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError) as error:
        training_data(SMOKE, 0)
    assert_named(error, small)


def test_the_embedded_archives_are_the_published_ones():
    for name, checksum in torchvision.datasets.FashionMNIST.resources:
        assert check_md5(EMBEDDED / name, checksum)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_a_folder_become_squares(tmp_path, channels):
    write_images(tmp_path / "test", {"ants": 2, "bees": 3})
    data = load(folder_images(tmp_path / "test", 16, channels))[0]
    assert data.images.shape == (5, channels, 16, 16) and data.images.dtype == torch.uint8
    assert data.classes == ("ants", "bees") and data.labels.tolist() == [0, 0, 1, 1, 1]
    if channels == 3:
        assert data.images[1, :, 8, 8].tolist() == [10, 200, 100]
    image, _ = data[1]
    torch.testing.assert_close(to_pixels(image), data.images[1] / 255, rtol=0, atol=1e-6)


def test_faults_of_a_folder_are_named(tmp_path):
    with pytest.raises(UserError) as error:
        load(folder_images(tmp_path / "train", 16, 3))[0]
    assert_named(error, tmp_path / "train")
    write_images(tmp_path / "train", {"ants": 2})
    broken = tmp_path / "train" / "ants" / "00.png"
    broken.write_bytes(broken.read_bytes()[:40])
    with pytest.raises(UserError) as error:
        load(folder_images(tmp_path / "train", 16, 3))[0]
    assert_named(error, broken)


def test_caltech256(tmp_path, monkeypatch, no_network):
    folder = tmp_path / "caltech256" / "256_ObjectCategories"
    write_pool(folder, {"001.ak47": 12, "056.dog": 12, "257.clutter": 12})
    (folder / "056.dog" / "greg").mkdir()  # as in the archive: files that are none of its images
    shutil.copy(folder / "056.dog" / "image_0000.jpg", folder / "056.dog" / "greg" / "image_0099.jpg")
    (folder / "001.ak47" / "RENAME2").write_text("a script")
    monkeypatch.setenv("AVIT_DATA", str(tmp_path))
    settings = replace(COLOUR, dataset="Caltech256")
    data = training_data(settings, 0)
    assert data.train.classes == ("001.ak47", "056.dog")
    assert (len(data.train), len(data.validation), len(test_data(settings))) == (12, 6, 6)
    assert not [name for names in data.split["files"].values() for name in names if "greg" in name]


@pytest.mark.parametrize(
    ("name", "place"),
    [("Caltech101", "101_ObjectCategories/<class>"), ("Caltech256", "256_ObjectCategories/<class>"),
     ("CIFAR10", "cifar-10-batches-py"), ("CIFAR100", "cifar-100-python")],
)  # fmt: skip
def test_what_cannot_be_downloaded_is_said_to_be_missing(name, place, tmp_path, monkeypatch, no_network, capsys):
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
        write_pool(tmp_path / "imagenet" / split, dict.fromkeys(("n01440764", "n01443537", "n01484850"), count))
    monkeypatch.setenv("AVIT_DATA", str(tmp_path))
    return replace(COLOUR, dataset="ImageNet", train_per_class="all", validation_per_class=2, test_per_class="all")


def test_imagenet(imagenet):
    data = training_data(imagenet, 0)
    assert data.train.classes == ("n01440764", "n01443537", "n01484850")
    assert (len(data.train), len(data.validation)) == (18, 6)
    assert not set(carried(data.train)) & set(carried(data.validation))
    assert test_data(imagenet, 0).labels.tolist() == test_data(imagenet, 1).labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert data.split["files"].keys() == {"validation"}  # a million training images are not listed
    fewer = training_data(replace(imagenet, train_per_class=3), 0)
    assert len(fewer.train) == 9 and len(fewer.split["files"]["train"]) == 9
    assert test_data(replace(imagenet, test_per_class=1)).labels.tolist() == [0, 1, 2]


def test_a_missing_imagenet_is_not_looked_for_elsewhere(imagenet, tmp_path):
    shutil.rmtree(tmp_path / "imagenet" / "val")
    with pytest.raises(UserError) as error:
        test_data(imagenet)
    assert_named(error, tmp_path / "imagenet" / "val")


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100"])
def test_cifar(name, tmp_path, monkeypatch, no_network):
    classes = [f"class {number}" for number in range(3)]
    write_cifar(name, classes, tmp_path, monkeypatch)
    settings = replace(COLOUR, dataset=name, train_per_class="all", test_per_class=2, image_size=48)
    data, held_out = training_data(settings, 0), test_data(settings)
    assert data.train.classes == tuple(classes)
    assert data.validation.labels.bincount().tolist() == [3, 3, 3]
    assert held_out.labels.bincount().tolist() == [2, 2, 2]
    assert data.train.images.shape[1:] == (3, 32, 32)  # scaled up a batch at a time
    for part in (data.train, data.validation, held_out):
        batch, labels = next(iter(loader(part, 4)))
        assert batch.shape == (4, 3, 48, 48)
        assert (to_pixels(batch)[:, 0] * 255).round().flatten(1).unique(dim=1)[:, 0].tolist() == labels.tolist()


def write_cifar(name, classes, root, monkeypatch):
    """Batches of 30 images in torchvision's pickled format, whose red is their label; their md5 sums are made known."""
    source = getattr(torchvision.datasets, name)
    folder = root / source.base_folder
    folder.mkdir()
    monkeypatch.setenv("AVIT_DATA", str(root))

    def write(file, content):
        (folder / file).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / file).read_bytes()).hexdigest()

    lists = {}
    for kind in ("train_list", "test_list"):
        lists[kind] = []
        for file, _ in getattr(source, kind):
            labels = [number % 3 for number in range(30)]
            pixels = np.zeros((30, 3, 1024), dtype=np.uint8)
            pixels[:, 0] = np.array(labels)[:, None]
            content = {"data": pixels.reshape(30, 3072), "labels" if name == "CIFAR10" else "fine_labels": labels}
            lists[kind].append([file, write(file, content)])
    meta = source.meta | {"md5": write(source.meta["filename"], {source.meta["key"]: classes})}
    for attribute, value in (lists | {"meta": meta}).items():
        monkeypatch.setattr(source, attribute, value)


def test_a_damaged_cifar_is_not_unpickled(tmp_path, monkeypatch, no_network, capsys):
    write_cifar("CIFAR10", ["a", "b", "c"], tmp_path, monkeypatch)
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(UserError) as error:
        training_data(replace(COLOUR, dataset="CIFAR10"), 0)
    assert_named(error, tmp_path / "cifar-10-batches-py")
