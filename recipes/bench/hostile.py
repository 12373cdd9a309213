"""
Runs the commands on damaged, malicious and absurd input: `python recipes/bench/hostile.py`.

Each input goes through the command line in its own process, forked after torch is imported. The right answer is exit code 1 or 2
and one line `trl_spatial COMMAND: error: ...`, or, for input that is odd but fine, exit code 0. Faults are tracebacks, accepting
what should be refused or refusing what is fine, running code from the input, network connections, more than `--seconds` of
processor time, and more than 1 GB of memory on top of what the imports take.
"""

import argparse
import io
import json
import multiprocessing
import os
import resource
import runpy
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import trl_spatial
from trl_spatial import SpatialScore, cli
from trl_spatial.gaussian_reward import spatial_score_lora_config
from trl_spatial.gaussian_reward.modeling import GaussianRewardModel
from trl_spatial.gaussian_reward.processing import load_processor


PACKAGE = Path(trl_spatial.__file__).parent
BACKBONE, FLUX = PACKAGE / "tiny_models" / "qwen2_5_vl", PACKAGE / "tiny_models" / "flux"
PROMPT = "A red circle is left of a blue square."
GIGABYTE = 10**9


@dataclass(frozen=True)
class Case:
    """A command line, and whether its input is fine."""

    name: str
    words: tuple[str, ...]
    is_fine: bool = False


@dataclass(frozen=True)
class Outcome:
    """The outcome of a case; `faults` is empty if the command answered correctly."""

    name: str
    faults: tuple[str, ...]
    last_line: str
    seconds: float
    megabytes: float


# Images


