"""Published checkpoints: where their authors put them, and fetching them without ever leaving half a file."""

import difflib
import hashlib
import http.client
import itertools
import os
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from utils.utils_error import UserError

_CHUNK = 1 << 16  # bytes
_TIMEOUT = 30.0  # seconds without a byte
_RETRIES = 4  # in a row, none of which brought the file further
_WAIT = 1.0  # seconds before the first of them, doubled for each next


# ------------------------------------------------------------------------------------------------- what is published


@dataclass(frozen=True)
class Published:
    """A file that its authors published, or, where ``url`` is None, one that a user gets from ``page`` by hand.

    ``weights`` is how many its network has; ``licence`` that of the repository which it is fetched from, as its licence
    file or README says; None = not known to us.
    """

    group: str
    name: str
    what: str
    net_type: str
    scale: int | None = None
    weights: int | None = None
    licence: str | None = None
    url: str | None = None
    page: str | None = None
    size: int | None = None  # bytes; None = not known to us
    sha256: str | None = None  # hexadecimal, all 64 digits or as many of the first as are known


_KAIR = "https://github.com/cszn/KAIR/releases/download/v1.0/"
_REAL_ESRGAN = "https://github.com/xinntao/Real-ESRGAN/releases/download/"
_ESRGAN = "https://github.com/xinntao/ESRGAN"
_RANKSRGAN = "https://github.com/WenlongZhang0517/RankSRGAN"
_SWINIR = "https://github.com/JingyunLiang/SwinIR/releases/download/v0.0/"


_RRDB = 16_697_987  # weights of RRDBNet x4 with 23 blocks, in either layout


def _kair(group: str, name: str, what: str, net_type: str, scale: int, weights: int) -> Published:
    return Published(group, name, what, net_type, scale, weights, "MIT", _KAIR + name)


def _real_esrgan(version: str, name: str, what: str, net_type: str, scale: int | None, weights: int) -> Published:
    url = f"{_REAL_ESRGAN}{version}/{name}"
    return Published("realesrgan", name, what, net_type, scale, weights, "BSD-3-Clause", url)


def _swinir(name: str, what: str, scale: int, weights: int) -> Published:
    return Published("swinir", f"{name}.pth", what, "swinir", scale, weights, "Apache-2.0", f"{_SWINIR}{name}.pth")


def _by_hand(
    group: str,
    name: str,
    what: str,
    net_type: str,
    page: str,
    weights: int | None,
    licence: str | None = None,
    scale: int | None = 4,
) -> Published:
    return Published(group, name, what, net_type, scale, weights, licence, page=page)


