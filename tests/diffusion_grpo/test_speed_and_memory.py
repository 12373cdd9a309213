"""Options that save memory or time: what they must not change, and what is refused."""

import logging
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import BitsAndBytesConfig

from tests.diffusion_grpo.families import FAMILIES, GUIDED, MAX_SEQUENCE_LENGTH
from trl_spatial import DiffusionGRPOConfig, DiffusionGRPOTrainer
from trl_spatial.diffusion_grpo import attention_lora_config
from trl_spatial.diffusion_grpo.policies import SamplingOptions, make_policy
from trl_spatial.diffusion_grpo.runtime import model_setup
from trl_spatial.diffusion_grpo.runtime.memory import weight_bytes
from trl_spatial.diffusion_grpo.runtime.model_setup import (
    is_quantized,
    large_text_encoders,
    load_pipeline,
    loading_device,
    prepare_transformer,
    quantization_config,
    transformer_quantization,
)
from trl_spatial.diffusion_grpo.runtime.prompt_cache import PromptCache
from trl_spatial.generation.seeds import image_generator
from trl_spatial.scripts.grpo import build_trainer, main, make_parser
from trl_spatial.scripts.online import OnlineModelArguments


def make_args(folder, **kwargs):
    return DiffusionGRPOConfig(str(folder), use_cpu=True, **kwargs)


def decode(policy, size=32, num_images=2):
    options = SamplingOptions(size, size, 4, 1.0)
    latents = policy.prepare_latents([image_generator(0, image) for image in range(num_images)], options)
    return [torch.from_numpy(np.asarray(image).astype("float32")) for image in policy.decode_latents(latents, options)]


