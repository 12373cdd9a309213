"""How fast is training at true size on one GPU, and which lever helps?

    python recipes/bench_gpu.py --output bench_gpu

FLUX.1-dev and Qwen-Image in their true architectures with random weights, at 512², LoRA of rank 32: a rollout of `--num_images`
images and the training on those that are kept, with one lever at a time, and Qwen-Image with guidance, which takes two evaluations
for a velocity. The marks to pass are 1 image per second for FLUX.1-dev and 0.5 for Qwen-Image with guidance. SpatialScore on the architecture of Qwen2.5-VL-7B, with
LoRA and with NF4 besides. A row that does not fit is noted and the next one is run. Rows that `--output` has already are not run
again. Text encoders and rewards are left out: they run once per prompt and beside the generator. `--tiny` runs the same code on
tiny models, on the CPU too.
"""

import argparse
import gc
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from trl_spatial import DiffusionGRPOConfig
from trl_spatial.diffusion_grpo import attention_lora_config
from trl_spatial.diffusion_grpo.policies import DiffusionPolicy, SamplingOptions, make_policy
from trl_spatial.diffusion_grpo.rollout import sample_rollout
from trl_spatial.diffusion_grpo.runtime.memory import load_architecture
from trl_spatial.diffusion_grpo.runtime.model_setup import prepare_transformer
from trl_spatial.diffusion_grpo.sde import sde_step
from trl_spatial.generation.seeds import image_generator


