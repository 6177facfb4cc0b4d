"""Splits on small data sets in the formats of the real ones, in which every image carries its own index."""

import dataclasses
import hashlib
import json
import pickle
import shutil

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.datasets.utils import check_md5

from avit_lib import images
from avit_lib.config import StudyError, get_profile, project_root
from avit_lib.data import (
    check_split,
    folder_data,
    folder_training_data,
    loader,
    pick_per_class,
    split_pool,
    test_data,
    test_images,
    to_pixels,
    training_data,
)

test_data.__test__ = test_images.__test__ = False  # functions of the library, not tests
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


COLOUR = dataclasses.replace(
    get_profile("caltech101"), image_size=16, train_per_class=6, validation_per_class=3, test_per_class=5
)


def write_pool(folder, counts):
    """A folder a class of images whose colour is (class, index, 0)."""
    for label, (name, count) in enumerate(sorted(counts.items())):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            path = folder / name / f"image_{index:04d}.jpg"
            Image.new("RGB", (20, 30), (label, index, 0)).save(path, "PNG")  # Pillow goes by content


@pytest.fixture
def caltech(tmp_path, monkeypatch, no_network):
    """Caltech-101 with a large class, one that is just large enough, and two small ones; class names out of order."""
    folder = tmp_path / "caltech101" / "101_ObjectCategories"
    write_pool(folder, {"ant": 40, "Faces": 12, "bass": 9, "emu": 3})
    write_images(folder, {"BACKGROUND_Google": 4})
    (folder / "BACKGROUND_Google" / "tmp").write_text("torchvision's archive holds this")
    monkeypatch.setenv("AVIT_DATA", str(tmp_path))
    return folder


def carried(data):
    """Label and index that the colours of the decoded images carry."""
    return [tuple(image[:2, 8, 8].tolist()) for image in data.images]


def test_a_pool_gives_training_validation_and_test_images(caltech):
    data, held_out = training_data(COLOUR, seed=0), test_data(COLOUR, seed=0)
    assert data.train.classes == held_out.classes == ("Faces", "ant", "bass", "emu")  # sorted as torchvision sorts
    assert data.train.labels.bincount().tolist() == [6, 6, 6, 1]
    assert data.validation.labels.bincount().tolist() == [3, 3, 1, 1]
    assert held_out.labels.bincount().tolist() == [3, 5, 2, 1]
    parts = [carried(part) for part in (data.train, data.validation, held_out)]
    for part, source in zip(parts, (data.train, data.validation, held_out), strict=True):
        assert [label for label, _ in part] == source.labels.tolist()
    together = [image for part in parts for image in part]
    assert len(set(together)) == len(together) == 12 + 14 + 9 + 3


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
    with pytest.raises(StudyError, match="bass/image_0") as error:
        check_split(recorded, training_data(COLOUR, 0).split)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("images", "expected"),
    [(500, (30, 5, 50)), (86, (30, 5, 50)), (40, (30, 5, 5)), (39, (30, 4, 5)), (35, (30, 2, 3)), (32, (30, 1, 1)),
     (31, (29, 1, 1)), (5, (3, 1, 1)), (3, (1, 1, 1))],
)  # fmt: skip
def test_small_classes_are_in_every_part(images, expected):
    pool = images_of_classes(torch.zeros(images, dtype=torch.long), ("thing",))
    parts = split_pool(pool, get_profile("caltech101"), seed=0)
    assert tuple(len(parts[role]) for role in ("train", "validation", "test")) == expected
    assert len(torch.cat(list(parts.values())).unique()) == sum(expected)


def images_of_classes(labels, classes):
    """Empty images with these labels."""
    return images.ImageTensors(torch.zeros(len(labels), 1, 1, 1), labels, classes, None)


def test_a_class_of_two_images_is_named():
    pool = images_of_classes(torch.tensor([0, 0, 0, 1, 1]), ("ant", "bee"))
    with pytest.raises(StudyError, match="class bee of Caltech101"):
        split_pool(pool, get_profile("caltech101"), seed=0)


def test_caltech256(tmp_path, monkeypatch, no_network):
    folder = tmp_path / "caltech256" / "256_ObjectCategories"
    write_pool(folder, {"001.ak47": 12, "056.dog": 12, "257.clutter": 12})
    (folder / "056.dog" / "greg").mkdir()  # as in the archive: files that are none of its images
    shutil.copy(folder / "056.dog" / "image_0000.jpg", folder / "056.dog" / "greg" / "image_0099.jpg")
    (folder / "001.ak47" / "RENAME2").write_text("a script")
    monkeypatch.setenv("AVIT_DATA", str(tmp_path))
    profile = dataclasses.replace(COLOUR, dataset="Caltech256")
    data = training_data(profile, 0)
    assert data.train.classes == ("001.ak47", "056.dog")
    assert (len(data.train), len(data.validation), len(test_data(profile))) == (12, 6, 6)
    assert not [name for names in data.split["files"].values() for name in names if "greg" in name]


