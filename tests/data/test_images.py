"""Images of every kind become the same bytes; what cannot be read is named; on disk or in memory,
batches are equal.
"""

import struct

import numpy as np
import pytest
import torch
from conftest import random_images
from msgspec.structs import replace
from PIL import ExifTags, Image
from small_sets import COLOUR
from timm.data import create_transform
from torchvision.transforms import v2

from avit_lib.data import folder_training_data, images, loader, read_image
from avit_lib.data.datasets import folder_images
from avit_lib.data.images import ImageFiles, batch_transform, decode, load
from avit_lib.errors import UserError


def noise(size, seed=0):
    """A smooth random colour image [height, width, 3]."""
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize(size, Image.Resampling.BICUBIC))


def write_folder(root, split="train", counts=(("ants", 6), ("bees", 7))):
    """JPEGs of random sizes, one folder a class; returns their paths."""
    paths = []
    for name, count in counts:
        (root / split / name).mkdir(parents=True)
        for index in range(count):
            paths.append(root / split / name / f"{index}.jpg")
            Image.fromarray(noise((90 + 10 * index, 120), index)).save(paths[-1])
    return paths


def loaded(root, image_size):
    """The images that ``write_folder`` wrote."""
    return load(folder_images(root / "train", image_size))[0]


def test_evaluation_sees_what_timm_shows(tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(noise((300, 200))).save(path)
    standard = create_transform(
        (3, 224, 224), is_training=False, interpolation="bicubic", crop_pct=0.9
    )
    expected = standard(Image.open(path))
    torch.testing.assert_close(read_image(path, 224), expected)


def test_grey_becomes_colour(tmp_path):
    Image.new("L", (20, 20), 77).save(tmp_path / "grey.png")
    assert decode(tmp_path / "grey.png", 16).unique().tolist() == [77]
    assert decode(tmp_path / "grey.png", 16).shape == (3, 17, 17)


def palette(transparent):
    image = Image.new("P", (20, 20), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    if transparent:
        image.info["transparency"] = 1
    return image


@pytest.mark.parametrize(
    ("name", "image", "colour"),
    [
        ("palette.png", palette(transparent=False), (10, 200, 30)),
        ("transparent.gif.png", palette(transparent=True), (255, 255, 255)),
        ("cmyk.tif.png", None, (255, 0, 0)),
        (
            "bits16.png",
            Image.fromarray(np.full((20, 20), 128 * 257, dtype=np.uint16)),
            (128, 128, 128),
        ),
        ("bits1.png", Image.new("1", (20, 20), 1), (255, 255, 255)),
        ("alpha.png", Image.new("RGBA", (20, 20), (0, 0, 255, 0)), (255, 255, 255)),
        ("half.png", Image.new("RGBA", (20, 20), (0, 0, 255, 51)), (204, 204, 255)),
        ("grey_alpha.png", Image.new("LA", (20, 20), (60, 255)), (60, 60, 60)),
    ],
)
def test_every_mode_is_converted(tmp_path, name, image, colour):
    path = tmp_path / name
    if image is None:
        Image.new("CMYK", (20, 20), (0, 255, 255, 0)).save(path, "TIFF")
    else:
        image.save(path, "PNG")
    pixels = decode(path, 16)
    assert pixels[:, 5, 5].tolist() == list(colour)
    assert (pixels == pixels[:, :1, :1]).all()


def test_a_cmyk_jpeg_is_converted(tmp_path):
    Image.new("CMYK", (20, 20), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg")
    red, green, blue = decode(tmp_path / "cmyk.jpg", 16)[:, 8, 8].tolist()
    assert red > 200 and green < 60 and blue < 60


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_that_is_stored_turned_is_upright(tmp_path, orientation, ending):
    upright = np.zeros((40, 60, 3), dtype=np.uint8)
    upright[:20, :30], upright[:20, 30:], upright[20:, :30] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    turn = Image.Transpose  # what undoes what the tag asks for, by the definition of the tag
    stored = [
        None,
        turn.FLIP_LEFT_RIGHT,
        turn.ROTATE_180,
        turn.FLIP_TOP_BOTTOM,
        turn.TRANSPOSE,
        turn.ROTATE_90,
        turn.TRANSVERSE,
        turn.ROTATE_270,
    ][orientation - 1]
    image = Image.fromarray(upright)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = tmp_path / f"image.{ending}"
    (image if stored is None else image.transpose(stored)).save(path, exif=exif)
    image.save(tmp_path / "upright.png")
    expected = decode(tmp_path / "upright.png", 16).int()
    found = decode(path, 16).int()
    corners = [(2, 2), (2, 13), (13, 2), (13, 13)]
    assert all((found - expected)[:, row, column].abs().max() < 60 for row, column in corners)
    whole = read_image(path, 16, transform=v2.functional.pil_to_tensor)
    assert whole.shape == (3, 40, 60)


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000)])
def test_of_a_very_long_image_the_middle_is_seen(tmp_path, size):
    pixels = np.zeros((20_000, 1, 3), dtype=np.uint8)
    pixels[9_990:10_010] = 200
    image = Image.fromarray(pixels)
    if size[1] == 1:
        image = image.transpose(Image.Transpose.ROTATE_90)
    image.save(tmp_path / "long.png")
    assert decode(tmp_path / "long.png", 224).unique().tolist() == [200]
    seen = read_image(tmp_path / "long.png", 16, transform=v2.functional.pil_to_tensor)
    assert seen.shape[1] * seen.shape[2] == images.WIDEST


