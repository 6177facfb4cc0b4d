"""Profiles: what a file says is what counts; what is wrong in it is told with file and key."""

from inspect import signature

import pytest
import timm
from conftest import refused

from avit_lib.losses import AdaptiveLoss
from avit_lib.model import AViT
from avit_lib.study import get_profile
from avit_lib.study.settings import Halting

SMOKE = get_profile("smoke")


@pytest.fixture
def read(tmp_path):
    """Reads a profile from a file own.toml with the text that it is given."""

    def read(text, name="own"):
        path = tmp_path / f"{name}.toml"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        return get_profile(str(path))

    return read


@pytest.mark.parametrize("name", ["caltech101", "caltech24", "caltech256", "imagenet", "smoke"])
def test_a_profile_of_the_library_has_the_runs_that_notebooks_name(name):
    found = get_profile(name)
    assert [run.name for run in found.runs] == [run.name for run in SMOKE.runs]
    assert found.plain.name == "deit" and found.run(found.focus).halting
    for run in found.runs:
        assert isinstance(timm.create_model(run.model), AViT) == bool(run.halting)
        assert {run.start, run.teacher} <= {"deit", ""}  # the first: notebook 02 trains it
    assert {*found.sweep, *found.recalibrated, *found.budgets} <= {run.name for run in found.runs}


def test_the_recipe_on_imagenet_is_that_of_the_paper():
    run = get_profile("imagenet").run("avit_published")
    training, halting = run.training, run.halting
    assert (training.epochs, training.batch_size, training.learning_rate) == (100, 512, 5e-4)
    assert halting == Halting(gamma=5.0, beta=-10.0, alpha_ponder=5e-4, alpha_distr=0.1)
    assert (halting.target_depth, run.teacher) == (8.0, "")


def test_defaults_are_those_of_the_method():
    arguments = signature(AViT).parameters
    for name, value in Halting().model_arguments.items():
        assert arguments[name].default == value
    assert AdaptiveLoss(**Halting().objective) == AdaptiveLoss()


