"""Images of every kind become the same bytes; on disk or in memory, batches are equal."""

import io
import os
import struct
import zlib
from base64 import b64decode

import numpy as np
import pytest
import torch
from conftest import refused
from msgspec.structs import replace
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo
from small_sets import COLOUR
from timm.data import create_transform
from torchvision.transforms import v2

from avit_lib.data import folder_training_data, images, loader, read_image
from avit_lib.data.datasets import folder_images
from avit_lib.data.images import decode


def new(mode, colour):
    return Image.new(mode, (20, 20), colour)


def grey(kind):
    return Image.fromarray(np.ones((20, 20), dtype=kind))


def encode(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def clear_bmp():
    """A BMP with a channel for transparency that its writer left at 0."""
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    head = struct.pack("<IiiHHIIiiII", 108, 2, 2, 1, 32, 3, 16, 0, 0, 0, 0) + masks + bytes(52)
    return b"BM" + struct.pack("<IHHI", 138, 0, 0, 122) + head + b"\x09\x09\x09\x00" * 4


def bmp_of_16_bits():
    """A BMP of 5, 6 and 5 bits a colour: blue."""
    head = struct.pack("<IiiHHIIiiII", 40, 20, 20, 1, 16, 3, 800, 0, 0, 0, 0)
    masks = struct.pack("<3I", 0xF800, 0x07E0, 0x001F)
    return b"BM" + struct.pack("<IHHI", 866, 0, 0, 66) + head + masks + b"\x1f\x00" * 400


def bmp_of_one_clear_bit():
    """A BMP of 5 bits a colour and 1 bit of transparency."""
    masks = struct.pack("<4I", 0x7C00, 0x03E0, 0x001F, 0x8000)
    head = struct.pack("<IiiHHIIiiII", 108, 2, 2, 1, 16, 3, 8, 0, 0, 0, 0) + masks + bytes(52)
    return b"BM" + struct.pack("<IHHI", 130, 0, 0, 122) + head + b"\x1f\x00" * 4


def bmp_of_two_colours():
    """A BMP of 8 bits a pixel, whose palette has two colours: Pillow reads 1 bit."""
    image = new("P", 1)
    image.putpalette([0, 0, 0, 255, 255, 255])
    return encode(image, "BMP")


def gif_with_a_small_frame():
    """A GIF whose canvas is larger than its first frame."""
    whole = encode(new("L", 9), "GIF")
    return whole[:6] + struct.pack("<HH", 30, 30) + whole[10:]


def without_tag(tag, mode="L", colour=9):
    """A TIFF without a tag: it has another number."""
    whole = encode(new(mode, colour), "TIFF")
    return whole.replace(struct.pack("<HH", tag, 3), struct.pack("<HH", 65000, 3))


def without_its_pixels():
    """A TIFF whose only strip lies nowhere: its writer left out what is empty."""
    whole = encode(new("RGB", 9), "TIFF")
    place = whole.index(struct.pack("<HHI", 273, 4, 1)) + 8
    return whole[:place] + bytes(4) + whole[place + 4 :]


def small_palette():
    """A TIFF whose palette has 0..255 where 0..65535 is meant."""
    image = new("P", 200)
    image.putpalette([value for value in range(256) for _ in "RGB"])
    right = struct.pack("<768H", *3 * [*range(0, 65536, 256)])  # of two bytes the second
    return encode(image, "TIFF").replace(right, right[1:] + b"\0")


# By `avifenc --clap 4,1,4,1,0,1,0,1` of 8 x 8 red pixels: the 4 x 4 in the middle are to be seen.
AVIF_WITH_CLEAN_APERTURE = b64decode("""
AAAAIGZ0eXBhdmlmAAAAAGF2aWZtaWYxbWlhZk1BMUEAAAEbbWV0YQAAAAAAAAAoaGRscgAAAAAAAAAAcGljdAAAAAAAAAAA
AAAAAGxpYmF2aWYAAAAADnBpdG0AAAAAAAEAAAAeaWxvYwAAAABEAAABAAEAAAABAAABQwAAACAAAAAoaWluZgAAAAAAAQAA
ABppbmZlAgAAAAABAABhdjAxQ29sb3IAAAAAk2lwcnAAAABzaXBjbwAAABRpc3BlAAAAAAAAAAgAAAAIAAAAEHBpeGkAAAAA
AwgICAAAAAxhdjFDgSAAAAAAABNjb2xybmNseAABAA0ABoAAAAAoY2xhcAAAAAQAAAABAAAABAAAAAEAAAAAAAAAAQAAAAAA
AAABAAAAGGlwbWEAAAAAAAAAAQABBQECgwSFAAAAKG1kYXQSAAoIOAi/YQENBpAyEhZABhhhhAAAeUzcPVMfYxBeqA==
""")


@pytest.mark.parametrize(
    ("content", "colour"),
    [
        (encode(new("1", 1), "PNG"), "white"),
        (encode(new("1", 1), "BMP"), "white"),
        (encode(new("RGBA", (0, 0, 255, 51)), "PNG"), (204, 204, 255)),
        (encode(new("CMYK", (0, 255, 255, 0)), "JPEG"), "red"),
        (encode(new("LAB", (128, 128, 128)), "TIFF"), (119, 119, 119)),
        (bmp_of_16_bits(), "blue"),
        (encode(new("1", 1), "GIF", save_all=True, append_images=[new("1", 0)]), "white"),
    ],
)
def test_every_kind_of_image_becomes_rgb(tmp_path, content, colour):
    (tmp_path / "image.jpg").write_bytes(content)  # whatever the name says
    found = decode(tmp_path / "image.jpg", 18)
    expected = v2.functional.pil_to_tensor(new("RGB", colour))
    assert found.shape == (3, 20, 20) and (found.int() - expected).abs().max() <= 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (encode(grey(np.float32), "TIFF"), "more than 8 bits"),
        (encode(grey(np.uint16), "PNG"), "more than 8 bits"),
        (b"P6 20 20 65535\n" + bytes(2400), "more than 8 bits"),
        (b"P6 20 20 256\n" + bytes(2400), "more than 8 bits"),
        (b"P3 2 2 300 " + b"9 " * 12, "more than 8 bits"),
        (encode(new("RGB", 9), "TIFF", tiffinfo={254: 1}), "its NewSubfileType is 1"),
        (encode(new("RGB", 9), "TIFF", tiffinfo={255: 2}), "its SubfileType is 2"),
        (encode(new("RGB", 9), "TIFF", tiffinfo={284: 2}), "its PlanarConfiguration is 2"),
        (encode(new("RGB", 9), "TIFF", tiffinfo={266: 2}), "its FillOrder is 2"),
        (without_its_pixels(), "parts of it are missing"),
        (without_tag(338, "RGBA", 1), "what its fourth channel is"),
        (small_palette(), "its palette is of 8 bits"),
        (encode(new("YCbCr", 9), "TIFF"), "YCbCr without compression"),
        (without_tag(262), "whether 0 is black or white"),
        (encode(new("CMYK", 9), "JPEG").replace(b"Adobe", b"other"), "colours are inverted"),
        (bmp_of_two_colours(), "two colours are read wrongly"),
        (bmp_of_one_clear_bit(), "one bit of transparency"),
        (gif_with_a_small_frame(), "covers only a part"),
        (AVIF_WITH_CLEAN_APERTURE, "only a part of it is to be seen"),
        (clear_bmp(), "all of it is transparent"),
        (encode(new("RGBA", (9, 9, 9, 0)), "PNG"), "all of it is transparent"),
        (encode(new("L", 9), "PNG", transparency=9), "all of it is transparent"),
        (b"P6 40000 40000 255\n", "1600000000 pixels"),
    ],
)
def test_what_cannot_be_read_is_named_with_the_reason(tmp_path, content, reason):
    path = tmp_path / "image.jpg"
    path.write_bytes(content)
    with refused(f"{path} .*{reason}.*; mend or remove"):
        read_image(path, 16)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "image.png")
    with refused("a pipe, no file"):
        decode(tmp_path / "image.png", 16)


