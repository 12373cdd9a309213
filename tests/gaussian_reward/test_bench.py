"""The bench of reward models compares two ways to the same numbers."""

from recipes.bench import reward as bench


def test_both_ways_are_measured_and_compute_the_same(capsys):
    results = bench.main(["--sizes", "tiny", "--batch_sizes", "8", "--num_rounds", "1"])
    assert [result["name"] for result in results] == ["tiny, train, pairs/s", "tiny, score 8, images/s"]
    assert all(result["difference"] < 1e-4 and result["plain"] > 0 and result["ours"] > 0 for result in results)
    assert "ratio" in capsys.readouterr().out
