"""Where a run's numbers go: a line in the log, the progress bar, TensorBoard."""

import logging
import re
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path

import torch
from tqdm import tqdm

from utils.utils_image import imread_uint

logger = logging.getLogger(__name__)

# tqdm's own lock is one for several processes, for which Python may start a process that dies of SIGHUP and SIGUSR1;
# here the first process alone draws.
tqdm.set_lock(threading.RLock())


# What is no weighted loss of a generator: parts of SSL, the discriminators' losses and logits, norms of gradients.
_JUDGED = re.compile(r"[A-Z]\w*_(real|fake)")
_DETAIL = re.compile(rf"ssl_(l1|kl)|l_\w+_(real|fake)|[A-Z]\w*_grad|{_JUDGED.pattern}")


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
        """One step more, with what it logged: nothing, where it was left out (``train.skip_bad_steps``)."""
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
        """Step, time left, learning rate, data and step time, the numbers of the model; and TensorBoard.

        One line with all of it in the log file; on the terminal two rows, the second with the weighted losses and what
        the discriminator says, which fit into 80 columns for most systems.
        """
        self.scalars("train", {"lr": lr, **means})
        means = dict(means)
        data_time, step_time = means.pop("data_time"), means.pop("step_time")
        left = ""
        if self.last:
            speed = (time.perf_counter() - self._begin) / (self.step - self.first)
            left = f"/{self.last} {100 * self.step / self.last:.0f}% eta {duration(speed * (self.last - self.step))}"
        memory = f" mem {torch.cuda.max_memory_allocated(device) / 2**30:.1f}G" if device.type == "cuda" else ""
        head = f"step {self.step}{left} lr {lr:.2e} data {data_time:.3f}s step {step_time:.3f}s{memory}"
        # Sorted: which of them comes first depends on the step, while the discriminator trains alone for example.
        details = sorted(filter(_DETAIL.fullmatch, means))
        losses = [name for name in means if name not in details]

        def numbers(*names: str) -> str:
            return " ".join(f"{name} {means[name]:.3g}" for name in names)

        judged = sorted(filter(_JUDGED.fullmatch, means), reverse=True)  # real first
        second = numbers(*losses, *judged)
        terminal = f"{head}\n  {second}" if second else head
        logger.info(f"{head} | {numbers(*losses, *details)}", extra={"terminal": terminal})

    def scalars(self, prefix: str, values: dict[str, float]) -> None:
        """Numbers for TensorBoard."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(f"{prefix}/{name}", value, self.step)

    def image(self, name: str, path: Path) -> None:
        """A picture for TensorBoard, from a file."""
        if self._writer is not None:
            picture = imread_uint(str(path), 3)
            self._writer.add_image(name, picture, self.step, dataformats="HWC")

    def close(self) -> None:
        """End the progress bar and the TensorBoard file."""
        self._bar.close()
        if self._writer:
            self._writer.close()
