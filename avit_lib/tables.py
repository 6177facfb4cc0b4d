"""The tables of the study: predictions in, DataFrame out, one row a model, class or image; fractions are 0 to 1."""

import math
from collections.abc import Iterable, Mapping
from copy import deepcopy

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from avit_lib.calibration import calibrated_beta
from avit_lib.config import Profile, Run
from avit_lib.data import Images, pick_per_class
from avit_lib.efficiency import counted_flops, throughput
from avit_lib.evaluation import Predictions, bootstrap_intervals, metrics, paired_difference
from avit_lib.models import AViT
from avit_lib.published import PUBLISHED, SOURCES
from avit_lib.study import Study
from avit_lib.tome import TokenMerging

INTERVALS = ("accuracy", "accuracy_macro", "f1_macro")
DIFFERENCE = ("difference", "low", "high")
PUBLISHED_FIGURES = {
    "accuracy": "accuracy",
    "f1_macro": "macro F1",
    "minus_deit": "accuracy minus DeiT's",
    "mean_depth": "mean depth [layers]",
    "gflops_per_image": "GFLOPs per image",
    "speedup": "speed-up over DeiT",
}
HALTING_SETTINGS = (
    "gamma", "beta", "alpha_ponder", "ponder_ramp", "alpha_distr", "target_depth", "target_std", "class_token_halts",
    "fuse_halted", "merge_halted", "fitted",
)  # fmt: skip


def predict_runs(study: Study) -> dict[str, Predictions]:
    """What every trained model of the study, and every merged one, says of the test images, by its name."""
    trained = {run.name: study.load(run.name) for run in study.profile.runs}
    return {name: study.predict(model, study.test) for name, model in {**trained, **merged_models(study)}.items()}


def merged_models(study: Study) -> dict[str, TokenMerging]:
    """The plain model with token merging, which needs no training: the bar for a model that learns to halt."""
    if not study.profile.merging:
        return {}
    plain = study.load(plain_run(study.profile).name)
    return {f"ToMe, r = {r}": TokenMerging(plain, r) for r in study.profile.merging}


def first_images(study: Study, most: int) -> Tensor:
    """The first test images [B, C, H, W], at ``most`` so many, on the device of the study."""
    return study.test[torch.arange(min(most, len(study.test)))][0].to(study.device)


def evaluation_table(study: Study, predictions: dict[str, Predictions]) -> pd.DataFrame:
    """One row a model: accuracy, macro accuracy and F1 with 95 % intervals, depth in layers, GFLOPs, share saved.

    Merged models have no depth of their own.
    """
    rows = []
    for run in study.profile.runs:
        values = metrics(study.load(run.name), predictions[run.name])
        rows.append({"model": run.label, "init": run.init} | _with_intervals(values, predictions[run.name]))
    for name, model in merged_models(study).items():
        values = metrics(model.model, predictions[name])
        values |= {"mean_depth": math.nan, "mean_executed_depth": math.nan}
        values["gflops_per_image"] = counted_flops(model, first_images(study, 8)) / 1e9  # the same for every image
        init = f"{plain_run(study.profile).name}, not trained"
        rows.append({"model": name, "init": init} | _with_intervals(values, predictions[name]))
    table = pd.DataFrame(rows)
    flops = table.set_index("model")["gflops_per_image"]
    return table.assign(flops_saved=1 - table["gflops_per_image"] / flops[plain_run(study.profile).label])


def _with_intervals(values: dict[str, float], predictions: Predictions) -> dict[str, float]:
    row = {}
    for name, (low, high) in bootstrap_intervals(predictions).items():
        row |= {name: values[name], f"{name}_low": low, f"{name}_high": high}
    return row | {name: value for name, value in values.items() if name not in INTERVALS}


def speed_table(
    study: Study, batches: Iterable[int] = (), masked: bool = False, others: Mapping[str, nn.Module] | None = None
) -> pd.DataFrame:
    """Images a second of the trained models on test images, and speed-up against the plain one: see ``throughput``.

    One row a model and batch size (default: the one it was trained with); ``masked`` adds the models that halt as the
    paper executes them, in place of merged ones; ``others`` are timed beside them.
    """
    runs = study.profile.runs
    models = {run.label: (study.load(run.name), "packed") for run in runs}
    if masked:
        models |= {f"{run.label}, masked": (models[run.label][0], "masked") for run in runs if run.halting}
    else:
        models |= {name: (model, "") for name, model in merged_models(study).items()}
    models |= {name: (model, "packed") for name, model in (others or {}).items()}
    frames = []
    for batch in batches or [plain_run(study.profile).training.batch_size]:
        frames.append(throughput(models, first_images(study, batch)))
    return pd.concat(frames, ignore_index=True)


