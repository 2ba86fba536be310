"""How good a restored image E is, beside the ground truth H or alone: by the table of metric_table.py.

PSNR, SSIM, the SSG distance and ST-LPIPS are computed here, everything else by the library that the table names, as in
the paper's tables: 8-bit images without a border of ``scale`` pixels, then the mean over a set. FID compares whole
sets, of whole images.
"""

import contextlib
import importlib
import importlib.util
import io
import logging
import math
import sys
import threading
import types
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, TextIO

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from models.loss import color_loss
from models.loss_metric import LearnedMetric
from models.network_feature import socket_timeout
from utils.utils_error import UserError
from utils.utils_image import calculate_psnr, calculate_ssim, uint2tensor4, unrounded_y
from utils.utils_metric_table import GROUPS, METRICS, choose
from utils.utils_ssl import edge_mask, graph_difference, self_similarity_graph

logger = logging.getLogger(__name__)
Picture = NDArray[np.uint8]

INSTALL = "python -m pip install -r requirements-extra.txt"

# ---------------------------------------------------------------------------------------------------------- our own

_BAND_PIXELS = 2**15  # a band's graphs take at most 80 MB each, commonly a tenth of that
_ROWS = 256  # of graphs, 0.6 MB
_SEARCH = 25  # of utils_ssl


