"""Pretrain the tiny Qwen2.5-VL that ships with the package on sentences about rendered scenes.

    python recipes/tiny/pretrain_backbone.py --output_dir runs/tiny-backbone

A sequence is an image and sentences about it, each followed by "yes" or "no", or the reward model's input followed by one answer
for the whole caption. The loss covers the answers, the words of true captions, and linear probes of the hidden states, which are
discarded afterwards. They predict, from the image tokens, what each patch shows and whether it hides something or is partly
hidden; from an object's name, where it is, its offset from the object named before, and again whether it hides another or is
hidden; and from the end of a sentence, whether it is true. Without the probes, no relation was learned in 1,500 steps. The run
saves its state every `--save_steps` steps and resumes from there if restarted.
"""

import argparse
import itertools
import json
import math
from collections import defaultdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from models import build_processor, build_qwen2_5_vl, build_tokenizer
from questions import (
    ANSWERS,
    Scene,
    ask_for_objects,
    ask_for_relations,
    describe_objects,
    find_depths,
    make_caption,
    make_scene,
)
from torch.utils.data import DataLoader, IterableDataset
from tqdm.auto import tqdm

from trl_spatial.gaussian_reward.processing import SpatialScoreProcessor
from trl_spatial.hub import Card, Result
from trl_spatial.scenes import COLORS, REGIONS, RELATIONS, SHAPES
from trl_spatial.statistics import accuracy_interval


IMAGE_SIZE = 64
PATCH_SIZE, MERGE_SIZE = 8, 2
NUM_STATEMENTS = 5
NUM_HELD_OUT = 1000
IGNORED = -100
# Loss weights of the words of true captions and of the probes; an answer's is 1.
WORD_WEIGHT, PROBE_WEIGHT = 0.3, 0.5
# Positions are probed in this many bins per axis, after this many layers of the language model; offsets between two positions in
# bins twice as wide, one layer later; and the truth of a sentence before the last layer, so that the last one can combine them.
NUM_PLACES, PLACE_LAYER, OFFSET_LAYER, TRUTH_LAYER = 16, 3, 4, 5
# Numbers of colors, shapes and depths that a patch can show, including the background.
CONTENT_SIZES = (len(COLORS) + 1, len(SHAPES) + 1, 4)


def build_corpus() -> list[str]:
    """Returns every word of the captions in all its spellings: capitalized or not, after a space or not."""
    phrases = [phrase for kind in RELATIONS.values() for phrase in kind.phrases]
    words = {word for text in [*phrases, *REGIONS] for word in text.split() if "{" not in word}
    words |= {*COLORS, *SHAPES, "a", "an", "the", "and", "small", "large", "yes", "no"}
    words |= {
        *[
            "There",
            "is",
            "in",
            "the",
            "picture",
            "The",
            "shows",
            "A",
            "simple",
            "drawing",
            "of",
            "In",
            "this",
            "Seen",
            "from",
            "viewer's",
            "side",
        ]
    }
    words |= {*["Also", "addition", "At", "same", "time", "Nothing", "else", "background", "plain"]}
    spellings = [text for word in sorted(words) for text in (word, word.capitalize())]
    return [text for word in spellings for text in (word, f". {word}")] + [", . '"]


