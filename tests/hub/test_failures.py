"""What goes wrong with a Hub: who uses it is told what and what to do, and nothing is half done."""

import hashlib
import json
import re

import pytest

from tests.hub.conftest import BACKBONE, Machine


WEIGHTS = "adapter_model.safetensors"
LOAD = "from trl_spatial import SpatialScore; SpatialScore.from_pretrained({!r}, device='cpu')"
# What is said to each of several names that cannot be loaded.
FAIL_TO_LOAD = """
from trl_spatial import SpatialScore
for name in {!r}:
    try:
        SpatialScore.from_pretrained(name, device="cpu")
    except (OSError, ValueError) as error:
        print(f"{{name}}: {{type(error).__name__}}: {{error}}")
    else:
        raise AssertionError(name)
"""


def what_is_said(machine, *names, **environment):
    """The error messages by the names that were to be loaded."""
    lines = machine.python(FAIL_TO_LOAD.format(names), **environment).splitlines()
    return {name: next(line for line in lines if line.startswith(f"{name}: ")) for name in names}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, official_checkpoints):
    """Folder of a tiny SpatialScore adapter whose backbone is on the Hub."""
    from peft import get_peft_model

    from trl_spatial.gaussian_reward.modeling import GaussianRewardModel, spatial_score_lora_config
    from trl_spatial.gaussian_reward.processing import load_processor
    from trl_spatial.gaussian_reward.scoring import save_checkpoint

    backbone, _ = official_checkpoints["qwen2_5_vl"]
    folder = tmp_path_factory.mktemp("checkpoint") / "scorer"
    processor = load_processor(backbone)
    model = GaussianRewardModel.from_backbone(backbone, reward_token_id=processor.reward_token_id)
    save_checkpoint(get_peft_model(model, spatial_score_lora_config(2, 4)), processor, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": BACKBONE}))
    return folder


@pytest.fixture
def published(hub, checkpoint):
    """The same on the Hub, as `tester/scorer`."""
    hub.files["tester/scorer"] = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    return hub.files["tester/scorer"]


class TestNames:
    def test_no_namespace(self, machine, checkpoint):
        words = ["push", checkpoint, "--to", "hub/scorer"]
        output = machine.run(*words, rc=1, HF_TOKEN="")
        for way_out in ("--namespace ORG", "TRL_SPATIAL_NAMESPACE=ORG", "hf auth login", "ORG/NAME"):
            assert way_out in output
        # each of the ways out
        assert "to lab/scorer" in machine.run(*words, "--dry-run", "--namespace", "lab", HF_TOKEN="")
        assert "to team/scorer" in machine.run(*words, "--dry-run", HF_TOKEN="", TRL_SPATIAL_NAMESPACE="team")
        assert "to lab/scorer" in machine.run(*words, "--dry-run", "--namespace=lab", TRL_SPATIAL_NAMESPACE="team")
        assert "to tester/scorer" in machine.run(*words, "--dry-run")
        (machine.folder / "push.yaml").write_text("namespace: yaml\nto: hub/scorer\n")
        assert "to yaml/scorer" in machine.run("push", checkpoint, "--config", "push.yaml", "--dry-run")

    def test_a_namespace_of_an_organization(self, hub, machine, checkpoint):
        hub.orgs["tester"] = ["lab"]
        machine.run("push", checkpoint, "--to", "hub/scorer", "--namespace", "lab", "--private")
        assert WEIGHTS in hub.files["lab/scorer"] and hub.repository("lab/scorer").settings["private"]
        assert "no rights" not in machine.run("push", checkpoint, "--to", "others/scorer", rc=1)
        assert "others/scorer" not in hub.files

    def test_wrong_token(self, hub, machine, checkpoint):
        output = machine.run(
            "push", checkpoint, "--to", "tester/scorer", rc=1, HF_TOKEN="hf_wrong_and_secret_0123456789"
        )
        assert "does not know your token" in output and "hf auth login" in output
        assert "hf_wrong_and_secret" not in output and "tester/scorer" not in hub.files

    def test_read_only_token(self, hub, machine, checkpoint):
        hub.read_only_tokens.add("hf_stub")
        assert "role `write`" in machine.run("push", checkpoint, "--to", "tester/scorer", rc=1)

    def test_missing_private_or_misspelt_repositories(self, hub, machine, published):
        hub.repository("tester/scorer").settings["private"] = True
        hidden = what_is_said(machine, "tester/scorer", HF_TOKEN="")["tester/scorer"]
        assert "no such repository, or your token has no access to it" in hidden
        said = what_is_said(machine, "tester/nothing", "tester/scorer@v9")
        assert "no such repository" in said["tester/nothing"] and "no such revision" in said["tester/scorer@v9"]
        output = machine.run("data", "validate", "tester/nothing", rc=1)
        assert "tester/nothing" in output and "no such repository" in output


class TestExistingRepository:
    def test_other_files_are_not_mixed_in_and_are_replaced_if_asked_for(self, hub, machine, checkpoint):
        hub.files["tester/scorer"] = {"model.safetensors": b"of another model", "README.md": b"# Other", "a.txt": b""}
        output = machine.run("push", checkpoint, "--to", "tester/scorer", rc=1)
        assert "model.safetensors" in output and "--replace" in output
        assert set(hub.files["tester/scorer"]) == {"model.safetensors", "README.md", "a.txt"}
        machine.run("push", checkpoint, "--to", "tester/scorer", "--replace")
        assert WEIGHTS in hub.files["tester/scorer"] and "model.safetensors" not in hub.files["tester/scorer"]
        assert b"# Other" not in hub.files["tester/scorer"]["README.md"]

    def test_the_same_again_changes_nothing(self, hub, machine, checkpoint):
        machine.run("push", checkpoint, "--to", "tester/scorer")
        before, uploads = hub.revision("tester/scorer"), len(hub.uploads)
        machine.run("push", checkpoint, "--to", "tester/scorer")
        assert hub.revision("tester/scorer") == before and len(hub.uploads) == uploads


class TestNetwork:
    def test_rate_limits_and_errors_are_waited_out(self, hub, machine, checkpoint):
        hub.fail("POST", r"/api/repos/create", status=429, headers={"Retry-After": "1"})
        hub.fail("POST", r"/preupload/", status=503)
        hub.fail("POST", r"/commit/", status=429, headers={"Retry-After": "1"})
        hub.fail("POST", r"/commit/", status=500)
        machine.run("push", checkpoint, "--to", "tester/scorer")
        assert set(hub.files["tester/scorer"]) >= {WEIGHTS, "README.md"}
        assert all(fault.times == 0 for fault in hub.faults)

    def test_a_rate_limit_that_is_too_long_is_told(self, hub, machine, checkpoint):
        hub.fail("POST", r"/commit/", status=429, times=99, headers={"Retry-After": "3600"})
        output = machine.run("push", checkpoint, "--to", "tester/scorer", rc=1)
        assert "try again in 3600 s" in output and "429" in output

    def test_an_upload_that_breaks_in_a_file_is_sent_again(self, hub, machine, checkpoint):
        hub.drop("PUT", r"/lfs/", after=1000)
        machine.run("push", checkpoint, "--to", "tester/scorer")
        assert hub.files["tester/scorer"][WEIGHTS] == (checkpoint / WEIGHTS).read_bytes()

    def test_an_interrupted_upload_goes_on(self, hub, machine, checkpoint):
        """The repository stays as it was, and what had arrived is not sent again."""
        hub.fail("POST", r"/commit/", status=400, body={"error": "stopped"})
        machine.run("push", checkpoint, "--to", "tester/scorer", rc=1)
        assert not hub.files["tester/scorer"]
        oid = hashlib.sha256((checkpoint / WEIGHTS).read_bytes()).hexdigest()
        assert hub.uploads.count(oid) == 1
        machine.run("push", checkpoint, "--to", "tester/scorer")
        assert hub.uploads.count(oid) == 1
        assert hub.files["tester/scorer"][WEIGHTS] == (checkpoint / WEIGHTS).read_bytes()

    def test_an_interrupted_dataset_goes_on(self, hub, machine):
        machine.run("data", "make", "--num_pairs", 12, "--image_size", 32, "--output", "pairs")
        words = ["push", "pairs", "--to", "hub/pairs", "--max_shard_size", "10KB"]
        hub.fail("POST", r"/commit/", status=400, body={"error": "stopped"})
        machine.run(*words, rc=1)
        sent = list(hub.uploads)
        assert len(sent) > 2 and not hub.files["datasets/tester/pairs"]
        machine.run(*words)
        shards = [name for name in hub.files["datasets/tester/pairs"] if name.endswith(".parquet")]
        assert len(shards) == len(sent)
        assert not set(sent) & set(hub.uploads[len(sent) :])

    def test_a_download_that_breaks_is_right_in_the_end(self, hub, machine, published):
        hub.drop("GET", rf"/resolve/.+/{WEIGHTS}", after=2000)
        hub.fail("GET", r"/api/models/tester/scorer", status=429, headers={"Retry-After": "0"})
        machine.python(LOAD.format("hub/scorer"))
        (file,) = (machine.folder / "cache").glob(f"hub/models--tester--scorer/snapshots/*/{WEIGHTS}")
        assert file.read_bytes() == published[WEIGHTS]

    def test_a_cold_cache_without_a_network(self, machine):
        said = what_is_said(machine, "tester/scorer", "hub/scorer", HF_HUB_OFFLINE="1")
        assert "not in the cache" in said["tester/scorer"] and "while online" in said["tester/scorer"]
        assert "the cache has nothing of that name" in said["hub/scorer"]
        assert "TRL_SPATIAL_NAMESPACE" in said["hub/scorer"]


def test_a_full_disk(hub, machine, published):
    """No file may grow beyond 20 kB, which the operating system reports as a write error of the same family."""
    program = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n" + LOAD.format(
        "tester/scorer"
    )
    output = machine.python(program, rc=1)
    assert "no space left on the disk" in output and "HF_HOME" in output
    machine.python(LOAD.format("tester/scorer"))  # once there is room


