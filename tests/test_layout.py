"""The import graph, the public names and the declared dependencies are what CONTRIBUTING.md and pyproject.toml say."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest


REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "trl_spatial"

# The house, floor by floor: a room imports rooms of lower floors only. CONTRIBUTING.md says what each holds.
FLOORS = [
    {"preferences", "statistics", "figures", "store", "scenes", "hub", "cli", "yaml_text", "waiting"},
    {"endpoints"},
    {"generation", "training"},
    {"gaussian_reward", "diffusion_grpo", "judges"},
    {"rewards"},
    {"data", "evaluation", "serving", "space"},
    {"demo"},
    {"scripts"},
]
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
DOORS = {"__init__", "__main__"}  # `__main__` starts the command line; `__init__` names what users import
# Distributions whose import name differs.
IMPORT_NAMES = {"pillow": "PIL", "pyyaml": "yaml", "types-pyyaml": "yaml", "types-requests": "requests"}


def imports_of(path: Path) -> tuple[set[str], set[str]]:
    """Parts of the package and top-level modules of others that a file imports, whether at its top or in a function."""
    parts, others = set(), set()
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules = [(node.module or "").split(".")]
        elif isinstance(node, ast.ImportFrom) and node.level == depth:
            modules = [[PACKAGE.name, name] for name in ([node.module.split(".")[0]] if node.module else
                                                         [alias.name for alias in node.names])]  # fmt: skip
        else:
            continue
        for module in modules:
            if module[0] == PACKAGE.name:
                parts.update(module[1:2])
            else:
                others.add(module[0])
    return parts, others


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def public_names() -> dict[str, str]:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    return next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "_PUBLIC_NAMES"
    )


def test_every_room_has_its_floor():
    assert {part_of(path) for path in PACKAGE.rglob("*.py")} - DOORS == set(FLOOR_OF)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_from_lower_floors(path):
    parts, _ = imports_of(path)
    # `from .. import SpatialScore` is an import of the module that defines the public name
    parts = {public_names().get(part, part).split(".")[0] for part in parts} - {part_of(path), "__version__"}
    if part_of(path) in DOORS:
        assert parts <= {"cli"}
    else:
        assert {part: FLOOR_OF[part] for part in parts if FLOOR_OF[part] >= FLOOR_OF[part_of(path)]} == {}


def test_diffusers_is_imported_only_where_images_are_generated():
    users = {part_of(path) for path in PACKAGE.rglob("*.py") if "diffusers" in imports_of(path)[1]}
    assert users <= {"diffusion_grpo", "generation", "demo", "scripts"}


def test_the_server_is_imported_only_where_it_is_made():
    users = {part_of(path) for path in PACKAGE.rglob("*.py") if {"fastapi", "starlette"} & imports_of(path)[1]}
    assert users == {"serving", "data"}


def test_every_import_is_a_declared_dependency():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]

    def import_names(requirements):
        names = [re.match(r"[\w-]+", requirement)[0].lower() for requirement in requirements]
        return {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in names}

    needed = set().union(*(imports_of(path)[1] for path in PACKAGE.rglob("*.py"))) - set(sys.stdlib_module_names)
    optional = import_names(
        line
        for name in ("data", "diffusion", "demo", "judge", "quant", "ray", "serve", "space")
        for line in extras[name]
    )
    assert needed <= import_names(project["dependencies"]) | optional
    assert import_names(project["dependencies"]) - needed <= {"accelerate", "scipy"}


def test_the_makefile_installs_every_extra():
    """In the environment of the tests and in that of the lowest versions."""
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"--editable '\.\[(.*?)\]'", makefile)[1].split(",") == ["dev", *sorted(extras.keys() - {"dev"})]
    assert re.findall(r"--extra (\w+)", makefile) == ["dev", *sorted(extras.keys() - {"dev"})]


def test_every_dependency_has_bounds():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [line for name, lines in project["optional-dependencies"].items() if name != "dev" for line in lines]
    for requirement in project["dependencies"] + extras:
        assert re.search(r">=\d", requirement) and re.search(r"<\d", requirement), requirement


@pytest.mark.parametrize("room", [path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()])
def test_the_names_of_a_room_are_there(room):
    module = importlib.import_module(f"trl_spatial.{room}")
    for name in getattr(module, "__all__", ()):
        assert getattr(module, name) is not None


def test_public_names_resolve():
    import trl_spatial

    assert {
        "DiffusionGRPOConfig", "DiffusionGRPOTrainer", "GaussianRewardConfig", "GaussianRewardTrainer", "SpatialScore",
    } <= set(trl_spatial.__all__)  # fmt: skip
    for name in trl_spatial.__all__:
        assert getattr(trl_spatial, name) is not None
        assert name in dir(trl_spatial)
    with pytest.raises(AttributeError, match="no attribute 'SpatialSkore'"):
        _ = trl_spatial.SpatialSkore


def test_importing_the_package_is_light():
    code = "import sys, trl_spatial, trl_spatial.cli; print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"torch", "transformers", "diffusers", "datasets", "trl", "numpy", "PIL"} & set(modules)


def test_only_the_agreed_names_at_the_top():
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    if files.returncode:
        pytest.skip("not a git checkout")
    top = {path.split("/")[0] for path in files.stdout.splitlines()}
    assert {name for name in top if not name.startswith(".")} <= {
        "trl_spatial", "recipes", "hub_cards", "tests", "pyproject.toml", "Makefile", "README.md", "LICENSE",
        "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "CITATION.cff",
    }  # fmt: skip


def test_the_wheel_holds_what_the_package_needs(tmp_path):
    import zipfile

    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=REPOSITORY, check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    here = {
        str(path.relative_to(REPOSITORY))
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    readme = "trl_spatial/hub_cards/README.md"  # describes the templates, and is none
    cards = {f"trl_spatial/hub_cards/{path.name}" for path in (REPOSITORY / "hub_cards").glob("*.md")} - {readme}
    assert here | cards <= names and readme not in names
    assert cards
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"trl_spatial"}
