"""The command line as a new user tries it: images of one's own, a model trained, tested, drawn."""

import io
import json
import os
import runpy
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
from avit_lib.cli import main
from avit_lib.study import get_profile
from avit_lib.study.results import Results
from avit_lib.training import load_checkpoint, read_json, write_json

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_photographs(tmp_path_factory.mktemp("images"), train=12, test=4)


@pytest.fixture(scope="module")
def own(small_profile, images):
    """The options of a small model on images of the user's."""
    return ["--profile", str(small_profile), "--data-dir", str(images)]


@pytest.fixture(scope="module")
def trained(own, tmp_path_factory):
    """A DeiT and an A-ViT, trained an epoch each."""
    root = tmp_path_factory.mktemp("runs")
    for model in ("deit", "avit"):
        command = ["fit", *own, "--model", model, "--epochs", "1", "--seed", "3"]
        assert main([*command, "--output", str(root / model)]) == 0
    return root


@pytest.fixture
def avit(trained, tmp_path):
    """A copy of the A-ViT."""
    return shutil.copytree(trained / "avit", tmp_path / "avit") / "last.safetensors"


def test_a_model_is_trained_and_the_same_command_finds_it(avit, own, capsys):
    before = avit.read_bytes()
    command = ["fit", *own, "--model", "AViT", "--seed", "3", "--output", str(avit.parent)]
    assert main([*command, "--epochs", "1"]) == 0
    assert main([*command, "--epochs", "1", "--lr", "0.1"]) == 2
    assert "holds another run" in capsys.readouterr().err
    assert avit.read_bytes() == before


