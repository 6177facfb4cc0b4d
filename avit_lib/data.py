"""Data sets, splits and transforms; images are decoded once and kept as bytes."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError

import torch
import torchvision
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from tqdm.auto import tqdm

from avit_lib import distributed
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

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """A whole batch at once, for DataLoader: thousands of small images are slow one by one."""
        return self.transform(self.images[indices]), self.labels[indices]

    def select(self, indices: Tensor) -> "ImageTensors":
        """The images at ``indices`` [k], in that order."""
        return ImageTensors(self.images[indices], self.labels[indices], self.classes, self.transform)


@dataclass(frozen=True)
class TrainingData:
    """Training and validation images and how they were told apart."""

    train: ImageTensors
    validation: ImageTensors
    split: dict  # data set, seed, sizes, indices of the validation images, their checksum


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
    kept = _others(len(official), held_out)
    if profile.train_per_class is not None:
        kept = kept[pick_per_class(official.labels[kept], profile.train_per_class, generator)]
    train, validation = official.select(kept), official.select(held_out)
    return TrainingData(train, validation, _describe_split(profile.dataset, seed, train, validation, held_out))


def test_data(profile: Profile) -> ImageTensors:
    """The official test images of a profile, for the final evaluation only."""
    official = _official(profile, train=False)
    if profile.test_per_class is None:
        return official
    return official.select(pick_per_class(official.labels, profile.test_per_class, torch.Generator().manual_seed(0)))


def folder_data(
    folder: Path, split: str, image_size: int, channels: int, classes: Sequence[str] | None = None
) -> ImageTensors:
    """The images under ``folder``/``split``, one folder a class, scaled and cropped to a square of ``image_size``.

    Every image is decoded once, here; grey for one channel, else RGB. Raises StudyError when there are none, when their
    classes are not ``classes``, or names the first image that cannot be read.
    """
    source = Path(folder) / split
    try:
        files = torchvision.datasets.ImageFolder(source)
    except (FileNotFoundError, NotADirectoryError):
        raise StudyError(
            f"{source} holds no images in one folder a class; see `python -m avit_lib fit --help`"
        ) from None
    if classes is not None and list(classes) != files.classes:
        differing = sorted(set(classes) ^ set(files.classes))
        raise StudyError(f"{source} has other classes than the model or the training images: {', '.join(differing)}")
    paths = tqdm([path for path, _ in files.samples], desc=f"decoding {split}", unit="image", disable=None)
    images = torch.stack([_decode(path, image_size, channels) for path in paths])
    return ImageTensors(images, torch.tensor(files.targets), tuple(files.classes), _normalise(channels))


def read_image(path: Path, image_size: int, channels: int) -> Tensor:
    """One image file as a normalised tensor [C, H, W], scaled and cropped like ``folder_data`` does."""
    return _normalise(channels)(_decode(path, image_size, channels))


def folder_training_data(folder: Path, image_size: int, channels: int, seed: int) -> TrainingData:
    """Training and validation images of a folder of one's own: its val/, or else a tenth of each class of train/."""
    train = folder_data(folder, "train", image_size, channels)
    if (Path(folder) / "val").is_dir():
        validation, held_out = folder_data(folder, "val", image_size, channels, train.classes), None
    else:
        generator = torch.Generator().manual_seed(seed)
        smallest = int(train.labels.bincount().min())
        if smallest < 2:
            raise StudyError(
                f"a class in {Path(folder) / 'train'} has a single image, so none can be held out; add images"
            )
        per_class = max(1, smallest // 10)
        held_out = pick_per_class(train.labels, per_class, generator)
        validation, train = train.select(held_out), train.select(_others(len(train), held_out))
    return TrainingData(train, validation, _describe_split(str(folder), seed, train, validation, held_out))


def loader(data: ImageTensors, batch_size: int, shuffle_seed: int | None = None) -> DataLoader:
    """Batches of ``data`` in order, or shuffled by a seed (the last, smaller batch is then left out).

    Of a shuffled batch, each of several processes gets its share.
    """
    shuffle = shuffle_seed is not None
    generator = torch.Generator().manual_seed(shuffle_seed) if shuffle else None
    drop_last = shuffle and len(data) > batch_size
    if shuffle and distributed.count() > 1:
        data = distributed.Share(data, distributed.rank(), distributed.count())
    return DataLoader(data, batch_size, shuffle=shuffle, generator=generator, drop_last=drop_last, collate_fn=_as_it_is)


def to_pixels(images: Tensor) -> Tensor:
    """Undo the normalisation of images [..., C, H, W], for display: values 0..1."""
    mean, std = (torch.tensor(values)[:, None, None] for values in _statistics(images.shape[-3]))
    return (images * std + mean).clamp(0, 1)


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
    return ImageTensors(source.data[:, None], source.targets, FASHION_CLASSES, _normalise(channels=1))


def _as_it_is(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """A batch that ``ImageTensors.__getitems__`` has made already."""
    return batch


def _others(total: int, held_out: Tensor) -> Tensor:
    """The indices below ``total`` that are not ``held_out``."""
    rest = torch.ones(total, dtype=torch.bool)
    rest[held_out] = False
    return rest.nonzero()[:, 0]


def _describe_split(dataset: str, seed: int, train: ImageTensors, validation: ImageTensors, held_out: Tensor | None):
    """The split as it is written down; ``held_out`` are the validation images' indices in the whole training set."""
    indices = held_out.tolist() if held_out is not None else []
    return {
        "dataset": dataset,
        "seed": seed,
        "train_images": len(train),
        "validation_images": len(validation),
        "validation_sha256": hashlib.sha256(str(indices).encode() + validation.labels.numpy().tobytes()).hexdigest(),
        "validation_indices": indices,
    }


def _statistics(channels: int) -> tuple[list[float], list[float]]:
    """Mean and deviation of each channel: ImageNet's for colour, Fashion-MNIST's for grey."""
    if channels == 1:
        return [FASHION_MEAN], [FASHION_STD]
    return list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD)


def _normalise(channels: int) -> v2.Transform:
    return v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(*_statistics(channels))])


def _decode(path: Path | str, image_size: int, channels: int) -> Tensor:
    """The bytes [C, image_size, image_size] of an image file: shorter side scaled to fit, centre cropped."""
    try:
        image = Image.open(path).convert("L" if channels == 1 else "RGB")
    except OSError as error:  # also PIL's UnidentifiedImageError, and truncated files
        raise StudyError(f"{path} cannot be read as an image ({error}); mend or remove it") from None
    return v2.CenterCrop(image_size)(v2.Resize(image_size)(v2.functional.pil_to_tensor(image)))
