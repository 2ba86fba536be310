"""Files and options changed at random: whatever comes, it is read or refused in one line, and nothing else happens.

A few examples, the same ones each time, in ``make test``; many and ever new ones in ``make test-all``.
"""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save
from scipy.io import savemat

from tests.conftest import REPOSITORY, photograph
from utils.utils_checkpoint import load_state_dict
from utils.utils_error import UserError
from utils.utils_image import image_kind, image_size, imread_uint, read_image, read_mask
from utils.utils_npy import encode_npy
from utils.utils_option import Options, parse, strip_comments

pytest.importorskip("hypothesis", reason="needs requirements-dev.txt")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

FEW = 50
counts = pytest.mark.parametrize("count", [FEW, pytest.param(3000, marks=pytest.mark.long)])


def holds(check: Callable[[Any], Any], examples: st.SearchStrategy[Any], count: int) -> None:
    """Check so many examples; the few are the same in every run."""

    def each(example: Any) -> None:
        check(example)

    few = count == FEW
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
    settings(max_examples=count, derandomize=few, deadline=None, database=None, suppress_health_check=slow)(
        given(examples)(each)
    )()


def refused_or(read: Callable[[], Any]) -> Any:
    """What is read, or None after a UserError of one line."""
    said = "one line"
    try:
        return read()
    except UserError as error:
        said = str(error)
    assert "\n" not in said
    assert 0 < len(said) < 2000
    return None


# -------------------------------------------------------------------------------------------------------------- options

