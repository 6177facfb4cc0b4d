"""Data sets and how their images are told apart into training, validation and test."""

import hashlib
import json
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.error import URLError

import numpy as np
import torch
import torchvision
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import VisionDataset
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

from avit_lib import distributed
from avit_lib.config import Profile, StudyError, data_dir
from avit_lib.images import (
    ImageFiles,
    Images,
    ImageTensors,
    batch_transform,
    decoded_size,
    load,
    read_image,
    to_pixels,
    worker_count,
)

__all__ = [
    "ImageFiles", "ImageTensors", "Images", "TrainingData", "check_split", "folder_data", "folder_training_data",
    "loader", "pick_per_class", "read_image", "split_pool", "test_data", "test_images", "to_pixels", "training_data",
]  # fmt: skip

FASHION_CLASSES = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Boot")


@dataclass(frozen=True)
class Pool:
    """A data set without an official test set: one folder a class, from which all three parts are drawn."""

    folder: str  # under data_dir(), in torchvision's layout
    leave_out: str  # a folder of images of nothing in particular
    download: type[VisionDataset]


POOLS = {
    "Caltech101": Pool("caltech101/101_ObjectCategories", "BACKGROUND_Google", torchvision.datasets.Caltech101),
    "Caltech256": Pool("caltech256/256_ObjectCategories", "257.clutter", torchvision.datasets.Caltech256),
}
TENSOR_SETS = {
    "FashionMNIST": ("FashionMNIST/raw", torchvision.datasets.FashionMNIST),
    "CIFAR10": ("cifar-10-batches-py", torchvision.datasets.CIFAR10),
    "CIFAR100": ("cifar-100-python", torchvision.datasets.CIFAR100),
}  # with official training and test images, small enough to be one array
DOWNLOAD_ERRORS = (
    OSError, URLError, RuntimeError, ValueError, AssertionError, EOFError, ImportError, KeyError,
    pickle.UnpicklingError,
)  # fmt: skip


@dataclass(frozen=True)
class TrainingData:
    """Training and validation images and how they were told apart."""

    train: Images
    validation: Images
    split: dict  # data set, seed, sizes, what tells the images apart, its checksum; ready for JSON
    augmentation: str = "none"  # of the training images


def pick_per_class(labels: Tensor, per_class: int, generator: torch.Generator) -> Tensor:
    """Indices of ``per_class`` random examples of each class in ``labels`` [n], sorted."""
    order = torch.randperm(len(labels), generator=generator)
    picked = [order[labels[order] == label][:per_class] for label in labels.unique()]
    if min(len(indices) for indices in picked) < per_class:
        raise StudyError(f"a class has fewer than the {per_class} images asked for; lower the number per class")
    return torch.cat(picked).sort().values


