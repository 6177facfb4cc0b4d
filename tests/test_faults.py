"""What goes wrong, one row a fault: the line that the user sees, and that nothing is lost."""

import errno
import pickle
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import at_batch, read_files

from avit_lib.cli import main
from avit_lib.losses import AdaptiveLoss, Losses
from avit_lib.model import AViT
from avit_lib.training import files

FINISHED = {"best.json", "best.safetensors", "history.csv", "last.json", "last.safetensors"}
UNFINISHED = FINISHED | {"resume.pt"}
OWN = "--profile mine.toml --data-dir images --device cpu"
START = f"fit {OWN} --output output"
FIT = f"{START} --model avit --epochs 2 --batch-size 6"  # of three batches
WEIGHTS = Path("avit/last.safetensors")
TEST = f"test {OWN} --ckpt {WEIGHTS}"
TRAIN = Path("images/train")
ADAPT = "adapt --images images --output new.safetensors"
OTHERS = f"{ADAPT} --weights plain.safetensors"
DRAW = f"visualize --ckpt {WEIGHTS} --output"
IMAGE = "images/test/dark/0.jpg"

TYPED = {
    "Unknown option: --epoch-count. Did you mean --epochs?": f"{START} --epoch-count 3",
    "--seed: '1.5' is no whole number": f"{START} --seed 1.5",
    "--lr: '1_0' is no number": f"{START} --lr 1_0",
    "avit_finetuned.training.epochs: Expected `int` >= 1": f"{START} --epochs -1",
    "training.batch_size: Expected `int` <= 2147483647": f"{START} --batch-size {10**22}",
    "avit_finetuned.training.learning_rate: Expected `float` > 0": f"{START} --lr nan",
    "avit_finetuned.training.learning_rate: Expected `float` <= 1000000.0": f"{START} --lr inf",
    "profile 'mine' has no run 'resnet'; choose from deit, ": f"{START} --model resnet",
    '"none.safetensors" does not exist': f"{START} --ckpt none.safetensors",
    "settings of your own need a folder of their own: add": "fit --profile smoke --epochs 1",
    "there is no model 'none'": f"{OTHERS} --model none",
    "ResNet cannot be adapted: it is no": f"{OTHERS} --model resnet18",
    "plain.safetensors is of another model": f"{OTHERS} --model deit_tiny_distilled_patch16_224",
    "cannot be made: Invalid pretrained tag": f"{ADAPT} --model vit_tiny_patch16_224.none",
    "Unknown option: --profile": f"{OTHERS} --profile none",
    "no image is named; a file whose name begins with [": f"{DRAW} new.png --images []",
    "between 0 and 0.8": f"{OTHERS} --model deit_nano --saved 0.9",
    "of model avit_nano, not deit_nano": f"{ADAPT} --model deit_nano --weights {WEIGHTS}",
    "empty holds 0 images": f"adapt --images empty --output new.safetensors --weights {WEIGHTS}",
    'must have extension "safetensors"': "adapt --images images --output new.bin",
    "annotations.json is there": "adapt --images images --output annotations.safetensors",
    f"{WEIGHTS} is there already": f"adapt --images images --output {WEIGHTS}",
    'Invalid value "new.gif" for --output': f"{DRAW} new.gif --images {IMAGE}",
    '"²" does not exist': f"{DRAW} new.png --images ²",
    f"{IMAGE} is read, too; name another --output": f"{DRAW} {IMAGE} --images {IMAGE}",
    "a model whose tokens all go": f"visualize --images {IMAGE} --ckpt deit/last.safetensors",
    "was trained as avit, not deit": f"{TEST} --model deit",
    "trained with seed 3; leave out --seed": f"{TEST} --seed 7",
    "is a variable of your shell not set?": f"{START} --ckpt  ",
    "A-ViT halting trained has not been trained to the end": "test --profile mine.toml",
}


