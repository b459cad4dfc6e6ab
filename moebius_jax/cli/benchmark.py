"""`evaluate.py PROTOCOL`: images and masks, a model's results, scores, report."""

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moebius_jax import checkpoints
from moebius_jax.cli.arguments import compute_dtypes, load_pipeline, process_share
from moebius_jax.cli.common import FAILED, CompileClock, enable_compilation_cache, progress
from moebius_jax.cli.scoring import (
    fewest_images,
    gathered_mask_warnings,
    inception_facts,
    make_scorer,
    require_evaluation_extra,
    write_report,
)
from moebius_jax.errors import UserError
from moebius_jax.evaluation.cases import Case, list_pictures, pair_masks
from moebius_jax.evaluation.distributions import ENOUGH_FOR_FID
from moebius_jax.evaluation.generate import claim_folder, generate, listing_hash
from moebius_jax.evaluation.mask_sets import DESCRIPTION_FILE, MaskSpec, read_description, write_set
from moebius_jax.evaluation.protocols import PROTOCOLS, Protocol
from moebius_jax.evaluation.published import GUIDANCE
from moebius_jax.evaluation.report import Run
from moebius_jax.evaluation.scoring import NEEDS_INCEPTION, Scores
from moebius_jax.inpaint import InpaintOptions
from moebius_jax.pipeline import PORTRAIT_GUIDANCE, MoebiusInpaintPipeline
from moebius_jax.sampling.sampler import SamplingOptions

_PAPER = {"num_inference_steps": 20, "strength": 0.99, "scheduler": "ddim"}


def evaluate(args: argparse.Namespace) -> int:
    """Paints what is missing of a benchmark and scores it; returns the exit status."""
    protocol = PROTOCOLS[args.protocol]
    require_evaluation_extra()
    _check(args)
    images = _images(args, protocol)
    enough = 2 if args.sample_only else fewest_images(args, len(images))
    process, processes = process_share(args)
    if processes > 1 and not args.sample_only:
        raise UserError("several processes paint (--sample-only); score afterwards with one")
    if not args.no_compilation_cache:
        enable_compilation_cache()
    scorer = None if args.sample_only else make_scorer(args)  # its weights may be wrong: first, it is quick
    cases, masks = _with_masks(args, protocol, images)
    pipe = load_pipeline(args, _variant(args, protocol))
    model = _model_facts(args, protocol, pipe)
    runs: list[Run] = []
    folders: list[Path] = []
    with gathered_mask_warnings():
        for label, sampling in _variations(args, protocol, pipe):
            folder = args.output / (label or "results")
            folders.append(folder)
            placed = [dataclasses.replace(c, result=folder / f"{c.name}.png") for c in cases]
            settings = _settings(args, protocol, pipe, model, placed, sampling)
            mine = placed[process::processes]
            seconds, count, problems = _paint(args, pipe, mine, folder, settings, sampling)
            if problems:
                print(f"{len(problems)} not done:", *problems, sep="\n  ", file=sys.stderr)
                return FAILED
            if scorer:
                scores = scorer(placed, size=args.size, invert_masks=args.invert_masks, track=progress)
                _check_stored_set(masks, scores)
                run = Run(label=label, settings=settings, scores=scores, seconds=seconds, painted=count)
                runs.append(run)
    if scorer:
        write_report(
            args,
            runs,
            [dataclasses.replace(c, result=folders[0] / f"{c.name}.png") for c in cases],
            enough=enough,
            protocol={k: getattr(protocol, k) for k in ("name", "title", "dataset", "masks_like")},
            departures=_departures(args, protocol, len(cases), masks),
            sources={
                "images": {"folder": str(args.images)},
                "masks": masks,
                "model": model,
                **inception_facts(args),
            },
            sweep=_sweep(args),
        )
    return 0


