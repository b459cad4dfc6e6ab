"""What a loss is: where it looks at the student, what it needs beside, what it is called."""

from typing import ClassVar, Literal

import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Array, Bool, Float, Key

from moebius_jax.diffusion.noising import Noised
from moebius_jax.models import UNetOutput
from moebius_jax.models.architecture import Architecture
from moebius_jax.schema import Above0, Location, checked

Scalar = Float[Array, ""]


@struct.dataclass
class Context:
    """What a loss may look at beside the student.

    Attributes:
        noised: noisy latents, their noise and timesteps.
        hole: on the latent grid.
        teacher: its noise and features for the same inputs; None where no loss needs them.
        bottleneck: which of its features lies where the student's bottleneck is; likewise.
        network: this loss's own, with its weights.
        keys: one per sample, of this loss's own.
    """

    noised: Noised
    hole: Bool[Array, "B h w"]
    teacher: UNetOutput | None = None
    bottleneck: Float[Array, "B H W C"] | None = None
    network: nnx.Module | None = None
    keys: Key[Array, " B"] | None = None


@checked
class Loss:
    """One term of the total: a `checked` class with its settings as fields. To add one: docs/extending.md.

    Attributes:
        name: in configurations.
        logged_as: in TensorBoard; the release's name where it has one, so that curves compare.
        at: what of the student it is a function of: the predicted noise (its weight balances gradient norms
            at θ_F), or the map at the bottleneck (W_C balances it at θ_C).
        needs_teacher: whether it looks at the teacher.
        release_scale: s in the release's balance; 1 in the others.
        NETWORK: architecture of a network of its own, which `network` then names.
        scale: s of this run; None is the balance's own.
        network: a converted folder, or an architecture to be drawn at random (for trying out).

    Raises:
        ValueError: a field is out of range.
    """

    name: ClassVar[str]
    logged_as: ClassVar[str]
    at: ClassVar[Literal["output", "bottleneck"]] = "output"
    needs_teacher: ClassVar[bool] = False
    release_scale: ClassVar[float] = 1.0
    NETWORK: ClassVar[type[Architecture] | None] = None

    scale: Above0 | None = None
    network: Location | Architecture | None = None

    def require_network(self) -> None:
        """Raises ValueError if it needs a network and none is named, or the other way round."""
        if self.NETWORK is not None and self.network is None:
            raise ValueError(f"the {self.name} loss needs a network: {type(self).__name__}(network=FOLDER)")
        if self.NETWORK is None and self.network is not None:
            raise ValueError(f"loss.{self.name}.network is {self.network!r}; this loss has no network")

    def __call__(self, prediction: Array, context: Context) -> Scalar:
        """The loss, a mean over the batch.

        Args:
            prediction: the student's output [B, h, w, c] (noise, or what its `prediction_type` says), or its
                map at the bottleneck [B, H, W, C]; see `at`.
            context: see there.
        """
        raise NotImplementedError


def mean_square(a: Array, b: Array) -> Scalar:
    """Mean squared difference over all elements, in fp32."""
    return jnp.mean(jnp.square(a.astype(jnp.float32) - b.astype(jnp.float32)))
