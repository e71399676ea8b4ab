"""Finds every tensor of a model in a checkpoint, under whichever names it was published.

The model's own modules (``mlx_flashmoe.models``) say which tensors there are and what shapes they have. :func:`bind`
finds all of them in a checkpoint, and refuses what is missing, has another shape, or is not part of the model.

Three layouts of the same model are in the wild, told apart by the names of the experts:

    fused       …mlp.experts.gate_up_proj [E, 2I, D] (gate's rows first), …mlp.experts.down_proj [E, D, I]
    per expert  …mlp.experts.E.{gate,up,down}_proj.weight
    stacked     …mlp.switch_mlp.{gate,up,down}_proj.{weight,scales,biases} [E, …], as mlx-lm writes it

The first two are Hugging Face's: there, the RMS norms of some architectures hold weight - 1, and a convolution is
[C, 1, K]. In the third, 1 is added already and a convolution is [C, K, 1].

A matrix of the first two may be in FP8: weight float8 (e4m3), and one scale for each block of 128 x 128, named
``weight_scale_inv`` (``gate_up_proj_scale_inv`` … where experts are fused), or, by compressed-tensors, one for each
row, named ``weight_scale`` [out, 1]: value = weight * scale. Or it is in integers by compressed-tensors, packed as MLX
packs them: ``weight_packed`` [out, in * bits / 32], ``weight_scale`` [out, in / group], and value = (integer - half of
their range) * scale, which is MLX's affine quantization with biases that need not be published.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from reprlib import repr as short
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_flashmoe import models
from mlx_flashmoe.convert.safetensors import Tensor
from mlx_flashmoe.convert.source import Checkpoint
from mlx_flashmoe.errors import FormatError, SourceError
from mlx_flashmoe.external.library import LIBRARIES, find
from mlx_flashmoe.layout import GROUP_SIZES, PROJECTIONS, UNQUANTIZED, Quantization
from mlx_flashmoe.models.decoder import CausalLM
from mlx_flashmoe.models.norm import RMSNorm
from mlx_flashmoe.models.router import Gate

FLOATS = ("BF16", "F16", "F32")
SOURCE_BITS = (2, 3, 4, 5, 6, 8)  # MLX's affine formats; 5 bits can be read, but not kept
FP8, FP8_BLOCK = "F8_E4M3", 128
MANY_MISSING = 10_000  # a config.json may promise millions: no need to name them all
NONE = Quantization(UNQUANTIZED, 0)

# linear: quantized as asked; router: at 8 bits; gate: never, in float32 if it is published quantized; norm: 1 is to be
# added, in float32; conv: to be [C, K, 1]; plain: as published.
Kind = Literal["linear", "router", "gate", "norm", "conv", "plain"]


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix [out, in] (or a stack of them, [E, out, in]) as published: plain, affine quantized, or FP8.

    Attributes:
        biases: None where all are -2 ** (bits - 1) * scale.
        fp8_scale: of an FP8 matrix, one for each block of ``block`` rows and columns.
        skipped: of an FP8 matrix, rows of its first block that are not part of it.
        bias: [out], added to its product; only of experts.
    """

    weight: Tensor
    scales: Tensor | None = None
    biases: Tensor | None = None
    quantization: Quantization = NONE
    fp8_scale: Tensor | None = None
    block: tuple[int, int] = (FP8_BLOCK, FP8_BLOCK)
    skipped: int = 0
    bias: Tensor | None = None

    @property
    def parts(self) -> dict[str, Tensor]:
        named = {
            "weight": self.weight,
            "scales": self.scales,
            "biases": self.biases,
            "fp8_scale": self.fp8_scale,
            "bias": self.bias,
        }
        return {k: t for k, t in named.items() if t is not None}

    @property
    def in_dims(self) -> int:
        columns = self.weight.shape[-1]
        return columns * 32 // self.quantization.bits if self.quantization.quantized else columns

    @property
    def fp8(self) -> bool:
        return self.fp8_scale is not None

    @property
    def symmetric(self) -> bool:
        """Quantized, without biases."""
        return self.quantization.quantized and self.biases is None

    @property
    def dtype(self) -> str:
        """Of the values: the weight's, or the scales' if quantized; FP8 becomes bfloat16."""
        return "BF16" if self.fp8 else (self.scales or self.weight).dtype

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.parts.values())

    def _each(self, cut: Callable[[Tensor], Tensor]) -> Matrix:
        def optional(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else cut(tensor)

        return replace(
            self,
            weight=cut(self.weight),
            scales=optional(self.scales),
            biases=optional(self.biases),
            fp8_scale=optional(self.fp8_scale),
            bias=optional(self.bias),
        )

    def rows(self, start: int, stop: int) -> Matrix:
        if self.fp8_scale is None:
            return self._each(lambda t: t.rows(start, stop))
        first, last, rows = self.skipped + start, self.skipped + stop, self.block[0]
        blocks = self.fp8_scale.rows(first // rows, -(-last // rows))
        return replace(self, weight=self.weight.rows(start, stop), fp8_scale=blocks, skipped=first % rows)

    def at(self, index: int) -> Matrix:
        return self._each(lambda t: t.at(index))


@dataclass(frozen=True)
class DenseModule:
    """One dense parameter of a model. ``path`` is ours, without ``.weight`` unless ``kind`` is plain."""

    path: str
    shape: tuple[int, ...]
    kind: Kind


@dataclass(frozen=True)
class Architecture:
    """What a config.json says a checkpoint consists of."""

    modules: list[DenseModule]
    moe_layers: list[int]
    num_experts: int
    hidden_size: int
    intermediate_size: int
    tied: bool
    unused: tuple[str, ...]
    renamed: dict[str, str]
    refused: dict[str, str]


@dataclass(frozen=True)
class Dense:
    """One dense module found in the checkpoint. ``name`` of its weight is ours, e.g. ``model.norm.weight``."""

    name: str
    kind: Kind
    matrix: Matrix
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Experts:
    """One layer's experts.

    Attributes:
        expert: gives the matrices that an expert has, of gate, up and down.
        module: path of the module of a library's model that holds them; None in a model of ours.
    """

    layer: int
    num_experts: int
    expert: Callable[[int], dict[str, Matrix]]
    module: str | None = None


@dataclass(frozen=True)
class Bound:
    """A checkpoint whose every tensor is accounted for.

    Attributes:
        published: bits and group size that the checkpoint as a whole was quantized with; None if it was not.
        left_out: what of it is not used, e.g. {"mtp.*": 12}.
        library: whose modules the model is made of ("mlx-lm", "mlx-vlm"); None for ours.
        library_version: the version that loaded the checkpoint.
        notes: lines worth reading.
    """

    model_type: str
    dense: list[Dense]
    layers: list[Experts]
    published: Quantization | None
    left_out: dict[str, int]
    library: str | None = None
    library_version: str | None = None
    notes: list[str] = field(default_factory=list)


def describe(model_type: str, config: dict[str, Any], where: str) -> Architecture:
    """Lists what a checkpoint consists of, from the modules of its model; nothing is computed or allocated.

    Raises:
        SourceError: config.json is not what a model of this type has.
    """
    try:
        architecture = models.architecture(model_type)
        settings = architecture.Config.from_dict(config)
        model = architecture.Model(settings, lambda layer: None)
        parameters: list[tuple[str, mx.array]] = tree_flatten(model.parameters())  # type: ignore[assignment]
    except FormatError as e:
        raise SourceError(f"{where.removesuffix('config.json')}{e}") from None
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise SourceError(f"{where}: its sizes are larger than any array can be") from None
    modules = dict(model.named_modules())
    return Architecture(
        modules=[
            _module(model, name, array.shape, modules[name.rpartition(".")[0]]) for name, array in parameters
        ],
        moe_layers=settings.moe_layers,
        num_experts=settings.num_experts,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.moe_intermediate_size,
        tied=settings.tie_word_embeddings,
        unused=model.unused(settings),
        renamed=model.renamed,
        refused=model.refused,
    )


def _module(model: CausalLM, name: str, shape: tuple[int, ...], module: nn.Module) -> DenseModule:
    """One parameter of the model as an entry of the table."""
    path, _, part = name.rpartition(".")
    if part == "weight" and isinstance(module, (nn.Linear, nn.Embedding)):
        return DenseModule(path, shape, "router" if path.rpartition(".")[2] in model.routers else "linear")
    if part == "weight" and isinstance(module, Gate):
        return DenseModule(path, shape, "gate")
    if part == "weight" and isinstance(module, nn.Conv1d):
        return DenseModule(path, shape, "conv")
    if part == "weight" and isinstance(module, RMSNorm) and model.norms_less_one:
        return DenseModule(path, shape, "norm")
    return DenseModule(name, shape, "plain")


def canonical(name: str, renamed: dict[str, str], needed: set[str] | None = None) -> str:
    """A published name as the model has it, without what wraps the language model: ``model.…`` in every layout.

    Args:
        needed: gets the parts of it that were renamed.
    """
    for wrapped in ("model.language_model.", "language_model.model."):
        if name.startswith(wrapped):
            name = "model." + name[len(wrapped) :]
    name = name.removeprefix("language_model.")
    for published, ours in renamed.items():
        if published in name:
            name = name.replace(published, ours)
            if needed is not None:
                needed.add(published)
    return name


def bind(checkpoint: Checkpoint) -> Bound:
    """Accounts for every tensor of a checkpoint.

    Raises:
        SourceError: unsupported model type or quantization; a tensor missing, unknown, of another shape or
            dtype than config.json implies.
    """
    where = str(checkpoint.folder / "config.json")
    model_type = checkpoint.config.get("model_type")
    if not isinstance(model_type, str) or model_type not in models.ARCHITECTURES:
        return _bind_external(checkpoint, where)
    architecture = describe(model_type, checkpoint.config, where)
    # This package cannot compute tensors that were split so, but the library that split them can.
    if any(part in name for name in checkpoint.tensors for part in architecture.refused) and find(
        checkpoint.config
    ):
        return _bind_external(checkpoint, where)
    declared = _Declared.read(checkpoint.config, where, architecture.renamed)
    binder = _Binder(checkpoint, architecture, declared)
    dense = [d for m in architecture.modules if (d := binder.dense(m)) is not None]
    layers = [e for layer in architecture.moe_layers if (e := binder.experts(layer)) is not None]
    binder.finish()
    return Bound(
        model_type=str(model_type),
        dense=dense,
        layers=layers,
        published=binder.published(layers),
        left_out=binder.left_out,
    )


def _bind_external(checkpoint: Checkpoint, where: str) -> Bound:
    """Accounts for the tensors of a model whose architecture is a library's."""
    from mlx_flashmoe.convert import external  # which knows this module

    libraries = find(checkpoint.config, checkpoint.tensors)
    if not libraries:
        missing = [name for name, one in LIBRARIES.items() if not one.installed]
        more = "".join(f"; pip install 'mlx-flashmoe[{name}]' adds those of {name}" for name in missing)
        raise SourceError(
            f"{where}: model_type {short(checkpoint.config.get('model_type'))} is not supported; supported: "
            f"{', '.join(sorted(models.ARCHITECTURES))}{more} (python -m mlx_flashmoe models lists all)"
        )
    # Both may have an architecture, but name its tensors in their own ways, or have only one way to hold experts.
    refused: list[str] = []
    for library in libraries:
        try:
            return external.bind(checkpoint, library, where)
        except SourceError as e:
            refused.append(str(e))
    raise SourceError("; ".join(refused))


@dataclass(frozen=True)
class _Declared:
    """What config.json's ``quantization`` says.

    Attributes:
        default: of MLX's affine quantization.
        exceptions: from it, by module path (ours).
        fp8_by_row: matrices in FP8 have a scale for each row; else for each block.
        packed: of matrices that compressed-tensors has packed.
    """

    where: str
    default: Quantization | None = None
    exceptions: dict[str, Quantization | None] = field(default_factory=dict)
    fp8_by_row: bool = False
    packed: Quantization | None = None

    @classmethod
    def read(cls, config: dict[str, Any], where: str, renamed: dict[str, str]) -> _Declared:
        key = "quantization" if config.get("quantization") else "quantization_config"
        data = config.get(key) or config.get("text_config", {}).get(key)
        if not data:
            return cls(where)
        if not isinstance(data, dict):
            raise SourceError(f"{where}: {key} is not an object")
        if data.get("quant_method") == "fp8" and data.get("fmt", "e4m3") in ("e4m3", "float8_e4m3fn"):
            if data.get("weight_block_size") != [FP8_BLOCK, FP8_BLOCK]:
                raise SourceError(
                    f"{where}: {key}: FP8 in blocks of {short(data.get('weight_block_size'))}; "
                    f"blocks of [{FP8_BLOCK}, {FP8_BLOCK}] are read"
                )
            return cls(where)
        if data.get("quant_method") == "compressed-tensors":
            packed = cls._compressed(data, f"{where}: {key}")
            return cls(where, fp8_by_row=packed is None, packed=packed)
        if "quant_method" in data:
            raise SourceError(
                f"{where}: {key} is {short(data['quant_method'])}; only unquantized checkpoints, FP8 (e4m3) and MLX "
                "affine quantization are read"
            )
        default = cls._one(data, None, f"{where}: {key}")
        exceptions = {
            canonical(path, renamed): cls._one(value, default, f"{where}: {key}: {path}")
            for path, value in data.items()
            if isinstance(value, (dict, bool))
        }
        return cls(where, default, exceptions)

    @staticmethod
    def _compressed(data: dict[str, Any], where: str) -> Quantization | None:
        """How compressed-tensors has packed integers; None if it says FP8 with a scale for each row.

        Raises:
            SourceError: it says anything else, or more than one thing.
        """
        groups = data.get("config_groups")
        groups = list(groups.values()) if isinstance(groups, dict) else []
        said: set[Quantization | None] = set()
        for group in groups or [None]:
            weights = group.get("weights") if isinstance(group, dict) else None
            found = {} if not isinstance(weights, dict) else weights
            kind = tuple(found.get(name) for name in ("type", "num_bits", "strategy"))
            size, symmetric = found.get("group_size"), found.get("symmetric")
            integers = kind in (("int", 4, "group"), ("int", 8, "group")) and symmetric is True
            if data.get("format") == "pack-quantized" and integers and size in GROUP_SIZES:
                said.add(Quantization(int(found["num_bits"]), int(found["group_size"])))
            elif data.get("format") == "float-quantized" and kind == ("float", 8, "channel"):
                said.add(None)
            else:
                raise SourceError(
                    f"{where}: compressed-tensors of format {short(data.get('format'))} with weights of type, bits "
                    f"and strategy {short(kind)}, group_size {short(size)}, symmetric {short(symmetric)}; "
                    "float-quantized ('float', 8, 'channel') is read, and symmetric pack-quantized ('int', 4 or 8, "
                    f"'group') of group sizes {', '.join(map(str, GROUP_SIZES))}"
                )
        if len(said) > 1:
            raise SourceError(
                f"{where}: the config_groups of compressed-tensors differ; one kind of weights is read"
            )
        return said.pop()

    @staticmethod
    def _one(value: Any, default: Quantization | None, where: str) -> Quantization | None:
        if isinstance(value, bool):
            return default if value else NONE
        if value.get("mode", "affine") != "affine":
            raise SourceError(
                f"{where}: quantization mode {short(value['mode'])} is not supported; affine is"
            )
        try:
            return Quantization(int(value["bits"]), int(value["group_size"]))
        except (KeyError, TypeError, ValueError, OverflowError):
            raise SourceError(f"{where}: no bits and group_size in it") from None

    def check(self, path: str, tensor: Tensor, found: Quantization) -> None:
        declared = self.exceptions.get(path, self.default)
        # A module that a group size does not divide stays unquantized without a word in config.json.
        if declared is not None and found.quantized and declared != found:
            raise SourceError(
                f"{tensor}: its shape says {found.bits} bits in groups of {found.group_size}, but {self.where} says "
                f"{declared.bits} bits in groups of {declared.group_size}"
            )


class _Binder:
    """Finds modules among a checkpoint's tensors, and remembers what was missing and what was used."""

    def __init__(self, checkpoint: Checkpoint, architecture: Architecture, declared: _Declared) -> None:
        self.architecture = architecture
        self.declared = declared
        self.config = checkpoint.folder / "config.json"
        self.folder = checkpoint.folder
        self.tensors: dict[str, Tensor] = {}
        renamed: set[str] = set()
        left_out: Counter[str] = Counter()
        self.root = "model."
        for published, tensor in checkpoint.tensors.items():
            name = canonical(published, architecture.renamed, renamed)
            if why := next((why for part, why in architecture.refused.items() if part in name), None):
                raise SourceError(
                    f"{tensor} {why}; or pip install 'mlx-flashmoe[mlx-lm]', which reads it as it is"
                )
            unused = next((p for p in architecture.unused if name.startswith(p)), None)
            if unused is not None:
                last = unused.split(".")[-2]
                left_out[published[: published.index(f"{last}.")] + f"{last}.*"] += 1
            elif name.endswith("rotary_emb.inv_freq"):
                left_out["*.rotary_emb.inv_freq"] += 1
            elif architecture.tied and name.startswith("lm_head."):
                left_out["lm_head.* (tied to the embedding)"] += 1
            elif name in self.tensors:
                raise SourceError(f"{tensor} and {self.tensors[name]} are the same tensor of the model")
            else:
                self.tensors[name] = tensor
                if name.startswith("model.layers."):
                    self.root = published[: published.index("layers.")]
        # Only the names that this checkpoint uses.
        self.renamed = {p: ours for p, ours in architecture.renamed.items() if p in renamed}
        self.left_out = dict(left_out)
        self.stacked = any(".switch_mlp." in name for name in self.tensors)
        self.fused = any(name.endswith(".experts.gate_up_proj") for name in self.tensors)
        self.used: set[str] = set()
        self.missing: list[str] = []

    def published_name(self, name: str) -> str:
        for published, ours in reversed(self.renamed.items()):
            name = name.replace(ours, published)
        if name.startswith("model."):
            return self.root + name.removeprefix("model.")
        return "language_model." + name if self.root.startswith("language_model.") else name

    def lacks(self, name: str) -> None:
        self.missing.append(self.published_name(name))
        if len(self.missing) == MANY_MISSING:
            self.finish()

    def take(self, name: str, shape: tuple[int, ...], dtypes: Iterable[str] = FLOATS) -> Tensor | None:
        """The tensor of that name (ours), checked; None, and remembered, if it is missing."""
        tensor = self.tensors.get(name)
        if tensor is None:
            self.lacks(name)
            return None
        self.used.add(name)
        if tensor.dtype not in dtypes:
            raise SourceError(
                f"{tensor}: dtype {tensor.dtype} is not supported here; {', '.join(dtypes)} would be"
            )
        if tensor.shape != shape:
            raise SourceError(
                f"{tensor} has shape {list(tensor.shape)}, but {self.config} implies {list(shape)}"
            )
        return tensor

    def matrix(self, path: str, shape: tuple[int, ...]) -> Matrix | None:
        """The module ``path`` with a weight of ``shape`` [..., out, in], plain or quantized."""
        name = f"{path}.weight"
        packed = self.declared.packed
        if packed is not None and f"{name}_packed" in self.tensors:
            return self.packed(name, shape, packed)
        weight = self.tensors.get(name)
        if weight is None or weight.dtype != "U32":
            return self.plain_or_fp8(name, shape)
        scales = self.tensors.get(f"{path}.scales")
        if scales is None:
            self.lacks(f"{path}.scales")
            return None
        inner, leading = shape[-1], shape[:-1]
        words = weight.shape[-1] if weight.shape else 0
        groups = scales.shape[-1] if scales.shape else 0
        bits, odd_bits = divmod(32 * words, inner)
        group_size, odd_group = divmod(inner, groups) if groups else (0, 1)
        if odd_bits or odd_group or bits not in SOURCE_BITS or group_size not in GROUP_SIZES:
            raise SourceError(
                f"{weight} of shape {list(weight.shape)} with scales of shape {list(scales.shape)} is no affine "
                f"quantization of the {list(shape)} that {self.config} implies"
            )
        found = Quantization(bits, group_size)
        self.declared.check(path, weight, found)
        self.take(name, (*leading, words), ("U32",))
        self.take(f"{path}.scales", (*leading, groups))
        biases = self.take(f"{path}.biases", (*leading, groups), (scales.dtype,))
        return None if biases is None else Matrix(weight, scales, biases, found)

    def packed(self, name: str, shape: tuple[int, ...], quantization: Quantization) -> Matrix | None:
        """The matrix ``name`` as compressed-tensors has packed it."""
        *leading, inner = shape
        if inner % quantization.group_size:
            raise SourceError(
                f"{self.tensors[f'{name}_packed']}: groups of {quantization.group_size} do not divide {inner} inputs"
            )
        weight = self.take(f"{name}_packed", (*leading, inner * quantization.bits // 32), ("I32",))
        scales = self.take(f"{name}_scale", (*leading, inner // quantization.group_size))
        self.used.add(f"{name}_shape")  # that of the matrix, which config.json implies
        return None if weight is None or scales is None else Matrix(weight, scales, None, quantization)

    def plain_or_fp8(self, name: str, shape: tuple[int, ...]) -> Matrix | None:
        """The matrix whose tensor is ``name``: of plain floats, or of FP8 with its blocks' scales."""
        weight = self.tensors.get(name)
        if weight is None or weight.dtype != FP8:
            plain = self.take(name, shape)
            return None if plain is None else Matrix(plain)
        self.take(name, shape, (FP8,))
        by_row = self.declared.fp8_by_row
        block = (1, shape[-1]) if by_row else (FP8_BLOCK, FP8_BLOCK)
        blocks = (*shape[:-2], *(-(-n // size) for n, size in zip(shape[-2:], block)))
        scales = self.take(f"{name}_scale" if by_row else f"{name}_scale_inv", blocks)
        return None if scales is None else Matrix(weight, fp8_scale=scales, block=block)

    def dense(self, module: DenseModule) -> Dense | None:
        if module.kind in ("linear", "router", "gate"):
            name = f"{module.path}.weight"
            matrix = self.matrix(module.path, module.shape)
        else:
            name = module.path if module.kind == "plain" else f"{module.path}.weight"
            shape = module.shape
            if module.kind == "conv" and not self.stacked:
                shape = (shape[0], shape[2], shape[1])
            tensor = self.take(name, shape)
            matrix = None if tensor is None else Matrix(tensor)
        # mlx-lm's files have 1 added already.
        kind = "plain" if module.kind == "norm" and self.stacked else module.kind
        return None if matrix is None else Dense(name, kind, matrix, module.shape)

    def experts(self, layer: int) -> Experts | None:
        """A layer's experts, in whichever layout; None if anything of them is missing."""
        a = self.architecture
        count, hidden, inner = a.num_experts, a.hidden_size, a.intermediate_size
        shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
        at = f"model.layers.{layer}.mlp"
        if self.stacked:
            stacks = {p: self.matrix(f"{at}.switch_mlp.{p}_proj", (count, *shapes[p])) for p in PROJECTIONS}
            if any(s is None for s in stacks.values()):
                return None
            return Experts(layer, count, lambda e: {p: s.at(e) for p, s in stacks.items() if s is not None})
        if self.fused:
            gate_up = self.plain_or_fp8(f"{at}.experts.gate_up_proj", (count, 2 * inner, hidden))
            down = self.plain_or_fp8(f"{at}.experts.down_proj", (count, hidden, inner))
            if gate_up is None or down is None:
                return None

            def fused(e: int, gate_up: Matrix = gate_up, down: Matrix = down) -> dict[str, Matrix]:
                both = gate_up.at(e)
                return {"gate": both.rows(0, inner), "up": both.rows(inner, 2 * inner), "down": down.at(e)}

            return Experts(layer, count, fused)
        single: list[dict[str, Matrix]] = []
        for e in range(count):
            found = {p: self.matrix(f"{at}.experts.{e}.{p}_proj", shapes[p]) for p in PROJECTIONS}
            single.append({p: m for p, m in found.items() if m is not None})
            for p, m in single[-1].items():
                first = single[0].get(p, m)
                if (m.dtype, m.quantization) != (first.dtype, first.quantization):
                    raise SourceError(f"{m.weight} is {m.dtype}, but expert 0 of its layer is {first.dtype}")
        return Experts(layer, count, single.__getitem__) if all(len(s) == 3 for s in single) else None

    def finish(self) -> None:
        """Raises if anything was missing, or anything is left over."""
        if self.missing:
            raise SourceError(f"{self.folder}: {some('tensor', self.missing)} missing")
        extra = [str(tensor.name) for name, tensor in self.tensors.items() if name not in self.used]
        if extra:
            verb = "is not part" if len(extra) == 1 else "are not part"
            raise SourceError(
                f"{self.folder}: {some('tensor', extra)} {verb} of the model that config.json describes"
            )

    def published(self, layers: list[Experts]) -> Quantization | None:
        """How the checkpoint as a whole was quantized: as config.json says, else as its experts are.

        Not where integers are packed: those are some of its matrices, and the others are plain.
        """
        if self.declared.default is not None:
            return self.declared.default
        if not layers or self.declared.packed is not None:
            return None
        quantization = next(iter(layers[0].expert(0).values())).quantization
        return quantization if quantization.quantized else None


def some(noun: str, names: list[str], most: int = 3) -> str:
    """``tensor a`` or ``5 tensors (a, b, c, …)``."""
    if len(names) == 1:
        return f"{noun} {names[0]!r}"
    listed = ", ".join(repr(n) for n in names[:most])
    return f"{len(names)} {noun}s ({listed}{', …' if len(names) > most else ''})"
