"""
Types of options that name a file or a folder: a place that cannot be read or written is refused at once, with the option's name.
"""

import argparse
import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

from ..store import check_writable


def place(value: str) -> str:
    """A file, a folder, or the name of something elsewhere: neither empty nor a path that the file system rejects."""
    _mode(value)
    return value


def folder_or_name(value: str) -> str:
    """A folder, or the name of something elsewhere."""
    mode = _mode(value)
    if mode is not None and not stat.S_ISDIR(mode):
        raise argparse.ArgumentTypeError(f"{value} is not a folder")
    return value


def existing_file(value: str) -> str:
    """A readable file. Named pipes and devices may have no end, and are refused."""
    mode = _mode(value)
    if mode is None:
        _check_link(mode, value)
        raise argparse.ArgumentTypeError(f"there is no file {value}")
    if not stat.S_ISREG(mode):
        raise argparse.ArgumentTypeError(f"{value} is {_describe(mode)}, not a file")
    try:
        open(value, "rb").close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{value} cannot be read: {error.strerror}") from None
    return value


def new_file(value: str) -> str:
    """A file to write, which may exist already, as may its folder. Devices such as a terminal are allowed."""
    mode = _mode(value)
    _check_link(mode, value)
    if mode is not None and not (stat.S_ISREG(mode) or stat.S_ISCHR(mode)):
        raise argparse.ArgumentTypeError(f"{value} is {_describe(mode)}; name a file")
    _check_writable(Path(os.path.realpath(value)).parent, value)
    return value


def new_folder(value: str) -> str:
    """A folder to write into, which may exist already."""
    mode = _mode(value)
    if mode is not None and not stat.S_ISDIR(mode):
        raise argparse.ArgumentTypeError(f"{value} is {_describe(mode)}; name a folder")
    _check_link(mode, value)
    _check_writable(Path(value), value)
    return value


def json_settings(value: str) -> str:
    """A JSON file, or a JSON object."""
    _check_json(
        value, value if value.lstrip().startswith("{") else Path(existing_file(value)).read_text(errors="replace")
    )
    return value


def json_object(value: str) -> str:
    """A JSON object."""
    _check_json(value, value)
    return value


# Types of options by their destination, for options that a command gives no type of its own
TYPES: dict[str, Callable[[str], str]] = {
    **dict.fromkeys(("dataset", "eval_dataset", "input", "store", "run", "runs", "generator"), place),
    **dict.fromkeys(
        ("model", "model_name_or_path", "backbone", "chat_template_path", "resume_from_checkpoint"), place
    ),
    **dict.fromkeys(("detector", "second_detector", "colors", "depth", "vision", "rewards", "eval_rewards"), place),
    **dict.fromkeys(("lora", "data", "dir"), folder_or_name),
    **dict.fromkeys(("token_file", "from_label_studio"), existing_file),
    "to_label_studio": new_file,
    **dict.fromkeys(("output", "output_dir", "folder"), new_folder),
    **dict.fromkeys(("accelerator_config", "fsdp_config", "deepspeed"), json_settings),
    **dict.fromkeys(
        ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs", "lr_scheduler_kwargs"), json_object
    ),
}


def _check_json(value: str, text: str) -> None:
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{value} is not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise argparse.ArgumentTypeError(f"{value} is not a JSON object")


def _mode(value: str) -> int | None:
    """Returns the mode of the file or folder at a place, or `None` if there is none."""
    if not value.strip():
        raise argparse.ArgumentTypeError("its value is empty")
    try:
        return os.stat(value).st_mode
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            shown = value if len(value) <= 80 else f"{value[:77]}..."
            raise argparse.ArgumentTypeError(f"{shown} cannot be used: {error.strerror}") from None
        return None
    except ValueError as error:  # a null byte, or what is no text
        raise argparse.ArgumentTypeError(f"{value!r} cannot be used: {error}") from None


def _check_link(mode: int | None, value: str) -> None:
    if mode is None and os.path.islink(value):
        raise argparse.ArgumentTypeError(f"{value} is a link to nothing; remove it, or name another place")


def _check_writable(folder: Path, value: str) -> None:
    try:
        check_writable(folder)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"nothing can be written to {value}: {error}") from None


def _describe(mode: int) -> str:
    kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISREG, "a file"), (stat.S_ISFIFO, "a named pipe"))
    return next((words for is_kind, words in kinds if is_kind(mode)), "a device or a socket")