def difference_table(profile: Profile, predictions: dict[str, Predictions]) -> pd.DataFrame:
    """Accuracy of each model minus a plain one's on the same images, with its 95 % interval; _macro: mean per class."""
    labels = {run.name: run.label for run in profile.runs}
    rows = []
    for plain in (run for run in profile.runs if run.halting is None):
        for name, found in predictions.items():
            if name == plain.name:
                continue
            row = {"model": labels.get(name, name), "minus": plain.label}
            for suffix in ("", "_macro"):
                figures = paired_difference(found, predictions[plain.name], per_class=bool(suffix))
                row |= {f"{part}{suffix}": value for part, value in zip(DIFFERENCE, figures, strict=True)}
            rows.append(row)
    return pd.DataFrame(rows)


def summary_table(evaluation: pd.DataFrame, differences: pd.DataFrame) -> pd.DataFrame:
    """The evaluation (with speed) and difference tables in words, for people: percentages with 95 % intervals.

    Mean per-class accuracy and its differences stand there where classes are not equally large.
    """
    even = np.allclose(evaluation["accuracy"], evaluation["accuracy_macro"])
    gains = differences.set_index(["model", "minus"])[[name if even else f"{name}_macro" for name in DIFFERENCE]]
    rows = []
    for row in evaluation.itertuples():
        macro = _percent_with_interval(row.accuracy_macro, row.accuracy_macro_low, row.accuracy_macro_high)
        rows.append({
            "model": row.model,
            "starts from": row.init,
            **({} if even else {"mean per-class accuracy [%]": macro}),
            **{
                f"minus {plain} [points]": _signed_with_interval(*gains.loc[row.model, plain])
                if (row.model, plain) in gains.index
                else ""
                for plain in differences["minus"].unique()
            },
            "accuracy [%]": _percent_with_interval(row.accuracy, row.accuracy_low, row.accuracy_high),
            "macro F1 [%]": _percent_with_interval(row.f1_macro, row.f1_macro_low, row.f1_macro_high),
            "mean depth [layers]": "" if math.isnan(row.mean_depth) else f"{row.mean_depth:.2f}",
            "GFLOPs per image": f"{row.gflops_per_image:.4f}",
            "FLOPs saved": f"{row.flops_saved:.1%}",
            "images a second": f"{row.images_per_second:.0f}",
            "speed-up": f"{row.speedup:.2f}",
        })  # fmt: skip
    return pd.DataFrame(rows)


def _percent_with_interval(value: float, low: float, high: float) -> str:
    return f"{100 * value:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def _signed_with_interval(value: float, low: float, high: float) -> str:
    return f"{100 * value:+.2f} ({100 * low:+.2f} to {100 * high:+.2f})"


def dialled_models(study: Study, images: int = 64) -> dict[str, AViT]:
    """The focus model turned to other depths by its beta, found on validation images drawn by seed; nothing trained."""
    run = study.profile.run(study.profile.focus)
    model = study.load(run.name)
    validation = study.data.validation
    chosen = torch.randperm(len(validation), generator=torch.Generator().manual_seed(study.seed))[:images]
    pixels = validation[chosen][0].to(study.device)
    models = {}
    for wish in study.profile.dial:
        turned = models[f"{run.label}, depth {wish:g}"] = deepcopy(model)
        turned.beta = calibrated_beta(model, pixels, model.gamma, model.eps, wish)
    return models


def operating_points(
    study: Study, predictions: dict[str, Predictions], turned: Mapping[str, AViT], speed: pd.DataFrame
) -> pd.DataFrame:
    """The focus model as trained and ``turned`` to other depths, shallowest first: beta, depth, accuracy, FLOPs, speed.

    ``turned`` is what ``dialled_models`` gave, ``speed`` the table of ``speed_table`` with them.
    """
    plain, run = plain_run(study.profile), study.profile.run(study.profile.focus)
    rows = []
    for name, model in {run.label: study.load(run.name), **turned}.items():
        found = study.predict(model, study.test) if name in turned else predictions[run.name]
        rows.append({"model": name, "beta": model.beta} | _with_intervals(metrics(model, found), found))
    full = metrics(study.load(plain.name), predictions[plain.name])["gflops_per_image"]
    table = pd.DataFrame(rows)
    table = table.assign(flops_saved=1 - table["gflops_per_image"] / full)
    table = table.merge(speed[["model", "images_per_second", "speedup"]], on="model", validate="one_to_one")
    return table.sort_values("mean_depth", ignore_index=True)


