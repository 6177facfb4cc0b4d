"""Where images come from: torchvision's data sets, found or downloaded, ImageNet, and folders of one's own."""

import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal
from urllib.error import URLError

import numpy as np
import torch
import torchvision.datasets as torchvision_sets
from msgspec import Meta, Struct
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

from avit_lib.data.images import ImageFiles, Images, ImageTensors, batch_transform, decoded_size
from avit_lib.errors import UserError

FASHION_CLASSES = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Boot")
DOWNLOAD_ERRORS = (
    OSError, URLError, RuntimeError, ValueError, AssertionError, EOFError, ImportError, KeyError,
    pickle.UnpicklingError,
)  # fmt: skip

Count = Annotated[int, Meta(ge=1)]


class Data(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which images, and how many of each class go where: the section ``data`` of a profile."""

    dataset: Literal["FashionMNIST", "CIFAR10", "CIFAR100", "Caltech101", "Caltech256", "ImageNet"]
    image_size: Count  # pixels
    validation_per_class: Count
    train_per_class: Count | Literal["all"] = "all"
    test_per_class: Count | Literal["all"] = "all"  # at most
    augmentation: Literal["none", "standard"] = "none"  # of training images; "standard": random crops and mirroring

    @property
    def channels(self) -> int:
        """1 for grey images, 3 for colour."""
        return 1 if self.dataset == "FashionMNIST" else 3


@dataclass(frozen=True)
class Pool:
    """A data set without an official test set: one folder a class, from which all three parts are drawn."""

    folder: str  # under data_dir(), in torchvision's layout
    leave_out: str  # a folder of images of nothing in particular


POOLS = {
    "Caltech101": Pool("caltech101/101_ObjectCategories", "BACKGROUND_Google"),
    "Caltech256": Pool("caltech256/256_ObjectCategories", "257.clutter"),
}
# With official training and test images, small enough to be one array; the folders are torchvision's.
TENSOR_SETS = {"FashionMNIST": "FashionMNIST/raw", "CIFAR10": "cifar-10-batches-py", "CIFAR100": "cifar-100-python"}


def project_root() -> Path:
    """The checkout in which we are (the nearest folder upward with avit_lib beside pyproject.toml), else here."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "pyproject.toml").is_file() and (folder / "avit_lib").is_dir():
            return folder
    return here


def data_dir() -> Path:
    """Where data sets lie: $AVIT_DATA, or data/ in the checkout."""
    return Path(os.environ.get("AVIT_DATA") or project_root() / "data")


def weights_dir() -> Path:
    """Where pretrained weights lie: $AVIT_WEIGHTS, or data/weights/ in the checkout."""
    return Path(os.environ.get("AVIT_WEIGHTS") or data_dir() / "weights")


def official_images(data: Data, train: bool) -> Images:
    """All training or test images of a data set, or the whole pool, as they are evaluated; files are not decoded.

    Downloads what is missing, if it can; raises UserError, with the folder it belongs into, if not.
    """
    size, channels = data.image_size, data.channels
    if data.dataset in TENSOR_SETS:
        source = _tensor_set(data.dataset, train)
        images = torch.as_tensor(source.data)
        images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
        classes = FASHION_CLASSES if data.dataset == "FashionMNIST" else tuple(source.classes)
        transform = batch_transform(images.shape[-1], size, channels)
        return ImageTensors(images, torch.as_tensor(source.targets), classes, transform)
    if data.dataset in POOLS:
        pool = POOLS[data.dataset]
        return image_files(_pool_folder(data.dataset), size, channels, pool.leave_out, nested=False)
    folder = data_dir() / "imagenet" / ("train" if train else "val")
    if not folder.is_dir():
        raise UserError(
            f"ImageNet is missing: put its images into {folder}/<class>/, with the ILSVRC2012 identifiers such as "
            f"n01440764 as classes, or set AVIT_DATA; it can't be downloaded without an account on image-net.org"
        )
    return image_files(folder, size, channels)


def folder_images(
    folder: Path, split: str, image_size: int, channels: int, classes: Sequence[str] | None = None
) -> ImageFiles:
    """The images under ``folder``/``split``, one folder a class; grey for one channel, else RGB; not decoded yet.

    Raises UserError when there are none, or when their classes are not ``classes``.
    """
    source = Path(folder) / split
    files = image_files(source, image_size, channels)
    if classes is not None and list(classes) != list(files.classes):
        differing = sorted(set(classes) ^ set(files.classes))
        raise UserError(f"{source} has other classes than the model or the training images: {', '.join(differing)}")
    return files


def image_files(
    source: Path, image_size: int, channels: int, leave_out: str | None = None, nested: bool = True
) -> ImageFiles:
    """The image files in ``source``, one folder a class, sorted by name like torchvision's ImageFolder.

    ``nested``: those in folders inside a class's folder as well (torchvision leaves them out of the Caltech sets).
    """
    try:
        names = [name for name in find_classes(source)[0] if name != leave_out]
        samples = make_dataset(source, {name: label for label, name in enumerate(names)}, IMG_EXTENSIONS)
    except (FileNotFoundError, NotADirectoryError) as error:
        reason = _first_line(error).split(". ")[0]  # "Found no valid file for the classes ..."
        raise UserError(
            f"{source} holds no images in one folder a class ({reason}); see `python -m avit_lib fit --help`"
        ) from None
    files = [(Path(path).relative_to(source).as_posix(), label) for path, label in samples]
    if not nested:
        files = [(name, label) for name, label in files if name.count("/") == 1]
    paths, labels = zip(*files, strict=True)
    transform = batch_transform(decoded_size(image_size), image_size, channels)
    return ImageFiles(
        Path(source), np.array(paths), torch.tensor(labels), tuple(names), image_size, channels, transform
    )


def _tensor_set(name: str, train: bool) -> torchvision_sets.VisionDataset:
    try:
        return getattr(torchvision_sets, name)(data_dir(), train=train, download=True)
    except DOWNLOAD_ERRORS as error:
        mend = "put its files there (data/README.md says which)"
        if name == "FashionMNIST":
            mend = "remove that folder and bring it back with `git checkout -- data`"
        raise UserError(
            f"{name} under {data_dir() / TENSOR_SETS[name]} is missing or damaged and could not be downloaded "
            f"({_first_line(error)}); {mend}, or set AVIT_DATA"
        ) from error


def _pool_folder(name: str) -> Path:
    """The folder of a pool, downloaded if it is not there."""
    folder = data_dir() / POOLS[name].folder
    if not folder.is_dir():
        try:
            getattr(torchvision_sets, name)(data_dir(), download=True)
        except DOWNLOAD_ERRORS as error:
            raise UserError(
                f"{name} is missing and could not be downloaded ({_first_line(error)}); "
                f"unpack its archive so that there is {folder}/<class>/*.jpg, or set AVIT_DATA"
            ) from error
    return folder


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
