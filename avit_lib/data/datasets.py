"""Where images come from: torchvision's data sets, found or downloaded, ImageNet, and folders of
one's own.
"""

from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Annotated, Literal

import numpy as np
import torch
import torchvision.datasets as torchvision_sets
from msgspec import Meta, Struct

from avit_lib.data.files import find_images, name_some, tell
from avit_lib.data.images import ImageFiles, Images, batch_transform
from avit_lib.errors import UserError
from avit_lib.places import check_embedded, data_dir

# Data sets without an official test set, from which all three parts are drawn: their folder under
# data_dir(), in it one a class, and the one of these that holds images of nothing in particular.
POOLS = {
    "Caltech101": ("caltech101/101_ObjectCategories", "BACKGROUND_Google"),
    "Caltech256": ("caltech256/256_ObjectCategories", "257.clutter"),
}
CLASSES = {"Caltech101": 101, "Caltech256": 256}
DATASETS = (*POOLS, "ImageNet")
DOWNLOAD_ERRORS = (
    OSError,
    RuntimeError,
    ValueError,
    AssertionError,
    EOFError,
    ImportError,
    KeyError,
    UnpicklingError,
)

Count = Annotated[int, Meta(ge=1)]


class Data(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which images, and how many of each class go where: the section ``data`` of a profile."""

    dataset: str  # one of DATASETS
    image_size: Count  # pixels
    validation_per_class: Count
    # Of a pool alone: the classes that take part, by their folders (none named: all), and how many
    # images.
    classes: tuple[str, ...] = ()
    train_per_class: Count | Literal["all"] = "all"
    test_per_class: Count | Literal["all"] = "all"  # at most
    augmentation: Literal["none", "standard"] = (
        "none"  # of training images; "standard": random crops and mirroring
    )

    def __post_init__(self):
        if self.dataset not in DATASETS:
            raise ValueError(
                f"there is no data set {self.dataset!r}; choose from {', '.join(DATASETS)}"
            )
        whole = not self.classes and self.train_per_class == self.test_per_class == "all"
        if self.dataset not in POOLS and not whole:
            raise ValueError(
                f"of {self.dataset} all classes and images take part; leave out what chooses some"
            )


def official_images(data: Data, train: bool) -> Images:
    """All training or test images of a data set, or the whole pool, as they are evaluated; files
    are not decoded.

    Downloads what is missing, if it can; raises UserError, with the folder it belongs into, if not.
    """
    if data.dataset in POOLS:
        inside, nothing = POOLS[data.dataset]
        folder = data_dir() / inside
        check_embedded(folder)
        if not folder.is_dir():
            _download(data.dataset, folder)
        return folder_images(folder, data.image_size, leave_out=_left_out(data, folder, nothing))
    folder = data_dir() / "imagenet" / ("train" if train else "val")
    if not folder.is_dir():
        raise UserError(
            f"ImageNet is missing: put its images into {folder}/<class>/, with the ILSVRC2012 identifiers such as "
            f"n01440764 as classes, or set AVIT_DATA; it can't be downloaded without an account on image-net.org"
        )
    return folder_images(folder, data.image_size)


def _left_out(data: Data, folder: Path, nothing: str) -> list[str]:
    """The folders of a pool that are not of this study, ``nothing`` among them.

    Raises UserError when one that is of this study lacks.
    """
    there = {path.name for path in folder.iterdir() if path.is_dir()} - {nothing}
    missing = sorted(set(data.classes) - there)
    if missing or (not data.classes and len(there) < CLASSES[data.dataset]):
        what = (
            name_some(missing)
            if missing
            else f"{CLASSES[data.dataset] - len(there)} of its classes"
        )
        raise UserError(
            f"{data.dataset} under {folder} is not whole: it lacks {what}; bring them back (`git checkout -- data`), "
            f"or set AVIT_DATA to a folder into which all of it can be downloaded"
        )
    return [nothing, *sorted(there - set(data.classes))] if data.classes else [nothing]


def folder_images(
    source: Path,
    image_size: int,
    classes: Sequence[str] = (),
    leave_out: Sequence[str] = (),
) -> Images:
    """The image files in ``source``, one folder a class, sorted by name; not decoded.

    ``classes``: those to which the images have to belong; one without images is told on stderr.
    ``leave_out``: classes that a pool has too many; images in folders inside a class's are then
    left out as well, as torchvision does it. Raises UserError when there are no images, none in a
    folder, or some of other classes.
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
    images = ImageFiles(source, np.array(files), image_size)
    return Images(images, labels, classes, batch_transform(image_size))


def _class_of(name: str) -> str:
    """The folder at the front of the ``name`` of a file or folder."""
    return name.partition("/")[0]


def _download(name: str, folder: Path) -> None:
    """Let torchvision download a data set; raises UserError saying how else to get it."""
    try:
        getattr(torchvision_sets, name)(data_dir(), download=True)
    except DOWNLOAD_ERRORS as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{name} is not in {folder} and could not be downloaded ({reason}); work in a clone of the "
            f"repository, unpack its archive so that there is {folder}/<class>/*.jpg, or set AVIT_DATA"
        ) from error
