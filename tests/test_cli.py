"""The command line as a new user tries it: a folder of one's own images, then the faults it may
have.
"""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from avit_lib import data
from avit_lib.__main__ import run
from avit_lib.cli import main
from avit_lib.study import get_profile
from avit_lib.study.results import Results
from avit_lib.training import read_json, write_json


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of grey JPEGs, bright and dark, of several sizes."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        for label, brightness in (("bright", 150), ("dark", 20)):
            (root / split / label).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(
                    brightness, brightness + 100, (30 + number, 40), dtype=np.uint8
                )
                Image.fromarray(pixels).save(root / split / label / f"{number}.jpg")
    return root


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("run")
    assert (
        main(
            [
                "fit",
                "--profile",
                "smoke",
                "--data-dir",
                str(folder),
                "--output",
                str(output),
                "--epochs",
                "1",
            ]
        )
        == 0
    )
    return output


def test_fit_writes_checkpoints_and_history(trained):
    written = {path.name for path in trained.iterdir()}
    assert written == {
        "best.safetensors",
        "best.json",
        "last.safetensors",
        "last.json",
        "history.csv",
    }


def test_a_model_is_taught_by_another_on_images_of_the_user(folder, trained, tmp_path, capsys):
    fit = ["fit", "--profile", "smoke", "--data-dir", str(folder), "--epochs", "1"]
    assert main([*fit, "--model", "DeiT", "--output", str(tmp_path / "deit")]) == 0
    deit, taught = str(tmp_path / "deit" / "last.safetensors"), tmp_path / "taught"
    learn = [*fit, "--model", "deit_longer", "--ckpt", deit, "--output", str(taught)]
    assert main(learn) == 2
    assert "learns from run 'deit': name its weights by --teacher" in capsys.readouterr().err
    assert main([*learn, "--teacher", deit]) == 0
    assert "train_distillation" in (taught / "history.csv").read_text().splitlines()[0]
    assert main([*learn, "--teacher", str(trained / "last.safetensors")]) == 2  # is another teacher
    assert "holds another run" in capsys.readouterr().err
    assert (
        main([*fit, "--model", "avit", "--output", str(tmp_path / "other"), "--teacher", deit]) == 2
    )
    assert "has no teacher" in capsys.readouterr().err


def test_test_reports_the_figures(trained, folder, capsys):
    checkpoint = trained / "last.safetensors"
    assert (
        main(["test", "--profile", "smoke", "--ckpt", str(checkpoint), "--data-dir", str(folder)])
        == 0
    )
    shown = capsys.readouterr()
    printed = json.loads(shown.out)
    assert printed["images"] == 8 and "| images | accuracy |" in shown.err
    assert 0 <= printed["accuracy"] <= 1 and 1 <= printed["mean_depth"] <= 12
    assert json.loads((trained / "last_test.json").read_text())["accuracy"] == printed["accuracy"]


def test_a_checkpoint_of_the_other_kind_is_refused(trained, folder, capsys):
    checkpoint = str(trained / "last.safetensors")
    command = [
        "test",
        "--profile",
        "smoke",
        "--ckpt",
        checkpoint,
        "--data-dir",
        str(folder),
        "--model",
    ]
    assert main([*command, "DeiT"]) == 2
    assert "was trained as avit, not DeiT" in capsys.readouterr().err
    assert main([*command, "avit"]) == 0


