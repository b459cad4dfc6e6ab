"""`demo.py`: a page to paint on, served on this machine."""

import argparse
import sys

from moebius_jax.cli.arguments import add_model_arguments, load_pipeline, require_positive
from moebius_jax.cli.terminal import enable_compilation_cache, require_extra, run
from moebius_jax.defaults import DEFAULT_MODEL, TINY
from moebius_jax.errors import UserError

MAX_PORT = 65535
_DESCRIPTION = f"""\
Serves a page: upload a photo, paint over what should go, look at the results.

    python demo.py                               # {DEFAULT_MODEL}, or {TINY} where the Hub cannot be reached
    python demo.py --model {TINY}                  # the small network that comes along
    python demo.py --host 0.0.0.0 --port 8080    # for others in this network too

Programs can use it as well, through gradio_client: Client("http://127.0.0.1:7860").view_api() lists how.
"""


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="demo.py", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser, default=f"{DEFAULT_MODEL}, or {TINY} where the Hub cannot be reached")
    add = parser.add_argument_group("page").add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine alone)")
    add("--port", type=int, help="default: the first free one from 7860 on")
    add("--max-megapixels", type=float, default=40.0, metavar="N", help="of a photo (default 40)")
    add("--max-megabytes", type=float, default=50.0, metavar="N", help="of a file (default 50)")
    add("--max-results", type=int, default=4, metavar="N", help="of one request (default 4)")
    args = parser.parse_args(argv)
    return run(lambda: _demo(args))


def _demo(args: argparse.Namespace) -> int:
    require_positive(args, "port", "max_results")
    if (args.port or 1) > MAX_PORT:
        raise UserError(f"--port is {args.port}; expected at most {MAX_PORT}")
    for name in ("max_megapixels", "max_megabytes"):
        if not 0 < getattr(args, name) < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; expected a number above 0")
    require_extra("demo", "gradio")
    enable_compilation_cache()
    from moebius_jax.demo.page import Address, build, launch
    from moebius_jax.demo.painter import Painter

    print("loading the model …", file=sys.stderr)
    pipeline = load_pipeline(args, args.variant, or_tiny=True)
    painter = Painter(pipeline, max_megapixels=args.max_megapixels, max_results=args.max_results)
    address = Address(host=args.host, port=args.port, max_megabytes=args.max_megabytes)
    print("Ctrl-C ends it", file=sys.stderr)
    launch(build(painter), address)
    return 0
