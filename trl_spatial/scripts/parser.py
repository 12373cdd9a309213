"""The argument parser of the commands."""

import argparse
import gc
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml
from trl.scripts.utils import TrlParser

from ..cli import nearest
from ..hub.references import NAMESPACE_VARIABLE


@contextmanager
def quick_imports() -> Iterator[None]:
    """
    A context for imports of torch and what stands on it, which take a third less: the garbage collector does not search the
    many objects that they make and keep, neither meanwhile nor afterwards.
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


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


class SpatialParser(TrlParser):
    """
    [`~trl.TrlParser`] that says what is wrong.

    It differs from its parent in that a flag cannot be abbreviated, `--config=FILE` works like `--config FILE`, an unknown
    flag or YAML key is an error that names the nearest ones, and a YAML value passes the same checks as a value on the
    command line (type and choices).

    Args:
        dataclass_types (dataclass or iterable of dataclasses, *optional*):
            Dataclasses whose fields become options.
        examples (`str`):
            Command lines, shown at the end of `--help`.
        **kwargs:
            As for [`argparse.ArgumentParser`].
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
            help="YAML file of options without their dashes; options on the command line win. A mapping under `env` "
            "sets environment variables.",
        )
        self.add_argument(
            "--namespace",
            metavar="ORG",
            default=argparse.SUPPRESS,
            help="User or organization on the Hub that `hub/` stands for in names. By default TRL_SPATIAL_NAMESPACE of the "
            "environment, else the logged-in user.",
        )

    def parse_args_and_config(self, args: list[str] | None = None, *, is_launched: bool = False) -> tuple[Any, ...]:
        """
        Parse command-line arguments and the YAML file they name.

        Args:
            args (`list[str]`, *optional*):
                Arguments; default: `sys.argv[1:]`.
            is_launched (`bool`, *optional*, defaults to `False`):
                Whether the script runs under `accelerate launch`, so that its YAML file may also hold options of the
                launcher (which has read them already).

        Returns:
            One instance per dataclass, then a namespace of the other arguments if there are any. A mistake ends the
            program with exit code 2.
        """
        args, config, config_path = self._read_config(list(sys.argv[1:] if args is None else args))
        self._fail_on_unknown_flag(args, self._flags())
        unknown_keys = self._set_config_defaults(config, config_path)
        try:
            *values, unknown = self.parse_args_into_dataclasses(args=args, return_remaining_strings=True)
        except ValueError as error:  # a dataclass refuses its values
            self.error(str(error))
        if unknown_keys and is_launched:
            from accelerate.commands.launch import launch_command_parser

            launcher_flags = _launcher_flags(launch_command_parser())
        else:
            launcher_flags = set()
        self._fail_on_unknown_keys(unknown_keys, launcher_flags, config_path)
        if unknown:
            self.error(f"unexpected argument {unknown[0]!r}")
        return tuple(values)

    def split_launch_args(self, args: list[str], launcher: argparse.ArgumentParser) -> tuple[list[str], list[str]]:
        """
        Separate the launcher's arguments from the script's.

        Args:
            args (`list[str]`):
                Arguments of both, in any order. Keys of the YAML file that are options of the launcher go to it too.
            launcher ([`argparse.ArgumentParser`]):
                Parser of `accelerate launch`.

        Returns:
            `tuple[list[str], list[str]]`: the launcher's and the script's arguments.
        """
        from trl.cli.accelerate_config import resolve_accelerate_config_argument

        launcher_flags = _launcher_flags(launcher)
        own_args, config, config_path = self._read_config(args)
        self._fail_on_unknown_flag(own_args, self._flags() | launcher_flags)
        unknown_keys = self._set_config_defaults(config, config_path)
        _, left_over = self.parse_known_args(own_args)

        self._fail_on_unknown_keys(unknown_keys, launcher_flags, config_path)
        from_config: list[str] = []
        for key in unknown_keys:
            if config[key] is True:
                from_config += [f"--{key}"]
            elif config[key] is not False:
                from_config += [f"--{key}", str(config[key])]

        launch_args = [
            part
            for token in from_config + left_over
            for part in (token.split("=", 1) if token.startswith("--accelerate_config=") else [token])
        ]
        try:
            launch_args = resolve_accelerate_config_argument(launch_args)
        except ValueError as error:
            self.error(str(error))
        stray = launcher.parse_args([*launch_args, "SCRIPT"]).training_script
        if stray != "SCRIPT":
            self.error(f"unexpected argument {stray!r}")

        remaining = iter(left_over)
        expected = next(remaining, None)
        script_args = []
        for token in args:  # left_over is an ordered subsequence of args
            if token == expected:
                expected = next(remaining, None)
            else:
                script_args.append(token)
        return launch_args, script_args

    def error(self, message: str) -> NoReturn:
        # argparse prints the usage first: hundreds of options for a training command
        print(f"{self.prog}: error: {message}\n{self.prog} --help lists the options", file=sys.stderr)
        raise SystemExit(2)

    def _fail_on_unknown_flag(self, args: list[str], flags: set[str]) -> None:
        for token in args:
            flag = token.split("=")[0]
            if flag.startswith("--") and " " not in flag and flag not in flags:
                self.error(f"unknown option {flag}{nearest(flag, flags)}")

    def _fail_on_unknown_keys(self, keys: list[str], launcher_flags: set[str], config_path: str | None) -> None:
        for key in keys:
            if f"--{key}" not in launcher_flags:
                candidates = self._keys() | {flag.removeprefix("--") for flag in launcher_flags}
                self.error(f"{config_path}: unknown key {key!r}{nearest(str(key), candidates)}")

    def _all_actions(self) -> Iterator[tuple["SpatialParser", argparse.Action]]:
        for action in self._actions:
            yield self, action
            if isinstance(action, argparse._SubParsersAction):
                for subparser in action.choices.values():
                    yield from subparser._all_actions()

    def _keys(self) -> set[str]:
        return {action.dest for _, action in self._all_actions()} - {"help", "config"}

    def _flags(self) -> set[str]:
        return {flag for _, action in self._all_actions() for flag in action.option_strings}

    def _read_config(self, args: list[str]) -> tuple[list[str], dict[str, Any], str | None]:
        """
        Take `--config FILE` and `--namespace ORG` out of `args` and read the file: the other arguments, the file's mapping and
        its path. The namespace goes to the environment, where the Hub's part of the package looks for it.
        """
        others, namespaces = _take_option(args, "--namespace")
        others, paths = _take_option(others, "--config")
        if not paths:
            self._set_namespace(namespaces)
            return others, {}, None
        if len(paths) > 1 or not paths[0]:
            self.error("--config takes one YAML file")
        try:
            config = yaml.safe_load(Path(paths[0]).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            self.error(f"{paths[0]} cannot be read: {error}")
        if not isinstance(config, dict):
            self.error(f"{paths[0]}: expected a mapping from options to values")
        variables = config.pop("env", {})
        if not isinstance(variables, dict):
            self.error(f"{paths[0]}: `env` must be a mapping from environment variables to values")
        os.environ.update({name: str(value) for name, value in variables.items()})
        self._set_namespace(namespaces or ([str(config["namespace"])] if "namespace" in config else []))
        config.pop("namespace", None)
        return others, config, paths[0]

    def _set_namespace(self, namespaces: list[str]) -> None:
        if len(namespaces) > 1 or "" in namespaces:
            self.error("--namespace takes one user or organization on the Hub")
        for namespace in namespaces:
            os.environ[NAMESPACE_VARIABLE] = namespace

    def _set_config_defaults(self, config: dict[str, Any], config_path: str | None) -> list[str]:
        """Make the YAML file's values the parser's defaults; returns the keys that are not options of the parser."""
        actions: dict[str, tuple[SpatialParser, argparse.Action]] = {}
        for owner, action in self._all_actions():
            actions.setdefault(action.dest, (owner, action))
        values = {
            key: self._check_config_value(*actions[key], value, f"{config_path}: {key}")
            for key, value in config.items()
            if key in self._keys()
        }
        self.set_defaults_with_config(**values)
        return [key for key in config if key not in values]

    def _check_config_value(self, owner: "SpatialParser", action: argparse.Action, value: Any, where: str) -> Any:
        """`value` as it would come from the command line."""
        if isinstance(value, (dict, list)) and type(value) in self._containers(action.dest):
            return value
        if value is None:
            takes_none = action.default is None or (callable(action.type) and _is_none(action.type))
            return value if takes_none else self.error(f"{where}: a value is missing")
        if action.nargs == 0:
            return value if isinstance(value, bool) else self.error(f"{where}: expected true or false, got {value!r}")
        takes_many = action.nargs in ("+", "*") or isinstance(action.nargs, int)
        values = value if isinstance(value, list) and takes_many else [value]
        if any(isinstance(item, (dict, list)) for item in values):
            self.error(f"{where}: expected {'values' if takes_many else 'one value'}, got {value!r}")
        if isinstance(action.nargs, int) and len(values) != action.nargs:
            self.error(f"{where}: expected {action.nargs} values, got {value!r}")
        try:
            return owner._get_values(action, [str(item) for item in values])
        except argparse.ArgumentError as error:
            hint = (
                " (YAML reads a bare yes, no, on or off as true or false: quote it)" if isinstance(value, bool) else ""
            )
            self.error(f"{where}: {error.message}{hint}")

    def _containers(self, name: str) -> set[type]:
        """Which of `dict` and `list` a dataclass field takes as it stands (options with several values aside)."""
        for dataclass_type in self.dataclass_types:
            hint = get_type_hints(dataclass_type).get(name)
            members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
            kinds = {get_origin(member) or member for member in members}
            if dict in kinds or (list in kinds and str in kinds):
                return kinds & {dict, list}
        return set()


def _take_option(args: list[str], option: str) -> tuple[list[str], list[str]]:
    """The other arguments, and the values that the option has been given: `""` for none."""
    others: list[str] = []
    values: list[str] = []
    tokens = iter(args)
    for token in tokens:
        if token == option:
            values.append(next(tokens, ""))
        elif token.startswith(f"{option}="):
            values.append(token.removeprefix(f"{option}="))
        else:
            others.append(token)
    return others, values


def _launcher_flags(launcher: argparse.ArgumentParser) -> set[str]:
    return {"--accelerate_config", *(flag for flag in launcher._option_string_actions if flag.startswith("--"))}


def _is_none(convert: Any) -> bool:
    try:
        return convert("none") is None
    except (TypeError, ValueError, argparse.ArgumentTypeError):
        return False
