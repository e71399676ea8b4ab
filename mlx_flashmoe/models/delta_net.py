"""Linear attention by the gated delta rule of Yang et al., "Gated Delta Networks" (arXiv:2412.06464)."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlx_flashmoe.kernels import delta_inputs, gated_delta, gpu
from mlx_flashmoe.models.cache import RecurrentCache
from mlx_flashmoe.models.config import BaseConfig
from mlx_flashmoe.models.fused import replayed
from mlx_flashmoe.models.norm import GatedRMSNorm


@dataclass(frozen=True)
class DeltaNetConfig(BaseConfig):
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int

    @property
    def keys(self) -> int:
        """Dims of all keys together."""
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def values(self) -> int:
        """Dims of all values together."""
        return self.linear_num_value_heads * self.linear_value_head_dim

    def state_bytes(self, dtype: mx.Dtype) -> int:
        """Bytes of a layer's ``RecurrentCache`` for one sequence."""
        recurrent = self.values * self.linear_key_head_dim * 4
        return recurrent + (self.linear_conv_kernel_dim - 1) * (2 * self.keys + self.values) * dtype.size

    def mixing_bytes(self, dtype: mx.Dtype) -> int:
        """As of attention; a delta net is wider."""
        # Before and after the convolution, and the delta rule's inputs and outputs in float32.
        keys, values = self.keys, self.values
        return (5 * (2 * keys + values) + 2 * values) * dtype.size + (2 * keys + 2 * values) * 4


class GatedDeltaNet(nn.Module):
    """x [B, T, D] -> [B, T, D], with a recurrent state. Architectures differ in ``project``, and derive theirs."""

    def __init__(self, config: DeltaNetConfig):
        super().__init__()
        self.key_heads, self.key_dim = config.linear_num_key_heads, config.linear_key_head_dim
        self.value_heads, self.value_dim = config.linear_num_value_heads, config.linear_value_head_dim
        channels = 2 * config.keys + config.values
        self.conv1d = nn.Conv1d(
            channels, channels, config.linear_conv_kernel_dim, groups=channels, bias=False
        )
        self.A_log = mx.zeros((self.value_heads,))
        self.dt_bias = mx.ones((self.value_heads,))
        self.norm = GatedRMSNorm(self.value_dim, config.rms_norm_eps)
        self.out_proj = nn.Linear(config.values, config.hidden_size, bias=False)
        self._replayed = replayed(self._mix)

    def project(self, x: mx.array) -> tuple[mx.array, mx.array, mx.array, mx.array]:
        """What the rule computes with.

        Returns:
            queries, keys and values [B, T, 2 * keys + values], each with its heads in order;
            z [B, T, values], the output's gate;
            b and a, [B, T, value heads] each, which beta and the decay are made from.
        """
        raise NotImplementedError

    def __call__(self, x: mx.array, cache: RecurrentCache | None) -> mx.array:
        B, T, _ = x.shape
        before = cache.conv if cache is not None else None
        if before is None:
            channels, kernel, _ = self.conv1d.weight.shape
            before = mx.zeros((B, kernel - 1, channels), dtype=x.dtype)
        state = cache.recurrent if cache is not None else None
        if state is None:
            state = mx.zeros((B, self.value_heads, self.value_dim, self.key_dim))
        y, after, state = self._replayed(x, before, state)
        if cache is not None:
            cache.conv, cache.recurrent = after, state
            cache.offset += T
        return y

    def _mix(self, x: mx.array, before: mx.array, state: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """The layer's output, and what a ``RecurrentCache`` holds after it: convolution, then state."""
        B, T, _ = x.shape
        qkv, z, b, a = self.project(x)
        q, k, v, decay, beta, after = self._inputs(qkv, a, b, before)
        y, state = gated_delta.gated_delta_update(q, k, v, decay, beta, state)
        z = z.reshape(B, T, self.value_heads, self.value_dim)
        return self.out_proj(self.norm(y, z).reshape(B, T, -1)), after, state

    def _inputs(self, qkv: mx.array, a: mx.array, b: mx.array, before: mx.array) -> delta_inputs.DeltaInputs:
        """From queries, keys and values before the convolution, and its state ``before``."""
        return delta_inputs.delta_inputs(
            qkv,
            a,
            b,
            before=before,
            filter=self.conv1d.weight,
            a_log=self.A_log,
            dt_bias=self.dt_bias,
            key_heads=self.key_heads,
            key_dim=self.key_dim,
        )

    def check_kernels(self, language: gpu.Language, dtype: mx.Dtype) -> None:
        """Compares the kernels that serve this layer on a GPU, before they are needed."""
        past = self.conv1d.weight.shape[1] - 1
        heads = self.key_heads, self.value_heads
        if self.key_dim == self.value_dim:
            dtypes = dtype, self.conv1d.weight.dtype, self.A_log.dtype, self.dt_bias.dtype
            delta_inputs.right(language, dtypes, self.key_dim, *heads, past)
        gated_delta.right(self.key_heads, self.key_dim, self.value_heads, self.value_dim)
