"""Profiles: every setting of the study, as frozen dataclasses, and where files are found."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path


class StudyError(Exception):
    """A fault that the user can mend; its message is one line that says what is wrong and what to do."""


@contextmanager
def fitting_memory(images: int, remedy: str) -> Iterator[None]:
    """Turn the error of a CPU or GPU without memory for so many ``images`` at once into a StudyError with a remedy."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        known = ("out of memory", "allocate memory", "not enough memory")  # torch has no type for a CPU's
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in known):
            raise
        raise StudyError(f"out of memory with {images} images at once; {remedy}") from None


@dataclass(frozen=True)
class Training:
    """How a model is trained: AdamW, linear warm-up, cosine to zero."""

    epochs: int
    learning_rate: float
    batch_size: int = 64  # of all processes together
    weight_decay: float = 0.05
    warmup_epochs: float = 0.5
    label_smoothing: float = 0.1
    clip_norm: float = 1.0
    precision: str = "float32"  # or "bfloat16": autocast, where the device gains by it
    optimizer: str = "adamw"  # a name of timm's
    execution: str = "auto"  # of a model that halts, in training: "auto" is masked, "packed" may be faster
    ema_decay: float = 0.0  # of the averaged weights, which are then those evaluated and kept; 0: none
    mixup: float = 0.0  # alpha of Mixup; 0: none
    cutmix: float = 0.0  # alpha of CutMix; 0: none; with both, each batch takes one of them


@dataclass(frozen=True)
class Halting:
    """How tokens halt and what the halting is trained for (defaults: the paper's)."""

    gamma: float = 5.0
    beta: float = -10.0
    eps: float = 0.01
    alpha_ponder: float = 5e-4  # alpha_p
    ponder_ramp: float = 0.0  # fraction of training over which alpha_p grows linearly from 0; 0: full from the start
    alpha_distr: float = 0.1  # alpha_d
    target_depth: float = 8.0  # mu, in layers
    target_std: float = 1.0
    kl_direction: str = "paper"  # KL(H || target); "code": KL(target || H)
    class_token_halts: bool = True  # False (not in the paper): the class token runs to the last layer
    fuse_halted: bool = False  # True (not in the paper): halted tokens live on in one summary token an image
    merge_halted: bool = False  # True (not in the paper): each halted token joins the most similar one that goes on
    fitted: bool = False  # True (not in the paper): channel 0 is fitted before training and held (see ``redundancy``)

    @property
    def model_arguments(self) -> dict[str, float]:
        """What the model itself needs, as arguments of ``timm.create_model``."""
        names = ("gamma", "beta", "eps", "class_token_halts", "fuse_halted", "merge_halted")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Distillation:
    """How closely a model follows the logits of the teacher that its run names."""

    alpha: float = 1.0  # weight in the objective, beside the cross-entropy's 1
    temperature: float = 1.0  # T


@dataclass(frozen=True)
class Run:
    """One trained model: what it is, where it starts, how it is trained."""

    name: str  # folder of its checkpoints
    label: str  # what tables and figures call it
    model: str  # timm name
    init: str  # "random", "pretrained", or the name of the run whose weights it starts from
    training: Training
    halting: Halting | None = None  # None: a plain transformer
    pretrained: str = ""  # timm name of the weights that init "pretrained" means
    teacher: str = ""  # name of the run whose trained model teaches this one; "": nobody
    distillation: Distillation = Distillation()  # of the teacher, if there is one

    @property
    def start(self) -> str:
        """The name of the run whose weights it starts from; empty if it starts from none."""
        return "" if self.init in ("random", "pretrained") else self.init

    @property
    def needs(self) -> tuple[str, ...]:
        """The names of the runs that must be trained before it."""
        return tuple(name for name in (self.start, self.teacher) if name)


@dataclass(frozen=True)
class Profile:
    """One study from data to results; profiles never share a results folder."""

    name: str
    purpose: str
    dataset: str  # FashionMNIST, CIFAR10, CIFAR100, Caltech101, Caltech256 or ImageNet
    image_size: int  # pixels
    validation_per_class: int
    runs: tuple[Run, ...]
    train_per_class: int | None = None  # None: all
    test_per_class: int | None = None  # at most, where the test images are drawn as well (Caltech)
    augmentation: str = "none"  # of training images; "standard": random crops and mirroring
    smoke: bool = False
    notes: tuple[str, ...] = field(default=())  # where the numbers come from
    focus: str = "avit_finetuned"  # the run whose halting the notebooks look into
    dial: tuple[float, ...] = ()  # mean depths in layers to which its beta is turned after training
    search: tuple[Run, ...] = ()  # candidates, runs among them, that `make search` compares on validation images
    merging: tuple[int, ...] = ()  # tokens that merge in each layer: peers of the models, see ``tome``
    sweep: tuple[str, ...] = ()  # names of the runs that `make sweep` trains once for each of these seeds
    sweep_seeds: tuple[int, ...] = (0, 1, 2)

    @property
    def channels(self) -> int:
        """1 for grey images, 3 for colour."""
        return 1 if self.dataset == "FashionMNIST" else 3

    def run(self, name: str) -> Run:
        """The run, or candidate of the search, called ``name``; raises StudyError when there is none."""
        for run in (*self.runs, *self.search):
            if run.name == name:
                return run
        raise StudyError(f"profile {self.name!r} has no run {name!r}; choose from {[run.name for run in self.runs]}")

    def settings(self) -> dict:
        """What the notebooks depend on, as plain dictionaries ready for JSON: all but the search and the sweep."""
        aside = ("search", "sweep", "sweep_seeds")
        return {name: value for name, value in asdict(self).items() if name not in aside}


