"""`trl_spatial evaluate images`, `replay` and `compare` on the example rows of every benchmark, drawn by the renderer `flat`."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from trl_spatial.cli import main
from trl_spatial.evaluation.benchmarks import BENCHMARKS, make_benchmark
from trl_spatial.evaluation.image_run import ImageRun


JUDGES = {
    "vision": "simple_judges:Guessing",
    "detector": "flat",
    "second_detector": "flat",
    "colors": "flat",
    "depth": "flat",
}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def command(name, output="run", **options):
    judges = {role: JUDGES[role] for role in make_benchmark(name).judges}
    if name == "geneval2":
        judges["vision"] = "simple_judges:chances"
    given = {"benchmark": name, "data": "example", "generator": "flat", "output_dir": output, **judges, **options}
    flags = [part for key, value in given.items() if value is not None for part in (f"--{key}", str(value))]
    return ["evaluate", "images", *flags, "--skip_self_test"]


def results(folder="run"):
    return json.loads(Path(folder, "results.json").read_text())


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_from_its_prompts_to_its_page(name, capsys):
    assert main(command(name)) == 0
    found = results()
    run = ImageRun(Path("run"))
    assert found["num_images"] == len(run.items) * run.benchmark.num_images > 0
    assert found["protocols"].keys() == {"official", "fixed"}
    assert any(row["is_headline"] and row["estimate"] is not None for row in found["protocols"]["fixed"]["numbers"])
    assert "image missing" not in found["failures"]["counts"]
    page = Path("run/report.html").read_text()
    assert found["title"] in page
    assert "<script" not in page
    # from the records alone
    shutil.rmtree("run/images")
    Path("run/results.json").unlink()
    assert main(["evaluate", "replay", "run"]) == 0
    assert results() == found
    assert found["title"] in capsys.readouterr().out


@pytest.mark.parametrize("name", ["spatialbench-uc", "visor"])
def test_exact_pictures_are_right_by_exact_judges(name):
    assert main(command(name)) == 0
    headline = next(row for row in results()["protocols"]["fixed"]["numbers"] if row["is_headline"])
    assert headline["estimate"] == 1


def test_what_is_missing_or_damaged_counts_as_wrong_and_is_listed(capsys):
    assert main(command("visor")) == 0
    run = ImageRun(Path("run"))
    files = sorted(Path("run/images").rglob("*.png"))
    files[0].unlink()
    files[1].write_bytes(b"no image")
    arguments = {"generator": None, "images": "run/images"}
    assert main(command("visor", "elsewhere", **arguments)) == 0
    found = results("elsewhere")
    counts = found["failures"]["counts"]
    assert (counts["image missing"], counts["image unreadable"]) == (1, 1)
    before = next(row for row in results()["protocols"]["fixed"]["numbers"] if row["is_headline"])
    after = next(row for row in found["protocols"]["fixed"]["numbers"] if row["is_headline"])
    assert after["num_values"] == before["num_values"]
    assert after["estimate"] < before["estimate"]
    # once repaired, it is judged
    Image.open(files[2]).save(files[1])
    assert main(command("visor", "elsewhere", **arguments)) == 0
    assert "image unreadable" not in results("elsewhere")["failures"]["counts"]
    assert run.items


def test_a_comparison_names_what_differs(capsys):
    assert main(command("visor", "before", seed=1)) == 0
    assert main(command("visor", "after", seed=2)) == 0
    assert main(["evaluate", "compare", "before", "after", "--output_dir", "both"]) == 0
    comparison = json.loads(Path("both/compare.json").read_text())
    assert comparison["rows"]
    assert all(
        row["difference"] == 0 and row["p_value"] == 1
        for row in comparison["rows"]
        if row["before"] == 1 == row["after"]
    )
    assert "Other seeds" in comparison["runs"][1]["flags"][0]
    assert "<svg" in Path("both/report.html").read_text()
    assert main(command("geneval", "other")) == 0
    assert main(["evaluate", "compare", "before", "other"]) == 1
    assert "not comparable: benchmark is visor and geneval" in capsys.readouterr().err


def test_a_dry_run_writes_nothing_and_a_plan_cannot_change(capsys):
    assert main([*command("tiif"), "--dry_run"]) == 0
    assert not Path("run").exists()
    assert "questions to --vision" in capsys.readouterr().out
    assert main(command("visor")) == 0
    assert main(command("visor", seed=3)) == 1
    assert "was begun with seed 0, which is 3 now" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"detector": None}, "needs a judge that finds objects: name one with --detector"),
        ({"vision": "simple_judges:Guessing"}, "asks no judge that answers questions"),
        ({"images": "somewhere"}, "Name either a generator"),
        ({"generator": "absent/folder/model.yaml"}, "cannot be read"),
        ({"limit": 0}, "`limit` is 0"),
        ({"data": "absent"}, "There is no folder absent"),
        (
            {"detector": "simple_judges:absent"},
            "is not a function: the functions of simple_judges are Guessing, agreeing",
        ),
    ],
)
def test_bad_input_is_named_with_a_way_out(options, message, capsys):
    assert main(command("visor", **options)) == 1
    assert message in capsys.readouterr().err


def test_a_broken_judge_is_found_out_before_anything_is_drawn(capsys):
    assert main([part for part in command("tiif", vision="simple_judges:agreeing") if part != "--skip_self_test"]) == 1
    assert "simple_judges:agreeing" in capsys.readouterr().err
    assert not list(Path("run").rglob("*.png"))
