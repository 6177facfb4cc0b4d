"""Splits on a small data set in Fashion-MNIST's own format, in which every image carries its own index."""

import dataclasses
import shutil

import pytest
import torch
import torchvision
from PIL import Image
from torchvision.datasets.utils import check_md5

from avit_lib.config import StudyError, get_profile, project_root
from avit_lib.data import folder_data, folder_training_data, loader, pick_per_class, test_data, to_pixels, training_data

test_data.__test__ = False  # a function of the library, not a test
EMBEDDED = project_root() / "data" / "FashionMNIST" / "raw"
SMOKE = get_profile("smoke")


def write_idx(path, values):
    """Write a uint8 tensor in the idx format."""
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    path.write_bytes(bytes([0, 0, 8, values.ndim]) + sizes + values.numpy().tobytes())


@pytest.fixture
def small(tmp_path, monkeypatch, no_network):
    """The raw folder of 40 training and 25 test images a class; the first two pixels of an image are its index."""
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, per_class in (("train", 40), ("t10k", 25)):
        labels = torch.arange(10).repeat(per_class)[torch.randperm(10 * per_class)].to(torch.uint8)
        images = torch.zeros(len(labels), 28, 28, dtype=torch.uint8)
        images[:, 0, 0] = torch.arange(len(labels)) // 256
        images[:, 0, 1] = torch.arange(len(labels)) % 256
        write_idx(raw / f"{part}-images-idx3-ubyte", images)
        write_idx(raw / f"{part}-labels-idx1-ubyte", labels)
    monkeypatch.setenv("AVIT_DATA", str(tmp_path))
    return raw


def indices(data):
    """The indices that the images of ``data`` carry."""
    return (data.images[:, 0, 0, 0].long() * 256 + data.images[:, 0, 0, 1]).tolist()


def test_the_split_is_stratified_and_disjoint(small):
    data = training_data(SMOKE, seed=0)
    assert data.validation.labels.bincount().tolist() == [10] * 10
    assert data.train.labels.bincount().tolist() == [20] * 10
    train, validation = indices(data.train), indices(data.validation)
    assert len(set(train)) == 200 and len(set(validation)) == 100
    assert not set(train) & set(validation)


def test_what_is_not_held_out_is_trained_on(small):
    data = training_data(dataclasses.replace(SMOKE, train_per_class=None), seed=0)
    assert sorted(indices(data.train) + indices(data.validation)) == list(range(400))


def test_the_split_is_described(small):
    data = training_data(SMOKE, seed=3)
    assert data.split["validation_indices"] == indices(data.validation)
    assert (data.split["train_images"], data.split["validation_images"]) == (200, 100)
    assert data.split["seed"] == 3


def test_the_split_follows_the_seed(small):
    first, again, other = (training_data(SMOKE, seed) for seed in (0, 0, 1))
    assert first.split == again.split and indices(first.train) == indices(again.train)
    assert first.split["sha256"] != other.split["sha256"]
    assert indices(first.validation) != indices(other.validation)


def test_test_images_are_the_same_whatever_the_seed(small):
    data = test_data(SMOKE)
    assert data.labels.bincount().tolist() == [20] * 10
    assert indices(data) == indices(test_data(SMOKE))
    assert len(test_data(dataclasses.replace(SMOKE, test_per_class=None))) == 250


def test_items_are_normalised(small):
    image, label = training_data(SMOKE, 0).train[0]
    assert image.shape == (1, 28, 28) and image.dtype == torch.float32
    assert image[0, -1, -1].item() == pytest.approx(-0.286 / 0.353, rel=1e-3)  # a black pixel
    assert 0 <= label < 10


def test_too_few_images_of_a_class(small):
    with pytest.raises(StudyError, match="41"):
        training_data(dataclasses.replace(SMOKE, validation_per_class=41), 0)
    labels = torch.tensor([0, 0, 0, 1])
    with pytest.raises(StudyError, match="fewer than the 2"):
        pick_per_class(labels, 2, torch.Generator())
    assert pick_per_class(labels, 1, torch.Generator())[1].item() == 3


