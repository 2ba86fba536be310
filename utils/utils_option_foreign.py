"""What KAIR and the original SSL code wrote in option files, in our words; and what of it means nothing here."""

import json
import re
from collections.abc import Iterable
from typing import Any, get_args

from utils.utils_error import UserError
from utils.utils_option_networks import NetD, NetG, network_classes, network_fields
from utils.utils_option_sections import DatasetType, NetworkOptions

# Keys of KAIR's files that mean nothing here, by section. They are named once, never silently dropped.
_UNUSED_TOP = {"dist", "merge_bn", "merge_bn_startpoint", "find_unused_parameters", "use_static_graph", "opt_path"}
_UNUSED_TOP |= {"rank", "world_size", "num_gpu", "sigma", "sigma_test", "is_color", "val", "$schema"}
_UNUSED_PATH = {"task", "log", "models", "images", "options", "pretrained_optimizerG", "pretrained_optimizerD"}
_UNUSED_DATASET = {"sigma", "sigma_test", "sigma_min", "sigma_max", "num_patches_per_image", "num_sampled"}
_UNUSED_DATASET |= {"quality_factor", "quality_factor_test", "is_color", "n_channels_datasetload"}
_UNUSED_DATASET |= {"use_flip", "use_hflip", "cache_data", "io_backend", "meta_info_file", "test_mode"}
_UNUSED_TRAIN = {f"{net}_regularizer_{kind}step" for net in "GD" for kind in ("orth", "clip")}
_UNUSED_TRAIN |= {f"{net}_optimizer_reuse" for net in "GD"} | {"fix_iter", "fix_lr_mul", "fix_keys"}
_UNUSED_TRAIN |= {f"G_scheduler_{what}" for what in ("periods", "restart_weights")}
_UNUSED_NETWORK = {"ng", "reduction", "bias", "r", "n_layers", "norm_type", "nf", "nc", "nb", "gc", "act_mode"}
_UNUSED_NETWORK |= {"upsample_mode", "downsample_mode", "upscale", "act_type", "use_checkpoint", "scale", "n_channels"}
_UNUSED_NETWORK |= {"in_nc", "out_nc", "in_chans", "colors", "rgb_mean"}
_UNUSED_NETWORK |= {"init_type", "init_bn_type", "init_gain"}  # of a network that is never initialised

_RENAMED_TRAIN = {"total_iter": "iterations"}
_RENAMED_SSL = {"SSL_loss_weight": "ssl_l1_weight", "SSL1_loss_weight": "ssl_kl_weight"}

# KAIR reads the names of data sets in any case, and these too.
_DATASET_ALIASES = {"super-resolution": "sr", "bsrnet": "blindsr", "bsrgan": "blindsr", "plainpatch": "plain"}
_DATASET_ALIASES |= {"low-quality": "l", "input-only": "l"} | {name.lower(): name for name in get_args(DatasetType)}

FROM_THE_TOP = dict.fromkeys(("in_nc", "out_nc", "in_chans", "colors", "n_channels"), "n_channels")
FROM_THE_TOP |= dict.fromkeys(("upscale", "scale"), "scale")

# What KAIR and its relatives do besides, by the names in their files: of networks, data sets, models and folders.
_OTHER_TASKS = {
    "image denoising": "dncnn dncnn3 fdncnn ffdnet ircnn drunet scunet dnpatch denoising denoising-patch "
    "denoising-noiselevel denoising-noiselevelmap denoise",
    "the removal of JPEG artifacts": "jpeg fbcnn dejpeg car",
    "the restoration of videos": "vrt rvrt basicvsr edvr videosr",
    "super-resolution of a blur and a noise that are known": "srmd dpsr dnsr usrnet usrgan",
    "super-resolution with the network IMDN": "imdn",
    "the restoration of faces": "face gpen gfpgan codeformer dfdnet",
    "a degradation that is told to the network": "plain2 plain4",
    "deblurring": "deblur deblurring deblurgan",
    "the removal of rain": "derain deraining",
    "inpainting": "inpaint inpainting",
}


def _task_of(name: Any) -> str | None:
    """The other task that the name of a network, data set, model or folder stands for."""
    lower = str(name).lower()
    if lower.startswith("video"):
        lower = "videosr"
    return next((task for task, names in _OTHER_TASKS.items() if lower in names.split()), None)


def _refuse_other_tasks(raw: dict[str, Any], source: str) -> None:
    """One line for a file that is not for super-resolution as it is done here, in place of a list of its keys."""

    def at(section: Any, key: str) -> Any:
        return section.get(key) if isinstance(section, dict) else None

    net_type, datasets = at(raw.get("netG"), "net_type"), raw.get("datasets")
    told = {"netG.net_type": net_type}
    for name, data in datasets.items() if isinstance(datasets, dict) else ():
        told[f"datasets.{name}.dataset_type"] = at(data, "dataset_type")
    told["model"] = raw.get("model")
    if isinstance(net_type, str) and net_type not in network_classes(NetG):
        # Runs may be called as one likes, but beside a network that is not known here these names tell what it is.
        told["path.root"] = at(raw.get("path"), "root")
        told["task"] = next((w for w in re.split(r"[\W_\d]+", str(raw.get("task"))) if _task_of(w)), None)
    for key, name in told.items():
        if isinstance(name, str) and (task := _task_of(name)):
            raise UserError(
                f"{source}: {key}: {name!r} stands for {task}, which this program does not do: it trains and tests "
                f"super-resolution with the networks and data sets of options/schema.json"
            )


