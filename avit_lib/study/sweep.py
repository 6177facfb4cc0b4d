"""The sweep over seeds: how much of a figure is chance.

What was found stays on record in metrics/sweep.json; one on record is trained again when its
settings, the images or the seed change, but not when code does: then remove that file by hand.
"""

from typing import Any

import msgspec
import pandas as pd

from avit_lib.errors import UserError
from avit_lib.study.results import digest, provenance
from avit_lib.study.settings import Run
from avit_lib.study.study import Study
from avit_lib.study.tables import (
    figures,
    merged_models,
    percentages,
    recalibrated_models,
    untrained_method,
)
from avit_lib.training import read_json

CAPTION = (
    "Test figures over seeds: mean, and standard deviation (_std), over models trained from different seeds; a seed "
    "decides on the split, the order of the training images and all "
    "random weights. minus_...: difference in mean per-class accuracy, of the same seed."
)
SHORT_CAPTION = "The sweep over seeds: mean ± standard deviation"


def run_sweep(profile: str, seed: int = 0, device: str = "auto") -> pd.DataFrame:
    """Train the runs of a profile's sweep, once a seed, and test them as notebook 04 does.

    Writes tables/sweep and returns it. What a seed gives is written down run by run, and an
    interrupted sweep resumes where training stopped; checkpoints of other seeds than the study's
    own ``seed`` lie in checkpoints/seed<k>. Raises UserError for an empty sweep, or before notebook
    04 has measured speeds.
    """
    main = Study(profile, seed, "sweep", device)
    chosen, results = main.profile, main.results
    if not chosen.sweep:
        raise UserError(
            f"profile {chosen.name} has no runs to repeat; name some in its file, as sweep = [...]"
        )
    speed = (
        results.read("speed")
        .query(f"batch == {chosen.plain.training.batch_size}")
        .set_index("model")["speedup"]
    )
    rows, path = [], results.folder / "metrics" / "sweep.json"
    record = read_json(path)["record"] if path.is_file() else {}
    for k in chosen.sweep_seeds:
        # One for all runs: it decodes its images once.
        study = main if k == seed else Study(profile, k, "sweep", device, f"seed{k}")
        for run in map(chosen.run, chosen.sweep):
            entry = f"{run.name}, seed {k}"
            facts = (
                *chosen.chain(run.name),
                chosen.data,
                chosen.recalibrated,
                chosen.budgets,
                chosen.merging,
            )
            wanted = digest([msgspec.to_builtins(part) for part in facts])
            on_record = record.get(entry, {}).get("settings") == wanted
            print(f"seed {k}: {run.label}{': on record' if on_record else ''}", flush=True)
            if not on_record:
                found = sweep_rows(study, run)
                record[entry] = {
                    "settings": wanted,
                    "rows": found,
                    "provenance": provenance(chosen.name, k),
                }
                results.metrics({"record": record}, "sweep")
            rows += record[entry]["rows"]
    plain = {
        chosen.run(name).label: name for name in chosen.sweep if chosen.run(name).method == "plain"
    }
    figures_by_seed = with_differences(pd.DataFrame(rows), plain)
    results.table(
        figures_by_seed,
        "sweep_seeds",
        "What the table sweep is the mean of: one row a model and seed.",
    )
    table = results.table(sweep_table(figures_by_seed), "sweep", CAPTION)
    summary = results.table(summary_table(table, plain), "sweep_summary", f"{SHORT_CAPTION}.")
    results.table(
        short_table(summary, chosen.plain.label, speed),
        "sweep_short",
        f"{SHORT_CAPTION}, and speed-up.",
    )
    for run in map(chosen.run, chosen.sweep):
        if run.halting and run.label in speed:
            results.finding(
                headline(run.label, figures_by_seed, chosen.plain.label, speed), f"sweep_{run.name}"
            )
    return table


def sweep_rows(study: Study, run: Run) -> list[dict[str, Any]]:
    """The test figures of a run, trained if need be, and of what follows from it without
    training.
    """
    study.train_chain(run.name)
    untrained = merged_models(study) if run == study.profile.plain else {}
    models = {run.label: study.load(run.name)} | recalibrated_models(study, run.name) | untrained
    rows = []
    for label, model in models.items():
        method = untrained_method(model) if label in untrained else run.method
        found = figures(study, model, study.predict(model, study.test))
        rows.append({"model": label, "method": method, "seed": study.seed} | found)
    return rows


