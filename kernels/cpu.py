"""The expert feed-forward on the CPU: explicit SIMD through numba, reading quantized weights where they lie.

Works on the memory of the slab itself (``np.asarray`` of an evaluated array aliases it), so a call is *eager*:
it evaluates its inputs and returns finished values. MLX's own CPU path unpacks one weight at a time on one
thread; this one is bound by the memory's bandwidth.

The computation of one output, with q the stored integers, G the groups of a weight row:

    y = sum over g of scale[g] * (sum over i in g of q[i] * x[i])  +  sum over g of bias[g] * (sum over i in g of x[i])

- A *unit* is the shortest run of whole words that holds whole values: one word of 2-, 4- or 8-bit values, three
  words of 3- or 6-bit values. A vector register holds the same word of ``lanes`` consecutive units, so unpacking
  value j of all of them is one AND with a constant. x is laid out to match, once a call: value j of every unit
  adjacent.
- The AND leaves a value where it stands in the word, that is q * 2**shift; x carries the factor 2**-shift.
  Both are exact.
- A tile is one weight row by one row of x, or four weight rows by several rows of x: then a weight is unpacked
  once for all of them, and x read once for all weight rows.

Every product and sum is one explicit operation in a fixed order that depends on the layout alone. The bits of a
row therefore depend neither on the other rows and experts in the call, nor on the number of threads, nor on
which tile computed it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from functools import lru_cache
from itertools import pairwise
from typing import Any

import llvmlite.binding as llvm
import mlx.core as mx
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from mlx_flashmoe import system
from mlx_flashmoe.kernels.reference import DTYPES, Activation, activate
from mlx_flashmoe.layout import BlobLayout, Component, Projection
from mlx_flashmoe.threads import Shared, Threads

KINDS = {dtype: name for name, dtype in DTYPES.items()}
TILE_OUTPUTS = 4
PREFETCH = 8192  # bytes ahead: the hardware's own prefetching stops short when x is read alongside
WIDE = llvm.get_host_cpu_features().get("avx512f", False)
MAX_LANES = 16 if WIDE else 8
TILE_ROWS = 4 if WIDE else 2  # what fits the registers beside TILE_OUTPUTS weight rows
ROW_BLOCK = 32  # rows of x that stay in the second-level cache while weights pass by
CHUNKS_PER_THREAD = 8
SMALL = 1 << 23  # multiply-adds below which handing work to threads, some 0.4 ms, costs more than it saves

F32, I16, I32, I64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)


# ---------------------------------------------------------------------------------------------- the tile in LLVM


def unit_of(bits: int) -> tuple[int, int]:
    """(words, values) of a unit."""
    words = 3 if bits in (3, 6) else 1
    return words, words * 32 // bits


def _places(bits: int) -> list[tuple[int, int, bool, bool]]:
    """Of each value of a unit: its word, its shift there, whether it runs into the next word, and whether
    it can be left standing: not if it reaches bit 31, the sign of the int32 that is converted to float."""
    places = []
    for j in range(unit_of(bits)[1]):
        word, shift = divmod(j * bits, 32)
        places.append((word, shift, shift + bits > 32, shift + bits < 32))
    return places


def _factors(bits: int) -> np.ndarray:
    """float32 [values of a unit]: what x is multiplied with to make up for values left standing."""
    if bits == 16:
        return np.ones(1, np.float32)
    return np.array([2.0**-shift if stands else 1.0 for _, shift, _, stands in _places(bits)], np.float32)


class _Emitter:
    """Vector operations on top of an llvmlite builder."""

    def __init__(self, builder: Any) -> None:
        self.b = builder

    def splat(self, value: int | float, like: ir.VectorType) -> ir.Constant:
        return ir.Constant(like, [value] * like.count)

    def load(self, address: Any, element: ir.Type, lanes: int, align: int) -> Any:
        pointer = self.b.inttoptr(address, ir.VectorType(element, lanes).as_pointer())
        return self.b.load(pointer, align=align)

    def prefetch(self, address: Any) -> None:
        """Asks for the line at an address, valid or not, into the second-level cache."""
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer(), I32, I32, I32])
        function = cgutils.get_or_insert_function(self.b.module, kind, "llvm.prefetch.p0")
        pointer = self.b.inttoptr(address, ir.IntType(8).as_pointer())
        self.b.call(function, [pointer, ir.Constant(I32, 0), ir.Constant(I32, 2), ir.Constant(I32, 1)])

    def shuffle(self, v: Any, indices: list[int]) -> Any:
        mask = ir.Constant(ir.VectorType(I32, len(indices)), indices)
        return self.b.shuffle_vector(v, ir.Constant(v.type, ir.Undefined), mask)

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        # fmuladd: fused where the machine fuses, and never a call into libm where it does not.
        name = f"llvm.fmuladd.v{a.type.count}f32"
        function = cgutils.get_or_insert_function(self.b.module, ir.FunctionType(a.type, [a.type] * 3), name)
        return self.b.call(function, [a, b, c])

    def floats(self, address: Any, kind: str, lanes: int, repeat: int = 1) -> Any:
        """Loads lanes / repeat numbers of a dtype and repeats each: float32 <lanes>."""
        spread = [i // repeat for i in range(lanes)]
        if kind == "float32":
            return self.shuffle(self.load(address, F32, lanes // repeat, 4), spread)
        wide = ir.VectorType(I32, lanes)
        h = self.b.zext(self.shuffle(self.load(address, I16, lanes // repeat, 2), spread), wide)
        if kind == "bfloat16":
            return self.b.bitcast(self.b.shl(h, self.splat(16, wide)), ir.VectorType(F32, lanes))
        # float16: move exponent and mantissa into place and correct the exponent's bias by a multiplication,
        # which is right for subnormals too; infinity and NaN need the float32 exponent's top bits set.
        magnitude = self.b.and_(h, self.splat(0x7FFF, wide))
        moved = self.b.bitcast(self.b.shl(magnitude, self.splat(13, wide)), ir.VectorType(F32, lanes))
        value = self.b.bitcast(self.b.fmul(moved, self.splat(2.0**112, moved.type)), wide)
        special = self.b.icmp_unsigned(">=", magnitude, self.splat(0x7C00, wide))
        value = self.b.select(special, self.b.or_(value, self.splat(0x7F800000, wide)), value)
        sign = self.b.shl(self.b.and_(h, self.splat(0x8000, wide)), self.splat(16, wide))
        return self.b.bitcast(self.b.or_(value, sign), ir.VectorType(F32, lanes))

    def total(self, v: Any) -> Any:
        """Sum of the lanes, halves onto halves."""
        while v.type.count > 1:
            half = v.type.count // 2
            low, high = list(range(half)), list(range(half, 2 * half))
            v = self.b.fadd(self.shuffle(v, low), self.shuffle(v, high))
        return self.b.extract_element(v, ir.Constant(I32, 0))

    def unpack(self, words: list[Any], bits: int, place: tuple[int, int, bool, bool]) -> Any:
        """Value number j of ``lanes`` units, as float32."""
        word, shift, straddles, stands = place
        v, kind = words[word], words[word].type
        mask = (1 << bits) - 1
        if stands:
            v = self.b.and_(v, self.splat(mask << shift, kind))
        else:
            v = self.b.lshr(v, self.splat(shift, kind))
            if straddles:
                rest = self.b.shl(words[word + 1], self.splat(32 - shift, kind))
                v = self.b.and_(self.b.or_(v, rest), self.splat(mask, kind))
        return self.b.sitofp(v, ir.VectorType(F32, kind.count))


@intrinsic(prefer_literal=True)
def _tile(  # type: ignore[no-untyped-def]
    typing, bits, group, kind, lanes, group_lanes, counts, matrix, inputs, output, columns, sources, targets
):
    """out[targets[r], columns[o]] = row columns[o] of the weights times row sources[r] of x, for all r and o.

    ``bits``, ``group``, ``kind`` (a dtype's name), ``lanes`` and ``group_lanes`` are constants, ``counts``
    (units, groups) of a weight row. Addresses, and bytes from row to row: ``matrix`` (weights, their stride,
    scales, biases, their stride), ``inputs`` (x as :func:`_arranger` lays it out, its stride, its sums by group,
    their stride), ``output`` (out, its stride). The rest are tuples of row or column numbers.
    """
    b, g, k = bits.literal_value, group.literal_value, kind.literal_value
    n, gn = lanes.literal_value, group_lanes.literal_value
    o_count, r_count = columns.count, sources.count
    signature = types.void(
        bits, group, kind, lanes, group_lanes, counts, matrix, inputs, output, columns, sources, targets
    )

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        unpacked = [cgutils.unpack_tuple(builder, a) for a in args[5:]]
        (n_units, n_groups), (w0, w_row, s0, z0, s_row), (x0, x_row, sum0, sum_row), (out0, out_row) = (
            unpacked[:4]
        )
        columns, sources, targets = unpacked[4:]

        def along(base, stride, indices):  # type: ignore[no-untyped-def]
            return [builder.add(base, builder.mul(stride, i)) for i in indices]

        w, s, z = along(w0, w_row, columns), along(s0, s_row, columns), along(z0, s_row, columns)
        x, sx = along(x0, x_row, sources), along(sum0, sum_row, sources)
        e = _Emitter(builder)
        vector = ir.VectorType(F32, n)
        tiles = [(r, o) for r in range(r_count) for o in range(o_count)]
        totals = {t: cgutils.alloca_once_value(builder, e.splat(0.0, vector)) for t in tiles}

        def at(base, index, size):  # type: ignore[no-untyped-def]
            return builder.add(base, builder.mul(index, ir.Constant(I64, size)))

        step = ir.Constant(I64, n)
        with cgutils.for_range_slice(builder, ir.Constant(I64, 0), n_units, step, intp=I64) as (u, _):
            if b == 16:
                size = 4 if k == "float32" else 2
                for o in range(o_count):
                    value = e.floats(at(w[o], u, size), k, n)
                    for r in range(r_count):
                        xv = e.load(at(x[r], u, 4), F32, n, 4)
                        builder.store(e.fma(value, xv, builder.load(totals[r, o])), totals[r, o])
            else:
                n_words, _ = unit_of(b)
                words = []
                for o in range(o_count):
                    here = at(w[o], u, 4 * n_words)
                    loaded = e.load(here, I32, n * n_words, 4)
                    e.prefetch(builder.add(here, ir.Constant(I64, PREFETCH)))
                    words.append(
                        [e.shuffle(loaded, list(range(i, n * n_words, n_words))) for i in range(n_words)]
                    )
                partial = {}
                for j, place in enumerate(_places(b)):
                    q = [e.unpack(words[o], b, place) for o in range(o_count)]
                    offset = builder.add(u, builder.mul(n_units, ir.Constant(I64, j)))
                    for r in range(r_count):
                        xv = e.load(at(x[r], offset, 4), F32, n, 4)
                        for o in range(o_count):
                            t = (r, o)
                            partial[t] = e.fma(q[o], xv, partial[t]) if j else builder.fmul(q[o], xv)
                repeat = g // unit_of(b)[1]  # units to a group
                size = 4 if k == "float32" else 2
                for o in range(o_count):
                    first = builder.udiv(u, ir.Constant(I64, repeat))
                    scale = e.floats(at(s[o], first, size), k, n, min(repeat, n))
                    for r in range(r_count):
                        t = (r, o)
                        builder.store(e.fma(scale, partial[t], builder.load(totals[t])), totals[t])
        shifts = {}
        if b != 16:
            like = ir.VectorType(F32, gn)
            shifts = {t: cgutils.alloca_once_value(builder, e.splat(0.0, like)) for t in tiles}
            size = 4 if k == "float32" else 2
            step = ir.Constant(I64, gn)
            with cgutils.for_range_slice(builder, ir.Constant(I64, 0), n_groups, step, intp=I64) as (i, _):
                for o in range(o_count):
                    bias = e.floats(at(z[o], i, size), k, gn)
                    for r in range(r_count):
                        t = (r, o)
                        sv = e.load(at(sx[r], i, 4), F32, gn, 4)
                        builder.store(e.fma(bias, sv, builder.load(shifts[t])), shifts[t])
        out = along(out0, out_row, targets)
        for r, o in tiles:
            result = e.total(builder.load(totals[r, o]))
            if shifts:
                result = builder.fadd(result, e.total(builder.load(shifts[r, o])))
            pointer = builder.inttoptr(at(out[r], columns[o], 4), F32.as_pointer())
            builder.store(result, pointer, align=4)
        return context.get_dummy_value()

    return signature, codegen


# ---------------------------------------------------------------------------------------------- numba kernels


def compile_kernel(
    signature: str, function: Callable[..., None], allow: Collection[str] = ()
) -> Callable[..., None]:
    """Compiles ahead of the first call, cached on disk where some folder can be written.

    Args:
        allow: what LLVM may do to floating-point arithmetic; by default nothing.
    """
    options: dict[str, Any] = {"nogil": True, "fastmath": set(allow)}
    try:
        return njit(signature, cache=True, **options)(function)
    except RuntimeError:  # numba found no folder to cache in
        return njit(signature, **options)(function)


@lru_cache
def _projector(bits: int, group: int, kind: str, lanes: int, group_lanes: int) -> Callable[..., None]:
    """The kernel of one format of weights: out = x @ dequantized(weights).T for runs of rows."""
    n_words, per_unit = (1, 1) if bits == 16 else unit_of(bits)
    unit_bytes = 4 * n_words if bits != 16 or kind == "float32" else 2
    scale_bytes = 4 if kind == "float32" else 2
    divisor = group or 1
    tile_rows, row_block = TILE_ROWS, ROW_BLOCK

    def project(weights, scales, biases, starts, order, x, sums, in_dims, out, low, high):  # type: ignore[no-untyped-def]
        """Computes tiles [low, high) of all: tile i is block i % blocks of TILE_OUTPUTS outputs of run i // blocks.

        weights, scales, biases: int64 [runs] addresses; starts: int64 [runs + 1] into order and out;
        order: int64 [P] row of x of each row of out; x, sums: float32 arranged; out: float32 [P, out_dims].
        """
        out_dims = out.shape[1]
        blocks = (out_dims + 3) // 4
        counts = (in_dims // per_unit, in_dims // divisor)
        w_row, s_row = counts[0] * unit_bytes, counts[1] * scale_bytes
        inputs = (x.ctypes.data, x.shape[1] * 4, sums.ctypes.data, sums.shape[1] * 4)
        output = (out.ctypes.data, out_dims * 4)
        while low < high:
            run = low // blocks
            block = low - run * blocks
            stop = min(blocks, block + high - low)
            matrix = (weights[run], w_row, scales[run], biases[run], s_row)
            p = starts[run]
            while p < starts[run + 1]:
                last = min(p + row_block, starts[run + 1]) - 1
                for i in range(block, stop):
                    # What a tile lacks at the end repeats its last row or column: the same number stored twice.
                    end = out_dims - 1
                    o = i * 4
                    columns = (o, min(o + 1, end), min(o + 2, end), min(o + 3, end))
                    for r in range(p, last + 1, tile_rows):
                        if r == last:
                            for column in range(o, columns[3] + 1):
                                _tile(
                                    bits, group, kind, lanes, group_lanes, counts, matrix, inputs, output,
                                    (column,), (order[r],), (r,),
                                )  # fmt: skip
                        elif tile_rows == 4:
                            r1, r2, r3 = r + 1, min(r + 2, last), min(r + 3, last)
                            _tile(
                                bits, group, kind, lanes, group_lanes, counts, matrix, inputs, output,
                                columns, (order[r], order[r1], order[r2], order[r3]), (r, r1, r2, r3),
                            )  # fmt: skip
                        else:
                            _tile(
                                bits, group, kind, lanes, group_lanes, counts, matrix, inputs, output,
                                columns, (order[r], order[r + 1]), (r, r + 1),
                            )  # fmt: skip
                p = last + 1
            low += stop - block

    ints, floats = "int64[::1]", "float32[:, ::1]"
    return compile_kernel(
        f"void({ints}, {ints}, {ints}, {ints}, {ints}, {floats}, {floats}, int64, {floats}, int64, int64)",
        project,
    )


@lru_cache
def _arranger() -> Callable[..., None]:
    def arrange(x, factors, group, arranged, sums, low, high):  # type: ignore[no-untyped-def]
        """Rows [low, high) of x laid out for :func:`_tile`: value j of unit u at [j * units + u], times factor j;
        and their sums by group."""
        values = factors.shape[0]
        units = x.shape[1] // values
        for r in range(low, high):
            source, target = x[r].reshape(units, values), arranged[r].reshape(values, units)
            for j in range(values):
                factor = factors[j]
                for u in range(units):
                    target[j, u] = source[u, j] * factor
            grouped = x[r].reshape(sums.shape[1], group // 4, 4)
            for g in range(sums.shape[1]):
                a, b, c, d = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
                for i in range(group // 4):
                    a += grouped[g, i, 0]
                    b += grouped[g, i, 1]
                    c += grouped[g, i, 2]
                    d += grouped[g, i, 3]
                sums[r, g] = (a + b) + (c + d)

    floats = "float32[:, ::1]"
    return compile_kernel(f"void({floats}, float32[::1], int64, {floats}, {floats}, int64, int64)", arrange)


@lru_cache
def _addresser() -> Callable[..., None]:
    def addresses(weights, scales, biases, out):  # type: ignore[no-untyped-def]
        """out[0 to 2, 0] = where the three begin: what numpy takes several microseconds each to say."""
        out[0, 0], out[1, 0], out[2, 0] = weights.ctypes.data, scales.ctypes.data, biases.ctypes.data

    return compile_kernel("void(uint8[::1], uint8[::1], uint8[::1], int64[:, ::1])", addresses)


@lru_cache
def _combiner() -> Callable[..., None]:
    def combine(pairs, position, weights, out):  # type: ignore[no-untyped-def]
        """out[t] = sum over k, in order, of weights[t, k] * pairs[position[t * K + k]]."""
        top_k = weights.shape[1]
        for t in range(out.shape[0]):
            out[t, :] = np.float32(0)
            for k in range(top_k):
                p, w = position[t * top_k + k], weights[t, k]
                for i in range(out.shape[1]):
                    out[t, i] += w * pairs[p, i]

    floats = "float32[:, ::1]"
    return compile_kernel(f"void({floats}, int64[::1], {floats}, {floats})", combine)


# ---------------------------------------------------------------------------------------------- threads


CPUS = system.usable_processors()
THREADS = min(len(CPUS), 16)


@lru_cache
def _pool() -> Threads:
    homes = iter(CPUS)

    def settle() -> None:
        # Linux wakes a thread where its waker runs: workers would share a core for a call's first milliseconds,
        # which is most of it. With fewer threads than processors it has better choices than the first few.
        if len(CPUS) == THREADS:
            system.stay_on(next(homes))

    return Threads(THREADS, "flashmoe-cpu", settle)


# A forked child has none of the pool's threads.
os.register_at_fork(after_in_child=_pool.cache_clear)


def split(work: Callable[[int, int], None], bounds: list[int]) -> None:
    """Runs work(low, high) for every pair of neighbouring bounds: on this thread if there is one, else on all of
    the pool while this one sleeps, so that no worker finds its core taken.

    After Ctrl-C workers go on for a piece each: ``work`` must hold on to the arrays whose addresses it was given.
    """
    pieces = [(a, b) for a, b in pairwise(bounds) if a < b]
    if len(pieces) <= 1 or THREADS == 1:
        for piece in pieces:
            work(*piece)
        return
    helpers = min(THREADS, len(pieces))
    shared = Shared(work, pieces, helpers)
    _pool().help(shared.drain, helpers)
    shared.wait()


# ---------------------------------------------------------------------------------------------- the calls


def _lanes(count: int, most: int) -> int:
    """The largest power of two that divides count, up to most: vectors never hang over a row's end."""
    return min(count & -count, most)


def _aligned(rows: int, columns: int) -> np.ndarray:
    """float32 [rows, columns]; from a cache line's start on, since a vector astride two lines takes two loads,
    unless the rows are so short that finding the address takes longer."""
    if columns < 1024:
        return np.empty((rows, columns), np.float32)
    line = 16
    flat = np.empty(rows * columns + line, np.float32)
    first = -(flat.ctypes.data // 4) % line
    return flat[first : first + rows * columns].reshape(rows, columns)


def _swiglu(gate: np.ndarray, up: np.ndarray) -> None:
    """gate = silu(gate) * up, in place. numpy's float32 exp is vectorized, a compiled loop's is not."""
    e = np.negative(gate)
    with np.errstate(over="ignore"):  # gate / infinity is what silu comes to
        np.exp(e, out=e)
    e += 1
    gate /= e
    gate *= up


class _Matrix:
    """A projection's kernel and where its parts are in a blob."""

    def __init__(self, projection: Projection) -> None:
        self.out_dims, self.in_dims = projection.out_dims, projection.in_dims
        self.bits, self.group = projection.bits, projection.group_size
        scales, biases = projection.scales, projection.biases
        quantized = scales is not None and biases is not None
        self.kind = (scales or projection.weight).dtype
        self.groups = self.in_dims // self.group if quantized else 0
        self.bias = projection.bias
        self.factors = _factors(self.bits)
        per_unit = unit_of(self.bits)[1] if quantized else 1
        self.offsets = (
            projection.weight.offset,
            scales.offset if scales else 0,
            biases.offset if biases else 0,
        )
        self.project = _projector(
            self.bits,
            self.group,
            self.kind,
            _lanes(self.in_dims // per_unit, MAX_LANES),
            _lanes(self.groups, MAX_LANES) if quantized else 1,
        )

    def arrange(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """x float32 [rows, in_dims] -> the same numbers as the kernel reads them, and their sums by group."""
        if self.bits == 16:
            return x, np.empty((1, 1), np.float32)
        rows, arrange = x.shape[0], _arranger()
        arranged, sums = _aligned(rows, self.in_dims), np.empty((rows, self.groups), np.float32)
        if 4 * x.size < SMALL:  # a number takes about as long to arrange as to multiply with four weights
            arrange(x, self.factors, self.group, arranged, sums, 0, rows)
            return arranged, sums
        step = -(-rows // (THREADS * CHUNKS_PER_THREAD))
        split(
            lambda low, high: arrange(x, self.factors, self.group, arranged, sums, low, high),
            [*range(0, rows, step), rows],
        )
        return arranged, sums

    def add_bias(self, memory: np.ndarray, slots: np.ndarray, starts: np.ndarray, out: np.ndarray) -> None:
        """Adds the linear bias of slot slots[r] to the rows of run r."""
        if self.bias is None:
            return
        first, last = self.bias.offset, self.bias.offset + self.bias.nbytes
        for slot, start, stop in zip(slots, starts, starts[1:]):
            out[start:stop] += _floats(memory[slot].view(np.uint8)[first:last], self.bias.dtype)


@lru_cache
def _matrices(layout: BlobLayout) -> tuple[_Matrix | None, _Matrix, _Matrix]:
    gate = None if layout.gate is None else _Matrix(layout.gate)
    return gate, _Matrix(layout.up), _Matrix(layout.down)


def _each_tile(starts: np.ndarray, m: _Matrix, work: Callable[[int, int], None]) -> None:
    """Runs work(low, high) over all tiles of the runs that begin at ``starts``, in shares of equal cost."""
    blocks = -(-m.out_dims // TILE_OUTPUTS)
    if int(starts[-1]) * m.in_dims * m.out_dims < SMALL:
        work(0, (len(starts) - 1) * blocks)
        return
    # A run costs what its tiles cost: a full tile does the work of two single rows in this machine's registers.
    costs = np.concatenate([[0], np.cumsum(1 + np.diff(starts) // TILE_ROWS)])
    shares = np.linspace(0, costs[-1], THREADS * CHUNKS_PER_THREAD + 1)
    tiles = np.arange(starts.shape[0], dtype=np.float64) * blocks
    split(work, np.interp(shares, costs, tiles).astype(np.int64).tolist())


def _pairs(
    x: np.ndarray,
    order: np.ndarray,
    slab: mx.array,
    slots: np.ndarray,
    layout: BlobLayout,
    activation: Activation = None,
) -> np.ndarray:
    """The experts of rows in runs: float32 [P, D], row p = expert slots[p] of x[order[p]].

    x: float32 [rows, D]; order: int64 [P]; slots: [P], equal entries adjacent.
    """
    gate, up, down = _matrices(layout)
    memory = np.asarray(slab)
    if slots.min() < 0 or slots.max() >= memory.shape[0]:
        raise ValueError(
            f"[expert_ffn] slots from {slots.min()} to {slots.max()} in a slab of {memory.shape[0]}"
        )
    starts = np.flatnonzero(np.concatenate([[True], slots[1:] != slots[:-1], [True]]))
    experts = slots[starts[:-1]].astype(np.int64)
    blobs = memory.ctypes.data + experts * memory.strides[0]

    def bind(
        m: _Matrix, rows: np.ndarray, a: tuple[np.ndarray, np.ndarray], out: np.ndarray
    ) -> Callable[[int, int], None]:
        w, s, z = (blobs + offset for offset in m.offsets)

        def project(low: int, high: int, alive: np.ndarray = memory) -> None:
            m.project(w, s, z, starts, rows, *a, m.in_dims, out, low, high)

        return project

    arranged = up.arrange(x)
    u = np.empty((order.shape[0], up.out_dims), np.float32)
    into_u = bind(up, order, arranged, u)
    if gate is None:
        _each_tile(starts, up, into_u)
    else:
        same = (gate.bits, gate.group) == (up.bits, up.group)
        h = np.empty_like(u)
        into_h = bind(gate, order, arranged if same else gate.arrange(x), h)

        def hidden(low: int, high: int) -> None:
            into_h(low, high)
            into_u(low, high)

        _each_tile(starts, gate, hidden)
        gate.add_bias(memory, experts, starts, h)
    up.add_bias(memory, experts, starts, u)
    if gate is not None and activation is None:
        _swiglu(h, u)
    else:
        h = _float32(activate(mx.array(u), None if gate is None else mx.array(h), activation))
    inner = down.arrange(h)
    y = np.empty((order.shape[0], down.out_dims), np.float32)
    each = np.arange(order.shape[0], dtype=np.int64)
    _each_tile(starts, down, bind(down, each, inner, y))
    down.add_bias(memory, experts, starts, y)
    return y


def _floats(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Bytes of numbers of a dtype -> the numbers, float32."""
    if dtype == "bfloat16":  # which numpy does not know
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return raw.view(dtype).astype(np.float32, copy=False)


def _float32(x: mx.array) -> np.ndarray:
    """x evaluated, as a contiguous float32 array; its memory aliased where it is one already.

    Numpy, not MLX, converts and reshapes: each evaluation wakes MLX's thread, which costs more than a small product.
    """
    if x.dtype == mx.bfloat16:
        if not memoryview(x).c_contiguous:  # type: ignore[arg-type]
            x = mx.contiguous(x)
        return _floats(np.frombuffer(x, np.uint8), "bfloat16").reshape(x.shape)  # type: ignore[call-overload]
    return np.ascontiguousarray(np.asarray(x), dtype=np.float32)


def expert_rows(
    x: mx.array, slab: mx.array, slots: mx.array, layout: BlobLayout, activation: Activation = None
) -> mx.array:
    """See :func:`mlx_flashmoe.kernels.expert_rows`; here a row's bits do not even depend on its run. Eager."""
    ids = np.asarray(slots)
    if not ids.size:
        return mx.zeros((0, layout.hidden_size))
    return mx.array(_pairs(_float32(x), np.arange(ids.size), slab, ids, layout, activation))


def expert_ffn(
    x: mx.array, slab: mx.array, slots: mx.array, weights: mx.array, layout: BlobLayout
) -> mx.array:
    """See :func:`mlx_flashmoe.kernels.expert_ffn`. Eager."""
    mx.eval(x, slots, weights)  # at once: each evaluation costs
    tokens = slots.shape[0]
    if not slots.size:
        return mx.zeros((tokens, layout.hidden_size), dtype=x.dtype)
    pairs, position = _of_tokens(x, slab, slots, layout)
    y = np.empty((tokens, layout.hidden_size), np.float32)
    _combiner()(pairs, position, _float32(weights), y)
    return mx.array(y).astype(x.dtype)


def expert_outputs(
    x: mx.array, slab: mx.array, slots: mx.array, layout: BlobLayout, activation: Activation = None
) -> mx.array:
    """See :func:`mlx_flashmoe.kernels.expert_outputs`. Eager."""
    mx.eval(x, slots)
    pairs, position = _of_tokens(x, slab, slots, layout, activation)
    return mx.array(pairs[position].reshape(*slots.shape, layout.hidden_size)).astype(x.dtype)


def _of_tokens(
    x: mx.array, slab: mx.array, slots: mx.array, layout: BlobLayout, activation: Activation = None
) -> tuple[np.ndarray, np.ndarray]:
    """The experts of tokens: float32 [T * K, D] in order of their slots, and where token t's number k is in it."""
    ids = np.asarray(slots).reshape(-1)
    order = np.argsort(ids, kind="stable")
    pairs = _pairs(_float32(x), order // slots.shape[-1], slab, ids[order], layout, activation)
    position = np.empty_like(order)
    position[order] = np.arange(order.size)
    return pairs, position


@lru_cache
def _dense_matrix(out_dims: int, in_dims: int, bits: int, group_size: int, kind: str) -> _Matrix:
    weight = Component("uint32", (out_dims, in_dims * bits // 32), 0)
    groups = Component(kind, (out_dims, in_dims // group_size), 0)
    return _Matrix(Projection(out_dims, in_dims, bits, group_size, weight, groups, groups))


def quantized_matmul(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int
) -> mx.array:
    """See :func:`mlx_flashmoe.kernels.quantized_matmul`; a row's bits do not depend on the others. Eager."""
    rows = _float32(x).reshape(-1, x.shape[-1])
    out_dims = weight.shape[0]
    if biases.dtype != scales.dtype:
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    m = _dense_matrix(out_dims, rows.shape[1], bits, group_size, KINDS[scales.dtype])
    # The arrays' own memory, whatever their dtype: a conversion by MLX would be an evaluation each.
    parts = [np.frombuffer(a, np.uint8) for a in (weight, scales, biases)]  # type: ignore[call-overload]
    w, s, z = matrix = np.empty((3, 1), np.int64)
    _addresser()(*parts, matrix)
    starts = np.array([0, rows.shape[0]])
    order = np.arange(rows.shape[0])
    arranged, sums = m.arrange(rows)
    y = np.empty((rows.shape[0], out_dims), np.float32)

    def project(low: int, high: int, alive: list[np.ndarray] = parts) -> None:
        m.project(w, s, z, starts, order, arranged, sums, m.in_dims, y, low, high)

    _each_tile(starts, m, project)
    return mx.array(y.reshape(*x.shape[:-1], out_dims)).astype(x.dtype)