def train(folder, family, pipeline=None, eval_dataset=None, **kwargs):
    """Logs and trained weights of two updates of a tiny model."""
    settings = dict(
        num_generations=4,
        top_k=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        height=16,
        width=16,
        num_inference_steps=3,
        max_sequence_length=MAX_SEQUENCE_LENGTH,
        ema_decay=0.0,
        max_steps=2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        gradient_checkpointing=False,
        **family.guidance,
    )
    trainer = DiffusionGRPOTrainer(
        pipeline or family.build(),
        brightness,
        make_args(folder, **(settings | kwargs)),
        train_dataset=[{"prompt": "a red cube"}, {"prompt": "the lamp"}],
        eval_dataset=eval_dataset,
        peft_config=attention_lora_config(rank=2),
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    weights = {
        name: weight.detach().clone() for name, weight in trainer.model.named_parameters() if weight.requires_grad
    }
    return logs, weights


def brightness(prompts, images, **columns):
    return [float(np.asarray(image.convert("L"), dtype="float64").sum()) / 1e5 for image in images]


# Where the VAE is, and how it decodes


@pytest.mark.parametrize("name", GUIDED)
def test_an_offloaded_vae_decodes_elsewhere_and_comes_back(name):
    policy = FAMILIES[name].make_policy()
    moves = []
    move = type(policy.vae).to

    class Recorded(type(policy.vae)):
        def to(self, *args, **kwargs):
            moves.append(str(args[0]))
            return move(self, *args, **kwargs)

    before = decode(policy)
    policy.vae.__class__ = Recorded
    policy.offload_vae(torch.device("meta"))  # without contents: an image cannot be made there, weights are lost
    assert moves.pop() == "cpu"
    with pytest.raises(NotImplementedError):
        decode(policy)
    assert moves[0] == "meta" and moves[-1] == "cpu"

    policy = FAMILIES[name].make_policy()
    policy.offload_vae(torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(before, decode(policy), strict=True))


@pytest.mark.parametrize("name", GUIDED)
def test_slicing_changes_nothing_and_tiling_little(name):
    policy = FAMILIES[name].make_policy()
    whole = decode(policy, size=64)
    options = OnlineModelArguments(vae_slicing=True)
    options.set_up_vae(policy.vae)
    assert policy.vae.use_slicing and not policy.vae.use_tiling
    for a, b in zip(whole, decode(policy, size=64), strict=True):
        assert (a - b).abs().max() <= 1  # grey levels: convolutions of one image may round differently
    OnlineModelArguments(vae_tiling=True).set_up_vae(policy.vae)
    assert policy.vae.use_tiling
    tiled = decode(policy, size=64)
    # Weights are random, so that norms over a tile are not those over an image: nearer to its image than to the other one
    for a, b, other in zip(whole, tiled, tiled[::-1], strict=True):
        assert (a - b).abs().mean() < (a - other).abs().mean()


@pytest.mark.parametrize("name", GUIDED)
def test_checkpointing_and_the_native_kernel_train_the_same_weights(tmp_path, name):
    _, plain = train(tmp_path / "plain", FAMILIES[name])
    pipeline = FAMILIES[name].build()
    pipeline.transformer.set_attention_backend("native")
    pipeline.vae.enable_slicing()
    logs, weights = train(tmp_path / "options", FAMILIES[name], pipeline, gradient_checkpointing=True)
    assert weights.keys() == plain.keys()
    for key, weight in weights.items():
        torch.testing.assert_close(weight, plain[key], rtol=1e-3, atol=1e-5)
    assert [(log["ratio/mean"], log["ratio/std"]) for log in logs] == [(1.0, 0.0)] * 2


# Compiled blocks


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_the_first_ratio_of_compiled_blocks_is_1(tmp_path, gradient_checkpointing):
    """The same graphs as with inductor, run by PyTorch's own kernels: not a bit may differ from the blocks as they are."""
    options = dict(gradient_checkpointing=gradient_checkpointing, steps_per_generation=4)
    plain_logs, plain = train(tmp_path / "plain", FAMILIES["flux"], **options)
    logs, weights = train(tmp_path / "compiled", FAMILIES["flux"], torch_compile_backend="aot_eager", **options)
    assert (logs[0]["ratio/mean"], logs[0]["ratio/std"]) == (1.0, 0.0)
    # the reference, with the adapters disabled, is another graph than the policy
    assert logs[1]["kl"] == pytest.approx(plain_logs[1]["kl"]) and logs[1]["kl"] > 0
    for key, weight in weights.items():
        torch.testing.assert_close(weight, plain[key])


def test_the_blocks_are_compiled_and_not_the_whole_model(tmp_path):
    for name in GUIDED:
        args = make_args(tmp_path, torch_compile=True, beta=0.0)
        transformer = prepare_transformer(FAMILIES[name].make_policy(), args, attention_lora_config(rank=2))
        compiled = {name for name, module in transformer.named_modules() if module._compiled_call_impl is not None}
        blocks = {
            f"{list_name}.{index}"
            for list_name, child in transformer.named_children()
            if isinstance(child, torch.nn.ModuleList)
            for index in range(len(child))
        }
        assert compiled == blocks and blocks


def test_a_graph_for_each_size_and_mode_of_training_and_none_for_evaluation(tmp_path):
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    rows = [{"prompt": prompt} for prompt in ("a red cube", "the lamp", "a cat to the left of a dog")]
    train(
        tmp_path,
        FAMILIES["flux"],
        torch_compile_backend="eager",  # graphs as they are traced
        gradient_checkpointing=True,
        rollout_batch_size=3,  # of 4 images: the last batch is smaller
        eval_dataset=rows,
        eval_strategy="steps",
        eval_steps=1,
        eval_height=32,
        eval_width=32,
        per_device_eval_batch_size=2,  # the last batch is smaller here, too
        eval_num_inference_steps=2,
    )
    # of both kinds of blocks: for the two sizes of the rollout, for the reference, and for the policy with its gradient
    assert counters["stats"]["unique_graphs"] == 2 * 4


@pytest.mark.parametrize("name", GUIDED)
def test_blocks_of_every_family_are_compiled_whole(tmp_path, name):
    torch._dynamo.reset()
    options, velocities = FAMILIES[name].options(), []
    for kwargs in ({}, {"torch_compile_backend": "eager"}):
        policy = FAMILIES[name].make_policy()
        prepare_transformer(policy, make_args(tmp_path, beta=0.0, **kwargs), None)
        embeds = PromptCache(policy, "cpu", negative_prompt=policy.negative_prompt(options)).get(["a cat"])
        latents = policy.prepare_latents([image_generator(0)], options)
        with torch.no_grad():  # what cannot be compiled is an error
            velocities.append(policy.predict_velocity(policy.transformer, latents, torch.tensor(0.5), embeds, options))
    assert torch.equal(*velocities)


def test_a_graph_beyond_the_limit_is_an_error(tmp_path, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(model_setup, "_MAX_GRAPHS", 1)
    with torch._dynamo.config.patch(recompile_limit=1), pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        train(tmp_path, FAMILIES["flux"], torch_compile_backend="eager")


def test_an_unknown_kernel_is_refused_with_those_there_are(tmp_path):
    with pytest.raises(ValueError, match=r"`attention_backend` is 'flesh'.*'native'.*'flash'|'flash'.*'native'"):
        load_pipeline(str(tmp_path / "nowhere"), torch.float32, device=torch.device("cpu"), attention_backend="flesh")


# Where a pipeline is loaded to


@pytest.mark.parametrize("name", GUIDED)
def test_transformer_and_vae_are_loaded_onto_the_device_and_then_the_text_encoders_onto_the_cpu(
    tmp_path, name, monkeypatch
):
    saved = FAMILIES[name].build()
    saved.save_pretrained(tmp_path)
    # the meta device stands for the accelerator: what comes there never was in the host's memory
    pipeline = load_pipeline(str(tmp_path), torch.float32, device=torch.device("meta"))
    components = {
        key: component for key, component in pipeline.components.items() if isinstance(component, torch.nn.Module)
    }
    devices = {key: component.device.type for key, component in components.items()}
    assert devices == {key: "cpu" if key.startswith("text_encoder") else "meta" for key in devices}
    assert {"transformer", "vae", "text_encoder"} <= devices.keys()

    order = []
    for class_ in {type(component) for component in components.values()}:
        load = class_.from_pretrained

        def recorded(*args, class_=class_, load=load, **kwargs):
            order.append(class_)
            return load(*args, **kwargs)

        monkeypatch.setattr(class_, "from_pretrained", recorded)
    pipeline = load_pipeline(str(tmp_path), torch.float32, device=torch.device("cpu"))
    assert set(order[:2]) == {type(saved.transformer), type(saved.vae)} and len(order) == len(components)
    for key in components:
        weights, expected = getattr(pipeline, key).state_dict(), getattr(saved, key).state_dict()
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weight, expected[part]) for part, weight in weights.items())
    assert pipeline.config["_name_or_path"] == str(tmp_path)  # what a card names as the base model


