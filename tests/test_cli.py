"""The command line: help, mistakes, YAML files, launch arguments, and every command run at tiny size."""

import importlib
import json
import math
import os
import resource
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from datasets import load_from_disk
from PIL import Image

from trl_spatial import SpatialScore, __version__
from trl_spatial.cli import COMMANDS, LAUNCHED_COMMANDS, main, run_command
from trl_spatial.scripts.datasets import load_dataset_dict
from trl_spatial.scripts.parser import SpatialParser
from trl_spatial.scripts.training_parser import declared_options


REPOSITORY = Path(__file__).parents[1]
TINY_TRAINING = (
    "--lora_r 2 --max_steps 1 --per_device_train_batch_size 2 --gradient_accumulation_steps 1 --max_pixels 1024 "
    "--dataloader_num_workers 0 --use_cpu --disable_tqdm true --report_to none"
)


@pytest.fixture(scope="module")
def reward_parser():
    return importlib.import_module("trl_spatial.scripts.reward").make_parser


@pytest.fixture
def fails(capsys):
    """Runs a call that must end with exit code 2; returns what it wrote to the terminal."""

    def run(function, *args, **kwargs):
        with pytest.raises(SystemExit) as exit_info:
            function(*args, **kwargs)
        assert exit_info.value.code == 2
        return capsys.readouterr().err

    return run


def write_yaml(folder, text):
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


# ---------------------------------------------------------------------------------------------------- help


def test_help_is_quick_and_lists_every_command():
    seconds = []  # of processor time, the least of three: a busy machine takes more of that, too
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        text = subprocess.run(
            [sys.executable, "-m", "trl_spatial", "--help"], cwd=REPOSITORY, check=True, capture_output=True, text=True
        ).stdout
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.5
    for command, help_text in COMMANDS.items():
        assert command in text and help_text in text


@pytest.mark.parametrize(
    "line",
    [*sorted(COMMANDS.keys() - LAUNCHED_COMMANDS), "data build", "data make", "evaluate pairs", "evaluate images"],
)
def test_help_of_a_command_imports_nothing_slow(line):
    program = f"import sys\nfrom trl_spatial.cli import main\ntry: main({[*line.split(), '--help']})\n"
    program += "finally: print(*sys.modules, file=sys.stderr)"
    shown = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=True, capture_output=True, text=True)
    assert f"usage: trl_spatial {line}" in shown.stdout
    slow = (
        "torch transformers accelerate peft datasets diffusers pandas scipy matplotlib huggingface_hub gradio fastapi"
    )
    assert not set(slow.split()) & set(shown.stderr.split())


@pytest.mark.parametrize("command", sorted(LAUNCHED_COMMANDS))
def test_brief_help_has_the_options_that_the_package_declares(command, capsys):
    """Read from the source, they are those of the imported configuration; the long help has what that inherits."""
    script = importlib.import_module(f"trl_spatial.scripts.{command}")
    *_, config = script.make_parser().dataclass_types
    declared = {
        name for parent in config.__mro__ if parent.__module__.startswith("trl_spatial.") for name in vars(parent)["__annotations__"]
    }  # fmt: skip
    expected = {
        field.name: (field.default, field.metadata["help"]) for field in fields(config) if field.name in declared
    }
    module, _, name = f"{config.__module__.removeprefix('trl_spatial.')}:{config.__name__}".partition(":")
    assert declared_options(module, name) == expected and len(expected) >= 15

    lengths = []
    for option in ("--help", "--help_all"):
        assert main([command, option]) == 0
        text = capsys.readouterr().out
        assert all(f"--{name}" in text for name in expected) and "--dataset" in text and "examples:" in text
        assert ("--adam_beta1" in text) == (option == "--help_all")
        lengths.append(len(text))
    assert lengths[0] < lengths[1] / 2


