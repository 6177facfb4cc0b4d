"""The command line as a new user tries it: a folder of one's own images, then the faults it may have."""

import json

import numpy as np
import pytest
from PIL import Image

from avit_lib.cli import main
from avit_lib.config import data_dir


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of grey JPEGs, bright and dark, of several sizes."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        for label, brightness in (("bright", 150), ("dark", 20)):
            (root / split / label).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(brightness, brightness + 100, (30 + number, 40), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / label / f"{number}.jpg")
    return root


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("run")
    assert main(["fit", "--profile", "smoke", "--data-dir", str(folder), "--output", str(output), "--epochs", "1"]) == 0
    return output


def test_fit_writes_checkpoints_and_history(trained):
    written = {path.name for path in trained.iterdir()}
    assert written == {"best.safetensors", "best.json", "last.safetensors", "last.json", "history.csv"}


def test_test_reports_the_figures(trained, folder, capsys):
    checkpoint = trained / "last.safetensors"
    assert main(["test", "--profile", "smoke", "--ckpt", str(checkpoint), "--data-dir", str(folder)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["images"] == 8
    assert 0 <= printed["accuracy"] <= 1 and 1 <= printed["mean_depth"] <= 4
    assert json.loads((trained / "last_test.json").read_text())["accuracy"] == printed["accuracy"]


def test_visualize_draws_images_of_the_user(trained, folder, tmp_path):
    output = tmp_path / "new" / "halting.png"
    images = [str(path) for path in sorted((folder / "test" / "dark").iterdir())[:3]]
    command = ["visualize", "--ckpt", str(trained / "last.safetensors"), "--output", str(output), "--images", *images]
    assert main(command) == 0
    with Image.open(output) as picture:
        assert min(picture.size) > 100


def test_data_describes_the_split(capsys):
    assert main(["data", "--profile", "smoke"]) == 0
    assert "200 training, 100 validation" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data", "--profile", "imagnet"], "unknown profile 'imagnet'"),
        (["test", "--ckpt", "none.safetensors"], "none.json is missing"),
        (["fit", "--output", "x", "--data-dir", "nowhere"], "nowhere/train holds no images"),
        (["fit", "--output", "x", "--profile", "smoke", "--batch-size", "0"], "--batch-size must be positive"),
        (["fit", "--output", "x", "--profile", "smoke", "--device", "tpu"], "unknown device 'tpu'"),
    ],
)
def test_faults_are_one_line_and_leave_nothing(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("AVIT_DATA", str(data_dir().resolve()))
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not any(tmp_path.iterdir())


def test_a_run_with_other_settings_is_not_overwritten(trained, folder, capsys):
    before = (trained / "last.safetensors").read_bytes()
    command = ["fit", "--profile", "smoke", "--data-dir", str(folder), "--output", str(trained), "--lr", "0.1"]
    assert main(command) == 2
    assert "holds another run" in capsys.readouterr().err
    assert (trained / "last.safetensors").read_bytes() == before


def test_images_that_do_not_exist(trained, capsys, tmp_path):
    command = ["visualize", "--ckpt", str(trained / "last.safetensors"), "--output", str(tmp_path / "a.png")]
    assert main([*command, "--images", "nothing.jpg"]) == 2
    assert "nothing.jpg" in capsys.readouterr().err
