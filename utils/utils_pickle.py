"""What may stand beside the weights in a checkpoint, read without running code; and what a refused file is.

torch reads weights by a reader of its own that builds only what it knows. Here it learns the other things that trainers
put beside weights. None of the real classes is handed to it: each has a stand-in below, which keeps numbers, lists and
dictionaries and forgets the rest, so that nothing that a file says can call into another library.
"""

import io
import math
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

# --------------------------------------------------------------------------------------------------------- stand-ins


class _Forgotten:
    """Takes whatever its class would be given and keeps nothing: nobody asks for it."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return object.__new__(cls)

    def __setstate__(self, _: Any) -> None:
        pass


class _Dict(_Forgotten):
    """A kind of dictionary becomes a plain one; a defaultdict's factory is not called."""

    def __new__(cls, *_: Any) -> Any:
        return OrderedDict()  # the one that torch's reader both fills and gives attributes


class _List(_Forgotten):
    def __new__(cls, *_: Any) -> Any:
        return []


class _FrozenSet(_Forgotten):
    def __new__(cls, items: Any = ()) -> Any:
        return frozenset(items)


class _Bytes(_Forgotten):
    """Protocol 2 writes empty bytes as a call without arguments."""

    def __new__(cls) -> Any:
        return b""


class _DType(_Forgotten):
    """NumPy's types of plain numbers, text and times (as integers); structures have none here."""

    dtype: np.dtype

    def __new__(cls, code: str, *_: Any) -> Any:
        self = object.__new__(cls)
        if not re.fullmatch(r"[biufcSU]\d{1,6}|[OMm]8", code):
            raise pickle.UnpicklingError(f"a NumPy array of {code}")
        self.dtype = np.dtype("i8" if code[0] in "Mm" else code)
        return self

    def __setstate__(self, state: Any) -> None:
        if state[1] == ">":
            self.dtype = self.dtype.newbyteorder(">")


class _Scalar(_Forgotten):
    """A NumPy number becomes Python's."""

    def __new__(cls, kind: _DType, raw: bytes) -> Any:
        if kind.dtype.hasobject or len(raw) != kind.dtype.itemsize:
            raise pickle.UnpicklingError("a NumPy number of another size")
        return np.frombuffer(raw, kind.dtype)[0].item()


class _Array(np.ndarray):
    """NumPy's array, filled only where the bytes are as many as type and shape say."""

    def __new__(cls, *_: Any) -> Any:
        return np.ndarray.__new__(cls, (0,), np.uint8)

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, is_fortran, raw = state
        count = math.prod(shape) if all(type(side) is int and side >= 0 for side in shape) else -1
        size = 1 if kind.dtype.hasobject else kind.dtype.itemsize
        if type(raw) is not (list if kind.dtype.hasobject else bytes) or len(raw) != count * size:
            raise pickle.UnpicklingError("a NumPy array of another size")
        super().__setstate__((1, tuple(shape), kind.dtype, bool(is_fortran), raw))  # type: ignore[arg-type]


class _Reconstruct(_Forgotten):
    def __new__(cls, array: type[np.ndarray], *_: Any) -> Any:
        if not issubclass(array, _Array):
            raise pickle.UnpicklingError("no NumPy array")
        return array()


