"""`trl_spatial serve`: an HTTP endpoint that scores images."""

import argparse
import os
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

from ..cli import run_command
from ..rewards import TOKEN_VARIABLE
from ..serving.limits import Limits
from .parser import SpatialParser, check_device, quick_imports
from .space import check_port


EXAMPLES = """\
  # on its own GPU, only reachable from this machine; train with `trl_spatial grpo --rewards http://127.0.0.1:8000`
  trl_spatial serve --model SpatialScore-7B --device cuda:1

  # for other machines: with a token, which training reads from TRL_SPATIAL_SERVER_TOKEN
  trl_spatial serve --model hub/SpatialScore-7B --host 0.0.0.0 --token-file token.txt
"""


def make_parser(prog: str = "trl_spatial serve") -> SpatialParser:
    parser = SpatialParser(
        prog=prog,
        usage=f"{prog} --model MODEL [OPTIONS]",
        description="Score images over HTTP: POST /score, GET /health, and a page at /. Requests that arrive together are scored "
        "together. The connection is not encrypted: outside a trusted network, put a TLS proxy in front.",
        examples=EXAMPLES,
    )
    parser.add_checkpoint_arguments("Checkpoint, with an adapter or merged")
    parser.add_argument("--device", help="Device, e.g. cuda:1; by default the first GPU if there is one.")
    parser.add_attention_argument()
    parser.add_argument("--host", default="127.0.0.1", help="Address to listen on; 0.0.0.0 lets other machines in.")
    parser.add_argument("--port", type=int, default=8000, help="Port to listen on.")
    parser.add_argument(
        "--token-file",
        "--token_file",
        metavar="FILE",
        help=f"File with the token that requests need. By default the environment variable {TOKEN_VARIABLE}; if neither is "
        "set, no token is needed.",
    )
    parser.add_argument("--max_batch_size", type=int, default=16, help="Images per forward pass.")
    parser.add_argument("--max_queue", type=int, default=256, help="Maximum number of waiting images.")
    for name, what in (
        ("max_images", "Maximum images per request."),
        ("max_bytes", "Maximum bytes per request."),
        ("max_image_bytes", "Maximum bytes per image file."),
        ("max_pixels", "Maximum pixels per image."),
        ("max_prompt_length", "Maximum characters per prompt."),
        ("max_held_bytes", "Maximum bytes of all requests together: bodies and decoded images."),
    ):
        parser.add_argument(f"--{name}", type=int, default=getattr(Limits, name), help=what)
    return parser


def main(args: argparse.Namespace) -> None:
    if find_spec("fastapi") is None or find_spec("uvicorn") is None:
        raise ValueError('The server needs fastapi and uvicorn: pip install "trl-spatial[serve]"')
    token = read_token(args.token_file)
    check_device("--device", args.device)
    check_port(args.host, args.port)  # fail before loading the model, which may take minutes

    with quick_imports():
        from .. import SpatialScore
        from ..serving.app import create_app
        from ..serving.server import make_server

    limits = Limits(**{field.name: getattr(args, field.name) for field in fields(Limits)})
    scorer = SpatialScore.from_pretrained(
        args.model,
        revision=args.revision,
        backbone=args.backbone,
        dtype=args.dtype,
        device=args.device,
        attn_implementation=args.attn_implementation,
    )
    app = create_app(
        scorer,
        model_name=Path(args.model).absolute().name if Path(args.model).exists() else args.model,  # hides local paths
        token=token,
        max_batch_size=args.max_batch_size,
        max_queue=args.max_queue,
        limits=limits,
    )
    if token is None and args.host not in ("127.0.0.1", "localhost", "::1"):
        print(
            f"Anyone who can reach {args.host} can use the server: set a token with --token-file or {TOKEN_VARIABLE}."
        )
    make_server(app, host=args.host, port=args.port).run()


def read_token(path: str | None) -> str | None:
    """The token of a file or of the environment; `None` if neither is given."""
    if path is None:
        return os.environ.get(TOKEN_VARIABLE) or None
    token = Path(path).read_text(encoding="utf-8").strip()
    if not token:
        raise ValueError(f"{path} is empty: it should hold the token.")
    return token


if __name__ == "__main__":
    raise SystemExit(run_command("trl_spatial serve", lambda: main(*make_parser().parse_args_and_config())))
