import base64
import threading
import time
from contextlib import contextmanager
from io import BytesIO

import pytest
import requests
import torch

from trl_spatial import SpatialScore
from trl_spatial.gaussian_reward.modeling import GaussianRewardModel
from trl_spatial.serving.app import create_app
from trl_spatial.serving.server import make_server


TOKEN = "correct-horse-battery"


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


class Slow:
    """The same scorer behind a gate, that takes note of its batches."""

    def __init__(self, scorer):
        self.scorer, self.sizes, self.gate, self.entered = scorer, [], threading.Event(), threading.Event()
        self.prepare = scorer.prepare

    def score_batches(self, batches, num_rows, **kwargs):
        self.sizes.append(num_rows)
        self.entered.set()
        assert self.gate.wait(120)
        return self.scorer.score_batches(batches, num_rows, **kwargs)


@pytest.fixture
def slow(scorer):
    slow = Slow(scorer)
    yield slow
    slow.gate.set()


@contextmanager
def serve(scorer, **kwargs):
    """A server in a thread of this process: its URL and itself."""
    server = make_server(create_app(scorer, model_name="tiny", **kwargs), host="127.0.0.1", port=0)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        server.endpoint = server.config.app.state.endpoint
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", server
    finally:
        server.should_exit = True
        thread.join(120)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def url(scorer):
    """URL of a server for that scorer that needs `TOKEN`."""
    with serve(scorer, token=TOKEN) as (url, _):
        yield url


def encode(image, format="PNG", **kwargs):
    file = BytesIO()
    image.save(file, format, **kwargs)
    return base64.b64encode(file.getvalue()).decode()


def ask(url, prompts, images, token=TOKEN, **kwargs):
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    return requests.post(
        f"{url}/score", json={"prompts": prompts, "images": images}, headers=headers, timeout=120, **kwargs
    )
