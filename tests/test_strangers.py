"""Files from strangers, every reader that this program has: nothing in them runs, leads elsewhere, or fills the memory.

| what | read by |
|---|---|
| ``.pth .pt .ckpt .bin .safetensors`` | ``load_checkpoint_file`` and all that stands on it |
| folders of diffusers and transformers | their ``from_pretrained``, told to read safetensors |
| images, ``.npy`` | ``imread_uint``, ``open_image``, ``image_size``, ``image_kind`` |
| edge masks (``.mat``, images, ``.npy``) | ``read_mask`` |
| ``X.lmdb`` | ``list_lmdb``, ``read_lmdb`` |
| option files, a run's saved options | ``parse``, ``load_restorer`` |
| ``run.json``, ``{step}_state.json``, ``run.lock`` | ``read_run``, ``read_state``, ``FolderLock`` |
| ``prepared.json``, ``manifest.jsonl`` | ``main_prepare_data.py`` |
| ``results.csv`` | data sets of type ``rank`` |
| TensorBoard's events | ``read_scalars`` |

No archive is unpacked (ZIP, tar: torch's older files among them); YAML and ONNX are not read; ncnn's files, which hold
numbers alone, are in test_ncnn.py. LMDB itself trusts ``data.mdb``: one that was made to harm can end the process.
Links are followed where a user's folders hold them.
What damaged files of a kind are told is with that kind: test_checkpoint.py, test_image.py, test_tiff.py, test_names.py.
"""

import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.io import savemat
from scipy.sparse import coo_array

from data.preparation.run import check_settings
from data.select_dataset import define_Dataset
from evaluation.figure import read_scalars
from main_prepare_data import main as prepare
from models.restorer import load_restorer
from tests.conftest import REPOSITORY, photograph
from tests.test_main_test import save_run
from training.lock import FolderLock
from utils import utils_lmdb
from utils.utils_checkpoint import load_state_dict
from utils.utils_error import UserError, explain
from utils.utils_image import image_kind, image_size, imread_uint, imsave, open_image, read_mask
from utils.utils_option import DatasetOptions, parse
from utils.utils_resume import Run, read_run, read_state, save_sealed

# ------------------------------------------------------------------------------------------------------------- readers


def of_lmdb(path: Path) -> Any:
    """The file as ``data.mdb``."""
    folder = path.parent / "x.lmdb"
    folder.mkdir()
    (folder / "data.mdb").write_bytes(path.read_bytes())
    (folder / "meta_info.txt").write_text("a.png (9,9,3) 1\n")
    try:
        return [imread_uint(name) for name in utils_lmdb.list_lmdb(str(folder))]
    finally:
        utils_lmdb.close_all()


def value_of_lmdb(path: Path) -> Any:
    """The file as the value of a key."""
    folder = path.parent / "y.lmdb"
    with utils_lmdb.import_lmdb().open(str(folder), map_size=1 << 28) as env, env.begin(write=True) as transaction:
        transaction.put(b"a", path.read_bytes())
    try:
        return imread_uint(f"{folder}/a.png")
    finally:
        utils_lmdb.close_all()


def saved_options(path: Path) -> Any:
    save_run(path.parent / "run", names=("1_G",))
    (path.parent / "run/options/20270101_000000.json").write_bytes(path.read_bytes())
    return load_restorer(str(path.parent / "run"), None, None, torch.device("cpu"))


def state(path: Path) -> Any:
    (path.parent / "7_state.json").write_bytes(path.read_bytes())
    return read_state(path.parent, 7, Run("", 0, 0))


def run_json(path: Path) -> Any:
    (path.parent / "models").mkdir()
    (path.parent / "run.json").write_bytes(path.read_bytes())
    return read_run(path.parent / "models")


def lock(path: Path) -> None:
    (path.parent / "run.lock").write_bytes(path.read_bytes())
    with FolderLock(path.parent / "run.lock") as held:
        held.take()


def prepared(path: Path) -> None:
    (path.parent / "out").mkdir()
    (path.parent / "out/prepared.json").write_bytes(path.read_bytes())
    check_settings("masks", {}, [], path.parent / "out")


