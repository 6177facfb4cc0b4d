"""The notebooks in a real browser, in JupyterLab as `make lab` starts it: opened and run.

Not among the tests of `make test`: run by `make test-browser`, which needs chromium and selenium.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest

selenium = pytest.importorskip(
    "selenium.webdriver", reason="selenium is missing: .venv/bin/pip install -e '.[browser]'"
)
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
if not (CHROMIUM and DRIVER):
    pytest.skip(
        "no chromium: on Debian, apt install chromium chromium-driver", allow_module_level=True
    )

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(path.name for path in (ROOT / "notebooks").glob("[0-9]*.ipynb"))
MINUTES = 5  # that a notebook may take

# What a reader does by hand, by the commands behind the menus, which say when they are done.
OPEN = """
const [path, done] = arguments;
const open = async () => {
    if (!window.jupyterapp) return setTimeout(open, 100);
    await jupyterapp.restored;
    window.opened = await jupyterapp.commands.execute("docmanager:open", {path});
    await opened.context.ready;
    await opened.sessionContext.ready;
    done();
};
open().catch(error => done(String(error)));
"""
CLOSE = """
const [done] = arguments;
opened.context.revert()
    .then(() => opened.sessionContext.shutdown())
    .then(() => opened.close())
    .then(() => done(), error => done(String(error)));
"""
RUN = """
const [parameters] = arguments;
const done = result => { window.ran = result; };
window.ran = null;
const cells = [...opened.content.model.cells].filter(cell => cell.type === "code");
const tagged = cell => (cell.getMetadata("tags") || []).includes("parameters");
const chosen = cells.find(tagged).sharedModel;
chosen.setSource(parameters);
const seen = cell => [cell.sharedModel.getSource(), cell.executionCount, cell.outputs.toJSON()];
jupyterapp.commands.execute("notebook:run-all-cells")
    .then(() => done(cells.map(seen)), error => done(String(error)));
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the repository without results and data."""
    folder = tmp_path_factory.mktemp("lab") / "checkout"
    for name in ("avit_lib", "notebooks"):
        left_out = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
        shutil.copytree(ROOT / name, folder / name, ignore=left_out)
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def address(checkout):
    """Where `make lab` serves the copy; with this environment, and the embedded data."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    settings = {"open_browser": False, "port": port, "allow_root": True}
    settings = {
        "ServerApp": settings,
        "LabApp": {"expose_app_in_browser": True},
        "IdentityProvider": {"token": ""},
    }
    config = checkout.parent / "config"
    config.mkdir()
    for name in ("server", "lab"):
        (config / f"jupyter_{name}_config.json").write_text(json.dumps(settings))
    known = {
        "JUPYTER_CONFIG_DIR": str(config),
        "PYTHONPATH": str(ROOT),
        "AVIT_DATA": str(ROOT / "data"),
    }
    environment = {key: value for key, value in os.environ.items() if key != "AVIT_RESULTS"}
    command = ["make", "-o", "setup", "lab", f"VENV={sys.prefix}"]
    with (checkout.parent / "lab.log").open("w") as log:
        server = subprocess.Popen(
            command,
            cwd=checkout,
            env=environment | known,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    address = f"http://localhost:{port}"
    for _ in range(120):
        with suppress(OSError):
            urllib.request.urlopen(f"{address}/api")
            break
        assert server.poll() is None, (checkout.parent / "lab.log").read_text()
        time.sleep(0.5)
    yield address
    os.killpg(server.pid, signal.SIGTERM)
    server.wait()


@pytest.fixture(scope="module")
def browser():
    options = selenium.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--window-size=1280,1000",
    ):
        options.add_argument(argument)
    driver = selenium.Chrome(options, selenium.ChromeService(DRIVER))
    driver.set_script_timeout(60)
    yield driver
    driver.quit()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_without_a_fault(name, address, browser):
    """In order: the later notebooks use the models that the earlier ones train."""
    browser.get(f"{address}/lab")
    assert browser.execute_async_script(OPEN, f"notebooks/{name}") is None
    browser.execute_script(RUN, 'PROFILE = "smoke"\nSEED = 0')
    deadline = time.monotonic() + 60 * MINUTES
    cells = None
    while not cells:  # asked again: a call may take two minutes only
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.5)
        cells = browser.execute_script("return window.ran")
    assert isinstance(cells, list), cells
    for source, count, outputs in cells:
        assert count, f"did not run: {source}"
        for output in outputs:
            assert output["output_type"] != "error", f"{output} in {source}"
            assert output.get("name") != "stderr", f"{output} in {source}"
    assert browser.execute_async_script(CLOSE) is None  # its kernel too, for the memory
