"""Every command of the README runs, in its order, at tiny size. What differs from the README's words is in this file."""

import importlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from PIL import Image

from tests.hub_stub import HubStub
from tests.warm import run_python
from trl_spatial.cli import COMMANDS, LAUNCHED_COMMANDS, main
from trl_spatial.scenes import make_preference_dataset


REPOSITORY = Path(__file__).parents[1]
SERVED = "http://127.0.0.1:8000"  # the README's server
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")

# Smaller numbers for a test.
SMALLER = {
    "--num_pairs 1000 --num_test_pairs 200": "--num_pairs 4 --num_test_pairs 2",
    "DiffusionGRPOConfig(output_dir=": "DiffusionGRPOConfig(num_generations=4, top_k=1, per_device_train_batch_size=2, "
    "gradient_accumulation_steps=1, height=32, width=32, max_steps=1, use_cpu=True, output_dir=",
}
TINY_TRAINING = (
    "--lora_r 2 --min_pixels 256 --max_pixels 1024 --dataloader_num_workers 0 --use_cpu --disable_tqdm true"
)
TINY_GRPO = (
    "--lora_r 2 --num_generations 4 --top_k 1 --per_device_train_batch_size 2 --gradient_accumulation_steps 1 "
    "--num_inference_steps 4 --eval_num_inference_steps 2 --height 32 --width 32 --eval_height 32 --eval_width 32 "
    "--max_sequence_length 192 --max_steps 2 --eval_steps 2 --save_steps 2 --use_cpu --disable_tqdm true"
)
FEWER_STEPS = {  # of 4, instead of 10
    "recipes/grpo_sd3.yaml": "--sde_window_size 2 --sde_window_range 0 2",
    "recipes/grpo_z_image.yaml": "--sde_window_range 0 2",
}
TINY_DEMO = (
    "--reward_steps 1 --grpo_steps 1 --num_train_pairs 4 --num_test_pairs 8 --num_prompts 2 --output_dir {folder}/demo"
)


def blocks(language="bash|python"):
    """Pairs of a block's language and its text."""
    return re.findall(rf"^```({language})\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def commands(block):
    lines = block.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


@pytest.fixture
def place(tmp_path, monkeypatch, backbone_folder, flux_folder, detector_folder):
    """A folder in which the README's names stand for tiny local things."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # rewards are imported from this folder
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    for name in ("Qwen2.5-VL-7B-Instruct", "Qwen2.5-VL-3B-Instruct"):
        shutil.copytree(backbone_folder, tmp_path / "Qwen" / name)
    shutil.copytree(flux_folder, tmp_path / "black-forest-labs" / "FLUX.1-dev")
    for family, name in (
        ("qwen_image", "Qwen/Qwen-Image"),
        ("sd3", "stabilityai/stable-diffusion-3.5-medium"),
        ("z_image", "Tongyi-MAI/Z-Image"),
    ):
        importlib.import_module(family).main([str(tmp_path / name)])
    shutil.copytree(detector_folder, tmp_path / "PekingU" / "rtdetr_v2_r50vd")
    objects = [{"class": "dog", "count": 1}, {"class": "person", "count": 1, "position": ["left of", 0]}]
    (tmp_path / "objects.jsonl").write_text(json.dumps({"prompt": "x", "tag": "position", "include": objects}))
    for name in ("prompts.txt", "heldout.txt"):
        (tmp_path / name).write_text("a red circle\na blue square to the left of a cat\n")
    folder = tmp_path / "ORG" / "SpatialReward"
    folder.mkdir(parents=True)
    for split, num_pairs in (("train", 4), ("test", 2)):
        pairs = make_preference_dataset(num_pairs, split=split, image_size=32)
        pairs.to_parquet(folder / f"{split}.parquet")
    for name, row in zip("ab", pairs, strict=True):
        row["chosen"].save(tmp_path / f"{name}.png")
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a red circle", "image": "a.png"}\n')
    (tmp_path / "recipes").symlink_to(REPOSITORY / "recipes")
    yield tmp_path
    sys.modules.pop("my_rewards", None)


@pytest.fixture
def hub(place):
    """A Hub that has the two default models, tiny ones of their classes."""
    with HubStub() as hub:
        for name in ("Qwen/Qwen2.5-VL-7B-Instruct", "black-forest-labs/FLUX.1-dev"):
            folder = place / name
            files = (path for path in folder.rglob("*") if path.is_file())
            hub.files[name] = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
        yield hub


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
    assert words[:-1] == ["pip", "install"] and words[-1] in (
        "trl-spatial",
        "trl-spatial[diffusion]",
        "trl-spatial[serve]",
        "trl-spatial[space]",
    )
    site, dist = folder / f"site of {words[-1]}", folder / "dist"
    if not dist.exists():
        build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", dist]
        subprocess.run(build, cwd=REPOSITORY, check=True, capture_output=True)
    options = ["--no-deps", "--no-index", "--find-links", dist, "--target", site]
    shown = subprocess.run([sys.executable, "-m", *words, *options], check=True, capture_output=True, text=True)
    assert "does not provide the extra" not in shown.stderr
    shown = subprocess.run(
        [sys.executable, "-c", "import trl_spatial, trl_spatial.cli; print(trl_spatial.__file__); trl_spatial.cli.main([])"],
        env=os.environ | {"PYTHONPATH": str(site)}, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert shown.startswith(str(site))
    assert (site / "bin" / "trl_spatial").is_file()


def run_trl_spatial(words):
    if words[1] not in LAUNCHED_COMMANDS:
        assert main(words[1:]) == 0
        return
    script = importlib.import_module(f"trl_spatial.scripts.{words[1]}")
    launch_args, script_args = script.make_parser().split_launch_args(words[2:], launch_command_parser())
    assert launch_args in ([], ["--num_processes", "8"])  # the launcher itself runs in test_cli.py
    tiny = {"reward": TINY_TRAINING, "grpo": TINY_GRPO}[words[1]]
    tiny = " ".join([tiny, *(options for recipe, options in FEWER_STEPS.items() if recipe in words)])
    script.main(*script.make_parser().parse_args_and_config([*script_args, *tiny.split()], is_launched=True))


def run_with_hub(words, environment, folder):
    """
    A command that names something on the Hub, by itself, as the address of the Hub is read when a program starts. It runs in a
    folder where the models' names stand for what is on the Hub.
    """
    online = folder / "online"
    online.mkdir(exist_ok=True)
    for name in ("a.png", "b.png", "pairs"):
        if not (online / name).exists():
            (online / name).symlink_to(folder / name)
    options = {"cwd": online, "env": os.environ | environment}
    if words[1:3] == ["space", "serve"]:
        with run_server([sys.executable, "-m", *words], options):
            return
    if words[1] in LAUNCHED_COMMANDS and words[2:] != ["--dataset", "hub/SpatialReward"]:  # this one word for word
        tiny = {"reward": TINY_TRAINING, "grpo": TINY_GRPO}[words[1]].split()
        words = [f"trl_spatial.scripts.{words[1]}", *words[2:], *tiny]  # without the launcher
    ended = run_python(["-m", *words], **options)
    assert ended.returncode == 0, ended.stderr


@contextmanager
def run_server(command, options):
    """A command that serves a page, at a port that is free; it gives the address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with subprocess.Popen([*command, "--port", str(port)], **options) as server:
        try:
            for _ in range(120):
                with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}") as page:
                    assert page.status == 200
                    break
                assert server.poll() is None
                time.sleep(0.5)
            else:
                pytest.fail("the page did not come up")
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


