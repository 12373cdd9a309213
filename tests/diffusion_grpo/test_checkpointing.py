"""Weights come back through diffusers' own loaders, state bit for bit, and no half-written checkpoint is ever used."""

import copy
import json
import logging
import shutil

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from peft import LoraConfig
from safetensors.torch import load_file

from trl_spatial.diffusion_grpo.runtime.checkpointing import (
    check_exportable,
    export_weights,
    load_buffer,
    load_trained_state,
    save_buffer,
    save_trained_state,
)
from trl_spatial.diffusion_grpo.runtime.ema import EMA
from trl_spatial.store import begin_folder, is_complete, mark_complete
from trl_spatial.training.run_folder import check_complete, last_complete_checkpoint


# alpha is not the rank: an export that loses it changes the images
LORA = dict(r=4, lora_alpha=12, init_lora_weights="gaussian", target_modules=["to_q", "to_k", "to_v", "to_out.0"])


def draw(pipeline):
    """Latents of an image: what the transformer's weights change."""
    output = pipeline(
        "a red cube",
        height=32,
        width=32,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        max_sequence_length=16,
        output_type="latent",
    )
    return output.images


def change(transformer, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in transformer.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


@pytest.fixture(params=[{}, {"use_rslora": True, "rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_k": 5}}])
def trained_pipeline(make_flux_pipeline, request):
    """A pipeline whose transformer has an adapter that changes its images."""
    pipeline = make_flux_pipeline()
    pipeline.transformer.requires_grad_(False)
    pipeline.transformer.add_adapter(LoraConfig(**LORA, **request.param))
    change(pipeline.transformer)
    return pipeline


class TestExport:
    @pytest.mark.parametrize("with_average", [False, True])
    def test_diffusers_loads_the_adapter_and_draws_the_same(
        self, trained_pipeline, make_flux_pipeline, tmp_path, with_average
    ):
        transformer, ema, expected = trained_pipeline.transformer, None, draw(trained_pipeline)
        if with_average:
            ema = EMA(transformer, 0.9)
            change(transformer, seed=1)  # the average is what the first change made
        export_weights(trained_pipeline, transformer, tmp_path, ema=ema)
        fresh = make_flux_pipeline()
        assert not torch.allclose(draw(fresh), expected, atol=1e-2)
        fresh.load_lora_weights(tmp_path)
        # the scale is in the file's matrices, and loaded weights lie elsewhere: other roundings
        torch.testing.assert_close(draw(fresh), expected, rtol=0, atol=1e-4)
        assert torch.allclose(draw(trained_pipeline), expected, rtol=0, atol=1e-4) is not with_average

    def test_holds_nothing_but_the_adapter(self, trained_pipeline, tmp_path):
        export_weights(trained_pipeline, trained_pipeline.transformer, tmp_path)
        (path,) = tmp_path.iterdir()
        assert path.name == "pytorch_lora_weights.safetensors"
        sizes = {
            parameter.numel() for parameter in trained_pipeline.transformer.parameters() if parameter.requires_grad
        }
        tensors = load_file(path)
        assert all(".lora_" in name and tensor.numel() in sizes for name, tensor in tensors.items())

    def test_a_fully_trained_transformer(self, make_flux_pipeline, tmp_path):
        pipeline = make_flux_pipeline()
        ema = EMA(pipeline.transformer, 0.9)
        expected = draw(pipeline)
        change(pipeline.transformer)
        export_weights(pipeline, pipeline.transformer, tmp_path, ema=ema)
        fresh = make_flux_pipeline(seed=1)
        components = {
            **fresh.components,
            **{name: pipeline.components[name] for name in ("text_encoder", "text_encoder_2")},
        }
        components["transformer"] = FluxTransformer2DModel.from_pretrained(tmp_path, subfolder="transformer")
        loaded = FluxPipeline(**components)
        loaded.set_progress_bar_config(disable=True)
        torch.testing.assert_close(draw(loaded), expected, rtol=0, atol=1e-4)

    @pytest.mark.parametrize(
        "field",
        [{"use_dora": True}, {"bias": "lora_only"}, {"modules_to_save": ["proj_out"]}, {"init_lora_weights": "pissa"}],
        ids=str,
    )
    def test_what_diffusers_would_drop_is_an_error(self, field):
        check_exportable(LoraConfig(**LORA))
        with pytest.raises(ValueError, match=f"`peft_config.{next(iter(field))}` is .*load_lora_weights.*Set it to"):
            check_exportable(LoraConfig(**{**LORA, **field}))


class TestState:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_comes_back_bit_for_bit(self, trained_pipeline, tmp_path, dtype):
        transformer = trained_pipeline.transformer.to(dtype)
        ema = EMA(transformer, 0.9, every=2)
        fresh = copy.deepcopy(transformer)
        for seed in range(3):
            change(transformer, seed)
            ema.step()
        save_trained_state(transformer, tmp_path, ema=ema)
        fresh_ema = EMA(fresh, 0.9, every=2)
        load_trained_state(fresh, tmp_path, ema=fresh_ema)
        for (name, parameter), other in zip(transformer.named_parameters(), fresh.parameters(), strict=True):
            assert torch.equal(parameter, other), name
        assert fresh_ema.num_updates == 3
        assert all(torch.equal(fresh_ema.weights[name], weight) for name, weight in ema.weights.items())

    def test_holds_what_is_trained_and_no_more(self, trained_pipeline, tmp_path):
        save_trained_state(trained_pipeline.transformer, tmp_path)
        trainable = {name for name, param in trained_pipeline.transformer.named_parameters() if param.requires_grad}
        assert set(load_file(tmp_path / "trained_weights.safetensors")) == trainable
        assert [path.name for path in tmp_path.iterdir()] == ["trained_weights.safetensors"]

    def test_another_setup_is_an_error(self, trained_pipeline, make_flux_pipeline, tmp_path):
        save_trained_state(trained_pipeline.transformer, tmp_path)
        with pytest.raises(ValueError, match=r"another model.*lora_A.*`peft_config`"):
            load_trained_state(make_flux_pipeline().transformer, tmp_path)
        with pytest.raises(ValueError, match=r"float32.*bfloat16.*dtype of that run"):
            load_trained_state(trained_pipeline.transformer.to(torch.bfloat16), tmp_path)
        with pytest.raises(ValueError, match=r"ema\.safetensors is missing"):
            load_trained_state(
                trained_pipeline.transformer.float(), tmp_path, ema=EMA(trained_pipeline.transformer, 0.9)
            )


