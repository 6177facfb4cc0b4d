"""How images are told apart into training, validation and test: drawn by seed, and put on
record.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from avit_lib.data.datasets import POOLS, Data, folder_images, official_images
from avit_lib.data.images import Images, batch_transform, digest, load
from avit_lib.errors import UserError


@dataclass(frozen=True)
class TrainingData:
    """Training and validation images and how they were told apart."""

    train: Images
    validation: Images
    # Ready for JSON: data set, seed, sizes, what tells the images apart (names) and its
    # checksum ("sha256"), and the checksum of what each part holds ("content").
    split: dict
    image_size: int  # pixels, as models see them
    augmentation: str = "none"  # of the training images


def pick_per_class(labels: Tensor, per_class: int, generator: torch.Generator) -> Tensor:
    """Indices of ``per_class`` random examples of each class in ``labels`` [n], sorted."""
    order = torch.randperm(len(labels), generator=generator)
    picked = [order[labels[order] == label][:per_class] for label in labels.unique()]
    if min(len(indices) for indices in picked) < per_class:
        raise UserError(
            f"a class has fewer than the {per_class} images asked for; lower the number per class"
        )
    return torch.cat(picked).sort().values


def hold_out(labels: Tensor, per_class: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Indices of the "validation" images, ``per_class`` random ones of each class, and of all
    others, for "train".
    """
    chosen = pick_per_class(labels, per_class, generator)
    others = torch.ones(len(labels), dtype=torch.bool).index_fill(0, chosen, False)
    return {"train": others.nonzero()[:, 0], "validation": chosen}


def split_pool(pool: Images, data: Data, seed: int) -> dict[str, Tensor]:
    """Indices of the "train", "validation" and "test" images of a pool, drawn from each class by
    seed, each sorted.

    A class gives ``train_per_class`` images to training, of the rest ``validation_per_class`` to
    validation, and up to ``test_per_class`` of what is then left to the test. In a class too small
    for that, training still gets its number as long as two images are left, and validation at most
    half of what is left: so every class is in every part. With the 30 and 5 of Caltech-101, classes
    of 40 images or more are complete; the smallest, of 31, gives 29, 1 and 1. Raises UserError for
    a class of fewer than three images.
    """
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
    parts = {"train": [], "validation": [], "test": []}
    for label, name in enumerate(pool.classes):
        members = order[pool.labels[order] == label]
        if len(members) < 3:
            raise UserError(
                f"class {name} of {data.dataset} has fewer than 3 images; bring it back or remove it"
            )
        most = len(members) - 2
        train = most if data.train_per_class == "all" else min(data.train_per_class, most)
        validation = min(data.validation_per_class, (len(members) - train) // 2)
        rest = members[train + validation :]
        parts["train"].append(members[:train])
        parts["validation"].append(members[train : train + validation])
        parts["test"].append(rest if data.test_per_class == "all" else rest[: data.test_per_class])
    return {role: torch.cat(indices).sort().values for role, indices in parts.items()}


def training_data(data: Data, seed: int) -> TrainingData:
    """Training and validation images, drawn by seed: from the official training set, or from a
    pool.
    """
    official = official_images(data, train=True)
    if data.dataset in POOLS:
        chosen = split_pool(official, data, seed)
    else:
        generator = torch.Generator().manual_seed(seed)
        chosen = hold_out(official.labels, data.validation_per_class, generator)
    parts = {role: official.select(indices) for role, indices in chosen.items()}
    split = _description(data.dataset, seed, parts, list_training=data.dataset in POOLS)
    return _loaded(parts, split, data)


def test_data(data: Data, seed: int = 0, decode: bool = True) -> Images:
    """The test images, for the final evaluation only: the official ones, or from a pool those of
    the split by ``seed``.

    Decoded once, here, if memory allows; with ``decode`` False image files are decoded when they
    are asked for.
    """
    images = official_images(data, train=False)
    if data.dataset in POOLS:
        images = images.select(split_pool(images, data, seed)["test"])
    return load(images)[0] if decode else images


def check_split(recorded: dict, split: dict) -> str:
    """By what ``split`` (see ``TrainingData``) is the same as the ``recorded`` one: "content", or
    "names" where the record has no more.

    Raises UserError when they are not of the same images.
    """
    content = recorded.get("content", {})
    found = split["content"]
    other = {f"the content of {role}" for role in content if content[role] != found.get(role)}
    if recorded.get("sha256") == split["sha256"] and not other:
        return "content" if content else "names"
    found = [
        {name for names in part.get("files", {}).values() for name in names}
        for part in (recorded, split)
    ]
    other = found[0] ^ found[1] or other
    named = f" (such as {min(other)})" if other else ""
    raise UserError(
        f"the images of {split['dataset']} drawn by seed {split['seed']} are not those on record{named}; "
        f"compare the files with those of the published archive"
    )


def folder_test_data(
    folder: Path, size: int, classes: Sequence[str], decode: bool = True
) -> Images:
    """The images of ``folder``/test, like ``test_data``; raises UserError when their classes are
    not ``classes``.
    """
    images = folder_images(folder / "test", size, classes)
    return load(images)[0] if decode else images


def folder_training_data(folder: Path, data: Data, seed: int) -> TrainingData:
    """Training and validation images of a folder of one's own: its val/, or else of every class of
    train/ equally many, a tenth of the smallest class.

    Of ``data`` the image size and the augmentation count.
    """
    train, held_out = folder_images(folder / "train", data.image_size), folder / "val"
    if held_out.is_dir():
        parts = {"train": train}
        parts["validation"] = folder_images(held_out, data.image_size, train.classes)
    else:
        smallest = int(train.labels.bincount().min())
        if smallest < 2:
            raise UserError(
                f"a class in {train.images.root} has a single image, so none can be held out; add images"
            )
        chosen = hold_out(train.labels, max(1, smallest // 10), torch.Generator().manual_seed(seed))
        parts = {role: train.select(indices) for role, indices in chosen.items()}
    split = _description(str(folder), seed, parts, list_training=False)
    return _loaded(parts, split, data)


def _loaded(parts: dict[str, Images], split: dict, data: Data) -> TrainingData:
    """Decode the training and validation images, and augment the former."""
    transform = batch_transform(data.image_size, data.augmentation)
    train = replace(parts["train"], transform=transform)
    return TrainingData(
        *load(train, parts["validation"]), split, data.image_size, data.augmentation
    )


def _description(dataset: str, seed: int, parts: dict[str, Images], list_training: bool) -> dict:
    """The split as file names by role, ready for JSON, with checksums of names and of contents.

    The former is of all names, also of training images that are not listed because they are the
    rest.
    """
    files = {role: part.images.names.tolist() for role, part in parts.items()}
    return {
        "dataset": dataset,
        "seed": seed,
        **{f"{role}_images": len(images) for role, images in parts.items()},
        "sha256": hashlib.sha256(json.dumps(files).encode()).hexdigest(),
        "content": {role: digest(images) for role, images in parts.items()},
        "files": {role: names for role, names in files.items() if list_training or role != "train"},
    }
