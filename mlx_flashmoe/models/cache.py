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


class GrowingCache(Cache):
    """Arrays [B, heads, tokens, dims]; they grow in steps, so that appending rarely copies."""

    step = 256

    def _append(self, **new: mx.array) -> list[mx.array]:
        """Appends arrays [B, heads, T, dims], by attribute, and returns all that each has now."""
        end = self.offset + next(iter(new.values())).shape[2]
        for name, array in new.items():
            held = getattr(self, name)
            if held is None or end > held.shape[2]:
                held = self._grow(held, array, end)
                setattr(self, name, held)
            held[..., self.offset : end, :] = array
        self.offset = end
        return [getattr(self, name)[..., :end, :] for name in new]

    def _grow(self, old: mx.array | None, new: mx.array, end: int) -> mx.array:
        batch, heads, _, dim = new.shape
        have = old[..., : self.offset, :] if old is not None else new[..., :0, :]
        room = -(-end // self.step) * self.step - self.offset
        return mx.concatenate([have, mx.zeros((batch, heads, room, dim), dtype=new.dtype)], axis=2)

    def snapshot(self) -> dict[str, mx.array]:
        return {name: mx.contiguous(a[..., : self.offset, :]) for name, a in super().snapshot().items()}


class KVCache(GrowingCache):
    """Keys and values of a full-attention layer."""

    def __init__(self) -> None:
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    def update(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Appends keys and values [B, heads, T, head_dim] and returns all of them."""
        keys, values = self._append(keys=keys, values=values)
        return keys, values


class LatentCache(GrowingCache):
    """What all heads' keys and values of a latent-attention layer are made from: [B, 1, tokens, latent + rotated]."""

    def __init__(self) -> None:
        self.latents: mx.array | None = None

    def update(self, latents: mx.array) -> mx.array:
        """Appends latents [B, 1, T, dims] and returns all of them."""
        return self._append(latents=latents)[0]


class RecurrentCache(Cache):
    """The state of a gated delta net layer: of constant size whatever the number of tokens.

    Attributes:
        conv: the last inputs of the convolution, [B, kernel - 1, channels].
        recurrent: the fast weights, float32 [B, value heads, value dim, key dim].
    """

    def __init__(self) -> None:
        self.conv: mx.array | None = None
        self.recurrent: mx.array | None = None
