"""The release's name and layout of every tensor of ours.

The tables run from our names to the release's, so a complete list of what a release file must hold
follows from an architecture alone (`expected_tensors`), and conversion works both ways from one table.
"""

import dataclasses
import re

from moebius_jax.checkpoints import Architecture, abstract_tensors
from moebius_jax.conversion import layouts
from moebius_jax.conversion.layouts import Layout
from moebius_jax.models import ELatentLPIPSConfig, InceptionConfig, UNetConfig, VAEConfig

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slot:
    """Where a released tensor goes.

    Attributes:
        path: our dotted name.
        shape: the released (torch) shape.
        layout: how the two lie.
    """

    path: str
    shape: Shape
    layout: Layout


def expected_tensors(architecture: Architecture) -> dict[str, Slot]:
    """Every tensor of a release file of this architecture, by its released name.

    Counters (`num_batches_tracked`) are left out: see `counters`. E-LatentLPIPS files hold each head twice.
    """
    slots = {}
    for path, abstract in abstract_tensors(architecture).items():
        layout = _layout(architecture, path, len(abstract.shape))
        slot = Slot(path=path, shape=layout.torch_shape(abstract.shape), layout=layout)
        for name in _released_names(architecture, path):
            if name in slots:
                raise AssertionError(f"two of our tensors are called {name} in the release")
            slots[name] = slot
    return slots


def counters(expected: dict[str, Slot]) -> set[str]:
    """Names of the BatchNorm step counters that go with these tensors; they carry nothing."""
    suffix = ".running_mean"
    return {n.removesuffix(suffix) + ".num_batches_tracked" for n in expected if n.endswith(suffix)}


_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "mean": "running_mean",
    "var": "running_var",
}

# Applied in order, each to the whole dotted name.
_UNET_RENAMES = (
    (r"^(?!embedding\.)", "diff_model."),
    (r"^embedding\.", "embedding_layer."),
    (r"(down_blocks\.\d+)\.resample\.", r"\1.downsamplers.0."),
    (r"(up_blocks\.\d+)\.resample\.", r"\1.upsamplers.0."),
    (r"\.block\.", ".transformer_blocks.0."),
    (r"\.(conv_in|conv_out|conv1|conv2)\.norm([12])\.", r".\1.bn\2."),
    (r"\.depthwise\.", ".conv_dw."),
    (r"\.pointwise\.", ".conv_pw."),
    (r"\.self_mixer\.norm\.", ".self_mixer.g_norm_swish_gate."),
    (r"\.self_mixer\.decay_down\.", ".self_mixer.gk_proj.0."),
    (r"\.self_mixer\.decay_up\.", ".self_mixer.gk_proj.1."),
    (r"\.self_mixer\.position\.", ".self_mixer.pos_conv."),
    (r"\.cross_mixer\.position_table$", ".cross_mixer.rel_pos_emb"),
    (r"\.cross_mixer\.to_out\.", ".cross_mixer.to_out.0."),
    (r"\.feed_forward\.(inverted|depth|point)_conv\.", r".feed_forward.\1_conv.conv."),
    (r"\.feed_forward\.proj_in\.", ".feed_forward.net.0.proj."),
    (r"\.feed_forward\.proj_out\.", ".feed_forward.net.2."),
    (r"\.self_mixer\.", ".attn1."),
    (r"\.cross_mixer\.", ".attn2."),
    (r"\.feed_forward\.", ".ff."),
)

_VAE_RENAMES = (
    (r"(blocks|resnets|attentions|samplers)_(\d+)", r"\1.\2"),
    (r"\.query\.", ".to_q."),
    (r"\.key\.", ".to_k."),
    (r"\.value\.", ".to_v."),
    (r"\.proj_attn\.", ".to_out.0."),
)

_INCEPTION_RENAMES = (
    (r"^conv2d_", "Conv2d_"),
    (r"^mixed_", "Mixed_"),
    (r"\.norm\.", ".bn."),
)

_RENAMES = {UNetConfig: _UNET_RENAMES, VAEConfig: _VAE_RENAMES, InceptionConfig: _INCEPTION_RENAMES}


def _released_names(architecture: Architecture, path: str) -> list[str]:
    if isinstance(architecture, ELatentLPIPSConfig):
        return _elatentlpips_names(architecture, path)
    name = path
    for pattern, replacement in _RENAMES[type(architecture)]:
        name = re.sub(pattern, replacement, name)
    return [_rename_leaf(name)]


def _rename_leaf(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    return f"{module}.{_LEAVES.get(leaf, leaf)}"


def _elatentlpips_names(config: ELatentLPIPSConfig, path: str) -> list[str]:
    """torchvision numbers VGG16-BN's layers conv, norm, relu, …, with one number for each pool."""
    if match := re.fullmatch(r"heads\.(\d+)\.kernel", path):
        i = match[1]
        return [f"lin{i}.model.1.weight", f"lins.{i}.model.1.weight"]
    group, layer, part, leaf = re.fullmatch(r"groups\.(\d+)\.(\d+)\.(conv|norm)\.(\w+)", path).groups()
    before = sum(3 * len(g) + 1 for g in config.groups[: int(group)])
    index = before + 3 * int(layer) + (part == "norm")
    return [_rename_leaf(f"net.slice{int(group) + 1}.{index}.{leaf}")]


def _layout(architecture: Architecture, path: str, rank: int) -> Layout:
    if path.endswith(".position_table"):
        return layouts.POSITION_TABLE
    if not path.endswith(".kernel"):
        return layouts.SAME
    if rank == 4:
        return layouts.CONV
    if rank == 3:
        return layouts.POSITION_CONV if ".position." in path else layouts.DEPTHWISE
    return layouts.POINTWISE if _is_pointwise_conv(architecture, path) else layouts.LINEAR


_POINTWISE = re.compile(
    r"\.pointwise\.|\.conv_shortcut\.|attentions\.\d+\.proj_(in|out)\."
    r"|\.(inverted|point)_conv\.|^heads\."
)
_LAMBDA_SELF = re.compile(r"\.self_mixer\.to_[qkv]\.")
_LAMBDA_CROSS = re.compile(r"\.cross_mixer\.to_q\.")


def _is_pointwise_conv(architecture: Architecture, path: str) -> bool:
    """Whether a matrix of ours is a 1x1 convolution in the release rather than a Linear."""
    if isinstance(architecture, VAEConfig):
        return False
    if _POINTWISE.search(path) or _LAMBDA_SELF.search(path):
        return True
    return bool(_LAMBDA_CROSS.search(path)) and architecture.cross_mixer == "interactive_lambda"