def test_a_fault_of_the_library_is_not_told_as_one_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "_refuse_misread", lambda image: image.no_such_thing)
    new("RGB", "red").save(tmp_path / "image.png")
    with pytest.raises(AttributeError, match="no_such_thing"):
        read_image(tmp_path / "image.png", 16)


def noise(size, seed=0):
    """A smooth random colour image."""
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def test_evaluation_sees_what_timm_shows(tmp_path):
    path = tmp_path / "image.png"
    noise((300, 200)).save(path)
    standard = create_transform(
        (3, 224, 224), is_training=False, interpolation="bicubic", crop_pct=0.9
    )
    torch.testing.assert_close(read_image(str(path), 224), standard(Image.open(path)))


def turned():
    """An image whose left half is light, stored turned."""
    upright = Image.new("L", (60, 40))
    upright.paste(200, (0, 0, 30, 40))
    return upright.transpose(Image.Transpose.ROTATE_90)


def exif_turned():
    """That it is stored so."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return exif


def assert_upright(path):
    """Of an image ``turned`` that is stored in ``path``."""
    found = decode(path, 36)
    assert found[:, :, :18].min() > 197 and found[:, :, 22:].max() < 3


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
def test_an_image_that_is_stored_turned_is_upright(tmp_path, ending):
    path = tmp_path / f"image.{ending}"
    turned().save(path, exif=exif_turned())
    assert_upright(path)


def test_how_an_image_is_turned_may_be_a_byte(tmp_path):
    tag = struct.pack("<HHHIHHI", 1, ExifTags.Base.Orientation, 1, 1, 6, 0, 0)  # one, a byte: 6
    path = tmp_path / "image.jpg"
    turned().save(path, exif=b"Exif\0\0II*\0" + struct.pack("<I", 8) + tag)
    assert_upright(path)


XMP = """<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">
<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#" xmlns:tiff="{}" {}
</rdf:RDF></x:xmpmeta><?xpacket end="w"?>"""
TIFF = "http://ns.adobe.com/tiff/1.0/"
ORIENTED = '<tiff:Orientation xml:lang="en">\n{} </tiff:Orientation>'
PLACED = """<p:Pantry xmlns:p="http://ns.adobe.com/xap/1.0/mm/"><rdf:Bag><rdf:li><rdf:Description>
<tiff:Orientation>6</tiff:Orientation></rdf:Description></rdf:li></rdf:Bag></p:Pantry>"""


@pytest.mark.parametrize(
    ("namespace", "said", "upright"),
    [
        (TIFF, "><rdf:Description tiff:Orientation='6'/>", True),
        (TIFF, '><rdf:Description tiff:Orientation = "6"/>', True),
        (TIFF, f'xmlns:t="{TIFF}"><rdf:Description t:Orientation="6"/>', True),
        (TIFF, f"><rdf:Description>{ORIENTED.format(6)}</rdf:Description>", True),
        # Of a picture that was placed in this one, before or without its own
        (TIFF, f"><rdf:Description>{PLACED}{ORIENTED.format(1)}</rdf:Description>", False),
        (TIFF, f"><rdf:Description>{PLACED}</rdf:Description>", False),
        ("other", "><rdf:Description tiff:Orientation='6'/>", False),
        (TIFF, "><rdf:Description tiff:Orientation='6'>", False),  # no whole XML
    ],
)
def test_xmp_says_how_an_image_is_turned_where_exif_does_not(tmp_path, namespace, said, upright):
    path = tmp_path / "image.jpg"
    turned().save(path, xmp=XMP.format(namespace, said).encode() + b"\0")
    if upright:
        assert_upright(path)
    else:
        assert decode(path, 36)[:, :2].max() < 3  # dark above


TURNED_XMP = XMP.format(TIFF, "><rdf:Description tiff:Orientation='6'/>").encode()


def test_what_stands_behind_the_pixels_of_a_png_counts(tmp_path):
    path, exif = tmp_path / "image.png", Image.Exif()
    exif[ExifTags.Base.Make] = "camera"
    turned().save(path, exif=exif)
    text = b"iTXtXML:com.adobe.xmp" + bytes(5) + TURNED_XMP
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    whole, end = path.read_bytes(), 12  # bytes of the last chunk
    path.write_bytes(whole[:-end] + chunk + whole[-end:])
    assert_upright(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("APP1", exif_turned().tobytes()),
        ("APP1", b"http://ns.adobe.com/xap/1.0/\0" + TURNED_XMP),
        ("xmp", TURNED_XMP),
    ],
)
def test_what_old_programs_wrote_into_a_png_counts(tmp_path, name, content):
    text = PngInfo()
    text.add_text("Raw profile type exif", "no number")
    words = f"\ngeneric profile\n{len(content)}\n{content.hex()}\n"
    text.add_text(f"Raw profile type {name}", words)
    path = tmp_path / "image.png"
    turned().save(path, pnginfo=text)
    assert_upright(path)


@pytest.fixture
def folder(tmp_path):
    """13 JPEGs of random sizes in two classes under train/."""
    for name, count in (("ants", 6), ("bees", 7)):
        (tmp_path / "train" / name).mkdir(parents=True)
        for index in range(count):
            image = noise((120, 90 + 10 * index), index)
            image.save(tmp_path / "train" / name / f"{index}.jpg")
    return tmp_path / "train"


def load(folder):
    return images.load({"all": folder_images(folder, 28)})[0]["all"]


def test_files_and_tensors_give_the_same_batches(folder, monkeypatch):
    monkeypatch.setattr(images, "worker_count", lambda: 2)
    monkeypatch.setattr(images, "MEMORY_LIMIT", 13 * 3 * 31**2)  # of squares of 28 / 0.9 pixels
    in_memory = load(folder)
    monkeypatch.setattr(images, "MEMORY_LIMIT", 13 * 3 * 31**2 - 1)
    on_disk = load(folder)
    assert in_memory.images.shape == (13, 3, 31, 31) and on_disk.images.root == folder
    for seed in (None, 1):
        pairs = zip(loader(in_memory, 4, seed), loader(on_disk, 4, seed), strict=True)
        for (expected, labels), (found, found_labels) in pairs:
            assert torch.equal(expected, found) and torch.equal(labels, found_labels)
    chosen = [data.select(torch.tensor([12, 0])) for data in (in_memory, on_disk)]
    assert torch.equal(chosen[0][1][0], chosen[1][1][0])
    assert chosen[0].labels.tolist() == chosen[1].labels.tolist() == [1, 0]
    (folder / "ants" / "4.jpg").unlink()
    with refused(r"ants/4\.jpg"):
        list(loader(on_disk, 4))


@pytest.mark.parametrize("limit", [2**30, 0], ids=["in memory", "on disk"])
def test_augmentation_follows_the_seed_and_is_of_each_image_by_itself(folder, monkeypatch, limit):
    monkeypatch.setattr(images, "MEMORY_LIMIT", limit)
    monkeypatch.setattr(images, "worker_count", lambda: 2)
    data = folder_training_data(folder.parent, replace(COLOUR, image_size=28), seed=0)

    def epoch(seed):
        torch.manual_seed(seed)
        return torch.cat([batch for batch, _ in loader(data.train, 4, shuffle_seed=seed)])

    first = epoch(1)
    assert torch.equal(first, epoch(1)) and not torch.equal(first, epoch(2))
    same = data.train.select(torch.zeros(4, dtype=torch.long))  # an image four times
    torch.manual_seed(1)
    [halves] = zip(*(loader(same, 4, 1, (rank, 2)) for rank in (0, 1)), strict=True)
    assert not torch.equal(halves[0][0], halves[1][0])  # of two processes
    alike = torch.arange(31, dtype=torch.uint8).expand(32, 3, 31, 31)
    assert len(data.train.transform(alike).unique(dim=0)) > 20
    assert len(data.validation.transform(alike).unique(dim=0)) == 1
