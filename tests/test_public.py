"""What `import avit_lib` gives, and what it does not drag in."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import avit_lib

COMMITTED = sorted(ROOT.glob("results/*/models/*/model.safetensors"))
HEAVY = {"matplotlib", "pandas", "jupyterlab", "nbformat", "papermill", "seaborn", "msgspec"}


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.parent.name)
def test_a_committed_model_is_loaded_in_one_line_and_computes(path):
    model, description = avit_lib.load(path)
    assert not model.training and description["model"]
    with torch.inference_mode():
        assert model(torch.zeros(1, *model.default_cfg["input_size"])).isfinite().all()


def test_importing_the_method_loads_nothing_that_only_a_study_needs():
    code = "import sys, avit_lib; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).split()
    assert {"torch", "timm", "avit_lib"} <= set(loaded)
    assert not HEAVY & set(loaded)
