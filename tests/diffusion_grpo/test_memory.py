"""Memory is predicted from the configuration alone: compared with what the tiny models really have and save."""

import json
import math
from functools import partial

import pytest
import torch
from PIL import Image
from torch.autograd.graph import saved_tensors_hooks

from tests.diffusion_grpo.families import FAMILIES, GUIDED, MAX_SEQUENCE_LENGTH
from trl_spatial.diffusion_grpo import (
    DiffusionDPOConfig,
    DiffusionGRPOConfig,
    DiffusionNFTConfig,
    attention_lora_config,
)
from trl_spatial.diffusion_grpo.policies import make_policy
from trl_spatial.diffusion_grpo.rollout import sample_rollout
from trl_spatial.diffusion_grpo.runtime.activations import reusing
from trl_spatial.diffusion_grpo.runtime.allocations import peak_of
from trl_spatial.diffusion_grpo.runtime.memory import (
    GIB,
    GPU_GIB,
    MemoryEstimate,
    MemoryModel,
    build_policy,
    describe_options,
    load_architecture,
    reward_model_bytes,
    weight_bytes,
)
from trl_spatial.diffusion_grpo.runtime.model_setup import prepare_transformer
from trl_spatial.diffusion_grpo.runtime.prompt_cache import PromptCache
from trl_spatial.generation.seeds import image_generator


OFFICIAL = (
    "black-forest-labs/FLUX.1-dev",
    "Qwen/Qwen-Image",
    "stabilityai/stable-diffusion-3.5-medium",
    "Tongyi-MAI/Z-Image",
)


EVALUATION = {"evaluate: sample", "evaluate: decode"}
# Fields of what is shared by the configurations
SHARED = (
    "output_dir", "num_generations", "top_k", "per_device_train_batch_size", "gradient_accumulation_steps", "height", "width",
    "num_inference_steps", "max_sequence_length", "guidance_scale",
)  # fmt: skip


def make_args(folder, **kwargs):
    settings = dict(
        num_generations=4,
        top_k=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        height=32,
        width=32,
        num_inference_steps=4,
        max_sequence_length=MAX_SEQUENCE_LENGTH,
        use_cpu=True,
    )
    return DiffusionGRPOConfig(str(folder), **(settings | kwargs))


@pytest.fixture(scope="module", params=GUIDED)
def saved(request, tmp_path_factory):
    """A family, its tiny pipeline, and the folder that it is saved in."""
    family = FAMILIES[request.param]
    pipeline, folder = family.build(), tmp_path_factory.mktemp(request.param)
    pipeline.save_pretrained(folder)
    return family, pipeline, folder


def make_model(saved, tmp_path, peft_config="lora", dtype=torch.float32, **kwargs):
    family, _, folder = saved
    return MemoryModel(
        load_architecture(str(folder)),
        make_args(tmp_path, **(family.guidance | kwargs)),
        attention_lora_config(rank=2) if peft_config == "lora" else peft_config,
        dtype=dtype,
    )


@pytest.fixture(scope="module")
def plain(saved, tmp_path_factory):
    """The model of the usual run, whose steps are measured once. Treat it as read-only."""
    return make_model(saved, tmp_path_factory.mktemp("plain"))


def test_an_old_policy_takes_the_place_of_trained_steps(saved, plain):
    """DiffusionNFT keeps one more set of the trained weights, another one aside while it draws, and the last latents only."""
    _, _, folder = saved
    nft = DiffusionNFTConfig(**{name: getattr(plain.args, name) for name in SHARED}, use_cpu=True)
    lora, dtype = attention_lora_config(rank=2), torch.float32
    ours, theirs = MemoryModel(load_architecture(str(folder)), nft, lora, dtype=dtype).estimate(), plain.estimate()
    weights = ours.parts["trained weights"]
    assert ours.parts["old policy"] == weights and "old policy" not in theirs.parts
    one = theirs.parts["latents of a rollout"] // (2 * 3 + 1)
    assert ours.parts["latents of a rollout"] == one
    assert ours.phases["train"] - theirs.phases["train"] == weights - 6 * one
    assert ours.phases["sample"] - theirs.phases["sample"] == 2 * weights - 6 * one


