"""The command line as a new user tries it: images of one's own, a model trained, tested, drawn."""

import errno
import io
import json
import os
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pandas as pd
import pytest
import timm
import torch
from conftest import ROOT, SMALL, refused, write_photographs
from msgspec.structs import replace
from torch import nn

from avit_lib import adaptive, commands, data
from avit_lib.adaptive import NEVER
from avit_lib.cli import main
from avit_lib.study import get_profile
from avit_lib.study.results import Results
from avit_lib.training import files, load_checkpoint, read_json, save_checkpoint

AVIT = Path("avit/last.safetensors")
OWN = "--profile mine.toml --data-dir images"
TO_A = "--images images --output a.safetensors"


@pytest.fixture
def run(workplace, capsys):
    """Runs a command line in a copy of the prepared folder, and returns what it printed."""

    def run(line, status=0):
        assert main(shlex.split(line)) == status, capsys.readouterr().err
        return capsys.readouterr()

    return run


@pytest.fixture
def drawn(monkeypatch):
    """What is passed on to be drawn: the arguments of each picture."""
    spy = Mock(wraps=commands.pictures.depth_maps)
    monkeypatch.setattr(commands.pictures, "depth_maps", spy)
    return spy


def test_a_model_is_trained_and_the_same_command_finds_it(run):
    before = AVIT.read_bytes()
    command = f"fit {OWN} --model AViT --seed 3 --output avit --epochs 1"
    run(command)
    assert "holds another run" in run(f"{command} --lr 0.1", 2).err
    assert AVIT.read_bytes() == before


def test_a_tilde_is_the_home_folder(run, monkeypatch):
    monkeypatch.setenv("HOME", str(Path("home").resolve()))
    run("adapt --weights deit/last.safetensors --images images --output=~/a.safetensors")
    assert Path("home/a.safetensors").is_file() and not Path("~").exists()


def test_a_model_is_taught_by_another(run):
    learn = f"fit {OWN} --epochs 1 --output taught --ckpt deit/last.safetensors"
    assert "DeiT fine-tuned has not been trained to the end" in run(learn, 2).err  # the teacher
    run(f"{learn} --teacher deit/last.safetensors")
    assert "train_distillation" in pd.read_csv("taught/history.csv")


def test_a_checkpoint_is_tested(run):
    command = f"test {OWN} --ckpt {AVIT}"
    printed = json.loads(run(command).out)
    assert printed["images"] == 8
    tested, known = printed["tested"], read_json(AVIT.with_suffix(".json"))["run"]["images"]
    assert tested["folder"] == str(Path("images").resolve())
    assert [tested["sha256"], tested["content"]] == known[:2]
    assert printed["provenance"]["seed"] == 3
    assert "is of epoch" not in run(f"{command} --model AViT").err
    about = read_json(AVIT.with_suffix(".json"))
    about["run"]["settings"]["training"]["epochs"] = 9
    AVIT.with_suffix(".json").write_text(json.dumps(about))
    assert f"{AVIT} is of epoch 1 of 9" in run(command).err


def test_a_model_is_tested_beside_the_images_that_trained_it(run):
    """Others of the same classes may be those that it knows."""
    write_photographs(Path("other"), train=11, test=4)
    for options in ("--data-dir other", "--profile mine.toml", ""):  # of another size the last
        told = run(f"test --ckpt {AVIT} {options}", 2).err
        assert "was trained on other images than those of" in told
    shutil.rmtree("other/train")
    Path("other/train").symlink_to("nowhere")
    assert "other/train holds no images" in run(f"test --ckpt {AVIT} --data-dir other", 2).err
    Path("other/train").unlink()  # what is left is for a test alone
    tested = json.loads(run(f"test --ckpt {AVIT} --data-dir other").out)["tested"]
    assert tested == {"folder": str(Path("other").resolve())}


def test_images_are_drawn_and_named(run, tmp_path, drawn):
    draw = f"visualize --ckpt {AVIT} --output"
    shutil.copy("images/test/dark/0.jpg", "0.jpg")
    for options, begins in (
        ("a.png --images 0.jpg images/test/dark/1.jpg", b"\x89PNG"),
        ("new/a.PDF --images 0.jpg", b"%PDF"),
        ("a.jpg --images 0.jpg", b"\xff\xd8"),
    ):
        run(f"{draw} {options}")
        assert Path(options.split()[0]).read_bytes().startswith(begins)
    told = [[title.split("\n") for title in call.args[3]] for call in drawn.call_args_list]
    assert told[0][1][2] in ("predicted: bright", "predicted: dark")
    assert [["".join(title[:2]) for title in titles] for titles in told] == [
        [f"{tmp_path.name}/0.jpg", "dark/1.jpg"],
        [f"{tmp_path.name}/0.jpg"],
        [f"{tmp_path.name}/0.jpg"],
    ]


