"""How many preference pairs does `make_preference_dataset` make per second?

    python recipes/bench/pairs.py --num_proc 2

Times everything from the call to the dataset on disk, including the start of the processes.
"""

import argparse
import json
import os
import tempfile
import time

import datasets

from trl_spatial.scenes import make_preference_dataset


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_pairs", type=int, default=10_000)
    parser.add_argument("--num_proc", type=int, default=2)
    parser.add_argument("--image_size", type=int, default=64, help="width and height, in pixels")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    cache = datasets.config.HF_DATASETS_CACHE
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = folder  # an empty cache, so that nothing is reused
        start = time.perf_counter()
        dataset = make_preference_dataset(
            args.num_pairs, seed=args.seed, image_size=args.image_size, num_proc=args.num_proc
        )
        seconds = time.perf_counter() - start
        times = os.times()
        megabytes = dataset.data.nbytes / 2**20
    datasets.config.HF_DATASETS_CACHE = cache
    result = {
        **vars(args),
        "seconds": round(seconds, 2),
        "processor_seconds": round(times.user + times.system + times.children_user + times.children_system, 2),
        "pairs_per_second": round(args.num_pairs / seconds, 1),
        "kilobytes_per_pair": round(1024 * megabytes / args.num_pairs, 2),
    }
    print(
        f"{args.num_pairs} pairs in {seconds:.1f} s: {result['pairs_per_second']} pairs/s on {args.num_proc} processes"
    )
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
