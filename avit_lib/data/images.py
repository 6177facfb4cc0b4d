"""Images: decoded into bytes, at once or when they are needed, and made into normalised batches.

Every image file becomes a square of bytes of the same size (``decode``), a little larger than what
a model sees: evaluation cuts out its centre, augmentation a random part. So an image is decoded
once; whether a set lies in memory or on disk makes no difference to an image, but random draws,
and the order in training, are others. Images are RGB.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from struct import error as StructError
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile, ImageOps, TiffTags, UnidentifiedImageError
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler
from torchvision.transforms import v2

from avit_lib.data.files import FORMATS, Unreadable, read_all, worker_count
from avit_lib.places import digest_file

STATISTICS = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)  # mean and deviation, of pixels 0..1
CROP_FRACTION = 0.9  # of the shorter side, seen in evaluation: DeiT's in timm (crop_pct)
# Of the decoded square, seen by a training crop: moderate, the square is most of the object.
CROP_AREA = (0.5, 1.0)
# Bytes of a decoded set; a larger one is decoded when it is needed, in every epoch again.
MEMORY_LIMIT = 4 * 2**30
# Tags of a TIFF, and a value of the second.
BITS_PER_SAMPLE, PHOTOMETRIC, COLOUR_MAP, EXTRA_SAMPLES = 258, 262, 320, 338
STRIP_OFFSETS, TILE_OFFSETS, YCBCR = 273, 324, 6
# Other tags, and the values that Pillow reads right whatever else a TIFF says: no thumbnails, no
# bits in reverse, colours together and not in planes, without a sign.
PLAIN_TIFF = {254: (0, 2), 255: (1, 3), 266: (1,), 284: (1,), 339: (1,)}
ORIENTATION, TURNED = "{http://ns.adobe.com/tiff/1.0/}Orientation", [*"12345678"]  # of XMP
RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}RDF"
CLEAN_APERTURE = b"\0\0\0(clap"  # the head of this box in an AVIF, by which Pillow does not crop
WIDEST = 8  # aspect ratio to which longer images are cropped before scaling: 1 x 20,000 took 9 GB
# What Pillow and its decoders raise for files that are damaged, as they stumble.
BAD_IMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    RuntimeError,
    TypeError,
    LookupError,
    ArithmeticError,
    EOFError,
    MemoryError,
    StructError,
    Image.DecompressionBombError,
)


@dataclass(frozen=True)
class ImageFiles:
    """Image files ``root``/``names`` [n], decoded when asked for; indexed like bytes [n, 3, S, S].

    ``names`` is an array of str: a list of a million would be copied into every worker of a
    DataLoader.
    """

    root: Path
    names: np.ndarray
    image_size: int

    def __getitem__(self, index: int | list[int] | Tensor) -> Tensor:
        if np.ndim(index):
            return torch.stack([self[one] for one in index])
        return decode(self.root / self.names[index], self.image_size)


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
        if isinstance(self.images, Tensor):
            chosen = self.images[indices]
        else:
            chosen = replace(self.images, names=self.images.names[indices.numpy()])
        return replace(self, images=chosen, labels=self.labels[indices])


def load(
    parts: dict[str, Images], apart: str = ""
) -> tuple[dict[str, Images], dict[str, list[str]]]:
    """Decode the image files of ``parts`` into memory; also returns the SHA-256 of each file.

    What does not fit (``MEMORY_LIMIT``), and the part named ``apart``, stays on disk, and is only
    checked. Raises Unreadable for all files of all parts that cannot be read: now, not in
    mid-epoch.
    """
    loaded, jobs = {}, []
    for role, data in parts.items():
        side = decoded_size(data.images.image_size)
        shape = (len(data), 3, side, side)
        fits = role != apart and math.prod(shape) <= MEMORY_LIMIT
        room = torch.empty(shape, dtype=torch.uint8) if fits else data.images
        loaded[role] = replace(data, images=room)
        jobs += [(data.images, room, index) for index in range(len(data))]
    digests = iter(read_all(_read_into, jobs))
    return loaded, {role: [*islice(digests, len(data))] for role, data in parts.items()}


def _read_into(job: tuple) -> str:
    """Of a job, files, their room and an index: decode one, or only check it; returns its checksum.

    It is only checked where the room are the files themselves.
    """
    files, room, index = job
    path = files.root / files.names[index]
    if room is files:
        _read(path, draft=True)
    else:
        room[index] = files[index]
    return digest_file(path)  # by now in the system's cache: the disk is read once


def loader(
    data: Images, batch_size: int, shuffle_seed: int | None = None, share: tuple = (0, 1)
) -> DataLoader:
    """Batches of ``data`` in order, or shuffled by a seed (a last, smaller batch is left out).

    ``share`` (k, n): of each batch only the images k, k + n, ..., the part of one of n processes.
    Augmentation draws from torch's global generator; of image files from those of workers, seeded
    by ``shuffle_seed`` and their number.
    """
    shuffle = shuffle_seed is not None
    generator = torch.Generator().manual_seed(shuffle_seed) if shuffle else None
    order = RandomSampler(data, generator=generator) if shuffle else SequentialSampler(data)
    batches = ShareSampler(order, batch_size, drop_last=shuffle and len(data) > batch_size)
    batches.share = slice(share[0], None, share[1])
    workers = worker_count() if isinstance(data.images, ImageFiles) else 0
    # Whole batches are asked for (batch_size=None): thousands of small images are slow one by one.
    return DataLoader(
        data,
        None,
        sampler=batches,
        generator=generator,
        num_workers=workers,
        worker_init_fn=partial(_seed_worker, share[0]),
    )


def _seed_worker(rank: int, worker: int) -> None:
    """Other augmentation in each of several processes, whose workers have the same seeds."""
    torch.manual_seed(torch.initial_seed() + 1_000_003 * rank)


class ShareSampler(BatchSampler):
    """Of every batch the ``share`` of one process: images rank, rank + count, ..."""

    def __iter__(self) -> Iterator[list[int]]:
        for batch in super().__iter__():
            yield batch[self.share]


def read_image(path: Path | str, image_size: int, transform: Callable | None = None) -> Tensor:
    """One image file as a normalised tensor [3, H, W], as in evaluation.

    ``transform``: what makes the tensor of a PIL image, in place of the study's own way. Raises
    UserError when the file cannot be read.
    """
    if transform is not None:
        return transform(_read(path))
    return batch_transform(image_size)(decode(path, image_size))


def decode(path: Path | str, image_size: int) -> Tensor:
    """The bytes [3, S, S] of an image file: shorter side scaled to S, the centre cut out.

    S is ``decoded_size``; raises UserError when the file cannot be read.
    """
    size = decoded_size(image_size)
    # By Pillow, whose bicubic is what timm evaluates with.
    scaled = v2.Resize(size, v2.InterpolationMode.BICUBIC)(_read(path))
    return v2.functional.pil_to_tensor(v2.CenterCrop(size)(scaled))


def decoded_size(image_size: int) -> int:
    """Side of the decoded square for models that see ``image_size`` pixels, as 248 for 224."""
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
    """Random transforms with draws of their own for every image; v2's share theirs in a batch."""

    def forward(self, images: Tensor) -> Tensor:
        """From [..., C, H, W] to [..., C, h, w]."""
        if images.ndim == 3:
            return super().forward(images)
        return torch.stack([self(image) for image in images])