def published_table(study: Study, evaluation: pd.DataFrame) -> pd.DataFrame:
    """Our figures beside published ones, a column each named for its source: other data, so not to be compared."""
    ours = evaluation.set_index("model")
    plain = ours.loc[plain_run(study.profile).label]
    rows = []
    for run in study.profile.runs:
        own = ours.loc[run.label].to_dict()
        own["minus_deit"] = own["accuracy"] - plain["accuracy"]
        others = [entry for entry in PUBLISHED if entry.run == run.name]
        for name, words in PUBLISHED_FIGURES.items():
            row = {"model": run.label, "figure": words, f"ours, {study.profile.dataset}": own[name]}
            row |= {source: math.nan for source in SOURCES}
            row |= {entry.source: getattr(entry, name) for entry in others}
            if any(getattr(entry, name) is not None for entry in others):
                rows.append(row)
    return pd.DataFrame(rows).astype({source: float for source in SOURCES})


def run_table(profile: Profile) -> pd.DataFrame:
    """How each run of a profile is trained, one row each; empty where a setting has no meaning for it."""
    rows = []
    for run in profile.runs:
        row = {"model": run.label, "starts from": run.pretrained or run.init, "taught by": run.teacher}
        row |= {"epochs": run.training.epochs, "learning_rate": run.training.learning_rate}
        row |= {name: getattr(run.halting, name) if run.halting else "" for name in HALTING_SETTINGS}
        rows.append(row)
    return pd.DataFrame(rows)


def start_table(study: Study) -> pd.DataFrame:
    """What each model that halts does on the validation images before it is trained: accuracy, depth, GFLOPs."""
    rows = []
    for run in filter(lambda run: run.halting and run.init != "random", study.profile.runs):
        model = study.initial_model(run)
        found = metrics(model, study.predict(model, study.data.validation))
        columns = ("accuracy", "mean_depth", "gflops_per_image")
        rows.append({"model": run.label} | {f"val_{name}": found[name] for name in columns})
    return pd.DataFrame(rows)


def class_accuracy_table(first: Predictions, second: Predictions, classes: tuple[str, ...]) -> pd.DataFrame:
    """Accuracy on each class of two models, and the change from ``second`` to ``first``, the greatest losses first."""
    images = first.labels.bincount(minlength=len(classes))
    hits = [found.labels[found.correct].bincount(minlength=len(classes)) for found in (second, first)]
    table = pd.DataFrame({"class": classes, "images": images.tolist()})
    table["before"], table["after"] = ((count / images).tolist() for count in hits)
    table = table[table["images"] > 0].assign(change=table["after"] - table["before"])
    return table.sort_values(["change", "class"], ignore_index=True)


def plain_run(profile: Profile) -> Run:
    """The run without halting that the others are compared with."""
    return next(run for run in profile.runs if run.halting is None)


def class_counts(splits: dict[str, Images]) -> pd.DataFrame:
    """Images of each class, one column for each named set of images."""
    classes = next(iter(splits.values())).classes
    counts = {name: data.labels.bincount(minlength=len(classes)).tolist() for name, data in splits.items()}
    return pd.DataFrame({"class": classes} | counts)


def epoch_table(histories: dict[str, pd.DataFrame], columns: dict[str, str]) -> pd.DataFrame:
    """The histories of several models under each other; ``columns`` picks columns and renames them."""
    parts = [history.assign(model=model) for model, history in histories.items()]
    return pd.concat(parts)[["model", "epoch", *columns]].rename(columns=columns).reset_index(drop=True)


def reload_check(last_epoch: pd.Series, reloaded: dict[str, float]) -> pd.DataFrame:
    """Validation metrics as the last epoch wrote them, beside those of the model loaded back from its checkpoint."""
    rows = [
        {"metric": name, "last epoch": last_epoch[f"val_{name}"], "reloaded": value} for name, value in reloaded.items()
    ]
    table = pd.DataFrame(rows)
    return table.assign(difference=table["reloaded"] - table["last epoch"])


def confusion(predictions: Predictions) -> Tensor:
    """Counts [K, K] of images by true class (row) and predicted class (column)."""
    classes = predictions.logits.shape[1]
    cell = predictions.labels * classes + predictions.predicted
    return cell.bincount(minlength=classes**2).reshape(classes, classes)


