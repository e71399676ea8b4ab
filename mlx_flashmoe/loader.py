"""load: a converted folder -> a model ready to call, and its tokenizer."""

from __future__ import annotations

import bisect
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_flashmoe import memory, tiktoken_model
from mlx_flashmoe.architectures import Architecture, described
from mlx_flashmoe.errors import FormatError, MemoryPlanError
from mlx_flashmoe.experts import Decode, ExpertStore, ReadAhead, SlotArena
from mlx_flashmoe.experts.slab import HostSlab
from mlx_flashmoe.experts.store import ReadRequest, reads_directly
from mlx_flashmoe.experts.streamed import slot_layout
from mlx_flashmoe.facts import Facts
from mlx_flashmoe.fetch import model_folder
from mlx_flashmoe.kernels import chosen, trust
from mlx_flashmoe.layout import BlobLayout, Manifest, expert_files
from mlx_flashmoe.models import check_kernels
from mlx_flashmoe.models.cache import Cache
from mlx_flashmoe.models.config import mixed_at_once
from mlx_flashmoe.models.quantized import quantize
from mlx_flashmoe.models.together import join
from mlx_flashmoe.tokenizer import Tokenizer

# Tokens the memory plan counts the KV cache for, unless more are reserved.
PLANNED_CONTEXT = 8192


@dataclass(frozen=True)
class Stats:
    """Counts and seconds since loading.

    Attributes:
        bytes_read, reads: of experts, from disk; a read is a whole expert.
        hits, misses: routed experts found resident, and not.
        routing_seconds, reading_seconds: the caller waited for routers' choices, and for reads.
        busy_seconds: something was being read.
    """

    bytes_read: int
    reads: int
    hits: int
    misses: int
    routing_seconds: float
    reading_seconds: float
    busy_seconds: float

    def __sub__(self, earlier: Stats) -> Stats:
        """What happened since ``earlier``."""
        return Stats(*(a - b for a, b in zip(astuple(self), astuple(earlier))))


class StreamingModel:
    """A model whose routed experts are read from disk as they are needed.

    Attributes:
        model: the architecture's own module (``mlx_flashmoe.models``).
        arena: where its experts are.
        plan: the memory it takes.
        prefill_chunk: prompt tokens to give it at once, at most, if the plan is to hold.
        context_length: tokens of prompt and answer it was made for, at most; None if config.json does not say.
        identity: what its outputs depend on, bit for bit, as a hexadecimal digest.
        facts: what it consists of.
    """

    def __init__(
        self,
        model: nn.Module,
        decode: Decode,
        plan: memory.Plan,
        prefill_chunk: int,
        kv_bytes: Callable[[int], int],
        context_length: int | None,
        identity: str,
        facts: Facts,
    ):
        self.model = model
        self.arena = decode.arena
        self.plan = plan
        self.prefill_chunk = prefill_chunk
        self.context_length = context_length
        self.identity = identity
        self.facts = facts
        self._decode = decode
        self._kv_bytes = kv_bytes

    def __call__(self, tokens: mx.array, cache: list[Cache] | None = None) -> mx.array:
        """tokens: integer [B, T] -> logits [B, T, vocab]. ``cache`` (of ``make_cache``) is updated.

        Raises:
            ReadError: an expert could not be read. ``cache`` is then half updated: make a new one.
        """
        return self.model(tokens, cache)

    def read(self, tokens: mx.array, cache: list[Cache]) -> mx.array:
        """As a call, without the head: tokens [B, T] -> [B, T, hidden]. On the CPU logits would cost time.

        Raises:
            ReadError: as a call.
        """
        hidden: mx.array = self.model.hidden(tokens, cache)
        return hidden

    def head(self, hidden: mx.array) -> mx.array:
        """What ``read`` returned, or some of its tokens, [B, T, hidden] -> logits [B, T, vocab]."""
        return self.model.head(hidden)

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return int(self.model.config.vocab_size)

    @property
    def resident(self) -> bool:
        """Every expert is in memory: calls neither read nor wait for the router."""
        return self.arena.resident

    def make_cache(self) -> list[Cache]:
        """An empty cache for one sequence, or for a batch of one length."""
        return self.model.make_cache()

    def reserve(self, context: int) -> None:
        """Counts the KV cache for ``context`` tokens into the plan, if it did not before. For what comes next.

        Raises:
            MemoryPlanError: there is no room for them.
        """
        kv = self._kv_bytes(context)
        if kv > self.plan.kv:
            wider = replace(self.plan, kv=kv)
            if wider.total > wider.limit:
                other = "--prefix-memory" if wider.prefixes > wider.arena else "--expert-memory"
                hint = memory.Room.here().hint(wider.total, "it fits")
                raise MemoryPlanError(
                    f"{wider}: a context of {context} tokens does not fit; give fewer tokens, --max-tokens included, "
                    f"or less {other}{f'; {hint}' * bool(hint)}"
                )
            self.plan = wider

    @property
    def max_context(self) -> int:
        """Tokens of a prompt and its answer: what the model was made for, and what there is memory for."""
        longest = self.context_length or PLANNED_CONTEXT
        room = self.plan.kv + self.plan.limit - self.plan.total
        if self._kv_bytes(longest) <= room:
            return longest
        return bisect.bisect_right(range(longest), room, key=self._kv_bytes) - 1

    def on_prefill_layer(self, done: Callable[[int, int], None] | None) -> None:
        """``done`` is called as a prompt goes through, with (layers done, layers); None: no longer."""
        self._decode.on_prefill_layer = done

    def on_routing(self, chosen: Callable[[int, mx.array], None] | None) -> None:
        """``chosen`` is called with (layer, ids [tokens, active]) by every layer of experts; None: no longer."""
        self._decode.on_routing = chosen

    def stats(self) -> Stats:
        arena, store = self.arena, self.arena.store
        return Stats(
            store.bytes_read,
            store.reads,
            arena.hits,
            arena.misses,
            arena.routing_seconds,
            arena.reading_seconds,
            store.busy_seconds,
        )


