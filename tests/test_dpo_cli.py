"""`trl_spatial dpo` at tiny size: from a dataset on disk to weights that plain diffusers loads."""

import importlib
import re
import shlex

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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--dataset pairs --dataset_train_split validation", "has no split 'validation'"),
        ("--dataset nowhere/there.jsonl", "There is no file or folder"),
        ("--dataset pairs --width 64", "`chosen`: .* has 64x64 pixels, another shape than the 64x32 of training"),
        ("--dataset pairs --beta 0", "`beta` is 0.0. Use a positive number"),
        ("--dataset pairs --eval_dataset prompts.txt --eval_strategy steps", "no reward function that could judge"),
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
