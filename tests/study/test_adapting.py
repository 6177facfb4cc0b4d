"""Trained models made adaptive from the command line: files in, a file out, figures beside peers;
and the faults.
"""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from avit_lib.adaptive import Adaptive, adapt
from avit_lib.cli import main
from avit_lib.data import to_pixels
from avit_lib.study import adapting
from avit_lib.training import load_checkpoint

TINY = dict(img_size=32, patch_size=4, embed_dim=48, depth=4, num_heads=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images in colour of two classes, smooth and busy, in a folder of validation images."""
    root, generator = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for label, contrast in (("busy", 200), ("smooth", 20)):
        (root / "val" / label).mkdir(parents=True)
        for number in range(8):
            slope = np.linspace(0, 1, 40)[:, None, None] * generator.integers(
                0, contrast, (40, 50, 3)
            )
            Image.fromarray(slope.astype(np.uint8)).save(root / "val" / label / f"{number}.jpg")
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file(timm.create_model("vit_tiny_patch16_224").state_dict(), path)
    return path


def test_a_model_of_timm_s_is_adapted_and_drawn(folder, weights, tmp_path, capsys):
    output = tmp_path / "adaptive.safetensors"
    command = [
        "adapt",
        "--model",
        "vit_tiny_patch16_224",
        "--weights",
        str(weights),
        "--images",
        str(folder),
    ]
    assert main([*command, "--saved", "0.3", "--output", str(output)]) == 0
    assert "of the FLOPs" in capsys.readouterr().out
    model, described = load_checkpoint(output)
    assert (
        isinstance(model, Adaptive)
        and model.thresholds.isfinite().any()
        and described["adapted"]["images"] == 16
    )
    image, drawn = str(folder / "val" / "busy" / "0.jpg"), tmp_path / "drawn.png"
    assert (
        main(["visualize", "--ckpt", str(output), "--images", image, "--output", str(drawn)]) == 0
    )
    assert drawn.stat().st_size > 5_000
    assert main(["visualize", "--ckpt", str(output), "--images", "3"]) == 2
    assert main(["test", "--ckpt", str(output)]) == 2
    assert "--data imagenet" in capsys.readouterr().err
    assert main(["test", "--ckpt", str(output), "--images", str(folder)]) == 2
    assert main(["test", "--ckpt", str(output), "--data", "imagenet"]) == 2
    assert capsys.readouterr().err.count("go together") == 2
    assert main(["test", "--ckpt", str(output), "--data", "imagenet", "--images", str(folder)]) == 2
    assert "val has 2 classes, the model 1000" in capsys.readouterr().err


def test_a_model_of_the_study_is_adapted_and_tested(folder, tmp_path, capsys):
    images = tmp_path / "images"
    for part in ("train", "test"):
        (images / part).parent.mkdir(exist_ok=True)
        (images / part).symlink_to(folder / "val")
    run = [
        "fit",
        "--profile",
        "smoke",
        "--model",
        "DeiT",
        "--data-dir",
        str(images),
        "--epochs",
        "1",
        "--seed",
        "3",
    ]
    assert main([*run, "--output", str(tmp_path / "deit")]) == 0
    made, output = (
        str(tmp_path / "deit" / "last.safetensors"),
        str(tmp_path / "adaptive.safetensors"),
    )
    command = ["adapt", "--weights", made, "--images", str(folder), "--output", output]
    assert main([*command, "--saved", "0.1"]) == 0
    assert load_checkpoint(output)[1]["run"]["seed"] == 3  # of the split on which it was trained
    assert main(["test", "--ckpt", output, "--data-dir", str(images)]) == 0
    assert '"gflops_per_image"' in capsys.readouterr().out


def test_weights_of_other_classes_in_a_wrapped_checkpoint_of_torch_are_read(folder, tmp_path):
    torch.manual_seed(0)
    weights = timm.create_model("vit_tiny_patch16_224", num_classes=10).state_dict()
    path, output = tmp_path / "deit.pth", tmp_path / "adaptive.safetensors"
    torch.save({"model": {f"module.{key}": value for key, value in weights.items()}}, path)
    command = [
        "adapt",
        "--model",
        "vit_tiny_patch16_224",
        "--weights",
        str(path),
        "--images",
        str(folder),
    ]
    assert main([*command, "--saved", "0.3", "--output", str(output)]) == 0
    model = load_checkpoint(output)[0]
    assert model.num_classes == 10 and torch.equal(model.head.weight, weights["head.weight"])


@pytest.mark.parametrize(
    "content", [timm.create_model("vit_tiny_patch16_224", **TINY), [1, 2], "text", b""]
)
def test_a_pth_that_holds_no_state_dict_is_one_line(content, folder, tmp_path, capsys):
    path = tmp_path / "deit.pth"
    path.write_bytes(content) if content == b"" else torch.save(content, path)
    assert (
        main(
            ["adapt", "--weights", str(path), "--images", str(folder), "--output", "a.safetensors"]
        )
        == 2
    )
    (line,) = capsys.readouterr().err.splitlines()
    assert "deit.pth is not a whole safetensors file, nor a state dict" in line


def test_titles_say_name_prediction_and_mean_depth():
    depth = torch.tensor([[12, 6], [4, 4]])
    found = adapting.titles(["a.jpg", "b.jpg"], torch.eye(3)[[2, 0]], depth, ["ant", "bee", "cat"])
    assert found == [
        "a.jpg\npredicted: cat\nmean depth 9.0",
        "b.jpg\npredicted: ant\nmean depth 4.0",
    ]
    (found,) = adapting.titles(["c.jpg"], torch.eye(1000)[[281]], depth[:1], [])
    assert "predicted: tabby" in found
    (found,) = adapting.titles(["d.jpg"], torch.eye(40)[[7]], depth[:1], [])
    assert "predicted: class 7" in found


FAULTS = {
    "there is no model 'none'": ["--model", "none"],
    "cannot be adapted: it is no VisionTransformer": ["--model", "resnet18"],
    "is no folder": ["--images", "nowhere"],
    "holds 0 images": ["--images", "."],
    "between 0 and 0.8": ["--saved", "0.9"],
    "must end in .safetensors": ["--output", "adaptive.bin"],
    "checkpoint nothing.safetensors is missing": ["--weights", "nothing.safetensors"],
    "is of another architecture": ["--model", "deit_tiny_distilled_patch16_224"],
}


@pytest.mark.parametrize("message", FAULTS)
def test_faults_are_one_line_and_write_nothing(
    message, folder, weights, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    usual = {
        "--model": "vit_tiny_patch16_224",
        "--weights": str(weights),
        "--images": str(folder),
        "--output": "a.safetensors",
    }
    changed = usual | dict([FAULTS[message]])
    assert main(["adapt", *(word for pair in changed.items() for word in pair)]) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("error: ") and message in error
    assert not any(tmp_path.iterdir())


def test_on_imagenet_it_stands_beside_tome_at_equal_flops_and_what_is_published(
    folder, monkeypatch
):
    monkeypatch.setattr(adapting, "CLASSES", 2)
    monkeypatch.setattr(adapting, "PEERS", (2, 5))
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=2, **TINY).eval()
    table = adapting.imagenet_table(
        model, folder, seed=0, device=torch.device("cpu"), batch_size=5
    ).set_index("model")
    plain, *merging = list(table.index[:5])
    assert plain == "plain" and table["images"].tolist()[:5] == [16] * 5
    assert table.loc[merging[:2], "gflops"].to_numpy() == pytest.approx(
        table.loc[merging[2:], "gflops"], rel=0.05
    )
    assert (table.loc[merging, "gflops"] < table.loc["plain", "gflops"]).all()
    with torch.inference_mode():
        source = adapting.folder_images(folder / "val", 32)
        images, labels = source[torch.arange(16)]
        images = (to_pixels(images) - 0.5) / 0.5  # as this model was trained
        expected = (model(images).argmax(dim=1) == labels).float().mean().item()
    assert table.loc["plain", "accuracy"] == pytest.approx(expected)
    assert table["images"].isna().sum() == len(adapting.IMAGENET)
    adaptive = adapt(model, images, 0.2)
    alone = adapting.imagenet_table(adaptive, folder / "val", 0, torch.device("cpu"), 5)
    assert alone["model"][0] == "Adaptive merging, as in the file"