def to_pixels(images: Tensor, statistics: tuple = STATISTICS) -> Tensor:
    """Undo the normalisation of images [..., 3, H, W], by mean and deviation: values 0..1."""
    mean, std = (torch.tensor(values)[:, None, None] for values in statistics)
    return (images * std + mean).clamp(0, 1)


def _read(path: Path | str, draft: bool = False) -> Image.Image:
    """An image file, upright, as "RGB", what is transparent laid on white.

    Of one beyond the aspect ratio ``WIDEST`` it is the middle; a JPEG at an eighth of its size,
    which is faster, if a ``draft`` is enough. Raises Unreadable.
    """
    try:
        if Path(path).is_fifo():  # would wait for a writer
            raise ValueError("a pipe, no file")
        # Not by its name: Pillow then maps a TIFF into memory, and a turned one in grey wrongly.
        with open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
            if draft:
                image.draft(None, (1, 1))
            _refuse_misread(image)
            if image.format == "PNG":
                image.load()  # metadata may stand behind the pixels
            _read_orientation(image)
            upright = ImageOps.exif_transpose(image)
            most = WIDEST * min(upright.size)
            upright = v2.CenterCrop([min(side, most) for side in reversed(upright.size)])(upright)
            if upright.has_transparency_data:
                upright = upright.convert("RGBA")
                if upright.getextrema()[3] == (0, 0):
                    raise ValueError("all of it is transparent; save it without transparency")
                upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
            return upright.convert("RGB")
    except BAD_IMAGE as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = f"not an image in {', '.join(FORMATS)}"
        raise Unreadable(f"{path} ({reason})") from None