def test_quick_imports_leave_nothing_to_collect_and_the_collector_on():
    program = "import gc; from trl_spatial.scripts.parser import quick_imports\n"
    program += "try:\n  with quick_imports(): import no_such_module\nexcept ModuleNotFoundError: print(gc.isenabled(), gc.get_freeze_count())\n"
    program += "with quick_imports(): import torch; from transformers import Trainer\n"
    program += "print(gc.isenabled(), len(gc.get_objects()) < 1000 < gc.get_freeze_count())"
    shown = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=True, capture_output=True, text=True)
    assert shown.stdout == "True 0\nTrue True\n"


def test_without_arguments_prints_help(capsys):
    assert main([]) == 0
    assert "usage: trl_spatial COMMAND" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["--version"])
    assert exit_info.value.code == 0
    assert capsys.readouterr().out == f"trl_spatial {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_has_examples_that_parse(command, monkeypatch, tmp_path):
    (tmp_path / "token.txt").touch()
    monkeypatch.chdir(tmp_path if command == "serve" else REPOSITORY)  # examples name files of the repository
    parser = importlib.import_module(f"trl_spatial.scripts.{command}").make_parser()
    text = parser.format_help()
    examples = text.split("examples:\n")[1].replace("\\\n", " ").splitlines()
    examples = [shlex.split(line) for line in examples if line.strip() and not line.strip().startswith("#")]
    assert examples
    for words in examples:
        assert words[:2] == ["trl_spatial", command]
        if command in LAUNCHED_COMMANDS:
            _, script_args = parser.split_launch_args(words[2:], launch_command_parser())
            assert "--dataset" in script_args
        else:
            parser.parse_args_and_config(words[2:])