def _three_runs(size: str, deit: Training, avit: Training, avit_finetuned: Training, halting: Halting) -> tuple:
    return (
        Run("deit", "DeiT", f"deit_{size}", "random", deit),
        Run("avit", "A-ViT", f"avit_{size}", "random", avit, halting),
        Run("avit_finetuned", "A-ViT fine-tuned", f"avit_{size}", "deit", avit_finetuned, halting),
    )


def _imagenet_runs(training: Training, halting: Halting) -> tuple:
    runs = []
    for suffix, size, letter in (("", "tiny", "T"), ("_small", "small", "S")):
        weights = f"deit_{size}_patch16_224.fb_in1k"
        start = {"init": "pretrained", "training": training, "pretrained": weights}
        runs.append(Run(f"deit{suffix}", f"DeiT-{letter}", f"deit_{size}_patch16_224", **start))
        runs.append(Run(f"avit{suffix}", f"A-ViT-{letter}", f"avit_{size}_patch16_224", halting=halting, **start))
    return tuple(runs)


def _smoke_candidate(name: str, label: str, halting: Halting, teacher: str = "") -> Run:
    training = Training(epochs=1, learning_rate=2e-3, batch_size=32)
    return Run(name, label, "avit_nano_patch7_28", "deit", training, halting, teacher=teacher)


_WEIGHTS = "deit_tiny_patch16_224.fb_in1k"
_DEIT, _AVIT = "deit_tiny_patch16_224", "avit_tiny_patch16_224"


def _pretrained_runs(
    deit: Training, avit: Training, finetuned: Training, fitted: Training, halting: Halting, merging: Halting
) -> tuple[Run, ...]:
    """The models of the study on DeiT-T's ImageNet weights.

    The report's three; the control, DeiT trained on as long as the A-ViTs that start from it; and one that goes beyond
    the paper: halting is fitted before training, halted tokens merge into similar ones, the class token runs to the
    end, the control is its teacher.
    """
    return (
        Run("deit", "DeiT fine-tuned", _DEIT, "pretrained", deit, pretrained=_WEIGHTS),
        Run("deit_longer", "DeiT trained on", _DEIT, "deit", replace(fitted, execution="auto")),
        Run("avit", "A-ViT from ImageNet", _AVIT, "pretrained", avit, halting, pretrained=_WEIGHTS),
        Run("avit_finetuned", "A-ViT fine-tuned", _AVIT, "deit", finetuned, halting),
        Run(
            "avit_fitted",
            "A-ViT fitted",
            _AVIT,
            "deit",
            fitted,
            merging,
            teacher="deit_longer",
            distillation=Distillation(alpha=8.0),
        ),
    )


# Of a beta: the fine-tuned DeiT's mean depth, untrained, is 7 layers with -2.3, 9 with -3.4, more than 11 with -6.
_HALTING = Halting(beta=-3.4, alpha_ponder=5e-3, ponder_ramp=0.5, alpha_distr=0.02, target_depth=6.0, target_std=4.0)
_FUSED = replace(_HALTING, class_token_halts=False, fuse_halted=True)
_MERGED = replace(_HALTING, class_token_halts=False, merge_halted=True, beta=-2.5, alpha_ponder=2e-3)
_MIXED = Training(8, 2e-4, precision="bfloat16", mixup=0.4)
_PACKED = replace(_MIXED, execution="packed")
_UNMIXED = replace(_PACKED, mixup=0.0)
_CALTECH101_RUNS = _pretrained_runs(
    deit=_MIXED,
    avit=_PACKED,
    finetuned=replace(_PACKED, epochs=4, learning_rate=1.5e-4),
    fitted=replace(_PACKED, epochs=4, learning_rate=5e-5),
    halting=replace(_HALTING, alpha_ponder=7e-3),
    merging=replace(_MERGED, fitted=True, alpha_ponder=0.0, alpha_distr=0.0, target_depth=8.0, target_std=10.0),
)
*_, _CALTECH101_FITTED = _CALTECH101_RUNS

