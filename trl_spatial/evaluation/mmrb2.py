"""Multimodal RewardBench 2: pairs of generated images, compared by people, that are unlike any scene of ours."""

import json
from pathlib import Path, PurePosixPath
from typing import Any

from datasets import Dataset


MMRB2, NUM_PAIRS = "mmrb2", 1000  # name, and size of the text-to-image task
_FILE = "t2i.json"
_HOW_TO = (
    "Fetch it with the program of its authors (https://github.com/facebookresearch/MMRB2, license CC BY-NC 4.0): "
    "`python benchmark/build_from_hf.py --output-dir FOLDER`"
)


def load_mmrb2(folder: str | Path) -> Dataset:
    """
    Loads the text-to-image task of Multimodal RewardBench 2 ([papers/2512.16899](https://huggingface.co/papers/2512.16899)),
    which users fetch themselves.

    Args:
        folder (`str` or `Path`):
            The output of the authors' program: `t2i.json` and the folder `images`.

    Returns:
        `Dataset`: `prompt`, `chosen` and `rejected` (paths of images) and `source`, the benchmark that the prompt is from.

    Raises:
        `ValueError`: If the folder holds something else, or a pair is not a text prompt with two images; the message
            names the pair.
    """
    folder = Path(folder)
    path = folder / _FILE
    if not path.is_file():
        hint = " It has the answers without their prompts." if any(folder.glob("*_response_only.json")) else ""
        raise ValueError(f"There is no {path}.{hint} {_HOW_TO}.")
    try:
        pairs = json.loads(path.read_bytes())["pairs"]
        rows = [_read_pair(pair, number, folder) for number, pair in enumerate(pairs)]
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is not a list of MMRB2 pairs ({type(error).__name__}: {error}). {_HOW_TO}."
        ) from None
    if not rows:
        raise ValueError(f"{path} has no pairs. {_HOW_TO}.")
    return Dataset.from_list(rows)


def _read_pair(pair: Any, number: int, folder: Path) -> dict[str, str]:
    place = f"{folder / _FILE}, pair {number}"
    if not isinstance(pair, dict):
        raise ValueError(f"{place} is {pair!r}, not a mapping.")
    missing = [key for key in ("prompt_content", "response_a", "response_b") if key not in pair]
    if missing:
        raise ValueError(f"{place} has no {missing[0]}. {_HOW_TO}.")
    # published files call the label `chosen`; the documented format also has `human_preference`
    label = pair.get("chosen", pair.get("human_preference"))
    if label not in ("A", "B"):
        raise ValueError(f"{place}: the chosen answer is {label!r}. It should be 'A' or 'B'.")
    prompt = pair["prompt_content"]
    if not prompt or any(kind != "text" for kind, _ in prompt):
        raise ValueError(f"{place}: the prompt is not text only. Only the text-to-image task can be measured here.")
    images = {name: _find_image(pair[f"response_{name.lower()}"], folder, f"{place}, answer {name}") for name in "AB"}
    return {
        "prompt": "\n".join(text for _, text in prompt),
        "chosen": images[label],
        "rejected": images["B" if label == "A" else "A"],
        "source": pair.get("prompt_source") or "unknown",
    }


def _find_image(answer: dict[str, Any], folder: Path, place: str) -> str:
    parts = answer["response_content"]
    if len(parts) != 1 or parts[0][0] != "image":
        raise ValueError(f"{place} is not one image. Only the text-to-image task can be measured here.")
    name = PurePosixPath(parts[0][1])
    if name.is_absolute() or ".." in name.parts:
        raise ValueError(f"{place} names {name}, which is outside the folder.")
    path = folder / name
    if not path.is_file():
        raise ValueError(f"{place}: there is no image {path}. {_HOW_TO}.")
    return str(path)
