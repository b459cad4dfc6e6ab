"""One student's loss terms, their weights and the gradient of the total, at the price of one backward pass.

The adaptive weights need gradient norms at two weights: θ_F, the last of the network, and θ_C, `proj_out` of
the last transformer of the last down level. So the network is cut there. Each loss is pulled back through the
head alone for θ_F; the weighted output loss is pulled through the up half once, which yields both the
gradients of its weights and what arrives at the bottleneck; there its norm at θ_C is one matrix product. Then
W_C is known: it scales everything the up half sent down (its weights' gradients, and the cotangents of the
bottleneck, the skips, the timestep and the context), the losses at the bottleneck join, and one pass through
the down half ends the step (docs/distillation.md, "What the weights cost").
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from moebius_jax.distillation.balance import BalanceForm, cross_weight, output_weights
from moebius_jax.distillation.loss import Scalar
from moebius_jax.models import UNet, UNetConfig
from moebius_jax.models.switches import RESIDUAL_CONVS
from moebius_jax.models.unet import Halfway
from moebius_jax.weights.tensors import Bare, Tensors, split_tensors

Map = Float[Array, "B H W C"]
LossOf = Callable[[Array], Scalar]  # of the predicted noise, or of the map at the bottleneck

_HEAD = ("conv_norm_out", "conv_out")
_UP = ("mid_block", "up_blocks")


@struct.dataclass
class Inputs:
    """What the networks see.

    Attributes:
        latents: see `diffusion.denoise.network_input`.
        timesteps: t.
        input_ids: rows of the category table.
    """

    latents: Float[Array, "B H W d"]
    timesteps: Int[Array, " B"]
    input_ids: Int[Array, "B L"]


@struct.dataclass
class Balanced:
    """Losses, norms and weights of a step, all scalars.

    Attributes:
        losses: by name; `total` too.
        weights: W by name; `cross` is W_C.
        norms: `theta_f/NAME` of the losses at the output, `theta_c/NAME` of those at the bottleneck, and
            `theta_c/` the anchor or `output`, whichever W_C was made with.
    """

    losses: dict[str, Scalar]
    weights: dict[str, Scalar]
    norms: dict[str, Scalar]


def last_weight(config: UNetConfig) -> str:
    """θ_F: the weight of the last convolution (its pointwise part where it is separable), by dotted name."""
    return f"conv_out.{RESIDUAL_CONVS[config.residual_conv].LAST_WEIGHT}"


def teacher_bottleneck(config: UNetConfig) -> int:
    """Index in a teacher's `features` of its first up level's output (5 for the published one)."""
    return len(config.channels) + config.mid_block


def balanced_gradients(
    student: Bare[UNet],
    params: Tensors,
    statistics: Tensors,
    inputs: Inputs,
    *,
    output_losses: Mapping[str, LossOf],
    bottleneck_losses: Mapping[str, LossOf],
    form: BalanceForm,
    scales: Mapping[str, float],
    all_norms: bool = False,
) -> tuple[Tensors, Tensors, Balanced]:
    """Gradient of the balanced total, without any extra pass through the network.

    Args:
        student: in training mode.
        params, statistics: its tensors by dotted name.
        inputs: of the network.
        output_losses: by name, as functions of the predicted noise; the anchor first.
        bottleneck_losses: by name, as functions of the last down level's map.
        form, scales: how they are balanced, and s of each by name; see `LossConfig`.
        all_norms: also report the norms no weight needs (every output loss's at θ_C), which costs a pass
            through the up half for each. For diagnosis and tests.

    Returns:
        Gradients by parameter name, new running statistics, and the figures.
    """
    theta_f = last_weight(student.config)
    network = _Stages(student, params, statistics)
    halfway, hidden, pull_down = network.down(inputs)
    x, pull_up = network.up(halfway)
    sample, pull_head = network.head(x)

    losses, at_output, norms = {}, {}, {}
    for name, loss in output_losses.items():
        losses[name], at_output[name] = jax.value_and_grad(loss)(sample)
        norms[f"theta_f/{name}"] = _norm(pull_head(at_output[name])[0][theta_f])
    weights = output_weights(form, {n: norms[f"theta_f/{n}"] for n in losses}) if losses else {}
    factors = {name: scales[name] * weights[name] for name in at_output}

    def at_bottleneck(cotangent: Map) -> Scalar:
        """Norm at θ_C of what arrives behind it: θ_C multiplies `hidden`, so its gradient is one product."""
        return _norm(jnp.einsum("bhwi,bhwo->io", hidden.astype(jnp.float32), cotangent.astype(jnp.float32)))

    def through_up(cotangent: Array) -> tuple[Tensors, Halfway]:
        head_gradients, above = pull_head(cotangent)
        up_gradients, below = pull_up(above)
        return head_gradients | up_gradients, below

    if at_output:
        gradients, below = through_up(sum(factors[name] * at_output[name] for name in at_output))
    else:  # losses at the bottleneck alone never reach the up half
        gradients, below = jax.tree.map(jnp.zeros_like, (network.upper_params, halfway))
    output_loss = sum((factors[name] * losses[name] for name in at_output), jnp.float32(0))

    cotangents = {}
    for name, loss in bottleneck_losses.items():
        losses[name], cotangents[name] = jax.value_and_grad(loss)(halfway.x)
        norms[f"theta_c/{name}"] = at_bottleneck(cotangents[name])
    cross = jnp.float32(1)
    if at_output and cotangents:
        anchor = next(iter(at_output))
        name, reference = "output", below.x
        if form == "release":
            name, reference = anchor, through_up(at_output[anchor])[1].x
        norms[f"theta_c/{name}"] = at_bottleneck(reference)
        joint = norms[f"theta_c/{next(iter(cotangents))}"]
        if len(cotangents) > 1:
            joint = at_bottleneck(sum(cotangents.values()))
        cross = weights["cross"] = cross_weight(form, joint, norms[f"theta_c/{name}"])
    if all_norms:
        for name, cotangent in at_output.items():
            norms[f"theta_c/{name}"] = at_bottleneck(through_up(cotangent)[1].x)

    gradients, below = jax.tree.map(lambda g: cross.astype(g.dtype) * g, (gradients, below))
    below = below.replace(x=sum((scales[name] * c for name, c in cotangents.items()), below.x))
    gradients |= pull_down(below)[0]
    losses["total"] = cross * output_loss + sum(scales[name] * losses[name] for name in cotangents)
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