def run_command(words, folder, hub_environment):
    if words[0] == "make":
        run_make(words, folder)
    elif words[0] == "pip":
        run_pip(words, folder)
    elif words[0] == "python":
        subprocess.run([sys.executable, *words[1:]], check=True)
    elif any(word.startswith("hub/") for word in words):
        run_with_hub(words, hub_environment, folder)
    else:
        assert words[0] == "trl_spatial"
        run_trl_spatial(words)


def run_block(block, place, hub):
    """The commands of a block in their order; a server runs until the block ends."""
    ran, address = [], SERVED
    with ExitStack() as servers:
        for command in commands(block):
            words = [word.replace(SERVED, address) for word in shlex.split(command, comments=True)]
            if words[:2] == ["trl_spatial", "serve"]:
                options = {"cwd": place, "env": os.environ | {"PYTHONPATH": str(REPOSITORY)}}
                address = servers.enter_context(run_server([sys.executable, "-m", *words], options))
            else:
                run_command(words, place, hub.environment)
            ran.append(" ".join(words[:2]))
    return ran


def test_every_command_and_program_runs(place, hub):
    ran = []
    for language, block in blocks():
        for text, smaller in SMALLER.items():
            block = block.replace(text, smaller)
        file = re.match(r"# (\w+\.py)\n", block)
        if file:  # a file that the text asks for
            (place / file[1]).write_text(block)
        elif language == "python":
            exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
        else:
            ran += run_block(block, place, hub)
    assert set(ran) >= {"make demo", "make test", *(f"trl_spatial {name}" for name in COMMANDS if name != "demo")}
    assert (place / "demo" / "report.html").is_file()
    assert hub.files.keys() >= {
        "datasets/tester/SpatialReward", "tester/SpatialScore", "tester/SpatialScore-live", "tester/FLUX.1-dev-hub",
        "spaces/tester/SpatialScore-page",
    }  # fmt: skip
    assert hub.unknown == []
    assert len((place / "scores.jsonl").read_text().splitlines()) == 1
    assert (place / "SpatialScore-7B" / "adapter_model.safetensors").is_file()
    for folder in (
        "FLUX.1-dev-SpatialScore",
        "FLUX.1-dev-SpatialScore-fast",
        "FLUX.1-dev-red",
        "FLUX.1-dev-geneval",
        "FLUX.1-dev-served",
        "tiny-flux-red",
    ):
        assert (place / folder / "pytorch_lora_weights.safetensors").is_file()
    assert Image.open(place / "red.png").size == (32, 32)


def test_scoring_in_python_takes_ten_lines():
    _, program = blocks("python")[0]
    assert "score(" in program
    assert len([line for line in program.splitlines() if line.strip()]) <= 10


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
