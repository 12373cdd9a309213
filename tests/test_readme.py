"""
Every command block of every README runs, in its order, in a folder where names stand for tiny local models.

What differs from the READMEs' words is in this file: numbers are smaller, `trl_spatial reward` and `grpo` run without their
launcher (test_cli.py and test_recipes.py start it), and `make` runs without the installation. Commands that take minutes at
any size, which are the measurements and what CONTRIBUTING.md asks for, do not run here: the program's own parser has to
accept their arguments. Other tests run those programs at tiny size.
"""

import argparse
import importlib
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

from tests.hub_stub import HubStub
from tests.ports import free_port
from tests.warm import Program, run_python
from trl_spatial.cli import COMMANDS, LAUNCHED_COMMANDS, main
from trl_spatial.evaluation.benchmarks import BENCHMARKS
from trl_spatial.scenes import make_preference_dataset


REPOSITORY = Path(__file__).parents[1]
# What a document's blocks have left in its folder when all have run.
RUN = {
    "README.md": [
        "runs/demo/report.html",
        "SpatialScore-7B/adapter_model.safetensors",
        "SpatialScore-7B-python/adapter_model.safetensors",
        "FLUX.1-dev-SpatialScore/pytorch_lora_weights.safetensors",
        "FLUX.1-dev-python/pytorch_lora_weights.safetensors",
    ],
    "recipes/README.md": [
        "SpatialScore-7B/adapter_model.safetensors",
        "SpatialScore-3B/adapter_model.safetensors",
        "SpatialScore-7B-merged/model.safetensors",
        "scores.jsonl",
        "FLUX.1-dev-SpatialScore-fast/pytorch_lora_weights.safetensors",
        "Qwen-Image-SpatialScore/before_after.json",
        "FLUX.1-dev-NFT/pytorch_lora_weights.safetensors",
        "FLUX.1-dev-scouts/pytorch_lora_weights.safetensors",
        "FLUX.1-dev-red/pytorch_lora_weights.safetensors",
        "FLUX.1-dev-geneval/pytorch_lora_weights.safetensors",
        "FLUX.1-dev-served/pytorch_lora_weights.safetensors",
        "tiny-flux-red/pytorch_lora_weights.safetensors",
        "red.png",
    ],
    "trl_spatial/evaluation/README.md": [
        "runs/scenes/report.html",
        "runs/comparison/report.html",
        *(f"runs/{name}/results.json" for name in BENCHMARKS if name != "geneval"),
        "runs/geneval/report.html",
        "FLUX.1-dev-judged/pytorch_lora_weights.safetensors",
    ],
    "hub_cards/README.md": ["pairs", "trainer_output/adapter_model.safetensors", "page/app.py"],
}
PARSED = ("CONTRIBUTING.md", "recipes/bench/README.md", "recipes/ablations/README.md", "recipes/data/README.md")
ON_THE_HUB = {
    "datasets/tester/SpatialReward", "tester/SpatialScore", "tester/SpatialScore-live", "tester/FLUX.1-dev-hub",
    "spaces/tester/SpatialScore-page",
}  # fmt: skip
SERVED = "http://127.0.0.1:8000"  # the READMEs' server

