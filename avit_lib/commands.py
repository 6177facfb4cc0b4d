"""What each command does, when ``cli`` has read its arguments.

``common`` are the options that several commands take, as ``cli`` declares them.
"""

import io
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import timm
import torch
from msgspec import structs, to_builtins
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config
from torch import Tensor, nn

from avit_lib import adaptive, data, training
from avit_lib.errors import UserError, fitting_memory
from avit_lib.evaluation import bootstrap_intervals, check_answers, metrics, predict
from avit_lib.evaluation.speed import benchmark_model
from avit_lib.halting import executed_depth
from avit_lib.model import AViT
from avit_lib.profiles import check, lay_over
from avit_lib.report import pictures
from avit_lib.study import Run, Study, get_profile
from avit_lib.study.results import provenance, results_dir, to_markdown
from avit_lib.study.study import released

CALIBRATION = 512  # images on which thresholds are set, at most
FEW = 64  # images for them
COLUMNS = 6  # images in a row of a picture
KEY = """Images are cropped to their centre and scaled to what the model sees. Depth is the number
of layers that compute a token. Blue covers tokens that left the computation: the earlier, the
bluer; in the last row, those that did not reach the last layer."""


# --- fit, test, data ------------------------------------------------------------------------------


def fit(common, output: Path | None, teacher: Path | None, changes: dict[str, Any]) -> None:
    """Train a run, for the notebooks or, with ``changes`` of its training, into ``output``."""
    study = Study(common.profile, common.seed, device=common.device)
    run = study.profile.run(common.model or study.profile.focus)
    if output is None:
        if common.data_dir or common.ckpt or teacher or changes:
            raise UserError(
                "data, weights or settings of your own need a folder of their own: add --output DIR"
            )
        output = study.folder(run.name)
        history = study.train(run.name)
    else:
        tables = lay_over(to_builtins(run), {"training": changes})
        run = check("these settings", run.name, tables, Run)
        if common.data_dir:
            study.data = data.folder_training_data(common.data_dir, study.profile.data, common.seed)
        history = study.train_into(output, run, common.ckpt, teacher)
    print(to_markdown(history.tail(1)))
    print(f"checkpoints and history: {output}")


def load_trained(common) -> tuple[nn.Module, dict[str, Any], Path]:
    """The model in a checkpoint, else the run that was trained here or committed.

    Returns it with the description of its run, and where it lies; "pretrained" there is the timm
    name of the weights that adapt took, if any.
    """
    study = Study(common.profile, common.seed, device=common.device)
    run = study.profile.run(common.model or study.profile.focus).name
    path = common.ckpt or released(study.profile.name, run)
    if not common.ckpt and (study.folder(run).is_dir() or not path.is_file()):
        path = study.checkpoint(run)
    model, description = training.load_checkpoint(path, study.device)
    found = {"classes": [], "seed": common.seed} | description.get("run", {})
    found["pretrained"] = description.get("adapted", {}).get("pretrained", "")
    if common.seed not in (0, found["seed"]):
        raise UserError(f"{path} was trained with seed {found['seed']}; leave out --seed")
    settings = found.get("settings", {})
    tell_unfinished(path, description)
    if not common.ckpt and settings != to_builtins(study.profile.run(run)):
        data.tell(f"{path} was trained by other settings than profile {study.profile.name} has now")
    trained_as = settings.get("name", run)
    if common.model not in (None, trained_as):
        raise UserError(
            f"{path} was trained as {trained_as}, not {run}; correct --model or leave it out"
        )
    return model, found, path


def tell_unfinished(path: Path, description: dict[str, Any]) -> None:
    """Tell on stderr of which epoch a checkpoint is, unless it is of the last."""
    settings = description.get("run", {}).get("settings", {})
    epochs = settings.get("training", {}).get("epochs", 0)
    if description.get("epoch", epochs) < epochs:
        data.tell(f"{path} is of epoch {description['epoch']} of {epochs}")


