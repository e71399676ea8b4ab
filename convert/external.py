"""Finds every tensor of a library's model in a checkpoint, by having the library load it.

Each library knows how the checkpoints of its models are named and changed on the way into its modules. So it loads
the checkpoint itself, lazily, from a copy of which nothing is real but the headers. An array that arrives in the tree
untouched is a tensor of a shard: it is copied byte for byte. So is a stack of such arrays, one an expert. Everything
else is computed by the library's own operations from the real shards, one array at a time.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_flashmoe.convert import exact
from mlx_flashmoe.convert.binding import FLOATS, Bound, Dense, Experts, Kind, Matrix
from mlx_flashmoe.convert.origins import Origin, Origins, relabelling, watched
from mlx_flashmoe.convert.safetensors import SafetensorsFile, Tensor
from mlx_flashmoe.convert.source import Checkpoint
from mlx_flashmoe.errors import FormatError, SourceError
from mlx_flashmoe.external import experts as expert_modules
from mlx_flashmoe.external.experts import ExpertModule
from mlx_flashmoe.external.library import Library
from mlx_flashmoe.external.model import ExternalConfig, layer_numbers
from mlx_flashmoe.layout import GROUP_SIZES, Quantization
from mlx_flashmoe.sizes import counted, show_size

DTYPES = {
    mx.bfloat16: "BF16",
    mx.float16: "F16",
    mx.float32: "F32",
    mx.uint32: "U32",
    mx.int32: "I32",
    mx.uint8: "U8",
    mx.int8: "I8",
    mx.int64: "I64",
    mx.bool_: "BOOL",
}
Bytes = np.ndarray[Any, np.dtype[np.uint8]]
KEPT = 2  # layers whose computed arrays are held: threads finish one while others begin the next
SMALL_FILES = ("*.json", "*.jinja")  # that a library may read besides the weights
PARTS = {"weight", "scales", "biases", "bias"}  # of a matrix


def bind(checkpoint: Checkpoint, library: Library, where: str) -> Bound:
    """Accounts for every tensor that the library's model has.

    Raises:
        SourceError: the library cannot load the checkpoint, or holds something of it in a way that cannot be
            streamed or kept.
    """
    with tempfile.TemporaryDirectory() as folder, watched() as origins:
        _headers_only(checkpoint, Path(folder))
        try:
            model = library.read(Path(folder))
            held = found = expert_modules.find(model)
            if held:
                settings = ExternalConfig(library, checkpoint.config)  # which refuses what could not be run
                used = {one.path for one in settings.experts}
                found = [one for one in held if one.path in used]
        except FormatError as e:
            raise SourceError(f"{where}: {e}") from None
        except Exception as e:  # whatever a library's code does with a checkpoint that it cannot load
            raise SourceError(
                f"{checkpoint.folder}: {library.name} {library.version} cannot load it: "
                f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
            ) from None
        if not found:
            raise SourceError(
                f"{where}: {library.name}'s model of it holds no experts that could be streamed"
            )
        finder = _Finder(checkpoint, library, origins, model)
        layers = [
            finder.experts(layer, experts)
            for layer, experts in zip(layer_numbers([e.path for e in found]), found)
        ]
        rest = expert_modules.modules(model, held)
        dense = [d for path, module in rest for d in finder.dense(path, module)]
    return Bound(
        model_type=str(checkpoint.config["model_type"]),
        dense=dense,
        layers=layers,
        published=finder.published(layers),
        left_out=finder.left_out(),
        notes=finder.notes(),
        library=library.name,
        library_version=library.version,
    )


def _headers_only(checkpoint: Checkpoint, folder: Path) -> None:
    """Writes sparse shards, which have headers and no data, and copies the small files."""
    for name, shard in checkpoint.shards.items():
        with open(folder / name, "wb") as file:
            text = shard.header.text
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(shard.header.file_size)
    for path in checkpoint.side_files:
        if any(path.match(pattern) for pattern in SMALL_FILES):
            shutil.copyfile(path, folder / path.name)
    (folder / "config.json").write_text(json.dumps(checkpoint.config), encoding="utf-8")
    weights = {tensor.name: tensor.file.path.name for tensor in checkpoint.tensors.values()}
    index = {"metadata": {}, "weight_map": weights}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


class _Finder:
    """Finds what fills a library's modules, and remembers what of the checkpoint was used."""

    def __init__(self, checkpoint: Checkpoint, library: Library, origins: Origins, model: nn.Module):
        self.checkpoint = checkpoint
        self.library = library
        self.origins = origins
        self.used: set[str] = set()
        self.computed = _Computed(checkpoint, library)
        self.predicate: Callable[..., Any] | None = getattr(model, "quant_predicate", None)

    def tensor(self, name: str, array: mx.array) -> Tensor:
        """The tensor of the checkpoint that an array is, or one that is computed from some."""
        origin = self.origins.known.get(id(array))
        return self.computed.tensor(name, array) if origin is None else self.published_tensor(origin)

    def published_tensor(self, origin: Origin) -> Tensor:
        self.used.add(origin.name)
        tensor = self.checkpoint.tensors[origin.name]
        return replace(tensor, dtype=DTYPES.get(origin.dtype, tensor.dtype), shape=origin.shape)

    def rows(self, name: str, array: mx.array) -> Callable[[int], Tensor]:
        """The part of an array [E, ...] that belongs to each expert."""
        stacked = self.origins.stacked.get(id(array))
        if stacked is not None:
            return [self.published_tensor(origin) for origin in stacked].__getitem__
        return self.tensor(name, array).at

    def arrays(self, path: str, module: nn.Module) -> dict[str, mx.array]:
        """A module's arrays by name; a quantized one's are "weight", "scales", "biases" and "bias".

        Raises:
            SourceError: it is quantized in a way that cannot be kept.
        """
        arrays = {n: a for n, a in module.items() if isinstance(a, mx.array)}
        if "scales" not in arrays or not hasattr(module, "bits"):
            return arrays
        mode, group = self.mode(module), int(module.group_size)
        unknown = sorted(arrays.keys() - PARTS)
        if (mode != "affine" and mode not in exact.MODES) or unknown:
            raise SourceError(
                f"{self.checkpoint.folder}: {path} is quantized in mode {mode!r}"
                f"{' with ' + ', '.join(unknown) if unknown else ''}, which is not supported; affine, "
                f"{', '.join(exact.MODES)} are"
            )
        if mode == "affine" and group not in GROUP_SIZES:
            raise SourceError(
                f"{self.checkpoint.folder}: {path} is quantized in groups of {group}; groups of "
                f"{', '.join(map(str, GROUP_SIZES))} are supported"
            )
        return arrays

    @staticmethod
    def mode(module: nn.Module) -> str:
        return str(getattr(module, "mode", "affine"))

    def matrix(self, module: nn.Module, tensors: dict[str, Tensor]) -> Matrix:
        """A matrix of a module by its parts, as it is kept."""
        weight, bias = tensors["weight"], tensors.get("bias")
        if "scales" not in tensors:
            return Matrix(weight, bias=bias)
        if (mode := self.mode(module)) != "affine":
            return exact.kept(mode, weight, tensors["scales"], bias)
        quantization = Quantization(int(module.bits), int(module.group_size))
        return exact.widened(Matrix(weight, tensors["scales"], tensors["biases"], quantization, bias=bias))

    def all_ones(self, name: str, array: mx.array) -> None:
        """Raises SourceError unless all values of an array are 1."""
        tensor = self.tensor(name, array)
        if not tensor.file.path.is_file():
            raise SourceError(
                f"{self.checkpoint.folder}: the values of {name} have to be known before the conversion begins: "
                "download the checkpoint and give its folder as --hf-path"
            )
        dtype = next((d for d, known in DTYPES.items() if known == tensor.dtype), None)
        values = None if dtype is None else mx.array(tensor.read()).view(dtype)
        if values is None or not mx.all(values == 1).item():
            raise SourceError(
                f"{tensor}: factors of experts other than 1 are not supported; convert a checkpoint that is "
                "quantized in MLX's affine mode, or not quantized"
            )

    def experts(self, layer: int, experts: ExpertModule) -> Experts:
        """A layer's experts; those of a fused gate and up are cut."""
        for name in experts.factors:
            self.all_ones(f"{experts.path}.{name}", experts.module[name])
        modules = {role: experts.module[child] for child, role in experts.matrices.items()}
        parts: dict[str, dict[str, Callable[[int], Tensor]]] = {}
        for child, role in experts.matrices.items():
            path = f"{experts.path}.{child}"
            arrays = self.arrays(path, modules[role])
            if unknown := sorted(arrays.keys() - PARTS):
                raise SourceError(
                    f"{self.checkpoint.folder}: {path} has {', '.join(unknown)}, which experts cannot keep"
                )
            parts[role] = {part: self.rows(f"{path}.{part}", array) for part, array in arrays.items()}

        def expert(e: int) -> dict[str, Matrix]:
            found = {
                role: self.matrix(modules[role], {part: at(e) for part, at in named.items()})
                for role, named in parts.items()
            }
            if "gate_up" in found:
                both, rows = found.pop("gate_up"), experts.intermediate_size
                found = {"gate": both.rows(0, rows), "up": both.rows(rows, 2 * rows), **found}
            return found

        for role, one in expert(0).items():
            if one.dtype not in FLOATS:
                raise SourceError(f"{one.weight}: experts of dtype {one.dtype} are not supported ({role})")
        return Experts(layer, experts.count, expert, experts.path)

    def dense(self, path: str, module: nn.Module) -> Iterator[Dense]:
        """The parameters of one module."""
        arrays = self.arrays(path, module)
        parameters = {n: a for n, a in arrays.items() if n in module.parameters()}
        at = f"{path}." if path else ""
        quantized = "scales" in parameters and hasattr(module, "bits")
        for name, array in parameters.items():
            if quantized and name in ("scales", "biases"):
                continue
            weight = self.tensor(at + name, array)
            if quantized and name == "weight":
                named = {"weight": weight}
                named |= {
                    n: self.tensor(at + n, parameters[n]) for n in ("scales", "biases") if n in parameters
                }
                matrix = self.matrix(module, named)
                yield Dense(at + name, "linear", matrix, (*array.shape[:-1], matrix.in_dims))
            else:
                fits = name == "weight" and array.ndim >= 2 and hasattr(module, "to_quantized")
                yield Dense(
                    at + name, self.kind(path, module) if fits else "plain", Matrix(weight), array.shape
                )

    def kind(self, path: str, module: nn.Module) -> Kind:
        """How a matrix is quantized that is not yet: as the library itself would."""
        if self.predicate is None:
            return "linear"
        asked = self.predicate(path, module)
        if isinstance(asked, dict):
            return "router" if asked.get("bits") == 8 else "linear"
        return "linear" if asked else "plain"

    def published(self, layers: list[Experts]) -> Quantization | None:
        """How the checkpoint as a whole is quantized: as config.json says, else as the first quantized experts are."""
        declared = self.checkpoint.config.get("quantization")
        if isinstance(declared, dict) and {"bits", "group_size"} <= declared.keys():
            return Quantization(int(declared["bits"]), int(declared["group_size"]))
        found = (matrix.quantization for layer in layers for matrix in layer.expert(0).values())
        return next((one for one in found if one.quantized), None)

    def notes(self) -> list[str]:
        through = f"modules of {self.library.name} {self.library.version}, experts of mlx-flashmoe"
        if not self.computed.names:
            return [through]
        computed, most = counted(len(self.computed.names), "tensor"), show_size(2 * self.computed.most)
        return [
            through,
            f"{self.library.name} computes {computed} from those of the checkpoint, in up to {most} of memory",
        ]

    def left_out(self) -> dict[str, int]:
        """Tensors that the model does not use as they are, by the beginnings of their names."""
        if self.computed.names:
            return {}  # which tensors those were made of is not known
        rest: Counter[str] = Counter()
        for name in self.checkpoint.tensors:
            if name not in self.used:
                rest[".".join(name.split(".")[:2]) + ".*"] += 1
        return dict(rest)