# Smaller numbers for a test.
SMALLER = {
    "--num_pairs 1000 --num_test_pairs 200 --output scenes": "--num_pairs 4 --num_test_pairs 8 --image_size 64 --output scenes",
    "--num_pairs 1000 --num_test_pairs 200": "--num_pairs 4 --num_test_pairs 2",
    "DiffusionGRPOConfig(output_dir=": "DiffusionGRPOConfig(num_generations=4, top_k=1, per_device_train_batch_size=2, "
    "gradient_accumulation_steps=1, height=32, width=32, max_steps=1, use_cpu=True, output_dir=",
}
TINY_ROLLOUT = (
    "--lora_r 2 --num_generations 4 --top_k 1 --per_device_train_batch_size 2 --gradient_accumulation_steps 1 "
    "--num_inference_steps 4 --eval_num_inference_steps 2 --height 32 --width 32 --eval_height 32 --eval_width 32 "
    "--max_sequence_length 192 --max_steps 2 --eval_steps 2 --save_steps 2 --use_cpu --disable_tqdm true"
)
TINY = {
    "reward": "--lora_r 2 --min_pixels 256 --max_pixels 1024 --dataloader_num_workers 0 --use_cpu --disable_tqdm true",
    "grpo": TINY_ROLLOUT,
    "nft": TINY_ROLLOUT,
    "dpo": "--lora_r 2 --per_device_train_batch_size 2 --gradient_accumulation_steps 1 --height 32 --width 32 "
    "--max_sequence_length 192 --max_steps 2 --save_steps 2 --use_cpu --disable_tqdm true",
}
FEWER_STEPS = {  # of 4, instead of 10
    "recipes/grpo_qwen_image.yaml": "--sde_window_range 0 2",
    "recipes/grpo_sd3.yaml": "--sde_window_size 2 --sde_window_range 0 2",
    "recipes/grpo_z_image.yaml": "--sde_window_range 0 2",
}
TINY_VISION = REPOSITORY / "trl_spatial/tiny_models/qwen2_5_vl"
TINY_DEMO = (
    "--reward_steps 1 --grpo_steps 1 --num_train_pairs 4 --num_test_pairs 8 --num_prompts 2 "
    "--output_dir {folder}/runs/demo"
)


def read(document):
    return (REPOSITORY / document).read_text(encoding="utf-8")


def blocks(document):
    """Pairs of a block's language and its text."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", read(document), flags=re.MULTILINE | re.DOTALL)


def commands(block):
    """The words of every command."""
    lines = block.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def documents():
    """All texts for readers; a text that begins with metadata is a card or a template of one."""
    folders = (REPOSITORY / name for name in ("recipes", "hub_cards", "tests", "trl_spatial"))
    paths = [*REPOSITORY.glob("*.md"), *(path for folder in folders for path in folder.rglob("*.md"))]
    return {
        str(path.relative_to(REPOSITORY)) for path in paths if not path.read_text(encoding="utf-8").startswith("---\n")
    }


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory, backbone_folder, flux_folder, detector_folder):
    """A folder in which the READMEs' names stand for tiny local things."""
    folder = tmp_path_factory.mktemp("stand_ins")
    for name in ("Qwen2.5-VL-7B-Instruct", "Qwen2.5-VL-3B-Instruct"):
        shutil.copytree(backbone_folder, folder / "Qwen" / name)
    shutil.copytree(flux_folder, folder / "black-forest-labs" / "FLUX.1-dev")
    for family, name in (
        ("qwen_image", "Qwen/Qwen-Image"),
        ("sd3", "stabilityai/stable-diffusion-3.5-medium"),
        ("z_image", "Tongyi-MAI/Z-Image"),
    ):
        importlib.import_module(family).main([str(folder / name)])
    shutil.copytree(detector_folder, folder / "PekingU" / "rtdetr_v2_r50vd")
    objects = [{"class": "dog", "count": 1}, {"class": "person", "count": 1, "position": ["left of", 0]}]
    (folder / "objects.jsonl").write_text(json.dumps({"prompt": "x", "tag": "position", "include": objects}))
    for name in ("prompts.txt", "heldout.txt"):
        (folder / name).write_text("a red circle\na blue square to the left of a cat\n")
    dataset = folder / "ORG" / "SpatialReward"
    dataset.mkdir(parents=True)
    for split, num_pairs in (("train", 4), ("test", 2)):
        pairs = make_preference_dataset(num_pairs, split=split, image_size=32)
        pairs.to_parquet(dataset / f"{split}.parquet")
    for name, row in zip("ab", pairs, strict=True):
        row["chosen"].save(folder / f"{name}.png")
    (folder / "pairs.jsonl").write_text('{"prompt": "a red circle", "image": "a.png"}\n')
    (folder / "recipes").symlink_to(REPOSITORY / "recipes")
    return folder