def test_a_profile_has_the_settings_of_the_one_it_extends_but_for_its_own(
    read, tmp_path, monkeypatch
):
    told = "purpose = 'mine'\nnotes = ['mine']\nlicence = 'MIT'\n"
    base = read(f"extends = 'smoke'\n{told}recalibrated.avit = [2.5]\npeers = {{}}\n", "base")
    assert (base.purpose, base.notes, base.licence) == ("mine", ("mine",), "MIT")
    monkeypatch.chdir("/")  # a path is looked for beside the file
    # The section for all runs gives way to that of a run.
    own = read(
        "\ufeffextends = 'base.toml'\ndata.image_size = 32\nruns.avit.halting.beta = -1.0\n"
        "training.weight_decay = 0.5\nruns.deit.training.weight_decay = 0.25\n"
        "[runs.child]\nextends = 'avit'\nlabel = 'child'\ntraining.epochs = 3\n"
    )
    assert (own.name, own.purpose) == ("own", "base with other settings")
    assert (own.notes, own.licence) == ((), "")  # those of the base are not its own
    assert (own.recalibrated, own.peers) == ({"avit": (2.5,)}, {})
    assert own.data.image_size == 32 and own.data.classes == SMOKE.data.classes
    avit, child = own.run("avit"), own.run("child")
    assert avit.halting.beta == child.halting.beta == -1.0
    assert avit.halting.target_std == SMOKE.run("avit").halting.target_std
    assert (avit.training.epochs, child.training.epochs) == (1, 3)
    assert [run.training.weight_decay for run in own.runs] == [0.25] + [0.5] * 8
    monkeypatch.chdir(tmp_path)
    assert get_profile("own.toml") == own


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("runs.avit.halting.projection = true", "runs.avit.halting: .*unknown field `projection`"),
        ("data.colour = 1", "data: .*unknown field `colour`"),
        ("data.image_size = 50", "image_size 50 is no multiple of the patch of deit_tiny_patch16_"),
        ("sweep_seeds = [3, 3]", "sweep_seeds names no seed, or one twice"),
        ("sweep_seeds = [-1]", r"sweep_seeds\[.*\]: Expected `int` >= 0"),
        ("runs.avit.halting.gamma = nan", "runs.avit.halting.gamma: Expected `float`"),
        ("runs.avit.halting.eps = 1.0", "runs.avit.halting.eps: .*< 1"),
        ("recalibrated.avit = [2.0, 0.5]", r"recalibrated\[.*\]: .*>= 1"),
        ("runs.Two.label = 'x'", "runs.Two"),
        ("data.dataset = 'CIFAR10'", "data.*'CIFAR10'"),
        ("\n[runs.deit", "line 3"),
        ("\ud83d", "codec"),
        ("runs.avit.extends = 'nobody'", r"runs\.avit\.extends: there is no run 'nobody'"),
        ("runs.deit.halting = {}", r"runs\.deit: model 'deit_tiny_.*have a section halting"),
        ("runs.avit.pretrained = ''", r"runs\.avit: init is pretrained; name the weights"),
        ("training.warmup_epochs = 2", r"runs\.deit: warmup_epochs must be fewer .*, not 2 of 2"),
        ("runs.deit.label = 'A-ViT halting held'", "'A-ViT halting held': .* no other run has"),
        ("runs.deit.label = 'DeiT, mine'", "label 'DeiT, mine': tables .* without comma"),
        ("runs.deit.label = 'ATS'", "label 'ATS' is that of another method"),
        ("runs.deit.label = 'DeiT|mine'", "label .* bar or line break"),
        (
            "runs.deit.init = 'deit'\nruns.deit.pretrained = ''",
            "run deit: init and teacher name runs above it",
        ),
        ("runs.deit.teacher = 'avit'", "run deit: init and teacher name runs above it"),
        ("runs.deit.saved = 0.9", "runs.deit.saved: Expected `float` <= 0.8"),
        ("[runs.new]\nlabel = 'x'", r"runs\.new: .*required field `model`"),
        ("training = [1]", "training: Expected `object`"),
        ("training.epochs = 'x'", "training.epochs: Expected `int`"),
        ("focus = 'nobody'", "focus and sweep name runs; there is no run 'nobody'"),
        ("sweep = ['nobody']", "focus and sweep name runs; there is no run 'nobody'"),
        ("sweep_peers.x = [1]", "there is no peer 'x'; choose from ToMe, "),
        ("runs.deit.label = ' '", "label ' ': tables need one"),
        ("name = 'other'", "name: a profile is called like its file"),
        ("runs.avit.name = 'other'", "name: .* a run like its section"),
        ("recalibrated.nobody = [2.0]", r"recalibrated\.nobody: there is no run 'nobody'"),
        ("budgets.nobody = [0.2]", r"budgets\.nobody: there is no run 'nobody'"),
        ("recalibrated.deit = [2.0]", "run deit: recalibrated is of runs that halt"),
        ("runs.avit_published.halting.channel_rate = 0.5", r"channel_rate is of a channel 0 that"),
        ("adapted = [0.1, 0.2]", "need as many numbers each as adapted"),
        ("runs.avit.init = 'deit'", r"runs\.avit: pretrained is for init = .*; init is 'deit'"),
    ],
)
def test_a_fault_is_told_with_its_file_and_key(text, words, read, tmp_path):
    with refused(words) as error:
        read(f"extends = 'smoke'\n{text}\n")
    assert str(error.value).startswith(f"{tmp_path / 'own.toml'}: ")


def test_what_a_profile_extends_is_another(read, tmp_path):
    (tmp_path / "base.toml").write_text("extends = 'own.toml'")
    for text, words in (
        ("extends = 'own.toml'", r"own\.toml: extends: .*own\.toml extends this file, too"),
        ("extends = 'base.toml'", r"base\.toml: extends: .*own\.toml extends this file, too"),
        ("extends = 3", r"own\.toml: extends: Expected `str`, got `int`"),
    ):
        with refused(words):
            read(text)


def test_names_that_nothing_has_are_told_with_those_there_are(read):
    for name in ("nobody", "/nowhere/smoke.toml"):
        with refused(f"unknown profile '{name}'; choose from caltech101, "):
            get_profile(name)
    with refused(r"profile 'smoke' has no run 'nobody'; choose from deit, "):
        SMOKE.run("nobody")
    with refused(r"caltech24\.toml would share the results of"):
        read("extends = 'smoke'", "caltech24")
