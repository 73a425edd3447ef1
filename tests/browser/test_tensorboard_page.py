# SPDX-License-Identifier: Apache-2.0
"""What a user sees: TensorBoard, in a real browser, shows the curve of the loss and the table of hyperparameters."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

import leyden

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")

pytestmark = [
    pytest.mark.skipif(
        CHROMIUM is None or CHROMEDRIVER is None,
        reason="needs chromium and chromedriver on the path (Debian: apt-get install chromium chromium-driver)",
    ),
    pytest.mark.timeout(180),
]

# each of TensorBoard's parts hides in a shadow tree of its own
EVERYTHING = """
const all = [];
const walk = root => { for (const e of root.querySelectorAll('*')) { all.push(e); if (e.shadowRoot) walk(e.shadowRoot); } };
walk(document);
"""
CARDS = (
    EVERYTHING
    + """
return all.filter(e => e.localName === 'scalar-card').map(card => ({
    words: card.innerText.split(/\\s+/),
    chart: card.querySelector('line-chart canvas, line-chart svg'),
}));
"""
)
TABLES = (
    EVERYTHING
    + """
return all.filter(e => e.localName === 'table')
    .map(table => [...table.rows].map(row => [...row.cells].map(cell => cell.innerText)));
"""
)


class Model(leyden.LightningModule):
    def __init__(self, learning_rate: float = 0.03125, hidden: int = 5) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(2, 1)
        torch.nn.init.ones_(self.layer.weight)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.layer(batch[0]).square().mean() / 20  # it falls by and by, so that the curve crosses the chart
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.hparams["learning_rate"])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of logs with one finished run."""
    folder = tmp_path_factory.mktemp("logs")
    trainer = leyden.Trainer(
        logger=leyden.Experiment(folder, name="digits"), max_epochs=5, log_every_n_steps=1, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(Model(), DataLoader(TensorDataset(torch.ones(16, 2)), batch_size=2))
    return folder


@pytest.fixture(scope="module")
def tensorboard(run: Path) -> Iterator[str]:
    """The address of a TensorBoard that looks at the run."""
    command = [
        sys.executable, "-m", "tensorboard.main", "--logdir", str(run), "--host", "127.0.0.1", "--port", "0",
        "--load_fast", "false", "--reload_interval", "1",
    ]  # fmt: skip
    with server(command, r"at (http://127\.0\.0\.1:\d+)") as address:
        yield address


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert CHROMEDRIVER is not None
    with server([CHROMEDRIVER, "--port=0"], r"started successfully on port (\d+)") as port:
        session = Browser(f"http://127.0.0.1:{port}", tmp_path_factory.mktemp("profile"))
        try:
            yield session
        finally:
            session.quit()


@contextmanager
def server(command: list[str], announces: str) -> Iterator[str]:
    """Run a server for the time of the block; yield what it says when it is ready. It and its children end after that."""
    with ExitStack() as stack:
        process = stack.enter_context(
            subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
        stack.callback(end, process.pid)
        assert process.stdout is not None
        yield wait_for_line(process.stdout, announces)


def wait_for_line(output: IO[str], pattern: str) -> str:
    said = []
    for line in output:
        said.append(line)
        if found := re.search(pattern, line):
            return found[1]
    raise AssertionError("the server ended:\n" + "".join(said))


def end(pid: int) -> None:
    """End a process and those that it started, by their ids."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        processes = [process, *process.children(recursive=True)]
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        for process in psutil.wait_procs(processes, timeout=5)[1]:
            process.kill()


class Browser:
    """A headless Chromium, driven through the WebDriver protocol."""

    def __init__(self, driver: str, profile: Path) -> None:
        self._driver = driver
        arguments = [
            "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-proxy-server",
            "--window-size=1400,2000", f"--user-data-dir={profile}",
        ]  # fmt: skip
        options = {"binary": CHROMIUM, "args": arguments}
        wanted = {"capabilities": {"alwaysMatch": {"browserName": "chrome", "goog:chromeOptions": options}}}
        self._session = f"/session/{self._call('POST', '/session', wanted)['sessionId']}"

    def open(self, address: str) -> None:
        self._call("POST", f"{self._session}/url", {"url": address})

    def evaluate(self, script: str) -> Any:
        return self._call("POST", f"{self._session}/execute/sync", {"script": script, "args": []})

    def wait_until(self, script: str, is_there: Callable[[Any], bool]) -> Any:
        """Return the first item of the list that ``script`` returns for which ``is_there``, as soon as there is one."""
        items = self.wait_for(lambda: [i for i in self.evaluate(script) if is_there(i)], lambda found: len(found) > 0)
        return items[0]

    def wait_for(self, look: Callable[[], Any], is_there: Callable[[Any], bool], timeout_s: float = 40) -> Any:
        """Return what ``look`` finds, as soon as ``is_there``."""
        until = time.monotonic() + timeout_s
        while not is_there(found := look()):
            text = self.evaluate("return document.body.innerText")
            assert time.monotonic() < until, f"not on the page after {timeout_s} s; what there is:\n{text}"
            time.sleep(0.2)
        return found

    def picture(self, element: dict[str, str]) -> Image.Image:
        """Return what the user sees of an element that a script returned."""
        (number,) = element.values()
        picture = self._call("GET", f"{self._session}/element/{number}/screenshot")
        return Image.open(io.BytesIO(base64.b64decode(picture)))

    def quit(self) -> None:
        self._call("DELETE", self._session)

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._driver + path, data, {"Content-Type": "application/json"}, method=method)
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(request, timeout=60) as response:
            return json.load(response)["value"]


def test_the_curve_of_the_loss_is_on_the_page(tensorboard: str, browser: Browser) -> None:
    browser.open(f"{tensorboard}/#timeseries")
    wanted = {"train_loss", "digits/version_0/tf", "39"}  # the tag, the run, the last step
    card = browser.wait_until(CARDS, lambda card: wanted <= set(card["words"]))
    browser.wait_for(lambda: coloured(browser.picture(card["chart"])), falls_from_left_to_right)


def falls_from_left_to_right(pixels: np.ndarray[Any, Any]) -> bool:
    rows, columns = pixels.T
    if columns.size == 0 or np.ptp(columns) < 200:
        return False
    return bool(rows[columns < columns.min() + 20].min() + 50 < rows[columns > columns.max() - 20].min())


def coloured(picture: Image.Image) -> np.ndarray[Any, Any]:
    """Return row and column of each pixel that is neither white nor grey: axes and grid are."""
    pixels = np.asarray(picture.convert("RGB")).astype(int)
    return np.argwhere(pixels.max(axis=2) - pixels.min(axis=2) > 20)


def test_the_table_of_hyperparameters_is_on_the_page(tensorboard: str, browser: Browser) -> None:
    browser.open(f"{tensorboard}/#text")
    table = browser.wait_until(TABLES, lambda table: table[:1] == [["parameter", "value"]])
    assert table == [["parameter", "value"], ["learning_rate", "0.03125"], ["hidden", "5"]]
