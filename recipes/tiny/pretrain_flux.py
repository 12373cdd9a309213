"""Pretrain the tiny FLUX.1 that ships with the package on captions, a known share of which have a wrong relation.

    python recipes/tiny/pretrain_flux.py --output_dir runs/tiny-flux

Real captions name the right objects but are careless about where they are, and so is this generator's training: an autoencoder
learns rendered scenes of two objects; then transformer and text encoders learn to draw them by flow matching, at first from true
captions, until they know what the relations mean, and finally from captions in which the relation is wrong in `--wrong_share` of
the cases. The resulting model draws the right objects, and misplaces them about as often. The run saves its state every
`--save_steps` steps and resumes from there if restarted.
"""

import argparse
import json
import math
from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import FluxPipeline
from flux import build_flux_pipeline
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from trl_spatial.demo.generator import (
    DIRECTIONS,
    IMAGE_SIZE,
    MAX_SEQUENCE_LENGTH,
    NUM_INFERENCE_STEPS,
    OUTLINES,
    PALETTE,
    SAMPLING,
)
from trl_spatial.generation.drawing import draw_rows
from trl_spatial.generation.generators import PipelineGenerator
from trl_spatial.hub import Card, Result
from trl_spatial.judges.scenes import check_images, summarize_checks
from trl_spatial.scenes import (
    COLORS,
    RELATIONS,
    Relation,
    SceneGraph,
    Style,
    describe_scene,
    mirror,
    place_scene,
    render_layout,
    sample_graph,
)
from trl_spatial.statistics import accuracy_interval


OBJECT_RADII = (0.18, 0.2)  # in canvas units
NUM_WORDINGS = 64  # seeds for the wording: more than there are phrases
# 32 × 32 × 3 numbers become 8 × 8 × 4, which the transformer sees as 16 tokens of 16: few, and narrow compared with its width
# of 64. With 64 tokens of raw pixels, the width is spent on passing noise through, and no relation was learned in 5,000 steps.
SIZES: dict[str, Any] = {
    "num_layers": 2,
    "num_single_layers": 3,
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "guidance_embeds": False,
    "latent_channels": 4,
    "vae_channels": (16, 32, 32),
    "text_hidden_size": 64,
    "num_text_layers": 2,
    "num_text_heads": 4,
}


def build_corpus() -> list[str]:
    """Returns every word of the captions in all its spellings."""
    phrases = [phrase for name in DIRECTIONS for phrase in RELATIONS[name].phrases]
    words = {word for phrase in phrases for word in phrase.split() if "{" not in word}
    words |= {*PALETTE, *OUTLINES, "a", "an", "the"}
    return [spelling for word in sorted(words) for spelling in (word, word.capitalize())] + ["."]


def make_graph(seed: int, split: str) -> SceneGraph:
    """Samples two objects and the direction between them."""
    return sample_graph(
        np.random.default_rng(seed),
        num_objects=2,
        num_relations=1,
        relations=DIRECTIONS,
        split=split,
        colors=PALETTE,
        shapes=OUTLINES,
    )


def draw_graph(graph: SceneGraph, seed: int) -> Image.Image:
    """Draws a scene: large objects, whose shapes a few latents can represent, in plain colors on a plain background."""
    rng = np.random.default_rng(seed)
    style = Style(
        background=np.full((2, 3), rng.uniform(215, 235)),
        pattern="gradient",
        angle=0.0,
        period=1.0,
        noise=0.0,
        noise_seed=0,
        colors={entity: np.array(COLORS[entity.color], float) for entity in graph.entities},
    )
    radii = {entity: float(rng.uniform(*OBJECT_RADII)) for entity in graph.entities}
    return render_layout(place_scene(graph, radii, rng), style, IMAGE_SIZE)


def make_scene(seed: int, split: str) -> tuple[SceneGraph, np.ndarray]:
    """Samples a graph and draws it, `(height, width, 3)`, uint8."""
    graph = make_graph(seed, split)
    return graph, np.asarray(draw_graph(graph, seed))