class TestBuffer:
    def test_comes_back_exactly(self, tmp_path):
        rollout = torch.randn(6, 5, 4)
        buffer = {
            "latents": rollout[:, :-1],  # they share memory, as those of a rollout do
            "next_latents": rollout[:, 1:],
            "scalar": torch.tensor(0.1, dtype=torch.float64),
            "half": torch.randn(3).bfloat16(),
            "indices": torch.tensor([2**40, -1]),
            "mask": torch.tensor([True, False]),
            "nothing": torch.empty(0, 3),
        }
        extra = {"prompts": ["a red cube", "ünïcode"], "reward": 0.1 + 0.2, "steps": [0, 3], "none": None}
        save_buffer(buffer, extra, tmp_path / "new", rank=1)
        loaded, loaded_extra = load_buffer(tmp_path / "new", rank=1)
        assert loaded_extra == extra
        assert set(loaded) == set(buffer)
        for name, tensor in buffer.items():
            assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)

    def test_another_number_of_processes_is_an_error(self, tmp_path):
        save_buffer({"latents": torch.zeros(1)}, {}, tmp_path, rank=0)
        with pytest.raises(ValueError, match=r"buffer_1\.safetensors is missing.*number of processes"):
            load_buffer(tmp_path, rank=1)


FILES = {"optimizer.pt": b"moments", "trained_weights.safetensors": b"weights", "transformer/config.json": b"{}"}


def write_files(folder, files=FILES):
    begin_folder(folder)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)


# States in which a process that is killed while saving leaves a folder.
def _as_nothing(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def _without_marker(folder):
    (folder / "checkpoint.json").unlink()


def _with_unfinished_marker(folder):
    marker = folder / "checkpoint.json"
    marker.with_name("checkpoint.json.part").write_text(marker.read_text()[:10])
    marker.unlink()


def _without_a_file(folder):
    (folder / "transformer" / "config.json").unlink()


def _with_a_truncated_file(folder):
    (folder / "optimizer.pt").write_bytes(FILES["optimizer.pt"][:3])


def _with_an_empty_file(folder):
    (folder / "trained_weights.safetensors").write_bytes(b"")


def _written_over(folder):
    # the same step again, after resuming from an earlier one: sizes do not change
    write_files(folder, dict(list(FILES.items())[:1]))
    for name, content in list(FILES.items())[1:]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


DAMAGES = [
    _as_nothing,
    _without_marker,
    _with_unfinished_marker,
    _without_a_file,
    _with_a_truncated_file,
    _with_an_empty_file,
    _written_over,
]


class TestCompleteness:
    def make(self, output_dir, *steps):
        for step in steps:
            write_files(output_dir / f"checkpoint-{step}")
            mark_complete(output_dir / f"checkpoint-{step}")

    def test_a_whole_checkpoint_is_complete(self, tmp_path):
        self.make(tmp_path, 5)
        assert is_complete(tmp_path / "checkpoint-5")
        check_complete(tmp_path / "checkpoint-5")
        listed = json.loads((tmp_path / "checkpoint-5" / "checkpoint.json").read_text())["files"]
        assert listed == {name: len(content) for name, content in FILES.items()}

    @pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
    def test_a_half_written_one_is_never_picked_up(self, tmp_path, damage, caplog):
        self.make(tmp_path, 9, 10, 100)
        damage(tmp_path / "checkpoint-100")
        assert not is_complete(tmp_path / "checkpoint-100")
        with caplog.at_level(logging.WARNING, logger="trl_spatial"):
            assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
        assert "checkpoint-100 is incomplete" in caplog.text
        with pytest.raises(ValueError, match=r"checkpoint-100', which is incomplete.*resume_from_checkpoint=True"):
            check_complete(tmp_path / "checkpoint-100")

    def test_steps_are_numbers_not_text(self, tmp_path):
        self.make(tmp_path, 9, 10)
        (tmp_path / "checkpoint-best").mkdir()
        (tmp_path / "checkpoint-11").write_text("a file")
        assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")

    def test_none_where_there_is_none(self, tmp_path):
        assert last_complete_checkpoint(tmp_path) is None
        assert last_complete_checkpoint(tmp_path / "missing") is None
        with pytest.raises(ValueError, match="not a folder"):
            check_complete(tmp_path / "checkpoint-1")

    def test_files_of_an_earlier_run_do_not_stay(self, tmp_path):
        self.make(tmp_path, 5)
        begin_folder(tmp_path / "checkpoint-5")
        assert list((tmp_path / "checkpoint-5").iterdir()) == []

    def test_files_that_come_later_do_no_harm(self, tmp_path):
        self.make(tmp_path, 5)
        (tmp_path / "checkpoint-5" / "notes.txt").write_text("mine")
        assert is_complete(tmp_path / "checkpoint-5")
