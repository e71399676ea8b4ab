"""What a conversion will write: the quantization of every module, the blob layouts, the dense files.

Decided completely, and refused if it cannot be done, before a single byte is written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from mlx_flashmoe.convert.binding import NONE, Bound, Dense, Experts, Matrix
from mlx_flashmoe.convert.recipe import Recipe
from mlx_flashmoe.convert.safetensors import DTYPE_BITS, build_header
from mlx_flashmoe.errors import ConversionError, SourceError
from mlx_flashmoe.layout import BITS, GROUP_SIZES, PAGE, UNQUANTIZED, BlobLayout, Quantization
from mlx_flashmoe.sizes import counted, show_size

DEFAULT = Quantization(4, 64)
ROUTER = Quantization(8, 64)  # what mlx-lm gives routers and shared-expert gates, whatever was asked
DENSE_FILE_BYTES = 4 << 30
LAYOUT_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True)
class Asked:
    """What was asked of some matrices, made complete by what the checkpoint is.

    Attributes:
        target: what they become; None keeps them as published.
        group_given: the user named the group size, rather than leaving it to the checkpoint or the default.
    """

    target: Quantization | None
    group_given: bool

    @classmethod
    def resolve(cls, q_bits: int | None, q_group_size: int | None, published: Quantization | None) -> Asked:
        """Raises ConversionError for what the checkpoint cannot give."""
        if q_bits == UNQUANTIZED:
            return cls(None, False)
        if published is None:
            return cls(Quantization(q_bits or DEFAULT.bits, q_group_size or DEFAULT.group_size), True)
        if q_bits is not None and q_bits > published.bits:
            raise ConversionError(
                f"the checkpoint is quantized at {published.bits} bits already: {q_bits} bits cannot bring back what "
                f"is lost; ask for {published.bits} or fewer (--q-bits, --q-bits-gate-up, --q-bits-down), or for none "
                "to repack it as it is"
            )
        if q_bits is None or q_bits == published.bits:
            if q_group_size not in (None, published.group_size):
                raise ConversionError(
                    f"the checkpoint is quantized at {published.bits} bits in groups of {published.group_size} "
                    "already, and is never quantized again at the same bits: leave --q-group-size "
                    f"{q_group_size} out"
                )
            return cls(None, False)
        return cls(Quantization(q_bits, q_group_size or published.group_size), q_group_size is not None)

    def choose(self, matrix: Matrix, router: bool) -> Quantization:
        """What becomes of a matrix; the answer may be a group size that does not divide its inputs."""
        has = matrix.quantization
        if self.target is None:
            return has
        want = ROUTER if router else self.target
        if not has.quantized:
            return want
        if has.bits <= want.bits:
            return has
        return want if self.group_given else Quantization(want.bits, has.group_size)


@dataclass(frozen=True)
class DensePlan:
    """One dense module, and the quantization it will have."""

    dense: Dense
    quantization: Quantization
    outputs: tuple[tuple[str, str, tuple[int, ...]], ...]  # (name, safetensors dtype, shape), as written
    nbytes: int

    @property
    def path(self) -> str:
        return self.dense.name.removesuffix(".weight")


@dataclass(frozen=True)
class DenseFile:
    """One safetensors file of the dense part."""

    name: str
    modules: list[DensePlan]
    header: bytes

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(m.nbytes for m in self.modules)


@dataclass(frozen=True)
class LayerPlan:
    """One layer's experts, and the layout of its blobs. ``layout`` is an index into ``Plan.layouts``."""

    experts: Experts
    layout: int
    quantization: dict[str, Quantization]
    source_bytes: int  # of one expert

    def choices(self) -> Iterator[tuple[Matrix, Quantization]]:
        """An expert's matrices, standing for all, and what becomes of them."""
        for name, matrix in self.experts.expert(0).items():
            yield matrix, self.quantization[name]


