"""The gated delta rule: segments, and the CUDA kernel's text executed on the CPU, against the definition.

The CUDA text is compiled as C++ with a warp's 32 lanes as threads that meet at shuffles. That shows its indexing and
arithmetic; it is no GPU.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_flashmoe.kernels import gated_delta

COMPILER = shutil.which("g++") or shutil.which("clang++")
B, T, HK, HV, DK, DV = 2, 37, 2, 6, 64, 8

HARNESS = """
#include <barrier>
#include <thread>
#include <vector>
struct Index { int x, y, z; };
thread_local Index threadIdx, blockIdx, blockDim;
static std::barrier<> meet(32);
static float given[32];
static float __shfl_xor_sync(unsigned, float v, int step) {
  given[threadIdx.x] = v;
  meet.arrive_and_wait();
  const float other = given[threadIdx.x ^ step];
  meet.arrive_and_wait();
  return other;
}
constexpr int Dk = %(DK)d, Dv = %(DV)d, Hk = %(HK)d, Hv = %(HV)d;
static void kernel(const float* q, const float* k, const float* v, const float* decay, const float* beta,
                   const float* state, float* y, float* new_state, const int* q_shape) {
%(SOURCE)s
}
extern "C" void run(const float* q, const float* k, const float* v, const float* decay, const float* beta,
                    const float* state, float* y, float* new_state, const int* q_shape) {
  for (int z = 0; z < q_shape[0] * Hv; ++z)
    for (int row = 0; row < Dv; ++row) {
      std::vector<std::thread> lanes;
      for (int lane = 0; lane < 32; ++lane)
        lanes.emplace_back([=] {
          blockDim = {32, %(ROWS)d, 1};
          threadIdx = {lane, row %% %(ROWS)d, 0};
          blockIdx = {0, row / %(ROWS)d, z};
          kernel(q, k, v, decay, beta, state, y, new_state, q_shape);
        });
      for (auto& lane : lanes) lane.join();
    }
}
"""


def inputs() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((B, T, HK, DK)) for _ in range(2))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    v = rng.standard_normal((B, T, HV, DV))
    decay, beta = (rng.uniform(0.3, 1, (B, T, HV)) for _ in range(2))
    state = rng.standard_normal((B, HV, DV, DK))
    return [a.astype(np.float32) for a in (q, k, v, decay, beta, state)]


def definition(q, k, v, decay, beta, state) -> tuple[np.ndarray, np.ndarray]:
    """Token by token in float64."""
    q, k, v, decay, beta, s = (a.astype(np.float64) for a in (q, k, v, decay, beta, state))
    q, k = (np.repeat(a, HV // HK, axis=2) for a in (q, k))
    y = np.empty(v.shape)
    for t in range(T):
        s = s * decay[:, t, :, None, None]
        delta = (v[:, t] - (s @ k[:, t, :, :, None])[..., 0]) * beta[:, t, :, None]
        s = s + delta[..., None] * k[:, t, :, None, :]
        y[:, t] = (s @ q[:, t, :, :, None])[..., 0]
    return y, s


def close(got: tuple[np.ndarray, ...], want: tuple[np.ndarray, ...]) -> bool:
    return all(np.linalg.norm(g - w) <= 1e-5 * np.linalg.norm(w) for g, w in zip(got, want))


def test_segments_and_single_tokens_follow_the_definition() -> None:
    arrays = [mx.array(a) for a in inputs()]
    want = definition(*inputs())
    assert gated_delta.SEGMENT < T  # or there would be one segment
    assert close(tuple(map(np.asarray, gated_delta.gated_delta_update(*arrays))), want)
    state, rows = arrays[5], []
    for t in range(T):
        y, state = gated_delta.gated_delta_update(*(a[:, t : t + 1] for a in arrays[:5]), state)
        rows.append(y)
    assert close((np.asarray(mx.concatenate(rows, axis=1)), np.asarray(state)), want)


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler to execute the CUDA text with")
def test_the_cuda_text_follows_the_definition(tmp_path: Path) -> None:
    constants = dict(DK=DK, DV=DV, HK=HK, HV=HV, ROWS=gated_delta.ROWS, SOURCE=gated_delta._CUDA)
    (tmp_path / "kernel.cpp").write_text(HARNESS % constants)
    library = tmp_path / "kernel.so"
    command = [str(COMPILER), "-std=c++20", "-O1", "-pthread", "-shared", "-fPIC", "-o", str(library)]
    subprocess.run([*command, str(tmp_path / "kernel.cpp")], check=True, timeout=120)
    arrays = inputs()
    y = np.full((B, T, HV, DV), np.nan, np.float32)
    state = np.full((B, HV, DV, DK), np.nan, np.float32)
    shape = np.array([B, T, HK, DK], np.int32)
    pointers = [ctypes.c_void_p(a.ctypes.data) for a in (*arrays, y, state, shape)]
    ctypes.CDLL(str(library)).run(*pointers)
    assert close((y, state), definition(*arrays))
