"""
The parser of a training command, with help that needs no slow imports.

The configuration is a dataclass that inherits from transformers', whose import imports torch. For the help, the
options that this package declares are read from the source.
"""

import ast
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

from .parser import SpatialParser, quick_imports


PACKAGE = Path(__file__).parents[1]


def training_parser(dataclass_types: Iterable[type], config: str, *, is_brief: bool, **kwargs: Any) -> SpatialParser:
    """
    Makes the parser of a command that trains.

    Args:
        dataclass_types (`Iterable[type]`):
            Dataclasses of options beside the configuration.
        config (`str`):
            The configuration, `"MODULE:CLASS"` within this package.
        is_brief (`bool`):
            Whether the parser is only asked for its help, which then leaves out what the configuration inherits.
        **kwargs:
            Arguments of [`SpatialParser`].
    """
    module, _, name = config.partition(":")
    if not is_brief:
        with quick_imports():
            config_class = getattr(import_module(f"..{module}", __package__), name)
        return SpatialParser([*dataclass_types, config_class], **kwargs)
    parser = SpatialParser(dataclass_types, **kwargs)
    group = parser.add_argument_group(
        "training options",
        "Listed here are the package's own. Those of transformers' TrainingArguments work too, such as --output_dir, --max_steps,\n"
        "--save_steps and --resume_from_checkpoint: `--help_all` lists them all, `accelerate launch --help` the launcher's.",
    )
    for option, (default, text) in declared_options(module, name).items():
        group.add_argument(f"--{option}", metavar=option.upper(), default=default, help=text)
    return parser


def declared_options(module: str, name: str) -> dict[str, tuple[Any, str]]:
    """
    Default and help text of every field that a dataclass of this package declares, or that it inherits from one of this package,
    in their order. Nothing is imported.
    """
    tree = ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
    (definition,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.level > 0]
    modules = {
        alias.name: [*module.split(".")[: -node.level], str(node.module)] for node in imports for alias in node.names
    }
    options: dict[str, tuple[Any, str]] = {}
    for base in definition.bases:
        if isinstance(base, ast.Name) and base.id in modules:
            options |= declared_options(".".join(modules[base.id]), base.id)
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(node.value, ast.Call):
            options[node.target.id] = _default_and_help(node.value)
    return options


def _default_and_help(call: ast.Call) -> tuple[Any, str]:
    """Return default and help of `field(default=..., metadata={"help": ...})` or `option(default, help, ...)`."""
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    if "metadata" not in keywords:
        default, text = call.args[:2]
    else:
        metadata = keywords["metadata"]
        assert isinstance(metadata, ast.Dict)
        names = [ast.literal_eval(key) for key in metadata.keys if key is not None]
        default, text = keywords["default"], metadata.values[names.index("help")]
    return ast.literal_eval(default), ast.literal_eval(text)
