"""Options of a run: JSON with ``//`` comments and ``key.path=value`` overrides, checked before anything is built.

Every key is a typed field of utils_option_sections or utils_option_networks, with its default and a description;
``python -m utils.utils_option`` prints the JSON schema that editors complete from (``options/schema.json``). The names
are KAIR's. KAIR's own option files and those of the original SSL code run unchanged (utils_option_foreign): keys that
mean nothing here, and options that nothing reads (utils_option_checks), are collected in ``Options.unused`` and named
once by the training script; every other unknown key is an error.
"""

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from utils.utils_error import UserError, check_regular
from utils.utils_option_checks import is_read, problems, unread
from utils.utils_option_foreign import FROM_THE_TOP, translate
from utils.utils_option_networks import NetD, NetG, RankerOptions, SpandrelOptions, network_classes
from utils.utils_option_sections import (
    DatasetOptions,
    Diffusion,
    MetricName,
    NetworkOptions,
    Options,
    TestOptions,
    fidelity_weight,
    patch_size,
)

__all__ = [
    "DatasetOptions",
    "MetricName",
    "NetworkOptions",
    "Options",
    "TestOptions",
    "fidelity_weight",
    "is_read",
    "network_options",
    "parse",
    "patch_size",
    "schema",
    "strip_comments",
]

# Sections of which one key says what the others are.
_UNIONS = {"netG": (NetG, "net_type"), "netD": (NetD, "net_type"), "diffusion": (Diffusion, "type")}

# ---------------------------------------------------------------------------------------------------------- reading

# The closing quote may lack: text that is tried again from each of its quotes takes quadratic time.
_STRING_OR_COMMENT = re.compile(r'"(?:\\.|[^"\\\n])*"?|//[^\n]*')
# A comma behind a value and before a bracket: what is left where the last of several entries is a comment.
_STRING_OR_LAST_COMMA = re.compile(
    r'"(?:\\.|[^"\\\n])*(?:"(?:\s*(?P<a>,)(?=\s*[}\]]))?)?|[\w}\]]\s*(?P<b>,)(?=\s*[}\]])'
)


def strip_comments(text: str) -> str:
    """Blank out ``//`` comments outside strings and commas before a closing bracket; the rest keeps its place."""
    text = _STRING_OR_COMMENT.sub(lambda m: m[0] if m[0][0] == '"' else " " * len(m[0]), text)
    return _STRING_OR_LAST_COMMA.sub(lambda m: m[0][:-1] + " " if m["a"] or m["b"] else m[0], text)


_WORDS = {"none": "null", "null": "null", "nil": "null", "undefined": "null"}
_WORDS |= {"true": "true", "yes": "true", "on": "true", "false": "false", "no": "false", "off": "false"}
_QUOTES = "'`\u2018\u2019\u201a\u201c\u201d\u201e\u00ab\u00bb"


def _remedy(text: str, error: json.JSONDecodeError) -> str:
    """What to do about a slip of JSON, by what stands where it was found."""
    before, after = text[: error.pos].rstrip(), text[error.pos :].lstrip(" \t\r\n")
    line = text.split("\n")[error.lineno - 1]
    word = re.match(r"[-+]?(\w+)", after)
    if re.search(r"(?<!\\)(\\\\)*\\([^\\/\"]|\"\s*([,}\]]|//|$))", line):
        return r"a backslash begins an escape: write \\ or / in paths"
    if not after:
        return "the file ends before it is complete: check brackets and quotes"
    if after.startswith(("/*", "*/", "#", "--", ";", "<!--")):
        return f"{after[:2].strip()} is no comment here: begin each line of a comment with //"
    if after[0] in _QUOTES:
        return 'check commas and quotes: texts and keys stand in double quotes, "..."'
    if not after[0].isprintable() or (after[0].isspace() or after[0] == "\ufeff"):
        return f"the character U+{ord(after[0]):04X} cannot be seen: remove it"
    if error.msg.startswith("Illegal trailing comma") or after[0] == "," or (before.endswith(",") and after[0] in "}]"):
        return "remove one comma"
    if error.msg.startswith(("Unterminated string", "Invalid control character")):
        return "a text ends on its line, without tabs in it: check its quotes"
    if error.msg.startswith("Extra data"):
        return "a file is one {...}: check brackets, remove what follows"
    if error.msg.startswith("Expecting ':' delimiter"):
        return "put a colon before it; check quotes"
    if re.search(r"[\d.]$", before) or re.match(r"[-+]?[.\d]|[-+][^\w]", after):
        return "write numbers as 4, 0.5 or 1e-4, and a comma after them"
    if word and word[1].lower() in _WORDS:
        return f"write {_WORDS[word[1].lower()]}"
    if word and word[1].lower() in ("inf", "infinity", "nan"):
        return "write a finite number"
    if word:
        return "check commas and quotes: texts and keys stand in double quotes"
    if error.msg.startswith("Expecting ',' delimiter"):
        return "put a comma before it; check quotes"
    return "check commas and quotes"


