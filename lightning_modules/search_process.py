"""One fit of a search: a process that is watched by what it logs, and asked to end where it is a bad one."""

import csv
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_POLL = 0.5  # seconds between looks at metrics.csv
_GRACE = 60.0  # seconds that a run has to end by itself
_FIT = (sys.executable, "-c", "from lightning_modules.cli import main; main()")

Report = Callable[[list[float]], bool]
"""Called with all values of the metric so far; True asks the run to end."""


class TrialFailed(Exception):
    """A fit that ended badly, or never logged the metric; says why."""


@dataclass
class FitProcess:
    """Runs ``seqlit`` in a process and watches its ``metrics.csv``.

    Args:
        metric: Column that is watched.
        stopping: Set where the whole search is to end.
    """

    metric: str
    stopping: threading.Event = field(default_factory=threading.Event)

    def __call__(self, arguments: Sequence[str], run: Path, report: Report) -> list[float]:
        """Fit, and return all values of the metric.

        Args:
            arguments: Those of ``seqlit``.
            run: The run folder, which the arguments name; the log of the process lies beside it.
            report: Called whenever there are new values.

        Raises:
            TrialFailed: If the process ends with another status than 0 without having been asked to.
        """
        run.parent.mkdir(parents=True, exist_ok=True)
        log = run.parent / "fit.log"
        with log.open("w", encoding="utf-8") as file:
            process = subprocess.Popen([*_FIT, *arguments], stdout=file, stderr=subprocess.STDOUT)
            values: list[float] = []
            asked = False
            try:
                while process.poll() is None and not self.stopping.is_set():
                    time.sleep(_POLL)
                    if process.poll() is not None:
                        break  # too late to be asked
                    values, asked = _watch(run, self.metric, values, report)
                    if asked:
                        break
            finally:
                _end(process)
        if process.returncode != 0 and not asked:
            raise TrialFailed(_last_line(log) or f"ended with status {process.returncode}")
        return logged_values(run, self.metric)


def _watch(run: Path, metric: str, before: list[float], report: Report) -> tuple[list[float], bool]:
    values = logged_values(run, metric)
    return values, len(values) > len(before) and report(values)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else ""


def logged_values(run: Path, metric: str) -> list[float]:
    """Values of a metric in ``metrics.csv``, in the order they were logged; none where there is no such column."""
    path = run / "metrics.csv"
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    values = []
    for row in rows:
        try:
            values.append(float(row.get(metric) or "nan"))
        except ValueError:  # a row that is just being written
            continue
    return [value for value in values if not math.isnan(value)]