def test_without_a_checkpoint_the_profile_s_is_taken(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("AVIT_RESULTS", str(tmp_path))
    assert (
        main(
            [
                "visualize",
                "--profile",
                "smoke",
                "--images",
                "0",
                "--output",
                str(tmp_path / "a.png"),
            ]
        )
        == 2
    )
    assert (
        "A-ViT halting trained has not been trained to the end in profile smoke"
        in capsys.readouterr().err
    )
    assert (
        main(["fit", "--profile", "smoke", "--model", "deit_longer"]) == 0
    )  # starts from DeiT, trained first
    capsys.readouterr()
    assert main(["test", "--profile", "smoke", "--model", "DeiT", "--batch-size", "64"]) == 0
    assert json.loads(capsys.readouterr().out)["mean_depth"] == 12
    deit = tmp_path / "smoke" / "checkpoints" / "deit"
    assert (deit / "last_test.json").is_file()
    write_json(
        deit / "last.json", read_json(deit / "last.json") | {"epoch": 1}
    )  # of two: it was interrupted
    assert main(["test", "--profile", "smoke", "--model", "DeiT"]) == 2
    assert "DeiT fine-tuned has not been trained to the end" in capsys.readouterr().err


def test_visualize_draws_images_of_the_user(trained, folder, tmp_path):
    output = tmp_path / "new" / "halting.png"
    images = [str(path) for path in sorted((folder / "test" / "dark").iterdir())[:3]]
    command = [
        "visualize",
        "--ckpt",
        str(trained / "last.safetensors"),
        "--output",
        str(output),
        "--images",
        *images,
    ]
    assert main(command) == 0
    with Image.open(output) as picture:
        assert min(picture.size) > 100


@pytest.mark.parametrize(
    ("name", "begins"),
    [
        ("a.pdf", b"%PDF"),
        ("a.SVG", b"<?xml"),
        ("a.jpg", b"\xff\xd8"),
        ("plain", b"\x89PNG"),
        ("a.gif", None),
    ],
)
def test_the_suffix_says_in_which_format_it_is_drawn(
    name, begins, trained, folder, tmp_path, capsys
):
    image = str(folder / "test" / "dark" / "0.jpg")
    command = [
        "visualize",
        "--ckpt",
        str(trained / "last.safetensors"),
        "--images",
        image,
        "--output",
    ]
    assert main([*command, str(tmp_path / name)]) == (0 if begins else 2)
    if begins:
        assert (tmp_path / name).read_bytes().startswith(begins)
    else:
        assert (
            "--output must end in .png" in capsys.readouterr().err
            and not (tmp_path / name).exists()
        )


def test_a_name_that_the_terminal_cannot_show_is_escaped(trained, folder, tmp_path, monkeypatch):
    output, terminal = tmp_path / "caf\udce9 \u732b.png", io.TextIOWrapper(io.BytesIO(), "ascii")
    image = shutil.copy(folder / "test" / "dark" / "0.jpg", tmp_path / "bad$\\foo$\udce9.jpg")
    monkeypatch.setattr(sys, "stdout", terminal)
    command = ["visualize", "--ckpt", str(trained / "last.safetensors"), "--images", str(image)]
    monkeypatch.setattr(sys, "argv", ["avit_lib", *command, "--output", str(output)])
    assert run() == 0
    assert output.is_file() and terminal.buffer.getvalue().endswith(
        rb"caf\udce9 \u732b.png" + b"\n"
    )


def test_it_ends_quietly_when_nobody_reads_on(monkeypatch, capsys):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        monkeypatch.setattr(sys, "argv", ["avit_lib", "data", "--profile", "smoke"])
        assert run() == 141
    assert not capsys.readouterr().err


def test_from_another_folder_the_checkout_of_the_package_is_found(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["data", "--profile", "smoke"]) == 0
    assert f"under {Path(__file__).parents[1] / 'data'}" in capsys.readouterr().out
    assert data.project_root() == Path(__file__).parents[1] and not any(tmp_path.iterdir())


def test_numbers_of_images_are_those_of_the_folder_or_refused(trained, folder, tmp_path, capsys):
    """Of the profile's test images, whose classes are others, none is drawn."""
    output = tmp_path / "halting.png"
    command = [
        "visualize",
        "--profile",
        "smoke",
        "--ckpt",
        str(trained / "last.safetensors"),
        "--output",
        str(output),
    ]
    assert main([*command, "--images", "0"]) == 2
    assert (
        "other classes than those of the profile smoke; add --data-dir" in capsys.readouterr().err
    )
    assert not output.exists()
    assert main([*command, "--data-dir", str(folder), "--images", "0", "7"]) == 0
    assert output.is_file()
    assert main([*command, "--data-dir", str(folder), "--images", "8"]) == 2
    assert "numbers go from 0 to 7" in capsys.readouterr().err


def test_data_describes_the_split(capsys):
    assert main(["data", "--profile", "smoke"]) == 0
    described = capsys.readouterr().out
    assert "embedded files are as published" in described
    assert "96 training, 48 validation, 288 test" in described


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data", "--profile", "imagnet"], "unknown profile 'imagnet'"),
        (["test", "--ckpt", "none.safetensors"], "none.json is missing"),
        (["fit", "--output", "x", "--data-dir", "nowhere"], "nowhere/train holds no images"),
        (
            ["fit", "--output", "x", "--profile", "smoke", "--batch-size", "0"],
            "training.batch_size: expected `int` >= 1",
        ),
        (
            ["test", "--ckpt", "none.safetensors", "--batch-size", "0"],
            'Invalid value "0" for --batch-size',
        ),
        (
            ["test", "--ckpt", "none.safetensors", "--seed", "-1"],
            'Invalid value "-1" for --seed. Must be >= 0',
        ),
        (
            ["fit", "--output", "x", "--profile", "smoke", "--device", "tpu"],
            'Invalid value "tpu" for --device',
        ),
        (
            ["visualize", "--ckpt", "none.safetensors", "--images"],
            "--images requires at least 1 element",
        ),
        (["benchmark", "--batch"], "--batch requires at least 1 element"),
        (["badges", "--check", "twice"], "twice"),
    ],
)
def test_faults_are_one_line_and_leave_nothing(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("AVIT_DATA", str(data.data_dir().resolve()))
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not any(tmp_path.iterdir())


COMMANDS = (
    "fit",
    "test",
    "visualize",
    "adapt",
    "data",
    "benchmark",
    "sweep",
    "notebooks",
    "readme",
    "badges",
)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_says_what_there_is_and_does_nothing(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*command.split(), "--help"]) == 0
    shown = capsys.readouterr()
    wanted = (
        COMMANDS if not command else ["--check"] if command == "badges" else ["--profile", "--seed"]
    )
    assert all(word in shown.out for word in wanted) and not shown.err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("command", [[], ["--help"], ["visualize", "--help"]])