_NUMBERS = "bool bool_ int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 longdouble complex64"
_NODES = "Any String Integer Float Boolean Enum Path Bytes"
_STAND_INS: dict[type, tuple[str, ...]] = {
    _Scalar: ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"),
    _Reconstruct: ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"),
    _Array: ("numpy.ndarray",),
    _DType: ("numpy.dtype",),
    _Bytes: ("builtins.bytes",),
    _FrozenSet: ("builtins.frozenset",),
    _List: ("collections.deque",),
    _Dict: (
        "collections.defaultdict",
        "easydict.EasyDict",
        "addict.addict.Dict",
        "munch.Munch",
        "yacs.config.CfgNode",
        "mmcv.utils.config.ConfigDict",
        "mmengine.config.config.ConfigDict",
        *(f"{package}.AttributeDict" for package in ("pytorch_lightning.utilities.parsing",)),
        *(f"{package}.utilities.data.AttributeDict" for package in ("lightning_fabric", "lightning.fabric")),
    ),
    _Forgotten: (
        # As the factory of a defaultdict, or as a type that an option names.
        *(f"builtins.{name}" for name in ("int", "float", "str", "bool", "list", "dict", "tuple", "object", "range")),
        *(f"builtins.{name}" for name in ("slice", "getattr")),  # bound methods are written as getattr(object, name)
        *(f"numpy.{name}" for name in _NUMBERS.split()),
        *(f"datetime.{name}" for name in ("datetime", "date", "time", "timedelta", "timezone")),
        *(
            f"{module}.{name}"
            for module in ("pathlib", "pathlib._local")  # Python 3.13
            for name in ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
        ),
        "argparse.Namespace",
        "types.SimpleNamespace",
        "typing.Any",
        "decimal.Decimal",
        "fractions.Fraction",
        "uuid.UUID",
        "functools.partial",
        "omegaconf.dictconfig.DictConfig",
        "omegaconf.listconfig.ListConfig",
        "omegaconf.base.ContainerMetadata",
        "omegaconf.base.Metadata",
        *(f"omegaconf.nodes.{name}Node" for name in _NODES.split()),
        "mmengine.logging.history_buffer.HistoryBuffer",
    ),
}


def _stand_in(base: type, name: str) -> type:
    """A class that torch takes for ``name``; it looks at these two attributes."""
    module, _, own = name.rpartition(".")
    return type(own, (base,), {"__module__": module, "__qualname__": own})


# For torch.serialization.safe_globals.
HARMLESS: list[Any] = [_stand_in(base, name) for base, names in _STAND_INS.items() for name in names]

# What torch's reader knows by itself.
_TORCHS_OWN = re.compile(
    r"torch\.(_utils\._rebuild\w+|_tensor\._rebuild_from_type_v2|nn\.parameter\.Parameter|(cuda\.)?\w*(Storage|Tensor)|"
    r"storage\.\w*Storage|Size|device|serialization\._get_layout|q?u?int\d+|b?float\d+\w*|complex\d+|bool)|"
    r"collections\.(OrderedDict|Counter)|_codecs\.encode|builtins\.(set|bytearray|complex)|"
    r"numpy\._?core\.numeric\._frombuffer"  # of protocol 5, where torch's reader does not get as far
)


def _is_known(name: str) -> bool:
    return any(name in names for names in _STAND_INS.values()) or bool(_TORCHS_OWN.fullmatch(name))


# --------------------------------------------------------------------------------------------------- what a file is


class _Unknown:
    """Stands for every class and function while a pickle is looked at: takes everything, does nothing."""

    name = ""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def __setstate__(self, _: Any) -> None: ...
    def __setitem__(self, *_: Any) -> None: ...
    def append(self, _: Any) -> None: ...
    def extend(self, _: Any) -> None: ...
    def add(self, _: Any) -> None: ...


class _Look(pickle._Unpickler):
    """Finds the names in a pickle; none of them is looked up, so that nothing can be called.

    The one in Python: a few bytes make the one in C reserve gigabytes for its memo.
    """

    def __init__(self, file: IO[bytes], names: dict[str, None]) -> None:
        super().__init__(file)
        self.names = names

    def find_class(self, module: str, name: str) -> Any:
        full = f"{'builtins' if module == '__builtin__' else module}.{name}"
        self.names[full] = None
        return type("Unknown", (_Unknown,), {"name": full})

    def persistent_load(self, what: Any) -> Any:
        # torch's older files name the classes of networks so, ("module", class, source), else numbers.
        return what[1] if isinstance(what, tuple) and len(what) > 1 and what[0] == "module" else _Unknown()


_MAX_PICKLE = 1 << 24  # bytes, of the names and shapes of a file of weights
# What torch's reader allows, and what makes memory of a number.
_BY_NUMBER = re.compile(rb"c(builtins|__builtin__)\nbytearray\n|ctorch(\.cuda)?(\.sparse)?\n\w+Tensor\n")


