"""The self-similarity loss (SSL) of Chen, Zhang, Liang and Zhang, "SSL: A Self-similarity Loss for Improving Generative
Image Super-resolution", ACM MM 2024 (arXiv 2408.05713). It needs PyTorch only and can be copied into any trainer,
alone or, for its fast form, with the folder ``similarity_cuda``.

Notation: k = ``kernel_size_search`` (side of the search area, 25), w = ``kernel_size_window`` (side of the compared
windows, 9), r = k // 2, f = w // 2, M = number of masked pixels of the whole batch. For a masked pixel p and an offset
d = (dy, dx), -r <= dy, dx <= r:

    D_p(d) = 1 / (C w^2)  sum over channels and window positions u, |u| <= f, of
             ( I(p + u) - I(p + d + u) )^2     where p + d + u lies in the search area of p (|d + u| <= r),
             I(p + u)^2                        where it does not: the published code compares with zero there,
    s_p(d) = exp(-D_p(d) / sigma),     S_p(d) = s_p(d) / (sum over d of s_p + 1e-10)     (the self-similarity graph).

The image is extended by reflection. ``search_border="zero"`` is the published rule above; it depends on brightness and
mutes the outer ring of the search area. ``"image"`` compares with the image itself everywhere. The loss compares the
graphs of the output (SR) and of the ground truth (GT) at the same pixels: ``l1_weight * mean |S_SR - S_GT| + kl_weight
* mean S_GT (ln S_GT - ln S_SR)``, means over all M k^2 entries, both graphs clamped from below at 1e-10 in the second.

Four forms (``ssl_mode``) compute it:

* ``pytorch``, the readable specification, holds M x C w^2 x k^2 numbers (6 GB for one 128 x 128 crop);
* ``boxsum``: for one offset d the sum over the window is a box sum of the squared difference between the image and its
  shift, so all pixels share it. In PyTorch, one row of offsets at a time, forward and backward, on any device;
* ``cpp``, ``cuda``: the same compiled for the CPU and for GPUs (``similarity_cuda``, built on first use): the loss and
  its gradient in one call, and the graphs never held as a whole.

``auto`` takes the compiled one of the images' device where it can be had, else ``boxsum``, and says once which and why;
that is a warning where the compiled one was built, but computed wrong numbers when it was tried on this device.
"""

import functools
import logging
import numbers

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_EPS = 1e-10  # of the normalisation and of the clamp in the KL term
_logger = logging.getLogger(__name__)
_said: set[tuple[str, str]] = set()


# ------------------------------------------------------------------------------------------------------------- masks


def edge_mask(img: Tensor, threshold: float = 20.0) -> Tensor:
    """Pixels on the dark side of an edge, where the loss is computed.

    The 8-bit grey value (ITU-R 601-2, integer arithmetic as in Pillow's mode "L") is filtered with the 4-neighbour
    Laplacian, border mirrored without repeating the edge pixel; negative responses saturate to 0. Equals the off-line
    masks of the published preparation script bit for bit where ``img`` came from 8-bit pixels.

    Args:
        img: (N, 3, H, W) RGB or (N, 1, H, W) grey, values in [0, 1]; H, W >= 2.
        threshold: response, in grey levels, above which (strictly) a pixel counts.

    Returns:
        (N, 1, H, W) float32 of {0, 1} on the device of ``img``.

    Raises:
        ValueError: another shape, integers (0 to 255, presumably) instead of values in [0, 1], a threshold that is NaN.
    """
    if img.dim() != 4 or img.shape[1] not in (1, 3) or min(img.shape[2:]) < 2:
        raise ValueError(f"edge_mask takes (N, 3, H, W) or (N, 1, H, W) with H, W >= 2, not {tuple(img.shape)}")
    if not img.is_floating_point():
        raise ValueError(f"edge_mask takes floating point in [0, 1], not {img.dtype}")
    if threshold != threshold:
        raise ValueError(f"threshold must be a number, not {threshold!r}")
    pixels = (img.detach().float() * 255).round().clamp(0, 255)
    if img.shape[1] == 3:
        red, green, blue = pixels.to(torch.int32).unbind(1)
        grey = ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).float()[:, None]
    else:
        grey = pixels
    p = F.pad(grey, (1, 1, 1, 1), mode="reflect")
    laplacian = p[..., :-2, 1:-1] + p[..., 2:, 1:-1] + p[..., 1:-1, :-2] + p[..., 1:-1, 2:] - 4 * grey
    return (laplacian.clamp(0, 255) > threshold).float()