def test_help_does_not_wait_for_torch(command):
    python = [sys.executable, "-X", "importtime", "-m", "avit_lib"]
    shown = subprocess.run([*python, *command], capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in shown.stderr.splitlines()}
    assert "Usage" in shown.stdout and "avit_lib.cli" in imported
    assert not imported & {"torch", "pandas", "matplotlib"}


def test_a_run_with_other_settings_is_not_overwritten(trained, folder, capsys):
    before = (trained / "last.safetensors").read_bytes()
    command = [
        "fit",
        "--profile",
        "smoke",
        "--data-dir",
        str(folder),
        "--output",
        str(trained),
        "--lr",
        "0.1",
    ]
    assert main(command) == 2
    assert "holds another run" in capsys.readouterr().err
    assert (trained / "last.safetensors").read_bytes() == before


def test_lost_weights_of_a_finished_run_are_trained_again(trained, folder, tmp_path):
    output = shutil.copytree(trained, tmp_path / "run")
    weights = output / "last.safetensors"
    before = weights.read_bytes()
    weights.unlink()
    command = [
        "fit",
        "--profile",
        "smoke",
        "--data-dir",
        str(folder),
        "--output",
        str(output),
        "--epochs",
        "1",
    ]
    assert main(command) == 0
    assert weights.read_bytes() == before


def test_images_that_do_not_exist(trained, capsys, tmp_path):
    command = [
        "visualize",
        "--ckpt",
        str(trained / "last.safetensors"),
        "--output",
        str(tmp_path / "a.png"),
    ]
    wrong = {
        "nothing.jpg": "nothing.jpg",
        "²": "² (No such file",
        str(tmp_path): f"is a folder; name its files: {tmp_path}/*.jpg",
    }
    for name, message in wrong.items():
        assert main([*command, "--images", name]) == 2
        assert message in capsys.readouterr().err
    assert main([*command, "--images", *["x.jpg"] * 241]) == 2
    assert "name 240 at most" in capsys.readouterr().err


