"""What the emulation ran, and what it cannot show, after pytest with ``-p metal_emulator.report``: ``make metal``."""

from __future__ import annotations

import pytest

from metal_emulator import EXECUTED
from metal_emulator.coverage import ROOT, Coverage, cover, mlx_kernels_called, names_made

HEADING = "### What the emulation cannot show\n"


def limits() -> str:
    """The list of docs/kernels.md."""
    text = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    return text.split(HEADING)[1].split("\n#")[0].strip()


def line(name: str, coverage: Coverage) -> str:
    """A kernel's texts and formats, as in "down: 20 texts; naive, fma; 4, 8 bits; groups of 32, 64; float32"."""
    columns = [
        ("", [f.formulation for f in coverage.formats if f.formulation]),
        (" bits", [f.bits for f in coverage.formats if f.bits]),
        ("groups of ", [f.group_size for f in coverage.formats if f.group_size]),
        ("", [f.dtype for f in coverage.formats]),
    ]
    parts = []
    for word, values in columns:
        listed = ", ".join(map(str, sorted(set(values))))
        if listed:
            parts.append(word + listed if word.endswith(" ") else listed + word)
    return f"  {name:<13} {len(coverage.texts):>4} texts; {'; '.join(parts)}"


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if exitstatus == pytest.ExitCode.OK and set(names_made()) - set(cover(EXECUTED)):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    covered = cover(EXECUTED)
    write = terminalreporter.write_line
    write("")
    texts = sum(len(c.texts) for c in covered.values())
    formats = sum(len(c.formats) for c in covered.values())
    write(
        f"Emulated: {len(covered)} Metal kernels in {formats} formats, {texts} texts, {len(EXECUTED)} launches"
    )
    for name in sorted(covered):
        write(line(name, covered[name]))
    for name in sorted(set(names_made()) - set(covered)):
        write(f"NOT EMULATED: {name}, which {names_made()[name]} makes")
    write("")
    write(f"Not emulated, because they are MLX's own: {', '.join(mlx_kernels_called())}, its matrix products")
    write("and its elementwise operations.")
    write("")
    write("What the emulation cannot show (docs/kernels.md):")
    write(limits())
