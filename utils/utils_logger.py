"""Where a run's words and numbers go: the terminal (beside a progress bar), a file, TensorBoard."""

import logging
import logging.handlers
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
from tqdm import tqdm

from utils.utils_error import accept_all_characters, printable

logger = logging.getLogger(__name__)


class _Formatter(logging.Formatter):
    """Keeps the control characters of file names from terminal and file; tables have lines."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), keep="\n")


class _TerminalHandler(logging.Handler):
    """Prints above a progress bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except Exception:
            self.handleError(record)


class _RunFileHandler(logging.FileHandler):
    """The log file of the run at hand."""


def setup(log_file: Path | None = None, quiet: bool = False) -> None:
    """Send the log to the terminal (unless quiet: processes other than the first) and, from now on, to a file."""
    accept_all_characters()
    root = logging.getLogger()
    root.setLevel(logging.WARNING if quiet else logging.INFO)
    if not quiet and not any(isinstance(h, _TerminalHandler) for h in root.handlers):
        terminal = _TerminalHandler()
        terminal.setFormatter(_Formatter("%(message)s"))
        root.addHandler(terminal)
    if not quiet and log_file is None and not any(isinstance(h, logging.handlers.MemoryHandler) for h in root.handlers):
        # What is said before a run has its folder (what was resumed, loaded, ignored) belongs into its file too.
        root.addHandler(logging.handlers.MemoryHandler(10000, flushLevel=logging.CRITICAL, flushOnClose=False))
    if log_file is not None:
        early = [h for h in root.handlers if isinstance(h, logging.handlers.MemoryHandler)]
        records = [record for handler in early for record in handler.buffer]
        close_file()
        file = _RunFileHandler(log_file, encoding="utf-8")
        file.setFormatter(_Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        root.addHandler(file)
        for record in records:
            file.handle(record)


def close_file() -> None:
    """Stop writing to the file of :func:`setup`: what comes next belongs to another run."""
    root = logging.getLogger()
    for handler in [h for h in root.handlers if isinstance(h, (_RunFileHandler, logging.handlers.MemoryHandler))]:
        root.removeHandler(handler)
        handler.close()


def duration(seconds: float) -> str:
    """``h:mm:ss``, with days in front where there are any."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days}d " * bool(days) + f"{hour}:{minute:02d}:{second:02d}"


class Progress:
    """Counts steps, measures data and step time, averages what is logged between two reports.

    Args:
        first, last: steps already done; the last step, None = no end.
        board: folder of the TensorBoard files; None = none.
        show: whether to draw a progress bar, on a terminal.
    """

    def __init__(self, first: int, last: int | None, board: Path | None, show: bool) -> None:
        self.first, self.last, self.step = first, last, first
        hidden = not (show and sys.stderr.isatty())
        self._bar = tqdm(total=last, initial=first, unit="step", dynamic_ncols=True, disable=hidden)
        self._writer = None
        if board is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(board))
        self._values: dict[str, list[float]] = defaultdict(list)
        self._begin = self._mark = time.perf_counter()

    def _lap(self) -> float:
        now = time.perf_counter()
        elapsed, self._mark = now - self._mark, now
        return elapsed

    def pause_over(self) -> None:
        """What went before, validation or saving, counts as neither data nor step time."""
        self._lap()

    def data_arrived(self) -> None:
        """The time since the last call was spent waiting for data."""
        self._values["data_time"].append(self._lap())

    def step_done(self, log: dict[str, float]) -> None:
        """One step more, with what it logged."""
        self._values["step_time"].append(self._lap())
        for name, value in log.items():
            self._values[name].append(value)
        self.step += 1
        self._bar.update()

    def means(self) -> dict[str, float]:
        """Means since the last call; what is not logged at each step averages over its own."""
        means = {name: sum(values) / len(values) for name, values in self._values.items()}
        self._values.clear()
        return means

    def report(self, means: dict[str, float], lr: float, device: torch.device) -> None:
        """One line: step, time left, learning rate, data and step time, every weighted loss; and TensorBoard."""
        self.scalars("train", {"lr": lr, **means})
        means = dict(means)
        data_time, step_time = means.pop("data_time"), means.pop("step_time")
        left = ""
        if self.last:
            speed = (time.perf_counter() - self._begin) / (self.step - self.first)
            left = f"/{self.last} {100 * self.step / self.last:.0f}% eta {duration(speed * (self.last - self.step))}"
        memory = f" mem {torch.cuda.max_memory_allocated(device) / 2**30:.1f}G" if device.type == "cuda" else ""
        losses = " ".join(f"{name} {value:.3g}" for name, value in means.items())
        logger.info(
            f"step {self.step}{left} lr {lr:.2e} data {data_time:.3f}s step {step_time:.3f}s{memory} | {losses}"
        )

    def scalars(self, prefix: str, values: dict[str, float]) -> None:
        """Numbers for TensorBoard."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(f"{prefix}/{name}", value, self.step)

    def close(self) -> None:
        """End the progress bar and the TensorBoard file."""
        self._bar.close()
        if self._writer:
            self._writer.close()
