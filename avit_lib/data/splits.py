"""Which images train, validate and test: drawn by seed, and put on record."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from avit_lib.data.datasets import POOLS, Data, folder_images, official_images
from avit_lib.data.images import Images, batch_transform, load
from avit_lib.errors import UserError


@dataclass(frozen=True)
class TrainingData:
    """Training and validation images and how they were told apart.

    ``split`` is ready for JSON: data set, seed, sizes, what tells the images apart (names) and its
    checksum ("sha256"), and the checksum of what each part holds ("content").
    """

    train: Images
    validation: Images
    split: dict
    image_size: int  # pixels, as models see them
    augmentation: str = "none"  # of the training images


def pick_per_class(labels: Tensor, per_class: int, generator: torch.Generator) -> Tensor:
    """Indices of ``per_class`` random examples of each class in ``labels`` [n], sorted."""
    order = torch.randperm(len(labels), generator=generator)
    picked = [order[labels[order] == label][:per_class] for label in labels.unique()]
    if min(map(len, picked)) < per_class:
        raise UserError(
            f"a class has fewer than the {per_class} images asked for; lower the number per class"
        )
    return torch.cat(picked).sort().values


def hold_out(labels: Tensor, per_class: int, seed: int) -> dict[str, Tensor]:
    """Indices for "validation", ``per_class`` random ones of each class, and of the rest: "train"."""
    chosen = pick_per_class(labels, per_class, torch.Generator().manual_seed(seed))
    others = torch.ones(len(labels), dtype=torch.bool).index_fill(0, chosen, False)
    return {"train": others.nonzero()[:, 0], "validation": chosen}


def split_pool(pool: Images, data: Data, seed: int) -> dict[str, Tensor]:
    """Indices of the "train", "validation" and "test" images of a pool, each sorted.

    Drawn by seed from each class: ``train_per_class`` images for training, of the rest
    ``validation_per_class`` for validation, and up to ``test_per_class`` of what is then left for
    the test. In a class too small for that, training still gets its number as long as two images
    are left, and validation at most half of what is left: so every class is in every part. With the
    30 and 5 of Caltech-101, classes of 40 images or more are complete; the smallest, of 31, gives
    29, 1 and 1. Raises UserError for a class of fewer than three images.
    """
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
    parts = {"train": [], "validation": [], "test": []}
    for label, name in enumerate(pool.classes):
        members = order[pool.labels[order] == label]
        most = len(members) - 2
        if most < 1:
            raise UserError(
                f"class {name} of {data.dataset} has fewer than 3 images; bring it back or remove it"
            )
        train = most if data.train_per_class == "all" else min(data.train_per_class, most)
        validation = min(data.validation_per_class, (len(members) - train) // 2)
        rest = members[train + validation :]
        parts["train"].append(members[:train])
        parts["validation"].append(members[train : train + validation])
        parts["test"].append(rest if data.test_per_class == "all" else rest[: data.test_per_class])
    return {role: torch.cat(indices).sort().values for role, indices in parts.items()}


def training_data(data: Data, seed: int) -> TrainingData:
    """Training and validation images, drawn by seed: of the official training set, or of a pool."""
    official = official_images(data, train=True)
    if data.dataset in POOLS:
        chosen = split_pool(official, data, seed)
    else:
        chosen = hold_out(official.labels, data.validation_per_class, seed)
    parts = {role: official.select(indices) for role, indices in chosen.items()}
    return _load_training(data.dataset, seed, parts, data)


def test_data(data: Data, seed: int = 0, decode: bool = True) -> Images:
    """The test images, for the final evaluation only: official, or of a pool's split by ``seed``.

    Decoded once, here, if memory allows; with ``decode`` False when they are asked for.
    """
    images = official_images(data, train=False)
    if data.dataset in POOLS:
        images = images.select(split_pool(images, data, seed)["test"])
    return load({"test": images})[0]["test"] if decode else images


def folder_test_data(
    folder: Path, size: int, classes: Sequence[str], decode: bool = True
) -> Images:
    """The images of ``folder``/test, like ``test_data``; UserError if they are of other classes."""
    images = folder_images(folder / "test", size, classes)
    return load({"test": images})[0]["test"] if decode else images


def folder_training_data(folder: Path, data: Data, seed: int) -> TrainingData:
    """Training and validation images of a folder of one's own: its train/ and val/.

    Without val/, of every class of train/ equally many are held out, a tenth of the smallest. Of
    ``data`` the image size and the augmentation count.
    """
    train = folder_images(folder / "train", data.image_size)
    if (folder / "val").is_dir():
        held_out = folder_images(folder / "val", data.image_size, train.classes)
        parts = {"train": train, "validation": held_out}
    else:
        smallest = int(train.labels.bincount().min())
        if smallest < 2:
            raise UserError(
                f"a class in {folder / 'train'} has a single image, so none can be held out; add images"
            )
        chosen = hold_out(train.labels, max(1, smallest // 10), seed)
        parts = {role: train.select(indices) for role, indices in chosen.items()}
    return _load_training(str(folder), seed, parts, data)


def _load_training(dataset: str, seed: int, parts: dict[str, Images], data: Data) -> TrainingData:
    """Decode the training and validation images, augment the former, and describe the split.

    The checksum is of all names, also of training images that are not listed because they are the
    rest.
    """
    loaded, content = load(parts, apart="test")
    transform = batch_transform(data.image_size, data.augmentation)
    files = {role: part.images.names.tolist() for role, part in parts.items()}
    split = {
        "dataset": dataset,
        "seed": seed,
        **{f"{role}_images": len(names) for role, names in files.items()},
        "sha256": hashlib.sha256(json.dumps(files).encode()).hexdigest(),
        "content": content,
        "files": {k: names for k, names in files.items() if k != "train" or "test" in files},
    }
    train = replace(loaded["train"], transform=transform)
    return TrainingData(train, loaded["validation"], split, data.image_size, data.augmentation)


def check_split(recorded: dict, split: dict) -> str:
    """By what ``split`` (see ``TrainingData``) is the ``recorded`` one: "content", or "names".

    The latter where the record has no more. Raises UserError when they are not of the same images.
    """
    content = recorded.get("content", {})
    changed = {
        f"the content of {role}" for role in content if content[role] != split["content"][role]
    }
    if recorded["sha256"] == split["sha256"] and not changed:
        return "content" if content else "names"
    before, now = (
        {name for names in part["files"].values() for name in names} for part in (recorded, split)
    )
    example = min(before ^ now or changed, default="the names for training")
    raise UserError(
        f"the images of {split['dataset']} drawn by seed {split['seed']} are not those on record "
        f"(such as {example}); compare the files with those of the published archive"
    )
