"""`trl_spatial nft` at tiny size: from prompts to weights that plain diffusers loads."""

import importlib
import shlex

import pytest
from diffusers import FluxPipeline
from safetensors.torch import load_file


TINY = (
    "--num_generations 4 --top_k 1 --per_device_train_batch_size 2 --gradient_accumulation_steps 1 --lora_r 2 "
    "--num_inference_steps 3 --height 32 --width 32 --max_sequence_length 192 --ema_decay 0 --use_cpu --disable_tqdm true "
    "--report_to none --dataset scenes:8 --rewards rules --output_dir out"
)


@pytest.fixture
def run(tmp_path, monkeypatch, flux_folder):
    """Runs the script in this process."""
    monkeypatch.chdir(tmp_path)
    script = importlib.import_module("trl_spatial.scripts.nft")

    def run(arguments):
        line = f"--model_name_or_path {flux_folder} {TINY} {arguments}"
        script.main(*script.make_parser().parse_args_and_config(shlex.split(line)))

    return run


@pytest.mark.parametrize("scouts", ["", "--num_scouts 6 --scout_steps 1"])
def test_trains_and_resumes(run, flux_folder, scouts, capsys):
    run(f"--max_steps 2 --save_steps 1 {scouts}")
    assert "Weights saved to out." in capsys.readouterr().out
    weights = load_file("out/pytorch_lora_weights.safetensors")
    FluxPipeline.from_pretrained(flux_folder).load_lora_weights("out")
    run(f"--max_steps 3 --save_steps 1 {scouts} --resume_from_checkpoint true")
    longer = load_file("out/pytorch_lora_weights.safetensors")
    assert longer.keys() == weights.keys()
    assert any(not longer[name].equal(weight) for name, weight in weights.items())


def test_memory_is_estimated(run, capsys):
    run("--estimate")
    assert "old policy" in capsys.readouterr().out
