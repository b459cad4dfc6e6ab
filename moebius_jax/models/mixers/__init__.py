"""Mixers: how positions of a map hear of each other (self) and of the context (cross)."""

from moebius_jax.models.mixers.cross_attention import CrossAttention
from moebius_jax.models.mixers.gated_linear_attention import GatedLinearAttention
from moebius_jax.models.mixers.interactive_lambda import InteractiveLambda
from moebius_jax.models.mixers.local_lambda import LocalLambda

__all__ = ["CrossAttention", "GatedLinearAttention", "InteractiveLambda", "LocalLambda"]
