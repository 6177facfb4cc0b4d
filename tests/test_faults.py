"""What goes wrong, one row a fault: the line that the user sees and what is left on disk."""

import errno
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import at_batch
from PIL import Image
from safetensors.torch import load_file, save_file

from avit_lib.cli import main
from avit_lib.losses import AdaptiveLoss, Losses
from avit_lib.model import AViT
from avit_lib.training import files, save_checkpoint

FINISHED = {"best.json", "best.safetensors", "history.csv", "last.json", "last.safetensors"}
UNFINISHED = FINISHED | {"resume.pt"}
MODEL = "avit_nano"


@dataclass(frozen=True)
class Place:
    """Where a fault happens: a copy of a folder of images and one of a finished run, and a folder
    for a new run.
    """

    root: Path
    profile: Path
    patch: pytest.MonkeyPatch

    def __getattr__(self, name: str) -> Path:
        return self.root / name  # images, trained, output

    def fit(self, *changes) -> list[str]:
        """The command that trains two epochs of three batches on ``images`` into ``output``, with
        changed options.
        """
        options = {
            "--profile": self.profile,
            "--device": "cpu",
            "--data-dir": self.images,
            "--output": self.output,
        }
        options |= {"--epochs": 2, "--batch-size": 6} | dict(
            zip(changes[::2], changes[1::2], strict=True)
        )
        return ["fit", *(str(word) for option in options.items() for word in option)]

    def test(self) -> list[str]:
        """The command that evaluates ``trained`` on ``images``."""
        checkpoint = self.trained / "last.safetensors"
        return [
            "test",
            "--profile",
            str(self.profile),
            "--ckpt",
            str(checkpoint),
            "--data-dir",
            str(self.images),
        ]

    def at_batch(self, number: int, happens: Callable[[Losses], Losses]) -> None:
        """Let something happen to the losses of a batch, counted over epochs."""
        at_batch(self.patch, AdaptiveLoss, number, happens)

    def at_write(self, number: int, error: OSError) -> None:
        """Let a write fail, counted over files."""
        calls, write = 0, files.os.fsync

        def failing(descriptor):
            nonlocal calls
            calls += 1
            if calls >= number:
                raise error
            write(descriptor)

        self.patch.setattr(files.os, "fsync", failing)


ROWS = []


def fault(message: str, leaves: set[str] = frozenset(), also: str = ""):
    """A row of the table: ``message`` and ``also`` are in the line; ``leaves`` are the files left
    in ``output``.
    """

    def register(arrange: Callable[[Place], list[str]]):
        ROWS.append(pytest.param(arrange, message, also, leaves, id=arrange.__name__))
        return arrange

    return register


# ---- what is typed ----


@fault(
    "unknown profile 'imagnet'; choose from caltech101, ",
    also=", smoke, or name a file that ends in .toml",
)
def unknown_profile(place):
    return place.fit("--profile", "imagnet")


@fault("Unknown option: --epoch-count. Did you mean --epochs?")
def unknown_option(place):
    return place.fit("--epoch-count", 3)


@fault('Unknown command "train"', also="Available commands: fit, adapt, test")
def unknown_command(place):
    return ["train"]


@fault("Parameter --model specified multiple times")
def an_option_twice(place):
    return [*place.fit("--model", "AViT"), "--model", "DeiT"]


@fault("Unused Tokens: ['more']")
def a_word_too_many(place):
    return [*place.fit(), "more"]


@fault("parameter --lr requires an argument")
def an_option_without_its_value(place):
    return [*place.fit(), "--lr"]


@fault("has no run 'resnet'", also="choose from deit, deit_longer, avit_finetuned, ")
def unknown_model(place):
    return place.fit("--model", "ResNet")


@fault('Invalid value "tpu" for --device. Choose from: "auto", "cpu", "gpu"')
def unknown_device(place):
    return place.fit("--device", "tpu")


@fault("training.epochs: expected `int` >= 1")
def negative_epochs(place):
    return place.fit("--epochs", -1)


@fault("training.batch_size: expected `int` >= 1")
def batches_of_nothing(place):
    return place.fit("--batch-size", 0)


@fault("training.learning_rate: expected `float` > 0")
def negative_learning_rate(place):
    return place.fit("--lr", -0.1)


@fault("training.learning_rate: expected `float` > 0")
def learning_rate_that_is_no_number(place):
    return place.fit("--lr", "nan")


@fault("training.learning_rate: expected `float` <= 1000000.0")
def infinite_learning_rate(place):
    """One step of it would spoil the weights, after the loss was seen to be finite."""
    return place.fit("--lr", "inf")


