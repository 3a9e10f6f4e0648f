"""A throw-away JupyterLab on loopback, and a page on one notebook in Debian's Chromium, for the browser tests."""

import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCREENSHOTS = ROOT / "tests" / "screenshots"

CHROMIUM_FLAGS = [
    "--no-sandbox",  # Chromium refuses to run as root otherwise, and CI runs as root
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--force-color-profile=srgb",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # no name resolves: nothing outside can be reached
]
OVERRIDES = {
    # Render every cell, so that locators find cells which are scrolled out of view.
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},
    "@jupyterlab/apputils-extension:notification": {
        "checkForUpdates": False, "doNotDisturbMode": True, "fetchNews": "false",
    },
    "@jupyterlab/docmanager-extension:plugin": {"autosave": False},
    "@jupyterlab/extensionmanager-extension:plugin": {"enabled": False},
}  # fmt: skip
KERNEL_IS_IDLE = """() => window.jupyterapp?.shell.currentWidget?.context?.sessionContext
    ?.session?.kernel?.status === 'idle'"""


def find_chromium() -> str:
    """The browser's path; without one the test is skipped, and fails where CI is set."""
    names = [os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome"]
    path = next((found for name in names if name and (found := shutil.which(name))), None)
    if path is None:
        reason = "no Chromium found: install it, or set CHROMIUM to its path"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def copy_course(folder: Path) -> Path:
    """Copy what a notebook's page needs: the notebooks, and the pictures they show from ../figures."""
    for name in ("notebooks", "figures"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    return folder


def own_places(scratch: Path) -> dict[str, str]:
    """An environment in which Jupyter reads and writes nothing of the user's; figures stay inline."""
    places = {name: str(scratch / name.lower()) for name in (
        "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "JUPYTERLAB_SETTINGS_DIR",
        "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR",
    )}  # fmt: skip
    inherited = {k: v for k, v in os.environ.items() if k not in ("MPLBACKEND", "JUPYTER_TOKEN", "PYTEST_CURRENT_TEST")}
    return inherited | places


@contextlib.contextmanager
def running(command: list[str], env: dict[str, str], url: str, log: Path, seconds: float = 120):
    """Run a server until the block ends; entered once url answers anything at all. Its output goes to log."""
    with log.open("w") as out:
        process = subprocess.Popen(
            command, env=env, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
        try:
            deadline = time.monotonic() + seconds
            while not answers(url):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"JupyterLab did not come up at {url}:\n{log.read_text()[-3000:]}")
                time.sleep(0.1)
            yield process
        finally:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def answers(url: str, token: str = "") -> int:
    """The HTTP status that url answers with; 0 when nothing listens."""
    request = urllib.request.Request(url, headers={"Authorization": f"token {token}"} if token else {})
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            return response.status
    except urllib.error.HTTPError as error:
        error.close()
        return error.code
    except OSError:
        return 0


@contextlib.contextmanager
def jupyterlab(root: Path, scratch: Path):
    """Serve root; yield (url, token). scratch receives configuration, workspaces and the log."""
    port, token, settings = free_port(), secrets.token_hex(16), scratch / "app-settings"
    settings.mkdir(parents=True)
    (settings / "overrides.json").write_text(json.dumps(OVERRIDES))
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root",
        "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.port_retries=0",
        f"--ServerApp.root_dir={root}", "--ServerApp.terminals_enabled=False",
        f"--LabApp.app_settings_dir={settings}", "--LabApp.expose_app_in_browser=True",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--LabApp.news_url=",
    ]  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    with running(command, own_places(scratch) | {"JUPYTER_TOKEN": token}, f"{url}/api", scratch / "jupyterlab.log"):
        yield url, token


class NotebookPage:
    """One browser page on one notebook. Outside requests are refused and kept, console errors are kept."""

    def __init__(self, chromium, server):
        self.url, self.token = server
        self.context = chromium.new_context(viewport={"width": 1280, "height": 900})
        self.page = self.context.new_page()
        self.outside, self.errors = [], []
        self.page.on("console", lambda message: message.type == "error" and self.errors.append(message.text))
        self.page.on("pageerror", lambda error: self.errors.append(f"uncaught: {error}"))
        self.page.on("websocket", lambda socket: self.is_outside(socket.url))
        self.context.route("**/*", self.guard)

    def is_outside(self, url: str) -> bool:
        outside = not re.match(r"(https?|wss?)://127\.0\.0\.1[:/]|data:|blob:", url)
        if outside:
            self.outside.append(url)
        return outside

    def guard(self, route):
        route.abort() if self.is_outside(route.request.url) else route.continue_()

    def open(self, name: str):
        """Open the notebook alone on its page, without side bars or an earlier workspace, and wait for its kernel."""
        self.page.goto(f"{self.url}/doc/tree/{name}?reset&token={self.token}")
        self.page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=60_000)
        self.page.wait_for_function(KERNEL_IS_IDLE, timeout=60_000)
        return self

    def run_all(self, timeout: float = 300):
        """Run every cell; none may end in an error or write to stderr."""
        self.page.evaluate("""() => { window.jupyterapp.commands.execute('notebook:run-all-cells')
                              .then(ok => { window.ranAllCells = ok }) }""")
        self.page.wait_for_function("() => window.ranAllCells !== undefined", timeout=1000 * timeout)
        for kind in ("error", "stderr"):
            shown = self.page.locator(f'[data-mime-type="application/vnd.jupyter.{kind}"]').all_inner_texts()
            assert shown == [], f"a cell showed {kind}: {shown[0]}"
        return self

    def slider(self, label: str):
        """The handle of the ipywidgets slider with this description."""
        return self.labelled(".widget-slider", label).locator(".noUi-handle")

    def dropdown(self, label: str):
        """The select element of the ipywidgets Dropdown with this description."""
        return self.labelled(".widget-dropdown", label).locator("select")

    def labelled(self, selector: str, label: str):
        return self.page.locator(selector, has=self.page.locator(".widget-label").get_by_text(label, exact=True))

    def press(self, *keys: str):
        for key in keys:
            self.page.keyboard.press(key)

    def shot(self, name: str):
        """Keep a picture of the page for a person to look at."""
        SCREENSHOTS.mkdir(exist_ok=True)
        self.page.screenshot(path=SCREENSHOTS / f"{name}.png")
