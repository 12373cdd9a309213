"""Damaged and malicious command lines and YAML files: a short message and exit code 1 or 2, and nothing else."""

import importlib
import os
import shlex

import pytest

from trl_spatial.cli import COMMANDS, main


REQUIRED = {
    "demo": "",
    "reward": "--dataset nowhere --output_dir out --use_cpu",
    "grpo": "--dataset nowhere.txt --rewards rules --output_dir out --use_cpu",
    "nft": "--dataset nowhere.txt --rewards rules --output_dir out --use_cpu",
    "dpo": "--dataset nowhere --output_dir out --use_cpu",
    "score": "--model nowhere --prompt a x.png",
    "merge": "--model nowhere --output merged",
    "data": "make --num_pairs 1 --output pairs",
    "evaluate": "images --benchmark visor --data example --images nowhere --detector flat --output_dir out",
    "push": "nowhere --to org/name",
    "serve": "--model nowhere",
    "space": "build folder --model org/name",
}
# what is wrong with each of them is in the command line itself
LINES = [
    "--no_such_option", "--no_such_option=1", "--=", "---", "-Z", "--config", "--config=", "--config nowhere.yaml",
    "--config .", "--config /dev/zero", "--config pipe", "--config a --config b", "--namespace", "--namespace=",
    "--config 'a\x01b'", f"--config {'x' * 5000}", "--prompt\u2028", "--con nowhere.yaml", "--config nul.yaml",
]  # fmt: skip
YAMLS = {
    "empty": "", "list": "- a", "text": "hello", "open": "a: [", "tab": "a:\n\t- b", "binary": "\x00\x01", "deep": "[" * 20000,
    "tag": "!!python/object/apply:os.system ['touch hacked']", "unknown": "no_such_key: 1", "number": "1: 2", "none": "null: 1",
    "nested": "seed: {a: {b: c}}", "env": "env: [1]", "env_value": "env: {A: [1]}", "env_name": "env: {'A=B': 1}",
    "env_none": "env: {A: }", "config": "config: other.yaml", "help": "help: true", "bytes": "seed: !!binary aGVsbG8=",
    "set": "seed: !!set {a, b}", "alias": "a: &a [*a]", "huge": "# " + "x" * 2**21, "two": "a: 1\n---\nb: 2", "list_key": "? [a]\n: b",
    "surrogate": 'seed: "\\ud800"', "float": "seed: 1e400", "long": f"seed: {'9' * 6000}", "namespace": "namespace: [a]",
}  # fmt: skip
# Option that takes a place → a command line with @ for it, and what that place should be
IMAGES = f"evaluate {REQUIRED['evaluate']}"
TRAINED = "--model_name_or_path nowhere --use_cpu true --report_to none"
PLACES = {
    "demo --output_dir": ("demo --output_dir @", "new folder"),
    "score --output": ("score --model nowhere --input rows.jsonl --output @", "new file"),
    "score --input": ("score --model nowhere --input @", "something"),
    "score --model": ("score --model @ --prompt a x.png", "something"),
    "score --backbone": ("score --model nowhere --backbone @ --prompt a x.png", "something"),
    "merge --output": ("merge --model nowhere --output @", "new folder"),
    "data make --output": ("data make --num_pairs 1 --output @", "new folder"),
    "data validate ref": ("data validate @", "something"),
    "data validate --output": ("data validate rows.jsonl --output @", "new folder"),
    "data build store": ("data build @", "something"),
    "data export --output": ("data export nowhere --output @", "new folder"),
    "data review --to_label_studio": ("data review nowhere --to_label_studio @", "new file"),
    "data review --from_label_studio": ("data review nowhere --from_label_studio @", "file"),
    "evaluate pairs --dataset": ("evaluate pairs --dataset @ --scorers pixels --output_dir out", "something"),
    "evaluate pairs --output_dir": (
        "evaluate pairs --dataset rows.jsonl --scorers pixels --output_dir @",
        "new folder",
    ),
    "evaluate images --output_dir": (f"{IMAGES} --output_dir @", "new folder"),
    "evaluate images --images": (f"{IMAGES} --images @", "folder"),
    "evaluate images --data": (f"{IMAGES} --data @", "folder"),
    "evaluate images --detector": (f"{IMAGES} --detector @", "something"),
    "evaluate images --lora": (f"{IMAGES} --lora @", "folder"),
    "evaluate compare run": ("evaluate compare @ @", "something"),
    "evaluate compare --output_dir": ("evaluate compare nowhere nowhere --output_dir @", "new folder"),
    "evaluate replay run": ("evaluate replay @", "something"),
    "push run": ("push @ --to org/name --dry-run", "something"),
    "serve --model": ("serve --model @", "something"),
    "serve --token-file": ("serve --model nowhere --token-file @", "file"),
    "space build dir": ("space build @ --model org/name", "new folder"),
    "space serve --dir": ("space serve --dir @", "folder"),
    **{
        f"{command} --{option}": (f"{command} {REQUIRED[command]} {TRAINED} --{option} @", kind)
        for command in ("reward", "grpo", "nft", "dpo")
        for option, kind in {
            "output_dir": "new folder", "dataset": "something", "model_name_or_path": "something",
            "resume_from_checkpoint": "something", "accelerator_config": "settings", "fsdp_config": "settings",
            "deepspeed": "settings",
        }.items()
    },
}  # fmt: skip
# What nothing can be read from or written to
NOWHERE = {"empty": "", "blanks": " ", "loop": "loop", "long": "x" * 300}
NO_PARENT = {"below a file": "rows.jsonl/x", "no file system for it": "/proc/nowhere/x"}
WRONG = {
    "something": NOWHERE,
    "file": {**NOWHERE, "missing": "missing", "folder": "folder", "dangling": "dangling", "pipe": "pipe"},
    "settings": {**NOWHERE, "missing": "missing", "folder": "folder", "pipe": "pipe", "no JSON": "rows.txt"},
    "folder": {**NOWHERE, "file": "rows.jsonl", "pipe": "pipe", "device": "/dev/null"},
    "new file": {**NOWHERE, **NO_PARENT, "folder": "folder", "dangling": "dangling", "pipe": "pipe"},
    "new folder": {
        **NOWHERE, **NO_PARENT, "file": "rows.jsonl", "dangling": "dangling", "pipe": "pipe", "device": "/dev/null",
    },
}  # fmt: skip
LAUGHS = "a: &a [x, x, x, x, x, x, x, x]\n" + "\n".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 8)}]" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    (tmp_path / "nul.yaml").write_bytes(b"a: \xff\xfe")
    for name, text in (YAMLS | {"laughs": LAUGHS}).items():
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
    return tmp_path


