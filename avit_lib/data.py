"""Data sets, splits and transforms; images are decoded once and kept as bytes."""

import hashlib
from dataclasses import dataclass
from urllib.error import URLError

import torch
import torchvision
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from avit_lib.config import Profile, StudyError, data_dir

FASHION_CLASSES = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Boot")
FASHION_MEAN, FASHION_STD = 0.286, 0.353  # of the training pixels, scaled to 0..1


@dataclass(frozen=True)
class ImageTensors(Dataset):
    """Decoded images [n, C, H, W] as bytes, their labels [n] and the names of the classes.

    An item is a normalised float image [C, H, W] and its label.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    transform: v2.Transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.transform(self.images[index]), self.labels[index]

    def select(self, indices: Tensor) -> "ImageTensors":
        """The images at ``indices`` [k], in that order."""
        return ImageTensors(self.images[indices], self.labels[indices], self.classes, self.transform)


@dataclass(frozen=True)
class TrainingData:
    """Training and validation images and how they were told apart."""

    train: ImageTensors
    validation: ImageTensors
    split: dict  # seed, sizes, the indices of the validation images in the official training set, a checksum


def pick_per_class(labels: Tensor, per_class: int, generator: torch.Generator) -> Tensor:
    """Indices of ``per_class`` random examples of each class in ``labels`` [n], sorted."""
    order = torch.randperm(len(labels), generator=generator)
    picked = [order[labels[order] == label][:per_class] for label in labels.unique()]
    if min(len(indices) for indices in picked) < per_class:
        raise StudyError(f"a class has fewer than the {per_class} images asked for; lower the number per class")
    return torch.cat(picked).sort().values


def training_data(profile: Profile, seed: int) -> TrainingData:
    """Training and validation images of a profile: a stratified split of the official training set, by seed."""
    official = _official(profile, train=True)
    generator = torch.Generator().manual_seed(seed)
    held_out = pick_per_class(official.labels, profile.validation_per_class, generator)
    rest = torch.ones(len(official), dtype=torch.bool)
    rest[held_out] = False
    kept = rest.nonzero()[:, 0]
    if profile.train_per_class is not None:
        kept = kept[pick_per_class(official.labels[kept], profile.train_per_class, generator)]
    indices = held_out.tolist()
    split = {
        "dataset": profile.dataset,
        "seed": seed,
        "train_images": len(kept),
        "validation_images": len(indices),
        "validation_sha256": hashlib.sha256(str(indices).encode()).hexdigest(),
        "validation_indices": indices,
    }
    return TrainingData(official.select(kept), official.select(held_out), split)


def test_data(profile: Profile) -> ImageTensors:
    """The official test images of a profile, for the final evaluation only."""
    official = _official(profile, train=False)
    if profile.test_per_class is None:
        return official
    return official.select(pick_per_class(official.labels, profile.test_per_class, torch.Generator().manual_seed(0)))


def loader(data: ImageTensors, batch_size: int, shuffle_seed: int | None = None) -> DataLoader:
    """Batches of ``data`` in order, or shuffled by a seed (the last, smaller batch is then left out)."""
    shuffle = shuffle_seed is not None
    generator = torch.Generator().manual_seed(shuffle_seed) if shuffle else None
    drop_last = shuffle and len(data) > batch_size
    return DataLoader(data, batch_size, shuffle=shuffle, generator=generator, drop_last=drop_last)


def to_pixels(images: Tensor) -> Tensor:
    """Undo the normalisation of Fashion-MNIST images, for display: values 0..1."""
    return (images * FASHION_STD + FASHION_MEAN).clamp(0, 1)


def _official(profile: Profile, train: bool) -> ImageTensors:
    folder = data_dir()
    raw = folder / "FashionMNIST" / "raw"
    try:
        source = torchvision.datasets.FashionMNIST(folder, train=train, download=True)
    except (OSError, URLError, RuntimeError, ValueError, AssertionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise StudyError(
            f"Fashion-MNIST under {raw} is missing or damaged and could not be downloaded ({reason}); "
            f"remove that folder and bring it back with `git checkout -- data`, or set AVIT_DATA"
        ) from error
    transform = v2.Compose(
        [v2.ToDtype(torch.float32, scale=True), v2.Normalize([FASHION_MEAN], [FASHION_STD])]
    )  # fmt: skip
    return ImageTensors(source.data[:, None], source.targets, FASHION_CLASSES, transform)