def picture(size: int = 64) -> Image.Image:
    pixels = np.full((size, size, 3), 235, np.uint8)
    pixels[20:40, 8:28] = (220, 40, 40)
    pixels[20:40, 40:60] = (40, 60, 220)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int, *, bits: int = 1, color: int = 0) -> bytes:
    """A PNG whose header claims a size, but which holds at most 64 rows."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(bytes((width * bits + 7) // 8 + 1) * min(height, 64))
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def bad_images(canary: Path) -> dict[str, bytes]:
    png, jpeg = encoded(picture(), "PNG"), encoded(picture(), "JPEG")
    gif, tiff, webp = (encoded(picture(), kind) for kind in ("GIF", "TIFF", "WEBP"))
    broken_crc = bytearray(png)
    broken_crc[len(png) // 2] ^= 0xFF
    script = (
        f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n(%pipe%touch {canary}) (w) file closefile\nshowpage\n"
    )
    return {
        "empty": b"",
        "one byte": b"\x89",
        "random bytes": np.random.default_rng(0).bytes(4096),
        "text": b"this is not an image\n",
        "html": b"<!doctype html><title>404</title>",
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
        "pdf": b"%PDF-1.7\n1 0 obj<<>>endobj\ntrailer<<>>\n%%EOF",
        "postscript": script.encode(),
        "png header only": png[:33],
        "png cut": png[: len(png) // 2],
        "png checksum": bytes(broken_crc),
        "jpeg cut": jpeg[: len(jpeg) // 3],
        "gif header only": gif[:10],
        "tiff cut": tiff[: len(tiff) // 2],
        "webp cut": webp[: len(webp) // 2],
        "169 megapixels": png_header(13000, 13000),
        "4 gigapixels": png_header(65535, 65535),
        "no height": png_header(64, 0),
        "a line": encoded(Image.new("RGB", (2000, 2)), "PNG"),
    }


def odd_images() -> dict[str, bytes]:
    image = picture()
    with_alpha = image.convert("RGBA")
    profile = {"icc_profile": b"not a profile"}
    return {
        "bmp": encoded(image, "BMP"),
        "tiff": encoded(image, "TIFF"),
        "webp": encoded(image, "WEBP", lossless=True),
        "palette": encoded(image.convert("P"), "PNG"),
        "grey": encoded(image.convert("L"), "PNG"),
        "grey with alpha": encoded(image.convert("LA"), "PNG"),
        "alpha": encoded(with_alpha, "PNG"),
        "two colours": encoded(image.convert("1"), "PNG"),
        "sixteen bits": encoded(Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257), "PNG"),
        "cmyk": encoded(image.convert("CMYK"), "JPEG"),
        "animated": encoded(image, "GIF", save_all=True, append_images=[image.rotate(90)]),
        "damaged profile": encoded(image, "PNG", **profile),
        "one pixel": encoded(Image.new("RGB", (1, 1)), "PNG"),
    }


def image_cases(folder: Path, model: Path, canary: Path) -> Iterator[Case]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    score = ("score", "--model", str(model))
    for kind, contents in (("bad", bad_images(canary)), ("odd", odd_images())):
        is_fine = kind == "odd"
        for name, data in contents.items():
            file = folder / f"{name.replace(' ', '_')}.png"
            file.write_bytes(data)
            yield Case(f"score, image: {name}", (*score, "--prompt", PROMPT, str(file)), is_fine)
            rows = folder / f"{file.stem}.jsonl"
            rows.write_text(json.dumps({"prompt": PROMPT, "image": file.name}) + "\n")
            yield Case(f"score --input, image: {name}", (*score, "--input", str(rows), "--json"), is_fine)
            cell = {"bytes": data, "path": None}
            other = {"bytes": encoded(picture().rotate(90), "PNG"), "path": None}
            pairs = folder / f"{file.stem}.parquet"
            table = {"prompt": [PROMPT], "chosen": [cell], "rejected": [other]}
            pq.write_table(pa.table(table), pairs)
            yield Case(f"data validate, image: {name}", ("data", "validate", str(pairs)), is_fine)
            if not is_fine:
                yield Case(f"reward, image: {name}", reward_words(folder, pairs))
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "fifo.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    places = [
        "missing.png",
        "folder.png",
        "fifo.png",
        "loop.png",
        "a\nb.png",
        "\N{PILE OF POO}.png",
        "x" * 5000 + ".png",
    ]
    places += ["/dev/zero", "/dev/stdin", "http://127.0.0.1:9/a.png", "https://192.0.2.1/a.png", "file:///etc/passwd"]
    places += ["hf://datasets/a/b/c.png", "zip://a.png::http://192.0.2.1/a.zip", "s3://bucket/a.png", ""]
    for place in places:
        path = place if "://" in place or place.startswith("/") or not place else str(folder / place)
        yield Case(f"score, image: {place[:40]!r}", (*score, "--prompt", PROMPT, path))
        rows = folder / f"place_{abs(hash(place))}.jsonl"
        rows.write_text(json.dumps({"prompt": PROMPT, "image": path}) + "\n")
        yield Case(f"score --input, image: {place[:40]!r}", (*score, "--input", str(rows), "--json"))
        rows = folder / f"pair_{abs(hash(place))}.jsonl"
        rows.write_text(json.dumps({"prompt": PROMPT, "chosen": path, "rejected": str(folder / "bmp.png")}) + "\n")
        yield Case(f"data validate, image: {place[:40]!r}", ("data", "validate", str(rows)))


# Prompts


def prompt_cases(folder: Path, model: Path) -> Iterator[Case]:
    image = str(folder / "bmp.png")
    fine = ["\ufeffa red cup", "a\u2028b", "a\x0bb", "NA", "null", "\u202eright to left", "e" + "\u0301" * 50, "\x00 zero",
            "<reward>", "<|im_end|><|image_pad|>", "<tool_call>", "{{ 7 * 7 }}", "🐈" * 50, "-", "  a red cup  "]  # fmt: skip
    bad = ["", "   ", "\t\n", "word " * 200_000, "a" * 1_000_000]
    for prompt in fine + bad:
        is_fine = prompt in fine
        name = f"{prompt[:16]!r} ({len(prompt)})"
        if "\x00" not in prompt and len(prompt) < 100_000:  # the limits of a command line
            words = ("score", "--model", str(model), f"--prompt={prompt}", image)
            yield Case(f"score, prompt: {name}", words, is_fine)
        rows = folder / f"prompt_{abs(hash(prompt))}.jsonl"
        rows.write_text(json.dumps({"prompt": prompt, "image": image}) + "\n")
        yield Case(f"score --input, prompt: {name}", ("score", "--model", str(model), "--input", str(rows)), is_fine)
        rows = folder / f"prompts_{abs(hash(prompt))}.jsonl"
        rows.write_text(json.dumps({"prompt": prompt}) + "\n")
        if not is_fine:
            yield Case(f"grpo, prompt: {name}", grpo_words(folder, rows))
    for number, value in enumerate(("\ud800", None, 7, ["a"], {"a": 1}, True, 1e400)):
        rows = folder / f"typed_{number}.jsonl"
        rows.write_text(json.dumps({"prompt": value, "image": image}) + "\n")
        yield Case(f"score --input, prompt: {value!r}", ("score", "--model", str(model), "--input", str(rows)))
        yield Case(f"grpo, prompt: {value!r}", grpo_words(folder, rows))


# Files of rows


def bad_files(folder: Path) -> dict[str, Path]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    whole = folder / "whole.parquet"
    pq.write_table(pa.table({"prompt": ["a"] * 100, "number": list(range(100))}), whole)
    contents = {
        "empty.jsonl": b"",
        "empty.json": b"",
        "empty.csv": b"",
        "empty.parquet": b"",
        "blank.txt": b"\n\n  \n",
        "cut.jsonl": b'{"prompt": "a"}\n{"prompt": "b',
        "numbers.jsonl": b"1\n2\n3\n",
        "lists.jsonl": b'["a", "b"]\n',
        "mixed.jsonl": b'{"prompt": "a"}\n{"prompt": {"b": 1}}\n',
        "text.jsonl": b"hello\nworld\n",
        "latin.jsonl": '{"prompt": "caf\u00e9"}\n'.encode("latin-1"),
        "utf16.jsonl": '{"prompt": "a"}\n'.encode("utf-16"),
        "scalar.json": b"42",
        "deep.json": b"[" * 100_000 + b"]" * 100_000,
        "quotes.csv": b'prompt,image\n"a,b.png\n',
        "ragged.csv": b"prompt,image\na,b,c,d\ne\n",
        "header.csv": b"prompt,image\n",
        "binary.csv": bytes(range(256)) * 20,
        "other.jsonl": b'{"text": "a"}\n',
        "cut.parquet": whole.read_bytes()[:300],
        "random.parquet": np.random.default_rng(1).bytes(3000),
        "magic.parquet": b"PAR1" + bytes(50) + b"PAR1",
        "rows.xlsx": b"PK\x03\x04" + bytes(100),
        "rows.pkl": b"\x80\x04N.",
        "rows.py": b"raise SystemExit('ran')\n",
    }
    files = {}
    for name, data in contents.items():
        files[name] = folder / name
        files[name].write_bytes(data)
    folders = {
        "empty_folder": {},
        "info_broken": {"dataset_info.json": b"{", "state.json": b"{}"},
        "dict_broken": {"dataset_dict.json": b'{"splits": ["train"]}'},
        "url_readme": {"README.md": b"---\nconfigs:\n- config_name: default\n  data_files: http://127.0.0.1:9/a.parquet\n---\n"},
        "outside_readme": {"README.md": b"---\nconfigs:\n- config_name: default\n  data_files: ../other.jsonl\n---\n"},
        "script": {"script.py": b"import os; os._exit(0)\n"},
    }  # fmt: skip
    for name, parts in folders.items():
        files[name] = folder / name
        files[name].mkdir()
        for part, data in parts.items():
            (files[name] / part).write_bytes(data)
    files["missing"] = folder / "nothing.jsonl"
    os.mkfifo(folder / "fifo.jsonl")
    files["fifo"] = folder / "fifo.jsonl"
    return files


def file_cases(folder: Path, model: Path) -> Iterator[Case]:
    for name, file in bad_files(folder).items():
        yield Case(f"score --input {name}", ("score", "--model", str(model), "--input", str(file)))
        yield Case(f"data validate {name}", ("data", "validate", str(file)))
        yield Case(f"push {name}", ("push", str(file), "--to", "org/name", "--dry-run"))
        yield Case(f"reward --dataset {name}", reward_words(folder, file))
        if name not in ("outside_readme",):  # prompts without images would be fine
            yield Case(f"grpo --dataset {name}", grpo_words(folder, file))


def reward_words(folder: Path, dataset: Path) -> tuple[str, ...]:
    output = tempfile.mkdtemp(dir=folder)
    return ("reward", "--dataset", str(dataset), "--output_dir", output, "--model_name_or_path", str(BACKBONE),
            "--max_steps", "1", "--use_cpu", "true", "--report_to", "none", "--dataloader_num_workers", "0")  # fmt: skip


def grpo_words(folder: Path, dataset: Path, rewards: str = "rules") -> tuple[str, ...]:
    output = tempfile.mkdtemp(dir=folder)
    return ("grpo", "--dataset", str(dataset), "--rewards", rewards, "--output_dir", output, "--model_name_or_path",
            str(FLUX), "--max_steps", "1", "--use_cpu", "true", "--report_to", "none", "--height", "32", "--width", "32",
            "--num_generations", "2", "--top_k", "1", "--per_device_train_batch_size", "2",
            "--gradient_accumulation_steps", "1", "--num_inference_steps", "2")  # fmt: skip


# Checkpoints


def broken_checkpoints(good: Path, folder: Path, canary: Path) -> Iterator[Path]:
    weights = "adapter_model.safetensors"

    def copy(name: str, change: Callable[[Path], object]) -> Path:
        target = folder / name
        shutil.copytree(good, target)
        change(target)
        return target

    def edit(target: Path, file: str, **values: Any) -> None:
        content = json.loads((target / file).read_text())
        (target / file).write_text(json.dumps(content | values))

    def retype(target: Path, convert: Callable[[torch.Tensor], torch.Tensor]) -> None:
        save_file({name: convert(tensor) for name, tensor in load_file(target / weights).items()}, target / weights)

    def keep_only(target: Path, name: str) -> None:
        for file in target.iterdir():
            if file.name != name:
                file.unlink()

    def pickled(target: Path) -> None:
        torch.save(load_file(target / weights), target / "adapter_model.bin")
        (target / weights).unlink()

    def with_code(target: Path) -> None:
        edit(target, "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "evil.Evil"]})
        (target / "evil.py").write_text(f"open({str(canary)!r}, 'w').close()\n")

    def config_with_code(target: Path) -> None:
        edit(target, "config.json", auto_map={"AutoConfig": "evil.Evil"})
        (target / "evil.py").write_text(f"open({str(canary)!r}, 'w').close()\n")

    size = (good / weights).stat().st_size
    yield folder / "no_such_checkpoint"
    yield copy("empty", lambda target: keep_only(target, ""))
    yield copy("config_only", lambda target: keep_only(target, "config.json"))
    yield copy("no_weights", lambda target: (target / weights).unlink())
    yield copy("cut_weights", lambda target: os.truncate(target / weights, size // 2))
    yield copy("empty_weights", lambda target: os.truncate(target / weights, 0))
    yield copy("huge_header", lambda target: (target / weights).write_bytes(struct.pack("<Q", 2**62) + bytes(64)))
    yield copy("nan_weights", lambda target: retype(target, lambda tensor: torch.full_like(tensor, torch.nan)))
    yield copy("inf_weights", lambda target: retype(target, lambda tensor: torch.full_like(tensor, torch.inf)))
    yield copy("integer_weights", lambda target: retype(target, lambda tensor: tensor.to(torch.int32)))
    yield copy("other_shapes", lambda target: retype(target, lambda tensor: tensor[..., :1].contiguous()))
    yield copy("pickled", pickled)
    yield copy("tokenizer_code", with_code)
    yield copy("config_code", config_with_code)
    for name in ("config.json", "adapter_config.json", "tokenizer_config.json", "tokenizer.json"):
        for kind, content in (("broken", "{"), ("missing", None), ("list", "[1, 2]")):
            target = copy(f"{kind}_{name}", lambda target: None)
            if content is None:
                (target / name).unlink()
            else:
                (target / name).write_text(content)
            yield target
    yield copy("other_model_type", lambda target: edit(target, "config.json", model_type="llama"))
    yield copy("other_token", lambda target: edit(target, "config.json", reward_token_id=3))
    yield copy("no_backbone", lambda t: edit(t, "adapter_config.json", base_model_name_or_path="/no/such/model"))
    yield copy("template", lambda target: (target / "chat_template.jinja").write_text("{{ messages"))


def checkpoint_cases(folder: Path, model: Path, canary: Path) -> Iterator[Case]:
    image = str(folder / "bmp.png")
    for checkpoint in broken_checkpoints(model, folder / "checkpoints", canary):
        name = str(checkpoint)
        yield Case(f"score, model: {checkpoint.name}", ("score", "--model", name, "--prompt", PROMPT, image))
        output = tempfile.mkdtemp(dir=folder)
        yield Case(f"merge, model: {checkpoint.name}", ("merge", "--model", name, "--output", f"{output}/merged"))
        if checkpoint.name in ("empty", "config_only", "pickled", "no_such_checkpoint", "broken_config.json"):
            yield Case(f"push, model: {checkpoint.name}", ("push", name, "--to", "org/name", "--dry-run"))
            prompts = folder / "prompts.txt"
            prompts.write_text("a red cup\n")
            yield Case(f"grpo, reward: {checkpoint.name}", grpo_words(folder, prompts, name))


# Options


def option_cases(folder: Path, canary: Path) -> Iterator[Case]:
    laughs = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
    )
    contents = {
        "broken": b"a: [1, 2\n",
        "empty": b"",
        "list": b"- a\n- b\n",
        "scalar": b"7\n",
        "unknown": b"learning_rat: 1\n",
        "nested": b"learning_rate: {a: 1}\n",
        "word": b"learning_rate: fast\n",
        "binary": bytes(range(256)),
        "python": f"x: !!python/object/apply:os.system ['touch {canary}']\n".encode(),
        "laughs": laughs.encode(),
        "no environment": b"env: 3\n",
    }
    for name, data in contents.items():
        file = folder / f"{name}.yaml"
        file.write_bytes(data)
        for command in ("reward", "grpo", "score", "serve"):
            yield Case(f"{command} --config {name}", (command, "--config", str(file)))
    prompts = folder / "prompts.txt"
    prompts.write_text("a red cup\n")
    for option, values in {
        "--learning_rate": ("nan", "inf", "-1", "x"),
        "--noise_level": ("nan", "1e30", "-1"),
        "--beta": ("nan", "inf", "-1"),
        "--epsilon": ("nan", "0", "-1"),
        "--num_generations": ("0", "-2", "1e3", "x"),
        "--top_k": ("0", "9"),
        "--num_inference_steps": ("0", "-1"),
        "--height": ("0", "31", "-64"),
        "--reward_weights": ("nan", "inf", "1 2"),
        "--lora_r": ("0", "-1"),
    }.items():
        for value in values:
            words = (*grpo_words(folder, prompts), option, *value.split())
            yield Case(f"grpo {option} {value}", words)


# Running


def run(case: Case, canary: Path, max_seconds: int) -> Outcome:
    """Runs a case in a fork of this process."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as report:
        start = time.monotonic()
        child = os.fork()
        if not child:
            _become(case, output.fileno(), report.fileno(), max_seconds)
        _, status, usage = os.wait4(child, 0)
        output.seek(0)
        text = output.read().decode(errors="replace")
        report.seek(0)
        connections = report.read().decode()
    code, seconds = os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime
    memory = usage.ru_maxrss * 1024 - resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    lines = text.strip().splitlines()
    command = case.words[0]
    answers = [line for line in lines if line.startswith(f"trl_spatial {command}") and " error: " in line]
    faults = []
    if "Traceback (most recent call last)" in text:
        faults.append("traceback")
    if code < 0:
        faults.append(f"killed by {signal.Signals(-code).name}" + (", a hang" if -code in (14, 24, 9) else ""))
    elif case.is_fine and code != 0:
        faults.append("refused")
    elif not case.is_fine and code == 0:
        faults.append("accepted")
    elif not case.is_fine and not answers:
        faults.append("no clear error")
    if connections:
        faults.append(f"connected to {connections}")
    if canary.exists():
        canary.unlink()
        faults.append("code ran")
    if memory > GIGABYTE:
        faults.append("memory")
    shown = (answers or lines or [""])[-1]
    return Outcome(case.name, tuple(faults), shown[:240], max(seconds, time.monotonic() - start), memory / 1e6)