def split_pool(pool: Images, profile: Profile, seed: int) -> dict[str, Tensor]:
    """Indices of the "train", "validation" and "test" images of a pool, drawn from each class by seed, each sorted.

    A class gives ``train_per_class`` images to training, of the rest ``validation_per_class`` to validation, and up to
    ``test_per_class`` of what is then left to the test. In a class too small for that, training still gets its number
    as long as two images are left, and validation at most half of what is left: so every class is in every part.
    With the 30 and 5 of Caltech-101, classes of 40 images or more are complete; the smallest, of 31, gives 29, 1 and 1.
    Raises StudyError for a class of fewer than three images.
    """
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
    parts = {"train": [], "validation": [], "test": []}
    for label, name in enumerate(pool.classes):
        members = order[pool.labels[order] == label]
        if len(members) < 3:
            raise StudyError(f"class {name} of {profile.dataset} has fewer than 3 images; bring it back or remove it")
        most = len(members) - 2
        train = most if profile.train_per_class is None else min(profile.train_per_class, most)
        validation = min(profile.validation_per_class, (len(members) - train) // 2)
        rest = members[train + validation :]
        parts["train"].append(members[:train])
        parts["validation"].append(members[train : train + validation])
        parts["test"].append(rest[: profile.test_per_class])
    return {role: torch.cat(indices).sort().values for role, indices in parts.items()}


def training_data(profile: Profile, seed: int) -> TrainingData:
    """Training and validation images of a profile, drawn by seed: from the official training set, or from a pool."""
    official = _official(profile, train=True)
    if profile.dataset in POOLS:
        chosen = split_pool(official, profile, seed)
    else:
        generator = torch.Generator().manual_seed(seed)
        held_out = pick_per_class(official.labels, profile.validation_per_class, generator)
        kept = _others(len(official), held_out)
        if profile.train_per_class is not None:
            kept = kept[pick_per_class(official.labels[kept], profile.train_per_class, generator)]
        chosen = {"train": kept, "validation": held_out}
    parts = {role: official.select(indices) for role, indices in chosen.items()}
    if isinstance(official, ImageTensors):
        split = _describe_indices(profile.dataset, seed, parts, chosen["validation"])
    else:
        complete = profile.dataset not in POOLS and profile.train_per_class is None
        split = _describe_files(profile.dataset, seed, parts, unlisted=("train",) if complete else ())
    return _loaded(parts, split, profile.image_size, profile.channels, profile.augmentation)


def test_data(profile: Profile, seed: int = 0) -> Images:
    """The test images of a profile, for the final evaluation only; decoded once, here, if memory allows.

    The official ones, whatever the seed; or, from a pool, those of the split that ``training_data`` draws by ``seed``.
    """
    return load(test_images(profile, seed), "test")


def test_images(profile: Profile, seed: int = 0) -> Images:
    """The images of ``test_data``, but image files are decoded when they are asked for: to look at a few."""
    official = _official(profile, train=False)
    if profile.dataset in POOLS:
        return official.select(split_pool(official, profile, seed)["test"])
    if profile.test_per_class is None:
        return official
    return official.select(pick_per_class(official.labels, profile.test_per_class, torch.Generator().manual_seed(0)))


def check_split(recorded: dict, split: dict) -> None:
    """Raise StudyError unless ``split`` (see ``TrainingData``) is of the same images as the ``recorded`` one."""
    if recorded.get("sha256") != split["sha256"]:
        raise StudyError(
            f"the images of {split['dataset']} drawn by seed {split['seed']} are not those on record"
            f"{_changed(recorded, split)}; compare the files with those of the published archive"
        )


def folder_data(
    folder: Path, split: str, image_size: int, channels: int, classes: Sequence[str] | None = None
) -> Images:
    """The images under ``folder``/``split``, one folder a class, scaled and cropped to a square of ``image_size``.

    Every image is decoded once, here, if memory allows; grey for one channel, else RGB. Raises StudyError when there
    are none, when their classes are not ``classes``, or names the first of the images that cannot be read.
    """
    return load(_folder_files(folder, split, image_size, channels, classes), split)


def folder_training_data(
    folder: Path, image_size: int, channels: int, seed: int, augmentation: str = "none"
) -> TrainingData:
    """Training and validation images of a folder of one's own: its val/, or else a tenth of each class of train/."""
    train = _folder_files(folder, "train", image_size, channels)
    if (Path(folder) / "val").is_dir():
        parts = {"train": train, "validation": _folder_files(folder, "val", image_size, channels, train.classes)}
    else:
        generator = torch.Generator().manual_seed(seed)
        smallest = int(train.labels.bincount().min())
        if smallest < 2:
            raise StudyError(
                f"a class in {Path(folder) / 'train'} has a single image, so none can be held out; add images"
            )
        held_out = pick_per_class(train.labels, max(1, smallest // 10), generator)
        parts = {"train": train.select(_others(len(train), held_out)), "validation": train.select(held_out)}
    split = _describe_files(str(folder), seed, parts, unlisted=("train",))
    return _loaded(parts, split, image_size, channels, augmentation)


def loader(data: Images, batch_size: int, shuffle_seed: int | None = None) -> DataLoader:
    """Batches of ``data`` in order, or shuffled by a seed (the last, smaller batch is then left out).

    Of a shuffled batch, each of several processes gets its share. Augmentation draws from torch's global generator.
    Image files are decoded by worker processes, whose generators are seeded from the loader's: there the draws depend
    on ``shuffle_seed`` and the number of workers.
    """
    shuffle = shuffle_seed is not None
    generator = torch.Generator().manual_seed(shuffle_seed) if shuffle else None
    drop_last = shuffle and len(data) > batch_size
    workers = worker_count() if isinstance(data, ImageFiles) else 0
    if shuffle and distributed.count() > 1:
        data = distributed.Share(data, distributed.rank(), distributed.count())
    return DataLoader(
        data, batch_size, shuffle=shuffle, generator=generator, drop_last=drop_last, collate_fn=_as_it_is,
        num_workers=workers,
    )  # fmt: skip


def _official(profile: Profile, train: bool) -> Images:
    """All training or test images of a data set, or the whole pool, as they are evaluated; files are not decoded."""
    size, channels = profile.image_size, profile.channels
    if profile.dataset in TENSOR_SETS:
        source = _tensor_set(profile.dataset, train)
        images = torch.as_tensor(source.data)
        images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
        classes = FASHION_CLASSES if profile.dataset == "FashionMNIST" else tuple(source.classes)
        transform = batch_transform(images.shape[-1], size, channels)
        return ImageTensors(images, torch.as_tensor(source.targets), classes, transform)
    if profile.dataset in POOLS:
        pool = POOLS[profile.dataset]
        return _image_files(_pool_folder(profile.dataset), size, channels, pool.leave_out, nested=False)
    if profile.dataset == "ImageNet":
        folder = data_dir() / "imagenet" / ("train" if train else "val")
        if not folder.is_dir():
            raise StudyError(
                f"ImageNet is missing: put its images into {folder}/<class>/, with the ILSVRC2012 identifiers such as "
                f"n01440764 as classes, or set AVIT_DATA; it can't be downloaded without an account on image-net.org"
            )
        return _image_files(folder, size, channels)
    known = ", ".join([*TENSOR_SETS, *POOLS, "ImageNet"])
    raise StudyError(f"unknown data set {profile.dataset!r}; choose from {known}, or name a folder with --data-dir")


def _tensor_set(name: str, train: bool) -> VisionDataset:
    folder, source = TENSOR_SETS[name]
    try:
        return source(data_dir(), train=train, download=True)
    except DOWNLOAD_ERRORS as error:
        where = data_dir() / folder
        mend = "put its files there (data/README.md says which)"
        if name == "FashionMNIST":
            mend = "remove that folder and bring it back with `git checkout -- data`"
        raise StudyError(
            f"{name} under {where} is missing or damaged and could not be downloaded ({_first_line(error)}); "
            f"{mend}, or set AVIT_DATA"
        ) from error


def _pool_folder(name: str) -> Path:
    """The folder of a pool, downloaded if it is not there."""
    pool = POOLS[name]
    folder = data_dir() / pool.folder
    if not folder.is_dir():
        try:
            pool.download(data_dir(), download=True)
        except DOWNLOAD_ERRORS as error:
            raise StudyError(
                f"{name} is missing and could not be downloaded ({_first_line(error)}); "
                f"unpack its archive so that there is {folder}/<class>/*.jpg, or set AVIT_DATA"
            ) from error
    return folder


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _folder_files(
    folder: Path, split: str, image_size: int, channels: int, classes: Sequence[str] | None = None
) -> ImageFiles:
    """The image files of ``folder_data``, not decoded yet."""
    source = Path(folder) / split
    files = _image_files(source, image_size, channels)
    if classes is not None and list(classes) != list(files.classes):
        differing = sorted(set(classes) ^ set(files.classes))
        raise StudyError(f"{source} has other classes than the model or the training images: {', '.join(differing)}")
    return files


def _image_files(
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
        raise StudyError(
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


def _loaded(parts: dict[str, Images], split: dict, image_size: int, channels: int, augmentation: str) -> TrainingData:
    """Decode the training and validation images, and augment the former."""
    train = parts["train"]
    size = train.images.shape[-1] if isinstance(train, ImageTensors) else decoded_size(image_size)
    train = replace(train, transform=batch_transform(size, image_size, channels, augmentation))
    return TrainingData(load(train, "training"), load(parts["validation"], "validation"), split, augmentation)


def _as_it_is(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """A batch that ``__getitems__`` has made already."""
    return batch


def _others(total: int, held_out: Tensor) -> Tensor:
    """The indices below ``total`` that are not ``held_out``."""
    rest = torch.ones(total, dtype=torch.bool)
    rest[held_out] = False
    return rest.nonzero()[:, 0]


def _sizes(parts: dict[str, Images]) -> dict[str, int]:
    return {f"{role}_images": len(data) for role, data in parts.items()}


def _describe_indices(dataset: str, seed: int, parts: dict[str, Images], held_out: Tensor) -> dict:
    """The split of images without names; ``held_out`` are the validation images' indices in the official set."""
    indices = held_out.tolist()
    content = str(indices).encode() + parts["validation"].labels.numpy().tobytes()
    return {
        "dataset": dataset,
        "seed": seed,
        **_sizes(parts),
        "sha256": hashlib.sha256(content).hexdigest(),
        "validation_indices": indices,
    }


def _describe_files(dataset: str, seed: int, parts: dict[str, ImageFiles], unlisted: Sequence[str] = ()) -> dict:
    """The split as file names by role; the checksum is of all, also of roles ``unlisted`` because they are the rest."""
    files = {role: data.names.tolist() for role, data in parts.items()}
    return {
        "dataset": dataset,
        "seed": seed,
        **_sizes(parts),
        "sha256": hashlib.sha256(json.dumps(files).encode()).hexdigest(),
        "files": {role: names for role, names in files.items() if role not in unlisted},
    }


def _changed(recorded: dict, split: dict) -> str:
    """Of how many files two splits differ, and the first of them."""
    before, after = ({(role, name) for role, names in found.get("files", {}).items() for name in names}
                     for found in (recorded, split))  # fmt: skip
    differing = sorted(before ^ after)
    if not differing:
        return ""
    role, name = differing[0]
    return f" ({len(differing)} entries differ, the first: {role} {name})"
