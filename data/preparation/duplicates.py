"""Images that are there twice: equal pixels, and test images of which the training set holds another version."""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from utils.utils_image import Array, augment_img

# Seen on the 584 images of BSD400, BSD100, Set5, Set14 and RealSet65: of 170,000 unrelated pairs none has fewer than 14
# different bits, and none with up to 16 a correlation above 0.6. An image against its own JPEG of quality 30, its
# quarter, its gray version, noise of 25, a blur of 3 pixels or a cut of 2.5 % at each side: 12 bits at most, 0.73 at
# least.
_BITS, _CORRELATION = 12, 0.7
_SIDE = 32
_ONES = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)


class Twin(NamedTuple):
    """Two images, as indices, that show the same; ``turned``: one is a flipped or rotated version."""

    train: int
    test: int
    correlation: float
    turned: bool


def thumbnail(img: Array) -> NDArray[np.uint8]:
    """``(H, W, C)`` uint8 or uint16 to a gray ``(32, 32)`` by area, whatever the shape was."""
    img = (img // 257).astype(np.uint8) if img.dtype == np.uint16 else img
    gray = cv2.cvtColor(img, cv2.COLOR_RGB2GRAY) if img.shape[2] == 3 else img[..., 0]
    return np.asarray(cv2.resize(gray, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA), np.uint8)


def equal_images(digests: Sequence[bytes]) -> list[list[int]]:
    """Groups of the indices that have one digest, two or more in each."""
    groups = defaultdict(list)
    for i, digest in enumerate(digests):
        groups[digest].append(i)
    return [group for group in groups.values() if len(group) > 1]


def near_duplicates(train: Sequence[Array], test: Sequence[Array]) -> list[Twin]:
    """Test images that are in the training set too: smaller, compressed, gray, turned or a little cropped.

    Takes the images' :func:`thumbnail`; a piece of a larger image is not found. Candidates come from a perceptual hash
    (which of the lowest 63 cosine frequencies lie above their median); the correlation of the thumbnails confirms them.
    """
    if not train or not test:
        return []
    known, known_hashes = _normalised(train), _hashes(train)
    twins: dict[tuple[int, int], Twin] = {}
    for mode in range(8):
        turned = [augment_img(img, mode) for img in test]
        for j, (img, bits) in enumerate(zip(_normalised(turned), _hashes(turned), strict=True)):
            for i in np.flatnonzero(_ONES[known_hashes ^ bits].sum(axis=1) <= _BITS):
                twin = Twin(int(i), j, float(known[i] @ img), mode > 0)
                before = twins.get((twin.train, j))
                # one that looks almost the same when it is turned has not been turned
                least = before.correlation + 0.01 if before else _CORRELATION
                if twin.correlation >= least:
                    twins[twin.train, j] = twin
    return [twins[pair] for pair in sorted(twins, key=lambda pair: pair[::-1])]


def _hashes(thumbnails: Sequence[Array]) -> NDArray[np.uint8]:
    """(N, 8): 64 bits each, the last always 0."""
    bits = np.zeros((len(thumbnails), 64), bool)
    for n, img in enumerate(thumbnails):
        lowest = cv2.dct(np.ascontiguousarray(img, np.float32))[:8, :8].ravel()[1:]
        bits[n, :63] = lowest > np.median(lowest)
    return np.packbits(bits, axis=1)


def _normalised(thumbnails: Sequence[Array]) -> NDArray[np.float32]:
    """(N, 1024) of mean 0 and length 1; 0 for an image of one gray."""
    flat = np.stack(thumbnails).reshape(len(thumbnails), -1).astype(np.float32)
    flat -= flat.mean(axis=1, keepdims=True)
    length = np.linalg.norm(flat, axis=1, keepdims=True)
    return np.asarray(flat / np.maximum(length, 1e-3))