def test_an_image_of_too_many_pixels_is_refused(tmp_path):
    (tmp_path / "bomb.png").write_bytes(b"P6 40000 40000 255\n")
    with pytest.raises(UserError, match="1600000000 pixels") as error:
        read_image(tmp_path / "bomb.png", 16)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("ending", ["png", "tif"])
@pytest.mark.parametrize(
    ("brightest", "expected"),
    [(65535, 128), (40000, 78), (4095, 128), (3000, 93), (255, 128), (0, 0)],
)
def test_how_many_of_16_bits_are_used(tmp_path, ending, brightest, expected):
    """The fewest of 8, 12 and 16 that hold the brightest pixel; most pixels are half as bright."""
    pixels = np.full((20, 20), round(brightest / 2), dtype=np.uint16)
    pixels[0, 0] = brightest
    Image.fromarray(pixels).save(tmp_path / f"grey.{ending}")
    found = decode(tmp_path / f"grey.{ending}", 20)[0, 10, 10].item()
    assert abs(found - expected) <= 1


def tiff(bits, colours, data, size=20):
    """An uncompressed TIFF of size x size pixels of so many bits."""
    tags = {
        256: size,
        257: size,
        258: bits,
        259: 1,
        262: 2 if colours == 3 else 1,
        273: 200,
        277: colours,
        278: size,
        279: len(data),
    }
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    if colours == 3:
        one, three = struct.pack("<HHII", 258, 4, 1, bits), struct.pack("<HHII", 258, 3, 3, 180)
        entries = entries.replace(one, three)
    head = struct.pack("<4sIH", b"II*\0", 8, len(tags)) + entries + bytes(4)
    return head.ljust(180, b"\0") + struct.pack("<HHH", bits, bits, bits).ljust(20, b"\0") + data


def test_a_tiff_that_tells_12_bits(tmp_path):
    (tmp_path / "dark.tif").write_bytes(tiff(12, 1, bytes.fromhex("0c80c8") * 200))  # all 200
    assert decode(tmp_path / "dark.tif", 20).unique().tolist() == [12]


