"""Products of one input with several matrices, as one: for one token each takes longer to launch than to compute.

The matrices stay modules of their own, with the checkpoint's names; once they are loaded their rows lie one after
the other in one array, of which each module holds its part.
"""

from __future__ import annotations

import itertools
import weakref
from collections import defaultdict
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlx_flashmoe.kernels import quantized_matmul

ROWS = 8  # rows of a joined matrix are a multiple of this: products want it, on Metal


@dataclass(frozen=True)
class _Joined:
    """Several matrices of a Together.

    Attributes:
        whole: weight, scales and biases.
        places: of the matrices among the Together's.
        starts: the row where each but the first begins.
    """

    whole: tuple[mx.array, mx.array, mx.array]
    group_size: int
    bits: int
    places: tuple[int, ...]
    starts: tuple[int, ...]

    def __call__(self, x: mx.array) -> list[mx.array]:
        y = quantized_matmul(x, *self.whole, self.group_size, self.bits)
        parts: list[mx.array] = mx.split(y, self.starts, axis=-1)  # type: ignore[assignment]
        return parts[: len(self.places)]


class Together:
    """Linear modules that are given the same input: x [..., in] -> [..., out] of each.

    Args:
        parent: the module that they are in.
        paths: their paths in it.
    """

    def __init__(self, parent: nn.Module, *paths: str):
        self._parent = weakref.ref(parent)  # which has this: a cycle would keep a dropped model's memory
        self._paths = paths
        self._joined: list[_Joined] = []
        self._alone = tuple(range(len(paths)))

    def __call__(self, x: mx.array) -> list[mx.array]:
        several = x.size != x.shape[-1]  # tokens: parts of rows would have to be copied
        alone, joined = (range(len(self._paths)), ()) if several else (self._alone, self._joined)
        ys = {place: self._module(place)(x) for place in alone}
        for matrices in joined:
            ys.update(zip(matrices.places, matrices(x), strict=True))
        return [ys[place] for place in range(len(self._paths))]

    def join(self) -> None:
        """Lays the matrices that are quantized alike together. They must have been loaded."""
        modules = [self._module(place) for place in range(len(self._paths))]
        alike: dict[object, list[int]] = defaultdict(list)
        for place, m in enumerate(modules):
            joins = isinstance(m, nn.QuantizedLinear) and "bias" not in m
            alike[(m.bits, m.group_size, m.scales.dtype, m.biases.dtype) if joins else place].append(place)
        groups = [places for places in alike.values() if len(places) > 1]
        self._joined = [self._lay(modules, places) for places in groups]
        self._alone = tuple(places[0] for places in alike.values() if len(places) == 1)

    def _module(self, place: int) -> nn.Module:
        module = self._parent()
        assert module is not None
        for name in self._paths[place].split("."):
            module = module[name]
        return module

    @staticmethod
    def _lay(modules: list[nn.Module], places: list[int]) -> _Joined:
        chosen = [modules[place] for place in places]
        bounds = [0, *itertools.accumulate(m.weight.shape[0] for m in chosen)]

        def laid(part: str) -> mx.array:
            rows = mx.concatenate([m[part] for m in chosen])
            rows = mx.pad(rows, [(0, -bounds[-1] % ROWS), (0, 0)])
            mx.eval(rows)
            for m, start, stop in zip(chosen, bounds, bounds[1:], strict=False):
                m[part] = rows[start:stop]  # no copy: the modules' own arrays go
                mx.eval(m[part])
            return rows

        first = chosen[0]
        whole = laid("weight"), laid("scales"), laid("biases")
        return _Joined(whole, first.group_size, first.bits, tuple(places), tuple(bounds[1:]))


def join(model: nn.Module) -> None:
    """Joins every Together of a loaded model, one after the other, so that little is ever held twice."""
    for module in model.modules():
        for attribute in vars(module).values():
            if isinstance(attribute, Together):
                attribute.join()