class _Computed:
    """Arrays that the library computes from a checkpoint: like files to those who read them.

    One thread owns the library's lazy arrays: MLX computes an array on the thread that made it. An array's bytes are
    kept until two more layers were wanted; after that the library builds everything anew, lazily, which takes seconds.
    """

    def __init__(self, checkpoint: Checkpoint, library: Library):
        self._checkpoint = checkpoint
        self._library = library
        self._owner = ThreadPoolExecutor(1, "library")
        self._lock = threading.Lock()
        self._lazy: dict[str, mx.array] = {}
        self._bytes: OrderedDict[str, dict[str, Bytes]] = (
            OrderedDict()
        )  # by module, the least recently used first
        self.names: dict[str, int] = {}  # and their bytes

    def tensor(self, name: str, array: mx.array) -> Tensor:
        """Raises SourceError if the array cannot be computed, because the shards are not all here."""
        checkpoint = self._checkpoint
        missing = sorted(n for n, shard in checkpoint.shards.items() if not shard.path.is_file())
        if missing:
            raise SourceError(
                f"{checkpoint.folder}: {self._library.name} computes {name} from the checkpoint's tensors, and needs "
                f"all of them in a folder ({missing[0]} is missing): download the checkpoint and give its folder as "
                "--hf-path, or give a checkpoint in MLX's layout"
            )
        if array.dtype not in DTYPES:
            raise SourceError(f"{checkpoint.folder}: {name} has dtype {array.dtype}, which cannot be kept")
        self.names[name] = array.nbytes
        file = _ComputedFile(self, name, checkpoint.folder / sorted(checkpoint.shards)[-1])
        return Tensor(file, name, DTYPES[array.dtype], array.shape, 0)

    def bytes_of(self, name: str) -> Bytes:
        module = ".".join(name.split(".")[:-2])
        with self._lock:
            while module not in self._bytes and len(self._bytes) >= KEPT:
                self._bytes.popitem(last=False)
            kept = self._bytes.setdefault(module, {})
            self._bytes.move_to_end(module)
            if name not in kept:
                kept[name] = self._owner.submit(self._compute, name).result()
            return kept[name]

    @property
    def most(self) -> int:
        """Bytes of computed arrays that are held at once, at most."""
        sizes: Counter[str] = Counter()
        for name, size in self.names.items():
            sizes[".".join(name.split(".")[:-2])] += size
        return sum(size for _, size in sizes.most_common(KEPT))

    def _compute(self, name: str) -> Bytes:
        with mx.stream(mx.cpu):
            if name not in self._lazy:
                with relabelling():
                    model = self._library.read(self._checkpoint.folder)
                arrays: list[tuple[str, mx.array]] = tree_flatten(model.parameters())  # type: ignore[assignment]
                self._lazy = dict(arrays)
            array = mx.contiguous(self._lazy.pop(name)).reshape(-1)
            mx.eval(array)
            return np.array(array.view(mx.uint8))


class _ComputedFile(SafetensorsFile):
    """One computed array, in the place of a file that holds nothing else."""

    def __init__(self, computed: _Computed, name: str, path: Path):
        self.path = path
        self._computed, self._name = computed, name

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        data = self._computed.bytes_of(self._name)
        for buffer in buffers:
            n = buffer.nbytes
            buffer.cast("B")[:] = data[offset : offset + n].data
            offset += n

    def close(self) -> None:
        pass

    def forget(self) -> None:
        pass
