"""The pairs that scorers are measured on, and pairs of Multimodal RewardBench 2."""

import json

import pytest
from datasets import Dataset, Image
from PIL import Image as PILImage

from trl_spatial.evaluation.mmrb2 import load_mmrb2
from trl_spatial.evaluation.pair_set import PairSet, change_groups, find_clusters
from trl_spatial.scenes import make_preference_dataset


@pytest.fixture(scope="module")
def rows():
    return make_preference_dataset(12, split="test", seed=1, both_directions=True)


def test_both_directions_of_a_pair_are_one_cluster(rows):
    records = PairSet(rows, "pairs").records()
    clusters = [record["cluster"] for record in records]
    by_texts = {frozenset((row["prompt"], row["perturbed_prompt"])) for row in rows}
    assert len(records) == 24 and len(set(clusters)) <= len(by_texts) == 12
    for number, row in enumerate(rows):
        twin = next(i for i, other in enumerate(rows) if other["prompt"] == row["perturbed_prompt"])
        assert clusters[twin] == clusters[number]
    assert find_clusters(["a", "b", "c", "d"], ["b", None, "a", None]) == [0, 0, 0, 1]


def test_records_say_what_was_changed(rows):
    for record, row in zip(PairSet(rows, "pairs", limit=5).records(), rows, strict=False):
        assert record["prompts"]["given"] == row["prompt"] and record["groups"]["level"] == str(row["level"])
        assert record["change"] and record["groups"]["generator"] == row["generator"]
        assert ("relation" in record["groups"]) == ("operation" in record["groups"]) == (row["level"] == 1)


def test_orientation_is_a_group_of_its_own():
    def change(before, after):
        return {"operation": "flip", "before": {"relation": before}, "after": {"relation": after}}

    assert change_groups(1, [change("left_of", "right_of")])["orientation"] == "left/right"
    assert change_groups(2, [change("behind", "front_of")] * 2) == {"level": "2", "orientation": "front/behind"}
    assert "orientation" not in change_groups(2, [change("left_of", "right_of"), change("behind", "front_of")])
    assert "orientation" not in change_groups(1, [change("left_of", "above")])
    assert change_groups(None, []) == {}


def test_changes_of_older_datasets_give_the_same_groups(rows):
    def written(relation):
        return f"{relation['relation']}({', '.join(relation['arguments'])})"

    for row in rows:
        operations = [
            {name: value if name == "operation" else written(value) for name, value in operation.items()}
            for operation in row["operations"]
        ]
        assert change_groups(row["level"], operations) == change_groups(row["level"], row["operations"])


def test_files_and_bytes_are_the_same_pairs(rows, tmp_path):
    paths = {"prompt": [], "chosen": [], "rejected": []}
    for number, row in enumerate(rows):
        paths["prompt"].append(row["prompt"])
        for column in ("chosen", "rejected"):
            row[column].save(tmp_path / f"{number}-{column}.png")
            paths[column].append(f"{number}-{column}.png")
    files = PairSet(Dataset.from_dict(paths), "files", folder=tmp_path)
    files.check()
    columns = {name: [str(tmp_path / path) for path in paths[name]] for name in ("chosen", "rejected")}
    cast = Dataset.from_dict(paths | columns).cast_column("chosen", Image())
    assert files.digest() == PairSet(cast, "cast").digest()
    assert files.images(3)[1].tobytes() == rows[3]["rejected"].convert("RGB").tobytes()
    PILImage.new("RGB", (8, 8)).save(tmp_path / "3-rejected.png")
    assert files.digest() != PairSet(rows, "pairs").digest()