FLUX, QWEN = "black-forest-labs/FLUX.1-dev", "Qwen/Qwen-Image"
# What makes an architecture tiny; everything else, and all of the code, is as it is at true size
TINY: dict[str, dict[str, Any]] = {
    "transformer": {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2},
    "vae": {"block_out_channels": [32] * 4, "layers_per_block": 1, "base_dim": 8, "num_res_blocks": 1},
    "text": {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
             "num_key_value_heads": 1, "vocab_size": 152064,
             "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}},
    "vision": {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64},
}  # fmt: skip


@dataclass(frozen=True)
class Lever:
    """Settings of [`DiffusionGRPOConfig`] that differ from the first row, which share of the images is kept, and how the models run."""

    settings: dict[str, Any] = field(default_factory=dict)
    kept: float = 1.0
    is_nf4: bool = False
    is_offloaded: bool = False
    attention_backend: str | None = None


LEVERS = {
    "all images, all steps": Lever(),
    "filter": Lever(kept=0.5),
    "window 2": Lever({"sde_window_size": 2}),
    "compile": Lever({"torch_compile": True}),
    "attention _native_cudnn": Lever(attention_backend="_native_cudnn"),
    "attention _native_flash": Lever(attention_backend="_native_flash"),
    "no checkpointing": Lever({"gradient_checkpointing": False}),
    "VAE offloaded": Lever(is_offloaded=True),
    "NF4": Lever(is_nf4=True),
    "filter, window 2": Lever({"sde_window_size": 2}, kept=0.5),
    "filter, window 2, compile": Lever({"sde_window_size": 2, "torch_compile": True}, kept=0.5),
}
GUIDED = "Qwen-Image with guidance"
GUIDED_LEVERS = ("all images, all steps", "filter, window 2", "filter, window 2, compile")
# Images per second of one H100 that the project set out for
MARKS = {"FLUX.1-dev: filter, window 2, compile": 1.0, f"{GUIDED}: filter, window 2, compile": 0.5}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock(function: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Seconds of a call, after one that sets everything up."""
    function()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def matmul_ceiling(device: torch.device, size: int) -> float:
    """Floating-point operations per second of a product of two square matrices in bfloat16."""
    matrix = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    return 2 * size**3 / clock(lambda: matrix @ matrix, device, repeats=10)


def on_device(build: Callable[[], nn.Module], device: torch.device) -> nn.Module:
    """Builds a model in bfloat16 where it will be: in float32 or on the CPU first, it would not fit."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return build().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)


def build_policy(name: str, device: torch.device, is_tiny: bool) -> DiffusionPolicy:
    """The policy of a family with random weights and without text encoders."""
    architecture = load_architecture(name)
    pipeline_class = getattr(diffusers, architecture["_class_name"])
    components: dict[str, Any] = {key: None for key in architecture if key.startswith(("text_encoder", "tokenizer"))}
    for component in ("scheduler", "transformer", "vae"):
        _, class_name, config = architecture[component]
        if is_tiny:
            config = {**config, **{key: value for key, value in TINY.get(component, {}).items() if key in config}}
        build = partial(getattr(diffusers, class_name).from_config, config)
        components[component] = build() if component == "scheduler" else on_device(build, device)
    return make_policy(pipeline_class(**components))


def count_flops(function: Callable[[], Any]) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def measure_generator(
    name: str, guidance_scale: float, lever: Lever, args: argparse.Namespace, device: torch.device
) -> dict[str, float]:
    """Images per second of sampling and training, as [`DiffusionGRPOTrainer`] calls the model."""
    policy = build_policy(name, device, args.tiny)
    if lever.is_nf4:
        quantize(policy.transformer, device)
    config = DiffusionGRPOConfig(
        "bench", num_inference_steps=6, height=args.size, width=args.size, use_cpu=device.type == "cpu",
        guidance_scale=guidance_scale, per_device_train_batch_size=args.batch_size, save_strategy="no",
        beta=0.0, bf16=device.type == "cuda", report_to="none", **lever.settings,
    )  # fmt: skip
    if args.tiny and config.torch_compile:
        config.torch_compile_backend = "aot_eager"  # the same graphs without the minutes of a compiler
    transformer: Any = prepare_transformer(policy, config, attention_lora_config())
    policy.vae.to(device)
    if lever.is_offloaded:
        policy.offload_vae(device)
    if lever.attention_backend is not None:
        transformer.set_attention_backend(lever.attention_backend)
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    options = SamplingOptions(args.size, args.size, 6, config.guidance_scale, negative_prompt=" ")
    sigmas = policy.prepare_sigmas(options)
    trained_steps = tuple(range(config.sde_window_size or 5))
    embeds = {
        key: torch.ones(shape, dtype=torch.long, device=device) if key.endswith("mask")
        else torch.randn(shape, device=device, dtype=torch.bfloat16)
        for key, shape in policy.embed_shapes(args.num_images).items()
    }  # fmt: skip
    if policy.negative_prompt(options) is not None:
        embeds |= {f"negative_{key}": tensor for key, tensor in embeds.items()}
    autocast = partial(torch.autocast, device.type, torch.bfloat16)

    def sample() -> Any:
        with autocast():
            return sample_rollout(
                policy, transformer, embeds, [image_generator(0, image) for image in range(args.num_images)], options,
                sigmas=sigmas, trained_steps=trained_steps, noise_level=0.9, dynamics="flow_sde", batch_size=args.batch_size,
            )  # fmt: skip

    def train(rollout: Any) -> None:
        for start in range(0, int(args.num_images * lever.kept), args.batch_size):
            rows = slice(start, start + args.batch_size)
            for k, step in enumerate(trained_steps):
                batch = {key: tensor[rows] for key, tensor in embeds.items()}
                with autocast():
                    velocity = policy.predict_velocity(
                        transformer, rollout.latents[rows, k], sigmas[step], batch, options
                    )
                output = sde_step(
                    velocity, rollout.latents[rows, k], sigmas[step], sigmas[step + 1], 0.9, dynamics="flow_sde",
                    sigma_max=sigmas[1] if step == 0 else None, next_latents=rollout.next_latents[rows, k],
                )  # fmt: skip
                output.log_probs.mean().backward()
        transformer.zero_grad()

    transformer.train()
    rollout = sample()
    sampling, training = clock(sample, device, args.repeats), clock(partial(train, rollout), device, args.repeats)
    can_count = not lever.is_nf4 and not lever.settings.get("torch_compile")
    flops = count_flops(lambda: train(sample())) if can_count else math.nan
    return {
        "images_per_second": args.num_images / (sampling + training),
        "seconds_sampling": sampling,
        "seconds_training": training,
        "flops_per_second": flops / (sampling + training),
    }


def quantize(model: Any, device: torch.device) -> None:
    """Replaces the linear layers by bitsandbytes' in NF4, those of a vision tower excepted."""
    import bitsandbytes

    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and "visual" not in name:
            packed = bitsandbytes.nn.Linear4bit(
                layer.in_features, layer.out_features, layer.bias is not None, torch.bfloat16, quant_type="nf4"
            )
            packed.weight = bitsandbytes.nn.Params4bit(layer.weight.data.cpu(), requires_grad=False, quant_type="nf4")
            packed.bias = layer.bias
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, packed.to(device))
    model.is_loaded_in_4bit = True  # PEFT asks for it


def measure_reward_model(is_nf4: bool, args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Pairs per second of training SpatialScore's backbone: both images of a pair, forward and backward."""
    from peft import inject_adapter_in_model

    from trl_spatial.gaussian_reward.modeling import spatial_score_lora_config

    _, _, config = load_architecture(QWEN)["text_encoder"]
    if args.tiny:
        config = {
            **config,
            "text_config": TINY["text"],
            "vision_config": {**config["vision_config"], **TINY["vision"]},
        }
    backbone_config = transformers.Qwen2_5_VLConfig.from_dict(config)
    model: Any = on_device(lambda: transformers.Qwen2_5_VLModel(backbone_config), device)
    if is_nf4:
        quantize(model, device)
    lora = spatial_score_lora_config(rank=64, alpha=128, dropout=0.0)
    lora.modules_to_save = lora.trainable_token_indices = (
        None  # head and reward token: 4 million weights, not the backbone
    )
    holder: Any = nn.ModuleDict({"backbone": model})  # the adapters' names are those in a reward model
    holder.is_loaded_in_4bit = is_nf4  # PEFT asks what the adapters are put into
    inject_adapter_in_model(lora, holder)
    model.train()
    model.gradient_checkpointing_enable()
    side = args.size // 28  # tokens
    ids = torch.full(
        (2 * args.batch_size, side * side + 160), 100, device=device
    )  # chosen and rejected, with their prompts
    ids[:, 20], ids[:, 21 + side * side] = backbone_config.vision_start_token_id, backbone_config.vision_end_token_id
    ids[:, 21 : 21 + side * side] = backbone_config.image_token_id
    grid = torch.tensor([[1, 2 * side, 2 * side]] * len(ids), device=device)
    pixels = torch.randn(int(grid.prod(1).sum()), 3 * 2 * 14 * 14, device=device, dtype=torch.bfloat16)
    types = (ids == backbone_config.image_token_id).long()

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            states = model(
                input_ids=ids, pixel_values=pixels, image_grid_thw=grid, mm_token_type_ids=types, use_cache=False
            ).last_hidden_state
        states[:, -1].float().mean().backward()
        model.zero_grad()

    seconds = clock(step, device, args.repeats)
    flops = math.nan if is_nf4 else count_flops(step)
    return {
        "pairs_per_second": args.batch_size / seconds,
        "seconds_training": seconds,
        "flops_per_second": flops / seconds,
    }


def rows(args: argparse.Namespace) -> dict[str, Callable[[torch.device], dict[str, float]]]:
    """What is measured, by name."""
    found: dict[str, Callable[[torch.device], dict[str, float]]] = {}
    for short, name, guidance_scale, levers in (
        ("FLUX.1-dev", FLUX, 3.5, tuple(LEVERS)),
        ("Qwen-Image", QWEN, 1.0, tuple(LEVERS)),
        (GUIDED, QWEN, 4.0, GUIDED_LEVERS),
    ):
        for lever in levers:
            found[f"{short}: {lever}"] = partial(measure_generator, name, guidance_scale, LEVERS[lever], args)
    found["SpatialScore-7B: LoRA"] = partial(measure_reward_model, False, args)
    found["SpatialScore-7B: NF4"] = partial(measure_reward_model, True, args)
    return {name: measure for name, measure in found.items() if not args.only or args.only in name}


def run_row(
    measure: Callable[[torch.device], dict[str, float]], device: torch.device, ceiling: float
) -> dict[str, Any]:
    """One row; a note in place of its numbers if it cannot run here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        result: dict[str, Any] = dict(measure(device))
    except torch.OutOfMemoryError as error:
        result = {"note": f"out of memory: {str(error).splitlines()[0]}"}
    except (ImportError, RuntimeError, ValueError) as error:  # a kernel that this machine has not
        result = {"note": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
    flops_per_second = result.pop("flops_per_second", math.nan)  # not counted in compiled blocks and in NF4
    if math.isfinite(flops_per_second):
        result |= {"flops_per_second": flops_per_second, "share_of_ceiling": flops_per_second / ceiling}
    if device.type == "cuda":
        result["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    gc.collect()
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return result


def to_markdown(results: dict[str, Any]) -> str:
    about = results["about"]
    lines = [
        f"{about['device']}, {', '.join(f'{name} {version}' for name, version in about['versions'].items())}. "
        f"Ceiling of a matrix product: {about['ceiling'] / 1e12:.1f} TFLOP/s. `{about['command']}`",
        "",
        "| row | images/s | pairs/s | sampling s | training s | peak GiB | share of ceiling | note |",
        "|---|---|---|---|---|---|---|---|",
    ]
    columns = ("images_per_second", "pairs_per_second", "seconds_sampling", "seconds_training", "peak_gib")
    for name, row in results["rows"].items():
        cells = [f"{row[column]:.3g}" if column in row else "" for column in columns]
        cells.append(f"{row['share_of_ceiling']:.0%}" if "share_of_ceiling" in row else "")
        note = row.get("note", "")
        if name in MARKS and "images_per_second" in row and about["device"] != "CPU" and not about["settings"]["tiny"]:
            verdict = "passed" if row["images_per_second"] >= MARKS[name] else "missed"
            note = f"the mark of an H100, {MARKS[name]:g} images/s, is {verdict}"
        lines.append(f"| {name} | {' | '.join(cells)} | {note} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="writes OUTPUT.json and OUTPUT.md; goes on with what is there")
    parser.add_argument("--only", help="only rows whose name has this in it")
    parser.add_argument("--size", type=int, default=512, help="width and height in pixels")
    parser.add_argument("--num_images", type=int, default=24, help="images of a rollout")
    parser.add_argument("--batch_size", type=int, default=4, help="images, or pairs, at once")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="tiny models at 64², two images: whether it runs")
    args = parser.parse_args(argv)
    if args.tiny:
        args.size, args.num_images, args.batch_size, args.repeats = 64, 2, 1, 1
    chosen = rows(args)
    if not chosen:
        parser.error(f"--only: no row has {args.only!r} in its name")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = Path(args.output).with_suffix(".json")
    results = json.loads(path.read_text()) if path.is_file() else {"rows": {}}
    settings = {name: value for name, value in vars(args).items() if name not in ("output", "only")}
    measured = results.get("about", {}).get("settings", settings)
    if measured != settings:
        sys.exit(
            f"{path} holds rows of other settings: {measured}, and now they are {settings}. Choose another --output."
        )
    results["about"] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "versions": {module.__name__: module.__version__ for module in (torch, diffusers, transformers)},
        "command": " ".join(["python recipes/bench_gpu.py", *(sys.argv[1:] if argv is None else argv)]),
        "settings": settings,
        "ceiling": matmul_ceiling(device, 8192 if device.type == "cuda" else 256),
    }
    for name, measure in chosen.items():
        if name not in results["rows"]:
            results["rows"][name] = run_row(measure, device, results["about"]["ceiling"])
            print(name, results["rows"][name], flush=True)
            path.write_text(json.dumps(results, indent=2) + "\n")
            path.with_suffix(".md").write_text(to_markdown(results))
    return results


if __name__ == "__main__":
    main()