def mask_stride_pattern(height: int, width: int, stride: int, device: torch.device | str | None = None) -> Tensor:
    """The tiled identity that thins a mask: 1 where y mod stride = x mod stride, so one pixel in ``stride`` stays.

    Returns (1, 1, height, width) float32 of {0, 1} on ``device`` (None: the CPU), anchored at the top-left corner. A
    stride of 0 or 1 keeps all; one that is negative or no whole number is a ValueError.
    """
    _check_stride(stride)
    stride = max(1, stride)
    y, x = torch.arange(height, device=device), torch.arange(width, device=device)
    return (y[:, None] % stride == x % stride).float()[None, None]


# --------------------------------------------------------------------------------------- distances: the specification


def _distances_specification(img: Tensor, pixels: tuple[Tensor, ...], k: int, w: int, zero: bool) -> Tensor:
    """D of the module docstring, word for word: (M, k, k). ``pixels`` = (image, row, column) of each masked pixel."""
    r, f = k // 2, w // 2
    image, row, column = pixels
    margin = r if zero else r + f
    side = 2 * margin + 1
    padded = F.pad(img, (margin,) * 4, mode="reflect")
    areas = padded.unfold(2, side, 1).unfold(3, side, 1)[image, :, row, column]  # (M, C, side, side), centred at pixels
    if zero:  # windows are cut from the search area, not from the image: what lies outside of it is zero
        areas = F.pad(areas, (f, f, f, f))
    windows = areas.unfold(2, w, 1).unfold(3, w, 1)  # (M, C, k, k, w, w)
    centre = windows[:, :, r : r + 1, r : r + 1]  # (M, C, 1, 1, w, w), complete because w <= k
    return (windows - centre).square().mean((1, 4, 5))


# ------------------------------------------------------------------------------------------------ distances: box sums


def _sums(x: Tensor, n: int, dim: int) -> Tensor:
    """Sums of ``n`` neighbours along ``dim`` (n >= 1), which gets n - 1 shorter.

    By doubling, in about log2(n) additions. Only like signs are added in the forward pass, so nothing cancels, as it
    would in differences of a running total.
    """
    length = x.shape[dim] - n + 1
    total: Tensor | None = None
    power, width, offset = x, 1, 0
    while True:
        if n & 1:
            piece = power.narrow(dim, offset, length)
            total = piece if total is None else total + piece
            offset += width
        n >>= 1
        if not n:
            assert total is not None
            return total
        size = power.shape[dim] - width
        power = power.narrow(dim, 0, size) + power.narrow(dim, width, size)
        width *= 2


def _inside(offset: int, r: int, f: int, zero: bool) -> tuple[int, int]:
    """First and last + 1 window index (0 .. 2f) whose position lies in the search area, |offset + index - f| <= r.

    With ``search_border="image"`` (not zero) every position counts as inside.
    """
    if not zero:
        return 0, 2 * f + 1
    return max(-f, -r - offset) + f, min(f, r - offset) + f + 1