def rollout_bytes(model):
    """Of the latents, without measuring the steps."""
    return model._state_bytes(None)["latents of a rollout"]


def test_means_of_the_old_policy_are_kept_for_later_updates(saved, plain, tmp_path):
    """Of 4 images with 3 trained steps: 7 latents each in the rollout; then 9 of those that are trained on, 4 or 2."""
    several = {"steps_per_generation": 4, "ratio_norm": True, "beta": 0.0}
    sizes = {
        (name, top_k): rollout_bytes(make_model(saved, tmp_path, top_k=top_k, **kwargs))
        for name, kwargs in (("one", {}), ("several", several))
        for top_k in (1, None)
    }
    one = plain._latents(1, FAMILIES["flux"].options()).nbytes
    images = {key: 2 * (2 if key[0] == "one" else 4) // (2 if key[1] else 4) * 4 for key in sizes}
    num_latents = {("one", 1): 7, ("one", None): 7, ("several", 1): 7, ("several", None): 9}
    assert sizes == {key: images[key] * num_latents[key] * one for key in sizes}


def test_many_scouts_have_more_latents_than_the_images(saved, plain, tmp_path):
    few, many = (make_model(saved, tmp_path, num_scouts=number, scout_steps=1) for number in (14, 28))
    kept, latents = few.args.num_kept, [rollout_bytes(model) for model in (plain, few, many)]
    one = latents[0] // (plain.args.num_prompts_per_device * plain.args.num_drawn * (2 * 3 + 1))
    assert latents[1:] == [
        few.args.num_prompts_per_device * max(kept * (2 * 3 + 1), number) * one for number in (14, 28)
    ]
    assert latents[1] < latents[2]


def make_dpo_model(saved, tmp_path, **kwargs):
    family, _, folder = saved
    args = make_args(tmp_path, **family.guidance)
    settings = {name: getattr(args, name) for name in SHARED if name in DiffusionDPOConfig.__dataclass_fields__}
    config = DiffusionDPOConfig(**settings, use_cpu=True, **kwargs)
    return MemoryModel(load_architecture(str(folder)), config, attention_lora_config(rank=2), dtype=torch.float32)


def test_pairs_take_both_their_images_and_no_rollout(saved, tmp_path):
    """Of a batch of 2 pairs, 4 images are encoded and trained on, without classifier-free guidance."""
    family, _, _ = saved
    model = make_dpo_model(saved, tmp_path)
    guidance = {"guidance_scale": model.policy.unguided_scale} if model.policy.has_classifier_free_guidance else {}
    online = make_model(saved, tmp_path, per_device_train_batch_size=4, **guidance)
    kept, offloaded = model.estimate(), model.estimate(offload_vae=True)
    assert list(kept.phases) == ["encode", "encode images", "train"]
    assert kept.phases["encode images"] == offloaded.phases["encode images"]
    assert kept.phases["train"] - offloaded.phases["train"] == kept.parts["VAE"]
    assert kept.parts["prompt embeddings"] == 4 * embeds_bytes(family)
    online.estimate()  # the first pass may fill caches of positions
    ours, theirs = (each.estimate(gradient_checkpointing=False) for each in (model, online))
    assert ours.parts["training step"] == theirs.parts["training step"]
    assert ours.phases["train"] == theirs.phases["train"] - theirs.parts["latents of a rollout"]


def test_evaluation_is_counted_where_there_is_one(saved, plain, tmp_path):
    """Its images are drawn with guidance also where pairs are trained on without."""
    online, pairs = (make(saved, tmp_path, eval_strategy="steps").estimate() for make in (make_model, make_dpo_model))
    without = plain.estimate()
    assert pairs.phases.keys() - make_dpo_model(saved, tmp_path).estimate().phases.keys() == EVALUATION
    assert online.phases.keys() - without.phases.keys() == EVALUATION
    for part in ("sampling step in evaluation", "decoding in evaluation", "trained weights kept aside"):
        assert pairs.parts[part] == online.parts[part] > 0
    assert without.parts["trained weights kept aside"] == 0


def test_encoding_images_takes_what_a_real_vae_does(saved, tmp_path):
    model, policy = make_dpo_model(saved, tmp_path), saved[0].make_policy()
    images = [Image.new("RGB", (32, 32))] * 4
    measured = peak_of(lambda: policy.encode_images(images), policy.vae)
    assert model.estimate().parts["encoding images"] == pytest.approx(measured, rel=0.1)


def test_parameters_are_counted_without_weights(saved):
    _, pipeline, folder = saved
    policy = build_policy(load_architecture(str(folder)), max_sequence_length=MAX_SEQUENCE_LENGTH)
    models = {name: model for name, model in pipeline.components.items() if isinstance(model, torch.nn.Module)}
    assert {"transformer", "vae", "text_encoder"} <= set(models)
    for name, model in models.items():
        predicted = getattr(policy.pipeline, name)
        assert {parameter.device.type for parameter in predicted.parameters()} == {"meta"}
        assert sum(p.numel() for p in predicted.parameters()) == sum(p.numel() for p in model.parameters()), name


def test_several_processes_hold_the_gradients_that_they_exchange(saved, plain, tmp_path, monkeypatch):
    """DDP copies them into buckets: as many bytes once more, in every phase. FSDP has none."""
    alone = plain.estimate()
    monkeypatch.setattr(DiffusionGRPOConfig, "world_size", property(lambda args: 2))
    model = make_model(saved, tmp_path, num_generations=2)
    together = model.estimate()
    exchanged = together.parts["gradients being exchanged"]
    assert exchanged == together.parts["trained weights"] and "gradients being exchanged" not in alone.parts
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    sharded = model.estimate()
    assert {phase: size - sharded.phases[phase] for phase, size in together.phases.items()} == dict.fromkeys(
        together.phases, exchanged
    )


def test_adapters_and_their_state_are_counted_exactly(saved, plain, tmp_path):
    family, _, _ = saved
    policy = family.make_policy()
    transformer = prepare_transformer(policy, plain.args, attention_lora_config(rank=2))
    real = sum(p.numel() for p in transformer.parameters() if p.requires_grad)
    assert plain.num_trained == real > 0
    parts = plain.estimate().parts
    assert parts["trained weights"] == 4 * real  # float32
    assert parts["their gradients and AdamW"] == 12 * real
    frozen = [*(p for p in transformer.parameters() if not p.requires_grad), *transformer.buffers()]
    assert parts["frozen weights"] == sum(tensor.nbytes for tensor in frozen)
    assert make_model(saved, tmp_path, ema_decay=0.0)._state_bytes(None)["average of the weights"] == 0


def test_embeddings_have_the_shapes_that_the_policy_gives(saved):
    family, _, _ = saved
    policy = family.make_policy()
    embeds = policy.encode_prompt(["a red cube"])
    shapes = policy.embed_shapes(1)
    assert set(shapes) == set(embeds)
    for name, tensor in embeds.items():
        assert len(shapes[name]) == tensor.ndim
        assert shapes[name][2:] == tensor.shape[2:]
        assert shapes[name][1] >= tensor.shape[1]  # as long as they may be


def embeds_bytes(family):
    """Of a prompt as long as may be, in float32; its mask counts tokens in 64 bits."""
    return sum(
        (8 if name.endswith("mask") else 4) * math.prod(shape)
        for name, shape in family.make_policy().embed_shapes(1).items()
    )


def test_embeddings_of_a_batch_are_on_the_device_and_those_of_a_rollout_on_the_host(saved, tmp_path):
    few, many = (make_model(saved, tmp_path, num_generations=size, per_device_eval_batch_size=1) for size in (4, 8))
    assert few.args.per_device_train_batch_size == few.args.sampling_batch_size == 2
    one = embeds_bytes(saved[0])
    sizes = [model._state_bytes(None)["prompt embeddings"] for model in (few, many)]
    assert sizes == [2 * one, 2 * one]
    num_more = many.args.num_prompts_per_device * 8 - few.args.num_prompts_per_device * 4
    assert many.host_bytes() - few.host_bytes() == num_more * one > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_activations_are_those_of_a_real_step(saved, tmp_path, dtype):
    """Oracle: autograd's own hooks, in a step of a real tiny model on the CPU. Within a factor of 1.5."""
    family, _, _ = saved
    model = make_model(saved, tmp_path, dtype=dtype)
    predicted = model.estimate(gradient_checkpointing=False).parts["training step"]
    pipeline = family.build()
    for parameter in [p for m in (pipeline.transformer,) for p in m.parameters()]:
        parameter.data = parameter.data.to(dtype)
    policy = make_policy(pipeline, max_sequence_length=MAX_SEQUENCE_LENGTH)
    transformer = prepare_transformer(policy, model.args, attention_lora_config(rank=2))
    weights = {p.untyped_storage().data_ptr() for p in transformer.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    options = family.options()
    embeds = {
        name: torch.ones(shape, dtype=torch.long if name.endswith("mask") else torch.float32)
        for name, shape in policy.embed_shapes(2).items()
    }
    embeds |= {f"negative_{name}": tensor.clone() for name, tensor in embeds.items()}
    latents = policy.prepare_latents([image_generator(0), image_generator(1)], options)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        policy.predict_velocity(transformer.train(), latents, torch.tensor(0.5), embeds, options).mean().backward()
    measured = sum(storages.values())
    # A peak holds, beside what is saved, what is computed at the moment
    assert 0.95 < predicted / measured < 1.5


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("peft_config", ["lora", None])
def test_a_training_step_takes_what_a_real_second_batch_does(saved, tmp_path, peft_config, checkpointing):
    """Oracle: a real tiny model that has gradients already, in the trainer's own checkpointing."""
    family, _, _ = saved
    model = make_model(saved, tmp_path, peft_config=peft_config, beta=0.0, height=64, width=64)
    model._train(checkpointing)  # fills caches of positions
    predicted = model.estimate(gradient_checkpointing=checkpointing).parts["training step"]
    policy = family.make_policy()
    lora = attention_lora_config(rank=2) if peft_config == "lora" else None
    transformer = prepare_transformer(policy, model.args, lora).train()
    if checkpointing:
        transformer.gradient_checkpointing_enable()
    options = family.options(64, 64)
    embeds = {
        name: torch.ones(shape, dtype=torch.long if name.endswith("mask") else torch.float32)
        for name, shape in policy.embed_shapes(2).items()
    }
    embeds |= {f"negative_{name}": tensor.clone() for name, tensor in embeds.items()}
    latents = policy.prepare_latents([image_generator(0), image_generator(1)], options)

    def step():
        policy.predict_velocity(transformer, latents, torch.tensor(0.5), embeds, options).mean().backward()

    step()
    assert predicted == pytest.approx(peak_of(step, transformer), rel=0.03)


def test_activations_that_are_reused_take_what_a_real_rollout_keeps(saved, tmp_path):
    """Oracle: a real tiny model. Two prompts are drawn with four images each, of which two are trained on."""
    family, _, _ = saved
    kwargs = dict(height=64, width=64, beta=0.0)
    plain = make_model(saved, tmp_path, **kwargs)
    if any(name.endswith("mask") for name in plain.policy.embed_shapes(1)):
        with pytest.raises(ValueError, match="different lengths"):
            make_model(saved, tmp_path, gradient_checkpointing_kwargs={"reuse_activations": True}, **kwargs)
        return
    ours = make_model(saved, tmp_path, gradient_checkpointing_kwargs={"reuse_activations": True}, **kwargs)
    policy, args = family.make_policy(), ours.args
    transformer = prepare_transformer(policy, args, attention_lora_config(rank=2))
    transformer.gradient_checkpointing_enable()
    embeds = {name: torch.ones(shape) for name, shape in policy.embed_shapes(8).items()}
    embeds |= {f"negative_{name}": tensor for name, tensor in embeds.items()}
    options = family.options(64, 64)
    rollout = sample_rollout(
        policy, transformer, embeds, [image_generator(image) for image in range(8)], options,
        sigmas=policy.prepare_sigmas(options), trained_steps=(0, 1, 2), noise_level=0.9, dynamics="flow_sde", batch_size=2,
        keep_activations=True,
    )  # fmt: skip
    estimate, without = ours.estimate(), plain.estimate()
    drawn = estimate.parts["activations of a rollout"]
    kept = rollout.activations.tensors
    assert drawn == sum(tensor.nbytes for tensor in kept)
    for phase in ("sample", "decode"):
        assert estimate.phases[phase] - without.phases[phase] == drawn

    batch = {name: tensor[:2].clone() for name, tensor in embeds.items()}
    latents = rollout.latents[:2, 0].clone()
    transformer.train()

    def step():
        with reusing(rollout.activations.of(0, slice(0, 2))):
            velocity = policy.predict_velocity(transformer, latents, torch.tensor(0.5), batch, options)
        velocity.mean().backward()

    step()
    assert estimate.parts["training step"] == pytest.approx(peak_of(step, transformer, kept), rel=0.03)
    # views of it, but with guidance copies
    is_less = estimate.parts["training step"] < without.parts["training step"]
    assert is_less == (policy.num_passes(options) == 1)
    assert estimate.phases["train"] - estimate.parts["training step"] - drawn / 2 == (
        without.phases["train"] - without.parts["training step"]
    )
    assert "activations of a rollout" not in ours.estimate(gradient_checkpointing=False).parts


@pytest.mark.parametrize(("dtype", "copies"), [(torch.bfloat16, 1), (torch.float32, 0)])
def test_a_convolution_in_half_precision_copies_what_it_reads_and_writes(dtype, copies):
    layer = torch.nn.Conv2d(8, 4, 3, padding=1, device="meta", dtype=dtype)
    image = torch.empty(2, 8, 32, 32, device="meta", dtype=dtype)
    output = image.nbytes // 2
    assert peak_of(lambda: layer(image), layer) == output + copies * (image.nbytes + output)


def test_memory_grows_with_sizes_and_batches(saved, plain, tmp_path):
    base = plain.estimate(gradient_checkpointing=False).parts
    larger = make_model(saved, tmp_path, height=64).estimate(gradient_checkpointing=False).parts
    batch = make_model(saved, tmp_path, per_device_train_batch_size=4, rollout_batch_size=4)
    batch = batch.estimate(gradient_checkpointing=False).parts
    for name in ("sampling step", "training step", "decoding"):
        assert base[name] < larger[name] < 4 * base[name]
        assert base[name] < batch[name] <= 2.1 * base[name]
    assert larger["latents of a rollout"] == 2 * base["latents of a rollout"]
    assert larger["frozen weights"] == base["frozen weights"]


def test_evaluation_is_counted_with_its_own_sizes_in_batches_of_no_more_pixels(saved, tmp_path):
    # one image of 4 times the pixels in place of 4
    evaluated = partial(make_model, saved, tmp_path, eval_strategy="steps")
    model = evaluated(rollout_batch_size=4, eval_height=64, eval_width=64)
    assert model.args.eval_sampling_batch_size == 1
    estimate, offloaded = model.estimate(), model.estimate(offload_vae=True)
    assert estimate.parts["decoding in evaluation"] == pytest.approx(estimate.parts["decoding"], rel=0.02)
    assert estimate.parts["sampling step in evaluation"] < 1.5 * estimate.parts["sampling step"]
    assert estimate.parts["trained weights kept aside"] == estimate.parts["average of the weights"] > 0
    vae = estimate.parts["VAE"]
    assert estimate.phases["evaluate: sample"] - offloaded.phases["evaluate: sample"] == vae
    assert estimate.phases["evaluate: decode"] == offloaded.phases["evaluate: decode"]
    small = evaluated(rollout_batch_size=1, per_device_eval_batch_size=1, ema_decay=0.0)
    parts = small.estimate().parts
    assert parts["decoding in evaluation"] == parts["decoding"]
    assert 0 < parts["sampling step in evaluation"] <= parts["sampling step"]  # the first may fill caches of positions
    assert parts["trained weights kept aside"] == 0
    large = evaluated(rollout_batch_size=1, eval_height=64, eval_width=64)  # at least one image
    assert large.estimate().phases["evaluate: decode"] > 2 * parts["decoding"]


def test_options_save_memory(saved, plain, tmp_path):
    steps = {kept: plain.estimate(gradient_checkpointing=kept) for kept in (True, False)}
    assert steps[True].parts["training step"] < steps[False].parts["training step"]
    kept, offloaded = plain.estimate(), plain.estimate(offload_vae=True)
    assert kept.phases["train"] - offloaded.phases["train"] == kept.parts["VAE"]
    assert kept.phases["decode"] == offloaded.phases["decode"]
    whole = kept.parts["decoding"]
    sliced = make_model(saved, tmp_path)
    sliced.policy.vae.enable_slicing()
    assert sliced.estimate().parts["decoding"] < whole
    assert kept.total == max(kept.phases.values())


def test_a_process_keeps_text_encoders_and_prompts_on_the_host(saved, plain, tmp_path):
    family, pipeline, _ = saved
    cache = PromptCache(family.make_policy(), "cpu")
    encoders = [module for name, module in pipeline.components.items() if name.startswith("text_encoder")]
    sizes = [tensor.nbytes for module in encoders for tensor in (*module.parameters(), *module.buffers())]
    num_images = plain.args.num_prompts_per_device * plain.args.num_generations
    expected = cache.max_bytes + sum(sizes) + num_images * embeds_bytes(family)
    assert plain.host_bytes() == pytest.approx(expected, rel=1e-6)
    assert plain.host_bytes(offload_vae=True) - plain.host_bytes() == plain.estimate().parts["VAE"]
    pairs = make_dpo_model(saved, tmp_path)  # no rollout
    assert pairs.host_bytes() == pytest.approx(cache.max_bytes + sum(sizes), rel=1e-6)


def test_quantized_text_encoders_are_less_to_encode_with(saved, plain):
    _, _, folder = saved
    lora, dtype = attention_lora_config(rank=2), torch.float32
    architecture = load_architecture(str(folder))
    model = MemoryModel(architecture, plain.args, lora, dtype=dtype, text_encoders_in_4bit=True)
    kept, quantized = plain.estimate(), model.estimate()
    less = kept.parts["text encoders"] - quantized.parts["text encoders"]
    assert kept.phases["encode"] - quantized.phases["encode"] == less > 0
    assert kept.phases["train"] == quantized.phases["train"]


def test_what_transformers_does_not_quantize_is_counted_whole():
    policy = build_policy(load_architecture("Qwen/Qwen-Image"), max_sequence_length=512)
    (encoder,) = policy.encoders
    encoder.requires_grad_(False)
    assert weight_bytes(encoder) / 1e9 == pytest.approx(2 * 8.29, rel=0.01)
    # the words and the output layer, of 1.09 billion weights together, stay
    assert weight_bytes(encoder, "nf4") / 1e9 == pytest.approx(7.2 * 4.13 / 8 + 2 * 1.09, rel=0.01)


def test_quantized_weights_take_the_stated_bits():
    linear = torch.nn.Sequential(torch.nn.Linear(256, 128, device="meta")).requires_grad_(False)
    others = 128 * 2  # the bias
    assert weight_bytes(linear) == 256 * 128 * 2 + others
    assert weight_bytes(linear, "int8") == 256 * 128 + 4 * 128 + others
    num_blocks = 256 * 128 // 64  # of bitsandbytes: 64 weights with a scale of a byte, 256 scales with one of 4 bytes
    assert weight_bytes(linear, "nf4") == 256 * 128 // 2 + num_blocks + 4 * num_blocks // 256 + others


@pytest.mark.parametrize(
    ("names", "num_models"),
    [
        (["rules", "my_rewards:redness", "http://127.0.0.1:8000", "https://host/reward"], 0),
        (["geneval:PekingU/rtdetr_v2_r50vd", "geneval-strict:flat,flat", "geneval:my.detector:Finder"], 0),
        (["SpatialScore-7B", "ORG/SpatialScore", "rules/adapter", "rules"], 3),
    ],
)
def test_only_models_on_the_device_are_rewards_that_take_memory(names, num_models):
    assert reward_model_bytes(names) == num_models * reward_model_bytes(["SpatialScore-7B"])


def test_a_size_that_evaluation_refuses_is_not_estimated(saved, tmp_path):
    with pytest.raises(ValueError, match="`eval_height` and `eval_width`: `height=33`"):
        make_model(saved, tmp_path, eval_height=33, eval_strategy="steps")
    assert make_model(saved, tmp_path, eval_height=33).estimate().total > 0


def test_a_card_that_is_too_small_does_not_fit():
    assert MemoryEstimate({}, {"train": int(GPU_GIB[24] * GIB)}).fits == [24, 40, 80]
    assert MemoryEstimate({}, {"encode": 1, "train": int(GPU_GIB[24] * GIB) + 1}).fits == [40, 80]
    assert MemoryEstimate({}, {"train": 200 * GIB}).fits == []


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    # of the released models, in billions; the positions of the third, 0.23 more, are no parameters
    [
        (OFFICIAL[0], (11.90, 0.084, 4.885)),
        (OFFICIAL[1], (20.43, 0.127, 8.29)),
        (OFFICIAL[2], (2.24, 0.084, 5.58)),
        (OFFICIAL[3], (6.15, 0.084, 4.02)),
    ],
)
def test_the_official_models_are_known_offline(name, num_parameters):
    policy = build_policy(load_architecture(name), max_sequence_length=512)
    parts = ([policy.transformer], [policy.vae], policy.encoders)
    counts = [sum(p.numel() for model in models for p in model.parameters()) / 1e9 for models in parts]
    assert counts == pytest.approx(num_parameters, rel=0.02)


def test_the_table_tells_what_fits(tmp_path):
    family = FAMILIES["flux"]
    family.build().save_pretrained(tmp_path / "flux")
    model = MemoryModel(load_architecture(str(tmp_path / "flux")), make_args(tmp_path), attention_lora_config())
    table = describe_options(model).splitlines()
    assert len([line for line in table if line.startswith(("bfloat16", "int8", "nf4"))]) == 12
    assert sum(line.endswith("24, 40, 80") for line in table) == 12  # it is tiny
    assert any(line.startswith("On the host each process keeps 8.0 GiB, eight on a node 64") for line in table)
    full = MemoryModel(load_architecture(str(tmp_path / "flux")), make_args(tmp_path, beta=0.0), None)
    assert "nf4" not in describe_options(full)  # what is trained cannot be quantized


def test_an_architecture_that_is_not_there_is_named(tmp_path):
    with pytest.raises((ValueError, OSError), match="nowhere"):
        load_architecture(str(tmp_path / "nowhere"))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline", "vae": ["diffusers", "X"]}))
    with pytest.raises(FileNotFoundError, match="vae"):
        load_architecture(str(tmp_path))