def test_a_model_is_taught_by_another(trained, own, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("AVIT_RESULTS", str(tmp_path / "results"))
    learn = ["fit", *own, "--epochs", "1", "--output", str(tmp_path)]  # the profile's focus
    deit = str(trained / "deit" / "last.safetensors")
    assert main([*learn, "--ckpt", deit]) == 2
    assert "DeiT fine-tuned has not been trained to the end" in capsys.readouterr().err
    assert main([*learn, "--ckpt", deit, "--teacher", deit]) == 0
    assert "train_distillation" in pd.read_csv(tmp_path / "history.csv")


def test_a_checkpoint_is_tested(avit, own, images, capsys):
    command = ["test", *own, "--ckpt", str(avit)]
    assert main(command) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["images"] == 8
    assert 0 <= printed["accuracy"] <= 1 and 1 <= printed["mean_depth"] <= 4
    written = read_json(avit.with_name("last_test.json"))
    tested, known = written.pop("tested"), read_json(avit.with_suffix(".json"))["run"]["images"]
    assert tested["folder"] == str(images) and [tested["sha256"], tested["content"]] == known[:2]
    assert written.pop("provenance")["seed"] == 3 and written == printed
    assert main([*command, "--model", "AViT"]) == 0
    assert main([*command, "--model", "deit"]) == 2
    assert "was trained as avit, not deit" in capsys.readouterr().err


def test_a_model_is_tested_beside_the_images_that_trained_it(avit, own, tmp_path, capsys):
    """Others of the same classes may be those that it knows."""
    test = ["test", "--ckpt", str(avit)]
    other = write_photographs(tmp_path / "other", train=11, test=4)
    for options in (["--data-dir", str(other)], own[:2], []):  # a folder, a profile, caltech24
        for command in (test, ["visualize", *test[1:], "--images", "0"]):
            assert main([*command, *options]) == 2
            assert "was trained on other images than those of" in capsys.readouterr().err
    shutil.rmtree(other / "train")  # what is left is for a test alone
    assert main([*test, "--data-dir", str(other)]) == 0
    assert read_json(avit.with_name("last_test.json"))["tested"] == {"folder": str(other)}

    described = read_json(avit.with_suffix(".json"))
    names, _, augmentation = described["run"]["images"]
    described["run"]["images"] = [22, names, augmentation]  # as long ago, without content
    write_json(avit.with_suffix(".json"), described)
    assert main([*test, *own]) == 0
    assert "compared by name alone" in capsys.readouterr().err


def test_images_are_drawn_and_named(trained, own, images, tmp_path, monkeypatch, capsys):
    drawn, depth_maps = [], commands.pictures.depth_maps

    def record(*arguments):
        drawn.append([title.split("\n") for title in arguments[3]])
        return depth_maps(*arguments)

    monkeypatch.setattr(commands.pictures, "depth_maps", record)
    draw = ["visualize", *own, "--ckpt", str(trained / "avit" / "last.safetensors"), "--output"]
    photograph = str(shutil.copy(images / "test" / "dark" / "0.jpg", tmp_path))
    for name, begins, chosen in (
        ("a.png", b"\x89PNG", ["--images", photograph, photograph]),
        ("new/a.PDF", b"%PDF", []),
        ("a.jpg", b"\xff\xd8", ["--images", "0", "7"]),
    ):
        assert main([*draw, str(tmp_path / name), *chosen]) == 0
        assert (tmp_path / name).read_bytes().startswith(begins)
    assert drawn[0][1][1] in ("predicted: bright", "predicted: dark")
    assert [[title[0] for title in titles] for titles in drawn] == [
        [f"{tmp_path.name}/0.jpg"] * 2,
        ["true: bright"] * 3 + ["true: dark"] * 3,
        ["true: bright", "true: dark"],
    ]
    for options, message in (
        (["b.gif"], "--output"),
        (["c.png", "--images", "8"], "numbers go from 0 to 7"),
        (["c.png", "--images", "²"], "No such file"),
        ([photograph, "--images", photograph], "0.jpg is read, too; name another --output"),
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
    test = ["test", "--profile", str(small_profile)]
    assert main(test) == 2
    assert "A-ViT halting trained has not been trained to the end" in capsys.readouterr().err
    assert main(["fit", *test[1:]]) == 0  # the focus, after its teacher
    runs = tmp_path / "small" / "checkpoints"
    assert {path.name for path in runs.iterdir()} == {"deit", "avit_finetuned"}
    assert main(test) == 0
    (tmp_path / "small" / "models").mkdir()
    for suffix in (".safetensors", ".json"):
        committed = tmp_path / "small" / "models" / f"avit_finetuned{suffix}"
        shutil.copy(runs / "avit_finetuned" / f"last{suffix}", committed)
    shutil.rmtree(runs)
    assert main(test) == 0
    tested = read_json(committed.with_name("avit_finetuned_test.json"))
    assert tested["images"] == 288 and tested["tested"]["profile"] == "small"


def test_a_split_is_compared_with_the_one_on_record(small_profile, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("AVIT_RESULTS", str(tmp_path))
    monkeypatch.chdir(tmp_path)  # the checkout of the package is found from elsewhere
    command = ["data", "--profile", str(small_profile)]
    split = data.training_data(get_profile(str(small_profile)).data, 0).split
    assert main(command) == 0
    printed = json.loads(capsys.readouterr().out)
    facts = {"folder": str(ROOT / "data"), "classes": 24, "test_images": 288}
    assert printed.items() >= (facts | {"sha256": split["sha256"]}).items()
    Results("small", 0, "02_finetune_deit").metrics(split, "split")
    assert main(command) == 0
    assert "the same as in" in capsys.readouterr().out
    assert main([*command, "--seed", "1"]) == 0  # of which there is no record
    assert "the same as" not in capsys.readouterr().out


# --- adapt, benchmark, ImageNet -------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A state dict of timm's keys for ten classes, wrapped as torch's training scripts do.

    A file of another program lies beside it.
    """
    torch.manual_seed(0)
    state = timm.create_model("vit_tiny_patch16_224", num_classes=10).state_dict()
    path = tmp_path_factory.mktemp("weights") / "vit.pth"
    torch.save({"model": {f"module.{key}": value for key, value in state.items()}}, path)
    path.with_suffix(".json").write_text('[{"file": "a.jpg"}]')
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
    assert "on ImageNet: scripts/imagenet.py" in capsys.readouterr().err

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


def test_on_imagenet_it_stands_beside_tome_at_equal_flops(images, tmp_path):
    script = runpy.run_path(str(ROOT / "scripts" / "imagenet.py"))
    compare = script["compare"]
    for identifier, name in (("n01440764", "bright"), ("n01443537", "dark")):
        shutil.copytree(images / "test" / name, tmp_path / "val" / identifier)
    torch.manual_seed(0)
    tiny = dict(img_size=32, patch_size=4, embed_dim=48, depth=4, num_heads=2, num_classes=2)
    model = timm.create_model("vit_tiny_patch16_224", **tiny).eval()
    arguments = model, tmp_path, 0, torch.device("cpu"), 4
    with pytest.raises(script["UserError"], match="has 2 classes, the model 2; ImageNet has 1,000"):
        compare(*arguments)
    compare.__globals__.update(CLASSES=2, PEERS=(2, 5))
    table = compare(*arguments).set_index("model")
    assert table["images"].tolist()[:5] == [8] * 5 and table["images"][5:].isna().all()
    gflops = table["gflops"].to_numpy()
    assert gflops[1:3] == pytest.approx(gflops[3:5], rel=0.05) and (gflops[1:5] < gflops[0]).all()
    pixels, labels = script["open_folder"](model, tmp_path / "val")[torch.arange(8)]
    right = model(pixels).argmax(dim=1) == labels
    assert table.loc["plain", "accuracy"] == pytest.approx(right.float().mean().item())
    dark = pixels[labels == 1]  # 20 to 120 of 255, less a mean of 0.5, over a deviation of 0.5
    assert dark.mean().item() == pytest.approx((70 / 255 - 0.5) / 0.5, abs=0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--model": "none"}, "there is no model 'none'"),
        ({"--model": "resnet18"}, "cannot be adapted: it is no"),
        ({"--images": "."}, "holds 0 images"),
        ({"--saved": "0.9"}, "between 0 and 0.8"),
        ({"--output": "adaptive.bin"}, 'must have extension "safetensors"'),
        ({"--output": "annotations.safetensors"}, "annotations.json is of something else"),
        ({"--model": "deit_tiny_distilled_patch16_224"}, "is of another model"),
        ({"--weights": "avit/last.safetensors"}, "is of model avit_nano, not vit_tiny_patch16_22"),
        (dict.fromkeys(["--weights", "--output"], "avit/last.safetensors"), "is read, too; name"),
    ],
)
def test_what_cannot_be_adapted_is_told_in_one_line(
    changes, message, weights, avit, images, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("annotations.json").write_text("[]")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    usual = {"--model": "vit_tiny_patch16_224", "--weights": weights}
    usual |= {"--images": str(images), "--output": "a.safetensors"} | changes
    assert main(["adapt", *(word for pair in usual.items() for word in pair)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and message in line
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


# --- as a program ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [(["--help"], 0, "Usage"), (["test", "--ckpt", "/none"], 2, '"/none" does not exist')],
)
def test_what_is_wrong_with_the_arguments_does_not_wait_for_torch(arguments, status, message):
    python = [sys.executable, "-X", "importtime", "-m", "avit_lib"]
    shown = subprocess.run([*python, *arguments], capture_output=True, text=True)
    assert shown.returncode == status and message in shown.stdout + shown.stderr
    imported = {line.rpartition("|")[2].strip() for line in shown.stderr.splitlines()}
    assert "avit_lib.cli" in imported
    assert not imported & {"torch", "timm", "pandas", "matplotlib"}


def test_a_package_that_imports_the_library_has_its_models_however_it_is_run(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import avit_lib, timm; print(timm.is_model('avit_tiny_patch16_224'))\n"
    )
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    shown = subprocess.check_output(
        [sys.executable, "-m", "mine"], text=True, env=os.environ | {"PYTHONPATH": paths}
    )
    assert shown == "True\n"


def test_a_name_that_the_terminal_cannot_show_is_escaped(
    trained, own, images, tmp_path, monkeypatch
):
    output, terminal = tmp_path / "caf\udce9 \u732b.png", io.TextIOWrapper(io.BytesIO(), "ascii")
    image = shutil.copy(images / "test" / "dark" / "0.jpg", tmp_path / "bad$\\foo$\udce9.jpg")
    monkeypatch.setattr(sys, "stdout", terminal)
    command = ["visualize", *own, "--ckpt", str(trained / "avit" / "last.safetensors")]
    assert main([*command, "--images", str(image), "--output", str(output)]) == 0
    assert output.is_file()
    assert terminal.buffer.getvalue().endswith(rb"caf\udce9 \u732b.png" + b"\n")


def test_it_ends_quietly_when_nobody_reads_on(small_profile, monkeypatch, capsys):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["data", "--profile", str(small_profile)]) == 141
    assert not capsys.readouterr().err
