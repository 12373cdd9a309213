"""The folder of a Space: what the Hub reads, what pip reads, and an app that runs anywhere."""

import ast
import os
import re
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from huggingface_hub import SpaceCard
from packaging.requirements import Requirement
from packaging.version import Version

import trl_spatial
from trl_spatial.scripts.space import main, make_parser
from trl_spatial.space.build import APP, build_space, fill_constants


REPOSITORY = Path(__file__).parents[2]
COLORS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}


def run(*arguments):
    main(*make_parser().parse_args_and_config([str(argument) for argument in arguments]))


def constants(path):
    """Values of the constants of a module."""
    return {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and isinstance(node.value, (ast.Constant, ast.List))
    }


@pytest.fixture
def space(tmp_path):
    """A folder that the command has written."""
    run("build", tmp_path / "space", "--model", "ORG/SpatialScore-7B", "--title", 'Which image: “A” or "B"?')
    return tmp_path / "space"


def test_the_front_matter_is_what_the_hub_reads(space):
    text = (space / "README.md").read_text(encoding="utf-8")
    head, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", text, re.S).groups()
    data = yaml.safe_load(head)
    assert data["title"] == 'Which image: “A” or "B"?'
    assert data["sdk"] == "gradio" and data["app_file"] == "app.py" and data["license"] == "apache-2.0"
    assert len(data["emoji"]) == 1 and not data["emoji"].isascii()
    assert {data["colorFrom"], data["colorTo"]} <= COLORS
    assert data["models"] == ["ORG/SpatialScore-7B"]
    assert 0 < len(data["short_description"]) <= 60
    assert isinstance(data["sdk_version"], str) and isinstance(data["python_version"], str)
    assert SpaceCard(text).data.to_dict() == data
    assert "https://huggingface.co/ORG/SpatialScore-7B)" in body and not re.search(r"[{}]", body)
    assert f"up to {constants(APP)['MAX_IMAGES']} images" in body


def test_the_versions_are_those_of_the_package(space):
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (space / "requirements.txt").read_text(encoding="utf-8").splitlines()
    ours, gradio = map(Requirement, lines)
    assert (ours.name, gradio.name) == ("trl-spatial", "gradio")
    assert ours.specifier.contains(trl_spatial.__version__, prereleases=True) and not ours.specifier.contains("0.0.9")
    assert [str(gradio)] == [str(Requirement(line)) for line in project["optional-dependencies"]["space"]]
    data = SpaceCard.load(space / "README.md").data
    lowest = next(part.version for part in gradio.specifier if part.operator == ">=")
    assert Version(data.sdk_version) == Version(lowest) and data.sdk_version.count(".") == 2
    assert Requirement(f"python{project['requires-python']}").specifier.contains(data.python_version)


def test_the_app_is_the_packages_with_its_constants_filled_in(space):
    path = space / "app.py"
    compile(path.read_text(encoding="utf-8"), "app.py", "exec")
    assert constants(path) == constants(APP) | {
        "MODEL_ID": "ORG/SpatialScore-7B", "TITLE": "Which image: “A” or \"B\"?",
    }  # fmt: skip
    imported = {
        node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.Import, ast.ImportFrom))
    }
    assert imported - set(sys.stdlib_module_names) == {
        "gradio", "torch", "trl_spatial", "trl_spatial.gaussian_reward.losses",
    }  # fmt: skip


def test_nothing_is_of_this_machine(space):
    assert {path.name for path in space.iterdir()} == {"app.py", "requirements.txt", "README.md"}
    here = {str(REPOSITORY), str(space), str(space.parent), str(Path.home()), os.getcwd(), socket.gethostname()}
    for path in space.iterdir():
        text = path.read_text(encoding="utf-8")
        assert not [name for name in here if len(name) > 1 and name in text]
        assert not re.search(r"(?<![\w/.:])/(home|root|tmp|work|Users|mnt|data)\b", text)