def ssg_maps(
    estimates: Sequence[Picture], H: Picture, border: int = 0, device: torch.device | str = "cpu"
) -> NDArray[np.float32]:
    """Where the self-similarity graphs of estimates differ from the ground truth's: false or missing structure.

    At each edge pixel of H (threshold 20) the mean over the graph's 625 entries of ``1000 (|S_E - S_H| + S_H (ln S_H -
    ln S_E))``. The mean of a map is ``SelfSimilarityLoss(1000, 1000)``, the SSG distance. H's graphs are computed once.

    Args:
        estimates, H: (H, W, 3) RGB or (H, W) gray, uint8, of one shape.
        border: pixels left out at each side, before the graphs are computed.

    Returns:
        (len(estimates), H, W): NaN off the edges, in the border, and everywhere where a side inside the border does not
        exceed half the search area (12 pixels).
    """
    height, width = H.shape[:2]
    maps = np.full((len(estimates), height, width), np.nan, np.float32)
    radius = _SEARCH // 2
    if min(height, width) - 2 * border <= radius:
        return maps
    inside = np.s_[border : height - border, border : width - border]
    hr, *srs = (uint2tensor4(np.ascontiguousarray(image[inside])).to(device) for image in (H, *estimates))
    mask = edge_mask(hr)
    rows = max(radius + 1, _BAND_PIXELS // hr.shape[-1])
    for top in range(0, hr.shape[-2], rows):
        # A graph reads no farther than the search area: the band and this margin are all it needs.
        band = np.s_[:, :, max(0, top - radius) : min(hr.shape[-2], top + rows + radius)]
        of_band = torch.zeros_like(mask)
        of_band[:, :, top : top + rows] = mask[:, :, top : top + rows]
        at = of_band[0, 0].nonzero().cpu().numpy() + border
        if len(at):
            target = self_similarity_graph(hr[band], of_band[band])
            for sr, values in zip(srs, maps, strict=True):
                graph = self_similarity_graph(sr[band], of_band[band])
                # A few rows at a time stay in the processor's cache: the difference takes half the time.
                pairs = zip(graph.split(_ROWS), target.split(_ROWS), strict=True)
                differences = torch.cat([torch.add(*graph_difference(*pair)) for pair in pairs])
                values[at[:, 0], at[:, 1]] = 1000 * differences.cpu().numpy()
    return maps


def _mean(values: NDArray[np.float32]) -> float:
    """The mean of what is not NaN; NaN where there is nothing."""
    measured = values[~np.isnan(values)]
    return float(measured.mean(dtype=np.float64)) if measured.size else math.nan


def _luma(image: Picture) -> NDArray[np.float64]:
    """By bands of rows: on the way to luma an image takes many times its memory."""
    rows = max(1, 2**20 // image.shape[1])
    return np.concatenate([unrounded_y(image[top : top + rows]) for top in range(0, len(image), rows)])


def _luma8(image: Picture) -> Picture:
    return image if image.ndim == 2 else _luma(image).round().astype(np.uint8)


_OWN: dict[str, Callable[[Picture, Picture, int], float]] = {
    "psnr": calculate_psnr,
    "ssim": calculate_ssim,
    "psnr_y": lambda E, H, border: calculate_psnr(_luma(E), _luma(H), border),
    "ssim_y": lambda E, H, border: calculate_ssim(_luma(E), _luma(H), border),
    "psnr_y8": lambda E, H, border: calculate_psnr(_luma8(E), _luma8(H), border),
    "ssim_y8": lambda E, H, border: calculate_ssim(_luma8(E), _luma8(H), border),
    "color": lambda E, H, border: 255 * float(color_loss(_as_input(E, border, "cpu"), _as_input(H, border, "cpu"))),
}


def frechet_distance(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Frechet distance of two Gaussians fitted to features, (n, d) and (m, d); NaN for fewer than two of either.

    ``|mean_a - mean_b|^2 + Tr(C_a + C_b - 2 (C_a C_b)^(1/2))``, Heusel et al. 2017, eq. 6. With far fewer images than
    features the d x d root is slow and singular; the trace is also the sum of the singular values of X_a X_b^T, where X
    are the centred features over sqrt(n - 1), which is n x m and exact.
    """
    if min(len(a), len(b)) < 2:
        return math.nan
    means = [x.astype(np.float64).mean(0) for x in (a, b)]
    X_a, X_b = ((x - mean) / math.sqrt(len(x) - 1) for x, mean in zip((a, b), means, strict=True))
    root = np.linalg.svd(X_a @ X_b.T, compute_uv=False).sum()
    return float(np.square(means[0] - means[1]).sum() + np.square(X_a).sum() + np.square(X_b).sum() - 2 * root)


# --------------------------------------------------------------------------------------------------------- networks


def _hub() -> Any:
    """The settings of huggingface_hub, which pyiqa brings, and torchmetrics and pytorch-fid do without."""
    try:
        from huggingface_hub import constants
    except ImportError:
        return types.SimpleNamespace(ENDPOINT="https://huggingface.co", HF_HUB_OFFLINE=False)
    return constants


def _online() -> bool:
    """Whether the site that holds pyiqa's weights answers, through a proxy if the environment names one."""
    try:
        urllib.request.urlopen(urllib.request.Request(_hub().ENDPOINT, method="HEAD"), timeout=5).close()
    except urllib.error.HTTPError:
        return True  # it answers
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _loading(online: bool) -> Iterator[None]:
    """Build networks quietly, and give up soon where weights cannot be fetched; what is in a cache works either way."""
    constants = _hub()
    offline = constants.HF_HUB_OFFLINE
    # OpenAI's CLIP takes `packaging` from setuptools' pkg_resources, which newer setuptools no longer has.
    stand_in = None if importlib.util.find_spec("pkg_resources") else types.ModuleType("pkg_resources")
    if stand_in:
        import packaging.version

        stand_in.packaging = packaging  # type: ignore[attr-defined]
        sys.modules["pkg_resources"] = stand_in
    try:
        constants.HF_HUB_OFFLINE = offline or not online  # else it tries for a minute
        with socket_timeout(30 if online else 3), contextlib.redirect_stdout(io.StringIO()):  # it prints what it loads
            yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        if stand_in:
            del sys.modules["pkg_resources"]


def _why(error: Exception) -> str:
    if isinstance(error, OSError):  # URLError, and huggingface_hub's errors, which say it in a paragraph
        reason = f" ({error.reason})" if isinstance(error, urllib.error.URLError) else ""
        return f"its weights are not in the cache and cannot be fetched{reason}"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _by_library(names: Iterable[str]) -> dict[str, list[str]]:
    """Library -> the metrics that it computes."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        if METRICS[name].library:
            groups[METRICS[name].library].append(name)
    return groups


def _load(names: Sequence[str], device: torch.device) -> tuple[dict[str, Any], dict[str, str]]:
    """-> metric name -> its network; metric name -> why it cannot be had.

    Raises:
        UserError: a library is not installed, or cannot be imported.
    """
    for library, its in _by_library(names).items():
        try:
            importlib.import_module(library)
        except ImportError as error:
            titles = ", ".join(METRICS[name].title for name in its)
            raise UserError(f"{titles}: needs {library}, which cannot be imported here ({error}): {INSTALL}") from None
    networks, missing = {}, {}
    online = not set(names) <= set(GROUPS["offline"]) and _online()
    for name in names:
        try:
            with _loading(online) if METRICS[name].library else contextlib.nullcontext():
                networks[name] = _network(name, device)
        except UserError:
            raise
        except Exception as error:  # whatever is wrong with one metric's code or weights, the others are computed
            missing[name] = _why(error)
    return networks, missing


def _network(name: str, device: torch.device) -> Any:
    """What is called with E, or with E and H."""
    if METRICS[name].is_loss:
        return LearnedMetric(name).to(device)
    if name == "fid":
        # The network of BasicSR and pyiqa, in its first place; torchmetrics' FID enlarges images in another way.
        from pytorch_fid.inception import InceptionV3

        return InceptionV3(resize_input=False, normalize_input=True).eval().to(device)
    import pyiqa

    luma = {"color_space": "ycbcr"} if name == "niqe" else {}  # MATLAB's, as BasicSR and the paper; pyiqa's is YIQ's
    return pyiqa.create_metric(name, device=device, **luma)


def _as_input(image: Picture, border: int, device: torch.device | str) -> torch.Tensor:
    """(1, 3, H, W) in [0, 1] without the border, gray repeated: what networks take."""
    inside = image[border : image.shape[0] - border, border : image.shape[1] - border]
    return uint2tensor4(np.ascontiguousarray(inside)).expand(-1, 3, -1, -1).to(device)


class _Muted(io.TextIOBase):
    """A stream without what the thread writes to it that has made this object."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._thread = stream, threading.get_ident()

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self._thread else self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()


# ------------------------------------------------------------------------------------------------------- all of them


@dataclass(frozen=True)
class Measured:
    """One image: label -> metric name -> value (NaN: cannot be had), and label -> its SSG map (:func:`ssg_maps`)."""

    values: dict[str, dict[str, float]]
    ssg: dict[str, NDArray[np.float32]]


class Measurer:
    """The chosen metrics, loaded; what cannot be had is named once and left out.

    Args:
        names: of ``METRICS`` or ``GROUPS``.
        border: pixels left out at each side, customarily the scale.
        device: where networks and graphs are computed.

    Attributes:
        names: the metrics that can be had.
        missing: name -> why not, of the others.

    Raises:
        UserError: an unknown name, or one that needs a library which is not installed.
    """

    def __init__(self, names: Iterable[str], border: int, device: torch.device | str) -> None:
        chosen = choose(names)
        self.border, self.device = border, device
        self._lock, self._threads = threading.Lock(), torch.get_num_threads()
        self._networks: dict[str, Any] = {}
        self.names, self.missing = chosen, dict[str, str]()
        if with_network := [name for name in chosen if METRICS[name].library or METRICS[name].is_loss]:
            self._networks, missing = _load(with_network, torch.device(device))
            self.leave_out(missing)
        self._features: dict[str, list[NDArray[np.float32]]] = defaultdict(list)

    def leave_out(self, missing: Mapping[str, str]) -> None:
        """Do without some metrics: name -> why; each is told once."""
        for name, why in missing.items():
            if name not in self.missing:
                logger.info("%s is left out: %s", METRICS[name].title, why)
        self.missing |= missing
        self.names = [name for name in self.names if name not in self.missing]

    def names_for(self, with_truth: bool) -> list[str]:
        """The metrics of a set with ground truth, or of one without."""
        return [name for name in self.names if with_truth or METRICS[name].needs == "image"]

    @contextlib.contextmanager
    def _network_alone(self) -> Iterator[None]:
        """Networks print and keep in themselves what they compute: one thread at a time, all of PyTorch's within."""
        with self._lock, contextlib.redirect_stdout(_Muted(sys.stdout)):
            threads = torch.get_num_threads()
            torch.set_num_threads(self._threads)
            try:
                yield
            finally:
                torch.set_num_threads(threads)

    def measure(self, estimates: Mapping[str, Picture], H: Picture | None, broken: Collection[str] = ()) -> Measured:
        """All metrics for one image; those over a set come from :meth:`of_set` after its last image. Threads may.

        Args:
            estimates: label -> RGB (H, W, 3) or gray (H, W), uint8; a gray image is its own luma.
            H: the ground truth, of the same shape, or None where there is none.
            broken: labels whose estimate does not count in the metrics over a set.

        Raises:
            ValueError: the shapes differ.
        """
        for label, E in estimates.items():
            if H is not None and E.shape != H.shape:
                raise ValueError(f"images of different shapes cannot be compared: {label} {E.shape} and {H.shape}")
        names = [name for name in self.names_for(H is not None) if METRICS[name].needs != "set"]
        ssg: dict[str, NDArray[np.float32]] = {}
        if H is not None and "ssg" in names:
            ssg = dict(zip(estimates, ssg_maps(list(estimates.values()), H, self.border, self.device), strict=True))
        values = {
            label: {name: _mean(ssg[label]) if name == "ssg" else self._value(name, E, H) for name in names}
            for label, E in estimates.items()
        }
        if H is not None and "fid" in self._networks:
            for label, image in (*estimates.items(), ("", H)):
                # A label all of whose images are broken is known too, and its FID is NaN.
                self._features[label] += [] if label in broken else [self._inception(image)]
        return Measured(values, ssg)

    def of_set(self) -> dict[str, dict[str, float]]:
        """Label -> metric name -> value over the images measured since the last call."""
        for rows in self._features.values():
            rows.sort(key=lambda row: row.tobytes())  # threads may have measured the images in any order
        features = {label: np.array(rows) for label, rows in self._features.items()}
        self._features.clear()
        truth = features.pop("", None)
        return {} if truth is None else {label: {"fid": frechet_distance(x, truth)} for label, x in features.items()}

    def _value(self, name: str, E: Picture, H: Picture | None) -> float:
        border, metric = self.border, METRICS[name]
        if min(E.shape[:2]) - 2 * border < metric.smallest:
            return math.nan
        if name in _OWN:
            assert H is not None
            return _OWN[name](E, H, border)
        images = [E] if metric.needs == "image" or H is None else [E, H]
        inputs = [_as_input(image, border, self.device) for image in images]
        if name == "mad":  # pyiqa's is 0 where a side is odd
            inputs = [x[..., : x.shape[-2] // 2 * 2, : x.shape[-1] // 2 * 2] for x in inputs]
        try:
            with self._network_alone(), torch.no_grad():
                return float(self._networks[name](*inputs))
        except (RuntimeError, ValueError, AssertionError, IndexError) as error:
            size = f"{E.shape[1]}x{E.shape[0]}"
            logger.info("%s has no value for an image of %s: %s", metric.title, size, _why(error))
            return math.nan

    def _inception(self, image: Picture) -> NDArray[np.float32]:
        """FID's 2048 features, as in BasicSR: resized bilinearly to 299 x 299, values in [-1, 1]."""
        small = F.interpolate(_as_input(image, 0, self.device), (299, 299), mode="bilinear", align_corners=False)
        with torch.inference_mode(), self._network_alone():
            features = self._networks["fid"](small)[0]
        return features.flatten().cpu().numpy()

    def describe(self, n_channels: int) -> str:
        """What the columns are: the note under a table."""
        notes = [f"{METRICS[name].title}: {METRICS[name].about}" for name in self.names]
        gray = "" if n_channels == 3 else " Gray images are their own luma, and repeated where RGB is needed."
        libraries = "".join(
            f" By {library} {version(library)}: {', '.join(METRICS[name].title for name in its)}."
            for library, its in _by_library(self.names).items()
        )
        return (
            f"{'; '.join(notes)}. 8-bit images without a border of {self.border} px, mean over the images; '-': image "
            f"too small or without edges, or no ground truth.{gray}{libraries}"
        )


def mean_metrics(values: Sequence[Mapping[str, float]], names: Iterable[str]) -> dict[str, float]:
    """The mean of each metric over the images that have a finite one; else infinite where any is, else NaN.

    PSNR is infinite where E equals H, a black frame say; one such image would make every mean infinite.
    """
    means = {}
    for name in names:
        measured = [image[name] for image in values if not math.isnan(image.get(name, math.nan))]
        finite = [value for value in measured if math.isfinite(value)]
        means[name] = sum(finite) / len(finite) if finite else math.inf if measured else math.nan
    return means
