"""The demo's sets, from the public-domain photographs inside the scikit-image package; nothing is downloaded."""

from pathlib import Path

import numpy as np

from utils.utils_error import UserError
from utils.utils_image import imsave
from utils.utils_name import output_path

# Gray ones become RGB.
TRAIN = ("astronaut", "brick", "camera", "coins", "grass", "gravel", "hubble_deep_field", "motorcycle", "rocket")
TEST = ("chelsea", "coffee")


def _photograph(name: str) -> np.ndarray:
    """(H, W, 3) uint8."""
    from skimage import data

    image = data.stereo_motorcycle()[0] if name == "motorcycle" else getattr(data, name)()
    return image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)


def prepare_demo(trainsets: Path, testsets: Path, side: int = 192) -> None:
    """Write ``trainsets/demo``, pieces of ``side`` pixels (fast to read), and ``testsets/demo``, whole photographs.

    Files that are there already are replaced by the same content.
    """
    for folder in (trainsets / "demo", testsets / "demo"):
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
                imsave(
                    image[y : y + side, x : x + side],
                    str(output_path(trainsets / "demo", f"{name}_{y:04d}_{x:04d}.png")),
                )
                pieces += 1
    for name in TEST:
        imsave(_photograph(name), str(output_path(testsets / "demo", f"{name}.png")))
    print(f"{pieces} training pieces in {trainsets / 'demo'}, {len(TEST)} test images in {testsets / 'demo'}")