def find_test_images(
    common, model: nn.Module, run: dict, path: Path
) -> tuple[data.Images, dict[str, Any]]:
    """The test images of a folder, else of the profile; and what they are.

    Raises UserError unless the model in ``path`` was trained on the training images beside them: it
    may know the others. A folder with test/ alone is taken as it is.
    """
    if not run["classes"]:
        raise UserError(
            f"{path} was not trained by fit: it has no test images; test it in a loop of your own "
            f"(docs/elsewhere.md)"
        )
    if len(run["classes"]) != model.num_classes:
        raise UserError(f"{path} has {model.num_classes} classes, its .json {len(run['classes'])}")
    profile, folder, seed = get_profile(common.profile), common.data_dir, run["seed"]
    wanted = structs.replace(profile.data, image_size=model.patch_embed.img_size[0])
    about: dict[str, Any] = {"profile": profile.name}
    trained_on = None
    if not folder:
        found, trained_on = data.test_data(wanted, seed), data.training_data(wanted, seed)
    else:
        about = {"folder": os.fsencode(folder.resolve()).decode(errors="backslashreplace")}
        if os.path.lexists(folder / "train"):
            trained_on = data.folder_training_data(folder, wanted, seed)
        found = data.folder_test_data(folder, wanted.image_size, run["classes"], trained_on)
    if trained_on:
        about |= {name: trained_on.split[name] for name in ("seed", "sha256", "content")}
        if "others" in run:
            raise UserError(
                f"{path} started from a model, or was taught by one, that was trained on other "
                f"images, and may know these; name a folder with test/ alone"
            )
        if run.get("images", [])[:2] != [about["sha256"], about["content"]]:
            raise UserError(
                f"{path} was trained on other images than those of {folder or profile.name}: name "
                f"its own by --profile or --data-dir, or a folder with test/ alone"
            )
    return found, about


def test(common, batch_size: int) -> None:
    """Print, as JSON, how good a trained model is on the test images, and where that is from."""
    model, run, path = load_trained(common)
    found, about = find_test_images(common, model, run, path)
    predictions = predict(model, found, batch_size, training.pick_device(common.device))
    facts = {
        "images": len(found),
        **metrics(predictions),
        "intervals": bootstrap_intervals(predictions),
        "tested": about,
        "provenance": provenance(about.get("profile", ""), run["seed"]),
    }
    # msgspec writes null for NaN, which is no JSON: the interval of one image.
    print(msgspec.json.format(msgspec.json.encode(facts), indent=1).decode())


def describe_data(common) -> None:
    """Print what the data of a profile are, and whether they are those on record."""
    profile = get_profile(common.profile)
    found = data.training_data(profile.data, common.seed)
    tested = data.test_data(profile.data, common.seed)
    facts = {"folder": str(data.data_dir()), "classes": len(tested.classes)} | found.split
    del facts["files"]
    print(json.dumps(facts | {"test_images": len(tested)}, indent=1))
    path = results_dir(profile.name) / "metrics" / "split.json"
    recorded = training.read_json(path) if path.is_file() else {}
    if recorded.get("seed") != common.seed:
        data.tell(f"compared with nothing: {path} has no record of seed {common.seed}")
    else:
        other = [key for key in ("sha256", "content") if recorded[key] != found.split[key]]
        if other:  # names, or what the files hold
            raise UserError(
                f"the images are not those on record: {', '.join(other)} of {path} differ; compare "
                f"the files with those of the published archive"
            )
        print(f"the same as in {path}")


# --- adapt, benchmark -----------------------------------------------------------------------------


def find_model(name: str | None, weights: Path | None) -> tuple[nn.Module, dict[str, Any]]:
    """A trained model and its description: one that fit or adapt wrote, else timm's ``name``.

    ``weights``: of fit or adapt, with the .json beside; or a .safetensors or .pth of timm's keys,
    for as many classes as it has. Default: the pretrained ones of ``name``.
    """
    if weights and weights.with_suffix(".json").is_file():
        model, described = training.load_checkpoint(weights)
        if name not in (None, described["model"]):
            raise UserError(
                f"{weights} is of model {described['model']}, not {name}; correct --model or leave "
                f"it out"
            )
        tell_unfinished(weights, described)
        return model, described
    name = name or "deit_tiny_patch16_224"
    head = training.read_weights(weights).get("head.weight") if weights else None
    arguments = {} if head is None or not head.ndim else {"num_classes": len(head)}
    model = training.create_model(name, arguments)
    adaptive.without_thresholds(model)  # or an error, before anything is downloaded
    if weights:
        training.load_weights(model, weights)
    else:
        known = timm.get_pretrained_cfg(name)
        timm_name = f"{known.architecture}.{known.tag}" if known and known.tag else name
        training.load_pretrained(model, timm_name)
    about = {"model": name, "arguments": arguments}
    return model.eval(), about if weights else about | {"pretrained": timm_name}


