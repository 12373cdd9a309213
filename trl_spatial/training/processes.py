"""Errors of one training process, raised in all of them."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce

from ..waiting import WaitNotices


@contextmanager
def fail_together(doing: str, *, is_collective: bool = False) -> Iterator[None]:
    """
    Context that all processes enter, and that raises an error on all of them if one fails: the others raise a
    `RuntimeError` that names the failed processes and the reasons. `doing` says, in its message, what was going on.

    Without it, the others would wait in the next exchange for a process that is gone, until the launcher ends them or,
    on another machine, until `ddp_timeout`. It costs an exchange of one number.

    The code inside may wait for other processes only if `is_collective`. Then an error ends only this process, and the
    launcher ends the others, which could not be told of it.
    """
    if is_collective:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as raised:  # raised again below, when the others know
        error = raised
    state = PartialState()
    if state.num_processes > 1:
        notices = WaitNotices(
            f"the other processes ({doing})", "One that hangs ends the training after `ddp_timeout`."
        )
        # Two of them say so: whichever process hangs, one of these waits for it.
        with notices.request() if state.process_index < 2 else nullcontext():
            num_failed = reduce(torch.tensor(int(error is not None), device=state.device), reduction="sum").item()
        if num_failed > 0:
            reasons = gather_object([None if error is None else _describe(error)])
            if error is None:
                failures = [f"process {rank} ({reason})" for rank, reason in enumerate(reasons) if reason is not None]
                raise RuntimeError(f"{doing} failed on {', '.join(failures)}. See its traceback for where.")
    if error is not None:
        raise error


def _describe(error: Exception) -> str:
    sentences = [f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())]
    return ". ".join(sentence.rstrip(".") for sentence in sentences)
