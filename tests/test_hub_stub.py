"""The Hub of the tests answers the real clients as the real one does, each of them in a process of its own."""

import hashlib
import os
from http.client import HTTPConnection

import pytest

from tests.hub_stub import HubStub
from tests.warm import run_python


BYTES = bytes(range(256)) * 1000


def sha256(data):
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def hub():
    """A Hub that is asked nothing that it does not know."""
    with HubStub() as hub:
        yield hub
    assert not hub.unknown


@pytest.fixture
def run(hub, tmp_path):
    """A function that runs a script against the Hub and returns what it wrote to the terminal."""

    def run(script, **environment):
        script = "from huggingface_hub import *\nfrom huggingface_hub.errors import *\napi = HfApi()\n" + script
        environment = os.environ | hub.environment | {"HF_HOME": str(tmp_path / "cache")} | environment
        output = run_python(["-c", script], cwd=tmp_path, env=environment)
        text = output.stdout + output.stderr
        assert output.returncode == 0, text
        return text

    return run


FOLDERS = """
from pathlib import Path

for kind, more in (("model", {}), ("dataset", {"private": True}), ("space", {"space_sdk": "gradio"})):
    url = api.create_repo("tester/thing", repo_type=kind, **more)
    assert (url.repo_type, url.repo_id) == (kind, "tester/thing")
    assert api.create_repo("thing", repo_type=kind, exist_ok=True, **more) == url
    try:
        api.create_repo("tester/thing", repo_type=kind, **more)
        raise AssertionError
    except HfHubHTTPError as error:
        assert error.response.status_code == 409
    first = api.upload_folder(repo_id="tester/thing", repo_type=kind, folder_path="folder", commit_message="Upload")
    again = api.upload_folder(repo_id="tester/thing", repo_type=kind, folder_path="folder", commit_message="Again")
    assert again.oid == first.oid
    copy = Path(snapshot_download("tester/thing", repo_type=kind))
    assert copy.name == first.oid
    assert {path.relative_to(copy): path.read_bytes() for path in copy.rglob("*") if path.is_file()} == {
        path.relative_to("folder"): path.read_bytes() for path in Path("folder").rglob("*") if path.is_file()
    }
    info = api.repo_info("tester/thing", repo_type=kind, files_metadata=True)
    assert (info.id, info.sha, info.private) == ("tester/thing", first.oid, kind == "dataset")
    assert {file.rfilename: file.size for file in info.siblings}["weights.bin"] == 256_000
    assert getattr(info, "sdk", None) == more.get("space_sdk")

operations = [
    CommitOperationCopy("weights.bin", "copy/weights.bin"),
    CommitOperationCopy("sub folder/a+b.txt", "text.txt"),
    CommitOperationDelete("empty.json"),
    CommitOperationDelete("sub folder/"),
]
api.create_commit("tester/thing", operations, commit_message="Move")
try:
    api.delete_file("gone.txt", "tester/thing")
    raise AssertionError
except RemoteEntryNotFoundError as error:
    assert "doesn't exist" in str(error)
api.update_repo_settings("tester/thing", private=True)
assert api.model_info("tester/thing").private
"""


@pytest.mark.parametrize("multipart_from", [None, 100_000])
def test_folders_come_back_as_they_were_uploaded(hub, run, tmp_path, multipart_from):
    hub.multipart_from = multipart_from
    card = b"---\nlicense: mit\n---\n# A thing\n"
    files = {"README.md": card, "weights.bin": BYTES, "empty.json": b"", "sub folder/a+b.txt": "ü".encode()}
    for name, data in files.items():
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    run(FOLDERS)
    for kind in ("datasets/", "spaces/"):
        assert hub.files[f"{kind}tester/thing"] == files
        assert hub.commits[f"{kind}tester/thing"] == ["Upload"]
    moved = {"README.md": card, "weights.bin": BYTES, "copy/weights.bin": BYTES, "text.txt": "ü".encode()}
    assert hub.files["tester/thing"] == moved
    assert hub.commits["tester/thing"] == ["Upload", "Move"]
    assert hub.uploads == [sha256(BYTES)] * 3
    assert len([path for method, path in hub.log if method == "PUT" and path.startswith("/lfs")]) == (
        3 if multipart_from is None else 9
    )


