"""A run's checkpoints as they lie in its folder: which sets there are, and whether one is whole and the run's own.

``root/task/models`` holds sets, ``{step}_{G,E,D,R,optimizerG,...}.pth``, each with a manifest, ``{step}_state.json``,
that is written last: size and SHA-256 of each of its files, its step, the run it is of. ``root/task/run.json`` says
which run this is, and which set was the last that became whole. Both hold a SHA-256 of their own content.
"""

import hashlib
import json
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from utils.utils_checkpoint import DamagedError, Fingerprint
from utils.utils_error import UserError
from utils.utils_run import save_json, to_json

logger = logging.getLogger(__name__)


def saved_steps(folder: Path, network: str = "[GR]") -> list[int]:
    """Steps with a file ``{step}_{network}.pth`` in the folder, the newest first; [GR] = what a run trains."""
    found = (re.fullmatch(rf"(0|[1-9]\d*)_{network}\.pth", path.name) for path in folder.glob(f"*_{network}.pth"))
    return sorted((int(match[1]) for match in found if match), reverse=True)


def save_sealed(content: Mapping[str, Any], path: Path) -> None:
    """Write JSON with its own SHA-256, which :func:`read_sealed` checks."""
    save_json({**content, "sha256": _seal(content)}, path)


def read_sealed(path: Path) -> dict[str, Any]:
    """What :func:`save_sealed` wrote, with ``sha256``; or a file of before there were seals, which has none.

    Raises:
        DamagedError: there is no file, or it is not what was written.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        seal = _seal(content) if isinstance(content, dict) else ""
    except FileNotFoundError:
        raise DamagedError(f"no {path.name}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedError(f"{path.name}: cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise DamagedError(f"{path.name}: holds no JSON object")
    # A changed name of a key must not make it pass for a file of before.
    if content.keys() & {"sha256", "run", "files"} and content.get("sha256") != seal:
        raise DamagedError(f"{path.name}: is not what was written, its SHA-256 is another")
    return content


def _seal(content: Mapping[str, Any]) -> str:
    unsealed = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(to_json(unsealed, sort_keys=True).encode()).hexdigest()


class Run(NamedTuple):
    """What ``run.json`` says."""

    run: str  # drawn at random when the run began; "" = not known
    saved: int  # the step of the newest set that became whole; 0 = none
    bare_upto: float  # sets up to this step are of before there were manifests

    def save(self, path: Path) -> None:
        save_sealed(self._asdict(), path)


def read_run(models: Path) -> Run:
    """The run whose ``models`` this is. Without ``run.json`` sets older than the first with a manifest may lack it.

    Raises nothing: a damaged file is named and told from the sets, as one that is missing.
    """
    path = models.parent / "run.json"
    if models.name == "models" and path.exists():
        try:
            content = read_sealed(path)
            return Run(str(content["run"]), int(content["saved"]), float(content["bare_upto"]))
        except (DamagedError, KeyError, OverflowError, TypeError, ValueError) as error:
            logger.warning("%s: passed over (%s)", path, error)
    newest, oldest, run = 0, math.inf, ""
    for step in saved_steps(models):
        try:
            state = read_sealed(models / f"{step}_state.json")
        except DamagedError:
            continue
        if "files" in state:
            newest, oldest, run = newest or step, step, run or str(state.get("run"))
    return Run(run, newest, oldest - 1)


def read_state(models: Path, step: int, run: Run) -> dict[str, Any]:
    """The content of a set's ``{step}_state.json``; of ``files`` what each must be. {} = a set of before manifests.

    Raises:
        DamagedError: it is missing or damaged, of another step or of another run.
    """
    path = models / f"{step}_state.json"
    try:
        state = read_sealed(path)
    except DamagedError:
        if path.exists() or step > run.bare_upto:
            raise
        return {}
    if "files" not in state:
        if step > run.bare_upto:
            raise DamagedError(f"{path.name}: lists no files")
        return state
    if state.get("step") != step:
        raise DamagedError(f"{path.name}: is of step {state.get('step')}")
    if run.run and state.get("run") != run.run:
        raise DamagedError(f"{path.name}: is of another run ({state.get('run')}, this is {run.run})")
    try:
        state["files"] = {name: Fingerprint(int(f["size"]), str(f["sha256"])) for name, f in state["files"].items()}
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise DamagedError(f"{path.name}: lists no files ({error!r})") from error
    return state


def never_saved(models: Path, run: Run) -> bool:
    """Whether no set ever became whole there: what lies there a first save has left that was cut off."""
    return not run.saved and not any(models.glob("*_state.json"))


def newest_generator(folder: Path, networks: str = "EG") -> Path | None:
    """The newest whole weights in a run's folder or its ``models``, of their step the first of ``networks`` there is.

    Training writes an average E beside each G; one that is older than the newest G is of a run that went on without.
    A file that is not what its manifest says is named and passed over; one of a set without a manifest, as KAIR's, is
    taken as it is.

    Returns:
        None where there are no weights, or those alone that a first save left which was cut off.

    Raises:
        UserError: there are weights, but none is whole.
    """
    models = folder / "models" if (folder / "models").is_dir() else folder
    steps = saved_steps(models, f"[{networks}]")
    run = read_run(models) if steps else Run("", 0, 0)
    problem = ""
    for step in steps:
        path = next(p for p in (models / f"{step}_{network}.pth" for network in networks) if p.is_file())
        try:
            state = read_state(models, step, run)
            if "files" in state:
                if path.name not in state["files"]:
                    raise DamagedError(f"{path.name} is not in {step}_state.json")
                state["files"][path.name].check(path)
        except DamagedError as error:
            logger.warning("%s: %s: looking for an older one", models, error)
            problem = problem or str(error)
            continue
        return path
    if problem and not never_saved(models, run):
        raise UserError(f"{models}: no weights in it are whole ({problem}); name the file to take all the same")
    return None
