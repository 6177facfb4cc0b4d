"""Every image in a folder is found, once; what is none is told; what can't be read is an error."""

import os
import unicodedata

from conftest import refused
from PIL import Image
from small_sets import write_images

from avit_lib.data import find_images
from avit_lib.data.datasets import folder_images
from avit_lib.data.images import load

ENDINGS = ("jfif", "avif", "gif", "JPEG", "webp", "jpg", "Png", "bmp", "tif", "ppm")


def test_what_pillow_reads_is_found_and_read(tmp_path, capsys):
    (tmp_path / "ants").mkdir()
    for ending in ENDINGS:
        Image.new("RGB", (20, 20), (200, 200, 200)).save(tmp_path / "ants" / f"image.{ending}")
    data = load({"all": folder_images(tmp_path, 16)})[0]["all"]
    assert len(data) == len(ENDINGS) and (data.images.int() - 200).abs().max() <= 2
    assert not capsys.readouterr().err


def test_what_is_left_out_is_counted_and_told(tmp_path, capsys):
    hidden = (".ipynb_checkpoints", "__MACOSX", "@eaDir", "ants/.trash")
    write_images(tmp_path, dict.fromkeys(("ants", "__MACOSX_real", *hidden), 2))
    (tmp_path / "ants" / "._\n.png").write_text("of a Mac")
    Image.new("RGB", (20, 20)).save(tmp_path / "in_no_class.png")
    (tmp_path / "ants" / os.fsdecode(b"\xfe.txt")).write_text("no image")
    assert folder_images(tmp_path, 16).classes == ("__MACOSX_real", "ants")
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and f"7 left out of {tmp_path}" in line
    assert line.endswith(r"ants/._ .png, ants/.trash and 2 more" + "\n")
    assert find_images(tmp_path)[0][-1] == "in_no_class.png"  # where there are no classes
    for number in range(2):
        (tmp_path / "ants" / f"image_000{number}.png").unlink()
    with refused(f"{tmp_path} holds no images .*none in ants"):
        folder_images(tmp_path, 16)


def test_a_class_is_the_same_however_its_accents_are_written(tmp_path):
    one, other = (
        [unicodedata.normalize(form, name) for name in ("café", "thé")] for form in ("NFC", "NFD")
    )
    assert one != other
    write_images(tmp_path, dict.fromkeys(other, 2))
    for classes, labels in (((), [0, 0, 1, 1]), (one, [0, 0, 1, 1]), (other[::-1], [1, 1, 0, 0])):
        assert folder_images(tmp_path, 16, classes).labels.tolist() == labels
    assert folder_images(tmp_path, 16).classes == tuple(one)


def test_links_are_followed_and_every_file_is_taken_once(tmp_path, capsys):
    write_images(tmp_path / "train", {"ants": 2, "bees": 3})
    write_images(tmp_path / "elsewhere", {"more": 2, "wasps": 4})
    links = {
        "train/ants/loop": "..",
        "train/ants/bees": "../bees",
        "train/ants/again.png": "image_0000.png",
        "train/ants/more": "../../elsewhere/more",
        "train/wasps": "../elsewhere/wasps",
        "train/bees/more.png": "../../elsewhere/more/image_0000.png",
        "elsewhere/wasps/back": "../../train",
    }
    for link, target in links.items():
        (tmp_path / link).symlink_to(target)
    data = folder_images(tmp_path / "train", 16)
    assert data.classes == ("ants", "bees", "wasps")
    real = {os.path.realpath(tmp_path / "train" / name) for name in data.images.names}
    assert len(real) == len(data) == 11
    # One file is linked in two classes.
    assert data.labels.bincount().tolist() in ([4, 3, 4], [3, 4, 4])
    assert "5 left out" in capsys.readouterr().err
