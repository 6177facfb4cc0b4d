"""Which images train, validate and test: drawn by seed, and put on record."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from avit_lib.data.datasets import POOLS, Data, folder_images, official_images
from avit_lib.data.files import tell
from avit_lib.data.images import Images, batch_transform, load
from avit_lib.errors import UserError, name_some

ROLES = ("train", "validation", "test")


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
    digests: Sequence[str] = ()  # SHA-256 of the files of both


def pick_per_class(labels: Tensor, per_class: int, generator: torch.Generator) -> Tensor:
    """Indices of ``per_class`` random examples of each class in ``labels`` [n], sorted.

    Of a class with fewer all are taken.
    """
    order = torch.randperm(len(labels), generator=generator)
    picked = [order[labels[order] == label][:per_class] for label in labels.unique()]
    return torch.cat(picked).sort().values


def draw(images: Images, seed: int, plan: Callable[[int], dict[str, int]]) -> dict[str, Images]:
    """Random images for each of ``ROLES``, in their order; of each class as many as ``plan`` says.

    ``plan``: from the size of a class to how many each role gets, in the order in which they are
    drawn. Raises UserError for a class too small for that.
    """
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    chosen: dict[str, list[Tensor]] = {}
    for label, name in enumerate(images.classes):
        members = order[images.labels[order] == label]
        sizes = plan(len(members))
        if min(sizes.values()) < 1:
            raise UserError(
                f"class {name} has too few images ({len(members)}) for {', '.join(sizes)}; add "
                f"images, or remove its folder"
            )
        for role, size in sizes.items():
            chosen.setdefault(role, []).append(members[:size])
            members = members[size:]
    return {r: images.select(torch.cat(chosen[r]).sort().values) for r in ROLES if r in chosen}


def plan_pool(data: Data, count: int) -> dict[str, int]:
    """How many of ``count`` images of a class in a pool are for training, validation and test.

    In a class too small for what ``data`` asks, training still gets its number as long as two
    images are left, and validation at most half of what is left: so every class is in every part.
    With the 30 and 5 of Caltech-101, classes of 40 images or more are complete; the smallest, of
    31, gives 29, 1 and 1.
    """
    wanted = data.train_per_class, data.test_per_class
    train, test = (count if number == "all" else number for number in wanted)
    train = min(train, count - 2)
    validation = min(data.validation_per_class, (count - train) // 2)
    return {"train": train, "validation": validation, "test": min(test, count - train - validation)}


def hold_out(per_class: int, count: int) -> dict[str, int]:
    """Of the ``count`` images of a class ``per_class`` for validation, all others for training."""
    return {"validation": per_class, "train": count - per_class}


def training_data(data: Data, seed: int) -> TrainingData:
    """Training and validation images, drawn by seed: of the official training set, or of a pool."""
    pool = data.dataset in POOLS
    plan = partial(plan_pool, data) if pool else partial(hold_out, data.validation_per_class)
    parts = draw(official_images(data, train=True), seed, plan)
    return _load_training(data.dataset, seed, parts, data)


def test_data(data: Data, seed: int = 0) -> Images:
    """The test images, for the final evaluation only: official, or of a pool's split by ``seed``.

    Decoded once, here, if memory allows.
    """
    images = official_images(data, train=False)
    if data.dataset in POOLS:
        images = draw(images, seed, partial(plan_pool, data))["test"]
    return load({"test": images})[0]["test"]


def folder_test_data(
    folder: Path, size: int, classes: Sequence[str], trained_on: TrainingData | None = None
) -> Images:
    """The images of ``folder``/test, like ``test_data``; UserError if they are of other classes.

    Those that ``trained_on`` has as well are told on stderr.
    """
    parts = {"test": folder_images(folder / "test", size, classes)}
    loaded, digests = load(parts)
    tell_repeated(parts, digests, trained_on.digests if trained_on else ())
    return loaded["test"]


def tell_repeated(
    parts: dict[str, Images], digests: dict[str, list[str]], known: Sequence[str] = ()
) -> None:
    """Tell on stderr which files are in a part before, too, or in two classes.

    ``digests`` has the SHA-256 of each file of ``parts``; ``known`` are those of further images.
    """
    before = Counter(known)
    for role, images in parts.items():
        own, files = digests[role], images.images
        labelled = {*zip(own, images.labels.tolist(), strict=True)}
        copies = before + Counter(digest for digest, _ in labelled)
        before.update(own)
        pairs = zip(files.names.tolist(), own, strict=True)
        found = [name for name, digest in pairs if copies[digest] > 1]
        if found:
            tell(
                f"{len(found)} {role} images in {files.root} have a copy in another part or class: "
                f"{name_some(found)}; remove one of both"
            )


def folder_training_data(folder: Path, data: Data, seed: int) -> TrainingData:
    """Training and validation images of a folder of one's own: its train/ and val/.

    Without val/, of every class of train/ equally many are held out, a tenth of the smallest; what
    is called alike is told on stderr. Of ``data`` the image size and the augmentation count.
    """
    train, val = folder_images(folder / "train", data.image_size), folder / "val"
    if os.path.lexists(val):
        parts = {"train": train, "validation": folder_images(val, data.image_size, train.classes)}
    else:
        for name in sorted(os.listdir(folder)):
            if name.lower() not in ("val", "valid", "validation", "dev"):
                continue
            tell(f"{folder / name} is not used, and a part of train held out: call it val")
        tenth = int(train.labels.bincount().min()) // 10
        parts = draw(train, seed, partial(hold_out, max(1, tenth)))
    return _load_training(str(folder), seed, parts, data)


def _load_training(dataset: str, seed: int, parts: dict[str, Images], data: Data) -> TrainingData:
    """Decode the training and validation images, augment the former, and describe the split.

    The checksum is of all names, also of training images that are not listed because they are the
    rest.
    """
    loaded, digests = load(parts, apart="test")
    tell_repeated(parts, digests)
    transform = batch_transform(data.image_size, data.augmentation)
    train = replace(loaded["train"], transform=transform)
    files = {role: part.images.names.tolist() for role, part in parts.items()}
    split = {
        "dataset": dataset,
        "seed": seed,
        **{f"{role}_images": len(names) for role, names in files.items()},
        "sha256": hashlib.sha256(json.dumps(files).encode()).hexdigest(),
        "content": {
            role: hashlib.sha256(bytes.fromhex("".join(those))).hexdigest()
            for role, those in digests.items()
        },
        "files": {k: names for k, names in files.items() if k != "train" or "test" in files},
    }
    facts = split, data.image_size, data.augmentation, digests["train"] + digests["validation"]
    return TrainingData(train, loaded["validation"], *facts)
