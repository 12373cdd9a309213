"""A run's folder, its checkpoints and its end, of both trainers: nothing is mixed, lost or saved broken in silence."""

import json
import os
import re
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from PIL import Image
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import TrainerCallback

from trl_spatial import DiffusionGRPOConfig, DiffusionGRPOTrainer, GaussianRewardConfig, GaussianRewardTrainer
from trl_spatial.diffusion_grpo.policies.lora import attention_lora_config
from trl_spatial.gaussian_reward.modeling import spatial_score_lora_config
from trl_spatial.store import is_complete, lock_folder
from trl_spatial.training.run_folder import move_weights, read_run


COMMON = dict(
    per_device_train_batch_size=2, gradient_accumulation_steps=1, learning_rate=1e-3, warmup_steps=0, save_steps=2,
    lr_scheduler_type="linear", max_steps=4, use_cpu=True, report_to="none", disable_tqdm=True, dataloader_num_workers=0,
    logging_steps=1,
)  # fmt: skip
GRPO = dict(
    num_generations=4, top_k=1, num_inference_steps=3, height=16, width=16, max_sequence_length=16,
    gradient_checkpointing=False,
)  # fmt: skip


def redness(prompts, images, **columns):
    return [float(np.asarray(image)[..., 0].mean()) for image in images]


def pairs(num_rows=12):
    generator = np.random.default_rng(0)
    pictures = [Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(2 * num_rows)]
    prompts = [f"a cube {row}" for row in range(num_rows)]
    return Dataset.from_dict({"prompt": prompts, "chosen": pictures[::2], "rejected": pictures[1::2]})


@pytest.fixture(params=["grpo", "reward"])
def make(request, tmp_path, flux_folder, backbone_folder):
    """A function that builds a trainer in the folder `run`; `is_full` trains all weights."""

    def build(folder="run", *, is_full=False, alpha=4, peft=None, callbacks=None, **changes):
        adapters = (attention_lora_config if request.param == "grpo" else spatial_score_lora_config)(2, alpha)
        vars(adapters).update(peft or {})
        if request.param == "grpo":
            args = DiffusionGRPOConfig(str(tmp_path / folder), **(COMMON | GRPO | changes), beta=0.0)
            return DiffusionGRPOTrainer(
                str(flux_folder), redness, args, callbacks=callbacks, train_dataset=[{"prompt": "a"}, {"prompt": "b"}],
                peft_config=None if is_full else adapters,
            )  # fmt: skip
        args = GaussianRewardConfig(
            str(tmp_path / folder), model_init_kwargs={"head_hidden_sizes": (8, 4)}, **(COMMON | changes)
        )
        return GaussianRewardTrainer(
            str(backbone_folder), args, callbacks=callbacks, train_dataset=pairs(),
            peft_config=None if is_full else adapters,
        )  # fmt: skip

    return build


class At(TrainerCallback):
    """Does something at the start of an update."""

    def __init__(self, step, function):
        self.step, self.function = step, function

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.function(model)


def weights(folder):
    (file,) = [path for path in folder.glob("*.safetensors") if "adapter" in path.name or "lora" in path.name]
    return load_file(file)


