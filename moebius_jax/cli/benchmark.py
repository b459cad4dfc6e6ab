"""`evaluate.py PROTOCOL`: images and masks, a model's results, scores, report."""

import argparse
import dataclasses
import functools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from moebius_jax import checkpoints
from moebius_jax.cli.arguments import (
    compute_dtypes,
    load_pipeline,
    process_share,
    require_positive,
    require_seed,
)
from moebius_jax.cli.common import FAILED, CompileClock, enable_compilation_cache, progress
from moebius_jax.cli.departures import PAPER, choices, departures
from moebius_jax.cli.scoring import (
    claim_report,
    fewest_images,
    inception_facts,
    make_scorer,
    require_evaluation_extra,
    write_report,
)
from moebius_jax.conversion.hub import VARIANTS
from moebius_jax.errors import UserError
from moebius_jax.evaluation.cases import Case, list_pictures, pair_masks
from moebius_jax.evaluation.generate import check_folder, claim_folder, generate
from moebius_jax.evaluation.inputs import Inputs, inspect, lines_of, odd_masks
from moebius_jax.evaluation.lpips import require_size
from moebius_jax.evaluation.mask_sets import DESCRIPTION_FILE, POLARITY, MaskSpec, read_description, write_set
from moebius_jax.evaluation.protocols import PROTOCOLS, Protocol
from moebius_jax.evaluation.published import GUIDANCE
from moebius_jax.evaluation.report import Run
from moebius_jax.inpaint import InpaintOptions
from moebius_jax.pipeline import DEFAULT_GUIDANCE, PORTRAIT_GUIDANCE, MoebiusInpaintPipeline
from moebius_jax.sampling.sampler import SamplingOptions


def evaluate(args: argparse.Namespace) -> int:
    """Paints what is missing of a benchmark and scores it; returns the exit status."""
    protocol = PROTOCOLS[args.protocol]
    require_evaluation_extra()
    _check(args, protocol)
    images, found = _images(args, protocol)
    enough = 2 if args.sample_only else fewest_images(args, len(images))
    process, processes = process_share(args)
    if processes > 1 and not args.sample_only:
        raise UserError("several processes paint (--sample-only); score afterwards with one")
    claim_report(args.output, protocol.name, (args.images, args.masks))
    if not args.no_compilation_cache:
        enable_compilation_cache()
    # Before the model: its weights may be wrong, and it is quick.
    scorer = None if args.sample_only else make_scorer(args, keep_truths=_sweep(args) is not None)
    cases, masks, inputs = _with_masks(args, protocol, images)
    pipe = load_pipeline(args, _variant(args, protocol))
    model = _model_facts(args, protocol, pipe)
    guidance = protocol.guidance_scale or pipe.guidance_scale
    plans = [
        _plan(args, label, sampling, _settings(args, protocol, pipe, model, inputs, sampling), cases)
        for label, sampling in _variations(args, guidance)
    ]
    plans = [_checked(args, plan) for plan in plans]
    runs: list[Run] = []
    for plan in plans:
        seconds, count, problems = _paint(args, pipe, plan.cases[process::processes], plan)
        if problems:
            print(f"{len(problems)} not done:", lines_of(problems), sep="\n", file=sys.stderr)
            return FAILED
        if scorer:
            scores = scorer(plan.cases, size=args.size, invert_masks=args.invert_masks, track=progress)
            facts = {"label": plan.label, "settings": plan.settings, "folder": plan.folder}
            runs.append(Run.of(scores, args.metrics, enough, **facts, seconds=seconds, painted=count))
    if runs:
        usual = _usual_sampling(args, guidance)
        shown = next((i for i, plan in enumerate(plans) if plan.sampling == usual), 0)
        write_report(
            args,
            runs,
            plans[shown].cases,
            enough=enough,
            protocol={k: getattr(protocol, k) for k in ("name", "title", "dataset", "masks_like")},
            departures=departures(
                args, protocol, found=found, inputs=inputs, masks=masks, model=model, network=pipe.unet.config
            ),
            choices=choices(plans[shown].sampling, args.mask_blur),
            sources=_sources(args, inputs, masks, model),
            sweep=_sweep(args),
            shown=shown,
        )
    return 0


