"""How one tensor lies in torch and in JAX: a transposition and some axes of length one."""

import dataclasses

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
POSITION_CONV = Layout(order=(2, 0, 1), ones=(1, 2))  # [p, p, k] ↔ [k, u=1, 1, p, p]
POSITION_TABLE = Layout(ones=(3,))  # [N, L, k] ↔ [N, L, k, u=1]
