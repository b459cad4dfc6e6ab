"""Reads off a release file's tensor names and shapes what network it is."""

import math
import re
from collections.abc import Mapping

from moebius_jax.checkpoints import Architecture
from moebius_jax.errors import UserError
from moebius_jax.models import ELatentLPIPSConfig, InceptionConfig, UNetConfig, VAEConfig

Shapes = Mapping[str, tuple[int, ...]]


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
    has = shapes.__contains__
    net = "diff_model."
    depthwise = any(".conv_dw." in name for name in shapes)
    conv = "conv_pw.weight" if depthwise else "weight"
    levels = _count(shapes, r"diff_model\.down_blocks\.(\d+)\.")
    channels = tuple(shapes[f"{net}down_blocks.{i}.resnets.0.conv1.{conv}"][0] for i in range(levels))
    transformers = tuple(has(f"{net}down_blocks.{i}.attentions.0.norm.weight") for i in range(levels))
    if True not in transformers:
        raise ValueError("no level has a transformer")
    level = transformers.index(True)
    width = channels[level]
    block = f"{net}down_blocks.{level}.attentions.0.transformer_blocks.0."

    is_lambda = has(block + "attn1.pos_conv.weight")
    is_interactive = has(block + "attn2.rel_pos_emb")
    is_mix = has(block + "ff.inverted_conv.conv.weight")
    depth = shapes[block + ("attn1.to_k.weight" if is_lambda else "attn1.g_norm_swish_gate.weight")][0]
    vocab_size, embedding_dim = shapes["embedding_layer.weight"]
    sizes = {}
    if is_lambda:
        sizes["window"] = shapes[block + "attn1.pos_conv.weight"][-1]
    if is_interactive:
        positions, sizes["context_length"] = shapes[block + "attn2.rel_pos_emb"][:2]
        if math.isqrt(positions) ** 2 != positions:
            raise ValueError(f"a position table of {positions} rows is not one of a square map")
        sizes["latent_size"] = math.isqrt(positions) * 2**level
    else:
        sizes["context_length"] = vocab_size // 2
    if is_mix:
        sizes["ffn_ratio"] = shapes[block + "ff.inverted_conv.conv.weight"][0] / 2 / width
    return UNetConfig(
        self_mixer="local_lambda" if is_lambda else "gla",
        cross_mixer="interactive_lambda" if is_interactive else "attention",
        feed_forward="mix_ffn" if is_mix else "geglu",
        residual_conv="depthwise" if depthwise else "conv3x3",
        channels=channels,
        transformers=transformers,
        mid_block=has(net + "mid_block.resnets.0.norm1.weight"),
        layers_per_block=_count(shapes, r"diff_model\.down_blocks\.0\.resnets\.(\d+)\."),
        num_heads=width // depth,
        in_channels=shapes[net + ("conv_in.conv_dw.weight" if depthwise else "conv_in.weight")][
            0 if depthwise else 1
        ],
        out_channels=shapes[f"{net}conv_out.{conv}"][0],
        vocab_size=vocab_size,
        embedding_dim=embedding_dim,
        context_dim=shapes[net + "encoder_hid_proj.weight"][0],
        **sizes,
    )


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
    """One more than the largest number the pattern's group matches in any name."""
    return 1 + max((int(m[1]) for name in shapes if (m := re.match(pattern, name))), default=-1)
