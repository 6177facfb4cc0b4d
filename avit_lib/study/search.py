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
from avit_lib.study.settings import Halting, Run
from avit_lib.study.study import Study
from avit_lib.training import Training, read_json

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
    record = read_record(study)
    data = study.data
    facts = [[len(data.train), data.split["sha256"], data.augmentation], list(data.train.classes), study.seed]
    images = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    for number, run in enumerate(candidates, start=1):
        known = record.get(run.name)
        on_record = known and known["images"] == images and known["settings"] == flat_settings(run)
        print(f"[{number}/{len(candidates)}] {run.label}{': on record' if on_record else ''}", flush=True)
        if not on_record:
            record[run.name] = {"images": images, **evaluate_candidate(study, run)}
            study.results.table(search_table(study, record), "search", CAPTION)
            study.results.metrics({"candidates": record}, "search")
    return search_table(study, record)


def evaluate_candidate(study: Study, run: Run) -> dict[str, Any]:
    """Train a candidate, and first what it starts or learns from; returns settings, validation figures, minutes."""
    origin = provenance(study.profile.name, study.seed)
    history = study.train_chain(run.name)
    model = study.load(run.name)
    return {
        "label": run.label,
        "settings": flat_settings(run),
        "figures": figures(model, study.predict(model, study.data.validation)),
        "minutes": history["seconds"].sum() / 60,
        "commit": origin["commit"][:10] + ("-dirty" if origin["dirty"] else ""),
    }


def figures(model: nn.Module, predictions: Predictions) -> dict[str, float]:
    """The metrics of a model and the share of FLOPs that it saves against itself at full depth."""
    values = metrics(model, predictions)
    full = flops_per_image(model, torch.full_like(predictions.depth[:1], predictions.layers)).item() / 1e9
    return values | {"flops_saved": 1 - values["gflops_per_image"] / full}


def read_record(study: Study) -> dict[str, dict]:
    """What earlier searches found, by the name of the candidate; a setting younger than the record has its default."""
    path = study.results.folder / "metrics" / "search.json"
    record = read_json(path)["candidates"] if path.is_file() else {}
    training = Training(epochs=0, learning_rate=0.0)
    anything = Run(name="", label="", model="", init="", training=training, halting=Halting(), teacher="anyone")
    defaults = flat_settings(anything) | {"teacher": ""}
    for entry in record.values():
        absent = {"halting", "distillation"} - {name.split(".")[0] for name in entry["settings"]}
        meant = {name: value for name, value in defaults.items() if name.split(".")[0] not in absent}
        entry["settings"] = meant | entry["settings"]
    return record


def flat_settings(run: Run) -> dict[str, Any]:
    """All settings of a run that mean something, by dotted names such as halting.beta."""
    idle = {"name", "label"} if run.teacher else {"name", "label", "distillation"}
    flat = {}
    for name, value in msgspec.to_builtins(run).items():
        if name not in idle and value is not None:
            flat |= {f"{name}.{key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def search_table(study: Study, record: dict[str, dict]) -> pd.DataFrame:
    """One row a candidate on record, those still declared first, in order: settings that differ, figures, minutes."""
    declared = [run.name for run in study.profile.search if run.name in record]
    table = pd.DataFrame([record[name] for name in dict.fromkeys([*declared, *record])])
    settings, reached = pd.DataFrame(table["settings"].tolist()), pd.DataFrame(table["figures"].tolist())
    differing = settings.loc[:, settings.map(repr).nunique() > 1]
    candidate = table["label"].rename("candidate")
    return pd.concat([candidate, differing, reached[list(FIGURES)], table[["minutes", "commit"]]], axis=1)
