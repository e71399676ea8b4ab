"""Compares a conversion that was killed and resumed with an uninterrupted one."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from mlx_flashmoe.convert import verify
from mlx_flashmoe.convert.destination import JOURNAL
from mlx_flashmoe.convert.journal import read_record
from mlx_flashmoe.errors import FormatError
from mlx_flashmoe.layout import MANIFEST, STATE
from mlx_flashmoe.selftest.trial import Trial, Wrong
from mlx_flashmoe.selftest.workplace import BITS, Workplace, model_types
from mlx_flashmoe.sizes import counted, show_size

UNITS = 2  # that are on the disk for good when the process is killed


def conversion_checks(place: Workplace) -> Iterator[Trial]:
    for model_type in model_types()[:1]:
        yield Trial("killed and resumed", partial(_killed_and_resumed, place, model_type))
    for model_type in model_types():
        yield Trial(f"verify {model_type}", partial(_verify, place, model_type))


def _killed_and_resumed(place: Workplace, model_type: str) -> str:
    made = place.folder / f"{model_type}-killed"
    command = ["convert", "--hf-path", str(place.checkpoint(model_type)), "--mlx-path", str(made)]
    command += ["--q-bits", str(BITS)]
    killed = _python("mlx_flashmoe.selftest.killed", str(UNITS), *command)
    if killed.returncode != -signal.SIGKILL:
        raise Wrong(f"was to be killed, but ended with status {killed.returncode}: {_last(killed.stderr)}")
    done = _units(made / STATE / JOURNAL)
    if done != UNITS or (made / MANIFEST).exists():
        raise Wrong(f"killed after {UNITS} units, but the journal has {done}")
    resumed = _python("mlx_flashmoe", *command)
    if resumed.returncode:
        raise Wrong(f"resuming ended with status {resumed.returncode}: {_last(resumed.stderr)}")
    found, wanted = _files(made), _files(place.model(model_type))
    if differing := sorted(f for f in found | wanted if found.get(f) != wanted.get(f)):
        raise Wrong(f"not as a conversion that was left alone: {', '.join(differing)}")
    return f"after {UNITS} units; {counted(len(found), 'file')} byte for byte"


def _verify(place: Workplace, model_type: str) -> str:
    notes: list[str] = []
    try:
        return f"{show_size(verify(place.model(model_type), note=notes.append))} as they should be"
    except FormatError as e:
        raise Wrong("; ".join(notes) or str(e)) from None


def _python(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True)


def _last(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def _units(journal: Path) -> int:
    """Units that a journal says are done."""
    if not journal.exists():
        return 0
    records = map(read_record, journal.read_bytes().splitlines(keepends=True))
    return sum(record is not None and "done" in record for record in records)


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
