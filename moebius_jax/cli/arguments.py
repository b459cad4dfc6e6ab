"""Arguments the programs share: which model, which extension, which share of the work.

A program's help and its errors about arguments come before jax is imported, which takes seconds.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from moebius_jax.buckets import location
from moebius_jax.cli.terminal import INTERRUPTED, progress
from moebius_jax.cluster import join_cluster, wait_for_all
from moebius_jax.defaults import DEFAULT_MODEL, DTYPES, TINY
from moebius_jax.errors import UserError
from moebius_jax.extensions import load_extension
from moebius_jax.files import require_local

if TYPE_CHECKING:
    from moebius_jax.inpaint.pipeline import MoebiusInpaintPipeline

# Help of arguments that more than one program adds by itself.
REVISION = (
    "branch, tag or commit of the model's Hub repository (default: of a released one the commit this version "
    "knows, else main)"
)


def add_model_arguments(
    parser: argparse.ArgumentParser,
    *,
    default: str = DEFAULT_MODEL,
    variant: str = "pretrained (default)",
) -> None:
    """--model, --extension, --variant, --revision, --vae, the three dtypes, and --no-verify."""
    add = parser.add_argument_group("model").add_argument
    add(
        "--model",
        help=f"converted folder, Hub repository, or {TINY}, a small network that comes along (default "
        f"{default})",
    )
    add_extension_argument(parser)
    add("--variant", help=f"{variant}, ft_places2, ft_celebahq or ft_ffhq")
    add("--revision", help=REVISION)
    add(
        "--vae", type=any_location, help="folder of a converted VAE (default: beside the model, or the Hub's)"
    )
    add(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="of the U-Net (default auto: float16 on GPUs, bfloat16 on TPUs, float32 on CPUs)",
    )
    add(
        "--stream-dtype",
        choices=DTYPES,
        help="of what lies between its large products (default as --dtype): bfloat16 with a float32 stream "
        "is a third as far from float32 as bfloat16 alone",
    )
    add(
        "--vae-dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="of the VAE (default auto: float16 on GPUs, float32 elsewhere; how accelerators multiply "
        'float32: docs/inference.md, "Precision")',
    )
    add_no_verify(parser)


def add_no_verify(parser: argparse.ArgumentParser) -> None:
    """--no-verify."""
    parser.add_argument(
        "--no-verify", action="store_true", help="do not compare the weights with their checksums"
    )


def local_path(text: str) -> Path:
    """For `type=` of an argument: a path of this machine, and no bucket's address."""
    try:
        return Path(require_local(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def any_location(text: str) -> Path:
    """For `type=` of an argument: a path of this machine, or of a bucket."""
    try:
        return location(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def add_extension_argument(parser: argparse.ArgumentParser) -> None:
    """--extension, which is run while the arguments are read."""
    parser.add_argument(
        "--extension",
        type=_extension,
        action="append",
        metavar="FILE.py",
        help="run this file first: it adds a mixer or a solver of your own (docs/extending.md)",
    )


def _extension(text: str) -> Path:
    try:
        load_extension(Path(text))
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return Path(text)


def load_pipeline(
    args: argparse.Namespace, variant: str | None, *, or_tiny: bool = False
) -> "MoebiusInpaintPipeline":
    """The pipeline the arguments name.

    Args:
        args: with what `add_model_arguments` adds.
        variant: of the released weights.
        or_tiny: where no model is named and the default cannot be had, `TINY` takes its place, with a line
            that says so.

    Raises:
        UserError: it cannot be had.
    """
    from moebius_jax.inpaint.model_folder import is_here
    from moebius_jax.inpaint.pipeline import MoebiusInpaintPipeline
    from moebius_jax.weights.hub import HubUnreachable

    options = {name: getattr(args, name) for name in ("dtype", "stream_dtype", "vae_dtype")}
    options["verify"] = not args.no_verify
    if args.model == "":
        raise UserError("--model is empty; expected a folder, a Hub repository or a name")
    model = args.model or DEFAULT_MODEL
    if not is_here(model):
        print(f"{model}: no such folder here, asking the Hub …", file=sys.stderr)
    try:
        return MoebiusInpaintPipeline.from_pretrained(
            model, variant=variant, vae=args.vae, revision=args.revision, track=progress, **options
        )
    except HubUnreachable as error:
        if args.model or args.variant or args.vae or args.revision or not or_tiny:
            raise
        print(
            f"painting with {TINY}, the small network that comes along; --model names another ({error})",
            file=sys.stderr,
        )
        return MoebiusInpaintPipeline.from_pretrained(TINY, **options)


def add_process_arguments(parser: argparse.ArgumentParser) -> None:
    """--num-processes, --process-id, --distributed and --coordinator."""
    add = parser.add_argument_group("several processes (each takes its share of the files)").add_argument
    add("--num-processes", type=int, default=1, metavar="N")
    add("--process-id", type=int, default=0, metavar="I", help="0 to N-1")
    add("--distributed", action="store_true", help="ask the cluster (TPU pod, SLURM, …) for the two instead")
    add("--coordinator", metavar="HOST:PORT", help="process 0, for --distributed where no cluster is found")


def process_share(args: argparse.Namespace) -> tuple[int, int]:
    """This process's number and how many there are; with --distributed, when all have come here.

    Those that joined end together: `part`.

    Raises:
        UserError: numbers that do not fit, or no cluster to join.
    """
    require_positive(args, "num_processes")
    if not 0 <= args.process_id < args.num_processes:
        raise UserError(f"--process-id is {args.process_id}; expected 0 to {args.num_processes - 1}")
    if args.coordinator and not args.distributed:
        raise UserError("--coordinator is for --distributed; sharing files needs no connection")
    if not args.distributed:
        return args.process_id, args.num_processes
    import jax

    several = args.num_processes > 1
    jax.config.update("jax_enable_preemption_service", False)  # it would keep SIGTERM to itself
    join_cluster(args.coordinator, *((args.num_processes, args.process_id) if several else ()))
    wait_for_all("looked at what there is to do")
    return jax.process_index(), jax.process_count()


def part(args: argparse.Namespace, status: int) -> int:
    """`status`, when the others of --distributed are through as well: jax gives slower ones five minutes.

    Who is interrupted does not wait for them, nor does jax then.
    """
    if getattr(args, "distributed", False):
        try:
            if status != INTERRUPTED:
                wait_for_all("done")
        except KeyboardInterrupt:
            status = INTERRUPTED
        if status == INTERRUPTED:
            sys.stdout.flush()
            os._exit(status)
    return status


def require_positive(args: argparse.Namespace, *names: str, most: int | None = None) -> None:
    """Raises UserError if one of these is given and below 1, or above `most`."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not 1 <= value <= (most or value):
            expected = "1 or more" if value < 1 else f"{most} or fewer"
            raise UserError(f"--{name.replace('_', '-')} is {value}; expected {expected}")


def require_seed(args: argparse.Namespace) -> None:
    """Raises UserError if --seed does not fit in 32 bits."""
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed is {args.seed}; expected 0 to {2**32 - 1}")