def make_reader(model: nn.Module, classes: list[str]) -> tuple[Callable[[Path], Tensor], tuple]:
    """What reads an image file as a model wants it; and the mean and deviation used.

    ``classes`` are those of a run of a study; a model of timm's has none of its own.
    """
    size = model.patch_embed.img_size[0]
    if classes:
        return partial(data.read_image, image_size=size), data.STATISTICS
    config = resolve_model_data_config(model)
    config["input_size"] = (3, *model.patch_embed.img_size)  # the model may be made for another
    seen = (f"{name} {config[name]}" for name in ("mean", "std", "crop_pct", "interpolation"))
    print(f"images as timm says of this model: {', '.join(seen)}; pooling {model.global_pool!r}")
    read = partial(data.read_image, image_size=size, transform=create_transform(**config))
    return read, (config["mean"], config["std"])


def make_adaptive(model: nn.Module, images: Tensor, saved: float) -> adaptive.Adaptive:
    """``adaptive.adapt``, which says how far it is."""
    with fitting_memory(len(images), "name a folder with fewer images"):
        return adaptive.adapt(
            model, images, saved, report=lambda share: print(f"saves {share:.1%} of the FLOPs")
        )


def prepare(
    common, name: str | None, weights: Path | None, folder: Path
) -> tuple[nn.Module, dict[str, Any], Tensor]:
    """A model and its description (see ``find_model``), and at most ``CALIBRATION`` images for it.

    The images [B, C, H, W] are drawn from the files in or below ``folder``.
    """
    model, described = find_model(name, weights)
    files, _ = data.find_images(folder)
    if len(files) < 2:
        raise UserError(
            f"{folder} holds {len(files)} images; two or more are needed, better some hundred"
        )
    drawn = torch.randperm(len(files), generator=torch.Generator().manual_seed(common.seed))
    chosen = [folder / files[number] for number in drawn[:CALIBRATION].tolist()]
    read, _ = make_reader(model, described.get("run", {}).get("classes", []))
    device = training.pick_device(common.device)
    pixels = torch.stack(data.read_all(read, chosen))
    return model.to(device), described, pixels.to(device)


def refuse_existing(weights: Path) -> None:
    """Raise UserError where a checkpoint, or its JSON, is there already."""
    for path in (weights, weights.with_suffix(".json")):
        if path.exists():
            raise UserError(f"{path} is there already; delete it, or name another --output")


def adapt(
    common, images: Path, output: Path, name: str | None, weights: Path | None, saved: float
) -> None:
    """Write a model to ``output`` that saves a share of its FLOPs."""
    output = output.with_suffix(".safetensors")
    refuse_existing(output)
    model, described, pixels = prepare(common, name, weights, images)
    adapted = make_adaptive(model, pixels, saved)
    with torch.inference_mode():
        answers = [torch.cat([one(part) for part in pixels.split(64)]) for one in (model, adapted)]
    check_answers(torch.cat(answers))
    if len(pixels) < FEW:
        data.tell(f"{images} holds only {len(pixels)} images; thresholds want some hundred")
    if model.num_classes > 1:
        same = (answers[0].argmax(dim=1) == answers[1].argmax(dim=1)).double().mean()
        print(f"answers as before on {same:.1%} of these {len(pixels)} images")
    else:  # it has features, or one output
        change = (answers[1] - answers[0]).norm() / answers[0].norm().clamp_min(1e-12)
        print(f"outputs changed by {change:.1%} of their norm on these {len(pixels)} images")
    facts = {"saved": saved, "images": len(pixels), "provenance": provenance("", common.seed)}
    facts["pretrained"] = described.get("pretrained", "")
    run = {"seed": common.seed, "classes": []} | described.get("run", {})
    about = described["model"], described["arguments"]
    epoch = {"epoch": described["epoch"]} if "epoch" in described else {}
    refuse_existing(output)  # another process may have written it meanwhile
    try:
        training.save_checkpoint(output, adapted, *about, run=run, adapted=facts, **epoch)
    except (UserError, KeyboardInterrupt):
        output.with_suffix(".json").unlink(missing_ok=True)  # or the same command would refuse
        raise
    print(f"written to {output}")