def manifest(path: Path) -> None:
    """A folder of blind low-quality images, prepared half, whose manifest is the file."""
    folder = path.parent
    (folder / "H").mkdir()
    imsave(photograph(40, 40), str(folder / "H/a.png"))
    command = ["lr-blind", "--type", "bsrgan", "--workers", "1", "--input", str(folder / "H"), "--output"]
    assert prepare([*command, str(folder / "out")]) == 0
    (folder / "out/manifest.jsonl").write_bytes(path.read_bytes())
    assert prepare([*command, str(folder / "out")]) == 0


def table(path: Path) -> Any:
    (path.parent / "results.csv").write_bytes(path.read_bytes())
    return define_Dataset(DatasetOptions(dataset_type="rank", rank_csv=str(path.parent / "results.csv"), phase="test"))


def events(path: Path) -> Any:
    (path.parent / "tensorboard").mkdir()
    (path.parent / "tensorboard/events.out.tfevents.1").write_bytes(path.read_bytes())
    return read_scalars(path.parent)


Reader = Callable[[Path], Any]
READERS: dict[str, tuple[str, Reader]] = {
    **{f"checkpoint {suffix}": (f"x{suffix}", load_state_dict) for suffix in (".pth", ".pt", ".ckpt", ".bin")},
    "safetensors": ("x.safetensors", load_state_dict),
    **{f"image {s}": (f"x{s}", lambda path: imread_uint(str(path))) for s in (".png", ".tif", ".webp", ".jpg")},
    "image .npy": ("x.npy", lambda path: open_image(str(path))),
    "size of an image": ("x.png", lambda path: image_size(str(path))),
    "kind of an image": ("x.png", lambda path: image_kind(str(path))),
    **{f"mask {suffix}": (f"x{suffix}", lambda path: read_mask(str(path))) for suffix in (".mat", ".npy", ".png")},
    "LMDB": ("x", of_lmdb),
    "value of LMDB": ("x", value_of_lmdb),
    "options": ("x.json", parse),
    "saved options": ("x", saved_options),
    "state": ("x", state),
    "run": ("x", run_json),
    "lock": ("x", lock),
    "prepared": ("x", prepared),
    "manifest": ("x", manifest),
    "table": ("x", table),
    "events": ("x", events),
}
TOLERANT = ("run", "manifest")  # which go on without the file


def refused_by(reader: str, folder: Path, content: bytes) -> str:
    """What the reader says of a file of this content."""
    name, read = READERS[reader]
    (folder / name).write_bytes(content)
    if reader in TOLERANT:
        read(folder / name)
        return ""
    with pytest.raises((UserError, OSError)) as error:
        read(folder / name)
    line = explain(error.value)
    assert line
    assert "\n" not in line
    return line


# ----------------------------------------------------------------------------------------------------- nothing is run


class Trap:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


def by_torch(trap: Trap, **how: Any) -> bytes:
    file = io.BytesIO()
    torch.save({"params": {"w": torch.zeros(1)}, "trap": trap}, file, **how)
    return file.getvalue()


def of_objects(trap: Trap, save: Callable[..., None]) -> bytes:
    file = io.BytesIO()
    save(file, np.array([[trap]], object), allow_pickle=True)
    return file.getvalue()


