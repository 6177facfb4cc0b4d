"""Where images come from: torchvision's data sets, found or downloaded, ImageNet, and folders of one's own."""

from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torchvision.datasets as torchvision_sets
from msgspec import Meta, Struct

from avit_lib.data.files import find_images, name_some, tell
from avit_lib.data.images import ImageFiles, Images, batch_transform, decoded_size
from avit_lib.errors import UserError
from avit_lib.places import data_dir

FASHION_CLASSES = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Boot")
# Data sets with official training and test images, small enough to be one array, and their folders under data_dir().
TENSOR_SETS = {"FashionMNIST": "FashionMNIST/raw", "CIFAR10": "cifar-10-batches-py", "CIFAR100": "cifar-100-python"}
# Data sets without an official test set, from which all three parts are drawn: their folder under data_dir(), in it one
# a class, and the one of these that holds images of nothing in particular.
POOLS = {
    "Caltech101": ("caltech101/101_ObjectCategories", "BACKGROUND_Google"),
    "Caltech256": ("caltech256/256_ObjectCategories", "257.clutter"),
}
CLASSES = {"Caltech101": 101, "Caltech256": 256}
DOWNLOAD_ERRORS = (OSError, RuntimeError, ValueError, AssertionError, EOFError, ImportError, KeyError, UnpicklingError)

Count, Share = Annotated[int, Meta(ge=1)], Annotated[float, Meta(gt=0, lt=1)]


class Data(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which images, and how many of each class go where, or which share: the section ``data`` of a profile."""

    dataset: Literal["FashionMNIST", "CIFAR10", "CIFAR100", "Caltech101", "Caltech256", "ImageNet"]
    image_size: Count  # pixels
    validation_per_class: Count | Share  # a share only of a pool
    classes: tuple[str, ...] = ()  # of a pool, those that take part, by the names of their folders; none named: all
    train_per_class: Count | Share | Literal["all"] = "all"
    test_per_class: Count | Literal["all"] = "all"  # at most
    augmentation: Literal["none", "standard"] = "none"  # of training images; "standard": random crops and mirroring

    def __post_init__(self):
        shares = [n for n in (self.train_per_class, self.validation_per_class) if isinstance(n, float)]
        if shares and self.dataset not in POOLS:
            raise ValueError(f"{shares[0]} images of each class: a share is only for {' and '.join(POOLS)}")
        if self.classes and self.dataset not in POOLS:
            raise ValueError(f"classes of {self.dataset}: they can be chosen of {' and '.join(POOLS)} only")

    @property
    def channels(self) -> int:
        """1 for grey images, 3 for colour."""
        return 1 if self.dataset == "FashionMNIST" else 3


def official_images(data: Data, train: bool) -> Images:
    """All training or test images of a data set, or the whole pool, as they are evaluated; files are not decoded.

    Downloads what is missing, if it can; raises UserError, with the folder it belongs into, if not.
    """
    name, size, channels = data.dataset, data.image_size, data.channels
    if name in TENSOR_SETS:
        mend = "put its files there (data/README.md says which)"
        if name == "FashionMNIST":
            mend = "remove that folder and bring it back with `git checkout -- data`"
        source = _downloaded(name, data_dir() / TENSOR_SETS[name], mend, train=train)
        images = torch.as_tensor(source.data)
        images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
        classes = FASHION_CLASSES if name == "FashionMNIST" else tuple(source.classes)
        transform = batch_transform(images.shape[-1], size, channels)
        return Images(images, torch.as_tensor(source.targets), classes, transform)
    if name in POOLS:
        folder, *leave_out = data_dir() / POOLS[name][0], POOLS[name][1]
        if not folder.is_dir():
            _downloaded(name, folder, f"unpack its archive so that there is {folder}/<class>/*.jpg")
        return folder_images(folder, size, channels, leave_out=_left_out(data, folder, leave_out))
    folder = data_dir() / "imagenet" / ("train" if train else "val")
    if not folder.is_dir():
        raise UserError(
            f"ImageNet is missing: put its images into {folder}/<class>/, with the ILSVRC2012 identifiers such as "
            f"n01440764 as classes, or set AVIT_DATA; it can't be downloaded without an account on image-net.org"
        )
    return folder_images(folder, size, channels)


def _left_out(data: Data, folder: Path, leave_out: Sequence[str]) -> list[str]:
    """The folders of a pool that are not of this study; raises UserError when one that is lacks."""
    there = {path.name for path in folder.iterdir() if path.is_dir()} - set(leave_out)
    missing = sorted(set(data.classes) - there)
    if missing or (not data.classes and len(there) < CLASSES[data.dataset]):
        what = name_some(missing) if missing else f"{CLASSES[data.dataset] - len(there)} of its classes"
        raise UserError(
            f"{data.dataset} under {folder} is not whole: it lacks {what}; bring them back (`git checkout -- data`), "
            f"or set AVIT_DATA to a folder into which all of it can be downloaded"
        )
    return [*leave_out, *sorted(there - set(data.classes))] if data.classes else list(leave_out)


def folder_images(
    source: Path,
    image_size: int,
    channels: int,
    classes: Sequence[str] = (),
    leave_out: Sequence[str] = (),
) -> Images:
    """The image files in ``source``, one folder a class, sorted by name; grey for one channel, else RGB; not decoded.

    ``classes``: those to which the images have to belong; one without images is told on stderr.
    ``leave_out``: classes that a pool has too many; images in folders inside a class's are then left
    out as well, as torchvision does it. Raises UserError when there are no images, none in a folder,
    or some of other classes.
    """

    def in_a_class(name: str) -> bool:
        return name.count("/") == 1 or ("/" in name and not leave_out)

    files, folders = find_images(source, in_a_class, leave_out)
    found = sorted({_class_of(name) for name in files})
    empty = sorted({_class_of(name) for name in folders if name} - set(found))
    if not files or (empty and not classes):
        reason = f"none in {name_some(empty)}" if empty else "none at all"
        raise UserError(
            f"{source} holds no images in one folder a class ({reason}); see `python -m avit_lib fit --help`"
        )
    if classes and not set(found) <= set(classes):
        differing = name_some(sorted(set(classes) ^ set(found)))
        raise UserError(
            f"{source} has other classes than the model or the training images: {differing}; "
            f"rename or remove their folders"
        )
    classes = tuple(classes) or tuple(found)
    missing = sorted(set(classes) - set(found))
    if missing:
        tell(f"{source} holds no images of {name_some(missing)}")
    number_of = {name: number for number, name in enumerate(classes)}
    labels = torch.tensor([number_of[_class_of(name)] for name in files])
    images = ImageFiles(source, np.array(files), image_size, channels)
    transform = batch_transform(decoded_size(image_size), image_size, channels)
    return Images(images, labels, classes, transform)


def _class_of(name: str) -> str:
    """The folder at the front of the ``name`` of a file or folder."""
    return name.partition("/")[0]


def _downloaded(name: str, place: Path, mend: str, **options: Any) -> torchvision_sets.VisionDataset:
    """A data set of torchvision's, downloaded if it is missing; raises UserError saying how to ``mend`` its files."""
    try:
        return getattr(torchvision_sets, name)(data_dir(), download=True, **options)
    except DOWNLOAD_ERRORS as error:
        raise UserError(
            f"{name} under {place} is missing or damaged and could not be downloaded ({_first_line(error)}); {mend}, "
            f"or set AVIT_DATA"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
