"""The argument parser of the commands."""

import argparse
import datetime
import gc
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, field
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

import yaml
from trl.scripts.utils import TrlParser

from ..cli import nearest
from ..yaml_text import load_yaml
from .places import TYPES


MAX_CONFIG_BYTES = 2**20
ATTENTION_FUNCTIONS = ["sdpa", "eager", "flash_attention_2", "flash_attention_3"]
ATTENTION_HELP = "Attention function of the backbone; by default sdpa. FlashAttention needs its package, a GPU and half-precision weights."


@contextmanager
def quick_imports() -> Iterator[None]:
    """
    Makes importing torch and transformers a third faster: the garbage collector skips the many objects that they create and
    keep, both during the import and afterwards.
    """
    num_modules, was_enabled = len(sys.modules), gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > num_modules:
            gc.freeze()
        if was_enabled:
            gc.enable()


def check_device(option: str, name: str | None, *, is_used: bool = True) -> None:
    """
    Checks that the value of an option is a PyTorch device and, if it `is_used` on this machine, that the device exists here.
    The `ValueError` lists the available devices.
    """
    if name is None:
        return
    with quick_imports():
        import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count()
    if accelerator is None:
        advice = "cpu: PyTorch sees no GPU on this machine" if is_used else "cpu, or for example cuda:1"
    else:
        advice = f"cpu or {' or '.join(f'{accelerator.type}:{index}' for index in range(count))}"
    try:
        device = torch.device(name)
        is_here = device.type == "cpu" or (
            accelerator is not None and device.type == accelerator.type and (device.index or 0) < count
        )
        is_known = is_here or not is_used
    except RuntimeError:  # "Expected one of cpu, cuda, ipu, …"
        is_known = False
    if not is_known:
        raise ValueError(f"`{option}` is {name!r}. Use {advice}.")


def argument(*, help: str, default: Any = MISSING, metadata: dict[str, Any] | None = None) -> Any:
    """A field of a dataclass of options, as from transformers' `HfArg`, but without that slow import."""
    return field(default=default, metadata={"help": help, **(metadata or {})})


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