@pytest.mark.parametrize("message", TYPED)
def test_what_is_typed_wrong_is_told_in_one_line(message, workplace, capsys):
    Path("empty").mkdir()
    Path("annotations.json").write_text("[]")
    shutil.copy("deit/last.safetensors", "plain.safetensors")  # without what is known of it
    before = read_files(".")
    assert main(TYPED[message].split(" ")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert read_files(".") == before


ROWS = []


def fault(message, leaves=frozenset()):
    """A row of the table: ``message`` is in the line, ``leaves`` are the files left in output."""
    return lambda arrange: ROWS.append(pytest.param(arrange, message, leaves, id=arrange.__name__))


@fault("all training images are of class 'bright': add a folder of another class")
def a_single_class(patch):
    shutil.rmtree(TRAIN / "dark")
    return FIT


@fault("has other classes than the model or the training images")
def other_classes_for_the_test(patch):
    shutil.move("images/test/bright", "images/test/light")
    return TEST


@fault("knows other classes than the training images")
def a_start_that_knows_other_classes(patch):
    shutil.move(TRAIN / "bright", TRAIN / "light")
    return f"{FIT} --ckpt {WEIGHTS}"


@fault("last.safetensors does not match the checksum beside it")
def a_start_beside_the_json_of_another_model(patch):
    shutil.copy("deit/last.json", WEIGHTS.with_suffix(".json"))
    return f"{START} --model deit --ckpt {WEIGHTS}"


@fault("started from a model, or was taught by one, that was trained on other")
def a_start_that_may_know_the_test_images(patch):
    shutil.move(IMAGE, TRAIN / "dark" / "moved.jpg")
    start = f"{START} --model deit --epochs 1 --batch-size 6 --ckpt deit/last.safetensors"
    assert main(start.split()) == 0
    shutil.move("output", "started")
    return f"test {OWN} --ckpt started/last.safetensors"


@fault("last.safetensors is not a whole safetensors file")
def a_pickle_that_would_run_code(patch):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (Path("exploded"),)

    WEIGHTS.write_bytes(pickle.dumps(Bomb()))
    return TEST


@fault("cannot be written (No space left on device); free some space", leaves=UNFINISHED)
def a_disk_that_is_full_after_the_second_epoch(patch):
    full = OSError(errno.ENOSPC, "No space left on device")
    # In the first epoch history, best (2), last (2) and state are written.
    patch.setattr(files.os, "fsync", Mock(side_effect=[None] * 6 + [full]))
    return FIT


@fault("gradient nan in epoch 1, batch 3")
def a_gradient_that_is_no_number(patch):
    """A finite loss whose gradient is not: the weights would be lost without a sign of it."""

    def spoil(losses):
        return Losses(losses.total + (0 * losses.total).sqrt(), losses.parts)

    at_batch(patch, AdaptiveLoss, 3, spoil)
    return FIT


@fault("out of memory with 6 images at once; lower batch_size (--batch-size)", leaves=UNFINISHED)
def no_memory_for_a_batch(patch):
    at_batch(patch, AdaptiveLoss, 4, lambda _: torch.empty(2**60))
    return FIT


@fault("out of memory with 100 images at once")
def no_memory_for_an_evaluation(patch):
    patch.setattr(AViT, "forward_with_trace", lambda *_: torch.empty(2**60))
    return TEST


@pytest.mark.parametrize(("arrange", "message", "leaves"), ROWS)
@pytest.mark.usefixtures("workplace")
def test_a_fault_is_one_line_and_loses_nothing(
    arrange, message, leaves, tmp_path, monkeypatch, capsys
):
    arguments = arrange(monkeypatch).split()
    before = read_files("avit")
    capsys.readouterr()
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert {path.name for path in Path("output").glob("[!.]*")} == leaves
    assert read_files("avit") == before
    assert not Path("exploded").exists() and not Path("results").exists()
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    if leaves == UNFINISHED:  # the fault is mended: the same command goes on
        assert main(arguments) == 0
        assert "going on after epoch 1" in capsys.readouterr().out
        assert {path.name for path in Path("output").glob("[!.]*")} == FINISHED
