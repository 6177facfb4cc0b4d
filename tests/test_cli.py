"""The command line as a new user tries it: images of one's own, a model trained, tested, drawn."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import timm
import torch
from conftest import write_photographs

from avit_lib import adaptive, commands, data
from avit_lib.__main__ import run
from avit_lib.cli import main
from avit_lib.study import get_profile
from avit_lib.study.results import Results
from avit_lib.training import load_checkpoint

COMMANDS = ("fit", "test", "visualize", "adapt", "data", "benchmark")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_photographs(tmp_path_factory.mktemp("images"), train=12, test=4)


@pytest.fixture(scope="module")
def own(small_profile, images):
    """The options of a small model on images of the user's, and those to fit one."""
    return ["--profile", str(small_profile), "--data-dir", str(images)]


@pytest.fixture(scope="module")
def trained(own, tmp_path_factory):
    """A DeiT and an A-ViT, trained an epoch each."""
    root = tmp_path_factory.mktemp("runs")
    for model in ("deit", "avit"):
        command = ["fit", *own, "--model", model, "--epochs", "1", "--seed", "3"]
        assert main([*command, "--output", str(root / model)]) == 0
    return root


def files(folder):
    return {path.name for path in folder.iterdir()}


def test_a_model_is_trained_and_the_same_command_finds_it(trained, own, capsys):
    wanted = {"best.safetensors", "best.json", "last.safetensors", "last.json", "history.csv"}
    assert files(trained / "avit") >= wanted
    weights = trained / "avit" / "last.safetensors"
    before = weights.read_bytes()
    command = ["fit", *own, "--model", "AViT", "--seed", "3", "--output", str(trained / "avit")]
    assert main([*command, "--epochs", "1"]) == 0
    assert main([*command, "--epochs", "1", "--lr", "0.1"]) == 2
    assert "holds another run" in capsys.readouterr().err
    assert weights.read_bytes() == before


def test_a_model_is_taught_by_another(trained, own, tmp_path, capsys):
    learn = ["fit", *own, "--epochs", "1", "--output", str(tmp_path)]  # the profile's focus
    deit = str(trained / "deit" / "last.safetensors")
    assert main([*learn, "--ckpt", deit]) == 2
    assert "learns from run 'deit': name its weights by --teacher" in capsys.readouterr().err
    assert main([*learn, "--ckpt", deit, "--teacher", deit]) == 0
    assert "train_distillation" in pd.read_csv(tmp_path / "history.csv")
    assert main([*learn, "--model", "avit", "--teacher", deit]) == 2
    assert "run 'avit' has no teacher" in capsys.readouterr().err


def test_a_checkpoint_is_tested(trained, own, capsys):
    command = ["test", *own, "--ckpt", str(trained / "avit" / "last.safetensors")]
    assert main(command) == 0
    shown = capsys.readouterr()
    printed = json.loads(shown.out)
    assert printed["images"] == 8 and "| images | accuracy |" in shown.err
    assert 0 <= printed["accuracy"] <= 1 and 1 <= printed["mean_depth"] <= 4
    written = json.loads((trained / "avit" / "last_test.json").read_text())
    assert written.pop("provenance")["seed"] == 3 and written == printed
    assert main([*command, "--model", "AViT"]) == 0
    assert main([*command, "--model", "DeiT"]) == 2
    assert "was trained as avit, not deit" in capsys.readouterr().err