_CALTECH101 = Profile(
    name="caltech101",
    purpose="the real study: natural images at 224 pixels, DeiT-T's ImageNet weights",
    dataset="Caltech101",
    image_size=224,
    train_per_class=30,
    validation_per_class=5,
    test_per_class=50,
    augmentation="standard",
    merging=(8, 13, 16),
    focus="avit_fitted",
    dial=(5.0, 6.0, 6.5, 7.5, 9.0),
    runs=_CALTECH101_RUNS,
    search=(
        Run(
            "fuse_taught",
            "summary token, from depth 7, taught by DeiT",
            _AVIT,
            "deit",
            replace(_UNMIXED, epochs=4, learning_rate=3e-4),
            replace(_FUSED, beta=-2.3, ponder_ramp=0.0, target_depth=5.0),
            teacher="deit",
        ),
        Run(
            "avit_summary",
            "A-ViT + summary token",
            _AVIT,
            "deit",
            replace(_UNMIXED, learning_rate=3e-4),
            _FUSED,
            teacher="deit",
        ),
        Run(
            "avit_merged",
            "A-ViT + merging",
            _AVIT,
            "deit",
            replace(_PACKED, epochs=6, learning_rate=1.5e-4),
            _MERGED,
            teacher="deit",
            distillation=Distillation(alpha=2.0),
        ),
        replace(
            _CALTECH101_FITTED,
            name="fitted_by_deit",
            label="A-ViT fitted, taught by DeiT fine-tuned",
            teacher="deit",
            halting=replace(_CALTECH101_FITTED.halting, target_depth=9.0),
        ),
        _CALTECH101_FITTED,
    ),
    sweep=("deit", "deit_longer", "avit_fitted"),
    notes=(
        "Split: the classic 30 training images a class, then 5 for validation, up to 50 of the rest for test, by seed.",
        "Classes of fewer than 40 images keep their training images and share the rest; inline_skate, the smallest, "
        "has 31 images: 29, 1 and 1. Mean per-class accuracy weighs every class alike, however few its test images.",
        "BACKGROUND_Google is not a class, as in torchvision.",
        "beta: calibrated on a fine-tuned DeiT, so that before training the mean depth is about 9 layers where "
        "halted tokens are lost. gamma 5 is the paper's; with 1 and less, tokens halt nearly together.",
        "alpha_ponder grows over the first half of training; a wide target (deviation 4) and a small alpha_distr "
        "let tokens differ in depth. 1e-2 gave a mean depth below 6, so it is 7e-3.",
        "Fitted start: spread, weight of the rank and ridge of redundancy.py were chosen on validation images, without "
        "training, by how far the answers of the fitted model are from DeiT's. Nearly as many tokens halt in every "
        "layer (target depth 8, deviation 10; the depth so that 45 % of the FLOPs of validation images are saved): "
        "with a narrow target too few were left in the last layer. What halts is then settled, so both weights of the "
        "halting losses are 0, beta has no effect of its own, and a low learning rate keeps what the model knows. Its "
        "teacher is the better DeiT of the two on validation images.",
        "Mixup, with the teacher's answers to mixed images: without it a DeiT knows the training images by heart "
        "after six epochs.",
        "The search is short, every candidate one run of one seed; all but the fitted one started from a DeiT "
        "fine-tuned for 6 epochs without Mixup, which is the one in the table.",
    ),
)
_CALTECH256 = replace(
    _CALTECH101,
    name="caltech256",
    purpose="the data of the original student report, by the protocol of the caltech101 profile",
    dataset="Caltech256",
    notes=("Split and settings: as in the caltech101 profile. 257.clutter is left out: it is no class of objects.",),
)
_CIFAR10 = replace(
    _CALTECH101,
    name="cifar10",
    purpose="CIFAR-10, scaled up to 224 pixels",
    dataset="CIFAR10",
    train_per_class=None,
    validation_per_class=500,
    test_per_class=None,
    notes=("Official test images; 500 training images a class are held out. Settings: as in the caltech101 profile.",),
)
_CIFAR100 = replace(
    _CIFAR10,
    name="cifar100",
    purpose="CIFAR-100, scaled up to 224 pixels",
    dataset="CIFAR100",
    validation_per_class=50,
    notes=("Official test images; 50 training images a class are held out. Settings: as in the caltech101 profile.",),
)

