"""Small expert folders with random blobs, for tests of what reads and computes them."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mlx_flashmoe.experts import ExpertStore
from mlx_flashmoe.layout import (
    PROJECTIONS,
    BlobLayout,
    LayerEntry,
    Manifest,
    Quantization,
    expert_file,
)


def random_blob(rng: np.random.Generator, layout: BlobLayout) -> bytes:
    """One expert with plausible values: random integers, float32 scales and biases near 0.05."""
    blob = np.zeros(layout.blob_size, dtype=np.uint8)
    for _, part, component in layout.components():
        if part == "weight" and component.dtype == "uint32":
            values = rng.integers(0, 2**32, component.shape, dtype=np.uint32)
        else:
            values = (rng.standard_normal(component.shape) * 0.05).astype(np.float32)
        blob[component.offset : component.offset + component.nbytes] = values.view(np.uint8).reshape(-1)
    return blob.tobytes()


def write_experts(
    folder: Path,
    *,
    layers: int,
    experts: int,
    hidden: int = 64,
    intermediate: int = 32,
    seed: int = 0,
    also: Sequence[Path] = (),
) -> tuple[ExpertStore, list[list[bytes]]]:
    """Writes expert files and returns the open store, over ``also`` too, and the blobs, [layer][expert]."""
    rng = np.random.default_rng(seed)
    quantization = {name: Quantization(4, 32) for name in PROJECTIONS}
    layout = BlobLayout.build(hidden, intermediate, quantization, "float32")
    blobs = [[random_blob(rng, layout) for _ in range(experts)] for _ in range(layers)]
    (folder / "experts").mkdir(parents=True, exist_ok=True)
    entries = []
    for layer in range(layers):
        (folder / expert_file(layer)).write_bytes(b"".join(blobs[layer]))
        entries.append(LayerEntry(layer, experts, 0, tuple(zlib.crc32(b) for b in blobs[layer])))
    manifest = Manifest("test", {}, {}, (layout,), tuple(entries), ())
    return ExpertStore(folder, manifest, also), blobs
