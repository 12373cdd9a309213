"""Do bad clients of `trl_spatial serve` slow down a good one, does memory grow under load, and does SIGTERM end it in time?

    python recipes/bench/server.py

Starts the command with a tiny model in its own process. One good client sends an image at a time, each over a new connection: to
an idle server, and while `--num_half_open` connections send half a head and `--num_slow` send one byte of a body per second, all
of them reopened when the server closes them. Then `--num_clients` clients send images for `--seconds` seconds. Finally, the server
gets SIGTERM while bad and good clients are connected. Exits with 1 and names every failed check. Linux only.
"""

import argparse
import base64
import io
import json
import os
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import requests
from PIL import Image


BACKBONE = Path(__file__).parents[2] / "trl_spatial" / "tiny_models" / "qwen2_5_vl"
MOST_DELAY = 0.5  # seconds that bad clients may add to the 95th percentile
MOST_GROWTH = 64.0  # megabytes under load
LONGEST_END = 10.0  # seconds from SIGTERM to exit, as the command promises
HEAD = b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def make_checkpoint(folder: Path) -> None:
    """Saves an untrained reward model on the tiny backbone."""
    from trl_spatial import SpatialScore
    from trl_spatial.gaussian_reward.modeling import GaussianRewardModel
    from trl_spatial.gaussian_reward.processing import load_processor

    processor = load_processor(BACKBONE)
    model = GaussianRewardModel.from_backbone(str(BACKBONE), reward_token_id=processor.reward_token_id)
    SpatialScore(model, processor).save_pretrained(folder)


