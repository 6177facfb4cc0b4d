"""Profiles: what a file says is what counts, and whatever is wrong in it is named in one line, with
file and key.
"""

import os
import subprocess
import sys
from inspect import signature
from pathlib import Path

import pytest
import timm

from avit_lib.errors import UserError
from avit_lib.losses import AdaptiveLoss, Teacher
from avit_lib.model import AViT
from avit_lib.study.settings import Distillation, Halting, changed, get_profile, profile_names
from avit_lib.training import Training

SMOKE = get_profile("smoke")
DATA = "[data]\ndataset = 'Caltech101'\nimage_size = 64\nvalidation_per_class = 2\n"
RUN = "label = 'x'\nmodel = 'deit_tiny_patch16_224'\ninit = 'pretrained'\npretrained = 'deit_tiny_patch16_224.fb_in1k'\n"


@pytest.fixture
def profile(tmp_path):
    """Reads a profile from a file own.toml with the text that it is given, over ``base``."""

    def read(text, base="smoke", name="own"):
        path = tmp_path / f"{name}.toml"
        path.write_text((f"extends = '{base}'\n" if base else "") + text)
        return get_profile(str(path))

    return read


@pytest.mark.parametrize("name", profile_names())
def test_a_profile_of_the_library_is_whole(name):
    found = get_profile(name)
    assert found.name == name and found.plain in found.runs
    assert found.run(found.focus).halting
    for run in found.runs:
        assert found.run(run.name) == run and timm.is_model(run.model)
        assert isinstance(timm.create_model(run.model), AViT) == bool(run.halting)
        assert bool(run.pretrained) == (run.init == "pretrained")


def test_there_is_a_profile_for_every_study():
    assert profile_names() == ["caltech101", "caltech24", "caltech256", "imagenet", "smoke"]


def test_defaults_are_those_of_the_method():
    arguments = signature(AViT).parameters
    assert {
        name: arguments[name].default for name in Halting().model_arguments
    } == Halting().model_arguments
    assert AdaptiveLoss(**Halting().objective) == AdaptiveLoss()
    taught = Teacher(timm.create_model("avit_nano"))
    assert (taught.alpha, taught.temperature) == (Distillation().alpha, Distillation().temperature)


# --- a file over another --------------------------------------------------------------------------


def test_a_profile_that_extends_another_has_its_settings_but_for_its_own(profile):
    own = profile("data.image_size = 32\nruns.avit.halting.beta = -1.0\nruns.avit.label = 'mine'\n")
    run, base = own.run("avit"), SMOKE.run("avit")
    assert own.name == "own" and own.data == changed(SMOKE.data, "data", image_size=32)
    assert run == changed(
        base, "avit", label="mine", halting=changed(base.halting, "halting", beta=-1.0)
    )
    assert own.run("deit") == SMOKE.run("deit") and own.recalibrated == SMOKE.recalibrated


def test_a_profile_extends_a_file_beside_it_whatever_the_working_folder(
    profile, tmp_path, monkeypatch
):
    (tmp_path / "bases").mkdir()
    (tmp_path / "bases" / "mine.toml").write_text(
        "extends = 'smoke'\npurpose = 'mine'\nrecalibrated.avit = [2.5]\n"
    )
    monkeypatch.chdir("/")
    own = profile("recalibrated.avit = [1.5]\n", base="bases/mine.toml")
    assert (own.name, own.purpose, own.recalibrated) == (
        "own",
        "mine",
        SMOKE.recalibrated | {"avit": (1.5,)},
    )
    assert own.runs == SMOKE.runs


def test_a_profile_with_a_byte_order_mark_is_read(profile):
    assert profile("\ufeffextends = 'smoke'\n", base=None).runs == SMOKE.runs


def test_a_profile_is_read_by_its_path_from_the_working_folder(profile, tmp_path, monkeypatch):
    own = profile("")
    monkeypatch.chdir(tmp_path)
    assert get_profile("own.toml") == own


def test_sections_for_all_runs_give_way_to_those_of_a_run(profile):
    own = profile(
        f"""purpose = 'x'
        {DATA}
        [training]
        epochs = 7
        learning_rate = 0.5
        [halting]
        beta = -4.0
        gamma = 2.0
        [runs.deit]
        {RUN}
        [runs.avit_finetuned]
        extends = 'deit'
        label = 'y'
        model = 'avit_tiny_patch16_224'
        training.learning_rate = 0.25
        halting.beta = -1.0
        [runs.child]
        extends = 'avit_finetuned'
        label = 'z'
        training.epochs = 3
        [runs.pupil]
        extends = 'child'
        label = 'p'
        init = 'child'
        """,
        base=None,
    )
    assert [run.name for run in own.runs] == ["deit", "avit_finetuned", "child", "pupil"]
    deit, avit, child, _ = own.runs
    assert deit.training == Training(epochs=7, learning_rate=0.5) and deit.halting is None
    assert avit.training == Training(epochs=7, learning_rate=0.25) and avit.halting == Halting(
        beta=-1.0, gamma=2.0
    )
    assert (
        child.training == Training(epochs=3, learning_rate=0.25) and child.halting == avit.halting
    )
    assert [run.name for run in own.chain("pupil")] == ["child", "pupil"]


