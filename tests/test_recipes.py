"""The recipes run, and their YAML files say only what differs from the defaults."""

import ast
import importlib.util
import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed.run
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from datasets import load_dataset

from trl_spatial import SpatialScore
from trl_spatial.gaussian_reward import GaussianRewardModel
from trl_spatial.scenes import make_preference_dataset, make_prompt_dataset
from trl_spatial.scripts import dpo, grpo, nft, reward


RECIPES = Path(__file__).parents[1] / "recipes"
RECIPE_YAML = RECIPES / "reward_spatialscore.yaml"
# file: its script, and keys that repeat the default on purpose
RECIPE_FILES = {
    "reward_spatialscore.yaml": (reward, {"objective"}),  # the paper's, whatever the default becomes
    "grpo_flux.yaml": (grpo, set()),
    "grpo_flux_fast.yaml": (grpo, set()),
    "grpo_qwen_image.yaml": (grpo, set()),
    "grpo_sd3.yaml": (grpo, set()),
    "grpo_z_image.yaml": (grpo, set()),
    "nft_flux.yaml": (nft, set()),
    "dpo_flux.yaml": (dpo, set()),
    "tiny/grpo.yaml": (grpo, set()),
}
TINY_GRPO = (
    "--num_generations 4 --top_k 1 --per_device_train_batch_size 2 --gradient_accumulation_steps 1 --lora_r 2 "
    "--num_inference_steps 4 --eval_num_inference_steps 2 --height 32 --width 32 --eval_height 32 --eval_width 32 "
    "--max_sequence_length 192 --max_steps 2 --eval_steps 1 --save_steps 1 --use_cpu --disable_tqdm true"
)


def training_recipes():
    """Those with settings beside them."""
    scripts = [path for path in RECIPES.glob("*.py") if path.with_suffix(".yaml").exists()]
    assert {path.name for path in scripts} == {"grpo_flux.py", "reward_spatialscore.py"}
    return scripts


def test_recipes_are_short():
    for path in training_recipes():
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 120, path


@pytest.fixture
def parse():
    """Values of all options, by name, for a recipe's YAML file or, without it, the defaults."""

    def run(name, use_file=True):
        script, _ = RECIPE_FILES[name]
        given = read_yaml(name) if use_file else {}
        arguments = ["--use_cpu", *(["--config", str(RECIPES / name)] if use_file else [])]
        for key in ("dataset", "output_dir", *(["rewards"] if script in (grpo, nft) else [])):
            arguments += [] if key in given else [f"--{key}", "none"]
        values = {}
        for part in script.make_parser().parse_args_and_config(arguments):
            values |= vars(part)
        return values

    return run


def read_yaml(name):
    return yaml.safe_load((RECIPES / name).read_text(encoding="utf-8"))


def test_every_yaml_of_options_is_tested():
    files = [path for path in RECIPES.rglob("*.yaml") if path.parent.name not in ("accelerate", "data")]
    assert {str(path.relative_to(RECIPES)) for path in files} == set(RECIPE_FILES)


@pytest.mark.parametrize("name", RECIPE_FILES)
def test_yaml_differs_from_the_defaults_in_every_line(name, parse):
    values, defaults = parse(name), parse(name, use_file=False)
    _, repeated = RECIPE_FILES[name]
    assert not [key for key in read_yaml(name) if values[key] == defaults[key] and key not in repeated]


def test_reward_yaml_is_the_papers():
    _, model_args, args = reward.make_parser().parse_args_and_config(
        ["--dataset", "pairs", "--use_cpu", "--config", str(RECIPE_YAML)]
    )
    assert model_args.model_name_or_path == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert args.learning_rate == 2e-6
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps * 8 == 32
    assert (args.objective, args.estimator, args.num_samples) == ("expected_nll", "monte_carlo", 1000)
    assert (args.min_pixels, args.max_pixels) == (512**2, 1024**2)


def test_grpo_yaml_is_the_papers(parse):
    values = parse("grpo_flux.yaml")
    expected = {
        "model_name_or_path": "black-forest-labs/FLUX.1-dev",
        "rewards": [read_yaml("reward_spatialscore.yaml")["output_dir"]],
        **{"num_generations": 24, "top_k": 6, "advantage_scope": "kept", "num_inference_steps": 6, "lora_r": 32},
        **{"learning_rate": 3e-4, "epsilon": 1e-4, "beta": 0.01, "dynamics": "flow_sde", "noise_level": 0.9},
        **{"height": 512, "width": 512, "eval_height": 1024, "eval_width": 1024, "eval_num_inference_steps": 28},
    }
    assert {key: values[key] for key in expected} == expected
    assert prompts_per_update(values, num_processes=8) == 48


