"""Oracles: the pipelines' own calls and signatures, the renderer itself, and redrawing an image from its recipe."""

import inspect
import io
import json
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image

from tests.generation.pipelines import BUILDERS
from trl_spatial.generation.engines import estimate
from trl_spatial.generation.generators import SceneGenerator
from trl_spatial.generation.jobs import DrawingError, ImageJob
from trl_spatial.generation.painters import EndpointPainter, PipelinePainter, RendererPainter, make_painter
from trl_spatial.generation.seeds import image_generator
from trl_spatial.generation.settings import FAMILIES, settings_for


RED, GREEN = "A red circle is left of a blue square.", "A green triangle is above a red circle."
JOBS = [ImageJob(f"{prompt}-{seed}", prompt, seed) for prompt in (RED, GREEN) for seed in (7, 2**62)]
SMALL = {"height": 32, "width": 32, "num_inference_steps": 2}
TINY = {"dtype": "float32", "device": "cpu", **SMALL}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Pipeline class → the folder of a tiny pipeline, under a name that says nothing. Treat them as read-only."""
    made = {}
    for number, (name, build) in enumerate(BUILDERS.items()):
        made[name] = tmp_path_factory.mktemp(f"model{number}")
        build().save_pretrained(made[name])
    return made


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)))


# the settings table


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_settings_are_arguments_of_the_familys_call(family):
    call = inspect.signature(getattr(diffusers, family.pipeline_class).__call__)
    call.bind(None, prompt=[RED], generator=[], **family.arguments)
    # Whatever guides, the class has it under the name of the table.
    guides = {
        name for name in call.parameters if name in ("true_cfg_scale", "distilled_guidance_scale", "guidance_scale")
    }
    assert guides & family.arguments.keys()
    assert ("true_cfg_scale" in family.arguments) == ("negative_prompt" in family.arguments)


def test_the_class_decides_about_the_family_and_not_the_name(tmp_path):
    folder = tmp_path / "Qwen-Image"
    folder.mkdir()
    for family in FAMILIES:
        (folder / "model_index.json").write_text(json.dumps({"_class_name": family.pipeline_class}))
        assert settings_for(folder) is family
    (folder / "model_index.json").write_text('{"_class_name": "PixArtSigmaPipeline"}')
    with pytest.raises(ValueError, match=r"PixArtSigmaPipeline.*FluxPipeline \(FLUX.1-dev\).*SD3.5") as error:
        settings_for(folder)
    assert all(family.name in str(error.value) for family in FAMILIES)
    (folder / "model_index.json").unlink()
    with pytest.raises(ValueError, match="has no model_index"):
        settings_for(folder)


# pipelines


@pytest.mark.parametrize("class_name", BUILDERS)
def test_images_are_what_the_pipelines_own_call_gives_and_prompts_are_encoded_once(class_name, folders):
    painter = PipelinePainter(folders[class_name], **TINY)
    painter.draw(JOBS[:1])  # loads it
    num_encoded = []
    painter._pipeline.text_encoder.register_forward_hook(lambda *_: num_encoded.append(1))
    drawn = painter.draw(JOBS[2:3])
    num_once = len(num_encoded)
    drawn += painter.draw(JOBS[3:])
    assert len(num_encoded) == num_once > 0
    drawn = painter.draw(JOBS[:2]) + drawn

    pipeline = DiffusionPipeline.from_pretrained(folders[class_name])
    pipeline.set_progress_bar_config(disable=True)
    arguments = {**settings_for(folders[class_name]).arguments, **SMALL}
    assert [image.id for image in drawn] == [job.id for job in JOBS]
    for job, image in zip(JOBS, drawn, strict=True):
        expected = pipeline(job.prompt, generator=image_generator(job.seed), **arguments).images[0]
        assert np.array_equal(pixels(image.png), np.asarray(expected))
        assert image.png.startswith(b"\x89PNG") and (image.refusal, image.cost) == (None, 0.0) and image.seconds > 0
    assert len({image.png for image in drawn}) == len(JOBS)


def test_the_order_of_the_jobs_does_not_matter_and_a_batch_moves_the_last_bit_at_most(folders):
    painter = PipelinePainter(folders["FluxPipeline"], **TINY)
    forwards = {image.id: image.png for image in painter.draw(JOBS)}
    torch.manual_seed(9)
    assert forwards == {image.id: image.png for image in painter.draw(JOBS[::-1])}
    batches = PipelinePainter(folders["FluxPipeline"], batch_size=3, **TINY).draw(JOBS)
    assert {image.id for image in batches} == forwards.keys()
    for image in batches:
        difference = pixels(image.png).astype(int) - pixels(forwards[image.id])
        assert np.abs(difference).max() <= 1


def test_pipelines_run_on_one_thread_and_the_number_of_threads_is_left_as_it_was(folders):
    painter = PipelinePainter(folders["FluxPipeline"], **TINY)
    one = painter.draw(JOBS[:1])[0].png
    num_threads = set()
    painter._pipeline.transformer.register_forward_hook(lambda *_: num_threads.add(torch.get_num_threads()))
    torch.set_num_threads(2)
    try:
        assert painter.draw(JOBS[:1])[0].png == one
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert num_threads == {1}


def test_an_image_can_be_drawn_again_from_its_recipe(folders):
    overrides = TINY | {"true_cfg_scale": 2.0, "width": 40}
    image = PipelinePainter(folders["QwenImagePipeline"], **overrides).draw(JOBS[1:2])[0]
    recipe = json.loads(json.dumps(image.recipe))
    assert recipe["model"] == folders["QwenImagePipeline"].name  # and not the path on this machine
    assert recipe["scheduler"] == "FlowMatchEulerDiscreteScheduler"
    assert (recipe["torch"], recipe["diffusers"]) == (version("torch"), diffusers.__version__)
    assert (recipe["device"], recipe["seed"], recipe["revision"]) == ("cpu", JOBS[1].seed, None)

    pipeline = getattr(diffusers, recipe["pipeline"]).from_pretrained(
        folders["QwenImagePipeline"], dtype=getattr(torch, recipe["dtype"])
    )
    noise = torch.Generator(recipe["generator_device"]).manual_seed(recipe["torch_seed"])
    names = ("height", "width", "num_inference_steps", "true_cfg_scale", "negative_prompt")
    again = pipeline(RED, generator=noise, **{name: recipe[name] for name in names}).images[0]
    assert np.array_equal(pixels(image.png), np.asarray(again))


def test_the_recipe_names_the_commit_of_a_cached_repository(folders, tmp_path, monkeypatch):
    commit = "0123456789" * 4
    repository = tmp_path / "models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / commit).symlink_to(folders["FluxPipeline"])
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    image = PipelinePainter("org/tiny", **TINY).draw(JOBS[:1])[0]
    assert (image.recipe["model"], image.recipe["revision"]) == ("org/tiny", commit)
    assert image.png == PipelinePainter(folders["FluxPipeline"], **TINY).draw(JOBS[:1])[0].png


class Flagging(FluxPipeline):
    """A pipeline with a safety checker that objects to every second image."""

    def __call__(self, prompt, **kwargs):
        output = super().__call__(prompt, **kwargs)
        output["nsfw_content_detected"] = [number % 2 == 1 for number in range(len(prompt))]
        return output


def test_flagged_images_are_refusals_and_errors_name_image_and_generator(folders):
    painter = PipelinePainter(folders["FluxPipeline"], batch_size=2, **TINY)
    painter.draw(JOBS[:1])
    painter._pipeline.__class__ = Flagging
    kept, refused = painter.draw(JOBS[:2])
    assert (kept.png is None, kept.refusal) == (False, None)
    assert refused.png is None and "not safe for work" in refused.refusal and refused.recipe["seed"] == JOBS[1].seed

    painter = PipelinePainter(folders["FluxPipeline"], batch_size=2, **TINY | {"num_inference_steps": 0})
    with pytest.raises(DrawingError, match=f"^{painter.name} could not draw the image {JOBS[0].id}, {JOBS[1].id}: "):
        painter.draw(JOBS)


# renderers


def test_a_renderer_draws_what_it_draws_alone_and_refuses_the_impossible():
    painter = RendererPainter(SceneGenerator(48))
    for job, image in zip(JOBS, painter.draw(JOBS), strict=True):
        (expected,) = SceneGenerator(48)([job.prompt], [image_generator(job.seed)])
        assert np.array_equal(pixels(image.png), np.asarray(expected))
        assert (image.recipe["width"], image.recipe["seed"], image.recipe["renderer"]) == (
            48,
            job.seed,
            "SceneGenerator",
        )
    impossible = "A red circle is left of a blue square. A blue square is left of a red circle."
    (image,) = painter.draw([ImageJob("x", impossible, 0)])
    assert image.png is None and "left" in image.refusal

    stream = painter.stream([JOBS[0], ImageJob("dog", "a photo of a dog", 0)])
    assert next(stream).id == JOBS[0].id
    with pytest.raises(DrawingError, match=r"SceneGenerator could not draw the image dog: .*a photo of a dog"):
        next(stream)


# servers


class Server:
    """What an endpoint is to its painter, with answers by prompt."""

    model, concurrency = "painter-4", 2

    def __init__(self, **answers):
        buffer = io.BytesIO()
        Image.new("RGB", (40, 24), "red").save(buffer, "JPEG", quality=100)
        self.drawing = {"image_bytes": buffer.getvalue(), "refusal": None, "cost": 0.03, "is_flagged": False}
        self.answers, self.calls = answers, []

    def draw(self, prompt, **kwargs):
        self.calls.append((prompt, kwargs))
        answer = self.answers.get(prompt, {})
        if isinstance(answer, Exception):
            raise answer
        return SimpleNamespace(**self.drawing | {"served_model": "painter-4.1", "seed": kwargs["seed"]} | answer)

    def map(self, function, items):
        def run(item):
            try:
                return function(item)
            except RuntimeError as error:
                return error

        with ThreadPoolExecutor(self.concurrency) as pool:
            for index, item in enumerate(items):
                yield index, pool.submit(run, item).result()


def test_answers_of_a_server_become_png_files_refusals_and_costs():
    refused = {"image_bytes": None, "refusal": "against our policy", "cost": 0.0}
    server = Server(violent=refused, naked={"is_flagged": True})
    painter = EndpointPainter(server, "40x24", {"watermark": False})
    jobs = [ImageJob(prompt, prompt, 2**62 + 5) for prompt in ("calm", "violent", "naked")]
    calm, violent, naked = painter.draw(jobs)
    assert calm.png.startswith(b"\x89PNG") and pixels(calm.png).shape == (24, 40, 3)
    assert (calm.recipe["served_model"], calm.recipe["width"], calm.cost) == ("painter-4.1", 40, 0.03)
    assert (violent.png, violent.refusal, violent.cost) == (None, "against our policy", 0.0)
    assert naked.png is None and "not safe for work" in naked.refusal and naked.cost == 0.03
    assert server.calls[0] == ("calm", {"size": "40x24", "seed": 5, "extra_body": {"watermark": False}})
    assert calm.recipe["seed"] == 5


def test_a_failing_call_ends_the_work_after_what_is_finished():
    server = Server(broken=RuntimeError("HTTP 500"))
    jobs = [ImageJob(prompt, prompt, 0) for prompt in ("a", "broken", "b", "c")]
    images, finished = EndpointPainter(server).stream(jobs), []
    with pytest.raises(DrawingError, match="painter-4 could not draw the image broken: RuntimeError: HTTP 500"):
        finished.extend(image.id for image in images)
    assert finished == ["a"] and len(server.calls) == 2  # nothing is bought any more


def test_a_recipe_names_a_server():
    stubs = pytest.importorskip("tests.openai_stub")
    with stubs.OpenAIStub() as stub:
        spec = {
            "endpoint": stub.url,
            "model": "m",
            "size": "64x64",
            "price_per_image": 0.5,
            "extra_body": {"watermark": False},
        }
        painter = make_painter(spec)
        drawn = {image.id: image for image in painter.draw(JOBS)}
        assert drawn.keys() == {job.id for job in JOBS}
        assert {image.cost for image in drawn.values()} == {0.5}
        assert len({image.png for image in drawn.values()}) == len(JOBS)


# recipes


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "flat", "size": 64}, "flat has the unknown key 'size'. Available: name, image_size"),
        (
            {"name": "flat", "image_size": "64"},
            "`image_size` of the generator flat is '64'. It must be of the type int",
        ),
        ({"image_size": 64}, "unknown key 'image_size'|lacks `name`"),
        ({"name": "org/x", "guidance": 3.0}, "org/x has the unknown key 'guidance'"),
        ({"name": "org/x", "guidance_scale": True}, "guidance_scale.*int or float"),
        ({"name": "org/x", "dtype": "fp8"}, "`dtype` is 'fp8'. Use one of float32"),
        ({"name": "org/x", "batch_size": 0}, "`batch_size` is 0"),
        (
            {"name": "Qwen/Qwen-Image", "guidance_scale": 3.0},
            "Qwen-Image do not take `guidance_scale`.*true_cfg_scale",
        ),
        ({"endpoint": "https://host/v1"}, "lacks `model`"),
        ({"endpoint": "https://host/v1", "model": "m", "name": "n"}, "unknown key 'name'"),
        ({"endpoint": "https://host/v1", "model": "m", "extra_body": "x"}, "`extra_body`.*of the type dict"),
    ],
)
def test_a_wrong_entry_of_a_recipe_is_refused_before_anything_is_loaded(spec, message):
    with pytest.raises(ValueError, match=message):
        make_painter(spec)


def test_entries_make_painters_and_overrides_of_another_family_are_refused_when_it_is_known(folders):
    assert make_painter({"name": "flat", "image_size": 32}).world.image_size == 32
    painter = make_painter({"name": str(folders["FluxPipeline"]), "batch_size": 2, "true_cfg_scale": 3.0, **TINY})
    assert isinstance(painter, PipelinePainter) and painter.batch_size == 2
    with pytest.raises(ValueError, match=r"FLUX.1-dev do not take `true_cfg_scale`.*guidance_scale"):
        painter.draw(JOBS)
    with pytest.raises(ValueError, match="seed of the image 'x' is -1"):
        ImageJob("x", RED, -1)


def test_estimates_are_the_sums_that_the_timings_make():
    flux = estimate({"name": "black-forest-labs/FLUX.1-dev"}, 80_000)
    qwen = estimate({"name": "Qwen/Qwen-Image@main", "dtype": "bfloat16"}, 80_000)
    assert flux["gpu_hours"] + qwen["gpu_hours"] == pytest.approx((5 + 20) * 80_000 / 3600)
    half = estimate({"name": "black-forest-labs/FLUX.1-dev", "num_inference_steps": 14, "height": 512}, 80_000)
    assert half["gpu_hours"] == pytest.approx(flux["gpu_hours"] / 4)
    assert estimate({"name": "Tongyi-MAI/Z-Image"}, 10)["gpu_hours"] is None
    # no key is needed for that
    server = {"endpoint": "https://host/v1", "model": "m", "api_key_env": "NO_SUCH_VARIABLE"}
    assert estimate(server | {"price_per_image": 0.03}, 100)["cost"] == pytest.approx(3.0)
    assert estimate(server, 100) == {"images": 100, "calls": 100, "gpu_hours": 0.0, "cost": None}
    assert estimate({"name": "flat"}, 10) == {"images": 10, "calls": 0, "gpu_hours": 0.0, "cost": 0.0}


def test_lora_weights_are_drawn_with(folders, tmp_path):
    # The oracle: diffusers itself, with the same weights loaded by hand.
    pipeline = diffusers.FluxPipeline.from_pretrained(folders["FluxPipeline"])
    pipeline.transformer.add_adapter(
        LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    )
    weights = get_peft_model_state_dict(pipeline.transformer)
    diffusers.FluxPipeline.save_lora_weights(tmp_path / "my lora", transformer_lora_layers=weights)
    spec = {"name": str(folders["FluxPipeline"]), **TINY}
    job = JOBS[0]
    (plain,) = make_painter(spec).draw([job])
    (drawn,) = make_painter(spec | {"lora": str(tmp_path / "my lora")}).draw([job])
    pipeline.set_progress_bar_config(disable=True)
    (expected,) = pipeline(job.prompt, generator=image_generator(job.seed), guidance_scale=3.5, **SMALL).images
    assert np.abs(pixels(drawn.png).astype(int) - np.asarray(expected)).max() <= 1  # of 255: another number of threads
    assert not np.array_equal(pixels(drawn.png), pixels(plain.png))
    assert drawn.recipe["lora"] == "my lora" and plain.recipe["lora"] is None
    with pytest.raises(ValueError, match="nowhere"):
        make_painter(spec | {"lora": "./nowhere"}).draw([job])
