"""Which files of a folder are uploaded, and which are not even loaded."""

import json
import re
import socket

import numpy as np
import pytest
from safetensors.numpy import save

from trl_spatial.data.kinds import DATASET
from trl_spatial.diffusion_grpo.kinds import LORA, PIPELINE, TRANSFORMER
from trl_spatial.gaussian_reward.kinds import BACKBONE, SPATIAL_SCORE
from trl_spatial.hub import Reference, UnsafeRepositoryError, check_repository, find_reference
from trl_spatial.hub.checkpoints import collect_files, find_kind, list_kept
from trl_spatial.hub.safety import check_public
from trl_spatial.space.build import SPACE


KINDS = (SPATIAL_SCORE, LORA, PIPELINE, TRANSFORMER, SPACE, DATASET, BACKBONE)
CONFIG = json.dumps({"model_type": "gaussian_reward"}).encode()
# What makes a folder one of a kind, and with the card is all that is uploaded.
CONTENTS = {
    "a SpatialScore reward model": {
        "config.json": CONFIG,
        "adapter_config.json": b'{"base_model_name_or_path": "org/base"}',
        "adapter_model.safetensors": save({}),
        "tokenizer.json": b"{}",
        "chat_template.jinja": b"{{ messages }}",
    },
    "LoRA weights of a diffusion model": {"pytorch_lora_weights.safetensors": save({})},
    "a diffusion pipeline": {
        "README.md": b"# Mine",
        "model_index.json": b"{}",
        "transformer/config.json": b"{}",
        "transformer/diffusion_pytorch_model-00001-of-00002.safetensors": save({}),
        "tokenizer/vocab.json": b"{}",
    },
    "a fully trained transformer of a diffusion model": {
        "transformer/config.json": b"{}",
        "transformer/diffusion_pytorch_model.safetensors": save({}),
    },
    "a model of transformers": {
        "README.md": b"# Mine",
        "config.json": b'{"model_type": "qwen2_5_vl"}',
        "model.safetensors": save({}),
    },
    "a Space": {"README.md": b"# Mine", "app.py": b"", "requirements.txt": b""},
}
# What trainings, users and other programs leave beside it.
OTHERS = (
    "before_after.json", "train_results.json", "all_results.json", "trainer_state.json", "checkpoint.json", "results.json",
    "training_args.bin", "optimizer.pt", "ema.safetensors", "trained_weights.safetensors", "buffer_0.safetensors", ".env",
    ".cache/token.json", "_private.json", "notes.txt", "images/step_1.png", "transformer/notes.json",
    "transformer/deep/config.json", "checkpoint-2/config.json", "checkpoint-2/model.safetensors", "wandb/config.json",
)  # fmt: skip
CARD = {"README.md", "card.json"}


def make_folder(folder, contents):
    for name, data in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def scorer(tmp_path):
    return make_folder(tmp_path / "scorer", CONTENTS["a SpatialScore reward model"])


def collect(folder):
    return collect_files(folder, "org/name", kind=find_kind(folder, KINDS))


@pytest.mark.parametrize("name", CONTENTS)
def test_what_is_not_on_the_list_stays_here(tmp_path, name):
    contents = CONTENTS[name]
    others = [file for file in OTHERS if not (name == "a diffusion pipeline" and file.startswith("wandb"))]
    make_folder(tmp_path, dict.fromkeys(others, b"private") | contents)
    (tmp_path.parent / "secret.json").write_text("{}")
    (tmp_path / "merges.txt").symlink_to(tmp_path.parent / "secret.json")
    if name == "a diffusion pipeline":  # nor do folders of a checkpoint count as parts of a pipeline
        for file in ("checkpoint-2/config.json", "checkpoint-2/model.safetensors"):
            (tmp_path / file).unlink()
    kind = find_kind(tmp_path, KINDS)
    files = collect_files(tmp_path, "org/name", kind=kind)
    assert kind.name == name
    assert set(files) == set(contents) | (CARD if "README.md" not in contents else set())
    # what is uploaded and what is listed as kept are all there is
    kept = list_kept(tmp_path, files)
    everything = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if not path.is_dir()}
    covered = {file for file in everything if file in kept or any(file.startswith(k) for k in kept if k[-1] == "/")}
    assert covered == everything - set(files)


def test_weights_are_those_of_one_model(scorer):
    (scorer / "model.safetensors").write_bytes(save({}))
    with pytest.raises(ValueError, match="the weights of two models"):
        collect(scorer)
    for file in scorer.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ValueError, match="holds no adapter_model"):
        collect(scorer)


@pytest.mark.parametrize("file", ["config.json", "adapter_config.json", "card.json"])
@pytest.mark.parametrize("content", [b"", b'{"a": ', b"[1]", b"\xff\xfe", b"3", b"[" * 99_999])
def test_damaged_files_are_named(scorer, file, content):
    (scorer / file).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(scorer / file))) as caught:
        collect(scorer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 7, b"\xff" * 8, b"\4" + b"\0" * 7 + b"{}", save({"a": np.ones(9)})[:-1], b"\2" + b"\0" * 7 + b"[]"],
)
def test_damaged_weights_are_named(scorer, content):
    (scorer / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is damaged"):
        check_public(collect(scorer))


def test_folders_that_hold_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"is none of: a SpatialScore reward model, .*a dataset"):
        find_kind(tmp_path, KINDS)
    make_folder(tmp_path / "pairs", {"dataset_info.json": b"{}"})
    with pytest.raises(ValueError, match=f"Push a folder in it: {tmp_path / 'pairs'}"):
        find_kind(tmp_path, KINDS)
    assert find_kind(tmp_path / "pairs", KINDS) is DATASET
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        find_kind(tmp_path / "nowhere", KINDS)


@pytest.mark.parametrize(
    ("secret", "reason"),
    [
        ("hf_" + "a" * 34, "secret token"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----", "secret token"),
        ("/etc/../{folder}", "path"),
    ],
)
def test_secrets_are_found_and_not_shown(scorer, secret, reason):
    secret = secret.format(folder=scorer)
    with pytest.raises(ValueError, match=reason) as caught:
        check_public(collect(scorer) | {"README.md": f"see {secret}".encode()}, private=(scorer,))
    assert "a" * 34 not in str(caught.value)
    link = scorer / "link.txt"
    link.symlink_to(scorer.parent)
    with pytest.raises(ValueError, match=r"a\.txt is a link to a file elsewhere"):
        check_public({"a.txt": link})


CODE = {
    "modeling.py": b"",
    "pytorch_model.bin": b"",
    "transformer/modeling.py": b"",
    **dict.fromkeys(
        ("config.json", "tokenizer_config.json", "processor_config.json", "transformer/config.json"),
        b'{"inner": [{"auto_map": {"AutoModel": "org/other--modeling.Model"}}]}',
    ),
}


@pytest.mark.parametrize("name", CODE)
def test_local_models_that_could_run_code_are_refused(scorer, name):
    make_folder(scorer, {"transformer/config.json": b"{}", "training_args.bin": b"", "optimizer.pt": b""})
    make_folder(scorer, {"notebooks/plot.py": b"", "checkpoint-1/optimizer.bin": b""})
    reference = Reference(str(scorer), None, is_local=True)
    check_repository(reference, kind="model")  # what a training leaves is none of it
    make_folder(scorer, {name: CODE[name]})
    with pytest.raises(UnsafeRepositoryError, match=rf"it holds {name}( with auto_map)?\. .* move these out"):
        check_repository(reference, kind="model")


def test_local_names_need_no_network(scorer, monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    check_repository(find_reference(scorer, kind="model"), kind="model")
    check_public(collect(scorer))