@pytest.fixture
def pool(tmp_path, monkeypatch):
    """The file of a profile on a small Caltech-101: 14 images of each of two classes."""
    for name, colour in (("ant", "red"), ("bee", "blue")):
        folder = tmp_path / "data" / "caltech101" / "101_ObjectCategories" / name
        folder.mkdir(parents=True)
        for number in range(14):
            Image.new("RGB", (30, 20), colour).save(folder / f"image_{number:04d}.jpg")
    monkeypatch.setenv("AVIT_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("AVIT_RESULTS", str(tmp_path / "results"))
    path = tmp_path / "pool.toml"
    path.write_text("""
        purpose = "a test"
        focus = "avit"
        training = { epochs = 1, learning_rate = 1e-3, batch_size = 4 }
        [runs.deit]
        label = "DeiT"
        model = "deit_tiny_patch16_224"
        init = "pretrained"
        pretrained = "deit_tiny_patch16_224.fb_in1k"
        [runs.avit]
        extends = "deit"
        label = "A-ViT"
        model = "avit_tiny_patch16_224"
        halting = {}
        [data]
        dataset = "Caltech101"
        classes = ["ant", "bee"]
        image_size = 64
        train_per_class = 4
        validation_per_class = 5
        test_per_class = 4
    """)
    return str(path)


def test_data_compares_with_the_split_on_record(pool, tmp_path, capsys):
    command = ["data", "--profile", pool]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert (
        "8 training, 10 validation, 8 test images, 2 classes" in printed
        and "the same as" not in printed
    )
    Results("pool", 0, "a test").metrics(
        data.training_data(get_profile(pool).data, 0).split, "split"
    )
    assert main(command) == 0
    assert "the same as in" in capsys.readouterr().out
    assert main([*command, "--seed", "1"]) == 0  # of which there is no record
    assert "the same as" not in capsys.readouterr().out
    next((tmp_path / "data").rglob("image_0003.jpg")).unlink()
    assert main(command) == 2
    assert "not those on record" in capsys.readouterr().err


def test_a_checkpoint_is_tested_on_the_split_it_was_trained_on(pool, tmp_path, monkeypatch):
    assert main(["fit", "--profile", pool, "--seed", "3", "--output", str(tmp_path / "run")]) == 0
    seeds, test_data = [], data.test_data
    monkeypatch.setattr(
        data,
        "test_data",
        lambda about, seed, *more: seeds.append(seed) or test_data(about, seed, *more),
    )
    assert (
        main(["test", "--profile", pool, "--ckpt", str(tmp_path / "run" / "last.safetensors")]) == 0
    )
    assert seeds == [3]


# ---- a profile of one's own ----


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The file of a profile, the smoke profile but for its epochs, in the current folder outside
    the checkout.
    """
    monkeypatch.setenv("AVIT_DATA", str(data.data_dir().resolve()))
    monkeypatch.setenv("AVIT_RESULTS", str(tmp_path / "results"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine.toml").write_text(
        'extends = "smoke"\nfocus = "avit"\nruns.avit.training.epochs = 2\n'
    )
    monkeypatch.chdir(elsewhere)
    return Path("mine.toml")


def test_a_profile_of_ones_own_is_trained_tested_and_drawn(own, tmp_path, monkeypatch, capsys):
    assert main(["fit", "--profile", str(own)]) == 0
    folder = tmp_path / "results" / "mine" / "checkpoints" / "avit"
    assert pd.read_csv(folder / "history.csv")["epoch"].tolist() == [
        1,
        2,
    ]  # of the smoke profile: one
    file = str(own.resolve())
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert main(["test", "--profile", os.path.relpath(file)]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 288
    assert json.loads((folder / "last_test.json").read_text())["provenance"]["profile"] == "mine"
    assert main(["visualize", "--profile", file, "--images", "0", "1", "2"]) == 0
    with Image.open("halting.png") as picture:
        assert min(picture.size) > 100
    assert {path.name for path in tmp_path.iterdir()} == {"elsewhere", "halting.png", "results"}
    assert {path.name for path in (tmp_path / "results").iterdir()} == {"mine"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("training.batch_size = 0", "training.batch_size: expected `int` >= 1"),
        ("halting.target_deph = 3.0", "target_deph"),
        ("focus = 'nobody'", "focus names 'nobody'"),
        ("epochs = ", "mend this line"),
    ],
)
def test_a_fault_in_a_profile_of_ones_own_names_the_file(own, tmp_path, content, message, capsys):
    own.write_text(f'extends = "smoke"\n{content}\n')
    assert main(["fit", "--profile", str(own)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert str(own.resolve()) in error and message in error
    assert not (tmp_path / "results").exists()