@pytest.mark.parametrize(
    ("profile", "place"),
    [("caltech101", "101_ObjectCategories/<class>"), ("caltech256", "256_ObjectCategories/<class>"),
     ("cifar10", "cifar-10-batches-py"), ("cifar100", "cifar-100-python")],
)  # fmt: skip
def test_what_cannot_be_downloaded_is_said_to_be_missing(profile, place, tmp_path, monkeypatch, no_network, capsys):
    monkeypatch.setenv("AVIT_DATA", str(tmp_path))
    for call in (lambda: training_data(get_profile(profile), 0), lambda: test_data(get_profile(profile))):
        with pytest.raises(StudyError, match=place) as error:
            call()
        assert_named(error, tmp_path)


@pytest.fixture
def imagenet(tmp_path, monkeypatch):
    """ImageNet with three classes."""
    for split, count in (("train", 8), ("val", 2)):
        write_pool(tmp_path / "imagenet" / split, dict.fromkeys(("n01440764", "n01443537", "n01484850"), count))
    monkeypatch.setenv("AVIT_DATA", str(tmp_path))
    return dataclasses.replace(
        COLOUR, dataset="ImageNet", train_per_class=None, validation_per_class=2, test_per_class=None
    )


def test_imagenet(imagenet):
    data = training_data(imagenet, 0)
    assert data.train.classes == ("n01440764", "n01443537", "n01484850")
    assert (len(data.train), len(data.validation)) == (18, 6)
    assert not set(carried(data.train)) & set(carried(data.validation))
    assert test_data(imagenet, 0).labels.tolist() == test_data(imagenet, 1).labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert data.split["files"].keys() == {"validation"}  # a million training images are not listed
    fewer = training_data(dataclasses.replace(imagenet, train_per_class=3), 0)
    assert len(fewer.train) == 9 and len(fewer.split["files"]["train"]) == 9
    assert test_data(dataclasses.replace(imagenet, test_per_class=1)).labels.tolist() == [0, 1, 2]


def test_a_missing_imagenet_is_not_looked_for_elsewhere(imagenet, tmp_path):
    shutil.rmtree(tmp_path / "imagenet" / "val")
    with pytest.raises(StudyError) as error:
        test_data(imagenet)
    assert_named(error, tmp_path / "imagenet" / "val")


def test_an_unknown_data_set_is_named():
    with pytest.raises(StudyError, match="unknown data set 'SVHN'"):
        training_data(dataclasses.replace(COLOUR, dataset="SVHN"), 0)


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100"])
def test_cifar(name, tmp_path, monkeypatch, no_network):
    classes = [f"class {number}" for number in range(3)]
    write_cifar(name, classes, tmp_path, monkeypatch)
    profile = dataclasses.replace(COLOUR, dataset=name, train_per_class=None, test_per_class=2, image_size=48)
    data, held_out = training_data(profile, 0), test_data(profile)
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
    with pytest.raises(StudyError) as error:
        training_data(dataclasses.replace(COLOUR, dataset="CIFAR10"), 0)
    assert_named(error, tmp_path / "cifar-10-batches-py")


def test_only_training_images_are_augmented(caltech):
    plain, augmented = (
        training_data(dataclasses.replace(COLOUR, augmentation=word), 0) for word in ("none", "standard")
    )
    assert plain.split == augmented.split and augmented.augmentation == "standard"
    noise = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    assert torch.equal(plain.train.transform(noise), plain.validation.transform(noise))
    assert torch.equal(augmented.validation.transform(noise), plain.validation.transform(noise))
    assert not torch.equal(augmented.train.transform(noise), plain.train.transform(noise))
    with pytest.raises(StudyError, match="unknown augmentation 'strong'"):
        training_data(dataclasses.replace(COLOUR, augmentation="strong"), 0)


def test_damage_in_any_part_of_a_pool_is_named_before_training(caltech):
    split = training_data(COLOUR, 0).split
    broken = [caltech / split["files"][role][0] for role in ("train", "validation", "test")]
    for path in broken:
        path.write_text("not an image")
    with pytest.raises(StudyError) as error:
        training_data(COLOUR, 0)
    assert_named(error, broken[0])
    with pytest.raises(StudyError) as error:
        test_data(COLOUR, 0)
    assert_named(error, broken[2])
