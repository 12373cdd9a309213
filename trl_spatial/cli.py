"""`trl_spatial <command>`: a command is a module of `trl_spatial.scripts` with `make_parser()` and `main()`.

Only the standard library is imported here, so that `trl_spatial --help` answers at once; a command's module, and with it
torch and transformers, is imported when the command runs.
"""

import argparse
import difflib
import importlib
import io
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from . import __version__


COMMANDS = {
    "demo": "the whole method in a small world: reward model, reinforcement learning, an exact judge, a report",
    "reward": "train a spatial reward model on preference pairs",
    "grpo": "fine-tune FLUX.1, Qwen-Image, Stable Diffusion 3 or Z-Image with rewards for their images",
    "nft": "the same with DiffusionNFT's loss, on images drawn without noise",
    "dpo": "fine-tune the same models on preference pairs",
    "score": "score images for prompts with a trained reward model",
    "merge": "fold a checkpoint's LoRA adapter into its backbone",
    "data": "build, make and validate datasets of preference pairs",
    "evaluate": "measure image scorers on preference pairs, and generators on benchmarks",
    "push": "upload a model, a dataset or a Space to the Hub, with its card",
    "serve": "score images over HTTP: a reward in its own process",
    "space": "build or run a page that scores images",
}
# Training commands also take the arguments of `accelerate launch`, as in TRL's CLI.
LAUNCHED_COMMANDS = {"reward", "grpo", "nft", "dpo"}
# Run again after an interruption, these continue from what is on disk.
RESUMED_COMMANDS = {"data", "demo", "evaluate", "push"}
# Process id of the launcher, set for the processes that it launches.
LAUNCHER_VARIABLE = "TRL_SPATIAL_LAUNCHER"
TRACEBACK_VARIABLE = "TRL_SPATIAL_TRACEBACK"
# Time for training processes to save and end after SIGTERM or SIGINT, the same as torch.distributed allows.
GRACE_SECONDS = 30.0

EXAMPLES = """\
examples:
  trl_spatial demo
  trl_spatial reward --dataset ORG/SpatialReward --output_dir SpatialScore-7B
  trl_spatial grpo --dataset prompts.txt --rewards SpatialScore-7B --output_dir FLUX.1-dev-SpatialScore
  trl_spatial dpo --dataset ORG/SpatialReward --output_dir FLUX.1-dev-DPO
  trl_spatial score --model SpatialScore-7B --prompt "a red cup to the left of a blue book" cup.png
  trl_spatial push SpatialScore-7B --to hub/SpatialScore-7B
  trl_spatial COMMAND --help

No command sends usage statistics: HF_HUB_DISABLE_TELEMETRY=1 and HF_UPDATE_DOWNLOAD_COUNTS=0 are set unless the environment
already sets them. TRL_SPATIAL_TRACEBACK=1 shows where an error comes from. Exit codes: 1 error, 2 usage, 130 interrupted.
"""


def nearest(word: str, candidates: Iterable[str]) -> str:
    """Text that suggests the candidates most like `word`; empty if none is close."""
    # --batch-size and --batch_size are the same option: suggest the documented spelling
    by_name = {candidate.lstrip("-").replace("-", "_"): candidate for candidate in sorted(candidates)}
    matches = difflib.get_close_matches(word.lstrip("-").replace("-", "_"), by_name, n=3, cutoff=0.7)
    return f"; did you mean {' or '.join(by_name[match] for match in matches)}?" if matches else ""


def make_parser() -> argparse.ArgumentParser:
    """The parser of `trl_spatial` itself, which lists the commands; each command has its own."""
    commands = "\n".join(f"  {name:<9} {text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="trl_spatial",
        usage="trl_spatial COMMAND [OPTIONS]",
        description=f"Spatial reward models and reinforcement learning for text-to-image models.\n\ncommands:\n{commands}",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"trl_spatial {__version__}")
    return parser


def prepare_environment() -> None:
    """
    Set environment variables that libraries read when they are imported, unless the user has set them.

    Telemetry is off: TRL's and the Hub's, and a call of `datasets` for every local file. Idle OpenMP threads
    spin for a short time only: libgomp's default starves training on a machine that has other work, and sleeping at once
    (`OMP_WAIT_POLICY=passive`) slows it down on one that has none.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")


def write_line(text: str) -> None:
    """Print to stderr on a line of its own, not behind a progress bar. tqdm is only asked where something has imported it."""
    bars = sys.modules.get("tqdm.std")
    write = print if bars is None else bars.tqdm.write
    write(text, file=sys.stderr)


class LineHandler(logging.Handler):
    """Writes log records with [`write_line`]."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            write_line(self.format(record))
        except OSError:  # nobody reads stderr any more
            self.handleError(record)