def with_differences(rows: pd.DataFrame, references: dict[str, str]) -> pd.DataFrame:
    """``rows`` with, for each reference (label to name), a column minus_<name>: accuracy_macro
    minus its, same seed.
    """
    by_seed = rows.pivot(index="seed", columns="model", values="accuracy_macro")
    bars = {f"minus_{name}": rows["seed"].map(by_seed[label]) for label, name in references.items()}
    return rows.assign(**{column: rows["accuracy_macro"] - bar for column, bar in bars.items()})


def sweep_table(figures: pd.DataFrame) -> pd.DataFrame:
    """One row a model, from one a model and seed: the seeds, then mean and standard deviation of
    every figure.
    """
    groups = figures.groupby(["model", "method"], sort=False)
    seeds = groups["seed"].agg(lambda seeds: " ".join(map(str, seeds))).rename("seeds")
    values = groups[list(figures.columns.drop(["model", "method", "seed"]))]
    return pd.concat([seeds, values.mean(), values.std().add_suffix("_std")], axis=1).reset_index()


def summary_table(sweep: pd.DataFrame, references: dict[str, str]) -> pd.DataFrame:
    """The sweep in words, for people, with the differences from each reference (label to name)."""
    table, form = sweep[["model", "method", "seeds"]].copy(), "{:.1f} ± {:.1f}"
    table["mean per-class accuracy [%]"] = percentages(
        sweep[["accuracy_macro", "accuracy_macro_std"]], form
    )
    for label, name in references.items():
        difference = percentages(sweep[[f"minus_{name}", f"minus_{name}_std"]], "{:+.2f} ± {:.2f}")
        table[f"minus {label} [points]"] = difference.mask(sweep["model"] == label, "")
    table["accuracy [%]"] = percentages(sweep[["accuracy", "accuracy_std"]], form)
    table["mean depth [layers]"] = sweep["mean_depth"].map("{:.2f}".format).replace("nan", "")
    table["FLOPs saved [%]"] = percentages(sweep[["flops_saved", "flops_saved_std"]], form)
    return table


def short_table(summary: pd.DataFrame, reference: str, speed: pd.Series) -> pd.DataFrame:
    """Of the models whose ``speed`` over the ``reference`` was measured, the columns that matter
    most.
    """
    shown = [
        "model",
        "mean per-class accuracy [%]",
        f"minus {reference} [points]",
        "FLOPs saved [%]",
    ]
    table = summary.loc[summary["model"].isin(speed.index), shown]
    return table.assign(**{"speed-up, measured": table["model"].map(speed).map("{:.2f}".format)})


def headline(label: str, by_seed: pd.DataFrame, reference: str, speed: pd.Series) -> str:
    """What the model ``label`` saves and costs, beside the ``reference`` and the peer that is
    nearest in ``speed``.
    """
    figures = by_seed.pivot(index="seed", columns="model")
    accuracy, saved = figures["accuracy_macro"], 100 * figures["flops_saved", label]
    peers = speed[speed.index.isin(by_seed.loc[by_seed["method"] == "peer", "model"])]
    nearest = (peers - speed[label]).abs().nsmallest(1).index
    others = {reference: ""} | {
        peer: f"; {speed[peer]:.2f} times as fast, the nearest in speed" for peer in nearest
    }
    words = []
    for one, why in others.items():
        gap, reached = 100 * (accuracy[label] - accuracy[one]), 100 * accuracy[one].mean()
        side = "below" if gap.mean() < 0 else "above"
        words.append(
            f"{abs(gap.mean()):.2f} ± {gap.std():.2f} points {side} that of {one} ({reached:.1f} %{why})"
        )
    return (
        f"*{label}* saves {saved.mean():.0f} % of the FLOPs and is {speed[label]:.2f} times as fast as {reference}. "
        f"Its mean per-class accuracy is {' and '.join(words)}; mean ± standard deviation over {len(saved)} seeds."
    )