def torchs_oldest(trap: Trap) -> bytes:
    """The tar files of torch before 0.1.10, with a link that leads out."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            content = pickle.dumps({"trap": trap, "little_endian": True}, 2)
            member = tarfile.TarInfo(name)
            if name == "storages":
                member.type, member.linkname, content = tarfile.SYMTYPE, str(trap.target.parent), b""
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def zipped(content: bytes, name: str = "archive/data.pkl") -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, content)
        archive.writestr("../../outside.txt", "out")
    return file.getvalue()


TRAPS: dict[str, Callable[[Trap], bytes]] = {
    **{f"pickle {n}": lambda trap, n=n: pickle.dumps(trap, n) for n in (0, 2, 4, 5)},  # type: ignore[misc]
    "torch": by_torch,
    "torch, protocol 4": lambda trap: by_torch(trap, pickle_protocol=4),
    "torch, older": lambda trap: by_torch(trap, _use_new_zipfile_serialization=False),
    "torch, oldest": torchs_oldest,
    "ZIP": lambda trap: zipped(pickle.dumps(trap, 2)),
    "npy": lambda trap: of_objects(trap, np.save),
    "JSON": lambda trap: json.dumps({"__reduce__": ["os.mkdir", str(trap.target)]}).encode(),
    "YAML": lambda trap: f"!!python/object/apply:os.mkdir ['{trap.target}']".encode(),
    "Python": lambda trap: f"__import__('os').mkdir({str(trap.target)!r})".encode(),
}


@pytest.mark.parametrize("reader", READERS)
def test_no_reader_runs_what_a_file_holds(tmp_path: Path, reader: str) -> None:
    trap = Trap(tmp_path / "trap")
    for number, (kind, make) in enumerate(TRAPS.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        refused_by(reader, folder, make(trap))
        assert not trap.target.exists(), kind
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(map(str, range(len(TRAPS))))
    os.mkdir(*trap.__reduce__()[1])  # as it would have been
    assert trap.target.is_dir()


# ---------------------------------------------------------------------------------------------- no memory is taken

MIB = 1 << 20


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width: int, height: int, more: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + more + chunk(b"IDAT", zlib.compress(bytes(MIB))) + chunk(b"IEND", b"")


def tiff(width: int, height: int) -> bytes:
    tags = ((256, width), (257, height), (258, 8), (259, 8), (262, 1), (273, 8), (277, 1), (278, height), (279, 99))
    return (
        b"II*\0\x08\0\0\0\x09\0" + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags) + bytes(99)
    )


def with_size(content: bytes, size: int) -> bytes:
    """A file of torch.save with its parts compressed, that of the numbers, it says, from so many bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as target:
        for member in source.infolist():
            target.writestr(member.filename, source.read(member))
            if member.filename.endswith("/data/0"):
                target.filelist[-1].file_size = size
    return file.getvalue()


def torch_file(content: Any, **how: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **how)
    return file.getvalue()


class Call:
    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


OLDER: dict[str, Any] = {"_use_new_zipfile_serialization": False}


def mat(matrix: Any) -> bytes:
    file = io.BytesIO()
    savemat(file, {"mat": matrix}, do_compression=True)
    return file.getvalue()


def mat_of(kind: int, dims: tuple[int, int], cells: int = 0) -> bytes:
    """The header of a variable "mat" of a class and a size, in itself so many times."""
    inner = struct.pack("<IIIIIIiiHH4s", 6, 8, kind, 0, 5, 8, *dims, 1, 3, b"mat\0")
    sizes = [len(inner) + n * (len(inner) + 8) for n in range(cells, -1, -1)]
    return b"MATLAB 5.0 MAT-file".ljust(124) + b"\0\1IM" + b"".join(struct.pack("<II", 14, n) + inner for n in sizes)


def compressed_mat() -> bytes:
    """A variable of 2 GiB of zeros in 2 MB."""
    packer = zlib.compressobj(9)
    packed = packer.compress(mat_of(9, (1, 1 << 28))[128:]) + packer.flush(zlib.Z_FULL_FLUSH)
    packed += 2048 * (packer.compress(bytes(MIB)) + packer.flush(zlib.Z_FULL_FLUSH))  # each stands for itself
    return b"MATLAB 5.0 MAT-file".ljust(124) + b"\0\1IM" + struct.pack("<II", 15, len(packed)) + packed


def nested(depth: int) -> bytes:
    return b'{"task": ' + depth * b"[" + depth * b"]" + b"}"


def bmp(side: int) -> bytes:
    return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 70, 0, 0, 54, 40, side, side, 1, 24, *6 * [0])


def gif(side: int) -> bytes:
    frame = b"," + struct.pack("<HHHHB", 0, 0, side, side, 0) + b"\2\2L\1\0;"
    return b"GIF89a" + struct.pack("<HHBBB", side, side, 0, 0, 0) + frame


def jpeg() -> bytes:
    """Of 65535 x 65535."""
    return b"\xff\xd8\xff\xc0\0\x11\x08\xff\xff\xff\xff\3\1\x22\0\2\x11\1\3\x11\1" + bytes(30) + b"\xff\xd9"


