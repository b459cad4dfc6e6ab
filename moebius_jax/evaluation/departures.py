"""What a reader who compares a report with the paper has to know: what differs, and what we chose."""

from typing import Any

import numpy as np
from jaxtyping import Float

from moebius_jax.evaluation.benchmark import PAPER, BenchmarkSettings
from moebius_jax.evaluation.inputs import Inputs
from moebius_jax.evaluation.masks import MaskSpec
from moebius_jax.evaluation.protocols import Protocol
from moebius_jax.inpaint.sampler import SamplingOptions
from moebius_jax.inpaint.stream import UNMATCHED_BLUR
from moebius_jax.models import UNetConfig

# Of these the paper says nothing.
_OURS = {"strength": SamplingOptions().strength, "mask_blur": UNMATCHED_BLUR}


def choices(sampling: SamplingOptions, mask_blur: float) -> list[str]:
    """How pictures were made where the paper leaves it open."""
    start = (
        "the noise that sampling starts from holds a trace of the original's latents, inside the hole too, "
        f"as in the released code: strength {sampling.strength:g}"
        if sampling.strength < 1
        else "sampling starts from pure noise: strength 1"
    )
    return [start, f"known pixels are kept but for a soft edge of {mask_blur:g} of the network's pixels"]


def departures(
    settings: BenchmarkSettings,
    *,
    found: int,
    inputs: Inputs,
    masks: dict[str, Any],
    model: dict[str, Any],
    network: UNetConfig,
    notes: list[str],
) -> list[str]:
    """What differs from the protocol, a sentence each.

    Args:
        settings: of the evaluation.
        found: images in their folder.
        inputs: what is evaluated.
        masks, model: what the report says of them.
        network: that paints.
        notes: of the caller's.
    """
    protocol = settings.protocol
    lines, count = [], len(inputs.ratios)
    if protocol.count and count != protocol.count:
        lines.append(f"{count:,} images, the protocol has {protocol.count:,}")
    if count < found:
        lines.append(f"the first {count:,} by name of {found:,} images")
    if protocol.is_published:
        lines += _setting_departures(settings)
        lines += _mask_departures(protocol.masks, masks, inputs.ratios)
        lines += _model_departures(protocol, model, network)
    return lines + masks["notes"] + notes + settings.small_set_note(count)


def _setting_departures(settings: BenchmarkSettings) -> list[str]:
    protocol = settings.protocol
    paper = {**PAPER, "size": protocol.size, "guidance_scale": protocol.guidance_scale}
    given = {name: getattr(settings, name) for name in (*paper, *_OURS)}
    given["size"] = settings.size or "original"
    lines = [
        f"{name.replace('_', ' ')} {given[name]}, the protocol has {value}"
        for name, value in paper.items()
        if given[name] not in (None, value)
    ]
    return lines + [
        f"{name.replace('_', ' ')} {given[name]}, our default is {value} (the paper names none)"
        for name, value in _OURS.items()
        if given[name] not in (None, value)
    ]


def _mask_departures(spec: MaskSpec, masks: dict[str, Any], ratios: Float[np.ndarray, " N"]) -> list[str]:
    """Whether the masks are drawn as the protocol says, as far as their set and their pixels tell."""
    lines = []
    keys = ("kind", "min_ratio", "max_ratio")
    if "set_kind" not in masks:
        lines.append(
            "masks of a set that does not say what it is: whether they are the protocol's is not known"
        )
    elif any(masks.get(f"set_{key}") != getattr(spec, key) for key in keys):
        found = f"{masks['set_kind']} {masks.get('set_min_ratio')} to {masks.get('set_max_ratio')}"
        lines.append(f"masks {found}, the protocol has {spec.kind} {spec.min_ratio} to {spec.max_ratio}")
    else:
        lines.append("masks drawn from their published description, not the files the paper used")
    outside = int(np.sum((ratios < spec.min_ratio) | (ratios > spec.max_ratio)))
    if outside:
        lines.append(
            f"{outside:,} masks have a hole outside the protocol's {spec.min_ratio:.0%} to "
            f"{spec.max_ratio:.0%} (the mean of all is {ratios.mean():.0%})"
        )
    return lines


def _model_departures(protocol: Protocol, model: dict[str, Any], network: UNetConfig) -> list[str]:
    lines = []
    published = [named.to_dict() for named in (UNetConfig.student(), UNetConfig.teacher())]
    if network.to_dict() not in published:
        lines.append(
            f"the network is neither Moebius nor PixelHacker ({model['parameters']:,} parameters, latents of "
            f"{network.latent_size} x {network.latent_size})"
        )
    elif model["variant"] is None:
        lines.append(f"the weights do not say what they are; the protocol has {protocol.variant}")
    if model["variant"] not in (None, protocol.variant):
        lines.append(f"weights {model['variant']}, the protocol has {protocol.variant}")
    return lines
