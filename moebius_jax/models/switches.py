"""What each of the four switches can be set to, by name; to be added to (docs/extending.md)."""

from flax import nnx

from moebius_jax.models.convolutions import Conv3x3, DepthwiseSeparableConv
from moebius_jax.models.feed_forward import GEGLU, MixFFN
from moebius_jax.models.mixers import CrossAttention, GatedLinearAttention, InteractiveLambda, LocalLambda
from moebius_jax.models.parts import Part

SELF_MIXERS: dict[str, type[Part]] = {"local_lambda": LocalLambda, "gla": GatedLinearAttention}
CROSS_MIXERS: dict[str, type[Part]] = {"interactive_lambda": InteractiveLambda, "attention": CrossAttention}
FEED_FORWARDS: dict[str, type[Part]] = {"mix_ffn": MixFFN, "geglu": GEGLU}
RESIDUAL_CONVS: dict[str, type[nnx.Module]] = {"depthwise": DepthwiseSeparableConv, "conv3x3": Conv3x3}

SWITCHES = {
    "self_mixer": SELF_MIXERS,
    "cross_mixer": CROSS_MIXERS,
    "feed_forward": FEED_FORWARDS,
    "residual_conv": RESIDUAL_CONVS,
}