def benchmark(
    common, name: str | None, weights: Path | None, saved: float, images: Path | None
) -> None:
    """Print what a model gains in speed on this machine, beside the plain one of its shape."""
    folder = images or data.data_dir() / "caltech101"
    plain, described, pixels = prepare(common, name, weights, folder)
    if not hasattr(plain, "forward_with_trace"):
        model = make_adaptive(plain, pixels, saved)
    else:
        model = plain
        twin = described["model"].replace("avit_", "deit_", 1)
        shape = {"img_size": model.patch_embed.img_size, "num_classes": model.num_classes}
        plain = training.create_model(twin, shape).to(pixels.device).eval()
    print(f"{len(pixels)} images of {folder}; FLOPs are those of the images in a batch")
    print(to_markdown(benchmark_model(model, plain, pixels)))


# --- visualize ------------------------------------------------------------------------------------


def visualize(common, images: list[Path], output: Path) -> None:
    """Write a picture of where a model stopped looking in image files."""
    if not images:
        raise UserError("no image is named; a file whose name begins with [ is written ./[...")
    if output.exists() and any(output.samefile(path) for path in images):
        raise UserError(f"{output} is read, too; name another --output")
    model, run, _ = load_trained(common)
    if not hasattr(model, "forward_with_trace"):
        raise UserError(
            "a model whose tokens all go through; name a checkpoint of an A-ViT, or of adapt"
        )
    read, statistics = make_reader(model, run["classes"])
    files = [Path(os.path.abspath(path)) for path in images]  # a link keeps its own name
    pixels = torch.stack(data.read_all(read, files))
    names = [f"{file.parent.name}/\n{file.name}" for file in files]
    with torch.inference_mode():
        logits, trace = model.forward_with_trace(pixels.to(training.pick_device(common.device)))
    check_answers(logits)
    classes = run["classes"] or name_classes(model.num_classes, run["pretrained"])
    classes = [name.replace("_", " ") for name in classes]
    predicted = [classes[best] if classes else "nothing" for best in logits.argmax(dim=1)]
    # An image ends with its class token, where that halts.
    depth = executed_depth(trace.depth) if isinstance(model, AViT) else trace.depth
    depths = depth.float().mean(dim=1)
    titles = [
        f"{name}\npredicted: {said}\nmean depth {mean:.1f}"
        for name, said, mean in zip(names, predicted, depths, strict=True)
    ]
    patches = depth[:, model.num_prefix_tokens :].cpu()
    figure = pictures.depth_maps(
        data.to_pixels(pixels, statistics),
        nn.functional.pad(patches, (1, 0)),  # as if of a class token
        len(model.blocks),
        titles,
        COLUMNS,
        model.patch_embed.grid_size,
    )
    figure.suptitle(KEY, fontsize=9)
    drawn = io.BytesIO()
    figure.savefig(drawn, format=output.suffix.lower()[1:], dpi=150, bbox_inches="tight")
    training.write_atomically(output, drawn.getvalue())
    print(f"written to {output}")


def name_classes(count: int, pretrained: str) -> list[str]:
    """The names of ImageNet's classes for timm's ``pretrained`` weights, or else numbers."""
    if count != data.IMAGENET_CLASSES or not pretrained:
        return [f"class {index}" for index in range(count)]
    return [words.split(",")[0] for words in ImageNetInfo().label_descriptions()]
