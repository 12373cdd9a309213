"""Every kind of thing that is published: what of it arrives, what its card says, and that the card's code runs."""

import io
import json
import re
import shutil

import pytest
from huggingface_hub import ModelCard
from PIL import Image

import trl_spatial
from tests.hub.conftest import BACKBONE, Machine
from tests.hub_stub import HubStub


PIPELINE = "black-forest-labs/FLUX.1-dev"  # the default of `trl_spatial grpo`; here a tiny one of its class
TINY_MODELS = f"{trl_spatial.__path__[0]}/tiny_models"
TINY_GRPO = (
    "--lora_r 2 --num_generations 4 --top_k 1 --per_device_train_batch_size 2 --gradient_accumulation_steps 1 "
    "--num_inference_steps 4 --eval_num_inference_steps 2 --height 32 --width 32 --eval_height 32 --eval_width 32 "
    "--max_sequence_length 192 --max_steps 2 --save_steps 1 --use_cpu --disable_tqdm true"
)
TINY_REWARD = (
    "--lora_r 2 --min_pixels 256 --max_pixels 1024 --dataloader_num_workers 0 --per_device_train_batch_size 2 "
    "--gradient_accumulation_steps 1 --max_steps 2 --save_steps 1 --use_cpu --disable_tqdm true"
)
PRIVATE_FILES = re.compile(
    r"\.(bin|pt|pth|pkl)$|trainer_state|checkpoint\.json|buffer_|trained_weights|optimizer|\.log|images/"
)


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run_code(files, machine, **replaced):
    """Run the Python of a card as it stands, but for what a test needs smaller."""
    programs = re.findall(r"^```python\n(.*?)^```", files["README.md"].decode(), re.MULTILINE | re.DOTALL)
    for program in programs:
        for text, other in replaced.items():
            program = program.replace(text, other)
        machine.python(program)
    return len(programs)


def check_nothing_private(hub, machine, of=()):
    secrets = (str(machine.folder), str(machine.folder.parent), hub.environment["HF_TOKEN"])
    for repo, files in hub.files.items():
        if repo in of or not of:
            for name, data in files.items():
                assert not PRIVATE_FILES.search(name), (repo, name)
                assert not any(secret.encode() in data for secret in secrets), (repo, name)