def _become(case: Case, output: int, report: int, max_seconds: int) -> None:
    """Runs the command line in this process, then exits."""
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = open(1, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        resource.setrlimit(resource.RLIMIT_CPU, (max_seconds, max_seconds + 1))
        signal.alarm(12 * max_seconds)  # for hangs that use no processor time
        connect = socket.socket.connect

        def guarded(self: socket.socket, address: Any) -> None:
            if isinstance(address, tuple):
                os.write(report, f"{address[0]} ".encode())
            connect(self, address)

        socket.socket.connect = guarded  # type: ignore[method-assign, assignment]
        code = 0
        try:
            if case.words[0] in cli.LAUNCHED_COMMANDS:  # run what the launcher would start
                sys.argv = [case.words[0], *case.words[1:]]
                runpy.run_module(f"trl_spatial.scripts.{case.words[0]}", run_name="__main__", alter_sys=True)
            else:
                code = cli.main(list(case.words))
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def make_checkpoint(folder: Path) -> Path:
    """Saves an untrained reward model with an adapter."""
    from peft import get_peft_model

    processor = load_processor(BACKBONE)
    model = GaussianRewardModel.from_backbone(str(BACKBONE), reward_token_id=processor.reward_token_id)
    SpatialScore(get_peft_model(model, spatial_score_lora_config(rank=2, alpha=4)), processor).save_pretrained(folder)
    return folder


def all_cases(folder: Path, canary: Path) -> list[Case]:
    model = make_checkpoint(folder / "model")
    (folder / "checkpoints").mkdir()
    return [
        *image_cases(folder, model, canary),
        *prompt_cases(folder, model),
        *file_cases(folder, model),
        *checkpoint_cases(folder, model, canary),
        *option_cases(folder, canary),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="Run the cases whose name contains this.")
    parser.add_argument("--every", type=int, default=1, help="Run every n-th case.")
    parser.add_argument("--seconds", type=int, default=10, help="Processor time a case may take.")
    parser.add_argument("--num_proc", type=int, default=os.cpu_count(), help="Cases at a time.")
    args = parser.parse_args()

    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    import datasets  # noqa: F401
    import diffusers  # noqa: F401

    from trl_spatial.diffusion_grpo import trainer as _  # noqa: F401
    from trl_spatial.gaussian_reward import trainer as _reward  # noqa: F401

    with tempfile.TemporaryDirectory() as folder:
        cases = [case for case in all_cases(Path(folder), Path(folder) / "canary") if args.only in case.name]
        cases = cases[:: args.every]
        number = max(args.num_proc, 1)
        queue: Any = multiprocessing.get_context("fork").SimpleQueue()
        for part in range(number):
            if os.fork() == 0:
                canary = Path(folder) / "canary"
                for case in cases[part::number]:
                    queue.put(run(case, canary, args.seconds))
                os._exit(0)
        outcomes = []
        for index in range(len(cases)):
            outcomes.append(queue.get())
            outcome = outcomes[-1]
            if outcome.faults:
                print(f"{outcome.name}: {', '.join(outcome.faults)} | {outcome.last_line}", flush=True)
            elif sys.stderr.isatty():
                print(f"\r{index + 1}/{len(cases)}", end="", file=sys.stderr)
    faults = Counter(fault.split(" to ")[0] for outcome in outcomes for fault in outcome.faults)
    print(f"{len(outcomes)} inputs, {sum(not outcome.faults for outcome in outcomes)} answered rightly")
    print("; ".join(f"{fault}: {number}" for fault, number in faults.most_common()) or "no faults")
    print(f"slowest {max(o.seconds for o in outcomes):.1f} s, most memory {max(o.megabytes for o in outcomes):.0f} MB")
    raise SystemExit(bool(faults))


if __name__ == "__main__":
    main()
