"""The demo's sets, from the public-domain photographs inside the scikit-image package; nothing is downloaded."""

from pathlib import Path

import numpy as np

from utils.utils_error import UserError
from utils.utils_image import imsave
from utils.utils_name import output_path

# Gray ones become RGB.
TRAIN = (
    "astronaut",
    "brick",
    "grass",
    "gravel",
    "hubble_deep_field",
    "immunohistochemistry",
    "moon",
    "motorcycle",
    "rocket",
)
TEST = ("camera", "chelsea", "clock", "coffee", "coins", "page", "text")
# Of some photographs a part is for testing: top, left, height, width.
TEST_PARTS = {
    "astronaut": (192, 192, 320, 320),
    "brick": (192, 192, 256, 256),
    "hubble_deep_field": (576, 576, 256, 320),
    "immunohistochemistry": (192, 192, 256, 256),
    "motorcycle": (192, 384, 308, 356),
    "rocket": (192, 384, 232, 256),
}


def _photograph(name: str) -> np.ndarray:
    """(H, W, 3) uint8."""
    from skimage import data

    image = data.stereo_motorcycle()[0] if name == "motorcycle" else getattr(data, name)()
    return image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)


def prepare_demo(trainsets: Path, testsets: Path, side: int = 192) -> None:
    """Write ``trainsets/demo``, pieces of ``side`` pixels (fast to read), and ``testsets/demo``, which share no pixel.

    Test images are whole photographs and parts of others. Files that are there are replaced by the same content.
    """
    train, test = (folder / "demo" for folder in (trainsets, testsets))
    for folder in (train, test):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{folder} cannot be made ({error.strerror}); give another --trainsets, --testsets"
            ) from error
    pieces = 0
    for name in TRAIN:
        image = _photograph(name)
        for y in range(0, image.shape[0] - side + 1, side):
            for x in range(0, image.shape[1] - side + 1, side):
                if not _meets(TEST_PARTS.get(name), y, x, side):
                    imsave(image[y : y + side, x : x + side], str(output_path(train, f"{name}_{y:04d}_{x:04d}.png")))
                    pieces += 1
    for name in TEST:
        imsave(_photograph(name), str(output_path(test, f"{name}.png")))
    for name, (top, left, height, width) in TEST_PARTS.items():
        part = _photograph(name)[top : top + height, left : left + width]
        imsave(part, str(output_path(test, f"{name}_part.png")))
    print(f"{pieces} training pieces in {train}, {len(TEST) + len(TEST_PARTS)} test images in {test}")


def _meets(part: tuple[int, int, int, int] | None, y: int, x: int, side: int) -> bool:
    """Whether a piece has pixels of a part."""
    if part is None:
        return False
    top, left, height, width = part
    return top < y + side and y < top + height and left < x + side and x < left + width