class TestUnsafe:
    def test_models_with_pickles_or_code_are_refused(self, hub, machine, published):
        unsafe = {"lab/a": "pytorch_model.bin", "lab/b": "nested/data.pkl", "lab/c": "modeling.py"}
        for repo, name in unsafe.items():
            hub.files[repo] = {**published, name: b"import os"}
        unsafe["lab/d"] = "tokenizer_config.json with auto_map"
        hub.files["lab/d"] = {
            **published,
            "tokenizer_config.json": b'{"auto_map": {"AutoTokenizer": ["a/b--c.D", null]}}',
        }
        for repo, said in what_is_said(machine, *unsafe).items():
            assert "is refused" in said and unsafe[repo] in said and "hf download" in said
        assert not list((machine.folder / "cache").rglob("*.safetensors"))

    def test_so_are_backbones_and_datasets(self, hub, machine, published):
        hub.files[BACKBONE]["training_args.bin"] = b""
        assert f"{BACKBONE} is refused" in machine.python(LOAD.format("tester/scorer"), rc=1)
        hub.files["datasets/tester/pairs"] = {"data/train.jsonl": b'{"prompt": "a"}\n', "pairs.py": b""}
        output = machine.run("data", "validate", "hub/pairs", rc=1)
        assert "tester/pairs is refused" in output and "--repo-type dataset" in output

    def test_what_is_private_is_not_uploaded(self, hub, machine, checkpoint, tmp_path):
        import shutil

        folder = machine.folder / "scorer"
        shutil.copytree(checkpoint, folder)
        (folder / "optimizer.pt").write_bytes(b"")
        (folder / "notes.txt").write_text("my token: hf_" + "a" * 34)  # not a file of a model
        for text, found in (
            ("my token: hf_" + "a" * 34, "README.md holds a secret token"),
            (f"see {machine.folder}/x", "README.md holds the path"),
            (f"trained on {checkpoint.parent}", "README.md holds the path"),  # a folder of this machine, whoever's
        ):
            (folder / "README.md").write_text(text)
            output = machine.run("push", folder, "--to", "tester/scorer", rc=1)
            assert found in output and "a" * 34 not in output
            assert not hub.files.get("tester/scorer")
        (folder / "README.md").write_text("nothing")
        plan = machine.run("push", folder, "--to", "tester/scorer", "--dry-run")
        assert "Would stay here: notes.txt, optimizer.pt" in plan
        machine.run("push", folder, "--to", "tester/scorer")
        assert not {"optimizer.pt", "notes.txt"} & set(hub.files["tester/scorer"])

    def test_an_adapter_of_a_local_backbone(self, hub, machine, checkpoint):
        import shutil

        folder = machine.folder / "scorer"
        shutil.copytree(checkpoint, folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        local = config | {"base_model_name_or_path": str(machine.folder / "Qwen2.5-VL")}
        (folder / "adapter_config.json").write_text(json.dumps(local))
        output = machine.run("push", folder, "--to", "tester/scorer", rc=1)
        assert "--base_model ORG/NAME" in output and "trl_spatial merge" in output
        machine.run("push", folder, "--to", "tester/scorer", "--base_model", BACKBONE)
        pushed = hub.files["tester/scorer"]
        assert json.loads(pushed["adapter_config.json"])["base_model_name_or_path"] == BACKBONE
        assert f"base_model: {BACKBONE}" in pushed["README.md"].decode()
        machine.python(LOAD.format("hub/scorer"))


def test_a_folder_that_is_nothing_says_what_can_be_pushed(machine, checkpoint, tmp_path):
    output = machine.run("push", checkpoint.parent, "--to", "hub/x", rc=1)
    assert re.search(rf"Push a folder in it: {checkpoint}", output)
    assert "is not a folder" in machine.run("push", "nowhere", "--to", "hub/x", rc=1)
    assert "not the name of a repository" in machine.run("push", checkpoint, "--to", "a/b/c", rc=1)


def test_machines_do_not_share_a_cache(hub, tmp_path):
    assert Machine(hub, tmp_path / "a").environment["HF_HOME"] != Machine(hub, tmp_path / "b").environment["HF_HOME"]