PROFILES = {
    profile.name: profile
    for profile in (
        Profile(
            name="smoke",
            purpose="a check that everything runs: a few hundred images and a tiny backbone; its numbers mean nothing",
            dataset="FashionMNIST",
            image_size=28,
            validation_per_class=10,
            train_per_class=20,
            test_per_class=20,
            smoke=True,
            merging=(2,),
            dial=(2.0, 3.0),
            runs=_three_runs(
                "nano_patch7_28",
                deit=Training(epochs=2, learning_rate=2e-3, batch_size=32),
                avit=Training(epochs=2, learning_rate=2e-3, batch_size=32),
                avit_finetuned=Training(epochs=2, learning_rate=2e-3, batch_size=32),
                halting=Halting(beta=-3.0, target_depth=2.0),
            ),
            search=(
                _smoke_candidate("higher_beta", "beta -2", Halting(beta=-2.0, target_depth=2.0)),
                _smoke_candidate("taught", "taught by DeiT, ramp", Halting(beta=-3.0, ponder_ramp=0.5), teacher="deit"),
            ),
            sweep=("deit", "avit_finetuned"),
            sweep_seeds=(0, 1),
            notes=("beta -3 so that tokens of a barely trained four-layer backbone halt at all.",),
        ),
        Profile(
            name="fashion",
            purpose="the default: Fashion-MNIST from the repository, on any machine, without a network",
            dataset="FashionMNIST",
            image_size=28,
            validation_per_class=500,
            merging=(2, 3, 4),
            dial=(5.0, 6.0, 8.0, 9.0),
            runs=_three_runs(
                "micro_patch4_28",
                deit=Training(4, learning_rate=1.2e-2, batch_size=128, optimizer="muon"),
                avit=Training(4, learning_rate=1.2e-2, batch_size=128, optimizer="muon", execution="packed"),
                avit_finetuned=Training(3, learning_rate=6e-3, batch_size=128, optimizer="muon", execution="packed"),
                halting=Halting(gamma=0.5, beta=-4.0, alpha_ponder=5e-3, target_depth=7.0, target_std=2.0),
            ),
            notes=(
                "Optimiser and learning rate: Muon as timm has it (AdamW inside for everything but matrices); within "
                "the few epochs that this profile allows, AdamW stayed clearly behind it on the validation images.",
                "gamma 0.5, beta -4: channel 0 of this backbone has a spread of several units, not the fraction of one "
                "for which gamma 5, beta -10 are meant; so an untrained score is small and no sigmoid is saturated.",
                "Target depth 7, deviation 2: a deviation of 1 made all tokens halt within two or three layers.",
                "alpha_ponder 5e-3: with 2e-2 and a weak prior nearly all patches halted in the second layer.",
            ),
        ),
        _CALTECH101,
        _CALTECH256,
        _CIFAR10,
        _CIFAR100,
        Profile(
            name="imagenet",
            purpose="the paper: ImageNet-1k, A-ViT from DeiT's weights, on several GPUs",
            dataset="ImageNet",
            image_size=224,
            validation_per_class=10,
            augmentation="standard",
            merging=(8, 13, 16),
            focus="avit",
            dial=(6.0, 8.0, 9.0, 10.0),
            runs=_imagenet_runs(
                # 4 x 128 images; EMA and Mixup with CutMix are those of DeiT, whose recipe the paper follows.
                Training(
                    epochs=100,
                    learning_rate=5e-4,
                    batch_size=512,
                    warmup_epochs=5,
                    precision="bfloat16",
                    ema_decay=0.99996,
                    mixup=0.8,
                    cutmix=1.0,
                ),
                Halting(gamma=5.0, beta=-10.0, alpha_ponder=5e-4, alpha_distr=0.1, target_depth=8.0),
            ),
            notes=(
                "The paper's recipe; the plain transformers are trained on by the same one, as a control.",
                "Validation images are held out of the training set; the official validation images are the test.",
            ),
        ),
    )
}


def get_profile(name: str) -> Profile:
    """The profile called ``name``; raises StudyError when there is none."""
    if name not in PROFILES:
        raise StudyError(f"unknown profile {name!r}; choose from {', '.join(PROFILES)}")
    return PROFILES[name]


def project_root() -> Path:
    """The checkout in which we are (the nearest folder upward with avit_lib beside pyproject.toml), else here."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "pyproject.toml").is_file() and (folder / "avit_lib").is_dir():
            return folder
    return here


def data_dir() -> Path:
    """Where data sets lie: $AVIT_DATA, or data/ in the checkout."""
    return Path(os.environ.get("AVIT_DATA") or project_root() / "data")


def weights_dir() -> Path:
    """Where pretrained weights lie: $AVIT_WEIGHTS, or data/weights/ in the checkout."""
    return Path(os.environ.get("AVIT_WEIGHTS") or data_dir() / "weights")


def results_dir(profile: str) -> Path:
    """Where the results of a profile lie: results/<profile>/ under $AVIT_RESULTS or in the checkout."""
    return Path(os.environ.get("AVIT_RESULTS") or project_root() / "results") / profile
