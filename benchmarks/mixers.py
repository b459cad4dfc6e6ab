"""Speed of the self mixers' inner functions: Local-λ's position term in every order, and the GLA scan.

python benchmarks/mixers.py                     # forward, and forward + backward, batch 2
python benchmarks/mixers.py --batch 16 --dtype bfloat16
"""

import argparse
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import get_args

import jax
import jax.numpy as jnp

from moebius_jax.models.config import PositionOrder
from moebius_jax.models.mixers.gated_linear_attention import gated_linear_attention
from moebius_jax.models.mixers.position_term import choose_order, position_term

LEVELS = ((64, 40), (32, 80), (16, 160))  # side of the map, depth k = v, of the released levels
HEADS, WINDOW = 8, 15
DENSE_LIMIT = 32  # above it the dense order's table alone is gigabytes


def milliseconds(call: Callable[..., object], *arrays: jax.Array, repeats: int) -> float:
    jax.block_until_ready(call(*arrays))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call(*arrays))
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def forward_and_both(
    function: Callable[..., jax.Array], arrays: list[jax.Array], repeats: int
) -> tuple[float, float]:
    gradient = jax.grad(
        lambda *a: jnp.sum(jnp.square(function(*a).astype(jnp.float32))), tuple(range(len(arrays)))
    )
    return (
        milliseconds(jax.jit(function), *arrays, repeats=repeats),
        milliseconds(jax.jit(gradient), *arrays, repeats=repeats),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--orders", nargs="+", default=[o for o in get_args(PositionOrder) if o != "auto"])
    args = parser.parse_args()
    device = f"{jax.devices()[0].device_kind}, batch {args.batch}, {args.dtype}"
    print(f"{datetime.now(UTC):%Y-%m-%d}, jax {jax.__version__}, {device}: ms forward / forward + backward\n")
    print("| | " + " | ".join(f"{side}², k={k}" for side, k in LEVELS) + " |")
    print("|---|" + "---|" * len(LEVELS))

    def draw(i: int, *shape: int) -> jax.Array:
        return jax.random.normal(jax.random.key(i), shape, jnp.dtype(args.dtype))

    for order in args.orders:
        cells = []
        for side, k in LEVELS:
            if order == "dense" and side > DENSE_LIMIT:
                cells.append("")
                continue
            arrays = [
                draw(0, args.batch, side, side, HEADS, k),
                draw(1, args.batch, side, side, k),
                draw(2, WINDOW, WINDOW, k) / WINDOW,
                draw(3, k),
            ]
            forward, both = forward_and_both(lambda *a, o=order: position_term(*a, o), arrays, args.repeats)
            mark = "**" if choose_order(side) == order else ""
            cells.append(f"{mark}{forward:.3g} / {both:.3g}{mark}")
        print(f"| {order} | " + " | ".join(cells) + " |", flush=True)

    cells = []
    for side, v in LEVELS:
        tokens, k = side * side, v // 2
        q, key, decay = (draw(i, args.batch, tokens, HEADS, k) for i in range(3))
        arrays = [q, key, draw(3, args.batch, tokens, HEADS, v), -jnp.abs(decay) / 16]
        forward, both = forward_and_both(gated_linear_attention, arrays, args.repeats)
        cells.append(f"{forward:.3g} / {both:.3g}")
    print("| GLA scan | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