def webp() -> bytes:
    """Of 16384 x 16384, WebP's limit."""
    return b"RIFF" + struct.pack("<I", 30) + b"WEBPVP8L" + struct.pack("<I", 10) + b"\x2f\xff\xff\xff\x0f" + bytes(10)


RADIANCE = b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y 20000 +X 20000\n" + bytes(99)
PAM = b"P7\nWIDTH 30000\nHEIGHT 30000\nDEPTH 3\nMAXVAL 255\nTUPLTYPE RGB\nENDHDR\n" + bytes(99)
NPY = b"{'descr': '|u1', 'fortran_order': False, 'shape': (100000, 100000)}"
SAFE = b'{"w":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}'
ODD_CHUNK = struct.pack(">I4s", 1 << 31, b"abcd")


def sparse() -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, that it checks nothing
        return torch_file({"w": torch.sparse_coo_tensor([[0]], [1.0], (1 << 40,))})


def long_text() -> bytes:
    return b"a\0\0" + zlib.compress(bytes(64 * MIB))


TOO_MANY = "megapixels, more than the 268"
BOMBS: list[tuple[str, str, Callable[[], bytes], str]] = [
    ("PNG", "image .png", lambda: png(100_000, 100_000), TOO_MANY),
    ("PNG", "size of an image", lambda: png(100_000, 100_000), TOO_MANY),
    ("PNG", "mask .png", lambda: png(100_000, 100_000), TOO_MANY),
    ("PNG", "value of LMDB", lambda: png(100_000, 100_000), TOO_MANY),
    # Of these Pillow cannot tell the size, only OpenCV.
    ("PNG, odd chunk", "image .png", lambda: png(30_000, 30_000, ODD_CHUNK), "decoded"),
    ("PNG, text", "image .png", lambda: png(30_000, 30_000, chunk(b"zTXt", long_text())), "decoded"),
    ("Radiance", "image .png", lambda: RADIANCE, "decoded"),
    ("PAM", "image .png", lambda: PAM, "decoded"),
    ("TIFF", "image .tif", lambda: tiff(100_000, 100_000), TOO_MANY),
    ("BMP", "image .png", lambda: bmp(30_000), TOO_MANY),
    ("PPM", "image .png", lambda: b"P6 100000 100000 255\n" + bytes(99), TOO_MANY),
    ("GIF", "image .png", lambda: gif(65535), TOO_MANY),
    ("JPEG", "image .jpg", jpeg, f"{TOO_MANY}|decoded"),  # not every Pillow reads on to its size
    ("WebP", "image .webp", webp, "decoded"),
    (
        "torch, compressed",
        "checkpoint .pth",
        lambda: with_size(torch_file({"w": torch.zeros(9)}), 1 << 32),
        r"unpack to 4,294,967,\d+",
    ),
    ("torch, pickle", "checkpoint .pth", lambda: zipped(b"\x80\2" + b"}" * (17 * MIB) + b"."), "unpack to"),
    (
        "torch, bytes",
        "checkpoint .pth",
        lambda: torch_file({"w": torch.zeros(1), "b": Call(bytearray, 1 << 32)}),
        "memory by a number",
    ),
    (
        "torch, older, bytes",
        "checkpoint .pth",
        lambda: torch_file({"b": Call(bytearray, 1 << 32)}, **OLDER),
        "memory by a number",
    ),
    (
        "pickle, bytes",
        "checkpoint .pth",
        lambda: pickle.dumps({"b": Call(bytearray, 1 << 32)}, 2),
        "memory by a number",
    ),
    (
        "torch, tensor",
        "checkpoint .pth",
        lambda: torch_file({"w": Call(torch.FloatTensor, 1 << 32)}),
        "memory by a number",
    ),
    (
        "torch, strides",
        "checkpoint .pth",
        lambda: torch_file({"w": torch.zeros(1).expand(1 << 20, 1 << 20)}),
        "repeat 4 bytes",
    ),
    ("torch, sparse", "checkpoint .pth", sparse, "found w"),
    ("torch, meta", "checkpoint .pth", lambda: torch_file({"w": torch.zeros(1 << 40, device="meta")}), "found w"),
    ("safetensors", "safetensors", lambda: struct.pack("<Q", 1 << 40) + b"{}", "damaged"),
    ("safetensors, size", "safetensors", lambda: struct.pack("<Q", len(SAFE)) + SAFE, "damaged"),
    ("npy", "image .npy", lambda: b"\x93NUMPY\1\0\x76\0" + NPY.ljust(117) + b"\n", "cut short"),
    ("mat, compressed", "mask .mat", compressed_mat, "unpacks to more than"),
    ("mat, size", "mask .mat", lambda: mat_of(9, (100_000, 100_000)), TOO_MANY),
    ("mat, version 4", "mask .mat", lambda: struct.pack("<5i4s", 0, 100_000, 100_000, 0, 4, b"mat"), TOO_MANY),
    (
        "mat, sparse",
        "mask .mat",
        lambda: mat(coo_array(([1.0], ([5], [5])), shape=(16_000, 16_000))),
        "is not an edge mask",
    ),
    ("mat, cells", "mask .mat", lambda: mat_of(1, (1, 1), cells=50_000), "is not an edge mask"),
    ("mat, objects", "mask .mat", lambda: mat(np.array([[1, "a"]], object)), "is not an edge mask"),
    ("options, nested", "options", lambda: nested(100_000), "nested too deeply"),
    ("options, nested less", "options", lambda: nested(400), "task"),
    ("options, digits", "options", lambda: b'{"task": "a", "scale": ' + b"9" * 10_000 + b"}", "digits"),
    ("options, text", "options", lambda: b'{"task": "a", "scale": "' + b"9" * MIB + b'"}', "scale"),
    ("saved options, nested", "saved options", lambda: nested(100_000), "are not a run's options"),
    ("state, nested", "state", lambda: nested(100_000), "cannot be read"),
    (
        "state, nested less",
        "state",
        lambda: b'{"sha256": 1, "a": ' + 700 * b"[" + 700 * b"]" + b"}",
        "cannot be read|another",
    ),
    ("run, nested", "run", lambda: nested(100_000), ""),
    ("lock, nested", "lock", lambda: nested(100_000), "works in this folder"),
    ("prepared, nested", "prepared", lambda: nested(100_000), "cannot be read"),
    ("prepared, a list", "prepared", lambda: b"[]", "holds no settings"),
    ("manifest, nested", "manifest", lambda: nested(100_000), ""),
    ("manifest, odd", "manifest", lambda: b'[]\n1\n{}\n{"file": {}}\n{"file": [], "H": 1}\n', ""),
    ("table, long", "table", lambda: b"image,model,niqe\n" + b"a" * MIB + b",b,1\n", "cannot be read as a CSV file"),
    ("events, length", "events", lambda: struct.pack("<QI", 1 << 40, 0) + bytes(99), "nothing was logged"),
]


