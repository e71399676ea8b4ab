"""The answer in two lines, the setting that gives it, and the commands to type."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from mlx_flashmoe.doctor.examine import Needs
from mlx_flashmoe.doctor.predictions import Row
from mlx_flashmoe.layout import converted_name
from mlx_flashmoe.sizes import show_size

WORTH_AN_OPTION = (
    0.05  # of a token's time: below, a row is no better than another by what predictions can tell
)
MUCH_LARGER = 1.5  # than the converted model: the download is of a checkpoint that is not quantized
WIDTH = 80  # columns of a command's line
PROGRAM = "python -m mlx_flashmoe"


def figure(value: float) -> str:
    """Three digits, or a whole number."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def choose(rows: Sequence[Row]) -> tuple[Row, str]:
    """The row that the verdict is about, and why it is not the asked one or not the best one; "" if it is both.

    Args:
        rows: of ``predictions``: the first is for what was asked.
    """
    asked = rows[0]
    own = [row for row in rows if row.work.active == asked.work.active]
    best = min(own, key=lambda row: row.token.seconds)
    gain = asked.token.seconds / best.token.seconds - 1
    if best is asked or gain == 0:
        return asked, ""
    rate, size = f"{figure(1 / asked.token.seconds)} tokens/s", show_size(best.plan.arena)
    if asked.expert_memory != "auto":
        return asked, f"{_setting(best)} is faster by {100 * gain:.0f}%." if gain >= WORTH_AN_OPTION else ""
    if gain >= WORTH_AN_OPTION:
        return best, (
            f"auto ({rate}) is not used: it gives the experts {show_size(asked.plan.arena)}, "
            f"{asked.plan.reason}; {size} is faster by {100 * gain:.0f}%."
        )
    return asked, (
        f"auto is not the fastest row: {size} is faster by {100 * gain:.1f}%, which is less than these "
        "predictions can tell, and auto leaves more memory to the system."
    )


def verdict(needs: Needs, row: Row, fits: bool, prompt: int, free: int | None) -> list[str]:
    """Two lines: speed, then memory and disk. A third where a smaller download would do.

    Args:
        fits: the machine has memory for every expert, whatever the row's setting.
        prompt: tokens before the first token of the answer.
        free: bytes of free disk; None for another machine.
    """
    worst = "" if row.where.resident else f" ({figure(1 / row.even.seconds)} at worst)"
    first = f"first token of a {prompt}-token prompt after {figure(row.first_token)} s"
    lines = [f"{figure(1 / row.token.seconds)} tokens/s{worst}; {first}."]
    if row.where.resident:
        lines.append("Fits in memory: mlx-lm also runs it.")
    elif fits:
        lines.append(f"Fits in memory (mlx-lm also runs it), but is streamed with {_setting(row)}.")
    else:
        lines.append("Does not fit in memory: streamed.")
    if needs.converted and needs.download:
        lines[1] += f" Download {show_size(needs.download)}, on first use."
    if not needs.converted:
        space = f"disk {show_size(needs.conversion_space)}"
        lines[1] += f" Download {show_size(needs.download)}; {space}" if needs.download else f" D{space[1:]}"
        if free is not None:
            enough = "" if free > needs.conversion_space else ": not enough"
            lines[1] += f", {show_size(free)} free{enough}"
        lines[1] += "."
    made = needs.expert_bytes + needs.dense_bytes
    if needs.download > MUCH_LARGER * made:
        lines.append(f"A 4-bit repository (mlx-community) is a smaller download: about {show_size(made)}.")
    return lines


def commands(model: str, needs: Needs, row: Row) -> list[str]:
    """The commands to type in a shell: convert, unless that is done, then chat."""
    out = []
    folder = model
    if not needs.converted:
        folder = converted_name(model)
        out.append(
            _wrapped([f"{PROGRAM} convert", f"--hf-path {_quoted(model)}", f"--mlx-path {_quoted(folder)}"])
        )
    setting = "" if row.expert_memory == "auto" else _setting(row)
    out.append(_wrapped([f"{PROGRAM} chat", f"--model {_quoted(folder)}", *([setting] if setting else [])]))
    return out


def _setting(row: Row) -> str:
    """The option that gives the row's arena."""
    if isinstance(row.expert_memory, str):
        return f"--expert-memory {row.expert_memory}"
    # Rounded down, so that it fits.
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if row.plan.arena >= 10 * size:
            return f"--expert-memory {row.plan.arena // size}{unit}"
    return f"--expert-memory {row.plan.arena}B"


def _quoted(path: str) -> str:
    """For a shell; a path that begins like an option gets its folder before it."""
    return shlex.quote(f"./{path}" if path.startswith("-") else path)


def _wrapped(words: Sequence[str]) -> str:
    """Words of a command in lines that a shell takes for one."""
    lines = [f"  {words[0]}"]
    for word in words[1:]:
        if len(lines[-1]) + len(word) + 3 <= WIDTH:
            lines[-1] += f" {word}"
        else:
            lines[-1] += " \\"
            lines.append(f"      {word}")
    return "\n".join(lines)
