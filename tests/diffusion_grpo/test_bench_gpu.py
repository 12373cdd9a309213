"""The bench of one GPU runs at tiny size on the CPU, goes on with what it has, and notes what does not fit."""

import json
import math

import pytest
import torch

from recipes import bench_gpu


@pytest.mark.parametrize("only", ["FLUX.1-dev: NF4", "Qwen-Image with guidance: filter, window 2", "LoRA"])
def test_rows_are_measured_and_not_run_again(tmp_path, only, capsys):
    argv = ["--tiny", "--output", str(tmp_path / "bench"), "--only", only]
    results = bench_gpu.main(argv)
    assert results["rows"] and "torch" in results["about"]["versions"]
    for name, row in results["rows"].items():
        assert only in name and "note" not in row, row
        rate = row.get("images_per_second", row.get("pairs_per_second"))
        assert math.isfinite(rate) and rate > 0
    assert capsys.readouterr().out
    table = (tmp_path / "bench.md").read_text()
    assert all(f"| {name} |" in table for name in results["rows"])

    assert bench_gpu.main(argv)["rows"] == results["rows"] == json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert not capsys.readouterr().out

    with pytest.raises(SystemExit, match=r"bench\.json holds rows of other settings: .*'tiny': True.*'tiny': False"):
        bench_gpu.main(argv[1:])  # at true size


def test_a_row_that_is_not_there_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        bench_gpu.main(["--tiny", "--output", str(tmp_path / "bench"), "--only", "nothing"])
    assert "no row has 'nothing' in its name" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("no such kernel")])
def test_what_does_not_fit_is_noted(error):
    def fail(device):
        raise error

    row = bench_gpu.run_row(fail, torch.device("cpu"), 1.0)
    assert str(error) in row["note"]
    about = {"device": "CPU", "versions": {}, "ceiling": 1.0, "command": "", "settings": {"tiny": True}}
    assert str(error) in bench_gpu.to_markdown({"about": about, "rows": {"a row": row}})


@pytest.mark.parametrize(
    ("device", "is_tiny", "rate", "verdict"),
    [("NVIDIA H100", False, 0.99, "is missed"), ("NVIDIA H100", False, 1.01, "is passed"), ("CPU", True, 5.0, "")],
)
def test_the_mark_is_judged_at_true_size_only(device, is_tiny, rate, verdict):
    about = {"device": device, "versions": {}, "ceiling": 1.0, "command": "", "settings": {"tiny": is_tiny}}
    name = "FLUX.1-dev: filter, window 2, compile"
    table = bench_gpu.to_markdown({"about": about, "rows": {name: {"images_per_second": rate}}})
    assert ("the mark" in table) == bool(verdict) and verdict in table
