"""Images: decoded into bytes, at once or when they are needed, and made into normalised batches.

Every image file becomes a square of bytes of the same size (``decode``), a little larger than what
a model sees: evaluation cuts out its centre, augmentation a random part. So an image is decoded
once; and whether a set lies in memory or on disk makes no difference to a batch. Images are RGB.
"""

import hashlib
import math
import re
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler
from torchvision.transforms import v2

from avit_lib.data.files import FORMATS, Unreadable, read_all, worker_count

STATISTICS = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)  # mean and deviation, of pixels 0..1
CROP_FRACTION = 0.9  # of the shorter side, seen in evaluation: DeiT's in timm (crop_pct)
CROP_AREA = (
    0.5,
    1.0,
)  # of the decoded square, seen by a training crop: moderate, the square is most of the object
MEMORY_LIMIT = (
    4 * 2**30
)  # bytes of a decoded set; a larger one is decoded when it is needed, in every epoch again

WIDEST = 8  # aspect ratio to which longer images are cropped before scaling: 1 x 20,000 took 9 GB
WHITES = (255, 4095, 65535)  # of 8, 12 and 16 bits

# What Pillow raises for files that are damaged or no images: OSError is also its
# UnidentifiedImageError.
READ_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


@dataclass(frozen=True)
class ImageFiles:
    """Image files ``root``/``names`` [n], decoded whenever they are asked for: indexed like bytes
    [n, 3, S, S].
    """

    root: Path
    names: (
        np.ndarray
    )  # of str: a list of a million strings would be copied into every worker of a DataLoader
    image_size: int

    def __getitem__(self, index: int | list[int] | Tensor) -> Tensor:
        chosen = self.names[np.asarray(index)]  # NumPy takes a tensor of one index for a number
        if isinstance(chosen, str):
            return decode(self.root / chosen, self.image_size)
        return torch.stack([decode(self.root / name, self.image_size) for name in chosen])


@dataclass(frozen=True)
class Images(Dataset):
    """Images [n, C, H, W] as bytes or files, their labels [n] and the names of the classes.

    An item is a normalised float image [C, H, W], made by ``transform``, and its label; several
    indices give a batch.
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
        chosen = (
            images[indices]
            if isinstance(images, Tensor)
            else replace(images, names=images.names[indices.numpy()])
        )
        return replace(self, images=chosen, labels=self.labels[indices])


def load(*sets: Images) -> list[Images]:
    """Decode image files into memory if they fit (``MEMORY_LIMIT``), else only check that every one
    can be read.

    Raises Unreadable for all files of all sets that cannot be read: now, not in mid-epoch.
    """
    decoded = [_make_room(data.images, len(data)) for data in sets]

    def read(job: tuple[ImageFiles, Tensor | ImageFiles, int]) -> None:
        files, pixels, index = job
        if pixels is files:
            _read(files.root / files.names[index], draft=True)
        else:
            pixels[index] = files[index]

    jobs = [
        (data.images, pixels, index)
        for data, pixels in zip(sets, decoded, strict=True)
        for index in range(len(data))
    ]
    read_all(read, jobs, "reading")
    return [replace(data, images=pixels) for data, pixels in zip(sets, decoded, strict=True)]


def _make_room(images: ImageFiles, count: int) -> Tensor | ImageFiles:
    """Memory for ``count`` decoded files; ``images`` themselves if it would be too much."""
    side = decoded_size(images.image_size)
    shape = (count, 3, side, side)
    return torch.empty(shape, dtype=torch.uint8) if math.prod(shape) <= MEMORY_LIMIT else images


def digest(data: Images) -> str:
    """The SHA-256 of the bytes of image files, in order.

    A file that cannot be opened counts as empty: reading it names it.
    """
    paths = [data.images.root / name for name in data.images.names]
    parts = read_all(_digest_file, paths, "comparing")
    return hashlib.sha256(b"".join(parts)).hexdigest()


def _digest_file(path: Path) -> bytes:
    try:
        return hashlib.sha256(path.read_bytes()).digest()
    except OSError:
        return b""


def loader(
    data: Images, batch_size: int, shuffle_seed: int | None = None, share: tuple = (0, 1)
) -> DataLoader:
    """Batches of ``data`` in order, or shuffled by a seed (the last, smaller batch is then left
    out).

    ``share`` (k, n): of each batch only the images k, k + n, ..., the part of one of n processes.
    Augmentation draws from torch's global generator; of image files from those of workers, seeded
    by ``shuffle_seed`` and their number.
    """
    shuffle = shuffle_seed is not None
    generator = torch.Generator().manual_seed(shuffle_seed) if shuffle else None
    order = RandomSampler(data, generator=generator) if shuffle else SequentialSampler(data)
    batches = BatchSampler(order, batch_size, drop_last=shuffle and len(data) > batch_size)
    workers = worker_count() if isinstance(data.images, ImageFiles) else 0
    # Whole batches are asked for (batch_size=None): thousands of small images are slow one by one.
    return DataLoader(
        Share(data, *share), None, sampler=batches, generator=generator, num_workers=workers
    )


@dataclass(frozen=True)
class Share(Dataset):
    """A data set of which one process loads only its share of each batch: images rank, rank +
    count, ...
    """

    data: Images
    rank: int
    count: int

    def __getitem__(self, batch: list[int]) -> tuple[Tensor, Tensor]:
        return self.data[batch[self.rank :: self.count]]


def read_image(path: Path, image_size: int, transform: Callable | None = None) -> Tensor:
    """One image file as a normalised tensor [3, H, W], as in evaluation.

    ``transform``: what makes the tensor of a PIL image, in place of the study's own way. Raises
    UserError when the file cannot be read.
    """
    if transform is not None:
        return transform(_read(path))
    return batch_transform(image_size)(decode(path, image_size))


def decode(path: Path, image_size: int) -> Tensor:
    """The bytes [3, S, S] of an image file: shorter side scaled to S, the centre cut out.

    S is ``decoded_size``; raises UserError when the file cannot be read.
    """
    size = decoded_size(image_size)
    # By Pillow, whose bicubic is what timm evaluates with.
    scaled = v2.Resize(size, v2.InterpolationMode.BICUBIC)(_read(path))
    return v2.functional.pil_to_tensor(v2.CenterCrop(size)(scaled))


def decoded_size(image_size: int) -> int:
    """Side of the square that is decoded for models that see ``image_size`` pixels, such as 248 for
    224.
    """
    return math.floor(image_size / CROP_FRACTION)


def batch_transform(image_size: int, augmentation: str = "none") -> v2.Compose:
    """From decoded bytes [..., 3, S, S] to normalised images [..., 3, image_size, image_size].

    Augmentation "none": the centre. "standard": of each image a random part, of ``CROP_AREA``,
    mirrored or not.
    """
    part = v2.CenterCrop(image_size)
    if augmentation == "standard":
        bicubic = v2.InterpolationMode.BICUBIC
        crop = v2.RandomResizedCrop(image_size, scale=CROP_AREA, interpolation=bicubic)
        part = EachByItself([crop, v2.RandomHorizontalFlip()])
    return v2.Compose([part, v2.ToDtype(torch.float32, scale=True), v2.Normalize(*STATISTICS)])


class EachByItself(v2.Compose):
    """Random transforms applied to every image of a batch with draws of its own; v2's share theirs
    in a batch.
    """

    def forward(self, images: Tensor) -> Tensor:
        """From [..., C, H, W] to [..., C, h, w]."""
        return (
            super().forward(images)
            if images.ndim == 3
            else torch.stack([self(image) for image in images])
        )


def to_pixels(images: Tensor, statistics: tuple = STATISTICS) -> Tensor:
    """Undo the normalisation of images [..., 3, H, W], by mean and deviation: values 0..1."""
    mean, std = (torch.tensor(values)[:, None, None] for values in statistics)
    return (images * std + mean).clamp(0, 1)


def _read(path: Path, draft: bool = False) -> Image.Image:
    """An image file, upright, as "RGB"; of one beyond the aspect ratio ``WIDEST`` the middle.

    A JPEG at an eighth of its size, which is faster, if a ``draft`` is enough. Raises Unreadable.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if draft:
                image.draft(None, (1, 1))
            layout = str(image.tile)
            _check_tiff(getattr(image, "tag_v2", {}))
            ImageOps.exif_transpose(image, in_place=True)
            most = WIDEST * min(image.size)
            middle = v2.CenterCrop([min(side, most) for side in reversed(image.size)])(image)
            return _to_bytes(middle, layout)
    except READ_ERRORS as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "not an image" if unknown else " ".join(reason.split())
        raise Unreadable(f"{path} ({reason})") from None