def confusion_pairs(
    first: Predictions, second: Predictions, classes: tuple[str, ...], names: tuple[str, str], count: int = 10
) -> pd.DataFrame:
    """The most frequent confusions of the model ``first``, in images, beside how often ``second`` makes them."""
    mistakes, others = confusion(first).fill_diagonal_(0), confusion(second)
    most = mistakes.flatten().argsort(descending=True, stable=True)[:count]
    true, predicted = most // len(classes), most % len(classes)
    table = pd.DataFrame({
        "true class": [classes[label] for label in true],
        "taken for": [classes[label] for label in predicted],
        names[0]: mistakes[true, predicted].tolist(),
        names[1]: others[true, predicted].tolist(),
    })  # fmt: skip
    return table[table[names[0]] > 0]


def mean_depth(predictions: Predictions) -> Tensor:
    """Mean depth [n] over the tokens of each image, every token to its own halting, in layers."""
    return predictions.depth.float().mean(dim=1)


def accuracy_by_depth(predictions: Predictions, groups: int = 8) -> pd.DataFrame:
    """Images in ``groups`` of equal size by mean depth, shallowest first: accuracy with its 95 % Wilson interval."""
    depth = mean_depth(predictions)
    rows = []
    for number, chosen in enumerate(depth.argsort(stable=True).tensor_split(min(groups, len(depth))), start=1):
        hits, images = int(predictions.correct[chosen].sum()), len(chosen)
        low, high = wilson_interval(hits, images)
        rows.append({
            "group": number, "images": images, "mean_depth": depth[chosen].mean().item(),
            "accuracy": hits / images, "low": low, "high": high,
        })  # fmt: skip
    return pd.DataFrame(rows)


def wilson_interval(hits: int, images: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a fraction ``hits`` of ``images`` (Wilson), which stays within 0..1."""
    fraction = hits / images
    centre = fraction + z**2 / (2 * images)
    half = z * math.sqrt(fraction * (1 - fraction) / images + z**2 / (4 * images**2))
    scale = 1 + z**2 / images
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def class_depth_table(predictions: Predictions, classes: tuple[str, ...]) -> pd.DataFrame:
    """One row a class, deepest first: images, mean depth and its standard deviation over images, accuracy."""
    frame = pd.DataFrame({
        "class": np.array(classes)[predictions.labels.numpy()],
        "depth": mean_depth(predictions).numpy(),
        "correct": predictions.correct.numpy(),
    })  # fmt: skip
    table = frame.groupby("class").agg(
        images=("depth", "size"),
        mean_depth=("depth", "mean"),
        depth_std=("depth", "std"),
        accuracy=("correct", "mean"),
    )
    return table.sort_values("mean_depth", ascending=False).reset_index()


def one_per_class(labels: Tensor, seed: int, most: int = 10) -> Tensor:
    """Indices of one random image a class, by seed; of ``most`` random classes if there are more. In class order."""
    generator = torch.Generator().manual_seed(seed)
    chosen = pick_per_class(labels, 1, generator)
    chosen = chosen[torch.randperm(len(chosen), generator=generator)[:most]]
    return chosen[labels[chosen].argsort()]


def some_per_class(labels: Tensor, seed: int, each: int = 10, most: int = 10) -> Tensor:
    """Indices of ``each`` random images of every class, by seed; of ``most`` classes, evenly spread, if more."""
    chosen = pick_per_class(labels, each, torch.Generator().manual_seed(seed))
    classes = labels.unique()
    shown = classes[torch.linspace(0, len(classes) - 1, min(most, len(classes))).round().long()]
    return chosen[torch.isin(labels[chosen], shown)]


def depth_extremes(predictions: Predictions, classes: tuple[str, ...], count: int = 8) -> pd.DataFrame:
    """The ``count`` images with the lowest and highest mean depth, and the widest spread of depth inside the image."""
    depth = predictions.depth.float()
    mean, spread = depth.mean(dim=1), depth.std(dim=1)
    orders = {
        "shallowest": mean.argsort(stable=True),
        "deepest": mean.argsort(descending=True, stable=True),
        "widest spread": spread.argsort(descending=True, stable=True),
    }
    rows = [
        {
            "group": group,
            "image": int(index),
            "class": classes[predictions.labels[index]],
            "predicted": classes[predictions.predicted[index]],
            "mean_depth": mean[index].item(),
            "spread": spread[index].item(),
        }
        for group, order in orders.items()
        for index in order[:count]
    ]
    return pd.DataFrame(rows)