REVISIONS = """
def upload(data, **more):
    more = {"commit_message": "Data " + data.decode()} | more
    return api.upload_file(repo_id="tester/thing", path_in_repo="a/b/data.txt", path_or_fileobj=data, **more).oid

def read(revision, **more):
    return open(hf_hub_download("tester/thing", "a/b/data.txt", revision=revision, **more), "rb").read()

def status_of(error_type, function, *arguments, **more):
    try:
        function(*arguments, **more)
        raise AssertionError
    except error_type as error:
        return type(error), error.response.status_code

start = api.model_info("tester/thing").sha
first = upload(b"1")
api.create_branch("tester/thing", branch="a/branch")
api.create_tag("tester/thing", tag="v1", tag_message="The first")
second = upload(b"2", parent_commit=first)
on_branch = upload(b"3", revision="a/branch")
assert len({start, first, second, on_branch}) == 4

for _ in range(2):  # the second time from the cache
    contents = {"main": b"2", first: b"1", second: b"2", "v1": b"1", "a/branch": b"3", on_branch: b"3"}
    assert {revision: read(revision) for revision in contents} == contents
assert api.list_repo_files("tester/thing", revision=start) == ["old.txt"]
assert status_of(RevisionNotFoundError, read, "v2") == (RevisionNotFoundError, 404)
assert status_of(RevisionNotFoundError, api.model_info, "tester/thing", revision="v2")
assert status_of(RemoteEntryNotFoundError, read, start) == (RemoteEntryNotFoundError, 404)
assert not api.file_exists("tester/thing", "a/b", revision="main") and api.revision_exists("tester/thing", "v1")
assert status_of(HfHubHTTPError, upload, b"4", parent_commit=first) == (HfHubHTTPError, 412)

refs = api.list_repo_refs("tester/thing")
assert {ref.name: ref.target_commit for ref in refs.branches} == {"main": second, "a/branch": on_branch}
assert {ref.name: ref.target_commit for ref in refs.tags} == {"v1": first}
assert status_of(HfHubHTTPError, api.create_tag, "tester/thing", tag="v1") == (HfHubHTTPError, 409)
api.create_branch("tester/thing", branch="a/branch", exist_ok=True)
api.delete_tag("tester/thing", tag="v1")
api.delete_branch("tester/thing", branch="a/branch")
assert status_of(RevisionNotFoundError, read, "v1", force_download=True)
assert read(on_branch, force_download=True) == b"3"

paths = [entry.path for entry in api.list_repo_tree("tester/thing", recursive=True)]
assert paths == ["a", "a/b", "a/b/data.txt", "old.txt"]
assert [entry.path for entry in api.list_repo_tree("tester/thing")] == ["a", "old.txt"]
assert [entry.path for entry in api.list_repo_tree("tester/thing", "a/b")] == ["a/b/data.txt"]
assert status_of(RemoteEntryNotFoundError, lambda: list(api.list_repo_tree("tester/thing", "b")))
entries = api.get_paths_info("tester/thing", ["a", "a/b/data.txt", "old.txt", "new.txt"], expand=True)
titles = {"a": "Data 2", "a/b/data.txt": "Data 2", "old.txt": ""}
assert {entry.path: entry.last_commit.title for entry in entries} == titles
"""


def test_every_revision_has_its_own_files(hub, run):
    hub.files["tester/thing"] = {"old.txt": b"0"}
    run(REVISIONS)
    assert hub.files["tester/thing"] == {"old.txt": b"0", "a/b/data.txt": b"2"}
    assert hub.commits["tester/thing"] == ["Data 1", "Data 2", "Data 3"]


