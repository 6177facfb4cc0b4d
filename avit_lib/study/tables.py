"""The tables that compare the models of a study: predictions in, DataFrame out, one row a model; fractions are 0 to 1.

Tables of one notebook alone are made there.
"""

import math
from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path

import msgspec
import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from avit_lib.evaluation import Predictions, bootstrap_intervals, counted_flops, metrics, paired_difference
from avit_lib.evaluation.speed import throughput
from avit_lib.model import AViT
from avit_lib.peers.tome import TokenMerging
from avit_lib.starts import calibrated_beta
from avit_lib.study.settings import Profile
from avit_lib.study.study import Study

DIFFERENCE = ("difference", "low", "high")
PUBLISHED = msgspec.toml.decode(Path(__file__).with_name("published.toml").read_bytes())
PUBLISHED_FIGURES = {
    "accuracy": "accuracy", "f1_macro": "macro F1", "minus_deit": "accuracy minus DeiT's",
    "mean_depth": "mean depth [layers]", "gflops_per_image": "GFLOPs per image", "speedup": "speed-up over DeiT",
}  # fmt: skip


def predict_runs(study: Study) -> dict[str, Predictions]:
    """What every trained model of the study, and every merged one, says of the test images, by its name."""
    trained = {run.name: study.load(run.name) for run in study.profile.runs}
    return {name: study.predict(model, study.test) for name, model in {**trained, **merged_models(study)}.items()}


def merged_models(study: Study) -> dict[str, TokenMerging]:
    """The plain model with token merging, which needs no training: the bar for a model that learns to halt."""
    if not study.profile.merging:
        return {}
    plain = study.load(study.profile.plain.name)
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
        init = f"{study.profile.plain.name}, not trained"
        rows.append({"model": name, "init": init} | _with_intervals(values, predictions[name]))
    table = pd.DataFrame(rows)
    flops = table.set_index("model")["gflops_per_image"]
    return table.assign(flops_saved=1 - table["gflops_per_image"] / flops[study.profile.plain.label])


def _with_intervals(values: dict[str, float], predictions: Predictions) -> dict[str, float]:
    row = {}
    for name, (low, high) in bootstrap_intervals(predictions).items():
        row |= {name: values[name], f"{name}_low": low, f"{name}_high": high}
    return row | {name: value for name, value in values.items() if name not in row}


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
    for batch in batches or [study.profile.plain.training.batch_size]:
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
    table = pd.DataFrame({"model": evaluation["model"], "starts from": evaluation["init"]})
    if not even:
        table["mean per-class accuracy [%]"] = _with_interval(evaluation, "accuracy_macro")
    for plain, part in differences.groupby("minus", sort=False):
        names = [name if even else f"{name}_macro" for name in DIFFERENCE]
        words = dict(zip(part["model"], _percentages(part[names], "+.2f"), strict=True))
        table[f"minus {plain} [points]"] = table["model"].map(words).fillna("")
    table["accuracy [%]"] = _with_interval(evaluation, "accuracy")
    table["macro F1 [%]"] = _with_interval(evaluation, "f1_macro")
    table["mean depth [layers]"] = evaluation["mean_depth"].map("{:.2f}".format).replace("nan", "")
    forms = {"GFLOPs per image": "{:.4f}", "FLOPs saved": "{:.1%}", "images a second": "{:.0f}", "speed-up": "{:.2f}"}
    columns = ("gflops_per_image", "flops_saved", "images_per_second", "speedup")
    return table.assign(**{name: evaluation[column].map(form.format)
                           for (name, form), column in zip(forms.items(), columns, strict=True)})  # fmt: skip


def _with_interval(frame: pd.DataFrame, name: str) -> list[str]:
    return _percentages(frame[[name, f"{name}_low", f"{name}_high"]], ".1f")


def _percentages(frame: pd.DataFrame, form: str) -> list[str]:
    """In words, from a fraction and the ends of its interval, a row each."""
    return [f"{middle:{form}} ({low:{form}} to {high:{form}})" for middle, low, high in 100 * frame.to_numpy()]


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
    plain, run = study.profile.plain, study.profile.run(study.profile.focus)
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
    table = evaluation.set_index("model")
    table["minus_deit"] = table["accuracy"] - table.loc[study.profile.plain.label, "accuracy"]
    rows = []
    for run in study.profile.runs:
        for name, words in PUBLISHED_FIGURES.items():
            others = {source: found.get(run.name, {}).get(name, math.nan) for source, found in PUBLISHED.items()}
            row = {
                "model": run.label,
                "figure": words,
                f"ours, {study.profile.data.dataset}": table.loc[run.label, name],
            }
            rows += [row | others] if not all(map(math.isnan, others.values())) else []
    return pd.DataFrame(rows)
