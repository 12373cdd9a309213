"""The part of a preference dataset that scorers are compared on."""

SPLIT = "benchmark"
# number → how many changes the pairs have that it is about; `None`: any number
NUMBERS: dict[str, frozenset[int] | None] = {
    "accuracy": None,
    "accuracy, 1 change": frozenset({1}),
    "accuracy, 2-3 changes": frozenset({2, 3}),
}