def _check_tiff(tags: Mapping[int, Any]) -> None:
    """Raise ValueError for a TIFF of more than 8 bits that Pillow reads, but wrongly."""
    bits, planes, white_is_zero = (
        np.atleast_1d(tags.get(258, 1)),
        tags.get(284, 1),
        tags.get(262, 1) == 0,
    )
    if bits.max() > 8 and (white_is_zero or (planes == 2 and len(bits) > 1)):
        what = "white as zero" if white_is_zero else "one plane a colour"
        raise ValueError(f"its pixels have {bits.max()} bits and {what}; save it with 8 bits")


def _to_bytes(image: Image.Image, layout: str) -> Image.Image:
    """An image of any mode as "RGB": 16 bits scaled to 8, what is transparent laid on white.

    Grey files of 16 bits seldom say how many are used: we take the fewest of 8, 12 and 16 that hold
    the brightest pixel. So what a sensor of 10 or 14 bits took is dark, at most by a factor of 4;
    and a picture without a pixel above a sixteenth of white becomes 16 times as bright. Of colours
    of 16 bits Pillow keeps the upper 8: an image in which all are that dark is refused. ``layout``:
    how Pillow finds the pixels in the file.
    """
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range")
    if image.mode.startswith("I"):
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > WHITES[-1]:
            raise ValueError("its pixels are whole numbers beyond 16 bits, of unknown range")
        whites = (4095,) if "I;12" in layout else WHITES
        white = next(white for white in whites if pixels.max() <= white)
        scaled = (pixels / white * 255).round().astype(np.uint8)
        scaled[pixels == image.info.get("transparency", -1)] = 255
        image = Image.fromarray(scaled)
    elif (
        re.search(r";16|'RGB', \d{4}", layout)
        and max(most for _, most in image.convert("RGB").getextrema()) < 17
    ):
        raise ValueError(
            "its colours use 12 bits of 16 or fewer, so come out black; save it with 8"
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
