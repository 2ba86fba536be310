"""A run's checkpoints: finding the newest complete one, going on from it, writing and dropping them."""

import json
import logging
import math
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from utils.utils_checkpoint import load_checkpoint_file
from utils.utils_error import UserError
from utils.utils_run import save_json

logger = logging.getLogger(__name__)


class Saved(Protocol):
    """What a model offers to be saved: ``models.model_base.ModelBase``."""

    def files(self, folder: Path, step: int) -> dict[str, Path]: ...
    def save(self, folder: Path, step: int) -> None: ...
    def load(self, folder: Path, step: int) -> None: ...


def saved_steps(folder: Path, network: str = "[GR]") -> list[int]:
    """Steps with a file ``{step}_{network}.pth`` in the folder, the newest first; [GR] = what a run trains."""
    found = (re.fullmatch(rf"(0|[1-9]\d*)_{network}\.pth", path.name) for path in folder.glob(f"*_{network}.pth"))
    return sorted((int(match[1]) for match in found if match), reverse=True)


def newest_generator(folder: Path, networks: str = "EG") -> Path | None:
    """The newest step's weights in a run's folder or its ``models``, of that step the first of ``networks`` there is.

    Training writes an average E beside each G; one that is older than the newest G is of a run that went on without.
    """
    models = folder / "models" if (folder / "models").is_dir() else folder
    steps = {network: saved_steps(models, network)[:1] for network in networks}
    newest = max((of_network for of_network in steps.values()), default=[])
    found = [models / f"{newest[0]}_{network}.pth" for network in networks if newest and steps[network] == newest]
    return found[0] if found else None


def _problem(paths: Iterable[Path]) -> str:
    """Why the files of a checkpoint are of no use: some are missing, or one is damaged; "" where they are."""
    paths = list(paths)
    if missing := [path.name for path in paths if not path.is_file()]:
        return f"no {', '.join(missing)}"
    for path in paths:
        try:
            load_checkpoint_file(path)
        except UserError as error:
            return str(error)
    return ""


class Checkpoints:
    """The folder ``models`` of a run: ``{step}_{G,E,D,R,optimizerG,...}.pth`` and ``{step}_state.json``.

    The state holds the seed and the best score; with the step and the seed, everything random in a run is known.

    Args:
        folder: where they are.
        keep: how many to keep besides the best one; None = all.
    """

    def __init__(self, folder: Path, keep: int | None) -> None:
        self.folder, self.keep = folder, keep
        self.state: dict[str, Any] = {}
        self._named: set[tuple[int, str]] = set()

    def _state(self, step: int) -> dict[str, Any]:
        """{} where it is missing, as beside KAIR's own checkpoints."""
        with suppress(OSError, ValueError):
            state = json.loads((self.folder / f"{step}_state.json").read_text(encoding="utf-8"))
            if isinstance(state, dict):
                return self._sound(state, step)
        return {}

    def _sound(self, state: dict[str, Any], step: int) -> dict[str, Any]:
        """A state without what cannot be one's, which is named once: somebody has edited the file."""
        if state.get("best_score", 0) is None and "best_step" in state:
            state["best_score"] = math.inf  # JSON has no infinity
        score, best_step, seed = (state.get(key) for key in ("best_score", "best_step", "seed"))
        wrong = {} if seed is None or (type(seed) is int and 0 <= seed < 2**32) else {"seed": seed}
        pair = {"best_score": score, "best_step": best_step}
        if pair != {"best_score": None, "best_step": None} and not (
            type(score) in (int, float) and score == score and type(best_step) is int and best_step >= 0
        ):
            wrong |= pair
        for key, value in wrong.items():
            if value is not None and (step, key) not in self._named:
                self._named.add((step, key))
                logger.warning("%d_state.json: %s cannot be %.50r: left out", step, key, value)
        return {key: value for key, value in state.items() if key not in wrong}

    def _newest_state(self, upto: float = math.inf) -> dict[str, Any]:
        """The newest state up to a step: a run stopped before it wrote its last one still has those before."""
        states = (self._state(step) for step in saved_steps(self.folder) if step <= upto)
        return next((state for state in states if state), {})

    def seed(self) -> int | None:
        """The seed of the run so far."""
        states = map(self._state, saved_steps(self.folder))
        return next((state["seed"] for state in states if state.get("seed") is not None), None)

    def resume(self, model: Saved) -> int:
        """Load the newest checkpoint of which every file is there and readable; -> its step, 0 where there is none.

        Raises:
            UserError: there are checkpoints, but damaged or of another kind of run, which this one would write over.
        """
        newest = ""
        for step in saved_steps(self.folder):
            problem = _problem(model.files(self.folder, step).values())
            if not problem:
                model.load(self.folder, step)
                self.state = self._newest_state(upto=step)
                return step
            logger.info("checkpoint %d cannot be used (%s): looking for an older one", step, problem)
            newest = newest or problem
        if self._newest_state():  # it is written last: that checkpoint was complete for the run that wrote it
            raise UserError(
                f"{self.folder}: holds checkpoints that this run cannot go on from ({newest}); choose another task, "
                f"with path.pretrained_netG to start from their weights, or remove that folder"
            )
        return 0

    def save(self, model: Saved, step: int, seed: int, score: float | None) -> None:
        """Write a checkpoint, the state last; then drop old ones if asked to, never the best.

        Args:
            score: of this step, if it was validated: PSNR in dB, or a ranker's share of pairs in order.
        """
        model.save(self.folder, step)
        best = self.state.get("best_score")
        if score is not None and not math.isnan(score) and (best is None or score >= best):
            self.state.update(best_score=score, best_step=step)
        self.state.update(step=step, seed=seed)
        save_json(self.state, self.folder / f"{step}_state.json")
        logger.info("saved step %d in %s", step, self.folder)
        # A later step is what an interruption left; were it counted, it would push out what was just saved.
        if self.keep:
            kept = [*[n for n in saved_steps(self.folder) if n <= step][: self.keep], self.state.get("best_step")]
            for path in self.folder.iterdir():
                # Of any kind of run: an average that is no longer made, say, would never be listed by this model.
                of_step = re.fullmatch(r"(\d+)_(([GERD]|D_grad|optimizer\w+)\.pth|state\.json)", path.name)
                if of_step and int(of_step[1]) <= step and int(of_step[1]) not in kept:
                    path.unlink(missing_ok=True)
