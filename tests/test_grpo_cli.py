"""`trl_spatial grpo`: its prompts, its mistakes, and what it trains at tiny size."""

import importlib
import json
import shlex
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from diffusers import FluxPipeline
from PIL import Image
from safetensors.torch import load_file

from trl_spatial.cli import main
from trl_spatial.scenes import make_preference_dataset, parse_description
from trl_spatial.scripts.datasets import load_prompts
from trl_spatial.scripts.grpo import build_trainer, make_parser


REWARDS = """
import numpy as np

def redness(prompts, images, **columns):
    return [float((np.asarray(image) / 255 @ [1, -0.5, -0.5]).mean()) for image in images]

def darkness(prompts, images, **columns):
    return [1 - float(np.asarray(image).mean()) / 255 for image in images]
"""
TINY = (
    "--num_generations 4 --top_k 1 --per_device_train_batch_size 2 --gradient_accumulation_steps 1 --lora_r 2 "
    "--num_inference_steps 3 --eval_num_inference_steps 2 --height 32 --width 32 --max_sequence_length 192 "
    "--max_steps 1 --use_cpu --disable_tqdm true --report_to none"
)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with rewards and prompts."""
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "tiny_rewards.py").write_text(REWARDS)
    (folder / "prompts.txt").write_text("a red circle\n\n  a blue square  \nthe cat\n", encoding="utf-8")
    return folder


@pytest.fixture
def here(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield workplace
    sys.modules.pop("tiny_rewards", None)


@pytest.fixture
def train(here, flux_folder):
    """Runs the script in this process, at tiny size; returns the trainer's folder."""
    script = importlib.import_module("trl_spatial.scripts.grpo")

    def run(arguments):
        line = f"--model_name_or_path {flux_folder} {TINY} {arguments}"
        parsed = script.make_parser().parse_args_and_config(shlex.split(line))
        script.main(*parsed)
        return here / parsed[2].output_dir

    return run


@pytest.fixture
def build(here, flux_folder):
    """Builds the trainer that arguments describe, at tiny size."""

    def run(arguments):
        line = f"--model_name_or_path {flux_folder} {TINY} --output_dir built {arguments}"
        return build_trainer(*make_parser().parse_args_and_config(shlex.split(line)))

    return run


# ---------------------------------------------------------------------------------------------------- prompts


def test_prompts_of_a_text_file(here):
    prompts = load_prompts("prompts.txt", "train")
    assert prompts["prompt"][:] == ["a red circle", "a blue square", "the cat"]
    with pytest.raises(
        ValueError, match=r"prompts.txt has no split 'test'; it has 'train'. Name one with --dataset_train_split"
    ):
        load_prompts("prompts.txt", "test")
    assert len(load_prompts("prompts.txt", "test", use_only_split=True)) == 3


def test_prompts_are_read_as_they_were_written(tmp_path, monkeypatch):
    """A text of every kind of blank and of words that look like missing values, in files as Windows writes them."""
    monkeypatch.chdir(tmp_path)
    prompts = ["a sign: hello\u2028world\x85end\x0bx\x0cy", "NA", "null", "nan", "None", "a red circle"]
    for end in ("\n", "\r\n", "\r"):
        Path("a.txt").write_bytes(
            end.join(["", prompts[0], *(f" {prompt} " for prompt in prompts[1:])]).encode("utf-8-sig")
        )
        assert load_prompts("a.txt", "train")["prompt"][:] == prompts
    rows = [{"prompt": f"{prompt} "} for prompt in prompts]
    Path("a.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8-sig")
    Path("a.json").write_text(json.dumps(rows), encoding="utf-8-sig")
    Path("a.csv").write_text("prompt,n\n" + "".join(f'"{prompt} ",1\n' for prompt in prompts), encoding="utf-8-sig")
    for name in ("a.jsonl", "a.json", "a.csv"):
        assert load_prompts(name, "train")["prompt"][:] == prompts, name
    Path("b.txt").write_bytes(b"a\nb\n\xff\xfe\n")
    with pytest.raises(ValueError, match=r"b\.txt, line 3 is not UTF-8"):
        load_prompts("b.txt", "train")
    Path("b.jsonl").write_text('{"prompt": "a"}\n{"prompt": null}\n')
    with pytest.raises(ValueError, match=r"b\.jsonl, row 1, column `prompt`: None is missing"):
        load_prompts("b.jsonl", "train")


def test_prompts_of_scenes_come_with_their_scene_and_differ_between_splits():
    train, test = load_prompts("scenes:12", "train"), load_prompts("scenes:12", "test")
    for prompts, split in ((train, "train"), (test, "test")):
        assert len(prompts) == 12
        assert {parse_description(text).split for text in prompts["scene"]} == {split}
    assert not set(train["prompt"]) & set(test["prompt"])