def test_a_revision_and_an_own_model_are_named_in_full(tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_SPATIAL_NAMESPACE", "someone")
    build_space(tmp_path, "hub/SpatialScore-7B@v1.0")
    values = constants(tmp_path / "app.py")
    assert values["MODEL_ID"] == "someone/SpatialScore-7B@v1.0" and values["TITLE"] == "SpatialScore-7B"
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert SpaceCard(text).data.models == ["someone/SpatialScore-7B"]
    assert "[someone/SpatialScore-7B@v1.0](https://huggingface.co/someone/SpatialScore-7B)" in text


def test_a_local_model_is_refused(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(checkpoint.parent)
    (checkpoint.parent / "org").mkdir(exist_ok=True)
    (checkpoint.parent / "org" / "model").mkdir(exist_ok=True)
    for model in (checkpoint, checkpoint.name, "org/model"):
        with pytest.raises(ValueError, match=r"on this machine.*Push the model to the Hub.*space serve --model"):
            run("build", tmp_path / "space", "--model", model)
    assert not (tmp_path / "space").exists()


@pytest.mark.parametrize("model", ["SpatialScore-7B", "a/b/c", "org/two words", "./org/model", "org/'\"; x = 1 #", ""])
def test_what_is_no_name_of_the_hub_is_refused(tmp_path, model):
    with pytest.raises(ValueError):
        build_space(tmp_path / "space", f"{model}" or "/no/path")
    assert not (tmp_path / "space").exists()


def test_a_title_is_one_line(tmp_path):
    for title in ("", "  ", "two\nlines", "bell\a"):
        with pytest.raises(ValueError, match="not one line"):
            build_space(tmp_path / "space", "org/model", title)
    build_space(tmp_path / "space", "org/model", 'a \\" {title} <b>')
    assert constants(tmp_path / "space" / "app.py")["TITLE"] == 'a \\" {title} <b>'


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "app.py").write_text("mine")
    with pytest.raises(ValueError, match="not an empty folder"):
        run("build", tmp_path, "--model", "ORG/SpatialScore-7B")
    assert [path.name for path in tmp_path.iterdir()] == ["app.py"]


def test_a_constant_that_is_not_there_once_is_an_error():
    assert fill_constants('A = "1"\nB = "2"\n', A='"') == 'A = "\\""\nB = "2"\n'
    for source in ('B = "2"\n', 'A = "1"\nA = "2"\n'):
        with pytest.raises(ValueError, match="one line with the constant A"):
            fill_constants(source, A="x")


def test_help_and_build_need_no_gradio(tmp_path):
    code = f"""
import sys
sys.modules["gradio"] = None
from trl_spatial.scripts.space import main, make_parser
for action in ([], ["build"], ["serve"]):
    try:
        make_parser().parse_args_and_config([*action, "--help"])
    except SystemExit as end:
        assert not end.code
main(*make_parser().parse_args_and_config(["build", {str(tmp_path / "space")!r}, "--model", "org/model"]))
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "hf upload" in result.stdout and (tmp_path / "space" / "app.py").is_file()


# ---------------------------------------------------------------- what `serve` refuses


def test_serving_without_gradio_says_what_to_install(checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ValueError, match=re.escape('pip install "trl-spatial[space]"')):
        run("serve", "--model", checkpoint)


def test_serving_refuses_what_cannot_be_served(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="--model, a folder or a name on the Hub, or --dir"):
        run("serve")
    with pytest.raises(ValueError, match=r"has no app.py: `trl_spatial space build`"):
        run("serve", "--dir", tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"Cannot listen on 127.0.0.1, port {port} .*--port"):
            run("serve", "--model", checkpoint, "--port", port)
    with pytest.raises(ValueError, match=r"Cannot listen on .* port 65536 .*--port"):
        run("serve", "--model", checkpoint, "--port", 65536)


def test_the_app_of_a_folder_is_run_as_a_space_runs_it(checkpoint, tmp_path):
    """With modules beside it, and with the model, the address and the port that were asked for."""
    (tmp_path / "beside.py").write_text("NAMES = ['MODEL_ID', 'GRADIO_SERVER_NAME', 'GRADIO_ANALYTICS_ENABLED']")
    (tmp_path / "app.py").write_text("import os, beside\nprint(__name__, *[os.environ[n] for n in beside.NAMES])")
    command = [sys.executable, "-m", "trl_spatial.scripts.space", "serve", "--dir", tmp_path, "--model", checkpoint,
               "--port", "0"]  # fmt: skip
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["__main__", str(checkpoint), "127.0.0.1", "False"]