def _sources(
    args: argparse.Namespace, inputs: Inputs, masks: dict[str, Any], model: dict[str, Any]
) -> dict[str, Any]:
    return {
        "images": {"folder": str(args.images), "sha256_of_files": inputs.images_sha256},
        "masks": masks,
        "model": model,
        **inception_facts(args),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """One setting: what to paint, and where; `label` is "" where there is no sweep."""

    label: str
    folder: str
    sampling: SamplingOptions
    settings: dict[str, Any]
    cases: list[Case]


def _plan(
    args: argparse.Namespace,
    label: str,
    sampling: SamplingOptions,
    settings: dict[str, Any],
    cases: Sequence[Case],
) -> _Plan:
    folder = label or "results"
    placed = [dataclasses.replace(c, result=args.output / folder / f"{c.name}.png") for c in cases]
    return _Plan(label=label, folder=folder, sampling=sampling, settings=settings, cases=placed)


def _checked(args: argparse.Namespace, plan: _Plan) -> _Plan:
    """The plan with the settings of the results that are there, if any are."""
    complete = all(case.result.exists() for case in plan.cases)
    return dataclasses.replace(
        plan, settings=check_folder(args.output / plan.folder, plan.settings, complete=complete)
    )


def _check(args: argparse.Namespace, protocol: Protocol) -> None:
    """What can be wrong on the command line should be said before anything is loaded or written."""
    require_positive(args, "count", "batch_size", "size")
    require_seed(args)
    InpaintOptions(mask_blur=args.mask_blur)
    if args.size is None and args.masks is None:
        raise UserError("--size original needs --masks: those that are drawn are square")
    if args.size is not None and "lpips" in args.metrics:
        require_size((args.size, args.size), "--size")
    if args.masks is None:
        _mask_spec(args, protocol)
    elif args.masks.exists() and args.images.exists() and args.masks.samefile(args.images):
        raise UserError(f"{args.masks}: holds images and masks; give masks a folder of their own")
    if args.masks is None and (args.invert_masks or args.pair_by != "name"):
        raise UserError("--invert-masks and --pair-by are for --masks; drawn masks are white = hole")
    if args.masks is not None and (args.mask_kind or args.mask_ratio or args.mask_seed):
        raise UserError("--mask-kind, --mask-ratio and --mask-seed are for drawing masks; leave out --masks")
    sweep = _sweep(args)
    if sweep and getattr(args, sweep) is not None:
        raise UserError(f"--{sweep.replace('_', '-')} has no place in a sweep over it; leave it out")
    _variations(args, protocol.guidance_scale or DEFAULT_GUIDANCE)  # whether they can be run


def _images(args: argparse.Namespace, protocol: Protocol) -> tuple[dict[str, Path], int]:
    """The originals, as many as the protocol has, or --count says; and how many there are."""
    found = list_pictures(args.images)
    wanted = args.count or protocol.count or len(found)
    if len(found) < wanted:
        hint = "" if args.count else f"; --count {len(found)} evaluates these, and the report says so"
        raise UserError(f"{args.images}: {len(found)} images, {wanted} are needed{hint}")
    return dict(list(found.items())[:wanted]), len(found)


def _with_masks(
    args: argparse.Namespace, protocol: Protocol, images: dict[str, Path]
) -> tuple[list[Case], dict[str, Any], Inputs]:
    """Images with their masks, what is known of the set, and a look at them all."""
    folder = args.masks or args.output / "masks"
    if args.masks is None:
        _draw_masks(folder, _mask_spec(args, protocol), list(images))
    found = list_pictures(folder, "masks")
    description = read_description(folder) or {}
    if args.invert_masks and description:
        raise UserError(f"{folder / DESCRIPTION_FILE}: says {POLARITY}; leave out --invert-masks")
    pairs = pair_masks(images, found, folder, args.pair_by)
    cases = [
        Case(name=name, truth=file, mask=found[pairs[name]], mask_name=pairs[name], result=Path())
        for name, file in images.items()
    ]
    metrics = () if args.sample_only else args.metrics
    inputs = inspect(cases, size=args.size, invert_masks=args.invert_masks, metrics=metrics, track=progress)
    odd = odd_masks([case.name for case in cases], inputs.ratios)
    for line in odd:
        print(f"warning: {folder}: {line}", file=sys.stderr)
    if len(found) == len(cases) and description.get("sha256") not in (None, inputs.masks_sha256):
        raise UserError(
            f"{folder / DESCRIPTION_FILE}: says SHA-256 {description['sha256'][:16]}…, the masks have "
            f"{inputs.masks_sha256[:16]}…: the set was changed; draw it again, or delete {DESCRIPTION_FILE} "
            "if the masks are your own"
        )
    facts = {
        "folder": str(folder),
        "origin": "stored set" if args.masks else "drawn for this evaluation",
        "polarity": "black is the hole" if args.invert_masks else "white is the hole",
        "paired_by": args.pair_by,
        "is_whole_set": len(found) == len(cases),
        "notes": odd,
        **{f"set_{key}": value for key, value in description.items() if key != "polarity"},
    }
    return cases, facts, inputs


def _mask_spec(args: argparse.Namespace, protocol: Protocol) -> MaskSpec:
    spec = dataclasses.replace(protocol.masks, size=args.size, seed=args.mask_seed)
    if args.mask_kind:
        spec = dataclasses.replace(spec, kind=args.mask_kind, min_ratio=0.0, max_ratio=1.0)
    if args.mask_ratio:
        spec = dataclasses.replace(spec, min_ratio=args.mask_ratio[0], max_ratio=args.mask_ratio[1])
    return spec


def _draw_masks(folder: Path, spec: MaskSpec, names: list[str]) -> None:
    """Draws the set, unless an earlier run, or another process by now, has."""
    if not folder.exists():
        try:
            write_set(folder, spec, names, track=progress)
        except UserError:
            if not folder.exists():
                raise
    before = read_description(folder) or {}
    for key, wanted in {**spec.to_dict(), "count": len(names)}.items():
        if before.get(key) != wanted:
            raise UserError(
                f"{folder / DESCRIPTION_FILE}: drawn with {key} {before.get(key)}, asked for is {wanted}; "
                f"choose another --output, or remove {folder}, or use it with --masks"
            )


def _variant(args: argparse.Namespace, protocol: Protocol) -> str | None:
    """--variant, or the protocol's, for models that come in variants."""
    single = any((Path(args.model) / name).is_file() for name in ("pipeline.json", "config.json"))
    return args.variant or (None if single else protocol.variant)


def _recorded_variant(model: Path, variant: str | None) -> str | None:
    """The released weights that a folder here says it was converted from."""
    for folder in (model, model / "unet", model / (variant or "pretrained")):
        if (folder / "config.json").is_file():
            recorded = checkpoints.read_config(folder).source.get("variant")
            return recorded if recorded in VARIANTS else None
    return variant


def _model_facts(
    args: argparse.Namespace, protocol: Protocol, pipe: MoebiusInpaintPipeline
) -> dict[str, Any]:
    return {
        "name": str(args.model),
        "variant": _recorded_variant(Path(args.model), _variant(args, protocol)),
        "network": checkpoints.describe(pipe.unet.config),
        "parameters": checkpoints.count_parameters(pipe.unet.config),
        "unet_sha256": checkpoints.digest(pipe.unet),
        "vae_sha256": checkpoints.digest(pipe.vae),
        **{key: str(value) for key, value in compute_dtypes(args).items()},
    }


def _usual_sampling(args: argparse.Namespace, guidance: float) -> SamplingOptions:
    """The settings without a sweep; with this guidance scale unless another is asked for."""
    steps = args.num_inference_steps
    return SamplingOptions(
        num_inference_steps=PAPER["num_inference_steps"] if steps is None else steps,
        guidance_scale=guidance if args.guidance_scale is None else args.guidance_scale,
        strength=args.strength,
        scheduler=args.scheduler or PAPER["scheduler"],
    )


def _variations(args: argparse.Namespace, guidance: float) -> list[tuple[str, SamplingOptions]]:
    """The settings to run, each with a label that is a folder's name; "" where there is no sweep."""
    usual = _usual_sampling(args, guidance)
    sweep = _sweep(args)
    if sweep is None:
        return [("", usual)]
    scales = GUIDANCE["celebahq" if usual.guidance_scale == PORTRAIT_GUIDANCE else "places2_test"]
    values: Sequence[Any] = {
        "guidance_scale": args.guidance_sweep or tuple(scales),
        "num_inference_steps": args.steps_sweep or (5, 10, 20, 50),
        "scheduler": ("ddim", "dpmpp_2m"),
    }[sweep]
    short = {"guidance_scale": "guidance", "num_inference_steps": "steps"}.get(sweep, sweep)
    return [
        (f"{short}_{value}", dataclasses.replace(usual, **{sweep: value})) for value in dict.fromkeys(values)
    ]


def _sweep(args: argparse.Namespace) -> str | None:
    """The setting that is swept."""
    if args.guidance_sweep is not None:
        return "guidance_scale"
    if args.steps_sweep is not None:
        return "num_inference_steps"
    return "scheduler" if args.scheduler_sweep else None


def _settings(
    args: argparse.Namespace,
    protocol: Protocol,
    pipe: MoebiusInpaintPipeline,
    model: dict[str, Any],
    inputs: Inputs,
    sampling: SamplingOptions,
) -> dict[str, Any]:
    """All that decides the results to the bit, for run.json and the report."""
    return {
        "protocol": protocol.name,
        "size": args.size or "original",
        "images": inputs.images_sha256,
        "masks": inputs.pairs_sha256,
        "unet": model["unet_sha256"],
        "vae": model["vae_sha256"],
        "dtype": model["dtype"],
        "vae_dtype": model["vae_dtype"],
        "model_square": pipe.sampler.image_size,
        "sampling": dataclasses.asdict(sampling),
        "mask_blur": args.mask_blur,
        "seed": args.seed,
        "batch_size": pipe.sampler.batch_size(args.batch_size),
        "device": jax.devices()[0].device_kind,
    }


def _paint(
    args: argparse.Namespace, pipe: MoebiusInpaintPipeline, cases: Sequence[Case], plan: _Plan
) -> tuple[float | None, int, list[str]]:
    """Paints what is missing; returns seconds without compiling, how many, and problems."""
    folder = args.output / plan.folder
    missing = sum(not case.result.exists() for case in cases)
    if missing < len(cases):
        print(f"{folder}: {len(cases) - missing} of {len(cases)} results exist already and are kept")
    if not missing:
        return None, 0, []
    start = time.perf_counter()
    with CompileClock() as compiling:
        problems = generate(
            pipe.sampler,
            cases,
            InpaintOptions(invert_mask=args.invert_masks, mask_blur=args.mask_blur),
            plan.sampling,
            size=args.size,
            seed=args.seed,
            batch_size=pipe.sampler.batch_size(args.batch_size),
            begin=functools.partial(claim_folder, folder, plan.settings),
            track=progress,
        )
    # All that was missing may have come from another process meanwhile.
    check_folder(folder, plan.settings, complete=True)
    seconds = max(time.perf_counter() - start - compiling.seconds, 1e-9)
    count = missing - len(problems)
    print(
        f"{folder}: painted {count} in {seconds:.1f} s ({count / seconds:.2f} images/s) after "
        f"{compiling.seconds:.1f} s of compiling"
    )
    return seconds, count, problems
