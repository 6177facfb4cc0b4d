"""The search for settings: candidates of a profile, trained and compared on the validation images, never the test's.

What was found stays on record in metrics/search.json, also of candidates no longer declared; one on record is trained
again when its own settings, the images or the seed change, but not when code does: then remove that file by hand.
"""

import hashlib
import json
from typing import Any

import msgspec
import pandas as pd
import torch
from torch import nn

from avit_lib.errors import UserError
from avit_lib.evaluation import Predictions, flops_per_image, metrics
from avit_lib.study.results import provenance
from avit_lib.study.settings import Run, checked
from avit_lib.study.study import Study
from avit_lib.training import read_json

FIGURES = ("accuracy", "accuracy_macro", "mean_depth", "mean_executed_depth", "gflops_per_image", "flops_saved")
CAPTION = (
    "The search for settings, on the validation images: the settings in which the candidates differ, what each reached "
    "after its last epoch, the minutes its training took and the commit that trained it."
)


def run_search(study: Study) -> pd.DataFrame:
    """Train and evaluate the candidates that are not on record, written down after each; returns the table of all.

    Raises UserError when the profile declares no candidates.
    """
    candidates = study.profile.search
    if not candidates:
        raise UserError(f"profile {study.profile.name} has no candidates; declare some in its file, as [search.NAME]")
    path = study.results.folder / "metrics" / "search.json"
    record = read_json(path)["candidates"] if path.is_file() else {}
    data = study.data
    facts = [[len(data.train), data.split["sha256"], data.augmentation], list(data.train.classes), study.seed]
    images = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    for number, run in enumerate(candidates, start=1):
        known = record.get(run.name)
        on_record = known and known["images"] == images and recorded(known, name=run.name, label=run.label) == run
        print(f"[{number}/{len(candidates)}] {run.label}{': on record' if on_record else ''}", flush=True)
        if not on_record:
            record[run.name] = {"images": images, **evaluate_candidate(study, run)}
            study.results.table(search_table(study, record), "search", CAPTION)
            study.results.metrics({"candidates": record}, "search")
    return search_table(study, record)


def evaluate_candidate(study: Study, run: Run) -> dict[str, Any]:
    """Train a candidate, and first what it starts or learns from; returns its settings, validation figures, minutes."""
    origin = provenance(study.profile.name, study.seed)
    history = study.train_chain(run.name)
    model = study.load(run.name)
    return {
        "label": run.label,
        "run": msgspec.to_builtins(run),
        "figures": figures(model, study.predict(model, study.data.validation)),
        "minutes": history["seconds"].sum() / 60,
        "commit": origin["commit"][:10] + ("-dirty" if origin["dirty"] else ""),
    }


def figures(model: nn.Module, predictions: Predictions) -> dict[str, float]:
    """The metrics of a model and the share of FLOPs that it saves against itself at full depth."""
    values = metrics(model, predictions)
    full = flops_per_image(model, torch.full_like(predictions.depth[:1], predictions.layers)).item() / 1e9
    return values | {"flops_saved": 1 - values["gflops_per_image"] / full}


def recorded(entry: dict[str, Any], **changes: str) -> Run:
    """The candidate on record, with ``changes``; a setting younger than the record has its default."""
    return msgspec.structs.replace(checked("metrics/search.json", entry["label"], entry["run"], Run), **changes)


def search_table(study: Study, record: dict[str, dict]) -> pd.DataFrame:
    """One row a candidate on record, those still declared first, in order: settings that differ, figures, minutes."""
    declared = [run.name for run in study.profile.search if run.name in record]
    entries = [record[name] for name in dict.fromkeys([*declared, *record])]
    settings = pd.json_normalize([msgspec.to_builtins(recorded(entry)) for entry in entries])
    settings.loc[settings["teacher"] == "", settings.columns.str.startswith("distillation")] = None  # mean nothing
    settings = settings.drop(columns=["name", "label"])
    table, reached = pd.DataFrame(entries), pd.DataFrame([entry["figures"] for entry in entries])
    differing = settings.loc[:, settings.map(repr).nunique() > 1]
    candidate = table["label"].rename("candidate")
    return pd.concat([candidate, differing, reached[list(FIGURES)], table[["minutes", "commit"]]], axis=1)