class TestWhileTraining:
    def test_lora_weights_of_a_diffusion_model(self, hub, machine, flux_folder, tmp_path):
        hub.files[PIPELINE] = files_of(flux_folder)
        words = "grpo --dataset scenes:4 --rewards rules --eval_dataset scenes:3 --eval_strategy steps --eval_steps 2"
        machine.run(
            *words.split(), *TINY_GRPO.split(), "--output_dir", "tuned", "--eval_on_start", "true", "--push_to_hub",
            "--hub_always_push", "true", "--hub_model_id", "hub/FLUX-tuned", "--hub_private_repo", "true",
        )  # fmt: skip
        commits = hub.commits["tester/FLUX-tuned"]
        assert commits[:2] == [f"Training in progress, step {step}" for step in (1, 2)]
        assert hub.repository("tester/FLUX-tuned").settings["private"]
        files = hub.files["tester/FLUX-tuned"]
        assert set(files) == {"pytorch_lora_weights.safetensors", "README.md", "card.json", "samples.png"}
        assert (
            files["pytorch_lora_weights.safetensors"]
            == (machine.folder / "tuned" / "pytorch_lora_weights.safetensors").read_bytes()
        )
        check_nothing_private(hub, machine, ["tester/FLUX-tuned"])

        card = ModelCard(files["README.md"].decode())
        data = card.data.to_dict()
        assert (data["base_model"], data["library_name"], data["pipeline_tag"]) == (
            PIPELINE,
            "diffusers",
            "text-to-image",
        )
        assert "lora" in data["tags"]
        logs = json.loads((machine.folder / "tuned" / "checkpoint-2" / "trainer_state.json").read_text())[
            "log_history"
        ]
        last = [log for log in logs if "eval_reward" in log][-1]
        (result,) = card.data.eval_results
        assert result.metric_value == pytest.approx(last["eval_rewards/rules/mean"], abs=1e-3)
        assert result.metric_args["num_samples"] == 3 and "(trained on)" in result.metric_name
        assert "| updates | 2 |" in card.text and "before training" in card.text
        assert Image.open(io.BytesIO(files["samples.png"])).width > 100
        assert run_code(files, Machine(hub, tmp_path / "reader")) == 1
        assert (tmp_path / "reader" / "image.png").is_file()

    def test_a_fully_trained_transformer(self, hub, machine, flux_folder, tmp_path):
        hub.files[PIPELINE] = files_of(flux_folder)
        machine.run(
            "grpo", "--dataset", "scenes:4", "--rewards", "rules", "--no_use_peft", "--beta", "0", *TINY_GRPO.split(),
            "--output_dir", "tuned", "--push_to_hub", "--hub_strategy", "end",
        )  # fmt: skip
        files = hub.files["tester/tuned"]
        assert {"transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"} < set(files)
        check_nothing_private(hub, machine, ["tester/tuned"])
        assert run_code(files, Machine(hub, tmp_path / "reader")) == 1
        assert (tmp_path / "reader" / "image.png").is_file()

    def test_a_reward_model_at_the_end_only(self, hub, machine):
        machine.run("data", "make", "--num_pairs", 4, "--num_test_pairs", 3, "--image_size", 32, "--output", "pairs")
        output = machine.run(
            "reward", "--dataset", "pairs", *TINY_REWARD.split(), "--output_dir", "out/my-scorer", "--push_to_hub",
            "--hub_strategy", "end", "--eval_strategy", "steps", "--eval_steps", 2,
        )  # fmt: skip
        assert hub.commits["tester/my-scorer"] == ["End of training"]
        files = hub.files["tester/my-scorer"]
        check_nothing_private(hub, machine, ["tester/my-scorer"])
        card = ModelCard(files["README.md"].decode())
        (result,) = card.data.eval_results
        low, high = result.metric_args["confidence_interval_95"]
        assert result.metric_args["num_samples"] == 3 and low <= result.metric_value <= high
        assert "datasets" not in card.data.to_dict()  # it was a local folder
        # its backbone was the Hub's: nothing else has to be named
        assert "BACKBONE" not in card.text
        assert "/tester/my-scorer/commit/" in output and "](samples.png)" in card.text

    def test_a_namespace_is_asked_for_before_the_training(self, hub, machine):
        machine.run("data", "make", "--num_pairs", 4, "--image_size", 32, "--output", "pairs")
        output = machine.run("reward", "--dataset", "pairs", *TINY_REWARD.split(), "--push_to_hub", rc=1, HF_TOKEN="")
        assert "TRL_SPATIAL_NAMESPACE" in output and "Training completed" not in output


@pytest.mark.parametrize("name", ["qwen2_5_vl", "flux"])
def test_the_tiny_models(hub, machine, name):
    machine.run("push", f"{TINY_MODELS}/{name}", "--to", f"hub/tiny-{name}")
    files = hub.files[f"tester/tiny-{name}"]
    card = ModelCard(files["README.md"].decode())
    assert card.data.license == "apache-2.0" and len(card.data.eval_results) >= 1
    assert f'from_pretrained("tester/tiny-{name}")' in card.text and TINY_MODELS not in card.text
    assert run_code(files, machine) == 1


