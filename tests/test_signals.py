"""Signals to a launching process reach what it launched, and nothing is left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest


REPOSITORY = Path(__file__).parents[1]
# A training: it notes the signals that it gets, and ends at the first one if it is obedient.
TRAINING = """
import os, signal, sys, time
from trl_spatial import cli

class Clock:
    sleep = staticmethod(lambda seconds: wait_for_note() if seconds == cli.GRACE_SECONDS else time.sleep(seconds))

def wait_for_note():  # however slow the machine, the time of grace begins when the signal has been noted
    while not (os.path.exists("signals") and os.path.getsize("signals")):
        time.sleep(0.05)
    time.sleep(cli.GRACE_SECONDS)

def note(number, frame):
    with open("signals", "a") as file:
        print(signal.Signals(number).name, file=file)
    if sys.argv[1] == "obedient":
        time.sleep(0.3)  # it saves
        open("saved", "w").close()
        sys.exit(128 + number)

for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, note)
cli.GRACE_SECONDS = 600.0 if sys.argv[1] == "obedient" else 1.0
cli.time = Clock
cli.follow_launcher(int(os.environ.pop(cli.LAUNCHER_VARIABLE)))
open("started", "w").write(str(os.getpid()))
while True:
    time.sleep(0.05)
"""
LAUNCHER = """
import subprocess, sys
from trl_spatial import cli

cli.GRACE_SECONDS = 600.0 if sys.argv[1] == "obedient" else 1.0
with cli.signals_passed_on() as received:
    subprocess.Popen([sys.executable, "training.py", *sys.argv[1:]]).wait()
sys.exit(128 + received[0])
"""


@pytest.fixture
def launch(tmp_path):
    """Starts the launcher in a session of its own, and gives it and its training once that runs; both are killed at the end."""
    processes = []

    def start(kind):
        (tmp_path / "training.py").write_text(TRAINING)
        launcher = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, kind],
            cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, start_new_session=True,
        )  # fmt: skip
        processes.append(launcher)
        wait_for(lambda: (tmp_path / "started").exists() and (tmp_path / "started").read_text())
        training = psutil.Process(int((tmp_path / "started").read_text()))
        processes.append(training)
        return launcher, training

    yield start
    for process in processes:
        if process.poll() is None if isinstance(process, subprocess.Popen) else process.is_running():
            process.kill()
            process.wait()


def wait_for(is_done, seconds=120.0):
    end = time.monotonic() + seconds
    while not is_done():
        assert time.monotonic() < end
        time.sleep(0.02)


def is_gone(process):
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("whole_group", [False, True])  # `kill`, or Ctrl-C in a terminal
def test_a_signal_reaches_the_training_once_and_the_launcher_waits(launch, tmp_path, number, whole_group):
    launcher, training = launch("obedient")
    os.killpg(launcher.pid, number) if whole_group else launcher.send_signal(number)
    assert launcher.wait(120) == 128 + number
    assert (tmp_path / "saved").exists() and is_gone(training)
    assert (tmp_path / "signals").read_text().split() == [number.name]


def test_a_training_that_does_not_end_is_killed(launch):
    launcher, training = launch("stubborn")
    launcher.terminate()
    assert launcher.wait(120) == 128 + signal.SIGTERM
    assert is_gone(training)


@pytest.mark.parametrize("kind", ["obedient", "stubborn"])
def test_a_killed_launcher_leaves_no_training(launch, tmp_path, kind):
    launcher, training = launch(kind)
    launcher.kill()
    launcher.wait()
    wait_for(lambda: is_gone(training))
    assert (tmp_path / "signals").read_text().split()[0] == "SIGTERM"
    assert (tmp_path / "saved").exists() == (kind == "obedient")
