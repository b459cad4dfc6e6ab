"""Reads a compiled program: its kernels, and each one's bytes, FLOPs and module.

The input is XLA's optimised HLO as text (`jax.stages.Compiled.as_text()`), for CUDA, TPU or CPU. A kernel is
an instruction of the entry computation, or of a loop's body (counted once), that does something at run time.
"""

import collections
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator

from moebius_jax.training.aot import COLLECTIVES

BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16}
BITS |= {
    "s32": 32,
    "u32": 32,
    "f32": 32,
    "s64": 64,
    "u64": 64,
    "f64": 64,
    "c64": 64,
    "f8e4m3fn": 8,
    "f8e5m2": 8,
}
# Change names or places of values, not values.
FREE = frozenset(
    [
        "parameter",
        "constant",
        "bitcast",
        "get-tuple-element",
        "tuple",
        "after-all",
        "partition-id",
        "opt-barrier",
    ]
)
_SHAPE = re.compile(r"\b([a-z][a-z0-9]*)\[([0-9,]*)\](\{[^{}]*\})?")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_ON_CHIP = "S(1)"  # TPU: in vector memory, not in HBM


@dataclasses.dataclass(frozen=True, kw_only=True)
class Array:
    """One array of a type: dtype, dimensions and layout as written."""

    dtype: str
    dims: tuple[int, ...]
    layout: str

    @property
    def nbytes(self) -> int:
        """In the device's main memory."""
        return 0 if _ON_CHIP in self.layout else math.prod(self.dims) * BITS.get(self.dtype, 0) // 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instruction:
    """One line of HLO.

    Attributes:
        name, op: `%fusion.3`, "fusion".
        arrays: of its result.
        operands: names; of a parameter, its number.
        attributes: the rest of the line.
        is_root: of its computation.
    """

    name: str
    op: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    @property
    def scope(self) -> str:
        """Where in the program it was traced, as jax named it."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def called(self, *keys: str) -> str | None:
        """The computation an attribute names."""
        found = re.search(rf"(?:{'|'.join(keys)})=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """One kernel of a program.

    Attributes:
        instruction: the line it comes from.
        operands: arrays it reads.
        read, written: bytes of main memory.
        flops: of products and convolutions, by how they are multiplied: "f16", "bf16", "tf32", "f32", …
        cycles: the TPU compiler's estimate, or 0.
        in_loop: whether it runs at every turn of a loop.
    """

    instruction: Instruction
    operands: tuple[Array, ...]
    read: int
    written: int
    flops: dict[str, float]
    cycles: int
    in_loop: bool


def kernels(text: str) -> list[Kernel]:
    """All kernels of a program, in order."""
    computations, entry = parse(text)
    return list(_walk(computations, entry))


def own_kernel(made: Instruction) -> str | None:
    """The name of one of ours."""
    is_ours = made.op == "custom-call" and made.scope.endswith("/pallas_call")
    return made.scope.split("/")[-2] if is_ours else None


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """How many of each kind a compiled program has, and how many bytes come out of them on one device."""
    seen: dict[str, dict[str, int]] = {}
    computations, _ = parse(text)
    for computation in computations.values():
        for made in computation.values():
            kind = made.op.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            sizes = [math.prod(a.dims) * BITS.get(a.dtype, 0) // 8 for a in made.arrays]
            # An all-gather that is only started has its operand beside its result.
            size = max(sizes) if kind == "all-gather" and made.op != kind else sum(sizes)
            # By channel: the compiler repeats a transfer in the text of everything it is fused with.
            channel = re.search(r"channel_id=(\d+)", made.attributes)
            seen.setdefault(kind, {})[channel[1] if channel else made.name] = size
    return {kind: (len(sizes), sum(sizes.values())) for kind, sizes in seen.items()}


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Computations by name, and the entry's name."""
    computations: dict[str, Computation] = {}
    current: Computation = {}
    entry = ""
    for line in text.splitlines():
        if line[:1].strip() and line.endswith("{") and "->" in line:
            found = re.match(r"(ENTRY )?%?([\w.\-]+) \(", line)
            if found:
                current = computations.setdefault(found[2], {})
                entry = found[2] if found[1] else entry
        elif (found := _INSTRUCTION.match(line)) and (made := _instruction(found)):
            current[made.name] = made
    return computations, entry


