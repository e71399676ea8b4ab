"""Which tensors a checkpoint of each architecture must have, and how its published names become ours.

An architecture is one row of FAMILIES: its model types, the names of what generation does not use, and one
function that lists, from config.json, the dense modules with their shapes and the experts' dimensions.
:func:`bind` finds all of that in a checkpoint, in whichever layout it was published, and refuses what is
missing, has another shape, or is not part of the model.

Three layouts of the same model are in the wild, told apart by the names of the experts:

    fused       …mlp.experts.gate_up_proj [E, 2I, D] (gate's rows first), …mlp.experts.down_proj [E, D, I]
    per expert  …mlp.experts.E.{gate,up,down}_proj.weight
    stacked     …mlp.switch_mlp.{gate,up,down}_proj.{weight,scales,biases} [E, …], as mlx-lm writes it

The first two are Hugging Face's: there, the RMS norms of some architectures hold weight - 1, and a convolution is
[C, 1, K]. In the third, 1 is added already and a convolution is [C, K, 1].

A matrix of the first two may be in FP8: weight float8 (e4m3), and one scale for each block of 128 x 128, named
``weight_scale_inv`` (``gate_up_proj_scale_inv`` … where experts are fused): value = weight * scale.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from reprlib import repr as short
from typing import Any, Literal

from mlx_flashmoe.convert.safetensors import Tensor
from mlx_flashmoe.convert.source import Checkpoint
from mlx_flashmoe.errors import SourceError
from mlx_flashmoe.layout import GROUP_SIZES, PROJECTIONS, UNQUANTIZED, Quantization

FLOATS = ("BF16", "F16", "F32")
SOURCE_BITS = (2, 3, 4, 5, 6, 8)  # MLX's affine formats; 5 bits can be read, but not kept
FP8, FP8_BLOCK = "F8_E4M3", 128
MANY_MISSING = 10_000  # a config.json may promise millions: no need to name them all
NONE = Quantization(UNQUANTIZED, 0)

# linear: quantized as asked; router: at 8 bits; norm: 1 is to be added, in float32; conv: to be [C, K, 1];
# plain: as published.
Kind = Literal["linear", "router", "norm", "conv", "plain"]


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix [out, in] (or a stack of them, [E, out, in]) as published: plain, affine quantized, or FP8.

    ``skipped``: of an FP8 matrix, rows of its first block of 128 that are not part of it.
    """

    weight: Tensor
    scales: Tensor | None = None
    biases: Tensor | None = None
    quantization: Quantization = NONE
    scale_inv: Tensor | None = None
    skipped: int = 0

    @property
    def parts(self) -> dict[str, Tensor]:
        named = {
            "weight": self.weight,
            "scales": self.scales,
            "biases": self.biases,
            "scale_inv": self.scale_inv,
        }
        return {k: t for k, t in named.items() if t is not None}

    @property
    def in_dims(self) -> int:
        columns = self.weight.shape[-1]
        return columns * 32 // self.quantization.bits if self.quantization.quantized else columns

    @property
    def fp8(self) -> bool:
        return self.scale_inv is not None

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
            scale_inv=optional(self.scale_inv),
        )

    def rows(self, start: int, stop: int) -> Matrix:
        if self.scale_inv is None:
            return self._each(lambda t: t.rows(start, stop))
        first, last = self.skipped + start, self.skipped + stop
        blocks = self.scale_inv.rows(first // FP8_BLOCK, -(-last // FP8_BLOCK))
        return Matrix(self.weight.rows(start, stop), scale_inv=blocks, skipped=first % FP8_BLOCK)

    def at(self, index: int) -> Matrix:
        return self._each(lambda t: t.at(index))


@dataclass(frozen=True)
class DenseModule:
    """One entry of an architecture's table. ``path`` is ours, without ``.weight`` unless ``kind`` is plain."""

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


@dataclass(frozen=True)
class Dense:
    """One dense module found in the checkpoint. ``name`` of its weight is ours, e.g. ``model.norm.weight``."""

    name: str
    kind: Kind
    matrix: Matrix
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Experts:
    """One layer's experts. ``expert(e)`` gives gate, up and down of expert e."""

    layer: int
    num_experts: int
    expert: Callable[[int], dict[str, Matrix]]


@dataclass(frozen=True)
class Bound:
    """A checkpoint whose every tensor is accounted for.

    Attributes:
        published: bits and group size that the checkpoint as a whole was quantized with; None if it was not.
        left_out: what of it is not used, e.g. {"mtp.*": 12}.
    """

    model_type: str
    architecture: Architecture
    dense: list[Dense]
    layers: list[Experts]
    published: Quantization | None
    left_out: dict[str, int]


class Settings:
    """Values of a config.json, checked as they are read."""

    def __init__(self, data: dict[str, Any], where: str) -> None:
        self.data = data
        self.where = where

    def size(self, key: str, most: int = 1 << 30) -> int:
        """A whole number from 1 to ``most``."""
        if key not in self.data or self.data[key] is None:
            raise SourceError(f"{self.where}: {key} is missing")
        value = self.data[key]
        if type(value) is not int or not 1 <= value <= most:
            raise SourceError(
                f"{self.where}: {key} must be a whole number from 1 to {most}, not {short(value)}"
            )
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.data.get(key, default)
        if not isinstance(value, bool):
            raise SourceError(f"{self.where}: {key} must be true or false, not {short(value)}")
        return value


def qwen3_5_moe(config: dict[str, Any], where: str) -> Architecture:
    """Qwen3.5-MoE: gated delta net layers and gated attention layers, all with routed and shared experts.

    Names and shapes as in transformers' modeling_qwen3_5_moe.py.
    """
    text = config.get("text_config", config)
    if not isinstance(text, dict):
        raise SourceError(f"{where}: text_config is not an object")
    c = Settings(text, where if text is config else f"{where} (text_config)")
    # The model's own flag is the outer one; transformers goes by it, and so do published files.
    tied = Settings(config, where).flag("tie_word_embeddings", c.flag("tie_word_embeddings", False))

    def projections(at: str, net: _DeltaNet) -> list[DenseModule]:
        return [
            DenseModule(f"{at}.in_proj_qkv", (2 * net.keys + net.values, net.hidden), "linear"),
            DenseModule(f"{at}.in_proj_z", (net.values, net.hidden), "linear"),
            DenseModule(f"{at}.in_proj_a", (net.value_heads, net.hidden), "linear"),
            DenseModule(f"{at}.in_proj_b", (net.value_heads, net.hidden), "linear"),
        ]

    return _hybrid(c, tied, projections)


def qwen3_next(config: dict[str, Any], where: str) -> Architecture:
    """Qwen3-Next: as Qwen3.5-MoE, with fused projections. Names and shapes as in modeling_qwen3_next.py."""
    c = Settings(config, where)

    def projections(at: str, net: _DeltaNet) -> list[DenseModule]:
        return [
            DenseModule(f"{at}.in_proj_qkvz", (2 * (net.keys + net.values), net.hidden), "linear"),
            DenseModule(f"{at}.in_proj_ba", (2 * net.value_heads, net.hidden), "linear"),
        ]

    return _hybrid(c, c.flag("tie_word_embeddings", False), projections)


def qwen3_moe(config: dict[str, Any], where: str) -> Architecture:
    """Qwen3-MoE: attention layers, all with routed experts. Names and shapes as in modeling_qwen3_moe.py."""
    c = Settings(config, where)
    _all_layers_have_experts(c)
    hidden, heads = c.size("hidden_size"), c.size("num_attention_heads")
    # Published configurations have the first name, those that transformers writes the second.
    experts = c.size("num_experts" if "num_experts" in config else "num_local_experts", 1 << 16)
    head = c.size("head_dim") if config.get("head_dim") is not None else hidden // heads
    layers = c.size("num_hidden_layers", 4096)
    tied = c.flag("tie_word_embeddings", False)
    modules = _ends(c, tied, "plain")
    for i in range(layers):
        layer = f"model.layers.{i}"
        modules += _attention(c, f"{layer}.self_attn", head, heads * head, "plain")
        modules += _norms(("input_layernorm", "post_attention_layernorm"), layer, hidden, "plain")
        modules.append(DenseModule(f"{layer}.mlp.gate", (experts, hidden), "router"))
    return _architecture(c, modules, layers, experts, tied)


@dataclass(frozen=True)
class _DeltaNet:
    """Dims of a gated delta net: of all keys and all values together."""

    hidden: int
    keys: int
    values: int
    value_heads: int


def _hybrid(
    c: Settings, tied: bool, projections: Callable[[str, _DeltaNet], list[DenseModule]]
) -> Architecture:
    """Gated delta net layers, whose inputs are ``projections``, and gated attention layers."""
    _all_layers_have_experts(c)
    hidden, heads, head = c.size("hidden_size"), c.size("num_attention_heads"), c.size("head_dim")
    experts, shared = c.size("num_experts", 1 << 16), c.size("shared_expert_intermediate_size")
    value_heads, value_head = c.size("linear_num_value_heads"), c.size("linear_value_head_dim")
    keys = c.size("linear_num_key_heads") * c.size("linear_key_head_dim")
    values = value_heads * value_head
    kernel = c.size("linear_conv_kernel_dim")
    modules = _ends(c, tied, "norm")
    kinds = _layer_types(c)
    for i, kind in enumerate(kinds):
        layer = f"model.layers.{i}"
        if kind == "linear_attention":
            at = f"{layer}.linear_attn"
            modules += projections(at, _DeltaNet(hidden, keys, values, value_heads))
            modules += [
                DenseModule(f"{at}.out_proj", (hidden, values), "linear"),
                DenseModule(f"{at}.conv1d", (2 * keys + values, kernel, 1), "conv"),
                DenseModule(f"{at}.A_log", (value_heads,), "plain"),
                DenseModule(f"{at}.dt_bias", (value_heads,), "plain"),
                DenseModule(f"{at}.norm.weight", (value_head,), "plain"),
            ]
        else:
            # Query and gate, interleaved head by head.
            modules += _attention(c, f"{layer}.self_attn", head, 2 * heads * head, "norm")
        modules += _norms(("input_layernorm", "post_attention_layernorm"), layer, hidden, "norm")
        modules += [
            DenseModule(f"{layer}.mlp.gate", (experts, hidden), "router"),
            DenseModule(f"{layer}.mlp.shared_expert.gate_proj", (shared, hidden), "linear"),
            DenseModule(f"{layer}.mlp.shared_expert.up_proj", (shared, hidden), "linear"),
            DenseModule(f"{layer}.mlp.shared_expert.down_proj", (hidden, shared), "linear"),
            DenseModule(f"{layer}.mlp.shared_expert_gate", (1, hidden), "router"),
        ]
    return _architecture(c, modules, len(kinds), experts, tied)


def _architecture(
    c: Settings, modules: list[DenseModule], layers: int, experts: int, tied: bool
) -> Architecture:
    if c.size("num_experts_per_tok") > experts:
        raise SourceError(f"{c.where}: num_experts_per_tok is more than the {experts} of num_experts")
    inner = c.size("moe_intermediate_size")
    return Architecture(modules, list(range(layers)), experts, c.size("hidden_size"), inner, tied)


def _ends(c: Settings, tied: bool, norm: Kind) -> list[DenseModule]:
    """What comes before the first layer and after the last."""
    vocabulary, hidden = c.size("vocab_size"), c.size("hidden_size")
    modules = [DenseModule("model.embed_tokens", (vocabulary, hidden), "linear")]
    modules += _norms(("norm",), "model", hidden, norm)
    if not tied:
        modules.append(DenseModule("lm_head", (vocabulary, hidden), "linear"))
    return modules


def _attention(c: Settings, at: str, head: int, queries: int, norm: Kind) -> list[DenseModule]:
    """Attention whose q_proj has ``queries`` rows."""
    hidden, heads, kv_heads = (
        c.size("hidden_size"),
        c.size("num_attention_heads"),
        c.size("num_key_value_heads"),
    )
    shapes = {
        "q_proj": (queries, hidden),
        "k_proj": (kv_heads * head, hidden),
        "v_proj": (kv_heads * head, hidden),
        "o_proj": (hidden, heads * head),
    }
    modules = [DenseModule(f"{at}.{name}", shape, "linear") for name, shape in shapes.items()]
    if c.flag("attention_bias", False):
        modules += [DenseModule(f"{at}.{name}.bias", (shape[0],), "plain") for name, shape in shapes.items()]
    return modules + _norms(("q_norm", "k_norm"), at, head, norm)


def _norms(names: Iterable[str], at: str, dims: int, kind: Kind) -> list[DenseModule]:
    """RMS norms: of kind "norm" where the architecture publishes weight - 1, else "plain"."""
    end = ".weight" if kind == "plain" else ""
    return [DenseModule(f"{at}.{name}{end}", (dims,), kind) for name in names]


def _all_layers_have_experts(c: Settings) -> None:
    # No published checkpoint of these architectures has a layer without.
    if c.data.get("mlp_only_layers") or c.data.get("decoder_sparse_step", 1) != 1:
        raise SourceError(
            f"{c.where}: layers without experts (mlp_only_layers, decoder_sparse_step) are not supported"
        )


def _layer_types(c: Settings) -> list[str]:
    layers = c.size("num_hidden_layers", 4096)
    kinds = c.data.get("layer_types")
    if kinds is None:
        interval = c.size("full_attention_interval")
        return ["linear_attention" if (i + 1) % interval else "full_attention" for i in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise SourceError(f"{c.where}: layer_types does not list the {layers} layers of num_hidden_layers")
    for kind in kinds:
        if kind not in ("linear_attention", "full_attention"):
            raise SourceError(
                f"{c.where}: layer_types has {short(kind)}; linear_attention and full_attention are known"
            )
    return kinds


@dataclass(frozen=True)
class Family:
    """One architecture. ``unused``: name prefixes (ours) of what text generation does not need."""

    model_types: tuple[str, ...]
    unused: tuple[str, ...]
    architecture: Callable[[dict[str, Any], str], Architecture]


FAMILIES = (
    Family(
        ("qwen3_5_moe", "qwen3_5_moe_text"),
        ("mtp.", "model.mtp.", "visual.", "model.visual.", "vision_tower.", "model.vision_tower."),
        qwen3_5_moe,
    ),
    Family(("qwen3_next",), ("mtp.", "model.mtp."), qwen3_next),
    Family(("qwen3_moe",), (), qwen3_moe),
)


def canonical(name: str) -> str:
    """A published name without what wraps the language model: every layout's names become ``model.…``."""
    for wrapped in ("model.language_model.", "language_model.model."):
        if name.startswith(wrapped):
            return "model." + name[len(wrapped) :]
    return name.removeprefix("language_model.")


def bind(checkpoint: Checkpoint) -> Bound:
    """Accounts for every tensor of a checkpoint.

    Raises:
        SourceError: unsupported model type or quantization; a tensor missing, unknown, of another shape or
            dtype than config.json implies.
    """
    where = str(checkpoint.folder / "config.json")
    model_type = checkpoint.config.get("model_type")
    family = next((f for f in FAMILIES if model_type in f.model_types), None)
    if family is None:
        supported = ", ".join(t for f in FAMILIES for t in f.model_types)
        raise SourceError(f"{where}: model_type {short(model_type)} is not supported; supported: {supported}")
    architecture = family.architecture(checkpoint.config, where)
    binder = _Binder(checkpoint, family, architecture, _Declared.read(checkpoint.config, where))
    dense = [d for m in architecture.modules if (d := binder.dense(m)) is not None]
    layers = [e for layer in architecture.moe_layers if (e := binder.experts(layer)) is not None]
    binder.finish()
    return Bound(
        model_type=str(model_type),
        architecture=architecture,
        dense=dense,
        layers=layers,
        published=binder.published(layers),
        left_out=binder.left_out,
    )


@dataclass(frozen=True)
class _Declared:
    """What config.json's ``quantization`` says: a default, and exceptions by module path (ours)."""

    where: str
    default: Quantization | None
    exceptions: dict[str, Quantization | None]

    @classmethod
    def read(cls, config: dict[str, Any], where: str) -> _Declared:
        key = "quantization" if config.get("quantization") else "quantization_config"
        data = config.get(key)
        if not data:
            return cls(where, None, {})
        if not isinstance(data, dict):
            raise SourceError(f"{where}: {key} is not an object")
        if data.get("quant_method") == "fp8" and data.get("fmt", "e4m3") == "e4m3":
            if data.get("weight_block_size") != [FP8_BLOCK, FP8_BLOCK]:
                raise SourceError(
                    f"{where}: {key}: FP8 in blocks of {short(data.get('weight_block_size'))}; "
                    f"blocks of [{FP8_BLOCK}, {FP8_BLOCK}] are read"
                )
            return cls(where, None, {})
        if "quant_method" in data:
            raise SourceError(
                f"{where}: {key} is {short(data['quant_method'])}; only unquantized checkpoints, FP8 (e4m3) and MLX "
                "affine quantization are read"
            )
        default = cls._one(data, None, f"{where}: {key}")
        exceptions = {
            canonical(path): cls._one(value, default, f"{where}: {key}: {path}")
            for path, value in data.items()
            if isinstance(value, (dict, bool))
        }
        return cls(where, default, exceptions)

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

    def __init__(
        self, checkpoint: Checkpoint, family: Family, architecture: Architecture, declared: _Declared
    ) -> None:
        self.architecture = architecture
        self.declared = declared
        self.config = checkpoint.folder / "config.json"
        self.folder = checkpoint.folder
        self.tensors: dict[str, Tensor] = {}
        left_out: Counter[str] = Counter()
        self.root = "model."
        for published, tensor in checkpoint.tensors.items():
            name = canonical(published)
            unused = next((p for p in family.unused if name.startswith(p)), None)
            if unused is not None:
                left_out[
                    published[: published.index(unused.split(".")[-2])] + unused.split(".")[-2] + ".*"
                ] += 1
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
        self.left_out = dict(left_out)
        self.stacked = any(".switch_mlp." in name for name in self.tensors)
        self.fused = any(name.endswith(".experts.gate_up_proj") for name in self.tensors)
        self.used: set[str] = set()
        self.missing: list[str] = []

    def published_name(self, name: str) -> str:
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

    def plain_or_fp8(self, name: str, shape: tuple[int, ...]) -> Matrix | None:
        """The matrix whose tensor is ``name``: of plain floats, or of FP8 with its blocks' scales."""
        weight = self.tensors.get(name)
        if weight is None or weight.dtype != FP8:
            plain = self.take(name, shape)
            return None if plain is None else Matrix(plain)
        self.take(name, shape, (FP8,))
        blocks = (*shape[:-2], *(-(-n // FP8_BLOCK) for n in shape[-2:]))
        scales = self.take(f"{name}_scale_inv", blocks)
        return None if scales is None else Matrix(weight, scale_inv=scales)

    def dense(self, module: DenseModule) -> Dense | None:
        if module.kind in ("linear", "router"):
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
            raise SourceError(f"{self.folder}: {_some('tensor', self.missing)} missing")
        extra = [str(tensor.name) for name, tensor in self.tensors.items() if name not in self.used]
        if extra:
            verb = "is not part" if len(extra) == 1 else "are not part"
            raise SourceError(
                f"{self.folder}: {_some('tensor', extra)} {verb} of the model that config.json describes"
            )

    def published(self, layers: list[Experts]) -> Quantization | None:
        """How the checkpoint as a whole was quantized: as config.json says, else as its experts are."""
        if self.declared.default is not None:
            return self.declared.default
        if not layers:
            return None
        quantization = layers[0].expert(0)["gate"].quantization
        return quantization if quantization.quantized else None


def _some(noun: str, names: list[str], most: int = 3) -> str:
    """``tensor a`` or ``5 tensors (a, b, c, …)``."""
    if len(names) == 1:
        return f"{noun} {names[0]!r}"
    listed = ", ".join(repr(n) for n in names[:most])
    return f"{len(names)} {noun}s ({listed}{', …' if len(names) > most else ''})"