PUBLISHED: tuple[Published, ...] = (
    _kair("bsrgan", "BSRGAN.pth", "blind, GAN", "rrdbnet", 4, _RRDB),
    _kair("bsrgan", "BSRGANx2.pth", "blind, GAN", "rrdbnet", 2, 16_661_059),
    _kair("bsrgan", "BSRNet.pth", "blind, PSNR", "rrdbnet", 4, _RRDB),
    _kair("esrgan", "ESRGAN.pth", "bicubic, GAN", "rrdbnet", 4, _RRDB),
    _kair("esrgan", "RRDB.pth", "bicubic, PSNR", "rrdbnet", 4, _RRDB),
    Published(
        "esrgan",
        "ESRGAN_SRx4_DF2KOST_official-ff704c30.pth",
        "bicubic, GAN",
        "rrdbnet_basicsr",
        4,
        _RRDB,
        "BSD-3-Clause",
        f"{_REAL_ESRGAN}v0.1.1/ESRGAN_SRx4_DF2KOST_official-ff704c30.pth",
        sha256="ff704c30",  # BasicSR's publishing script ends names with the first digits of the hash
    ),
    _by_hand(
        "esrgan",
        "ESRGAN_PSNR_SRx4_DF2K_official.pth",
        "bicubic, PSNR",
        "rrdbnet_basicsr",
        "https://github.com/XPixelGroup/BasicSR/blob/master/docs/ModelZoo.md",
        _RRDB,
        "Apache-2.0",
    ),
    _by_hand("esrgan", "RRDB_ESRGAN_x4.pth", "bicubic, GAN", "rrdbnet", _ESRGAN, _RRDB, "Apache-2.0"),
    _by_hand("esrgan", "RRDB_PSNR_x4.pth", "bicubic, PSNR", "rrdbnet", _ESRGAN, _RRDB, "Apache-2.0"),
    _real_esrgan("v0.1.0", "RealESRGAN_x4plus.pth", "blind, GAN", "rrdbnet_basicsr", 4, _RRDB),
    _real_esrgan("v0.2.1", "RealESRGAN_x2plus.pth", "blind, GAN", "rrdbnet_basicsr", 2, 16_703_171),
    _real_esrgan("v0.1.1", "RealESRNet_x4plus.pth", "blind, PSNR", "rrdbnet_basicsr", 4, _RRDB),
    _real_esrgan("v0.2.2.4", "RealESRGAN_x4plus_anime_6B.pth", "blind, drawings, GAN", "rrdbnet_basicsr", 4, 4_467_779),
    _real_esrgan(
        "v0.2.2.3", "RealESRGAN_x4plus_netD.pth", "its discriminator", "discriminator_unet_sn", None, 4_376_897
    ),
    _real_esrgan("v0.2.5.0", "realesr-general-x4v3.pth", "blind, small, GAN", "srvgg_compact", 4, 1_213_296),
    _real_esrgan(
        "v0.2.5.0",
        "realesr-general-wdn-x4v3.pth",
        "blind, small, GAN, keeps more noise",
        "srvgg_compact",
        4,
        1_213_296,
    ),
    _real_esrgan("v0.2.5.0", "realesr-animevideov3.pth", "blind, drawings, GAN", "srvgg_compact", 4, 621_424),
    _swinir("001_classicalSR_DF2K_s64w8_SwinIR-M_x2", "bicubic, PSNR", 2, 11_752_487),
    _swinir("001_classicalSR_DF2K_s64w8_SwinIR-M_x3", "bicubic, PSNR", 3, 11_937_127),
    _swinir("001_classicalSR_DF2K_s64w8_SwinIR-M_x4", "bicubic, PSNR", 4, 11_900_199),
    _swinir("001_classicalSR_DF2K_s64w8_SwinIR-M_x8", "bicubic, PSNR", 8, 12_047_911),
    _swinir("001_classicalSR_DIV2K_s48w8_SwinIR-M_x2", "bicubic, PSNR", 2, 11_752_487),
    _swinir("001_classicalSR_DIV2K_s48w8_SwinIR-M_x3", "bicubic, PSNR", 3, 11_937_127),
    _swinir("001_classicalSR_DIV2K_s48w8_SwinIR-M_x4", "bicubic, PSNR", 4, 11_900_199),
    _swinir("001_classicalSR_DIV2K_s48w8_SwinIR-M_x8", "bicubic, PSNR", 8, 12_047_911),
    _swinir("002_lightweightSR_DIV2K_s64w8_SwinIR-S_x2", "bicubic, small, PSNR", 2, 910_152),
    _swinir("002_lightweightSR_DIV2K_s64w8_SwinIR-S_x3", "bicubic, small, PSNR", 3, 918_267),
    _swinir("002_lightweightSR_DIV2K_s64w8_SwinIR-S_x4", "bicubic, small, PSNR", 4, 929_628),
    _swinir("003_realSR_BSRGAN_DFO_s64w8_SwinIR-M_x2_GAN", "blind, GAN", 2, 11_678_631),
    _swinir("003_realSR_BSRGAN_DFO_s64w8_SwinIR-M_x4_GAN", "blind, GAN", 4, 11_715_559),
    _swinir("003_realSR_BSRGAN_DFOWMFC_s64w8_SwinIR-L_x4_GAN", "blind, large, GAN", 4, 28_013_059),
    _kair("msrresnet", "msrresnet_x4_psnr.pth", "bicubic, PSNR", "msrresnet1", 4, 1_517_571),
    _kair("msrresnet", "msrresnet_x4_gan.pth", "bicubic, GAN", "msrresnet1", 4, 1_517_571),
    _by_hand("ranksrgan", "mmsr_SRResNet_pretrain.pth", "bicubic, PSNR", "ranksrgan_srresnet", _RANKSRGAN, 1_554_499),
    _by_hand("ranksrgan", "mmsr_Ranker_PI.pth", "the ranker", "ranker_vgg12", _RANKSRGAN, 13_734_281, scale=None),
    # The names of these files are not known to us: the group stands for what is on the page.
    _by_hand(
        "bebygan",
        "bebygan",
        "bicubic, PSNR and GAN",
        "rrdbnet",
        "https://github.com/dvlab-research/Simple-SR",
        _RRDB,
        "MIT",
    ),
    _by_hand("elan", "elan", "bicubic, PSNR", "elan", "https://github.com/xindongzhang/ELAN", 8_487_408),
    _by_hand("ldl", "ldl", "bicubic, GAN", "rrdbnet_basicsr", "https://github.com/csjliang/LDL", _RRDB, "Apache-2.0"),
    _by_hand("spsr", "spsr", "bicubic, GAN", "spsr", "https://github.com/Maclory/SPSR", 24_796_248),
    _by_hand(
        "ssl",
        "ssl",
        "every system of the paper",
        "several",
        "https://github.com/ChrisDud0257/SSL",
        None,
        "Apache-2.0",
    ),
)