def _instruction(found: re.Match[str]) -> Instruction | None:
    root, name, rest = found.groups()
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opened = re.match(r"([\w\-]+)\(", rest)
    if not opened:
        return None
    end = _closing(rest, opened.end() - 1)
    inside = rest[opened.end() : end - 1]
    op = opened[1]
    return Instruction(
        name=name,
        op=op,
        arrays=tuple(_arrays(kind)),
        operands=(inside,) if op == "parameter" else tuple(re.findall(r"%([\w.\-]+)", inside)),
        attributes=rest[end:],
        is_root=bool(root),
    )


def _closing(text: str, start: int) -> int:
    """The place after the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i + 1
    return len(text)


def _arrays(kind: str) -> Iterator[Array]:
    for dtype, dims, layout in _SHAPE.findall(kind):
        if dtype in BITS:
            yield Array(dtype=dtype, dims=tuple(int(n) for n in dims.split(",") if n), layout=layout)


def _walk(computations: dict[str, Computation], name: str, in_loop: bool = False) -> Iterator[Kernel]:
    for made in computations[name].values():
        inner = (
            made.called("body", "to_apply", "calls") if made.op in ("while", "call", "async-start") else None
        )
        if inner in computations:
            yield from _walk(computations, inner, in_loop or made.op == "while")
        elif made.op not in FREE and not made.op.endswith("-done"):
            read, written = _traffic(computations, computations[name], made)
            cycles = re.search(r'"estimated_cycles":"(\d+)"', made.attributes)
            yield Kernel(
                instruction=made,
                operands=_operands(computations[name], made),
                read=read,
                written=written,
                flops=dict(_flops(computations, computations[name], made)),
                # The compiler writes an absurd number where it has no estimate.
                cycles=int(cycles[1]) if cycles and len(cycles[1]) < 12 else 0,
                in_loop=in_loop,
            )


def _operands(inside: Computation, made: Instruction) -> tuple[Array, ...]:
    return tuple(array for name in made.operands if name in inside for array in inside[name].arrays)


def _traffic(computations: dict[str, Computation], inside: Computation, made: Instruction) -> tuple[int, int]:
    """Bytes read and written, where slices of large arrays count as what they are."""
    read = [inside[name].nbytes if name in inside else 0 for name in made.operands]
    if made.op in ("slice", "dynamic-slice", "gather"):
        return made.nbytes, made.nbytes
    if made.op == "dynamic-update-slice":
        return read[1], read[1]
    body = computations.get(made.called("calls") or "", {}) if made.op == "fusion" else {}
    touched = _touched(body)
    read = [min(n, touched.get(i, n)) for i, n in enumerate(read)]
    root = next((i for i in body.values() if i.is_root), None)
    if root and root.op == "dynamic-update-slice":
        return sum(read), body[root.operands[1]].nbytes
    return sum(read), made.nbytes


def _touched(body: Computation) -> dict[int, int]:
    """Bytes that a fusion reads of each parameter it only slices."""
    users = collections.defaultdict(list)
    for made in body.values():
        for name in made.operands:
            users[name].append(made)
    found = {}
    for parameter in (i for i in body.values() if i.op == "parameter"):
        names, total = [parameter.name], 0
        for name in names:
            for user in users[name]:
                if user.op == "bitcast":
                    names.append(user.name)
                elif user.op in ("slice", "dynamic-slice", "gather") and user.operands[0] == name:
                    total += user.nbytes
                elif not (user.op == "dynamic-update-slice" and user.operands[0] == name):
                    total = math.inf
        if total < math.inf:
            found[int(parameter.operands[0])] = total
    return found


def _flops(
    computations: dict[str, Computation], inside: Computation, made: Instruction
) -> collections.Counter[str]:
    found: collections.Counter[str] = collections.Counter()
    if made.op == "fusion":
        body = computations.get(made.called("calls") or "", {})
        for part in body.values():
            found += _flops(computations, body, part)
    elif made.op == "dot":
        left = inside[made.operands[0]].arrays[0]
        summed = re.search(r"lhs_contracting_dims=\{([0-9,]*)\}", made.attributes)
        length = math.prod(left.dims[int(i)] for i in (summed[1] if summed else "").split(",") if i)
        found[_unit(left.dtype, made)] += 2 * math.prod(made.arrays[0].dims) * length
    elif made.op == "convolution" or "__cudnn$conv" in made.attributes:
        first, second = (inside[name].arrays[0] for name in made.operands[:2])
        kernel, out = second, made.arrays[0]
        if "$convBackwardInput" in made.attributes:
            out = first
        elif "$convBackwardFilter" in made.attributes:
            kernel, out = out, second
        # Every element of the kernel meets every position of what the forward pass results in.
        features = _output_features(made, kernel)
        found[_unit(kernel.dtype, made)] += 2 * math.prod(out.dims) * math.prod(kernel.dims) / features
    elif name := own_kernel(made):
        operands = [inside[operand].arrays[0] for operand in made.operands]
        found[operands[0].dtype] += OWN_KERNELS.get(name, lambda _: 0)(operands)
    return found


def _local_lambda_flops(operands: list[Array]) -> int:
    """Of Local-λ's products in `moebius_jax.models.kernels`, gpu or tpu, padding included."""
    if len(operands[0].dims) == 4:
        return _tpu_lambda_flops(operands, on_window=2, on_depth=1)
    on_window, q, val, *_ = (array.dims for array in operands)
    B, H, W, h, p, _ = on_window
    return _gpu_lambda_flops((B, H, W, h, val[-1]), sums=32 * p + 32 * -(-q[-1] // 32))


def _on_window_gradient_flops(operands: list[Array]) -> int:
    side = 15  # the student's; only the result's shape would tell
    return _gpu_lambda_flops(operands[0].dims, sums=32 * side)


def _val_gradient_flops(operands: list[Array]) -> int:
    on_window, cotangent = (array.dims for array in operands)
    return _gpu_lambda_flops(cotangent, sums=32 * on_window[4])


def _gpu_lambda_flops(heads: tuple[int, ...], sums: int) -> int:
    """Of a map [B, H, W, h, v], in tiles of 16 columns and 64 of v that so many numbers go into."""
    B, H, W, h, v = heads
    return B * H * -(-W // 16) * -(-v // 64) * 2 * (16 * h) * 64 * sums


def _tpu_lambda_flops(operands: list[Array], *, on_window: int, on_depth: int) -> int:
    """Of that many products of all heads' rows with the window's lanes, and with the content."""
    B, H, W, channels = operands[0].dims
    k, lanes = operands[2].dims
    return 2 * B * H * W * channels * (on_window * lanes + on_depth * k)


def _product_flops(operands: list[Array]) -> int:
    """Of `moebius_jax.models.kernels.gpu.product`: maps [M, K] that a kernel [K, N] follows."""
    shapes = [array.dims for array in operands]
    M, N = shapes[0][0], shapes[1][1]
    pairs = itertools.pairwise(shapes)
    return sum(2 * M * K * N for (m, K), (k, n) in pairs if (m, K, n) == (M, k, N))


def _interactive_lambda_flops(operands: list[Array]) -> int:
    """Of the TPU kernel's three products; the sum over k and a GPU's kernel are none."""
    x, keys, *_ = (array.dims for array in operands)
    if len(x) == 4:
        return 0
    B, N, C = x
    return 2 * B * N * C * (C + 2 * keys[1])


# Those without matrix products, or with few (λc, gated linear attention), count as none.
OWN_KERNELS = {
    "local_lambda": _local_lambda_flops,
    "interactive_lambda": _interactive_lambda_flops,
    "on_window_gradient": _on_window_gradient_flops,
    "val_gradient": _val_gradient_flops,
    "local_lambda_gradient": functools.partial(_tpu_lambda_flops, on_window=5, on_depth=2),
    "product": _product_flops,
}


def _output_features(made: Instruction, kernel: Array) -> int:
    labels = re.search(r"dim_labels=\w+_(\w+)->", made.attributes)
    return kernel.dims[labels[1].index("o")] if labels else kernel.dims[-1]


def _unit(dtype: str, made: Instruction) -> str:
    """How accelerators multiply it: fp32 in tensor-float-32 unless more is asked for."""
    if dtype != "f32":
        return dtype
    is_precise = re.search(r"operand_precision=\{(high|highest)|algorithm=dot_f32_f32_f32", made.attributes)
    return "f32" if is_precise else "tf32"


def module_of(scope: str, modules: frozenset[str]) -> str:
    """The two innermost of these modules in a scope, joined; a scope outside of them all is "other"."""
    path = [part for part, _ in itertools.groupby(scope.split("/")) if part in modules]
    return "/".join(path[-2:]) or "other"
