"""Controls: altered prompts for the pairs of a dataset, which show whether a scorer reads the prompt."""

import re
from collections.abc import Sequence

import numpy as np

from ..scenes import describe_scene, mirror, parse_description


GIVEN = "given"  # the unaltered pairs
# Control → its effect on a pair, and the expected result.
CONTROLS = {
    "flip": "both images mirrored, left and right swapped in the prompt: the verdict should stay the same",
    "image_only": "the same empty prompt for all pairs: about half should be right",
    "prompt_swap": "the prompt of another pair: about half should be right",
}
NEUTRAL_PROMPT = "A picture."

_EXCHANGED = {
    "left": "right",
    "leftmost": "rightmost",
    "leftward": "rightward",
    "leftwards": "rightwards",
    "clockwise": "counterclockwise",
}
_EXCHANGED |= {new: old for old, new in _EXCHANGED.items()} | {
    "counter-clockwise": "clockwise",
    "anticlockwise": "clockwise",
    "anti-clockwise": "clockwise",
}
_SIDE = re.compile(rf"\b(?:{'|'.join(sorted(_EXCHANGED, key=len, reverse=True))})\b", re.IGNORECASE)
# After these words, "left" or "right" is a place: "on the right behind the sofa".
_PLACED = re.compile(
    r"(?:\b(?:the|its|his|her|their|your|my|our|far|upper|lower|top|bottom|front|back|rear|middle|center|centre|to|from)"
    r"|'s|[-–/])\s*$",
    re.IGNORECASE,
)
# Before these words, it is not: "right behind the sofa", "left open", "a right angle".
_NOT_PLACED = {
    "right": re.compile(
        r"\s+(?:next|beside|besides|by|near|in|on|at|above|below|over|under|underneath|beneath|behind|before|after|against|"
        r"around|between|inside|outside|through|up|down|into|onto|out|off|away|along|alongside|across|where|when|now|here|"
        r"there|angles?|angled|triangles?|side up|way up)\b",
        re.IGNORECASE,
    ),
    "left": re.compile(
        r"\s+(?:behind|over|open|ajar|alone|unattended|empty|blank|bare|untouched|unfinished|out|lying|standing|hanging|"
        r"on|in|by|at|to\s+\w+)\b",
        re.IGNORECASE,
    ),
}  # fmt: skip


def exchange_sides(text: str) -> str:
    """
    Exchanges left and right in a text to fit the mirrored image, including leftmost, clockwise and the like. Words
    that look the same but name no side stay: "right behind the sofa", "left open". East and west also stay.

    Example:

    ```python
    >>> exchange_sides("A mug to the left of a plate, right next to a lamp on the right.")
    'A mug to the right of a plate, right next to a lamp on the left.'
    ```
    """

    def exchange(found: re.Match[str]) -> str:
        word = found[0]
        rule = _NOT_PLACED.get(word.lower())
        is_placed = _PLACED.search(text, 0, found.start()) is not None
        if rule is not None and not is_placed and rule.match(text, found.end()):
            return word
        new = _EXCHANGED[word.lower()]
        return new.upper() if word.isupper() else new.capitalize() if word[0].isupper() else new

    return _SIDE.sub(exchange, text)


def mirror_text(prompt: str) -> str:
    """
    Returns the prompt of the mirrored image: for a description of a flat scene, a new description, of the same length,
    of the mirrored scene; for any other prompt, the result of [`exchange_sides`].
    """
    try:
        graph = parse_description(prompt)
    except ValueError:
        return exchange_sides(prompt)
    if not graph.entities:
        return exchange_sides(prompt)
    is_long = prompt.count(".") > len(graph.relations)
    return describe_scene(mirror(graph), seed=len(prompt), length="long" if is_long else "short")


def swap_prompts(prompts: Sequence[str], clusters: Sequence[int], rng: np.random.Generator) -> list[str] | None:
    """
    Gives every pair the prompt of a pair of another cluster; each prompt is given once, unless one cluster holds more than
    half of the pairs.

    Args:
        prompts (`Sequence[str]` of length `num_pairs`):
            The prompts.
        clusters (`Sequence[int]` of length `num_pairs`):
            Cluster of each pair. Pairs with equal prompts are in one.
        rng (`np.random.Generator`):
            Source of the order.

    Returns:
        `list[str]` of length `num_pairs`: The prompts, exchanged; `None` if all pairs are in one cluster.
    """
    _, cluster_of, sizes = np.unique(np.asarray(clusters), return_inverse=True, return_counts=True)
    num_pairs = len(prompts)
    if len(sizes) < 2:
        return None
    # With pairs sorted by cluster and shifted by the largest cluster, no pair gets a prompt of its own cluster.
    order = np.lexsort((rng.permutation(num_pairs), rng.permutation(len(sizes))[cluster_of]))
    sources = np.empty(num_pairs, dtype=int)
    sources[order] = np.roll(order, -int(sizes.max()))
    for index in np.flatnonzero(cluster_of[sources] == cluster_of):
        sources[index] = rng.choice(np.flatnonzero(cluster_of != cluster_of[index]))
    return [prompts[source] for source in sources]


def prompts_of(control: str, prompts: Sequence[str], clusters: Sequence[int]) -> list[str] | None:
    """
    The prompts of a control, or of the pairs as they are.

    Args:
        control (`str`):
            `GIVEN` or a name of `CONTROLS`.
        prompts (`Sequence[str]` of length `num_pairs`), clusters (`Sequence[int]` of length `num_pairs`):
            The prompts of the pairs, and their clusters.

    Returns:
        `list[str]` of length `num_pairs`: A prompt for each pair; `None` if these pairs do not allow the control.
    """
    if control == "flip":
        return [mirror_text(prompt) for prompt in prompts]
    if control == "image_only":
        return [NEUTRAL_PROMPT] * len(prompts)
    if control == "prompt_swap":
        return swap_prompts(prompts, clusters, np.random.default_rng(0))
    return list(prompts)