def test_cudnns_attention_is_ruled_out_for_training(make):
    """Its gradients can be NaN; what other code of the process asks for by name stays its choice."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    make()
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_resumed_run_is_the_undisturbed_one(make, tmp_path, number, capsys):
    whole = make("whole", save_strategy="no")
    whole.train()
    whole.save_model()

    before = signal.getsignal(number)
    trainer = make(callbacks=[At(2, lambda model: os.kill(os.getpid(), number))], save_only_model=True, save_steps=100)
    with pytest.raises(SystemExit) as stopped:
        trainer.train(resume_from_checkpoint=True)  # nothing there yet: from the beginning
    assert stopped.value.code == 128 + number and signal.getsignal(number) == before
    assert capsys.readouterr().err.count("--resume_from_checkpoint true to continue") == 1
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]
    assert is_complete(tmp_path / "run" / "checkpoint-3")
    for expected in (4, 4):  # and once more, when it is over
        again = make()
        again.train(resume_from_checkpoint="true")
        again.save_model()
        assert again.state.global_step == expected
    assert is_complete(tmp_path / "run")
    ours, theirs = weights(tmp_path / "run"), weights(tmp_path / "whole")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_used_folder_is_refused_and_a_run_stays_itself(make, tmp_path):
    make(max_steps=2).train()
    run = tmp_path / "run"
    first = read_run(run)
    assert first["kind"] == "adapter" and read_run(run / "checkpoint-2")["id"] == first["id"]
    with pytest.raises(ValueError, match=r"already holds a training.*Name another folder, resume.*or remove"):
        make(max_steps=2).train()
    with pytest.raises(ValueError, match=r"`seed` was 42.*is 7 now"):
        make(seed=7).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"kind 'adapter', not 'full'"):
        make(is_full=True).train(resume_from_checkpoint=True)

    # another rate and schedule are used from the next update on, and the card says when
    trainer = make(learning_rate=5e-3)
    trainer.train(resume_from_checkpoint=True)
    rates = {log["step"]: log["learning_rate"] for log in trainer.state.log_history if "loss" in log}
    assert rates[3] == pytest.approx(5e-3 * 2 / 4) or rates[3] == pytest.approx(5e-3 * 1 / 4)
    trainer.save_model()
    assert "| learning_rate until update 2 | 0.001 |" in (run / "README.md").read_text()
    assert read_run(run)["id"] == first["id"]
    with pytest.raises(ValueError, match=r"holds later checkpoints.*checkpoint-4"):
        make().train(resume_from_checkpoint=str(run / "checkpoint-2"))


def test_a_checkpoint_of_another_method_is_refused(make, tmp_path):
    """Its optimizer has seen other gradients, and its data is counted otherwise."""
    make(max_steps=2).train()
    folder = str(tmp_path / "run")
    trainer = make(max_steps=2)
    other = type("OtherTrainer", (type(trainer),), {})
    trainer.__class__ = other
    with pytest.raises(
        ValueError, match=r"checkpoint-2 was saved by a `\w+`, and this is a `OtherTrainer`.*another `output_dir`"
    ):
        trainer.train(resume_from_checkpoint=True)
    assert read_run(folder)["trainer"] != "OtherTrainer"


def test_what_cannot_be_resumed_from_is_named(make, tmp_path, caplog):
    make(max_steps=4, save_only_model=True).train()
    with pytest.raises(ValueError, match=r"checkpoint-4 has no optimizer.*`save_only_model`"):
        make().train(resume_from_checkpoint=True)
    (tmp_path / "run" / "checkpoint-4" / "trainer_state.json").write_text("{")
    with pytest.raises(ValueError, match=r"checkpoint-2 has no optimizer"):
        make().train(resume_from_checkpoint=True)
    assert "checkpoint-4 is incomplete" in caplog.text


def test_adapters_keep_their_scale_when_a_run_is_resumed(make, tmp_path):
    make(max_steps=2).train()
    with pytest.raises(
        ValueError, match=r"`peft_config` was .*'lora_alpha': 4.* and is .*'lora_alpha': 8.* It cannot be"
    ):
        make(alpha=8, max_steps=4).train(resume_from_checkpoint=True)
    assert make(max_steps=4).train(resume_from_checkpoint=True).global_step == 4


def test_adapters_stay_in_their_places_when_a_run_is_resumed(make, tmp_path):
    trainer = make(max_steps=2)
    is_reward = isinstance(trainer, GaussianRewardTrainer)
    trainer.train()
    fewer = r".*language_model.*(q|k)_proj" if is_reward else {"to_q"}
    with pytest.raises(ValueError, match=r"`peft_config` was .*'target_modules': .* and is .* now. It cannot be"):
        make(peft={"target_modules": fewer}, max_steps=4).train(resume_from_checkpoint=True)
    if is_reward:  # with the others, dropout is an error
        make(peft={"lora_dropout": 0.5}, max_steps=4).train(resume_from_checkpoint=True)
        (change,) = [change for change in read_run(tmp_path / "run")["changes"] if change["name"] == "lora_dropout"]
        assert change == {"name": "lora_dropout", "value": 0.05, "until": 2}


@pytest.mark.parametrize("name", ["chat_template", "log_std_max"])
def test_a_reward_model_keeps_its_instruction_and_the_bounds_of_its_head(make, name):
    trainer = make(max_steps=4)
    if not isinstance(trainer, GaussianRewardTrainer):
        pytest.skip("Pipelines have neither a chat template nor a head.")
    make(max_steps=2).train()
    if name == "chat_template":
        trainer.processing_class.chat_template += " "
    else:
        trainer.model.get_base_model().config.log_std_max = 1.0
    with pytest.raises(ValueError, match=rf"`{name}` was .* in the run so far and is .* now. It cannot be changed"):
        trainer.train(resume_from_checkpoint=True)


def test_what_else_a_model_computes_with_is_announced_when_it_changes(make, tmp_path, caplog, monkeypatch):
    # diffusers also sets the kernel of every model in the process, and never back
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", _AttentionBackendRegistry._active_backend)
    make(max_steps=2).train()
    trainer = make(max_steps=4)
    if isinstance(trainer, GaussianRewardTrainer):
        trainer.model.config._name_or_path = "other/model"
        trainer.processing_class.image_processor.size["longest_edge"] = 56 * 56
        expected = [("max_pixels", 56 * 56), ("model_name_or_path", "'model'")]
    else:
        trainer.policy.pipeline.register_to_config(_name_or_path="other/model")
        trainer.policy.vae.to(torch.bfloat16)
        trainer.policy.transformer.set_attention_backend("_native_math")
        expected = [
            ("model_name_or_path", "'model'"), ("dtype", "'vae': 'bfloat16'"), ("attention_backend", "'_native_math'"),
        ]  # fmt: skip
    trainer.train(resume_from_checkpoint=True)
    for name, value in expected:
        assert re.search(rf"`{name}` is .*{value}.* from update 2 on", caplog.text)
    assert [change["name"] for change in read_run(tmp_path / "run")["changes"]][-len(expected) :] == [
        n for n, _ in expected
    ]


@pytest.fixture
def small_files(capsys):
    """A function that lets no file grow beyond a size, as a full disk does. Output is not captured in a file."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_told_with_what_is_left_and_the_run_goes_on_when_there_is_room(make, tmp_path, small_files):
    whole = make("whole", save_strategy="no")
    whole.train()
    whole.save_model()
    left = rf"failed: .*\. The last complete checkpoint is {tmp_path}/run/checkpoint-2\. Make room"
    with pytest.raises(OSError, match=rf"Saving to {tmp_path}/run/checkpoint-4 {left}"):
        make(callbacks=[At(3, lambda model: small_files(2000))]).train()
    small_files(-1)
    resumed = make(max_steps=4)
    assert resumed.train(resume_from_checkpoint=True).global_step == 4
    small_files(2000)
    with pytest.raises(OSError, match=rf"Saving to {tmp_path}/run failed: .*checkpoint-4\. Make room"):
        resumed.save_model()
    small_files(-1)
    resumed.save_model()
    ours, theirs = weights(tmp_path / "run"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("where", ["loss", "last"])
def test_numbers_that_are_not_finite_end_the_run_and_are_not_saved(make, tmp_path, where):
    def spoil(model):
        with torch.no_grad():
            next(parameter for parameter in model.parameters() if parameter.requires_grad).fill_(torch.nan)

    class AfterUpdate(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 4:
                spoil(model)

    callback = At(3, spoil) if where == "loss" else AfterUpdate()
    with pytest.raises(ValueError, match=r"(nan|not finite) at update \d.*last good checkpoint is .*checkpoint-2"):
        make(callbacks=[callback]).train()
    assert not is_complete(tmp_path / "run" / "checkpoint-4")


def test_no_update_is_made_beyond_max_steps(make):
    trainer = make(max_steps=0)
    trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("length", [{"max_steps": 2}, {"max_steps": -1, "num_train_epochs": 1}], ids=str)
def test_an_epoch_without_a_batch_is_an_error(tmp_path, backbone_folder, length):
    """Instead of weights that are as they were, called trained."""
    options = COMMON | dict(per_device_train_batch_size=8, dataloader_drop_last=True) | length
    trainer = GaussianRewardTrainer(
        str(backbone_folder), GaussianRewardConfig(str(tmp_path / "run"), **options), train_dataset=pairs(7),
        peft_config=spatial_score_lora_config(2, 4),
    )  # fmt: skip
    with pytest.raises(
        ValueError, match=r"gives 7 examples, fewer than the 8 of a batch .*`dataloader_drop_last`.*nothing would"
    ):
        trainer.train()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per_device_train_batch_size": 0}, "`per_device_train_batch_size` is 0. Use at least 1."),
        ({"per_device_eval_batch_size": 0}, "`per_device_eval_batch_size` is 0. Use at least 1."),
        ({"gradient_accumulation_steps": 0}, "`gradient_accumulation_steps` is 0. Use at least 1."),
        ({"max_steps": -1, "num_train_epochs": -1}, "`num_train_epochs` is -1: nothing would be trained."),
    ],
)
@pytest.mark.parametrize("config_class", [GaussianRewardConfig, DiffusionGRPOConfig])
def test_sizes_that_train_nothing_are_refused_by_the_configuration(tmp_path, config_class, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config_class(str(tmp_path / "run"), **(COMMON | changes))


def test_an_output_dir_that_cannot_be_used_is_refused_by_the_configuration(make, tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in ("file", "file/below"):
        with pytest.raises(ValueError, match=r"`output_dir` is .*file.* is not a folder"):
            make(folder)
    with pytest.raises(ValueError, match="`save_on_each_node` is True"):
        make(save_on_each_node=True)


def test_a_second_process_is_kept_out_until_the_first_ends(tmp_path):
    program = "import sys; from trl_spatial.store import lock_folder\nwith lock_folder(sys.argv[1]): "
    with subprocess.Popen(
        [sys.executable, "-c", f"{program}print('locked', flush=True); sys.stdin.read()", tmp_path],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout.readline() == "locked\n"
        with (
            pytest.raises(ValueError, match=f"Another process \\({process.pid} on .* is running in"),
            lock_folder(tmp_path),
        ):
            pass
        process.kill()
        process.wait()
        with lock_folder(tmp_path), lock_folder(tmp_path):
            pass


def test_weights_of_the_other_form_do_not_stay(tmp_path):
    folder, new = tmp_path / "out", tmp_path / "out" / ".partial"
    new.mkdir(parents=True)
    for name in ("adapter_model.safetensors", "adapter_config.json", "notes.txt"):
        (folder / name).write_text("old")
    (folder / "checkpoint.json").write_text(json.dumps({"files": {"tokenizer.json": 3}}))
    (folder / "tokenizer.json").write_text("old")
    (new / "model.safetensors").write_text("new")
    assert move_weights(new, folder) == ["model.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == ["model.safetensors", "notes.txt"]


def test_rows_are_counted_and_not_batches(tmp_path, backbone_folder):
    """12 rows; 4 of them are seen before the batches change: the others follow, each once, or it is an error."""

    def run(seen, **changes):
        options = COMMON | dict(max_steps=-1, num_train_epochs=1, save_strategy="steps", save_steps=2) | changes
        trainer = GaussianRewardTrainer(
            str(backbone_folder), GaussianRewardConfig(str(tmp_path / "run"), **options), train_dataset=pairs(),
            peft_config=spatial_score_lora_config(2, 4),
        )  # fmt: skip
        collate = trainer.data_collator
        trainer.data_collator = lambda rows: (seen.extend(row["__row__"] for row in rows), collate(rows))[1]
        return trainer

    first, rest = [], []
    run(first, max_steps=2).train()
    with pytest.raises(ValueError, match=r"after 4 examples.*`per_device_train_batch_size` 3.*was 2"):
        run([], per_device_train_batch_size=3).train(resume_from_checkpoint=True)
    run(rest, per_device_train_batch_size=1, gradient_accumulation_steps=4).train(resume_from_checkpoint=True)
    assert sorted(first[:4] + rest) == list(range(12))
