"""One student's loss terms, their weights and the gradient of the total, at the price of one backward pass.

The adaptive weights need gradient norms at two weights: θ_F, the last of the network, and θ_C, at the
bottleneck. So the network is cut there. Each loss is pulled back through the head alone for θ_F; the weighted
output loss is pulled through the up half once, which yields both its weights' gradients and what arrives at
the bottleneck; there its norm at θ_C is one matrix product. Then W_C is known: it scales everything the up
half sent down (its weights' gradients, and the cotangents of the bottleneck, the skips, the timestep and the
context), the coarse loss joins, and one pass through the down half ends the step (spec "Cost note").
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from moebius_jax.distillation.balance import LossConfig, Scalar, cross_weight, output_weights
from moebius_jax.models import UNet, UNetConfig
from moebius_jax.models.functional import Bare, Tensors, split_tensors
from moebius_jax.models.unet import Halfway

Map = Float[Array, "B H W C"]
OutputLoss = Callable[[Float[Array, "B H W 4"]], Scalar]

_HEAD = ("conv_norm_out", "conv_out")
_UP = ("mid_block", "up_blocks")


@struct.dataclass
class Inputs:
    """What the networks see.

    Attributes:
        latents: [z_t 4, mask 1, masked-image latents 4] on the last axis.
        timesteps: t.
        input_ids: rows of the category table.
    """

    latents: Float[Array, "B H W 9"]
    timesteps: Int[Array, " B"]
    input_ids: Int[Array, "B 10"]


@struct.dataclass
class Balanced:
    """Losses, norms and weights of a step, all scalars.

    Attributes:
        losses: by term; `total` too.
        weights: W by term; `cross` is W_C.
        norms: `theta_f/TERM`, `theta_c/coarse`, and `theta_c/` the term or `output` W_C was made with.
    """

    losses: dict[str, Scalar]
    weights: dict[str, Scalar]
    norms: dict[str, Scalar]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    """Names of the two weights the norms are taken at.

    Attributes:
        theta_f: the weight of the last convolution (its pointwise part where it is separable).
        theta_c: `proj_out` of the last transformer of the last down level.
    """

    theta_f: str
    theta_c: str

    @classmethod
    def of(cls, config: UNetConfig, *, needs_bottleneck: bool = True) -> "Cut":
        """Where a student of this architecture is cut.

        Raises:
            ValueError: a coarse loss is wanted and the last level has no transformers, so there is no θ_C.
        """
        if needs_bottleneck and not config.transformers[-1]:
            raise ValueError(
                f"transformers is {config.transformers}: a student needs them in its last level, "
                "where the coarse loss's gradient norm is taken"
            )
        pointwise = "pointwise." if config.residual_conv == "depthwise" else ""
        level, unit = len(config.channels) - 1, config.layers_per_block - 1
        return cls(
            theta_f=f"conv_out.{pointwise}kernel",
            theta_c=f"down_blocks.{level}.attentions.{unit}.proj_out.kernel",
        )


def teacher_coarse_index(config: UNetConfig) -> int:
    """Index in a teacher's `features` of its first up level's output (5 for the published one)."""
    return len(config.channels) + config.mid_block


def mean_square(a: Array, b: Array) -> Scalar:
    """Mean squared difference over all elements, in fp32."""
    return jnp.mean(jnp.square(a.astype(jnp.float32) - b.astype(jnp.float32)))


def balanced_gradients(
    student: Bare[UNet],
    params: Tensors,
    statistics: Tensors,
    inputs: Inputs,
    config: LossConfig,
    *,
    output_losses: Mapping[str, OutputLoss],
    coarse_target: Map | None,
    all_norms: bool = False,
) -> tuple[Tensors, Tensors, Balanced]:
    """Gradient of the balanced total, without any extra pass through the network.

    Args:
        student: in training mode.
        params, statistics: its tensors by dotted name.
        inputs: of the network.
        config: terms and their balance.
        output_losses: each output term as a function of the predicted noise.
        coarse_target: the teacher's map for L_C; None where the term is absent.
        all_norms: also report the norms no weight needs (every output term's at θ_C), which costs a pass
            through the up half for each. For diagnosis and tests.

    Returns:
        Gradients by parameter name, new running statistics, and the figures.
    """
    cut = Cut.of(student.config, needs_bottleneck="coarse" in config.terms)
    network = _Stages(student, params, statistics)
    halfway, hidden, pull_down = network.down(inputs)
    x, pull_up = network.up(halfway)
    sample, pull_head = network.head(x)

    terms = config.output_terms
    losses, at_output, norms = {}, {}, {}
    for term in terms:
        losses[term], at_output[term] = jax.value_and_grad(output_losses[term])(sample)
        norms[f"theta_f/{term}"] = _norm(pull_head(at_output[term])[0][cut.theta_f])
    weights = output_weights(config, {t: norms[f"theta_f/{t}"] for t in terms}) if terms else {}
    scales = {t: config.scale(t) * weights[t] for t in terms}

    def at_bottleneck(cotangent: Map) -> Scalar:
        """Norm at θ_C of what arrives behind it: θ_C multiplies `hidden`, so its gradient is one product."""
        return _norm(jnp.einsum("bhwi,bhwo->io", hidden.astype(jnp.float32), cotangent.astype(jnp.float32)))

    def through_up(cotangent: Array) -> tuple[Tensors, Halfway]:
        head_gradients, above = pull_head(cotangent)
        up_gradients, below = pull_up(above)
        return head_gradients | up_gradients, below

    if terms:
        weighted = sum(scales[t] * at_output[t] for t in terms)
        gradients, below = through_up(weighted)
    else:  # the coarse loss alone never reaches the up half
        gradients, below = jax.tree.map(jnp.zeros_like, (network.upper_params, halfway))
    output_loss = sum((scales[t] * losses[t] for t in terms), jnp.float32(0))

    cross, coarse_scale = jnp.float32(1), 0.0
    if "coarse" in config.terms:
        losses["coarse"], coarse_cotangent = jax.value_and_grad(mean_square)(halfway.x, coarse_target)
        norms["theta_c/coarse"] = at_bottleneck(coarse_cotangent)
        coarse_scale = config.scale("coarse")
        if terms:
            if config.balance == "release":
                name, reference = terms[0], through_up(at_output[terms[0]])[1].x
            else:
                name, reference = "output", below.x
            norms[f"theta_c/{name}"] = at_bottleneck(reference)
            cross = cross_weight(config, norms["theta_c/coarse"], norms[f"theta_c/{name}"])
            weights["cross"] = cross
    if all_norms:
        for term in terms:
            norms[f"theta_c/{term}"] = at_bottleneck(through_up(at_output[term])[1].x)

    gradients, below = jax.tree.map(lambda g: cross.astype(g.dtype) * g, (gradients, below))
    if coarse_scale:
        below = below.replace(x=below.x + coarse_scale * coarse_cotangent)
    gradients |= pull_down(below)[0]
    losses["total"] = cross * output_loss + coarse_scale * losses.get("coarse", 0.0)
    return gradients, network.new_statistics, Balanced(losses, weights, norms)


class _Stages:
    """The student as three differentiable functions of their own parameters: down half, up half, head."""

    def __init__(self, student: Bare[UNet], params: Tensors, statistics: Tensors) -> None:
        self._student = student
        self._tensors = {**params, **statistics}
        self._params = params
        self.new_statistics = dict(statistics)

    @property
    def upper_params(self) -> Tensors:
        """The parameters of the up half and the head."""
        return {**self._own(_UP), **self._own(_HEAD)}

    def down(self, inputs: Inputs) -> tuple[Halfway, Map, Callable[[Halfway], tuple[Tensors]]]:
        def apply(params: Tensors) -> tuple[Halfway, tuple[Map, Tensors]]:
            unet = self._student({**self._tensors, **params})
            halfway, taps = unet.down(inputs.latents, inputs.timesteps, inputs.input_ids)
            return halfway, (taps.bottleneck_input, split_tensors(unet)[1])

        halfway, pull, (hidden, statistics) = jax.vjp(apply, self._own(None), has_aux=True)
        self._track(statistics)
        return halfway, hidden, pull

    def up(self, halfway: Halfway) -> tuple[Map, Callable[[Map], tuple[Tensors, Halfway]]]:
        def apply(params: Tensors, halfway: Halfway) -> tuple[Map, Tensors]:
            unet = self._student({**self._tensors, **params})
            return unet.up(halfway)[0], split_tensors(unet)[1]

        x, pull, statistics = jax.vjp(apply, self._own(_UP), halfway, has_aux=True)
        self._track(statistics)
        return x, pull

    def head(self, x: Map) -> tuple[Array, Callable[[Array], tuple[Tensors, Map]]]:
        def apply(params: Tensors, x: Map) -> tuple[Array, Tensors]:
            unet = self._student({**self._tensors, **params})
            return unet.head(x), split_tensors(unet)[1]

        sample, pull, statistics = jax.vjp(apply, self._own(_HEAD), x, has_aux=True)
        self._track(statistics)
        return sample, pull

    def _own(self, parts: tuple[str, ...] | None) -> Tensors:
        """A stage's parameters; None: those of neither of the two others."""
        if parts is None:
            return {k: v for k, v in self._params.items() if k.split(".")[0] not in (*_UP, *_HEAD)}
        return {k: v for k, v in self._params.items() if k.split(".")[0] in parts}

    def _track(self, statistics: Tensors) -> None:
        """Takes over the statistics a stage has moved; those of the other stages came back as they were."""
        before = self._tensors
        self.new_statistics |= {k: v for k, v in statistics.items() if v is not before[k]}


def _norm(x: Array) -> Scalar:
    return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32))))