TOKENS = """
def error_of(function, *arguments, **more):
    try:
        function(*arguments, **more)
    except HfHubHTTPError as error:
        return f"{type(error).__name__} {error.response.status_code} {error}"

def upload(repo, token):
    more = {"repo_id": repo, "path_in_repo": "data.txt", "path_or_fileobj": b"new", "commit_message": "New"}
    return error_of(api.upload_file, token=token, **more)

def read(repo, token):
    return error_of(hf_hub_download, repo, "data.txt", token=token, force_download=True)

user = api.whoami()
assert user["name"] == "tester" and [org["name"] for org in user["orgs"]] == ["lab"]
assert api.whoami("hf_read")["auth"]["accessToken"]["role"] == "read"
assert "Invalid user token" in error_of(api.whoami, "hf_wrong")

for repo in ("tester/open", "lab/secret"):
    assert upload(repo, "hf_stub") is None
    assert "Invalid username or password." in upload(repo, "hf_wrong") and "401" in upload(repo, False)
    assert upload(repo, "hf_read").startswith("HfHubHTTPError 403")
    assert read(repo, "hf_stub") is read(repo, "hf_read") is None
    assert error_of(api.model_info, repo, token="hf_wrong").startswith("HfHubHTTPError 401")
assert upload("tester/open", "hf_other").startswith("HfHubHTTPError 403")
assert read("tester/open", False) is None

for token, status in ((False, 401), ("hf_other", 404)):
    for repo in ("lab/secret", "lab/none"):
        for error in (error_of(api.model_info, repo, token=token), upload(repo, token)):
            assert error.startswith(f"RepositoryNotFoundError {status}"), error
assert not api.repo_exists("lab/none") and api.repo_exists("lab/secret") and not api.repo_exists("one-word")

assert "under the namespace \\"other\\"" in error_of(api.create_repo, "other/new")
assert "HfHubHTTPError 401" in error_of(api.create_repo, "new", token="hf_wrong")
assert "403" in error_of(api.create_repo, "new", token="hf_read")
assert api.create_repo("tester/open", token="hf_other", exist_ok=True).repo_id == "tester/open"
assert api.create_repo("lab/new", private=True).repo_id == "lab/new"

for card, problem in (("- a", "not a mapping"), ("a: [", "expected")):
    try:
        api.upload_file(repo_id="lab/new", path_in_repo="README.md", path_or_fileobj=f"---\\n{card}\\n---\\n".encode())
        raise AssertionError
    except ValueError as error:
        assert problem in str(error)
"""


def test_tokens_and_private_repositories(hub, run):
    hub.tokens |= {"hf_read": "tester", "hf_other": "other"}
    hub.read_only_tokens.add("hf_read")
    hub.orgs["tester"] = ["lab"]
    for repo in ("tester/open", "lab/secret"):
        hub.files[repo] = {"data.txt": b"old"}
    hub.repository("lab/secret").settings["private"] = True
    run(TOKENS)
    assert hub.files["tester/open"] == hub.files["lab/secret"] == {"data.txt": b"new"}
    assert not hub.files["lab/new"] and hub.repository("lab/new").settings["private"]


FAULTS = """
from huggingface_hub import constants

constants.DOWNLOAD_CHUNK_SIZE = 50_000
data = bytes(range(256)) * 1000

def upload(name="weights.bin"):
    return api.upload_file(repo_id="tester/thing", path_in_repo=name, path_or_fileobj=data, commit_message="Upload")

def download():
    return open(hf_hub_download("tester/thing", "weights.bin"), "rb").read()
"""


def test_what_fails_for_a_while_is_retried(hub, run):
    hub.files["tester/thing"] = {}
    hub.fail("POST", "/preupload/", 429, headers={"Retry-After": "0"})
    hub.fail("POST", "/objects/batch", 503)
    hub.drop("PUT", "/lfs/", after=1000)
    hub.fail("HEAD", "/resolve/", 502)
    hub.drop("GET", "/resolve/", after=120_000)
    shown = run(FAULTS + "upload()\nassert download() == data")
    assert hub.files["tester/thing"] == {"weights.bin": BYTES}
    assert not any(fault.times for fault in hub.faults)
    assert hub.uploads == [sha256(BYTES)]
    requests = [method for method, path in hub.log if path.startswith("/lfs/") or "/resolve/" in path]
    assert " ".join(requests) == "PUT PUT HEAD HEAD GET GET"
    assert "Rate limited. Waiting 1.0s" in shown and "Trying to resume download" in shown


def test_some_requests_are_made_once_only(hub, run):
    hub.files["tester/thing"] = {"weights.bin": BYTES}
    hub.fail("POST", "/commit/", 503)
    hub.fail("GET", "/resolve/", 503)
    hub.fail("GET", "whoami", 500, body=b"<html>no</html>")
    script = """
for function in (lambda: upload("other.bin"), download, api.whoami):
    try:
        function()
        raise AssertionError
    except HfHubHTTPError as error:
        assert error.response.status_code in (500, 503)
"""
    run(FAULTS + script)
    assert hub.files["tester/thing"] == {"weights.bin": BYTES}
    assert [path for method, path in hub.log if "whoami" in path or "/commit/" in path] == [
        "/api/models/tester/thing/commit/main",
        "/api/whoami-v2",
    ]


