"""The tables that compare the models of a study: predictions in, DataFrame out, one row a model;
fractions 0 to 1.
"""

import math
from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path

import msgspec
import pandas as pd
import torch
from torch import Tensor, nn

from avit_lib.adaptive import Adaptive, adapt
from avit_lib.data import Images
from avit_lib.evaluation import Predictions, bootstrap_intervals, counted_flops, metrics
from avit_lib.evaluation.speed import throughput
from avit_lib.flops import plain_flops
from avit_lib.peers.tome import TokenMerging
from avit_lib.starts import calibrated_beta
from avit_lib.study.settings import Run
from avit_lib.study.study import Study

DIFFERENCE = ["difference", "low", "high"]
MACRO_DIFFERENCE = [f"{name}_macro" for name in DIFFERENCE]
ROUNDS, FEWER_ROUNDS = 5, 3  # of timing, interleaved
ADAPTED = "Adaptive merging"  # what tables and figures call a model of ``adaptive.adapt``
PUBLISHED = msgspec.toml.decode(Path(__file__).with_name("published.toml").read_bytes())
IMAGENET = PUBLISHED.pop(
    "imagenet"
)  # what others published of DeiT-T on ImageNet's validation images


def merged_models(study: Study) -> dict[str, nn.Module]:
    """What needs no training: the plain model with ToMe, the bar for a model that learns to halt,
    and as much saved by ``adaptive.adapt``, with thresholds set on 256 validation images."""
    plain = study.load(study.profile.plain.name)
    peers = {f"ToMe, r = {r}": TokenMerging(plain, r) for r in study.profile.merging}
    if not peers:
        return {}
    return peers | adapted_like(plain, peers.values(), validation_images(study, 256))


def adapted_like(
    plain: nn.Module, peers: Iterable[nn.Module], images: Tensor
) -> dict[str, Adaptive]:
    """``plain`` adapted so that it saves as many FLOPs as each of its ``peers``; thresholds are set
    on ``images``.
    """
    full = counted_flops(plain, images[:1])
    shares = [1 - counted_flops(peer, images[:1]) / full for peer in peers]
    return {f"{ADAPTED}, {share:.0%} saved": adapt(plain, images, share) for share in shares}


def test_images(study: Study, most: int) -> Tensor:
    """Test images [B, C, H, W], at ``most`` so many, drawn by the seed so that all classes take
    part.
    """
    return _drawn(study, study.test, most)


def validation_images(study: Study, most: int) -> Tensor:
    """Validation images [B, C, H, W], at ``most`` so many, drawn by the seed."""
    return _drawn(study, study.data.validation, most)


def _drawn(study: Study, data: Images, most: int) -> Tensor:
    chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(study.seed))[:most]
    return data[chosen][0].to(study.device)


def evaluation_table(
    study: Study, predictions: dict[str, Predictions], others: Mapping[str, nn.Module] | None = None
) -> pd.DataFrame:
    """One row a model: accuracy, macro accuracy and F1 with 95 % intervals, depth in layers,
    GFLOPs, share saved.

    First the trained ones; ``others`` are those of ``merged_models``.
    """
    plain, rows = study.profile.plain, []
    for run in study.profile.runs:
        facts = {"model": run.label, "method": run.method, "init": run.init}
        rows.append(facts | with_intervals(study, study.load(run.name), predictions[run.name]))
    for name, model in (others or {}).items():
        facts = {
            "model": name,
            "method": untrained_method(model),
            "init": f"{plain.name}, not trained",
        }
        rows.append(facts | with_intervals(study, model, predictions[name]))
    return pd.DataFrame(rows)


def untrained_method(model: nn.Module) -> str:
    """Whose one of ``merged_models`` is: "peer" or "ours"."""
    return "peer" if isinstance(model, TokenMerging) else "ours"


def figures(study: Study, model: nn.Module, predictions: Predictions) -> dict[str, float]:
    """The metrics of a model and the share of FLOPs that it saves against itself without halting or
    merging.
    """
    plain = model.model if isinstance(model, TokenMerging) else model
    values = metrics(plain, predictions)
    if plain is not model:
        values |= {
            "mean_depth": math.nan,
            "mean_executed_depth": math.nan,
        }  # its tokens have no depth
        values["gflops_per_image"] = (
            counted_flops(model, test_images(study, 8)) / 1e9
        )  # the same for every image
    full = plain_flops(plain, predictions.depth.shape[1]) / 1e9
    return values | {"flops_saved": 1 - values["gflops_per_image"] / full}


def with_intervals(study: Study, model: nn.Module, predictions: Predictions) -> dict[str, float]:
    """The ``figures`` of a model; after those that have a 95 % interval its ends, _low and
    _high.
    """
    values, row = figures(study, model, predictions), {}
    for name, (low, high) in bootstrap_intervals(predictions).items():
        row |= {name: values.pop(name), f"{name}_low": low, f"{name}_high": high}
    return row | values


