"""What the cells of the notebooks compute themselves, on predictions made by hand."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import pytest
import timm
import torch
from conftest import assert_labels_on_the_page, random_images, varied_model
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from msgspec import structs

from avit_lib.adaptive import adapt
from avit_lib.evaluation import Predictions, metrics, predict
from avit_lib.flops import plain_flops
from avit_lib.model import AViT
from avit_lib.study import figures, get_profile, tables
from avit_lib.study.settings import Profile

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
CLASSES = ("ant", "bee", "cat", "dog")  # there is no image of a dog
LAYERS = 5
SMOKE = get_profile("smoke")


class Kept(dict):
    """In place of a results folder: what cells write, by name."""

    def _keep(self, value, name, caption=""):
        kind = "figure" if hasattr(value, "savefig") else "table"
        self[f"{kind} {name}"] = value
        return value

    table = figure = metrics = finding = _keep


def run_cells(notebook: str, first: str, count: int | None = None, **names) -> Kept:
    """What cells of a notebook write, given ``names``: ``count`` or all, from the first that begins with ``first``."""
    cells = nbformat.read(NOTEBOOKS / f"{notebook}.ipynb", as_version=4).cells
    codes = [cell.source for cell in cells if cell.cell_type == "code" and not cell.metadata.get("tags")]
    imports, namespace = codes[0].split("study = Study(")[0], {"SEED": 0, **names}
    chosen = codes[next(number for number, code in enumerate(codes) if code.startswith(first)) :]
    for code in (imports, *chosen[:count]):
        exec(compile(code, notebook, "exec"), namespace)
    return names["study"].results


def predictions(predicted: list[int], labels: list[int], depth: torch.Tensor) -> Predictions:
    """Predictions of certain classes; every active token scores 0.2 in the first layer and 0.1 in the others."""
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


# --- 02 and 03: data, settings, histories -----------------------------------------------------------------------------


class OfRuns:
    """A study whose runs have all the same history and the same model."""

    def __init__(self, histories: dict[str, pd.DataFrame] | None = None):
        self.profile, self.results, self.device, self.histories = SMOKE, Kept(), "cpu", histories or {}
        self.data = SimpleNamespace(train=random_images(107), validation=random_images(30, seed=1), split={})
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
    epochs = [last | {"epoch": 1, "val_accuracy": 0.0}, last | {"epoch": 2, "val_accuracy": found["accuracy"] + 0.25}]
    study.histories["deit"] = pd.DataFrame(epochs).assign(train_loss=1.0, learning_rate=0.1)
    run_cells("02_finetune_deit", "study.results.metrics", study=study)
    counts = study.results["table 02_split"]
    assert counts["training"].tolist() == [11] * 7 + [10] * 3 and counts["validation"].tolist() == [3] * 10
    check = study.results["table 02_checkpoint"].set_index("metric")
    assert set(check.index) == set(found)
    assert check["difference"].drop("accuracy").abs().max() == 0
    assert check.loc["accuracy", "difference"] == pytest.approx(-0.25)


def test_settings_starts_and_histories_of_the_models_that_halt():
    columns = ("train_task", "train_ponder", "train_distr", "val_mean_depth", "val_accuracy", "val_gflops_per_image")
    history = pd.DataFrame({"epoch": [1, 2], **{name: [2.0, 1.0] for name in columns}, "seconds": 3})
    study = OfRuns({run.name: history for run in SMOKE.runs})
    run_cells("03_train_avit", "rows = []", study=study)
    settings = study.results["table 03_runs"].set_index("setting").T
    assert (settings["gamma"] == "").tolist() == [run.halting is None for run in study.profile.runs]
    assert settings["starts from"].tolist() == ["random", "deit", "random", "deit"]
    assert settings.loc["A-ViT", ["epochs", "learning_rate", "beta"]].tolist() == [2, 2e-3, -3]
    (start,) = study.results["table 03_start"].to_dict("records")  # of those that start from trained weights
    expected = metrics(study.model, predict(study.model, study.data.validation))
    assert start["model"] == "A-ViT fine-tuned" and start["val_mean_depth"] == expected["mean_depth"]
    epochs = study.results["table 03_history"]
    assert epochs["model"].tolist() == ["A-ViT"] * 2 + ["A-ViT fine-tuned"] * 2
    assert list(epochs) == ["model", "epoch", "task", "ponder", "distr", "depth", "val_accuracy", "val_gflops"]
    assert epochs["epoch"].tolist() == [1, 2, 1, 2] and epochs["task"].tolist() == [2, 1, 2, 1]
    assert study.results["table 03_last_epoch"]["epoch"].tolist() == [2, 2]
    bars, target = study.results["figure 03_halting_distribution"].axes[0].patches, study.profile.run("avit").halting
    assert sum(bar.get_height() for bar in bars) == pytest.approx(1)
    line = study.results["figure 03_halting_distribution"].axes[0].lines[-1].get_ydata()
    assert line.argmax() + 1 == target.target_depth and line.sum() == pytest.approx(1)


# --- 04: tables -------------------------------------------------------------------------------------------------------

LABELS = ["DeiT", "DeiT trained longer", "A-ViT", "A-ViT fine-tuned"]
MERGED = ["ToMe, r = 2", "ToMe, r = 3"]


def of_models(adaptive: AViT, **changes) -> SimpleNamespace:
    """A study in which every run that halts has left ``adaptive``, with ``changes`` of its profile."""
    plain = timm.create_model("deit_nano").eval()
    return SimpleNamespace(
        profile=structs.replace(SMOKE, **changes), results=Kept(), seed=0, device="cpu", predict=predict,
        test=random_images(40), data=SimpleNamespace(validation=random_images(30, seed=1)),
        load=lambda name: plain if name.startswith("deit") else adaptive,
    )  # fmt: skip


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
    names = dict(study=study, predictions=found, untrained=untrained)
    results = run_cells("04_evaluation", "table = tables.evaluation_table", 4, **names)
    table = results["table evaluation"].set_index("model")
    assert list(table.index) == [*LABELS, *MERGED, *adapted]
    assert list(table["method"])[-4:] == ["peer", "peer", "ours", "ours"]
    np.testing.assert_allclose(table.loc[adapted, "flops_saved"], table.loc[MERGED, "flops_saved"], atol=0.06)
    assert table.loc["ToMe, r = 3", "gflops_per_image"] < table.loc["ToMe, r = 2", "gflops_per_image"]
    assert table.loc["ToMe, r = 2", "flops_saved"] > 0 and table["mean_depth"].isna().sum() == 2
    differences = results["table 04_differences"]
    everyone, references = [*LABELS, *MERGED, *adapted], [*LABELS[:2], *MERGED]
    pairs = [(model, minus) for minus in references for model in everyone if model != minus]
    assert list(zip(differences["model"], differences["minus"], strict=True)) == pairs
    summary = results["table 04_summary"]
    assert list(summary["mean depth [layers]"])[:6] == ["4.00"] * 4 + ["", ""]
    assert list(summary["minus DeiT trained longer [points]"])[1] == ""  # not minus itself
    assert (summary.drop(index=1)["minus DeiT trained longer [points]"].str.match(r"[+-]\d+\.\d\d \(")).all()


def differences(profile: Profile, found: dict[str, Predictions]) -> pd.DataFrame:
    study = SimpleNamespace(profile=profile, results=Kept())
    names = dict(study=study, predictions=found, untrained={})
    return run_cells("04_evaluation", "labels, rows = ", 1, **names)["table 04_differences"]


def test_a_difference_is_minus_the_plain_model_on_the_same_images(halting, plain):
    profile = structs.replace(SMOKE, runs=tuple(run for run in SMOKE.runs if run.name != "deit_longer"))
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
    assert table.loc[(labels[0], labels[2]), ["difference", "difference_macro"]].tolist() == pytest.approx([-1 / 6] * 2)


def test_a_macro_difference_weighs_small_classes_like_large_ones():
    right, wrong = (predictions([0, 0, 0, last], [0, 0, 0, 1], torch.full((4, 5), LAYERS)) for last in (1, 0))
    row = differences(SMOKE, {"deit": right, "deit_longer": right, "avit": wrong}).iloc[1]
    assert row[["model", "difference", "difference_macro"]].tolist() == ["A-ViT", -0.25, -0.5]


def test_a_model_that_merges_is_set_to_other_budgets():
    run = structs.replace(SMOKE.plain, name="merging", label="Adaptive merging trained", init="deit", saved=0.3)
    study = of_models(varied_model(depth=4).float(), runs=(*SMOKE.runs, run), budgets={"merging": (0.1, 0.2)})
    plain = timm.create_model("deit_nano").eval()
    study.load = lambda name: adapt(plain, study.data.validation[:][0], 0.3)
    models = tables.recalibrated_models(study, "merging")
    assert list(models) == ["Adaptive merging trained, 10% saved", "Adaptive merging trained, 20% saved"]
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
    names = dict(study=study, predictions=found, models=models, untrained=untrained)
    results = run_cells("04_evaluation", "table = tables.evaluation_table", 6, **names)
    points = results["table operating_points"].set_index("model")
    assert model.beta == points["beta"]["A-ViT fine-tuned"] == -1.0
    assert points["beta"]["A-ViT fine-tuned, depth 2"] > points["beta"]["A-ViT fine-tuned, depth 3"]
    assert points["mean_depth"].is_monotonic_increasing and len(points) == 3
    assert points["mean_depth"]["A-ViT fine-tuned, depth 2"] == pytest.approx(2, abs=0.3)
    assert points["flops_saved"].is_monotonic_decreasing and (points["images_per_second"] > 0).all()


def test_published_figures_stand_beside_ours():
    study = SimpleNamespace(profile=get_profile("fashion"), results=Kept())
    ours = pd.DataFrame({
        "model": [run.label for run in study.profile.runs], "accuracy": [0.9, 0.85, 0.8, 0.95], "f1_macro": 0.5,
        "mean_depth": 6.0, "gflops_per_image": 1.0, "speedup": 2.0,
    })  # fmt: skip
    results = run_cells("04_evaluation", "words_of = {", 1, study=study, table=ours)
    table = results["table 04_published"].set_index(["model", "figure"])
    for model, ours, theirs in (("A-ViT", -0.1, np.nan), ("A-ViT fine-tuned", 0.05, -0.003)):  # theirs starts from DeiT
        row = table.loc[(model, "accuracy minus DeiT's")]
        assert row["ours, FashionMNIST"] == pytest.approx(ours)
        assert row["paper, ImageNet"] == pytest.approx(theirs, nan_ok=True)
    assert table.loc[("DeiT", "accuracy"), "report, Caltech-256"] == pytest.approx(0.7322)
    assert table.notna().any(axis=1).all() and ("DeiT", "mean depth [layers]") not in table.index


# --- 04: confusions, accuracy by depth --------------------------------------------------------------------------------


def evaluated(halting: Predictions, plain: Predictions) -> Kept:
    found = {"deit": plain, "avit_finetuned": halting}
    return run_cells("04_evaluation", "classes = study.test.classes", 4, study=study_of(plain), predictions=found)


def test_confusion_is_a_percentage_of_the_true_class_in_its_row(halting, plain):
    results = evaluated(halting, plain)
    shares = [[100, 0, 0, 0], [0, 50, 50, 0], [0, 0, 100, 0], [0] * 4]
    np.testing.assert_allclose(drawn(results["figure 04_confusion"]), shares)
    change = [[0] * 4, [0, -50, 50, 0], [0] * 4, [0] * 4]
    np.testing.assert_allclose(drawn(results["figure 04_confusion_change"]), change)


@pytest.mark.parametrize(("classes", "named", "numbered"), [(3, 3, True), (20, 20, False)])
def test_a_confusion_map_has_the_true_class_in_rows_and_as_much_text_as_fits(monkeypatch, classes, named, numbered):
    monkeypatch.setattr(f"{__name__}.CLASSES", tuple(f"class_{number}" for number in range(classes)))
    labels = [0] * 4 + [2] * 2500
    found = predictions([0, 1, 1, 1, 1] + [2] * 2499, labels, torch.full((2504, 5), LAYERS))
    axis = evaluated(found, found)["figure 04_confusion"].axes[0]
    values = np.zeros((classes, classes))
    values[0, :2], values[2, 1:3] = (25, 75), (0.04, 99.96)
    np.testing.assert_allclose(drawn(axis.figure), values, rtol=1e-5)
    assert axis.yaxis_inverted() and axis.get_ylabel() == "true class" and axis.get_xlabel() == "predicted class"
    ticks = texts(axis.get_yticklabels()), texts(axis.get_xticklabels())
    assert ticks == ([f"class {number}" for number in range(named)],) * 2
    assert [text for text in texts(axis.texts) if text] == ["25", "75", "100"] * numbered  # nothing for 0.04


def test_confused_pairs_leave_out_what_never_happens(halting, plain):
    table = evaluated(halting, plain)["table 04_confused_pairs"]
    assert table.to_dict("records") == [{"true class": "bee", "taken for": "cat", "A-ViT fine-tuned": 1, "DeiT": 0}]


def test_accuracy_by_depth_puts_the_shallowest_first_with_wilson_intervals(plain):
    depth = torch.tensor([3, 1, 5, 2, 4, 2, 3, 4]).repeat_interleave(10)[:, None].repeat(1, 5)
    depth[50:, 0] += 1  # so that no two groups are equally deep
    labels = torch.zeros(80, dtype=torch.long)
    right = depth.float().mean(dim=1) < 4
    right[20:25] = True  # of the deepest, half
    found = predictions((~right).long().tolist(), labels.tolist(), depth)
    table = evaluated(found, predictions(labels.tolist(), labels.tolist(), depth))["table 04_accuracy_by_depth"]
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


# --- 05: where and how deep -------------------------------------------------------------------------------------------


def analysed(halting: Predictions, plain: Predictions) -> Kept:
    whole = timm.create_model("deit_nano", patch_size=14, num_classes=len(CLASSES)).eval()
    study = study_of(plain, load=lambda name: whole, predict=lambda model, data: plain, device="cpu")
    return run_cells(
        "05_halting_analysis", "generator = torch", study=study, run=study.profile.run("avit_finetuned"),
        model=SimpleNamespace(eps=0.01), predictions=halting, depth=halting.depth, layers=LAYERS, classes=CLASSES,
    )  # fmt: skip


@pytest.fixture
def analysis(halting, plain):
    return analysed(halting, plain)


def test_images_are_drawn_one_a_class(analysis):
    titles = [axis.get_title() for axis in analysis["figure 05_depth_maps"].axes if axis.get_title()]
    assert titles == ["ant", "bee", "cat"]


def test_extremes_are_the_extremes(analysis):
    table = analysis["table 05_extremes"]
    images = {name: rows["image"].tolist() for name, rows in table.groupby("group")}
    assert images["shallowest"] == [0, 5, 1, 4, 3, 2]
    assert images["deepest"] == [2, 3, 4, 1, 5, 0]
    assert images["most uneven"][:2] == [4, 5]
    first_bee = table[table["image"] == 2].iloc[0]
    assert first_bee[["class", "predicted", "mean_depth", "spread"]].tolist() == ["bee", "cat", 4, 0]


def test_depth_by_position_is_that_of_the_patches_in_their_places(analysis, halting):
    figure = analysis["figure 05_position"]
    patches = halting.depth[:, 1:].float().view(6, 2, 2)
    np.testing.assert_allclose(drawn(figure, 0), patches.mean(dim=0), rtol=1e-6)
    assert drawn(figure, 1).mean() == pytest.approx(0, abs=1e-6) and drawn(figure, 1).std() > 1e-4


def test_alive_is_the_share_of_tokens_of_at_least_that_depth(analysis):
    own, plain = analysis["figure 05_tokens_alive"].axes[0].lines
    np.testing.assert_allclose(own.get_ydata(), np.array([6, 4, 2.4, 1.4, 0]) / 6)
    np.testing.assert_allclose(plain.get_ydata(), np.array([6, 3.6, 2, 1, 0]) / 6)  # ends with the class token


def test_scores_of_halted_tokens_are_left_out(analysis):
    active, sums = analysis["figure 05_halting_scores"].axes
    np.testing.assert_allclose(active.lines[0].get_ydata(), [0.2, 0.1, 0.1, 0.1, np.nan], 1e-6)  # none in the last
    tokens = np.array([0, 20, 12, 7, 0]) / 30  # that are active
    np.testing.assert_allclose(sums.lines[0].get_ydata(), 0.2 + 0.1 * tokens.cumsum(), rtol=1e-6)
    assert sums.lines[-1].get_ydata()[0] == 0.99


def test_classes_are_sorted_by_depth(analysis):
    table = analysis["table 05_depth_by_class"]
    assert table["class"].tolist() == ["bee", "cat", "ant"]
    assert table["mean_depth"].tolist() == pytest.approx([3.5, 1.9, 1.5])
    assert table["accuracy"].tolist() == [0.5, 1, 1] and table["images"].tolist() == [2] * 3
    ticks = [tick.get_text() for tick in analysis["figure 05_depth_by_class"].axes[0].get_yticklabels()]
    assert ticks == ["bee (2)", "cat (2)", "ant (2)"]


def test_accuracy_by_class_of_two_models(analysis):
    table = analysis["table 05_class_change"]
    assert table["class"].tolist() == ["bee", "ant", "cat"]  # the dog has no images
    assert table["before"].tolist() == [1, 1, 1] and table["images_gained"].tolist() == [-1, 0, 0]


def arrows(changes: pd.DataFrame):
    """The axis that shows how the accuracy of classes changes."""
    names = {"study": OfRuns(), "reference": SMOKE.plain, "run": SMOKE.run("avit"), "caption": ""}
    cell = run_cells("05_halting_analysis", "losing, gaining = ", 1, changes=changes, **names)
    return cell["figure 05_class_change"].axes[0]


def test_classes_that_lose_and_gain_most_are_shown():
    changes = pd.DataFrame({"class": [f"class_{number}" for number in range(25)], "images": 32, "before": 0.5})
    changes["images_gained"] = np.arange(-12, 13)
    changes["after"] = changes["before"] + changes["images_gained"] / 32
    axis = arrows(changes)
    shown = [*range(24, 14, -1), *range(9, -1, -1)]
    assert texts(axis.get_yticklabels()) == [f"class {number} (32, {number - 12:+d})" for number in shown]
    before, after = axis.collections[1:3]
    np.testing.assert_array_equal(before.get_offsets(), [(0.5, place) for place in range(20)])
    np.testing.assert_array_equal(after.get_offsets(), list(zip(changes["after"][shown], range(20), strict=True)))
    assert [to_rgb(points.get_facecolor()[0]) for points in (before, after)] == [
        to_rgb(figures.model_colour(name)) for name in ("DeiT", "A-ViT")
    ]


def test_a_figure_draws_when_no_class_changes():
    axis = arrows(pd.DataFrame({"class": ["ant"], "images": 14, "before": 1.0, "after": 1.0, "images_gained": 0}))
    FigureCanvasAgg(axis.figure).draw()
    assert texts(axis.get_yticklabels()) == []


@pytest.mark.parametrize("classes", [10, 256])
def test_figures_of_few_and_of_many_classes_keep_their_labels_on_the_page(monkeypatch, classes):
    names = tuple(f"some_class_{number}" for number in range(classes))
    monkeypatch.setattr(f"{__name__}.CLASSES", names)
    generator = torch.Generator().manual_seed(0)
    guesses, labels = torch.randint(classes, (2, 4 * classes), generator=generator).tolist()
    found, plain = (predictions(one, labels, torch.full((len(labels), 5), LAYERS)) for one in (guesses, labels))
    before, after = torch.rand(2, classes, generator=generator).numpy()
    changes = pd.DataFrame({"class": names, "images": 19, "before": before, "after": after})
    changes["images_gained"] = 19 * (after - before)
    shown = {"05_class_change": arrows(changes.sort_values("images_gained")).figure}
    shown |= {name: value for name, value in evaluated(found, plain).items() if name.startswith("figure")}
    assert len(shown) == (4 if classes <= 20 else 2)  # no matrix of many
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
        assert sorted(words) == ["right: 5 images, mean 1.96 layers", "wrong: 1 images, mean 4.00 layers"]
        assert means == pytest.approx([1.96, 4])


def test_of_many_classes_the_two_ends_are_shown(monkeypatch):
    names = tuple(f"class_{number:03d}" for number in range(101))
    monkeypatch.setattr(f"{__name__}.CLASSES", names)
    labels = torch.cat([torch.arange(101), torch.arange(50), torch.arange(50)])  # half of them have a single image
    depth = (1 + labels % 5)[:, None].repeat(1, 5)
    found = predictions(((labels + (labels == 7)) % 101).tolist(), labels.tolist(), depth)
    analysis = analysed(found, predictions(labels.tolist(), labels.tolist(), depth))
    table = analysis["table 05_depth_by_class"]
    assert len(table) == 101 and table["images"].sum() == 201
    assert len(analysis["figure 05_depth_by_class"].axes[0].get_yticklabels()) == 20
    assert len(analysis["figure 05_depth_maps"].axes) == 4 * 10 + 1  # ten images, and the key
    pairs = evaluated(found, predictions(labels.tolist(), labels.tolist(), depth))["table 04_confused_pairs"]
    assert pairs.to_dict("records") == [
        {"true class": "class_007", "taken for": "class_008", "A-ViT fine-tuned": 3, "DeiT": 0}
    ]
