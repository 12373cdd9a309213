"""A Hub on loopback that has the default backbone, and a way to run programs that talk to it."""

import os

import pytest

from tests.hub_stub import HubStub
from tests.warm import run_python
from trl_spatial.cli import LAUNCHED_COMMANDS


BACKBONE = "Qwen/Qwen2.5-VL-7B-Instruct"  # the default of `trl_spatial reward`; here a tiny model of its class


class Machine:
    """A machine with a cache of its own that knows a Hub."""

    def __init__(self, hub, folder, **environment):
        self.hub, self.folder = hub, folder
        folder.mkdir(exist_ok=True)
        home = folder / "home"
        home.mkdir(exist_ok=True)
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("TRL_SPATIAL")},
            **hub.environment,
            "HF_HOME": str(folder / "cache"),
            "HOME": str(home),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            **environment,
        }

    def run(self, *words, rc=0, **environment):
        """Standard output and error of `trl_spatial WORDS`, which has to end with the exit code `rc`."""
        words = list(map(str, words))
        if words[0] in LAUNCHED_COMMANDS and rc == 0:  # the script by itself: the launcher is tested elsewhere
            return self.execute(["-m", f"trl_spatial.scripts.{words[0]}", *words[1:]], rc, environment)
        return self.execute(["-m", "trl_spatial", *words], rc, environment)

    def python(self, program, rc=0, **environment):
        """Standard output and error of a Python program."""
        return self.execute(["-c", program], rc, environment)

    def execute(self, words, rc, environment):
        ended = run_python(words, cwd=self.folder, env={**self.environment, **environment})
        assert (ended.returncode == 0) == (rc == 0), ended.stdout + ended.stderr
        return ended.stdout + ended.stderr


@pytest.fixture(scope="package")
def backbone_files(official_checkpoints):
    """Files of a tiny Qwen2.5-VL as on the Hub."""
    folder, _ = official_checkpoints["qwen2_5_vl"]
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def hub(backbone_files):
    """A Hub that has the backbone and nothing else."""
    with HubStub() as hub:
        hub.files[BACKBONE] = dict(backbone_files)
        yield hub


@pytest.fixture
def machine(hub, tmp_path):
    """A machine that is logged in as `tester`."""
    return Machine(hub, tmp_path / "machine")