@fault("training.batch_size: expected `int` <= 2147483647")
def a_batch_that_no_computer_counts(place):
    return place.fit("--batch-size", 10**22)


@fault("Invalid value for --epochs: 'two' is no whole number")
def epochs_in_words(place):
    return place.fit("--epochs", "two")


@fault("run 'avit_finetuned' starts or learns from run 'deit': name its weights by --ckpt")
def weights_to_start_from_are_not_named(place):
    return place.fit("--model", "avit_finetuned")


@fault("add --output DIR")
def own_settings_for_the_profiles_folder(place):
    return ["fit", "--profile", "smoke", "--epochs", "1"]


# ---- profiles of one's own ----


def profile(place: Place, content: str) -> list[str]:
    """The command that trains by a profile with ``content`` in a file."""
    path = place.root / "mine.toml"
    path.write_text(f'extends = "{place.profile}"\n{content}\n')
    return place.fit("--profile", path)


@fault("mine.toml: ", also="(at line 2, column 10); mend this line")
def a_file_that_is_no_toml(place):
    return profile(place, "epochs = ")


@fault("mine.toml: runs.deit.training: ", also="contains unknown field `epoch`")
def a_setting_that_does_not_exist(place):
    return profile(place, "training.epoch = 3")


@fault("mine.toml: runs.avit.halting.eps: expected `float` < 1.0")
def a_setting_that_makes_no_sense(place):
    return profile(place, "runs.avit.halting.eps = 2.0")


@fault("mine.toml: focus names 'nobody', but the runs are deit")
def a_run_that_is_not_declared(place):
    return profile(place, 'focus = "nobody"')


@fault(
    "caltech24.toml would share the results of the profile caltech24: give the file another name"
)
def the_name_of_another_profile(place):
    path = place.root / "caltech24.toml"
    path.write_text('extends = "smoke"')
    return place.fit("--profile", path)


@fault("unknown profile 'missing.toml'")
def a_profile_file_that_is_not_there(place):
    return place.fit("--profile", "missing.toml")


@fault(
    "mine.toml: data: there is no data set 'FashionMNIST'; choose from Caltech101, Caltech256, ImageNet"
)
def a_data_set_that_is_gone(place):
    return profile(place, "data.dataset = 'FashionMNIST'")


@fault("mine.toml: runs.deit.training: there is no optimizer 'muon'; choose from adamw, ")
def an_optimizer_that_is_gone(place):
    return profile(place, "training.optimizer = 'muon'")


# ---- data ----


@fault("nowhere/train holds no images in one folder a class")
def no_data_folder(place):
    return place.fit("--data-dir", place.root / "nowhere")


@fault("train holds no images in one folder a class")
def empty_data_folder(place):
    shutil.rmtree(place.images / "train")
    (place.images / "train").mkdir()
    return place.fit()


@fault("train holds no images in one folder a class")
def a_class_without_images(place):
    for path in (place.images / "train" / "dark").iterdir():
        path.unlink()
    return place.fit()


@fault("all training images are of class 'bright': add a folder of another class")
def a_single_class(place):
    shutil.rmtree(place.images / "train" / "dark")
    return place.fit()


@fault("a class in", also="has a single image, so none can be held out; add images")
def a_class_with_one_image(place):
    for path in sorted((place.images / "train" / "dark").iterdir())[1:]:
        path.unlink()
    return place.fit()


@fault("val has other classes than the model or the training images: bright, dark, grey; rename")
def other_classes_for_validation(place):
    shutil.copytree(place.images / "test" / "dark", place.images / "val" / "grey")
    return place.fit()


@fault("train/dark/3.jpg", also="cannot be read as")
def a_truncated_image(place):
    path = place.images / "train" / "dark" / "3.jpg"
    path.write_bytes(path.read_bytes()[:300])
    return place.fit()


@fault("train/dark/3.jpg", also="cannot be read as")
def a_text_named_jpg(place):
    (place.images / "train" / "dark" / "3.jpg").write_text("see attachment")
    return place.fit()


@fault("train/dark/3.jpg", also="cannot be read as")
def an_empty_image_file(place):
    (place.images / "train" / "dark" / "3.jpg").write_bytes(b"")
    return place.fit()


# ---- checkpoints ----


@fault("last.json is missing; make it again, or name another checkpoint")
def no_checkpoint(place):
    shutil.rmtree(place.trained)
    return place.test()


@fault("last.safetensors is not a whole safetensors file", also="train or download it again")
def a_truncated_checkpoint(place):
    path = place.trained / "last.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return place.test()


@fault("does not match the checksum beside it: it is damaged or foreign; train it again")
def a_changed_checkpoint(place):
    path = place.trained / "last.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    return place.test()