@pytest.mark.parametrize(("is_fsdp", "device"), [("true", "cpu"), ("false", "meta")])
def test_a_transformer_that_is_shared_out_is_loaded_onto_the_cpu(monkeypatch, is_fsdp, device):
    """It may be larger than a device."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", is_fsdp)
    assert loading_device(SimpleNamespace(device=torch.device("meta"))) == torch.device(device)


# Quantized weights


def test_the_transformer_is_quantized_as_it_says():
    nf4 = transformer_quantization("nf4", torch.bfloat16)
    assert isinstance(nf4, BitsAndBytesConfig) and nf4.load_in_4bit and not nf4.load_in_8bit
    assert (nf4.bnb_4bit_quant_type, nf4.bnb_4bit_use_double_quant) == ("nf4", True)
    assert nf4.bnb_4bit_compute_dtype == torch.bfloat16
    assert transformer_quantization("int8", torch.bfloat16).load_in_8bit
    with pytest.raises(ValueError, match="'nf4' or 'int8'"):
        quantization_config("fp4", torch.bfloat16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("option", ["--load_in_4bit", "--load_in_8bit"])
def test_without_a_gpu_quantization_is_refused_before_anything_is_loaded(tmp_path, option):
    (tmp_path / "prompts.txt").write_text("a red cube\n")
    line = f"--dataset {tmp_path}/prompts.txt --rewards rules --output_dir {tmp_path}/out --use_cpu {option}"
    line += " --model_name_or_path nowhere/at-all"
    with pytest.raises((RuntimeError, ImportError), match=rf"`{option}` needs (a GPU|bitsandbytes)"):
        build_trainer(*make_parser().parse_args_and_config(line.split()))


@pytest.mark.parametrize(
    ("family", "large", "small"),
    # T5, of which some layers stay as they are; with an output layer; a model with tied words
    [
        ("sd3", "text_encoder_3", "text_encoder_2"),
        ("qwen_image", "text_encoder", None),
        ("z_image", "text_encoder", None),
    ],
)
def test_large_text_encoders_are_quantized_as_predicted_and_read_prompts_much_the_same(tmp_path, family, large, small):
    pytest.importorskip("bitsandbytes")
    # 64 inputs: the blocks of NF4
    plain = FAMILIES[family].build(text_hidden_size=64)
    plain.save_pretrained(tmp_path)
    assert large_text_encoders(str(tmp_path)) == [large]
    config = quantization_config(None, torch.bfloat16, text_encoders=[large])
    pipeline = load_pipeline(str(tmp_path), torch.bfloat16, device=torch.device("cpu"), quantization_config=config)
    encoder = getattr(pipeline, large)
    assert is_quantized(encoder) and not is_quantized(pipeline.transformer) and not is_quantized(pipeline.vae)
    assert small is None or not is_quantized(getattr(pipeline, small))

    num_bytes = sum(tensor.nbytes for tensor in [*encoder.parameters(), *encoder.buffers()])
    scales = [weight.quant_state for weight in encoder.parameters() if hasattr(weight, "quant_state")]
    num_bytes += sum(state.absmax.nbytes + state.state2.absmax.nbytes for state in scales)
    predicted = weight_bytes(getattr(plain, large).requires_grad_(False), "nf4")
    assert predicted == pytest.approx(num_bytes, rel=0.02)

    embeds, expected = (
        PromptCache(make_policy(made, max_sequence_length=MAX_SEQUENCE_LENGTH), "cpu").get(["a cat"])["prompt_embeds"]
        for made in (pipeline, plain)
    )
    error = ((embeds.float() - expected).pow(2).mean() / expected.var()).sqrt()
    assert 1e-3 < error < 0.5


def test_text_encoders_that_are_not_worth_quantizing_are_an_error(tmp_path):
    (tmp_path / "model_index.json").write_text(
        '{"_class_name": "X", "text_encoder": ["transformers", "CLIPTextModel"], "text_encoder_2": [null, null]}'
    )
    with pytest.raises(ValueError, match=r"no text encoder but CLIP's.*Drop `--load_text_encoders_in_4bit`"):
        large_text_encoders(str(tmp_path))


def test_quantized_weights_need_lora():
    with pytest.raises(ValueError, match="`load_in_4bit` is True and `use_peft` is False"):
        OnlineModelArguments(load_in_4bit=True, use_peft=False)
    with pytest.raises(ValueError, match="both True"):
        OnlineModelArguments(load_in_4bit=True, load_in_8bit=True)
    assert [OnlineModelArguments().quantization, OnlineModelArguments(load_in_4bit=True).quantization] == [None, "nf4"]
    assert OnlineModelArguments(load_in_8bit=True).quantization == "int8"


def test_a_quantized_transformer_trains_adapters_in_float32_or_nothing(tmp_path):
    """bitsandbytes' own layer with weights that are not packed yet, as they are before they come to a GPU."""
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def quantized_policy():
        policy = FAMILIES["flux"].make_policy()
        attention = policy.transformer.transformer_blocks[0].attn
        layer = bitsandbytes.nn.Linear4bit(attention.to_q.in_features, attention.to_q.out_features, quant_type="nf4")
        attention.to_q = layer
        return policy

    policy = quantized_policy()
    assert is_quantized(policy.transformer) and not is_quantized(policy.vae)
    with pytest.raises(ValueError, match="quantized weights cannot be trained"):
        prepare_transformer(policy, make_args(tmp_path, beta=0.0), None)
    transformer = prepare_transformer(quantized_policy(), make_args(tmp_path), attention_lora_config(rank=2))
    trained = {name: weight for name, weight in transformer.named_parameters() if weight.requires_grad}
    assert {weight.dtype for weight in trained.values()} == {torch.float32}
    assert any("attn.to_q.lora_A" in name for name in trained) and is_quantized(transformer)