# ---------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rewrad"], "unknown command 'rewrad'; did you mean reward?"),
        (["--hepl"], "unknown option --hepl; did you mean --help?"),
        (["score", "--modle", "x"], "unknown option --modle; did you mean --model?"),
        (["score", "--modle=x"], "unknown option --modle; did you mean --model?"),
        (["data", "make", "--num_pair", "3"], "unknown option --num_pair; did you mean --num_pairs"),
        (["data", "make", "--num_pairs", "many", "--output", "x"], "invalid int value: 'many'"),
        (["merge", "--model", "x", "--output", "y", "--dtype", "float8"], "invalid choice: 'float8'"),
        (["merge", "--model", "x", "--output", "y", "z"], "unexpected argument 'z'"),
        (["reward", "--dataset", "x", "--learnin_rate", "1"], "unknown option --learnin_rate; did you mean --learning_rate"),
        (["reward", "--dataset", "x", "--num_proceses", "2"], "unknown option --num_proceses; did you mean --num_processes"),
        (["reward", "--dataset", "x", "--learning", "1"], "unknown option --learning"),
        (["reward", "--dataset", "x", "stray"], "unexpected argument 'stray'"),
        (["reward", "--dataset", "x", "--accelerate_config", "nix"], "nix"),
        (["reward", "--dataset", "x", "--config"], "argument --config: expected one argument"),
        (["reward", "--config", "a.yaml", "--config", "b.yaml"], "--config takes one YAML file"),
        (["grpo", "--dataset", "x", "--rewards", "a", "--rewards", "b"], "--rewards is given twice"),
        (["grpo", "--dataset", "x", "--reward_weights=1", "--reward-weights", "2"], "--reward-weights is given twice"),
        (["data", "mkae", "--output", "x"], "unknown action 'mkae'; did you mean make?"),
        (["reward", "--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)  # fmt: skip
def test_mistakes_are_named(arguments, message, fails):
    error = fails(main, arguments)
    assert message in error
    assert "--help" in error or "usage" in error
    assert len(error.splitlines()) <= 4


def test_errors_of_a_command_are_one_message(capsys, monkeypatch, tmp_path):
    arguments = ["score", "--model", str(tmp_path), "--prompt", "a cube", "a.png"]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert "trl_spatial score: error:" in error
    assert "it lacks config.json" in error
    assert "Traceback" not in error
    monkeypatch.setenv("TRL_SPATIAL_TRACEBACK", "1")
    with pytest.raises(ValueError):
        main(arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a cube"], "--prompt needs at least one image"),
        (["--prompt", "a cube", "--input", "x.jsonl", "a.png"], "either --prompt"),
        (["--input", "x.jsonl", "a.png"], "no image files are expected"),
        (["--input", "x.jsonl"], "no file or folder x.jsonl"),
    ],
)
def test_score_says_what_it_needs(arguments, message, capsys):
    assert main(["score", "--model", "x", *arguments]) == 1
    assert message in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- YAML


@pytest.mark.parametrize("flag", ["--config {}", "--config={}"])
def test_yaml_gives_defaults_and_the_command_line_wins(flag, reward_parser, tmp_path):
    path = write_yaml(tmp_path, "dataset: pairs\nlearning_rate: 3e-5\nlora_r: 4\nreport_to: [none]\nuse_cpu: true\n")
    script_args, model_args, training_args = reward_parser().parse_args_and_config(
        [*flag.format(path).split(), "--lora_r", "8"]
    )
    assert script_args.dataset == "pairs"
    assert training_args.learning_rate == 3e-5  # a string for PyYAML
    assert training_args.report_to == []
    assert model_args.lora_r == 8


def test_yaml_takes_mappings_lists_none_and_environment_variables(reward_parser, tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_SPATIAL_TEST", "")
    path = write_yaml(
        tmp_path,
        "dataset: pairs\nuse_cpu: true\nmax_length: null\nlr_scheduler_type: cosine_with_min_lr\n"
        "lr_scheduler_kwargs: {min_lr: 1.0e-7}\nenv: {TRL_SPATIAL_TEST: 7}\n",
    )
    _, _, training_args = reward_parser().parse_args_and_config(["--config", path])
    assert training_args.max_length is None
    assert training_args.lr_scheduler_kwargs == {"min_lr": 1e-7}
    assert os.environ["TRL_SPATIAL_TEST"] == "7"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lerning_rate: 1", "unknown key 'lerning_rate'; did you mean learning_rate"),
        ("num_proceses: 1", "unknown key 'num_proceses'; did you mean num_processes"),
        ("objective: expected", "objective: invalid choice: 'expected'"),
        ("dtype: float8", "dtype: invalid choice: 'float8'"),
        ("eval_strategy: no", "quote it"),
        ("learning_rate: fast", "learning_rate: invalid float value: 'fast'"),
        ("learning_rate: {a: 1}", "learning_rate: expected one value"),
        ("learning_rate: [1, 2]", "learning_rate: expected one value"),
        ("lora_r: null", "lora_r: a value is missing"),
        ("bf16: perhaps", "bf16"),
        ("- a\n- b", "expected a mapping"),
        ("a: [", "cannot be read"),
        ("seed: 1\nlora_r: 2\nseed: 3", "'seed' appears on line 1 and again on line 3"),
        ("lr_scheduler_kwargs:\n  {min_lr: 1, min_lr: 2}", "'min_lr' appears on line 2 and again on line 2"),
        ("seed: 1\nlora_r: 2\nseed: 3", "'seed' appears on line 1 and again on line 3"),
        ("lr_scheduler_kwargs:\n  min_lr: 1\n  min_lr: 2", "'min_lr' appears on line 2 and again on line 3"),
        ("env: 3", "`env` must be a mapping"),
    ],
)
def test_yaml_mistakes_are_named(text, message, reward_parser, tmp_path, fails):
    path = write_yaml(tmp_path, text)
    arguments = ["--dataset", "pairs", "--use_cpu", "--config", path]
    for error in (
        fails(reward_parser().split_launch_args, arguments, launch_command_parser()),
        fails(reward_parser().parse_args_and_config, arguments, is_launched=True),
    ):
        assert message in error
        assert path in error


