"""What is on disk: the manifest and the layout of an expert's blob.

The one file that converter and runtime share. A converted folder holds

    flashmoe.json             the manifest, written last: a folder without it is not a model
    model-*.safetensors       the dense part: MLX names, MLX affine quantization
    experts/layer_000.bin …   one file a layer; blob e at byte e * blob_size
    config.json, tokenizer…   as published

A blob is one expert: gate, up and down projection, each as weight, scales and biases (the latter two only
when quantized), in that order, every component aligned to 256 bytes, the whole rounded up to 16 KiB (Apple's
page). A quantized weight is MLX's affine format: uint32 [out, in * bits / 32], little endian, value =
q * scale + bias with one scale and bias per group_size inputs: [out, in / group_size].

Format version 2 adds what other libraries' models have: experts without a gate, a linear bias [out, 1] after the
other parts of its projection, and the library and its modules that the experts belong to. A manifest without any of
these is written as version 1, which older releases read.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mlx_flashmoe import system
from mlx_flashmoe.errors import FormatError

FORMAT = "mlx-flashmoe"
FORMAT_VERSIONS = (1, 2)
MANIFEST = "flashmoe.json"
STATE = ".conversion"  # a folder in one that is being converted (convert/destination.py), gone when it is complete
PAGE = 16384
ALIGNMENT = 256
PROJECTIONS = ("gate", "up", "down")
LIBRARIES = ("mlx-lm", "mlx-vlm")  # whose modules a model may be made of
ITEMSIZE = {"uint32": 4, "float32": 4, "bfloat16": 2, "float16": 2}
FLOATS = ("float32", "bfloat16", "float16")
BITS = (2, 3, 4, 6, 8)
GROUP_SIZES = (32, 64, 128)
UNQUANTIZED = 16  # --q-bits 16: weights as published


# What reading a value of the wrong type or range out of parsed JSON may raise.
_MALFORMED = (KeyError, TypeError, ValueError, AttributeError, OverflowError)


def _same(a: Any, b: Any) -> bool:
    """Equality of parsed JSON that tells 1 from 1.0 and from true."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


def _without(data: dict[str, Any], key: str) -> dict[str, Any]:
    """The same, less a key of version 2 whose value is None."""
    return {k: v for k, v in data.items() if k != key or v is not None}


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


@dataclass(frozen=True)
class Component:
    """One array inside a blob. ``offset`` is in bytes from the blob's start."""

    dtype: str
    shape: tuple[int, int]
    offset: int

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.shape[1] * ITEMSIZE[self.dtype]


@dataclass(frozen=True)
class Quantization:
    """Affine quantization of one matrix; ``bits == 16`` means unquantized (``group_size`` is then 0)."""

    bits: int
    group_size: int

    @property
    def quantized(self) -> bool:
        return self.bits != UNQUANTIZED


@dataclass(frozen=True)
class Projection:
    """One matrix [out_dims, in_dims] of an expert.

    Attributes:
        scales, biases: of the quantization; None when unquantized.
        bias: what is added to the product, [out_dims, 1]; None for nothing.
    """

    out_dims: int
    in_dims: int
    bits: int
    group_size: int
    weight: Component
    scales: Component | None
    biases: Component | None
    bias: Component | None = None

    @property
    def components(self) -> dict[str, Component]:
        named = {"weight": self.weight, "scales": self.scales, "biases": self.biases, "bias": self.bias}
        return {k: c for k, c in named.items() if c is not None}

    def to_json(self) -> dict[str, Any]:
        return _without(asdict(self), "bias")