def test_shuffled_batches_follow_their_seed(small):
    data = training_data(SMOKE, 0).train

    def order(seed):
        return torch.cat([labels for _, labels in loader(data, 32, shuffle_seed=seed)]).tolist()

    assert order(1) == order(1) != order(2)
    assert len(order(1)) == 192  # the last, smaller batch is left out
    assert torch.equal(torch.cat([labels for _, labels in loader(data, 32)]), data.labels)


def assert_named(error, folder):
    """The message is one line that names the folder."""
    message = str(error.value)
    assert str(folder) in message and "\n" not in message


def test_missing_files(tmp_path, monkeypatch, no_network, capsys):
    monkeypatch.setenv("AVIT_DATA", str(tmp_path))
    with pytest.raises(StudyError) as error:
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
    with pytest.raises(StudyError) as error:
        test_data(SMOKE)
    assert_named(error, raw)


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"])
@pytest.mark.parametrize("kept", [0, 10, 300])
def test_a_damaged_unpacked_file(small, name, kept):
    path = small / name
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(StudyError) as error:
        training_data(SMOKE, 0)
    assert_named(error, small)


def test_the_embedded_archives_are_the_published_ones():
    for name, checksum in torchvision.datasets.FashionMNIST.resources:
        assert check_md5(EMBEDDED / name, checksum)


def write_images(folder, counts, size=(20, 30)):
    """``counts[class]`` PNG images of one colour in ``folder``/<class>: the i-th has red 10 i."""
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", size, (10 * index, 200, 100)).save(folder / name / f"{index:02d}.png")


@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_a_folder_become_squares(tmp_path, channels):
    write_images(tmp_path / "test", {"ants": 2, "bees": 3})
    data = folder_data(tmp_path, "test", 16, channels)
    assert data.images.shape == (5, channels, 16, 16) and data.images.dtype == torch.uint8
    assert data.classes == ("ants", "bees") and data.labels.tolist() == [0, 0, 1, 1, 1]
    if channels == 3:
        assert data.images[1, :, 8, 8].tolist() == [10, 200, 100]
    image, _ = data[1]
    torch.testing.assert_close(to_pixels(image), data.images[1] / 255, rtol=0, atol=1e-6)


def test_a_folder_without_validation_images_gives_some_up(tmp_path):
    write_images(tmp_path / "train", {"ants": 20, "bees": 25})
    data = folder_training_data(tmp_path, 16, 3, seed=0)
    assert data.validation.labels.bincount().tolist() == [2, 2]
    assert data.train.labels.bincount().tolist() == [18, 23]
    held, kept = (set(zip(part.labels.tolist(), part.images[:, 0, 0, 0].tolist(), strict=True))
                  for part in (data.validation, data.train))  # fmt: skip
    assert len(held) == 4 and not held & kept


def test_a_folder_with_validation_images_keeps_them_apart(tmp_path):
    write_images(tmp_path / "train", {"ants": 3, "bees": 3})
    write_images(tmp_path / "val", {"ants": 1, "bees": 2})
    data = folder_training_data(tmp_path, 16, 1, seed=0)
    assert (len(data.train), data.validation.labels.tolist()) == (6, [0, 1, 1])


def test_validation_classes_are_those_of_training(tmp_path):
    write_images(tmp_path / "train", {"ants": 3, "bees": 3})
    write_images(tmp_path / "val", {"bees": 2})
    try:
        data = folder_training_data(tmp_path, 16, 1, seed=0)
    except StudyError as error:
        assert "val" in str(error)  # refusing is as good
    else:
        assert data.validation.labels.tolist() == [1, 1]


def test_faults_of_a_folder_are_named(tmp_path):
    with pytest.raises(StudyError) as error:
        folder_data(tmp_path, "train", 16, 3)
    assert_named(error, tmp_path / "train")
    write_images(tmp_path / "train", {"ants": 2})
    broken = tmp_path / "train" / "ants" / "00.png"
    broken.write_bytes(broken.read_bytes()[:40])
    with pytest.raises(StudyError) as error:
        folder_data(tmp_path, "train", 16, 3)
    assert_named(error, broken)
