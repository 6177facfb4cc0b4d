"""Images: decoded into bytes, at once or when they are needed, and made into normalised batches.

Every image file becomes a square of bytes of the same size (``decode``). At ImageNet's image sizes that square is a
little larger than what a model sees: evaluation cuts out its centre, augmentation a random part. So an image is decoded
once; and whether a set lies in memory or on disk makes no difference to a batch.
"""

import math
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler
from torchvision.transforms import v2
from tqdm.auto import tqdm

from avit_lib.errors import UserError

# Mean and deviation of each channel, of pixels 0..1, by the number of channels: Fashion-MNIST's and ImageNet's.
STATISTICS = {1: ((0.286,), (0.353,)), 3: (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)}
CROP_FRACTION = 0.9  # of the shorter side, seen in evaluation: DeiT's in timm (crop_pct)
SMALL_IMAGE = 64  # pixels; up to this image size nothing is cut off the shorter side, there is little enough of it
CROP_AREA = (0.5, 1.0)  # of the decoded square, seen by a training crop: moderate, the square is most of the object
MEMORY_LIMIT = 4 * 2**30  # bytes of a decoded set; a larger one is decoded when it is needed, in every epoch again
FAULTS_SHOWN = 5

# What Pillow raises for files that are damaged or no images: OSError is also its UnidentifiedImageError.
READ_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


class Unreadable(UserError):
    """Files that cannot be read as images: "path (reason)" of each is an argument, the message shows the first few."""

    def __str__(self) -> str:
        what = "1 file" if len(self.args) == 1 else f"{len(self.args)} files"
        more = f" and {len(self.args) - FAULTS_SHOWN} more" if len(self.args) > FAULTS_SHOWN else ""
        return f"{what} cannot be read as images: {', '.join(self.args[:FAULTS_SHOWN])}{more}; mend or remove them"


@dataclass(frozen=True)
class ImageFiles:
    """Image files ``root``/``names`` [n], decoded whenever they are asked for: indexed like bytes [n, C, S, S]."""

    root: Path
    names: np.ndarray  # of str: a list of a million strings would be copied into every worker of a DataLoader
    image_size: int
    channels: int

    def __getitem__(self, index: int | list[int] | Tensor) -> Tensor:
        chosen = self.names[np.asarray(index)]  # NumPy takes a tensor of one index for a number
        if isinstance(chosen, str):
            return decode(self.root / chosen, self.image_size, self.channels)
        return torch.stack([decode(self.root / name, self.image_size, self.channels) for name in chosen])


@dataclass(frozen=True)
class Images(Dataset):
    """Images [n, C, H, W] as bytes or files, their labels [n] and the names of the classes.

    An item is a normalised float image [C, H, W], made by ``transform``, and its label; several indices give a batch.
    """

    images: Tensor | ImageFiles
    labels: Tensor
    classes: tuple[str, ...]
    transform: Callable[[Tensor], Tensor]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int | list[int] | Tensor) -> tuple[Tensor, Tensor]:
        return self.transform(self.images[index]), self.labels[index]

    def select(self, indices: Tensor) -> "Images":
        """The images at ``indices`` [k], in that order; files are not decoded."""
        images = self.images
        chosen = images[indices] if isinstance(images, Tensor) else replace(images, names=images.names[indices.numpy()])
        return replace(self, images=chosen, labels=self.labels[indices])


def load(data: Images, description: str) -> Images:
    """Decode image files into memory if they fit (``MEMORY_LIMIT``), else only check that every one can be read.

    Raises UserError that names the first few of all files that cannot be read: now, not in the middle of an epoch.
    """
    files = data.images
    if isinstance(files, Tensor):
        return data
    side = decoded_size(files.image_size)
    shape = (len(data), files.channels, side, side)
    images = torch.empty(shape, dtype=torch.uint8) if math.prod(shape) <= MEMORY_LIMIT else None

    def faults(index: int) -> tuple[str, ...]:
        try:
            if images is None:
                _read(files.root / files.names[index], "RGB", draft=True)
            else:
                images[index] = files[index]
        except Unreadable as error:
            return error.args
        return ()

    with ThreadPool(worker_count()) as threads:  # Pillow lets other threads run while it decodes
        tasks = threads.imap(faults, range(len(data)), chunksize=16)
        verb = "checking" if images is None else "decoding"
        bar = tqdm(tasks, desc=f"{verb} {description}", total=len(data), unit="image", disable=None)
        found = [fault for of_image in bar for fault in of_image]
    if found:
        raise Unreadable(*found)
    return data if images is None else replace(data, images=images)


