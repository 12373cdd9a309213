"""The tiny FLUX that is shipped: what it draws, how it is judged, and that rewards can teach it."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors import safe_open

from trl_spatial.demo.generator import (
    DIRECTIONS,
    IMAGE_SIZE,
    MAX_SEQUENCE_LENGTH,
    NUM_INFERENCE_STEPS,
    TINY_FLUX,
    draw_images,
    grpo_config,
    judge,
    load_generator,
    make_prompts,
    make_trainer,
    objects_present,
    spatial_accuracy,
)
from trl_spatial.scenes import Relation, SceneGraph, describe_scene, parse_description, render_scene
from trl_spatial.statistics import accuracy_interval


@pytest.fixture(scope="module")
def generator():
    return load_generator()


@pytest.fixture(scope="module")
def drawn(generator):
    """192 images of 48 prompts on objects that were not trained on."""
    return draw_images(generator, make_prompts(48, split="test", seed=0), spatial_accuracy, show_progress=False)


def opposite(graph):
    (relation,) = graph.relations
    names = dict(zip(DIRECTIONS, ("right_of", "left_of", "below", "above"), strict=True))
    return SceneGraph(graph.entities, (Relation(names[relation.name], relation.arguments),))


def drawn_scenes(graphs, shown):
    """A dataset as `draw_images` makes it, of pictures that are rendered: four of each prompt."""
    rows = [
        {
            "prompt": describe_scene(graph, seed=0),
            "scene": describe_scene(graph, seed=0),
            "image": render_scene(other, seed=seed),
            "score": float(seed),
        }
        for graph, other in zip(graphs, shown, strict=True)
        for seed in range(4)
    ]
    return Dataset.from_list(rows)


class TestPrompts:
    def test_they_are_two_objects_and_a_direction_in_few_tokens(self, generator):
        prompts = make_prompts(200, split="train", seed=3)
        for prompt, scene in zip(prompts["prompt"], prompts["scene"], strict=True):
            graph = parse_description(scene)
            assert parse_description(prompt) == graph
            assert len(graph.entities) == 2 and graph.relations[0].name in DIRECTIONS
            ids = generator.tokenizer_2(prompt).input_ids
            assert len(ids) <= MAX_SEQUENCE_LENGTH and generator.tokenizer_2.unk_token_id not in ids

    def test_no_objects_are_in_two_splits(self):
        sets = [
            {frozenset(parse_description(scene).entities) for scene in make_prompts(150, split=split, seed=1)["scene"]}
            for split in ("train", "validation", "test")
        ]
        assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])


class TestShippedModel:
    def test_it_is_small_safe_and_complete(self):
        files = [file for file in TINY_FLUX.rglob("*") if file.is_file()]
        assert sum(file.stat().st_size for file in files) < 3_000_000
        assert {file.suffix for file in files} <= {".json", ".safetensors", ".md", ".txt"}
        assert "wrong" in (TINY_FLUX / "README.md").read_text()

    @pytest.mark.parametrize("kwargs", [{}, {"dtype": torch.float32}])
    def test_plain_diffusers_draws_with_it(self, kwargs):
        from diffusers import FluxPipeline

        pipeline = FluxPipeline.from_pretrained(TINY_FLUX, **kwargs)
        pipeline.set_progress_bar_config(disable=True)
        image = pipeline(
            "A red circle is to the left of a blue square.",
            height=IMAGE_SIZE,
            width=IMAGE_SIZE,
            num_inference_steps=NUM_INFERENCE_STEPS,
            max_sequence_length=MAX_SEQUENCE_LENGTH,
            generator=torch.Generator().manual_seed(0),
        ).images[0]
        assert image.size == (IMAGE_SIZE, IMAGE_SIZE) and np.asarray(image).std() > 10

    def test_every_weight_is_in_the_files(self, generator):
        # of tied embeddings one name is saved
        tied = {"shared.weight": "encoder.embed_tokens.weight"}
        for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
            (file,) = (TINY_FLUX / name).glob("*.safetensors")
            with safe_open(file, "pt") as saved:
                names = {tied.get(key, key) for key in saved.keys()}  # noqa: SIM118
            assert {tied.get(key, key) for key in getattr(generator, name).state_dict()} == names

    def test_it_draws_the_right_objects_and_often_misplaces_them(self, drawn):
        judged = judge(drawn)
        assert judged["objects_present"]["estimate"] >= 0.85
        assert judged["spatial_accuracy"]["low"] < 0.65 and judged["spatial_accuracy"]["high"] > 0.35
        assert judged["diversity"] > 0.05


class TestDrawing:
    def test_an_image_does_not_depend_on_the_prompts_beside_it(self, generator, drawn):
        prompts = make_prompts(48, split="test", seed=0)
        few = draw_images(generator, prompts.select(range(2)), spatial_accuracy, show_progress=False)
        assert few["prompt"] == drawn["prompt"][:8]
        for image, other in zip(few["image"], drawn["image"], strict=False):
            # another batch size may round the last bit of a pixel differently
            assert np.abs(np.asarray(image, int) - np.asarray(other, int)).max() <= 2

    def test_the_score_is_the_reward_of_the_image(self, drawn):
        assert drawn["score"] == spatial_accuracy(drawn["prompt"], drawn["image"], scene=drawn["scene"])


@pytest.fixture(scope="module")
def graphs():
    return [parse_description(scene) for scene in make_prompts(12, split="test", seed=4)["scene"]]


class TestJudging:
    def test_right_pictures_are_right(self, graphs):
        judged = judge(drawn_scenes(graphs, graphs))
        assert judged["spatial_accuracy"]["estimate"] == judged["objects_present"]["estimate"] == 1
        assert sum(row["num_images"] for row in judged["relations"].values()) == 48
        assert judged["reward"] == 1.5

    def test_misplaced_objects_are_present(self, graphs):
        shown = [opposite(graph) if index % 4 else graph for index, graph in enumerate(graphs)]
        judged = judge(drawn_scenes(graphs, shown))
        assert judged["objects_present"]["estimate"] == 1
        assert judged["spatial_accuracy"]["estimate"] == judged["relations_correct"]["estimate"] == 0.25
        # images of a prompt count as one, so the interval is about that of 12 images
        interval, of_prompts = judged["spatial_accuracy"], accuracy_interval([1] * 3 + [0] * 9)
        width = of_prompts.high - of_prompts.low
        assert interval["high"] - interval["low"] == pytest.approx(width, rel=0.2)

    def test_rewards_agree_with_the_verdicts(self, graphs):
        drawn = drawn_scenes(graphs, [opposite(graph) for graph in graphs])
        arguments = (drawn["prompt"], list(drawn["image"]))
        assert set(spatial_accuracy(*arguments, scene=drawn["scene"])) == {0.0}
        assert set(objects_present(*arguments, scene=drawn["scene"])) == {1.0}


def test_the_truth_watches_and_is_not_trained_on(tmp_path):
    def SpatialScore(prompts, images, **columns):
        return [0.0] * len(images)

    args = grpo_config(tmp_path, max_steps=25, seed=0, use_cpu=True)
    trainer = make_trainer(args, SpatialScore)
    assert trainer.reward_functions.names == ["SpatialScore"]
    assert trainer.eval_reward_functions.names == ["SpatialScore", "spatial_accuracy", "objects_present"]
    assert args.eval_steps == args.save_steps == 3  # ten times
    assert args.num_prompts_per_device * args.num_kept == args.per_device_train_batch_size == 96
    sets = [{frozenset(parse_description(scene).entities) for scene in data["scene"]}
            for data in (trainer.train_dataset, trainer.eval_dataset)]  # fmt: skip
    assert not sets[0] & sets[1]