def _check(args: argparse.Namespace) -> None:
    """What can be wrong on the command line should be said before anything is loaded."""
    for name in ("count", "batch_size", "size"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; expected 1 or more")
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed is {args.seed}; expected 0 to {2**32 - 1}")
    if args.masks is None and (args.invert_masks or args.pair_by != "name"):
        raise UserError("--invert-masks and --pair-by are for --masks; drawn masks are white = hole")
    if args.masks is not None and (args.mask_kind or args.mask_ratio or args.mask_seed):
        raise UserError("--mask-kind, --mask-ratio and --mask-seed are for drawing masks; leave out --masks")
    if args.output.exists() and not args.output.is_dir():
        raise UserError(f"{args.output}: is a file, expected a folder")
    for base in (args.images, args.masks):
        if base is not None and args.output.resolve().is_relative_to(base.resolve()):
            raise UserError(f"{args.output}: is in the folder of inputs {base}; choose another --output")


def _images(args: argparse.Namespace, protocol: Protocol) -> dict[str, Path]:
    """The originals: as many as the protocol has, or --count says."""
    found = list_pictures(args.images)
    wanted = args.count or protocol.count or len(found)
    if len(found) < wanted:
        hint = "" if args.count else f"; --count {len(found)} evaluates these, and the report says so"
        raise UserError(f"{args.images}: {len(found)} images, {wanted} are needed{hint}")
    return dict(list(found.items())[:wanted])


def _with_masks(
    args: argparse.Namespace, protocol: Protocol, images: dict[str, Path]
) -> tuple[list[Case], dict[str, Any]]:
    """Images with their masks, and what is known of the set."""
    folder = args.masks or args.output / "masks"
    if args.masks is None:
        _draw_masks(folder, _mask_spec(args, protocol), list(images))
    found = list_pictures(folder, "masks")
    pairs = pair_masks(images, found, folder, args.pair_by)
    cases = [
        Case(name=name, truth=file, mask=found[pairs[name]], mask_name=pairs[name], result=Path())
        for name, file in images.items()
    ]
    description = read_description(folder) or {}
    facts = {
        "folder": str(folder),
        "origin": "stored set" if args.masks else "drawn for this evaluation",
        "polarity": "black is the hole" if args.invert_masks else "white is the hole",
        "paired_by": args.pair_by,
        "is_whole_set": len(found) == len(cases),
        **{f"set_{key}": value for key, value in description.items() if key != "polarity"},
    }
    return cases, facts


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
    if {k: before.get(k) for k in spec.to_dict()} != spec.to_dict() or before.get("count") != len(names):
        raise UserError(
            f"{folder / DESCRIPTION_FILE}: drawn otherwise (kind, ratio, size, seed or count differ); "
            "choose another --output, or name them with --masks"
        )


def _check_stored_set(masks: dict[str, Any], scores: Scores) -> None:
    """A set that says what its hash is must have it."""
    said = masks.get("set_sha256")
    is_comparable = masks["is_whole_set"] and masks["polarity"].startswith("white")
    if said and is_comparable and said != scores.masks_sha256:
        raise UserError(
            f"{masks['folder']}/{DESCRIPTION_FILE}: says SHA-256 {said[:16]}…, the files have "
            f"{scores.masks_sha256[:16]}…: the set was changed; draw it again, or delete {DESCRIPTION_FILE} "
            "if the masks are your own"
        )


def _variant(args: argparse.Namespace, protocol: Protocol) -> str | None:
    """--variant, or the protocol's, for models that come in variants."""
    single = any((Path(args.model) / name).is_file() for name in ("pipeline.json", "config.json"))
    return args.variant or (None if single else protocol.variant)


def _model_facts(
    args: argparse.Namespace, protocol: Protocol, pipe: MoebiusInpaintPipeline
) -> dict[str, Any]:
    tensors = checkpoints.network_tensors(pipe.unet)
    return {
        "name": str(args.model),
        "variant": _variant(args, protocol),
        "network": checkpoints.describe(pipe.unet.config),
        "parameters": sum(
            v.size for k, v in tensors.items() if k.rpartition(".")[2] not in checkpoints.STATISTICS
        ),
        "unet_sha256": checkpoints.digest(pipe.unet),
        "vae_sha256": checkpoints.digest(pipe.vae),
        **{key: str(value) for key, value in compute_dtypes(args).items()},
    }


def _variations(
    args: argparse.Namespace, protocol: Protocol, pipe: MoebiusInpaintPipeline
) -> list[tuple[str, SamplingOptions]]:
    """The settings to run, each with a label that is a folder's name; "" where there is no sweep."""
    default = protocol.guidance_scale or pipe.guidance_scale
    base = SamplingOptions(
        num_inference_steps=args.num_inference_steps,
        guidance_scale=default if args.guidance_scale is None else args.guidance_scale,
        strength=args.strength,
        scheduler=args.scheduler,
    )
    sweep = _sweep(args)
    if sweep is None:
        return [("", base)]
    scales = GUIDANCE["celebahq" if default == PORTRAIT_GUIDANCE else "places2_test"]
    values: Sequence[Any] = {
        "guidance_scale": args.guidance_sweep or tuple(scales),
        "num_inference_steps": args.steps_sweep or (5, 10, 20, 50),
        "scheduler": ("ddim", "dpmpp_2m"),
    }[sweep]
    short = {"guidance_scale": "guidance", "num_inference_steps": "steps"}.get(sweep, sweep)
    return [
        (f"{short}_{value}", dataclasses.replace(base, **{sweep: value})) for value in dict.fromkeys(values)
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
    cases: Sequence[Case],
    sampling: SamplingOptions,
) -> dict[str, Any]:
    """All that decides the results, for run.json and the report."""
    return {
        "protocol": protocol.name,
        "size": args.size,
        "images_and_masks": listing_hash(cases),
        "invert_masks": args.invert_masks,
        "unet": model["unet_sha256"],
        "vae": model["vae_sha256"],
        "dtype": model["dtype"],
        "vae_dtype": model["vae_dtype"],
        "model_square": pipe.sampler.image_size,
        "sampling": dataclasses.asdict(sampling),
        "mask_blur": args.mask_blur,
        "seed": args.seed,
    }


def _paint(
    args: argparse.Namespace,
    pipe: MoebiusInpaintPipeline,
    cases: Sequence[Case],
    folder: Path,
    settings: dict[str, Any],
    sampling: SamplingOptions,
) -> tuple[float, int, list[str]]:
    """Paints what is missing; returns seconds without compiling, how many, and problems."""
    inpainting = InpaintOptions(invert_mask=args.invert_masks, mask_blur=args.mask_blur)
    claim_folder(folder, settings)
    missing = sum(not case.result.exists() for case in cases)
    if missing < len(cases):
        print(f"{folder}: {len(cases) - missing} of {len(cases)} results exist already and are kept")
    if not missing:
        return 0.0, 0, []
    start = time.perf_counter()
    with CompileClock() as compiling:
        problems = generate(
            pipe.sampler,
            cases,
            inpainting,
            sampling,
            size=args.size,
            seed=args.seed,
            batch_size=pipe.sampler.batch_size(args.batch_size),
            track=progress,
        )
    seconds = max(time.perf_counter() - start - compiling.seconds, 1e-9)
    count = missing - len(problems)
    print(
        f"{folder}: painted {count} in {seconds:.1f} s ({count / seconds:.2f} images/s) after "
        f"{compiling.seconds:.1f} s of compiling"
    )
    return seconds, count, problems


def _departures(args: argparse.Namespace, protocol: Protocol, count: int, masks: dict[str, Any]) -> list[str]:
    """What a reader who compares with the paper has to know."""
    lines = []
    if protocol.count:
        usual = {**_PAPER, "size": protocol.size, "guidance_scale": protocol.guidance_scale}
        found = {name: getattr(args, name) for name in usual}
        lines += [
            f"{name.replace('_', ' ')} {found[name]}, the protocol has {value}"
            for name, value in usual.items()
            if found[name] not in (None, value)
        ]
        if count != protocol.count:
            lines.insert(0, f"{count:,} images, the protocol has {protocol.count:,}")
        if args.mask_kind or args.mask_ratio:
            lines.append("masks of another kind than the protocol's")
        elif masks["origin"] != "stored set":
            lines.append("masks drawn from their published description, not the files the paper used")
    if args.allow_untrained:
        lines.append("--allow-untrained: the weights may be random, see the model's name and digest")
    if set(args.metrics) & set(NEEDS_INCEPTION) and count < ENOUGH_FOR_FID:
        lines.append(
            f"FID, P-IDS and U-IDS of {count:,} images are far from those of many: compare with equals"
        )
    return lines