def test_an_image_ends_with_its_class_token(run, drawn):
    model, described = load_checkpoint(AVIT)
    with torch.no_grad():
        model.cls_token[..., 0] = model.pos_embed[:, 0, 0] = 9.0  # it halts in layer 1
    about = described["model"], described["arguments"]
    save_checkpoint(Path("early.safetensors"), model, *about, run=described["run"])
    run("visualize --ckpt early.safetensors --images images/test/dark/0.jpg --output a.png")
    assert drawn.call_args.args[1][:, 1:].unique().tolist() == [1]
    assert "mean depth 1.0" in drawn.call_args.args[3][0]


@pytest.mark.parametrize(
    ("classes", "pretrained", "predicted", "kept"),
    [
        (0, "", "nothing", "outputs changed by "),
        (1, "", "class 0", "outputs changed by "),
        (1000, "", "class 3", "answers as before on "),
        (1000, "deit_tiny_patch16_224.fb_in1k", "tiger shark", "answers as before on "),
    ],
)
def test_what_a_model_of_timm_s_predicts(
    classes, pretrained, predicted, kept, run, drawn, monkeypatch
):
    model, arguments = timm.create_model("deit_nano", num_classes=classes), {"num_classes": classes}
    if classes:
        nn.init.zeros_(model.head.weight)
        model.head.bias.data = 1.0 * (torch.arange(classes) == 3)
    found = model, {"model": "deit_nano", "arguments": arguments, "pretrained": pretrained}
    monkeypatch.setattr(commands, "find_model", lambda *_: found)
    assert kept in run(f"adapt --saved 0 {TO_A}").out  # no token merges
    run("visualize --ckpt a.safetensors --images images/test/dark/0.jpg --output a.png")
    assert drawn.call_args.args[3] == [f"dark/\n0.jpg\npredicted: {predicted}\nmean depth 4.0"]


def test_without_a_checkpoint_the_profile_s_or_the_committed_one_is_taken(run):
    test = "test --profile mine.toml"
    run("fit --profile mine.toml")  # the focus, after its teacher
    results = Path("results/mine")
    assert set(os.listdir(results / "checkpoints")) == {"deit", "avit_finetuned"}
    run(test)
    committed = results / "models" / "avit_finetuned"
    committed.mkdir(parents=True)
    for suffix in (".safetensors", ".json"):
        trained = results / "checkpoints" / "avit_finetuned" / f"last{suffix}"
        shutil.copy(trained, committed / f"model{suffix}")
    shutil.rmtree(results / "checkpoints")
    found = run(test)
    tested = json.loads(found.out)
    assert tested["images"] == 288 and tested["tested"]["profile"] == "mine" and not found.err
    with Path("mine.toml").open("a") as profile:
        profile.write("runs.avit_finetuned.halting.eps = 0.02\n")
    assert "trained by other settings than profile mine has now" in run(test).err


def test_a_split_is_compared_with_the_one_on_record(run):
    split = data.training_data(get_profile("mine.toml").data, 0).split
    printed = json.loads(run("data --profile mine.toml").out)
    # the checkout of the package is found from elsewhere
    facts = {"folder": str(ROOT / "data"), "classes": 24, "test_images": 288}
    assert printed.items() >= (facts | {"sha256": split["sha256"]}).items()
    Results("mine", 0, "02_finetune_deit").metrics(split, "split")
    assert "the same as in" in run("data --profile mine.toml").out
    for key in ("sha256", "content"):
        Results("mine", 0, "02_finetune_deit").metrics(split | {key: "other"}, "split")
        assert f"not those on record: {key} of" in run("data --profile mine.toml", 2).err
    other = run("data --profile mine.toml --seed 1")
    assert json.loads(other.out) and "has no record of seed 1" in other.err


# --- adapt, benchmark, ImageNet -------------------------------------------------------------------


def test_a_model_of_timm_s_is_adapted_drawn_and_measured(run, monkeypatch):
    shutil.copy("deit/last.safetensors", "plain.safetensors")
    source = "--model deit_nano --images images --saved 0.1"
    told = run(f"adapt {source} --weights plain.safetensors --output adaptive.safetensors").out
    assert "mean (0.485, 0.456, 0.406)" in told and "pooling 'token'" in told
    assert "of the FLOPs" in told and "before on 100.0% of these 32 images" in told
    model, described = load_checkpoint(Path("adaptive.safetensors"))
    assert isinstance(model, adaptive.Adaptive) and model.thresholds.min() < NEVER
    assert described["adapted"]["images"] == 32 and model.num_classes == 2
    run("visualize --ckpt adaptive.safetensors --images images/test/dark/0.jpg --output a.png")
    told = run("test --ckpt adaptive.safetensors", 2).err
    assert "was not trained by fit" in told

    measured = []
    monkeypatch.setattr(
        commands, "benchmark_model", lambda *models: measured.append(models) or pd.DataFrame()
    )
    run(f"benchmark {source} --ckpt plain.safetensors")
    run("benchmark --ckpt adaptive.safetensors --images images")
    for made, plain, pixels in measured:
        assert isinstance(made, adaptive.Adaptive) and made.thresholds.min() < NEVER
        assert not hasattr(plain, "forward_with_trace") and pixels.shape == (32, 3, 28, 28)
        assert plain(pixels[:1]).shape == (1, 2)


