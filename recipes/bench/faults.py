"""
Kills commands at random moments, reruns them until they finish, and compares the results with those of an undisturbed run,
tensor by tensor:

    python recipes/bench/faults.py --num_kills 100 --commands reward grpo data score
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import trl_spatial


ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))  # for the Hub stub of the tests
from tests.hub_stub import USER, HubStub  # noqa: E402


TINY_MODELS = Path(trl_spatial.__file__).parent / "tiny_models"
TRAINING = (
    "--max_steps 6 --save_steps 2 --logging_steps 1 --use_cpu true --report_to none --disable_tqdm true "
    "--per_device_train_batch_size 2 --gradient_accumulation_steps 1 --resume_from_checkpoint true --output_dir out"
)
# Run in a folder with `pairs`, `prompts.txt`, `recipe.yaml`, `scorer` and `my_rewards.py`
COMMANDS = {
    "reward": f"reward --dataset pairs --model_name_or_path {TINY_MODELS}/qwen2_5_vl --dataloader_num_workers 1 "
    f"--learning_rate 1e-3 {TRAINING}",
    "grpo": f"grpo --dataset prompts.txt --rewards my_rewards:redness --model_name_or_path {TINY_MODELS}/flux --height 32 "
    "--width 32 --num_generations 4 --top_k 1 --num_inference_steps 3 --max_sequence_length 64 --learning_rate 1e-3 "
    f"--gradient_checkpointing false {TRAINING}",
    "demo": "demo --reward_steps 2 --grpo_steps 2 --num_train_pairs 8 --num_test_pairs 8 --num_prompts 4 --output_dir out",
    "data": "data make --num_pairs 40 --num_test_pairs 8 --image_size 32 --output out",
    "score": "score --model scorer --input pairs --image_column chosen --output out.jsonl",
    "push": "push pairs --to hub/pairs",
    "build": "data build recipe.yaml",
    "build_ray": "data build recipe.yaml --engine ray --num_workers 2",
}


def start(command: str, folder: Path, hub: HubStub) -> subprocess.Popen:
    """Starts a command in its own process group."""
    environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= hub.environment if command.startswith("push") else {"HF_HUB_OFFLINE": "1"}
    path = os.pathsep.join([str(Path(trl_spatial.__file__).parents[1]), str(folder)])
    with (folder / "log.txt").open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "trl_spatial", *command.split()], cwd=folder, stdout=log, stderr=log,
            start_new_session=True, env={**os.environ, **environment, "PYTHONPATH": path},
        )  # fmt: skip


def kill(process: subprocess.Popen) -> None:
    """Sends SIGKILL to the launcher and everything it started."""
    with contextlib.suppress(ProcessLookupError):  # it just exited
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def prepare(folder: Path, inputs: Path) -> Path:
    """Copies the inputs to a new folder."""
    shutil.copytree(inputs, folder)
    return folder


def make_inputs(folder: Path, names: list[str]) -> Path:
    """Writes the files that the commands read."""
    folder.mkdir()
    (folder / "prompts.txt").write_text("a red circle\na blue square\na green triangle\n")
    (folder / "recipe.yaml").write_text(
        "store: out\nprompts: {num_prompts: 120, num_relations: {3: 1, 6: 1}}\n"
        "render: {generators: [{name: tabletop, image_size: 64}]}\nexport: {num_benchmark_pairs: 10}\n"
    )
    (folder / "my_rewards.py").write_text(
        "import numpy\ndef redness(prompts, images, **columns):\n"
        "    return [float(numpy.asarray(image)[..., 0].mean()) for image in images]\n"
    )
    subprocess.run(
        [sys.executable, "-m", "trl_spatial", *["data", "make", "--num_pairs", "24", "--image_size", "32", "--output", "pairs"]],
        cwd=folder, check=True, capture_output=True,
    )  # fmt: skip
    if "score" in names:
        command = COMMANDS["reward"].replace("--output_dir out", "--output_dir scorer")
        with HubStub() as hub:
            failed = start(command, folder, hub).wait()
        if failed:
            raise SystemExit((folder / "log.txt").read_text())
        (folder / "log.txt").unlink()
    return folder


def contents(folder: Path, hub: HubStub) -> dict[str, Any]:
    """Returns a command's results: weights by tensor, other output files by content, and the files on the Hub."""
    found: dict[str, Any] = dict(hub.files.get(f"datasets/{USER}/pairs", {}))
    for path in sorted(folder.glob("out*/**/*") if (folder / "out").is_dir() else folder.glob("out*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".safetensors" and "checkpoint-" not in name:
            found |= {f"{name} {key}": tensor for key, tensor in load_file(path).items()}
        elif path.suffix in (".parquet", ".jsonl", ".arrow") and path.parent.name != "out":  # not the logs of a build
            found[name] = path.read_bytes()
    return found


def is_equal(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Returns whether two results are equal, tensor by tensor."""
    return ours.keys() == theirs.keys() and all(
        torch.equal(value, theirs[name]) if isinstance(value, torch.Tensor) else value == theirs[name]
        for name, value in ours.items()
    )


def bench(name: str, num_kills: int, folder: Path, inputs: Path, generator: random.Random) -> Counter[str]:
    """Kills a command at least `num_kills` times; counts kills, runs, and runs that ended equal, different or failed."""
    undisturbed = prepare(folder / f"{name}_undisturbed", inputs)
    begin = time.monotonic()
    with HubStub() as hub:
        if start(COMMANDS[name], undisturbed, hub).wait():
            raise SystemExit((undisturbed / "log.txt").read_text())
        duration, expected = time.monotonic() - begin, contents(undisturbed, hub)
    if not expected:
        raise SystemExit(f"{name} left nothing to compare in {undisturbed}.")
    counts: Counter[str] = Counter()
    while counts["kills"] < num_kills:
        counts["runs"] += 1
        here = prepare(folder / f"{name}_{counts['runs']}", inputs)
        with HubStub() as hub:
            for _ in range(generator.randint(1, 3)):
                process = start(COMMANDS[name], here, hub)
                try:
                    process.wait(timeout=generator.uniform(0, duration))
                    break
                except subprocess.TimeoutExpired:
                    kill(process)
                    counts["kills"] += 1
            code = start(COMMANDS[name], here, hub).wait()
            outcome = "failed" if code else "equal" if is_equal(contents(here, hub), expected) else "different"
        counts[outcome] += 1
        if outcome == "equal":
            shutil.rmtree(here)
        else:
            print(f"{name}: {outcome}, see {here}", flush=True)
    return counts


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_kills", type=int, default=100, help="kills of each command")
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="faults_"))
    inputs = make_inputs(folder / "inputs", args.commands)
    table = {}
    print("| command | kills | runs | equal | different | failed |\n|---|---|---|---|---|---|", flush=True)
    for name in args.commands:
        table[name] = bench(name, args.num_kills, folder, inputs, random.Random(args.seed))
        cells = (table[name][key] for key in ("kills", "runs", "equal", "different", "failed"))
        print(f"| {name} | {' | '.join(map(str, cells))} |", flush=True)
    (folder / "table.json").write_text(json.dumps(table, indent=2) + "\n")
    if any(counts["different"] + counts["failed"] for counts in table.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
