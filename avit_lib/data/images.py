"""Images: decoded into bytes, held in memory or decoded when they are needed, and made into normalised batches.

Every image file becomes a square of bytes of the same size (``decode``). At ImageNet's image sizes that square is a
little larger than what a model sees: evaluation cuts out its centre, augmentation a random part. So an image is decoded
once; and whether a set lies in memory (``ImageTensors``) or on disk (``ImageFiles``) makes no difference to a batch.
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
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from tqdm.auto import tqdm

from avit_lib.errors import UserError

FASHION_MEAN, FASHION_STD = 0.286, 0.353  # of the training pixels, scaled to 0..1
CROP_FRACTION = 0.9  # of the shorter side, seen in evaluation: DeiT's in timm (crop_pct)
SMALL_IMAGE = 64  # pixels; up to this image size nothing is cut off the shorter side, there is little enough of it
CROP_AREA = (0.5, 1.0)  # of the decoded square, seen by a training crop: moderate, the square is most of the object
MEMORY_LIMIT = 4 * 2**30  # bytes of a decoded set; a larger one is decoded when it is needed, in every epoch again
FAULTS_SHOWN = 5

# What Pillow raises for files that are damaged or no images: OSError is also its UnidentifiedImageError.
READ_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


@dataclass(frozen=True)
class ImageTensors(Dataset):
    """Decoded images [n, C, H, W] as bytes, their labels [n] and the names of the classes.

    An item is a normalised float image [C, H, W] and its label; ``transform`` makes it from the bytes.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    transform: Callable[[Tensor], Tensor]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int | Tensor) -> tuple[Tensor, Tensor]:
        return self.transform(self.images[index]), self.labels[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """A whole batch at once, for DataLoader: thousands of small images are slow one by one."""
        return self.transform(self.images[indices]), self.labels[indices]

    def select(self, indices: Tensor) -> "ImageTensors":
        """The images at ``indices`` [k], in that order."""
        return replace(self, images=self.images[indices], labels=self.labels[indices])


@dataclass(frozen=True)
class ImageFiles(Dataset):
    """Image files ``root``/``names`` [n], otherwise like ``ImageTensors``; decoded whenever they are asked for."""

    root: Path
    names: np.ndarray  # of str: a list of a million strings would be copied into every worker of a DataLoader
    labels: Tensor
    classes: tuple[str, ...]
    image_size: int
    channels: int
    transform: Callable[[Tensor], Tensor]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int | Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(index, Tensor) and index.ndim:
            return self.__getitems__(index.tolist())
        return self.transform(self._decoded(int(index))), self.labels[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """A whole batch at once, for DataLoader."""
        return self.transform(torch.stack([self._decoded(index) for index in indices])), self.labels[indices]

    def _decoded(self, index: int) -> Tensor:
        """The bytes [C, S, S] of one image; raises UserError when the file cannot be read."""
        return _decoded(self.root / self.names[index], self.image_size, self.channels)

    def select(self, indices: Tensor) -> "ImageFiles":
        """The images at ``indices`` [k], in that order."""
        return replace(self, names=self.names[indices.numpy()], labels=self.labels[indices])


Images = ImageTensors | ImageFiles


def load(data: Images, description: str) -> Images:
    """Decode image files into memory if they fit (``MEMORY_LIMIT``), else only check that every one can be read.

    Raises UserError that names the first few of all files that cannot be read: now, not in the middle of an epoch.
    """
    if isinstance(data, ImageTensors):
        return data
    shape = (len(data), data.channels, decoded_size(data.image_size), decoded_size(data.image_size))
    images = torch.empty(shape, dtype=torch.uint8) if math.prod(shape) <= MEMORY_LIMIT else None

    def read(index: int) -> tuple[Path, Exception] | None:
        path = data.root / data.names[index]
        try:
            if images is None:
                _skim(path)
            else:
                images[index] = decode(path, data.image_size, data.channels)
        except READ_ERRORS as error:
            return path, error
        return None

    with ThreadPool(worker_count()) as threads:  # Pillow lets other threads run while it decodes
        tasks = threads.imap(read, range(len(data)), chunksize=16)
        verb = "checking" if images is None else "decoding"
        bar = tqdm(tasks, desc=f"{verb} {description}", total=len(data), unit="image", disable=None)
        faults = [fault for fault in bar if fault]
    if faults:
        raise _unreadable(faults)
    return data if images is None else ImageTensors(images, data.labels, data.classes, data.transform)


def loader(
    data: Images, batch_size: int, shuffle_seed: int | None = None, share: tuple[int, int] = (0, 1)
) -> DataLoader:
    """Batches of ``data`` in order, or shuffled by a seed (the last, smaller batch is then left out).

    ``share`` (k, n): of each batch only the images k, k + n, ..., the part of one of n processes. Augmentation draws
    from torch's global generator. Image files are decoded by worker processes, whose generators are seeded from the
    loader's: there the draws depend on ``shuffle_seed`` and the number of workers.
    """
    shuffle = shuffle_seed is not None
    generator = torch.Generator().manual_seed(shuffle_seed) if shuffle else None
    drop_last = shuffle and len(data) > batch_size
    workers = worker_count() if isinstance(data, ImageFiles) else 0
    return DataLoader(
        Share(data, *share), batch_size, shuffle=shuffle, generator=generator, drop_last=drop_last,
        collate_fn=_as_it_is, num_workers=workers,
    )  # fmt: skip


@dataclass(frozen=True)
class Share(Dataset):
    """A data set of which one process loads only its share of each batch: images rank, rank + count, ..."""

    data: Images
    rank: int
    count: int

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """The own share of the batch ``indices``, for DataLoader."""
        return self.data.__getitems__(indices[self.rank :: self.count])


def _as_it_is(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """A batch that ``__getitems__`` has made already."""
    return batch


def read_image(path: Path, image_size: int, channels: int) -> Tensor:
    """One image file as a normalised tensor [C, H, W], as in evaluation; raises UserError when it cannot be read."""
    transform = batch_transform(decoded_size(image_size), image_size, channels)
    return transform(_decoded(path, image_size, channels))


def _decoded(path: Path, image_size: int, channels: int) -> Tensor:
    """``decode``, with a UserError when the file cannot be read."""
    try:
        return decode(path, image_size, channels)
    except READ_ERRORS as error:
        raise _unreadable([(path, error)]) from None


def decode(path: Path, image_size: int, channels: int) -> Tensor:
    """The bytes [C, S, S], S = ``decoded_size``, of an image file: shorter side scaled to S, centre cut out.

    Grey for one channel, else RGB; raises one of ``READ_ERRORS``.
    """
    size = decoded_size(image_size)
    with Image.open(path) as opened:
        image = _to_bytes(opened, "L" if channels == 1 else "RGB")
    if size > image_size:  # by Pillow, whose bicubic is what timm evaluates with
        image = v2.Resize(size, v2.InterpolationMode.BICUBIC)(image)
    return v2.CenterCrop(size)(v2.Resize(size)(v2.functional.pil_to_tensor(image)))


def decoded_size(image_size: int) -> int:
    """Side of the square that is decoded for models that see ``image_size`` pixels, such as 248 for 224."""
    return image_size if image_size <= SMALL_IMAGE else math.floor(image_size / CROP_FRACTION)


def batch_transform(size: int, image_size: int, channels: int, augmentation: str = "none") -> Callable:
    """From bytes [..., C, size, size] to normalised images [..., C, image_size, image_size].

    Augmentation "none": the centre, or all of images that are smaller than ``image_size``, which are scaled up.
    "standard": of each image another part, of ``CROP_AREA``, and every other one mirrored; drawn from torch's global
    generator.
    """
    normalise = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(*_statistics(channels))]
    bicubic = v2.InterpolationMode.BICUBIC
    if augmentation == "standard":
        crop = v2.RandomResizedCrop(image_size, scale=CROP_AREA, interpolation=bicubic)
        return v2.Compose([EachByItself(v2.Compose([crop, v2.RandomHorizontalFlip()])), *normalise])
    if size > image_size:
        return v2.Compose([v2.CenterCrop(image_size), *normalise])
    if size < image_size:
        return v2.Compose([v2.Resize(image_size, bicubic), *normalise])
    return v2.Compose(normalise)


class EachByItself(torch.nn.Module):
    """A random transform applied to every image of a batch with draws of its own; v2's share theirs in a batch."""

    def __init__(self, transform: v2.Transform):
        super().__init__()
        self.transform = transform

    def forward(self, images: Tensor) -> Tensor:
        """From [..., C, H, W] to [..., C, h, w]."""
        if images.ndim == 3:
            return self.transform(images)
        return torch.stack([self.transform(image) for image in images])


def to_pixels(images: Tensor) -> Tensor:
    """Undo the normalisation of images [..., C, H, W], for display: values 0..1."""
    mean, std = (torch.tensor(values)[:, None, None] for values in _statistics(images.shape[-3]))
    return (images * std + mean).clamp(0, 1)


def worker_count() -> int:
    """Processes that decode images: the processors, shared among the processes that torchrun started here."""
    return max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def _statistics(channels: int) -> tuple[list[float], list[float]]:
    """Mean and deviation of each channel: ImageNet's for colour, Fashion-MNIST's for grey."""
    if channels == 1:
        return [FASHION_MEAN], [FASHION_STD]
    return list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD)


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


def _skim(path: Path) -> None:
    """Read an image file to its end, a JPEG at an eighth of its size, which is faster; raises one of READ_ERRORS."""
    with Image.open(path) as image:
        image.draft(None, (1, 1))
        _to_bytes(image, "RGB")


def _unreadable(faults: list[tuple[Path, Exception]]) -> UserError:
    """One line that names the first few of the files that cannot be read, and why."""
    named = ", ".join(f"{path} ({_reason(error)})" for path, error in faults[:FAULTS_SHOWN])
    more = f" and {len(faults) - FAULTS_SHOWN} more" if len(faults) > FAULTS_SHOWN else ""
    what = "1 file" if len(faults) == 1 else f"{len(faults)} files"
    return UserError(f"{what} cannot be read as images: {named}{more}; mend or remove them")


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())
