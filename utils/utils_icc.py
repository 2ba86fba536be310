"""Colour profiles: whether one means something else than sRGB, for which this program takes all colours."""

from functools import lru_cache
from io import BytesIO

import numpy as np
from PIL import Image

_NEAR = 4  # of 255: profiles that are called sRGB differ by less from each other, Display P3 by 30 and more


@lru_cache(maxsize=64)
def foreign_profile(icc: bytes) -> str | None:
    """The name of an ICC profile whose colours are not sRGB's, "unknown" where it has none; None for sRGB's."""
    try:
        from PIL import ImageCms
    except ImportError:  # a Pillow built without LittleCMS
        return None if b"sRGB" in icc else "unknown"
    is_gray = icc[16:20] == b"GRAY"
    steps = np.linspace(0, 255, 9).round().astype(np.uint8)
    grid = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(27, 27, 3)
    image = Image.fromarray(grid[..., 0] if is_gray else grid)
    try:
        profile = ImageCms.ImageCmsProfile(BytesIO(icc))
        name = ImageCms.getProfileDescription(profile)
        shown = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return "unknown"
    difference = np.asarray(shown).astype(int) - np.asarray(image.convert("RGB"))
    if np.abs(difference).max() <= _NEAR:
        return None
    return "".join(c for c in name if c.isprintable()).strip()[:60] or "unknown"