@dataclass
class Plan:
    """Everything that will be written, and the lines a user should read about it."""

    dense: list[DenseFile]
    layers: list[LayerPlan]
    layouts: list[BlobLayout]
    notes: list[str] = field(default_factory=list)

    @property
    def dense_bytes(self) -> int:
        return sum(f.nbytes for f in self.dense)

    @property
    def expert_bytes(self) -> int:
        return sum(p.experts.num_experts * self.layouts[p.layout].blob_size for p in self.layers)

    @property
    def source_bytes(self) -> int:
        """Bytes of the checkpoint that will be read."""
        dense = sum(m.dense.matrix.nbytes for f in self.dense for m in f.modules)
        return dense + sum(p.experts.num_experts * p.source_bytes for p in self.layers)

    @property
    def quantizes(self) -> bool:
        """Whether any expert is more than copied."""
        return any(m.quantization != q or m.fp8 for p in self.layers for m, q in p.choices())

    def modules(self) -> Iterator[DensePlan]:
        for file in self.dense:
            yield from file.modules


def make_plan(bound: Bound, recipe: Recipe) -> Plan:
    """Decides what will be written.

    Raises:
        ConversionError: what was asked does not fit the checkpoint.
        SourceError: the checkpoint has a quantization that the runtime does not know.
    """
    asked = Asked.resolve(recipe.model.bits, recipe.model.group_size, bound.published)
    unknown = sorted(recipe.layers.keys() - {e.layer for e in bound.layers})
    if unknown:
        raise ConversionError(
            f"the recipe names layer {unknown[0]}, but the checkpoint has experts in layers "
            f"{bound.layers[0].layer} to {bound.layers[-1].layer}"
        )
    notes = list(bound.notes)
    if bound.left_out:
        listed = ", ".join(f"{n} of {name}" for name, n in bound.left_out.items())
        notes.append(
            f"left out, not used for text: {counted(sum(bound.left_out.values()), 'tensor')} ({listed})"
        )

    uneven: list[str] = []
    modules = [_dense(d, asked, uneven) for d in bound.dense]
    if uneven:
        named = ", ".join(uneven[:3]) + (", …" if len(uneven) > 3 else "")
        notes.append(
            f"kept as published, the group size does not divide their inputs: {len(uneven)} ({named})"
        )

    layouts: list[BlobLayout] = []
    layers = [_layer(e, recipe, bound, layouts) for e in bound.layers]
    plan = Plan(_dense_files(modules), layers, layouts, notes)
    sizes = sorted({layout.blob_size for layout in layouts})
    kept = [(m.dense.matrix, m.quantization) for m in plan.modules()]
    if any(m.fp8 and not q.quantized for m, q in [*kept, *(c for p in layers for c in p.choices())]):
        notes.append("FP8 that is not quantized becomes bfloat16")
    most = max(e.num_experts for e in bound.layers)
    notes.append(
        f"{counted(len(layers), 'layer')} of {counted(most, 'expert')}: {_bits(layers)}; "
        f"{' or '.join(f'{size:,}' for size in sizes)} bytes per expert: "
        f"{show_size(plan.expert_bytes)} of experts, {show_size(plan.dense_bytes)} of everything else"
    )
    if sizes[0] == PAGE:
        notes.append(
            f"an expert is padded to a multiple of {PAGE:,} bytes: fewer bits do not make one of {PAGE:,} smaller"
        )
    return plan


def _bits(layers: list[LayerPlan]) -> str:
    """Words for the experts' quantization: what most layers have, then the layers that have something else."""
    having: dict[str, list[int]] = {}
    for p in layers:
        having.setdefault(_projections(p.quantization), []).append(p.experts.layer)
    (most, _), *others = sorted(having.items(), key=lambda item: -len(item[1]))
    words = [f"{'layer' if len(ns) == 1 else 'layers'} {_as_ranges(ns)} {bits}" for bits, ns in others]
    return "; ".join([most, *words])


def _projections(quantization: dict[str, Quantization]) -> str:
    """Words for one layer's: "gate and up 4 bits, down 6 bits, in groups of 64"."""
    having: dict[Quantization, list[str]] = {}
    for name, q in quantization.items():
        having.setdefault(q, []).append(name)
    groups = {q.group_size for q in having}
    shared = groups.pop() if len(groups) == 1 else 0
    words = []
    for q, names in having.items():
        bits = f"{q.bits} bits" if q.quantized else "as published, unquantized"
        bits += f" in groups of {q.group_size}" if q.quantized and (not shared or len(having) == 1) else ""
        words.append(bits if len(having) == 1 else f"{' and '.join(names)} {bits}")
    return ", ".join(words) + (f", in groups of {shared}" if shared and len(having) > 1 else "")


