"""Oracles: the pipeline and the renderer themselves, called for one image at a time."""

import numpy as np
import pytest
import torch
from flux import build_flux_pipeline

from trl_spatial.generation.drawing import draw_rows
from trl_spatial.generation.generators import PipelineGenerator, SceneGenerator
from trl_spatial.generation.seeds import image_generator
from trl_spatial.scenes import check_scene, parse_description


ROWS = [
    {"prompt": "A red circle is left of a blue square."},
    {"prompt": "A green triangle is above a red circle."},
    {"prompt": "A red circle is left of a blue square."},  # again: another row, with other noise
]
SETTINGS = {"height": 32, "width": 48, "num_inference_steps": 2, "guidance_scale": 2.0, "max_sequence_length": 16}


@pytest.fixture(scope="module")
def pipeline():
    pipeline = build_flux_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module", params=["pipeline", "scenes"])
def generator(request, pipeline):
    return PipelineGenerator(pipeline, **SETTINGS) if request.param == "pipeline" else SceneGenerator(image_size=48)


def draw(generator, rows=ROWS, **kwargs):
    """Number of each image → its pixels."""
    batches = draw_rows(generator, rows, **({"batch_size": 4, "seed": 3, "num_images": 2} | kwargs))
    return {
        index: np.asarray(image, dtype=int)
        for batch in batches
        for index, image in zip(batch.indices, batch.images, strict=True)
    }


def is_close(first, second):
    # another batch size may round the last bit of a pixel differently
    return np.abs(first - second).max() <= 1


def test_an_image_is_what_its_own_call_gives(pipeline):
    for index, image in draw(PipelineGenerator(pipeline, **SETTINGS)).items():
        row, number = divmod(index, 2)
        expected = pipeline(ROWS[row]["prompt"], generator=image_generator(3, row, number), **SETTINGS).images[0]
        assert is_close(image, np.asarray(expected, dtype=int))


def test_an_image_depends_on_its_seed_alone(generator):
    images = draw(generator)
    assert sorted(images) == list(range(6))
    assert all(np.array_equal(images[index], image) for index, image in draw(generator).items())
    for other in (draw(generator, batch_size=1), draw(generator, ROWS[:2], batch_size=3)):
        assert all(is_close(images[index], image) for index, image in other.items())
    # all random numbers differ: within a row, between equal prompts, between seeds
    different = [images[0], images[1], images[4], images[5], draw(generator, ROWS[:1], num_images=1, seed=4)[0]]
    assert not any(is_close(a, b) for i, a in enumerate(different) for b in different[:i])


def test_order_of_a_batch_and_global_state_do_not_matter(generator):
    prompts = [row["prompt"] for row in ROWS]
    state = torch.get_rng_state()
    forwards = generator(prompts, [image_generator(0, index) for index in range(3)])
    torch.manual_seed(99)
    backwards = generator(prompts[::-1], [image_generator(0, index) for index in (2, 1, 0)])[::-1]
    torch.set_rng_state(state)
    assert all(is_close(np.asarray(a, int), np.asarray(b, int)) for a, b in zip(forwards, backwards, strict=True))


@pytest.mark.parametrize("world_size", [1, 2, 4, 7])
@pytest.mark.parametrize("is_collective", [False, True])
def test_processes_share_the_images_and_call_equally_often_if_they_must(world_size, is_collective):
    calls = []

    def count(prompts, generators):
        calls[-1] += 1
        return SceneGenerator(32)(prompts, generators)

    whole, shared = draw(SceneGenerator(32)), {}
    for rank in range(world_size):
        calls.append(0)
        share = draw(count, batch_size=2, rank=rank, world_size=world_size, is_collective=is_collective)
        assert not shared.keys() & share.keys()
        shared |= share
    assert sorted(shared) == sorted(whole)
    assert all(np.array_equal(whole[index], image) for index, image in shared.items())
    assert len(set(calls)) == 1 or not is_collective
    assert is_collective or sum(calls) == sum(-(-len(range(rank, 6, world_size)) // 2) for rank in range(world_size))


def test_a_scene_is_drawn_as_described():
    generators = [image_generator(0, index) for index in range(3)]
    images = SceneGenerator()([row["prompt"] for row in ROWS], generators)
    for row, image in zip(ROWS, images, strict=True):
        assert check_scene(image, parse_description(row["prompt"])).is_correct
    with pytest.raises(ValueError, match="a photo of a dog"):
        SceneGenerator()(["a photo of a dog"], generators[:1])


def test_a_generator_that_draws_another_number_of_images_is_an_error():
    with pytest.raises(ValueError, match="drew 1 images for 4 prompts"):
        draw(lambda prompts, generators: SceneGenerator()(prompts[:1], generators[:1]))