@contextmanager
def running_server(checkpoint: Path, log: Path):
    """Runs the command in the context; yields its process and port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "trl_spatial", "serve", "--model", str(checkpoint), "--port", str(port)]
    with log.open("w") as output:
        process = subprocess.Popen([*command, "--device", "cpu"], stdout=output, stderr=output)
    try:
        while True:
            with suppress(requests.ConnectionError):
                requests.get(f"http://127.0.0.1:{port}/health", timeout=10)
                break
            if process.poll() is not None:
                raise RuntimeError(f"The server did not start:\n{log.read_text()}")
            time.sleep(0.2)
        yield process, port
    finally:
        process.kill()
        process.wait()


class BadClients:
    """Connections that never finish a request, reopened when the server closes them."""

    def __init__(self, port: int, num_half_open: int, num_slow: int):
        self.port = port
        self.openings = [HEAD] * num_half_open + [HEAD + b"Content-Length: 1000000\r\n\r\n{"] * num_slow
        self.num_slow = num_slow
        self.num_opened = 0
        self._stop, self._all_open = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> "BadClients":
        self._thread.start()
        self._all_open.wait()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _work(self) -> None:
        sockets: list[socket.socket | None] = [None] * len(self.openings)
        while not self._stop.is_set():
            for index, opening in enumerate(self.openings):
                try:
                    sockets[index] = self._keep(sockets[index], opening, index >= len(self.openings) - self.num_slow)
                except OSError:  # closed by the server: reopened in the next round
                    sockets[index] = None
            self._all_open.set()
            self._stop.wait(1.0)
        for client in sockets:
            if client is not None:
                client.close()

    def _keep(self, client: socket.socket | None, opening: bytes, is_slow: bool) -> socket.socket:
        if client is None:
            client = socket.create_connection(("127.0.0.1", self.port), timeout=1)
            client.sendall(opening)
            client.setblocking(False)
            self.num_opened += 1
            return client
        if is_slow:
            client.send(b" ")
        with suppress(BlockingIOError):
            if client.recv(4096) == b"":
                client.close()
                raise ConnectionResetError
        return client


def ask(port: int) -> float:
    """Returns the seconds until a good client gets its score; infinite if it gets none."""
    file = io.BytesIO()
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(file, "PNG")
    body = {
        "prompts": ["a red cup to the left of a blue book"],
        "images": [base64.b64encode(file.getvalue()).decode()],
    }
    start = time.perf_counter()
    try:
        answer = requests.post(f"http://127.0.0.1:{port}/score", json=body, timeout=30)
    except requests.RequestException:
        return float("inf")
    is_scored = answer.status_code == 200 and answer.json()["errors"] == [None]
    return time.perf_counter() - start if is_scored else float("inf")


def percentile_95(seconds: list[float]) -> float:
    return sorted(seconds)[int(0.95 * (len(seconds) - 1))]


def megabytes(pid: int) -> float:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def measure_load(process: subprocess.Popen, port: int, args: argparse.Namespace) -> dict[str, float]:
    def work(end: float) -> list[float]:
        seconds = []
        while time.perf_counter() < end:
            seconds.append(ask(port))
        return seconds

    with ThreadPoolExecutor(args.num_clients) as executor:
        for _ in executor.map(lambda _: ask(port), range(4 * args.num_clients)):  # warm-up
            pass
        before = megabytes(process.pid)
        ends = [time.perf_counter() + args.seconds] * args.num_clients
        seconds = [value for values in executor.map(work, ends) for value in values]
    return {
        "requests": len(seconds),
        "failed": sum(value == float("inf") for value in seconds),
        "p95_s": percentile_95(seconds),
        "megabytes_before": before,
        "megabytes_after": megabytes(process.pid),
    }


def measure_end(process: subprocess.Popen, port: int, args: argparse.Namespace) -> float:
    """Returns the seconds from SIGTERM to the exit of the process, with bad and good clients connected."""
    with BadClients(port, args.num_half_open, args.num_slow), ThreadPoolExecutor(args.num_clients) as executor:
        for _ in range(args.num_clients):
            executor.submit(ask, port)
        start = time.perf_counter()
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(60)
        return time.perf_counter() - start


def shortcomings(results: dict) -> list[str]:
    """Describes every failed check."""
    idle, attacked, load = results["idle"], results["attacked"], results["load"]
    found = []
    if attacked["failed"] or attacked["p95_s"] > idle["p95_s"] + MOST_DELAY:
        found.append(f"beside bad clients, {attacked['failed']} requests failed and p95 is {attacked['p95_s']:.2f} s")
    if load["failed"]:
        found.append(f"under load {load['failed']} requests failed")
    growth = load["megabytes_after"] - load["megabytes_before"]
    if growth > MOST_GROWTH:
        found.append(f"memory grew by {growth:.0f} MB under load")
    if results["end_s"] > LONGEST_END:
        found.append(f"SIGTERM took {results['end_s']:.1f} s")
    return found


def main(argv: list[str] | None = None) -> list[str]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_half_open", type=int, default=600)
    parser.add_argument("--num_slow", type=int, default=50)
    parser.add_argument("--num_requests", type=int, default=100, help="of the good client")
    parser.add_argument(
        "--pause", type=float, default=0.2, help="seconds between its requests: longer than time-outs in all"
    )
    parser.add_argument("--num_clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long the clients ask")
    args = parser.parse_args(argv)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 4096) if most > 0 else 4096, most))

    def summarize(port: int) -> dict[str, float]:
        seconds = []
        for _ in range(args.num_requests):
            seconds.append(ask(port))
            time.sleep(args.pause)
        failed = sum(value == float("inf") for value in seconds)
        return {"median_s": statistics.median(seconds), "p95_s": percentile_95(seconds), "failed": failed}

    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(Path(folder) / "model")
        with running_server(Path(folder) / "model", Path(folder) / "log") as (process, port):
            ask(port)  # the first one is slow
            results: dict = {"idle": summarize(port)}
            with BadClients(port, args.num_half_open, args.num_slow) as bad:
                results["attacked"] = summarize(port) | {"bad_connections": bad.num_opened}
            results["load"] = measure_load(process, port, args)
            results["end_s"] = measure_end(process, port, args)
    print(json.dumps(results, indent=1))
    return shortcomings(results)


if __name__ == "__main__":
    for line in (found := main()):
        print(line, file=sys.stderr)
    sys.exit(bool(found))