@fault("last.json is damaged", also="delete it and make it again")
def a_damaged_description(place):
    path = place.trained / "last.json"
    path.write_text(path.read_text()[:100])
    return place.test()


@fault("last.json holds a list; delete it and make it again")
def a_description_that_is_a_list(place):
    (place.trained / "last.json").write_text("[1, 2]")
    return place.test()


@fault("last.safetensors is missing or a folder")
def a_folder_in_place_of_a_checkpoint(place):
    (place.trained / "last.safetensors").unlink()
    (place.trained / "last.safetensors").mkdir()
    return place.test()


@pytest.mark.parametrize("name", ["last.json", "last.safetensors"])
def test_a_file_that_may_not_be_read_is_named(name, place, capsys):
    opened = Path.open

    def refused(path, *mode, **more):
        if path.name == name:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *mode, **more)

    place.patch.setattr(Path, "open", refused)
    place.patch.setattr(Path, "read_text", lambda path, *more: refused(path).read())
    assert main(place.test()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and f"Permission denied: '{place.trained / name}'" in line


@fault("is of another architecture: it lacks blocks.3.", also="foreign.safetensors")
def weights_of_another_architecture(place):
    model = timm.create_model(MODEL, depth=3, num_classes=2)
    save_checkpoint(place.root / "foreign.safetensors", model, MODEL, {})
    return place.fit("--ckpt", place.root / "foreign.safetensors")


@fault(
    "foreign.safetensors has another number of classes: head.weight is [7, 16], the model's [2, 16]"
)
def weights_for_another_number_of_classes(place):
    model = timm.create_model(MODEL, num_classes=7)
    save_checkpoint(place.root / "foreign.safetensors", model, MODEL, {})
    return place.fit("--ckpt", place.root / "foreign.safetensors")


@fault("foreign.safetensors is of another architecture: it lacks norm.weight and 0 more")
def weights_with_a_missing_key(place):
    weights = load_file(place.trained / "last.safetensors")
    del weights["norm.weight"]
    save_file(weights, place.root / "foreign.safetensors")
    shutil.copy(place.trained / "last.json", place.root / "foreign.json")
    return place.fit("--ckpt", place.root / "foreign.safetensors")


@fault("last.safetensors is not a whole safetensors file")
def a_pickle_that_would_run_code(place):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (place.root / "exploded",)

    (place.trained / "last.safetensors").write_bytes(pickle.dumps(Bomb()))
    return place.test()


@fault("has other classes than the model or the training images: bright, light")
def other_classes_for_the_test(place):
    shutil.move(place.images / "test" / "bright", place.images / "test" / "light")
    return place.test()


@fault("last_test.json describes a checkpoint of that name; rename one of them")
def a_record_over_another_checkpoint(place):
    shutil.copy(place.trained / "last.safetensors", place.trained / "last_test.safetensors")
    return place.test()


@fault("was trained for other classes than those of the training images")
def a_start_that_knows_other_classes(place):
    for part in ("train", "test"):
        shutil.move(place.images / part / "bright", place.images / part / "light")
    return place.fit("--ckpt", place.trained / "last.safetensors")


@fault("'1.5' is no whole number")
def a_seed_that_is_no_whole_number(place):
    return place.fit("--seed", "1.5")


# ---- the disk ----


@fault(
    "last.json cannot be written (No space left on device); free some space, then run the same command again",
    leaves=UNFINISHED - {"last.json"},
)
def a_disk_that_is_full_after_the_first_epoch(place):
    place.at_write(
        6, OSError(errno.ENOSPC, "No space left on device")
    )  # state, history, best (2), last (2)
    return place.fit()


@fault("resume.pt cannot be written (No space left on device)", leaves=UNFINISHED)
def a_disk_that_is_full_after_the_second_epoch(place):
    place.at_write(7, OSError(errno.ENOSPC, "No space left on device"))
    return place.fit()


@fault("output cannot be written (Permission denied); name another folder, or allow writing there")
def no_permission_to_write(place):
    def refused(dir):
        raise PermissionError(errno.EACCES, "Permission denied", dir)

    place.patch.setattr(files.tempfile, "TemporaryFile", refused)
    return place.fit()


@fault("cannot be written (Not a directory); name another folder")
def an_output_folder_inside_a_file(place):
    return place.fit("--output", place.trained / "last.json" / "run")


@fault("trained holds another run; name another folder, or delete it to start again")
def the_folder_of_another_run(place):
    return place.fit("--output", place.trained)


@fault("history.csv cannot be read", also="to train again")
def a_finished_run_without_its_history(place):
    assert main(place.fit()) == 0
    (place.output / "history.csv").unlink()
    return place.fit()


# ---- training ----


def not_a_number(losses: Losses) -> Losses:
    return Losses(losses.total * float("nan"), losses.parts)


@fault(
    "the loss became nan in epoch 1, batch 2; lower the learning rate and train into another folder, by --output"
)
def a_loss_that_is_no_number(place):
    place.at_batch(2, not_a_number)
    return place.fit()


@fault(
    "the loss became nan in epoch 2, batch 3",
    also="the checkpoints of the last finished epoch are kept",
    leaves=UNFINISHED,
)
def a_loss_that_is_no_number_later(place):
    place.at_batch(6, not_a_number)
    return place.fit()


@fault("the gradient became nan in epoch 1, batch 3")
def a_gradient_that_is_no_number(place):
    """A finite loss whose gradient is not: the weights would be lost without a sign of it."""
    place.at_batch(3, lambda losses: Losses(losses.total + (0 * losses.total).sqrt(), losses.parts))
    return place.fit()


def out_of_memory(*_):
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation"
    )