def make_scenes(num_scenes: int, first_seed: int, split: str) -> tuple[list[SceneGraph], np.ndarray]:
    """Makes scenes from consecutive seeds, the images as `(num_scenes, height, width, 3)`, uint8."""
    seeds = range(first_seed, first_seed + num_scenes)
    with get_context("spawn").Pool(2) as pool:
        made = pool.imap(partial(make_scene, split=split), seeds, chunksize=64)
        scenes = list(tqdm(made, total=num_scenes, desc="Drawing scenes"))
    return [graph for graph, _ in scenes], np.stack([image for _, image in scenes])


def to_pixels(images: np.ndarray) -> torch.Tensor:
    """Converts `(n, height, width, 3)`, uint8, to `(n, 3, height, width)`, float32, from -1 to 1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def with_wrong_relation(graph: SceneGraph, rng: np.random.Generator) -> SceneGraph:
    """
    Returns the same objects in one of the three other directions. If it were always the opposite one, half of a caption's images
    would be mirrored, and such a small model blends the two: in a trial, it drew both objects in only 64 % of the images.
    """
    (relation,) = graph.relations
    others = [name for name in DIRECTIONS if name != relation.name]
    return SceneGraph(graph.entities, (Relation(others[rng.integers(3)], relation.arguments),))


class Stage:
    """
    A stage of pretraining: modules to train, an optimizer, and a state to resume from, in a file called `name`.

    The learning rate rises over 100 steps and falls to zero along a cosine. At the end, `modules` get the moving average of their
    weights.
    """

    def __init__(
        self,
        name: str,
        modules: dict[str, nn.Module],
        args: argparse.Namespace,
        *,
        learning_rate: float,
        num_steps: int,
        ema_decay: float = 0.0,
    ):
        self.modules, self.num_steps, self.ema_decay = modules, num_steps, ema_decay
        self.file, self.save_steps, self.name = args.output_dir / f"{name}.pt", args.save_steps, name
        parameters = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._factor)
        self.average = {key: deepcopy(module).requires_grad_(False) for key, module in modules.items()}
        self.step = 0
        if self.file.exists():
            state = torch.load(self.file, weights_only=True)
            for key, module in modules.items():
                module.load_state_dict(state["modules"][key])
                self.average[key].load_state_dict(state["average"][key])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            self.step = state["step"]

    def _factor(self, step: int) -> float:
        return min((step + 1) / 100, 0.5 * (1 + math.cos(math.pi * min(step / self.num_steps, 1.0))))

    def __iter__(self) -> Iterator[int]:
        """Yields the numbers of the remaining steps, then puts the averaged weights in place."""
        for module in self.modules.values():
            module.train()
        steps = range(self.step, self.num_steps)
        self.bar = tqdm(steps, initial=self.step, total=self.num_steps, desc=self.name)
        yield from self.bar
        for key, module in self.modules.items():
            module.load_state_dict(self.average[key].state_dict())
            module.eval()

    def update(self, loss: torch.Tensor) -> bool:
        """Takes one optimizer step. Returns whether it saved the state."""
        loss.backward()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.step += 1
        # start with a short average, so that it forgets the first steps
        decay = min(self.ema_decay, self.step / (self.step + 10))
        with torch.no_grad():
            for key, module in self.modules.items():
                for mean, value in zip(self.average[key].parameters(), module.parameters(), strict=True):
                    mean.lerp_(value, 1 - decay)
        if self.step % 25 == 0:
            self.bar.set_postfix(loss=f"{loss.item():.4f}")
        if self.step % self.save_steps and self.step < self.num_steps:
            return False
        state = {
            "modules": {key: module.state_dict() for key, module in self.modules.items()},
            "average": {key: module.state_dict() for key, module in self.average.items()},
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "step": self.step,
        }
        torch.save(state, self.file.with_suffix(".tmp"))
        self.file.with_suffix(".tmp").replace(self.file)
        return True


def train_vae(pipeline: FluxPipeline, images: np.ndarray, args: argparse.Namespace) -> None:
    """Trains the autoencoder, then scales the latents to mean 0 and standard deviation 1."""
    vae = pipeline.vae.to(memory_format=torch.channels_last)
    stage = Stage("vae", {"vae": vae}, args, learning_rate=2e-3, num_steps=args.vae_steps, ema_decay=0.99)
    for step in stage:
        rng = np.random.default_rng([args.seed, 1, step])
        pixels = to_pixels(images[rng.integers(len(images), size=32)]).contiguous(memory_format=torch.channels_last)
        if step % 2:
            pixels = pixels.flip(-1)
        posterior = vae.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(args.seed + step))
        restored = vae.decode(posterior.mean + posterior.std * noise, return_dict=False)[0]
        stage.update(F.mse_loss(restored, pixels) + args.kl_weight * posterior.kl().mean() / posterior.mean[0].numel())
    means = encode_images(pipeline, images[:2048], is_scaled=False)[0]
    vae.register_to_config(shift_factor=float(means.mean()), scaling_factor=float(1 / means.std()))


@torch.no_grad()
def encode_images(pipeline: FluxPipeline, images: np.ndarray, *, is_scaled: bool = True) -> torch.Tensor:
    """Mean and standard deviation of the latents: `(2, n, channels, rows, columns)`."""
    config, parts = pipeline.vae.config, []
    for start in range(0, len(images), 256):
        posterior = pipeline.vae.encode(to_pixels(images[start : start + 256])).latent_dist
        parts.append(torch.stack([posterior.mean, posterior.std]))
    latents = torch.cat(parts, dim=1)
    if is_scaled:
        latents[0] -= config.shift_factor
        latents *= config.scaling_factor
    return latents


@torch.no_grad()
def evaluate_vae(pipeline: FluxPipeline, graphs: list[SceneGraph], images: np.ndarray) -> dict[str, float]:
    """Measures the reconstruction error, and how many images still show their scene after encoding and decoding."""
    config = pipeline.vae.config
    latents = encode_images(pipeline, images)[0] / config.scaling_factor + config.shift_factor
    restored = pipeline.vae.decode(latents, return_dict=False)[0]
    error = F.mse_loss(restored, to_pixels(images)).item()
    pictures = pipeline.image_processor.postprocess(restored, output_type="pil")
    return {"restored_error": error, "restored_correct": summarize(pictures, graphs)["spatial_accuracy"]}


def summarize(images: list[Image.Image], graphs: list[SceneGraph]) -> dict[str, float]:
    summary = summarize_checks(check_images(images, graphs))
    return {name: interval.estimate for name, interval in summary.items()}


def encode_captions(pipeline: FluxPipeline, captions: list[str]) -> dict[str, torch.Tensor]:
    """Computes the embeddings of `FluxPipeline.encode_prompt`, but with gradients."""
    length = MAX_SEQUENCE_LENGTH
    ids = pipeline.tokenizer_2(captions, padding="max_length", max_length=length, return_tensors="pt").input_ids
    if ids.shape[1] > length:
        raise ValueError(f"A caption has {ids.shape[1]} tokens, more than MAX_SEQUENCE_LENGTH={length}.")
    # CLIP is causal, so padding does not change the embedding at the end of the text
    clip_ids = pipeline.tokenizer(captions, padding=True, return_tensors="pt").input_ids
    return {
        "encoder_hidden_states": pipeline.text_encoder_2(ids)[0],  # (n, length, text_hidden_size)
        "pooled_projections": pipeline.text_encoder(clip_ids).pooler_output,  # (n, text_hidden_size)
    }


def train_transformer(
    pipeline: FluxPipeline,
    graphs: list[SceneGraph],
    images: np.ndarray,
    args: argparse.Namespace,
    *,
    name: str,
    num_steps: int,
    learning_rate: float,
    wrong_share: float,
) -> None:
    """Trains by flow matching on latents, with a share of captions that name a wrong relation."""
    both = (encode_images(pipeline, images), encode_images(pipeline, np.ascontiguousarray(images[:, :, ::-1])))
    mirrored = [mirror(graph) for graph in graphs]
    modules: dict[str, nn.Module] = {
        part: getattr(pipeline, part) for part in ("transformer", "text_encoder", "text_encoder_2")
    }
    stage = Stage(name, modules, args, learning_rate=learning_rate, num_steps=num_steps, ema_decay=args.ema_decay)
    rows = images.shape[1] // pipeline.vae_scale_factor // 2
    image_ids = pipeline._prepare_latent_image_ids(args.batch_size, rows, rows, "cpu", torch.float32)
    text_ids = torch.zeros(MAX_SEQUENCE_LENGTH, 3)
    for step in stage:
        rng = np.random.default_rng([args.seed, 2, num_steps, step])
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        indices, is_mirrored = rng.integers(len(graphs), size=args.batch_size), step % 2
        mean, std = both[is_mirrored][:, torch.from_numpy(indices)]
        clean = mean + std * torch.randn(mean.shape, generator=generator)
        clean = pipeline._pack_latents(clean, *clean.shape)  # (batch_size, image_seq_len, in_channels)
        shown = [(mirrored if is_mirrored else graphs)[index] for index in indices]
        shown = [with_wrong_relation(graph, rng) if rng.random() < wrong_share else graph for graph in shown]
        captions = [describe_scene(graph, seed=int(rng.integers(NUM_WORDINGS))) for graph in shown]
        noise = torch.randn(clean.shape, generator=generator)
        uniform = torch.rand(len(clean), generator=generator)
        # shifted towards high noise, where the layout is decided
        sigma = args.timestep_shift * uniform / (1 + (args.timestep_shift - 1) * uniform)
        velocity = pipeline.transformer(
            hidden_states=torch.lerp(clean, noise, sigma[:, None, None]),
            timestep=sigma,
            img_ids=image_ids,
            txt_ids=text_ids,
            return_dict=False,
            **encode_captions(pipeline, captions),
        )[0]
        if stage.update(F.mse_loss(velocity, noise - clean)):
            metrics = {
                "stage": name,
                "step": stage.step,
                **evaluate(with_modules(pipeline, stage.average), "validation", args),
            }
            print(json.dumps(metrics), flush=True)
            with (args.output_dir / "log.jsonl").open("a") as log:
                log.write(json.dumps(metrics) + "\n")


def with_modules(pipeline: FluxPipeline, modules: dict[str, nn.Module]) -> FluxPipeline:
    """Returns a pipeline with some modules replaced by others, in evaluation mode."""
    other = FluxPipeline(**{**pipeline.components, **{name: module.eval() for name, module in modules.items()}})
    other.set_progress_bar_config(disable=True)
    return other


def evaluate(pipeline: FluxPipeline, split: str, args: argparse.Namespace) -> dict[str, float]:
    """Draws captions of a split and judges the images."""
    graphs = [make_graph(5_000_000 + index, split) for index in range(args.num_held_out)]
    rows = [{"prompt": describe_scene(graph, seed=index)} for index, graph in enumerate(graphs)]
    batches = draw_rows(PipelineGenerator(pipeline, **SAMPLING), rows, batch_size=128, seed=args.seed)
    return summarize([image for batch in batches for image in batch.images], graphs)


def zero_gates(transformer: Any) -> None:
    """Makes blocks start as the identity and the output at zero (adaLN-Zero), which trains faster and more reliably."""
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and (name.endswith(("norm.linear", "norm1.linear", "norm1_context.linear"))):
            nn.init.zeros_(module.weight), nn.init.zeros_(module.bias)
    nn.init.zeros_(transformer.proj_out.weight), nn.init.zeros_(transformer.proj_out.bias)


def save_pipeline(pipeline: FluxPipeline, args: argparse.Namespace, vae_metrics: dict[str, float]) -> None:
    """Saves the pipeline and its card, with numbers measured on the saved pipeline."""
    folder = args.output_dir / "model"
    num_parameters = {
        name: f"{sum(p.numel() for p in module.parameters()):,}"
        for name, module in pipeline.components.items()
        if isinstance(module, nn.Module)
    }
    # half the file size; loaded as float32
    pipeline.transformer.half(), pipeline.vae.half()
    pipeline.save_pretrained(folder)
    saved = FluxPipeline.from_pretrained(folder, dtype=torch.float32)
    saved.set_progress_bar_config(disable=True)
    settings = {
        name: value
        for name, value in vars(args).items()
        if name not in ("output_dir", "save_steps", "num_held_out", "notes")
    }
    metrics = {split: evaluate(saved, split, args) for split in ("train", "validation", "test")}
    card = Card(
        template="tiny_flux.md",
        front_matter={"library_name": "diffusers", "pipeline_tag": "text-to-image", "license": "apache-2.0"},
        values={
            "script": "recipes/tiny/pretrain_flux.py",
            "num_parameters": num_parameters,
            "image_size": IMAGE_SIZE,
            "max_sequence_length": MAX_SEQUENCE_LENGTH,
            "num_inference_steps": NUM_INFERENCE_STEPS,
            "wrong_share": f"{args.wrong_share:.0%}",
            "settings": settings,
            "notes": args.notes,
            "num_held_out": args.num_held_out,
            "metrics": metrics,
            "vae_metrics": vae_metrics,
        },
        results=[_result(row["spatial_accuracy"], args.num_held_out, split) for split, row in metrics.items()],
    )
    card.save(folder, model_id="trl_spatial/tiny_models/flux")


def _result(accuracy: float, num_images: int, split: str) -> Result:
    interval = accuracy_interval(np.full(num_images, accuracy))
    return Result(
        metric="spatial accuracy",
        value=accuracy,
        num_samples=num_images,
        unit="images",
        interval=(interval.low, interval.high),
        dataset="captions of rendered scenes",
        split=split,
    )


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--num_scenes", type=int, default=30_000)
    parser.add_argument("--vae_steps", type=int, default=1000)
    parser.add_argument("--kl_weight", type=float, default=3e-4)
    parser.add_argument("--true_steps", type=int, default=4000, help="steps on true captions")
    parser.add_argument("--careless_steps", type=int, default=3000, help="steps on captions of which a share is wrong")
    parser.add_argument("--wrong_share", type=float, default=0.55)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--true_learning_rate", type=float, default=2e-3)
    parser.add_argument("--careless_learning_rate", type=float, default=1e-3)
    parser.add_argument("--ema_decay", type=float, default=0.995)
    parser.add_argument("--timestep_shift", type=float, default=3.0)
    parser.add_argument("--num_held_out", type=int, default=1024, help="images of each measurement")
    parser.add_argument("--save_steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--notes", default="", help="text for the card, for example how a run differed from the script"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    pipeline = build_flux_pipeline(corpus=build_corpus(), seed=args.seed, **SIZES)
    zero_gates(pipeline.transformer)
    graphs, images = make_scenes(args.num_scenes, 10_000_000 * (args.seed + 1), "train")
    train_vae(pipeline, images, args)
    held_out = [make_scene(6_000_000 + index, "validation") for index in range(args.num_held_out)]
    vae_metrics = evaluate_vae(pipeline, [graph for graph, _ in held_out], np.stack([image for _, image in held_out]))
    print(json.dumps({name: round(value, 4) for name, value in vae_metrics.items()}), flush=True)
    for name, wrong_share in (("true", 0.0), ("careless", args.wrong_share)):
        train_transformer(
            pipeline,
            graphs,
            images,
            args,
            name=f"{name}_captions",
            num_steps=getattr(args, f"{name}_steps"),
            learning_rate=getattr(args, f"{name}_learning_rate"),
            wrong_share=wrong_share,
        )
    save_pipeline(pipeline, args, vae_metrics)


if __name__ == "__main__":
    main()
