"""Figures to look at: self-similarity graphs of one pixel, as in the paper, and what a training run logged."""

import logging
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from evaluation.metrics import ssg_maps
from utils.utils_error import UserError, printable
from utils.utils_image import imread_uint, single2uint, uint2single, uint2tensor4, write_file
from utils.utils_name import output_path
from utils.utils_ssl import edge_mask, self_similarity_graph

logger = logging.getLogger(__name__)
Picture = NDArray[np.uint8]

_SCALES = range(2, 9)  # to a multiple of which main_test.py cuts H
SEARCH, WINDOW = 25, 9  # of the loss: sides of the search area and of the compared windows
_INK, _SOFT, _FRAME, _WINDOW_FRAME = "#1d1f23", "#62666e", "#ff3b30", "#ffd60a"
_LINES = ("#0f6fb8", "#d1495b", "#2a9d5c", "#e58a1f", "#7b52ab", "#4a5560", "#c2559d", "#7f9c2b")
_STYLE = {
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": "#c9c6c0",
    "axes.labelcolor": _SOFT,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titlecolor": _INK,
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
    "axes.grid": False,
}


def _matplotlib() -> Any:
    try:
        import matplotlib
        import matplotlib.figure
    except ImportError as error:
        raise UserError(
            f"figures are drawn by matplotlib, which cannot be imported ({error}): "
            "python -m pip install -r requirements.txt"
        ) from None
    return matplotlib


def _save(figure: Any, path: Path) -> None:
    content = BytesIO()
    figure.savefig(content, format="png", dpi=160, facecolor="white")
    write_file(content.getvalue(), str(path))


# ------------------------------------------------------------------------------------------------------------ graphs


def _titled(name: str) -> str:
    """The name of a file as it can stand in a title, where ``$`` would begin a formula."""
    return printable(name).replace("$", r"\$")


def graph_at(image: Picture, x: int, y: int) -> NDArray[np.float32]:
    """The self-similarity graph of one pixel of an image (H, W, 3), uint8: (25, 25), sum 1, the pixel in the middle."""
    img = uint2tensor4(image)
    mask = torch.zeros(1, 1, *image.shape[:2])
    mask[0, 0, y, x] = 1
    graph = self_similarity_graph(img, mask, SEARCH, WINDOW, ssl_mode="boxsum")
    return graph.reshape(SEARCH, SEARCH).numpy()


