"""The GPU kernels that work on rows of activations, as Metal in the emulation and, where there is one, on CUDA.

Compared with the operations they take the place of, in float64 where nothing is rounded in between.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from metal_emulator import COMPILER, Job, Launch, compile_kernels, record, run

from mlx_flashmoe.kernels import cuda, metal, router
from mlx_flashmoe.selftest.floats import DTYPES, decode
from mlx_flashmoe.selftest.row_cases import (
    TOLERANCE,
    Case,
    delta_case,
    gated_norm_case,
    norm_case,
    router_case,
)

CASES = {
    f"{name}-{dtype}": make(dtype)
    for dtype in DTYPES
    for name, make in {
        "norm": lambda d: norm_case(d, (3, 4096), False),
        "norm of odd rows": lambda d: norm_case(d, (2, 3, 200), False),
        "norm of short rows": lambda d: norm_case(d, (5, 7), False),
        "add and norm": lambda d: norm_case(d, (2, 1100), True),
        "add and norm of wide rows": lambda d: norm_case(d, (1, 9000), True),
        "gated norm": lambda d: gated_norm_case(d, 5, 128),
        "gated norm of odd rows": lambda d: gated_norm_case(d, 2, 50),
        "router": lambda d: router_case(d, 2, 512 if d != "bfloat16" else 256, 10, True),
        "router of few": lambda d: router_case(d, 3, 40, 1, False),
        "delta inputs": lambda d: delta_case(d, 2, 2, 4, 128),
        "delta inputs of narrow heads": lambda d: delta_case(d, 1, 1, 3, 32),
    }.items()
}


def check(case: Case, outputs: dict[str, np.ndarray]) -> None:
    assert case.error(outputs) <= TOLERANCE[case.dtype]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, np.ndarray]]:
    """Every case's outputs in the emulation."""
    launches: dict[str, list[Launch]] = {
        name: record(metal.LANGUAGE, case.kernel, *case.arrays()) for name, case in CASES.items()
    }
    every = [launch for group in launches.values() for launch in group]
    libraries = compile_kernels(every, tmp_path_factory.mktemp("rows"))
    jobs = [Job(launches[name], case.encoded()) for name, case in CASES.items()]
    return dict(zip(CASES, run(libraries, jobs)))


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler (g++ or clang++) to emulate Metal with")
@pytest.mark.parametrize("name", CASES)
def test_metal(name: str, emulated: dict[str, dict[str, np.ndarray]]) -> None:
    outputs = {k: decode(v) if v.dtype != np.int32 else v for k, v in emulated[name].items()}
    check(CASES[name], outputs)


@pytest.mark.skipif(mx.default_device() != mx.cpu, reason="a GPU has the kernels")
@pytest.mark.parametrize("name", CASES)
def test_the_operations_that_a_cpu_has_instead(name: str) -> None:
    case = CASES[name]
    check(case, case.named(case.plain(*case.arrays())))


@pytest.mark.skipif(not mx.cuda.is_available(), reason="MLX finds no CUDA GPU")
@pytest.mark.parametrize("name", CASES)
def test_cuda(name: str) -> None:
    case = CASES[name]
    check(case, case.named(case.kernel(cuda.LANGUAGE, *case.arrays())))


def test_the_router_always_names_experts() -> None:
    """Whatever the logits are: an id out of range would make a kernel read outside the slab."""
    logits = mx.array([[float("nan")] * 4, [float("inf"), float("nan"), -float("inf"), 0.0]])
    ids, _ = router.route(logits, 3, True)
    for row in np.array(ids).tolist():
        assert len(set(row)) == 3 and set(row) <= {0, 1, 2, 3}
