"""What only a GPU can show: everything else is tested on a CPU. Skipped where there is none."""

import importlib
import math
import shlex

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file

from tests.diffusion_grpo.families import FAMILIES, GUIDED, make_small_trainer
from trl_spatial import SpatialScore
from trl_spatial.diffusion_grpo import attention_lora_config
from trl_spatial.diffusion_grpo.policies import make_policy
from trl_spatial.diffusion_grpo.runtime.evaluation import PolicyGenerator
from trl_spatial.diffusion_grpo.runtime.model_setup import load_pipeline, quantization_config
from trl_spatial.diffusion_grpo.runtime.prompt_cache import PromptCache
from trl_spatial.generation.drawing import draw_rows
from trl_spatial.scenes import make_preference_dataset


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

PROMPTS = ["a red cube to the left of a blue sphere", "a cat"]
SMALL = (
    "--lora_r 2 --height 32 --width 32 --max_sequence_length 192 --ema_decay 0.9 --disable_tqdm true --report_to none "
    "--per_device_train_batch_size 2 --output_dir out"
)
ONLINE = f"{SMALL} --num_generations 4 --top_k 1 --num_inference_steps 3 --dataset scenes:8 --rewards tests.diffusion_grpo.families:brightness"
COMMANDS = {
    "grpo": f"{ONLINE} --gradient_accumulation_steps 2 --beta 0.01 --sde_window_size 2 --gradient_checkpointing true",
    "grpo, scouts": f"{ONLINE} --gradient_accumulation_steps 2 --num_scouts 6 --scout_steps 1",
    "nft": f"{ONLINE} --gradient_accumulation_steps 1",
    "dpo": f"{SMALL} --gradient_accumulation_steps 1 --dataset pairs --eval_num_inference_steps 2",
}


def make_trainer(name, folder, pipeline, **kwargs):
    settings = {"num_iterations": 2, "beta": 0.01, "learning_rate": 1e-3}
    return make_small_trainer(name, folder, pipeline, attention_lora_config(rank=2), **(settings | kwargs))