def loader(data: Images, batch_size: int, shuffle_seed: int | None = None, share: tuple = (0, 1)) -> DataLoader:
    """Batches of ``data`` in order, or shuffled by a seed (the last, smaller batch is then left out).

    ``share`` (k, n): of each batch only the images k, k + n, ..., the part of one of n processes. Augmentation draws
    from torch's global generator; of image files from those of workers, seeded by ``shuffle_seed`` and their number.
    """
    shuffle = shuffle_seed is not None
    generator = torch.Generator().manual_seed(shuffle_seed) if shuffle else None
    order = RandomSampler(data, generator=generator) if shuffle else SequentialSampler(data)
    batches = BatchSampler(order, batch_size, drop_last=shuffle and len(data) > batch_size)
    workers = worker_count() if isinstance(data.images, ImageFiles) else 0
    # Whole batches are asked for (batch_size=None): thousands of small images are slow one by one.
    return DataLoader(Share(data, *share), None, sampler=batches, generator=generator, num_workers=workers)


@dataclass(frozen=True)
class Share(Dataset):
    """A data set of which one process loads only its share of each batch: images rank, rank + count, ..."""

    data: Images
    rank: int
    count: int

    def __getitem__(self, batch: list[int]) -> tuple[Tensor, Tensor]:
        return self.data[batch[self.rank :: self.count]]


def read_image(path: Path, image_size: int, channels: int, transform: Callable | None = None) -> Tensor:
    """One image file as a normalised tensor [C, H, W], as in evaluation; raises UserError when it cannot be read.

    ``transform``: what makes the tensor of a PIL image, in place of the study's own way.
    """
    if transform is not None:
        return transform(_read(path, "L" if channels == 1 else "RGB"))
    return batch_transform(decoded_size(image_size), image_size, channels)(decode(path, image_size, channels))


def decode(path: Path, image_size: int, channels: int) -> Tensor:
    """The bytes [C, S, S], S = ``decoded_size``, of an image file: shorter side scaled to S, centre cut out.

    Grey for one channel, else RGB; raises UserError when it cannot be read.
    """
    size = decoded_size(image_size)
    image = _read(path, "L" if channels == 1 else "RGB")
    if size > image_size:  # by Pillow, whose bicubic is what timm evaluates with
        image = v2.Resize(size, v2.InterpolationMode.BICUBIC)(image)
    return v2.CenterCrop(size)(v2.Resize(size)(v2.functional.pil_to_tensor(image)))


def decoded_size(image_size: int) -> int:
    """Side of the square that is decoded for models that see ``image_size`` pixels, such as 248 for 224."""
    return image_size if image_size <= SMALL_IMAGE else math.floor(image_size / CROP_FRACTION)


def batch_transform(size: int, image_size: int, channels: int, augmentation: str = "none") -> v2.Compose:
    """From bytes [..., C, size, size] to normalised images [..., C, image_size, image_size].

    Augmentation "none": the centre, or all of images that are smaller than ``image_size``, which are scaled up.
    "standard": of each image a random part, of ``CROP_AREA``, mirrored or not.
    """
    bicubic = v2.InterpolationMode.BICUBIC
    if augmentation == "standard":
        crop = v2.RandomResizedCrop(image_size, scale=CROP_AREA, interpolation=bicubic)
        part = EachByItself([crop, v2.RandomHorizontalFlip()])
    else:
        part = v2.CenterCrop(image_size) if size > image_size else v2.Resize(image_size, bicubic)
    return v2.Compose([part, v2.ToDtype(torch.float32, scale=True), v2.Normalize(*STATISTICS[channels])])


class EachByItself(v2.Compose):
    """Random transforms applied to every image of a batch with draws of its own; v2's share theirs in a batch."""

    def forward(self, images: Tensor) -> Tensor:
        """From [..., C, H, W] to [..., C, h, w]."""
        return super().forward(images) if images.ndim == 3 else torch.stack([self(image) for image in images])


def to_pixels(images: Tensor, statistics: tuple | None = None) -> Tensor:
    """Undo the normalisation of images [..., C, H, W], by mean and deviation (default: the study's): values 0..1."""
    mean, std = (torch.tensor(values)[:, None, None] for values in statistics or STATISTICS[images.shape[-3]])
    return (images * std + mean).clamp(0, 1)


def worker_count() -> int:
    """Processes that decode images: the processors, shared among the processes that torchrun started here."""
    return max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def _read(path: Path, mode: str, draft: bool = False) -> Image.Image:
    """An image file as "RGB" or "L"; a JPEG at an eighth of its size, which is faster, if a ``draft`` is enough."""
    try:
        with Image.open(path) as image:
            if draft:
                image.draft(None, (1, 1))
            return _to_bytes(image, mode)
    except READ_ERRORS as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else " ".join(reason.split())
        raise Unreadable(f"{path} ({reason})") from None


def _to_bytes(image: Image.Image, mode: str) -> Image.Image:
    """An image of whatever mode as "RGB" or "L": 16 bits scaled to 8, what is transparent laid on white."""
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range")
    if image.mode.startswith("I"):  # 16 bits, which Pillow would cut off at 255
        image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)