def test_images_are_drawn_and_named(trained, own, images, tmp_path, monkeypatch, capsys):
    drawn, depth_maps = [], commands.pictures.depth_maps

    def record(*arguments):
        drawn.append(arguments[3])
        return depth_maps(*arguments)

    monkeypatch.setattr(commands.pictures, "depth_maps", record)
    draw = ["visualize", *own, "--ckpt", str(trained / "avit" / "last.safetensors"), "--output"]
    chosen = [str(images / "test" / "dark" / f"{number}.jpg") for number in range(3)]
    for name, begins in (("a.png", b"\x89PNG"), ("new/a.PDF", b"%PDF"), ("a.jpg", b"\xff\xd8")):
        assert main([*draw, str(tmp_path / name), "--images", *chosen]) == 0
        assert (tmp_path / name).read_bytes().startswith(begins)
    assert drawn[0][0].startswith("dark/0.jpg\npredicted: ")
    for numbers in ([], ["--images", "0", "7"]):
        assert main([*draw, str(tmp_path / "b.png"), *numbers]) == 0
    names = [[title.split("\n")[0] for title in titles] for titles in drawn[-2:]]
    assert names == [["true: bright"] * 3 + ["true: dark"] * 3, ["true: bright", "true: dark"]]
    for options, message in (
        (["b.gif"], "--output"),
        (["c.png", "--images", "8"], "numbers go from 0 to 7"),
        (["c.png", "--images", "nothing.jpg"], "nothing.jpg"),
        (["c.png", "--images", "²"], "No such file"),
    ):
        assert main([*draw, *options]) == 2
        assert message in capsys.readouterr().err
    draw[-2] = str(trained / "deit" / "last.safetensors")
    assert main([*draw, "c.png"]) == 2
    assert "a model whose tokens all go through" in capsys.readouterr().err