@pytest.mark.skipif(sys.platform != "linux", reason="counts and limits memory as Linux does, in a forked process")
@pytest.mark.parametrize(("name", "reader", "make", "words"), BOMBS, ids=[f"{b[0]}: {b[1]}" for b in BOMBS])
def test_what_would_unpack_to_gigabytes_ends_in_one_line_before_memory_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, reader: str, make: Callable[[], bytes], words: str
) -> None:
    monkeypatch.setattr("utils.utils_image._MAX_MAT", 64 * MIB)  # 1 GiB takes seconds to unpack
    content = make()
    (tmp_path / "x").mkdir()

    def read() -> str:
        return refused_by(reader, tmp_path / "x", content)

    line = limited(read, 400 * MIB)
    assert re.search(words, line), line
    assert len(line) < 1000


def limited(work: Callable[[], str], memory: int) -> str:
    """What ``work`` returns in a process that may take so many bytes more than this one has."""
    import resource  # which Windows lacks

    there, here = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (taken + memory, taken + memory))
            os.write(here, work().encode(errors="backslashreplace")[:60_000])
            status = 0
        except BaseException as error:
            os.write(here, f"{type(error).__name__}: {error}".encode(errors="backslashreplace")[:60_000])
        finally:
            os._exit(status)
    os.close(here)
    with os.fdopen(there, "rb") as pipe:
        line = pipe.read().decode()
    _, status = os.waitpid(pid, 0)
    assert status == 0, f"{line or 'it died'} ({status})"
    return line


