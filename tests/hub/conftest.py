"""A Hub on loopback that has the default backbone, and a way to run programs that talk to it."""

import os
import subprocess
import sys

import pytest

from tests.hub_stub import HubStub


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
        return self.execute([sys.executable, "-m", "trl_spatial", *map(str, words)], rc, environment)

    def python(self, program, rc=0, **environment):
        """Standard output and error of a Python program."""
        return self.execute([sys.executable, "-c", program], rc, environment)

    def execute(self, command, rc, environment):
        ended = subprocess.run(
            command,
            cwd=self.folder,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )
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
