"""Counts the multiply-adds of a traced function, without running or compiling it.

A program is walked primitive by primitive, following which values depend on the inputs. That tells work on
weights, which the usual tools count (a hook per layer), from products of two activations, which they miss.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.extend import core


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiplyAdds:
    """Multiply-adds of one call.

    Attributes:
        layers: matrix products and convolutions of inputs with weights.
        elementwise: products of inputs with weights number by number: depthwise convolutions written as
            shifts, scales of normalisation layers.
        products: matrix products and convolutions whose two operands both depend on the inputs.
    """

    layers: int = 0
    elementwise: int = 0
    products: int = 0

    @property
    def with_weights(self) -> int:
        """What the paper's tables count: its figures are met to 0.1 % (see docs/evaluation.md)."""
        return self.layers + self.elementwise

    @property
    def flops(self) -> int:
        """Floating-point operations: two for every multiply-add, products of activations included."""
        return 2 * (self.layers + self.elementwise + self.products)

    def __add__(self, other: "MultiplyAdds") -> "MultiplyAdds":
        return MultiplyAdds(
            layers=self.layers + other.layers,
            elementwise=self.elementwise + other.elementwise,
            products=self.products + other.products,
        )

    def times(self, n: int) -> "MultiplyAdds":
        """As many of n calls."""
        return MultiplyAdds(
            layers=n * self.layers, elementwise=n * self.elementwise, products=n * self.products
        )


def count(function: Callable[..., Any], weights: Any, *inputs: Any) -> MultiplyAdds:
    """Multiply-adds of `function(weights, *inputs)`.

    Args:
        function: what jax can trace.
        weights: arrays or their shapes; what is computed from them alone counts nothing.
        inputs: arrays or their shapes.

    Raises:
        NotImplementedError: the program has a loop whose length is unknown.
    """
    jaxpr = jax.make_jaxpr(function)(weights, *inputs).jaxpr
    constant = len(jax.tree.leaves(weights))
    return _walk(jaxpr, [i >= constant for i in range(len(jaxpr.invars))])[0]


def _walk(jaxpr: Any, depends: Iterable[bool]) -> tuple[MultiplyAdds, list[bool]]:
    """Multiply-adds of a program, and which of its results depend on the inputs."""
    varies = dict(zip(jaxpr.invars, depends, strict=True)) | dict.fromkeys(jaxpr.constvars, False)
    total = MultiplyAdds()
    for eqn in jaxpr.eqns:
        operands = [not isinstance(v, core.Literal) and varies[v] for v in eqn.invars]
        results = [any(operands)] * len(eqn.outvars)
        if inner := _inner(eqn):
            program, times = inner
            done, results = _walk(program, operands)
            if eqn.primitive.name == "scan":  # what a turn hands to the next may vary only after some turns
                first, carried = _carried(eqn, program)
                while any(
                    r and not o for r, o in zip(results, operands[first : first + carried], strict=False)
                ):
                    for i, result in enumerate(results[:carried]):
                        operands[first + i] |= result
                    done, results = _walk(program, operands)
            total += done.times(times)
        elif any(operands):
            total += _primitive(eqn, operands)
        varies |= dict(zip(eqn.outvars, results, strict=True))
    return total, [not isinstance(v, core.Literal) and varies[v] for v in jaxpr.outvars]


def _carried(scan: Any, program: Any) -> tuple[int, int]:
    """Where in a scan's operands those begin that a turn hands to the next, and their number.

    Read from shapes: jax 0.10 and 0.11 name them differently. What is scanned or stacked has a dimension more
    outside than inside.
    """
    carried = sum(o.aval.ndim == i.aval.ndim for o, i in zip(scan.outvars, program.outvars, strict=True))
    scanned = sum(o.aval.ndim > i.aval.ndim for o, i in zip(scan.invars, program.invars, strict=True))
    return len(scan.invars) - carried - scanned, carried


def _inner(eqn: Any) -> tuple[Any, int] | None:
    """The program inside an equation, and how often it runs."""
    name = eqn.primitive.name
    if name in ("while", "cond"):
        raise NotImplementedError(f"a {name} loop or branch cannot be counted")
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if key in eqn.params:
            program = eqn.params[key]
            return getattr(program, "jaxpr", program), eqn.params["length"] if name == "scan" else 1
    return None


def _primitive(eqn: Any, operands: list[bool]) -> MultiplyAdds:
    name, params = eqn.primitive.name, eqn.params
    shapes = [v.aval.shape for v in eqn.invars]
    size = math.prod(eqn.outvars[0].aval.shape)
    if name == "dot_general":
        contracted = params["dimension_numbers"][0][0]
        size *= math.prod(shapes[0][axis] for axis in contracted)
    elif name == "conv_general_dilated":
        size *= math.prod(shapes[1]) // shapes[1][params["dimension_numbers"].rhs_spec[0]]
        size //= math.prod(params["lhs_dilation"])  # between the inserted zeros there is nothing to multiply
    elif name == "mul" and not all(operands) and all(not isinstance(v, core.Literal) for v in eqn.invars):
        return MultiplyAdds(elementwise=size)
    else:
        return MultiplyAdds()
    return MultiplyAdds(products=size) if all(operands[:2]) else MultiplyAdds(layers=size)
