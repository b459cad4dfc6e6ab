"""A benchmark from images to report: masks, a model's results, scores. `moebius_jax.evaluate` is here."""

import contextlib
import dataclasses
import functools
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from moebius_jax.errors import UserError
from moebius_jax.evaluation.benchmark import BenchmarkSettings
from moebius_jax.evaluation.cases import Case, list_pictures, pair_masks
from moebius_jax.evaluation.departures import choices, departures
from moebius_jax.evaluation.inputs import Inputs, inspect, lines_of, odd_masks
from moebius_jax.evaluation.masks import (
    DESCRIPTION_FILE,
    POLARITY,
    MaskSet,
    MaskSpec,
    read_description,
    write_set,
)
from moebius_jax.evaluation.metrics.names import Metric
from moebius_jax.evaluation.metrics.scorer import Scorer
from moebius_jax.evaluation.paint import check_folder, claim_folder, paint, require_own_results
from moebius_jax.evaluation.protocols import PROTOCOLS
from moebius_jax.evaluation.report.document import Run
from moebius_jax.evaluation.report.result import EvaluationReport, case_loader, claim_report
from moebius_jax.files import AlreadyThere
from moebius_jax.inpaint.pipeline import MoebiusInpaintPipeline
from moebius_jax.inpaint.sampler import SamplingOptions
from moebius_jax.inpaint.stream import InpaintOptions
from moebius_jax.timing import CompileClock
from moebius_jax.weights.tensors import count_parameters, digest

Track = Callable[..., Iterable[Any]]


def evaluate(
    pipeline: MoebiusInpaintPipeline,
    images: str | Path,
    *,
    protocol: str = "custom",
    metrics: Sequence[Metric] = ("lpips", "psnr", "ssim", "l1"),
    output: str | Path | None = None,
    size: int | Literal["protocol", "original"] = "protocol",
    track: Track = lambda items, **_: items,
    **settings: Any,
) -> EvaluationReport:
    """Paints the images of a benchmark with a pipeline, and scores the results.

    Args:
        pipeline: that paints.
        images: folder of originals.
        protocol: a key of `PROTOCOLS`: one of the paper's benchmarks, or "custom".
        metrics: of `METRICS`; "fid" and "ids" need `inception`, a converted network's folder.
        output: folder for results and masks, which a stopped evaluation goes on from; by default a temporary
            one, which lasts as long as the report.
        size: originals are brought to this many pixels a side; "original" leaves them as they are.
        track: wraps loops, as tqdm does.
        settings: the other fields of `BenchmarkSettings`.

    Returns:
        The figures (`.summary`), everything as JSON-ready values (`.document`), and `.write(folder)`, which
        writes report.html and its companions.

    Raises:
        UserError: something cannot be read or does not fit together; names it.
    """
    if protocol not in PROTOCOLS:
        raise UserError(f"protocol is {protocol!r}; expected one of {', '.join(PROTOCOLS)}")
    temporary = tempfile.TemporaryDirectory() if output is None else None
    chosen = PROTOCOLS[protocol]
    benchmark = Benchmark(
        BenchmarkSettings(
            protocol=chosen,
            images=Path(images),
            output=Path(output or temporary.name),
            size={"protocol": chosen.size, "original": None}.get(size, size),
            metrics=tuple(metrics),
            **settings,
        ),
        track=track,
    )
    return benchmark.run(pipeline, keep=temporary)