def test_without_a_checkpoint_the_profile_s_or_the_committed_one_is_taken(
    small_profile, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("AVIT_RESULTS", str(tmp_path))
    draw = ["visualize", "--profile", str(small_profile), "--images", "0"]
    draw += ["--output", str(tmp_path / "a.png")]
    assert main(draw) == 2
    assert "A-ViT halting trained has not been trained to the end" in capsys.readouterr().err
    assert main(["fit", "--profile", str(small_profile)]) == 0  # the focus, after its teacher
    runs = tmp_path / "small" / "checkpoints"
    assert files(runs) == {"deit", "avit_finetuned"}
    assert main(draw) == 0
    (tmp_path / "small" / "models").mkdir()
    for suffix in (".safetensors", ".json"):
        committed = tmp_path / "small" / "models" / f"avit_finetuned{suffix}"
        shutil.copy(runs / "avit_finetuned" / f"last{suffix}", committed)
    shutil.rmtree(runs)
    capsys.readouterr()
    assert main(["test", "--profile", str(small_profile)]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 288
    assert committed.with_name("avit_finetuned_test.json").is_file()


def test_a_split_is_compared_with_the_one_on_record(small_profile, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("AVIT_RESULTS", str(tmp_path))
    monkeypatch.chdir(tmp_path)  # the checkout of the package is found from elsewhere
    command = ["data", "--profile", str(small_profile)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert f"under {Path(__file__).parents[1] / 'data'}: 24 classes" in printed
    assert "test: 288 images, 12 to 12 a class" in printed and "the same as" not in printed
    split = data.training_data(get_profile(str(small_profile)).data, 0).split
    Results("small", 0, "02_finetune_deit").metrics(split, "split")
    assert main(command) == 0
    assert "the same as in" in capsys.readouterr().out
    assert main([*command, "--seed", "1"]) == 0  # of which there is no record
    assert "the same as" not in capsys.readouterr().out


# --- adapt, benchmark, ImageNet -------------------------------------------------------------------

TINY = dict(img_size=32, patch_size=4, embed_dim=48, depth=4, num_heads=2)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A state dict of timm's keys for ten classes, wrapped as torch's training scripts do."""
    torch.manual_seed(0)
    state = timm.create_model("vit_tiny_patch16_224", num_classes=10).state_dict()
    path = tmp_path_factory.mktemp("weights") / "vit.pth"
    torch.save({"model": {f"module.{key}": value for key, value in state.items()}}, path)
    return str(path)


def test_a_model_of_timm_s_is_adapted_drawn_and_measured(
    weights, images, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "adaptive.safetensors"
    source = ["--model", "vit_tiny_patch16_224", "--images", str(images), "--saved", "0.3"]
    assert main(["adapt", *source, "--weights", weights, "--output", str(output)]) == 0
    assert "of the FLOPs" in capsys.readouterr().out
    model, described = load_checkpoint(output)
    assert isinstance(model, adaptive.Adaptive) and model.thresholds.isfinite().any()
    assert described["adapted"]["images"] == 32 and model.num_classes == 10
    file, drawn = str(images / "test" / "dark" / "0.jpg"), tmp_path / "drawn.png"
    draw = ["visualize", "--ckpt", str(output), "--output", str(drawn), "--images"]
    assert main([*draw, file]) == 0 and drawn.is_file()
    assert main([*draw, "3"]) == 2
    assert "name image files by --images" in capsys.readouterr().err
    assert main(["test", "--ckpt", str(output)]) == 2
    assert "test it by --data imagenet" in capsys.readouterr().err

    measured = []
    monkeypatch.setattr(
        commands, "benchmark_model", lambda *models: measured.append(models) or pd.DataFrame()
    )
    assert main(["benchmark", *source, "--ckpt", weights]) == 0
    assert main(["benchmark", "--ckpt", str(output), "--images", str(images)]) == 0
    for made, plain, pixels in measured:
        assert isinstance(made, adaptive.Adaptive) and made.thresholds.isfinite().any()
        assert not hasattr(plain, "forward_with_trace") and pixels.shape == (32, 3, 224, 224)
        assert plain(pixels[:1]).shape == (1, 10)


def test_a_model_of_the_study_is_adapted_and_tested(trained, own, images, tmp_path):
    output, made = tmp_path / "adaptive.safetensors", trained / "deit" / "last.safetensors"
    adapt = ["adapt", "--weights", str(made), "--images", str(images), "--saved", "0.1"]
    assert main([*adapt, "--output", str(output)]) == 0
    assert load_checkpoint(output)[1]["run"]["seed"] == 3  # of the split on which it was trained
    assert main(["test", *own, "--ckpt", str(output)]) == 0


def test_on_imagenet_it_stands_beside_tome_at_equal_flops(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(commands, "CLASSES", 2)
    monkeypatch.setattr(commands, "PEERS", (2, 5))
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=2, **TINY).eval()
    monkeypatch.setattr(commands, "find_model", lambda *_: (model, {}))
    for identifier, name in (("n01440764", "bright"), ("n01443537", "dark")):
        shutil.copytree(images / "test" / name, tmp_path / "val" / identifier)
    tables = []
    monkeypatch.setattr(commands, "to_markdown", lambda table: tables.append(table) or "")
    assert main(["test", "--data", "imagenet", "--images", str(tmp_path), "--device", "cpu"]) == 0
    table = tables[0].set_index("model")
    assert table["images"].tolist()[:5] == [8] * 5 and table["images"][5:].isna().all()
    gflops = table["gflops"].to_numpy()
    assert gflops[1:3] == pytest.approx(gflops[3:5], rel=0.05) and (gflops[1:5] < gflops[0]).all()
    with torch.inference_mode():
        pixels, labels = commands.open_folder(model, tmp_path / "val")[torch.arange(8)]
        expected = (model(pixels).argmax(dim=1) == labels).float().mean().item()
    assert table.loc["plain", "accuracy"] == pytest.approx(expected)
    dark = pixels[labels == 1]  # 20 to 120 of 255, less a mean of 0.5, over a deviation of 0.5
    assert dark.mean().item() == pytest.approx((70 / 255 - 0.5) / 0.5, abs=0.05)
    model = adaptive.adapt(model, pixels, 0.2)
    assert main(["test", "--data", "imagenet", "--images", str(tmp_path), "--device", "cpu"]) == 0
    assert tables[1]["model"][0] == "as in the file"
    monkeypatch.setattr(commands, "CLASSES", 1000)
    assert main(["test", "--data", "imagenet", "--images", str(tmp_path)]) == 2
    assert "has 2 classes, the model 2; ImageNet has 1,000" in capsys.readouterr().err
    (tmp_path / "val" / "n01443537").rename(tmp_path / "val" / "1")
    assert main(["test", "--data", "imagenet", "--images", str(tmp_path)]) == 2
    assert "identifiers such as n01440764: 1; rename" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--model": "none"}, "there is no model 'none'"),
        ({"--model": "resnet18"}, "cannot be adapted: it is no"),
        ({"--images": "."}, "holds 0 images"),
        ({"--saved": "0.9"}, "between 0 and 0.8"),
        ({"--output": "adaptive.bin"}, 'must have extension "safetensors"'),
        ({"--weights": "nothing.pth"}, '"nothing.pth" does not exist'),
        ({"--model": "deit_tiny_distilled_patch16_224"}, "is of another model"),
    ],
)
def test_what_cannot_be_adapted_is_told_in_one_line(
    changes, message, weights, images, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    usual = {"--model": "vit_tiny_patch16_224", "--weights": weights}
    usual |= {"--images": str(images), "--output": "a.safetensors"} | changes
    assert main(["adapt", *(word for pair in usual.items() for word in pair)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and message in line and not any(tmp_path.iterdir())


# --- as a program ---------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_says_what_there_is_and_does_nothing(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*command.split(), "--help"]) == 0
    shown = capsys.readouterr()
    wanted = ["--profile", "--seed", "default: caltech24"] if command else COMMANDS
    assert all(word in shown.out for word in wanted) and not shown.err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--help"], 0, "Usage"),
        (["test", "--ckpt", "/nonexist"], 2, '"/nonexist" does not exist'),
        (["fit", "--profile", "imagnet"], 2, "unknown profile 'imagnet'"),
        (["visualize", "--model", "resnet"], 2, "no run 'resnet'; choose from deit"),
    ],
)
def test_what_is_wrong_with_the_arguments_does_not_wait_for_torch(arguments, status, message):
    python = [sys.executable, "-X", "importtime", "-m", "avit_lib"]
    shown = subprocess.run([*python, *arguments], capture_output=True, text=True)
    assert shown.returncode == status and message in shown.stdout + shown.stderr
    imported = {line.rpartition("|")[2].strip() for line in shown.stderr.splitlines()}
    assert "avit_lib.cli" in imported
    assert not imported & {"torch", "timm", "pandas", "matplotlib"}


def test_a_package_that_imports_the_library_has_its_models_however_it_is_run(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("import avit_lib\n")
    (tmp_path / "mine" / "train.py").write_text(
        "import timm; print(timm.is_model('avit_tiny_patch16_224'))\n"
    )
    paths = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])
    shown = subprocess.check_output(
        [sys.executable, "-m", "mine.train"], text=True, env=os.environ | {"PYTHONPATH": paths}
    )
    assert shown == "True\n"


def test_a_name_that_the_terminal_cannot_show_is_escaped(
    trained, own, images, tmp_path, monkeypatch
):
    output, terminal = tmp_path / "caf\udce9 \u732b.png", io.TextIOWrapper(io.BytesIO(), "ascii")
    image = shutil.copy(images / "test" / "dark" / "0.jpg", tmp_path / "bad$\\foo$\udce9.jpg")
    monkeypatch.setattr(sys, "stdout", terminal)
    command = ["visualize", *own, "--ckpt", str(trained / "avit" / "last.safetensors")]
    command += ["--images", str(image), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["avit_lib", *command])
    assert run() == 0 and output.is_file()
    assert terminal.buffer.getvalue().endswith(rb"caf\udce9 \u732b.png" + b"\n")


def test_it_ends_quietly_when_nobody_reads_on(small_profile, monkeypatch, capsys):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        monkeypatch.setattr(sys, "argv", ["avit_lib", "data", "--profile", str(small_profile)])
        assert run() == 141
    assert not capsys.readouterr().err
