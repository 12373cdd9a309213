"""The split of a preference dataset on which scorers are compared."""

SPLIT = "benchmark"
# metric → numbers of changes of the pairs that it covers; `None`: all pairs
NUMBERS: dict[str, frozenset[int] | None] = {
    "accuracy": None,
    "accuracy, 1 change": frozenset({1}),
    "accuracy, 2-3 changes": frozenset({2, 3}),
}
