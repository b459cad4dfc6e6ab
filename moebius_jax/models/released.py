"""How the release names a module's parts and how its tensors lie there: said by each module, next to them.

A module class has a table `RELEASED` of those attributes that are called otherwise in the release, or lie
otherwise; the rest bears the same name. From the tables follow names, layouts and the optimiser's choice for
every tensor of any network (`weights.names`), so a new module converts without a line elsewhere.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """A bijection between two layouts of the same numbers.

    Attributes:
        order: torch's axes in terms of JAX's, before the axes of length one are added; None keeps them.
        ones: where torch has axes of length one that JAX does without.
    """

    order: tuple[int, ...] | None = None
    ones: tuple[int, ...] = ()

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """JAX layout → torch layout."""
        moved = array if self.order is None else np.transpose(array, self.order)
        return np.expand_dims(moved, self.ones)

    def to_jax(self, array: np.ndarray) -> np.ndarray:
        """torch layout → JAX layout; the axes in `ones` must have length one."""
        squeezed = np.squeeze(array, self.ones)
        return squeezed if self.order is None else np.transpose(squeezed, np.argsort(self.order))

    def torch_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """torch's shape of a tensor with JAX shape `shape`."""
        return self.to_torch(np.broadcast_to(np.float32(0), shape)).shape


SAME = Layout()  # vectors, embedding tables
LINEAR = Layout(order=(1, 0))  # [in, out] ↔ [out, in]
POINTWISE = Layout(order=(1, 0), ones=(2, 3))  # [in, out] ↔ [out, in, 1, 1]
CONV = Layout(order=(3, 2, 0, 1))  # HWIO ↔ OIHW
DEPTHWISE = Layout(order=(2, 0, 1), ones=(1,))  # [h, w, c] ↔ [c, 1, h, w]


@dataclasses.dataclass(frozen=True)
class Released:
    """How the release keeps one attribute of a module: a part, or a parameter.

    Attributes:
        name: there, dotted where it lies deeper.
        layout: of a parameter.
        muon: whether Muon may orthogonalise it (of a part: what is in it). Vectors never are.
    """

    name: str
    layout: Layout = SAME
    muon: bool = True


Table = dict[str, str | Released]  # a plain name stands for Released(name)
Shapes = Mapping[str, tuple[int, ...]]  # released name → torch shape
