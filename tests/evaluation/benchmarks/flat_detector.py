"""A perfect detector of the flat world."""

from trl_spatial.scenes import locate_objects


def find_things(image):
    """The reply to a question for boxes: a box and a color for each thing of a scene."""
    side = image.width
    boxes = []
    for rank, thing in enumerate(locate_objects(image)):
        box = [thing.x - thing.radius, thing.y - thing.radius, thing.x + thing.radius, thing.y + thing.radius]
        label = f"{thing.color} {thing.shape}"
        boxes.append(
            {"label": label, "score": 0.99 - rank / 1000, "box": [side * edge for edge in box], "color": thing.color}
        )
    return {"size": list(image.size), "boxes": boxes}
