import json
import pickle
import traceback
from io import BytesIO

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, IterableDataset, Value
from PIL import Image as PILImage
from torch.utils.data import DataLoader

from trl_spatial.data import validate_splits
from trl_spatial.gaussian_reward.data import (
    DataCollatorForSpatialPreference,
    PreferencePairs,
    RowSampler,
    prepare_pairs,
)


FORMS = ["pil", "bytes", "dictionary of bytes", "dictionary of path", "path", "Image", "Image of paths"]


def picture(seed, width=32, height=32):
    return PILImage.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image, **kwargs):
    file = BytesIO()
    image.save(file, **({"format": "PNG"} | kwargs))
    return file.getvalue()


def rows_with_reverse(num_rows=4):
    return [
        {
            "prompt": f"a cube left of {row} spheres",
            "perturbed_prompt": f"a cube right of {row} spheres",
            "chosen": {"bytes": encoded(picture(2 * row)), "path": None},
            "rejected": {"bytes": encoded(picture(2 * row + 1, width=48)), "path": None},
        }
        for row in range(num_rows)
    ]


def as_dataset(rows, kind):
    if kind == "map":
        return Dataset.from_list(rows)
    return IterableDataset.from_generator(lambda: iter(rows))


def truncated(image):
    data = encoded(image)
    return data[: len(data) // 2]


def in_form(image, form, path):
    data = encoded(image)
    path.write_bytes(data)
    return {
        "pil": image,
        "bytes": data,
        "dictionary of bytes": {"bytes": data, "path": None},
        "dictionary of path": {"bytes": None, "path": str(path)},
        "path": str(path),
        "Image": image,
        "Image of paths": str(path),
    }[form]


@pytest.mark.parametrize("kind", ["map", "stream"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_image_gives_the_same_batch(processor, tmp_path, form, kind):
    pictures = {"chosen": [picture(0), picture(1)], "rejected": [picture(2), picture(3)]}
    prompts = ["a red cube", "a blue sphere on a table"]
    rows = [
        {"prompt": prompt}
        | {column: in_form(pictures[column][i], form, tmp_path / f"{column}{i}") for column in pictures}
        for i, prompt in enumerate(prompts)
    ]
    if kind == "map":
        features = Features({"prompt": Value("string"), "chosen": Image(), "rejected": Image()})
        dataset = Dataset.from_list(rows, features=features if form.startswith("Image") else None)
    elif form.startswith("Image"):
        features = Features({"prompt": Value("string"), "chosen": Image(), "rejected": Image()})
        dataset = Dataset.from_list(rows, features=features).to_iterable_dataset()
    else:
        dataset = IterableDataset.from_generator(lambda: iter(rows))
    batch = DataCollatorForSpatialPreference(processor)(list(prepare_pairs(dataset, processor)))
    expected = processor(prompts + prompts, pictures["chosen"] + pictures["rejected"])
    assert batch.keys() == expected.keys()
    for name in expected:
        assert torch.equal(batch[name], expected[name]), name


@pytest.mark.parametrize("kind", ["map", "stream"])
def test_reverse_pairs_prefer_the_other_image_for_the_perturbed_prompt(processor, kind):
    rows = rows_with_reverse()
    pairs = list(prepare_pairs(as_dataset(rows, kind), processor))
    seen = [(pair["prompt"], pair["chosen"]["bytes"], pair["rejected"]["bytes"]) for pair in pairs]
    expected = []
    for row in rows:
        expected.append((row["prompt"], row["chosen"]["bytes"], row["rejected"]["bytes"]))
        expected.append((row["perturbed_prompt"], row["rejected"]["bytes"], row["chosen"]["bytes"]))
    assert seen == expected


@pytest.mark.parametrize("kind", ["map", "stream"])
def test_reverse_pairs_can_be_left_out(processor, kind):
    rows = rows_with_reverse()
    pairs = list(prepare_pairs(as_dataset(rows, kind), processor, use_reverse_pairs=False))
    assert [pair["prompt"] for pair in pairs] == [row["prompt"] for row in rows]
    # a bad perturbed prompt is nobody's concern then
    rows[0]["perturbed_prompt"] = ""
    assert len(list(prepare_pairs(as_dataset(rows, kind), processor, use_reverse_pairs=False))) == len(rows)


@pytest.mark.parametrize("kind", ["map", "stream"])
def test_preparing_twice_changes_nothing(processor, kind):
    once = prepare_pairs(as_dataset(rows_with_reverse(), kind), processor)
    assert list(prepare_pairs(once, processor)) == list(once)


def test_pairs_of_a_shuffled_selection_are_its_rows_in_its_order(processor):
    rows = rows_with_reverse(6)
    dataset = Dataset.from_list(rows).shuffle(seed=1).select(range(2, 5))
    pairs = prepare_pairs(dataset, processor, use_reverse_pairs=False)
    assert isinstance(pairs, PreferencePairs)
    assert [pairs[i]["prompt"] for i in range(len(pairs))] == dataset["prompt"][:]


def test_the_format_of_a_dataset_does_not_matter(processor):
    dataset = Dataset.from_list(rows_with_reverse()).cast_column("chosen", Image()).with_format("numpy")
    assert len(prepare_pairs(dataset, processor)) == 8


@pytest.mark.parametrize("kind", ["map", "stream"])
def test_margins_reach_the_batch_one_per_pair(processor, kind):
    rows = [row | {"margin": 0.5 * i} for i, row in enumerate(rows_with_reverse(3))]
    pairs = list(prepare_pairs(as_dataset(rows, kind), processor))
    batch = DataCollatorForSpatialPreference(processor)(pairs)
    assert batch["margin"].tolist() == [0.0, 0.0, 0.5, 0.5, 1.0, 1.0]
    assert len(batch["input_ids"]) == 12


# What is wrong with row 2, in which column the message says so, and in which words.
FAULTS = {
    "no image": ({"chosen": None}, "chosen", "None is missing"),
    "image without content": ({"chosen": {"bytes": None, "path": None}}, "chosen", "is missing"),
    "not an image": ({"rejected": {"bytes": b"hello", "path": None}}, "rejected", "<5 bytes>.* is not a PNG"),
    "missing file": ({"rejected": {"bytes": None, "path": "no/such.png"}}, "rejected", "no/such.png.* cannot be open"),
    "empty prompt": ({"prompt": " \n"}, "prompt", r"' \\n' is empty"),
    "no prompt": ({"prompt": None}, "prompt", "None is missing"),
    "empty perturbed prompt": ({"perturbed_prompt": ""}, "perturbed_prompt", "is empty"),
    "perturbed prompt is the prompt": (
        {"perturbed_prompt": "a cube left of 2 spheres"},
        "perturbed_prompt",
        "contradict",
    ),
    "long prompt": ({"prompt": "cube " * 300}, "prompt", "'cube cube .* tokens .* `max_length` is 200"),
    "long perturbed prompt": ({"perturbed_prompt": "cube " * 300}, "perturbed_prompt", "`max_length` is 200"),
    "margin is not finite": ({"margin": float("nan")}, "margin", "nan is not a finite number"),
    "no margin": ({"margin": None}, "margin", "None is not a finite number"),
    "narrow image": ({"chosen": {"bytes": encoded(picture(9, 1, 300)), "path": None}}, "chosen", "1x300"),
    "same image twice": (
        {"chosen": {"bytes": encoded(picture(5, 48)), "path": None}},
        "rejected",
        "shows the chosen image",
    ),
}


@pytest.mark.parametrize("kind", ["map", "stream"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_row_is_named_or_left_out_and_listed(processor, tmp_path, fault, kind):
    change, column, words = FAULTS[fault]
    rows = [row | {"margin": 1.0} for row in rows_with_reverse()]
    rows[2] |= change

    with pytest.raises(ValueError, match=rf"(?s)train, row 2, `{column}`: .*{words}.*skip_bad_rows"):
        list(prepare_pairs(as_dataset(rows, kind), processor, max_length=200))

    file = tmp_path / "bad_rows.jsonl"
    pairs = prepare_pairs(
        as_dataset(rows, kind), processor, max_length=200, skip_bad_rows=True, bad_rows_file=file, num_threads=2
    )
    good = [row for i, row in enumerate(rows) if i != 2]
    assert [pair["prompt"] for pair in pairs] == [
        prompt for row in good for prompt in (row["prompt"], row["perturbed_prompt"])
    ]
    (line,) = file.read_text().splitlines()
    record = json.loads(line)
    assert (record["dataset"], record["row"], record["column"]) == ("train", 2, column)


def batches_of(loader):
    """
    All batches. After an error, the workers end at once: with an iterator that its traceback keeps, each one is waited for 5
    seconds when that is collected.
    """
    batches = iter(loader)
    try:
        return list(batches)
    except ValueError as error:
        traceback.clear_frames(error.__traceback__)
        del batches
        raise


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", ["map", "stream"])
def test_damage_behind_the_header_is_found_where_batches_are_made_and_names_the_row(processor, kind, num_workers):
    rows = rows_with_reverse()
    rows[3]["rejected"] = {"bytes": truncated(picture(1)), "path": None}
    pairs = prepare_pairs(as_dataset(rows, kind), processor)
    loader = DataLoader(
        pairs, batch_size=1, collate_fn=DataCollatorForSpatialPreference(processor), num_workers=num_workers
    )
    with pytest.raises(ValueError, match=r"row 3, `rejected`: .* bytes>.* cannot be decoded.*skip_bad_rows") as error:
        batches_of(loader)
    assert ("worker process" in str(error.value)) == (num_workers > 0)
    # with `skip_bad_rows` it is found before
    assert len(list(prepare_pairs(as_dataset(rows, kind), processor, skip_bad_rows=True))) == 6


def test_rows_of_a_stream_that_workers_share_are_numbered_by_worker(processor, tmp_path):
    """Each worker counts the rows of its own shards: two rows of one number are two rows."""
    rows = rows_with_reverse(12)
    for row in (3, 6, 11):  # the shards are 0-3, 4-7 and 8-11; the first worker reads the first and the last
        rows[row]["prompt"] = ""
    stream = Dataset.from_list(rows).to_iterable_dataset(num_shards=3)
    collator, file = DataCollatorForSpatialPreference(processor), tmp_path / "bad_rows.jsonl"
    pairs = prepare_pairs(stream, processor, skip_bad_rows=True, bad_rows_file=file)
    assert len(list(DataLoader(pairs, batch_size=None, num_workers=2))) == 2 * 9
    listed = sorted((record["dataset"], record["row"]) for record in map(json.loads, file.read_text().splitlines()))
    assert listed == [
        ("train as worker 0 of 2 reads it", 3),
        ("train as worker 0 of 2 reads it", 7),
        ("train as worker 1 of 2 reads it", 2),
    ]
    rows[5]["chosen"] = {"bytes": truncated(picture(1)), "path": None}
    pairs = prepare_pairs(Dataset.from_list(rows[4:6]).to_iterable_dataset(num_shards=2), processor)
    with pytest.raises(ValueError, match=r"row 0 as worker 1 of 2 reads it, `chosen`: .* cannot be decoded"):
        batches_of(DataLoader(pairs, batch_size=1, collate_fn=collator, num_workers=2))
    pairs = prepare_pairs(Dataset.from_list(rows[4:6]).to_iterable_dataset(), processor)
    with pytest.raises(ValueError, match=r"row 1, `chosen`"):  # of a single shard, which one worker reads
        batches_of(DataLoader(pairs, batch_size=1, collate_fn=collator, num_workers=2))


@pytest.mark.parametrize("kind", ["map", "stream"])
def test_images_stay_undecoded_until_a_batch_is_made(processor, kind):
    rows = rows_with_reverse()
    rows[0]["chosen"] = {"bytes": truncated(picture(1)), "path": None}  # would fail if it were decoded
    dataset = Dataset.from_list(rows).cast_column("chosen", Image()).cast_column("rejected", Image())
    pairs = list(prepare_pairs(dataset if kind == "map" else dataset.to_iterable_dataset(), processor))
    assert [pair["chosen"] for pair in pairs[::2]] == [row["chosen"] for row in rows]


def test_damage_in_a_reverse_pair_is_blamed_on_the_column_of_the_dataset(processor):
    rows = rows_with_reverse()
    rows[1]["rejected"] = {"bytes": truncated(picture(1)), "path": None}
    reverse = prepare_pairs(Dataset.from_list(rows), processor)[3]
    with pytest.raises(ValueError, match="row 1, `rejected`"):
        DataCollatorForSpatialPreference(processor)([reverse])


def test_an_image_without_pixels_is_a_bad_row(processor):
    rows = rows_with_reverse(2)
    rows[1]["rejected"]["bytes"] = b"P6 0 8 255\n"
    with pytest.raises(ValueError, match=r"train, row 1, `rejected`: .*(no pixels|is not a PNG|cannot be opened)"):
        prepare_pairs(Dataset.from_list(rows), processor)
    rows[1]["rejected"] = PILImage.new("RGB", (0, 8))
    with pytest.raises(ValueError, match=r"train, row 1, `rejected`: <image of 0x8 .* no pixels"):
        list(prepare_pairs(as_dataset(rows, "stream"), processor))


def test_the_limit_is_the_length_of_the_row_in_tokens(processor):
    rows = rows_with_reverse(2)
    dataset = Dataset.from_list(rows)
    collator = DataCollatorForSpatialPreference(processor)
    longest = collator(list(prepare_pairs(dataset, processor)))["input_ids"].shape[1]
    assert len(prepare_pairs(dataset, processor, max_length=longest)) == 4
    with pytest.raises(ValueError, match=f"has {longest} tokens"):
        prepare_pairs(dataset, processor, max_length=longest - 1)


@pytest.mark.parametrize("kind", ["map", "stream"])
@pytest.mark.parametrize("missing", ["prompt", "chosen", "rejected", "perturbed_prompt"])
def test_a_missing_column_is_named_with_those_that_are_there(processor, kind, missing):
    rows = [{**row, "extra": 1} for row in rows_with_reverse()]
    for row in rows:
        del row[missing]
    with pytest.raises(ValueError, match=rf"train, `{missing}`: the column is missing.* extra; rename.*rename_column"):
        prepare_pairs(as_dataset(rows, kind), processor, use_reverse_pairs=True)


@pytest.mark.parametrize("kind", ["map", "stream"])
def test_an_empty_dataset_is_an_error(processor, kind):
    dataset = Dataset.from_list(rows_with_reverse()).select([]) if kind == "map" else as_dataset([], kind)
    with pytest.raises(ValueError, match="The eval dataset is empty"):
        prepare_pairs(dataset, processor, dataset_name="eval")


@pytest.mark.parametrize("as_stream", [False, True])
@pytest.mark.parametrize(
    "column, values",
    [
        ("prompt", [1, 2]),
        ("prompt", [["a"], ["b"]]),
        ("chosen", [1, 2]),
        ("rejected", [["a.png"], ["b.png"]]),
        ("margin", ["1", "2"]),
    ],
)
def test_a_column_of_a_wrong_type_is_named_with_what_it_holds(processor, column, values, as_stream):
    rows = [row | {column: value} for row, value in zip(rows_with_reverse(2), values, strict=True)]
    dataset = Dataset.from_list(rows)
    with pytest.raises(ValueError, match=rf"train, `{column}`: the column holds (Value|List)"):
        prepare_pairs(dataset.to_iterable_dataset() if as_stream else dataset, processor, skip_bad_rows=True)


def test_a_dataset_of_one_pair_over_and_over_is_an_error(processor):
    row = rows_with_reverse(1)[0]
    with pytest.raises(ValueError, match="All 3 rows of the train dataset are the same pair"):
        prepare_pairs(Dataset.from_list([row] * 3), processor)
    assert len(prepare_pairs(Dataset.from_list([row]), processor)) == 2
    other = row | {"prompt": "another prompt"}
    assert len(prepare_pairs(Dataset.from_list([row, row, other]), processor)) == 6


@pytest.mark.parametrize("kind", ["map", "stream"])
def test_nothing_but_bad_rows_is_an_error_even_if_they_may_be_skipped(processor, kind, tmp_path):
    rows = [row | {"prompt": ""} for row in rows_with_reverse()]
    with pytest.raises(ValueError, match=r"All .*rows of the train dataset are bad"):
        prepare_pairs(as_dataset(rows, kind), processor, skip_bad_rows=True, bad_rows_file=tmp_path / "bad.jsonl")


def test_a_transform_is_refused_because_it_would_be_lost(processor):
    dataset = Dataset.from_list(rows_with_reverse()).with_transform(lambda batch: batch)
    with pytest.raises(ValueError, match="reset_format"):
        prepare_pairs(dataset, processor)


def test_equal_files_under_different_names_are_the_same_image(processor, tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(encoded(picture(0)))
    row = {"prompt": "a cube", "chosen": str(tmp_path / "a.png"), "rejected": str(tmp_path / "b.png")}
    with pytest.raises(ValueError, match="shows the chosen image"):
        prepare_pairs(Dataset.from_list([row]), processor)


def test_checking_reads_headers_only(processor, tmp_path):
    """Files of 49 million pixels that are not even there pass: the header says enough, the rest comes when it is used."""
    header = b"P6 7000 7000 255\n"
    for name, data in (("a.ppm", b"0" * 10), ("b.ppm", b"1" * 10)):
        (tmp_path / name).write_bytes(header + data)
    row = {"prompt": "a cube", "chosen": str(tmp_path / "a.ppm"), "rejected": str(tmp_path / "b.ppm")}
    assert len(prepare_pairs(Dataset.from_list([row]), processor)) == 1


def test_pairs_and_collator_travel_to_spawned_workers(processor):
    pairs = prepare_pairs(Dataset.from_list(rows_with_reverse()), processor)
    pairs_there, collator_there = pickle.loads(pickle.dumps((pairs, DataCollatorForSpatialPreference(processor))))
    here = DataCollatorForSpatialPreference(processor)([pairs[0], pairs[1]])
    there = collator_there([pairs_there[0], pairs_there[1]])
    assert all(torch.equal(here[name], there[name]) for name in here)


def test_rows_come_in_random_order_each_followed_by_its_reverse():
    sampler = RowSampler(50, seed=1)
    first, again = list(sampler), list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert first == again != second and len(sampler) == 100
    for order in (first, second):
        assert sorted(order) == list(range(100)) != order
        assert all(order[i] % 2 == 0 and order[i + 1] == order[i] + 1 for i in range(0, 100, 2))


@pytest.mark.parametrize("kind", ["map", "stream"])
def test_a_pair_and_its_reverse_share_their_images(processor, kind):
    pairs = prepare_pairs(as_dataset(rows_with_reverse(), kind), processor)
    batch = DataCollatorForSpatialPreference(processor)(list(pairs))
    assert batch["image_index"].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 1, 0, 3, 2, 5, 4, 7, 6]
    assert len(batch["image_grid_thw"]) == 8
    assert len(batch["pixel_values"]) == batch["image_grid_thw"].prod(-1).sum()


# Change of row 2, and whether the row can be used then.
ROWS = {
    "as it is": ({}, True),
    "blanks at the ends": ({"prompt": " a cat\n"}, True),
    "null prompt": ({"prompt": None}, False),
    "null perturbed prompt": ({"perturbed_prompt": None}, False),
    "blank perturbed prompt": ({"perturbed_prompt": " \ufeff"}, False),
    "perturbed prompt is the prompt but for blanks": ({"perturbed_prompt": "a cube left of 2 spheres "}, False),
    "very long prompt": ({"prompt": "a" * 20_001}, False),
    "margin 0": ({"margin": 0.0}, True),
    "negative margin": ({"margin": -1.5}, True),
    "margin NaN": ({"margin": float("nan")}, False),
    "infinite margin": ({"margin": float("inf")}, False),
    "null margin": ({"margin": None}, False),
    "null image": ({"rejected": None}, False),
    "image without content": ({"rejected": {"bytes": None, "path": None}}, False),
    "address": ({"rejected": {"bytes": None, "path": "https://x.invalid/a.png"}}, False),
    "no image": ({"chosen": {"bytes": b"hello", "path": None}}, False),
    "cut image": ({"chosen": {"bytes": truncated(picture(1)), "path": None}}, False),
    "narrow image": ({"chosen": {"bytes": encoded(picture(9, 1, 201)), "path": None}}, False),
    "nearly narrow image": ({"chosen": {"bytes": encoded(picture(9, 1, 200)), "path": None}}, True),
    "the same file": ({"chosen": {"bytes": encoded(picture(5, 48)), "path": None}}, False),
    "the same pixels in another format": (
        {"chosen": {"bytes": encoded(picture(5, 48), format="BMP"), "path": None}},
        False,
    ),
    "other pixels": ({"chosen": {"bytes": encoded(picture(6, 48), format="BMP"), "path": None}}, True),
}


@pytest.mark.parametrize("skip_bad_rows", [False, True])
@pytest.mark.parametrize("kind", ["map", "stream"])
def test_training_refuses_a_row_exactly_if_validation_does(processor, tmp_path, kind, skip_bad_rows):
    collate = DataCollatorForSpatialPreference(processor)
    for name, (change, is_good) in ROWS.items():
        rows = [row | {"margin": 1.0} for row in rows_with_reverse()]
        rows[2] |= change
        errors = validate_splits({"train": Dataset.from_list(rows)}).errors
        assert {finding.place.row for finding in errors} == (set() if is_good else {2}), name
        file = tmp_path / f"{name}.jsonl"
        try:
            pairs = list(
                prepare_pairs(as_dataset(rows, kind), processor, skip_bad_rows=skip_bad_rows, bad_rows_file=file)
            )
            for pair in pairs:
                collate([pair])
        except ValueError as error:
            assert not skip_bad_rows and not is_good and "row 2" in str(error), name
        else:
            assert is_good or skip_bad_rows, name
            assert len(pairs) == (8 if is_good else 6), name
            listed = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
            assert {(line["row"], line["column"]) for line in listed} == {
                (finding.place.row, finding.place.column) for finding in errors
            }, name


@pytest.mark.parametrize(
    ("column", "values"),
    [("margin", ["3"] * 4), ("margin", [True] * 4), ("margin", [1] * 4), ("margin", [None] * 4),
     ("perturbed_prompt", [None] * 4), ("perturbed_prompt", [1] * 4), ("prompt", [None] * 4), ("chosen", [1] * 4)],
)  # fmt: skip
def test_training_refuses_a_column_exactly_if_validation_does(processor, column, values):
    dataset = Dataset.from_list(rows_with_reverse())
    dataset = dataset.remove_columns([column] if column in dataset.column_names else []).add_column(column, values)
    if any(finding.severity == "error" for finding in validate_splits({"train": dataset}).findings):
        with pytest.raises(ValueError, match=rf"train, `{column}`: the column holds"):
            prepare_pairs(dataset, processor)
    else:
        assert len(prepare_pairs(dataset, processor)) == (4 if column == "perturbed_prompt" else 8)