@pytest.fixture(scope="module")
def wheel_folder(tmp_path_factory):
    """A folder with a wheel of this checkout."""
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder]
    subprocess.run(build, cwd=REPOSITORY, check=True, capture_output=True)
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch, stand_ins):
    """The stand-ins for one document, whose commands are started there."""
    shutil.copytree(stand_ins, tmp_path, symlinks=True, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # rewards are imported from this folder
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield tmp_path
    for name in ("my_rewards", "my_judges", "my_scorers"):
        sys.modules.pop(name, None)


class Reader:
    """
    Does what a document says.

    Args:
        folder (`Path`):
            Where.
        hub ([`HubStub`]):
            A Hub that has the two default models, tiny ones of their classes.
        wheel_folder (`Path`):
            What pip installs from.
        monkeypatch:
            Pytest's, for `sys.argv`.
    """

    def __init__(self, folder, hub, wheel_folder, monkeypatch):
        self.folder, self.hub, self.wheel_folder, self.monkeypatch = folder, hub, wheel_folder, monkeypatch
        self.ran = []

    def follow(self, document):
        for language, block in blocks(document):
            for text, smaller in SMALLER.items():
                block = block.replace(text, smaller)
            file = re.match(r"# (\w+\.py)\n", block)
            if file:  # a file that the text asks for
                (self.folder / file[1]).write_text(block)
            elif language == "python":
                exec(compile(block, document, "exec"), {"__name__": "readme"})
            elif language == "bash":
                self.run_block(block)

    def run_block(self, block):
        """The commands of a block in their order; a server runs until the block ends."""
        address = SERVED
        with ExitStack() as servers:
            for command in commands(block):
                words = [word.replace(SERVED, address) for word in command]
                if words[:2] == ["trl_spatial", "serve"]:
                    options = {"cwd": self.folder, "env": os.environ | {"PYTHONPATH": str(REPOSITORY)}}
                    address = servers.enter_context(run_server(["-m", *words], options))
                else:
                    self.run_command(words)
                self.ran.append(" ".join(words[:2]))

    def run_command(self, words):
        if words[0] == "make":
            self.run_make(words)
        elif words[0] == "pip":
            self.run_pip(words)
        elif words[0] == "python":
            ended = run_python(words[1:])
            assert ended.returncode == 0, ended.stderr
        elif words[:2] == ["accelerate", "launch"]:
            args = launch_command_parser().parse_args(words[2:])
            assert Path(args.config_file).is_file()
            self.run_program(runpy.run_path, args.training_script, args.training_script_args, TINY["grpo"])
        elif any(word.startswith("hub/") for word in words):
            self.run_with_hub(words)
        elif words[1] in LAUNCHED_COMMANDS:
            if words[-2:] == ["--num_processes", "8"]:  # the launcher's
                words = words[:-2]
            tiny = TINY[words[1]]
            if "--estimate" in words:  # the model of that name is known without its files, at its true size
                tiny += f" --model_name_or_path {self.folder}/black-forest-labs/FLUX.1-dev"
            self.run_program(runpy.run_module, f"trl_spatial.scripts.{words[1]}", words[2:], tiny)
        else:
            assert words[0] == "trl_spatial"
            if "evaluate" in words:  # the bundled model knows words of the flat world alone
                is_tiny = any(word.startswith("Qwen/") for word in words)
                words = [str(TINY_VISION) if word.startswith("Qwen/") else word for word in words]
                words += ["--skip_self_test"] if is_tiny else []
            assert main(words[1:]) == 0

    def run_program(self, run, name, arguments, tiny):
        """A program that would be launched, in this process."""
        tiny = " ".join([tiny, *(options for recipe, options in FEWER_STEPS.items() if recipe in arguments)])
        self.monkeypatch.setattr(sys, "argv", [name, *arguments, *tiny.split()])
        options = {"alter_sys": True} if run is runpy.run_module else {}
        with ended_well():
            run(name, run_name="__main__", **options)

    def run_make(self, words):
        """`make` without the installation, in the environment of this test."""
        if "TORCH" in words[-1]:  # would install another torch: show what would be done
            shown = dry_run([*words, f"VENV={self.folder}/none"])
            assert f"pip install {words[-1].removeprefix('TORCH=')}\n" in shown
            assert "trl_spatial demo" in shown.splitlines()[-1]
            return
        variables = {
            "demo": f"DEMO_ARGS={TINY_DEMO.format(folder=self.folder)}",
            "test": "PYTEST_ARGS=-n 0 -p no:cacheprovider --noconftest tests/test_layout.py::test_importing_the_package_is_light",
        }
        # -o: the environment is there and needs no remaking
        make = ["make", "-o", "installed", *words[1:], "INSTALLED=installed", f"VENV={sys.prefix}"]
        subprocess.run([*make, variables[words[1]]], cwd=REPOSITORY, check=True, env=terminal())

    def run_pip(self, words):
        """Install the wheel into a folder by itself, and use it from there."""
        extras = ("", "[diffusion]", "[serve]", "[space]")
        assert words[:-1] == ["pip", "install"] and words[-1] in [f"trl-spatial{extra}" for extra in extras]
        site = self.folder / f"site of {words[-1]}"
        options = ["--no-deps", "--no-index", "--find-links", self.wheel_folder, "--target", site]
        shown = subprocess.run([sys.executable, "-m", *words, *options], check=True, capture_output=True, text=True)
        assert "does not provide the extra" not in shown.stderr
        shown = subprocess.run(
            [sys.executable, "-c", "import trl_spatial, trl_spatial.cli; print(trl_spatial.__file__); trl_spatial.cli.main([])"],
            env=os.environ | {"PYTHONPATH": str(site)}, check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
        assert shown.startswith(str(site))
        assert (site / "bin" / "trl_spatial").is_file()

    def run_with_hub(self, words):
        """
        A command that names something on the Hub, by itself, as the address of the Hub is read when a program starts. It runs in
        a folder where the models' names stand for what is on the Hub.
        """
        online = self.folder / "online"
        online.mkdir(exist_ok=True)
        for name in ("a.png", "b.png", "pairs"):
            if not (online / name).exists():
                (online / name).symlink_to(self.folder / name)
        options = {"cwd": online, "env": os.environ | self.hub.environment}
        if words[1:3] == ["space", "serve"]:
            with run_server(["-m", *words], options):
                return
        if words[1] in LAUNCHED_COMMANDS:
            words = [f"trl_spatial.scripts.{words[1]}", *words[2:], *TINY[words[1]].split()]
        ended = run_python(["-m", *words], **options)
        assert ended.returncode == 0, ended.stderr


@contextmanager
def ended_well():
    """A program may end with an exit code, which has to be 0."""
    try:
        yield
    except SystemExit as end:
        assert not end.code, end.code


@contextmanager
def run_server(command, options):
    """A command that serves a page, at a port that is free; it gives the address."""
    port = free_port()
    with Program([*command, "--port", port], **options) as server:
        for _ in range(3000):
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}") as page:
                assert page.status == 200
                break
            assert server.is_running(), server.printed()
            time.sleep(0.1)
        else:
            pytest.fail("the page did not come up")
        yield f"http://127.0.0.1:{port}"
        os.kill(server.pid, signal.SIGTERM)
        server.wait()


def terminal():
    """The environment as in a terminal, although these tests may run under `make test`."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "MAKE", "MFLAGS"))}


def dry_run(words):
    """The commands that `make` would run."""
    make = ["make", "--dry-run", *words[1:]]
    return subprocess.run(
        make, cwd=REPOSITORY, env=terminal(), check=True, capture_output=True, text=True
    ).stdout  # fmt: skip


@pytest.mark.parametrize("document", RUN)
def test_every_command_and_program_runs(document, place, wheel_folder, monkeypatch):
    with HubStub() as hub:
        for name in ("Qwen/Qwen2.5-VL-7B-Instruct", "black-forest-labs/FLUX.1-dev"):
            files = (path for path in (place / name).rglob("*") if path.is_file())
            hub.files[name] = {path.relative_to(place / name).as_posix(): path.read_bytes() for path in files}
        reader = Reader(place, hub, wheel_folder, monkeypatch)
        reader.follow(document)
        assert hub.unknown == []
        if document == "hub_cards/README.md":
            assert hub.files.keys() >= ON_THE_HUB
    if document == "README.md":
        assert reader.ran[2:4] == ["make demo", "make test"]
    for name in RUN[document]:
        assert (place / name).exists() or (place / "online" / name).exists(), name


class Parsed(Exception):
    """A program has read its arguments."""


@pytest.mark.parametrize("document", PARSED)
def test_every_long_command_is_understood(document, monkeypatch):
    parse_args = argparse.ArgumentParser.parse_args

    def stop(*args, **kwargs):
        parse_args(*args, **kwargs)
        raise Parsed

    bash = [block for language, block in blocks(document) if language == "bash"]
    assert bash and "python" not in dict(blocks(document))
    for words in (words for block in bash for words in commands(block)):
        if words[0] == "make":  # a target that is not there is an error
            words = shlex.split(dry_run([*words, "-o", "installed", "INSTALLED=installed"]).splitlines()[-1])
            if words[1:3] != ["-m", "trl_spatial"]:
                continue
        if "trl_spatial" in words:  # by itself, or launched
            command, *options = words[words.index("trl_spatial") + 1 :]
            script = importlib.import_module(f"trl_spatial.scripts.{command}")
            assert script.make_parser().parse_args_and_config(options)
            continue
        assert words[0] == "python"
        module = importlib.import_module(words[1].removesuffix(".py").replace("/", "."))
        with monkeypatch.context() as patch, pytest.raises(Parsed):
            patch.setattr(argparse.ArgumentParser, "parse_args", stop)
            patch.setattr(sys, "argv", words[1:])
            module.main()


def test_no_block_of_any_document_is_left_out():
    with_blocks = {name for name in documents() if re.search(r"^\s*(```|~~~)", read(name), flags=re.MULTILINE)}
    assert with_blocks == {*RUN, *PARSED}
    for document in with_blocks:
        assert {language for language, _ in blocks(document)} <= {"bash", "python", "bibtex", "text"}, document
        fences = re.findall(r"^\s*(?:```|~~~)", read(document), flags=re.MULTILINE)
        assert len(fences) == 2 * len(blocks(document)), (
            document
        )  # one that is indented or of no language is not found


def test_every_recipe_and_measurement_is_in_the_text_of_its_folder():
    folders = ("recipes", ".yaml"), ("recipes/data", ".yaml"), ("recipes/bench", ".py"), ("recipes/ablations", ".py")
    for folder, suffix in folders:
        for path in (REPOSITORY / folder).glob(f"*{suffix}"):
            assert path.name in read(f"{folder}/README.md"), path


def test_the_first_texts_are_short():
    assert len(read("README.md").encode()) <= 9 * 1024
    assert len(read("CONTRIBUTING.md").encode()) <= 7 * 1024


def test_scoring_in_python_takes_ten_lines():
    program = next(block for language, block in blocks("README.md") if language == "python")
    assert "score(" in program
    assert len([line for line in program.splitlines() if line.strip()]) <= 10


def test_table_of_commands_is_complete():
    listed = re.findall(r"^\| `trl_spatial (\w+)", read("README.md"), flags=re.MULTILINE)
    assert listed == list(COMMANDS)


def test_links_to_files_exist():
    for document in documents():
        for target in re.findall(r"\]\(([^)#]+)\)", read(document)):
            if not target.startswith("http"):
                assert ((REPOSITORY / document).parent / target).exists(), (document, target)


def test_contributing_names_what_exists():
    text = read("CONTRIBUTING.md")
    makefile = read("Makefile")
    for target in re.findall(r"make ([a-z-]+)", "\n".join(re.findall(r"`+[^`]*`+", text))):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    paths = [path for folder in ("trl_spatial", "recipes", "tests") for path in (REPOSITORY / folder).rglob("*")]
    names = {path.name for path in paths} | {path.stem for path in paths} | {"hub_cards"}
    code = "\n".join(path.read_text(encoding="utf-8") for path in paths if path.suffix == ".py")
    for name in re.findall(r"\b[A-Za-z_]+(?=\.py\b)|\b[a-z]+_[a-z_]+\b|\b[A-Z][a-z]+[A-Z]\w+\b", text):
        assert name in names or re.search(rf"\b{name}\b", code), name


def test_options_in_the_text_exist():
    scripts = [importlib.import_module(f"trl_spatial.scripts.{name}") for name in COMMANDS]
    parsers = [script.make_parser() for script in scripts]
    actions = [action for parser in parsers for action in parser._actions]
    parsers += [part for a in actions if isinstance(a, argparse._SubParsersAction) for part in a.choices.values()]
    known = "\n".join(parser.format_help() for parser in parsers)
    for document in RUN:
        text = re.sub(r"^```.*?^```$", "", read(document), flags=re.MULTILINE | re.DOTALL)
        for option in re.findall(r"`[^`\n]*?(--[a-z0-9_-]+)", text):
            assert re.search(rf"{option}\b", known), (document, option)
