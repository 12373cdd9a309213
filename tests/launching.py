"""Starts scripts of several processes on CPUs, and leaves none of the processes behind."""

import os
import signal
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil

from tests.ports import free_port
from tests.warm import Program


REPOSITORY = Path(__file__).parents[1]
PATHS = (REPOSITORY, REPOSITORY / "recipes" / "tiny")
ENVIRONMENT = {"PYTHONPATH": os.pathsep.join(map(str, PATHS)), "OMP_NUM_THREADS": "1"}


def run_processes(words, *, num_processes=2, num_machines=1, code=0, **environment):
    """
    Runs a script in processes that find each other as those of `accelerate launch` do, where the launch is not what is tested.

    Args:
        words (`list`):
            The script and its arguments, or `-m`, a module and its arguments, which tell it to use the CPU.
        num_processes (`int`, *optional*, defaults to `2`):
            Number of processes.
        num_machines (`int`, *optional*, defaults to `1`):
            Number of machines that they believe to be on.
        code (`int`, *optional*, defaults to `0`):
            The exit code of all of them.
        **environment (`str`):
            Further variables.

    Returns:
        `list[subprocess.CompletedProcess]`: What each has printed.
    """
    per_machine = num_processes // num_machines
    shared = {
        "WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": per_machine, "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(), "ACCELERATE_MIXED_PRECISION": "no",
    }  # fmt: skip
    with ExitStack() as stack:
        programs = []
        for rank in range(num_processes):
            variables = {
                name: str(value) for name, value in {**shared, "RANK": rank, "LOCAL_RANK": rank % per_machine}.items()
            }
            env = {**os.environ, **ENVIRONMENT, **variables, **environment}
            programs.append(stack.enter_context(Program(words, env=env)))
        all_ended = [program.wait() for program in programs]
    for ended in all_ended:
        assert ended.returncode == code, ended.stdout + ended.stderr
    return all_ended


class Launched:
    """
    `accelerate launch` of a script, in the background. It is a context: what still runs at its end is killed.

    Args:
        words (`list`):
            The script and its arguments, which tell it to use the CPU.
        log (`Path`):
            File that gets what is printed.
        num_processes (`int`, *optional*, defaults to `2`):
            Number of processes.
        config (`str`, *optional*, defaults to `"multi_gpu"`):
            Name of a file in recipes/accelerate/.
        **environment (`str`):
            Further variables.
    """

    def __init__(self, words, log, *, num_processes=2, config="multi_gpu", **environment):
        options = [
            "--config_file",
            REPOSITORY / "recipes" / "accelerate" / f"{config}.yaml",
            "--mixed_precision",
            "no",
        ]
        if num_processes > 1:
            options += ["--num_processes", num_processes, "--main_process_port", 0]  # a free port
        command = [sys.executable, "-m", "accelerate.commands.launch", *options, *words]
        self.log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [str(word) for word in command],
                env={**os.environ, **ENVIRONMENT, **environment},
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def wait(self, timeout=600):
        """Waits for the end: the exit code, and what was printed."""
        self.process.wait(timeout)
        return self.process.returncode, self.log.read_text()

    def workers(self):
        """The processes of the script by their ranks."""
        ranks = {}
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # a child of a moment
                rank = child.environ().get("RANK")
                if rank is not None:
                    ranks[int(rank)] = child
        return ranks

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is not None:
            return
        # Each worker leads a group of its own, so that killing the launcher's would leave them.
        launcher = psutil.Process(self.process.pid)
        for process in [*launcher.children(recursive=True), launcher]:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        self.process.wait()