def test_a_disk_that_is_full_leaves_nothing_of_an_adapted_model(run, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", Mock(side_effect=[None, full]))
        run(f"adapt --weights deit/last.safetensors --saved 0.1 {TO_A}", 2)
    assert not list(Path().glob("a.*"))


def test_answers_that_are_no_numbers_are_no_answers(run):
    model, described = load_checkpoint(Path("deit/last.safetensors"))
    model.norm.weight.data *= 1e30
    model.head.weight.data *= 1e30
    save_checkpoint(Path("big.safetensors"), model, "deit_nano", described["arguments"])
    told = run(f"adapt --weights big.safetensors --saved 0 {TO_A}", 2).err
    assert "answers with values that are no numbers" in told and not list(Path().glob("a.*"))


def test_a_model_of_the_study_is_adapted_and_tested(run):
    run("adapt --weights deit/last.safetensors --images images --saved 0.1 --output a.Safetensors")
    # of the split on which it was trained
    assert read_json(Path("a.json"))["run"]["seed"] == 3
    run(f"test {OWN} --ckpt a.safetensors")


def test_on_imagenet_it_stands_beside_tome_at_equal_flops(run):
    script = runpy.run_path(str(ROOT / "scripts" / "imagenet.py"))
    compare, folder = script["compare"], Path("imagenet")
    for identifier, name in (("n01440764", "bright"), ("n01443537", "dark")):
        shutil.copytree(Path("images/test") / name, folder / "val" / identifier)
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **(SMALL | {"num_classes": 2})).eval()
    arguments = 0, torch.device("cpu"), 4
    for place, message in (
        ("imagenet", "has 2 classes, the model 2; ImageNet has 1,000"),
        ("images/test", "identifiers such as n01440764: bright, dark; rename them"),
    ):
        with refused(message):
            compare(model, Path(place), *arguments)
    profile = replace(get_profile("smoke"), peers={"ToMe": (1, 2)}, adapted=(0.05, 0.1))
    compare.__globals__.update(IMAGENET_CLASSES=2, get_profile=lambda _: profile)
    table = compare(model, folder, *arguments).set_index("model")
    assert table["images"].tolist()[:5] == [8] * 5 and table["images"][5:].isna().all()
    gflops = table["gflops"].to_numpy()
    assert (gflops[1:5] < gflops[0]).all()
    assert 1 - gflops[3:5] / gflops[0] == pytest.approx([0.05, 0.1], abs=0.01)
    pixels, labels = script["open_folder"](model, folder / "val")[torch.arange(8)]
    right = model(pixels).argmax(dim=1) == labels
    assert table["accuracy"]["plain"] == pytest.approx(right.float().mean().item())
    dark = pixels[labels == 1]  # 20 to 120 of 255, less a mean of 0.5, over a deviation of 0.5
    assert dark.mean().item() == pytest.approx((70 / 255 - 0.5) / 0.5, abs=0.05)


# --- as a program ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [("--help", 0, "Usage"), ("test --ckpt /none", 2, '"/none" does not exist')],
)
def test_what_is_wrong_with_the_arguments_does_not_wait_for_torch(arguments, status, message):
    python = [sys.executable, "-X", "importtime", "-m", "avit_lib"]
    shown = subprocess.run([*python, *arguments.split()], capture_output=True, text=True)
    assert shown.returncode == status and message in shown.stdout + shown.stderr
    imported = {line.rpartition("|")[2].strip() for line in shown.stderr.splitlines()}
    assert "avit_lib.cli" in imported
    assert not imported & {"torch", "timm", "pandas", "matplotlib"}


def test_a_package_that_imports_the_library_has_its_models_however_it_is_run(tmp_path):
    code = "import avit_lib, timm; print(timm.is_model('avit_tiny_patch16_224'))\n"
    (tmp_path / "mine.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "mine"]
    assert subprocess.check_output(command, text=True, env=environment) == "True\n"


def test_a_name_that_the_terminal_cannot_show_is_escaped(run, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    image = shutil.copy("images/test/dark/0.jpg", "bad$\\foo$\udce9.jpg")
    output = "caf\udce9 \u732b.png"
    run(f"visualize --ckpt {AVIT} --images '{image}' --output '{output}'")
    assert Path(output).is_file()
    assert terminal.buffer.getvalue().endswith(rb"caf\udce9 \u732b.png" + b"\n")


def test_it_ends_quietly_when_nobody_reads_on(run, monkeypatch):
    split = data.training_data(get_profile("mine.toml").data, 0).split
    Results("mine", 0, "02_finetune_deit").metrics(split, "split")  # or it says that none is there
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert not run("data --profile mine.toml", 141).err
