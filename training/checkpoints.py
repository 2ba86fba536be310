"""A run's checkpoints: going on from the newest that is whole, writing them, dropping old ones."""

import logging
import math
import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

from utils.utils_checkpoint import DamagedError, Fingerprint
from utils.utils_error import UserError
from utils.utils_metric_table import METRICS
from utils.utils_resume import Run, never_saved, read_run, read_state, save_sealed, saved_steps
from utils.utils_run import sync_folder

logger = logging.getLogger(__name__)


Validation = Mapping[str, Mapping[str, float]]  # of a step: test set -> metric -> value


class Saved(Protocol):
    """What a model offers to be saved: ``models.model_base.ModelBase``."""

    def files_to_load(
        self, folder: Path, step: int, expected: Mapping[str, Fingerprint] | None = None
    ) -> dict[str, Path]: ...
    def save(self, folder: Path, step: int, validation: Validation) -> dict[str, Fingerprint]: ...
    def load(self, folder: Path, step: int, expected: Mapping[str, Fingerprint] | None = None) -> None: ...


class Pool(Protocol):
    """What else goes on from a checkpoint: ``data.degradations.select_degradation.Degrader``."""

    def load(self, folder: Path, step: int, expected: Mapping[str, Fingerprint]) -> None: ...


class State(NamedTuple):
    """What a set's ``{step}_state.json`` holds beside its manifest."""

    seed: int | None = None  # with the step, all that is random in a run is known
    metric: str = "psnr"
    score: float | None = None  # of this step, if it was validated
    best_score: float | None = None  # so far
    best_step: int | None = None


