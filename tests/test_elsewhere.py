"""The page on other people's code: its Python runs as it stands, on a small model."""

import re

import pytest
import timm
import torch
from conftest import ROOT
from safetensors.torch import save_file

PAGE = (ROOT / "docs" / "elsewhere.md").read_text()
FIRST, *OTHERS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """What somebody has who has read the page so far: the model, images, labels, data sets."""
    plain = timm.create_model("deit_nano", num_classes=10)
    save_file(plain.state_dict(), tmp_path / "deit_tiny_patch16_224.fb_in1k.safetensors")
    monkeypatch.setenv("AVIT_WEIGHTS", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    images, labels = torch.randn(16, 3, 28, 28), torch.arange(16) % 10
    pairs = [(image, int(label)) for image, label in zip(images, labels, strict=True)]
    dictionaries = [{"pixel_values": image, "labels": label} for image, label in pairs]
    found = {"images": images, "labels": labels, "more_images": torch.randn(5, 3, 28, 28)}
    found |= {"pairs": pairs, "dictionaries": dictionaries, "plain": plain}
    exec(FIRST.replace("avit_tiny_patch16_224", "avit_nano"), found)
    return found


@pytest.mark.parametrize(
    "block", OTHERS, ids=lambda block: re.search(r"loss|Trainer|lightning|export", block).group()
)
def test_a_piece_of_code_runs_and_does_what_the_page_says(block, reader):
    model, plain = reader["model"], reader["plain"].state_dict()
    # From the folder.
    assert torch.equal(model.blocks[0].attn.qkv.weight, plain["blocks.0.attn.qkv.weight"])
    try:
        exec(block, reader)
    except ModuleNotFoundError as error:
        pytest.skip(f"{error.name} is not installed")
    if "export" in block:
        assert torch.allclose(reader["logits"], model(reader["more_images"]), atol=1e-5)
    else:
        assert model.norm.weight.isfinite().all()
        assert not torch.equal(model.norm.weight, plain["norm.weight"])