def _read_orientation(image: ImageFile.ImageFile) -> None:
    """Let ``image`` know how it is turned: from EXIF, else from its own XMP."""
    # Pillow would take the first orientation in XMP, be it that of a picture placed in this one.
    xmp = image.info.pop("xmp", b"")
    image.info.pop("XML:com.adobe.xmp", None)
    image._exif = None
    exif = image.getexif()
    # Old programs write both into a PNG under these names: three lines, then it in hexadecimal.
    for name in ("APP1", "xmp"):
        digits = "".join(image.info.get(f"Raw profile type {name}", "").split("\n")[3:])
        raw = bytes.fromhex(digits) if re.fullmatch("([0-9a-fA-F]{2})*", digits) else b""
        if raw.startswith(b"Exif"):
            exif.load(raw)
        xmp = xmp or raw.partition(b"http://ns.adobe.com/xap/1.0/\0")[2] or raw
    found = exif.get(ExifTags.Base.Orientation)
    if isinstance(found, bytes):  # the number of a byte, where others write a short one
        found = exif[ExifTags.Base.Orientation] = int.from_bytes(found, "little")
    if found in range(1, 9):
        return
    try:
        described = [*ElementTree.fromstring(xmp.rstrip(b"\0")).iterfind(f".//{RDF}/*")]
    except ElementTree.ParseError:  # there is none, or none that is whole
        return
    for description in described:
        turned = description.get(ORIENTATION) or description.findtext(ORIENTATION)
        if turned and turned.strip() in TURNED:
            exif[ExifTags.Base.Orientation] = int(turned)


def _refuse_misread(image: ImageFile.ImageFile) -> None:
    """Raise ValueError for an opened file that Pillow reads, but wrongly."""
    tags, layout = getattr(image, "tag_v2", {}), str(image.tile)
    # Of grey with more than 8 bits nobody knows which is white; of colours Pillow drops the lower.
    deep = image.mode.startswith(("F", "I")) or re.search("(?<!BGR);16", layout)
    highest = re.search(r"'ppm.*, (\d+)\)", layout)  # value of a PPM
    if deep or (highest and int(highest[1]) > 255) or np.max(tags.get(BITS_PER_SAMPLE, 1)) > 8:
        raise ValueError("it has more than 8 bits a colour; save it with 8")
    for tag, plain in PLAIN_TIFF.items():
        if tag in tags and not {*np.ravel(tags[tag])} <= {*plain}:
            raise ValueError(f"its {TiffTags.lookup(tag).name} is {tags[tag]}; save it as PNG")
    raw = image.info.get("compression") == "raw"
    if raw and tags.get(PHOTOMETRIC) == YCBCR:
        raise ValueError("its colours are YCbCr without compression; save it as RGB")
    if raw and 0 in (*tags.get(STRIP_OFFSETS, ()), *tags.get(TILE_OFFSETS, ())):
        raise ValueError("parts of it are missing; save it whole")
    if tags and image.mode in ("RGBA", "RGBX") and EXTRA_SAMPLES not in tags:
        raise ValueError("it does not say what its fourth channel is; save it with three")
    if np.max(tags.get(COLOUR_MAP, 256)) < 256:
        raise ValueError("its palette is of 8 bits in place of 16; save it again")
    if "transparency" in image.info and re.search("'L;[24]'", layout):
        raise ValueError("its transparent grey is read wrongly; save it with 8 bits")
    if image.format == "AVIF":  # whose pixels are decoded from bytes that Pillow has read
        image.fp.seek(0)
        if CLEAN_APERTURE in image.fp.read():
            raise ValueError("it says that only a part of it is to be seen; save that part")
    part = image.format == "GIF" and image.tile and image.tile[0][1] != (0, 0, *image.size)
    if part and "transparency" not in image.info:
        raise ValueError("its first frame covers only a part of it; save it anew")
    if tags and PHOTOMETRIC not in tags and image.info.get("compression") != "tiff_jpeg":
        raise ValueError("it does not say whether 0 is black or white; save it again")
    if image.mode == "CMYK" and image.format in ("JPEG", "MPO") and "adobe" not in image.info:
        raise ValueError("it does not say whether its colours are inverted; save it as RGB")
    one_bit = ("1", (image.width + 31) // 32 * 4)  # how such lines are read, and how long they are
    if image.format == "BMP" and image.mode == "1" and image.tile[0][3][:2] != one_bit:
        raise ValueError("its two colours are read wrongly; save it with 24 bits")
    if image.format == "BMP" and "BGR;15" in layout:
        image.fp.seek(14)
        header = image.fp.read(56)
        if header[0] >= 56 and any(header[52:56]):  # long enough to have a mask of alpha
            raise ValueError("its one bit of transparency is not read; save it with 32 bits")
