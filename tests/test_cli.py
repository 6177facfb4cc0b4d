"""The command line as a new user tries it: a folder of one's own images, then the faults it may have."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from avit_lib import cli
from avit_lib.cli import main
from avit_lib.config import PROFILES, Halting, Run, Training, data_dir, get_profile
from avit_lib.data import training_data
from avit_lib.reporting import Results


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


def test_a_model_is_taught_by_another_on_images_of_the_user(folder, trained, tmp_path, capsys):
    fit = ["fit", "--profile", "smoke", "--data-dir", str(folder), "--epochs", "1"]
    assert main([*fit, "--model", "DeiT", "--output", str(tmp_path / "deit")]) == 0
    deit, taught = str(tmp_path / "deit" / "last.safetensors"), tmp_path / "taught"
    fit += ["--model", "taught", "--ckpt", deit, "--output", str(taught)]
    assert main(fit) == 2
    assert "learns from run 'deit': name its weights by --teacher" in capsys.readouterr().err
    assert main([*fit, "--teacher", deit]) == 0
    assert "train_distillation" in (taught / "history.csv").read_text().splitlines()[0]
    assert main([*fit, "--teacher", str(trained / "last.safetensors")]) == 2  # is another teacher
    assert "holds another run" in capsys.readouterr().err
    assert main([*fit[:-1], str(tmp_path / "other"), "--model", "avit", "--teacher", deit]) == 2
    assert "has no teacher" in capsys.readouterr().err


def test_test_reports_the_figures(trained, folder, capsys):
    checkpoint = trained / "last.safetensors"
    assert main(["test", "--profile", "smoke", "--ckpt", str(checkpoint), "--data-dir", str(folder)]) == 0
    shown = capsys.readouterr()
    printed = json.loads(shown.out)
    assert printed["images"] == 8 and "| images | accuracy |" in shown.err
    assert 0 <= printed["accuracy"] <= 1 and 1 <= printed["mean_depth"] <= 4
    assert json.loads((trained / "last_test.json").read_text())["accuracy"] == printed["accuracy"]


def test_a_checkpoint_of_the_other_kind_is_refused(trained, folder, capsys):
    checkpoint = str(trained / "last.safetensors")
    command = ["test", "--profile", "smoke", "--ckpt", checkpoint, "--data-dir", str(folder), "--model"]
    assert main([*command, "DeiT"]) == 2
    assert "is of kind AViT, not DeiT" in capsys.readouterr().err
    assert main([*command, "avit"]) == 0


def test_without_a_checkpoint_the_profile_s_is_taken(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("AVIT_RESULTS", str(tmp_path))
    assert main(["visualize", "--profile", "smoke", "--images", "0", "--output", str(tmp_path / "a.png")]) == 2
    assert "A-ViT fine-tuned has not been trained in profile smoke" in capsys.readouterr().err
    assert main(["fit", "--profile", "smoke", "--model", "DeiT"]) == 0
    capsys.readouterr()
    assert main(["test", "--profile", "smoke", "--model", "DeiT", "--batch-size", "64"]) == 0
    assert json.loads(capsys.readouterr().out)["mean_depth"] == 4
    assert (tmp_path / "smoke" / "checkpoints" / "deit" / "last_test.json").is_file()


def test_visualize_draws_images_of_the_user(trained, folder, tmp_path):
    output = tmp_path / "new" / "halting.png"
    images = [str(path) for path in sorted((folder / "test" / "dark").iterdir())[:3]]
    command = ["visualize", "--ckpt", str(trained / "last.safetensors"), "--output", str(output), "--images", *images]
    assert main(command) == 0
    with Image.open(output) as picture:
        assert min(picture.size) > 100


def test_numbers_of_images_are_those_of_the_folder_or_refused(trained, folder, tmp_path, capsys):
    """Of the profile's test images, whose classes are others, none is drawn."""
    output = tmp_path / "halting.png"
    command = ["visualize", "--profile", "smoke", "--ckpt", str(trained / "last.safetensors"), "--output", str(output)]
    assert main([*command, "--images", "0"]) == 2
    assert "other classes than those of the profile smoke; add --data-dir" in capsys.readouterr().err
    assert not output.exists()
    assert main([*command, "--data-dir", str(folder), "--images", "0", "7"]) == 0
    assert output.is_file()
    assert main([*command, "--data-dir", str(folder), "--images", "8"]) == 2
    assert "numbers go from 0 to 7" in capsys.readouterr().err


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
        (["test", "--ckpt", "none.safetensors", "--batch-size", "0"], "--batch-size must be positive"),
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


@pytest.fixture
def pool(tmp_path, monkeypatch):
    """A profile on a small Caltech-101: 14 images of each of two classes."""
    for name, colour in (("ant", "red"), ("bee", "blue")):
        folder = tmp_path / "data" / "caltech101" / "101_ObjectCategories" / name
        folder.mkdir(parents=True)
        for number in range(14):
            Image.new("RGB", (30, 20), colour).save(folder / f"image_{number:04d}.jpg")
    run = Run("avit", "A-ViT", "avit_tiny_patch16_224", "random", Training(1, 1e-3, batch_size=4), Halting())
    profile = replace(get_profile("caltech101"), name="pool", runs=(run,), train_per_class=4, test_per_class=4)
    monkeypatch.setitem(PROFILES, "pool", profile)
    monkeypatch.setenv("AVIT_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("AVIT_RESULTS", str(tmp_path / "results"))
    return profile


def test_data_compares_with_the_split_on_record(pool, tmp_path, capsys):
    command = ["data", "--profile", "pool"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "8 training, 10 validation, 8 test images, 2 classes" in printed and "the same as" not in printed
    Results(pool, 0, "a test").metrics(training_data(pool, 0).split, "split")
    assert main(command) == 0
    assert "the same as in" in capsys.readouterr().out
    assert main([*command, "--seed", "1"]) == 0  # of which there is no record
    capsys.readouterr()
    next((tmp_path / "data").rglob("image_0003.jpg")).unlink()
    assert main(command) == 2
    assert "not those on record" in capsys.readouterr().err


def test_a_checkpoint_is_tested_on_the_split_it_was_trained_on(pool, tmp_path, monkeypatch, capsys):
    assert main(["fit", "--profile", "pool", "--seed", "3", "--output", str(tmp_path / "run")]) == 0
    seeds = []
    test_data = cli.test_data
    monkeypatch.setattr(cli, "test_data", lambda profile, seed: seeds.append(seed) or test_data(profile, seed))
    assert main(["test", "--profile", "pool", "--ckpt", str(tmp_path / "run" / "last.safetensors")]) == 0
    assert seeds == [3]