def load(
    path: str | os.PathLike[str],
    expert_memory: str | int = "auto",
    active_experts: int | None = None,
    dtype: mx.Dtype | None = None,
    announce: Callable[[str], None] | None = None,
    read_ahead: bool = True,
    experts_path: Sequence[str | os.PathLike[str]] = (),
    direct_reads: bool = False,
    prefix_memory: int = 0,
    check_reads: bool = False,
    progress: Callable[[int, int], None] | None = None,
    kernels: str = "auto",
) -> tuple[StreamingModel, Tokenizer]:
    """Loads a converted folder. One without a tokenizer.json loads too; its tokenizer raises when used.

    Args:
        path: what ``convert`` made: a folder, or a repository of it on the hub ("org/name"), which is fetched once
            (fetch.py).
        expert_memory: memory for experts: "8GB" or a number of bytes; "auto" picks from the memory that is free;
            "os" keeps slots only for the layer at work and leaves caching to the operating system.
        active_experts: routed experts a token uses; the checkpoint's own number if None.
        dtype: of the activations; the checkpoint's own on a GPU and float32 on a CPU if None.
        announce: is given a line about what is fetched, if anything, the memory plan, and a warning if less than that
            is free, before memory is taken.
        read_ahead: read the next layer's likely experts while this one computes, as long as that pays.
        experts_path: more folders that hold copies of some or all of the expert files, best on other disks:
            reads are spread over all copies, and ``path`` itself need not have those that are elsewhere.
        direct_reads: read experts around the operating system's page cache, also where "auto" would not.
        prefix_memory: bytes that the plan leaves for a ``PrefixCache``.
        check_reads: checksum every expert as it is read; a damaged one is a ReadError when it is needed.
        progress: called with (bytes loaded, bytes to load) as the dense part is read, and the experts, if all of
            them fit.
        kernels: on a GPU, for the whole process: "auto" compares the custom kernels with plain operations before their
            first use on a device, and does without those that are wrong; "custom" uses them unseen; "mlx" uses MLX's
            own operations only.

    Raises:
        FlashMoEError: experts are not computed right on this device.
        FormatError: not a complete converted folder, or its parts contradict each other.
        MemoryPlanError: it does not fit in memory as asked.
        SourceError, ConversionError: a repository cannot be fetched, or not be written.
    """
    folder = model_folder(path, announce)
    manifest = Manifest.load(folder, experts_path)
    for other in experts_path:
        if not any((Path(other) / entry.file).exists() for entry in manifest.layers):
            raise FormatError(
                f"--experts-path {other}: there is no {manifest.layers[0].file} in it, nor any other layer's; "
                f"give a folder with copies of files of {folder / 'experts'}"
            )
    config = read_config(folder)
    arch = described(manifest.model_type, manifest.library, config)
    settings = arch.settings
    _check_experts(arch, manifest, folder)
    active = arch.active(active_experts)
    if dtype is None:
        on_gpu = mx.default_device() == mx.gpu
        dtype = getattr(mx, settings.dtype, None) if on_gpu else mx.float32
        if dtype not in (mx.float32, mx.bfloat16, mx.float16):
            raise FormatError(f"{folder / 'config.json'}: dtype {settings.dtype!r} is not supported")

    weights = _open_dense(folder, manifest)
    dtypes = {
        name: arch.dtype_of(name, w.dtype, dtype)
        for name, w in weights.items()
        if mx.issubdtype(w.dtype, mx.floating)
    }
    experts = sum(entry.num_experts for entry in manifest.layers)

    def kv_bytes(tokens: int) -> int:
        size: int = settings.kv_bytes(tokens, dtype)
        return size

    plan = memory.plan(
        expert_memory,
        dense=sum(w.size * dtypes.get(name, w.dtype).size for name, w in weights.items()),
        slot_bytes=max(manifest.layout_of(entry).blob_size for entry in manifest.layers),
        experts=experts,
        active=active,
        largest_buffer=memory.largest_buffer(),
        kv=kv_bytes(PLANNED_CONTEXT),
        prefixes=prefix_memory,
        # Every copy: folders, and files that are links, may be on file systems of different kinds.
        may_read_directly=all(
            reads_directly(path)
            for entry in manifest.layers
            for path in expert_files(entry.layer, folder, experts_path)
        ),
    )
    if announce is not None:
        for line in (str(plan), *plan.notes):
            announce(line)
    _limit_memory(plan)
    total = plan.dense + (plan.arena if plan.slots == experts else 0)
    told = progress or (lambda done, total: None)
    told(0, total)  # now: to take the memory is work, too

    store = ExpertStore(folder, manifest, experts_path, direct_reads or plan.direct, check_reads)
    trust.use(kernels, announce)
    layouts = {slot_layout(store, layer): layer for layer in store.layers}
    summed = arch.ffn_experts(active)
    for layout, layer in layouts.items():
        chosen.prepare(layout, dtype, summed, partial(_some_experts, store, layer, layout), announce)
    arena = SlotArena(store, plan.slots)
    decode = Decode(arena, ReadAhead(arena) if read_ahead and arch.lazy else None, may_defer=arch.lazy)
    model = arch.build(decode, active)
    check_kernels(model, dtype)
    facts = Facts.of(manifest, weights)
    _load_dense(arch.tree(model), manifest, weights, dtypes, folder, lambda done: told(done, total))
    tokenizer = _load_tokenizer(folder)
    if plan.slots == experts:
        arena.load_all(lambda count: told(plan.dense + count * plan.slot_bytes, total))
    told(total, total)
    chunk = prefill_chunk(settings, dtype)
    computing = [chosen.identity(layout, dtype, summed) for layout in layouts]
    identity = _identity(manifest, config, active, dtype, [*arch.code, *computing, *trust.wrong()])
    loaded = StreamingModel(model, decode, plan, chunk, kv_bytes, settings.context_length, identity, facts)
    return loaded, tokenizer