class Checkpoints:
    """The folder ``models`` of a run; see ``utils_resume`` for its files.

    Args:
        folder: where they are.
        keep: how many to keep besides those that ``every`` and ``best`` name; None = all.
        every: keep steps that are multiples of this for good; None = none.
        best: keep this many with the best scores.
        metric: what the scores are, by its name in ``utils_metric_table``; those of another one do not count.
    """

    def __init__(
        self, folder: Path, keep: int | None, every: int | None = None, best: int = 1, metric: str = "psnr"
    ) -> None:
        self.folder, self.keep, self.every, self.best, self.metric = folder, keep, every, best, metric
        self.state = State()
        self.run = read_run(folder)
        self._named: set[tuple[int, str]] = set()

    def _state(self, step: int) -> State | None:
        """None where it is missing, as beside KAIR's own checkpoints, or damaged.

        What cannot be a state's is left out, and named once: somebody has edited the file.
        """
        try:
            content = read_state(self.folder, step, self.run)
        except DamagedError:
            return None
        if not content:
            return None
        for score in ("score", "best_score"):
            if score in content and content[score] is None:
                content[score] = math.inf  # JSON has no infinity
        seed, best_score, best_step = (content.get(key) for key in ("seed", "best_score", "best_step"))
        wrong = {} if seed is None or (type(seed) is int and 0 <= seed < 2**32) else {"seed": seed}
        if "score" in content and not _is_score(content["score"]):
            wrong["score"] = content["score"]
        if (best_score, best_step) != (None, None) and not (
            _is_score(best_score) and type(best_step) is int and best_step >= 0
        ):
            wrong |= {"best_score": best_score, "best_step": best_step}
        for key, value in wrong.items():
            if value is not None and (step, key) not in self._named:
                self._named.add((step, key))
                logger.warning("%d_state.json: %s cannot be %.50r: left out", step, key, value)
        known = {key: value for key, value in content.items() if key in State._fields and key not in wrong}
        return State(**known)

    def seed(self) -> int | None:
        """The seed of the run so far."""
        states = map(self._state, saved_steps(self.folder))
        return next((state.seed for state in states if state and state.seed is not None), None)

    def resume(self, model: Saved, pool: Pool | None = None, upto: float = math.inf) -> int:
        """Load the newest checkpoint that is whole; -> its step, 0 where there is none and never was one.

        Args:
            upto: the last step to look at.

        Raises:
            UserError: there are checkpoints, but damaged or of another kind of run, which this one would write over.
        """
        newest = ""
        states = (re.fullmatch(r"(0|[1-9]\d*)_state\.json", path.name) for path in self.folder.glob("*_state.json"))
        found = {*saved_steps(self.folder), *(int(match[1]) for match in states if match)}
        steps = sorted((step for step in found if step <= upto), reverse=True)
        for step in steps:
            try:
                state = read_state(self.folder, step, self.run)
                expected = state.get("files")
                files = model.files_to_load(self.folder, step, expected)
                if missing := [path.name for path in files.values() if not path.is_file()]:
                    raise DamagedError(f"no {', '.join(missing)}")
                if expected and (other := [path.name for path in files.values() if path.name not in expected]):
                    raise DamagedError(f"{', '.join(other)}: not in {step}_state.json")
                model.load(self.folder, step, expected)
                if pool:
                    pool.load(self.folder, step, expected or {})
            except DamagedError as error:
                logger.warning("checkpoint %d cannot be used (%s): looking for an older one", step, error)
                newest = newest or str(error)
                continue
            if not expected:
                logger.info("checkpoint %d is of before there were manifests: nothing says that it is whole", step)
            self.state = self._newest_state(step)
            return step
        # A first save that was cut off before it wrote its state leaves nothing to go on from.
        if newest and not (self.run.run and never_saved(self.folder, self.run)):
            raise UserError(
                f"{self.folder}: holds checkpoints that this run cannot go on from ({newest}); choose another task, "
                f"with path.pretrained_netG to start from their weights, or remove that folder"
            )
        return 0

    def _is_whole(self, step: int) -> bool:
        """Whether a set has all its files, as far as names tell."""
        try:
            listed = read_state(self.folder, step, self.run).get("files") or {}
        except DamagedError:
            return False
        # A card, .safetensors, may be elsewhere: nothing goes on from it.
        return all((self.folder / name).is_file() for name in listed if name.endswith(".pth"))

    def _newest_state(self, upto: int) -> State:
        """What goes on into the next states: of old sets, a state before may know what the newest lacks."""
        states = (self._state(step) for step in saved_steps(self.folder) if step <= upto)
        state = next((state for state in states if state), State())
        return state if state.metric == self.metric else state._replace(best_score=None, best_step=None)

    def begin(self, step: int) -> None:
        """Write down which run this is, before its first step after ``step``."""
        path = self.folder.parent / "run.json"
        bare_upto = min(self.run.bare_upto, step)
        begun = Run(self.run.run or uuid.uuid4().hex, self.run.saved if step else 0, bare_upto)
        if begun != self.run or not path.exists():
            self.run = begun
            begun.save(path)

    def save(
        self,
        model: Saved,
        step: int,
        seed: int,
        validation: Validation,
        others: Mapping[str, Fingerprint] | None = None,
    ) -> None:
        """Write a checkpoint, the state last; then drop old ones if asked to, never the best.

        Args:
            validation: of this step; the metric, or a ranker's share of pairs in order, of its first set is the score
                by which the best are kept.
            others: files of this step that are written already, by their names.
        """
        files = {**model.save(self.folder, step, validation), **(others or {})}
        scores = next((scores for scores in validation.values() if scores), {})
        score = scores.get(self.metric, scores.get("in_order"))
        state = self.state._replace(seed=seed, metric=self.metric, score=None)
        if score is not None and not math.isnan(score):
            state = state._replace(score=score)
            if state.best_score is None or not self._is_better(state.best_score, score):
                state = state._replace(best_score=score, best_step=step)
        content = {key: value for key, value in state._asdict().items() if value is not None}
        content |= {"step": step, "run": self.run.run, "files": {name: file._asdict() for name, file in files.items()}}
        save_sealed(content, self.folder / f"{step}_state.json")
        self.state = state
        self.run = self.run._replace(saved=step)
        self.run.save(self.folder.parent / "run.json")
        logger.info("saved step %d in %s", step, self.folder)
        if self.keep:
            sync_folder(self.folder)
            kept = self._kept(step)
            for path in self.folder.iterdir():
                # Of any kind of run: an average that is no longer made, say, would never be listed by this model.
                of_step = re.fullmatch(
                    r"(\d+)_(([GERD]|D_grad|optimizer\w+|pool\d+)\.pth|[GE]\.safetensors|state\.json)", path.name
                )
                if of_step and int(of_step[1]) <= step and int(of_step[1]) not in kept:
                    path.unlink(missing_ok=True)

    def _is_better(self, one: float, other: float) -> bool:
        return one > other if METRICS[self.metric].higher_better else one < other

    def _kept(self, step: int) -> set[int]:
        """The steps to keep. What an interruption left, a later step or half a set, must not push out a whole one."""
        steps = [n for n in saved_steps(self.folder) if n <= step]
        kept = {step, *[n for n in steps if self._is_whole(n)][: self.keep]}
        if self.every:
            kept |= {n for n in steps if n % self.every == 0}
        if self.best:
            states = {n: state for n in steps if (state := self._state(n)) and state.metric == self.metric}
            sign = 1 if self._is_better(1, 0) else -1
            scores = [(sign * state.score, n) for n, state in states.items() if state.score is not None]
            kept |= {n for _, n in sorted(scores, reverse=True)[: self.best]}
            kept |= {self.state.best_step} if self.state.best_step is not None else set()
        return kept


def _is_score(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value
