"""The process that makes the trials, and its other end.

A fault on a GPU, or a kernel that never ends, takes a process with it, or spoils it: the trials are made in one that
can be lost, and after one that has failed the next are made in another. Its output is lines of JSON: the names of all
trials, and then a row for each.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlx_flashmoe.selftest.trial import FAILED, Row

LONGEST_TRIAL = 300.0  # seconds


def perform_all(folder: Path, done: Callable[[int, int], None]) -> list[Row]:
    """Runs all trials. A trial whose process ends, or that does not end, gives a failed row; the others still run.

    Args:
        folder: to work in.
        done: is called with (rows so far, rows in all).
    """
    names: list[tuple[str, str]] = []
    rows: list[Row] = []
    while not names or len(rows) < len(names):
        with _Process(folder, len(rows)) as process:
            for message in iter(process.next, None):
                if "names" in message:
                    names = [(check, name) for check, name in message["names"]]
                    continue
                rows.append(Row(**message))
                done(len(rows), len(names))
                # A failed trial may leave the process, or its use of the device, unfit for the next trial.
                if rows[-1].outcome == FAILED or len(rows) == len(names):
                    break
            else:
                if not names:
                    return [Row("self-test", "its process", FAILED, process.end())]
                rows.append(Row(*names[len(rows)], FAILED, process.end()))
                done(len(rows), len(names))
    return rows


class _Process:
    """A worker, from the given trial on; killed with everything that it has started when the context ends."""

    def __init__(self, folder: Path, first: int) -> None:
        self._stderr = folder / f"stderr-{first}"
        with open(self._stderr, "wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(folder), str(first)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,  # a group of its own, that can be killed as a whole; Ctrl-C is ours alone
                # Float32 products are TF32 on some NVIDIA GPUs, unless MLX finds this when it looks.
                env={**os.environ, "MLX_ENABLE_TF32": "0"},
            )
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()
        self._hangs = False

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *_: Any) -> None:
        self._kill()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._lines.put(line)
        self._lines.put(b"")

    def next(self) -> dict[str, Any] | None:
        """The next message; None when none will come."""
        try:
            line = self._lines.get(timeout=LONGEST_TRIAL)
        except queue.Empty:
            self._hangs = True
            return None
        if not line.endswith(b"\n"):
            return None
        message: dict[str, Any] = json.loads(line)
        return message

    def end(self) -> str:
        """Why there are no more messages."""
        if self._hangs:
            return f"did not end within {LONGEST_TRIAL:.0f} s"
        status = self._process.wait()
        how = signal.Signals(-status).name if status < 0 else f"status {status}"
        lines = self._stderr.read_text(errors="replace").strip().splitlines()
        return f"the process ended with {how}" + (f": {lines[-1]}" if lines else "")

    def _kill(self) -> None:
        # The group may be gone; macOS refuses to kill one whose processes have all ended.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def main(folder: str, first: int) -> int:
    """Makes the trials from the given one on, and writes messages to standard output."""
    # Whatever else writes to standard output must not be taken for a message.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)

        def send(message: dict[str, Any]) -> None:
            out.write(json.dumps(message) + "\n")
            out.flush()

        from mlx_flashmoe.selftest.checks import trials
        from mlx_flashmoe.selftest.trial import perform

        found = trials(Path(folder))
        send({"names": [(check, trial.name) for check, trial in found]})
        for check, trial in found[first:]:
            send(asdict(perform(check, trial)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