def run_command(prog: str, function: Callable[[], int | None]) -> int:
    """
    Run a command so that an error is a message, not a traceback: the one place where that is decided.

    `prog` is the name of the command, such as `"trl_spatial score"`. Returns the exit code: 0, 1 after an error, 130 after Ctrl-C,
    or what the command returned. With `TRL_SPATIAL_TRACEBACK` in the environment, the error is raised instead.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # an ASCII-only terminal must not lose a result
    logging.lastResort = LineHandler(logging.WARNING)  # for loggers that nobody has configured
    # it says which file of the cache another process has locked, and for how long
    logging.getLogger("huggingface_hub.utils._fixes").setLevel(logging.INFO)
    try:
        return function() or 0
    except KeyboardInterrupt as error:
        continues = "; run the same command again to continue" if prog.split()[-1] in RESUMED_COMMANDS else ""
        print(f"\n{prog}: {str(error) or f'interrupted{continues}'}", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader of the output, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if TRACEBACK_VARIABLE in os.environ:
            raise
        text = str(error).strip()
        if not text or not isinstance(error, (OSError, ValueError, RuntimeError, ImportError)):
            text = ": ".join(part for part in (type(error).__name__, text, str(error.__cause__ or "")) if part)
        text = "\n".join([text, *getattr(error, "__notes__", ())])
        write_line(f"{prog}: error: {text}\n(set {TRACEBACK_VARIABLE}=1 to see where)")
        return 1


def launch(command: str, argv: list[str]) -> int:
    """Train in this process or, if it is needed, through `accelerate launch`, whose options may be among the arguments."""
    script = importlib.import_module(f"{__package__}.scripts.{command}")
    if {"-h", "--help", "--help_all"} & set(argv):
        script.make_parser(is_brief="--help_all" not in argv).print_help()
        return 0

    import torch
    from accelerate.commands.config import default_config_file
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    launcher, parser = launch_command_parser(), script.make_parser()
    variables = dict(os.environ)
    launch_args, script_args = parser.split_launch_args(argv, launcher)
    if not (
        launch_args
        or variables != dict(os.environ)  # variables set by the YAML file must be there before torch is imported
        or os.path.isfile(default_config_file)
        or torch.accelerator.device_count() > 1
    ):
        return script.main(*parser.parse_args_and_config(argv))

    args = launcher.parse_args([*launch_args, "--module", str(__package__), command, *script_args])
    if TRACEBACK_VARIABLE not in os.environ:
        importlib.import_module("torch.distributed.run")  # creates the loggers
        for name in list(logging.root.manager.loggerDict):
            if name.startswith("torch.distributed.elastic"):
                logging.getLogger(name).setLevel(logging.CRITICAL)  # the script prints the reason
    try:
        with signals_passed_on() as received:
            launch_command(args)
    except SignalException as error:
        return 128 + error.sigval
    except subprocess.CalledProcessError as error:
        code = error.returncode
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
    else:
        code = 0
    if received:
        return 128 + received[0]
    if code < 0:
        raise RuntimeError(f"a training process was ended by {signal.Signals(-code).name}")
    return code


@contextmanager
def signals_passed_on() -> Iterator[list[int]]:
    """
    A context in which SIGINT and SIGTERM are passed on to the processes that this one has started; those that have not
    ended after `GRACE_SECONDS` are killed. Yields a list of the received signals. (With several training processes,
    torch.distributed replaces these handlers by its own, which do the same.)
    """
    import psutil

    received: list[int] = []

    def send(number: int) -> None:
        for child in psutil.Process().children():
            child.send_signal(number)

    def handle(number: int, frame: Any) -> None:
        received.append(number)
        if not psutil.Process().children():
            raise SystemExit(128 + number)
        send(number)
        timer = threading.Timer(GRACE_SECONDS, send, (signal.SIGKILL,))
        timer.daemon = True
        timer.start()

    os.environ[LAUNCHER_VARIABLE] = str(os.getpid())
    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        del os.environ[LAUNCHER_VARIABLE]
        for number, handler in previous.items():
            signal.signal(number, handler)


def follow_launcher(launcher: int) -> None:
    """End this process by SIGTERM, and after `GRACE_SECONDS` by SIGKILL, once the launcher that started it is gone."""
    parent = os.getppid() if os.getppid() > 1 else launcher

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    if "LOCAL_RANK" not in os.environ:
        os.setpgid(0, 0)  # as torch.distributed does: Ctrl-C then reaches only the launcher, which passes it on once


def start(command: str, argv: list[str]) -> int | None:
    """Parse the arguments of a command and run it."""
    launcher = os.environ.pop(LAUNCHER_VARIABLE, None)
    if launcher is not None:
        follow_launcher(int(launcher))
    is_launched = command in LAUNCHED_COMMANDS and (launcher is not None or "LOCAL_RANK" in os.environ)
    if command in LAUNCHED_COMMANDS and not is_launched:
        return launch(command, argv)
    script = importlib.import_module(f"{__package__}.scripts.{command}")
    return script.main(*script.make_parser().parse_args_and_config(argv, is_launched=is_launched))


def main(argv: list[str] | None = None) -> int:
    """Run the CLI; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    prepare_environment()
    parser = make_parser()
    if not argv:
        parser.print_help()
        return 0
    command, *argv = argv
    if command.startswith("-"):
        _, unknown = parser.parse_known_args([command])
        if unknown:
            parser.error(f"unknown option {command}{nearest(command, ['--help', '--version'])}")
    if command not in COMMANDS:
        parser.error(f"unknown command {command!r}{nearest(command, COMMANDS)}\ncommands: {', '.join(COMMANDS)}")
    return run_command(f"trl_spatial {command}", lambda: start(command, argv))