# What the paper does not tell of the other models is from Flow-GRPO's recipes for them, for Z-Image from Flow-Factory's example
OTHER_FAMILIES = {
    "qwen_image": {
        "model_name_or_path": "Qwen/Qwen-Image",
        **{"guidance_scale": 4.0, "num_inference_steps": 10, "eval_num_inference_steps": 50},
        **{"noise_level": 1.2, "sde_window_size": 2, "sde_window_range": None},
    },
    "sd3": {
        "model_name_or_path": "stabilityai/stable-diffusion-3.5-medium",
        **{"guidance_scale": 4.5, "num_inference_steps": 10, "eval_num_inference_steps": 40},
        **{"noise_level": 0.7, "sde_window_size": 8, "sde_window_range": [0, 8], "max_sequence_length": 256},
    },
    "z_image": {
        "model_name_or_path": "Tongyi-MAI/Z-Image",
        **{"guidance_scale": 4.0, "num_inference_steps": 10, "eval_num_inference_steps": 40},
        **{"noise_level": 0.7, "sde_window_size": 1, "sde_window_range": [1, 4]},
    },
}


@pytest.mark.parametrize(
    ("family", "num_groups", "num_evaluations"), [("qwen_image", 32, 26), ("sd3", 48, 44), ("z_image", 48, 23)]
)
def test_yaml_of_the_other_families(parse, family, num_groups, num_evaluations):
    values, flux = parse(f"grpo_{family}.yaml"), parse("grpo_flux.yaml")
    expected = OTHER_FAMILIES[family]
    assert {key: values[key] for key in expected} == expected
    papers = ["num_generations", "top_k", "advantage_scope", "lora_r", "learning_rate", "epsilon", "beta", "dynamics"]
    same = ["rewards", "lora_alpha", "height", "width", "eval_height", "eval_width", "max_steps"]
    assert {key: values[key] for key in papers + same} == {key: flux[key] for key in papers + same}
    assert prompts_per_update(values, num_processes=8) == num_groups
    assert 2 * evaluations_per_image(values) == num_evaluations  # guidance takes two for a velocity


def test_fast_yaml_costs_two_thirds(parse):
    values, fast = parse("grpo_flux.yaml"), parse("grpo_flux_fast.yaml")
    assert (fast["dynamics"], fast["noise_level"], fast["sde_window_size"]) == ("cps", 0.8, 2)
    assert prompts_per_update(fast, num_processes=8) == 48
    assert (evaluations_per_image(values), evaluations_per_image(fast)) == (13.5, 9.0)


def prompts_per_update(values, num_processes):
    batch = values["per_device_train_batch_size"] * values["gradient_accumulation_steps"] * num_processes
    return batch / (2 * values["top_k"])


def evaluations_per_image(values):
    num_steps, size = values["num_inference_steps"], values["sde_window_size"]
    return num_steps + 3 * (size or num_steps - 1) * 2 * values["top_k"] / values["num_generations"]


