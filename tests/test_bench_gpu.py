"""The bench of one GPU runs at tiny size on the CPU, continues with what it has, and keeps what it measured when something fails."""

import json
import math
import subprocess
import sys
from pathlib import Path

import bench_gpu
import pytest
import torch
from gpu.generator import Generator
from gpu.models import FLUX
from gpu.phases import PhaseTrainer
from gpu.prediction import FLOPS_PER_SECOND, predict
from gpu.rows import Row, all_rows


REPOSITORY = Path(__file__).parents[1]
UPDATE = "FLUX.1-dev: a real update"
ABOUT = {"device": "CPU", "versions": {}, "ceiling": 1.0, "bandwidth": 1.0, "command": "", "settings": {"tiny": True}}
CPU = torch.device("cpu")


@pytest.fixture
def bench(tmp_path):
    def run(*argv):
        return bench_gpu.main(["--tiny", "--output", str(tmp_path / "bench"), *argv])["rows"]

    return run


def test_rows_are_measured_and_not_run_again(bench, tmp_path, capsys):
    names = ["FLUX.1-dev: filter, window 2, NF4", "scoring, 512², windows one by one", "Qwen-Image: encoding"]
    rows = bench("--only", *names)
    assert len(rows) == 3
    for name, row in rows.items():
        assert any(text in name for text in names) and row["note"] == "", row
        assert all(math.isfinite(seconds) and seconds > 0 for seconds in row["seconds"].values())
    assert len(capsys.readouterr().out.splitlines()) >= 3
    table = (tmp_path / "bench.md").read_text()
    assert all(f"| {name} |" in table for name in rows)

    ceiling = json.loads((tmp_path / "bench.json").read_text())["about"]["ceiling"]
    assert bench("--only", *names) == rows
    assert json.loads((tmp_path / "bench.json").read_text())["about"]["ceiling"] == ceiling
    assert not capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"bench\.json holds rows of other settings: .*'tiny': True.*'tiny': False"):
        bench_gpu.main(["--output", str(tmp_path / "bench")])  # at true size


def test_a_real_update_is_evaluated_saved_and_resumed(bench):
    (row,) = bench("--only", UPDATE).values()
    assert row["note"] == "" and row["num_evaluations"] == 2 and row["num_updates_resumed"] == 1
    assert all(size > 0 for size in row["estimated_gib"].values())
    assert list(row).index("estimated_gib") < list(row).index(
        "num_updates_resumed"
    )  # kept if time runs out in between
    seconds = row["seconds"]
    assert {"encode", "sample", "decode", "reward", "reference", "train", "optimizer"} <= seconds.keys()
    parts = sum(value for phase, value in seconds.items() if phase != "step")
    assert math.isclose(parts, seconds["step"], rel_tol=1e-6)  # no phase is counted twice
    assert math.isclose(row["images_per_second"], 4 / seconds["step"], rel_tol=1e-6)


def test_training_of_the_reward_model_is_measured_with_and_without_vision_gradients(bench):
    rows = bench("--only", "training, 512²", "vision tower")
    assert len(rows) == 3 and all(row["pairs_per_second"] > 0 and row["note"] == "" for row in rows.values())


def test_settings_are_those_of_the_recipes(tmp_path):
    class Args:
        size, num_images, batch_size, tiny = 512, 24, 4, False

    flux = Generator(FLUX, "grpo_flux.yaml", 512).config(str(tmp_path), Args)
    assert (flux.beta, flux.top_k, flux.num_inference_steps, flux.sde_window_size) == (0.01, 6, 6, None)
    assert flux.gradient_accumulation_steps == 3 and flux.num_prompts_per_device == 1
    qwen = Generator(FLUX, "grpo_qwen_image.yaml", 512).config(str(tmp_path), Args)
    assert (qwen.num_inference_steps, qwen.guidance_scale, qwen.sde_window_size) == (10, 4.0, 2)