def _read(path: Path) -> dict[str, Any]:
    check_regular(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.json")], 1)
        hint = f"did you mean {path.parent / near[0]}?" if near else "give an option file with --opt"
        raise UserError(f"{path}: there is no such option file; {hint}") from None
    except UnicodeDecodeError as error:
        text, reason = "\0", f"{error.reason} at byte {error.start}"
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a text file ({error})") from None
    else:
        reason = "it holds zero bytes"
    if "\0" in text:  # UTF-16 is full of them, with a mark at its begin or without
        raise UserError(f"{path}: cannot be read as a text file ({reason}); if it is one, save as UTF-8, not as UTF-16")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise UserError(f"{path}: the key {_shortened(key)!r} stands twice in one section: remove one")
            result[key] = value
        return result

    try:
        raw = json.loads(strip_comments(text), object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        remedy = _remedy(text, error)
        raise UserError(f"{path}: line {error.lineno}, column {error.colno}: {error.msg}; {remedy}") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply for an option file") from None
    except ValueError as error:  # a number of thousands of digits
        raise UserError(f"{path}: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: an option file is one {{...}} object")
    return raw


def _override(raw: dict[str, Any], overrides: Iterable[str]) -> None:
    """Apply ``key.path=value``; the value is read as JSON, else taken as a string."""
    for text in overrides:
        key, equals, value = text.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            raise UserError(f"{text!r}: an override is written key.path=value, for example train.iterations=1000")
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):
            parsed = value
        section = raw
        for depth, part in enumerate(parts[:-1], 1):
            inner = section.get(part)
            if inner is None:
                inner = section[part] = {}
            if not isinstance(inner, dict):
                raise UserError(f"{text!r}: {'.'.join(parts[:depth])} is a value, not a section")
            section = inner
        section[parts[-1]] = parsed


def _fields_at(location: tuple[Any, ...]) -> Iterable[str]:
    """Names that are valid in the section at ``location``."""
    section: Any = Options
    for part in location:
        if part in _UNIONS and section is Options:
            section, tag = _UNIONS[part]
        elif part == "netR" and section is Options:
            section = RankerOptions
        elif section in (NetG, NetD, Diffusion):
            section = network_classes(section, tag)[part]
        elif section is Options and part == "datasets":
            section = dict
        elif section is dict:
            section = DatasetOptions
        else:
            section = section.model_fields[part].annotation
    return section.model_fields if hasattr(section, "model_fields") else ()


# Where a key is looked for that stands in the wrong section.
_PLACES: tuple[tuple[str, ...], ...] = ((), ("train",), ("datasets", "train"), ("path",), ("test",))


def _nearest(name: Any, valid: Iterable[str]) -> str:
    lower = {v.lower(): v for v in valid if v not in ("is_train", "unused")}
    ends = [v for v in lower if len(str(name)) > 5 and v.endswith(f"_{str(name).lower()}")]  # batch_size
    near = ends if len(ends) == 1 else difflib.get_close_matches(str(name).lower(), lower, 1, cutoff=0.6)
    return f"did you mean {lower[near[0]]!r}?" if near else f"valid are: {', '.join(sorted(lower.values()))}"


def _explain(error: Any) -> str:
    """One line for one of pydantic's findings: full key path, what is wrong, the remedy."""
    location = tuple(error["loc"])
    shown = [str(p) for i, p in enumerate(location) if not (i == 1 and location[0] in _UNIONS)]
    # pydantic names the branch of a union it tried last; the key path ends before it.
    shown = [
        p for p in shown if not re.match(r"(int|float|str|list|constrained|function|literal)[\[(-]|^(int|str)$", p)
    ]
    key, kind, given = ".".join(shown), error["type"], error.get("input")
    if kind == "value_error":
        return f"{key}: {error['ctx']['error']}"
    if kind == "extra_forbidden":
        there = next((place for place in _PLACES if location[-1] in _fields_at(place)), None)
        if there is not None and location[-1] not in ("is_train", "unused"):
            return f"{key}: unknown key; did you mean {'.'.join((*there, location[-1]))!r}?"
        return f"{key}: unknown key; {_nearest(location[-1], _fields_at(location[:-1]))}"
    if kind == "missing":
        return f"{key}: is required and missing"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        union, tag = _UNIONS[location[0]]
        valid = network_classes(union, tag)
        given = given.get(tag) if isinstance(given, dict) else given
        if kind == "union_tag_not_found":
            return f"{key}.{tag}: is required and missing; valid are: {', '.join(sorted(valid))}"
        what = "process" if key == "diffusion" else "network"
        return f"{key}.{tag}: {given!r} is not a {what} of this program; {_nearest(given, valid)}"
    if kind == "literal_error":
        names = re.findall(r"'([^']*)'", error["ctx"]["expected"])
        remedy = _nearest(given, names) if names else error["msg"].replace("Input should", "it must")
        return f"{key}: {json.dumps(given)} is not valid; {remedy}"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"{key}: must be a section {{...}}, not {json.dumps(given)}"
    if kind == "string_type":
        return f"{key}: must be text in double quotes, not {json.dumps(given, default=str)}"
    if kind == "string_pattern_mismatch":
        return f"{key}: {json.dumps(given)} cannot be the name of a folder: give a plain name without / or leading dot"
    message = re.sub(
        r", not \d+$", "", error["msg"].replace("Input should be", "must be").replace("Input should", "must")
    )
    return f"{key}: {message[0].lower() + message[1:]}, not {json.dumps(given, default=str)}"


def _shortened(text: str) -> str:
    return text if len(text) < 800 else f"{text[:500]} ... {text[-200:]}"


def _validate(cls: type[Any], raw: dict[str, Any], source: str) -> Any:
    try:
        return cls.model_validate(raw)
    except ValidationError as error:
        found = list(dict.fromkeys(_explain(e) for e in error.errors()))
        # A wrong value in a union is reported once per branch; the first line says it all for one key.
        found = list({line.split(":")[0]: line for line in reversed(found)}.values())[::-1]
        more = f" (and {len(found) - 1} more: {', '.join(f.split(':')[0] for f in found[1:4])})" if found[1:] else ""
        raise UserError(f"{source}: {_shortened(found[0])}{more}") from None


# -------------------------------------------------------------------------------------------------------- resolving


def _with_top(network: Any, top: Any, side: str, source: str) -> Any:
    """Channels and scale come from the top of the file; a network that states other numbers contradicts it."""
    update = {}
    for name, key in FROM_THE_TOP.items():
        if name in type(network).model_fields:
            given, value = getattr(network, name), getattr(top, key)
            if given not in (None, value):
                raise UserError(f"{source}: {side}.{name}: {given} contradicts {key} {value}; remove it")
            update[name] = value
    return network.model_copy(update=update)


def _with_checkpoint(opt: Options, source: str) -> Options:
    """Where the network is built from a checkpoint: which, the pretrained one or, that one gone, the run's newest.

    The scale and the channels are then the checkpoint's, unless the options state them.
    """
    netG, path = opt.netG, opt.path.pretrained_netG
    if not isinstance(netG, SpandrelOptions):
        return opt
    from utils.utils_resume import newest_generator  # reads checkpoints: only where they decide

    if netG.path not in (None, path):
        raise UserError(f"{source}: netG.path: {netG.path} contradicts path.pretrained_netG {path}; remove it")
    if opt.is_train and not (path and Path(path).is_file()) and (own := newest_generator(opt.task_dir, "G")):
        path = str(own)
        opt = opt.model_copy(update={"path": opt.path.model_copy(update={"pretrained_netG": path})})
    update: dict[str, Any] = {"netG": netG.model_copy(update={"path": path})}
    left_open = {"scale", "n_channels"} - opt.model_fields_set
    given = Path(path) if path else opt.task_dir
    file = given if given.is_file() else newest_generator(given)
    if left_open and file:
        from utils.utils_spandrel import describe_checkpoint  # reads weights: only where they decide

        found = describe_checkpoint(file)
        of_checkpoint = {"scale": found.scale, "n_channels": found.input_channels}
        update |= {key: of_checkpoint[key] for key in left_open}
    return opt.model_copy(update=update)


def _filled_in(name: str, data: DatasetOptions, opt: Options, source: str) -> DatasetOptions:
    """A data set with what comes from the top of the file; a set that states something else contradicts it."""
    known = {
        "phase": "train" if name == "train" else "test",
        "scale": opt.scale,
        "n_channels": opt.n_channels,
        "seed": opt.train.manual_seed or 0,
    }
    for key, value in known.items():
        if key in data.model_fields_set and data[key] != value:
            where = "train.manual_seed" if key == "seed" else key if key != "phase" else "the set's name"
            raise UserError(f"{source}: datasets.{name}.{key}: {data[key]!r} contradicts {where}, {value!r}; remove it")
    return data.model_copy(update={**known, "name": data.name or name})


def parse(path: str | Path, is_train: bool = True, overrides: Iterable[str] = ()) -> Options:
    """Read, override, check and resolve an option file.

    Args:
        path: the JSON file; ``//`` starts a comment outside strings.
        is_train: whether the file is used for training; testing needs no training set and no discriminator.
        overrides: ``key.path=value`` strings, applied in order on top of the file.

    Returns:
        The frozen options; keys that were accepted but mean nothing here are listed in ``unused``.

    Raises:
        UserError: one line with the file, the full key path, what is wrong and the nearest valid name.
    """
    source = str(path)
    raw = _read(Path(path))
    _override(raw, overrides)
    for filled_in in ("is_train", "unused"):
        raw.pop(filled_in, None)  # a run's own saved options can be given again
    unused = translate(raw, source)
    if not is_train:
        raw.pop("netD", None)
    opt: Options = _validate(Options, raw, source)
    opt = _with_checkpoint(opt.model_copy(update={"is_train": is_train}), source)

    opt = opt.model_copy(
        update={
            "unused": unused,
            "datasets": {name: _filled_in(name, data, opt, source) for name, data in opt.datasets.items()},
            "netG": opt.netG and _with_top(opt.netG, opt, "netG", source),
            "netD": opt.netD and _with_top(opt.netD, opt, "netD", source),
            "netR": opt.netR and _with_top(opt.netR, opt, "netR", source),
        }
    )
    for problem in problems(opt):
        raise UserError(f"{source}: {problem}")
    return opt.model_copy(update={"unused": [*unused, *unread(opt)]}) if is_train else opt


def network_options(raw: Mapping[str, Any]) -> NetworkOptions:
    """Check a plain dict with ``scale``, ``n_channels``, ``is_train``, ``netG`` and/or ``netD``; see ``define_G``."""
    names = NetworkOptions.model_fields
    picked = {k: dict(v) if isinstance(v, Mapping) else v for k, v in raw.items() if k in names}
    source = "network options"
    translate(picked, source)
    opt: NetworkOptions = _validate(NetworkOptions, picked, source)
    update = {
        side: _with_top(network, opt, side, source)
        for side, network in (("netG", opt.netG), ("netD", opt.netD))
        if network is not None
    }
    return opt.model_copy(update=update)


def schema() -> dict[str, Any]:
    """The JSON schema of an option file, for editors."""
    result = Options.model_json_schema()
    for filled_in in ("is_train", "unused"):
        del result["properties"][filled_in]
    result["properties"]["$schema"] = {"type": "string", "description": "this schema's path, for editors"}
    return result


if __name__ == "__main__":
    print(json.dumps(schema(), indent=2))
