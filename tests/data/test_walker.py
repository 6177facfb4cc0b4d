"""Every image in a folder is found, once; what is none is told; all that can't be read is an
error.
"""

import json
import os

import pytest
from PIL import Image
from small_sets import COLOUR, write_images
from torchvision.datasets.folder import make_dataset

from avit_lib.data import find_images, folder_training_data
from avit_lib.data.datasets import folder_images
from avit_lib.data.images import load
from avit_lib.errors import UserError

ENDINGS = ("jfif", "avif", "gif", "JPEG", "webp", "jpg", "Png", "bmp", "tif", "jp2", "ppm")


def test_what_pillow_reads_is_found_and_read(tmp_path, capsys):
    for ending in ENDINGS:
        (tmp_path / "ants").mkdir(exist_ok=True)
        Image.new("RGB", (20, 20), (200, 200, 200)).save(tmp_path / "ants" / f"image.{ending}")
    data = load(folder_images(tmp_path, 16))[0]
    assert len(data) == len(ENDINGS) and (data.images.int() - 200).abs().max() <= 2
    assert not capsys.readouterr().err


def test_what_is_no_image_is_counted_and_told(tmp_path, capsys):
    write_images(tmp_path, {"ants": 2, ".ipynb_checkpoints": 1, "__MACOSX": 1, "ants/.trash": 1})
    (tmp_path / "ants" / "._00.png").write_text("of a Mac")
    assert folder_images(tmp_path, 16).classes == ("ants",)
    assert f"4 left out of {tmp_path}" in capsys.readouterr().err
    Image.new("RGB", (20, 20)).save(tmp_path / "in_no_class.png")
    for number in range(5):
        (tmp_path / "ants" / f"notes{number}.txt").write_text("no image")
    assert len(folder_images(tmp_path, 16)) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and f"10 left out of {tmp_path}" in line
    assert "ants/notes0.txt" in line and "ants/notes4.txt and 5 more" in line
    assert find_images(tmp_path)[0] == ["ants/00.png", "ants/01.png", "in_no_class.png"]


def test_the_order_is_torchvision_s(tmp_path):
    classes = ("ants", "ants-2", "Bees", "ants 3")
    write_images(tmp_path, dict.fromkeys([*classes, "ants/b", "ants/b/c", "ants/a-b"], 2))
    data = folder_images(tmp_path, 16)
    numbers = {name: number for number, name in enumerate(sorted(classes))}
    expected = make_dataset(str(tmp_path), numbers, (".png",))
    found = [str(tmp_path / name) for name in data.images.names]
    assert list(zip(found, data.labels.tolist(), strict=True)) == expected


def test_links_are_followed_and_every_file_is_taken_once(tmp_path, capsys):
    write_images(tmp_path / "train", {"ants": 2, "bees": 3})
    write_images(tmp_path / "elsewhere", {"more": 2, "wasps": 4})
    links = {
        "train/around": "..",
        "train/ants/loop": "..",
        "train/ants/bees": "../bees",
        "train/ants/again.png": "00.png",
        "train/formicidae": "ants",
        "train/ants/more": "../../elsewhere/more",
        "train/wasps": "../elsewhere/wasps",
        "train/bees/more.png": "../../elsewhere/more/00.png",
        "elsewhere/wasps/back": "../../train",
        "elsewhere/wasps/itself": ".",
    }
    for link, target in links.items():
        (tmp_path / link).symlink_to(target)
    data = folder_images(tmp_path / "train", 16)
    assert data.classes == ("ants", "bees", "wasps")
    real = [os.path.realpath(tmp_path / "train" / name) for name in data.images.names]
    assert len(real) == len(set(real)) == 11
    # One file is linked in two classes.
    assert data.labels.bincount().tolist() in ([4, 3, 4], [3, 4, 4])
    assert "8 left out" in capsys.readouterr().err
    assert sorted(find_images(tmp_path / "train")[0]) == sorted(data.images.names.tolist())


def test_a_link_to_nothing_is_an_error(tmp_path):
    write_images(tmp_path, {"ants": 2})
    (tmp_path / "ants" / "lost.png").symlink_to("nowhere.png")
    with pytest.raises(UserError, match=r"lost\.png \(No such file"):
        load(folder_images(tmp_path, 16))


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    write_images(tmp_path, {"ants": 2, "bees": 2})
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("bees"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"bees cannot be read \(Permission denied\)"):
        find_images(tmp_path)


def test_faults_of_training_and_validation_are_told_together(tmp_path):
    for part in ("train", "val"):
        write_images(tmp_path / part, {"ants": 3, "bees": 3})
        (tmp_path / part / "ants" / "01.png").write_text("no image")
    with pytest.raises(UserError, match="2 files") as error:
        folder_training_data(tmp_path, COLOUR, seed=0)
    for part in ("train", "val"):
        assert str(tmp_path / part / "ants" / "01.png") in str(error.value)


def test_names_that_are_not_utf_8(tmp_path, capsys):
    write_images(tmp_path / "train", {"ants": 3, os.fsdecode(b"caf\xe9s"): 3})
    broken = tmp_path / "train" / "ants" / os.fsdecode(b"\xff.png")
    Image.new("RGB", (20, 20)).save(broken)
    (tmp_path / "train" / "ants" / os.fsdecode(b"\xfe.txt")).write_text("no image")
    data = folder_training_data(tmp_path, COLOUR, seed=0)
    assert len(data.train) + len(data.validation) == 7
    assert json.loads(json.dumps(data.split)) == data.split
    assert r"ants/\udcfe.txt" in capsys.readouterr().err
    broken.write_text("no image")
    with pytest.raises(UserError, match=r"ants/\\udcff\.png"):
        folder_training_data(tmp_path, COLOUR, seed=0)


def test_only_names_that_hide_are_hidden_and_all_are_told(tmp_path, capsys):
    places = ("@eaDirk/x.jpg", "__MACOSX_real/x.jpg", "@eaDir/x.jpg", ".net/x.jpg")
    for place in places:
        (tmp_path / place).parent.mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / place)
    assert find_images(tmp_path)[0] == sorted(places[:2])
    assert "2 left out" in (told := capsys.readouterr().err) and ".net" in told and "@eaDir" in told


def test_a_pipe_that_nobody_fills_is_left_out(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.jpg")
    assert find_images(tmp_path)[0] == []
    assert "pipe.jpg" in capsys.readouterr().err