@pytest.mark.parametrize("path", sorted((RECIPES / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_configs_are_understood(path):
    config = load_config_from_file(str(path))
    distributed_type, num_processes = {
        "single_gpu": ("NO", 1),
        "multi_gpu": ("MULTI_GPU", 8),
        "fsdp2": ("FSDP", 8),
        "deepspeed_zero2": ("DEEPSPEED", 8),
    }[path.stem]
    assert (config.distributed_type, config.num_processes) == (distributed_type, num_processes)
    assert config.mixed_precision == "bf16"


def test_commands_for_several_machines_are_understood():
    """Those of the README and of its SLURM script: options of the launcher are the launcher's, all others the command's."""
    text = (RECIPES / "README.md").read_text(encoding="utf-8")
    text = text.split("## Multiple machines")[1].split("\n## ")[0]
    blocks = re.findall(r"^```text\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if " grpo " in line]
    seen = []
    for line in lines:
        words = shlex.split(line)
        if words[0] == "srun":
            assert words[:3] == ["srun", "bash", "-c"]
            words = shlex.split(words[3])
        seen.append(words[0])
        words = [{"$RANK": "1", "$SLURM_NODEID": "1", "$HEAD": "head"}.get(word, word) for word in words]
        if words[0] == "trl_spatial":
            launch_args, words = grpo.make_parser().split_launch_args(words[2:], launch_command_parser())
            args = launch_command_parser().parse_args([*launch_args, "script"])
        elif words[0] == "accelerate":
            args = launch_command_parser().parse_args(words[2:])
        else:
            args = torch.distributed.run.get_args_parser().parse_args(words[1:])
            assert (args.nnodes, args.nproc_per_node, args.node_rank) == ("4", "8", 1)
            assert (args.master_addr, args.master_port, args.module) == ("head", 29500, True)
        if words[0] != "torchrun":
            assert (args.num_machines, args.num_processes, args.machine_rank) == (4, 32, 1)
            assert (args.main_process_ip, args.main_process_port) == ("head", 29500)
            assert load_config_from_file(args.config_file).distributed_type == "MULTI_GPU"
        if words[0] in ("accelerate", "torchrun"):
            assert args.training_script == "trl_spatial" and args.training_script_args[0] == "grpo"
            words = args.training_script_args[1:]
        values = grpo.make_parser().parse_args_and_config([*words, "--use_cpu"])[-1]
        assert 32 * values.num_prompts_per_device == 32
    assert seen == ["trl_spatial", "accelerate", "torchrun", "trl_spatial"]


def load_recipe(name):
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_reward_recipe_trains_and_measures(tmp_path, backbone_folder, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pairs = make_preference_dataset(16, split="test", image_size=32)
    pairs.to_parquet("test.parquet")
    make_preference_dataset(4, image_size=32).to_parquet("train.parquet")
    (tmp_path / "pairs").mkdir()
    for split in ("train", "test"):
        (tmp_path / f"{split}.parquet").rename(tmp_path / "pairs" / f"{split}.parquet")

    recipe = load_recipe("reward_spatialscore")
    arguments = (
        f"--config {RECIPE_YAML} --dataset pairs --model_name_or_path {backbone_folder} --output_dir out --lora_r 2 "
        "--max_steps 2 --eval_steps 1 --save_steps 1 --per_device_train_batch_size 2 --dataloader_num_workers 0 "
        "--use_cpu --disable_tqdm true --report_to none --min_pixels 256 --max_pixels 1024"
    )
    recipe.main(*recipe.make_parser().parse_args_and_config(arguments.split()))

    results = json.loads((tmp_path / "out" / "held_out.json").read_text())
    by_level = [result["n"] for name, result in results["accuracy"].items() if name != "all pairs"]
    assert by_level == [sum(level == wanted for level in pairs["level"]) for wanted in sorted(set(pairs["level"]))]
    assert results["accuracy"]["all pairs"]["n"] == 16
    for result in results["accuracy"].values():
        low, high = result["interval"]
        assert 0 <= low <= result["estimate"] <= high <= 1
    assert "16" in capsys.readouterr().out
    # the folder is a checkpoint, with an evaluation by which the best one was chosen
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


@pytest.fixture
def grpo_place(tmp_path, monkeypatch, official_checkpoints, processor):
    """A folder with prompts and a reward model where the recipes expect it."""
    monkeypatch.chdir(tmp_path)
    folder, _ = official_checkpoints["qwen2_5_vl"]
    model = GaussianRewardModel.from_backbone(
        folder, reward_token_id=processor.reward_token_id, head_hidden_sizes=(16, 8)
    )
    SpatialScore(model, processor).save_pretrained("SpatialScore-7B")
    for split, number in (("train", 3), ("test", 4)):
        (tmp_path / "prompts").mkdir(exist_ok=True)
        make_prompt_dataset(number, split=split).to_parquet(tmp_path / "prompts" / f"{split}.parquet")
    return tmp_path


def test_grpo_recipe_trains_and_compares_under_accelerate_launch(grpo_place, flux_folder):
    command = (
        f"accelerate launch --config_file {RECIPES}/accelerate/single_gpu.yaml --mixed_precision no "
        f"{RECIPES}/grpo_flux.py --config {RECIPES}/grpo_flux.yaml --dataset prompts --eval_rewards rules "
        f"--model_name_or_path {flux_folder} {TINY_GRPO} --learning_rate 0.1 --ema_decay 0"
    )
    environment = os.environ | {"PYTHONPATH": str(RECIPES.parent)}
    output = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *command.split()[2:]],
        env=environment, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    check_comparison(grpo_place, flux_folder, "FLUX.1-dev-SpatialScore", output, guidance_scale=3.5)


@pytest.mark.parametrize(
    ("family", "guidance", "folder"),
    [
        ("qwen_image", {"true_cfg_scale": 4.0, "negative_prompt": " "}, "Qwen-Image-SpatialScore"),
        ("sd3", {"guidance_scale": 4.5}, "stable-diffusion-3.5-medium-SpatialScore"),
        ("z_image", {"guidance_scale": 4.0}, "Z-Image-SpatialScore"),
    ],
)
def test_recipes_of_the_other_families_train_and_compare(grpo_place, family, guidance, folder, capsys):
    importlib.import_module(family).main(["pipeline"])  # a tiny one
    recipe = load_recipe("grpo_flux")
    arguments = (
        f"--config {RECIPES}/grpo_{family}.yaml --dataset prompts --eval_rewards rules --model_name_or_path pipeline "
        f"{TINY_GRPO} --sde_window_size 2 --sde_window_range 0 2 --learning_rate 0.1 --ema_decay 0"
    )
    recipe.main(*recipe.make_parser().parse_args_and_config(arguments.split()))
    check_comparison(grpo_place, "pipeline", folder, capsys.readouterr().out, **guidance)


def check_comparison(place, pipeline_folder, name, output, **guidance):
    """What a recipe printed and left in its folder, against plain diffusers."""
    folder = place / name
    results = json.loads((folder / "before_after.json").read_text())
    assert list(results) == ["spatial_score", "rules"]
    for name, result in results.items():
        low, high = result["interval"]
        assert result["n"] == 4 and low <= result["change"] <= high
        assert math.isclose(result["after"] - result["before"], result["change"], abs_tol=1e-9)
        assert re.search(rf"^{name} +before", output, flags=re.MULTILINE)
    assert results["spatial_score"]["change"] != 0
    # the images before are the base model's, those after the exported weights'
    rewards = rewards_of_plain_pipelines(place, pipeline_folder, folder, **guidance)
    assert results["spatial_score"]["before"] == pytest.approx(rewards[0], abs=1e-4)
    assert results["spatial_score"]["after"] == pytest.approx(rewards[1], abs=1e-4)
    assert {path.name for path in (folder / "images").glob("eval_*")} >= {"eval_000001.png", "eval_000002.png"}


def rewards_of_plain_pipelines(place, pipeline_folder, lora_folder, **guidance):
    """Mean reward of the test prompts without and with the exported LoRA, by diffusers alone."""
    from diffusers import DiffusionPipeline

    from trl_spatial.generation.seeds import image_generator

    pipeline = DiffusionPipeline.from_pretrained(pipeline_folder)
    scorer = SpatialScore.from_pretrained("SpatialScore-7B")
    prompts = load_dataset("parquet", data_files=str(place / "prompts" / "test.parquet"))["train"]["prompt"][:]
    means = []
    for lora in (None, lora_folder):
        if lora:
            pipeline.load_lora_weights(lora)
        images = [
            pipeline(
                prompt, height=32, width=32, num_inference_steps=2, max_sequence_length=192,
                generator=image_generator(42, index, 0), **guidance,
            ).images[0]
            for index, prompt in enumerate(prompts)
        ]  # fmt: skip
        means.append(sum(scorer(prompts, images)) / len(prompts))
    return means


def test_fast_recipe_trains(grpo_place, flux_folder):
    arguments = (
        f"--config {RECIPES}/grpo_flux_fast.yaml --dataset prompts --model_name_or_path {flux_folder} {TINY_GRPO}"
    )
    grpo.main(*grpo.make_parser().parse_args_and_config(arguments.split()))
    folder = grpo_place / "FLUX.1-dev-SpatialScore-fast"
    state = json.loads((folder / "checkpoint-2" / "trainer_state.json").read_text())
    (entry,) = [entry for entry in state["log_history"] if "loss" in entry and entry["step"] == 2]
    # 2 rollouts of 4 images: 4 steps each, and 3 evaluations of 2 kept images at 2 trained steps
    assert entry["num_policy_passes"] == 2 * (4 * 4 + 3 * 2 * 2)
    assert (folder / "pytorch_lora_weights.safetensors").is_file()


def test_recipes_import_only_the_package_and_its_dependencies():
    for path in training_recipes():
        modules = {
            (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, (ast.Import, ast.ImportFrom))
        }
        assert modules <= {"json", "pathlib", "numpy", "torch", "trl_spatial"}


def test_the_bench_of_a_busy_machine_measures_what_the_commands_set(capsys):
    busy = load_recipe("bench/busy")
    busy.work(1)
    assert float(capsys.readouterr().out) > 0
    source = (RECIPES.parent / "trl_spatial" / "cli.py").read_text(encoding="utf-8")
    ((name, value),) = busy.POLICIES[busy.OURS].items()
    assert f'os.environ.setdefault("{name}", "{value}")' in source
