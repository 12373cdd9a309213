"""`trl_spatial data make`: preference pairs of rendered scenes."""

import argparse

from .utils import SpatialParser, new_folder


EXAMPLES = """\
  trl_spatial data make --num_pairs 1000 --output pairs
  trl_spatial data make --num_pairs 20000 --num_test_pairs 2000 --image_size 256 --num_proc 8 --output pairs
  trl_spatial data make --num_pairs 500 --relations left_of right_of --levels 1 --both_directions --output flips
"""


def make_parser(prog: str = "trl_spatial data") -> SpatialParser:
    parser = SpatialParser(prog=prog, description="Build preference datasets.", examples=EXAMPLES)
    commands = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    make = commands.add_parser(
        "make",
        help="make preference pairs of rendered scenes",
        description="Make preference pairs of rendered scenes, with a train and a test split that share no scene. The "
        "folder that is written is what `trl_spatial reward --dataset` and `datasets.load_from_disk` take.",
        examples=EXAMPLES,
    )
    make.add_argument("--num_pairs", type=int, required=True, help="Number of training pairs.")
    make.add_argument("--num_test_pairs", type=int, default=0, help="Number of test pairs; 0: no test split.")
    make.add_argument("--output", required=True, help="Folder to write; it must be empty or not exist yet.")
    make.add_argument("--seed", type=int, default=0, help="Seed; the same seed gives the same pairs.")
    make.add_argument("--image_size", type=int, default=64, help="Width and height of the images, in pixels.")
    make.add_argument("--levels", type=int, nargs="+", default=[1, 2, 3], help="Numbers of changed relations.")
    make.add_argument("--relations", nargs="+", help="Kinds of relations; by default all.")
    make.add_argument(
        "--num_objects", type=int, nargs=2, default=[2, 4], metavar=("LEAST", "LARGEST"), help="Objects in a scene."
    )
    make.add_argument(
        "--num_relations",
        type=int,
        nargs=2,
        default=[1, 4],
        metavar=("LEAST", "LARGEST"),
        help="Relations in a prompt.",
    )
    make.add_argument("--both_directions", action="store_true", help="Give every pair twice, the second one reversed.")
    make.add_argument("--num_proc", type=int, help="Number of processes.")
    return parser


def main(args: argparse.Namespace) -> None:
    output = new_folder(args.output)
    from datasets import DatasetDict

    from ..scenes import RELATIONS, make_preference_dataset

    dataset = DatasetDict(
        {
            split: make_preference_dataset(
                num_pairs,
                split=split,
                seed=args.seed,
                levels=args.levels,
                num_objects=tuple(args.num_objects),
                num_relations=tuple(args.num_relations),
                relations=args.relations or tuple(RELATIONS),
                image_size=args.image_size,
                both_directions=args.both_directions,
                num_proc=args.num_proc,
            )
            for split, num_pairs in (("train", args.num_pairs), ("test", args.num_test_pairs))
            if num_pairs
        }
    )
    dataset.save_to_disk(output)
    rows = ", ".join(f"{len(pairs)} rows in the {split} split" for split, pairs in dataset.items())
    print(f"Saved to {output}: {rows}")


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
