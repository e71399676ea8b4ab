"""Kernels that do not compile or are wrong, planted: the model runs all the same, and its text is right.

The GPU is played on the CPU: its kernels are what each test plants. tests/test_gpu_model.py plants real ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_flashmoe import convert, generate, kernels, load, user_cache
from mlx_flashmoe.errors import FlashMoEError
from mlx_flashmoe.kernels import (
    add_norm,
    chosen,
    gated_delta,
    gpu,
    metal,
    mlx_experts,
    reference,
    trust,
    tuning,
)
from mlx_flashmoe.kernels.random_slab import random_slab
from mlx_flashmoe.selftest.expert_cases import Experts, clamped_swiglu, layout_of, squared_relu
from mlx_flashmoe.selftest.floats import error
from mlx_flashmoe.selftest.workplace import Workplace, model_types

MODEL = Path(__file__).parents[1] / "examples" / "small_moe" / "model"
QUESTION = "Who is the mayor of Tarnwick?"
COMPILER_ERROR = (
    "[metal::Device] Unable to build metal library from source\n"
    "program_source:7:3: error: unknown type name 'oops'"
)

pytestmark = pytest.mark.skipif(mx.default_device() != mx.cpu, reason="the GPU is played on the CPU")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trust") / "model"
    convert(MODEL, path)
    return path


@pytest.fixture(autouse=True)
def a_new_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    forget()
    yield
    forget()
    trust.use("auto")


def forget() -> None:
    """What a process knows of kernels, but for what is in the user's cache."""
    trust._wrong.clear()
    chosen._experts.clear()


def does_not_compile(**launch: Any) -> list[mx.array]:
    raise RuntimeError(COMPILER_ERROR)


def gives_zeros(**launch: Any) -> list[mx.array]:
    return [mx.zeros(s, d) for s, d in zip(launch["output_shapes"], launch["output_dtypes"], strict=True)]


def gives_nan(**launch: Any) -> list[mx.array]:
    return [zeros + float("nan") if zeros.dtype != mx.int32 else zeros for zeros in gives_zeros(**launch)]


PLANTS = {"does not compile": does_not_compile, "zeros": gives_zeros, "NaN": gives_nan}


def plant(monkeypatch: pytest.MonkeyPatch, kernel: Callable[..., list[mx.array]]) -> list[str]:
    """Plays a GPU all of whose kernels are ``kernel``. Returns the names of those that are made, as they are."""
    made: list[str] = []

    def make(name: str, *_: Any) -> Callable[..., list[mx.array]]:
        made.append(name)
        return kernel

    language = replace(metal.LANGUAGE, make_kernel=make)
    monkeypatch.setattr(gpu, "backend", lambda: SimpleNamespace(LANGUAGE=language))
    # The one kernel that is not made through gpu.make.
    monkeypatch.setattr(
        gated_delta,
        "_on_gpu",
        lambda q, k, v, decay, beta, state: kernel(
            output_shapes=[v.shape, state.shape], output_dtypes=[mx.float32] * 2
        ),
    )
    return made


def text_of(folder: Path, **options: Any) -> tuple[str, list[str]]:
    """The answer to QUESTION, and the lines that were announced. Experts are streamed: two of a layer's are missing."""
    lines: list[str] = []
    model, tokenizer = load(folder, expert_memory=20 * slot_bytes(folder), announce=lines.append, **options)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True
    )
    return generate(model, tokenizer, prompt, max_tokens=40), lines


def slot_bytes(folder: Path) -> int:
    from mlx_flashmoe.layout import Manifest

    return Manifest.load(folder).layouts[0].blob_size