def test_values_that_a_config_refuses_are_one_message(reward_parser, fails):
    error = fails(reward_parser().parse_args_and_config, ["--dataset", "x", "--load_in_4bit", "--no_use_peft"])
    assert "4-bit weights cannot be trained" in error


def test_yaml_knows_the_home_folder_as_a_shell_does(reward_parser, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    path = write_yaml(tmp_path, "dataset: ~/pairs\nmodel_name_or_path: a~/b\noutput_dir: ~/out\nuse_cpu: true\n")
    script_args, model_args, training_args = reward_parser().parse_args_and_config(["--config", path])
    assert (script_args.dataset, training_args.output_dir) == ("/home/me/pairs", "/home/me/out")
    assert model_args.model_name_or_path == "a~/b"


def test_yaml_of_a_plain_command(tmp_path, fails):
    def parse(text):
        parser = SpatialParser(prog="p", examples="")
        parser.add_argument("images", nargs="*")
        parser.add_argument("--size", type=int, nargs=2, default=[1, 2])
        parser.add_argument("--fast", action="store_true")
        parser.add_argument("--name", choices=["a", "b"], required=True)
        return parser.parse_args_and_config(["--config", write_yaml(tmp_path, text)])

    (args,) = parse("images: [x, y]\nsize: [3, 4]\nfast: true\nname: b")
    assert (args.images, args.size, args.fast, args.name) == (["x", "y"], [3, 4], True, "b")
    assert "fast: expected true or false" in fails(parse, "name: a\nfast: 1")
    assert "size: expected 2 values" in fails(parse, "name: a\nsize: [1]")
    assert "name: invalid choice: 'c'" in fails(parse, "name: c")


# ---------------------------------------------------------------------------------------------------- launching


def test_arguments_are_split_between_script_and_launcher(reward_parser, tmp_path):
    launcher = launch_command_parser()
    path = write_yaml(tmp_path, "dataset: pairs\nnum_machines: 1\nmulti_gpu: true\nuse_fsdp: false\nlora_r: 2\n")

    def split(line):
        return reward_parser().split_launch_args(line.split(), launcher)

    assert split("--seed 2 --num_processes 2 --dataset x") == (
        ["--num_processes", "2"],
        ["--seed", "2", "--dataset", "x"],
    )
    assert split("--dataset x --main-process-port=7") == (["--main-process-port=7"], ["--dataset", "x"])
    assert split(f"--config {path} --multi_gpu") == (
        ["--num_machines", "1", "--multi_gpu", "--multi_gpu"], ["--config", path],
    )  # fmt: skip
    config = str(REPOSITORY / "recipes/accelerate/fsdp2.yaml")
    for flag in (f"--accelerate_config {config}", f"--accelerate_config={config}"):
        assert split(f"--dataset x {flag} --num_processes 4") == (
            ["--config_file", config, "--num_processes", "4"], ["--dataset", "x"],
        )  # fmt: skip
    # the script itself accepts the launcher's keys in its YAML file, and only under the launcher
    script_args, _, _ = reward_parser().parse_args_and_config(["--config", path, "--use_cpu"], is_launched=True)
    assert script_args.dataset == "pairs"


def test_exit_code_of_the_training_script_is_returned(monkeypatch):
    def fail(args):
        assert args.module and args.training_script == "trl_spatial"
        assert args.training_script_args == ["reward", "--dataset", "x"]
        assert args.num_processes == 2
        raise subprocess.CalledProcessError(3, "python")

    monkeypatch.setattr("accelerate.commands.launch.launch_command", fail)
    assert main(["reward", "--dataset", "x", "--num_processes", "2"]) == 3


# ---------------------------------------------------------------------------------------------------- datasets


def test_datasets_are_loaded_from_wherever_they_are(tmp_path, capsys):
    assert main(["data", "make", "--num_pairs", "4", "--num_test_pairs", "2", "--image_size", "32", "--output",
                 str(tmp_path / "disk")]) == 0  # fmt: skip
    pairs = load_from_disk(tmp_path / "disk")
    assert "4 rows in the train split, 2 rows in the test split" in capsys.readouterr().out
    again = ["data", "make", "--num_pairs", "4", "--num_test_pairs", "2", "--image_size", "32", "--output"]
    assert main([*again, str(tmp_path / "disk")]) == 0
    assert "already holds these pairs" in capsys.readouterr().out
    assert main([*again, str(tmp_path / "disk"), "--seed", "1"]) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk"]  # nothing half-written
    (tmp_path / "parquet").mkdir()
    for split, rows in pairs.items():
        rows.to_parquet(tmp_path / "parquet" / f"{split}-00000-of-00001.parquet")
    pairs["train"].save_to_disk(tmp_path / "one_split")
    lines = [json.dumps({"prompt": row["prompt"], "level": row["level"]}) for row in pairs["train"]]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))

    prompts = pairs["train"]["prompt"][:]
    for name in ("disk", "parquet", "parquet/train-00000-of-00001.parquet", "one_split", "rows.jsonl"):
        for streaming in (False, True):
            loaded = load_dataset_dict(str(tmp_path / name), streaming=streaming)
            assert [row["prompt"] for row in loaded["train"]] == prompts
            assert ("test" in loaded) == (name in ("disk", "parquet"))


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "/nowhere/at/all", "pairs.parquet", "a/b/c"])
def test_a_missing_dataset_is_not_looked_for_on_the_hub(name):
    with pytest.raises(FileNotFoundError, match=name):
        load_dataset_dict(name)