def test_bad_rows_are_named(rows, tmp_path):
    whole = rows.to_dict()
    for change, message in (
        ({"prompt": [*whole["prompt"][:2], " ", *whole["prompt"][3:]]}, "pairs, row 2, `prompt`"),
        ({"rejected": whole["chosen"]}, "pairs, row 0, `rejected`"),
    ):
        broken = Dataset.from_dict(whole | change, features=rows.features)
        with pytest.raises(ValueError, match=message):
            PairSet(broken, "pairs").check()
    with pytest.raises(ValueError, match="`chosen`"):
        PairSet(rows.remove_columns("chosen"), "pairs")
    with pytest.raises(ValueError, match="at least 1"):
        PairSet(rows, "pairs", limit=0)
    with pytest.raises(ValueError, match="has no rows"):
        PairSet(rows.select([]), "pairs")


@pytest.fixture
def benchmark_folder(tmp_path):
    """A folder as MMRB2's program writes it, of two pairs."""
    (tmp_path / "images").mkdir()
    pairs = []
    for number, chosen in enumerate("AB"):
        answers = {}
        for side, color in (("a", "red"), ("b", "blue")):
            name = f"images/{number}_{side}_0.png"
            PILImage.new("RGB", (8, 8), color).save(tmp_path / name)
            answers[f"response_{side}"] = {"model_name": "imagen4", "response_content": [["image", name]]}
        prompt = [["text", f"a thing {number}"], ["text", "in a box"]]
        pairs.append(
            {"id": str(number), "prompt_source": "wise", "prompt_content": prompt, "chosen": chosen} | answers
        )
    (tmp_path / "t2i.json").write_text(json.dumps({"pairs": pairs}))
    return tmp_path


def test_pairs_of_mmrb2_keep_what_people_chose(benchmark_folder):
    pairs = PairSet(load_mmrb2(benchmark_folder), "mmrb2")
    pairs.check()
    colors = [tuple(image.getpixel((0, 0)) for image in pairs.images(number)) for number in range(2)]
    assert colors == [((255, 0, 0), (0, 0, 255)), ((0, 0, 255), (255, 0, 0))]
    assert pairs.prompts == ["a thing 0\nin a box", "a thing 1\nin a box"]
    assert pairs.records()[1]["groups"] == {"source": "wise"}


def test_other_forms_of_mmrb2_are_refused_in_words(benchmark_folder):
    path = benchmark_folder / "t2i.json"
    (good := json.loads(path.read_text()))["pairs"][0].pop("chosen")
    path.write_text(json.dumps({"pairs": [good["pairs"][0] | {"human_preference": "B"}]}))
    assert load_mmrb2(benchmark_folder)[0]["chosen"].endswith("0_b_0.png")

    pair = good["pairs"][1]
    other = [["image", "images/0_a_0.png"], ["text", "and words"]]
    for change, message in (
        ({"chosen": "C"}, "pair 0: the chosen answer is 'C'"),
        ({"prompt_content": [["image", "x.png"]]}, "pair 0: the prompt is not text only"),
        ({"response_b": {"response_content": other}}, "pair 0, answer B is not one image"),
        ({"response_b": {"response_content": [["image", "images/none.png"]]}}, "answer B: there is no image"),
        ({"response_b": {"response_content": [["image", "../secret.png"]]}}, "outside the folder"),
        ({"response_b": {}}, "KeyError: 'response_content'"),
    ):
        path.write_text(json.dumps({"pairs": [pair | change]}))
        with pytest.raises(ValueError, match=message):
            load_mmrb2(benchmark_folder)
    pair.pop("prompt_content")
    path.write_text(json.dumps({"pairs": [pair]}))
    with pytest.raises(ValueError, match="pair 0 has no prompt_content"):
        load_mmrb2(benchmark_folder)
    path.write_text("[1]")
    with pytest.raises(ValueError, match="is not a list of MMRB2 pairs"):
        load_mmrb2(benchmark_folder)
    path.rename(benchmark_folder / "t2i_response_only.json")
    with pytest.raises(ValueError, match=r"has the answers without their prompts\. Fetch it"):
        load_mmrb2(benchmark_folder)
