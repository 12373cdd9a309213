"""`trl_spatial evaluate images`, `replay` and `compare` on the example rows of every benchmark, drawn by the renderer `flat`."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
from PIL import Image

from tests.launching import run_processes
from tests.openai_stub import OpenAIStub
from trl_spatial.cli import main
from trl_spatial.evaluation.benchmarks import BENCHMARKS, make_benchmark
from trl_spatial.evaluation.image_run import ImageRun
from trl_spatial.evaluation.sharing import card_section
from trl_spatial.store import lock_folder


JUDGES = {
    "vision": "simple_judges:Guessing",
    "detector": "flat",
    "second_detector": "flat",
    "colors": "flat",
    "depth": "flat",
}


CARD = {"title": "VISOR", "num_prompts": 1, "num_images": 4, "protocols": {}}


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


def test_several_processes_end_together_if_the_first_one_cannot_begin():
    """The others would wait for it before they draw."""
    Path("run").mkdir()
    with lock_folder("run"):
        first, second = run_processes(["-m", "trl_spatial", *command("visor")], code=1, ACCELERATE_USE_CPU="true")
    assert "error: Another process" in first.stderr
    assert "error: Preparing the run failed on process 0 (ValueError: Another process" in second.stderr


def test_several_processes_draw_what_one_does():
    assert main(command("visor", "one")) == 0
    run_processes(["-m", "trl_spatial", *command("visor")], ACCELERATE_USE_CPU="true")
    assert results("run")["protocols"] == results("one")["protocols"]


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


def test_a_run_that_was_killed_before_its_plan_was_recorded_begins_again():
    assert main(command("visor")) == 0
    Path("killed").mkdir()
    shutil.copy("run/items.jsonl", "killed")
    assert main(command("visor", output="killed")) == 0
    assert results("killed")["protocols"] == results()["protocols"]


# A process of two, of which the second one is slow to find out what is to be drawn: the first one has drawn
# those of more than a prompt, if it may.
SHARED = """
import sys, time
from pathlib import Path
from trl_spatial.cli import main
from trl_spatial.evaluation.image_run import ImageRun
from trl_spatial.generation.painters import RendererPainter
from trl_spatial.store import PROCESS

def missing_jobs(self):
    deadline = time.monotonic() + 2
    while PROCESS == 1 and len(list(Path("run").rglob("*.png"))) < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    return find(self)

find, ImageRun.missing_jobs = ImageRun.missing_jobs, missing_jobs
RendererPainter.batch_size = 1
raise SystemExit(main(sys.argv[1:]))
"""


def test_two_processes_share_the_images():
    run_processes(["-c", SHARED, *command("visor")], ACCELERATE_USE_CPU="true")
    logs = [path.read_text().splitlines() for path in Path("run").glob("images*.jsonl")]
    drawn = [(record["item"], record["image"]) for log in logs for record in map(json.loads, log)]
    assert len(logs) == 2 and len(set(drawn)) == len(drawn) == results()["num_images"]
    assert "image missing" not in results()["failures"]["counts"]


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
    assert "Different seeds" in comparison["runs"][1]["flags"][0]
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
        ({"generator": "flatt"}, "There is no generator 'flatt'. Name a pipeline (a folder, ORG/NAME"),
        ({"trained_on": "viser"}, "There is no benchmark 'viser'. Available: dpg-bench"),
        ({"generator": None, "images": "."}, "is an image of VISOR. The image of its first prompt would be"),
        ({"data": "."}, "holds no file of VISOR, such as text_spatial_rel_phrases.json: https://"),
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


def test_images_of_another_prompt_are_no_images_of_this_one(capsys):
    assert main(command("geneval", output="drawn")) == 0
    first, second = (Path("drawn/images", name) for name in ("00000", "00001"))
    second.rename("other")
    first.rename(second)
    Path("other").rename(first)
    assert main(command("geneval", generator=None, images="drawn/images")) == 1
    assert "00000/metadata.jsonl says that the images were drawn for" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "is_warned"), [("geneval", True), ("visor", False)])
def test_a_detector_whose_scores_are_too_low_to_count_is_known_before_anything_is_drawn(name, is_warned):
    call = [part for part in command(name, detector="simple_judges:unsure") if part != "--skip_self_test"]
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        assert main(call) == 0
    said = [str(warning.message) for warning in found]
    assert any("finds 0 above `counting_threshold` 0.9" in text for text in said) == is_warned


def test_what_was_never_begun_can_be_put_right_in_its_folder(capsys):
    assert main(command("visor", detector="simple_judges:absent")) == 1
    assert not Path("run/images.jsonl").exists()
    assert main(command("visor")) == 0


def test_only_the_protocols_that_were_asked_have_tables(capsys):
    assert main(command("spatialgeneval", protocol="official")) == 0
    assert results()["protocols"].keys() == {"official"}
    assert "not asked" not in results()["failures"]["counts"]
    assert main(["evaluate", "replay", "run"]) == 0
    assert results()["protocols"].keys() == {"official"}
    assert main(["evaluate", "compare", "run", "run"]) == 1
    assert "was not judged with the fixed protocol" in capsys.readouterr().err
    assert main(command("spatialgeneval", protocol="fixed")) == 0
    assert results()["protocols"].keys() == {"official", "fixed"}
    Path("run/files.json").unlink()  # as if interrupted before the judges were asked
    assert main(["evaluate", "compare", "run", "run"]) == 1
    assert "Run the command that began it once more" in capsys.readouterr().err


def test_a_spend_cap_holds_over_interruptions_and_no_payment_is_forgotten(capsys):
    """Each call costs a cent, and the cap is reached in the middle of an image's questions."""
    with OpenAIStub(chat=lambda request: "yes.") as stub:
        call = command("tiif", vision=f"{stub.url}#judge", limit=4)
        prices = ["--prices", "judge=0/10000"]  # an answer is one token, as the stub counts, of 0.01 dollars
        for cap in ("0.03", "0.03", "0.07"):
            assert main([*call, *prices, "--max_cost", cap]) == 1
            assert "have been spent" in capsys.readouterr().err
        paid = sum(json.loads(line)["cost"] for line in Path("run/payments.jsonl").read_text().splitlines())
        assert paid == pytest.approx(0.01 * len(stub.requests))
        assert paid <= 0.07 + 0.08 + 1e-9  # eight calls run at once
        assert main([*call, *prices, "--max_cost", "10"]) == 0
        assert results()["usage"]["cost"] == pytest.approx(0.01 * len(stub.requests))
    answers = [json.loads(line) for line in Path("run/answers.jsonl").read_text().splitlines()]
    assert all(answer["replies"] and "error" not in answer for answer in answers)


def test_numbers_of_other_prompts_are_not_called_comparable():
    assert main(command("visor")) == 0
    assert {row["why"] for row in results()["published"]} == {"Not measured on the published prompts."}
    assert "no: Not measured on the published prompts." in Path("run/results.md").read_text()


def test_a_card_names_no_folder_of_the_author(tmp_path):
    assert card_section(CARD | {"judges": {"vision": {"name": str(tmp_path)}}}).count(tmp_path.name) == 1
    for private in (str(tmp_path), "http://10.0.0.7:8000/v1#judge"):
        assert private not in card_section(CARD | {"judges": {"vision": {"name": private}}})
