"""Starts scripts of several processes on CPUs, and leaves none of the processes behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil


REPOSITORY = Path(__file__).parents[1]
PATHS = (REPOSITORY, REPOSITORY / "recipes" / "tiny")


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
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(map(str, PATHS)),
                    "OMP_NUM_THREADS": "1",
                    **environment,
                },
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
            if process.is_running():
                process.send_signal(signal.SIGKILL)
        self.process.wait()