def translate(raw: dict[str, Any], source: str) -> list[str]:
    """Rewrite KAIR's and the original SSL's spellings in ``raw`` into ours; return the keys that mean nothing here."""
    _refuse_other_tasks(raw, source)
    unused: list[str] = []

    def drop(section: Any, prefix: str, names: Iterable[str], known: Iterable[str] = ()) -> None:
        if isinstance(section, dict):
            for name in [n for n in section if n in names and n not in known]:
                del section[name]
                if name != "$schema":
                    unused.append(prefix + name)

    train, datasets = raw.get("train"), raw.get("datasets")
    sets: dict[str, Any] = datasets if isinstance(datasets, dict) else {}
    if raw.get("model") == "SSL":  # the KAIR fork of the original SSL code
        raw["model"] = "gan"
        if isinstance(train, dict) and train.get("ssl_mode") in ("pytorch", "cuda"):
            # There the two are one loss by two routes; here the fastest that works on this machine gives it.
            train["ssl_mode"] = "auto"
        for data in sets.values():
            # Its "bsrgan" is KAIR's pipeline with milder figures (recipes of the paper).
            if isinstance(data, dict) and data.get("degradation_type") == "bsrgan":
                data["degradation_type"] = "bsrgan_light"
    if isinstance(train, dict):
        renamed = dict(_RENAMED_SSL)
        # SSL_loss_type says which of the two terms SSL_loss_weight belongs to; both are always there.
        first = train.pop("SSL_loss_type", None)
        train.pop("SSL1_loss_type", None)
        if "kl" in str(first).lower():
            renamed = dict(zip(renamed, reversed(renamed.values()), strict=True))
        for theirs, ours in (_RENAMED_TRAIN | renamed).items():
            if theirs in train:
                if ours in train:
                    raise UserError(f"{source}: train.{theirs} and train.{ours} are one option: give one of them")
                train[ours] = train.pop(theirs)
        drop(train, "train.", _UNUSED_TRAIN)
    unused += _translate_testing(raw, source)
    drop(raw, "", _UNUSED_TOP)
    drop(raw.get("path"), "path.", _UNUSED_PATH)
    for name, data in list(sets.items()):
        if data is None:
            del sets[name]  # datasets.test=null on the command line: without this set
        elif isinstance(data, dict):
            drop(data, f"datasets.{name}.", _UNUSED_DATASET)
            given = data.get("dataset_type")
            if isinstance(given, str):
                data["dataset_type"] = _DATASET_ALIASES.get(given.lower(), given)
    for side, union in (("netG", NetG), ("netD", NetD)):
        network = raw.get(side)
        if not isinstance(network, dict):
            continue
        fields = network_fields(union, network.get("net_type"))
        if "nf" in fields and "nc" not in fields and "nc" in network and "nf" not in network:
            network["nf"] = network.pop("nc")  # KAIR's rrdb and msrresnet write nc
        elif "nc" in fields and "nf" not in fields and "nf" in network and "nc" not in network:
            network["nc"] = network.pop("nf")
        if fields:
            for name, key in FROM_THE_TOP.items():
                value = raw.get(key, NetworkOptions.model_fields[key].default)
                if name in network and name not in fields and network[name] != value:
                    raise UserError(f"{source}: {side}.{name}: {network[name]} contradicts {key} {value}; remove it")
            drop(network, f"{side}.", _UNUSED_NETWORK, fields)
    return unused


def _translate_testing(raw: dict[str, Any], source: str) -> list[str]:
    """The original SSL's keys of validation into section ``test``; -> those that mean nothing."""
    given = {key: raw.pop(key) for key in ("tile_process", "tile_size", "tile_pad", "save_test_image") if key in raw}
    for key, value in given.items():
        number = key in ("tile_size", "tile_pad")
        if isinstance(value, bool) == number or not isinstance(value, int) or value < 0:
            wanted = "a whole number of pixels" if number else "true or false"
            raise UserError(f"{source}: {key}: must be {wanted}, not {json.dumps(value)}")
    test = raw.setdefault("test", {}) if given else raw.get("test")
    if not isinstance(test, dict):
        return []
    if given.pop("save_test_image", True) is False:
        test.setdefault("images", 0)
    size, pad = given.get("tile_size", 0), given.get("tile_pad", 0)
    if not given.get("tile_process", size > 0):
        return [key for key in given if key != "tile_process"]
    if "tile" in test or not size:
        return list(given)
    # There a tile is what is kept of it and reads tile_pad pixels more on each side; here it is what goes through the
    # network at once, and half the overlap lies on each side.
    test.update(tile=size + 2 * pad, tile_overlap=test.get("tile_overlap", 2 * pad))
    return []