def _as_ranges(numbers: list[int]) -> str:
    """Ascending numbers as a recipe names them: "0-2,59"."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def _listed(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values))


def _known(matrix: Matrix, quantization: Quantization) -> Quantization:
    if quantization.quantized and quantization.bits not in BITS:
        raise SourceError(
            f"{matrix.weight} is quantized at {quantization.bits} bits; {_listed(BITS)} are supported (fewer bits can "
            "be asked for with --q-bits)"
        )
    return quantization


def _dense(dense: Dense, asked: Asked, uneven: list[str]) -> DensePlan:
    name, matrix = dense.name, dense.matrix
    chosen = matrix.quantization
    if dense.kind in ("linear", "router"):
        chosen = asked.choose(matrix, dense.kind == "router")
        if chosen.quantized and dense.shape[-1] % chosen.group_size:
            uneven.append(name.removesuffix(".weight"))
            chosen = matrix.quantization
    elif dense.kind == "gate":
        chosen = NONE
    if _known(matrix, chosen).quantized:
        *rows, columns = dense.shape
        groups = (*rows, columns // chosen.group_size)
        path = name.removesuffix(".weight")
        outputs: tuple[tuple[str, str, tuple[int, ...]], ...] = (
            (name, "U32", (*rows, columns * chosen.bits // 32)),
            (f"{path}.scales", matrix.dtype, groups),
            (f"{path}.biases", matrix.dtype, groups),
        )
    elif dense.kind == "norm" or (dense.kind == "gate" and matrix.quantization.quantized):
        outputs = ((name, "F32", dense.shape),)
    else:
        outputs = ((name, matrix.dtype, dense.shape),)

    return DensePlan(dense, chosen, outputs, sum(_nbytes(dtype, shape) for _, dtype, shape in outputs))


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * DTYPE_BITS[dtype] // 8


def _layer(experts: Experts, recipe: Recipe, bound: Bound, layouts: list[BlobLayout]) -> LayerPlan:
    first = experts.expert(0)
    chosen = {}
    for p, matrix in first.items():
        bits, group_size = recipe.layer(experts.layer).projection(p)
        asked = Asked.resolve(bits, group_size, bound.published)
        q = chosen[p] = _known(matrix, asked.choose(matrix, router=False))
        if q.quantized and matrix.in_dims % q.group_size:
            fitting = [g for g in GROUP_SIZES if not any(m.in_dims % g for m in first.values())]
            hint = f"--q-group-size {_listed(tuple(fitting))} would" if fitting else "only --q-bits 16 would"
            raise ConversionError(
                f"group size {q.group_size} does not divide the {matrix.in_dims} inputs of the experts' {p}_proj "
                f"(layer {experts.layer}); {hint}"
            )
    dtypes = {p: LAYOUT_DTYPES[matrix.dtype] for p, matrix in first.items()}
    biases = {p: LAYOUT_DTYPES[m.bias.dtype] for p, m in first.items() if m.bias is not None}
    layout = BlobLayout.build(first["up"].in_dims, first["down"].in_dims, chosen, dtypes, biases)
    if layout not in layouts:
        layouts.append(layout)
    return LayerPlan(experts, layouts.index(layout), chosen, sum(m.nbytes for m in first.values()))


def _dense_files(modules: list[DensePlan]) -> list[DenseFile]:
    """Fills files of about DENSE_FILE_BYTES, a module's tensors always together."""
    shards: list[list[DensePlan]] = [[]]
    size = 0
    for module in modules:
        if shards[-1] and size + module.nbytes > DENSE_FILE_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(module)
        size += module.nbytes
    n = len(shards)
    names = (
        [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)] if n > 1 else ["model.safetensors"]
    )
    return [
        DenseFile(name, shard, build_header([t for m in shard for t in m.outputs]))
        for name, shard in zip(names, shards)
    ]