@pytest.fixture(scope="module")
def demo(backbone_files, tmp_path_factory):
    """A Hub with everything that a tiny demo has made, and the machine it ran on."""
    folder = tmp_path_factory.mktemp("demo")
    with HubStub() as hub:
        hub.files[BACKBONE] = dict(backbone_files)
        machine = Machine(hub, folder / "here")
        sizes = "--reward_steps 1 --grpo_steps 1 --num_train_pairs 4 --num_test_pairs 8 --num_prompts 2"
        machine.run("demo", *sizes.split(), "--output_dir", "demo")
        for name, words in {
            "qwen2_5_vl": [f"{TINY_MODELS}/qwen2_5_vl"],
            "flux": [f"{TINY_MODELS}/flux"],
            "reward": ["demo/reward", "--base_model", "hub/demo-qwen2_5_vl"],
            "grpo": ["demo/grpo", "--base_model", "hub/demo-flux"],
            "pairs": ["demo/pairs"],
        }.items():
            machine.run("push", *words, "--to", f"hub/demo-{name}")
        yield hub, machine, json.loads((machine.folder / "demo" / "results.json").read_text())


class TestDemo:
    def test_what_it_is_made_of_is_named(self, demo):
        _, machine, _ = demo
        output = machine.run("push", "demo", "--to", "hub/demo", rc=1)
        for name in ("demo/grpo", "demo/pairs", "demo/reward"):
            assert name in output

    def test_the_reward_model(self, demo, tmp_path):
        hub, _, results = demo
        files = hub.files["tester/demo-reward"]
        card = ModelCard(files["README.md"].decode())
        accuracy = results["reward_model"]["accuracy"]["all"]["all"]
        found = next(result for result in card.data.eval_results if result.metric_name == "accuracy")
        assert found.metric_value == pytest.approx(accuracy["estimate"], abs=1e-4)
        assert found.metric_args["num_samples"] == 8
        assert found.metric_args["confidence_interval_95"] == pytest.approx(
            [accuracy["low"], accuracy["high"]], abs=1e-3
        )
        assert "](samples.png)" in card.text and "samples.png" in files
        reader = Machine(hub, tmp_path / "reader")
        Image.new("RGB", (64, 64), "red").save(reader.folder / "image.png")
        assert run_code(files, reader, **{"red cube": "red circle", "blue sphere": "blue square"}) == 1

    def test_the_generator(self, demo, tmp_path):
        hub, _, results = demo
        files = hub.files["tester/demo-grpo"]
        card = ModelCard(files["README.md"].decode())
        after = results["generator"]["after"]["spatial_accuracy"]
        found = next(result for result in card.data.eval_results if "spatial accuracy" in result.metric_name)
        assert found.metric_value == pytest.approx(after["estimate"], abs=1e-3)
        assert found.metric_args["num_samples"] == 8
        assert f"| {results['generator']['before']['spatial_accuracy']['estimate']:.4g} |" in card.text
        assert run_code(files, Machine(hub, tmp_path / "reader")) == 1

    def test_the_pairs(self, demo):
        _, machine, _ = demo
        output = machine.python("from datasets import load_dataset; print(load_dataset('tester/demo-pairs').num_rows)")
        assert "{'train': 4, 'test': 8}" in output

    def test_nothing_private(self, demo):
        hub, machine, _ = demo
        check_nothing_private(hub, machine, [name for name in hub.files if "demo-" in name])


def test_a_space(hub, machine):
    machine.run("space", "build", "page", "--model", "hub/scorer")
    machine.run("push", "page", "--to", "hub/spatial-page")
    files = hub.files["spaces/tester/spatial-page"]
    assert set(files) == {"app.py", "requirements.txt", "README.md"}
    assert hub.repository("spaces/tester/spatial-page").settings["sdk"] == "gradio"
    assert b"tester/scorer" in files["app.py"]


def test_a_readme_that_somebody_wrote_goes_up_as_it_is(hub, machine):
    folder = machine.folder / "model"
    shutil.copytree(f"{TINY_MODELS}/qwen2_5_vl", folder)
    text = (folder / "README.md").read_text() + "\nA line of mine.\n"
    (folder / "README.md").write_text(text)
    machine.run("push", folder, "--to", "hub/model")
    assert hub.files["tester/model"]["README.md"].decode() == text
