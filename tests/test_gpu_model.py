"""Whole models on the GPU that is there: the CPU's logits, and the same bits whatever is resident.

Skipped where MLX has no GPU. Float32 products are TF32 on some NVIDIA GPUs, which has to be off for a comparison.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ["MLX_ENABLE_TF32"] = "0"  # before MLX looks

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import Spec, write_checkpoint

from mlx_flashmoe import convert, load
from mlx_flashmoe.experts import ahead
from mlx_flashmoe.kernels import chosen, gated_norm, gpu, trust

pytestmark = pytest.mark.skipif(mx.default_device() != mx.gpu, reason="MLX finds no GPU")

# Heads as wide as the delta rule's kernel wants, experts as the matrix kernels want them.
SPEC = Spec(
    hidden=256, inner=128, experts=16, per_token=4, layers=4, vocab=512, heads=4, key_head=64, value_head=64
)
BITS = (4, 16)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    base = tmp_path_factory.mktemp("gpu-model")
    write_checkpoint(base / "source", SPEC, "fused")
    (base / "source" / "tokenizer.json").unlink(missing_ok=True)
    for bits in BITS:
        convert(base / "source", base / str(bits), q_bits=bits)
    return {bits: base / str(bits) for bits in BITS}


@contextmanager
def device(kind: mx.Device) -> Iterator[None]:
    before = mx.default_device()
    mx.set_default_device(kind)
    try:
        yield
    finally:
        mx.set_default_device(before)


def logits(
    folder: Path, dtype: mx.Dtype, prompt: int = 40, answer: int = 24, **options: object
) -> np.ndarray:
    """Of a prompt in two chunks and of tokens fed one by one: float32 [tokens, vocab]."""
    model, _ = load(folder, dtype=dtype, **options)  # type: ignore[arg-type]
    tokens = np.random.default_rng(0).integers(0, SPEC.vocab, prompt + answer)
    cache = model.make_cache()
    bounds = [0, prompt // 2, prompt, *range(prompt + 1, prompt + answer + 1)]
    pieces = []
    for start, stop in itertools.pairwise(bounds):
        piece = model(mx.array(tokens[None, start:stop]), cache)[0]
        pieces.append(np.array(piece.astype(mx.float32)))
    if "expert_memory" in options:
        assert model.stats().misses > 0 and not model.resident
    return np.concatenate(pieces)


@pytest.mark.parametrize("bits", BITS)
def test_the_cpus_logits(folders: dict[int, Path], bits: int) -> None:
    got = logits(folders[bits], mx.float32)
    with device(mx.Device(mx.cpu)):
        want = logits(folders[bits], mx.float32)
    assert np.abs(got - want).max() < 1e-3 * want.std()
    assert (got.argmax(axis=1) == want.argmax(axis=1)).all()


@pytest.mark.parametrize("bits", BITS)
def test_residency_never_changes_a_bit(
    folders: dict[int, Path], bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = logits(folders[bits], mx.bfloat16)
    assert np.isfinite(want).all()
    slot = load(folders[bits])[0].arena.slot_bytes
    monkeypatch.setattr(ahead, "TRIAL", 4)  # both ways of reading ahead within one run
    for slots in (4, 7, 23, 63):
        for read_ahead in (False, True):
            got = logits(folders[bits], mx.bfloat16, expert_memory=slots * slot, read_ahead=read_ahead)
            assert np.array_equal(got, want), (slots, read_ahead)


@pytest.mark.parametrize(
    "fault", ["experts do not compile", "experts are wrong", "a norm is wrong", "by hand"]
)
def test_a_planted_fault_does_not_change_the_text(
    folders: dict[int, Path], fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = logits(folders[4], mx.bfloat16)
    slot = load(folders[4])[0].arena.slot_bytes
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    lines: list[str] = []
    options = {"expert_memory": 23 * slot, "announce": lines.append}
    forget()
    try:
        if fault == "a norm is wrong":
            monkeypatch.setattr(gated_norm, "_SOURCE", gated_norm._SOURCE.replace("z * fm_sigmoid(z)", "z"))
        elif fault == "by hand":
            options["kernels"] = "mlx"
        else:
            planted = "oops;" if "compile" in fault else "if (lane == 0) h[0] = 1000;"
            for table in (gpu._FFN, gpu._ROWS):
                for name, (text, first, second) in list(table.items()):
                    monkeypatch.setitem(table, name, (text, first + planted, second))
        got = logits(folders[4], mx.bfloat16, **options)
    finally:
        monkeypatch.undo()
        forget()
        trust.use("auto")
    kernel = {"a": "gated_norm", "e": "experts"}.get(fault[0])
    told = [line.partition(" is not used")[0] for line in lines if "is not used on this GPU" in line]
    assert told == ([f"the {kernel} kernel"] if kernel else []), lines
    # MLX rounds to bfloat16 between products, where the custom kernels do not.
    assert np.linalg.norm(got - want) < 0.1 * np.linalg.norm(want)
    assert (got.argmax(axis=1) == want.argmax(axis=1)).mean() > 0.9


def forget() -> None:
    """What the process knows of kernels, and the kernels."""
    chosen._experts.clear()
    trust._wrong.clear()
    for made in (gated_norm._kernel, gpu._ffn_kernels, gpu._rows_kernels):
        made.cache_clear()
