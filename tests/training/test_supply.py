"""What comes from outside is checked, and runs no code."""

import ast
import hashlib
import re
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from avit_lib.errors import UserError
from avit_lib.training import checkpoints, load_pretrained

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
NAME = "deit_tiny_patch16_224.fb_in1k"


def calls(name: str) -> list[tuple[str, ast.Call]]:
    """The calls of a function such as "torch.load" in the library, its tests and its notebooks."""
    sources = [path for folder in ("avit_lib", "tests") for path in (ROOT / folder).rglob("*.py")]
    found = [
        (str(path), node) for path in sources for node in ast.walk(ast.parse(path.read_text()))
    ]
    return [
        (path, node)
        for path, node in found
        if isinstance(node, ast.Call) and ast.unparse(node.func) == name
    ]


def test_torch_loads_nothing_but_weights():
    assert len({path for path, _ in calls("torch.load")}) >= 2  # in the library and in a test
    for path, call in calls("torch.load"):
        assert "weights_only=True" in [ast.unparse(keyword) for keyword in call.keywords], path
    notebooks = list((ROOT / "notebooks").glob("*.ipynb"))
    assert notebooks
    for notebook in notebooks:
        assert "torch.load" not in notebook.read_text()


def test_no_pickle_is_read_in_the_library():
    sources = list((ROOT / "avit_lib").rglob("*.py"))
    assert ROOT / "avit_lib" / "training" / "files.py" in sources
    for path in sources:
        assert not re.search(
            r"pickle\.loads?\(|allow_pickle|joblib|read_pickle", path.read_text()
        ), path


def test_installing_runs_no_code_of_ours():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["build-system"] == {
        "requires": ["setuptools>=77"],
        "build-backend": "setuptools.build_meta",
    }
    assert "dynamic" not in project["project"] and "cmdclass" not in project["tool"]["setuptools"]
    assert not (ROOT / "setup.py").exists() and not (ROOT / "setup.cfg").exists()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for the cache of timm's hub: a file named by its checksum, and a link to it."""
    monkeypatch.setenv("AVIT_WEIGHTS", str(tmp_path / "empty"))
    torch.manual_seed(0)
    model = timm.create_model(NAME, depth=1)
    save_file(model.state_dict(), tmp_path / "file")
    blob = tmp_path / hashlib.sha256((tmp_path / "file").read_bytes()).hexdigest()
    (tmp_path / "file").rename(blob)
    (tmp_path / "model.safetensors").symlink_to(blob)

    def download(repository, file):
        assert (repository, file) == ("timm/deit_tiny_patch16_224.fb_in1k", "model.safetensors")
        return str(tmp_path / file)

    monkeypatch.setattr(checkpoints, "hf_hub_download", download)
    return model, blob


def test_downloaded_weights_are_loaded_when_their_checksum_fits(hub):
    source, _ = hub
    model = timm.create_model(NAME, depth=1, num_classes=3)
    load_pretrained(model, NAME)
    assert torch.equal(model.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)


def test_downloaded_weights_of_another_checksum_are_refused(hub):
    _, blob = hub
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    with pytest.raises(
        UserError, match="timm's hub publishes another checksum; delete it"
    ) as error:
        load_pretrained(timm.create_model(NAME, depth=1), NAME)
    assert str(blob) in str(error.value)


def test_without_weights_and_network_both_ways_are_named(tmp_path, monkeypatch, no_network):
    monkeypatch.setenv("AVIT_WEIGHTS", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(
        UserError, match=r"timm's hub is out of reach; .*put the file there"
    ) as error:
        load_pretrained(timm.create_model(NAME, depth=1), NAME)
    assert "\n" not in str(error.value)
