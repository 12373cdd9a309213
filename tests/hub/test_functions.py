"""Code of the user's: whatever it raises is an error that says where it is from, and nothing but Ctrl-C ends the program."""

import asyncio
import sys

import pytest
from PIL import Image

from trl_spatial.cli import run_command
from trl_spatial.diffusion_grpo.reward_functions import RewardFunctions
from trl_spatial.evaluation.scorers.function import FunctionScorer
from trl_spatial.hub.functions import errors_of, load_function
from trl_spatial.judges.loading import load_colors, load_depth, load_detector
from trl_spatial.judges.vision import FunctionVision
from trl_spatial.rewards import load_reward


IMAGE = Image.new("RGB", (8, 8))
# Everything that a user can give a function for, and a call of it
CALLS = {
    "reward": lambda name: RewardFunctions(load_reward(name))(["a"], [IMAGE]),
    "scorer": lambda name: FunctionScorer(name).score(["a"], [IMAGE]),
    "detector": lambda name: load_detector(name)([IMAGE]),
    "depth": lambda name: load_depth(name)(IMAGE),
    "colors": lambda name: load_colors(name)(IMAGE, "cat"),
    "judge": lambda name: FunctionVision(name).answer(IMAGE, "Is it red?"),
}
NOTE = "The reward function `length` raised this error."


def raising(error):
    def function(*args):
        raise error

    return function


@pytest.fixture
def write_module(tmp_path, monkeypatch):
    """A function that writes a module of the user's, which no other test has imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)

    return write


@pytest.mark.parametrize("exit", [SystemExit(), SystemExit(0), SystemExit(3), asyncio.CancelledError("late")])
def test_what_would_end_the_program_is_an_error_of_the_function(exit, capsys):
    assert run_command("trl_spatial grpo", errors_of(NOTE)(raising(exit))) == 1
    error = capsys.readouterr().err
    assert repr(exit) in error and NOTE in error and "Traceback" not in error


@pytest.mark.parametrize("error", [KeyError("scene"), StopIteration(), ConnectionError("gone")])
def test_errors_stay_what_they_are(error):
    with pytest.raises(type(error)) as raised, errors_of(NOTE):
        raise error
    assert raised.value is error and error.__notes__ == [NOTE]


def test_ctrl_c_interrupts(capsys):
    assert run_command("trl_spatial grpo", errors_of(NOTE)(raising(KeyboardInterrupt()))) == 130
    assert "error" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["import sys\nsys.exit()\n", "class length:\n    def __init__(self):\n        raise SystemExit(0)\n"]
)
def test_a_module_that_ends_the_program_is_named(write_module, text):
    """As a script does that has no `if __name__ == "__main__"`."""
    write_module("a_script", text)
    with pytest.raises(RuntimeError, match="raised SystemExit") as raised:
        load_function("a_script:length", what="reward")
    assert "the reward a_script:length" in raised.value.__notes__[0]


def test_a_module_whose_own_import_is_missing_says_so(write_module):
    write_module("needs_another", "import no_such_package\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_package") as raised:
        load_function("needs_another:length", what="reward")
    assert "while importing needs_another" in raised.value.__notes__[0]
    with pytest.raises(ValueError, match="there is no module 'no_such_module'"):
        load_function("no_such_module:length")


@pytest.mark.parametrize("kind", CALLS)
def test_every_function_of_the_user_is_named_when_it_ends_the_program(kind, write_module):
    write_module("leaves", "def at_once(*args, **kwargs):\n    raise SystemExit(0)\n")
    with pytest.raises(RuntimeError, match=r"raised SystemExit\(0\)") as raised:
        CALLS[kind]("leaves:at_once")
    assert "at_once" in raised.value.__notes__[0]