def telling_pixel(image: Picture, other: Picture | None) -> tuple[int, int]:
    """(x, y) of an edge pixel worth a look: where the graphs of the two differ most, or the edges are densest.

    Raises:
        UserError: the image has no edge pixel.
    """
    if other is not None:
        worth = np.nan_to_num(ssg_maps([other], image)[0], nan=-1)
    else:
        mask = edge_mask(uint2tensor4(image))
        worth = torch.where(mask > 0, torch.nn.functional.avg_pool2d(mask, SEARCH, 1, SEARCH // 2), -1)[0, 0].numpy()
    y, x = np.unravel_index(int(worth.argmax()), worth.shape)
    if worth[y, x] < 0:
        raise UserError("the image has no edges, where the loss would look; choose a pixel with --pixel X Y")
    return int(x), int(y)


def _area(image: Picture, x: int, y: int) -> Picture:
    """The search area of a pixel (25, 25, 3), the image extended by reflection."""
    r = SEARCH // 2
    return np.pad(image, ((r, r), (r, r), (0, 0)), mode="reflect")[y : y + SEARCH, x : x + SEARCH]


def ssg_figure(image: Picture, other: Picture | None, pixel: tuple[int, int], names: Sequence[str], path: Path) -> None:
    """The paper's figure: edge mask, search area, the graph at a pixel of one image or of two, and their difference.

    Args:
        image, other: (H, W, 3) RGB, uint8, of one shape, with sides over 12 pixels; ``other`` may be None.
        pixel: (x, y), column and row.
        names: of the images, for the headings.
        path: PNG to write.

    Raises:
        UserError: matplotlib is missing, or the file cannot be written.
    """
    matplotlib = _matplotlib()
    x, y = pixel
    images = [image] if other is None else [image, other]
    graphs = [graph_at(picture, x, y) for picture in images]
    mask = edge_mask(uint2tensor4(image))[0, 0].numpy()
    columns = len(images) + (1 if other is None else 2)
    with matplotlib.rc_context(_STYLE):
        figure = matplotlib.figure.Figure((3.1 * columns + 0.4, 6.9), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
        axes = figure.subplots(2, columns)
        for ax in axes.flat:
            ax.set(xticks=[], yticks=[])
        _overview(axes[0, 0], image, f"{names[0]}, {image.shape[1]} x {image.shape[0]}", pixel)
        shown = np.where(mask[..., None] > 0, 255, 0.35 * image.mean(2, keepdims=True).repeat(3, 2)).astype(np.uint8)
        _overview(axes[1, 0], shown, f"edge mask, {100 * mask.mean():.1f} % of the pixels", pixel)
        if not mask[y, x]:
            axes[1, 0].set_xlabel("this pixel is not on it:\nthe loss does not look here", loc="left")
        # The root, or a pixel that resembles nothing but itself leaves the rest black.
        norm = matplotlib.colors.PowerNorm(0.5, 0, 1000 * max(float(graph.max()) for graph in graphs))
        for column, (picture, graph, name) in enumerate(zip(images, graphs, names, strict=False), 1):
            axes[0, column].imshow(_area(picture, x, y))
            axes[0, column].set_title(f"{name}: search area {SEARCH}, window {WINDOW}")
            _window(axes[0, column], matplotlib)
            drawn = axes[1, column].imshow(1000 * graph, cmap="magma", norm=norm)
            axes[1, column].set_title(f"graph of {name}: similarity x 1000")
            figure.colorbar(drawn, ax=axes[1, column], shrink=0.8, pad=0.02).outline.set_visible(False)
        if other is not None:
            difference = graphs[1] - graphs[0]
            pixels = np.abs(_area(other, x, y).astype(int) - _area(image, x, y)).mean(2)
            drawn = axes[0, -1].imshow(pixels, cmap="Greys", vmin=0, vmax=max(32, pixels.max()))
            axes[0, -1].set_title("difference of the pixels, levels")
            figure.colorbar(drawn, ax=axes[0, -1], shrink=0.8, pad=0.02).outline.set_visible(False)
            limit = 1000 * max(float(np.percentile(np.abs(difference), 99.5)), 1e-6)
            drawn = axes[1, -1].imshow(1000 * difference, cmap="RdBu_r", vmin=-limit, vmax=limit)
            axes[1, -1].set_title("difference of the graphs x 1000")
            figure.colorbar(drawn, ax=axes[1, -1], shrink=0.8, pad=0.02).outline.set_visible(False)
            distance = ssg_maps([other], image)[0]
            here = f"{distance[y, x]:.3f} at this pixel\n" if mask[y, x] else ""
            mean = f"{np.nanmean(distance):.3f} over the image" if mask.any() else "none, for there are no edges"
            axes[1, -1].set_xlabel(f"SSG distance: {here}{mean}", loc="left")
        figure.suptitle(f"Self-similarity at pixel ({x}, {y})", x=0.008, ha="left", fontsize=13, fontweight="bold")
        _save(figure, path)


def figure_of_images(paths: Sequence[Path], pixel: tuple[int, int] | None, output: str | None) -> Path:
    """:func:`ssg_figure` of one image file or of two versions of an image.

    Args:
        paths: the files, first the ground truth; what main_test.py makes of it may lack up to 7 pixels at the right
            and below.
        pixel: (x, y); None = a telling one (:func:`telling_pixel`).
        output: the PNG to write; None = ``./IMAGE_ssg_X_Y.png``.

    Returns:
        The file written.

    Raises:
        UserError: a file cannot be used, or the pixel lies outside.
    """
    images = [imread_uint(str(path)) for path in paths]
    height, width = images[-1].shape[:2]
    cut = [of_image - of_other for of_image, of_other in zip(images[0].shape, (height, width), strict=False)]
    if any(cut) and any(cut == [side % scale for side in images[0].shape[:2]] for scale in _SCALES):
        logger.info("%s: cut to %dx%d at the right and below, the size of %s", paths[0], width, height, paths[1])
        images[0] = images[0][:height, :width]
    height, width = images[0].shape[:2]
    if images[-1].shape != images[0].shape:
        size = f"{images[-1].shape[1]}x{images[-1].shape[0]}"
        raise UserError(f"{paths[-1]} is {size}, {paths[0]} {width}x{height}: give two images of one size")
    if min(height, width) <= SEARCH // 2:
        raise UserError(f"{paths[0]} is {width}x{height}: the search area needs sides over {SEARCH // 2} pixels")
    images = [image if image.dtype == np.uint8 else single2uint(uint2single(image)) for image in images]
    other = images[1] if images[1:] else None
    x, y = pixel or telling_pixel(images[0], other)
    if not (0 <= x < width and 0 <= y < height):
        raise UserError(
            f"--pixel {x} {y}: lies outside {paths[0]}, where X is 0 to {width - 1} and Y 0 to {height - 1}"
        )
    png = Path(output or f"{paths[0].stem}_ssg_{x}_{y}.png")
    png = output_path(png.parent, png.name, inputs=paths)
    names = (
        [_titled(path.stem) for path in paths]
        if len({path.stem for path in paths}) == len(paths)
        else ["first", "other"]
    )
    ssg_figure(images[0], other, (x, y), names, png)
    return png


def _overview(ax: Any, image: Picture, title: str, pixel: tuple[int, int]) -> None:
    """The whole image with the search area framed."""
    height, width = image.shape[:2]
    ax.imshow(image)
    corner = [side - SEARCH / 2 for side in pixel]
    ax.add_patch(_matplotlib().patches.Rectangle(corner, SEARCH, SEARCH, fill=False, ec=_FRAME, lw=1.6))
    ax.set(title=title, xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))


def _window(ax: Any, matplotlib: Any) -> None:
    """The pixel and its window, in the middle of a search area."""
    middle = SEARCH // 2
    corner = middle - WINDOW / 2
    ax.add_patch(matplotlib.patches.Rectangle((corner, corner), WINDOW, WINDOW, fill=False, ec=_WINDOW_FRAME, lw=1.6))
    ax.plot(middle, middle, "o", mfc=_FRAME, mec="white", ms=5, mew=0.8)


# -------------------------------------------------------------------------------------------------------- training


def read_scalars(run: Path) -> dict[str, tuple[NDArray[np.int64], NDArray[np.float64]]]:
    """What a run logged for TensorBoard: name -> steps and values; where it was resumed, the later value counts.

    Raises:
        UserError: the folder is not a run's, or nothing was logged yet.
    """
    board = run / "tensorboard"
    if not any(board.glob("events.out.tfevents.*")):
        raise UserError(f"{run}: is not a run's folder: it has no logged values in tensorboard/; name ROOT/TASK")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of the end of each file
    events = EventAccumulator(str(board), size_guidance={"scalars": 0})
    events.Reload()
    scalars = {}
    for name in events.Tags()["scalars"]:
        by_step = {event.step: event.value for event in sorted(events.Scalars(name), key=lambda event: event.wall_time)}
        steps = sorted(by_step)
        scalars[name] = np.array(steps, np.int64), np.array([by_step[step] for step in steps], np.float64)
    if not scalars:
        raise UserError(f"{run}: nothing was logged yet; wait for the run's first steps")
    return scalars


def _panels(names: Sequence[str]) -> dict[str, list[str]]:
    """Title of a panel -> names of the scalars in it."""
    panels: dict[str, list[str]] = {}
    for name in names:
        kind, _, bare = name.partition("/")
        if kind == "val":
            title = {"psnr": "validation: PSNR, dB", "ssim": "validation: SSIM"}.get(bare.rsplit("/", 1)[-1], name)
        elif bare == "lr":
            title = "learning rate"
        elif bare.endswith("_time"):
            title = "seconds a step"
        elif bare.endswith("_grad"):
            title = "gradient norms"
        elif bare.startswith("l_d_"):
            title = "discriminator: losses"
        elif bare.startswith("D_") and bare != "D_loss":
            title = "discriminator: outputs"
        else:
            title = "generator: weighted losses"
        panels.setdefault(title, []).append(name)
    order = ("validation", "generator", "discriminator", "gradient", "learning", "seconds")
    rank = {title: next((i for i, word in enumerate(order) if title.startswith(word)), 0) for title in panels}
    return dict(sorted(panels.items(), key=lambda panel: rank[panel[0]]))


def _smooth(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Running mean over ``width`` values, over fewer at the ends."""
    sums = np.convolve(values, np.ones(width), "same")
    return sums / np.convolve(np.ones_like(values), np.ones(width), "same")


def _curve(ax: Any, steps: NDArray[np.int64], values: NDArray[np.float64], label: str, colour: str) -> None:
    finite = np.isfinite(values)
    steps, values = steps[finite], values[finite]
    width = len(values) // 40
    if width > 1:
        ax.plot(steps, values, color=colour, lw=0.6, alpha=0.3)
        values = _smooth(values, width)
    ax.plot(steps, values, color=colour, lw=1.5, label=label, marker="o" if len(values) < 12 else None, ms=3)


def _grids(run: Path, wanted: int) -> list[tuple[str, Picture]]:
    """(heading, picture) of a run's validation images, of its first set, from the first step to the last."""
    by_set: dict[str, list[Path]] = {}
    for path in sorted((run / "images").glob("*_[0-9]*.png")):
        by_set.setdefault(path.stem.rpartition("_")[0], []).append(path)
    if not by_set:
        return []
    name, paths = next(iter(by_set.items()))
    chosen = sorted({round(i) for i in np.linspace(0, len(paths) - 1, min(wanted, len(paths)))})
    return [
        (f"{_titled(name)}, step {int(paths[i].stem.rpartition('_')[2]):,}: L, E, H", imread_uint(str(paths[i])))
        for i in chosen
    ]


def training_figure(run: Path, path: Path) -> None:
    """Curves of everything a run logged, above its validation images, as one PNG.

    Args:
        run: the run's folder, ``root/task``.
        path: PNG to write.

    Raises:
        UserError: ``run`` is no run's folder, matplotlib is missing, or the file cannot be written.
    """
    scalars = read_scalars(run)
    matplotlib = _matplotlib()
    panels = _panels(list(scalars))
    grids = _grids(run, 4)
    rows = -(-len(panels) // 3)
    width, heights = 13.0, [2.6 * rows + 0.4]
    if grids:
        tallest = max(picture.shape[0] / picture.shape[1] for _, picture in grids)
        heights.append(tallest * (width / len(grids) - 0.3) + 0.5)
    with matplotlib.rc_context(_STYLE):
        figure = matplotlib.figure.Figure((width, sum(heights)), layout="constrained")
        parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        for ax, (title, names) in zip(parts[0].subplots(rows, 3, squeeze=False).flat, panels.items(), strict=False):
            _draw_panel(ax, title, {name: scalars[name] for name in names})
        for ax in parts[0].axes[len(panels) :]:
            ax.remove()
        if grids:
            for ax, (title, picture) in zip(parts[1].subplots(1, len(grids), squeeze=False).flat, grids, strict=True):
                ax.imshow(picture, cmap="gray", vmin=0, vmax=255)
                ax.set(xticks=[], yticks=[], title=title)
        last = max(int(steps[-1]) for steps, _ in scalars.values())
        title = f"{_titled(run.resolve().name)}, {last:,} steps"
        parts[0].suptitle(title, x=0.008, ha="left", fontsize=13, fontweight="bold")
        _save(figure, path)


def _draw_panel(ax: Any, title: str, scalars: Mapping[str, tuple[NDArray[np.int64], NDArray[np.float64]]]) -> None:
    for (name, (steps, values)), colour in zip(scalars.items(), _LINES * len(scalars), strict=False):
        bare = name.partition("/")[2]
        _curve(ax, steps, values, _titled(bare.rpartition("/")[0] or bare), colour)
    if title.startswith(("generator", "gradient")):
        positive = [values[values > 0] for _, values in scalars.values()]
        if all(len(values) for values in positive):
            ax.set_yscale("log")
    elif title.startswith(("learning", "seconds")):
        ax.set_ylim(0, 1.1 * max(values.max() for _, values in scalars.values()))
        ax.ticklabel_format(axis="y", scilimits=(-2, 3))
    ax.set_title(_titled(title), fontweight="bold")
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#eceae6", lw=0.8)
    ax.set_axisbelow(True)
    ax.margins(x=0.01)
    if len(scalars) > 1 or title.startswith("validation"):
        place = {"loc": "upper left", "bbox_to_anchor": (-0.01, -0.1), "borderaxespad": 0.0}
        ax.legend(frameon=False, fontsize=8, ncols=min(len(scalars), 5), handlelength=1.2, columnspacing=1.2, **place)