def prefill_chunk(settings: Any, dtype: mx.Dtype) -> int:
    """Prompt tokens that a model of these settings (an architecture's Config) is given at once, at most."""
    mixing = mixed_at_once() * settings.mixing_bytes(dtype)
    return memory.prefill_chunk(settings.activation_bytes(dtype), besides=mixing)


def _some_experts(store: ExpertStore, layer: int, layout: BlobLayout, count: int) -> np.ndarray:
    """The first experts of a layer, as slots hold them: uint32 [count or fewer, blob_size / 4]."""
    count = min(count, store.num_experts(layer))
    slab = HostSlab(count, layout.blob_size)
    store.start([ReadRequest(layer, expert, expert) for expert in range(count)], slab).wait()
    return slab.host


def _identity(
    manifest: Manifest, config: dict[str, Any], active: int, dtype: mx.Dtype, computing: list[str]
) -> str:
    """A digest of the weights, the settings, the code that computes with them and the device it does so on.

    Args:
        computing: which kernels the device uses.
    """
    weights = {**manifest.to_json(), "source": None}
    code = [version("mlx"), version("mlx-flashmoe"), str(mx.default_device().type), *computing]
    text = json.dumps([weights, config, active, str(dtype), code], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class _NoTokenizer:
    """Stands in for the tokenizer a folder does not have: the model can be called, text cannot be made."""

    def __init__(self, error: FormatError):
        self._error = error.with_traceback(None)  # its frames would keep the model

    def __getattr__(self, name: str) -> Any:
        raise self._error


def _load_tokenizer(folder: Path) -> Tokenizer:
    try:
        return Tokenizer.load(folder)
    except FormatError as e:
        if any((folder / name).exists() for name in ("tokenizer.json", tiktoken_model.NAME)):
            raise
        return cast(Tokenizer, _NoTokenizer(e))


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a converted folder; raises FormatError if it cannot be read."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise FormatError(f"{path}: cannot be read: {e}") from None
    if not isinstance(config, dict):
        raise FormatError(f"{path}: is not a JSON object")
    return config


def _check_experts(arch: Architecture, manifest: Manifest, folder: Path) -> None:
    try:
        arch.check(manifest.layers)
    except FormatError as e:
        raise FormatError(f"{folder}: {e}") from None
    for entry in manifest.layers:
        width = manifest.layout_of(entry).hidden_size
        if manifest.library is None and width != arch.settings.hidden_size:
            raise FormatError(
                f"{folder}: layer {entry.layer} has experts of width {width}, but config.json says "
                f"{arch.settings.hidden_size}"
            )


def _open_dense(folder: Path, manifest: Manifest) -> dict[str, mx.array]:
    """The dense tensors, lazily: nothing is read yet."""
    weights: dict[str, mx.array] = {}
    for entry in manifest.dense:
        try:
            loaded = mx.load(str(folder / entry.file))
        except (RuntimeError, ValueError) as e:
            raise FormatError(f"{folder / entry.file}: cannot be read: {e}") from None
        assert isinstance(loaded, dict)
        weights.update(loaded)
    return weights


def _load_dense(
    model: nn.Module,
    manifest: Manifest,
    weights: dict[str, mx.array],
    dtypes: dict[str, mx.Dtype],
    folder: Path,
    progress: Callable[[int], None],
) -> None:
    """Fills the module tree. Tensor by tensor, so that no second copy of the dense part ever exists.

    Args:
        progress: called with the bytes loaded.
    """
    quantize(model, {path: asdict(q) for path, q in manifest.dense_quantization.items()})
    try:
        model.load_weights(list(weights.items()), strict=True)
    except ValueError as e:
        raise FormatError(f"{folder}: the dense part does not match config.json: {e}") from None
    done = 0
    for name in list(weights):
        w = weights.pop(name)
        if name in dtypes and w.dtype != dtypes[name]:
            w = w.astype(dtypes[name])
            model.load_weights([(name, w)], strict=False)
        mx.eval(w)
        done += w.nbytes
        progress(done)
    join(model)
    model.eval()


def _limit_memory(plan: memory.Plan) -> None:
    """Leaves memory nobody needs to the page cache, and keeps what is needed wired on Metal."""
    mx.set_cache_limit(memory.CACHE_LIMIT)
    if mx.metal.is_available():
        most = int(mx.device_info()["max_recommended_working_set_size"])
        mx.set_wired_limit(min(plan.total + 2**30, most))
