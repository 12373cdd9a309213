"""`trl_spatial dpo` at tiny size: from a dataset on disk to weights that plain diffusers loads."""

import importlib
import re
import shlex
import shutil

import pytest
from diffusers import FluxPipeline
from safetensors.torch import load_file

from trl_spatial.cli import main
from trl_spatial.scenes import make_preference_dataset


TINY = (
    "--per_device_train_batch_size 2 --gradient_accumulation_steps 1 --lora_r 2 --eval_num_inference_steps 2 --height 32 "
    "--width 32 --max_sequence_length 192 --ema_decay 0 --max_steps 2 --use_cpu --disable_tqdm true --report_to none --output_dir out"
)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with preference pairs of scenes."""
    make_preference_dataset(6, split="train", seed=0, image_size=64).save_to_disk(tmp_path / "pairs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_trains_on_a_dataset_and_resumes(place, flux_folder, capsys):
    script = importlib.import_module("trl_spatial.scripts.dpo")
    line = f"--model_name_or_path {flux_folder} --dataset pairs {TINY} --save_steps 1"
    script.main(*script.make_parser().parse_args_and_config(shlex.split(line)))
    weights = load_file(place / "out" / "pytorch_lora_weights.safetensors")
    assert all(weight.abs().max() > 0 for name, weight in weights.items() if "lora_B" in name)
    assert "Weights saved to out." in capsys.readouterr().out
    FluxPipeline.from_pretrained(flux_folder).load_lora_weights(place / "out")

    line = line.replace("--max_steps 2", "--max_steps 3") + " --resume_from_checkpoint true"
    script.main(*script.make_parser().parse_args_and_config(shlex.split(line)))
    longer = load_file(place / "out" / "pytorch_lora_weights.safetensors")
    assert all(not longer[name].equal(weight) for name, weight in weights.items() if "lora_B" in name)


def test_memory_is_estimated_and_nothing_is_loaded(tmp_path, monkeypatch, flux_folder, capsys):
    folder = shutil.copytree(flux_folder, tmp_path / "flux")
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    monkeypatch.chdir(tmp_path)
    line = f"dpo --model_name_or_path {folder} --dataset nowhere {TINY} --eval_rewards SpatialScore-7B --estimate"
    assert main(shlex.split(line)) == 0
    out = capsys.readouterr().out
    assert "4 images at a time in training" in out  # of two pairs
    assert "needed to encode images" in out and "needed to sample" not in out and "needed to evaluate" not in out
    assert re.search(r"Reward models: 1\d\.\d\d GiB", out)
    assert not (tmp_path / "out").exists()
    assert main(shlex.split(f"{line} --eval_strategy steps")) == 0
    assert "needed to evaluate: decode" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", r"Reward models: 1\d\.\d\d GiB"),
        ("", r"GiB on each device +bfloat16"),  # the run is for a GPU, which this machine has not
        ("--reward_device cuda:0", r"Reward models: 1\d\.\d\d GiB"),
        ("--reward_device cuda:1", r"Reward models: 0\.00 GiB"),
        ("--reward_device cpu", r"Reward models: 0\.00 GiB"),
        ("--torch_compile true", r"needed to train +\d+\.\d\d"),
        ("--bf16 false", r"GiB on each device +float32"),
        ("--bf16 false --dtype bfloat16", r"GiB on each device +bfloat16"),
        ("--optim adamw_torch_8bit", r"`optim` is 'adamw_torch_8bit', but is counted as AdamW"),
    ],
)
def test_the_estimate_is_of_the_options(tmp_path, monkeypatch, flux_folder, capsys, options, expected):
    monkeypatch.chdir(tmp_path)
    model = f"--model_name_or_path {flux_folder} --dataset nowhere --eval_rewards SpatialScore-7B"
    assert main(shlex.split(f"dpo {model} {TINY} --estimate {options}")) == 0
    assert re.search(expected, capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--dataset pairs --dataset_train_split validation", "has no split 'validation'.* --dataset_train_split"),
        ("--dataset nowhere/there.jsonl", "There is no file or folder"),
        ("--dataset pairs --width 64", "`chosen`: .* has 64x64 pixels, another shape than the 64x32 of training"),
        ("--dataset pairs --beta 0", "`beta` is 0.0. Use a positive number"),
        ("--dataset pairs --eval_dataset prompts.txt --eval_strategy steps", "no reward function to score"),
        ("--dataset pairs --dataset_test_split train --eval_strategy steps", "(`--eval_strategy no`)"),
    ],
)
def test_mistakes_are_one_message(place, flux_folder, arguments, message, capsys):
    (place / "prompts.txt").write_text("a red circle\n")
    line = f"--model_name_or_path {flux_folder} {TINY} {arguments}"
    try:
        code = main(["dpo", *shlex.split(line)])
    except SystemExit as end:
        code = end.code
    error = capsys.readouterr().err
    assert code in (1, 2)
    assert re.search(message, error), error
    assert "Traceback" not in error