def build_inputs(images: np.ndarray, processor: SpatialScoreProcessor) -> dict[str, torch.Tensor]:
    """
    Extracts the patches of a batch of images of the model's size, as the processor does, but all at once.

    Args:
        images (`np.ndarray` of shape `(batch_size, height, width, 3)` and type `uint8`):
            The images.

    Returns:
        `dict` with `pixel_values` and `image_grid_thw`.
    """
    config = processor.image_processor
    scale = np.float32(1 / 255) / np.array(config.image_std, np.float32)
    shift = np.array(config.image_mean, np.float32) / np.array(config.image_std, np.float32)
    pixels = images.astype(np.float32) * scale - shift
    patch, merge = config.patch_size, config.merge_size
    rows, columns = images.shape[1] // patch, images.shape[2] // patch
    blocks = pixels.reshape(len(images), rows // merge, merge, patch, columns // merge, merge, patch, 3)
    blocks = blocks.transpose(
        0, 1, 4, 2, 5, 7, 3, 6
    )  # (image, row, column, row in merge, column in merge, channel, y, x)
    patches = blocks.reshape(len(images) * rows * columns, 3, 1, patch * patch)
    flat = np.repeat(patches, config.temporal_patch_size, axis=2).reshape(len(patches), -1)
    grid = torch.tensor([[1, rows, columns]]).expand(len(images), 3)
    return {"pixel_values": torch.from_numpy(flat), "image_grid_thw": grid}


class QuestionBatches(IterableDataset):
    """Endless batches of images and sentences: at first about objects and their positions, then also about relations."""

    def __init__(
        self, scenes: list[Scene], processor, relations, batch_size: int, seed: int, num_object_steps: int = 0
    ):
        self.scenes, self.processor, self.relations = scenes, processor, relations
        self.batch_size, self.seed, self.num_object_steps = batch_size, seed, num_object_steps
        self.first_step = 0
        names = [spelling for word in (*COLORS, *SHAPES) for spelling in (word, f" {word}")]
        self.words = {processor.tokenizer(name)["input_ids"][0]: name.strip() for name in names}
        tokenizer = processor.tokenizer
        self.answers = [tokenizer.convert_tokens_to_ids(tokenizer.tokenize(answer))[0] for answer in ANSWERS]
        self.before, self.after, self.suffix = processor._encode_template()
        self.period = processor.tokenizer(".")["input_ids"][0]

    def __iter__(self):
        rng = np.random.default_rng([self.seed, self.first_step])
        for step in itertools.count(self.first_step):
            scenes = [self.scenes[i] for i in rng.integers(len(self.scenes), size=self.batch_size)]
            rows = [self.make_rows(scene, rng, step < self.num_object_steps) for scene in scenes]
            batch = self.encode(np.stack([scene.image for scene in scenes]), rows)
            places = [
                self.find_places(row, scene) for row, scene in zip(batch["input_ids"].tolist(), scenes, strict=True)
            ]
            batch["places"] = torch.tensor(places)  # (batch_size, length, 5)
            content = np.stack([scene.content for scene in scenes]).astype(np.int64)
            size = content.shape[1] // MERGE_SIZE
            blocks = content.reshape(-1, size, MERGE_SIZE, size, MERGE_SIZE, 3).swapaxes(2, 3)
            batch["content"] = torch.from_numpy(blocks.reshape(len(content), size * size, MERGE_SIZE**2, 3))
            yield batch

    def find_places(self, row: list[int], scene: Scene) -> list[list[int]]:
        """
        Finds the probes' targets for each token, `(length, 5)`: at the last word of an object's name, its column and row,
        their offset from those of the object named before, and whether it is in front of another object (1), behind one
        (2) or neither (0); elsewhere `IGNORED`.
        """
        depths = {(entity.color, entity.shape): depth for entity, depth in find_depths(scene.graph).items()}
        places = {
            (o.entity.color, o.entity.shape): (int(o.x * NUM_PLACES), int(o.y * NUM_PLACES)) for o in scene.objects
        }
        words = [self.words.get(token, "") for token in row]
        found = [[IGNORED] * 5]
        before: tuple[int, int] | None = None
        for name in itertools.pairwise(words):
            place = places.get(name)
            if place is None:
                found.append([IGNORED] * 5)
                continue
            offset = [IGNORED, IGNORED]
            if before is not None and before != place:
                offset = [(a - b) // 2 + NUM_PLACES // 2 for a, b in zip(place, before, strict=True)]
            found.append([*place, *offset, depths.get(name, 0)])
            before = place
        return found

    def make_rows(self, scene: Scene, rng: np.random.Generator, is_first_phase: bool):
        """Draws sentences with their truth, and returns whether they are one caption with one answer."""
        kind = rng.random() * (0.2 if is_first_phase else 1.0)
        if kind < 0.05:
            return ask_for_objects(scene, rng, NUM_STATEMENTS), False
        if kind < 0.2:
            return [(describe_objects(scene, rng), None)], True  # always true: nothing to answer
        if kind < 0.55:
            return [make_caption(scene, rng)], True
        return ask_for_relations(scene, rng, self.relations, NUM_STATEMENTS), False

    def encode(self, images: np.ndarray, rows: list) -> dict[str, torch.Tensor]:
        """Encodes a batch: token ids, and per token its label, the truth of the sentence it ends, and whether it is an answer."""
        # only the first sentence starts the text
        texts = [f" {text}" if i else text for questions, _ in rows for i, (text, *_) in enumerate(questions)]
        encoded = iter(self.processor.tokenizer(texts)["input_ids"])
        inputs = build_inputs(images, self.processor)
        num_image_tokens = int(inputs["image_grid_thw"][0].prod()) // MERGE_SIZE**2
        prefix = self.before + [self.processor.image_token_id] * num_image_tokens + self.after
        ids, labels, are_answers, truths = [], [], [], []
        for questions, is_caption in rows:
            row, row_labels, row_answers = list(prefix), [IGNORED] * len(prefix), [False] * len(prefix)
            row_truths = [IGNORED] * len(prefix)
            for _, is_true, *sentences in questions:
                tokens = next(encoded)
                of_sentences = iter(sentences[0] if sentences else [])
                found = [next(of_sentences, None) if token == self.period else None for token in tokens]
                answer = [*self.suffix[:-1], self.answers[bool(is_true)]] if is_caption else [self.answers[is_true]]
                row += tokens + answer
                row_labels += [IGNORED] * len(tokens) if is_true is False or not is_caption else tokens
                row_labels += [IGNORED] * (len(answer) - 1) + [IGNORED if is_true is None else answer[-1]]
                row_answers += [False] * len(tokens) + [True] * len(answer)
                row_truths += [IGNORED if truth is None else int(truth) for truth in found] + [IGNORED] * len(answer)
            ids.append(row)
            truths.append(row_truths)
            labels.append(row_labels)
            are_answers.append(row_answers)
        length = max(map(len, ids))

        def pad(rows, value):
            return torch.tensor([row + [value] * (length - len(row)) for row in rows])

        batch = {"input_ids": pad(ids, self.processor.tokenizer.pad_token_id), "labels": pad(labels, IGNORED)}
        batch |= {"truths": pad(truths, IGNORED), "is_answer": pad(are_answers, False)}
        batch |= {"attention_mask": pad([[1] * len(row) for row in ids], 0)}
        batch["mm_token_type_ids"] = (batch["input_ids"] == self.processor.image_token_id).long()
        return batch | inputs


class Probes(torch.nn.Module):
    """Linear probes of the hidden states that teach the model to see; they are not saved with it."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.place_norm = torch.nn.LayerNorm(hidden_size)
        self.place = torch.nn.Linear(hidden_size, 2 * NUM_PLACES)
        self.depth = torch.nn.Linear(hidden_size, 3)
        self.offset_norm = torch.nn.LayerNorm(hidden_size)
        self.offset = torch.nn.Linear(hidden_size, 2 * NUM_PLACES)
        self.content_norm = torch.nn.LayerNorm(hidden_size)
        self.content = torch.nn.ModuleList(torch.nn.Linear(hidden_size, MERGE_SIZE**2 * n) for n in CONTENT_SIZES)
        self.truth_norm = torch.nn.LayerNorm(hidden_size)
        self.truth = torch.nn.Linear(hidden_size, 2)

    def forward(
        self, hidden_states, is_image: torch.Tensor, places: torch.Tensor, content: torch.Tensor, truths: torch.Tensor
    ) -> torch.Tensor:
        """Sums the probes' cross-entropies; `hidden_states` has `(batch_size, length, hidden_size)` for every layer."""
        image = self.content_norm(hidden_states[0][is_image])
        loss = torch.zeros(())
        for i, probe in enumerate(self.content):
            target = content[..., i].flatten()
            logits = probe(image).view(target.numel(), -1)
            # equal weight for the background, which covers most of the image, for single objects and for occlusions
            group = content[..., 2].flatten().clamp(max=2)
            weights = 1 / torch.bincount(group, minlength=3).clamp(min=1).float()[group]
            loss = loss + (F.cross_entropy(logits, target, reduction="none") * weights).sum() / 3
        for probe, norm, layer, target in (
            (self.place, self.place_norm, PLACE_LAYER, places[..., :2]),
            (self.offset, self.offset_norm, OFFSET_LAYER, places[..., 2:4]),
        ):
            is_known = target[..., 0] != IGNORED
            logits = probe(norm(hidden_states[layer][is_known])).view(-1, 2, NUM_PLACES)
            loss = loss + F.cross_entropy(logits.transpose(1, 2), target[is_known])
        depth = places[..., 4]
        logits = self.depth(self.place_norm(hidden_states[PLACE_LAYER][depth != IGNORED]))
        loss = loss + F.cross_entropy(logits, depth[depth != IGNORED])
        logits = self.truth(self.truth_norm(hidden_states[TRUTH_LAYER][truths != IGNORED]))
        return loss + (F.cross_entropy(logits, truths[truths != IGNORED]) if len(logits) else 0)


def compute_loss(model, probes: Probes, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Mean next-token cross-entropy of the answers and of the other labeled tokens, and the loss of the probes."""
    batch = dict(batch)
    labels, is_answer = batch.pop("labels")[:, 1:], batch.pop("is_answer")
    places, content, truths = batch.pop("places"), batch.pop("content"), batch.pop("truths")
    outputs = model.model(**batch, use_cache=False, output_hidden_states=True)
    is_labeled = labels != IGNORED
    logits = model.lm_head(outputs.last_hidden_state[:, :-1][is_labeled])
    losses = F.cross_entropy(logits, labels[is_labeled], reduction="none")
    is_answer = is_answer[:, 1:][is_labeled]
    return {
        "answers": losses[is_answer].mean(),
        "words": losses[~is_answer].mean(),
        "probes": probes(outputs.hidden_states, batch["mm_token_type_ids"] == 1, places, content, truths),
    }


@torch.no_grad()
def answer_log_odds(model, data: QuestionBatches, images: np.ndarray, texts: list[str]) -> np.ndarray:
    """log P(yes) / P(no) that each caption, in the reward model's input format, describes its image: `(n,)`."""
    odds = []
    for start in range(0, len(texts), 128):
        rows = [([(text, True)], True) for text in texts[start : start + 128]]
        batch = data.encode(images[start : start + 128], rows)
        position = batch["attention_mask"].sum(1) - 2
        del batch["labels"], batch["is_answer"], batch["truths"]
        hidden = model.model(**batch, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[torch.arange(len(rows)), position])
        odds.append((logits[:, data.answers[1]] - logits[:, data.answers[0]]).numpy())
    return np.concatenate(odds)


def evaluate(model, data: QuestionBatches, scenes: list[Scene], seed: int = 0) -> dict[str, float]:
    """Share of scenes whose caption gets higher odds of yes than the perturbed one, by level and changed relation."""
    from trl_spatial.scenes import describe_scene

    model.eval()
    images = np.stack([scene.image for scene in scenes])
    odds = [
        answer_log_odds(
            model,
            data,
            images,
            [describe_scene(graph, seed=seed + i, length=("short", "long")[i % 2]) for i, graph in enumerate(graphs)],
        )
        for graphs in ([scene.graph for scene in scenes], [scene.perturbed for scene in scenes])
    ]
    model.train()
    correct = odds[0] > odds[1]
    groups = defaultdict(list)
    for scene, is_correct in zip(scenes, correct, strict=True):
        changed = [a.name for a, b in zip(scene.graph.relations, scene.perturbed.relations, strict=True) if a != b]
        groups[f"level_{len(changed)}"].append(is_correct)
        if len(changed) == 1:
            groups[changed[0]].append(is_correct)
    return {"pairs": float(correct.mean()), "yes": float((odds[0] > 0).mean()), "no": float((odds[1] < 0).mean())} | {
        name: float(np.mean(values)) for name, values in sorted(groups.items())
    }


def make_scenes(num_scenes: int, seed: int, split: str, **options) -> list[Scene]:
    """Makes scenes of a split in two processes and keeps them in memory."""
    make = partial(make_scene, image_size=IMAGE_SIZE, patch_size=PATCH_SIZE, split=split, **options)
    with get_context("fork").Pool(2) as pool:
        seeds = range(seed, seed + num_scenes)
        return list(tqdm(pool.imap(make, seeds, chunksize=64), total=num_scenes, desc=f"Scenes ({split})"))


def learning_rate_factor(step: int, num_steps: int, num_warmup_steps: int = 100) -> float:
    """Warm-up, a constant part, and a cosine to zero over the last 40 %."""
    decay = max(0.0, (step - 0.6 * num_steps) / (0.4 * num_steps))
    return min(1.0, (step + 1) / num_warmup_steps) * (0.5 + 0.5 * math.cos(math.pi * min(decay, 1.0)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--relations", nargs="+", default=list(RELATIONS), choices=list(RELATIONS))
    parser.add_argument("--num_scenes", type=int, default=40_000)
    parser.add_argument("--occlusion_weight", type=int, default=3)
    parser.add_argument("--max_steps", type=int, default=9500)
    parser.add_argument("--num_object_steps", type=int, default=300)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--num_hidden_layers", type=int, default=6)
    parser.add_argument("--rope_theta", type=float, default=30.0)
    parser.add_argument("--save_steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--notes", default="", help="Text for the card, for example how a run differed from the script."
    )
    args = parser.parse_args()
    train(args)


def train(args: argparse.Namespace) -> None:
    """Pretrains and saves the model, resuming from the last saved state."""
    relations = tuple(args.relations)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(build_corpus(), vocab_size=1024)
    processor = build_processor(
        tokenizer,
        patch_size=PATCH_SIZE,
        merge_size=MERGE_SIZE,
        min_pixels=IMAGE_SIZE**2,
        max_pixels=IMAGE_SIZE**2,
        instruction="",
    )
    model = build_qwen2_5_vl(
        tokenizer,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=args.num_hidden_layers,
        num_attention_heads=4,
        vision_hidden_size=64,
        vision_depth=3,
        vision_heads=4,
        vision_window_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        merge_size=MERGE_SIZE,
        rope_theta=args.rope_theta,
        initializer_range=0.06,
        seed=args.seed,
    )
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens")
    scenes = make_scenes(
        args.num_scenes,
        10_000_000 * (args.seed + 1),
        "train",
        relations=relations,
        occlusion_weight=args.occlusion_weight,
    )
    held_out = make_scenes(NUM_HELD_OUT, 5_000_000, "validation", relations=relations)
    data = QuestionBatches(scenes, processor, relations, args.batch_size, args.seed, args.num_object_steps)
    torch.manual_seed(args.seed)
    probes = Probes(model.config.get_text_config().hidden_size)
    decayed = [p for module in (model, probes) for p in module.parameters() if p.ndim > 1]
    others = [p for module in (model, probes) for p in module.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.02}, {"params": others, "weight_decay": 0.0}],
        lr=args.learning_rate,
        betas=(0.9, 0.98),
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(learning_rate_factor, num_steps=args.max_steps))
    state_file = args.output_dir / "state.pt"
    first_step = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"]), probes.load_state_dict(state["probes"])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        first_step = state["step"]
        data.first_step = first_step
    batches = iter(DataLoader(data, batch_size=None, num_workers=1, prefetch_factor=4))
    model.train()
    progress = tqdm(range(first_step, args.max_steps), initial=first_step, total=args.max_steps, desc="Pretraining")
    average = None
    for step in progress:
        losses = compute_loss(model, probes, next(batches))
        (losses["answers"] + WORD_WEIGHT * losses["words"] + PROBE_WEIGHT * losses["probes"]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        current = torch.stack([loss.detach() for loss in losses.values()])
        average = current if average is None else 0.98 * average + 0.02 * current
        if (step + 1) % 25 == 0:
            progress.set_postfix({name: f"{value:.3f}" for name, value in zip(losses, average.tolist(), strict=True)})
        if (step + 1) % args.save_steps == 0 or step + 1 == args.max_steps:
            metrics = {
                "step": step + 1,
                **dict(zip(losses, average.tolist(), strict=True)),
                **evaluate(model, data, held_out),
            }
            print(json.dumps({key: round(value, 3) for key, value in metrics.items()}), flush=True)
            with (args.output_dir / "log.jsonl").open("a") as log:
                log.write(json.dumps(metrics) + "\n")
            state = {
                "model": model.state_dict(),
                "probes": probes.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step + 1,
            }
            torch.save(state | {"scheduler": scheduler.state_dict()}, state_file.with_suffix(".tmp"))
            state_file.with_suffix(".tmp").replace(state_file)
    save_backbone(model, processor, args)


def save_backbone(model, processor: SpatialScoreProcessor, args: argparse.Namespace) -> None:
    """Saves model, processor and card; the card's numbers are those of the run's log."""
    folder = args.output_dir / "model"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    metrics = json.loads((args.output_dir / "log.jsonl").read_text().splitlines()[-1])
    names = {"pairs": "all", "level_1": "1 change", "level_2": "2 changes", "level_3": "3 changes"}
    groups = {**names, **{relation: f"1 change, {relation}" for relation in args.relations}}
    settings = {name: value for name, value in vars(args).items() if name not in ("output_dir", "notes", "save_steps")}
    settings["relations"] = ", ".join(args.relations)
    card = Card(
        template="tiny_backbone.md",
        front_matter={"library_name": "transformers", "pipeline_tag": "image-text-to-text", "license": "apache-2.0"},
        values={
            "script": "recipes/tiny/pretrain_backbone.py",
            "num_parameters": f"{sum(p.numel() for p in model.parameters()):,}",
            "num_tokens": len(processor.tokenizer),
            "settings": settings,
            "notes": args.notes,
            "num_held_out": NUM_HELD_OUT,
            "metrics": {title: f"{metrics[name]:.3f}" for name, title in groups.items() if name in metrics},
        },
        results=[_result(metrics["pairs"])],
    )
    card.save(folder, model_id="trl_spatial/tiny_models/qwen2_5_vl")


def _result(accuracy: float) -> Result:
    interval = accuracy_interval(np.full(NUM_HELD_OUT, accuracy))
    return Result(
        metric="accuracy",
        value=accuracy,
        num_samples=NUM_HELD_OUT,
        unit="scenes",
        interval=(interval.low, interval.high),
        dataset="rendered scenes",
        split="validation",
    )


if __name__ == "__main__":
    main()
