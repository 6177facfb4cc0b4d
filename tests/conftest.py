"""What several tests share: small data and models, slow references, no network."""

import shutil
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from timm.models import register_model

from avit_lib import training
from avit_lib.cli import main
from avit_lib.data import Images
from avit_lib.data.images import batch_transform
from avit_lib.errors import UserError
from avit_lib.evaluation import speed
from avit_lib.starts import channel_parameters

torch.set_num_threads(1)

ROOT = Path(__file__).parents[1]


def refused(match):
    """Expects a UserError of one line, which has these words."""
    return pytest.raises(UserError, match=rf"\A[^\n]*{match}[^\n]*\Z")


def read_files(folder):
    """The content of every file in a folder or below."""
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def noise(*shape, seed=0):
    """Normal random numbers in float64, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# --- models ---------------------------------------------------------------------------------------

# The tiny shape made small: 16 patches, 4 layers.
SMALL = dict(
    img_size=28, patch_size=7, num_classes=10, embed_dim=16, depth=4, num_heads=2, mlp_ratio=2.0
)


@register_model
def deit_nano(pretrained=False, **kwargs):
    return timm.create_model("deit_tiny_patch16_224", pretrained, **(SMALL | kwargs))


@register_model
def avit_nano(pretrained=False, **kwargs):
    return timm.create_model("avit_tiny_patch16_224", pretrained, **(SMALL | kwargs))


def varied_model(class_channel=0.0, seed=0, **kwargs):
    """A float64 A-ViT in which the brightness of a patch decides how deep it goes.

    Channel 0 of the embedding starts as the mean of the patch's pixels, and as ``class_channel``
    for the class token.
    """
    torch.manual_seed(seed)
    settings = {"gamma": 2.0, "beta": -1.0, "depth": 6} | kwargs
    model = timm.create_model("avit_nano", **settings).double().eval()
    with torch.no_grad():
        weight = model.patch_embed.proj.weight
        weight[0] = 1 / weight[0].numel()
        model.patch_embed.proj.bias[0] = 0.0
        model.pos_embed[..., 0] = 0.0
        model.cls_token[..., 0] = class_channel
    return model


@torch.no_grad()
def scatter(model):
    """The model with weights that make tokens differ: at the initialisation all are alike."""
    for parameter in model.parameters():
        parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


def channels(model):
    """All that writes or reads channel 0."""
    return [parameter[index].detach().clone() for parameter, index in channel_parameters(model)]


def embed_slowly(model, image):
    """The tokens [N, D] of an image [C, H, W], and the depth [N] of those that never leave."""
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(image[None])))[0]
    return tokens, torch.full((len(tokens),), len(model.blocks))


def attend_slowly(block, tokens, size):
    """Attention [heads, M, M] of tokens [M, D] that stand for ``size`` [M] each, in a block.

    Returns also keys and values, [M, heads, d].
    """
    attn = block.attn
    q, k, v = attn.qkv(block.norm1(tokens)).unflatten(-1, (3, attn.num_heads, -1)).unbind(1)
    q, k = attn.q_norm(q), attn.k_norm(k)
    logits = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5 + size.log()
    return logits.softmax(dim=-1), k, v


def merge_slowly(model, image, choose):
    """Token merging by loops over lists of places: logits [K] and depth [N] of an image [C, H, W].

    ``choose(layer, keys, worth)`` says, of a layer 0..L-1, keys [M, d] of length 1 and what the
    class token takes from each [M], which row joins which other, and the rows that stay, in their
    new order.
    """
    tokens, depth = embed_slowly(model, image)
    groups = [[place] for place in range(len(tokens))]  # the first of each is what it still is
    for layer, block in enumerate(model.blocks):
        size = torch.tensor([len(group) for group in groups]).double()
        attention, k, v = attend_slowly(block, tokens, size)
        taken = torch.einsum("hqk,khd->qhd", attention, v).flatten(1)
        tokens = tokens + block.ls1(block.attn.proj(block.attn.norm(taken)))
        worth = (attention[:, 0].T * v.norm(dim=-1)).mean(dim=1)
        joins, kept = choose(layer, F.normalize(k.mean(dim=1), dim=-1), worth)
        shares = size.diag()
        for one, into in joins.items():
            depth[groups[one][0]] = layer + 1
            shares[into, one] = size[one]
            groups[into] += groups[one]
        tokens = shares[kept] @ tokens / shares[kept].sum(dim=1, keepdim=True)
        groups = [groups[place] for place in kept]
        tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
    whole = torch.empty(len(depth), tokens.shape[1]).double()
    for group, token in zip(groups, tokens, strict=True):
        whole[group] = token
    return model.forward_head(model.norm(whole[None]))[0], depth


def leave_slowly(model, image, choose):
    """Logits [K] and depth [N] of an image [C, H, W], token by token; some leave after attention.

    ``choose(layer, attention, values)`` says, of a layer 0..L-1, of the class token's attention
    [heads, M] and of the values [M, heads, d], which rows stay, and the weights of a row that is
    made of others, by row, if one is.
    """
    tokens, depth = embed_slowly(model, image)
    places = [*range(len(tokens))]  # of each token in the image; None: it was made
    for layer, block in enumerate(model.blocks):
        attention, _, v = attend_slowly(block, tokens, torch.ones(len(tokens)))
        tokens = tokens + block.attn.proj(torch.einsum("hqk,khd->qhd", attention, v).flatten(1))
        stay, weights = choose(layer, attention[:, 0], v)
        for row in {*range(len(tokens))} - {*stay}:
            if places[row] is not None:
                depth[places[row]] = layer + 1
        made = [sum(weight * tokens[row] for row, weight in weights.items())] if weights else []
        tokens = torch.stack([*tokens[stay], *made])
        places = [places[row] for row in stay] + [None] * len(made)
        tokens = tokens + block.mlp(block.norm2(tokens))
    return model.forward_head(model.norm(tokens[None]))[0], depth


# --- images ---------------------------------------------------------------------------------------


def random_images(count, classes=10, seed=0):
    """``count`` 28 x 28 images of noise, the brighter the higher their label, which take turns."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 100, (count, 3, 28, 28), dtype=torch.uint8, generator=generator)
    labels = torch.arange(count) % classes
    images += (labels * (150 // classes)).to(torch.uint8)[:, None, None, None]
    return Images(images, labels, tuple(map(str, range(classes))), batch_transform(28))


def bright_and_dark(seed=1):
    """Images [4, 3, 28, 28]: two of patches of random brightness, one all bright, one all dark."""
    brightness = 2 * noise(4, 1, 4, 4, seed=seed)
    brightness[2], brightness[3] = 20.0, -20.0
    pixels = torch.kron(brightness, torch.ones(7, 7)) + 0.1 * noise(4, 1, 28, 28, seed=seed)
    return pixels.repeat(1, 3, 1, 1)


def write_photographs(root, **counts):
    """Grey JPEGs of two classes, bright and dark: so many of each in every named part."""
    generator = np.random.default_rng(0)
    for part, count in counts.items():
        for label, brightness in (("bright", 150), ("dark", 20)):
            (root / part / label).mkdir(parents=True)
            for number in range(count):
                shape = (30 + number, 40)
                pixels = generator.integers(brightness, brightness + 100, shape, dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / label / f"{number}.jpg")


# --- studies --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_profile(tmp_path_factory):
    """The file of the smoke profile with small models, which start from random weights."""
    path = tmp_path_factory.mktemp("profile") / "small.toml"
    models = {"deit": "deit", "deit_longer": "deit", "avit_finetuned": "avit", "merging": "deit"}
    runs = [f"runs.{run}.model = '{kind}_nano'" for run, kind in models.items()]
    path.write_text("\n".join(["extends = 'smoke'", "data.image_size = 28", *runs]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "load_pretrained", lambda *_, **__: None)
        yield path


@pytest.fixture(scope="module")
def prepared(small_profile, tmp_path_factory):
    """Images, a profile of small models, a DeiT and an A-ViT, trained an epoch each."""
    root = tmp_path_factory.mktemp("prepared")
    write_photographs(root / "images", train=12, test=4)
    (root / "mine.toml").write_text(f"extends = '{small_profile}'\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for model in ("deit", "avit"):
            own = f"--profile mine.toml --data-dir images --seed 3 --output {model}"
            assert main(f"fit {own} --model {model} --epochs 1".split()) == 0
    return root


@pytest.fixture
def workplace(prepared, tmp_path, monkeypatch):
    """A copy of the prepared folder, in which we are."""
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AVIT_RESULTS", "results")


def at_batch(patch, loss, number, happens):
    """Let something happen to what ``loss`` gives for a batch, counted over epochs."""
    calls, compute = 0, loss.__call__

    def called(*arguments):
        nonlocal calls
        calls += 1
        losses = compute(*arguments)
        return happens(losses) if calls == number else losses

    patch.setattr(loss, "__call__", called)


def assert_on_the_page(figure):
    """A figure draws, cuts nothing off, is as wide as all, and is unknown to pyplot."""
    from avit_lib.report import figures

    FigureCanvasAgg(figure).draw()
    page, taken = figure.bbox_inches, figure.get_tightbbox()
    assert min(taken.x0, taken.y0) > -0.05
    assert taken.x1 < page.x1 + 0.05 and taken.y1 < page.y1 + 0.05
    assert figure.get_figwidth() == figures.WIDTH
    assert plt.get_fignums() == [], "pyplot knows a figure, so a notebook would show it twice"


@pytest.fixture
def short_timings(monkeypatch):
    """Timings are short."""
    monkeypatch.setattr(speed, "interleave", partial(speed.interleave, minimum=0.01))
