"""Reads off a release file's tensor names and shapes what network it is."""

import re
from typing import Any

from flax import nnx

from moebius_jax.errors import UserError
from moebius_jax.models import ELatentLPIPSConfig, InceptionConfig, UNetConfig, VAEConfig
from moebius_jax.models.architecture import Architecture
from moebius_jax.models.released import Shapes
from moebius_jax.models.switches import CROSS_MIXERS, FEED_FORWARDS, RESIDUAL_CONVS, SELF_MIXERS


def detect_architecture(shapes: Shapes, file: str) -> Architecture:
    """The architecture of a release file.

    Args:
        shapes: tensor name → torch shape.
        file: what to call the file in messages.

    Raises:
        UserError: none of the networks we know, or tensors that decide a size are missing or contradict each
            other.
    """
    detectors = {
        "embedding_layer.weight": _unet,
        "diff_model.conv_norm_out.weight": _unet,
        "encoder.conv_norm_out.weight": _vae,
        "net.slice1.0.weight": _elatentlpips,
        "Mixed_7c.branch_pool.conv.weight": lambda shapes: InceptionConfig(classes=shapes["fc.weight"][0]),
    }
    for landmark, detect in detectors.items():
        if landmark in shapes:
            try:
                return detect(shapes)
            except KeyError as error:
                raise UserError(
                    f"{file}: the architecture cannot be told: tensor {error.args[0]} is missing"
                ) from None
            except (ValueError, ZeroDivisionError, IndexError) as error:
                raise UserError(f"{file}: the tensors do not fit together: {error}") from None
    for prefix in ("module.", "model.", "_orig_mod."):
        if all(name.startswith(prefix) for name in shapes) and shapes:
            raise UserError(f"{file}: every name begins with {prefix!r}; save the inner module's state dict")
    some = ", ".join(list(shapes)[:3]) or "no tensors"
    raise UserError(
        f"{file}: not a Moebius or PixelHacker U-Net, an SDXL-layout VAE, an E-LatentLPIPS network or FID's "
        f"Inception; it holds {some}"
    )


def _unet(shapes: Shapes) -> UNetConfig:
    net = _below(shapes, "diff_model.")
    residual_conv = _setting(RESIDUAL_CONVS, _below(net, "conv_in."), "residual convolution")
    widths = RESIDUAL_CONVS[residual_conv].read_widths
    levels = _count(net, r"down_blocks\.(\d+)\.")
    channels = tuple(widths(_below(net, f"down_blocks.{i}.resnets.0.conv1."))[1] for i in range(levels))
    transformers = tuple(f"down_blocks.{i}.attentions.0.norm.weight" in net for i in range(levels))
    if True not in transformers:
        raise ValueError("no level has a transformer")
    level = transformers.index(True)
    vocab_size, embedding_dim = shapes["embedding_layer.weight"]
    switches, sizes = _block(
        _below(net, f"down_blocks.{level}.attentions.0.transformer_blocks.0."), channels[level]
    )
    if "map_size" in sizes:
        sizes["latent_size"] = sizes.pop("map_size") * 2**level
    return UNetConfig(
        **switches,
        residual_conv=residual_conv,
        channels=channels,
        transformers=transformers,
        mid_block="mid_block.resnets.0.norm1.weight" in net,
        layers_per_block=_count(net, r"down_blocks\.0\.resnets\.(\d+)\."),
        in_channels=widths(_below(net, "conv_in."))[0],
        out_channels=widths(_below(net, "conv_out."))[1],
        vocab_size=vocab_size,
        embedding_dim=embedding_dim,
        context_dim=net["encoder_hid_proj.weight"][0],
        **{"context_length": vocab_size // 2, **sizes},
    )


def _block(shapes: Shapes, channels: int) -> tuple[dict[str, str], dict[str, Any]]:
    """Three switches, and the sizes that show, of a transformer block of this width."""
    switches, sizes = {}, {}
    for switch, known, name in (
        ("self_mixer", SELF_MIXERS, "attn1."),
        ("cross_mixer", CROSS_MIXERS, "attn2."),
        ("feed_forward", FEED_FORWARDS, "ff."),
    ):
        part = _below(shapes, name)
        switches[switch] = _setting(known, part, switch.replace("_", " "))
        for size, value in known[switches[switch]].read_sizes(part, channels).items():
            if sizes.setdefault(size, value) != value:
                raise ValueError(f"{size} is {sizes[size]} by one tensor and {value} by another")
    if "num_heads" not in sizes:
        raise ValueError("nothing tells the number of heads")
    return switches, sizes


def _setting(known: dict[str, type[nnx.Module]], shapes: Shapes, what: str) -> str:
    """The setting of a switch whose landmark is among these tensors."""
    for name, part in known.items():
        if part.LANDMARK in shapes:
            return name
    found = ", ".join(list(shapes)[:3]) or "nothing"
    raise ValueError(f"the {what} is none of {', '.join(known)}; it holds {found}")


def _below(shapes: Shapes, prefix: str) -> Shapes:
    """The tensors whose names begin so, by the rest of their names."""
    return _Below({n.removeprefix(prefix): s for n, s in shapes.items() if n.startswith(prefix)}, prefix)


class _Below(dict):
    """Shapes by the end of a name; one that is missing is reported by its whole name."""

    def __init__(self, shapes: Shapes, prefix: str) -> None:
        super().__init__(shapes)
        self._prefix = prefix

    def __missing__(self, name: str) -> tuple[int, ...]:
        raise KeyError(self._prefix + name)


def _vae(shapes: Shapes) -> VAEConfig:
    levels = _count(shapes, r"encoder\.down_blocks\.(\d+)\.")
    return VAEConfig(
        channels=tuple(shapes[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"][0] for i in range(levels)),
        layers_per_block=_count(shapes, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        latent_channels=shapes["post_quant_conv.weight"][0],
    )


def _elatentlpips(shapes: Shapes) -> ELatentLPIPSConfig:
    groups: dict[int, list[tuple[int, int]]] = {}
    for name, shape in shapes.items():
        match = re.fullmatch(r"net\.slice(\d+)\.(\d+)\.weight", name)
        if match and len(shape) == 4:
            groups.setdefault(int(match[1]), []).append((int(match[2]), shape[0]))
    return ELatentLPIPSConfig(
        in_channels=shapes["net.slice1.0.weight"][1],
        groups=tuple(tuple(width for _, width in sorted(groups[i])) for i in sorted(groups)),
    )


def _count(shapes: Shapes, pattern: str) -> int:
    """How many numbers the pattern's group matches in the names; they count from 0.

    Raises:
        ValueError: some are left out.
    """
    numbers = {m[1] for name in shapes if (m := re.match(pattern, name))}
    if missing := sorted({str(i) for i in range(len(numbers))} - numbers):
        named = pattern.replace("\\", "").replace("(d+)", missing[0]).rstrip(".")
        raise ValueError(f"there is no {named}, and one of a higher number")
    return len(numbers)
