"""What `import avit_lib` gives, and what it does not drag in."""

import subprocess
import sys
from pathlib import Path

import pytest

import avit_lib

HEAVY = ("matplotlib", "pandas", "jupyterlab", "nbformat", "papermill", "seaborn", "msgspec")


@pytest.mark.parametrize("name", avit_lib.__all__)
def test_what_is_announced_is_there(name):
    assert getattr(avit_lib, name).__module__.split(".")[0] == "avit_lib"


def test_importing_the_method_loads_nothing_that_only_a_study_needs():
    code = "import sys, avit_lib; print(*{name.split('.')[0] for name in sys.modules})"
    root = Path(__file__).parents[1]
    loaded = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    assert {"torch", "timm", "avit_lib"} <= set(loaded.split())
    assert not set(HEAVY) & set(loaded.split())
