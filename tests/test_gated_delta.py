"""The gated delta rule: segments, and the CUDA kernel's text executed on the CPU, against the definition.

The CUDA text is compiled as C++ and run by the emulation of tests/metal_emulator. That shows its indexing and
arithmetic; it is no GPU.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from metal_emulator import COMPILER, HERE, Job, Launch, run

from mlx_flashmoe.kernels import gated_delta
from mlx_flashmoe.selftest.delta_rule import TOLERANCE, definition, error, random_inputs

B, T, HK, HV, DK, DV = 2, 37, 2, 6, 64, 8

# What CUDA gives a kernel, in terms of the emulation, whose SIMD groups are as wide as warps.
HARNESS = """
#include "metal_emulator.h"
static float __shfl_xor_sync(unsigned, float value, int step) {
  struct Lane { float value; int step; } mine = {value, step};
  emulator::together(&mine, [](void** lanes) {
    float given[32];
    for (int i = 0; i < 32; ++i) given[i] = static_cast<Lane*>(lanes[i])->value;
    for (int i = 0; i < 32; ++i) {
      Lane& lane = *static_cast<Lane*>(lanes[i]);
      lane.value = given[i ^ lane.step];
    }
  });
  return mine.value;
}
%(CONSTANTS)s
static void kernel(void** buffers) {
  const uint3 threadIdx = emulator::self().thread_position_in_threadgroup;
  const uint3 blockIdx = emulator::self().threadgroup_position_in_grid;
  const uint3 blockDim = {%(BLOCK)s};
  %(BUFFERS)s
%(SOURCE)s
}
extern "C" void run_%(KEY)s(int n, const emulator::Buffer* buffers, const int32_t* grid, const int32_t* group,
                            int backwards) {
  emulator::launch(kernel, n, buffers, grid, group, backwards);
}
"""
INPUTS = ("q", "k", "v", "decay", "beta", "state", "q_shape")
OUTPUTS = ("y", "new_state")


def inputs() -> list[np.ndarray]:
    return random_inputs(B, T, HK, HV, DK, DV)


def close(got: tuple[np.ndarray, ...], want: tuple[np.ndarray, ...]) -> bool:
    return error(got, want) <= TOLERANCE


FUNCTIONS = {
    "the default": gated_delta.gated_delta_update,
    "in segments": gated_delta._in_segments,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_prompts_and_single_tokens_follow_the_definition(name: str) -> None:
    function = FUNCTIONS[name]
    arrays = [mx.array(a) for a in inputs()]
    want = definition(*inputs())
    assert gated_delta.SEGMENT < T  # or there would be one segment
    whole = tuple(map(np.asarray, function(*arrays)))
    assert close(whole, want)
    state, rows = arrays[5], []
    for t in range(T):
        y, state = function(*(a[:, t : t + 1] for a in arrays[:5]), state)
        rows.append(y)
    single = np.asarray(mx.concatenate(rows, axis=1)), np.asarray(state)
    assert close(single, want)
    if mx.default_device() == mx.cpu:
        assert all(np.array_equal(a, b) for a, b in zip(single, whole))


def test_heads_share_work_without_changing_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = pytest.importorskip("mlx_flashmoe.kernels.cpu")
    eager = gated_delta._on_cpu()
    assert eager is not None
    arrays = [mx.array(a) for a in inputs()]
    alone = eager(*arrays)
    monkeypatch.setattr(cpu, "SMALL", 0)
    shared = eager(*arrays)
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(alone, shared))


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler to execute the CUDA text with")
def test_the_cuda_text_follows_the_definition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: dict[str, Any] = {}

    def kernel(**arguments: Any) -> tuple[None, None]:
        called.update(arguments)
        return None, None

    monkeypatch.setattr(gated_delta, "_cuda_kernel", lambda: kernel)
    arrays = inputs()
    gated_delta._cuda(*map(mx.array, arrays))
    launch = Launch(
        gated_delta._CUDA,
        INPUTS,
        OUTPUTS,
        called["grid"],
        called["threadgroup"],
        tuple(map(tuple, called["output_shapes"])),
        tuple(called["output_dtypes"]),
    )
    kinds = ["const float*"] * 6 + ["const int*"] + ["float*"] * 2
    named = enumerate(zip(kinds, INPUTS + OUTPUTS))
    source, library = tmp_path / "kernel.cpp", tmp_path / "kernel.so"
    source.write_text(
        HARNESS
        % {
            "CONSTANTS": "\n".join(
                f"constexpr int {name} = {n};"
                for name, n in [*called["template"], ("tokens", *called["scalars"])]
            ),
            "BLOCK": ", ".join(map(str, launch.threadgroup)),
            "BUFFERS": "\n  ".join(f"{kind} {name} = ({kind})buffers[{i}];" for i, (kind, name) in named),
            "SOURCE": launch.text,
            "KEY": launch.key,
        }
    )
    command = [str(COMPILER), "-std=gnu++14", "-O1", "-shared", "-fPIC", f"-I{HERE}", "-o", str(library)]
    subprocess.run([*command, str(source)], check=True, timeout=120)
    given = dict(zip(INPUTS, [*arrays, np.array(arrays[0].shape, np.int32)]))
    (result,) = run({launch.key: library}, [Job([launch], given)])
    assert close((result["y"], result["new_state"]), definition(*arrays))
