"""SpatialBench-UC by both protocols."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.evaluation.goldens import assert_same, goldens
from trl_spatial.evaluation.benchmarks.base import Evidence, OfficialError
from trl_spatial.evaluation.benchmarks.spatialbench_uc import SpatialBenchUC
from trl_spatial.evaluation.benchmarks.spatialbench_uc_rules import (
    LIMITS,
    center_distance,
    check_image,
    combine_components,
    judge_distance,
    rate_components,
)
from trl_spatial.evaluation.benchmarks.spatialbench_uc_tables import (
    Sample,
    Twin,
    confidence_grid,
    confusion_table,
    evaluate_table,
    observed_confidences,
    report_table,
    risk_coverage_curve,
)
from trl_spatial.evaluation.benchmarks.t2i_compbench_rules import intersection_over_union
from trl_spatial.evaluation.boxes import find_boxes
from trl_spatial.evaluation.roles import Judges
from trl_spatial.judges.flat import FlatDetector
from trl_spatial.judges.views import VIEWS
from trl_spatial.scenes import parse_description, render_scene
from trl_spatial.scenes.layout import place_scene, sample_radii


ROOT = Path(__file__).parents[3]
DATA = ROOT.parent / "shared" / "bench_data" / "spatialbench_uc"
EXAMPLES = ROOT / "trl_spatial" / "evaluation" / "benchmarks" / "examples" / "spatialbench_uc"
SIDE = 512
# names of the goldens' options → fields of the limits
OPTIONS = {
    "geometry.margin": "margin",
    "thresholds.detection_score": "min_score",
    "thresholds.min_area_fraction": "min_area",
    "thresholds.ambiguity_delta": "min_score_gap",
    "thresholds.max_overlap_iou": "max_overlap",
    "stability.consistency_threshold": "min_stability",
}


def read_boxes(rows):
    if rows == "raise":
        return None
    return [{"label": label, "score": score, "box": box} for label, score, box in rows]


@goldens("spatialbench_uc", "sample")
def test_goldens_of_images(golden):
    given = golden.given
    config = dict(given.get("config", {}))
    has_views = config.pop("stability.enabled", True)
    limits = replace(LIMITS, **{OPTIONS[name]: value for name, value in config.items()})
    primary = given["primary"] * 5 if len(given["primary"]) == 1 else given["primary"]
    first, *views = map(read_boxes, primary)
    second = [read_boxes(given["secondary"])] if given.get("secondary") is not None else []
    size = given.get("size", (SIDE, SIDE))
    checked = check_image(given["relation"], ("mug", "lamp"), size, first, views if has_views else (), second, limits)
    found = {
        "verdict": checked.verdict,
        "reason": checked.reason,
        "confidence": checked.confidence,
        "components": dict(checked.components),
        "delta": checked.delta,
        "iou": checked.overlap,
    }
    # views are looked at before it is known whether they are needed
    assert_same(found, {name: value for name, value in golden.official.items() if name != "detector_calls"})


@goldens("spatialbench_uc", "geometry")
def test_goldens_of_the_geometry(golden):
    given = golden.given
    assert given["geom_slope"] == 0.15
    delta = center_distance(given["relation"], given["a"], given["b"], (given["width"], given["height"]))
    components = rate_components(
        (given["score_a"], given["score_b"]), delta, given["stability"], given["agreement"], given["margin"]
    )
    found = {
        "delta": delta,
        "verdict": judge_distance(given["relation"], delta, given["margin"])[0],
        "iou": intersection_over_union(given["a"], given["b"]),
        "confidence": combine_components(components),
    }
    assert_same(found, golden.official)


@goldens("spatialbench_uc", "aggregate")
def test_goldens_of_the_tables(golden):
    samples = [
        Sample(row["prompt_id"], row["relation"], row["verdict_raw"], row["verdict_reason"], row["conf"])
        for row in golden.given["samples"]
    ]
    twins = [Twin(row["prompt_id"], row.get("counterfactual", {}).get("prompt_id")) for row in golden.given["prompts"]]
    found = {"evaluate": evaluate_table(samples), "report": report_table(samples, twins, golden.given["k"])}
    assert_same(found, golden.official)


@goldens("spatialbench_uc", "risk_coverage")
def test_goldens_of_risk_and_coverage(golden):
    given = golden.given
    results = {
        image: (row["verdict_raw"], row["conf"])
        for image, row in given["results"].items()
        if image in given["samples"]
    }
    thresholds = {
        "unique": observed_confidences(results),
        "grid": confidence_grid(given.get("grid_step", 0.1)),
    }
    found = {
        name: risk_coverage_curve(results, given["labels"], len(given["samples"]), taus)
        for name, taus in thresholds.items()
    }
    verdicts = {image: verdict for image, (verdict, _) in results.items()}
    found["confusion"] = confusion_table(verdicts, given["labels"])
    assert_same(found, golden.official)


@pytest.mark.skipif(not DATA.is_dir(), reason=f"there is no folder {DATA}")
def test_the_published_file_is_known_and_read():
    benchmark = SpatialBenchUC()
    (file,) = benchmark.files
    assert hashlib.sha256((DATA / file.name).read_bytes()).hexdigest() == file.sha256
    items = benchmark.load(DATA)
    meta = json.loads((DATA / "dataset_meta.json").read_text())["statistics"]
    assert len(items) == meta["total_prompts"]
    relations = [item.data["relation"] for item in items]
    assert {name: relations.count(name) for name in relations} == meta["relations"]


def changed_rows(change):
    rows = [json.loads(line) for line in (EXAMPLES / "prompts.jsonl").read_text().splitlines()]
    change(rows)
    return "".join(f"{json.dumps(row)}\n" for row in rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[1].update(relation="near"), "row 2: relation is 'near', none of left_of"),
        (lambda rows: rows[2].pop("prompt"), "row 3: prompt is None"),
        (lambda rows: rows[0].update(prompt_id="a/b"), "row 1: prompt_id is 'a/b'"),
        (lambda rows: rows[3].update(object_b={"name": "x"}), "row 4: object_b is .* no coco_label"),
        (lambda rows: rows[3].update(prompt_id="v1_000000"), "row 4 repeats"),
        (lambda rows: rows[4]["counterfactual"].update(prompt_id="v1_000000"), "row 5: the twin of 'v1_000004'"),
        (lambda rows: rows.pop(), "row 5: the twin of 'v1_000004' is 'v1_000005'"),
    ],
)
def test_bad_rows_are_named(tmp_path, change, message):
    (tmp_path / "prompts.jsonl").write_text(changed_rows(change))
    with pytest.raises(ValueError, match=rf"prompts\.jsonl, {message}"):
        SpatialBenchUC().load(tmp_path)


def test_a_line_that_is_no_json_and_a_missing_file_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"prompts\.jsonl"):
        SpatialBenchUC().load(tmp_path)
    (tmp_path / "prompts.jsonl").write_text(changed_rows(lambda rows: None) + "{broken\n")
    with pytest.raises(ValueError, match="line 7"):
        SpatialBenchUC().load(tmp_path)


def test_files_are_assigned_by_official_names():
    benchmark = SpatialBenchUC()
    items = benchmark.load(EXAMPLES)[:2]
    seeds = [f"images/sd14_gligen_v1_000000_seed{seed:04d}.png" for seed in (0, 2)]
    large = [f"images/run_v1_000001_seed{seed:04d}.png" for seed in (40, 41, 42, 43, 44)]
    others = ["images/run_v1_000099_seed0000.png", "manifest.jsonl", "eval/overlays/run_v1_000000_seed0001.png"]
    beside = ["run_v1_000000_seed0003.jpg"]
    files = sorted([*seeds, *large, *others, *beside])
    official = benchmark.assign(items, files, "official")
    assert official == {("v1_000000", 0): seeds[0], ("v1_000000", 2): seeds[1]} | {
        ("v1_000001", 40 + index): file for index, file in enumerate(large)
    }
    fixed = benchmark.assign(items, files, "fixed")
    assert fixed == {("v1_000000", 0): seeds[0], ("v1_000000", 2): seeds[1], ("v1_000000", 3): beside[0]} | {
        ("v1_000001", index): file for index, file in enumerate(large[:4])
    }
    with pytest.raises(ValueError, match="remove one"):
        benchmark.assign(items, [*files, "images/other_v1_000000_seed0000.png"], "fixed")
    paths = {(item.id, number): benchmark.image_path(item, number) for item in items for number in range(4)}
    for protocol in ("official", "fixed"):
        assert benchmark.assign(items, list(paths.values()), protocol) == paths


def test_the_manifest_names_the_images_that_are_there(tmp_path):
    benchmark = SpatialBenchUC()
    items = benchmark.load(EXAMPLES)
    (tmp_path / "images").mkdir()
    for item, number in ((items[0], 0), (items[0], 1), (items[3], 2)):
        Image.new("RGB", (2, 2)).save(tmp_path / benchmark.image_path(item, number))
    benchmark.finish(tmp_path, items)
    rows = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert [(row["prompt_id"], row["relation"], row["object_a"], row["object_b"]) for row in rows] == [
        ("v1_000000", "left_of", "red circle", "blue square"),
        ("v1_000000", "left_of", "red circle", "blue square"),
        ("v1_000003", "below", "blue square", "red circle"),
    ]
    assert all((tmp_path / row["image_path"]).is_file() for row in rows)
    assert len({row["sample_id"] for row in rows}) == 3


def exact_boxes(item, seed):
    """Boxes of the scene of a prompt, of a layout that is no border case of this benchmark."""
    graph = parse_description(item.prompt)
    (relation,) = graph.relations
    rng = np.random.default_rng(seed)
    axis = 0 if item.data["relation"] in ("left_of", "right_of") else 1
    while True:
        placed = {thing.entity: thing for thing in place_scene(graph, sample_radii([graph], rng), rng)}
        first, second = (placed[entity] for entity in relation.arguments)
        if abs((first.x, first.y)[axis] - (second.x, second.y)[axis]) > 0.3:
            break
    return [
        {
            "label": str(thing.entity),
            "score": 0.9,
            "box": [SIDE * (center + sign * thing.radius) for sign in (-1, 1) for center in (thing.x, thing.y)],
        }
        for thing in (first, second)
    ]


def exchange(boxes):
    return [row | {"label": other["label"]} for row, other in zip(boxes, boxes[::-1], strict=True)]


def evidence_with(benchmark, items, boxes_of):
    """The same boxes for every question about an image."""
    images = {(item.id, number): benchmark.image_path(item, number) for item in items for number in range(4)}
    replies = {
        (item.id, number, question.key): [{"size": [SIDE, SIDE], "boxes": boxes_of(item, number)}]
        for item in items
        for number in range(4)
        for question in benchmark.questions(item, "fixed")
    }
    return Evidence(images, replies)


def estimates(benchmark, items, evidence):
    return {metric.name: metric.estimate for metric in benchmark.fixed(items, evidence)}


def test_both_protocols_ask_the_same_of_each_view_and_a_second_detector():
    benchmark = SpatialBenchUC()
    (item, *_) = benchmark.load(EXAMPLES)
    official, fixed = (benchmark.questions(item, protocol) for protocol in ("official", "fixed"))
    assert [(question.key, question.options) for question in official] == [(q.key, q.options) for q in fixed]
    asked = [(question.options.get("view"), question.options.get("detector")) for question in fixed]
    assert asked == [(None, None), *((view, None) for view in VIEWS), (None, "second")]
    assert len(VIEWS) == 4 and len({question.key for question in fixed}) == 6
    assert all(question.options["classes"] == ["red circle", "blue square"] for question in fixed)


def test_a_whole_pass_over_the_examples():
    benchmark = SpatialBenchUC()
    items = benchmark.load(EXAMPLES)
    right = evidence_with(benchmark, items, exact_boxes)
    wrong = evidence_with(benchmark, items, lambda item, number: exchange(exact_boxes(item, number)))
    for evidence, share in ((right, 1.0), (wrong, 0.0)):
        found = estimates(benchmark, items, evidence)
        assert {value for name, value in found.items() if name.startswith("pass rate")} == {share}
        assert found["selective risk"] == 1 - share and found["abstention"] == 0.0
        assert {found[name] for name in ("prompts with a pass", "prompts with passes only")} == {share}
        assert found["twins that both pass"] == share
        official = benchmark.official(items, evidence)
        assert official["pass_rate_overall"] == official["cf_both_pass_rate"] == official["left_of/coverage"] * share
        assert official["coverage"] == 1.0 and official["mean_confidence"] > 0.9
    (headline,) = [metric for metric in benchmark.fixed(items, right) if metric.is_headline]
    assert headline.name == "pass rate" and len(headline.values) == len(headline.items) == 4 * len(items)
    pairs = {metric.name: metric for metric in benchmark.fixed(items, right)}["twins that both pass"]
    assert len(pairs.values) == len(items) / 2


def test_pictures_of_the_scenes_pass_and_of_their_mirror_images_fail():
    benchmark = SpatialBenchUC()
    items = [item for item in benchmark.load(EXAMPLES) if item.data["relation"] in ("left_of", "right_of")]
    detector = FlatDetector()
    judges = Judges(None, {"first": detector, "second": detector}, None, None, {})
    benchmark.num_images = 1
    for is_mirrored in (False, True):
        images, replies = {}, {}
        for item in items:
            picture = render_scene(parse_description(item.prompt), seed=1, image_size=96)
            picture = ImageOps.mirror(picture) if is_mirrored else picture
            images[item.id, 0] = benchmark.image_path(item, 0)
            for question in benchmark.questions(item, "fixed"):
                options = question.options
                place, view = options.get("detector", "first"), options.get("view", "")
                replies[item.id, 0, question.key] = find_boxes(judges, place, view, [picture], [options])
        found = estimates(benchmark, items, Evidence(images, replies))
        assert found["pass rate"] == (not is_mirrored) and found["selective risk"] == is_mirrored


def test_missing_images_and_answers_count_as_wrong_and_as_abstentions_in_the_fixed_protocol_only():
    benchmark = SpatialBenchUC()
    items = benchmark.load(EXAMPLES)
    whole = evidence_with(benchmark, items, exact_boxes)
    gone, failed = (items[0].id, 3), (items[0].id, 2)
    images = {key: file for key, file in whole.images.items() if key != gone}
    replies = {key: [None] if key[:2] == failed else reply for key, reply in whole.replies.items() if key[:2] != gone}
    partial = Evidence(images, replies)
    found = estimates(benchmark, items, partial)
    assert found["pass rate"] == pytest.approx(22 / 24) and found["abstention"] == pytest.approx(2 / 24)
    assert found["pass rate: left_of"] == pytest.approx(6 / 8)  # two of the prompts
    assert found["selective risk"] == 0.0
    assert found["prompts with a pass"] == 1.0 and found["prompts with passes only"] == pytest.approx(5 / 6)
    official = benchmark.official(items, partial)
    assert official["pass_rate_overall"] == official["coverage"] == 1.0
    assert official["prompt_pass_rate_all"] == pytest.approx(5 / 6)
    nothing = Evidence({}, {})
    assert estimates(benchmark, items, nothing)["pass rate"] == 0.0
    # nothing is judged, so nothing is known of the risk
    assert np.isnan(estimates(benchmark, items, nothing)["selective risk"])
    with pytest.raises(OfficialError, match="No image"):
        benchmark.official(items, nothing)


def test_the_risk_is_of_the_images_that_are_judged():
    benchmark = SpatialBenchUC()
    items = benchmark.load(EXAMPLES)

    def boxes_of(item, number):
        boxes = exact_boxes(item, number)
        return (boxes, boxes, exchange(boxes), boxes[:1])[number]

    found = estimates(benchmark, items, evidence_with(benchmark, items, boxes_of))
    assert found["pass rate"] == 0.5 and found["abstention"] == 0.25
    assert found["selective risk"] == pytest.approx(1 / 3)
    official = benchmark.official(items, evidence_with(benchmark, items, boxes_of))
    assert official["pass_rate_conditional"] == pytest.approx(1 - found["selective risk"])


@pytest.mark.parametrize("relation", ["left_of", "right_of", "above", "below"])
def test_a_distance_of_exactly_the_margin_is_undecidable(relation):
    sign = 1 if relation in ("right_of", "below") else -1
    verdicts = [judge_distance(relation, sign * delta, 0.25)[0] for delta in (0.26, 0.25, -0.25, -0.26)]
    assert verdicts == ["PASS", "UNDECIDABLE", "UNDECIDABLE", "FAIL"]


def test_a_verdict_that_views_unsettle_is_none():
    benchmark = SpatialBenchUC()
    items = benchmark.load(EXAMPLES)[:2]
    whole = evidence_with(benchmark, items, exact_boxes)
    for num_failed, abstention in ((2, 0.0), (3, 1.0)):
        views = list(VIEWS)[:num_failed]
        replies = {
            key: [reply | {"boxes": exchange(reply["boxes"])} for reply in given]
            if key[2].endswith(tuple(views))
            else given
            for key, given in whole.replies.items()
        }
        assert estimates(benchmark, items, Evidence(whole.images, replies))["abstention"] == abstention


def test_a_pair_counts_only_with_both_prompts():
    benchmark = SpatialBenchUC()
    items = benchmark.load(EXAMPLES)[:3]
    pairs = {m.name: m for m in benchmark.fixed(items, evidence_with(benchmark, items, exact_boxes))}
    assert pairs["twins that both pass"].items == [items[0].id]