class Benchmark:
    """A benchmark whose inputs are checked and whose masks are drawn.

    All that can be wrong is said here, before a model is loaded.

    Args:
        settings: see there.
        scores: whether results will be scored, or painted only.
        track: wraps loops, as tqdm does.
        say: told of what is kept and what was done.

    Raises:
        UserError: files cannot be read or do not fit, or the folder for results holds something else.
    """

    def __init__(
        self,
        settings: BenchmarkSettings,
        *,
        scores: bool = True,
        track: Track = lambda items, **_: items,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._settings, self._track, self._say = settings, track, say
        images = self._images()
        self._enough = settings.fewest_images(len(images)) if scores else 2
        claim_report(settings.output, settings.protocol.name, (settings.images, settings.masks))
        # Before the pictures: its weights may be wrong, and it is quick.
        self._scorer: Scorer | None = None
        if scores:
            self._scorer = settings.make_scorer(keep_truths=settings.sweep is not None)
        self._cases, self._masks, self._inputs = self._with_masks(images)

    def run(
        self,
        pipeline: MoebiusInpaintPipeline,
        *,
        name: str = "pipeline",
        process: int = 0,
        processes: int = 1,
        command: Sequence[str] = (),
        notes: Sequence[str] = (),
        keep: Any = None,
    ) -> EvaluationReport | None:
        """Paints what is missing, and scores it.

        Args:
            pipeline: that paints.
            name: of the model, for the report.
            process, processes: which share of the pictures to paint; only one process can score.
            command: for the report.
            notes: for the report, what differs from the protocol beside the settings.
            keep: kept by the report.

        Returns:
            The report; None where results are painted only.

        Raises:
            UserError: some pictures could not be painted (names the first), or results of other settings
                are in the way.
        """
        settings = self._settings
        model = _model_facts(name, pipeline)
        own = pipeline.defaults
        plans = [self._plan(label, sampling, pipeline, model) for label, sampling in settings.variations(own)]
        runs: list[Run] = []
        for plan in plans:
            looked_at = plan.cases if self._scorer else plan.cases[process::processes]
            require_own_results([case for case in looked_at if case.result.exists()])
            seconds, count = self._paint(pipeline, plan.cases[process::processes], plan)
            if self._scorer:
                scores = self._scorer(
                    plan.cases, size=settings.size, invert_masks=settings.invert_masks, track=self._track
                )
                facts = {"label": plan.label, "settings": plan.settings, "folder": plan.folder}
                runs.append(
                    Run.of(scores, settings.metrics, self._enough, **facts, seconds=seconds, painted=count)
                )
        if not runs:
            return None
        usual = settings.usual_sampling(own)
        shown = next((i for i, plan in enumerate(plans) if plan.sampling == usual), 0)
        return EvaluationReport.of(
            runs,
            case_loader(plans[shown].cases, size=settings.size, invert_masks=settings.invert_masks),
            keep=keep,
            size=settings.size,
            kind=settings.protocol.name,
            command=command,
            enough=self._enough,
            protocol={
                key: getattr(settings.protocol, key) for key in ("name", "title", "dataset", "masks_like")
            },
            departures=departures(
                settings,
                found=self._found,
                inputs=self._inputs,
                masks=self._masks,
                model=model,
                network=pipeline.unet.config,
                notes=list(notes),
            ),
            choices=choices(plans[shown].sampling, settings.mask_blur),
            sources={
                "images": {"folder": str(settings.images), "sha256_of_files": self._inputs.images_sha256},
                "masks": self._masks,
                "model": model,
                **settings.inception_facts(),
            },
            sweep=settings.sweep,
            shown=shown,
        )

    def _images(self) -> dict[str, Path]:
        """The originals, as many as the protocol has, or `count` says."""
        folder, count = self._settings.images, self._settings.count
        found = list_pictures(folder)
        self._found = len(found)
        wanted = count or self._settings.protocol.count or len(found)
        if len(found) < wanted:
            hint = "" if count else f"; --count {len(found)} evaluates these, and the report says so"
            raise UserError(f"{folder}: {len(found)} images, {wanted} are needed{hint}")
        return dict(list(found.items())[:wanted])

    def _with_masks(self, images: dict[str, Path]) -> tuple[list[Case], dict[str, Any], Inputs]:
        """Images with their masks, what is known of the set, and a look at them all."""
        settings = self._settings
        folder = settings.masks or settings.output / "masks"
        if settings.masks is None:
            self._draw_masks(folder, settings.mask_spec, list(images))
        found = list_pictures(folder, "masks")
        description = read_description(folder)
        if settings.invert_masks and description:
            raise UserError(f"{folder / DESCRIPTION_FILE}: says {POLARITY}; leave out --invert-masks")
        pairs = pair_masks(images, found, folder, settings.pair_by)
        cases = [
            Case(name=name, truth=file, mask=found[pairs[name]], mask_name=pairs[name], result=Path())
            for name, file in images.items()
        ]
        inputs = inspect(
            cases,
            size=settings.size,
            invert_masks=settings.invert_masks,
            metrics=settings.metrics if self._scorer else (),
            track=self._track,
        )
        odd = odd_masks([case.name for case in cases], inputs.ratios)
        for line in odd:
            warnings.warn(f"{folder}: {line}", stacklevel=2)
        if len(found) == len(cases) and description and description.sha256 != inputs.masks_sha256:
            raise UserError(
                f"{folder / DESCRIPTION_FILE}: says SHA-256 {description.sha256[:16]}…, the masks have "
                f"{inputs.masks_sha256[:16]}…: the set was changed; draw it again, or delete "
                f"{DESCRIPTION_FILE} if the masks are your own"
            )
        facts = {
            "folder": str(folder),
            "origin": "stored set" if settings.masks else "drawn for this evaluation",
            "polarity": "black is the hole" if settings.invert_masks else "white is the hole",
            "paired_by": settings.pair_by,
            "is_whole_set": len(found) == len(cases),
            "notes": odd,
            **_set_facts(description),
        }
        return cases, facts, inputs

    def _draw_masks(self, folder: Path, spec: MaskSpec, names: list[str]) -> None:
        """Draws the set, unless an earlier run, or another process by now, has."""
        if not folder.exists():
            with contextlib.suppress(AlreadyThere):
                write_set(folder, spec, names, track=self._track)
        before = read_description(folder)
        for key, wanted in {**dataclasses.asdict(spec), "count": len(names)}.items():
            found = getattr(before, key, None)
            if found != wanted:
                raise UserError(
                    f"{folder / DESCRIPTION_FILE}: drawn with {key} {found}, asked for is "
                    f"{wanted}; choose another --output, or remove {folder}, or use it with --masks"
                )

    def _plan(
        self, label: str, sampling: SamplingOptions, pipe: MoebiusInpaintPipeline, model: dict[str, Any]
    ) -> "_Plan":
        """What to paint with one setting, and where; with the settings of results that are there."""
        folder = self._settings.output / (label or "results")
        cases = [dataclasses.replace(c, result=folder / f"{c.name}.png") for c in self._cases]
        wanted = self._deciding(sampling, pipe, model)
        complete = all(case.result.exists() for case in cases)
        return _Plan(
            label=label,
            folder=folder.name,
            sampling=sampling,
            settings=check_folder(folder, wanted, complete=complete),
            cases=cases,
        )

    def _deciding(
        self, sampling: SamplingOptions, pipe: MoebiusInpaintPipeline, model: dict[str, Any]
    ) -> dict[str, Any]:
        """All that decides the results to the bit, for run.json and the report."""
        settings = self._settings
        return {
            "protocol": settings.protocol.name,
            "size": settings.size or "original",
            "images": self._inputs.images_sha256,
            "masks": self._inputs.pairs_sha256,
            "unet": model["unet_sha256"],
            "vae": model["vae_sha256"],
            "dtype": model["dtype"],
            "vae_dtype": model["vae_dtype"],
            "model_square": pipe.sampler.image_size,
            "sampling": dataclasses.asdict(sampling),
            "mask_blur": settings.mask_blur,
            "seed": settings.seed,
            "batch_size": pipe.sampler.batch_size(settings.batch_size),
            "device": jax.devices()[0].device_kind,
        }

    def _paint(
        self, pipe: MoebiusInpaintPipeline, cases: Sequence[Case], plan: "_Plan"
    ) -> tuple[float | None, int]:
        """Paints what is missing; returns seconds without compiling, and how many."""
        settings = self._settings
        folder = settings.output / plan.folder
        missing = sum(not case.result.exists() for case in cases)
        if missing < len(cases):
            self._say(f"{folder}: {len(cases) - missing} of {len(cases)} results exist already and are kept")
        if not missing:
            return None, 0
        start = time.perf_counter()
        with CompileClock() as compiling:
            problems = paint(
                pipe.sampler,
                cases,
                InpaintOptions(
                    invert_mask=settings.invert_masks, mask_blur=settings.mask_blur, match_color=False
                ),
                plan.sampling,
                size=settings.size,
                seed=settings.seed,
                batch_size=pipe.sampler.batch_size(settings.batch_size),
                begin=functools.partial(claim_folder, folder, plan.settings),
                track=self._track,
            )
        # All that was missing may have come from another process meanwhile.
        check_folder(folder, plan.settings, complete=True)
        seconds = max(time.perf_counter() - start - compiling.seconds, 1e-9)
        count = missing - len(problems)
        self._say(
            f"{folder}: painted {count} in {seconds:.1f} s ({count / seconds:.2f} images/s) after "
            f"{compiling.seconds:.1f} s of compiling"
        )
        if problems:
            raise UserError(f"{len(problems)} not done:\n{lines_of(problems)}")
        return seconds, count


def _set_facts(description: MaskSet | None) -> dict[str, Any]:
    facts = dataclasses.asdict(description) if description else {}
    return {f"set_{key}": value for key, value in facts.items() if key != "polarity"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """One setting: what to paint, and where; `label` is "" where there is no sweep."""

    label: str
    folder: str
    sampling: SamplingOptions
    settings: dict[str, Any]
    cases: list[Case]


def _model_facts(name: str, pipe: MoebiusInpaintPipeline) -> dict[str, Any]:
    """What the report says of the model."""
    return {
        "name": name,
        "variant": pipe.variant,
        "network": pipe.unet.config.describe(),
        "parameters": count_parameters(pipe.unet.config),
        "unet_sha256": digest(pipe.unet),
        "vae_sha256": digest(pipe.vae),
        "dtype": str(jnp.dtype(pipe.unet.precision.dtype)),
        "vae_dtype": str(jnp.dtype(pipe.vae.dtype)),
    }
