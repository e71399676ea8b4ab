"""What a sequence leaves behind in a layer, so that the next call need not see the old tokens again."""

from __future__ import annotations

import mlx.core as mx


class Cache:
    """What every layer's cache has.

    Attributes:
        offset: tokens seen.
    """

    offset = 0

    def _arrays(self) -> tuple[mx.array | None, ...]:
        raise NotImplementedError

    @property
    def state(self) -> list[mx.array]:
        """The arrays held: evaluate them to finish the work that fills the cache."""
        return [a for a in self._arrays() if a is not None]

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.state)


class KVCache(Cache):
    """Keys and values of a full-attention layer; grows in steps, so that appending rarely copies."""

    step = 256

    def __init__(self) -> None:
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    def update(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Appends keys and values [B, heads, T, head_dim] and returns all of them."""
        end = self.offset + keys.shape[2]
        if self.keys is None or self.values is None or end > self.keys.shape[2]:
            self.keys = self._grow(self.keys, keys, end)
            self.values = self._grow(self.values, values, end)
        self.keys[..., self.offset : end, :] = keys
        self.values[..., self.offset : end, :] = values
        self.offset = end
        return self.keys[..., :end, :], self.values[..., :end, :]

    def _grow(self, old: mx.array | None, new: mx.array, end: int) -> mx.array:
        batch, heads, _, dim = new.shape
        have = old[..., : self.offset, :] if old is not None else new[..., :0, :]
        room = -(-end // self.step) * self.step - self.offset
        return mx.concatenate([have, mx.zeros((batch, heads, room, dim), dtype=new.dtype)], axis=2)

    def _arrays(self) -> tuple[mx.array | None, ...]:
        return self.keys, self.values


class RecurrentCache(Cache):
    """The state of a gated delta net layer: of constant size whatever the number of tokens.

    Attributes:
        conv: the last inputs of the convolution, [B, kernel - 1, channels].
        recurrent: the fast weights, float32 [B, value heads, value dim, key dim].
    """

    def __init__(self) -> None:
        self.conv: mx.array | None = None
        self.recurrent: mx.array | None = None

    def _arrays(self) -> tuple[mx.array | None, ...]:
        return self.conv, self.recurrent
