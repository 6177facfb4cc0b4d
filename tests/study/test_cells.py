"""What the cells of the notebooks compute themselves, on predictions made by hand."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import pytest
import timm
import torch
from conftest import assert_labels_on_the_page, four_runs, random_images, varied_model
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from msgspec import structs

from avit_lib.adaptive import adapt
from avit_lib.data import to_pixels
from avit_lib.evaluation import Predictions, metrics, predict
from avit_lib.flops import plain_flops
from avit_lib.model import AViT
from avit_lib.study import figures, get_profile, pictures, tables
from avit_lib.study.settings import Profile

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
CLASSES = ("ant", "bee", "cat", "dog")  # there is no image of a dog
LAYERS = 5
SMOKE = four_runs()


class Kept(dict):
    """In place of a results folder: what cells write, by name, and the names that they ``left``
    behind.
    """

    def _keep(self, value, name, caption=""):
        kind = (
            "figure"
            if hasattr(value, "savefig")
            else "finding"
            if isinstance(value, str)
            else "table"
        )
        self[f"{kind} {name}"] = value
        return value

    table = figure = metrics = finding = _keep


def run_cells(notebook: str, first: str, count: int | None = None, **names) -> Kept:
    """What cells of a notebook write, given ``names``: ``count`` or all, from the first that begins
    with ``first``.
    """
    cells = nbformat.read(NOTEBOOKS / f"{notebook}.ipynb", as_version=4).cells
    codes = [
        cell.source for cell in cells if cell.cell_type == "code" and not cell.metadata.get("tags")
    ]
    imports, namespace = codes[0].split("study = Study(")[0], {"SEED": 0, **names}
    chosen = codes[next(number for number, code in enumerate(codes) if code.startswith(first)) :]
    for code in (imports, *chosen[:count]):
        exec(compile(code, notebook, "exec"), namespace)
    names["study"].results.left = namespace
    return names["study"].results


def predictions(predicted: list[int], labels: list[int], depth: torch.Tensor) -> Predictions:
    """Predictions of certain classes; every active token scores 0.2 in the first layer and 0.1 in
    the others.
    """
    logits = torch.nn.functional.one_hot(torch.tensor(predicted), len(CLASSES)).float()
    active = depth[:, None] >= torch.arange(1, LAYERS + 1)[:, None]
    scores = 0.1 * active
    scores[:, 0] = 0.2
    return Predictions(logits, torch.tensor(labels), depth, scores, LAYERS)


@pytest.fixture
def halting() -> Predictions:
    """Six images of a class token and 2 x 2 patches; the first bee is taken for a cat."""
    depth = [[1] * 5, [2] * 5, [4] * 5, [3] * 5, [1, 1, 1, 4, 4], [2, 2, 2, 1, 1]]
    return predictions([0, 0, 2, 1, 2, 2], [0, 0, 1, 1, 2, 2], torch.tensor(depth))


@pytest.fixture
def plain() -> Predictions:
    return predictions([0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2], torch.full((6, 5), LAYERS))


def study_of(plain: Predictions, **more) -> SimpleNamespace:
    test = replace(random_images(len(plain.labels)), labels=plain.labels, classes=CLASSES)
    return SimpleNamespace(profile=SMOKE, results=Kept(), test=test, **more)


def drawn(figure, axis: int = 0) -> np.ndarray:
    """The values of a heat map, square."""
    values = np.asarray(figure.axes[axis].collections[0].get_array())
    return values.reshape(2 * [round(values.size**0.5)])


def texts(labels) -> list[str]:
    return [label.get_text() for label in labels]


# --- 02 and 03: data, settings, histories ---------------------------------------------------------


class OfRuns:
    """A study whose runs have all the same history and the same model."""

    def __init__(self, histories: dict[str, pd.DataFrame] | None = None):
        self.profile, self.results, self.device, self.histories = (
            SMOKE,
            Kept(),
            "cpu",
            histories or {},
        )
        self.data = SimpleNamespace(
            train=random_images(107), validation=random_images(30, seed=1), split={}
        )
        self.model = varied_model(depth=4).float()
        self.predict, self.train = predict, self.histories.__getitem__

    def load(self, name):
        return self.model

    def initial_model(self, run):
        return self.model if run.halting else timm.create_model("deit_nano")


def test_images_of_each_class_and_figures_of_the_checkpoint_read_back():
    study = OfRuns()
    found = metrics(study.model, predict(study.model, study.data.validation))
    last = {f"val_{name}": value for name, value in found.items()}
    epochs = [
        last | {"epoch": 1, "val_accuracy": 0.0},
        last | {"epoch": 2, "val_accuracy": found["accuracy"] + 0.25},
    ]
    study.histories["deit"] = pd.DataFrame(epochs).assign(
        train_loss=1.0, train_task=0.8, learning_rate=0.1
    )
    longer = study.histories["deit_longer"] = study.histories["deit"].assign(train_task=[0.7, 0.6])
    run_cells("02_finetune_deit", "study.results.metrics", study=study)
    counts = study.results["table 02_split"]
    assert (
        counts["training"].tolist() == [11] * 7 + [10] * 3
        and counts["validation"].tolist() == [3] * 10
    )
    check = study.results["table 02_checkpoint"].set_index("metric")
    assert set(check.index) == set(found)
    assert check["difference"].drop("accuracy").abs().max() == 0
    assert check.loc["accuracy", "difference"] == pytest.approx(-0.25)
    pd.testing.assert_frame_equal(study.results["table 02_history_longer"], longer)
    losses, accuracies = (axis.lines for axis in study.results["figure 02_longer"].axes)
    assert [line.get_label() for line in losses] == ["DeiT", "DeiT trained longer"]
    assert [line.get_xydata().tolist() for line in losses] == [
        [[1, 0.8], [2, 0.8]],
        [[3, 0.7], [4, 0.6]],
    ]
    assert [line.get_xdata().tolist() for line in accuracies] == [[1, 2], [3, 4]]
    finding = " ".join(study.results["finding 02_deit"].split())
    assert "DeiT trained longer*, the control, is +0.0 points (+0.0 to +0.0) from it" in finding
    assert f"the largest difference is {0.25:.1g}" in finding


def test_class_attention_is_a_softmax_and_its_finding_says_where_it_goes():
    study = OfRuns()
    history = pd.DataFrame(
        {"epoch": [1, 2], "train_loss": 1.0, "train_task": 1.0, "learning_rate": 0.1}
    )
    for name in metrics(study.model, predict(study.model, study.data.validation)):
        history[f"val_{name}"] = 0.5
    study.histories |= {"deit": history, "deit_longer": history}
    run_cells("02_finetune_deit", "study.results.metrics", study=study)
    left, finding = study.results.left, study.results["finding 02_attention"]
    drawn = [axis.images[0].get_array() for axis in study.results["figure 02_attention"].axes[:8]]
    words = []
    for model, (_, *grids) in ((left["start"], drawn[:4]), (study.model, drawn[4:])):
        inputs = []
        for block in model.blocks:
            block.attn.register_forward_pre_hook(
                lambda _, inside, inputs=inputs: inputs.append(inside[0])
            )
        with torch.inference_mode():
            model.forward_features(left["image"])
            for layer, grid in zip((0, 2, 3), grids, strict=True):
                tokens, attention = inputs[layer], model.blocks[layer].attn
                query, key, _ = attention.qkv(tokens).view(1, 17, 3, 2, 8).unbind(2)
                shares = (
                    (query[0, 0, :, None] * key[0].transpose(0, 1))
                    .sum(dim=-1)
                    .div(8**0.5)
                    .softmax(dim=1)
                )
                np.testing.assert_allclose(grid, 100 * shares.mean(dim=0)[1:].view(4, 4), rtol=1e-3)
        last = np.asarray(grids[-1]) / np.sum(grids[-1])
        words.append((np.sort(last.ravel())[-4:].sum(), last.sum() - last[1:3, 1:3].sum()))
    (first, at_border), (tuned, border) = words
    finding = " ".join(finding.split())
    assert f"receives {first:.0%} (ImageNet weights) and {tuned:.0%} (fine-tuned)" in finding
    assert f"border, 75% of all, receive {at_border:.0%} and {border:.0%}" in finding


class OfHalting(OfRuns):
    """A study of every run of the smoke profile, on small images; each has a history and an offset
    of its own.

    DeiT alone answers better than by chance.
    """

    def __init__(self):
        super().__init__()
        profile = get_profile("smoke")
        runs = [
            structs.replace(run, model="avit_nano" if run.halting else "deit_nano")
            for run in profile.runs
        ]
        data = structs.replace(profile.data, image_size=28)
        self.profile, self.models = structs.replace(profile, data=data, runs=tuple(runs)), {}
        self.predict = self.answers
        torch.manual_seed(0)
        for number, run in enumerate(runs):
            values = {"train_loss": 4.0, "train_task": 2.0, "train_ponder": 3.0, "train_distr": 0.5}
            values |= {"val_mean_depth": 3.5, "val_accuracy": 0.5, "val_gflops_per_image": 0.1}
            parts = {
                name: [value + number / 20, value + number / 10] for name, value in values.items()
            }
            self.histories[run.name] = pd.DataFrame({"epoch": [1, 2], **parts, "seconds": 3})
            self.models[run.name] = timm.create_model("deit_nano").eval()
            if run.halting:
                self.models[run.name] = varied_model(depth=4, beta=-1 - number / 4).float()

    def load(self, name):
        return self.models[name]

    def answers(self, model, data):
        found = predict(model, data)
        if model is self.models["deit"]:
            right = torch.nn.functional.one_hot(found.labels[:12], 10).float()
            found = replace(found, logits=torch.cat([right, found.logits[12:]]))
        return found

    def initial_model(self, run):
        model = deepcopy(self.models[run.name])
        model.beta += 0.8
        return model


@pytest.fixture(scope="module")
def halting_study() -> OfHalting:
    study = OfHalting()
    run_cells("03_train_avit", "halting_runs = [", study=study)
    return study


HALTING = ["avit_finetuned", "avit_held", "avit_published", "avit"]
HALTING_LABELS = [get_profile("smoke").run(name).label for name in HALTING]


def said(study: OfHalting, name: str) -> tuple[Predictions, Predictions]:
    """What a model says of the validation images before and after training."""
    models = study.initial_model(study.profile.run(name)), study.load(name)
    return tuple(predict(model, study.data.validation) for model in models)


def test_settings_starts_and_histories_of_the_models_that_halt(halting_study):
    study, results = halting_study, halting_study.results
    settings = results["table 03_runs"].set_index("setting").T
    assert list(settings.index) == HALTING_LABELS
    assert settings["starts from"].tolist() == ["DeiT fine-tuned"] * 3 + [
        study.profile.plain.pretrained
    ]
    assert settings["channel 0"].tolist() == [
        "fitted",
        "fitted",
        "as the weights have it",
        "fitted",
    ]
    assert settings["its rate"].tolist() == [0.2, 0, 1, 0.2]
    assert settings["alpha_p"].tolist() == [5e-4, 0, 7e-3, 5e-4]
    assert settings["alpha_d"].tolist() == [0.02, 0, 0.02, 0.02]
    assert settings["teacher"].tolist() == ["deit"] * 3 + ["none"]
    assert settings["teacher's weight"].tolist() == [8, 8, 8, 0]
    assert settings.loc[HALTING_LABELS[3], ["epochs", "learning rate", "beta"]].tolist() == [
        1,
        2e-4,
        -2.5,
    ]
    starts = results["table 03_start"]
    assert starts["model"].tolist() == HALTING_LABELS
    for name, start in zip(HALTING, starts.to_dict("records"), strict=True):
        expected = metrics(study.load(name), said(study, name)[0])
        assert (
            start["val_mean_depth"] == expected["mean_depth"]
            and start["val_accuracy"] == expected["accuracy"]
        )
        assert start["val_gflops_per_image"] == expected["gflops_per_image"]
    assert starts["val_mean_depth"].nunique() == 4
    epochs = results["table 03_history"]
    assert epochs["model"].tolist() == [label for label in HALTING_LABELS for _ in range(2)]
    assert list(epochs) == [
        "model",
        "epoch",
        "task",
        "ponder",
        "distr",
        "depth",
        "val_accuracy",
        "val_gflops",
    ]
    assert epochs["epoch"].tolist() == [1, 2] * 4
    trained = pd.concat(study.histories[name] for name in HALTING)
    assert epochs["task"].tolist() == trained["train_task"].tolist()
    assert epochs["depth"].tolist() == trained["val_mean_depth"].tolist()
    finding = " ".join(results["finding 03_training"].split())
    plain = study.answers(study.load("deit"), study.data.validation)
    assert plain.correct.double().mean() > 0.4
    assert "*DeiT fine-tuned* ends at 50.0%" in finding
    for name, label, start in zip(HALTING, HALTING_LABELS, starts["val_mean_depth"], strict=True):
        history = study.histories[name].iloc[-1]
        gain = 100 * (said(study, name)[1].correct.double().mean() - plain.correct.double().mean())
        assert f"*{label}* at {history['val_accuracy']:.1%}, {gain:+.1f} points" in finding
        assert (
            f"depth of {history['val_mean_depth']:.1f} layers, {start:.1f} before training"
            in finding
        )


def test_halting_losses_have_their_share_of_the_objective(halting_study):
    table = halting_study.results["table 03_terms"]
    assert table["model"].tolist() == [label for label in HALTING_LABELS for _ in range(2)]
    assert table["term"].tolist() == ["ponder", "distr"] * 4
    assert table["weight"].tolist() == [5e-4, 0.02, 0, 0, 7e-3, 0.02, 5e-4, 0.02]
    for name, (ponder, distr) in zip(
        HALTING, table.to_numpy()[:, 3:].reshape(4, 2, 3), strict=True
    ):
        first, last = halting_study.histories[name].to_dict("records")
        halting = halting_study.profile.run(name).halting
        for row, term, weight in (
            (ponder, "ponder", halting.alpha_ponder),
            (distr, "distr", halting.alpha_distr),
        ):
            share = weight * last[f"train_{term}"] / last["train_loss"]
            assert row.tolist() == [
                first[f"train_{term}"],
                last[f"train_{term}"],
                pytest.approx(share),
            ]
    finding = " ".join(halting_study.results["finding 03_terms"].split())
    assert (
        "*A-ViT halting trained*, ponder (weight 0.0005) 3.1 to 3.2, distr (weight 0.02) 0.6 to 0.7;"
        in finding
    )
    assert "by -0.10 layers of ponder and -0.100 of KL" in finding


def test_halting_by_layer_stands_against_its_prior(halting_study):
    table = halting_study.results["table 03_prior"].set_index("figure")
    assert list(table) == HALTING_LABELS
    axes = np.array(halting_study.results["figure 03_halting_distribution"].axes).reshape(2, 4)
    layer = np.arange(1, 5)
    for name, label, column in zip(HALTING, HALTING_LABELS, axes.T, strict=True):
        halting = halting_study.profile.run(name).halting
        prior = np.exp(-0.5 * ((layer - halting.target_depth) / halting.target_std) ** 2)
        prior /= prior.sum()
        assert table.loc["mean of the prior", label] == pytest.approx((prior * layer).sum())
        for state, found in zip(("before", "after"), said(halting_study, name), strict=True):
            depth = found.depth[:, 1:].numpy()
            scores = found.halting_scores[:, :, 1:].double().sum(dim=(0, 2)).numpy()
            shares = {
                "scores": scores / scores.sum(),
                "patches": np.array([(depth == one).mean() for one in layer]),
            }
            assert table.loc[f"depth of patches, {state}", label] == pytest.approx(depth.mean())
            for axis, (what, share) in zip(column, shares.items(), strict=True):
                expected = (share * np.log(np.maximum(share, 1e-300) / prior)).sum()
                assert table.loc[f"KL of {what}, {state}", label] == pytest.approx(
                    expected, rel=1e-4
                )
                bars = [bar.get_height() for bar in axis.patches]
                np.testing.assert_allclose(
                    axis.lines[0].get_ydata() if state == "before" else bars, share, rtol=1e-4
                )
                np.testing.assert_allclose(axis.lines[1].get_ydata(), prior, rtol=1e-4)
    finding = " ".join(halting_study.results["finding 03_prior"].split())
    for label, at in table.items():
        scores, patches = (
            [at[f"KL of {what}, {when}"] for when in ("before", "after")]
            for what in ("scores", "patches")
        )
        words = "*{}* {:.2f} to {:.2f} (patches: {:.2f} to {:.2f})".format(label, *scores, *patches)
        assert words in finding


def test_maps_of_both_starts_before_and_after_training(halting_study):
    figure, images = halting_study.results["figure 03_starts"], halting_study.data.validation
    axes = np.array(figure.axes[:-1]).reshape(5, 10)
    names = [
        "image",
        *(
            f"{start},\n{state}"
            for start in ("published", "fitted")
            for state in ("before", "after")
        ),
    ]
    assert [axis.get_ylabel() for axis in axes[:, 0]] == names
    titles = [axis.get_title() for axis in axes[0]]
    assert sorted(titles) == [str(number) for number in range(10)]  # one image of each class
    pixels = pictures.rgb(to_pixels(images[:][0]))
    maps = [
        found.depth
        for name in ("avit_published", "avit_finetuned")
        for found in said(halting_study, name)
    ]
    for title, (image, *below) in zip(titles, axes.T, strict=True):
        number = next(
            one for one, other in enumerate(pixels) if (other == image.images[0].get_array()).all()
        )
        assert images.labels[number] == int(title)
        for axis, depth in zip(below, maps, strict=True):
            expected = pictures.coloured(pictures.grids(depth[[number]]), 4)[0]
            np.testing.assert_array_equal(axis.images[0].get_array(), expected)


def test_how_far_depth_follows_class_attention(halting_study):
    table, taken = (
        halting_study.results["table 03_follows"],
        halting_study.results.left["taken"].numpy(),
    )
    assert table["model"].tolist() == HALTING_LABELS and taken.shape == (30, 16)
    for name, row in zip(HALTING, table.to_dict("records"), strict=True):
        before, after = (
            np.array(
                [
                    np.corrcoef(depth, attended)[0, 1] if np.ptp(depth) else 0
                    for depth, attended in zip(found.depth[:, 1:].numpy(), taken, strict=True)
                ]
            )
            for found in said(halting_study, name)
        )
        assert [row["before"], row["after"]] == pytest.approx(
            [before.mean(), after.mean()], abs=1e-5
        )
        change = after - before
        expected = [change.mean(), change.std(ddof=1) / 30**0.5]
        assert [row["change"], row["its error"]] == pytest.approx(expected, abs=1e-5)
    fitted, published = table.iloc[0], table.iloc[2]
    finding = " ".join(halting_study.results["finding 03_starts"].split())
    way = published["change"] / (fitted["before"] - published["before"])
    assert f"Training brings the published start {way:.0%} of the way" in finding
    assert (
        f"*{HALTING_LABELS[2]}* {published['before']:+.2f} and {published['after']:+.2f}: training "
        in finding
    )


# --- 04: tables -----------------------------------------------------------------------------------

COMPARED = {"focus": SMOKE.run("avit_finetuned"), "reference": SMOKE.plain}
LABELS = ["DeiT", "DeiT trained longer", "A-ViT", "A-ViT fine-tuned"]
MERGED = ["ToMe, r = 2", "ToMe, r = 3"]


def of_models(adaptive: AViT, **changes) -> SimpleNamespace:
    """A study in which every run that halts has left ``adaptive``, with ``changes`` of its
    profile.
    """
    plain = timm.create_model("deit_nano").eval()
    return SimpleNamespace(
        profile=structs.replace(SMOKE, **changes),
        results=Kept(),
        seed=0,
        device="cpu",
        predict=predict,
        test=random_images(40),
        data=SimpleNamespace(validation=random_images(30, seed=1)),
        load=lambda name: plain if name.startswith("deit") else adaptive,
    )


@pytest.mark.usefixtures("one_round")
def test_merged_models_stand_beside_the_trained_ones():
    adaptive = timm.create_model("avit_nano", beta=-1e4).eval()
    study = of_models(adaptive, merging=(2, 3), recalibrated={})
    untrained = tables.merged_models(study)
    models = {run.name: study.load(run.name) for run in study.profile.runs} | untrained
    found = {name: study.predict(model, study.test) for name, model in models.items()}
    assert list(found)[:-2] == [*(run.name for run in SMOKE.runs), *MERGED]
    adapted = list(found)[-2:]
    assert all(name.startswith("Adaptive merging") for name in adapted)
    names = dict(study=study, predictions=found, untrained=untrained, **COMPARED)
    results = run_cells("04_evaluation", "table = tables.evaluation_table", 3, **names)
    results = run_cells("04_evaluation", "labels, rows = ", 2, **results.left)
    table = results["table evaluation"].set_index("model")
    assert list(table.index) == [*LABELS, *MERGED, *adapted]
    assert list(table["method"])[-4:] == ["peer", "peer", "ours", "ours"]
    np.testing.assert_allclose(
        table.loc[adapted, "flops_saved"], table.loc[MERGED, "flops_saved"], atol=0.06
    )
    assert (
        table.loc["ToMe, r = 3", "gflops_per_image"] < table.loc["ToMe, r = 2", "gflops_per_image"]
    )
    assert table.loc["ToMe, r = 2", "flops_saved"] > 0 and table["mean_depth"].isna().sum() == 2
    differences = results["table 04_differences"]
    everyone, references = [*LABELS, *MERGED, *adapted], [*LABELS[:2], *MERGED]
    pairs = [(model, minus) for minus in references for model in everyone if model != minus]
    assert list(zip(differences["model"], differences["minus"], strict=True)) == pairs
    summary = results["table 04_summary"]
    assert list(summary["mean depth [layers]"])[:6] == ["4.00"] * 4 + ["", ""]
    assert list(summary["minus DeiT trained longer [points]"])[1] == ""  # not minus itself
    assert (
        summary.drop(index=1)["minus DeiT trained longer [points]"].str.match(r"[+-]\d+\.\d\d \(")
    ).all()
    short = results["table 04_short"].set_index("model")
    assert list(short.index) == list(table.index) and short["minus DeiT [points]"].tolist() == [
        "" if label == "DeiT" else words
        for label, words in zip(table.index, summary["minus DeiT [points]"], strict=True)
    ]
    assert short["speed-up at batches of 32"]["DeiT"] == "1.00"
    for column, name in (
        ("mean per-class accuracy [%]", "accuracy_macro"),
        ("FLOPs saved [%]", "flops_saved"),
    ):
        np.testing.assert_allclose(short[column].astype(float), 100 * table[name], atol=0.051)


def differences(profile: Profile, found: dict[str, Predictions]) -> pd.DataFrame:
    study = SimpleNamespace(profile=profile, results=Kept())
    names = dict(study=study, predictions=found, untrained={})
    return run_cells("04_evaluation", "labels, rows = ", 1, **names)["table 04_differences"]


def test_a_difference_is_minus_the_plain_model_on_the_same_images(halting, plain):
    profile = structs.replace(
        SMOKE, runs=tuple(run for run in SMOKE.runs if run.name != "deit_longer")
    )
    table = differences(profile, {"deit": plain, "avit": plain, "avit_finetuned": halting})
    assert list(table["model"]) == ["A-ViT", "A-ViT fine-tuned"]
    assert set(table["minus"]) == {"DeiT"}
    assert table["difference"].tolist() == pytest.approx([0, -1 / 6])
    assert table["low"][1] <= -1 / 6 <= table["high"][1] <= 0


def test_differences_are_from_every_plain_model(halting, plain):
    profile = get_profile("caltech101")
    found = {"deit": plain, "deit_longer": halting, "avit_finetuned": halting}
    table = differences(profile, found).set_index(["minus", "model"])
    labels = [profile.run(name).label for name in found]
    assert set(table.index) == {
        (labels[0], labels[1]),
        (labels[0], labels[2]),
        (labels[1], labels[0]),
        (labels[1], labels[2]),
    }
    assert table.loc[(labels[1], labels[2]), "difference"] == 0
    assert table.loc[
        (labels[0], labels[2]), ["difference", "difference_macro"]
    ].tolist() == pytest.approx([-1 / 6] * 2)


def test_a_macro_difference_weighs_small_classes_like_large_ones():
    right, wrong = (
        predictions([0, 0, 0, last], [0, 0, 0, 1], torch.full((4, 5), LAYERS)) for last in (1, 0)
    )
    row = differences(SMOKE, {"deit": right, "deit_longer": right, "avit": wrong}).iloc[1]
    assert row[["model", "difference", "difference_macro"]].tolist() == ["A-ViT", -0.25, -0.5]


def test_a_model_that_merges_is_set_to_other_budgets():
    run = structs.replace(
        SMOKE.plain, name="merging", label="Adaptive merging trained", init="deit", saved=0.3
    )
    study = of_models(
        varied_model(depth=4).float(), runs=(*SMOKE.runs, run), budgets={"merging": (0.1, 0.2)}
    )
    plain = timm.create_model("deit_nano").eval()
    study.load = lambda name: adapt(plain, study.data.validation[:][0], 0.3)
    models = tables.recalibrated_models(study, "merging")
    assert list(models) == [
        "Adaptive merging trained, 10% saved",
        "Adaptive merging trained, 20% saved",
    ]
    for model, saved in zip(models.values(), (0.1, 0.2), strict=True):
        found = metrics(model, study.predict(model, study.data.validation))
        full = plain_flops(model, model.patch_embed.num_patches + 1) / 1e9
        assert 1 - found["gflops_per_image"] / full == pytest.approx(saved, abs=0.01)


@pytest.mark.usefixtures("one_round")
def test_a_model_is_turned_to_other_depths():
    model = varied_model(depth=4).float()
    study = of_models(model, merging=(), recalibrated={"avit_finetuned": (2.0, 3.0)})
    untrained = tables.merged_models(study)
    models = {run.name: study.load(run.name) for run in study.profile.runs} | untrained
    found = {name: study.predict(model, study.test) for name, model in models.items()}
    names = dict(study=study, predictions=found, models=models, untrained=untrained, **COMPARED)
    results = run_cells("04_evaluation", "table = tables.evaluation_table", 3, **names)
    results = run_cells("04_evaluation", "rows = []", 2, **results.left)
    points = results["table operating_points"].set_index("model")
    assert model.beta == points["beta"]["A-ViT fine-tuned"] == -1.0
    assert points["beta"]["A-ViT fine-tuned, depth 2"] > points["beta"]["A-ViT fine-tuned, depth 3"]
    assert points["mean_depth"].is_monotonic_increasing and len(points) == 3
    assert points["mean_depth"]["A-ViT fine-tuned, depth 2"] == pytest.approx(2, abs=0.3)
    assert points["flops_saved"].is_monotonic_decreasing and (points["images_per_second"] > 0).all()


def test_published_figures_stand_beside_ours():
    study = SimpleNamespace(profile=SMOKE, results=Kept())
    ours = pd.DataFrame(
        {
            "model": [run.label for run in study.profile.runs],
            "accuracy": [0.9, 0.85, 0.8, 0.95],
            "f1_macro": 0.5,
            "mean_depth": 6.0,
            "gflops_per_image": 1.0,
            "speedup": 2.0,
        }
    )
    results = run_cells("04_evaluation", "words_of = {", 1, study=study, table=ours)
    table = results["table 04_published"].set_index(["model", "figure"])
    for model, ours, theirs in (
        ("A-ViT", -0.1, np.nan),
        ("A-ViT fine-tuned", 0.05, -0.003),
    ):  # theirs starts from DeiT
        row = table.loc[(model, "accuracy minus DeiT's")]
        assert row["ours, smoke"] == pytest.approx(ours)
        assert row["paper, ImageNet"] == pytest.approx(theirs, nan_ok=True)
    assert table.loc[("DeiT", "accuracy"), "report, Caltech-256"] == pytest.approx(0.7322)
    assert table.notna().any(axis=1).all() and ("DeiT", "mean depth [layers]") not in table.index


# --- 04: confusions, accuracy by depth ------------------------------------------------------------


def evaluated(halting: Predictions, plain: Predictions) -> Kept:
    found = {"deit": plain, "avit_finetuned": halting}
    return run_cells(
        "04_evaluation", "classes = np", 7, study=study_of(plain), predictions=found, **COMPARED
    )


def test_confusion_is_a_percentage_of_the_true_class_in_its_row(halting, plain):
    results = evaluated(halting, plain)
    shares = [[100, 0, 0, 0], [0, 50, 50, 0], [0, 0, 100, 0], [0] * 4]
    np.testing.assert_allclose(drawn(results["figure 04_confusion"]), shares)
    change = [[0] * 4, [0, -50, 50, 0], [0] * 4, [0] * 4]
    np.testing.assert_allclose(drawn(results["figure 04_confusion_change"]), change)


@pytest.mark.parametrize("classes", [3, 20])
def test_a_confusion_map_has_the_true_class_in_rows_and_numbers_of_one_per_cent_and_more(
    monkeypatch, classes
):
    monkeypatch.setattr(
        f"{__name__}.CLASSES", tuple(f"class_{number}" for number in range(classes))
    )
    labels = [0] * 4 + [2] * 2500
    found = predictions([0, 1, 1, 1, 1] + [2] * 2499, labels, torch.full((2504, 5), LAYERS))
    axis = evaluated(found, found)["figure 04_confusion"].axes[0]
    values = np.zeros((classes, classes))
    values[0, :2], values[2, 1:3] = (25, 75), (0.04, 99.96)
    np.testing.assert_allclose(drawn(axis.figure), values, rtol=1e-5)
    assert (
        axis.yaxis_inverted()
        and axis.get_ylabel() == "true class"
        and axis.get_xlabel() == "predicted class"
    )
    ticks = texts(axis.get_yticklabels()), texts(axis.get_xticklabels())
    assert ticks == ([f"class {number}" for number in range(classes)],) * 2
    assert [text for text in texts(axis.texts) if text] == ["25", "75", "100"]  # nothing for 0.04


def test_a_confusion_map_of_many_classes_has_those_with_the_most_mistakes(monkeypatch):
    monkeypatch.setattr(f"{__name__}.CLASSES", tuple(f"class_{number}" for number in range(30)))
    labels, depth = 2 * list(range(30)), torch.full((60, 5), LAYERS)
    one, other = (
        [change.get(number, label) for number, label in enumerate(labels)]
        for change in ({28: 25}, {29: 26})
    )
    results = evaluated(predictions(one, labels, depth), predictions(other, labels, depth))
    shown = [*range(20), 25, 26, 28, 29]
    values, change = 100 * np.eye(24), np.zeros((24, 24))
    values[22, [20, 22]] = 50
    change[22, [20, 22]], change[23, [21, 23]] = (50, -50), (-50, 50)
    for figure, expected in (("04_confusion", values), ("04_confusion_change", change)):
        np.testing.assert_allclose(drawn(results[f"figure {figure}"]), expected)
        assert texts(results[f"figure {figure}"].axes[0].get_yticklabels()) == [
            f"class {number}" for number in shown
        ]


def test_mistakes_are_new_mended_or_shared(halting, plain):
    predicted = plain.predicted.tolist()
    other = predictions([1, *predicted[1:2], 0, *predicted[3:]], plain.labels.tolist(), plain.depth)
    left = evaluated(halting, other).left  # wrong on image 2 alone; the other on 0 and 2
    assert (left["new"], left["mended"], left["old"]) == (0, 1, 1)


def test_confused_pairs_leave_out_what_never_happens(halting, plain):
    table = evaluated(halting, plain)["table 04_confused_pairs"]
    assert table.to_dict("records") == [
        {"true class": "bee", "taken for": "cat", "A-ViT fine-tuned": 1, "DeiT": 0}
    ]


def test_accuracy_by_depth_puts_the_shallowest_first_with_wilson_intervals(plain):
    depth = torch.tensor([3, 1, 5, 2, 4, 2, 3, 4]).repeat_interleave(10)[:, None].repeat(1, 5)
    depth[50:, 0] += 1  # so that no two groups are equally deep
    labels = torch.zeros(80, dtype=torch.long)
    right = depth.float().mean(dim=1) < 4
    right[20:25] = True  # of the deepest, half
    found = predictions((~right).long().tolist(), labels.tolist(), depth)
    table = evaluated(found, predictions(labels.tolist(), labels.tolist(), depth))[
        "table 04_accuracy_by_depth"
    ]
    assert table["images"].tolist() == [10] * 8
    assert table["mean_depth"].tolist() == pytest.approx([1, 2, 2.2, 3, 3.2, 4, 4.2, 5])
    assert table["accuracy"].tolist() == [1] * 5 + [0, 0, 0.5]
    intervals = table[["low", "high"]].to_numpy()
    expected = [(0.7225, 1)] * 5 + [(0, 0.2775)] * 2 + [(0.2366, 0.7634)]
    np.testing.assert_allclose(intervals, expected, atol=1e-4)


def test_accuracy_by_depth_of_fewer_images_than_groups(halting, plain):
    table = evaluated(halting, plain)["table 04_accuracy_by_depth"]
    assert table["images"].tolist() == [1] * 6
    assert table["mean_depth"].tolist() == pytest.approx([1, 1.6, 2, 2.2, 3, 4])
    assert table["accuracy"].tolist() == [1] * 5 + [0]


def test_findings_say_which_models_are_told_apart(halting, plain):
    wrong = predictions([1, 1, 2, 2, 0, 0], plain.labels.tolist(), halting.depth)
    found = {"deit": plain, "deit_longer": plain, "avit": wrong, "avit_finetuned": halting}
    found |= {"ToMe, r = 2": plain, "ToMe, r = 3": wrong}
    untrained = dict.fromkeys(MERGED)
    names = dict(study=study_of(plain), predictions=found, untrained=untrained, **COMPARED)
    results = run_cells("04_evaluation", "labels, rows = ", 1, **names)
    table = pd.DataFrame({"model": [*LABELS, *MERGED], "accuracy_macro": [1, 1, 0, 5 / 6, 1, 0]})
    table["speedup"], table["flops_saved"] = [1, 1, 1.9, 1.5, 1.3, 1.8], [0, 0, 0.5, 0.4, 0.3, 0.5]
    results = run_cells(
        "04_evaluation", "def apart", 2, **(results.left | {"table": table, "batch": 32})
    )
    differences = results["table 04_differences"].set_index(["model", "minus"])[
        ["low_macro", "high_macro"]
    ]
    low, high = 100 * differences.loc[("A-ViT fine-tuned", "DeiT")]
    assert low < high == 0
    of_focus = f"16.7 points below that of {{}} (95 %: {low:+.1f} to +0.0: not to be told apart)"
    assert results["finding 04_avit_finetuned"] == (
        "*A-ViT fine-tuned* saves 40% of the FLOPs of DeiT and is 1.50 times as fast at batches of 32 images. "
        f"Its mean per-class accuracy is 83.3%, {of_focus.format('DeiT')}, "
        f"and {of_focus.format('ToMe, r = 2')}, the nearest in speed (1.30 times)."
    )
    assert results["finding 04_avit"].endswith(
        "Its mean per-class accuracy is 0.0%, 100.0 points below that of DeiT (95 %: -100.0 to -100.0, more than "
        "chance), and 0.0 points below that of ToMe, r = 3 (95 %: +0.0 to +0.0: not to be told apart), the nearest in "
        "speed (1.80 times)."
    )
    results = run_cells("04_evaluation", "classes = np", 7, **results.left)
    finding = " ".join(
        run_cells("04_evaluation", "def verdicts", 2, **results.left)[
            "finding 04_conclusion"
        ].split()
    )
    for label in LABELS[:2]:
        assert (
            f"A-ViT is less accurate than {label}; A-ViT fine-tuned is not to be told from {label}"
            in finding
        )
    assert "Of the 1 commonest confusions of A-ViT fine-tuned, 1 are rarer in DeiT." in finding
    assert "accuracy of A-ViT fine-tuned changes by -100.0 points" in finding


# --- 05: where and how deep -----------------------------------------------------------------------


def analysed(halting: Predictions, plain: Predictions) -> Kept:
    """All from the maps on; the published start goes deep where the other halts. Image 3 shows no
    background.
    """
    torch.manual_seed(
        23
    )  # with all patches it is right on four images, without some of them on two
    whole = timm.create_model("deit_nano", patch_size=14, num_classes=len(CLASSES)).eval()
    with torch.no_grad():  # so that its answer depends on the patches
        whole.cls_token.mul_(0.01)
        for block in whole.blocks:
            block.attn.qkv.weight.mul_(10)
            block.attn.proj.weight.mul_(20)
    theirs = replace(halting, depth=LAYERS + 1 - halting.depth)
    study = study_of(
        plain, load=lambda name: whole, predict=lambda model, data: plain, device="cpu"
    )
    run, published = (study.profile.run(name) for name in ("avit_finetuned", "avit"))
    model = SimpleNamespace(eps=0.01, patch_embed=SimpleNamespace(grid_size=(2, 2)))
    first = "@torch.inference_mode()\ndef class_attention"
    return run_cells(
        "05_halting_analysis",
        first,
        study=study,
        run=run,
        published=published,
        reference=study.profile.plain,
        model=model,
        whole=whole,
        predictions=halting,
        theirs=theirs,
        depth=halting.depth,
        layers=LAYERS,
        classes=CLASSES,
        chosen=torch.tensor([0, 3, 4, 5]),
        differing=torch.tensor([[1.0, 0.8, 0.0, 0.01], [1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0]]),
    )


@pytest.fixture
def analysis(halting, plain):
    return analysed(halting, plain)


def test_an_object_is_told_by_depth_from_a_background_of_one_colour(analysis):
    table = analysis["table 05_object"].set_index("map")
    labels = ["A-ViT fine-tuned: depth", "A-ViT: depth", "DeiT: class attention"]
    assert list(table.index) == labels and table["images"].tolist() == [3] * 3
    for label, aucs in zip(labels, ([0.5, 1, 1], [0.5, 0, 0]), strict=False):
        half = 1.96 * np.std(aucs, ddof=1) / 3**0.5
        found = table.loc[label, ["auc", "auc_low", "auc_high"]].tolist()
        low, high = np.mean(aucs) - half, min(np.mean(aucs) + half, 1)  # an AUC is at most 1
        assert found == pytest.approx([np.mean(aucs), low, high])
    words = analysis["finding 05_maps"].replace("\n", " ")
    assert "one colour (3)" in words
    assert "0.833 (0.507 to 1.000) by the depth of A-ViT fine-tuned" in words
    assert "better than that of A-ViT (+0.667 ± 0.653)" in words
    figure = analysis["figure 05_object_maps"]
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles == ["ant", "cat", "AUC 0.50", "AUC 1.00", "AUC 0.50", "AUC 0.00"]


def test_without_patches_the_plain_model_answers_as_if_they_were_not_there(analysis):
    left, table = analysis.left, analysis["table 05_memory"].set_index("patches")["accuracy"]
    whole, labels = left["whole"], left["study"].test.labels
    every = [1, 2, 3, 4]
    shown = {
        "with all patches": {0: every, 3: every, 4: every, 5: every},
        "without the empty ones": {0: [1, 2], 3: every, 4: [3, 4], 5: [1, 2]},
    }
    for name, patches in shown.items():
        answers = []
        for image, seen in patches.items():
            with torch.inference_mode():
                tokens = whole._pos_embed(whole.patch_embed(left["study"].test[[image]][0]))[
                    :, [0, *seen]
                ]
                logits = whole.forward_head(whole.norm(whole.blocks(tokens)))
            answers.append(bool(logits.argmax() == labels[image]))
        assert table[name] == np.mean(answers)
    assert table["without the empty ones"] < table["with all patches"]
    hidden = [(~one).sum(dim=1).tolist() for one in left["kept"].values()]
    assert hidden == [[0] * 4, [2, 0, 2, 2], [2, 0, 2, 2]]
    assert (left["kept"]["without the empty ones"] | left["kept"]["without as many others"]).all()


def test_images_are_drawn_one_a_class(analysis, halting):
    figure, test = analysis["figure 05_depth_maps"], analysis.left["study"].test
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles == ["ant", "bee", "cat"]
    images, *maps = np.array(figure.axes[:-1]).reshape(3, 3)
    for column, image in enumerate(images):
        pixels = pictures.rgb(to_pixels(test[:][0]))
        number = next(
            one for one, other in enumerate(pixels) if (other == image.images[0].get_array()).all()
        )
        assert test.labels[number] == column
        own = halting.depth[[number]]
        for row, depth in zip(maps, (own, 6 - own), strict=True):
            expected = pictures.coloured(pictures.grids(depth), LAYERS)[0]
            np.testing.assert_array_equal(row[column].images[0].get_array(), expected)


def test_extremes_are_the_extremes(analysis):
    table = analysis["table 05_extremes"]
    images = {name: rows["image"].tolist() for name, rows in table.groupby("group")}
    assert images["shallowest"] == [0, 5, 1, 4, 3, 2]
    assert images["deepest"] == [2, 3, 4, 1, 5, 0]
    assert images["most uneven"][:2] == [4, 5]
    first_bee = table[table["image"] == 2].iloc[0]
    assert first_bee[["class", "predicted", "mean_depth", "spread"]].tolist() == [
        "bee",
        "cat",
        4,
        0,
    ]


def test_depth_by_position_is_that_of_the_patches_in_their_places(analysis, halting):
    figure = analysis["figure 05_position"]
    patches = halting.depth[:, 1:].float().view(6, 2, 2)
    np.testing.assert_allclose(drawn(figure, 0), patches.mean(dim=0), rtol=1e-6)
    assert drawn(figure, 1).mean() == pytest.approx(0, abs=1e-6) and drawn(figure, 1).std() > 1e-4
    np.testing.assert_allclose(drawn(figure, 2), 6 - patches.mean(dim=0), rtol=1e-6)
    own, published = analysis.left["places"]
    expected = np.corrcoef(drawn(figure, 0).ravel(), drawn(figure, 1).ravel())[0, 1]
    assert own == pytest.approx(expected) and published == pytest.approx(-expected)


def test_alive_is_the_share_of_tokens_of_at_least_that_depth(analysis):
    own, computed, published = analysis["figure 05_tokens_alive"].axes[0].lines
    np.testing.assert_allclose(own.get_ydata(), np.array([6, 4, 2.4, 1.4, 0]) / 6)
    np.testing.assert_allclose(
        computed.get_ydata(), np.array([6, 3.6, 2, 1, 0]) / 6
    )  # ends with the class token
    np.testing.assert_allclose(published.get_ydata(), np.array([6, 6, 4.6, 3.6, 2]) / 6)


def test_scores_of_halted_tokens_are_left_out(analysis):
    active, sums = analysis["figure 05_halting_scores"].axes
    np.testing.assert_allclose(
        active.lines[0].get_ydata(), [0.2, 0.1, 0.1, 0.1, np.nan], 1e-6
    )  # none in the last
    tokens = np.array([0, 20, 12, 7, 0]) / 30  # that are active
    np.testing.assert_allclose(sums.lines[0].get_ydata(), 0.2 + 0.1 * tokens.cumsum(), rtol=1e-6)
    assert sums.lines[-1].get_ydata()[0] == 0.99


def test_classes_are_sorted_by_depth(analysis):
    table = analysis["table 05_depth_by_class"]
    assert table["class"].tolist() == ["bee", "cat", "ant"]
    assert table["mean_depth"].tolist() == pytest.approx([3.5, 1.9, 1.5])
    assert table["accuracy"].tolist() == [0.5, 1, 1] and table["images"].tolist() == [2] * 3
    ticks = [
        tick.get_text() for tick in analysis["figure 05_depth_by_class"].axes[0].get_yticklabels()
    ]
    assert ticks == ["bee (2)", "cat (2)", "ant (2)"]


def test_accuracy_by_class_of_two_models(analysis):
    table = analysis["table 05_class_change"]
    assert table["class"].tolist() == ["bee", "ant", "cat"]  # the dog has no images
    assert table["before"].tolist() == [1, 1, 1] and table["images_gained"].tolist() == [-1, 0, 0]


def arrows(changes: pd.DataFrame):
    """The axis that shows how the accuracy of classes changes."""
    names = {"study": OfRuns(), "reference": SMOKE.plain, "run": SMOKE.run("avit"), "caption": ""}
    cell = run_cells("05_halting_analysis", "shown = pd.concat(", 1, changes=changes, **names)
    return cell["figure 05_class_change"].axes[0]


def test_classes_that_lose_and_gain_most_are_shown():
    changes = pd.DataFrame(
        {"class": [f"class_{number}" for number in range(25)], "images": 32, "before": 0.5}
    )
    changes["images_gained"] = np.arange(-12, 13)
    changes["after"] = changes["before"] + changes["images_gained"] / 32
    axis = arrows(changes)
    shown = [*range(24, 12, -1), *range(11, -1, -1)]  # not the one in the middle
    assert texts(axis.get_yticklabels()) == [
        f"class {number} (32, {number - 12:+d})" for number in shown
    ]
    before, after = axis.collections[1:3]
    np.testing.assert_array_equal(before.get_offsets(), [(0.5, place) for place in range(24)])
    np.testing.assert_array_equal(
        after.get_offsets(), list(zip(changes["after"][shown], range(24), strict=True))
    )
    assert [to_rgb(points.get_facecolor()[0]) for points in (before, after)] == [
        to_rgb(figures.model_colour(name)) for name in ("DeiT", "A-ViT")
    ]


def test_a_figure_draws_when_no_class_changes():
    axis = arrows(
        pd.DataFrame(
            {"class": ["ant"], "images": 14, "before": 1.0, "after": 1.0, "images_gained": 0}
        )
    )
    FigureCanvasAgg(axis.figure).draw()
    assert texts(axis.get_yticklabels()) == ["ant (14, +0)"]


@pytest.mark.parametrize("classes", [10, 256])
def test_figures_of_few_and_of_many_classes_keep_their_labels_on_the_page(monkeypatch, classes):
    names = tuple(f"some_class_{number}" for number in range(classes))
    monkeypatch.setattr(f"{__name__}.CLASSES", names)
    generator = torch.Generator().manual_seed(0)
    guesses, labels = torch.randint(classes, (2, 4 * classes), generator=generator).tolist()
    found, plain = (
        predictions(one, labels, torch.full((len(labels), 5), LAYERS)) for one in (guesses, labels)
    )
    before, after = torch.rand(2, classes, generator=generator).numpy()
    changes = pd.DataFrame({"class": names, "images": 19, "before": before, "after": after})
    changes["images_gained"] = 19 * (after - before)
    shown = {"05_class_change": arrows(changes.sort_values("images_gained")).figure}
    shown |= {
        name: value for name, value in evaluated(found, plain).items() if name.startswith("figure")
    }
    assert len(shown) == 4
    assert_labels_on_the_page(shown)


@pytest.mark.parametrize("all_right", [False, True])
def test_right_and_wrong_are_told_apart_and_draw_when_nothing_is_wrong(halting, plain, all_right):
    figure = analysed(plain if all_right else halting, plain)["figure 05_right_wrong"]
    FigureCanvasAgg(figure).draw()
    words = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    means = sorted(line.get_xdata()[0] for line in figure.axes[0].lines)
    if all_right:
        assert words == ["right: 6 images, mean 5.00 layers"] and means == [5]
    else:
        assert sorted(words) == [
            "right: 5 images, mean 1.96 layers",
            "wrong: 1 images, mean 4.00 layers",
        ]
        assert means == pytest.approx([1.96, 4])


def test_of_many_classes_the_two_ends_are_shown(monkeypatch):
    names = tuple(f"class_{number:03d}" for number in range(101))
    monkeypatch.setattr(f"{__name__}.CLASSES", names)
    labels = torch.cat(
        [torch.arange(101), torch.arange(50), torch.arange(50)]
    )  # half of them have a single image
    depth = (1 + labels % 5)[:, None].repeat(1, 5)
    found = predictions(((labels + (labels == 7)) % 101).tolist(), labels.tolist(), depth)
    analysis = analysed(found, predictions(labels.tolist(), labels.tolist(), depth))
    table = analysis["table 05_depth_by_class"]
    assert len(table) == 101 and table["images"].sum() == 201
    assert len(analysis["figure 05_depth_by_class"].axes[0].get_yticklabels()) == 24
    assert (
        len(analysis["figure 05_depth_maps"].axes) == 3 * 24 + 1
    )  # 24 images with two maps each, and the key
    pairs = evaluated(found, predictions(labels.tolist(), labels.tolist(), depth))[
        "table 04_confused_pairs"
    ]
    assert pairs.to_dict("records") == [
        {"true class": "class_007", "taken for": "class_008", "A-ViT fine-tuned": 3, "DeiT": 0}
    ]