@pytest.mark.parametrize("name", PLANTS)
def test_a_model_runs_without_its_kernels(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right, _ = text_of(folder)
    assert "mayor" in right
    made = plant(monkeypatch, PLANTS[name])
    text, lines = text_of(folder)
    assert text == right
    assert made, "nothing was tried"
    told = [line for line in lines if "kernel is not used on this GPU" in line]
    expected = {f"the {kernel} kernel" for kernel in ("experts", "norm", "gated_norm", "router")}
    assert {line.partition(" is not used")[0] for line in told} >= expected
    for line in told:
        assert line.count("\n") == 0 and line.endswith("python -m mlx_flashmoe selftest")
        if name == "does not compile":
            assert "error: unknown type name 'oops'" in line


@pytest.mark.parametrize("model_type", model_types())
def test_every_kernel_is_compared_before_the_first_token(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Workplace(tmp_path)
    converted = place.model(model_type)
    made = plant(monkeypatch, gives_zeros)
    model, _ = load(converted, announce=lambda line: None)
    compared = sorted(made)
    cache = model.make_cache()
    for tokens in ([[1, 2, 3, 4, 5, 6, 7, 8, 9]], [[1]], [[2]]):
        assert mx.isfinite(model(mx.array(tokens), cache)).all().item()
    assert compared and sorted(made) == compared


def test_what_was_found_is_kept_for_the_next_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, does_not_compile)
    right, first = text_of(folder)
    forget()
    made = plant(monkeypatch, does_not_compile)
    text, lines = text_of(folder)
    assert (text, made) == (right, [])
    assert [line for line in lines if "kernel" in line] == [
        line for line in first if "kernel" in line and "measured once" not in line
    ]


def test_a_compiler_that_is_missing_is_looked_for_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(**launch: Any) -> list[mx.array]:
        raise FileNotFoundError("CUDA's headers are not found")

    plant(monkeypatch, missing)
    right, lines = text_of(folder)
    assert any("headers are not found" in line for line in lines)
    forget()
    made = plant(monkeypatch, missing)
    text, _ = text_of(folder)
    assert text == right and made


def test_mlx_by_hand_makes_no_kernel(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right, _ = text_of(folder)
    made = plant(monkeypatch, does_not_compile)
    text, lines = text_of(folder, kernels="mlx")
    assert (text, made) == (right, [])
    assert not any("kernel" in line for line in lines)


def test_custom_by_hand_is_used_unseen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, does_not_compile)
    with pytest.raises(RuntimeError, match="oops"):
        text_of(folder, kernels="custom")


def test_a_mode_that_there_is_not() -> None:
    with pytest.raises(ValueError, match="one of auto, custom, mlx"):
        trust.use("metal")


def test_the_choice_is_part_of_the_identity(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, does_not_compile)
    plain = load(folder, kernels="mlx")[0].identity
    layout = next(iter(load(folder, kernels="mlx")[0].arena.store._files.values())).layout
    other = chosen.Experts(metal.LANGUAGE, chosen.Choice("naive", "grouped", metal.LANGUAGE.tiling))
    for key in list(chosen._experts):
        if key[1] == layout:
            chosen._experts[key] = other
    assert load(folder, kernels="mlx")[0].identity != plain


# Parts


def reference_serves(monkeypatch: pytest.MonkeyPatch, wrong: Callable[[str], bool] = lambda f: False) -> None:
    """Plays a GPU whose experts' kernels are the reference's operations; ``wrong``: formulations that are not."""
    plant(monkeypatch, gives_zeros)

    def ffn(
        language: Any, x: Any, slab: Any, slots: Any, weights: Any, layout: Any, formulation: str, **_: Any
    ) -> mx.array:
        y = reference.expert_ffn(x, slab, slots, weights, layout)
        return 2 * y if wrong(formulation) else y

    def rows(
        language: Any, x: Any, slab: Any, slots: Any, layout: Any, formulation: str, **_: Any
    ) -> mx.array:
        return reference.expert_rows(x, slab, slots, layout).astype(x.dtype)

    monkeypatch.setattr(gpu, "expert_ffn", ffn)
    monkeypatch.setattr(gpu, "expert_rows", rows)


def prepared(monkeypatch: pytest.MonkeyPatch, fast: str) -> chosen.Choice:
    """The choice where ``fast`` is the formulation that is measured to be the fastest."""
    monkeypatch.setattr(tuning, "fastest", lambda own, ways, launches: fast if fast in ways else own)
    layout = layout_of(64, 96, 4, 32)
    blobs = np.array(random_slab(layout, 6))
    choice = chosen.prepare(layout, mx.float32, 2, lambda count: blobs)
    assert choice is not None
    return choice


def test_kernels_that_are_right_are_used_as_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    reference_serves(monkeypatch)
    assert prepared(monkeypatch, "fma") == chosen.Choice("fma", "grouped", metal.LANGUAGE.tiling)


def test_a_fast_formulation_that_is_wrong_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    reference_serves(monkeypatch, wrong=lambda formulation: formulation == "fma")
    assert prepared(monkeypatch, "fma") == chosen.Choice("grouped", "grouped", metal.LANGUAGE.tiling)


def test_mlx_s_kernel_is_not_trusted_either(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where MLX's delta rule on Metal is wrong, the rule is computed step by step."""
    q, k, v, state = trust.normals((1, 20, 2, 32), (1, 20, 2, 32), (1, 20, 4, 32), (1, 4, 32, 32))
    decay, beta = (mx.sigmoid(part) for part in trust.normals((1, 20, 4), (1, 20, 4)))
    expected = mx.fast.gated_delta_update(q, k, v, decay, beta, state)
    monkeypatch.setattr(gated_delta, "ON_METAL", ((2, 32, 4, 32),))
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    monkeypatch.setattr(mx.fast, "gated_delta_update", lambda *arrays: (2 * arrays[2], arrays[5]))
    with pytest.warns(RuntimeWarning, match="the gated_delta kernel is not used"):
        got = gated_delta.gated_delta_update(q, k, v, decay, beta, state)
    assert trust.judge(got, expected, 1e-5) == ""


def test_a_device_on_which_nothing_is_right_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, gives_zeros)
    monkeypatch.setattr(mlx_experts, "expert_ffn", lambda x, *_: x)
    with pytest.raises(FlashMoEError, match=r"neither by the custom kernels .* nor by MLX's own operations"):
        prepared(monkeypatch, "fma")


def test_callers_without_a_model_are_served_too(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = layout_of(64, 96, 4, 32)
    slab, slots = random_slab(layout, 4), mx.array([[2, 0]], dtype=mx.int32)
    x, weights = mx.ones((1, 64)), mx.array([[0.25, 0.75]])
    plant(monkeypatch, does_not_compile)
    with pytest.warns(RuntimeWarning, match="the experts kernel is not used"):
        y = kernels.expert_ffn(x, slab, slots, weights, layout)
    assert mx.allclose(y, reference.expert_ffn(x, slab, slots, weights, layout), rtol=1e-4, atol=1e-5).item()


@pytest.mark.parametrize("mode", ["auto", "custom"])
@pytest.mark.parametrize(
    "gated, bias, activation",
    [(False, None, squared_relu), (True, "float32", None), (True, None, clamped_swiglu)],
)
def test_custom_kernels_are_not_asked_for_experts_that_they_do_not_know(
    gated: bool, bias: str | None, activation: Any, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = layout_of(64, 96, 4, 32, "float32", gated, bias)
    experts = Experts(layout, 4, activation=activation)
    slab = mx.array(experts.blobs.view(np.uint32))
    made = plant(monkeypatch, gives_zeros)
    trust.use(mode)
    if not gpu.fuses(layout):
        choice = chosen.prepare(layout, mx.float32, 1, lambda count: pytest.fail("experts are read"))
        assert choice is not None and (choice.ffn, choice.rows, choice.wrong) == (
            chosen.MLX,
            chosen.MLX,
            "",
        )
        assert chosen.identity(layout, mx.float32, 1).startswith("mlx mlx ")
    x = trust.normals((3, 64))[0]
    picked = np.array([[1, 3], [0, 1], [2, 0]], np.int32)
    expected = experts.outputs(np.array(x, np.float64), picked)
    y = kernels.expert_outputs(x, slab, mx.array(picked), layout, activation)
    assert error(np.array(y), expected) < 1e-5
    y = kernels.expert_rows(x, slab, mx.array(picked[:, 0]), layout, activation)
    assert error(np.array(y), expected[:, 0]) < 1e-5
    assert not made


def test_a_result_per_expert_comes_from_the_custom_kernels_if_they_are_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layout = layout_of(64, 96, 4, 32)
    slab, slots = random_slab(layout, 4), mx.array([[2, 0]], dtype=mx.int32)
    x = mx.ones((1, 64))
    made = plant(monkeypatch, gives_zeros)
    trust.use("custom")
    assert not kernels.expert_outputs(x, slab, slots, layout).any().item()
    assert len(made) == 2
    trust.use("auto")
    with pytest.warns(RuntimeWarning, match="the experts kernel is not used"):
        y = kernels.expert_outputs(x, slab, slots, layout)
    assert trust.judge([y], [reference.expert_outputs(x, slab, slots, layout)], 1e-5) == ""


def test_a_check_leaves_sampling_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, gives_zeros)
    mx.random.seed(3)
    want = mx.random.uniform(shape=(4,)).tolist()
    mx.random.seed(3)
    with pytest.warns(RuntimeWarning, match="the norm kernel"):
        add_norm.rms_norm(mx.ones((1, 64)), mx.ones((64,)), 1e-6)
    assert mx.random.uniform(shape=(4,)).tolist() == want


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8, 16, (4, 3, 6), (8, 16, 2)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_mlx_s_operations_compute_experts(bits: Any, dtype: str) -> None:
    """In every format, lazily in the slots, for a few tokens and for rows."""
    layout = layout_of(128, 64, bits, 32, dtype)
    slab = random_slab(layout, 5)
    slots = mx.array([[3, 1], [0, 4], [1, 2]], dtype=mx.int32)
    x, several = trust.normals((3, 128), (7, 128))
    weights = mx.array([[0.3, 0.7], [0.5, 0.5], [0.9, 0.1]])
    rows = mx.array([2] * 4 + [0] + [4] * 2, dtype=mx.int32)
    got = [
        mlx_experts.expert_ffn(x, slab, slots, weights, layout),
        mlx_experts.expert_rows(several, slab, rows, layout),
    ]
    expected = [
        reference.expert_ffn(x, slab, slots, weights, layout),
        reference.expert_rows(several, slab, rows, layout),
    ]
    assert trust.judge(got, expected, 1e-5) == ""


SECONDS = st.lists(st.floats(1e-6, 1.0), min_size=3, max_size=3)


@given(st.dictionaries(st.integers(0, 9), SECONDS, min_size=1))
def test_what_is_chosen_is_a_gain_and_nowhere_a_loss(seconds: dict[int, list[float]]) -> None:
    own = min(seconds)
    best = tuning.better(own, seconds)
    ratios = {way: np.array(taken) / seconds[own] for way, taken in seconds.items()}
    if best != own:
        assert ratios[best].max() <= tuning.MOST_LOSS
        assert np.prod(ratios[best]) ** (1 / 3) <= tuning.LEAST_GAIN + 1e-9
    clear = [way for way, r in ratios.items() if r.max() < tuning.LEAST_GAIN - 1e-6]
    assert not clear or best != own


def test_a_way_that_the_device_cannot_go_is_left_out() -> None:
    class Played(tuning.Launch):
        def __init__(self, way: int):
            super().__init__(lambda: mx.array(way))
            self.way = way

        def __call__(self) -> float:
            if self.way == 2:
                raise ValueError("Thread group size (512) is greater than the maximum allowed (384).")
            return {0: 1.0, 1: 0.5}[self.way]

    def launches(way: int) -> list[tuning.Launch]:
        return [tuning.Launch(does_not_compile) if way == 3 else Played(way)]

    assert tuning.fastest(0, [2, 1, 3], launches) == 1
    assert tuning.fastest(2, [0, 1], launches) == 2
    assert tuning.fastest(3, [0, 1], launches) == 3


@given(content=st.binary(max_size=100), cut=st.integers(0, 103), flip=st.booleans())
def test_what_is_kept_is_whole_or_not_there(content: bytes, cut: int, flip: bool) -> None:
    user_cache.write("kernels", "one", content)
    assert user_cache.read("kernels", "one") == content
    path = user_cache.folder("kernels") / "one"
    data = bytearray(path.read_bytes())
    if cut < len(data):
        if flip:
            data[cut] ^= 1
        else:
            del data[cut:]
        path.write_bytes(data)
        assert user_cache.read("kernels", "one") is None


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    user_cache.write("kernels", "one", b"content")
    assert user_cache.read("kernels", "one") is None