class _BoxSumDistances(torch.autograd.Function):
    """Distances of all masked pixels of a few images by box sums, one row of offsets (fixed dy) at a time.

    Fields have the shape (N, rows, k, columns): at each pixel the k horizontal offsets dx. The template I(p + u) lives
    on the image extended by f, (He, We) = (H + 2f, W + 2f); candidates on the image extended by r + f, whose outer f
    are never read inside a search area.
    """

    @staticmethod
    def forward(ctx, img: Tensor, image: Tensor, row: Tensor, column: Tensor, k: int, w: int, zero: bool) -> Tensor:
        r, f, cut = k // 2, w // 2, w // 2 if zero else 0  # so many offsets on each side have incomplete windows
        (_, C, H, W), He, We = img.shape, img.shape[2] + 2 * f, img.shape[3] + 2 * f
        candidates = _extend(img, r, f, zero)
        template = candidates[:, :, r : r + He, r : r + We]
        energy = template.square().sum(1)  # (N, He, We)
        distances = img.new_empty(len(row), k, k)
        for i, dy in enumerate(range(-r, r + 1)):
            shifted = candidates[:, :, r + dy : r + dy + He].unfold(3, We, 1)  # (N, C, He, k, We), a view
            squares = (shifted[:, 0] - template[:, 0, :, None]).square_()  # (N, He, k, We)
            for c in range(1, C):
                difference = shifted[:, c] - template[:, c, :, None]
                squares.addcmul_(difference, difference)
            top, bottom = _inside(dy, r, f, zero)
            within = _sums(squares[:, top : bottom + H - 1], bottom - top, 1)  # (N, H, k, We), rows summed
            field = img.new_empty(len(img), H, k, W)
            field[:, :, cut : k - cut] = _sums(within[:, :, cut : k - cut], w, 3)  # complete windows
            energy_within = _sums(energy[:, top : bottom + H - 1], bottom - top, 1)  # (N, H, We)
            for j in [*range(cut), *range(k - cut, k)]:  # windows that leave the search area at the left or right
                left, right = _inside(j - r, r, f, zero)
                field[:, :, j] = _sums(within[:, :, j, left : right + W - 1], right - left, 2)
                out_left, out_right = (0, left) if left else (right, w)
                field[:, :, j] += _sums(energy_within[:, :, out_left : out_right + W - 1], out_right - out_left, 2)
            if bottom - top < w:  # ... at the top or bottom
                out_top, out_bottom = (0, top) if top else (bottom, w)
                energy_out = _sums(energy[:, out_top : out_bottom + H - 1], out_bottom - out_top, 1)
                field += _sums(energy_out, w, 2)[:, :, None]
            distances[:, i] = field[image, row, :, column]
        ctx.save_for_backward(img, image, row, column)
        ctx.sizes = k, w, zero
        return distances.div_(C * w * w)

    @staticmethod
    def backward(ctx, grad: Tensor):
        """The same box sums, applied to the incoming gradient: each term 2 g (template - candidate) at both ends."""
        img, image, row, column = ctx.saved_tensors
        k, w, zero = ctx.sizes
        r, f, cut = k // 2, w // 2, w // 2 if zero else 0
        (N, C, H, W), He, We = img.shape, img.shape[2] + 2 * f, img.shape[3] + 2 * f
        grad = grad * (2 / (C * w * w))
        candidates = _extend(img, r, f, zero)
        template = candidates[:, :, r : r + He, r : r + We]
        grad_candidates = torch.zeros_like(candidates)
        grad_template = torch.zeros_like(template)
        weight_template = img.new_zeros(N, He, We)  # what multiplies the template itself
        weight_candidates = torch.zeros_like(candidates[:, 0])
        field = img.new_zeros(N, H, k, W)
        for i, dy in enumerate(range(-r, r + 1)):
            field[image, row, :, column] = grad[:, i]
            top, bottom = _inside(dy, r, f, zero)
            # Spread each gradient over its window: the adjoint of the sums above is sums over a zero-padded field.
            spread = img.new_zeros(N, He, k, We)
            rows = img.new_zeros(N, H, k, We)
            rows[:, :, cut : k - cut] = _sums(F.pad(field[:, :, cut : k - cut], (w - 1, w - 1)), w, 3)
            outside = img.new_zeros(N, H, We)
            for j in [*range(cut), *range(k - cut, k)]:
                left, right = _inside(j - r, r, f, zero)
                n = right - left
                rows[:, :, j, left : left + W + n - 1] = _sums(F.pad(field[:, :, j], (n - 1, n - 1)), n, 2)
                out_left, n = (0, left) if left else (right, w - right)
                outside[:, :, out_left : out_left + W + n - 1] += _sums(F.pad(field[:, :, j], (n - 1, n - 1)), n, 2)
            n = bottom - top
            spread[:, top : top + H + n - 1] = _sums(F.pad(rows, (0, 0, 0, 0, n - 1, n - 1)), n, 1)
            weight_template[:, top : top + H + n - 1] += _sums(F.pad(outside, (0, 0, n - 1, n - 1)), n, 1)
            if n < w:
                out_top, n = (0, top) if top else (bottom, w - bottom)
                columns = _sums(F.pad(field.sum(2), (w - 1, w - 1)), w, 2)  # (N, H, We)
                weight_template[:, out_top : out_top + H + n - 1] += _sums(F.pad(columns, (0, 0, n - 1, n - 1)), n, 1)
            # Sum over dx of spread x (template - candidate), and the same seen from the candidates.
            lines = slice(r + dy, r + dy + He)
            weight_template += spread.sum(2)
            for j in range(k):
                at = (slice(None), lines, slice(j, j + We))
                weight_candidates[at] += spread[:, :, j]
                for c in range(C):
                    grad_template[:, c].addcmul_(spread[:, :, j], candidates[:, c, lines, j : j + We], value=-1)
                    grad_candidates[:, c, lines, j : j + We].addcmul_(spread[:, :, j], template[:, c], value=-1)
        grad_candidates.addcmul_(candidates, weight_candidates[:, None])
        grad_template.addcmul_(template, weight_template[:, None])
        grad_candidates[:, :, r : r + He, r : r + We] += grad_template
        if zero and f:
            grad_candidates = grad_candidates[:, :, f:-f, f:-f]
        return _unpad_reflect(grad_candidates, r if zero else r + f), None, None, None, None, None, None