def inflates(file: IO[bytes]) -> str:
    """Why reading a file takes far more memory than it has bytes, told before any of it is taken; "" if it does not."""
    size, is_zip = file.seek(0, io.SEEK_END), not file.seek(0) and file.read(4) == b"PK\3\4"
    why, asks = "", "refused, it asks for memory by a number"
    file.seek(0)
    if is_zip:
        try:
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                unpacked = sum(member.file_size for member in members)
                pickles = [member for member in members if member.filename.endswith("data.pkl")]
                if any(member.filename.endswith("/constants.pkl") for member in members):
                    pass  # TorchScript, refused by what it is
                elif unpacked > size or any(member.file_size > _MAX_PICKLE for member in pickles):
                    why = f"refused, {size:,} bytes unpack to {unpacked:,}, as in no file of torch.save"
                elif any(_BY_NUMBER.search(archive.read(member)) for member in pickles):
                    why = asks
        except Exception:  # a damaged file makes it raise almost anything
            why = "cannot be read, it is damaged or no checkpoint"
    else:
        before = b""
        while piece := file.read(1 << 20):
            if _BY_NUMBER.search(before + piece):
                why = asks
            before = piece[-64:]
    file.seek(0)
    return why


_MAGIC = bytes.fromhex("6cfc9c46f9206aa85019")  # torch.save before its ZIP files begins with a pickle of this number


def what_is(path: Path) -> str:
    """What a file is that torch's reader of weights refuses, with the remedy; "" for a damaged or foreign file.

    Nothing in it is run.
    """
    names: dict[str, None] = {}
    whole = True
    root: Any = None
    with path.open("rb") as file:
        head = file.read(64)
        is_zip, is_plain = head.startswith(b"PK"), head.startswith(b"\x80") and _MAGIC not in head
        if not is_zip and not head.startswith(b"\x80"):
            return ""
        file.seek(0)
        try:
            for pickled in _pickles(file, is_zip, 1 if is_plain else 4):
                head = pickled.read(2)
                pickled.seek(-2, 1)
                root = _Look(pickled, names).load()
        except _ScriptError:
            command = "import torch; torch.save(torch.jit.load({}, map_location='cpu').state_dict(), {})"
            return f"refused, it is a TorchScript program, not weights; {_save_again(path, command)}"
        except Exception:  # a damaged pickle raises almost anything
            root, whole = None, False
    foreign = [name for name in names if not _is_known(name)]
    load = "torch.load({}, map_location='cpu', weights_only=False)"
    if any(name.startswith("torch.nn.modules.") for name in foreign):
        within = root if isinstance(root, dict) else {}
        key = next((key for key, value in within.items() if isinstance(value, _Unknown)), None)
        command = f"import torch; torch.save({load}{'' if key is None else f'[{key!r}]'}.state_dict(), {{}})"
        again = _save_again(path, command)
        return f"refused, it holds {foreign[0]}: a whole pickled network, and unpickling that could run code; {again}"
    if foreign:
        return (
            f"refused, it holds {foreign[0]}, and unpickling that could run code; where you trust it, open it with "
            f"torch.load(..., weights_only=False) and save the weights alone"
        )
    if not whole:
        return ""
    if is_plain:
        command = "import pickle, torch; torch.save(pickle.load(open({}, 'rb')), {})"
        return f"it is a plain pickle, not written by torch.save; {_save_again(path, command)}"
    if head[1] > 2:
        again = _save_again(path, f"import torch; torch.save({load}, {{}})")
        return f"it is written in pickle protocol {head[1]}, and torch reads weights in protocol 2 alone; {again}"
    return "refused, beside weights it holds what torch's reader of weights does not build; save the weights alone"


class _ScriptError(Exception):
    """The file is a program of torch.jit."""


def _pickles(file: IO[bytes], is_zip: bool, count: int) -> Iterator[IO[bytes]]:
    """The pickles of a file, one after the other; torch's older files have four before the numbers."""
    if not is_zip:
        yield from (file for _ in range(count))
        return
    with zipfile.ZipFile(file) as archive:
        members = archive.namelist()
        if any(member.endswith("/constants.pkl") for member in members):
            raise _ScriptError
        with archive.open(next(member for member in members if member.endswith("data.pkl"))) as pickled:
            yield pickled


def _save_again(path: Path, command: str) -> str:
    again = path.with_name(f"{path.stem}_again.pth")
    command = command.format(repr(str(path)), repr(str(again)))
    return f'where you trust it, save it again: python -c "{command}"'
