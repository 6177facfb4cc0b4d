"""Run by the first cell of a notebook on Colab: goes to this folder, installs the study, leaves torch alone."""

import importlib
import os
import subprocess
import sys
from importlib import metadata, util
from pathlib import Path

os.chdir(Path(__file__).resolve().parent)
if not all(util.find_spec(name) for name in ("avit_lib", "timm", "torchmetrics")):
    pins = [
        f"{name}=={metadata.version(name)}" for name in ("torch", "torchvision")
    ]  # Colab's own stay
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "..", *pins], check=True)
    importlib.invalidate_caches()
print(
    "All that is computed here vanishes with the runtime: download what you want to keep of results/."
)