# --- faults ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("colour = 1", "unknown field `colour`"),
        ("[training]\nepoch = 3", "training: .*unknown field `epoch`"),
        ("runs.avit.halting.colour = 1", "runs.avit.halting: .*unknown field `colour`"),
        ("data.colour = 1", "data: .*unknown field `colour`"),
        ("[training]\nbatch_size = 'two'", "training.batch_size: expected `int`, got `str`"),
        ("runs.avit.training.batch_size = 1.5", "runs.avit.training.batch_size: expected `int`"),
        ("runs.avit.training = 3", "runs.avit.training: expected `object`, got `int`"),
        ("smoke = 'yes'", "smoke: expected `bool`, got `str`"),
        ("runs.avit.training.epochs = 0", "runs.avit.training.epochs: .*>= 1"),
        ("runs.avit.training.learning_rate = nan", "runs.avit.training.learning_rate: .*> 0"),
        ("runs.avit.training.precision = 'float8'", "runs.avit.training.precision: .*'float8'"),
        (
            "runs.avit.training.optimizer = 'nobody'",
            "runs.avit.training: there is no optimizer 'nobody'; choose from adamw, ",
        ),
        ("runs.avit.halting.eps = 1.0", "runs.avit.halting.eps: .*< 1"),
        ("[halting]\neps = 1.0", "halting.eps: .*< 1"),
        ("recalibrated.avit = [2.0, 0.5]", r"recalibrated\[.*\]: .*>= 1"),
        ("recalibrated.nobody = [2.0]", "recalibrated names 'nobody', but the runs are deit"),
        ("recalibrated.deit = [2.0]", "recalibrated names 'deit', a run without halting"),
        ("budgets.avit = [0.4]", "budgets names 'avit', a run without saved"),
        ("merging = [-1]", r"merging\[.*\]: .*>= 0"),
        ("runs.Two.label = 'x'", "runs.Two"),
        ("name = 'mine'", "name: a profile is called like its file"),
        (
            "data.dataset = 'CIFAR10'",
            "data: there is no data set 'CIFAR10'; choose from Caltech101, ",
        ),
        (
            "data = {dataset = 'ImageNet', classes = ['ant']}",
            "data: of ImageNet all classes .* take part",
        ),
        ("search.x.label = 'x'", "unknown field `search`"),
        ("data.augmentation = 'strong'", "data.augmentation: .*'strong'"),
        ("data.train_per_class = 'some'", "data.train_per_class: .*'some'"),
        ("data.test_per_class = 0", "data.test_per_class: .*>= 1"),
        ("\n[runs.deit", r"line 3"),
        ("\n\nfocus = deit", r"line 4"),
        ("\ud83d", "codec"),
        ("focus = 'nobody'", "focus.*'nobody'"),
        ("sweep = ['deit', 'nobody']", "sweep.*'nobody'"),
        ("runs.avit.init = 'nobody'", r"avit\.init.*'nobody'"),
        ("runs.avit.teacher = 'nobody'", r"avit\..*teacher.*'nobody'"),
        ("runs.avit.init = 'random'", r"avit\.init.*'random'"),
        ("runs.avit.extends = 'nobody'", r"runs\.avit\.extends: .*'nobody'"),
        ("runs = 3", "runs: expected `object`, got `int`"),
        ("runs.avit = 3", "runs.*: expected `object`, got `int`"),
        ("runs.deit.init = 'deit'", "circle: deit, deit"),
        ("runs.deit.init = 'avit_finetuned'", "circle: .*avit_finetuned"),
        ("runs.deit.saved = 0.3\nruns.deit_longer.saved = 0.3", "runs: a plain one is missing"),
        ("runs.avit.saved = 0.3", r"runs\.avit: it both halts and merges"),
        ("runs.deit.halting = {}", r"runs\.deit: model 'deit_tiny_.*' and halting"),
        (
            "[runs.x]\nextends = 'deit'\nmodel = 'avit_tiny_patch16_224'",
            r"runs\.x: model 'avit_.*' and halting",
        ),
        (
            "runs.deit_longer.init = 'pretrained'",
            r"runs\.deit_longer: init is pretrained; name the weights",
        ),
        (
            "runs.avit = {init = 'pretrained', pretrained = 'x', halting.projection = true}",
            r"runs\.avit: timm's weights have no projection; fine-tune a plain model first",
        ),
        (
            "runs.avit_published.halting.channel_rate = 0.5",
            r"runs\.avit_published\.halting: channel_rate is of a fitted",
        ),
        (
            "runs.deit.training.warmup_epochs = 2",
            r"runs\.deit: warmup_epochs must be fewer than epochs, not 2 of 2",
        ),
        (
            "runs.deit.label = 'A-ViT halting held'",
            "label 'A-ViT halting held': .* that no other run has",
        ),
        ("runs.deit.label = 'cost $5 and $6'", r"runs\.deit: label 'cost \$5 .* leave out the \$"),
        ("runs.deit.label = 'DeiT, mine'", "label 'DeiT, mine': tables need one without a comma"),
        ("runs.deit.saved = 0.9", "runs.deit.saved: expected `float` <= 0.8"),
        ("[runs.new]\nlabel = 'x'", r"runs\.new: .*required field `model`"),
    ],
)
def test_a_fault_is_named_with_its_file_and_key(text, words, tmp_path):
    path = tmp_path / "own.toml"
    path.write_bytes(f"extends = 'smoke'\n{text}\n".encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match=words) as error:
        get_profile(str(path))
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "required field `purpose`"),
        ("purpose = 'x'\n", "required field `data`"),
        (
            f"purpose = 'x'\n{DATA}[runs.avit_finetuned]\n{RUN}",
            r"runs\.avit_finetuned\.training: .*field `epochs`",
        ),
        (
            f"purpose = 'x'\n{DATA}[training]\nepochs = 1\nlearning_rate = 1.0\n[runs.deit]\n{RUN}",
            "focus.*are deit",
        ),
    ],
)
def test_what_a_profile_of_its_own_lacks_is_named(text, words, profile):
    with pytest.raises(UserError, match=words) as error:
        profile(text, base=None)
    assert "own.toml: " in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("cycle", [["own"], ["own", "other"]])
