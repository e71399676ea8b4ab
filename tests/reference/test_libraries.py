"""Every architecture with experts of mlx-lm and mlx-vlm, with streamed experts, computes what the library computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is a reference; pip install .[reference]")
pytest.importorskip("mlx_vlm", reason="mlx-vlm is a reference; pip install .[reference]")

import library_models as lib
import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_flashmoe import convert, load, models
from mlx_flashmoe.errors import FlashMoEError

# Other orders of summation, in float32; logits are a few units.
TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def _as_if_ours_were_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Architectures that ``models`` has too are taken from the libraries."""
    for name in (*lib.MLX_LM, *lib.MLX_VLM):
        monkeypatch.delitem(models.ARCHITECTURES, name, raising=False)


@pytest.fixture(autouse=True)
def _uncompiled() -> None:
    """On a CPU the libraries' compiled functions need a C++ compiler."""
    mx.disable_compile()


@pytest.mark.parametrize(("library", "model_type", "bits"), lib.rows())
def test_computes_what_the_library_computes(
    tmp_path: Path, library: str, model_type: str, bits: int | None
) -> None:
    assert_computes_the_same(tmp_path, library, model_type, bits)


def some_layers(path: str, module: nn.Module) -> bool:
    return "layers.1." not in path


def every_projection_its_own(path: str, module: nn.Module) -> dict[str, Any]:
    bits = next(
        (bits for name, bits in {"gate_proj": 3, "down_proj": 6, "layers.1.": 8}.items() if name in path), 4
    )
    return {"bits": bits, "group_size": 32, "mode": "affine"}


@pytest.mark.parametrize("library", lib.TABLES)
@pytest.mark.parametrize(
    "quantization",
    [
        dict(bits=4, group=32, mode="mxfp4"),
        dict(bits=8, group=32, mode="mxfp8"),
        dict(bits=4, group=16, mode="nvfp4"),
        dict(bits=5, group=32),
        dict(bits=4, group=64),
        dict(bits=4, predicate=some_layers),
        dict(bits=4, predicate=every_projection_its_own),
    ],
    ids=["mxfp4", "mxfp8", "nvfp4", "5 bits", "groups of 64", "some layers", "every projection its own"],
)
def test_however_it_is_quantized(tmp_path: Path, library: str, quantization: dict[str, Any]) -> None:
    assert_computes_the_same(tmp_path, library, "gpt_oss", **quantization)


def assert_computes_the_same(
    tmp_path: Path, library: str, model_type: str, bits: int | None, **how: Any
) -> None:
    source = lib.make(library, lib.config(library, model_type), tmp_path / "src", bits, **how)
    model = lib.resident(library, source)
    prompt, other = lib.TOKENS[:1], lib.TOKENS[1:]
    want = [
        lib.logits(model, prompt),
        lib.resident_in_pieces(library, model, prompt),
        lib.logits(model, other),
    ]
    assert 0.1 < np.abs(want).max() < 20  # ordinary logits: no comparison of zeros, and no chaos

    convert(source, tmp_path / "dst", q_bits=None if bits else 16)
    computed = []
    for memory in ("auto", "os"):
        ours, _ = load(tmp_path / "dst", expert_memory=memory)

        def call(tokens: np.ndarray, cache: object = None, ours: nn.Module = ours) -> np.ndarray:
            return np.asarray(ours(mx.array(tokens), cache).astype(mx.float32))

        computed.append([call(prompt), lib.in_pieces(call, prompt, ours.make_cache()), call(other)])
        assert_goes_on(ours, call, prompt)
    np.testing.assert_array_equal(*computed)
    assert np.abs(np.array(computed[0]) - want).max() <= TOLERANCE


def assert_goes_on(model: nn.Module, call: Callable[..., np.ndarray], tokens: np.ndarray) -> None:
    """A kept cache goes on as the one that it was kept of, bit for bit, each time that it is restored."""
    (cache,) = model.make_cache()
    call(tokens[:, :7], [cache])
    kept = cache.snapshot()
    mx.eval(kept)
    want = [call(tokens[:, a:b], [cache]) for a, b in ((7, 10), (10, 11))]
    for _ in range(2):
        (fresh,) = model.make_cache()
        fresh.restore(kept, 7)
        got = [call(tokens[:, a:b], [fresh]) for a, b in ((7, 10), (10, 11))]
        assert all(map(np.array_equal, got, want))


@pytest.mark.parametrize(("library", "model_type"), lib.REFUSED)
def test_refuses_what_cannot_be_streamed_by_name(tmp_path: Path, library: str, model_type: str) -> None:
    source = lib.make(library, lib.config(library, model_type), tmp_path / "src", None)
    with pytest.raises(FlashMoEError) as refused:
        convert(source, tmp_path / "dst", q_bits=16)
        load(tmp_path / "dst")
    assert lib.REFUSED[library, model_type][0] in str(refused.value)
    assert model_type in str(refused.value)


@pytest.mark.parametrize("library", lib.TABLES)
@pytest.mark.parametrize("model_type", lib.METAL)
@pytest.mark.skipif(mx.metal.is_available(), reason="it runs on Metal")
def test_what_only_metal_can_run_is_converted_and_refused_by_name(
    tmp_path: Path, library: str, model_type: str
) -> None:
    source = lib.make(library, lib.config(library, model_type), tmp_path / "src", 4)
    convert(source, tmp_path / "dst")
    with pytest.raises(FlashMoEError, match=rf"{model_type}.*Metal"):
        load(tmp_path / "dst")


def test_the_documented_table_is_this_one() -> None:
    documented = Path(__file__, "../../../docs/models.md").resolve().read_text()
    assert lib.table() in documented, "python tests/reference/library_models.py writes docs/models.md's table"
