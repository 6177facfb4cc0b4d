"""Write the headline models of a profile in half precision, to be committed.

    python scripts/release.py --profile caltech24 --seed 0

Into results/<profile>/models/<run>: the plain model and the one that notebooks look into, each a
folder as timm's hub has them, with a model card; and a table of what rounding costs them on the
test images.
"""

import argparse
from copy import deepcopy
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from timm.models import save_for_hf
from torch import nn

from avit_lib.data.images import CROP_FRACTION, STATISTICS
from avit_lib.errors import UserError
from avit_lib.evaluation import metrics
from avit_lib.places import project_root
from avit_lib.study import Run, Study
from avit_lib.study.results import provenance, to_markdown
from avit_lib.study.study import released
from avit_lib.training import load_checkpoint, save_checkpoint, write_atomically

CARD = """---
library_name: timm
pipeline_tag: image-classification
license: {short_licence}
---
# {label}

`{model}` of the study *{profile}* ({purpose}); {classes} classes, weights in half precision.
On the {images:,} test images of seed {seed} its accuracy is {accuracy:.1%}, its mean per-class
accuracy {accuracy_macro:.1%}, at {gflops_per_image:.2f} GFLOPs an image. Licence: {licence}.

```python
import avit_lib, timm  # avit_lib registers the A-ViTs with timm

model = timm.create_model("local-dir:{place}", pretrained=True)
```
"""


def write_folder(folder: Path, model: nn.Module, described: dict[str, Any], licence: str) -> None:
    """Write weights, settings and classes of a model as timm's hub has them, and what ours has."""
    arguments, run = described["arguments"], described["run"]
    seen = {"mean": STATISTICS[0], "std": STATISTICS[1], "crop_pct": CROP_FRACTION}
    names = {"label_names": run["classes"], "pretrained_cfg": seen | {"interpolation": "bicubic"}}
    facts = {"run": run, "licence": licence, "provenance": described["provenance"]}
    save_for_hf(model, str(folder), names, model_args=arguments, safe_serialization=True)
    save_checkpoint(folder / "model.safetensors", model, described["model"], arguments, **facts)


def write_card(folder: Path, study: Study, run: Run, found: dict[str, float]) -> None:
    """Write what a model is, and how good: ``found``, its metrics on the test images."""
    root = project_root()
    words = CARD.format(
        label=run.label,
        profile=study.profile.name,
        purpose=study.profile.purpose,
        model=run.model,
        classes=len(study.test.classes),
        licence=study.profile.licence,
        short_licence=study.profile.licence.split(";")[0].lower(),
        images=len(study.test),
        seed=study.seed,
        place=folder.relative_to(root) if folder.is_relative_to(root) else folder,
        **found,
    )
    write_atomically(folder / "README.md", words.encode())


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
        made = {"provenance": provenance(profile.name, study.seed)}
        write_folder(path.parent, half, described | made, profile.licence)
        row: dict[str, Any] = {"model": run.label}
        both = {"as trained": model, "as committed": load_checkpoint(path, study.device)[0]}
        for words, one in both.items():
            found = metrics(study.predict(one, study.test))
            row |= {f"{key}, {words}": found[key] for key in ("accuracy", "accuracy_macro")}
        write_card(path.parent, study, run, found)
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