def how_to_get(name: str) -> str | None:
    """What a user who lacks this published file does; None for other names."""
    for file in PUBLISHED:
        if file.name == name:
            fetch = f"fetch it: python main_download_pretrained_models.py --models {name}"
            return fetch if file.url else f"get it from {file.page}"
    return None


def select(words: Sequence[str]) -> list[Published]:
    """The files that ``words`` name: file names, groups or "all", in any case.

    Raises:
        UserError: a word that names nothing; close names are suggested.
    """
    named: dict[str, list[Published]] = {"all": list(PUBLISHED)}
    for file in PUBLISHED:
        named.setdefault(file.group, []).append(file)
        named.setdefault(file.name.lower(), [file])
    chosen: dict[Published, None] = {}
    for word in words:
        if word.lower() not in named:
            shown = {key: files[0].name if key == files[0].name.lower() else key for key, files in named.items()}
            close = [shown[key] for key in difflib.get_close_matches(word.lower(), named, cutoff=0.5)]
            hint = f"do you mean {' or '.join(close)}?" if close else "without --models the names are listed"
            raise UserError(f"--models {word}: no published file or group of this name; {hint}")
        chosen.update(dict.fromkeys(named[word.lower()]))
    return list(chosen)


# ---------------------------------------------------------------------------------------------------------- fetching


class _BrokenError(Exception):
    """What may work on another try; its text says what happened."""


class _UnreachableError(_BrokenError):
    """There was no answer at all."""


class _StaleError(_BrokenError):
    """What was kept is no beginning of what the server has now."""


def part_of(path: Path) -> Path:
    """Where ``path`` grows until it is whole; beside it, ``.etag``, lies what tells whether the server's changed."""
    return path.with_name(path.name + ".part")


def _tag_of(part: Path) -> Path:
    return part.with_name(part.name + ".etag")


def _discard(part: Path) -> None:
    _tag_of(part).unlink(missing_ok=True)
    part.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest()


def fetch(url: str, path: Path, size: int | None = None, sha256: str | None = None) -> str:
    """Download ``url`` to ``path``, whose folder is there: whole and checked, or not at all.

    The data grow in ``path``.part. A broken connection is tried again; what an earlier call left there is continued
    where the server still has the same file (RFC 9110, If-Range), else thrown away. Proxies are urllib's.

    Args:
        size: bytes that the file must have; None = what the server announces.
        sha256: the first hexadecimal digits, or all, of its SHA-256; None = not compared.

    Returns:
        The SHA-256 found.

    Raises:
        UserError: no such file, no server, a web page instead, another size or hash, a disk that cannot be written.
    """
    part = part_of(path)
    furthest = failures = 0
    try:
        while True:
            try:
                _receive(url, part, size)
                break
            except _BrokenError as error:
                if isinstance(error, _StaleError):
                    _discard(part)
                have = part.stat().st_size if part.exists() else 0
                if isinstance(error, _UnreachableError) and furthest == 0:
                    raise UserError(f"{url}: {error}; is there a connection, or is a proxy needed?") from error
                failures = 1 if have > furthest else failures + 1
                furthest = max(furthest, have)
                if failures > _RETRIES:
                    raise UserError(f"{url}: {error}, {failures} times; try again later") from error
                wait = _WAIT * 2 ** (failures - 1)
                print(f"{path.name}: {error}; next try in {wait:.0f} s", file=sys.stderr)
                time.sleep(wait)
        found = sha256_of(part)
        if sha256 and not found.startswith(sha256):
            _discard(part)
            raise UserError(f"{url}: SHA-256 {found} instead of {_digits(sha256)}; it was not kept, try again")
        os.replace(part, path)
        _discard(part)
    except KeyboardInterrupt:
        if _tag_of(part).exists():
            print(f"\n{part} is kept: the same command goes on from there", file=sys.stderr)
        raise
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); once it can, the same command goes on"
        ) from error
    return found


