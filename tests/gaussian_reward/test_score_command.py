"""`trl_spatial score`: a bad row costs that row, and the same command continues."""

import argparse
import json
import tracemalloc
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLModel
from transformers.utils import is_flash_attn_2_available

from trl_spatial.gaussian_reward.scoring import SpatialScore
from trl_spatial.scripts import evaluate_pairs, serve
from trl_spatial.scripts.score import ScoreFile, main, make_parser, show_scores


@pytest.mark.parametrize(
    ("name", "device"), [("score", "gpu"), ("serve", "gpu"), ("pairs", "gpu"), ("score", "cuda:99")]
)
def test_an_unknown_device_is_named_with_those_that_there_are(name, device):
    """And before a model is looked for: there is none of that name."""
    line = ["--model", "nowhere", "--device", device]
    commands = {
        "score": lambda: main(*make_parser().parse_args_and_config([*line, "--prompt", "a cube", "picture.png"])),
        "serve": lambda: serve.main(*serve.make_parser().parse_args_and_config(line)),
        "pairs": lambda: evaluate_pairs.main(argparse.Namespace(batch_size=1, device=device)),
    }
    with pytest.raises(ValueError, match=rf"`--device` is '{device}'\. Use cpu( or |: )"):
        commands[name]()


def test_bad_rows_are_listed_and_an_interrupted_run_continues(make_reward_model, processor, prompts, images, tmp_path):
    SpatialScore(make_reward_model(), processor).save_pretrained(tmp_path / "model")
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
    whole = (tmp_path / "3.png").read_bytes()
    (tmp_path / "3.png").write_bytes(whole[: len(whole) // 2])
    rows = [json.dumps({"prompt": prompt, "image": f"{number}.png"}) for number, prompt in enumerate(prompts)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    output = tmp_path / "new" / "scores.jsonl"
    command = ["--model", str(tmp_path / "model"), "--input", str(tmp_path / "rows.jsonl"), "--output", str(output)]

    with pytest.raises(ValueError, match=r"1 of 5 rows have no score: row 3: .*3\.png cannot be decoded"):
        main(*make_parser().parse_args_and_config(command))
    first = {record["row"]: record for record in map(json.loads, output.read_text().splitlines())}
    assert [row for row in sorted(first) if "error" in first[row]] == [3]

    (tmp_path / "3.png").write_bytes(whole)
    output.write_text("".join(f"{json.dumps(first[row])}\n" for row in (0, 1)) + '{"row": 2, "pro')  # killed
    main(*make_parser().parse_args_and_config(command))
    scores = SpatialScore(make_reward_model(), processor).score(prompts, images)
    records = sorted(map(json.loads, output.read_text().splitlines()), key=lambda record: record["row"])
    assert [record["mean"] for record in records] == pytest.approx(scores.mean.tolist(), abs=1e-5)

    with pytest.raises(ValueError, match=r"holds scores of .*model@\w+, not of .*model@\w+\. Delete it, or name"):
        main(*make_parser().parse_args_and_config([*command, "--dtype", "bfloat16"]))
    trained = make_reward_model()
    with torch.no_grad():
        next(trained.head.parameters()).add_(1)
    SpatialScore(trained, processor).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="holds scores of"):
        main(*make_parser().parse_args_and_config(command))

    Image.new("RGB", (8, 8)).save(tmp_path / "other.png")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "another", "image": "other.png"}))
    with pytest.raises(ValueError, match="holds rows other than"):
        main(*make_parser().parse_args_and_config(command))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": " ", "image": "0.png"}, "row 1: The prompt is empty."),
        ({"prompt": 5, "image": "0.png"}, "row 1: The prompt is a int"),
        ({"prompt": "a", "image": None}, "row 1: The image is missing."),
        ({"prompt": "a", "image": "none.png"}, "row 1: none.png cannot be opened"),
    ],
    ids=str,
)
def test_a_bad_row_has_one_number(make_reward_model, processor, images, tmp_path, row, message):
    SpatialScore(make_reward_model(), processor).save_pretrained(tmp_path / "model")
    images[0].save(tmp_path / "0.png")
    rows = [json.dumps(entry) for entry in ({"prompt": "a", "image": "0.png"}, row)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    with pytest.raises(ValueError) as error:
        main(
            *make_parser().parse_args_and_config(["--model", f"{tmp_path}/model", "--input", f"{tmp_path}/rows.jsonl"])
        )
    assert message in str(error.value)


def test_a_wrong_batch_size_is_no_fault_of_the_rows(tmp_path):
    command = [
        "--model",
        "none",
        "--input",
        "none.jsonl",
        "--output",
        str(tmp_path / "scores.jsonl"),
        "--batch_size",
        "0",
    ]
    with pytest.raises(ValueError, match=r"--batch_size is 0\. Use at least 1"):
        main(*make_parser().parse_args_and_config(command))
    assert not list(tmp_path.iterdir())


def test_the_attention_function_is_the_one_that_is_asked_for(
    make_reward_model, processor, prompts, images, tmp_path, monkeypatch
):
    expected = SpatialScore(make_reward_model(), processor).score(prompts[:1], images[:1])
    SpatialScore(make_reward_model(), processor).save_pretrained(tmp_path / "model")
    images[0].save(tmp_path / "0.png")
    command = ["--model", str(tmp_path / "model"), "--prompt", prompts[0], str(tmp_path / "0.png"), "--json"]
    used = set()
    call = Qwen2_5_VLModel.__call__
    monkeypatch.setattr(
        Qwen2_5_VLModel,
        "__call__",
        lambda model, *args, **kwargs: (
            used.add(model.config.text_config._attn_implementation) or call(model, *args, **kwargs)
        ),
    )
    for name in ("eager", "sdpa"):
        used.clear()
        main(
            *make_parser().parse_args_and_config(
                [*command, "--attn_implementation", name, "--output", str(tmp_path / name)]
            )
        )
        assert used == {name}
        assert json.loads((tmp_path / name).read_text())["mean"] == pytest.approx(expected.mean[0], abs=1e-5)
    with pytest.raises(SystemExit):
        make_parser().parse_args_and_config([*command, "--attn_implementation", "quick"])
    if not is_flash_attn_2_available():
        with pytest.raises(ImportError, match="package for FlashAttention2"):
            main(*make_parser().parse_args_and_config([*command, "--attn_implementation", "flash_attention_2"]))


def test_scores_are_read_in_the_order_of_rows_with_few_of_them_in_memory(tmp_path, capsys):
    args = make_parser().parse_args_and_config(["--model", "m", "--input", "i", "--output", "o", "--json"])[0]
    order = np.random.default_rng(0).permutation(20_000)
    records = [{"row": int(row), "prompt": "ö" * 50, "mean": float(row), "model": "m"} for row in order]
    with (tmp_path / "scores").open("w+b") as file:
        scores = ScoreFile(file, len(records))
        for start in range(0, len(records), 64):
            scores.append(records[start : start + 64])
    size = (tmp_path / "scores").stat().st_size
    with (tmp_path / "scores").open("r+b") as file, (tmp_path / "printed").open("w") as printed:
        tracemalloc.start()
        again = ScoreFile(file, len(records))
        with redirect_stdout(printed):
            show_scores(args, again)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    shown = [json.loads(line) for line in (tmp_path / "printed").read_text().splitlines()]
    assert shown == sorted(records, key=lambda record: record["row"])
    assert "20000 scores saved to o" in capsys.readouterr().err
    assert peak < size / 8
