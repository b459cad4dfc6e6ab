"""An evaluation's result: its figures, and its report as files."""

import contextlib
import dataclasses
import datetime
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moebius_jax.errors import UserError
from moebius_jax.evaluation.cases import Case, Hole, Rgb, preparation, read_hole, read_result, read_truth
from moebius_jax.evaluation.metrics.scores import Summary
from moebius_jax.evaluation.report.document import FORMAT, Run, build_document, finite
from moebius_jax.evaluation.report.html import Load, render_html
from moebius_jax.evaluation.report.markdown import arrow, figure, metric_keys, render_markdown
from moebius_jax.evaluation.report.table import render_csv
from moebius_jax.files import remove_remains, replace_when_complete, require_writable
from moebius_jax.schema import read_json

PAGE = "report.html"
_FILES = ("report.json", "report.md", PAGE, "scores.csv")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationReport:
    """What an evaluation found.

    Attributes:
        document: everything, as JSON-ready values; see `build_document`.
        runs: one, or one for each setting of a sweep, with every picture's scores.
        load: reads a case's original, result and hole by name, for the page.
        keep: whatever the results' files depend on.
    """

    document: dict[str, Any]
    runs: Sequence[Run]
    load: Load
    keep: Any = None

    @classmethod
    def of(
        cls, runs: Sequence[Run], load: Load, *, size: int | None, keep: Any = None, **facts: Any
    ) -> "EvaluationReport":
        """The report of some runs of pictures of this size, made now; `facts` are for `build_document`."""
        created = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
        document = build_document(runs, created=created, preparation=preparation(size), **facts)
        return cls(document=finite(document), runs=runs, load=load, keep=keep)

    @property
    def summary(self) -> Summary:
        """The figures of all pictures: "count", and for each metric {"whole": …, "hole": …}.

        Of a sweep, those of the setting the page shows.
        """
        return self.runs[self.document["shown"]].summary

    def figures(self) -> str:
        """The figures as lines for a terminal."""
        lines = []
        for run in self.document["runs"]:
            lines.append(f"{run['label'] or 'scores'} ({run['all']['count']} images; whole, inside the hole)")
            for key in metric_keys(run["all"]):
                values = (f"{figure(key, run['all'][key][part]):>10}" for part in ("whole", "hole"))
                lines.append(" ".join([f"  {arrow(key):16}", *values]))
        return "\n".join(lines)

    def write(self, folder: str | Path) -> Path:
        """Writes report.json, report.md, report.html and each run's scores.csv: all, or none.

        Returns:
            The page.

        Raises:
            UserError: they cannot be written.
        """
        shown = self.runs[self.document["shown"]].scores
        texts = {f"{run.folder}/scores.csv".lstrip("/"): render_csv(run.scores) for run in self.runs}
        texts |= {
            "report.json": json.dumps(self.document, indent=2, allow_nan=False) + "\n",
            "report.md": render_markdown(self.document),
            PAGE: render_html(self.document, shown, self.load),
        }
        with contextlib.ExitStack() as stack:
            for name, text in texts.items():
                file = Path(folder) / name
                stack.enter_context(replace_when_complete(file, overwrite=True)).write_text(text)
        return Path(folder) / PAGE


def claim_report(folder: Path, kind: str, inputs: Iterable[Path | None]) -> None:
    """Makes the folder a report goes to, before the work for it is done.

    Args:
        folder: of the report.
        kind: of the report; an earlier one of this kind will be replaced.
        inputs: folders that nothing may be written to.

    Raises:
        UserError: it cannot be written, is among the inputs, or holds another report or files of that name.
    """
    for base in inputs:
        if base is not None and folder.resolve().is_relative_to(base.resolve()):
            raise UserError(f"{folder}: is in the folder of inputs {base}; choose another --output")
    require_writable(folder)
    remove_remains(folder)
    for name in _FILES:
        if not (folder / name).exists():
            continue
        try:
            before = read_json(folder / "report.json", dict[str, Any])
        except (OSError, UserError):
            before = {}
        if (before.get("format"), before.get("kind")) != (FORMAT, kind):
            raise UserError(f"{folder / name}: is not from evaluate.py {kind}; choose another --output")


def case_loader(cases: Sequence[Case], *, size: int | None, invert_masks: bool) -> Callable[..., Any]:
    """Reads a case's pictures by its name, see `Load`."""
    by_name = {case.name: case for case in cases}

    def load(name: str) -> tuple[Rgb, Rgb, Hole]:
        case = by_name[name]
        truth = read_truth(case, size)
        hole = np.zeros(truth.shape[:2], bool)
        if case.mask is not None:
            hole = read_hole(case.mask, truth, invert=invert_masks)
        return truth, read_result(case, truth), hole

    return load