@dataclass(frozen=True)
class BlobLayout:
    """Where everything is inside one expert's blob. Hashable, and quickly so: kernels are looked up by it.

    Experts of two matrices have no ``gate``: ``up`` comes first, ``down`` second.
    """

    hidden_size: int
    intermediate_size: int
    gate: Projection | None
    up: Projection
    down: Projection
    blob_size: int

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.hidden_size, self.intermediate_size, self.gate, self.up, self.down, self.blob_size))

    @classmethod
    def build(
        cls,
        hidden_size: int,
        intermediate_size: int,
        quantization: dict[str, Quantization],
        dtype: str | dict[str, str],
        bias: dict[str, str] | None = None,
    ) -> BlobLayout:
        """Lays out a blob.

        Args:
            quantization: for each of "gate", "up", "down"; without "gate" for experts of two matrices.
            dtype: of scales and biases, or of the weights where they are unquantized; one, or per projection.
            bias: dtype of the linear bias of each projection that has one.
        """
        offset = 0

        def place(dtype: str, shape: tuple[int, int]) -> Component:
            nonlocal offset
            component = Component(dtype, shape, offset)
            offset = _round_up(offset + component.nbytes, ALIGNMENT)
            return component

        bias = bias or {}
        projections: dict[str, Projection] = {}
        names = [n for n in PROJECTIONS if n in quantization or n != "gate"]
        unknown = (quantization.keys() - set(PROJECTIONS)) | (bias.keys() - set(names))
        if unknown:
            raise ValueError(
                f"[BlobLayout] an expert has {', '.join(names)}, but got {', '.join(sorted(unknown))}"
            )
        if hidden_size <= 0 or intermediate_size <= 0:
            raise ValueError(f"[BlobLayout] sizes of {hidden_size} and {intermediate_size} are not positive")
        for name in names:
            q = quantization[name]
            kind = dtype if isinstance(dtype, str) else dtype[name]
            for each in (kind, bias.get(name, kind)):
                if each not in FLOATS:
                    raise ValueError(f"[BlobLayout] a dtype is one of {', '.join(FLOATS)}, but got {each!r}")
            out, inner = (
                (hidden_size, intermediate_size) if name == "down" else (intermediate_size, hidden_size)
            )
            scales = biases = None
            if not q.quantized:
                weight = place(kind, (out, inner))
            elif q.bits not in BITS or q.group_size not in GROUP_SIZES:
                raise ValueError(f"[BlobLayout] bits in {BITS} and group size in {GROUP_SIZES}, but got {q}")
            elif inner % q.group_size:
                raise ValueError(
                    f"[BlobLayout] group size {q.group_size} does not divide the {inner} inputs of {name}_proj"
                )
            else:
                weight = place("uint32", (out, inner * q.bits // 32))
                groups = (out, inner // q.group_size)
                scales, biases = place(kind, groups), place(kind, groups)
            added = place(bias[name], (out, 1)) if name in bias else None
            group_size = q.group_size if q.quantized else 0
            projections[name] = Projection(out, inner, q.bits, group_size, weight, scales, biases, added)
        return cls(
            hidden_size,
            intermediate_size,
            projections.get("gate"),
            projections["up"],
            projections["down"],
            _round_up(offset, PAGE),
        )

    @property
    def projections(self) -> dict[str, Projection]:
        """Those that the expert has, in file order."""
        named = {"gate": self.gate, "up": self.up, "down": self.down}
        return {name: p for name, p in named.items() if p is not None}

    @property
    def biased(self) -> bool:
        """A linear bias belongs to some projection."""
        return any(p.bias is not None for p in self.projections.values())

    def components(self) -> Iterator[tuple[str, str, Component]]:
        """Yields (projection, part, component) in file order: ("gate", "weight", …), ("gate", "scales", …) …"""
        for name, projection in self.projections.items():
            for part, component in projection.components.items():
                yield name, part, component

    def to_json(self) -> dict[str, Any]:
        return {
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            **{name: p.to_json() for name, p in self.projections.items()},
            "blob_size": self.blob_size,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any], where: str) -> BlobLayout:
        """Reads and checks a layout; raises FormatError when anything in it contradicts anything else."""
        try:
            names = [n for n in PROJECTIONS if n in data or n != "gate"]
            quantization = {n: Quantization(int(data[n]["bits"]), int(data[n]["group_size"])) for n in names}
            dtype = {n: (data[n]["scales"] or data[n]["weight"])["dtype"] for n in names}
            bias = {n: data[n]["bias"]["dtype"] for n in names if "bias" in data[n]}
            layout = cls.build(
                int(data["hidden_size"]), int(data["intermediate_size"]), quantization, dtype, bias
            )
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise FormatError(f"{where}: malformed blob layout ({e!r})") from None
        if json.loads(json.dumps(layout.to_json())) != data:
            raise FormatError(f"{where}: the blob layout is not the one that follows from its sizes")
        return layout


@dataclass(frozen=True)
class LayerEntry:
    """One layer's expert file.

    Attributes:
        crc32: zlib's, of each blob.
        module: path of the module of the library's model whose experts these are, such as
            "model.layers.3.mlp.switch_mlp"; None in a model of ours.
    """

    layer: int
    num_experts: int
    layout: int
    crc32: tuple[int, ...]
    module: str | None = None

    @property
    def file(self) -> str:
        return expert_file(self.layer)

    def to_json(self) -> dict[str, Any]:
        return _without(asdict(self), "module")


@dataclass(frozen=True)
class DenseEntry:
    """One safetensors file of the dense part."""

    file: str
    size: int
    crc32: int


def expert_file(layer: int) -> str:
    """Path of a layer's expert file, relative to the converted folder."""
    return f"experts/layer_{layer:03d}.bin"


def expert_files(
    layer: int, folder: str | os.PathLike[str], also: Sequence[str | os.PathLike[str]] = ()
) -> list[Path]:
    """Every copy of a layer's expert file in these folders; where it should be if there is none."""
    paths = [Path(f) / expert_file(layer) for f in (folder, *also)]
    return [path for path in paths if path.exists()] or paths[:1]


MODULE = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")  # the path of one in a tree of modules
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # the name of one on the hub


def converted_name(source: str | os.PathLike[str]) -> str:
    """A name for the folder that a checkpoint is converted to: one that the checkpoint does not have."""
    name = Path(source).resolve().name
    if not name.endswith("bit"):
        name += "-4bit"
    return f"{name}-flashmoe" if Path(source).exists() and Path(name).exists() else name


def convert_command(source: str | os.PathLike[str]) -> str:
    """The command that converts a checkpoint: a folder, or a repository on the hub."""
    made = converted_name(source)
    return (
        f"python -m mlx_flashmoe convert --hf-path {shlex.quote(str(source))} --mlx-path {shlex.quote(made)}"
    )


def _advice(folder: Path) -> str:
    """Why a path is not a converted folder, and the command that makes one of what it is."""
    if (folder / "config.json").is_file() and any(folder.glob("*.safetensors*")):
        return f"it is a checkpoint: convert it first, {convert_command(folder)}"
    if folder.is_dir():
        return f"no {MANIFEST} in it, and no checkpoint that could be converted"
    if REPOSITORY.fullmatch(str(folder)):
        return f"no such folder; to convert the repository of that name on the hub: {convert_command(folder)}"
    made = shlex.quote(str(folder))
    return f"no such folder; make one with: python -m mlx_flashmoe convert --hf-path SRC --mlx-path {made}"


@dataclass(frozen=True)
class Manifest:
    """flashmoe.json.

    Attributes:
        model_type: the checkpoint's, a key of ``models.ARCHITECTURES``.
        source: where it came from ("path", "revision"), what was "asked" for, and the "files" that are kept as
            published, name -> crc32; folders that were converted earlier have no "files".
        dense_quantization: module path -> Quantization, for every quantized dense module.
        layouts: distinct blob layouts; a layer names one by its index.
        layers: the expert files, by layer.
        dense: the dense safetensors files.
        library: one of LIBRARIES, whose modules the model is made of; None for ours.
    """

    model_type: str
    source: dict[str, Any]
    dense_quantization: dict[str, Quantization]
    layouts: tuple[BlobLayout, ...]
    layers: tuple[LayerEntry, ...]
    dense: tuple[DenseEntry, ...]
    library: str | None = None

    @property
    def format_version(self) -> int:
        """The first version that has all that this manifest uses."""
        newer = any(layout.gate is None or layout.biased for layout in self.layouts)
        return 2 if newer or self.library is not None or any(e.module is not None for e in self.layers) else 1

    def layout_of(self, entry: LayerEntry) -> BlobLayout:
        return self.layouts[entry.layout]

    @property
    def expert_bytes(self) -> int:
        """Bytes of all expert files together."""
        return sum(e.num_experts * self.layout_of(e).blob_size for e in self.layers)

    @property
    def dense_bytes(self) -> int:
        return sum(d.size for d in self.dense)

    def to_json(self) -> dict[str, Any]:
        data = {
            "format": FORMAT,
            "format_version": self.format_version,
            "model_type": self.model_type,
            "library": self.library,
            "source": self.source,
            "dense_quantization": {k: asdict(q) for k, q in self.dense_quantization.items()},
            "layouts": [layout.to_json() for layout in self.layouts],
            "layers": [entry.to_json() for entry in self.layers],
            "dense": [asdict(entry) for entry in self.dense],
        }
        return _without(data, "library")

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the manifest so that it is either whole or not there, even if power fails."""
        folder = Path(folder)
        temporary = folder / (MANIFEST + ".part")
        with open(temporary, "w", encoding="utf-8") as f:
            json.dump(self.to_json(), f, separators=(",", ":"))
            f.flush()
            system.flush(f.fileno())
        os.replace(temporary, folder / MANIFEST)
        system.flush_folder(folder)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], also: Sequence[str | os.PathLike[str]] = ()) -> Manifest:
        """Reads the manifest of a converted folder and checks it, and the presence and size of every file.

        Args:
            also: more folders that may hold expert files (see ``check_files``).

        Raises:
            FormatError: not a converted folder, another format version, a file missing, of another size or of
                another model.
        """
        manifest = cls.read(Path(folder))
        manifest.check_files(folder, also)
        return manifest

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Reads the manifest of a converted folder, and nothing else. Raises FormatError."""
        path = folder / MANIFEST
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            if (folder / STATE).is_dir():
                raise FormatError(
                    f"{folder} is not a converted model (the conversion is not complete); the command that began it "
                    f"resumes it, and python -m mlx_flashmoe verify --model {shlex.quote(str(folder))} says what is "
                    "missing"
                ) from None
            raise FormatError(f"{folder} is not a converted model ({_advice(folder)})") from None
        except (OSError, UnicodeDecodeError) as e:
            raise FormatError(f"{path}: cannot be read: {e}") from None
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as e:
            raise FormatError(f"{path}: not valid JSON: {e}") from None
        return cls.from_json(data, str(path))

    @classmethod
    def from_json(cls, data: Any, where: str = MANIFEST) -> Manifest:
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise FormatError(f"{where}: not a {FORMAT} manifest")
        version = data.get("format_version")
        if not isinstance(version, int) or version not in FORMAT_VERSIONS:
            raise FormatError(
                f"{where}: format version {version!r}, but this release reads versions "
                f"{' and '.join(map(str, FORMAT_VERSIONS))}; convert the checkpoint again"
            )
        try:
            manifest = cls(
                model_type=str(data["model_type"]),
                source=dict(data["source"]),
                dense_quantization={
                    str(k): Quantization(int(q["bits"]), int(q["group_size"]))
                    for k, q in data["dense_quantization"].items()
                },
                layouts=tuple(
                    BlobLayout.from_json(layout, f"{where}: layouts[{i}]")
                    for i, layout in enumerate(data["layouts"])
                ),
                layers=tuple(
                    LayerEntry(
                        int(e["layer"]),
                        int(e["num_experts"]),
                        int(e["layout"]),
                        tuple(map(int, e["crc32"])),
                        str(e["module"]) if "module" in e else None,
                    )
                    for e in data["layers"]
                ),
                dense=tuple(
                    DenseEntry(str(e["file"]), int(e["size"]), int(e["crc32"])) for e in data["dense"]
                ),
                library=str(data["library"]) if "library" in data else None,
            )
            if manifest.format_version != version:
                raise ValueError(f"format version {version} with contents of {manifest.format_version}")
            # Nothing was rounded, cut or overlooked: a value of another type, an unknown key, a missing one.
            if not _same(json.loads(json.dumps(manifest.to_json())), data):
                raise ValueError("unknown keys, or values of the wrong type")
        except _MALFORMED as e:
            raise FormatError(f"{where}: malformed manifest ({e!r})") from None
        for path, q in manifest.dense_quantization.items():
            if q.bits not in BITS or q.group_size not in GROUP_SIZES:
                raise FormatError(f"{where}: {path} has {q.bits} bits in groups of {q.group_size}")
        for entry in manifest.layers:
            if not 0 <= entry.layout < len(manifest.layouts):
                raise FormatError(
                    f"{where}: layer {entry.layer} names layout {entry.layout}, which is not there"
                )
            if entry.layer < 0 or entry.num_experts <= 0 or len(entry.crc32) != entry.num_experts:
                raise FormatError(
                    f"{where}: layer {entry.layer} has {entry.num_experts} experts and {len(entry.crc32)} checksums"
                )
            if not all(0 <= crc < 1 << 32 for crc in entry.crc32):
                raise FormatError(f"{where}: layer {entry.layer} has a checksum that is none")
        if len({entry.layer for entry in manifest.layers}) != len(manifest.layers):
            raise FormatError(f"{where}: a layer is listed twice")
        manifest._check_library(where)
        for dense in manifest.dense:
            plain = dense.file.isprintable() and not set(dense.file) & set("/\\")
            if not plain or not dense.file.endswith(".safetensors"):
                raise FormatError(
                    f"{where}: {dense.file!r} is not the name of a safetensors file in this folder"
                )
            if dense.size < 0 or not 0 <= dense.crc32 < 1 << 32:
                raise FormatError(f"{where}: {dense.file} has a size or checksum that is none")
        if len({dense.file for dense in manifest.dense}) != len(manifest.dense):
            raise FormatError(f"{where}: a dense file is listed twice")
        return manifest

    def _check_library(self, where: str) -> None:
        """Raises FormatError if the library is unknown, or a layer does not name a module of its own in it."""
        if self.library is not None and self.library not in LIBRARIES:
            raise FormatError(
                f"{where}: made for {self.library!r}, but this release knows {' and '.join(LIBRARIES)}"
            )
        for entry in self.layers:
            if entry.module is None and self.library is not None:
                raise FormatError(f"{where}: layer {entry.layer} names no module of {self.library}")
            if entry.module is not None and self.library is None:
                raise FormatError(f"{where}: layer {entry.layer} names a module, but there is no library")
            if entry.module is not None and not MODULE.fullmatch(entry.module):
                raise FormatError(f"{where}: layer {entry.layer} names {entry.module!r}, which is no module")
        modules = [entry.module for entry in self.layers if entry.module is not None]
        if len(set(modules)) != len(modules):
            raise FormatError(f"{where}: a module is listed twice")

    def check_files(
        self, folder: str | os.PathLike[str], also: Sequence[str | os.PathLike[str]] = ()
    ) -> None:
        """Raises FormatError for the first file that is missing or has another size than the manifest says.

        Args:
            also: more folders that may hold expert files: one in any of them is enough. One that is a converted
                model itself must be the same one.
        """
        folder = Path(folder)
        mend = f"python -m mlx_flashmoe verify --model {shlex.quote(str(folder))} says how to mend it"
        for other in map(Path, also):
            self._check_same_experts(folder, other)
        for dense in self.dense:
            self._check(folder / dense.file, dense.size, "", mend)
        for entry in self.layers:
            blob_size = self.layout_of(entry).blob_size
            what = f" (layer {entry.layer}, {entry.num_experts} experts of {blob_size} bytes)"
            for path in expert_files(entry.layer, folder, also):
                advice = mend
                if path != folder / entry.file:
                    advice = f"copy it again from where {folder} has it, or do without the copies in {path.parents[1]}"
                self._check(path, entry.num_experts * blob_size, what, advice)

    def _check_same_experts(self, folder: Path, other: Path) -> None:
        """Raises FormatError if ``other`` is a converted model, and one of its expert files is not this model's."""
        if not (other / MANIFEST).exists():
            return  # copies of files alone: nothing but reading them would tell
        theirs = {entry.layer: entry.crc32 for entry in Manifest.read(other).layers}
        for entry in self.layers:
            if (other / entry.file).exists() and theirs.get(entry.layer) != entry.crc32:
                raise FormatError(
                    f"{other} belongs to another model: its {MANIFEST} has other checksums for the experts of layer "
                    f"{entry.layer} than {folder / MANIFEST}; give a folder with copies of files of "
                    f"{folder / 'experts'}"
                )

    @staticmethod
    def _check(path: Path, size: int, what: str, advice: str) -> None:
        try:
            actual = os.stat(path).st_size
        except (OSError, ValueError):
            raise FormatError(f"{path}{what} is missing; {advice}") from None
        if actual != size:
            raise FormatError(f"{path}{what} has {actual} bytes, but should have {size}; {advice}")