def test_data_make_of_no_pairs_is_an_error(tmp_path, capsys):
    assert main(["data", "make", "--num_pairs", "0", "--output", str(tmp_path / "none")]) == 1
    assert "`--num_pairs` and `--num_test_pairs` are 0" in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_data_make_overwrites_nothing(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("precious")
    assert main(["data", "make", "--num_pairs", "2", "--output", str(tmp_path)]) == 1
    assert "not an empty folder" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- end to end


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, backbone_folder):
    """A folder with pairs and a reward model that `trl_spatial reward` trained on them, through the launcher."""
    folder = tmp_path_factory.mktemp("workplace")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
        assert main(shlex.split("data make --num_pairs 6 --num_test_pairs 4 --image_size 32 --output pairs")) == 0
        command = f"reward --dataset pairs --model_name_or_path {backbone_folder} --output_dir model {TINY_TRAINING}"
        (folder / "launch.yaml").write_text(yaml.dump({"num_processes": 1, "num_machines": 1, "dynamo_backend": "no"}))
        assert main(shlex.split(f"{command} --eval_strategy steps --mixed_precision no --config launch.yaml")) == 0
    for name, row in zip("abc", load_from_disk(folder / "pairs")["train"], strict=False):
        row["chosen"].save(folder / f"{name}.png")
    return folder


