"""`trl_spatial space`: a page that ranks images for a prompt, as a Space to upload or served from this machine."""

import argparse
import os
import runpy
import socket
import sys
from importlib.util import find_spec
from pathlib import Path

from ..cli import run_command
from ..store import new_folder
from .parser import SpatialParser


EXAMPLES = """\
  # a folder to upload to the Hub as a Gradio Space
  trl_spatial space build space --model ORG/SpatialScore-7B --title "Which image is right?"

  # the same page on this machine, for a newly trained checkpoint
  trl_spatial space serve --model SpatialScore-7B

  # a built and edited Space, before uploading it
  trl_spatial space serve --dir space --port 8000
"""


def make_parser(prog: str = "trl_spatial space") -> SpatialParser:
    parser = SpatialParser(
        prog=prog,
        description="A page that ranks images by how well they match a prompt: built as a Hugging Face Space, or served "
        "from this machine.",
        examples=EXAMPLES,
    )
    commands = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    build = commands.add_parser(
        "build",
        help="write the folder of a Gradio Space",
        description="Write a Gradio Space: app.py, requirements.txt and README.md.",
        examples=EXAMPLES,
    )
    build.add_argument("folder", metavar="DIR", help="Output folder; it must be empty or not exist yet.")
    build.add_argument(
        "--model", required=True, help="Reward model on the Hub: ORG/NAME, ORG/NAME@REVISION or hub/NAME."
    )
    build.add_argument("--title", help="Title of the page and of the Space; by default the name of the model.")
    serve = commands.add_parser(
        "serve",
        help="serve the page from this machine",
        description="Serve the page from this machine, only to this machine unless --host says otherwise. It works "
        "without a network if the model is local.",
        examples=EXAMPLES,
    )
    serve.add_argument("--model", help="Checkpoint: a folder or a name on the Hub; by default that of --dir.")
    serve.add_argument("--dir", help="Folder of a Space whose app.py to run instead of the package's.")
    serve.add_argument("--host", default="127.0.0.1", help="Address to listen on; 0.0.0.0 lets other machines in.")
    serve.add_argument("--port", type=int, default=7860, help="Port to listen on.")
    return parser


def main(args: argparse.Namespace) -> None:
    if args.action == "serve":
        serve(args.model, args.dir, args.host, args.port)
        return
    folder = new_folder(args.folder)
    from ..space.build import build_space

    build_space(folder, args.model, args.title)
    print(f"Space written to {folder}. Upload it: hf upload ORG/NAME {folder} . --repo-type space")


def serve(model: str | None, space: str | None, host: str, port: int) -> None:
    """Run the app of a Space, or the package's, until it is interrupted."""
    if model is None and space is None:
        raise ValueError("Give --model, a folder or a name on the Hub, or --dir, the folder of a Space.")
    if find_spec("gradio") is None:
        raise ValueError('The page needs gradio: pip install "trl-spatial[space]"')
    app = Path(__file__).parents[1] / "space" / "app.py" if space is None else Path(space) / "app.py"
    if not app.is_file():
        raise ValueError(f"{space} has no app.py: `trl_spatial space build` writes the folder of a Space.")
    check_port(host, port)  # fail before loading the model, which may take minutes
    os.environ.update(
        GRADIO_ANALYTICS_ENABLED="False",
        GRADIO_SERVER_NAME=host,
        GRADIO_SERVER_PORT=str(port),
        GRADIO_NUM_PORTS="1",
    )
    if model is not None:
        from ..hub import find_reference

        os.environ["MODEL_ID"] = str(find_reference(model, kind="model"))
    if space is not None:
        sys.path.insert(0, str(app.parent.resolve()))  # as `python app.py` does
    runpy.run_path(str(app), run_name="__main__")


def check_port(host: str, port: int) -> None:
    try:
        socket.create_server((host, port)).close()
    except (OSError, OverflowError) as error:
        raise ValueError(f"Cannot listen on {host}, port {port} ({error}); choose others: --host, --port.") from error


if __name__ == "__main__":
    raise SystemExit(run_command("trl_spatial space", lambda: main(*make_parser().parse_args_and_config())))
