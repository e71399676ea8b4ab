"""Every CUDA kernel goes through NVIDIA's compiler, which needs no GPU: in every format, for Hopper and for Ada.

That what is compiled computes the right thing, tests/test_cuda_kernels.py and selftest show on a GPU.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import test_metal_kernels
import test_row_kernels

from mlx_flashmoe.experts import cuda as experts_cuda
from mlx_flashmoe.experts import table
from mlx_flashmoe.kernels import add_norm, cuda, gated_delta, gpu, nvrtc, tuning
from mlx_flashmoe.selftest.expert_cases import layout_of

ARCHITECTURES = ("sm_90a", "sm_89")


def available() -> bool:
    try:
        nvrtc._library(), nvrtc._headers()
    except FileNotFoundError:
        return False
    return True


pytestmark = pytest.mark.skipif(
    not available(), reason="NVRTC is not installed: pip install 'mlx-flashmoe[nvrtc]'"
)


def every_text(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The texts of all kernels, with their names."""
    texts: dict[str, str] = {}

    def record(self: nvrtc.Kernel, **launch: Any) -> list[mx.array]:
        dtypes = [a.dtype for a in launch["inputs"]], launch["output_dtypes"]
        texts[self.text(*dtypes, launch.get("template", ()))] = self._name
        return [mx.zeros(s, d) for s, d in zip(launch["output_shapes"], launch["output_dtypes"], strict=True)]

    monkeypatch.setattr(nvrtc.Kernel, "__call__", record)
    language = cuda.LANGUAGE
    for case in test_row_kernels.CASES.values():
        case.kernel(language, *case.arrays())
    for dtype in gpu.TYPES:  # activations and weights of any two dtypes
        for weight in gpu.TYPES:
            x = mx.zeros((2, 64), dtype)
            add_norm.launch(language, x, None, mx.zeros((64,), weight), 1e-6)
            add_norm.launch(language, x, x, mx.zeros((64,), weight), 1e-6)
    cases = test_metal_kernels.every_configuration() + test_metal_kernels.MIXED_AND_UNQUANTIZED
    for case in cases:
        launch_experts(language, case.layout, case.dtype, case.formulation, bool(case.rows))
    true = layout_of(4096, 1024, 4, 64)
    own = language.tiling
    for formulation in (*gpu.FORMULATIONS, gpu.MATRIX):
        for change in ({}, *tuning.gate_tilings(formulation), *tuning.down_tilings(formulation)):
            tiled = replace(language, tiling=replace(own, **change))
            launch_experts(tiled, true, "bfloat16", formulation, False)
    for formulation in (gpu.DEFAULT_FORMULATION, gpu.MATRIX):
        for change in ({}, *tuning.rows_tilings(formulation)):
            tiled = replace(language, tiling=replace(own, **change))
            launch_experts(tiled, true, "bfloat16", formulation, True)

    q, v, state = mx.zeros((1, 3, 2, 64)), mx.zeros((1, 3, 4, 64)), mx.zeros((1, 4, 64, 64))
    gated_delta._cuda(q, q, v, mx.zeros((1, 3, 4)), mx.zeros((1, 3, 4)), state)
    experts_cuda.device_address(mx.zeros((4,), mx.uint32))
    host = SimpleNamespace(_most=8, _address=mx.zeros((1,), mx.uint64))
    experts_cuda.HostCopy.__call__(host, mx.zeros((1, 4), mx.int32))  # type: ignore[arg-type]
    rows = SimpleNamespace(_rows=[mx.zeros((1,), mx.uint64)])
    table.CudaTable.lookup(rows, 0, mx.zeros((1, 4), mx.int32))  # type: ignore[arg-type]
    return texts


def launch_experts(language: gpu.Language, layout: Any, dtype: str, formulation: str, rows: bool) -> None:
    x, slab = mx.zeros((2, layout.hidden_size), test_metal_kernels.MX[dtype]), mx.zeros((1, 4), mx.uint32)
    if rows:
        gpu.expert_rows(language, x, slab, mx.array(np.zeros(2, np.int32)), layout, formulation)
    else:
        gpu.expert_ffn(language, x, slab, mx.zeros((2, 3), mx.int32), mx.zeros((2, 3)), layout, formulation)


def test_every_kernel_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = every_text(monkeypatch)
    names = {name.rpartition("_")[0] if name[-8:].isalnum() else name for name in texts.values()}
    assert {"flashmoe_gate_up", "flashmoe_rows_down", "flashmoe_route", "flashmoe_delta_inputs"} <= names
    assert {"flashmoe_gated_delta", "flashmoe_address", "flashmoe_export", "flashmoe_lookup"} <= set(
        texts.values()
    )

    def wrong(work: tuple[str, str]) -> str:
        text, architecture = work
        try:
            assert nvrtc.compile(text, architecture)[:4] == b"\x7fELF"
        except RuntimeError as e:
            return f"{texts[text]} for {architecture}: {e}"
        return ""

    work = [(text, ARCHITECTURES[0]) for text in texts] + [
        (text, ARCHITECTURES[1]) for text in list(texts)[::5]
    ]
    with ThreadPoolExecutor() as pool:
        assert [what for what in pool.map(wrong, work) if what] == []


def test_a_kernel_that_does_not_compile_says_where() -> None:
    kernel = nvrtc.Kernel("planted", ["x"], ["y"], "y[0] = oops;")
    with pytest.raises(RuntimeError, match='identifier "oops" is undefined'):
        nvrtc.compile(kernel.text([mx.float32], [mx.float32], ()), ARCHITECTURES[0])


def test_what_was_compiled_is_kept(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(nvrtc, "_architecture", lambda: ARCHITECTURES[0])
    text = nvrtc.Kernel("kept", ["x"], ["y"], "y[0] = N;").text([mx.float32], [mx.bfloat16], [("N", 3)])
    first = nvrtc.build(text)
    monkeypatch.setattr(nvrtc, "compile", lambda *_: pytest.fail("compiled again"))
    assert nvrtc.build(text) == first
