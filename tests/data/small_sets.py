"""Small data sets in the formats of the real ones, in which every image carries its own index."""

import torch
from PIL import Image

from avit_lib.data import Data

SMOKE = Data(dataset="FashionMNIST", image_size=28, train_per_class=20, validation_per_class=10, test_per_class=20)
COLOUR = Data(
    dataset="Caltech101", image_size=16, train_per_class=6, validation_per_class=3, test_per_class=5,
    augmentation="standard",
)  # fmt: skip


def write_idx(path, values):
    """Write a uint8 tensor in the idx format."""
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    path.write_bytes(bytes([0, 0, 8, values.ndim]) + sizes + values.numpy().tobytes())


def write_fashion(root):
    """40 training and 25 test images a class; the first two pixels of an image are its index. Returns their folder."""
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, per_class in (("train", 40), ("t10k", 25)):
        labels = torch.arange(10).repeat(per_class)[torch.randperm(10 * per_class)].to(torch.uint8)
        images = torch.zeros(len(labels), 28, 28, dtype=torch.uint8)
        images[:, 0, 0] = torch.arange(len(labels)) // 256
        images[:, 0, 1] = torch.arange(len(labels)) % 256
        write_idx(raw / f"{part}-images-idx3-ubyte", images)
        write_idx(raw / f"{part}-labels-idx1-ubyte", labels)
    return raw


def indices(data):
    """The indices that the images of ``data`` carry."""
    return (data.images[:, 0, 0, 0].long() * 256 + data.images[:, 0, 0, 1]).tolist()


def write_images(folder, counts, size=(20, 30)):
    """``counts[class]`` PNG images of one colour in ``folder``/<class>: the i-th has red 10 i."""
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", size, (10 * index, 200, 100)).save(folder / name / f"{index:02d}.png")


def write_pool(folder, counts):
    """A folder a class of images whose colour is (class, index, 0)."""
    for label, (name, count) in enumerate(sorted(counts.items())):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            path = folder / name / f"image_{index:04d}.jpg"
            Image.new("RGB", (20, 30), (label, index, 0)).save(path, "PNG")  # Pillow goes by content


def carried(data):
    """Label and index that the colours of the decoded images carry."""
    return [tuple(image[:2, 8, 8].tolist()) for image in data.images]


def assert_named(error, folder):
    """The message is one line that names the folder."""
    message = str(error.value)
    assert str(folder) in message and "\n" not in message