def _digits(sha256: str) -> str:
    return sha256 if len(sha256) == 64 else f"{sha256}..."


def _receive(url: str, part: Path, size: int | None) -> None:
    """One request: begin ``part``, or go on with it, until it is whole."""
    tag = _tag_of(part)
    have = part.stat().st_size if part.exists() and tag.exists() else 0
    with _open(url, {"Range": f"bytes={have}-", "If-Range": tag.read_text()} if have else {}) as response:
        validator = _validator(response)
        start, total = _extent(response)
        # 200 in answer to a range: the file has changed, or the server knows no ranges. It sends all from the start.
        if start and (start != have or validator != tag.read_text()):
            raise _StaleError("the file on the server has changed")
        if size is not None and total not in (None, size):
            raise UserError(f"{url}: the server offers {total:,} bytes, the published file has {size:,}")
        expected = size if size is not None else total
        if expected is None and not response.chunked:
            raise UserError(f"{url}: the server does not tell the file's size, so a cut could not be noticed")
        if response.headers.get_content_type() == "text/html":
            raise UserError(f"{url}: a web page came instead of the file; open the address in a browser")
        chunks = _chunks(response)
        first = next(chunks, b"")
        if not start and first.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")):
            raise UserError(f"{url}: a web page came instead of the file; open the address in a browser")
        if not start:
            # In this order, so that the tag never stands beside another file's data.
            tag.unlink(missing_ok=True)
        with (
            part.open("ab" if start else "wb") as file,
            tqdm(
                desc=part.stem,
                initial=start,
                total=expected,
                unit="B",
                unit_scale=True,
                dynamic_ncols=True,
                leave=False,
                disable=not sys.stderr.isatty(),
            ) as bar,
        ):
            if not start and validator:
                tag.write_text(validator)
            for chunk in itertools.chain([first], chunks):
                file.write(chunk)
                bar.update(len(chunk))
            file.flush()
            os.fsync(file.fileno())
    have = part.stat().st_size
    if expected is not None and have < expected:
        raise _BrokenError(f"the connection was cut at {have:,} of {expected:,} bytes")
    if have == 0 or (expected is not None and have > expected):
        _discard(part)
        due = f"{expected:,}" if expected else "a file"
        raise UserError(f"{url}: {have:,} bytes came instead of {due}; they were not kept, try again")


def _open(url: str, headers: dict[str, str]) -> http.client.HTTPResponse:
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and headers:
            raise _StaleError("the file on the server has changed") from error
        if error.code in (408, 429) or error.code >= 500:
            raise _BrokenError(f"the server answered {error.code} {error.reason}") from error
        missing = "there is no such file on the server any more; see the authors' page for where it went"
        raise UserError(
            f"{url}: {missing if error.code in (404, 410) else error.reason} (status {error.code})"
        ) from error
    except urllib.error.URLError as error:
        raise _UnreachableError(f"the server cannot be reached ({error.reason})") from error
    except (OSError, http.client.HTTPException) as error:
        raise _BrokenError(f"the connection broke ({error or type(error).__name__})") from error


def _chunks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    # Here, away from the writing, an OSError is the network's and not the disk's.
    try:
        while chunk := response.read(_CHUNK):
            yield chunk
    except (OSError, http.client.HTTPException) as error:
        raise _BrokenError(f"the connection broke ({error or type(error).__name__})") from error


def _validator(response: http.client.HTTPResponse) -> str | None:
    """What If-Range may hold: a strong ETag, else the date of the last change."""
    etag = response.headers["ETag"]
    return etag if etag and not etag.startswith("W/") else response.headers["Last-Modified"]


def _extent(response: http.client.HTTPResponse) -> tuple[int, int | None]:
    """Where the body starts in the file, and the file's size where the server tells it."""
    if response.status == 206:
        span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers["Content-Range"] or "")
        if span is None:
            raise _StaleError("the server sent a piece without saying which")
        return int(span[1]), None if span[2] == "*" else int(span[2])
    return 0, response.length
