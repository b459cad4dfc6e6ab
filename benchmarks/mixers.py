"""Speed of the self mixers' inner functions: Local-λ's position term in every order, and GLA.

python -m benchmarks.mixers                     # forward, and forward + backward, batch 2
python -m benchmarks.mixers --batch 16 --dtype bfloat16
"""

import functools
import sys
from collections.abc import Callable
from typing import get_args

import jax
import jax.numpy as jnp

from benchmarks.common import median_seconds, parser, report, told
from moebius_jax.models.forms import position_order
from moebius_jax.models.kernels.gpu import local_lambda as gpu
from moebius_jax.models.mixers.gated_linear_attention import gated_linear_attention
from moebius_jax.models.mixers.local_lambda import fused
from moebius_jax.models.mixers.position_term import position_term
from moebius_jax.models.parts import PositionOrder

LEVELS = ((64, 40), (32, 80), (16, 160))  # side of the map, depth k = v, of the released levels
HEADS, WINDOW = 8, 15
GLA = "GLA scan"
FUSED = "fused"  # a GPU's kernels, which add the product with λc


def forward_and_both(function: Callable[..., jax.Array], arrays: list[jax.Array], repeats: int) -> str:
    """Milliseconds of the function, and of its gradient with respect to everything."""
    gradient = jax.grad(
        lambda *a: jnp.sum(jnp.square(function(*a).astype(jnp.float32))), tuple(range(len(arrays)))
    )
    calls = jax.jit(function), jax.jit(gradient)
    return " / ".join(f"{1e3 * median_seconds(lambda c=c: c(*arrays), repeats):.3g}" for c in calls)


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--batch", type=int, default=2)
    options.add_argument("--dtype", default="float32")
    # Interpreted, where there is no GPU, the kernel takes minutes; a TPU's is another one.
    interpret = jax.default_backend() != "gpu"
    left_out = {"auto", FUSED} if interpret else {"auto"}
    orders = [order for order in get_args(PositionOrder) if order not in left_out]
    options.add_argument("--orders", nargs="+", default=[*orders, GLA], choices=[*orders, FUSED, GLA])
    args = options.parse_args()

    def draw(i: int, *shape: int) -> jax.Array:
        return jax.random.normal(jax.random.key(i), (args.batch, *shape), jnp.dtype(args.dtype))

    def cell(name: str, side: int, v: int) -> str:
        if name == GLA:
            q, key, decay = (draw(i, side * side, HEADS, v // 2) for i in range(3))
            arrays = [q, key, draw(3, side * side, HEADS, v), -jnp.abs(decay) / 16]
            return forward_and_both(gated_linear_attention, arrays, args.repeats)
        kernel, bias = draw(2, WINDOW, WINDOW, v)[0] / WINDOW, draw(3, v)[0]
        arrays = [draw(0, side, side, HEADS, v), draw(1, side, side, v), kernel, bias]
        if name == FUSED:
            q, val = arrays[0].reshape(args.batch, side, side, -1), arrays[1]
            sizes = {"heads": HEADS, "side": WINDOW, "dtype": q.dtype}
            call = functools.partial(fused, kernels=gpu, interpret=interpret, **sizes)
            return forward_and_both(call, [q, val, gpu.packed_window(kernel), draw(4, v, v)], args.repeats)
        found = forward_and_both(lambda *a: position_term(*a, name), arrays, args.repeats)
        picked = position_order((side, side), HEADS, v, WINDOW, args.dtype, None)
        return f"**{found}**" if name == picked else found

    titles = [f"{side}², k={v}, ms" for side, v in LEVELS]
    rows = ({"": name} | {t: cell(name, *level) for t, level in zip(titles, LEVELS, strict=True)}
            for name in args.orders)  # fmt: skip
    return report(told(rows), args)


if __name__ == "__main__":
    sys.exit(main())
