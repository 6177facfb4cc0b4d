"""What goes wrong, one row a fault: the line that the user sees, and that nothing is lost."""

import errno
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from conftest import at_batch, write_photographs

from avit_lib.cli import main
from avit_lib.losses import AdaptiveLoss, Losses
from avit_lib.model import AViT
from avit_lib.training import files

FINISHED = {"best.json", "best.safetensors", "history.csv", "last.json", "last.safetensors"}
UNFINISHED = FINISHED | {"resume.pt"}
OWN = ["--profile", "mine.toml", "--data-dir", "images", "--device", "cpu"]
FIT = ["fit", *OWN, "--output", "output"]  # two epochs of three batches
WEIGHTS = Path("trained/last.safetensors")
TEST = ["test", *OWN, "--ckpt", str(WEIGHTS)]
TRAIN = Path("images/train")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, small_profile):
    """A folder with images, a finished run, and a profile by which another is to be trained."""
    root = tmp_path_factory.mktemp("prepared")
    write_photographs(root / "images", train=10, test=3)
    (root / "mine.toml").write_text(
        f"extends = '{small_profile}'\nfocus = 'avit'\n"
        "runs.avit.training = { epochs = 2, batch_size = 6 }\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert main([*FIT[:-1], "trained", "--epochs", "1"]) == 0
    return root


@pytest.fixture
def patch(prepared, tmp_path, monkeypatch):
    """What faults are made by, in a copy of the prepared folder."""
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AVIT_RESULTS", "results")
    return monkeypatch


def content(folder: str) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path(folder).rglob("*.*") if path.is_file()}


TYPED = {
    "Unknown option: --epoch-count. Did you mean --epochs?": ["--epoch-count", "3"],
    "--seed: '1.5' is no whole number": ["--seed", "1.5"],
    "--lr: '1_0' is no number": ["--lr", "1_0"],
    "avit.training.epochs: Expected `int` >= 1": ["--epochs", "-1"],
    "avit.training.batch_size: Expected `int` <= 2147483647": ["--batch-size", str(10**22)],
    "avit.training.learning_rate: Expected `float` > 0": ["--lr", "nan"],
    "avit.training.learning_rate: Expected `float` <= 1000000.0": ["--lr", "inf"],
    "profile 'mine' has no run 'resnet'; choose from deit, ": ["--model", "resnet"],
    '"none.safetensors" does not exist': ["--ckpt", "none.safetensors"],
}


@pytest.mark.parametrize("message", TYPED)
def test_what_is_typed_wrong_is_told_in_one_line(message, patch, capsys):
    before = content(".")
    assert main([*FIT, *TYPED[message]]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert content(".") == before and not Path("output").exists()


ROWS = []


def fault(message: str, leaves: set[str] = frozenset()):
    """A row of the table: ``message`` is in the line, ``leaves`` are the files left in output."""
    return lambda arrange: ROWS.append(pytest.param(arrange, message, leaves, id=arrange.__name__))


@fault("add --output DIR")
def own_settings_for_the_profiles_folder(patch):
    return ["fit", "--profile", "smoke", "--epochs", "1"]


@fault("train/dark/3.jpg")
def a_truncated_image(patch):
    path = TRAIN / "dark" / "3.jpg"
    path.write_bytes(path.read_bytes()[:300])
    return FIT


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
    return [*FIT, "--ckpt", str(WEIGHTS)]


@fault("last.safetensors is not a whole safetensors file")
def a_pickle_that_would_run_code(patch):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (Path("exploded"),)

    WEIGHTS.write_bytes(pickle.dumps(Bomb()))
    return TEST


@fault("cannot be written (No space left on device); free some space", leaves=UNFINISHED)
def a_disk_that_is_full_after_the_second_epoch(patch):
    calls, write = 0, files.os.fsync

    def full(descriptor):
        nonlocal calls
        calls += 1
        if calls >= 7:  # of the first epoch: history, best (2), last (2), state
            raise OSError(errno.ENOSPC, "No space left on device")
        write(descriptor)

    patch.setattr(files.os, "fsync", full)
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


@fault("out of memory with 250 images at once")
def no_memory_for_an_evaluation(patch):
    patch.setattr(AViT, "forward_with_trace", lambda *_: torch.empty(2**60))
    return TEST


@pytest.mark.parametrize(("arrange", "message", "leaves"), ROWS)
def test_a_fault_is_one_line_and_loses_nothing(arrange, message, leaves, patch, tmp_path, capsys):
    arguments = arrange(patch)
    before = content("trained")
    capsys.readouterr()
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert {path.name for path in Path("output").glob("*")} == leaves
    assert content("trained") == before
    assert not Path("exploded").exists() and not Path("results").exists()
    patch.undo()
    patch.chdir(tmp_path)
    if leaves == UNFINISHED:  # the fault is mended: the same command goes on
        assert main(arguments) == 0
        assert "going on after epoch 1" in capsys.readouterr().out
        assert {path.name for path in Path("output").iterdir()} == FINISHED