def test_peaks_are_those_of_the_phase_that_ends(monkeypatch):
    trainer = PhaseTrainer.__new__(PhaseTrainer)
    monkeypatch.setattr(PhaseTrainer, "args", type("Args", (), {"device": torch.device("cuda")}), raising=False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    trainer._timer, trainer.peaks = type("Timer", (), {"_running": []}), {"sample": 0, "rest": 0}
    for peak, running in ((5, []), (9, ["sample"]), (7, ["sample"]), (8, ["train", "sample"])):
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device, peak=peak: peak)
        trainer._timer._running = running
        trainer._end_of_phase()
    assert trainer.peaks == {"sample": 9, "rest": 5}


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("no such kernel"), AttributeError("gone")]
)
def test_what_fails_is_noted_and_keeps_what_it_had_measured(tmp_path, error):
    def measure(args, device, report):
        report({"images_per_second": 3.0, "seconds": {"sample": 1.0}})
        raise error

    results = bench_gpu.Results(str(tmp_path / "bench"))
    results.about = ABOUT
    bench_gpu.run_row("a row", Row(measure, 1.0), None, CPU, results)
    (row,) = bench_gpu.Results(str(tmp_path / "bench")).rows.values()
    assert row["images_per_second"] == 3.0 and row["seconds"] == {"sample": 1.0} and str(error) in row["note"]
    table = (tmp_path / "bench.md").read_text()
    assert str(error) in table and "3 images" in table


def test_a_row_that_ended_the_program_is_not_run_again(tmp_path):
    def measure(args, device, report):
        raise KeyboardInterrupt

    results = bench_gpu.Results(str(tmp_path / "bench"))
    results.about = ABOUT
    with pytest.raises(KeyboardInterrupt):
        bench_gpu.run_row("a row", Row(measure, 1.0), None, CPU, results)
    assert bench_gpu.Results(str(tmp_path / "bench")).rows == {"a row": {"note": "did not end"}}


@pytest.mark.parametrize("content", ["", '{"rows": {', "[1]", '{"rows": {}}', '{"rows": [1], "about": {}}'])
def test_a_damaged_file_is_named_and_left_as_it_is(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(SystemExit, match=r"run\.json is damaged .*Repair or remove it"):
        bench_gpu.Results(str(tmp_path / "run"))
    assert (tmp_path / "run.json").read_text() == content


def test_outputs_whose_names_have_dots_are_files_of_their_own(tmp_path):
    assert bench_gpu.Results(str(tmp_path / "run.1")).path == tmp_path / "run.1.json"


def test_no_row_is_begun_that_would_not_fit_into_the_minutes(bench, capsys):
    assert bench("--minutes", "0.5") == {}
    first, row = next(iter(all_rows().items()))
    assert f"{first} may take {row.minutes:g} minutes more" in capsys.readouterr().out


def test_a_row_that_is_not_there_is_named(bench, tmp_path, capsys):
    with pytest.raises(SystemExit):
        bench("--only", "nothing", "nowhere")
    assert "no row has 'nothing' or 'nowhere' in its name" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench("--only", "SpatialScore-7B", "nowhere")
    assert "no row has 'nowhere' in its name" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("device", "is_tiny", "rate", "verdict"),
    [("NVIDIA H100", False, 0.99, "is missed"), ("NVIDIA H100", False, 1.01, "is passed"), ("CPU", True, 5.0, "")],
)
def test_the_mark_is_judged_at_true_size_only(device, is_tiny, rate, verdict):
    name = "FLUX.1-dev: filter, window 2, compile"
    about = ABOUT | {"device": device, "settings": {"tiny": is_tiny}}
    table = bench_gpu.to_markdown(about, {name: {"images_per_second": rate, "note": ""}})
    assert ("the mark" in table) == bool(verdict) and verdict in table


def test_marks_are_of_rows_that_there_are():
    assert bench_gpu.MARKS.keys() <= all_rows().keys()


def test_predictions_of_the_readme_are_those_of_the_counts(capsys):
    assert bench_gpu.main(["--predict"]) == {}
    table = capsys.readouterr().out
    assert table.strip() in (REPOSITORY / "recipes" / "bench" / "README.md").read_text(encoding="utf-8")
    predictions = predict()
    assert predictions.keys() <= all_rows().keys()
    rates = [
        predictions[f"FLUX.1-dev: {lever}"].rate for lever in ("all images, all steps", "filter", "filter, window 2")
    ]
    assert rates == sorted(rates)  # each lever saves passes
    for prediction in predictions.values():  # reading and writing takes time too
        assert prediction.rate is None or 0 < prediction.rate < FLOPS_PER_SECOND / prediction.flops


def test_it_needs_neither_trl_nor_gradio():
    program = (
        "import gc, sys; gc.disable(); "  # a third faster
        "sys.modules.update(dict.fromkeys(['trl', 'gradio', 'fastapi', 'matplotlib'])); import bench_gpu"
    )
    subprocess.run(
        [sys.executable, "-c", program], env={"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'recipes'}"}, check=True
    )
