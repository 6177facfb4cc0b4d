"""The tables that compare the models of a study: predictions in, DataFrame out.

One row a model, fractions 0 to 1.
"""

import math
from copy import deepcopy
from pathlib import Path

import msgspec
import pandas as pd
import torch
from torch import Tensor, nn

from avit_lib.adaptive import adapt
from avit_lib.data import Images
from avit_lib.evaluation import Predictions, bootstrap_intervals, maps, metrics
from avit_lib.model import AViT
from avit_lib.peers import PEERS, make_peers
from avit_lib.starts import calibrate_beta
from avit_lib.study import Profile, Study

DIFFERENCE = ["difference", "low", "high"]
MACRO_DIFFERENCE = [f"{name}_macro" for name in DIFFERENCE]
ADAPTED = "Adaptive merging"  # what tables and figures call a model of ``adaptive.adapt``
PEER = {"method": "peer", "mean_depth": math.nan, "mean_executed_depth": math.nan}
PUBLISHED, ON_IMAGENET = (
    msgspec.toml.decode(Path(__file__).with_name(name).read_bytes())
    for name in ("published.toml", "imagenet.toml")
)
IMAGENET = ON_IMAGENET["model"]  # what others published, a dictionary a model


# --- models that need no training -----------------------------------------------------------------


def merged_models(study: Study) -> dict[str, nn.Module]:
    """``merge_both_ways`` of the study's plain model, by at most 256 validation images."""
    images = draw_images(study, study.data.validation, 256)
    return merge_both_ways(study.load(study.profile.plain.name), study.profile, images)


def merge_both_ways(plain: nn.Module, profile: Profile, images: Tensor) -> dict[str, nn.Module]:
    """A plain model with its peers, the bar for what learns, and adapted on ``images``, by label.

    At the budgets that the profile names.
    """
    models = make_peers(plain, profile.peers)
    for share in profile.adapted:
        models[f"{ADAPTED}, {100 * share:g}% saved"] = adapt(plain, images, share)
    return models


def is_peer(label: str) -> bool:
    """Whether a label of ``merged_models`` is a peer's."""
    return label.split(", ")[0] in PEERS


def name_trainings(profile: Profile) -> dict[str, tuple[str, float]]:
    """Of each trained peer, what it is called: its method and the number that it is trained at.

    All are trained at their last number but one; those of ``peers`` once more, at their last.
    """
    trainings = {}
    for name, numbers in (profile.peers | profile.sweep_peers).items():
        trainings[f"{name} trained"] = name, numbers[-2:][0]
        if name in profile.peers:
            trainings[f"{name} trained at {PEERS[name][1]} = {numbers[-1]}"] = name, numbers[-1]
    return trainings


def recalibrated_models(study: Study, name: str) -> dict[str, nn.Module]:
    """The model of a run at the other depths or budgets that the profile names, by label.

    Nothing is trained: beta is set on at most 64 validation images, thresholds on at most 256.
    """
    run, models = study.profile.run(name), {}
    model = study.load(name)
    pixels = draw_images(study, study.data.validation, 64 if run.halting else 256)
    for depth in study.profile.recalibrated.get(name, ()):
        models[f"{run.label}, depth {depth:g}"] = recalibrate(model, pixels, depth)
    for saved in study.profile.budgets.get(name, ()):
        cheaper = models[f"{run.label}, {100 * saved:g}% saved"] = deepcopy(model)
        cheaper.calibrate(pixels, saved)
    return models


def recalibrate(model: AViT, images: Tensor, depth: float) -> AViT:
    """A copy of ``model`` whose beta gives a mean ``depth`` in layers on ``images``."""
    deeper = deepcopy(model)
    deeper.beta = calibrate_beta(model, images, depth)
    return deeper


def draw_images(study: Study, data: Images, most: int) -> Tensor:
    """Images [B, C, H, W] of ``data``, at ``most`` so many, drawn by the seed from all classes."""
    chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(study.seed))[:most]
    return data[chosen][0].to(study.device)


# --- tables ---------------------------------------------------------------------------------------


def measure(predictions: Predictions, full: float) -> dict[str, float]:
    """Metrics of a model, the share that it saves of ``full`` FLOPs, and ends of intervals.

    The ends of the 95 % interval of a metric, if it has one, stand after it, as _low and _high.
    """
    values, row = metrics(predictions), {}
    for name, (low, high) in bootstrap_intervals(predictions).items():
        row |= {name: values.pop(name), f"{name}_low": low, f"{name}_high": high}
    return row | values | {"flops_saved": 1 - 1e9 * values["gflops_per_image"] / full}


def judge(low: float, high: float) -> str:
    """What the interval of a difference in accuracy says, in words."""
    if low > 0:
        return "more accurate"
    return "less accurate" if high < 0 else "not significantly different"


def object_table(depths: dict[str, Tensor], differing: Tensor) -> pd.DataFrame:
    """The mean AUC of object against background, with its 95 % interval over images, by model.

    ``depths`` [k, P] of patches by label, ``differing`` [k, P] from ``maps.plain_backgrounds``.
    """
    rows = []
    for label, depth in depths.items():
        auc = pd.Series(maps.object_auc(depth, differing).numpy()).dropna()
        middle, half = auc.mean(), 1.96 * auc.sem()
        row = {"model": label, "images": len(auc), "auc": middle}
        rows.append(row | {"low": middle - half, "high": middle + half})
    return pd.DataFrame(rows)


def percentages(fractions: pd.DataFrame, form: str) -> pd.Series:
    """Each row of ``fractions`` in words, as percentages: ``form`` has a place for each column."""
    return pd.Series([form.format(*row) for row in 100 * fractions.to_numpy()], fractions.index)
