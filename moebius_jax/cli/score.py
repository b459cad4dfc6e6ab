"""`evaluate.py score`: any method's pictures against their originals."""

import argparse
import sys
from pathlib import Path

from moebius_jax.cli.arguments import require_positive
from moebius_jax.cli.common import progress
from moebius_jax.cli.scoring import (
    claim_report,
    fewest_images,
    inception_facts,
    make_scorer,
    require_evaluation_extra,
    small_set_note,
    write_report,
)
from moebius_jax.errors import UserError
from moebius_jax.evaluation.cases import Case, list_pictures, pair_masks, read_truth
from moebius_jax.evaluation.inputs import odd_masks
from moebius_jax.evaluation.protocols import PROTOCOLS
from moebius_jax.evaluation.published import QUALITY


def score(args: argparse.Namespace) -> int:
    """Scores --pred against --gt; returns the exit status."""
    from moebius_jax.evaluation.report import Run

    require_evaluation_extra()
    if args.beside is not None and args.beside not in QUALITY:
        raise UserError(f"--beside {args.beside}: expected one of {', '.join(QUALITY)}")
    require_positive(args, "batch_size", "size")
    cases = _pairs(args)
    enough = fewest_images(args, len(cases))
    if args.output is not None:
        claim_report(args.output, "score", (args.pred, args.gt, args.masks))
    scores = make_scorer(args)(cases, size=args.size, invert_masks=args.invert_masks, track=progress)
    odd = odd_masks(scores.names, scores.ratios)
    for line in odd:
        print(f"warning: {args.masks}: {line}", file=sys.stderr)
    protocol = {}
    if args.beside:
        protocol = {"name": args.beside, "title": f"Scores beside {PROTOCOLS[args.beside].title}"}
    sources = {"images": {"folder": str(args.gt)}, "results": {"folder": str(args.pred)}}
    if args.masks:
        polarity = "black is the hole" if args.invert_masks else "white is the hole"
        sources["masks"] = {"folder": str(args.masks), "origin": "stored set", "polarity": polarity}
    write_report(
        args,
        [Run.of(scores, args.metrics, enough, label="", settings={})],
        cases,
        enough=enough,
        protocol=protocol,
        departures=[*_departures(args, cases), *odd, *small_set_note(args, len(cases))],
        sources={**sources, **inception_facts(args)},
    )
    return 0


def _departures(args: argparse.Namespace, cases: list[Case]) -> list[str]:
    """What a reader who compares with the published figures has to know."""
    if args.beside is None:
        return []
    protocol = PROTOCOLS[args.beside]
    lines = [
        "pictures made elsewhere: whether images, masks and settings are the protocol's is not known here"
    ]
    if len(cases) != protocol.count:
        lines.append(f"{len(cases):,} images, the protocol has {protocol.count:,}")
    height, width = (args.size,) * 2 if args.size else read_truth(cases[0], None).shape[:2]
    if (height, width) != (protocol.size,) * 2:
        lines.append(
            f"pictures of {width} x {height} pixels, the protocol has {protocol.size} x {protocol.size}"
        )
    return lines


def _pairs(args: argparse.Namespace) -> list[Case]:
    """Results with their originals and masks, by name; one without a partner is an error."""
    truths, results = list_pictures(args.gt, "originals"), list_pictures(args.pred, "results")
    _require_partners(truths, results, args.pred, "result")
    _require_partners(results, truths, args.gt, "original")
    masks: dict[str, Path] = {}
    pairs: dict[str, str] = {}
    if args.masks:
        masks = list_pictures(args.masks, "masks")
        pairs = pair_masks(truths, masks, args.masks, args.pair_by)
    elif args.invert_masks or args.pair_by != "name":
        raise UserError("--invert-masks and --pair-by are for --masks, which is missing")
    return [
        Case(
            name=name,
            truth=file,
            mask=masks[pairs[name]] if pairs else None,
            mask_name=pairs.get(name, ""),
            result=results[name],
        )
        for name, file in truths.items()
    ]


def _require_partners(found: dict[str, Path], others: dict[str, Path], folder: Path, what: str) -> None:
    missing = [name for name in found if name not in others]
    if missing:
        more = f" (and {len(missing) - 1} more are missing)" if len(missing) > 1 else ""
        raise UserError(f"{folder}: no {what} {missing[0]}.*{more}; results and originals are paired by name")
