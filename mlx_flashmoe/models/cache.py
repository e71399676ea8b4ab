"""What a sequence leaves behind in a layer, so that the next call need not see the old tokens again."""

from __future__ import annotations

import mlx.core as mx


class Cache:
    """What every layer's cache has.

    Attributes:
        offset: tokens seen.
    """

    offset = 0

    @property
    def state(self) -> list[mx.array]:
        """The arrays held: evaluate them to finish the work that fills the cache."""
        return [a for a in vars(self).values() if isinstance(a, mx.array)]

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.state)

    def snapshot(self) -> dict[str, mx.array]:
        """What the tokens so far have left behind, by attribute, without room for more: later calls of the model
        do not change it."""
        return {name: a for name, a in vars(self).items() if isinstance(a, mx.array)}

    def restore(self, snapshot: dict[str, mx.array], offset: int) -> None:
        """Makes this empty cache what it was at ``offset`` tokens, when ``snapshot`` was taken."""
        vars(self).update(snapshot)
        self.offset = offset


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

    def snapshot(self) -> dict[str, mx.array]:
        return {name: mx.contiguous(a[..., : self.offset, :]) for name, a in super().snapshot().items()}


class RecurrentCache(Cache):
    """The state of a gated delta net layer: of constant size whatever the number of tokens.

    Attributes:
        conv: the last inputs of the convolution, [B, kernel - 1, channels].
        recurrent: the fast weights, float32 [B, value heads, value dim, key dim].
    """

    def __init__(self) -> None:
        self.conv: mx.array | None = None
        self.recurrent: mx.array | None = None