class SpatialParser(TrlParser):
    """
    [`~trl.TrlParser`] with strict checks and short errors.

    Flags cannot be abbreviated, `--config=FILE` works like `--config FILE`, an unknown flag or YAML key is an error that names
    the nearest ones, and a YAML value passes the same checks as a value on the command line (type and choices). `examples` are
    command lines, shown at the end of `--help`; other arguments are those of the parent.
    """

    def __init__(self, dataclass_types: type | Iterable[type] = (), *, examples: str, **kwargs):
        super().__init__(
            [dataclass_types] if isinstance(dataclass_types, type) else list(dataclass_types),
            allow_abbrev=False,
            formatter_class=_HelpFormatter,
            epilog=f"examples:\n{examples.rstrip()}",
            **kwargs,
        )
        self.add_argument(
            "--config",
            metavar="FILE",
            default=argparse.SUPPRESS,
            help="YAML file of options without their dashes; options on the command line take precedence. A mapping under "
            "`env` sets environment variables.",
        )
        self.add_argument(
            "--namespace",
            metavar="ORG",
            default=argparse.SUPPRESS,
            help="User or organization on the Hub that `hub/` stands for in names. By default the environment variable "
            "TRL_SPATIAL_NAMESPACE, or else the logged-in user.",
        )

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        """As the parent's; an option that names a file or a folder gets its type from [`~scripts.places.TYPES`]."""
        action = super().add_argument(*names, **options)
        if action.type in (None, str) and action.nargs != 0:
            action.type = TYPES.get(action.dest, action.type)
        return action

    def add_checkpoint_arguments(self, what: str) -> None:
        """Add the options that say which reward model is loaded."""
        self.add_argument(
            "--model",
            required=True,
            help=f"{what}: a folder, or a name on the Hub (ORG/NAME, ORG/NAME@REVISION, hub/NAME).",
        )
        self.add_argument("--revision", help="Branch, tag or commit of the checkpoint on the Hub.")
        self.add_argument(
            "--backbone", help="Folder or Hub id of the backbone, if it is not where the checkpoint says."
        )
        dtypes = ["auto", "bfloat16", "float16", "float32"]
        self.add_argument("--dtype", default="auto", choices=dtypes, help="Type of the weights.")

    def add_attention_argument(self) -> None:
        """Add the option that says how a reward model attends."""
        self.add_argument("--attn_implementation", choices=ATTENTION_FUNCTIONS, help=ATTENTION_HELP)

    def parse_args_and_config(self, args: list[str] | None = None, *, is_launched: bool = False) -> tuple[Any, ...]:
        """
        Parse command-line arguments and the YAML file they name. A mistake ends the program with exit code 2.

        Under `accelerate launch` (`is_launched`) the file may also hold options of the launcher, which has read them already.
        Returns one instance per dataclass, then a namespace of the other arguments if there are any.
        """
        args, config, path = self._read_config(list(sys.argv[1:] if args is None else args))
        launcher = None
        if is_launched and config:
            from accelerate.commands.launch import launch_command_parser

            launcher = launch_command_parser()
        self._chosen_parser(args)._check(args, config, path, launcher)
        try:
            *values, unknown = self.parse_args_into_dataclasses(
                args, return_remaining_strings=True, look_for_args_file=False
            )
        except ValueError as error:  # a dataclass rejected its values
            self.error(str(error))
        if unknown:
            self.error(f"unexpected argument {unknown[0]!r}")
        return tuple(values)

    def split_launch_args(self, args: list[str], launcher: argparse.ArgumentParser) -> tuple[list[str], list[str]]:
        """
        Separate the arguments of `accelerate launch`, whose parser is `launcher`, from the script's; returns both. Launcher
        options in the YAML file count as the launcher's.
        """
        from trl.cli.accelerate_config import resolve_accelerate_config_argument

        own_args, config, path = self._read_config(args)
        launch_args: list[str] = []
        for key in self._check(own_args, config, path, launcher):
            if config[key] is not False:
                launch_args += [f"--{key}"] if config[key] is True else [f"--{key}", str(config[key])]
        _, left_over = self.parse_known_args(own_args)
        for token in left_over:
            launch_args += token.split("=", 1) if token.startswith("--accelerate_config=") else [token]
        launcher.error = self.error  # type: ignore[method-assign]  # argparse's own prints a hundred options first
        try:
            launch_args = resolve_accelerate_config_argument(launch_args)
        except ValueError as error:
            self.error(str(error))
        stray = launcher.parse_args([*launch_args, "SCRIPT"]).training_script
        if stray != "SCRIPT":
            self.error(f"unexpected argument {stray!r}")

        remaining = [*reversed(left_over)]  # an ordered subsequence of args
        script_args = [token for token in args if not (remaining and token == remaining[-1] and remaining.pop())]
        return launch_args, script_args

    def error(self, message: str) -> NoReturn:
        # argparse would print the usage first: hundreds of options for a training command
        print(f"{self.prog}: error: {message}\n{self.prog} --help lists the options", file=sys.stderr)
        raise SystemExit(2)

    def _chosen_parser(self, args: list[str]) -> "SpatialParser":
        """
        Return the parser of the action that `args` begin with, as in `data make`, or this one if there are no actions.
        """
        word = next((token for token in args if not token.startswith("-")), None)
        parsers: Any = next((a.choices for a in self._actions if isinstance(a, argparse._SubParsersAction)), None)
        if parsers is None or word is None:
            return self
        if word not in parsers:
            self.error(f"unknown action {word!r}{nearest(word, parsers)}; choose from {', '.join(parsers)}")
        return parsers[word]

    def _read_config(self, args: list[str]) -> tuple[list[str], dict[str, Any], str]:
        """
        Take `--config FILE` and `--namespace ORG` out of `args` and read the file. Returns the other arguments, the
        mapping in the file, and its path. The namespace and the variables of `env` are set in the environment, where
        `trl_spatial.hub` reads the namespace.
        """
        first = argparse.ArgumentParser(prog=self.prog, add_help=False, allow_abbrev=False)
        first.error = self.error  # type: ignore[method-assign]
        for option in ("--config", "--namespace"):
            first.add_argument(option, action="append", default=[])
        given, others = first.parse_known_args(args)
        if len(given.config) > 1 or len(given.namespace) > 1 or "" in given.config + given.namespace:
            self.error("--config takes one YAML file, --namespace one user or organization on the Hub")
        path, config = (given.config[0], self._load_yaml(given.config[0])) if given.config else ("", {})
        namespace = config.pop("namespace", None)
        variables = config.pop("env", {})
        if not isinstance(variables, dict) or not all(isinstance(v, str | int | float) for v in variables.values()):
            self.error(f"{path}: `env` must be a mapping from environment variables to values")
        if not isinstance(namespace, str | None):
            self.error(f"{path}: namespace: expected one value, got {namespace!r}")
        if given.namespace or namespace is not None:
            from ..hub.references import NAMESPACE_VARIABLE

            variables |= {NAMESPACE_VARIABLE: given.namespace[0] if given.namespace else namespace}
        try:
            os.environ.update({str(name): str(value) for name, value in variables.items()})
        except (OSError, ValueError) as error:
            self.error(f"{path}: env: {error}")
        return others, config, path

    def _load_yaml(self, path: str) -> dict[str, Any]:
        try:
            if Path(path).exists() and not Path(path).is_file():  # reading a pipe or a device might never end
                self.error(f"{path} is not a file")
            if Path(path).stat().st_size > MAX_CONFIG_BYTES:
                self.error(f"{path} is larger than {MAX_CONFIG_BYTES:,} bytes: it is not a file of options")
            config = load_yaml(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            self.error(f"{path}, the file of --config, cannot be read: {reason}")
        if not isinstance(config, dict):
            self.error(f"{path}: expected a mapping from options to values")
        return config

    def _check(
        self, args: list[str], config: dict[str, Any], path: str, launcher: argparse.ArgumentParser | None
    ) -> list[str]:
        """Reject unknown flags and YAML keys; make the YAML values the defaults. Returns the launcher's keys."""
        launcher_keys: set[str] = set()
        if launcher is not None:
            launcher_keys = {"accelerate_config", *vars(launcher.parse_args(["SCRIPT"]))}
            launcher_keys -= {"training_script", "training_script_args"}
        flags = {*self._option_string_actions}
        flags |= {flag for key in launcher_keys for flag in (f"--{key}", f"--{key.replace('_', '-')}")}
        lists: set[str] = set()
        for token in args:
            flag = token.split("=")[0]
            option = self._option_string_actions.get(flag)
            if option is not None and option.nargs in ("+", "*"):
                if option.dest in lists:  # argparse would keep the second list and drop the first
                    self.error(f"{flag} is given twice; give all of its values once: {flag} VALUE VALUE")
                lists.add(option.dest)
            if flag.startswith("--") and flag != "--" and " " not in flag and flag not in flags:
                self.error(f"unknown option {flag}{nearest(flag, flags)}")
        # `--use_peft` and `--no_use_peft` share a name, which means the first
        options = {option.dest: option for option in reversed(self._actions)}
        own_keys = options.keys() - {"help", "config", "namespace", "action"}
        for key in config:
            if key not in own_keys | launcher_keys:
                self.error(f"{path}: unknown key {key!r}{nearest(str(key), own_keys | launcher_keys)}")
        own = {key: self._as_given(options[key], config[key], f"{path}: {key}") for key in config if key in own_keys}
        self.set_defaults_with_config(**own)
        return [key for key in config if key not in own]

    def _as_given(self, option: argparse.Action, value: Any, where: str) -> Any:
        """Check and convert a value of the YAML file as if it had been given on the command line."""
        number = option.nargs
        hints = [get_type_hints(dataclass_type).get(option.dest) for dataclass_type in self.dataclass_types]
        kinds = {get_origin(member) or member for hint in hints for member in (hint, *get_args(hint))}
        if number is None and type(value) in kinds & {dict, list}:  # as for `str | dict` and `str | list[str]`
            return value
        if number == 0:
            return value if isinstance(value, bool) else self.error(f"{where}: expected true or false, got {value!r}")
        if value is None and option.default is None:
            return None
        takes_many = number in ("+", "*") or isinstance(number, int)
        values = value if isinstance(value, list) and takes_many else [value]
        # as a shell does
        values = [os.path.expanduser(item) if isinstance(item, str) and item[:2] == "~/" else item for item in values]
        if not all(isinstance(item, str | int | float | datetime.date | None) for item in values):
            self.error(f"{where}: expected {'values' if takes_many else 'one value'}, got {value!r}")
        if len(values) != number if isinstance(number, int) else number == "+" and not values:
            self.error(f"{where}: expected {number if values else 'some'} values, got {value!r}")
        probe = argparse.ArgumentParser(add_help=False, exit_on_error=False)
        probe.add_argument("--value", type=option.type or str, choices=option.choices)
        try:
            given = [probe.parse_args([f"--value={'null' if item is None else item}"]).value for item in values]
        except argparse.ArgumentError as error:
            hint = " (YAML reads a bare yes, no, on or off as true or false: quote it)"
            problem = "a value is missing" if None in values else error.message
            self.error(f"{where}: {problem}{hint if isinstance(value, bool) else ''}")
        # an option that accepts `null` has read the word as None; any other one would take it as text
        if None in values and given != [None]:
            self.error(f"{where}: a value is missing")
        return given if takes_many else given[0]
