"""How much does other work slow down training, and what does letting idle threads spin briefly cost on an idle machine?

    python recipes/bench/busy.py

Runs a fixed number of updates of a small transformer on the CPU, in a new process each time, alternating between OpenMP's wait
policies: first on an idle machine, then next to `--num_busy` processes that each keep a core busy. Next to four of them on two
cores, a fair share is a third of the machine. Taking up to 6 times as long is good, since a single thread takes 5 times as long.
Run it while nothing else runs. A run that exceeds `--timeout` is killed and counts as infinite.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time


POLICIES: dict[str, dict[str, str]] = {
    "default": {},
    "GOMP_SPINCOUNT=4000": {"GOMP_SPINCOUNT": "4000"},
    "GOMP_SPINCOUNT=3000": {"GOMP_SPINCOUNT": "3000"},
    "GOMP_SPINCOUNT=2000": {"GOMP_SPINCOUNT": "2000"},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
OURS = "GOMP_SPINCOUNT=3000"  # set by the commands


def work(num_updates: int) -> None:
    """Time the updates, without two that warm up, and print the seconds."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    inputs = torch.randn(16, 96, 128)
    for update in range(num_updates + 2):
        if update == 2:  # after the warm-up
            start = time.perf_counter()
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    print(json.dumps(time.perf_counter() - start))


def measure(variables: dict[str, str], args: argparse.Namespace) -> float:
    """Return the seconds that the updates take in a process with these variables; infinite after a timeout."""
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if name not in names} | variables
    command = [sys.executable, __file__, "--work", "--num_updates", str(args.num_updates)]
    try:
        done = subprocess.run(command, env=environment, check=True, capture_output=True, timeout=args.timeout)
    except subprocess.TimeoutExpired:
        return float("inf")
    return json.loads(done.stdout)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_updates", type=int, default=40)
    parser.add_argument("--num_busy", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.work:
        return work(args.num_updates)

    seconds: dict[str, dict[str, float]] = {"idle": {}, "busy": {}}
    for state in seconds:
        num_busy = args.num_busy if state == "busy" else 0
        loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(num_busy)]
        try:
            rows = [{name: measure(POLICIES[name], args) for name in POLICIES} for _ in range(args.repeats)]
        finally:
            stop(loops)
        seconds[state] = {name: statistics.median(row[name] for row in rows) for name in POLICIES}

    default = seconds["idle"]["default"]
    print("| idle threads | idle s | ratio to the default | busy s | ratio to idle |\n|---|---|---|---|---|")
    for name in POLICIES:
        idle, busy = seconds["idle"][name], seconds["busy"][name]
        mark = " (ours)" if name == OURS else ""
        print(f"| {name}{mark} | {idle:.2f} | {idle / default:.2f} | {busy:.2f} | {busy / idle:.1f} |")


def stop(processes: list[subprocess.Popen]) -> None:
    """Kill the processes."""
    for process in processes:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
