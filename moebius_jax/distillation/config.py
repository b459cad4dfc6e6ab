"""Which losses are trained on, and how they are balanced."""

import dataclasses
from typing import Literal

from moebius_jax.distillation.balance import BalanceForm
from moebius_jax.distillation.imitation import Coarse, Fine, Task
from moebius_jax.distillation.loss import Loss
from moebius_jax.distillation.perceptual import Perceptual
from moebius_jax.schema import checked


@checked
class LossConfig:
    """The total is L_C + W_C·L_out with L_out = s_T·L_T + Σ s_i·W_i·L_i, L_C = Σ s_j·L_j.

    L_out sums the losses at the output, L_C those at the bottleneck. The first of task, fine, perceptual that
    is present (else the first there is) is the *anchor*: its weight is one, and the others are brought to its
    gradient norm. In the paper the anchor is always the task loss; without it, as in Table 5's row 2, there
    is no other choice. A term that is absent costs nothing.

    Attributes:
        terms: of coarse, fine, task, perceptual, by name; or losses of one's own.
        balance: "paper" (Eqs 4, 5: ratios of squared norms), "release" (ratios of norms, clipped), or
            "static" (W = 1).
        balance_over: the "global" batch, or each "device"'s own samples, as the release's data parallelism
            has it: gradients are balanced there and then averaged.
        all_norms: log every output loss's gradient norm at the bottleneck too, as the release does: for each
            that no weight needs, another pass through the up half.
        coarse, fine, task, perceptual: their settings.

    Raises:
        ValueError: a field is out of range.
    """

    terms: tuple[str | Loss, ...] = ("coarse", "fine", "task", "perceptual")
    balance: BalanceForm = "paper"
    balance_over: Literal["global", "device"] = "global"
    all_norms: bool = False
    coarse: Coarse = dataclasses.field(default_factory=Coarse)
    fine: Fine = dataclasses.field(default_factory=Fine)
    task: Task = dataclasses.field(default_factory=Task)
    perceptual: Perceptual = dataclasses.field(default_factory=Perceptual)

    def __post_init__(self) -> None:
        known = ("coarse", "fine", "task", "perceptual")
        wrong = [t for t in self.terms if not isinstance(t, Loss) and t not in known]
        if wrong or not self.terms or len(set(self.names)) < len(self.terms):
            raise ValueError(
                f"terms is {self.terms!r}; expected some of {', '.join(known)}, or losses of your own, "
                "each once"
            )
        if taken := {"teacher", "total", "output", "cross"} & set(self.names):
            raise ValueError(f"terms has a loss called {min(taken)}; the step calls something else so")
        logged = [loss.logged_as for loss in self.losses]
        if len(set(logged)) < len(logged):
            raise ValueError(f"terms are logged as {', '.join(logged)}; expected different names")

    @property
    def names(self) -> tuple[str, ...]:
        """Of the terms."""
        return tuple(t.name if isinstance(t, Loss) else t for t in self.terms)

    @property
    def losses(self) -> tuple[Loss, ...]:
        """The terms with their settings."""
        return tuple(t if isinstance(t, Loss) else getattr(self, t) for t in self.terms)

    @property
    def output_losses(self) -> tuple[Loss, ...]:
        """Those of the predicted noise, the anchor first."""
        order = ("task", "fine", "perceptual")
        output = [loss for loss in self.losses if loss.at == "output"]
        return tuple(sorted(output, key=lambda x: order.index(x.name) if x.name in order else len(order)))

    @property
    def bottleneck_losses(self) -> tuple[Loss, ...]:
        """Those of the map at the bottleneck."""
        return tuple(loss for loss in self.losses if loss.at == "bottleneck")

    @property
    def needs_teacher(self) -> bool:
        return any(loss.needs_teacher for loss in self.losses)

    @property
    def scales(self) -> dict[str, float]:
        """s by name."""
        is_release = self.balance == "release"
        return {
            loss.name: (loss.release_scale if is_release else 1.0) if loss.scale is None else loss.scale
            for loss in self.losses
        }