def test_a_profile_that_extends_itself_is_refused(cycle, tmp_path):
    for name, base in zip(cycle, [*cycle[1:], cycle[0]], strict=True):
        (tmp_path / f"{name}.toml").write_text(f"extends = '{base}.toml'\n")
    with pytest.raises(UserError, match=r"own\.toml: extends itself"):
        get_profile(str(tmp_path / "own.toml"))


@pytest.mark.parametrize("base", ["nobody", "nobody.toml"])
def test_a_profile_that_extends_nobody_is_refused(profile, base):
    with pytest.raises(
        UserError, match=rf"own\.toml: extends: unknown profile '{base}'; choose from"
    ) as error:
        profile("", base=base)
    assert "\n" not in str(error.value)


def test_profiles_are_found_in_a_checkout_that_is_reached_by_a_link(tmp_path):
    (tmp_path / "link").symlink_to(Path(__file__).parents[2])
    code = "from avit_lib.study.settings import get_profile; print(get_profile('smoke').name)"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "link")}
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert found.stdout == "smoke\n", found.stderr


def test_a_file_named_like_a_profile_of_the_library_is_refused(profile):
    with pytest.raises(
        UserError, match=r"caltech24\.toml would share the results of the profile caltech24"
    ):
        profile("", name="caltech24")


@pytest.mark.parametrize("name", ["nobody", "nobody.toml", "/nowhere/smoke.toml", ""])
def test_an_unknown_profile_is_named_with_those_there_are(name):
    with pytest.raises(
        UserError, match=f"unknown profile '{name}'; choose from .*, caltech24, "
    ) as error:
        get_profile(name)
    assert "\n" not in str(error.value)


def test_an_unknown_run_is_named_with_those_there_are():
    with pytest.raises(UserError, match=r"profile 'smoke' has no run 'nobody'; choose from deit, "):
        SMOKE.run("nobody")


@pytest.mark.parametrize(
    ("settings", "changes", "words"),
    [
        (SMOKE.data, {"image_size": 0}, "image_size: .*>= 1"),
        (SMOKE.data, {"dataset": "SVHN"}, "there is no data set 'SVHN'"),
        (SMOKE.run("deit").training, {"epochs": -1}, "epochs: .*>= 1"),
        (SMOKE.run("deit").training, {"learning_rate": float("nan")}, "learning_rate: .*> 0"),
        (SMOKE.run("deit").training, {"batch_size": "all"}, "batch_size: .*got `str`"),
        (SMOKE.run("avit").halting, {"eps": 0.0}, "eps: .*> 0"),
        (SMOKE.run("avit"), {"colour": 1}, "unknown field `colour`"),
        (SMOKE, {"focus": "nobody"}, "focus.*'nobody'"),
    ],
)
def test_changes_are_checked_like_a_file(settings, changes, words):
    with pytest.raises(UserError, match=f"place.*{words}") as error:
        changed(settings, "place", **changes)
    assert "\n" not in str(error.value)


def test_changes_leave_all_else():
    training = SMOKE.run("deit").training
    found = changed(training, "training", epochs=5)
    assert found.epochs == 5 and changed(found, "training", epochs=training.epochs) == training
    assert training.epochs == 2
