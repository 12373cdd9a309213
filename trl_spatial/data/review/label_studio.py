"""Exchange with Label Studio: exports pairs as tasks and imports its annotations as votes."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from .votes import ANSWERS, VERSION, ReviewItem


# For users to paste into the labeling interface of their project.
LABELING_CONFIG = """<View>
  <Text name="prompt" value="$prompt"/>
  <View style="display: flex; gap: 1em">
    <Image name="left" value="$left"/>
    <Image name="right" value="$right"/>
  </View>
  <Choices name="answer" toName="prompt" choice="single-radio" showInline="true">
    <Choice value="left" hotkey="1"/>
    <Choice value="right" hotkey="2"/>
    <Choice value="both" hotkey="3"/>
    <Choice value="neither" hotkey="4"/>
    <Choice value="cannot_tell" hotkey="5"/>
  </Choices>
</View>
"""


def to_label_studio(items: Sequence[ReviewItem], votes: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """
    Makes tasks of Label Studio for `LABELING_CONFIG`, with the images in them.

    Args:
        items (`Sequence[ReviewItem]`):
            The pairs. Every second one has the edited image at the left.
        votes (`Iterable[Mapping[str, Any]]`):
            The current votes, which become annotations.

    Returns:
        `list[dict]`: as JSON, to be imported.
    """
    given: dict[str, list[Mapping[str, Any]]] = {}
    for vote in votes:
        given.setdefault(vote["item"], []).append(vote)
    tasks = []
    for number, item in enumerate(items):
        order = ["original", "edited"] if number % 2 == 0 else ["edited", "original"]
        left, right = (
            f"data:image/png;base64,{base64.b64encode(item.images[side].read_bytes()).decode()}" for side in order
        )
        data = {"item": item.id, "prompt": item.prompt, "order": order, "left": left, "right": right}
        annotations = [
            {
                "result": [_result(_seen_in(vote, order)) | {"id": vote["id"]}],
                "completed_by": {"email": vote["reviewer"]},
                "lead_time": vote["milliseconds"] / 1000,
            }
            for vote in given.get(item.id, [])
        ]
        tasks.append({"data": data, "annotations": annotations})
    return tasks


def _result(answer: str) -> dict[str, Any]:
    return {"from_name": "answer", "to_name": "prompt", "type": "choices", "value": {"choices": [answer]}}


def _seen_in(vote: Mapping[str, Any], order: Sequence[str]) -> str:
    """Returns the answer of a vote as it reads with the images in the given order."""
    if vote["answer"] not in ("left", "right") or list(vote["order"]) == list(order):
        return vote["answer"]
    return "right" if vote["answer"] == "left" else "left"


def from_label_studio(export: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """
    Makes votes from an export of Label Studio (JSON).

    Args:
        export (`Sequence[Mapping[str, Any]]`):
            Its tasks. Annotations that were cancelled or are empty are left out.

    Returns:
        `list[dict]`: the votes.

    Raises:
        `ValueError`: If a task is not one of [`to_label_studio`], or an answer is unknown. The message names the task.
    """
    votes = []
    if not isinstance(export, Sequence) or not all(isinstance(task, Mapping) for task in export):
        raise ValueError("An export of Label Studio is a list of tasks: export in JSON format.")
    for task in export:
        name = f"Task {task.get('id', '?')}"
        data = task.get("data") or {}
        if not {"item", "order"} <= data.keys():
            raise ValueError(f"{name} has no `item` and `order` in its data: it was not made from this dataset.")
        for annotation in task.get("annotations") or []:
            results = [result for result in annotation.get("result") or [] if result.get("from_name") == "answer"]
            chosen = [choice for result in results for choice in result["value"]["choices"]]
            if annotation.get("was_cancelled") or not chosen:
                continue
            if len(chosen) != 1 or chosen[0] not in ANSWERS:
                raise ValueError(f"{name} has the answer {chosen}. It should be one of {', '.join(ANSWERS)}.")
            by = annotation.get("completed_by")
            reviewer = by.get("email") or by.get("id") if isinstance(by, Mapping) else by
            votes.append(
                {
                    # an annotation made from a vote keeps that vote's id
                    "id": results[0].get("id") or f"label-studio-{data['item']}-{annotation.get('id', reviewer)}",
                    "item": data["item"],
                    "reviewer": str(reviewer),
                    "answer": chosen[0],
                    "order": list(data["order"]),
                    "ticks": {},
                    "milliseconds": round(1000 * (annotation.get("lead_time") or 0)),
                    "version": VERSION,
                    "time": annotation.get("created_at") or datetime.now().astimezone().isoformat(timespec="seconds"),
                }
            )
    return votes
