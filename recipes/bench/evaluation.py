"""
Evaluates 4,000 images of 1,000 prompts, with 10 questions each, against a stub judge on loopback. Prints throughput, memory and
the cache hit rate, and checks that kills at random moments do not change the tables.

    python recipes/bench/evaluation.py --num_kills 30
"""

import argparse
import csv
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from PIL import Image


COLUMNS = (
    "item_id", "text", "keywords", "proposition_id", "dependency", "category_broad", "category_detailed", "tuple",
    "question_natural_language",
)  # fmt: skip


class Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        pass  # the client was killed


class Judge(BaseHTTPRequestHandler):
    """Answers yes to two of three requests, chosen by a hash, so the same request always gets the same answer."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    num_requests = 0

    def do_POST(self) -> None:  # named by http.server
        body = self.rfile.read(int(self.headers["Content-Length"]))
        Judge.num_requests += 1
        answer = "no" if hashlib.blake2b(body).digest()[0] % 3 == 0 else "yes"
        reply = {
            "id": "answer", "object": "chat.completion", "created": 0, "model": "stub",
            "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": answer}}],
            "usage": {"prompt_tokens": 1000, "completion_tokens": 1, "total_tokens": 1001},
        }  # fmt: skip
        data = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


def make_inputs(folder: Path, num_prompts: int, num_questions: int) -> None:
    """Writes questions in DPG-Bench's format, and a grid of four images for each prompt."""
    (folder / "data").mkdir()
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    with (folder / "data" / "dpg_bench.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for number in range(num_prompts):
            for question in range(1, num_questions + 1):
                kind = "relation - spatial (circle, square, left of)" if question > 4 else "entity - whole (circle)"
                writer.writerow([
                    f"prompt-{number:04}", f"Scene {number}.", "circle", question, 0 if question <= 4 else 1, kind.split(" - ")[0],
                    "spatial" if question > 4 else "whole", kind, f"Does part {question} of scene {number} hold?",
                ])  # fmt: skip
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8).repeat(32, 0).repeat(32, 1)  # 512 x 512
            Image.fromarray(pixels).save(folder / "images" / f"prompt-{number:04}.png")


def command(folder: Path, output: str, port: int) -> list[str]:
    return [
        sys.executable, "-m", "trl_spatial", "evaluate", "images", "--benchmark", "dpg-bench", "--data", str(folder / "data"),
        "--images", str(folder / "images"), "--vision", f"http://127.0.0.1:{port}/v1#stub", "--protocol", "fixed",
        "--skip_self_test", "--output_dir", str(folder / output),
    ]  # fmt: skip


def start(folder: Path, output: str, port: int, cache: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(folder / cache)}
    log = (folder / f"{output}.txt").open("ab")
    return subprocess.Popen(
        command(folder, output, port), stdout=log, stderr=log, env=environment, start_new_session=True
    )


def run(folder: Path, output: str, port: int, cache: str) -> float:
    """Runs the command to its end; returns the seconds."""
    begin = time.monotonic()
    if start(folder, output, port, cache).wait():
        raise SystemExit((folder / f"{output}.txt").read_text()[-3000:])
    return time.monotonic() - begin


def tables(folder: Path, output: str) -> dict[str, object]:
    """Returns a run's results without its costs."""
    results = json.loads((folder / output / "results.json").read_text())
    return {name: results[name] for name in ("protocols", "failures", "examples", "num_images")} | {
        "answers": results["usage"]["answers"]
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_prompts", type=int, default=1000)
    parser.add_argument("--num_questions", type=int, default=10)
    parser.add_argument("--num_kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="evaluation_"))
    make_inputs(folder, args.num_prompts, args.num_questions)
    server = Server(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = server.server_port
    total = args.num_prompts * 4 * args.num_questions

    seconds = run(folder, "first", port, "cache")
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    asked = Judge.num_requests
    print(
        f"{total:,} questions in {seconds:.0f} s: {total / seconds:.0f} a second, at most {memory:.0f} MB, {asked:,} requests",
        flush=True,
    )
    seconds = run(folder, "again", port, "cache")
    hits = 1 - (Judge.num_requests - asked) / total
    print(f"again in a new folder: {seconds:.0f} s, {100 * hits:.1f} % of the answers from the cache", flush=True)
    expected = tables(folder, "first")
    if tables(folder, "again") != expected:
        raise SystemExit("The cache gives other tables.")

    # the same again with a separate cache, killed at random moments
    generator, kills = random.Random(args.seed), 0
    undisturbed = seconds
    while kills < args.num_kills:
        process = start(folder, "killed", port, "killed_cache")
        try:
            process.wait(timeout=generator.uniform(0, 1.2 * undisturbed))
            shutil.rmtree(folder / "killed")  # it finished: start over, with a filled cache
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
    run(folder, "killed", port, "killed_cache")
    is_equal = tables(folder, "killed") == expected
    print(f"after {kills} kills: the tables are {'equal' if is_equal else 'DIFFERENT'}", flush=True)
    shutil.rmtree(folder)
    if not is_equal:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
