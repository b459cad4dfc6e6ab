"""What becomes of a network for inference: BatchNorm folded, and work on weights done once."""

from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from moebius_jax.models.blocks import TransformerBlock
from moebius_jax.models.convolutions import DepthwiseConv
from moebius_jax.models.norms import BatchNorm

Network = TypeVar("Network", bound=nnx.Module)


def fold_batch_norm(network: Network) -> Network:
    """A copy of `network` without BatchNorm layers that computes the same function in evaluation mode.

    A module's `FOLDS` names the bias-free linear layer before each of its BatchNorms: y = (W x)·scale + bias
    is one layer with weight W·scale and that bias. The result is for inference: it has other parameters than
    the release and can be neither trained further nor exported. Networks without BatchNorm come back as
    plain copies.
    """
    network = nnx.clone(network)
    for _, module in nnx.iter_modules(network):
        for norm, layer in getattr(module, "FOLDS", {}).items():
            if getattr(module, norm) is not None:
                _fold(getattr(module, layer), getattr(module, norm))
                setattr(module, norm, None)
    network.eval()
    return network


def _fold(layer: nnx.Linear | DepthwiseConv, norm: BatchNorm) -> None:
    """The last axis of `layer.kernel` is the one `norm` works on."""
    scale, bias = norm.affine(norm.mean[...], norm.var[...])
    kernel = layer.kernel[...]
    layer.kernel = nnx.Param(kernel.astype(jnp.float32) * scale)
    layer.bias = nnx.data(nnx.Param(bias))  # it was None, which nnx takes as static
    if isinstance(layer, nnx.Linear):
        layer.use_bias = True


def _widen(network: nnx.Module) -> None:
    """Parameters that are kept in half precision are converted here rather than at every use."""
    for _, variable in nnx.iter_graph(network):
        if isinstance(variable, nnx.Param) and jnp.issubdtype(variable.dtype, jnp.floating):
            variable.set_value(variable.get_value().astype(jnp.float32))


def inference_copy(network: Network) -> Network:
    """`network` with BatchNorm folded, and with all done to its weights that is done at every call otherwise.

    Matrices are in the dtype they are multiplied in; a module's `freeze`, where it has one, does the rest.
    """
    # One program, which the compilation cache keeps; each of its hundred operations by itself is compiled
    # too, and too quickly to be kept.
    graphdef, state = nnx.split(network)
    frozen = None

    def freeze(state: nnx.State) -> nnx.State:
        nonlocal frozen
        frozen, state = nnx.split(_frozen(nnx.merge(graphdef, state)))
        return state

    state = jax.jit(freeze)(state)
    return nnx.merge(frozen, state)


def _frozen(network: Network) -> Network:
    network = fold_batch_norm(network)
    if getattr(network, "precision", network).dtype == jnp.float32:
        _widen(network)
    # A module before its parts: it may make something of a weight that its part then rounds.
    modules = [module for _, module in sorted(nnx.iter_modules(network), key=lambda item: len(item[0]))]
    for module in modules:
        if isinstance(module, TransformerBlock):
            module.fold_norms()
    for module in modules:
        if callable(freeze := getattr(module, "freeze", None)):
            freeze()
    return network