RECIPES = [json.loads(strip_comments(path.read_text())) for path in sorted((REPOSITORY / "options").glob("t*.json"))]
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["sr", "train", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def places(section: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all keys and list items."""
    pairs = section.items() if isinstance(section, dict) else enumerate(section) if isinstance(section, list) else ()
    return [place for key, value in pairs for place in ((*above, key), *places(value, (*above, key)))]


@st.composite
def recipes(draw: st.DrawFn) -> Any:
    """A recipe of ours with one to four keys removed, replaced, renamed, doubled elsewhere or wrapped."""
    raw = json.loads(json.dumps(draw(st.sampled_from(RECIPES))))
    for _ in range(draw(st.integers(1, 4))):
        *above, key = draw(st.sampled_from(places(raw) or [("task",)]))
        section = raw
        for part in above:
            section = section[part]
        other = draw(st.text(max_size=8) | st.sampled_from(["H_size", "netD", "train", "scale", "diffusion"]))
        match draw(st.sampled_from(["remove", "replace", "rename", "move", "wrap"])):
            case "remove" if key in section or isinstance(section, list):
                del section[key]
            case "rename" if isinstance(section, dict) and key in section:
                section[other] = section.pop(key)
            case "move" if isinstance(section, dict) and key in section:
                raw[other] = section[key]
            case "wrap" if isinstance(section, dict) and key in section:
                section[key] = [section[key]] if draw(st.booleans()) else {other: section[key]}
            case _:
                section[key] = draw(values)
    return raw


@counts
@pytest.mark.parametrize("is_train", [True, False])
def test_options_changed_at_random_are_read_or_refused_in_one_line(tmp_path: Path, is_train: bool, count: int) -> None:
    path = tmp_path / "x.json"

    def check(raw: Any) -> None:
        path.write_text(json.dumps(raw), encoding="utf-8")
        opt = refused_or(lambda: parse(path, is_train=is_train))
        assert opt is None or isinstance(opt, Options)

    holds(check, recipes(), count)


@counts
def test_an_option_file_changed_letter_by_letter_is_read_or_refused_in_one_line(tmp_path: Path, count: int) -> None:
    path = tmp_path / "x.json"
    text = (REPOSITORY / "options/train_demo_gan_ssl.json").read_bytes()
    holds(lambda content: path.write_bytes(content) and refused_or(lambda: parse(path)), damaged([text]), count)


@counts
def test_any_override_is_read_or_refused_in_one_line(count: int) -> None:
    file = REPOSITORY / "options/train_demo_gan_ssl.json"
    keys = st.sampled_from([".".join(place) for place in places(RECIPES[0]) if all(isinstance(p, str) for p in place)])
    text = st.tuples(keys | st.text(max_size=12), st.sampled_from(["=", "", "=="]), values.map(json.dumps) | st.text())
    overrides = st.lists(text.map("".join), max_size=3)
    holds(lambda given: refused_or(lambda: parse(file, overrides=given)), overrides, count)


# ---------------------------------------------------------------------------------------------------------------- files


def damaged(files: list[bytes]) -> st.SearchStrategy[bytes]:
    """One of the files with bits turned, bytes put in, taken out or cut off; or any bytes."""

    @st.composite
    def change(draw: st.DrawFn) -> bytes:
        content = bytearray(draw(st.sampled_from(files)))
        near = st.integers(0, min(200, len(content) - 1)) | st.integers(0, len(content) - 1)  # of the header more often
        for _ in range(draw(st.integers(1, 4))):
            at = draw(near)
            match draw(st.sampled_from(["turn", "turn", "turn", "put", "remove", "cut"])):
                case "turn" if at < len(content):
                    content[at] ^= 1 << draw(st.integers(0, 7))
                case "put":
                    content[at:at] = draw(st.binary(min_size=1, max_size=8))
                case "remove":
                    del content[at : at + draw(st.integers(1, 8))]
                case _:
                    del content[at:]
        return bytes(content)

    return change() | st.binary(max_size=200)


def encoded(suffix: str, channels: int = 3, **how: Any) -> bytes:
    """A small image by Pillow."""
    img, file = photograph(12, 15, channels=channels), io.BytesIO()
    image = Image.fromarray(img if channels != 1 else img[..., 0])
    image = image.convert(how.pop("mode", image.mode))
    image.save(file, suffix, **how)
    return file.getvalue()


def masks() -> list[bytes]:
    found = []
    for how in ({"do_compression": True}, {}, {"format": "4"}):
        file = io.BytesIO()
        savemat(file, {"other": np.arange(3), "mat": np.eye(9, dtype=np.uint8)}, **how)  # type: ignore[arg-type]
        found.append(file.getvalue())
    return found


exif = Image.Exif()
exif[0x0112] = 6
KINDS: dict[str, list[bytes]] = {
    "png": [
        *(encoded("PNG", exif=exif, icc_profile=bytes(200), mode=mode) for mode in ("RGB", "P", "LA", "RGBA", "1")),
        cv2.imencode(".png", photograph(12, 15).astype(np.uint16) * 257)[1].tobytes(),
    ],
    "jpg": [encoded("JPEG", exif=exif), encoded("JPEG", mode="CMYK"), encoded("JPEG", 1, progressive=True)],
    "tif": [
        *(encoded("TIFF", compression=c) for c in (None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")),
        *(encoded("TIFF", mode=mode) for mode in ("P", "RGBA", "CMYK", "1")),
        cv2.imencode(".tif", photograph(12, 15).astype(np.uint16) * 257)[1].tobytes(),
    ],
    "webp": [encoded("WEBP", lossless=True, exif=exif), encoded("WEBP")],
    "bmp": [encoded("BMP"), encoded("BMP", mode="P")],
    "gif": [encoded("GIF")],
    "ppm": [encoded("PPM"), encoded("PPM", mode="L")],
    "tga": [encoded("TGA"), encoded("TGA", compression="tga_rle")],
    "npy": [encode_npy(photograph(12, 15)), encode_npy(photograph(12, 15, channels=1).astype(np.uint16))],
    "mat": masks(),
}


@counts
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_image_or_mask_is_read_or_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, count: int
) -> None:
    monkeypatch.setattr("utils.utils_image.MAX_PIXELS", 1 << 18)  # images of another size take no time
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1 << 17)
    path = str(tmp_path / f"x.{kind}")

    def check(content: bytes) -> None:
        Path(path).write_bytes(content)
        if kind != "mat":
            for n_channels in (3, 1, None):
                img = refused_or(lambda n=n_channels: imread_uint(path, n))  # type: ignore[misc]
                assert img is None or (img.dtype in (np.uint8, np.uint16) and img.ndim == 3)
            refused_or(lambda: read_image(path))
            size = refused_or(lambda: image_size(path))
            assert size is None or min(size) > 0
            refused_or(lambda: image_kind(path))
        mask = refused_or(lambda: read_mask(path))
        assert mask is None or (mask.ndim == 2 and set(np.unique(mask)) <= {0, 1})

    holds(check, damaged(KINDS[kind]), count)


def checkpoints() -> dict[str, list[bytes]]:
    weights = {"conv.weight": torch.arange(36.0).view(1, 4, 3, 3), "conv.bias": torch.ones(4, dtype=torch.float16)}
    beside = {"params": weights, "iter": 5, "psnr": np.float64(30), "options": {"path": Path("x"), "list": [1, "a"]}}
    found: dict[str, list[bytes]] = {"safetensors": [save(weights)], "zip": [], "older": []}
    for content in (weights, beside):
        for kind, is_new in (("zip", True), ("older", False)):
            file = io.BytesIO()
            torch.save(content, file, _use_new_zipfile_serialization=is_new)
            found[kind].append(file.getvalue())
    return found


CHECKPOINTS = checkpoints()


@counts
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_damaged_checkpoint_is_read_or_refused_in_one_line(tmp_path: Path, kind: str, count: int) -> None:
    path = tmp_path / ("x.safetensors" if kind == "safetensors" else "x.pth")

    def check(content: bytes) -> None:
        path.write_bytes(content)
        weights = refused_or(lambda: load_state_dict(path))
        assert weights is None or all(isinstance(value, torch.Tensor) for value in weights.values())

    holds(check, damaged(CHECKPOINTS[kind]), count)
