"""The headline models of a profile, small enough to be committed: half precision, each measured as
it is committed.
"""

from copy import deepcopy
from pathlib import Path

import pandas as pd
import torch

from avit_lib.errors import UserError
from avit_lib.evaluation import metrics
from avit_lib.study.results import provenance, results_dir
from avit_lib.study.study import Study
from avit_lib.training import load_checkpoint, save_checkpoint


def released(profile: str, run: str) -> Path:
    """Where the committed model of a run lies, if there is one."""
    return results_dir(profile) / "models" / f"{run}.safetensors"


def release(study: Study) -> pd.DataFrame:
    """Write the plain model and the one that the notebooks look into in half precision; returns
    what rounding costs.

    Accuracies are of the test images: of the model as trained, and of the file read back. Raises
    UserError for a profile without a licence.
    """
    profile, rows = study.profile, []
    if not profile.licence:
        raise UserError(
            f"profile {profile.name} has no licence for its weights: write licence = ... into its file"
        )
    for run in dict.fromkeys([profile.plain, profile.run(profile.focus)]):
        model, described = load_checkpoint(study.checkpoint(run.name), study.device)
        path, half = released(profile.name, run.name), deepcopy(model).to(torch.float16)
        facts = {"licence": profile.licence, "provenance": provenance(profile.name, study.seed)}
        save_checkpoint(
            path, half, described["model"], described["arguments"], run=described["run"], **facts
        )
        both = {"as trained": model, "as committed": load_checkpoint(path, study.device)[0]}
        found = {words: metrics(one, study.predict(one, study.test)) for words, one in both.items()}
        row = {
            f"{key}, {words}": found[words][key]
            for key in ("accuracy", "accuracy_macro")
            for words in both
        }
        rows.append({"model": run.label} | row | {"megabytes": path.stat().st_size / 1e6})
    caption = "The committed models, weights in half precision (computed with in single), on the test images."
    return study.results.table(pd.DataFrame(rows), "models", caption)