def _extend(img: Tensor, r: int, f: int, zero: bool) -> Tensor:
    """The image extended by r + f; where windows end at the search area, the outer f are never read inside of one."""
    if zero:
        return F.pad(F.pad(img, (r, r, r, r), mode="reflect"), (f, f, f, f))
    return F.pad(img, (r + f,) * 4, mode="reflect")


def _unpad_reflect(grad: Tensor, r: int) -> Tensor:
    """Adjoint of reflection padding by ``r``: folds the frame's gradient back onto the image."""
    for dim in (2, 3):
        size = grad.shape[dim] - 2 * r
        inner = grad.narrow(dim, r, size).clone()
        if r:
            inner.narrow(dim, 1, r).add_(grad.narrow(dim, 0, r).flip(dim))
            inner.narrow(dim, size - 1 - r, r).add_(grad.narrow(dim, r + size, r).flip(dim))
        grad = inner
    return grad


def _distances_boxsum(img: Tensor, pixels: tuple[Tensor, ...], k: int, w: int, zero: bool) -> Tensor:
    """D of the module docstring for all masked pixels, a few images at a time to bound the memory; -> (M, k, k)."""
    image, row, column = pixels
    per_image = k * (img.shape[2] + w) * (img.shape[3] + w)
    step = max(1, 2**22 // per_image)  # fields of at most 16 MB in float32
    counts = torch.bincount(image, minlength=len(img)).tolist()
    pieces, first = [], 0
    for start in range(0, len(img), step):
        n = sum(counts[start : start + step])
        if n:
            of = slice(first, first + n)
            part = img[start : start + step]
            pieces.append(_BoxSumDistances.apply(part, image[of] - start, row[of], column[of], k, w, zero))
            first += n
    return torch.cat(pieces) if pieces else img.sum((1, 2, 3))[:0, None, None].expand(0, k, k)


# ------------------------------------------------------------------------------------------------- graph and the loss


def _distances_compiled(img: Tensor, pixels: tuple[Tensor, ...], k: int, w: int, zero: bool) -> Tensor:
    return torch.ops.similarity.distances(img, *pixels, k, w, zero)


_COMPILED = {"cpu": "cpp", "cuda": "cuda"}  # device type -> mode of the compiled op there
_DISTANCES = {
    "pytorch": _distances_specification,
    "boxsum": _distances_boxsum,
    "cpp": _distances_compiled,
    "cuda": _distances_compiled,
}


def _why_not(mode: str, device_type: str) -> str | None:
    """Load the compiled op ``mode``, built and proved at first; -> None, or why it cannot be had for tensors there."""
    if _COMPILED.get(device_type) != mode:
        return f"it works on {'the CPU' if mode == 'cpp' else 'CUDA GPUs'}, the images are on {device_type}"
    try:
        import similarity_cuda

        similarity_cuda.load(mode)
    except (ImportError, RuntimeError) as error:
        return str(error)
    return None


def _failed_proof(mode: str) -> bool:
    """Whether the compiled op ``mode`` was built, but computed wrong numbers when it was tried on this device."""
    try:
        import similarity_cuda
    except ImportError:
        return False
    return similarity_cuda.failed_proof(mode)


def _choose(ssl_mode: str, device_type: str) -> str:
    """Resolve ``auto`` to the fastest form that works on the device, and say so once.

    Raises:
        ValueError: a mode that is unknown or cannot be had here, with the reason.
    """
    if ssl_mode == "auto":
        compiled = _COMPILED.get(device_type)
        why = _why_not(compiled, device_type) if compiled else f"there is no compiled op for {device_type}"
        chosen = compiled if compiled and not why else "boxsum"
        if (chosen, device_type) not in _said:
            _said.add((chosen, device_type))
            note = f" (not {compiled or 'compiled'}: {why})" if why else ""
            level = logging.WARNING if compiled and _failed_proof(compiled) else logging.INFO
            _logger.log(level, "self-similarity on %s: ssl_mode auto takes %s%s", device_type, chosen, note)
        return chosen
    if ssl_mode not in _DISTANCES:
        raise ValueError(f"ssl_mode {ssl_mode!r} is unknown; valid are auto, {', '.join(_DISTANCES)}")
    if ssl_mode in _COMPILED.values():
        why = _why_not(ssl_mode, device_type)
        if why:
            raise ValueError(f"ssl_mode {ssl_mode!r} cannot be had here: {why}")
    return ssl_mode


@functools.cache
def _meet_the_compiler() -> None:
    """Say what torch.compile need not look into; not at import, because this loads much of it."""
    torch.compiler.assume_constant_result(_choose)
    # Traced, its loops over offsets would be unrolled: minutes of compiling.
    _DISTANCES["boxsum"] = torch.compiler.disable(_distances_boxsum)


_SMALLEST, _LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def _check_stride(stride: int) -> None:
    if not isinstance(stride, numbers.Integral) or stride < 0:
        raise ValueError(f"mask_stride must be a whole number, 0 or more, not {stride!r}")


def _check_weight(name: str, weight: float) -> None:
    if not isinstance(weight, numbers.Real) or not 0 <= weight <= _LARGEST:  # false for NaN
        raise ValueError(f"{name} must be 0 or a positive number, finite in float32, not {weight!r}")


def _check_settings(k: int, w: int, sigma: float, search_border: str) -> None:
    if not all(isinstance(size, numbers.Integral) and size >= 1 and size % 2 for size in (k, w)) or w > k:
        raise ValueError(f"search area {k} and window {w} must be odd, the window not larger than the search area")
    if not isinstance(sigma, numbers.Real) or not _SMALLEST <= sigma <= _LARGEST:
        raise ValueError(f"sigma must be a positive number, finite in float32, not {sigma!r}")
    if search_border not in ("zero", "image"):
        raise ValueError(f"search_border is 'zero' or 'image', not {search_border!r}")


def _check_images(img: Tensor, mask: Tensor, k: int, w: int, search_border: str) -> None:
    if img.dim() != 4 or not img.is_floating_point():
        raise ValueError(f"images must be (N, C, H, W) floating point, not {tuple(img.shape)} {img.dtype}")
    if tuple(mask.shape) != (len(img), 1, *img.shape[2:]):
        raise ValueError(f"mask {tuple(mask.shape)} does not fit images {tuple(img.shape)}: it must be (N, 1, H, W)")
    if mask.device != img.device:
        raise ValueError(f"mask is on {mask.device}, images are on {img.device}")
    margin = k // 2 if search_border == "zero" else k // 2 + w // 2
    if len(img) and min(img.shape[2:]) <= margin:
        raise ValueError(
            f"images of {img.shape[2]} x {img.shape[3]} pixels are too small for kernel_size_search {k}: "
            f"both sides must be at least {margin + 1}"
        )


def _masked_pixels(mask: Tensor) -> tuple[Tensor, ...]:
    """(image, row, column) of every mask entry equal to 1, batch order, then raster order."""
    pixels = (mask[:, 0] == 1).nonzero(as_tuple=True)  # the host waits for a GPU here: M is a tensor size
    if len(pixels[0]) == 0 and bool((mask != 0).any()):
        raise ValueError("no mask entry equals 1, but some are not 0: the mask must be of {0, 1}")
    return pixels


def _computable(*images: Tensor) -> list[Tensor]:
    """float64 stays, everything else becomes float32; beside float64 it becomes that."""
    dtype = torch.float64 if any(img.dtype == torch.float64 for img in images) else torch.float32
    return [img.to(dtype) for img in images]


def _graph(
    img: Tensor, pixels: tuple[Tensor, ...], k: int, w: int, zero: bool, sigma: float, generalization: bool, mode: str
) -> Tensor:
    similarity = torch.exp(_DISTANCES[mode](img, pixels, k, w, zero).flatten(1) / -sigma)
    return similarity / (similarity.sum(1, keepdim=True) + _EPS) if generalization else similarity


def self_similarity_graph(
    img: Tensor,
    mask: Tensor,
    kernel_size_search: int = 25,
    kernel_size_window: int = 9,
    sigma: float = 0.004,
    generalization: bool = True,
    ssl_mode: str = "auto",
    search_border: str = "zero",
) -> Tensor:
    """The self-similarity graph of the masked pixels (ACM MM 2024, section 3), differentiable with respect to ``img``.

    Args:
        img: (N, C, H, W), values in [0, 1]; float64 is computed in float64, everything else in float32.
        mask: (N, 1, H, W); entries equal to exactly 1 are selected.
        kernel_size_search: side of the search area, odd; H and W must exceed half of it.
        kernel_size_window: side of the compared windows, odd, at most ``kernel_size_search``.
        sigma: scaling factor h.
        generalization: divide each row by its sum (+ 1e-10).
        ssl_mode: ``"auto"``, ``"pytorch"``, ``"boxsum"``, ``"cpp"`` or ``"cuda"``, see the top of this file.
        search_border: ``"zero"`` as published, or ``"image"``: true windows everywhere; then H and W must exceed half
            of both sizes together.

    Returns:
        (M, kernel_size_search ** 2): the masked pixels of all images, batch order, then raster order; columns are the
        offsets in raster order, the pixel itself in the middle.

    Raises:
        ValueError: shapes, devices, sizes or the mode do not fit, or sigma is not positive and finite.
    """
    k, w = kernel_size_search, kernel_size_window
    _check_settings(k, w, sigma, search_border)
    _check_images(img, mask, k, w, search_border)
    mode = _choose(ssl_mode, img.device.type)
    pixels = _masked_pixels(mask)
    with torch.autocast(img.device.type, enabled=False):
        (img,) = _computable(img)
        return _graph(img, pixels, k, w, search_border == "zero", sigma, generalization, mode)


def graph_difference(graph: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """``|S_SR - S_GT|`` and ``KL(S_GT || S_SR)`` at each masked pixel: means over the graph's entries, without weights.

    Args:
        graph, target: (M, k^2), of the output and of the ground truth (:func:`self_similarity_graph`).

    Returns:
        (M,), (M,); differentiable.
    """
    l1 = (graph - target).abs().mean(1)
    # Written out because the mean of PyTorch's kl_div is about to change its meaning.
    target, graph = target.clamp(min=_EPS), graph.clamp(min=_EPS)
    return l1, (target * (target.log() - graph.log())).mean(1)


class SelfSimilarityLoss(nn.Module):
    """``l1_weight * mean |S_SR - S_GT| + kl_weight * KL(S_GT || S_SR)`` at the edge pixels of the ground truth.

    Args:
        l1_weight, kl_weight: weights, 0 or more; both terms are means over M k^2 entries (1000 = 1.6 per pixel at
            k = 25).
        kernel_size_search, kernel_size_window, sigma, generalization, ssl_mode, search_border: see
            :func:`self_similarity_graph`.
        mask_stride: thin the mask to one pixel in this many (:func:`mask_stride_pattern`); 0 or 1 keeps all.
        threshold: of :func:`edge_mask`, for masks made on line.

    The mean runs over all masked pixels of the batch, so an image with more edges weighs more. A batch without masked
    pixels gives a zero loss and a zero gradient. Computed in float32 also inside autocast (float64 stays float64).
    Images and masks may have any layout in memory: channels_last, permuted, sliced, expanded.

    Raises:
        ValueError: a setting is not what is said here, or the mode cannot be had; it names the value.
    """

    def __init__(
        self,
        l1_weight: float,
        kl_weight: float,
        kernel_size_search: int = 25,
        kernel_size_window: int = 9,
        sigma: float = 0.004,
        generalization: bool = True,
        mask_stride: int = 0,
        threshold: float = 20.0,
        ssl_mode: str = "auto",
        search_border: str = "zero",
    ) -> None:
        super().__init__()
        self.l1_weight = l1_weight
        self.kl_weight = kl_weight
        self.kernel_size_search = kernel_size_search
        self.kernel_size_window = kernel_size_window
        self.sigma = sigma
        self.generalization = generalization
        self.mask_stride = mask_stride
        self.threshold = threshold
        self.ssl_mode = ssl_mode
        self.search_border = search_border
        self._check_settings()
        if ssl_mode != "auto":
            # A mode that cannot be had fails now, not at the first batch.
            _choose(ssl_mode, "cuda" if ssl_mode == "cuda" else "cpu")
        _meet_the_compiler()

    def _check_settings(self) -> None:
        _check_settings(self.kernel_size_search, self.kernel_size_window, self.sigma, self.search_border)
        _check_weight("l1_weight", self.l1_weight)
        _check_weight("kl_weight", self.kl_weight)
        _check_stride(self.mask_stride)

    def prepare(self, device: torch.device) -> str:
        """Build and load now what the first batch would need, and say which form it is."""
        return _choose(self.ssl_mode, torch.device(device).type)

    def parts(self, sr: Tensor, hr: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, and for logs its weighted L1 and KL parts without gradient; arguments as in :meth:`forward`."""
        self._check_settings()  # again: they may have been changed since
        if sr.shape != hr.shape or not hr.is_floating_point():
            raise ValueError(
                f"sr {tuple(sr.shape)} and hr {tuple(hr.shape)} {hr.dtype} must have one shape, in floating point"
            )
        if sr.device != hr.device:
            raise ValueError(f"sr is on {sr.device}, hr is on {hr.device}")
        hr = hr.detach()
        mask = edge_mask(hr, self.threshold) if mask is None else mask
        k, w, zero = self.kernel_size_search, self.kernel_size_window, self.search_border == "zero"
        _check_images(sr, mask, k, w, self.search_border)
        if self.mask_stride > 1:
            mask = mask * mask_stride_pattern(mask.shape[2], mask.shape[3], self.mask_stride, mask.device).to(
                mask.dtype
            )
        mode = _choose(self.ssl_mode, sr.device.type)
        with torch.autocast(sr.device.type, enabled=False):
            sr, hr = _computable(sr, hr)
            if mode in ("cpp", "cuda"):
                return self._fused(sr, hr, mask)
            pixels = _masked_pixels(mask)
            settings = (k, w, zero, self.sigma, self.generalization, mode)
            with torch.no_grad():
                target = _graph(hr, pixels, *settings)
            l1, kl = graph_difference(_graph(sr, pixels, *settings), target)
            masked = max(1, len(target))
            l1, kl = self.l1_weight * l1.sum() / masked, self.kl_weight * kl.sum() / masked
        return l1 + kl, l1.detach(), kl.detach()

    def _fused(self, sr: Tensor, hr: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss, l1, kl, _ = torch.ops.similarity.loss(
            sr,
            hr,
            mask,
            self.kernel_size_search,
            self.kernel_size_window,
            self.search_border == "zero",
            self.sigma,
            self.generalization,
            self.l1_weight,
            self.kl_weight,
            sr.requires_grad and torch.is_grad_enabled(),
        )
        return loss, self.l1_weight * l1, self.kl_weight * kl

    def forward(self, sr: Tensor, hr: Tensor, mask: Tensor | None = None) -> Tensor:
        """Scalar loss; the gradient flows to ``sr`` only.

        Args:
            sr: (N, C, H, W), the network's output, not clamped; RGB, nominally in [0, 1].
            hr: (N, C, H, W), the ground truth in [0, 1].
            mask: (N, 1, H, W) of {0, 1}; made from ``hr`` by :func:`edge_mask` when None.
        """
        return self.parts(sr, hr, mask)[0]
