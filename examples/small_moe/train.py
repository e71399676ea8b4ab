"""Trains the small mixture-of-experts model, on one GPU, in a given number of minutes.

    python -m examples.small_moe.train --out small-moe --minutes 8.5 --seed 1

The learning rate and quantization-aware training follow the clock, so that a run is whole on any machine; a faster
one sees more dialogues. The result is a folder as Hugging Face publishes them, in bfloat16, with ``log.jsonl`` and
the mistakes on the held-out set beside it.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

from . import checkpoint, forward, tokenizer
from .data import LENGTH, loader
from .evaluate import HeldOut
from .muon import Muon
from .quantize import fake_quantized

RATE = 2e-3
WARMUP = 100  # steps
STABLE = 0.3  # of the time; then the learning rate falls to zero
QUANTIZED_FROM = 0.6  # of the time
BALANCE = 0.02  # weight of the loss that spreads tokens over experts
CLIP = 1.0
LAST_SECONDS = 20  # for evaluating and saving at the end


def new_model(config: Qwen3_5MoeTextConfig, seed: int) -> Qwen3_5MoeForCausalLM:
    """Initialized as transformers does it, but for how fast the delta net forgets: a step between 0.001 and 0.1,
    as its authors begin; transformers begins with heads that forget within a token or two."""
    torch.manual_seed(seed)
    model = Qwen3_5MoeForCausalLM(config).float().train()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("dt_bias"):
                step = torch.exp(torch.empty_like(p).uniform_(-6.9, -2.3))
                p.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus
            elif name.endswith("A_log"):
                p.uniform_(1, 16).log_()
    return model


def prepared(parameters: dict[str, Tensor], quantized: bool, dtype: torch.dtype) -> forward.Weights:
    """The weights that a step computes with: quantized or not, matrices in ``dtype``, routers in float32.

    Tensors of one kind in every case: where quantization begins, compiled code is not compiled again.
    """
    weights = {}
    for name, p in parameters.items():
        w = fake_quantized(name, p) if quantized else p.clone()
        weights[name] = w if p.ndim == 1 or name.endswith("mlp.gate.weight") else w.to(dtype)
    return weights


def balance_loss(routing: list[forward.Routing], real: Tensor) -> Tensor:
    """1 where every expert gets as many tokens as every other; the mean over layers. ``real`` [N]: not padding."""
    losses = []
    count = real.sum()
    for layer in routing:
        experts = layer.probabilities.shape[-1]
        picked = torch.zeros_like(layer.probabilities).scatter(1, layer.picked, 1.0)
        share = (picked * real[:, None]).sum(0) / (count * layer.picked.shape[-1])
        mean = (layer.probabilities * real[:, None]).sum(0) / count
        losses.append(experts * (share * mean).sum())
    return torch.stack(losses).mean()


def is_for_muon(name: str, p: Tensor) -> bool:
    """The large matrices of layers; not embeddings, routers, and what has few rows."""
    return (
        p.ndim >= 2
        and min(p.shape[-2:]) >= 32
        and "embed" not in name
        and not name.endswith("mlp.gate.weight")
    )


def optimizers(parameters: dict[str, Tensor], device: str) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in parameters.items() if is_for_muon(n, p)]
    others = [p for n, p in parameters.items() if not is_for_muon(n, p)]
    adam = torch.optim.AdamW(others, lr=RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=device == "cuda")
    return [Muon(matrices, lr=RATE), adam]


@dataclass
class Clock:
    """Where a run of so many seconds stands."""

    seconds: float
    started: float

    @property
    def progress(self) -> float:
        return min(1.0, (time.monotonic() - self.started) / self.seconds)

    def rate(self, step: int) -> float:
        """The learning rate, as a share of the highest."""
        falling = (1 - self.progress) / (1 - STABLE)
        return min(1.0, (step + 1) / WARMUP, max(falling, 1e-3))


class Log:
    """JSON lines in a file, and the short of it on the terminal."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("w")
        self.begun = time.monotonic()

    def __call__(self, kind: str, **figures: Any) -> None:
        line = {"kind": kind, "seconds": round(time.monotonic() - self.begun, 1), **figures}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        short = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in line.items() if k != "tasks"}
        print(" ".join(f"{k}={v}" if k != "kind" else str(v) for k, v in short.items()), flush=True)


