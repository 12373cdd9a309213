import json
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import SpaceCard, SpaceCardData

from ..hub import Reference, card_template, find_reference
from ..hub.checkpoints import Kind


APP = Path(__file__).with_name("app.py")
SPACE = Kind(
    "a Space",
    "space",
    lambda folder: (folder / "app.py").is_file() and (folder / "README.md").is_file(),
    files=("app.py", "requirements.txt", "README.md"),
)
GRADIO_VERSION = "6.30.0"
REQUIREMENTS = f"""\
trl-spatial>={version("trl-spatial")},<1
gradio>=6.30,<7
"""


def build_space(folder: str | Path, model_id: str, title: str | None = None) -> None:
    """
    Writes a Space, `app.py`, `requirements.txt` and `README.md`, into a folder, which is created if missing. Its reward model is
    `org/name`, `org/name@revision`, or `hub/NAME`, whose name is also the title unless another is given.

    Raises:
        `ValueError`: If the model is a local path or its name not one of the Hub, or the title is not one line of text.
    """
    model = find_reference(model_id, kind="model")
    if model.is_local:
        raise ValueError(
            f"{model_id} is on this machine, so a Space cannot read it. Push the model to the Hub and give its id there "
            f"(ORG/NAME), or serve the page from here: trl_spatial space serve --model {model_id}"
        )
    title = model.name.split("/")[1] if title is None else title.strip()
    if not title or not title.isprintable():
        raise ValueError(f"The title {title!r} is not one line of text.")
    contents = {
        "app.py": fill_constants(APP.read_text(encoding="utf-8"), MODEL_ID=str(model), TITLE=title),
        "requirements.txt": REQUIREMENTS,
        "README.md": build_card(model, title),
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_text(content, encoding="utf-8")


def fill_constants(source: str, **constants: str) -> str:
    """Sets constants in the source of a module. Raises `ValueError` unless it has exactly one line `NAME = "..."` for each."""
    lines = source.splitlines(keepends=True)
    for name, value in constants.items():
        places = [index for index, line in enumerate(lines) if line.startswith(f'{name} = "')]
        if len(places) != 1:
            raise ValueError(f"Expected one line with the constant {name}, found {len(places)}.")
        lines[places[0]] = f"{name} = {json.dumps(value, ensure_ascii=False)}\n"
    return "".join(lines)


def build_card(model: Reference, title: str) -> str:
    """Fills the Space's `README.md`: front matter, which the Hub reads, and text."""
    card_data = SpaceCardData(
        title=title,
        emoji="📐",
        colorFrom="blue",
        colorTo="green",
        sdk="gradio",
        sdk_version=GRADIO_VERSION,
        python_version="3.12",
        app_file="app.py",
        license="apache-2.0",
        models=[model.name],
        short_description="Rank images by how well they match a prompt's layout",
    )
    template = card_template("space.md")
    return str(SpaceCard.from_template(card_data, template_path=str(template), title=title, model=model))
