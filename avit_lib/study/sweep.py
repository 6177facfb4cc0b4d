"""The sweep over seeds: how much of a figure is chance."""

import pandas as pd

from avit_lib.errors import UserError
from avit_lib.study.search import figures
from avit_lib.study.study import Study
from avit_lib.study.tables import dialled_models, percentages

CAPTION = (
    "Test figures over seeds: mean, and standard deviation (_std), over models trained from different seeds; a seed "
    "decides on the split (of official data, only on the validation images), the order of the training images and all "
    "random weights. minus_...: difference in mean per-class accuracy, of the same seed."
)


def run_sweep(profile: str, seed: int = 0, device: str = "auto") -> pd.DataFrame:
    """Train the runs of a profile's sweep, once a seed, and test them, the focus run at its other depths too.

    Writes tables/sweep and returns it; an interrupted sweep goes on where training stopped. ``seed`` is that of the
    study, whose own checkpoints serve; those of others lie in checkpoints/seed<k>. Raises UserError for an empty sweep.
    """
    main = Study(profile, seed, "sweep", device)
    chosen, results = main.profile, main.results
    if not chosen.sweep:
        raise UserError(f"profile {chosen.name} has no runs to repeat; name some in its file, as sweep = [...]")
    rows = []
    for k in chosen.sweep_seeds:
        study = Study(profile, k, "sweep", device, "" if k == seed else f"seed{k}")
        for name in chosen.sweep:
            print(f"seed {k}: {chosen.run(name).label}", flush=True)
            study.train_chain(name)
            models = {chosen.run(name).label: study.load(name)}
            models |= dialled_models(study) if name == chosen.focus else {}
            for label, model in models.items():
                rows.append({"model": label, "seed": k} | figures(model, study.predict(model, study.test)))
    plain = {chosen.run(name).label: name for name in chosen.sweep if not chosen.run(name).halting}
    figures_by_seed = with_differences(pd.DataFrame(rows), plain)
    results.table(figures_by_seed, "sweep_seeds", "What the table sweep is the mean of: one row a model and seed.")
    table = results.table(sweep_table(figures_by_seed), "sweep", CAPTION)
    results.table(summary_table(table, plain), "sweep_summary", "The sweep over seeds: mean ± standard deviation.")
    return table


def with_differences(rows: pd.DataFrame, references: dict[str, str]) -> pd.DataFrame:
    """``rows`` with, for each reference (label to name), a column minus_<name>: accuracy_macro minus its, same seed."""
    by_seed = rows.pivot(index="seed", columns="model", values="accuracy_macro")
    bars = {f"minus_{name}": rows["seed"].map(by_seed[label]) for label, name in references.items()}
    return rows.assign(**{column: rows["accuracy_macro"] - bar for column, bar in bars.items()})


def sweep_table(figures: pd.DataFrame) -> pd.DataFrame:
    """One row a model, from one a model and seed: the seeds, then mean and sample deviation of every figure."""
    groups = figures.groupby("model", sort=False)
    columns = {"seeds": groups["seed"].agg(lambda seeds: " ".join(map(str, seeds)))}
    for name in figures.columns.drop(["model", "seed"]):
        columns |= {name: groups[name].mean(), f"{name}_std": groups[name].std()}
    return pd.DataFrame(columns).reset_index()


def summary_table(sweep: pd.DataFrame, references: dict[str, str]) -> pd.DataFrame:
    """The sweep in words, for people: mean and deviation, with the differences from each reference (label to name)."""
    table, form = sweep[["model", "seeds"]].copy(), "{:.1f} ± {:.1f}"
    table["mean per-class accuracy [%]"] = percentages(sweep[["accuracy_macro", "accuracy_macro_std"]], form)
    for label, name in references.items():
        difference = percentages(sweep[[f"minus_{name}", f"minus_{name}_std"]], "{:+.2f} ± {:.2f}")
        table[f"minus {label} [points]"] = difference.mask(sweep["model"] == label, "")
    table["accuracy [%]"] = percentages(sweep[["accuracy", "accuracy_std"]], form)
    table["mean depth [layers]"] = sweep["mean_depth"].map("{:.2f}".format)
    table["FLOPs saved [%]"] = percentages(sweep[["flops_saved", "flops_saved_std"]], form)
    return table
