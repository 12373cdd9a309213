"""Every command of the README runs, in its order, at tiny size. What differs from the README's words is in this file."""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

from trl_spatial.cli import COMMANDS, main
from trl_spatial.scenes import make_preference_dataset


REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")

# Smaller numbers for a test.
SMALLER = {
    "--num_pairs 1000 --num_test_pairs 200": "--num_pairs 4 --num_test_pairs 2",
}
TINY_TRAINING = (
    "--lora_r 2 --min_pixels 256 --max_pixels 1024 --dataloader_num_workers 0 --use_cpu --disable_tqdm true"
)
TINY_DEMO = "--max_steps 1 --num_train_pairs 4 --num_test_pairs 8 --output_dir {folder}/demo"


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def commands():
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


@pytest.fixture
def place(tmp_path, monkeypatch, backbone_folder):
    """A folder in which the README's names stand for tiny local things."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    for name in ("Qwen2.5-VL-7B-Instruct", "Qwen2.5-VL-3B-Instruct"):
        shutil.copytree(backbone_folder, tmp_path / "Qwen" / name)
    folder = tmp_path / "ORG" / "SpatialReward"
    folder.mkdir(parents=True)
    for split, num_pairs in (("train", 4), ("test", 2)):
        pairs = make_preference_dataset(num_pairs, split=split, image_size=32)
        pairs.to_parquet(folder / f"{split}.parquet")
    for name, row in zip("ab", pairs, strict=True):
        row["chosen"].save(tmp_path / f"{name}.png")
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a red circle", "image": "a.png"}\n')
    (tmp_path / "recipes").symlink_to(REPOSITORY / "recipes")
    return tmp_path


def run_make(words, folder):
    """`make` without the installation, in the environment of this test."""
    # -o: the environment is there and needs no remaking
    make = ["make", "-o", "installed", *words[1:], "INSTALLED=installed", f"VENV={sys.prefix}"]
    # as from a terminal, although these tests may run under `make test`
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "MAKE", "MFLAGS"))
    }
    if "TORCH" in words[-1]:  # would install another torch: show what would be done
        shown = subprocess.run(
            ["make", "--dry-run", *words[1:], f"VENV={folder}/none"], cwd=REPOSITORY, env=environment, check=True, capture_output=True, text=True
        ).stdout  # fmt: skip
        assert f"pip install {words[-1].removeprefix('TORCH=')}\n" in shown
        assert "trl_spatial demo" in shown.splitlines()[-1]
        return
    variables = {
        "demo": f"DEMO_ARGS={TINY_DEMO.format(folder=folder)}",
        "test": "PYTEST_ARGS=-n 0 -p no:cacheprovider tests/test_layout.py::test_importing_the_package_is_light",
    }
    subprocess.run([*make, variables[words[1]]], cwd=REPOSITORY, check=True, env=environment)


def run_pip(words, folder):
    """Install a wheel of this checkout into a folder by itself, and use it from there."""
    assert words == ["pip", "install", "trl-spatial"]
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder / "dist"],
        cwd=REPOSITORY, check=True, capture_output=True,
    )  # fmt: skip
    subprocess.run(
        [
            sys.executable,
            "-m",
            *words,
            "--quiet",
            "--no-deps",
            "--no-index",
            "--find-links",
            "dist",
            "--target",
            "site",
        ],
        check=True,
    )
    shown = subprocess.run(
        [sys.executable, "-c", "import trl_spatial, trl_spatial.cli; print(trl_spatial.__file__); trl_spatial.cli.main([])"],
        env=os.environ | {"PYTHONPATH": "site"}, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert shown.startswith(str(folder / "site"))
    assert (folder / "site" / "bin" / "trl_spatial").is_file()


def run_trl_spatial(words):
    if words[1] != "reward":
        assert main(words[1:]) == 0
        return
    script = importlib.import_module("trl_spatial.scripts.reward")
    launch_args, script_args = script.make_parser().split_launch_args(words[2:], launch_command_parser())
    assert launch_args in ([], ["--num_processes", "8"])  # the launcher itself runs in test_cli.py
    script.main(*script.make_parser().parse_args_and_config([*script_args, *TINY_TRAINING.split()], is_launched=True))


def test_every_command_and_program_runs(place):
    programs = blocks("python")
    assert len(programs) == 2
    ran = []
    for command in commands():
        for text, smaller in SMALLER.items():
            command = command.replace(text, smaller)
        words = shlex.split(command, comments=True)
        if words[0] == "make":
            run_make(words, place)
        elif words[0] == "pip":
            run_pip(words, place)
        else:
            assert words[0] == "trl_spatial"
            run_trl_spatial(words)
        ran.append(" ".join(words[:2]))
    for program in programs:
        exec(compile(program, "README.md", "exec"), {"__name__": "readme"})
    assert set(ran) >= {"make demo", "make test", "trl_spatial reward", "trl_spatial score", "trl_spatial merge"}
    assert (place / "demo" / "results.md").is_file()
    assert len((place / "scores.jsonl").read_text().splitlines()) == 1
    assert (place / "SpatialScore-7B" / "adapter_model.safetensors").is_file()


def test_scoring_in_python_takes_ten_lines():
    assert len([line for line in blocks("python")[0].splitlines() if line.strip()]) <= 10


def test_table_of_commands_is_complete():
    listed = re.findall(r"^\| `trl_spatial (\w+)", README, flags=re.MULTILINE)
    assert listed == list(COMMANDS)


def test_links_to_files_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (REPOSITORY / target).exists(), target


def test_contributing_names_what_exists():
    text = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"make ([a-z-]+)", "\n".join(re.findall(r"`+[^`]*`+", text))):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    paths = [path for folder in ("trl_spatial", "recipes", "tests") for path in (REPOSITORY / folder).rglob("*")]
    names = {path.name for path in paths} | {path.stem for path in paths} | {"hub_cards"}
    code = "\n".join(path.read_text(encoding="utf-8") for path in paths if path.suffix == ".py")
    for name in re.findall(r"\b[A-Za-z_]+(?=\.py\b)|\b[a-z]+_[a-z_]+\b|\b[A-Z][a-z]+[A-Z]\w+\b", text):
        assert name in names or re.search(rf"\b{name}\b", code), name
