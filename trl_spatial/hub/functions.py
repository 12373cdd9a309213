"""The user's own functions, named `module:function`."""

import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


_FUNCTION = re.compile(r"[^\W\d][\w.]*:[^\W\d]\w*")


def is_function(name: str) -> bool:
    """Whether a name has the form `module:function`."""
    return _FUNCTION.fullmatch(name) is not None


@contextmanager
def errors_of(note: str) -> Iterator[None]:
    """
    Context or decorator for running a user's code. Every error gets the `note`, which says where it came from. `sys.exit()` becomes a
    `RuntimeError`: it would end the whole program silently, as if it had succeeded.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise
    except Exception as error:
        error.add_note(note)
        raise
    except BaseException as end:
        failure = RuntimeError(
            f"Your code raised {end!r}, which would end the program. Let it return, or raise an `Exception`."
        )
        failure.add_note(note)
        raise failure from end


def load_function(name: str, *, what: str = "function", hint: str = "") -> Callable[..., Any]:
    """
    Imports a function.

    Args:
        name (`str`):
            `module:function`, of a module that Python finds, the current folder included. A class is instantiated
            without arguments.
        what (`str`, *optional*, defaults to `"function"`):
            What errors call it.
        hint (`str`, *optional*):
            What else may be named, for errors.

    Raises:
        `ValueError`: If there is no such module, or nothing of that name in it that can be called.
    """
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        with errors_of(f"It was raised while importing {module_name} for the {what} {name}."):
            module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ValueError(
            f"The {what} {name} cannot be imported: there is no module {error.name!r} in {os.getcwd()} or among the "
            f"installed packages.{hint and f' {hint}'}"
        ) from error
    function: Any = getattr(module, attribute, None)
    if not callable(function):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(
            f"The {what} {name} is not a function: the functions of {module_name} are {', '.join(functions) or 'none'}."
        )
    if inspect.isclass(function):
        with errors_of(f"It was raised while creating the {what} {name}."):
            function = function()
    return function