def train(args: argparse.Namespace) -> None:
    begun = time.monotonic()
    device = args.device
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.set_float32_matmul_precision("high")
    args.out.mkdir(parents=True, exist_ok=True)
    log = Log(args.out / "log.jsonl")
    tokens = tokenizer.build()
    tokenizer.save(tokens, args.out)
    batches = loader(tokens, args.seed, args.rows, args.workers)
    held_out = HeldOut(tokens, args.heldout)
    config = checkpoint.text_config(tokens)
    model = new_model(config, args.seed).to(device)
    parameters = dict(model.named_parameters())
    log(
        "begin",
        seed=args.seed,
        parameters=sum(p.numel() for p in parameters.values()),
        tokens_a_step=args.rows * LENGTH,
        torch=torch.__version__,
        device=torch.cuda.get_device_name() if device == "cuda" else device,
        compile=args.compile,
    )
    optimizing = optimizers(parameters, device)

    def evaluate(quantized: bool, dtype: torch.dtype = dtype) -> list[str]:
        with torch.no_grad():
            weights = prepared(parameters, quantized, dtype)
        figures, mistakes = held_out.evaluate(config, weights, device, dtype)
        log("heldout", step=step, quantized=quantized, **figures)
        return mistakes

    step, seen, clock = 0, 0, None
    last_log, last_seen, last_evaluation, last_save = time.monotonic(), 0, time.monotonic(), time.monotonic()
    while clock is None or clock.progress < 1:
        batch, segments, weights = next(batches).tensors(device)
        quantized = clock is not None and clock.progress >= QUANTIZED_FROM
        for optimizer in optimizing:
            for group in optimizer.param_groups:
                group["lr"] = RATE * (clock.rate(step) if clock else 1 / WARMUP)
        logits, routing = forward.logits(
            config, prepared(parameters, quantized, dtype), batch, segments, dtype, args.compile
        )
        counts = weights[:, 1:] * (segments[:, 1:] == segments[:, :-1])
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="none")
        loss = (loss * counts.flatten()).sum() / counts.sum()
        balance = balance_loss(routing, (segments >= 0).flatten())
        (loss + BALANCE * balance).backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), CLIP)
        for optimizer in optimizing:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step, seen = step + 1, seen + batch.numel()
        if clock is None:
            # Compilation and the loader's start are over: what is left of the time is for training.
            if device == "cuda":
                torch.cuda.synchronize()
            now = time.monotonic()
            clock = Clock(max(1.0, args.minutes * 60 - LAST_SECONDS - (now - begun)), now)
            last_log, last_seen = now, seen
        now = time.monotonic()
        if now - last_log > args.every / 3:
            log(
                "step",
                step=step,
                tokens=seen,
                progress=clock.progress,
                tokens_a_second=(seen - last_seen) / (now - last_log),
                loss=float(loss),
                balance=float(balance),
                norm=float(norm),
                rate=optimizing[0].param_groups[0]["lr"],
            )
            last_log, last_seen = time.monotonic(), seen
        if now - last_evaluation > args.every:
            evaluate(quantized)
            last_evaluation = time.monotonic()
        if now - last_save > 3 * args.every:
            checkpoint.save(model, config, args.out)
            last_save = time.monotonic()
    checkpoint.save(model, config, args.out)
    evaluate(False, torch.float32)
    mistakes = evaluate(True, torch.float32)
    (args.out / "mistakes.txt").write_text("\n".join(mistakes))
    log("end", step=step, tokens=seen)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the small mixture-of-experts model.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint and the log")
    parser.add_argument(
        "--minutes", type=float, default=8.5, help="wall-clock time, all in all (default 8.5)"
    )
    parser.add_argument(
        "--seed", type=int, default=1, help="of the initial weights and the corpus (default 1)"
    )
    parser.add_argument("--rows", type=int, default=48, help=f"rows of {LENGTH} tokens a step (default 48)")
    parser.add_argument("--workers", type=int, default=7, help="processes that make dialogues (default 7)")
    parser.add_argument(
        "--compile", action="store_true", help="compile the layers; takes a minute, needs a C compiler"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--heldout", type=int, help="use only so many held-out questions")
    parser.add_argument("--every", type=float, default=30, help="seconds between evaluations (default 30)")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
