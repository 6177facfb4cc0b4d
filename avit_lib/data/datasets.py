"""Where images come from: torchvision's data sets, ImageNet, and folders of one's own."""

import re
import tempfile
import unicodedata
from collections.abc import Collection, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torchvision.datasets as torchvision_sets
from msgspec import Meta, Struct

from avit_lib.data.files import find_images, tell
from avit_lib.data.images import ImageFiles, Images, batch_transform
from avit_lib.errors import UserError, name_some
from avit_lib.places import check_embedded, data_dir, list_embedded, project_root

# Data sets without an official test set, from which all three parts are drawn: their folder under
# data_dir(), how many classes are in it, one a folder, and the folders that are none of them.
POOLS = {
    "Caltech101": ("caltech101/101_ObjectCategories", 101, {"BACKGROUND_Google"}),
    "Caltech256": ("caltech256/256_ObjectCategories", 256, {"257.clutter", "greg"}),
}

# How many images these classes have, as published.
PUBLISHED = {"Caltech101": 8677, "Caltech256": 29780}
IMAGENET_CLASSES = 1000

Count = Annotated[int, Meta(ge=1)]


class Data(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which images, and how many of each class go where: the section ``data`` of a profile."""

    dataset: Literal["Caltech101", "Caltech256", "ImageNet"]
    image_size: Count  # pixels
    validation_per_class: Count
    # Of a pool alone: the classes that take part, by their folders (none named: all), and how many
    # images of each; for training it must be a number.
    classes: tuple[str, ...] = ()
    train_per_class: Count | Literal["all"] = "all"
    test_per_class: Count | Literal["all"] = "all"  # at most
    # Of training images; "standard": random crops and mirroring.
    augmentation: Literal["none", "standard"] = "none"

    def __post_init__(self):
        whole = not self.classes and self.train_per_class == self.test_per_class == "all"
        if self.dataset not in POOLS and not whole:
            raise ValueError(
                f"of {self.dataset} all classes and images take part; leave out what chooses some"
            )
        if self.dataset in POOLS and self.train_per_class == "all":
            raise ValueError(
                f"train_per_class must be a number: {self.dataset} has no test images but those "
                f"that training leaves"
            )


def official_images(data: Data, train: bool) -> Images:
    """All training or test images of a data set, or the whole pool; files are not decoded.

    Downloads what is missing, if it can; raises UserError, with the folder it belongs into, if not.
    """
    if data.dataset in POOLS:
        return _pool_images(data)
    trained = data_dir() / "imagenet" / "train"
    folder = trained if train else trained.with_name("val")
    if not folder.is_dir():
        raise UserError(
            f"ImageNet is missing: put its images into {folder}/<class>/, with the ILSVRC2012 "
            f"identifiers such as n01440764 as classes, or set AVIT_DATA; it can't be downloaded "
            f"without an account on image-net.org"
        )
    # Labels are those of training, also where val/ lacks a class.
    known = trained.iterdir() if trained.is_dir() and not train else ()
    classes = sorted(path.name for path in known if is_identifier(path.name))
    images = imagenet_images(folder, data.image_size, classes)
    if not are_imagenets(images.classes):
        raise UserError(
            f"{trained.parent} has {len(images.classes)} classes, and ImageNet has "
            f"{IMAGENET_CLASSES}: unpack the others, or take a part of it as a folder of your own "
            f"(--data-dir)"
        )
    return images


def is_identifier(name: str) -> bool:
    """Whether a folder is called like a class of ILSVRC2012, such as n01440764."""
    return bool(re.fullmatch(r"n\d{8}", name))


def are_imagenets(classes: Sequence[str]) -> bool:
    """Whether these are the classes of ImageNet-1k, in the order of its models."""
    known = all(map(is_identifier, classes)) and [*classes] == sorted(classes)
    return known and len(classes) == IMAGENET_CLASSES


def imagenet_images(folder: Path, image_size: int, classes: Sequence[str] = ()) -> Images:
    """``folder_images`` of ImageNet; UserError unless its folders are named by ILSVRC2012.

    The labels of its models follow the order of these identifiers, such as n01440764.
    """
    images = folder_images(folder, image_size, classes)
    others = [name for name in images.classes if not is_identifier(name)]
    if others:
        raise UserError(
            f"{folder} has other folders than ImageNet's identifiers such as n01440764: "
            f"{name_some(others)}; rename them, or labels would be wrong"
        )
    return images


def _pool_images(data: Data) -> Images:
    """The images of a pool, of the classes that take part; raises UserError when one is lacking."""
    inside, count, others = POOLS[data.dataset]
    folder = data_dir() / inside
    check_embedded(folder)
    if not folder.is_dir():
        _download(data.dataset, inside)
    there = {path.name for path in folder.iterdir() if path.is_dir()} - others
    lacking = sorted(set(data.classes) - there)
    if not data.classes and len(there) < count:
        lacking = [f"{count - len(there)} of its classes"]
    if not data.classes and len(there) > count:
        raise UserError(f"{folder} has more folders than its {count} classes; remove the others")
    if lacking:
        raise UserError(
            f"{data.dataset} under {folder} is not whole: it lacks {name_some(lacking)}; bring "
            f"them back (`git checkout -- data`), or set AVIT_DATA to a folder into which all of "
            f"it can be downloaded"
        )
    unused = there - set(data.classes or there)
    images = folder_images(folder, data.image_size, leave_out=others | unused)
    whole = project_root() / "data" / inside
    listed = {name.removeprefix(f"{inside}/") for _, name in list_embedded(whole)}
    known = {name for name in listed if name.partition("/")[0] in data.classes}
    if known and (differing := known ^ {*images.images.names.tolist()}):
        tell(
            f"{folder} lacks or adds images of these classes ({len(differing)}): "
            f"{name_some(sorted(differing))}; its split is another one"
        )
    if not data.classes and len(images) != PUBLISHED[data.dataset]:
        tell(
            f"{folder} has {len(images)} images, and {data.dataset} as published "
            f"{PUBLISHED[data.dataset]}: its split is another one"
        )
    return images


def _download(name: str, inside: str) -> None:
    """Let torchvision download a data set; raises UserError saying how else to get it.

    It is whole or not there: what is unpacked in part looks like a smaller one.
    """
    folder = data_dir() / inside
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as place:
            getattr(torchvision_sets, name)(place, download=True)
            (Path(place) / inside).rename(folder)
    except (OSError, RuntimeError, HTTPException) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(
            f"{name} is not in {folder} and could not be downloaded ({reason}); work in a clone of "
            f"the repository, unpack its archive so that there is {folder}/<class>/*.jpg, or set "
            f"AVIT_DATA"
        ) from error


def folder_images(
    source: Path,
    image_size: int,
    classes: Sequence[str] = (),
    leave_out: Collection[str] = (),
) -> Images:
    """The image files in ``source``, one folder a class, sorted by name; not decoded.

    ``classes``: those to which the images have to belong; one without images is told on stderr.
    ``leave_out``: folders that are no classes. Raises UserError when there are no images, none in a
    folder, or some of other classes.
    """
    files, folders = find_images(source, 1, leave_out)
    class_names = [_name_class(name) for name in files]
    named = tuple(classes or sorted({_name_class(name) for name in folders if name}))
    number_of = {_name_class(name): number for number, name in enumerate(named)}
    missing = sorted(number_of.keys() - {*class_names})
    if not files or (missing and not classes):
        raise UserError(
            f"{source} holds no images in one folder a class (none in {name_some(missing) or 'it'})"
            f"; see `python -m avit_lib fit --help`"
        )
    if unknown := {*class_names} - number_of.keys():
        raise UserError(
            f"{source} has other classes than the model or the training images: "
            f"{name_some(sorted({*unknown, *missing}))}; rename or remove their folders"
        )
    if missing:
        tell(f"{source} holds no images of {name_some(missing)}")
    labels = torch.tensor([number_of[name] for name in class_names])
    images = ImageFiles(source, np.array(files), image_size)
    return Images(images, labels, named, batch_transform(image_size))


def _name_class(path: str) -> str:
    """The class of a path: its folder, in one form of the several that letters with accents have.

    macOS and Linux write different ones.
    """
    return unicodedata.normalize("NFC", path.split("/")[0])
