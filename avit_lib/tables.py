"""The tables of the study: predictions in, DataFrame out, one row a model, class or image; fractions are 0 to 1."""

import math
from collections.abc import Iterable

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from avit_lib.config import Profile, Run
from avit_lib.data import Images, pick_per_class
from avit_lib.efficiency import counted_flops, throughput
from avit_lib.evaluation import Predictions, bootstrap_intervals, metrics, paired_difference
from avit_lib.study import Study
from avit_lib.tome import TokenMerging

INTERVALS = ("accuracy", "accuracy_macro", "f1_macro")


def predict_runs(study: Study) -> dict[str, Predictions]:
    """What every trained model of the study, and every merged one, says of the test images, by its name."""
    trained = {run.name: study.load(run.name) for run in study.profile.runs}
    return {name: study.predict(model, study.test) for name, model in {**trained, **merged_models(study)}.items()}


def merged_models(study: Study) -> dict[str, TokenMerging]:
    """The plain model with token merging, which needs no training: the bar for a model that learns to halt."""
    plain = plain_run(study.profile).name
    return {f"ToMe, r = {r}": TokenMerging(study.load(plain), r) for r in study.profile.merging}


def evaluation_table(study: Study, predictions: dict[str, Predictions]) -> pd.DataFrame:
    """One row a model: accuracy, macro accuracy and F1 with 95 % intervals, depth in layers, GFLOPs, share saved.

    Merged models have no depth of their own.
    """
    rows = []
    for run in study.profile.runs:
        values = metrics(study.load(run.name), predictions[run.name])
        rows.append({"model": run.label, "init": run.init} | _with_intervals(values, predictions[run.name]))
    for name, model in merged_models(study).items():
        few = study.test.__getitems__(list(range(8)))[0].to(study.device)
        values = metrics(model.model, predictions[name])
        values |= {"mean_depth": math.nan, "mean_executed_depth": math.nan}
        values["gflops_per_image"] = counted_flops(model, few) / 1e9  # the same for every image
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


def speed_table(study: Study, batches: Iterable[int] = (), masked: bool = False) -> pd.DataFrame:
    """Images a second of the trained models on test images, and speed-up against the plain one: see ``throughput``.

    One row a model and batch size (default: the one it was trained with); ``masked`` adds the models that halt as the
    paper executes them, in place of merged ones.
    """
    runs = study.profile.runs
    models = {run.label: (study.load(run.name), "packed") for run in runs}
    if masked:
        models |= {f"{run.label}, masked": (models[run.label][0], "masked") for run in runs if run.halting}
    else:
        models |= {name: (model, "") for name, model in merged_models(study).items()}
    frames = []
    for batch in batches or [plain_run(study.profile).training.batch_size]:
        images, _ = study.test.__getitems__(list(range(min(batch, len(study.test)))))
        frames.append(throughput(models, images.to(study.device)))
    return pd.concat(frames, ignore_index=True)


def difference_table(profile: Profile, predictions: dict[str, Predictions]) -> pd.DataFrame:
    """Accuracy of every other model minus the plain one's on the same images, with its 95 % interval."""
    plain = plain_run(profile)
    labels = {run.name: run.label for run in profile.runs}
    rows = []
    for name, found in predictions.items():
        if name != plain.name:
            difference, low, high = paired_difference(found, predictions[plain.name])
            row = {"model": labels.get(name, name), "minus": plain.label}
            rows.append(row | {"difference": difference, "low": low, "high": high})
    return pd.DataFrame(rows)


def summary_table(evaluation: pd.DataFrame, differences: pd.DataFrame) -> pd.DataFrame:
    """The evaluation (with speed) and difference tables in words, for people: percentages with 95 % intervals."""
    gains = differences.set_index("model")
    rows = []
    for row in evaluation.itertuples():
        gain = gains.loc[row.model] if row.model in gains.index else None
        rows.append({
            "model": row.model,
            "starts from": row.init,
            "accuracy [%]": _percent_with_interval(row.accuracy, row.accuracy_low, row.accuracy_high),
            "minus DeiT [points]": "" if gain is None else _signed_with_interval(*gain[["difference", "low", "high"]]),
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


def some_per_class(labels: Tensor, seed: int, each: int = 10) -> Tensor:
    """Indices of ``each`` random images of every class, by seed."""
    return pick_per_class(labels, each, torch.Generator().manual_seed(seed))


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
