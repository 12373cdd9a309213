"""Ending training on a signal, with its state saved."""

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_SAME = 2.0  # seconds in which signals count as one: a terminal and a launcher both pass on a Ctrl-C


class Interruption(TrainerCallback):
    """
    On SIGTERM or SIGINT, ends training after the current update, with a checkpoint. A second signal ends the process at
    once. As a context, it replaces the main thread's handlers. `agree` takes a number and returns the largest of all
    processes'; `signum` is the signal that all of them have agreed on, or 0.
    """

    def __init__(self, agree: Callable[[int], int]):
        self.agree = agree
        self.signum = 0
        self._received, self._time, self._process = 0, 0.0, os.getpid()
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        self.signum = self._received = 0
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _handle(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:  # a worker of the data loader, which the trainer ends
            return
        if self._received and time.monotonic() - self._time > _SAME:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not self._received:
            self._received, self._time = number, time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.signum = self.agree(self._received)
        if self.signum:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.signum = self.agree(self._received)
        if self.signum:
            control.should_save = control.should_training_stop = True
