"""Run a generator over an image of any size, whole or in overlapping tiles."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.utils_error import UserError, tells_of_memory

logger = logging.getLogger(__name__)
Tile = int | Literal["auto"]
# Of tile "auto":
_SMALLEST = 32  # pixels, below which a tile is all border
_fitting: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # what a network was brought down to


class _Span(NamedTuple):
    """One tile along one axis, in pixels of L: it reads [start, stop) and fills [first, last) of the result."""

    start: int
    stop: int
    first: int
    last: int


@runtime_checkable
class RestoresItself(Protocol):
    """A network that goes about images of any size, and tiles, in its own way: models.sampler.DiffusionSampler."""

    def restore(self, L: Tensor, tile: int, tile_overlap: int) -> Tensor: ...


def check_tile(tile: Tile, tile_overlap: int, size_multiple: int = 1) -> None:
    """Refuse tiles that would never get to the end of an image.

    Raises:
        UserError: a negative number, or ``tile`` (unless 0) exceeds ``tile_overlap`` by less than ``size_multiple``.
    """
    if tile == "auto":
        tile = 0
    if tile < 0 or tile_overlap < 0:
        raise UserError(f"tile {tile} and tile_overlap {tile_overlap}: must be 0 or more")
    if tile and tile < tile_overlap + size_multiple:
        raise UserError(
            f"tile {tile} is too small for tile_overlap {tile_overlap}: give a tile of at least "
            f"{tile_overlap + size_multiple}, or a smaller overlap"
        )


def tile_remedy(tile: Tile, setting: str) -> str:
    """What helps a network that finds too little memory.

    Args:
        tile: of now; 0 = whole images, "auto" = even small ones were too large.
        setting: how it is set: ``--tile ``, ``test.tile=``.
    """
    if tile == "auto":
        return f"the memory is too small even for small tiles; give {setting}32 and a smaller tile_overlap"
    if not tile:
        return f"the memory is too small for whole images; restore them in tiles, {setting}256"
    return f"the memory is too small for tiles of {tile}; give smaller ones, {setting}{max(tile // 2, 1)}"


@contextmanager
def enough_memory(otherwise: str) -> Iterator[None]:
    """Work that needs memory: what NumPy, PyTorch and OpenCV raise where there is none becomes one line.

    Raises:
        UserError: with the text ``otherwise``.
    """
    try:
        yield
    except (UserError, OSError):
        raise
    except Exception as error:
        if tells_of_memory(error):
            raise UserError(otherwise) from error
        raise


def _free_memory() -> float:
    """Bytes of main memory that this process may still take, within its container's limit; 4 GiB where none says."""
    free = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free += [1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    except OSError:  # not Linux
        pass
    for folder, limit, held in (("", "memory.max", "anon"), ("memory", "memory.limit_in_bytes", "total_rss")):
        try:
            group = Path("/sys/fs/cgroup", folder)
            facts = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
            free.append(float((group / limit).read_text(encoding="ascii")) - float(facts[held]))
        except (OSError, ValueError, KeyError):  # no such group, or its limit is "max"
            pass
    return max(0.0, min(free, default=4 * 2.0**30))


def _careful_tile(L: Tensor, scale: int, is_diffusion: bool) -> int:
    """The tile for which half of the free main memory is enough, by what networks take at most; 0 = the whole image.

    There is no retry where main memory runs out: systems kill. Counted for E are twelve maps of 64 float32
    features, and for L sixteen times as many: 96 KiB a pixel of L at scale 4. ELAN takes 12, RRDBNet 16, SwinIR 21
    and SPSR 79. Of diffusion, whose autoencoders have wider maps, four times that; it was not measured.
    """
    each = 12 * 64 * 4 * (scale**2 + 16) * (4 if is_diffusion else 1)  # bytes a pixel of L
    pixels = _free_memory() / 2 / (each * len(L))
    return 0 if L.shape[-2] * L.shape[-1] <= pixels else max(math.isqrt(int(pixels)), _SMALLEST)


def _spans(size: int, tile: int, overlap: int, multiple: int) -> list[_Span]:
    """Cover [0, size) by as few tiles as can, spread evenly; seams lie in the middle of the overlaps.

    Args:
        size, tile: multiples of ``multiple``; ``tile`` 0 = one for all.
        overlap: of neighbours at least; ``tile`` exceeds it by ``multiple`` or more.
        multiple: tiles start at multiples of this.
    """
    if not tile or size <= tile:
        return [_Span(0, size, 0, size)]
    n, free = _count(size, tile, overlap, multiple), (size - tile) // multiple
    starts = [i * free // (n - 1) * multiple for i in range(n)]
    stops = [start + tile for start in starts]
    seams = [(start + stop) // 2 for start, stop in zip(starts[1:], stops, strict=False)]
    return [_Span(*span) for span in zip(starts, stops, [0, *seams], [*seams, size], strict=True)]


def _count(size: int, tile: int, overlap: int, multiple: int) -> int:
    """How many tiles cover [0, size): n of them reach n * tile - (n - 1) * overlap, all in units of ``multiple``."""
    overlap = -(-overlap // multiple)
    return -(-(size // multiple - overlap) // (tile // multiple - overlap))


def _even_side(size: int, tile: int, overlap: int, multiple: int) -> int:
    """The smallest side with which as many tiles as of ``tile``, rounded up to ``multiple``, cover [0, size)."""
    tile = -(-tile // multiple) * multiple
    if not tile or size <= tile:
        return size
    n = _count(size, tile, overlap, multiple)
    overlap = -(-overlap // multiple)
    return -(-(size // multiple + (n - 1) * overlap) // n) * multiple


def pad_to_multiple(image: Tensor, multiple: int) -> Tensor:
    """Extend (N, C, H, W) at the bottom and right to sides that divide by ``multiple``, by reflection if they can."""
    h, w = image.shape[-2:]
    bottom, right = -h % multiple, -w % multiple
    if not (bottom or right):
        return image
    # Reflection needs more pixels than it adds.
    return F.pad(image, (0, right, 0, bottom), mode="reflect" if bottom < h and right < w else "replicate")


def blend_tiles(
    function: Callable[..., Tensor], images: Sequence[Tensor], tile: int, tile_overlap: int, multiple: int = 1
) -> Tensor:
    """Apply a function to images piece by piece; where pieces overlap, the mean weighted by a Gaussian of each piece.

    The Gaussian's deviation is a tenth of the piece's side, as in StableSR and in Mixture of Diffusers
    (arXiv 2302.02412): a piece counts at its middle, where it has seen what is around.

    Args:
        function: of pieces of ``images``, one of each, to a (N, C', h', w') as many times larger than the first.
        images: (N, C, H, W), different ones of one scene; the sides of the others are multiples of the first's.
        tile: side of the pieces, in pixels of the first; 0, or as large as the image = all of it at once. All are of
            this side, spread evenly: diffusion is best at the size that its network was trained with.
        tile_overlap: least overlap of neighbouring pieces, less than ``tile``.
        multiple: pieces start at multiples of this, which divides ``tile`` and the first image's sides.
    """
    height, width = images[0].shape[-2:]
    rows, columns = (_spans(size, tile, tile_overlap, multiple) for size in (height, width))
    if len(rows) == len(columns) == 1:
        return function(*images)
    total: Tensor | None = None
    for y, x in product(rows, columns):
        # In float32: the weight of a corner, 1e-11, is 0 in half precision, and their quotient NaN.
        piece = function(*(_cut(image, y, x, image.shape[-1] / width) for image in images)).float()
        weight = _gaussian(piece.shape[-2]).outer(_gaussian(piece.shape[-1])).to(piece)
        if total is None:
            factor = piece.shape[-1] / (x.stop - x.start)
            total = piece.new_zeros(*piece.shape[:2], round(height * factor), round(width * factor))
            weights = piece.new_zeros(total.shape[-2:])
        _cut(total, y, x, factor).add_(piece * weight)
        _cut(weights, y, x, factor).add_(weight)
    assert total is not None
    return total / weights


def _cut(image: Tensor, y: _Span, x: _Span, factor: float) -> Tensor:
    """The piece that a tile reads, of an image that is ``factor`` times larger than what the tiles were laid over."""
    rows, columns = (slice(round(span.start * factor), round(span.stop * factor)) for span in (y, x))
    return image[..., rows, columns]


def _gaussian(size: int) -> Tensor:
    """(size,), 1 at the middle."""
    return (-0.5 * ((torch.arange(size) - (size - 1) / 2) / (0.1 * size)) ** 2).exp()


def image_of(output: Any) -> Tensor:
    """The estimate E among what a generator returns: SPSR's returns gradient maps too."""
    E: Tensor = getattr(output, "E", output)
    return E


def _enlarge(netG: nn.Module, L: Tensor, scale: int) -> Tensor:
    """One call of the network, its result's size checked."""
    E = image_of(netG(L))
    if E.shape[-2:] != (L.shape[-2] * scale, L.shape[-1] * scale):
        found, given = " x ".join(map(str, E.shape[-2:])), " x ".join(map(str, L.shape[-2:]))
        raise ValueError(f"the network made {found} pixels of {given}: this is not scale {scale}")
    return E


def _restore_in_what_fits(netG: nn.Module, L: Tensor, scale: int, tile_overlap: int) -> Tensor:
    """:func:`restore` with the largest tile for which there is memory."""
    smallest = max(_SMALLEST, 2 * tile_overlap, tile_overlap + int(getattr(netG, "size_multiple", 1)))
    tile = _careful_tile(L, scale, isinstance(netG, RestoresItself)) if L.device.type == "cpu" else 0
    tiles = [tile for tile in (tile, _fitting.get(netG, 0)) if tile]
    tile = max(min(tiles), smallest) if tiles else 0
    while True:
        try:
            return restore(netG, L, scale, tile, tile_overlap)
        except Exception as error:
            largest = max(L.shape[-2:])
            smaller = (min(tile, largest) if tile else largest) // 2
            if smaller < smallest or not tells_of_memory(error):
                raise
        # Out of the except clause, for the error's frames hold tensors.
        if L.device.type == "cuda":
            torch.cuda.empty_cache()
        tried = f"tiles of {tile}" if tile else "a whole image"
        logger.warning("the memory is too small for %s; tiles of %d from here on", tried, smaller)
        tile = _fitting[netG] = smaller


@torch.inference_mode()
def restore(netG: nn.Module, L: Tensor, scale: int, tile: Tile = 0, tile_overlap: int = 32) -> Tensor:
    """The estimate E of a low-quality image, tile by tile where the image is larger than a tile.

    Each pixel of E comes from the tile in which it lies farthest from the tile's border, so that tiles give exactly
    what the whole image gives where half the overlap covers the network's receptive field. A network whose input must
    divide by some number, or whose response repeats with it (windows, pixel-unshuffle), says so in an attribute
    ``size_multiple``: sizes are extended to it by reflection, tiles start at multiples of it and have such sides.

    Tiles share the work evenly: there are as few as can be, of one shape, no larger than they must be to overlap by
    ``tile_overlap``. Several go through the network at once where together they have no more pixels than one of
    ``tile`` x ``tile``, so that ``tile`` bounds the memory.

    A network with a method ``restore(L, tile, tile_overlap)`` of its own (diffusion) does all of this itself.

    Args:
        netG: the generator, in the mode (``eval``) and on the device that the caller wants.
        L: (N, C, h, w) in [0, 1], of any size from 1 x 1.
        scale: factor from L to E.
        tile: largest side of a tile in pixels of L, rounded up to ``size_multiple``; 0 = the whole image; "auto" =
            the whole image if the memory is enough, else the largest tile for which it is: on the CPU by an estimate
            from half of what is free, on a GPU by halving where the memory runs out, from then on for that network.
            What is chosen shows in the result only where the overlap does not cover the receptive field.
        tile_overlap: least overlap of neighbouring tiles in pixels of L, less than ``tile``.

    Returns:
        (N, C, h * scale, w * scale), not clamped, without a gradient.

    Raises:
        UserError: ``tile`` is too small for ``tile_overlap``.
        ValueError: the network does not enlarge by ``scale``.
    """
    if tile == "auto":
        check_tile(tile, tile_overlap)
        return _restore_in_what_fits(netG, L, scale, tile_overlap)
    if isinstance(netG, RestoresItself):
        return netG.restore(L, tile, tile_overlap)
    multiple = int(getattr(netG, "size_multiple", 1))
    check_tile(tile, tile_overlap, multiple)
    h, w = L.shape[-2:]
    L = pad_to_multiple(L, multiple)
    height, width = (_even_side(size, tile, tile_overlap, multiple) for size in L.shape[-2:])
    if (height, width) == L.shape[-2:]:
        return _enlarge(netG, L, scale)[..., : h * scale, : w * scale]
    spans = list(
        product(_spans(L.shape[-2], height, tile_overlap, multiple), _spans(L.shape[-1], width, tile_overlap, multiple))
    )
    at_once = max(1, tile**2 // (height * width))
    E = L.new_empty(0)
    for i in range(0, len(spans), at_once):
        batch = spans[i : i + at_once]
        pieces = _enlarge(netG, torch.cat([_cut(L, y, x, 1) for y, x in batch]), scale).chunk(len(batch))
        if not i:
            E = pieces[0].new_empty(*pieces[0].shape[:-2], L.shape[-2] * scale, L.shape[-1] * scale)
        for (y, x), piece in zip(batch, pieces, strict=True):
            E[..., y.first * scale : y.last * scale, x.first * scale : x.last * scale] = piece[
                ...,
                (y.first - y.start) * scale : (y.last - y.start) * scale,
                (x.first - x.start) * scale : (x.last - x.start) * scale,
            ]
    return E[..., : h * scale, : w * scale]