def speed_table(
    study: Study,
    others: Mapping[str, nn.Module] | None = None,
    recalibrated: Mapping[str, nn.Module] | None = None,
) -> pd.DataFrame:
    """``throughput`` on test images, one row a model and batch size: the only measurement of a
    study.

    Trained models run packed, at batch sizes up to that of training; the focus also masked, as the
    paper executes it. Plain ones of one architecture compute the same: one is timed for all. The
    ``others`` run at the largest batch size, and so do the ``recalibrated``, in fewer rounds.
    """
    runs, plain = study.profile.runs, study.profile.plain
    alike = {run.label: _timed_for(study, run).label for run in runs}
    timed = [run for run in runs if run.label in alike.values()]
    models = {run.label: (study.load(run.name), "packed") for run in timed}
    focus = study.profile.run(study.profile.focus).label
    models[f"{focus}, masked"] = (models[focus][0], "masked")
    most = min(plain.training.batch_size, len(study.test))
    few = [batch for batch in ((1,) if study.profile.smoke else (1, 8)) if batch < most]
    measured = [throughput(models, test_images(study, batch), ROUNDS) for batch in few]
    models |= {name: (model, "packed") for name, model in (others or {}).items()}
    measured.append(throughput(models, test_images(study, most), ROUNDS))
    if recalibrated:
        beside = {plain.label: models[plain.label]}
        beside |= {name: (model, "packed") for name, model in recalibrated.items()}
        measured.append(throughput(beside, test_images(study, most), FEWER_ROUNDS)[1:])
    table = pd.concat(measured, ignore_index=True)
    others = {label: timed for label, timed in alike.items() if label != timed}
    copies = [table[table["model"] == timed].assign(model=label) for label, timed in others.items()]
    return pd.concat([table, *copies], ignore_index=True)


def _timed_for(study: Study, run: Run) -> Run:
    """The run whose speed is that of ``run``: of plain ones the first of the same architecture."""
    if run.method != "plain":
        return run
    plain = [one for one in study.profile.runs if one.method == "plain"]
    return next(one for one in plain if one.model == run.model)


def summary_table(evaluation: pd.DataFrame, differences: pd.DataFrame) -> pd.DataFrame:
    """The evaluation (with speed) and difference tables in words, for people: percentages with 95 %
    intervals.
    """
    table = evaluation[["model", "init"]].set_axis(["model", "starts from"], axis=1)

    def with_interval(name: str) -> pd.Series:
        return percentages(
            evaluation[[name, f"{name}_low", f"{name}_high"]], "{:.1f} ({:.1f} to {:.1f})"
        )

    table["mean per-class accuracy [%]"] = with_interval("accuracy_macro")
    for plain, part in differences.set_index("model").groupby("minus", sort=False):
        words = percentages(part[MACRO_DIFFERENCE], "{:+.2f} ({:+.2f} to {:+.2f})")
        table[f"minus {plain} [points]"] = table["model"].map(words).fillna("")
    table["accuracy [%]"] = with_interval("accuracy")
    table["macro F1 [%]"] = with_interval("f1_macro")
    table["mean depth [layers]"] = evaluation["mean_depth"].map("{:.2f}".format).replace("nan", "")
    table["GFLOPs per image"] = evaluation["gflops_per_image"].map("{:.4f}".format)
    table["FLOPs saved"] = evaluation["flops_saved"].map("{:.1%}".format)
    table["images/s"] = evaluation["images_per_second"].map("{:.0f}".format)
    table["speed-up"] = evaluation["speedup"].map("{:.2f}".format)
    return table


def percentages(fractions: pd.DataFrame, form: str) -> pd.Series:
    """Each row of ``fractions`` in words, as percentages: ``form`` has a place for each column."""
    return pd.Series([form.format(*row) for row in 100 * fractions.to_numpy()], fractions.index)


def recalibrated_models(study: Study, name: str) -> dict[str, nn.Module]:
    """The model of a run at the other depths or budgets that the profile names; nothing is trained.

    Beta is set on 64 validation images, thresholds are set on 256.
    """
    run, models = study.profile.run(name), {}
    model, pixels = study.load(run.name), validation_images(study, 64 if run.halting else 256)
    for depth in study.profile.recalibrated.get(name, ()):
        deeper = models[f"{run.label}, depth {depth:g}"] = deepcopy(model)
        deeper.beta = calibrated_beta(model, pixels, model.gamma, model.eps, depth)
    for saved in study.profile.budgets.get(name, ()):
        cheaper = models[f"{run.label}, {saved:.0%} saved"] = deepcopy(model)
        cheaper.calibrate(pixels, saved)
    return models