def logs(trainer):
    return [log for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("name", GUIDED)
def test_the_first_ratio_is_1(tmp_path, name, gradient_checkpointing):
    """Whatever the kernels round: drawing and training are the same computation."""
    pipeline = FAMILIES[name].build().to(torch.bfloat16)
    trainer = make_trainer(name, tmp_path, pipeline, gradient_checkpointing=gradient_checkpointing)
    trainer.train()
    assert trainer.args.bf16 and trainer.accelerator.device.type == "cuda"
    first, second = logs(trainer)
    assert (first["ratio/mean"], first["ratio/std"]) == (1.0, 0.0)
    assert first["grad_norm"] > 0 and second["ratio/std"] > 0 and second["kl"] > 0


@pytest.mark.parametrize("name", GUIDED)
def test_compiled_blocks_compute_the_same(tmp_path, name):
    """One update without rounding to bfloat16, from the same weights and noise."""
    runs = []
    for torch_compile in (False, True):
        trainer = make_trainer(
            name, tmp_path / str(torch_compile), FAMILIES[name].build(), bf16=False, torch_compile=torch_compile
        )
        trainer.train()
        runs.append(logs(trainer))
    for plain, compiled in zip(*runs, strict=True):
        assert compiled["reward"] == pytest.approx(plain["reward"], abs=0.5)
        assert compiled["ratio/mean"] == pytest.approx(plain["ratio/mean"], abs=1e-2)
        assert compiled["grad_norm"] == pytest.approx(plain["grad_norm"], rel=0.05)


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_adapters_train_beside_quantized_weights(tmp_path, method):
    FAMILIES["flux"].build().save_pretrained(tmp_path / "flux")
    pipeline = load_pipeline(
        str(tmp_path / "flux"),
        torch.bfloat16,
        device=torch.device("cuda"),
        quantization_config=quantization_config(method, torch.bfloat16),
    )
    trainer = make_trainer("flux", tmp_path / "run", pipeline, gradient_checkpointing=True)
    trainer.train()
    first, second = logs(trainer)
    assert first["ratio/mean"] == pytest.approx(1.0, abs=1e-2) and first["grad_norm"] > 0
    assert math.isfinite(second["loss"])
    trainer.save_model()
    assert load_file(tmp_path / "run" / "pytorch_lora_weights.safetensors")


def make_generator(name, policy, device):
    options = FAMILIES[name].options()
    cache = PromptCache(policy, device, negative_prompt=policy.negative_prompt(options))
    return PolicyGenerator(policy, policy.transformer, cache, options)


@pytest.mark.parametrize("name", GUIDED)
def test_an_image_depends_on_its_seed_alone(name):
    """The noise is the CPU's, and other images of a batch change no more than the rounding of its convolutions."""
    policy = make_policy(FAMILIES[name].build(), max_sequence_length=16)
    policy.pipeline.to("cuda")
    generator = make_generator(name, policy, "cuda")
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    drawn = [
        [
            image
            for batch in draw_rows(generator, rows, batch_size=size, seed=3, num_images=3)
            for image in batch.images
        ]
        for size in (1, 4)
    ]
    for alone, together in zip(*drawn, strict=True):
        difference = np.abs(np.asarray(alone, dtype=float) - np.asarray(together, dtype=float))
        assert difference.max() <= 4
    policy.pipeline.to("cpu")
    generator = make_generator(name, policy, "cpu")
    (on_cpu,) = (batch.images[0] for batch in draw_rows(generator, rows[:1], batch_size=1, seed=3))
    assert np.abs(np.asarray(on_cpu, dtype=float) - np.asarray(drawn[0][0], dtype=float)).max() <= 4


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_trains_and_resumes(tmp_path, monkeypatch, flux_folder, command):
    """Interrupted or not, the same weights as far as sums in another order go."""
    monkeypatch.chdir(tmp_path)
    make_preference_dataset(6, split="train", seed=0, image_size=32).save_to_disk(tmp_path / "pairs")
    script = importlib.import_module(f"trl_spatial.scripts.{command.partition(',')[0]}")

    def run(arguments):
        line = f"--model_name_or_path {flux_folder} {COMMANDS[command]} --save_steps 1 {arguments}"
        script.main(*script.make_parser().parse_args_and_config(shlex.split(line)))
        return load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")

    whole = run("--max_steps 3 --lr_scheduler_type constant")
    (tmp_path / "out").rename(tmp_path / "whole")
    run("--max_steps 2 --lr_scheduler_type constant")
    resumed = run("--max_steps 3 --lr_scheduler_type constant --resume_from_checkpoint true")
    trained = [key for key in whole if "lora_B" in key]  # which are 0 before
    error, size = (
        torch.cat([weights[key].flatten() - shift * whole[key].flatten() for key in trained]).norm()
        for weights, shift in ((resumed, 1), (whole, 0))
    )
    assert error < 0.05 * size
    FluxPipeline.from_pretrained(flux_folder).to("cuda").load_lora_weights(tmp_path / "out")


def test_a_reward_model_trains_resumes_and_scores_as_on_a_cpu(tmp_path, monkeypatch, backbone_folder):
    monkeypatch.chdir(tmp_path)
    dataset = make_preference_dataset(6, split="train", seed=0, image_size=64)
    dataset.save_to_disk(tmp_path / "pairs")
    script = importlib.import_module("trl_spatial.scripts.reward")
    line = (
        f"--model_name_or_path {backbone_folder} --dataset pairs --output_dir out --lora_r 2 --max_pixels 4096 "
        "--per_device_train_batch_size 2 --gradient_accumulation_steps 1 --dataloader_num_workers 0 --save_steps 1 "
        "--disable_tqdm true --report_to none"
    )
    for arguments in ("--max_steps 2", "--max_steps 3 --resume_from_checkpoint true"):
        script.main(*script.make_parser().parse_args_and_config(shlex.split(f"{line} {arguments}")))
    prompts, images = dataset["prompt"], dataset["chosen"]
    mean, std = (
        np.stack(values)
        for values in zip(
            *(
                SpatialScore.from_pretrained("out", dtype="float32", device=device).score(prompts, images)
                for device in ("cpu", "cuda")
            ),
            strict=True,
        )
    )
    np.testing.assert_allclose(mean[1], mean[0], atol=2e-3)
    np.testing.assert_allclose(std[1], std[0], rtol=2e-3)
