"""The recipe that pretrains the tiny FLUX of the demo."""

import json
from functools import lru_cache

import numpy as np
import pretrain_flux
import pytest
import torch
from diffusers import FluxPipeline

from trl_spatial.demo.generator import DIRECTIONS, IMAGE_SIZE, MAX_SEQUENCE_LENGTH, TINY_FLUX, load_generator
from trl_spatial.judges.scenes import check_images, summarize_checks
from trl_spatial.scenes import describe_scene


def graphs(number, split="train"):
    return [pretrain_flux.make_graph(seed, split) for seed in range(number)]


def test_its_pictures_show_their_scenes():
    made = graphs(60)
    pictures = [pretrain_flux.draw_graph(graph, seed) for seed, graph in enumerate(made)]
    assert summarize_checks(check_images(pictures, made))["spatial_accuracy"].estimate == 1


def test_a_wrong_caption_names_the_same_objects_in_another_direction():
    rng = np.random.default_rng(0)
    for graph in graphs(60):
        wrong = pretrain_flux.with_wrong_relation(graph, rng)
        assert wrong.entities == graph.entities and wrong.relations[0].arguments == graph.relations[0].arguments
        assert wrong.relations[0].name in set(DIRECTIONS) - {graph.relations[0].name}


def test_captions_are_encoded_as_the_pipeline_does():
    pipeline = load_generator()
    captions = [describe_scene(graph, seed=seed) for seed, graph in enumerate(graphs(5))]
    with torch.no_grad():
        encoded = pretrain_flux.encode_captions(pipeline, captions)
        embeds, pooled, _ = pipeline.encode_prompt(captions, max_sequence_length=MAX_SEQUENCE_LENGTH)
    torch.testing.assert_close(encoded["encoder_hidden_states"], embeds)
    torch.testing.assert_close(encoded["pooled_projections"], pooled, rtol=1e-5, atol=1e-5)


def test_the_shipped_tokenizers_are_those_of_the_recipe():
    built = pretrain_flux.build_flux_pipeline(corpus=pretrain_flux.build_corpus(), **pretrain_flux.SIZES)
    shipped = FluxPipeline.from_pretrained(TINY_FLUX)
    for name in ("tokenizer", "tokenizer_2"):
        assert getattr(built, name).get_vocab() == getattr(shipped, name).get_vocab()
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        shapes = [{k: v.shape for k, v in getattr(p, name).state_dict().items()} for p in (built, shipped)]
        assert shapes[0] == shapes[1]


@pytest.fixture(scope="module")
def options():
    names = ("vae_steps", "true_steps", "careless_steps", "batch_size", "num_held_out")
    return ["--num_scenes", "40", "--save_steps", "1", *(part for name in names for part in (f"--{name}", "2"))]


def test_it_goes_on_where_it_was_and_saves_a_pipeline_with_its_card(tmp_path, options, monkeypatch):
    # drawn once, by two processes that begin with the imports
    monkeypatch.setattr(pretrain_flux, "make_scenes", lru_cache(pretrain_flux.make_scenes))
    pretrain_flux.main(["--output_dir", str(tmp_path / "whole"), *options])

    class InterruptedError(Exception):
        pass

    evaluate, calls = pretrain_flux.evaluate, []

    def evaluate_and_stop(*args):
        calls.append(args)
        if len(calls) == 3:  # the first step on careless captions is saved
            raise InterruptedError
        return evaluate(*args)

    monkeypatch.setattr(pretrain_flux, "evaluate", evaluate_and_stop)
    with pytest.raises(InterruptedError):
        pretrain_flux.main(["--output_dir", str(tmp_path / "parts"), *options])
    pretrain_flux.main(["--output_dir", str(tmp_path / "parts"), *options])
    pipelines = [
        FluxPipeline.from_pretrained(tmp_path / name / "model", dtype=torch.float32) for name in ("whole", "parts")
    ]
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        states = [getattr(pipeline, name).state_dict() for pipeline in pipelines]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    card = (tmp_path / "whole" / "model" / "README.md").read_text()
    assert "| true_steps | 2 |" in card and "library_name: diffusers" in card
    log = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in log] == ["true_captions"] * 2 + ["careless_captions"] * 2
    image = pipelines[0]("A red circle is above a blue square.", height=IMAGE_SIZE, width=IMAGE_SIZE,
                         num_inference_steps=2, max_sequence_length=MAX_SEQUENCE_LENGTH).images[0]  # fmt: skip
    assert image.size == (IMAGE_SIZE, IMAGE_SIZE)