@pytest.fixture
def here(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    return workplace


def read_table(text):
    header, *rows = [line.split() for line in text.splitlines()]
    return [dict(zip(header, row, strict=True)) for row in rows]


def test_score_ranks_images_for_a_prompt(here, capsys):
    prompt = "a red cube left of a blue sphere"
    assert main(shlex.split(f"score --model model --prompt '{prompt}' c.png a.png b.png")) == 0
    table = read_table(capsys.readouterr().out)
    mean, std = SpatialScore.from_pretrained("model").score([prompt] * 3, [Image.open(f"{n}.png") for n in "abc"])
    best_first = np.argsort(-mean)
    assert [row["image"] for row in table] == [f"{'abc'[i]}.png" for i in best_first]
    assert [row["rank"] for row in table] == ["1", "2", "3"]
    for row, i in zip(table, best_first, strict=True):
        assert math.isclose(float(row["mean"]), mean[i], abs_tol=1e-3)
        assert math.isclose(float(row["std"]), std[i], abs_tol=1e-3)


def test_score_reads_files_and_datasets(here, capsys):
    rows = load_from_disk("pairs")["train"].select(range(3))
    (here / "sub").mkdir(exist_ok=True)
    lines = [{"prompt": row["prompt"], "image": f"../{name}.png"} for name, row in zip("abc", rows, strict=True)]
    (here / "sub" / "pairs.jsonl").write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    assert main(shlex.split("score --model model --input sub/pairs.jsonl --output scores.jsonl --json")) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert printed == [json.loads(line) for line in (here / "scores.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [record["prompt"] for record in printed] == [line["prompt"] for line in lines]  # input order

    assert main(shlex.split("score --model model --input pairs --image_column chosen --json --batch_size 2")) == 0
    from_dataset = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(from_dataset) == 6
    for record, expected in zip(printed, from_dataset, strict=False):
        assert math.isclose(record["mean"], expected["mean"], abs_tol=1e-5)

    assert main(shlex.split("score --model model --input pairs --split best")) == 1
    assert "no split 'best'; it has 'train', 'test'" in capsys.readouterr().err
    assert main(shlex.split("score --model model --input pairs")) == 1
    assert "name one of prompt, chosen, rejected" in capsys.readouterr().err


def test_merged_checkpoint_scores_the_same(here, capsys):
    assert main(shlex.split("merge --model model --output merged")) == 0
    scores = []
    for model in ("model", "merged"):
        capsys.readouterr()
        assert main(shlex.split(f"score --model {model} --prompt 'a red cube' --json a.png b.png")) == 0
        scores.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    for one, other in zip(*scores, strict=True):
        assert one["image"] == other["image"]
        assert math.isclose(one["mean"], other["mean"], abs_tol=1e-5)
    assert main(shlex.split("merge --model model --output merged")) == 1
    assert "not an empty folder" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--no_use_peft", "--load_in_4bit", "--dataset_streaming"])
def test_ways_of_training(here, option, backbone_folder, reward_parser):
    if option == "--load_in_4bit":
        pytest.importorskip("bitsandbytes")
    script = importlib.import_module("trl_spatial.scripts.reward")
    output = f"out{option}"
    arguments = (
        f"--dataset pairs --model_name_or_path {backbone_folder} --output_dir {output} {TINY_TRAINING} "
        f"--save_strategy no {option}"
    )
    script.main(*reward_parser().parse_args_and_config(arguments.split()))
    is_full = option == "--no_use_peft"
    assert (here / output / ("model.safetensors" if is_full else "adapter_model.safetensors")).is_file()
    mean, _ = SpatialScore.from_pretrained(output).score(["a cube"], ["a.png"])
    assert np.isfinite(mean).all()


def test_training_resumes_from_the_last_checkpoint(here, backbone_folder, reward_parser):
    script = importlib.import_module("trl_spatial.scripts.reward")
    arguments = (
        f"--dataset pairs --model_name_or_path {backbone_folder} --output_dir again {TINY_TRAINING} --save_steps 1"
    )
    script.main(*reward_parser().parse_args_and_config(arguments.split()))
    first = here / "again" / "checkpoint-1" / "trainer_state.json"
    saved = first.stat().st_mtime_ns
    arguments += " --max_steps 2 --resume_from_checkpoint true"
    script.main(*reward_parser().parse_args_and_config(arguments.split()))
    state = json.loads((here / "again" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    assert first.stat().st_mtime_ns == saved  # training from the beginning would have written it again


# Notes every address beyond this machine that a process turns to, and refuses it.
GUARD = """
import socket

def refuse(*address):
    with open("connections", "a") as file:
        print(*address, file=file)
    raise OSError("no network in this test")

def connect(self, address):
    refuse(address) if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1") else None
    return original(self, address)

original, resolve = socket.socket.connect, socket.getaddrinfo
socket.socket.connect = connect
socket.getaddrinfo = lambda host, *rest, **options: (
    resolve(host, *rest, **options) if host in (None, "localhost", "127.0.0.1", "::1") else refuse(host)
)
"""


def test_nothing_on_this_machine_needs_a_connection_and_nothing_is_reported_home(here, tmp_path, backbone_folder):
    lines = [
        "data validate rows.parquet",
        f"reward --dataset pairs --model_name_or_path {backbone_folder} --output_dir {tmp_path}/out {TINY_TRAINING}",
        "score --model model --input pairs --image_column chosen --json",
    ]
    load_from_disk("pairs")["train"].to_parquet("rows.parquet")
    (tmp_path / "sitecustomize.py").write_text(GUARD)
    program = f"from trl_spatial.cli import main; raise SystemExit(sum(main(line.split()) for line in {lines!r}))"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_") and key != "CI"}
    environment |= {"PYTHONPATH": f"{tmp_path}:{REPOSITORY}", "HF_HOME": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, stdout=subprocess.DEVNULL)
    assert not Path("connections").exists(), Path("connections").read_text()
    environment["HF_HOME"] = str(tmp_path / "other_cache")
    # the guard sees what the libraries send when they are allowed to
    program = "import datasets; datasets.load_dataset('parquet', data_files='rows.parquet')"
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
    assert "s3.amazonaws.com" in Path("connections").read_text()


def test_errors_of_a_launched_command_are_one_message(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    line = f"reward --dataset {tmp_path}/nowhere --use_cpu --mixed_precision no --num_processes 1 --output_dir {tmp_path}/out"
    assert main(line.split()) == 1
    error = capfd.readouterr().err
    assert error.count("trl_spatial reward: error:") == 1 and "nowhere" in error
    assert "Traceback" not in error


def test_interruption_and_faults_of_our_own_are_one_line(capsys, monkeypatch):
    def run(error):
        def fail():
            raise error

        code = run_command("trl_spatial demo", fail)
        return code, capsys.readouterr().err.strip().splitlines()

    assert run(KeyboardInterrupt()) == (130, ["trl_spatial demo: interrupted; run the same command again to continue"])
    assert run(KeyboardInterrupt("saved")) == (130, ["trl_spatial demo: saved"])
    assert run(KeyError("x"))[1][0] == "trl_spatial demo: error: KeyError: 'x'"
    assert run(ValueError("no x"))[1][0] == "trl_spatial demo: error: no x"
    noted = KeyError("x")
    noted.add_note("The reward function `f` raised this error.")
    assert run(noted)[1][:2] == ["trl_spatial demo: error: KeyError: 'x'", *noted.__notes__]
    assert run_command("p", lambda: 3) == 3 and run_command("p", lambda: None) == 0
    monkeypatch.setenv("TRL_SPATIAL_TRACEBACK", "1")
    with pytest.raises(KeyError):
        run(KeyError("x"))


def test_the_environment_of_the_user_is_kept():
    program = "import os; from trl_spatial import scripts; print(*(os.environ.get(name) for name in {names}))"
    names = ["HF_HUB_DISABLE_TELEMETRY", "HF_UPDATE_DOWNLOAD_COUNTS", "GOMP_SPINCOUNT"]
    others = {key: value for key, value in os.environ.items() if key not in names and key != "OMP_WAIT_POLICY"}
    for given, shown in [
        ({}, "1 0 3000"),
        ({"HF_HUB_DISABLE_TELEMETRY": "0", "GOMP_SPINCOUNT": "7"}, "0 0 7"),
        ({"OMP_WAIT_POLICY": "active"}, "1 0 None"),
    ]:
        command = [sys.executable, "-c", program.format(names=names)]
        output = subprocess.run(
            command, cwd=REPOSITORY, env=others | given, check=True, capture_output=True, text=True
        )
        assert output.stdout.split() == shown.split()
