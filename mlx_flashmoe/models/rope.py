"""Rotary position embedding: plain, or stretched to longer contexts by YaRN (Peng et al., arXiv:2309.00071)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_flashmoe.errors import FormatError

PLAIN = ("default", "mrope")  # of text alone, mrope's three positions are the same


@dataclass(frozen=True)
class Yarn:
    """Rotations that turn fewer than ``beta_slow`` times within the original context are stretched by ``factor``,
    those that turn more than ``beta_fast`` times are not, and between the two it goes gradually.

    Attributes:
        attention_factor: rotated queries and keys are multiplied by it.
        mscale_all_dim: strength of ``score_factor``; 0 is none.
        truncate: the two bounds are rounded to whole rotations.
    """

    factor: float
    original_context: int
    attention_factor: float
    mscale_all_dim: float
    beta_fast: float
    beta_slow: float
    truncate: bool

    @classmethod
    def from_config(cls, rope: dict[str, Any], text: dict[str, Any]) -> Yarn:
        original = int(rope.get("original_max_position_embeddings") or text["max_position_embeddings"])
        factor, attention = rope["factor"], rope.get("attention_factor")
        if factor is None:  # transformers then takes what the context has grown by
            factor = text["max_position_embeddings"] / original
        factor = float(factor)
        mscale, all_dim = float(rope.get("mscale") or 0), float(rope.get("mscale_all_dim") or 0)
        if attention is None:
            both = mscale and all_dim
            attention = _mscale(factor, mscale) / _mscale(factor, all_dim) if both else _mscale(factor, 1)
        yarn = cls(
            factor,
            original,
            float(attention),
            all_dim,
            float(rope.get("beta_fast") or 32),
            float(rope.get("beta_slow") or 1),
            bool(rope.get("truncate", True)),
        )
        if min(factor, yarn.original_context, yarn.beta_fast, yarn.beta_slow) <= 0:
            raise ValueError("rope_parameters")
        return yarn

    @property
    def score_factor(self) -> float:
        """The factor of every score in DeepSeek's attention, of dims that are rotated and of those that are not."""
        return _mscale(self.factor, self.mscale_all_dim) ** 2

    def stretched(self, dims: int, theta: float) -> mx.array:
        """How much each of the dims / 2 rotations is stretched: 0 not at all, 1 by all of ``factor``."""

        def rotation(turns: float) -> float:
            """Which rotation turns so many times within the original context."""
            return dims * math.log(self.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = rotation(self.beta_fast), rotation(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dims - 1)
        if low == high:
            high += 0.001
        return mx.clip((mx.arange(dims // 2, dtype=mx.float32) - low) / (high - low), 0, 1)


def _mscale(factor: float, strength: float) -> float:
    """Returns how much attention is sharpened in a context ``factor`` times as long; 1 without ``strength``."""
    return 0.1 * strength * math.log(factor) + 1 if factor > 1 else 1.0


@dataclass(frozen=True)
class Rope:
    """What config.json says of the rotary embedding.

    Attributes:
        dims: leading dims of each head that are rotated.
        theta: base of the rotations' periods.
    """

    dims: int
    theta: float
    yarn: Yarn | None

    @classmethod
    def from_config(cls, text: dict[str, Any]) -> Rope:
        """Raises FormatError for a kind that is not supported; KeyError, TypeError or ValueError if malformed."""
        rope = _settings(text)
        kind = rope["rope_type"]
        if kind not in ("default", "yarn"):
            raise FormatError(f"rope type {kind!r} is not supported; default and yarn are")
        partial = rope.get("partial_rotary_factor", text.get("partial_rotary_factor", 1.0))
        return cls(
            dims=int(int(text["head_dim"]) * partial),
            theta=float(rope["rope_theta"] if "rope_theta" in rope else text["rope_theta"]),
            yarn=Yarn.from_config(rope, text) if kind == "yarn" else None,
        )

    def context_length(self, text: dict[str, Any]) -> int | None:
        """Tokens of a prompt and its answer that a model of this config.json is made for; None if it does not say.

        Model cards ask for YaRN to be added and ``max_position_embeddings`` to stay as it is: the longer one counts.

        Raises:
            TypeError, ValueError: max_position_embeddings is not a number above 0.
        """
        given = text.get("max_position_embeddings")
        lengths = [] if given is None else [int(given)]
        if self.yarn is not None:
            lengths.append(int(self.yarn.factor * self.yarn.original_context))
        if min(lengths, default=1) < 1:
            raise ValueError("max_position_embeddings")
        return max(lengths, default=None)


def _settings(text: dict[str, Any]) -> dict[str, Any]:
    """What ``rope_parameters`` and ``rope_scaling``, its older spelling, say together; ``rope_type`` tells the kind.

    A user adds the one that a model card shows to a config.json that may have the other. What is added counts, and
    keeps the rest, such as rope_theta.
    """
    together: dict[str, Any] = {}
    kind: Any = "default"
    for spelling in ("rope_parameters", "rope_scaling"):
        given = text.get(spelling) or {}
        if not isinstance(given, dict):
            raise TypeError(spelling)
        together |= given
        own = given.get("rope_type", given.get("type", "default"))
        if own not in PLAIN:
            kind = own
    return {**together, "rope_type": kind}


class RotaryEmbedding:
    """Rotates the first ``rope.dims`` of each head of x [B, heads, T, head_dim] by its position.

    Args:
        interleaved: dims 2i and 2i + 1 are rotated together, not i and i + dims / 2.
    """

    def __init__(self, rope: Rope, interleaved: bool = False):
        exponent = mx.arange(0, rope.dims, 2, dtype=mx.float32) / rope.dims
        periods = rope.theta**exponent
        if rope.yarn is not None:
            share = rope.yarn.stretched(rope.dims, rope.theta)
            periods = 1 / (share / (rope.yarn.factor * periods) + (1 - share) / periods)
        self._dims = rope.dims
        self._interleaved = interleaved
        self._periods = periods
        mx.eval(periods)  # now: lazy, it could only ever be computed on the thread that loaded the model
        self._factor = rope.yarn.attention_factor if rope.yarn is not None else 1.0

    def __call__(self, x: mx.array, offset: int) -> mx.array:
        if self._factor != 1.0:
            x = mx.concatenate([self._factor * x[..., : self._dims], x[..., self._dims :]], axis=-1)
        return mx.fast.rope(
            x,
            self._dims,
            traditional=self._interleaved,
            base=None,
            scale=1.0,
            offset=offset,
            freqs=self._periods,
        )