def test_parts_of_a_file_can_be_asked_for(hub):
    hub.files["tester/thing"] = {"weights.bin": BYTES}
    connection = HTTPConnection("127.0.0.1", hub.server.server_port)

    def ask(part):
        connection.request("GET", "/tester/thing/resolve/main/weights.bin", headers={"Range": f"bytes={part}"})
        response = connection.getresponse()
        return response.status, response.read(), response.headers["Content-Range"]

    assert ask("0-0") == (206, BYTES[:1], "bytes 0-0/256000")
    assert ask("5-9") == (206, BYTES[5:10], "bytes 5-9/256000")
    assert ask("255990-") == ask("-10") == ask("255990-300000") == (206, BYTES[-10:], "bytes 255990-255999/256000")
    assert ask("256000-") == (416, b"", "bytes */256000")
    connection.close()


DATASETS = """
import io
import numpy as np
from PIL import Image
from datasets import Dataset, DatasetDict, Features, Image as ImageFeature, Value, load_dataset

def make_image(seed):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, 32, 3), dtype=np.uint8)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}

def make(seeds):
    rows = {"prompt": [f"prompt {seed}" for seed in seeds], "image": [make_image(seed) for seed in seeds]}
    return Dataset.from_dict(rows, Features({"prompt": Value("string"), "image": ImageFeature()}))

def check(dataset, there):
    rows = list(there)
    assert len(rows) == len(dataset)
    for here, row in zip(dataset, rows, strict=True):
        assert here["prompt"] == row["prompt"]
        assert here["image"].tobytes() == row["image"].convert("RGB").tobytes()

both = DatasetDict(train=make(range(12)), test=make(range(12, 15)))
shards = {"train": 3, "test": 1}
"""

PUSH = """
first = both.push_to_hub("tester/pairs", num_shards=shards, private=True)
assert both.push_to_hub("tester/pairs", num_shards=shards).oid == first.oid
for split, dataset in both.items():
    check(dataset, load_dataset("tester/pairs", split=split))
"""

STREAM = """
for split, dataset in both.items():
    check(dataset, load_dataset("tester/pairs", split=split, streaming=True))

first = api.dataset_info("tester/pairs").sha
smaller = DatasetDict(train=make(range(2)))
smaller.push_to_hub("tester/pairs")
check(smaller["train"], load_dataset("tester/pairs", split="train"))
check(both["test"], load_dataset("tester/pairs", split="test", revision=first, streaming=True))
"""


def test_datasets_are_pushed_loaded_and_streamed(hub, run):
    run(DATASETS + PUSH)
    files = dict(hub.files["datasets/tester/pairs"])
    names = {f"data/train-0000{index}-of-00003.parquet" for index in range(3)} | {"data/test-00000-of-00001.parquet"}
    assert set(files) == {"README.md"} | names
    assert hub.repository("datasets/tester/pairs").settings["private"]
    assert sorted(hub.uploads) == sorted(sha256(files[name]) for name in names)
    assert len(hub.commits["datasets/tester/pairs"]) == 1

    hub.drop("GET", "/resolve/.*train-00001.*", after=1000)
    hub.fail("GET", "/resolve/.*train-00002.*", 503)
    run(DATASETS + STREAM)
    assert not any(fault.times for fault in hub.faults)
    assert set(hub.files["datasets/tester/pairs"]) == {"README.md", "data/train-00000-of-00001.parquet"}
    assert len(hub.uploads) == 5 and len(hub.commits["datasets/tester/pairs"]) == 2


def test_what_the_hub_does_not_know_is_told(tmp_path):
    with HubStub() as hub:
        script = "import huggingface_hub as h\ntry: list(h.list_models())\nexcept Exception as error: print(error)"
        environment = os.environ | hub.environment | {"HF_HOME": str(tmp_path)}
        output = run_python(["-c", script], env=environment)
    assert "GET /api/models is not part of this Hub" in output.stdout
    assert hub.unknown == [("GET", "/api/models")] and hub.unknown[0] in hub.log