@fault(
    "out of memory with 6 images at once; lower batch_size (--batch-size), or train on more devices"
)
def no_memory_for_a_batch(place):
    place.at_batch(2, out_of_memory)
    return place.fit()


@fault("out of memory with 6 images at once; lower batch_size (--batch-size)", leaves=UNFINISHED)
def no_memory_on_a_cpu(place):
    def allocate(_):
        torch.empty(2**60)

    place.at_batch(4, allocate)
    return place.fit()


@fault("out of memory with 250 images at once; lower batch_size of predict, or use --device cpu")
def no_memory_for_an_evaluation(place):
    place.patch.setattr(AViT, "forward_with_trace", out_of_memory)
    return place.test()


# ---- the table is run ----


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, small_profile):
    """A folder of images of two classes, and a run trained on it."""
    place = Place(tmp_path_factory.mktemp("prepared"), small_profile, None)
    generator = np.random.default_rng(0)
    for split, count in (("train", 10), ("test", 3)):
        for label, brightness in (("bright", 150), ("dark", 20)):
            (place.images / split / label).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(brightness, brightness + 100, (30, 40), dtype=np.uint8)
                Image.fromarray(pixels).save(place.images / split / label / f"{number}.jpg")
    assert main(place.fit("--epochs", 1, "--output", place.trained)) == 0
    return place


@pytest.fixture
def place(prepared, tmp_path, monkeypatch):
    shutil.copytree(prepared.images, tmp_path / "images")
    shutil.copytree(prepared.trained, tmp_path / "trained")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AVIT_RESULTS", str(tmp_path / "results"))
    return Place(tmp_path, prepared.profile, monkeypatch)


@pytest.mark.parametrize(("arrange", "message", "also", "leaves"), ROWS)
def test_a_fault_is_one_line_and_loses_nothing(arrange, message, also, leaves, place, capsys):
    arguments = arrange(place)
    before = {path: path.read_bytes() for path in place.trained.rglob("*.*") if path.is_file()}
    capsys.readouterr()
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line and also in line
    if arrange is not a_finished_run_without_its_history:
        assert {path.name for path in place.output.glob("*")} == leaves
    assert {
        path: path.read_bytes() for path in place.trained.rglob("*.*") if path.is_file()
    } == before
    assert not (place.root / "exploded").exists() and not (place.root / "results").exists()
    place.patch.undo()
    if leaves:  # the fault is mended: the same command goes on
        assert main(arguments) == 0
        assert "going on after epoch 1" in capsys.readouterr().out
        assert {path.name for path in place.output.iterdir()} == FINISHED


def sixteen_bit(path: Path) -> None:
    Image.fromarray((np.arange(1200).reshape(30, 40) * 50).astype(np.uint16)).save(
        path.with_suffix(".png")
    )
    path.unlink()


def palette(path: Path) -> None:
    Image.open(path).convert("P").save(path.with_suffix(".png"))
    path.unlink()


def one_pixel(path: Path) -> None:
    Image.new("L", (1, 1), 30).save(path)


def cmyk(path: Path) -> None:
    Image.new("CMYK", (40, 30), (0, 0, 0, 200)).save(path)


@pytest.mark.parametrize("kind", [cmyk, palette, one_pixel, sixteen_bit])
def test_unusual_images_are_taken_as_they_are_meant(kind, place):
    kind(place.images / "train" / "dark" / "3.jpg")
    assert main(place.fit("--epochs", 1)) == 0
    assert {path.name for path in place.output.iterdir()} == FINISHED


def test_the_table_has_a_row_for_every_kind_of_fault():
    assert len(ROWS) >= 25
