"""Write the headline models of a profile in half precision, to be committed.

    python scripts/release.py --profile caltech24 --seed 0

Into results/<profile>/models: the plain model and the one that notebooks look into; and a table of
what rounding costs them on the test images.
"""

import argparse
from copy import deepcopy
from typing import Any

import pandas as pd
import torch

from avit_lib.errors import UserError
from avit_lib.evaluation import metrics
from avit_lib.study import Study
from avit_lib.study.results import provenance, to_markdown
from avit_lib.study.study import released
from avit_lib.training import load_checkpoint, save_checkpoint


def release(study: Study) -> pd.DataFrame:
    """Write the models and the table; raises UserError for a profile without a licence."""
    profile, rows = study.profile, []
    if not profile.licence:
        raise UserError(
            f"profile {profile.name} has no licence for its weights: add licence = ... to its file"
        )
    for run in dict.fromkeys([profile.plain, profile.run(profile.focus)]):
        model, described = load_checkpoint(study.checkpoint(run.name), study.device)
        path, half = released(profile.name, run.name), deepcopy(model).to(torch.float16)
        made = provenance(profile.name, study.seed)
        about = described["model"], described["arguments"]
        save_checkpoint(
            path, half, *about, run=described["run"], licence=profile.licence, provenance=made
        )
        row: dict[str, Any] = {"model": run.label}
        both = {"as trained": model, "as committed": load_checkpoint(path, study.device)[0]}
        for words, one in both.items():
            found = metrics(study.predict(one, study.test))
            row |= {f"{key}, {words}": found[key] for key in ("accuracy", "accuracy_macro")}
        rows.append(row | {"megabytes": path.stat().st_size / 1e6})
    caption = "The committed models, weights in half precision (computed with in single), tested."
    return study.results.table(pd.DataFrame(rows), "models", caption)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="caltech24")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        print(to_markdown(release(Study(options.profile, options.seed, source="release"))))
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
