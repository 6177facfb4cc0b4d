"""The ImageNet profile, dry: its recipe on generated images, with a tiny backbone in place of its
own.
"""

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from PIL import Image
from timm.models import register_model

from avit_lib import cli
from avit_lib.model import AViT
from avit_lib.study import get_profile
from avit_lib.training import load_checkpoint, save_checkpoint


@register_model
def avit_dry_patch56_224(num_classes=1000, gamma=5.0, beta=-10.0, eps=0.01, **_):
    """Four layers of 16 channels on 224 x 224 colour images; not part of the library."""
    shape = {"patch_size": 56, "embed_dim": 16, "depth": 4, "num_heads": 2}
    return AViT(num_classes=num_classes, gamma=gamma, beta=beta, eps=eps, **shape)


@pytest.fixture
def generated(tmp_path, monkeypatch):
    """Noise in the layout of ImageNet: three classes of 14 training and 3 validation images."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 14), ("val", 3)):
        for label in ("n01440764", "n01443537", "n01484850"):
            folder = tmp_path / "imagenet" / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 255, (240, 260, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.JPEG")
    monkeypatch.setenv("AVIT_DATA", str(tmp_path))


def test_the_recipe_is_that_of_the_paper():
    run = get_profile("imagenet").run("avit_finetuned")
    training, halting = run.training, run.halting
    assert (
        training.epochs,
        training.batch_size,
        training.learning_rate,
        training.warmup_epochs,
    ) == (100, 512, 5e-4, 5)
    assert training.ema_decay and training.mixup
    assert (halting.gamma, halting.beta, halting.alpha_ponder, halting.alpha_distr) == (
        5,
        -10,
        5e-4,
        0.1,
    )
    assert (halting.target_depth, run.init) == (8, "pretrained")


@pytest.mark.parametrize("run", get_profile("imagenet").runs, ids=lambda run: run.name)
def test_its_models_and_weights_exist(run):
    assert timm.is_model(run.model)
    assert timm.get_pretrained_cfg(run.pretrained).hf_hub_id == f"timm/{run.pretrained}"


@pytest.mark.usefixtures("generated")
def test_dry_run(tmp_path, monkeypatch, capsys):
    changes = 'runs.avit_finetuned.model = "avit_dry_patch56_224"\ntraining.warmup_epochs = 1\n'
    (tmp_path / "dry.toml").write_text(f'extends = "imagenet"\n{changes}')
    profile = str(tmp_path / "dry.toml")
    run = get_profile(profile).run("avit_finetuned")
    monkeypatch.setenv("AVIT_WEIGHTS", str(tmp_path))
    torch.manual_seed(0)
    source = timm.create_model(run.model, num_classes=1000)
    save_checkpoint(tmp_path / f"{run.pretrained}.safetensors", source, run.model, {})
    output = tmp_path / "output"
    command = [
        "fit",
        "--profile",
        profile,
        "--model",
        "avit_finetuned",
        "--epochs",
        "2",
        "--output",
        str(output),
    ]
    assert cli.main([*command, "--device", "cpu"]) == 0
    history = pd.read_csv(output / "history.csv")
    assert history["epoch"].tolist() == [1, 2] and np.isfinite(history["train_loss"]).all()
    model, description = load_checkpoint(output / "last.safetensors")
    assert len(description["run"]["classes"]) == 3
    torch.testing.assert_close(
        model.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight, atol=1e-3, rtol=0
    )
    test = ["test", "--profile", profile, "--ckpt", str(output / "last.safetensors")]
    assert cli.main([*test, "--device", "cpu"]) == 0
    assert '"images": 9' in capsys.readouterr().out