@pytest.mark.skipif(sys.platform != "linux", reason="counts and limits memory as Linux does, in a forked process")
def test_the_limit_on_memory_is_one() -> None:
    with pytest.raises(AssertionError, match="MemoryError"):
        limited(lambda: str(len(bytes(500 * MIB))), 400 * MIB)


def test_opencv_itself_refuses_by_the_header_what_pillow_cannot_tell_of() -> None:
    code = f"import utils, cv2, numpy; cv2.imdecode(numpy.frombuffer({RADIANCE!r}, numpy.uint8), cv2.IMREAD_COLOR)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=100)
    assert "pixels <= CV_IO_MAX_IMAGE_PIXELS" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="files with holes, and memory as Linux counts it")
@pytest.mark.parametrize("suffix", ["png", "mat", "tif"])
def test_a_file_of_holes_is_refused_by_its_size(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    with path.open("wb") as file:
        file.write(png(30, 30))
        file.truncate(1 << 40)

    def read() -> str:
        with pytest.raises(UserError, match="1,024 GiB") as error:
            (read_mask if suffix == "mat" else imread_uint)(str(path))
        return str(error.value)

    assert "\n" not in limited(read, 400 * MIB)


def test_a_huge_value_of_an_LMDB_folder_is_refused_before_it_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(utils_lmdb, "MAX_FILE", 1000)
    folder = tmp_path / "x.lmdb"
    with utils_lmdb.import_lmdb().open(str(folder), map_size=1 << 28) as env, env.begin(write=True) as transaction:
        transaction.put(b"small", bytes(1000))
        transaction.put(b"huge", bytes(1001))
    assert len(utils_lmdb.read_lmdb(str(folder), "small")) == 1000
    with pytest.raises(UserError, match=r"'huge' has .* more than images may have"):
        utils_lmdb.read_lmdb(str(folder), "huge")
    utils_lmdb.close_all()


# ---------------------------------------------------------------------------------------------- no name leads elsewhere


@pytest.mark.parametrize(
    ("model", "set_name", "image"),
    [("..", "", "secret"), ("../private", "", "secret"), ("a", "../../private", "secret"), ("a", "", "../../secret"),
     ("/", "", "secret"), ("a", "/", "secret"), ("a", "", "{root}/private/secret")],
)  # fmt: skip
def test_a_table_names_no_image_outside_of_its_folder(tmp_path: Path, model: str, set_name: str, image: str) -> None:
    for folder in ("private", "in/a", "in/b"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("secret.png", "private/secret.png", "in/a/secret.png", "in/b/secret.png"):
        imsave(photograph(48, 48), str(tmp_path / name))
    image = image.replace("{root}", str(tmp_path))
    text = f"image,model,set,niqe\n{image},{model},{set_name},1\nsecret,b,,2\n"
    (tmp_path / "in/results.csv").write_text(text)
    with pytest.raises(UserError, match=r"results\.csv: .*secret\.png lies outside of the table's folder"):
        define_Dataset(DatasetOptions(dataset_type="rank", rank_csv=str(tmp_path / "in/results.csv"), phase="test"))


def test_a_manifest_does_not_make_a_file_elsewhere_count_as_made(tmp_path: Path) -> None:
    (tmp_path / "secret.png").touch()
    (tmp_path / "x").write_text('{"file": "../secret.png", "H": "a.png"}\n')
    manifest(tmp_path / "x")
    assert len([*(tmp_path / "out").rglob("*.png")]) == 1
    assert (tmp_path / "secret.png").stat().st_size == 0


def test_a_state_names_no_file_outside_of_its_folder(tmp_path: Path) -> None:
    models = tmp_path / "run/models"
    models.mkdir(parents=True)
    save_file({"w": torch.zeros(1)}, tmp_path / "G.pth")
    entry = {"size": (tmp_path / "G.pth").stat().st_size, "sha256": ""}
    save_sealed({"run": "r", "step": 7, "files": {"../../G.pth": entry}}, models / "7_state.json")
    (models / "7_G.pth").write_bytes(b"")
    with pytest.raises(UserError, match=r"7_G\.pth is not in 7_state\.json"):
        load_restorer(str(tmp_path / "run"), None, None, torch.device("cpu"))
