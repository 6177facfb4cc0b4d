"""What several tests share: small data and models, what a run left, no network."""

import gc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import timm
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from msgspec import structs
from PIL import Image
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer

from avit_lib import training
from avit_lib.data import Images
from avit_lib.data.images import batch_transform
from avit_lib.evaluation import speed
from avit_lib.losses import Losses
from avit_lib.model import AViT
from avit_lib.study import Profile, get_profile
from avit_lib.training import read_json

torch.set_num_threads(1)


SMALL = dict(
    img_size=28, patch_size=7, num_classes=10, embed_dim=16, depth=4, num_heads=2, mlp_ratio=2.0
)


def small_model(kind: str, pretrained: bool = False, **kwargs) -> VisionTransformer:
    """An untrained "deit" or "avit" of the tiny shape, made small: 16 patches, 4 layers."""
    return timm.create_model(f"{kind}_tiny_patch16_224", pretrained, **(SMALL | kwargs))


# By name too, for what takes a name: checkpoints, timings, runs.
@register_model
def deit_nano(pretrained: bool = False, **kwargs) -> VisionTransformer:
    return small_model("deit", pretrained, **kwargs)


@register_model
def avit_nano(pretrained: bool = False, **kwargs) -> VisionTransformer:
    return small_model("avit", pretrained, **kwargs)


def four_runs() -> Profile:
    """The smoke profile with two plain runs and two that halt, under short labels."""
    profile = get_profile("smoke")
    labels = {
        "deit": "DeiT",
        "deit_longer": "DeiT trained longer",
        "avit": "A-ViT",
        "avit_finetuned": "A-ViT fine-tuned",
    }
    runs = []
    for name, label in labels.items():
        run = profile.run(name)
        kind = "avit" if run.halting else "deit"
        runs.append(structs.replace(run, label=label, model=f"{kind}_nano"))
    return structs.replace(profile, runs=tuple(runs), recalibrated={}, budgets={}, merging=(2,))


@pytest.fixture(scope="module")
def small_profile(tmp_path_factory) -> Iterator[Path]:
    """The file of the smoke profile with small models, which start from random weights."""
    path = tmp_path_factory.mktemp("profile") / "small.toml"
    models = {"deit": "deit", "deit_longer": "deit", "avit_finetuned": "avit", "merging": "deit"}
    runs = [f"runs.{run}.model = '{kind}_nano'" for run, kind in models.items()]
    path.write_text("\n".join(["extends = 'smoke'", "data.image_size = 28", *runs]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "load_pretrained", lambda *_: None)
        yield path


def write_photographs(root: Path, **counts: int) -> Path:
    """Grey JPEGs of two classes, bright and dark: so many of each in every named part."""
    generator = np.random.default_rng(0)
    for part, count in counts.items():
        for label, brightness in (("bright", 150), ("dark", 20)):
            (root / part / label).mkdir(parents=True)
            for number in range(count):
                shape = (30 + number, 40)
                pixels = generator.integers(brightness, brightness + 100, shape, dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / label / f"{number}.jpg")
    return root


def random_images(count: int, classes: int = 10, seed: int = 0) -> Images:
    """``count`` 28 x 28 images of noise, the brighter the higher their label, which take turns."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 100, (count, 3, 28, 28), dtype=torch.uint8, generator=generator)
    labels = torch.arange(count) % classes
    images += (labels * (150 // classes)).to(torch.uint8)[:, None, None, None]
    return Images(images, labels, tuple(map(str, range(classes))), batch_transform(28))


def varied_model(class_channel: float = 0.0, **kwargs) -> AViT:
    """A float64 model in which the brightness of a patch decides how deep it goes.

    Channel 0 of the embedding starts as the mean of the patch's pixels, and as ``class_channel``
    for the class token.
    """
    torch.manual_seed(0)
    settings = {"gamma": 2.0, "beta": -1.0, "depth": 6} | kwargs
    model = small_model("avit", **settings).double().eval()
    with torch.no_grad():
        weight = model.patch_embed.proj.weight
        weight[0] = 1 / weight[0].numel()
        model.patch_embed.proj.bias[0] = 0.0
        model.pos_embed[..., 0] = 0.0
        model.cls_token[..., 0] = class_channel
    return model


def bright_and_dark(patch: int = 7) -> torch.Tensor:
    """Images [4, 3, 28, 28]: two of patches of random brightness, one all bright, one all dark."""
    generator = torch.Generator().manual_seed(1)
    side = 28 // patch
    brightness = torch.randn(4, 1, side, side, generator=generator, dtype=torch.float64) * 2
    brightness[2], brightness[3] = 20.0, -20.0
    pixels = brightness.repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    noise = torch.randn(pixels.shape, generator=generator, dtype=torch.float64)
    return (pixels + 0.1 * noise).expand(-1, 3, -1, -1).contiguous()


def finished_epochs(folder: Path) -> int:
    """How many epochs the history of a run in ``folder`` has so far."""
    history = folder / "history.csv"
    return len(history.read_text().splitlines()) - 1 if history.is_file() else 0


def content(folder: Path) -> dict:
    """What a run left: weights byte for byte, all else without the seconds."""
    found = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    for path in folder.glob("*.json"):
        found[path.name] = read_json(path)
        found[path.name].get("validation", {}).pop("seconds", None)
        found[path.name].pop("provenance", None)
    found["history.csv"] = pd.read_csv(folder / "history.csv").drop(columns="seconds").to_csv()
    return found


def assert_same(folder: Path, whole: Path) -> None:
    """The runs in both folders left the same."""
    assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()}
    assert content(folder) == content(whole)


def at_batch(
    patch: pytest.MonkeyPatch, loss: type, number: int, happens: Callable[[Losses], Losses]
) -> None:
    """Let something happen to what ``loss`` gives for a batch, counted over epochs."""
    calls, compute = 0, loss.__call__

    def called(*arguments):
        nonlocal calls
        calls += 1
        losses = compute(*arguments)
        return happens(losses) if calls == number else losses

    patch.setattr(loss, "__call__", called)


def assert_labels_on_the_page(drawn: dict[str, Figure]) -> None:
    """Every figure draws, cuts nothing off, is as wide as all, and is unknown to pyplot."""
    from avit_lib.report import figures

    for name, figure in drawn.items():
        FigureCanvasAgg(figure).draw()
        page, taken = figure.bbox_inches, figure.get_tightbbox()
        assert min(taken.x0, taken.y0) > -0.05, f"{name} is cut off at the left or bottom: {taken}"
        assert taken.x1 < page.x1 + 0.05 and taken.y1 < page.y1 + 0.05, f"{name} is cut off"
        assert figure.get_figwidth() == figures.WIDTH, name
    assert plt.get_fignums() == [], "pyplot knows a figure, so a notebook would show it twice"


@pytest.fixture
def one_round(monkeypatch):
    """Timings take one short round."""
    from avit_lib.report import tables

    monkeypatch.setattr(speed, "interleave", partial(speed.interleave, minimum=0.01))
    for name in ("ROUNDS", "FEWER_ROUNDS"):
        monkeypatch.setattr(tables, name, 1, raising=False)
    gc.freeze()  # what is there need not be looked through before each timing
    yield
    gc.unfreeze()


@pytest.fixture
def no_network(monkeypatch):
    """Every download fails at once, wherever the tests run."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
        monkeypatch.setenv(name.upper(), "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
