import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.ports import free_port
from trl_spatial import SpatialScore
from trl_spatial.gaussian_reward.modeling import GaussianRewardModel


REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def scorer(official_checkpoints, processor):
    """A scorer that tells images apart."""
    folder, _ = official_checkpoints["qwen2_5_vl"]
    model = GaussianRewardModel.from_backbone(
        folder, reward_token_id=processor.reward_token_id, head_hidden_sizes=(16, 8)
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return SpatialScore(model, processor)


@pytest.fixture(scope="session")
def checkpoint(scorer, tmp_path_factory):
    """Folder of that scorer. Treat it as read-only."""
    folder = tmp_path_factory.mktemp("space") / "tiny-reward"
    scorer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def image_paths(images, tmp_path_factory):
    """Files of images, not in the order of their scores. Treat them as read-only."""
    folder = tmp_path_factory.mktemp("images")
    names = ["red cube.png", "blue.webp", "größe.bmp", "lamp & bob's (1).gif", "narrow-window.png"]
    for image, name in zip(images, names, strict=True):
        image.save(folder / name, **({"lossless": True} if name.endswith("webp") else {}))
    return [folder / name for name in names]


@pytest.fixture(scope="session")
def damaged_path(tmp_path_factory):
    """File of a picture that breaks off."""
    path = tmp_path_factory.mktemp("damaged") / "torn's.png"
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:-2000])
    return path


class Proxy:
    """A proxy that takes every connection down and closes it: what a program asks of the world outside this machine."""

    def __init__(self):
        self.requests = []
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self):
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            with connection:
                self.requests.append(connection.recv(1000).split(b"\r\n")[0].decode())


@contextmanager
def run_server(command, *, cwd, port, environment):
    """Starts a server, waits until it answers, and gives its URL and the proxy through which it would go outside."""
    url, proxy = f"http://127.0.0.1:{port}/", Proxy()
    outside = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), proxy.url)
    loopback = dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1,localhost")
    variables = os.environ | {"PYTHONPATH": str(REPOSITORY)} | outside | loopback | environment
    log = Path(cwd) / f"server-{port}.log"
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=cwd, env=variables, stdout=file, stderr=subprocess.STDOUT)
    try:
        wait_for_answer(url, process, log)
        yield url, proxy
    finally:
        process.terminate()
        process.wait(timeout=120)
        proxy.socket.close()


def wait_for_answer(url, process, log):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + 600
    while True:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        try:
            return opener.open(url, timeout=120).close()
        except OSError:
            time.sleep(0.2)


@pytest.fixture(scope="module")
def served(checkpoint, tmp_path_factory):
    """URL and proxy of `trl_spatial space serve` for that checkpoint."""
    port = free_port()
    command = [sys.executable, "-m", "trl_spatial", "space", "serve", "--model", str(checkpoint), "--port", str(port)]
    with run_server(command, cwd=tmp_path_factory.mktemp("serve"), port=port, environment={}) as server:
        yield server


@pytest.fixture(scope="module")
def built(checkpoint, tmp_path_factory):
    """URL and proxy of `python app.py` in the folder of a Space, with that checkpoint as MODEL_ID."""
    from trl_spatial.space.build import build_space

    folder, port = tmp_path_factory.mktemp("built"), free_port()
    build_space(folder, "ORG/SpatialScore-tiny", title="Which image?")
    environment = {"MODEL_ID": str(checkpoint), "GRADIO_SERVER_PORT": str(port)}
    with run_server([sys.executable, "app.py"], cwd=folder, port=port, environment=environment) as server:
        yield server


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium of the system, driven by playwright."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    missing = (
        "`pip install playwright`" if find_spec("playwright") is None else "a Chromium, e.g. `apt install chromium`"
    )
    if path is None or find_spec("playwright") is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(
            f"The page is not opened: it takes {missing}."
        )
    from playwright.sync_api import sync_playwright

    flags = ["no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
             "disable-component-update", "disable-sync", "no-proxy-server"]  # fmt: skip
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=[f"--{flag}" for flag in flags])
        yield browser
        browser.close()