@pytest.fixture
def refused(capsys):
    def run(command, arguments):
        try:
            code = main([command, *shlex.split(REQUIRED[command]), *arguments])
        except SystemExit as end:
            code = end.code
        error = capsys.readouterr().err
        assert code in (1, 2), (command, arguments)
        assert ": error: " in error and "Traceback" not in error, error
        assert len(error.splitlines()) <= 12 and len(error) < 12_000, error
        assert "A" not in os.environ
        return error

    return run


@pytest.mark.parametrize("command", COMMANDS)
def test_hostile_command_lines_and_files_are_refused(command, refused, place):
    for line in LINES:
        refused(command, shlex.split(line))
    for name in [*YAMLS, "laughs"]:
        assert f"{name}.yaml" in refused(command, ["--config", f"{name}.yaml"])
    assert not (place / "hacked").exists()
    # nothing was started
    assert not {"out", "merged", "pairs", "folder", "runs"} & {path.name for path in place.iterdir()}


@pytest.mark.parametrize("option", PLACES)
def test_places_that_cannot_be_used_are_named_with_their_option(option, place, capsys):
    """Before anything is loaded, and without reading from what never ends."""
    (place / "folder").mkdir()
    (place / "rows.txt").write_text("hello")
    (place / "rows.jsonl").write_text('{"prompt": "a", "image": "x.png"}\n')
    os.symlink("loop", place / "loop")
    os.symlink("nowhere/at/all", place / "dangling")
    before = sorted(place.rglob("*"))
    line, kind = PLACES[option]
    for name, wrong in WRONG[kind].items():
        with pytest.raises(SystemExit) as end:
            main([wrong if word == "@" else word for word in shlex.split(line)])
        error = capsys.readouterr().err
        assert end.value.code == 2 and len(error.splitlines()) == 2, (name, error)
        assert option.split()[-1] in error.lower() and "Errno" not in error, (name, error)
        assert wrong[:60] in error, (name, error)
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("command", ["reward", "grpo", "nft", "dpo"])
def test_wrong_values_of_every_training_option_are_refused_as_on_the_command_line(command, place, capsys):
    make_parser = importlib.import_module(f"trl_spatial.scripts.{command}").make_parser
    options = [argument for argument in make_parser()._actions if argument.type in (int, float) or argument.choices]
    assert len(options) > 30
    for argument in options:
        messages = []
        (place / "one.yaml").write_text(f"{argument.dest}: wrong!")
        for given in ([f"--{argument.dest}=wrong!"], ["--config", "one.yaml"]):
            with pytest.raises(SystemExit) as end:
                make_parser().parse_args_and_config([*shlex.split(REQUIRED[command]), *given])
            assert end.value.code == 2
            messages.append(capsys.readouterr().err.partition(": invalid ")[2])
        assert messages[0] and messages[0] == messages[1]
