"""No kernel that the package makes for Metal, and no format of it, is left out of the emulation."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache

import pytest
import test_row_kernels
from metal_emulator import CLANG, Launch, check_address_spaces, record
from metal_emulator.coverage import Coverage, Format, cover, mlx_kernels_called, names_made
from metal_emulator.report import limits
from metal_texts import every_launch

from mlx_flashmoe.kernels import gpu, metal
from mlx_flashmoe.layout import BITS, GROUP_SIZES, UNQUANTIZED

EXPERT_KERNELS = {"gate_up", "down", "rows_gate_up", "rows_down"}


@cache
def covered() -> dict[str, Coverage]:
    return cover(every_launch())


def test_every_kernel_of_the_package_is_emulated() -> None:
    made = names_made()
    assert set(made) > EXPERT_KERNELS and "route" in made
    assert set(covered()) == set(made)


def test_every_format_is_emulated() -> None:
    for name, coverage in covered().items():
        if name not in EXPERT_KERNELS:
            assert coverage.formats == {Format(dtype) for dtype in gpu.TYPES.values()}, name
            continue
        formulations = (gpu.DEFAULT_FORMULATION,) if name.startswith("rows_") else gpu.FORMULATIONS
        missing = {
            Format(dtype, formulation, bits, group_size)
            for dtype, formulation, bits, group_size in itertools.product(
                gpu.TYPES.values(), formulations, BITS, GROUP_SIZES
            )
        } - coverage.formats
        assert not missing, (name, missing)
        assert any(f.bits == UNQUANTIZED and not f.group_size for f in coverage.formats), name


def test_the_formats_are_those_of_the_text() -> None:
    """Of a kernel whose text says 3 bits where 4 were asked for, 3 are covered."""
    launch = next(iter(every_launch()))
    assert {f.bits for f in cover([launch])["gate_up"].formats} == {2}
    other = replace(launch, text=launch.text.replace("bits = 2,", "bits = 3,"))
    assert {f.bits for f in cover([other])["gate_up"].formats} == {3}


@pytest.mark.parametrize("name", ["a_name", '"norm" + suffix'])
def test_a_name_that_is_not_written_out_is_refused(name: str, tmp_path, monkeypatch) -> None:
    from metal_emulator import coverage

    path = tmp_path / "new_kernel.py"
    path.write_text(f"kernel = gpu.row_kernel(language, {name}, [], [], '', dtype)\n")
    monkeypatch.setattr(coverage, "ROOT", tmp_path)
    monkeypatch.setattr(coverage, "SOURCES", [path])
    with pytest.raises(AssertionError, match="write it out"):
        names_made()
    path.write_text("kernel = mx.fast.metal_kernel('name', [], [], '')\n")
    with pytest.raises(AssertionError, match="alone makes Metal kernels"):
        names_made()


def test_what_is_not_emulated_is_said() -> None:
    assert "mx.fast.gated_delta_update" in mlx_kernels_called()
    assert "Apple's compiler" in limits() and "gated_delta_update" in limits()


@pytest.mark.skipif(CLANG is None, reason="no clang++ to check Metal's address spaces with")
@pytest.mark.parametrize("name", [n for n in test_row_kernels.CASES if n.endswith("bfloat16")])
def test_address_spaces(name: str) -> None:
    case = test_row_kernels.CASES[name]
    launches: list[Launch] = record(metal.LANGUAGE, case.kernel, *case.arrays())
    for launch in launches:
        check_address_spaces(launch, str(CLANG))