def test_16_bit_colours_that_would_be_black_are_refused(tmp_path):
    for value, name in ((4000, "dark.tif"), (40_000, "bright.tif")):
        (tmp_path / name).write_bytes(tiff(16, 3, struct.pack("<H", value) * 1200))
    with pytest.raises(UserError, match="12 bits of 16"):
        decode(tmp_path / "dark.tif", 20)
    assert decode(tmp_path / "bright.tif", 20).unique().tolist() == [40_000 // 256]


@pytest.mark.parametrize("value", [70_000, -5])
def test_whole_numbers_beyond_16_bits_are_refused(tmp_path, value):
    Image.fromarray(np.full((20, 20), value, dtype=np.int32)).save(tmp_path / "deep.tif")
    with pytest.raises(UserError, match="unknown range"):
        decode(tmp_path / "deep.tif", 16)


def test_of_an_animation_the_first_image_counts(tmp_path):
    frames = [Image.new("RGB", (20, 20), colour) for colour in ((250, 0, 0), (0, 0, 250))]
    for ending in ("gif", "webp", "png"):
        path = tmp_path / f"animated.{ending}"
        frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
        assert decode(path, 16)[:, 8, 8].tolist() == [250, 0, 0]


def test_lab_becomes_rgb(tmp_path):
    Image.new("LAB", (20, 20), (128, 128, 128)).save(tmp_path / "lab.tif")
    assert decode(tmp_path / "lab.tif", 16)[:, 8, 8].tolist() == [119, 119, 119]


def test_what_is_no_picture_is_not_opened_whatever_its_name(tmp_path):
    program = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    (tmp_path / "program.jpg").write_text(program)
    with pytest.raises(UserError, match="not an image"):
        read_image(tmp_path / "program.jpg", 16)


def damage(paths):
    """Of 13 images, seven that cannot be read, each in a way of its own."""
    whole = paths[0].read_bytes()
    contents = [
        b"",
        whole[: len(whole) // 2],
        b"text named .jpg",
        whole[:-200],
        b"\x89PNG\r\n\x1a\n" + whole,
        whole[:3],
    ]
    for path, content in zip(paths, contents, strict=False):
        path.write_bytes(content)
    Image.fromarray(np.zeros((9, 9), dtype=np.float32)).save(paths[6], "TIFF")
    return paths[:7]


@pytest.mark.parametrize("limit", [2**30, 0], ids=["in memory", "on disk"])
def test_all_damaged_files_are_found_before_training(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(images, "MEMORY_LIMIT", limit)
    broken = damage(write_folder(tmp_path))
    with pytest.raises(UserError) as error:
        loaded(tmp_path, 16)
    message = str(error.value)
    assert (
        message.startswith("7 files cannot be read as images")
        and "and 2 more" in message
        and "\n" not in message
    )
    assert [str(path) in message for path in broken] == [True] * 5 + [False] * 2
    for path in broken[1:]:
        path.unlink()
    Image.new("RGB", (20, 20)).save(broken[0])
    assert len(loaded(tmp_path, 16)) == 7


@pytest.mark.parametrize("number", range(7))
def test_a_damaged_file_on_its_own_is_named(tmp_path, number):
    path = damage(write_folder(tmp_path))[number]
    with pytest.raises(UserError, match="1 file cannot be read") as error:
        read_image(path, 16)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("image_size", [28, 96])
def test_files_and_tensors_give_the_same_batches(tmp_path, monkeypatch, image_size):
    write_folder(tmp_path)
    in_memory = loaded(tmp_path, image_size)
    monkeypatch.setattr(images, "MEMORY_LIMIT", 13 * 3 * 31**2 - 1)
    monkeypatch.setattr(images, "worker_count", lambda: 2)
    on_disk = loaded(tmp_path, image_size)
    assert isinstance(in_memory.images, torch.Tensor) and isinstance(on_disk.images, ImageFiles)
    assert len(in_memory) == len(on_disk) == 13 and in_memory.classes == on_disk.classes
    for seed in (None, 1):
        pairs = list(zip(loader(in_memory, 4, seed), loader(on_disk, 4, seed), strict=True))
        for (expected, labels), (found, found_labels) in pairs:
            assert torch.equal(expected, found) and torch.equal(labels, found_labels)
            assert found.shape[1:] == (3, image_size, image_size)
    chosen = torch.tensor([12, 0, 5])
    assert torch.equal(in_memory[chosen][0], on_disk[chosen][0])
    assert torch.equal(in_memory.select(chosen)[1][0], on_disk.select(chosen)[1][0])
    assert torch.equal(on_disk.select(chosen).labels, in_memory.labels[chosen])
    assert torch.equal(on_disk[12][0], in_memory[12][0]) and on_disk[12][1] == 1


def test_what_fits_is_held_in_memory(tmp_path, monkeypatch):
    write_folder(tmp_path)
    monkeypatch.setattr(images, "MEMORY_LIMIT", 13 * 3 * 31**2)
    assert isinstance(loaded(tmp_path, 28).images, torch.Tensor)
    assert isinstance(loaded(tmp_path, 29).images, ImageFiles)


def test_images_are_decoded_once(tmp_path):
    paths = write_folder(tmp_path)
    data = loaded(tmp_path, 28)
    for path in paths:
        path.unlink()
    assert sum(len(labels) for _, labels in loader(data, 4)) == 13


def test_a_class_without_images_is_named(tmp_path):
    for path in write_folder(tmp_path)[:6]:
        path.unlink()
    with pytest.raises(UserError, match="ants") as error:
        loaded(tmp_path, 16)
    assert "\n" not in str(error.value)


def test_a_file_that_is_lost_later_is_named(tmp_path, monkeypatch):
    paths = write_folder(tmp_path)
    monkeypatch.setattr(images, "MEMORY_LIMIT", 0)
    data = loaded(tmp_path, 28)
    paths[4].unlink()
    with pytest.raises(UserError, match=r"ants/4\.jpg"):
        list(loader(data, 4))


@pytest.mark.parametrize("limit", [2**30, 0], ids=["in memory", "on disk"])
def test_augmentation_follows_the_seed_and_differs_between_epochs(tmp_path, monkeypatch, limit):
    write_folder(tmp_path)
    monkeypatch.setattr(images, "MEMORY_LIMIT", limit)
    monkeypatch.setattr(images, "worker_count", lambda: 2)
    data = folder_training_data(tmp_path, replace(COLOUR, image_size=28), seed=0).train

    def epoch(seed):
        torch.manual_seed(seed)
        return torch.cat([batch for batch, _ in loader(data, 4, shuffle_seed=seed)])

    first, again, other = epoch(1), epoch(1), epoch(2)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_every_image_of_a_batch_is_augmented_by_itself():
    torch.manual_seed(0)
    ramp = torch.arange(248, dtype=torch.uint8).expand(3, 248, 248)
    batch = batch_transform(224, "standard")(ramp.expand(32, 3, 248, 248))
    assert batch.shape == (32, 3, 224, 224) and batch.dtype == torch.float32
    assert len(batch.flatten(1).unique(dim=0)) == 32
    mirrored = (batch[:, 0, 0, 0] > batch[:, 0, 0, -1]).sum().item()
    assert 6 < mirrored < 26


def test_evaluation_cuts_out_the_centre():
    large = torch.zeros(1, 3, 248, 248, dtype=torch.uint8)
    large[:, :, 12:-12, 12:-12] = 255
    assert len(batch_transform(224)(large)[0, 0].unique()) == 1


def test_processors_are_shared_among_processes(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert images.worker_count() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert images.worker_count() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert images.worker_count() == 1


def test_shuffled_batches_follow_their_seed():
    data = random_images(200)

    def order(seed):
        return torch.cat([labels for _, labels in loader(data, 32, shuffle_seed=seed)]).tolist()

    assert order(1) == order(1) != order(2)
    assert len(order(1)) == 192  # the last, smaller batch is left out
    assert torch.equal(torch.cat([labels for _, labels in loader(data, 32)]), data.labels)


@pytest.mark.parametrize("shuffle_seed", [None, 1])
def test_processes_share_every_batch(shuffle_seed):
    data = random_images(70)
    whole = list(loader(data, 16, shuffle_seed))
    for rank in range(3):
        part = list(loader(data, 16, shuffle_seed, share=(rank, 3)))
        for (pixels, labels), (own, own_labels) in zip(whole, part, strict=True):
            assert torch.equal(own, pixels[rank::3]) and torch.equal(own_labels, labels[rank::3])


def test_pictures_that_pillow_reads_wrongly_are_refused(tmp_path):
    inverted = Image.fromarray(np.full((8, 8), 60000, dtype=np.uint16))
    inverted.save(tmp_path / "inverted.tif", tiffinfo={262: 0})
    dark = b"P6 8 8 65535\n" + np.full(8 * 8 * 3, 4080, dtype=">u2").tobytes()
    (tmp_path / "dark.ppm").write_bytes(dark)
    for name, reason in {"inverted.tif": "white as zero", "dark.ppm": "12 bits of 16"}.items():
        with pytest.raises(UserError, match=reason):
            decode(tmp_path / name, 8)


def test_what_is_transparent_in_16_bits_is_white(tmp_path):
    pixels = np.zeros((8, 8), dtype=np.uint16)
    pixels[:, 4:] = 30000
    Image.fromarray(pixels).save(tmp_path / "grey.png", transparency=0)
    found = decode(tmp_path / "grey.png", 8)
    assert (found[:, :, :4] == 255).all() and (found[:, :, 4:] < 200).all()