@pytest.mark.parametrize("estimate", ["true", "false"])
def test_a_device_of_the_rewards_that_is_unknown_is_named(tmp_path, estimate):
    FAMILIES["flux"].build().save_pretrained(tmp_path / "flux")
    (tmp_path / "prompts.txt").write_text("a cube\na cone\n")
    line = (
        f"--dataset {tmp_path}/prompts.txt --rewards rules --output_dir {tmp_path}/out --use_cpu --estimate {estimate} "
        f"--model_name_or_path {tmp_path}/flux --height 32 --width 32 --reward_device gpu"
    )
    with pytest.raises(ValueError, match=r"`--reward_device` is 'gpu'\. Use cpu"):
        main(*make_parser().parse_args_and_config(line.split()))


# The estimate


def test_the_estimate_is_printed_and_nothing_is_loaded(tmp_path, capsys, caplog):
    FAMILIES["flux"].build().save_pretrained(tmp_path / "flux")
    for weights in (tmp_path / "flux").rglob("*.safetensors"):
        weights.unlink()  # it reads none
    line = (
        f"--dataset nowhere.txt --rewards rules SpatialScore-7B my_rewards:sharpness --output_dir {tmp_path}/out --use_cpu "
        f"--estimate --model_name_or_path {tmp_path}/flux --height 32 --width 32"
    )
    with caplog.at_level(logging.WARNING):
        main(*make_parser().parse_args_and_config(line.split()))
    out = capsys.readouterr().out
    assert re.search(r"Reward models: 1\d\.\d\d GiB", out) and "nf4" in out and "fits (GB)" in out
    assert not (tmp_path / "out").exists()
