"""The recipes run, and their YAML files say only what differs from the defaults."""

import ast
import importlib.util
import json
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from trl_spatial.scenes import make_preference_dataset
from trl_spatial.scripts.reward import make_parser


RECIPES = Path(__file__).parents[1] / "recipes"
RECIPE_YAML = RECIPES / "reward_spatialscore.yaml"


def test_recipes_are_short():
    for path in RECIPES.glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 120, path


def test_yaml_differs_from_the_defaults_in_every_line():
    arguments = ["--dataset", "pairs", "--use_cpu"]
    defaults = {}
    for part in make_parser().parse_args_and_config(arguments):
        defaults |= vars(part)
    values = {}
    for part in make_parser().parse_args_and_config([*arguments, "--config", str(RECIPE_YAML)]):
        values |= vars(part)
    same = [
        key
        for key in yaml.safe_load(RECIPE_YAML.read_text(encoding="utf-8"))
        if values[key] == defaults[key] and key not in ("objective",)  # the paper's, whatever the default becomes
    ]
    assert not same


def test_yaml_is_the_papers():
    _, model_args, args = make_parser().parse_args_and_config(
        ["--dataset", "pairs", "--use_cpu", "--config", str(RECIPE_YAML)]
    )
    assert model_args.model_name_or_path == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert args.learning_rate == 2e-6
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps * 8 == 32
    assert (args.objective, args.estimator, args.num_samples) == ("expected_nll", "monte_carlo", 1000)
    assert (args.min_pixels, args.max_pixels) == (512**2, 1024**2)


@pytest.mark.parametrize("path", sorted((RECIPES / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_configs_are_understood(path):
    config = load_config_from_file(str(path))
    assert config.num_processes == 8
    assert config.mixed_precision == "bf16"
    assert (
        config.distributed_type
        == {"multi_gpu": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed_zero2": "DEEPSPEED"}[path.stem]
    )


def load_recipe():
    spec = importlib.util.spec_from_file_location("reward_spatialscore", RECIPES / "reward_spatialscore.py")
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

    recipe = load_recipe()
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


def test_recipes_import_only_the_package_and_its_dependencies():
    for path in RECIPES.glob("*.py"):
        modules = {
            (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, (ast.Import, ast.ImportFrom))
        }
        assert modules <= {"json", "pathlib", "numpy", "torch", "trl_spatial"}