def test_prompts_of_a_dataset_keep_its_columns_but_for_images(tmp_path):
    make_preference_dataset(4, image_size=32).save_to_disk(tmp_path / "pairs")
    prompts = load_prompts(str(tmp_path / "pairs"), "train")
    assert prompts.column_names == [
        "prompt", "perturbed_prompt", "level", "operations", "relations", "scene", "generator", "seed",
    ]  # fmt: skip
    lines = [json.dumps({"prompt": f"prompt {i}", "style": i}) for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    assert load_prompts(str(tmp_path / "rows.jsonl"), "train")["style"][:] == [0, 1, 2]


def test_bad_prompts_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n \n")
    Dataset.from_dict({"caption": ["a cat"]}).to_json("captions.jsonl")
    for source, error, message in (
        ("scenes:", ValueError, "Say how many scenes: scenes:1000"),
        ("scenes:many", ValueError, "Say how many scenes"),
        ("scenes:0", ValueError, "num_prompts=0"),
        ("empty.txt", ValueError, "empty.txt has 0 rows"),
        ("captions.jsonl", ValueError, "the columns caption. It needs prompts: a column `prompt`"),
        ("nowhere.txt", FileNotFoundError, "no file nowhere.txt"),
        ("nowhere", FileNotFoundError, "no file or folder nowhere"),
    ):
        with pytest.raises(error, match=message):
            load_prompts(source, "train")


# ---------------------------------------------------------------------------------------------------- arguments


def test_the_paper_is_the_default():
    script_args, model_args, args = make_parser().parse_args_and_config(
        ["--dataset", "x", "--rewards", "a:b", "c", "--use_cpu", "--output_dir", "out"]
    )
    assert script_args.rewards == ["a:b", "c"]
    assert (model_args.model_name_or_path, model_args.lora_r) == ("black-forest-labs/FLUX.1-dev", 32)
    assert (args.num_generations, args.top_k, args.num_inference_steps) == (24, 6, 6)
    assert (args.learning_rate, args.epsilon, args.beta) == (3e-4, 1e-4, 0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--rewards rules", "the following arguments are required: --dataset"),
        ("--dataset x --rewards", "--rewards: expected at least one argument"),
        ("--dataset x", "the following arguments are required: --rewards"),
        ("--dataset x --rewards rules --dtype float16", "invalid choice: 'float16'"),
        ("--dataset x --rewards rules --dynamics sde", "invalid choice: 'sde'"),
        ("--dataset x --rewards rules --top_k 13", "`top_k` is 13"),
        (
            "--dataset x --rewards rules --gradient_checkpointing_kwargs {",
            "gradient-checkpointing-kwargs: { is not JSON",
        ),
        ("--dataset x --rewards rules --lr_scheduler_kwargs 1", "lr-scheduler-kwargs: 1 is not a JSON object"),
        (
            '--dataset x --rewards rules --gradient_checkpointing_kwargs {"reuse":true}',
            "it can only be {'reuse_activations': True}",
        ),
        ("--dataset x --rewards rules --eval_reward y", "unknown option --eval_reward; did you mean --eval_rewards"),
    ],
)
def test_mistakes_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        make_parser().parse_args_and_config([*arguments.split(), "--use_cpu", "--output_dir", "out"])
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_activations_are_reused_by_an_option_and_by_a_key_of_the_file(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("gradient_checkpointing_kwargs:\n  reuse_activations: true\n")
    given = ("--gradient_checkpointing_kwargs", '{"reuse_activations": true}'), ("--config", str(file)), ()
    for words in given:
        required = ["--dataset", "x", "--rewards", "rules", "--output_dir", str(tmp_path / "out"), "--use_cpu"]
        _, _, args = make_parser().parse_args_and_config([*required, *words])
        assert args.reuses_activations == bool(words)


def test_what_is_misspelt_is_told_before_the_model_is_loaded(here):
    def build(arguments):
        line = f"--model_name_or_path nowhere/at-all {TINY} --output_dir out {arguments}"
        build_trainer(*make_parser().parse_args_and_config(line.split()))

    with pytest.raises(ValueError, match="no reward 'rule'"):
        build("--dataset prompts.txt --rewards rule")
    with pytest.raises(FileNotFoundError, match=r"prompt\.txt"):
        build("--dataset prompt.txt --rewards rules")
    with pytest.raises(ValueError, match="no split 'test'"):
        build("--dataset prompts.txt --rewards rules --eval_strategy steps")


def test_lora_is_the_papers_on_every_attention_projection(build):
    trainer = build("--dataset prompts.txt --rewards tiny_rewards:redness --lora_r 3 --lora_alpha 5")
    transformer = trainer.model
    (config,) = transformer.peft_config.values()
    assert (config.r, config.lora_alpha) == (3, 5)
    # Oracle: the linear layers inside diffusers' attention modules
    from diffusers.models.transformers.transformer_flux import FluxAttention

    expected = {
        f"{name}.{part}"
        for name, module in transformer.named_modules()
        if isinstance(module, FluxAttention)
        for part, layer in module.named_modules()
        if isinstance(getattr(layer, "base_layer", layer), torch.nn.Linear)
        and not part.endswith("base_layer")
        and "lora" not in part
    }
    adapted = {name.split(".lora_A")[0] for name, _ in transformer.named_parameters() if "lora_A" in name}
    assert adapted == expected and len(adapted) == 8 + 3  # one double block, one single block
    assert {name for name, p in transformer.named_parameters() if p.requires_grad} == {
        name for name, _ in transformer.named_parameters() if ".lora_" in name
    }


def test_dtype_is_that_of_the_frozen_weights(build):
    arguments = "--dataset prompts.txt --rewards tiny_rewards:redness"
    for option, dtype in (("", torch.float32), ("--dtype bfloat16", torch.bfloat16)):
        parameters = dict(build(f"{arguments} {option}").model.named_parameters())
        assert {p.dtype for p in parameters.values() if p.requires_grad} == {torch.float32}
        assert {p.dtype for p in parameters.values() if not p.requires_grad} == {dtype}


def test_training_all_weights_asks_for_a_beta_of_zero(build):
    arguments = "--dataset prompts.txt --rewards tiny_rewards:redness --no_use_peft"
    with pytest.raises(ValueError, match=r"beta=0\.0"):
        build(arguments)
    assert all(parameter.requires_grad for parameter in build(f"{arguments} --beta 0").model.parameters())


def test_rewards_their_weights_and_those_of_evaluation(build):
    trainer = build(
        "--dataset scenes:4 --rewards tiny_rewards:redness rules --reward_weights 1 0.25 "
        "--eval_rewards tiny_rewards:darkness --eval_dataset prompts.txt --eval_strategy steps"
    )
    assert trainer.reward_functions.names == ["redness", "rules"]
    assert trainer.reward_functions.weights.tolist() == [1.0, 0.25]
    assert trainer.eval_reward_functions.names == ["redness", "rules", "darkness"]
    assert trainer.train_dataset.column_names == ["prompt", "scene"]
    assert trainer.eval_dataset["prompt"][:] == ["a red circle", "a blue square", "the cat"]


# ---------------------------------------------------------------------------------------------------- end to end


def test_the_command_trains_through_the_launcher_and_resumes(here, flux_folder, train, monkeypatch):
    """Two steps at once are one step, and another one after resuming."""
    arguments = (
        f"--dataset scenes:6 --rewards tiny_rewards:redness --save_steps 1 --model_name_or_path {flux_folder} "
        "--eval_strategy steps --eval_steps 1 --eval_dataset scenes:2 --eval_rewards rules"
    )
    command = f"grpo {TINY} {arguments} --max_steps 2 --output_dir launched --num_processes 1 --num_machines 1"
    assert main(shlex.split(f"{command} --mixed_precision no --dynamo_backend no")) == 0

    folder = train(f"{arguments} --max_steps 1 --output_dir resumed")
    first = (folder / "checkpoint-1" / "trainer_state.json").stat().st_mtime_ns
    train(f"{arguments} --max_steps 2 --output_dir resumed --resume_from_checkpoint true")
    assert (folder / "checkpoint-1" / "trainer_state.json").stat().st_mtime_ns == first  # it was not made again
    launched, resumed = (
        load_file(parent / "pytorch_lora_weights.safetensors") for parent in (here / "launched", folder)
    )
    assert launched.keys() == resumed.keys() and launched
    for name, tensor in launched.items():
        assert torch.equal(tensor, resumed[name]), name

    # image grids are on disk, and the log has what the issue asks for
    assert Image.open(next((here / "launched" / "images").glob("eval_*.png"))).size[0] > 32
    state = json.loads((here / "launched" / "checkpoint-2" / "trainer_state.json").read_text())
    logs = {name for entry in state["log_history"] for name in entry}
    assert {"reward", "ratio/mean", "clip_ratio/low", "images_per_second", "eval_rewards/rules/mean"} <= logs

    # plain diffusers loads the result
    pipeline = FluxPipeline.from_pretrained(flux_folder)
    pipeline.load_lora_weights(here / "launched")
    assert pipeline.get_active_adapters() == ["default_0"]


def test_full_training_exports_a_transformer(train, flux_folder):
    folder = train("--dataset prompts.txt --rewards tiny_rewards:redness --no_use_peft --beta 0 --learning_rate 1e-5 "
                   "--ema_decay 0 --output_dir full --save_strategy no")  # fmt: skip
    transformer = type(FluxPipeline.from_pretrained(flux_folder).transformer).from_pretrained(
        folder, subfolder="transformer"
    )
    assert transformer.config.num_layers == 1
