"""Options: comments, overrides, KAIR's and the original SSL code's files, and one line for every mistake."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from utils.utils_error import UserError
from utils.utils_option import Options, network_options, parse, schema, strip_comments

REPOSITORY = Path(__file__).resolve().parent.parent
OPTION_FILES = sorted(p for p in (REPOSITORY / "options").glob("*.json") if p.name != "schema.json")

BASE = """{
  "task": "t", "model": "gan", "scale": 4,
  "datasets": {"train": {"dataroot_H": "trainsets/H", "H_size": 96}, "test": {"dataroot_H": "testsets/H"}},
  "netG": {"net_type": "srvgg_compact"},
  "netD": {"net_type": "discriminator_unet"},
  "train": {"D_lossfn_weight": 1.0}
}"""


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str, name: str = "o.json") -> Path:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return write


@pytest.fixture
def base(write) -> Path:
    return write(BASE)


# ---------------------------------------------------------------------------------------------------------- comments


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": "x"} // end', "x"),
        ('{"a": "//server/share"}', "//server/share"),
        ('{"a": "https://host//path"}', "https://host//path"),
        (r'{"a": "say \"// no comment\" twice"} // "quoted" comment', 'say "// no comment" twice'),
        (r'{"a": "C:\\data\\"} // a backslash before the closing quote', "C:\\data\\"),
        (r'{"a": "\\\"//x"}', '\\"//x'),
        ('{ // it\'s an "odd quote\n"a": "x" // "b": "y"\n}', "x"),
        ('// {\n{"a": ""}//', ""),
    ],
)
def test_a_comment_starts_outside_strings_only(text: str, value: str) -> None:
    assert json.loads(strip_comments(text)) == {"a": value}


@pytest.mark.parametrize(
    "text",
    [
        '{"a": [1, "x, ]"]}',
        '{"a": [1, "x, ]",],}',
        '{"a": [1 // one\n  , "x, ]"] // all\n  ,}',
        '{"a": [1, "x, ]" , // the last\n  // "y"\n  ],\n  // "b": 2\n}',
    ],
)
def test_a_comma_before_a_bracket_is_no_mistake(text: str) -> None:
    assert json.loads(strip_comments(text)) == {"a": [1, "x, ]"]}


def test_blanking_comments_moves_no_character() -> None:
    text = '{\n  "a": 1, // one\n  "b": "//", // two\n}'
    stripped = strip_comments(text)
    assert [len(line) for line in stripped.split("\n")] == [len(line) for line in text.split("\n")]
    assert stripped.index('"b"') == text.index('"b"')


@pytest.mark.parametrize(
    ("text", "line", "column"),
    [
        ('{\n  "task": "t", // comment\n  "scale" 4\n}', 3, 11),
        ('{"task": "t",,}', 1, 13),
        ('{\n"task": "t\n}', 2, 10),
        ("", 1, 1),
        ('// only\n// comments\n{"a": 1} x', 3, 10),
    ],
)
def test_a_syntax_error_is_told_by_file_line_and_column(write, text: str, line: int, column: int) -> None:
    path = write(text)
    with pytest.raises(UserError) as error:
        parse(path)
    # Pythons differ by one in where they see the fault of a trailing comma.
    found = re.search(r"line (\d+), column (\d+)", str(error.value))
    assert found, str(error.value)
    assert int(found[1]) == line
    assert abs(int(found[2]) - column) <= 1
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


# A slip that people make in BASE -> the line it is in, and the remedy.
PLACE = '"trainsets/H"'
SLIPS = {
    "backslash": (BASE.replace(PLACE, r'"D:\data\HR"'), 3, r"write \\ or / in paths"),
    "backslash_u": (BASE.replace(PLACE, r'"C:\users\me"'), 3, r"write \\ or / in paths"),
    "backslash_at_the_end": (BASE.replace(PLACE, '"D:\\\\HR\\"'), 3, r"write \\ or / in paths"),
    "network_share": (BASE.replace(PLACE, r'"\\server\share"'), 3, r"write \\ or / in paths"),
    "block_comment": ("/* my run */\n" + BASE, 1, "begin each line of a comment with //"),
    "block_comment_behind": (BASE.replace('"scale": 4,', '"scale": 4, /* x4 */'), 2, "of a comment with //"),
    "hash": ("# my run\n" + BASE, 1, "begin each line of a comment with //"),
    "none": (BASE.replace("4", "None"), 2, "write null"),
    "true": (BASE.replace("4", "True"), 2, "write true"),
    "false": (BASE.replace("4", "FALSE"), 2, "write false"),
    "infinite": (BASE.replace("1.0", "-inf"), 6, "write a finite number"),
    "single_quotes": (BASE.replace('"gan"', "'gan'"), 2, 'stand in double quotes, "..."'),
    "curly_quotes": (BASE.replace('"gan"', "\u201cgan\u201d"), 2, 'stand in double quotes, "..."'),
    "bare_key": (BASE.replace('"scale"', "scale"), 2, "stand in double quotes"),
    "bare_text": (BASE.replace('"gan"', "gan"), 2, "stand in double quotes"),
    "no_comma": (BASE.replace('"gan",', '"gan"'), 2, "put a comma before it"),
    "no_colon": (BASE.replace('"scale":', '"scale"'), 2, "put a colon before it"),
    "trailing_commas": (BASE.replace("1.0", "1.0,,"), 6, "remove one comma"),
    "trailing_commas_of_a_list": (BASE.replace("1.0", "[1.0,,]"), 6, "remove one comma"),
    "only_a_comma": (BASE.replace("1.0", "{,}"), 6, "remove one comma"),
    "comma_first": (BASE.replace("{", "{,", 1), 1, "remove one comma"),
    "two_commas": (BASE.replace('"gan",', '"gan",,'), 2, "remove one comma"),
    "no_quote": (BASE.replace('"gan"', '"gan'), 2, "stand in double quotes"),
    "no_quote_at_the_end": (
        BASE.replace('H"}\n', "H}\n").replace('"testsets/H"}', '"testsets/H}'),
        3,
        "check its quotes",
    ),
    "a_number": (BASE.replace("1.0", ".5"), 6, "write numbers as 4, 0.5 or 1e-4"),
    "no_bracket": (BASE[:-2], 6, "check brackets and quotes"),
    "two_objects": (BASE + "{}", 7, "check brackets"),
    "a_space_from_the_web": (BASE.replace("4", "\u00a04"), 2, "U+00A0 cannot be seen: remove it"),
}


@pytest.mark.parametrize("name", SLIPS)
def test_a_slip_of_json_is_one_line_with_its_place_and_remedy(write, name: str) -> None:
    text, line, remedy = SLIPS[name]
    with pytest.raises(UserError) as error:
        parse(write(text))
    message = str(error.value)
    assert f"line {line}, column " in message
    assert remedy in message, message
    assert "\n" not in message


@pytest.mark.parametrize(
    "key",
    ["datasets.train.dataroot_H", "datasets.test.dataroot_L", "path.root", "path.pretrained_netG", "test.output"],
)
@pytest.mark.parametrize("value", [r"D:\train", r"D:\new", r"D:\bsd", r"D:\f", r"D:\results", "a\\u0000b"])
def test_a_control_character_in_a_path_is_a_single_backslash(base: Path, key: str, value: str) -> None:
    with pytest.raises(UserError, match=r"; write \\\\ or / in paths$") as error:
        parse(base, overrides=[f'{key}="{value}"'])
    assert str(error.value).startswith(f"{base}: {key}: ")
    assert str(error.value).isprintable()


def test_a_tilde_is_the_home_folder_as_in_kair(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/a")
    monkeypatch.setenv("USERPROFILE", "/home/a")
    opt = parse(base, overrides=["path.root=~/runs", 'datasets.train.dataroot_H=["~/b", "c~/d"]'])
    assert parse(base, overrides=["task=~"]).task == "~"
    assert (opt.path.root, opt.datasets["train"].dataroot_H) == ("/home/a/runs", ["/home/a/b", "c~/d"])


def test_a_control_character_in_a_list_of_paths_is_found_too(base: Path) -> None:
    with pytest.raises(UserError, match=r"dataroot_H: .*control character.*; write"):
        parse(base, overrides=[r'datasets.train.dataroot_H=["a", "D:\train"]'])


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"])
def test_another_encoding_is_one_line_that_says_to_save_as_utf_8(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "o.json").write_bytes(BASE.replace('"t"', '"caf\u00e9"').encode(encoding))
    with pytest.raises(UserError, match=r"cannot be read as a text file .*save as UTF-8") as error:
        parse(tmp_path / "o.json")
    assert "\n" not in str(error.value)


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "o.json").write_text(BASE, encoding="utf-8-sig")
    assert parse(tmp_path / "o.json").task == "t"


# --------------------------------------------------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.iterations=4e5", "train.iterations", 400000),
        ("train.G_optimizer_lr=2e-4", "train.G_optimizer_lr", 2e-4),
        ("train.F_use_input_norm=false", "train.F_use_input_norm", False),
        ("train.manual_seed=null", "train.manual_seed", None),
        ("train.G_scheduler_milestones=[1, 2e1]", "train.G_scheduler_milestones", [1, 20]),
        ("path.root=//server/share=1//x", "path.root", "//server/share=1//x"),
        ('path.root="a b"', "path.root", "a b"),
        ("path.pretrained_netG=C:\\zoo\\G.pth", "path.pretrained_netG", "C:\\zoo\\G.pth"),
        ("test.tile=64", "test.tile", 64),
        ("test.tile=auto", "test.tile", "auto"),
        ('path={"root": "elsewhere"}', "path.root", "elsewhere"),
        ("task=other", "task", "other"),
        (" train.iterations =5", "train.iterations", 5),
    ],
)
def test_an_override_is_read_as_json_or_else_as_text(base: Path, override: str, key: str, value: Any) -> None:
    found: Any = parse(base, overrides=[override])
    for part in key.split("."):
        found = found[part]
    assert found == value
    assert type(found) is type(value)


def test_overrides_make_new_sections_and_the_last_one_wins(base: Path) -> None:
    new = ["datasets.test_new.dataset_type=l", "datasets.test_new.dataroot_L=a", "datasets.test_new.dataroot_L=b"]
    assert parse(base, overrides=new).datasets["test_new"].dataroot_L == "b"


def test_a_data_set_can_be_taken_away(base: Path) -> None:
    assert list(parse(base, overrides=["datasets.test=null"]).datasets) == ["train"]


def test_options_are_frozen_and_read_like_a_dict_too(base: Path) -> None:
    opt = parse(base)
    assert opt["train"]["G_lossfn_weight"] == opt.train.G_lossfn_weight == 1.0
    assert opt.get("nothing", 7) == 7
    with pytest.raises(KeyError):
        opt["nothing"]
    with pytest.raises(Exception, match="frozen"):
        opt.train.G_lossfn_weight = 2.0


def test_what_stands_at_the_top_is_filled_in_below(base: Path) -> None:
    opt = parse(base, overrides=["scale=2", "n_channels=1", "train.manual_seed=7"])
    assert opt.netD is not None
    assert (opt.netG["in_nc"], opt.netG["out_nc"], opt.netD["in_nc"]) == (1, 1, 1)
    for name, phase in (("train", "train"), ("test", "test")):
        data = opt.datasets[name]
        assert (data.phase, data.scale, data.n_channels, data.seed, data.name) == (phase, 2, 1, 7, name)


# ---------------------------------------------------------------------------------------------- the files of options/


@pytest.mark.parametrize("path", OPTION_FILES, ids=lambda p: p.stem)
def test_every_option_file_is_valid_and_has_no_key_without_meaning(path: Path) -> None:
    assert parse(path, is_train=path.stem.startswith("train")).unused == []


def essence(document: dict) -> dict:
    """Every option with its description and default: what must not go stale, however pydantic spells the rest."""
    sections = {"options": document, **document["$defs"]}
    return {
        (name, key): (field.get("description"), json.dumps(field.get("default")))
        for name, section in sections.items()
        for key, field in section["properties"].items()
    }


def test_the_schema_file_is_the_one_of_the_code() -> None:
    stored = json.loads((REPOSITORY / "options" / "schema.json").read_text(encoding="utf-8"))
    assert essence(stored) == essence(schema()), "run `make schema`"


@pytest.mark.parametrize("path", OPTION_FILES, ids=lambda p: p.stem)
def test_every_option_file_validates_against_the_schema(path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(json.loads(strip_comments(path.read_text(encoding="utf-8"))), schema())


def test_every_option_has_a_description() -> None:
    sections = {"options": schema(), **schema()["$defs"]}
    bare = [
        f"{name}.{key}"
        for name, section in sections.items()
        for key, field in section["properties"].items()
        if "description" not in field
    ]
    assert bare == []


# ------------------------------------------------------------------------------------------------- KAIR's vocabulary

KAIR_DATA = """
  , "datasets": {
    "train": {
      "name": "train_dataset"           // just name
      , "dataset_type": "%(dataset_type)s"   // "dncnn" | "dnpatch" | "sr" | "blindsr" | ...
      , "dataroot_H": "trainsets/trainH"// path of H training dataset
      , "dataroot_L": null              // path of L training dataset
      , "H_size": %(H_size)d
      %(blind)s
      , "dataloader_shuffle": true
      , "dataloader_num_workers": 8
      , "dataloader_batch_size": 16     // batch size for all GPUs
    }
    , "test": {
      "name": "test_dataset"
      , "dataset_type": "sr"
      , "dataroot_H": "testsets/set5"   // e.g. https://example.org//set5
      , "dataroot_L": null
    }
  }
"""

KAIR_BLIND = """, "degradation_type": "bsrgan"    // "bsrgan" | "bsrgan_plus"
      , "shuffle_prob": 0.1             //
      , "lq_patchsize": 72
      , "use_sharp": false
      , "sigma": [0, 50]                // 15, 25, 50 for DnCNN | [0, 75] for FFDNet
      , "sigma_test": 25"""

KAIR_NETG = """
  , "netG": {
    "net_type": "%(netG)s"
    , "in_nc": 3                        // input channel number
    , "out_nc": 3
    , "%(width)s": 64                   // channel number
    , "nb": 16
    , "gc": 32                          // unused by some
    , "ng": 2
    , "reduction": 16
    , "act_mode": "R"                   // "BR" for BN+ReLU | "R" for ReLU
    , "bias": true
    , "upsample_mode": "upconv"         // "pixelshuffle" | "convtranspose" | "upconv"
    , "downsample_mode": "strideconv"   // "strideconv" | "avgpool" | "maxpool"
    , "scale": 4
    , "n_channels": 3

    , "init_type": "orthogonal"         // "orthogonal" | "normal" | "uniform" | "xavier_normal" | ...
    , "init_bn_type": "uniform"         // "uniform" | "constant"
    , "init_gain": 0.2
  }
"""

KAIR_NETD = """
  , "netD": {
    "net_type": "%(netD)s"
    , "in_nc": 3
    , "base_nc": 64
    , "n_layers": 3                     // only for "net_type": "discriminator_patchgan"
    , "norm_type": "spectral"           // only for "net_type": "discriminator_patchgan"
    , "act_mode": "BL"                  // "BL" means BN+LeakyReLU

    , "init_type": "orthogonal"
    , "init_bn_type": "uniform"
    , "init_gain": 0.2
  }
"""

KAIR_FILE = """{
  "task": "%(task)s"                    // root/task/images-models-options
  , "model": "%(model)s"                // "plain" | "gan"
  , "gpu_ids": [0,1,2,3]
  , "dist": true
  , "find_unused_parameters": false
  , "use_static_graph": false

  , "scale": 4
  , "n_channels": 3                     // 1 for grayscale, 3 for color
  , "merge_bn": false                   // if no BN exists, set false
  , "merge_bn_startpoint": 400000

  , "path": {
    "root": "superresolution"           // "denoising" | "superresolution"
    , "pretrained_netG": null
    , "pretrained_netD": null
    , "pretrained_netE": null
    , "pretrained_optimizerG": null
  }
%(data)s
%(nets)s
  , "train": {
    "manual_seed": 7
    , "G_lossfn_type": "l1"             // "l1" preferred | "l2sum" | "l2" | "ssim" | "charbonnier"
    , "G_lossfn_weight": 1.0
    , "G_charbonnier_eps": 1e-9

    , "F_lossfn_type": "l1"
    , "F_lossfn_weight": 1.0
    , "F_feature_layer": [2,7,16,25,34]
    , "F_weights": [0.1,0.1,1.0,1.0,1.0]
    , "F_use_input_norm": true
    , "F_use_range_norm": false

    , "gan_type": "lsgan"               // "gan" | "ragan" | "lsgan" | "wgan" | "softplusgan"
    , "D_lossfn_weight": 1.0

    , "E_decay": 0.999                  // Exponential Moving Average for netG: set 0 to disable
    , "D_init_iters": 0
    , "D_update_ratio": 1

    , "G_optimizer_type": "adam"
    , "G_optimizer_lr": 5e-5
    , "G_optimizer_betas": [0.9,0.999]
    , "G_optimizer_wd": 0
    , "G_optimizer_clipgrad": null
    , "G_optimizer_reuse": true

    , "D_optimizer_type": "adam"
    , "D_optimizer_lr": 5e-5
    , "D_optimizer_betas": [0.9,0.999]
    , "D_optimizer_wd": 0
    , "D_optimizer_clipgrad": null
    , "D_optimizer_reuse": false

    , "G_scheduler_type": "MultiStepLR"
    , "G_scheduler_milestones": [800000, 1600000]
    , "G_scheduler_gamma": 0.5
    , "D_scheduler_type": "MultiStepLR"
    , "D_scheduler_milestones": [800000, 1600000]
    , "D_scheduler_gamma": 0.5

    , "G_regularizer_orthstep": null
    , "G_regularizer_clipstep": null
    , "D_regularizer_orthstep": null
    , "D_regularizer_clipstep": null

    , "G_param_strict": true
    , "D_param_strict": true
    , "E_param_strict": false

    , "checkpoint_test": 5000
    , "checkpoint_save": 5000
    , "checkpoint_print": 200
  }
}
"""


def kair(task: str, model: str, netG: str, netD: str | None = None, blind: bool = False, H_size: int = 96) -> str:
    data = KAIR_DATA % {
        "dataset_type": "blindsr" if blind else "sr",
        "H_size": H_size,
        "blind": KAIR_BLIND if blind else '// "lq_patchsize": 72',
    }
    nets = KAIR_NETG % {"netG": netG, "width": "nf" if netG == "rrdbnet" else "nc"}
    nets += KAIR_NETD % {"netD": netD} if netD else ""
    return KAIR_FILE % {"task": task, "model": model, "data": data, "nets": nets}


KAIR = {
    "train_bsrgan_x4_gan": kair("bsrgan_x4_gan", "gan", "rrdbnet", "discriminator_unet", True, 320),
    "train_bsrgan_x4_psnr": kair("bsrgan_x4_psnr", "plain", "rrdbnet", None, True, 320),
    "train_msrresnet_psnr": kair("msrresnet_psnr", "plain", "msrresnet0"),
    "train_msrresnet_gan": kair("msrresnet_gan", "gan", "msrresnet0", "discriminator_vgg_96"),
    "train_rrdb_psnr": kair("rrdb_psnr", "plain", "rrdb"),
    "train_patchgan": kair("patchgan", "gan", "msrresnet1", "discriminator_patchgan"),
}


@pytest.mark.parametrize("name", KAIR)
def test_kairs_option_files_run_unchanged(write, name: str) -> None:
    opt = parse(write(KAIR[name]))
    assert opt.gpu_ids == [0, 1, 2, 3]
    assert opt.netG.init_type == "orthogonal"
    assert opt.train.E_param_strict is False  # KAIR itself always resets it to true
    assert opt.train.G_scheduler_milestones == [800000, 1600000]
    assert opt.datasets["train"].dataloader_batch_size == 16
    assert opt.datasets["train"].name == "train_dataset"
    # What means nothing here is named, once.
    for key in ("dist", "merge_bn", "train.G_regularizer_orthstep", "train.G_optimizer_reuse", "netG.reduction"):
        assert opt.unused.count(key) == 1
    assert "train.F_lossfn_weight" not in opt.unused


def test_kairs_rrdb_takes_its_width_from_nc(write) -> None:
    net = parse(write(KAIR["train_rrdb_psnr"])).netG
    assert (net["nf"], net["nb"], net["gc"], net["act_mode"]) == (64, 16, 32, "R")


def test_kairs_blind_patches_are_those_of_lq_patchsize(write) -> None:
    data = parse(write(KAIR["train_bsrgan_x4_gan"])).datasets["train"]
    assert (data.H_size, data.lq_patchsize, data.degradation_type) == (320, 72, "bsrgan")


SSL = """{
  "task": "bsrgan_ssl", "model": "SSL", "gpu_ids": [0,1,2,3], "scale": 4, "n_channels": 3
  , "path": {"root": "superresolution", "pretrained_netG": "superresolution/bsrgan_ssl/models/0_G.pth"}
  , "datasets": {
    "train": {
      "name": "train_dataset", "dataset_type": "blindsrmask"
      , "dataroot_H": "trainsets/trainH", "dataroot_H_mask": "trainsets/Laplacian/L/threshold-20.0/mat"
      , "dataroot_L": null, "degradation_type": "bsrgan", "H_size": 256, "shuffle_prob": 0.1, "lq_patchsize": 64
      , "use_sharp": false, "dataloader_shuffle": true, "dataloader_num_workers": 6, "dataloader_batch_size": 48
    }
    , "test": {"name": "test_dataset", "dataset_type": "sr", "dataroot_H": "testsets/H", "dataroot_L": "testsets/L"}
  }
  , "netG": {"net_type": "rrdbnet", "in_nc": 3, "out_nc": 3, "nf": 64, "nb": 23, "gc": 32, "ng": 2, "reduction": 16
    , "act_mode": "R", "upsample_mode": "upconv", "downsample_mode": "strideconv"
    , "init_type": "orthogonal", "init_bn_type": "uniform", "init_gain": 0.2}
  , "netD": {"net_type": "discriminator_unet", "in_nc": 3, "base_nc": 64, "n_layers": 3, "norm_type": "spectral"
    , "init_type": "orthogonal", "init_bn_type": "uniform", "init_gain": 0.2}
  , "train": {
    "G_lossfn_type": "l1", "G_lossfn_weight": 1
    , "SSL_loss_type": "%(kind)s", "SSL_loss_weight": 300, "SSL1_loss_weight": 500
    , "ssl_mode": "cuda", "kernel_size_search": 25, "kernel_size_window": 9, "sigma": 0.004
    , "generalization": true, "mask_stride": 3
    , "gan_type": "lsgan", "D_lossfn_weight": 1, "E_decay": 0.999
    , "G_optimizer_type": "adam", "G_optimizer_lr": 1e-4, "G_optimizer_reuse": true
    , "checkpoint_test": 1000, "checkpoint_save": 5000, "checkpoint_print": 200
  }
}"""


def test_the_original_ssl_file_runs_unchanged(write) -> None:
    opt = parse(write(SSL % {"kind": "l1"}))
    train, data = opt.train, opt.datasets["train"]
    assert opt.model == "gan"
    assert (train.ssl_l1_weight, train.ssl_kl_weight, train.mask_stride) == (300, 500, 3)
    assert (train.kernel_size_search, train.kernel_size_window, train.sigma) == (25, 9, 0.004)
    assert train.ssl_mode == "auto"  # the fastest that works here computes the same loss
    assert (data.dataset_type, data.dataroot_H_mask) == ("blindsrmask", "trainsets/Laplacian/L/threshold-20.0/mat")
    assert data.degradation_type == "bsrgan_light"  # the figures that its "bsrgan" stands for
    assert "train.SSL_loss_type" not in opt.unused  # it says which term SSL_loss_weight belongs to


def test_the_original_ssl_file_may_name_kl_first(write) -> None:
    train = parse(write(SSL % {"kind": "KL"})).train
    assert (train.ssl_l1_weight, train.ssl_kl_weight) == (500, 300)


# ----------------------------------------------------------------------------------------------------- wrong inputs

# overrides on top of BASE | what the line names | what it offers
WRONG = [
    (["trian.iterations=1"], "trian", "'train'"),
    (["train.iteratoins=1"], "train.iteratoins", "'iterations'"),
    (["train.G_lossfn_wieght=1"], "train.G_lossfn_wieght", "'G_lossfn_weight'"),
    (["train.g_lossfn_weight=1"], "train.g_lossfn_weight", "'G_lossfn_weight'"),
    (["datasets.train.H_szie=96"], "datasets.train.H_szie", "'H_size'"),
    (["datasets.test.dataroot_HR=x"], "datasets.test.dataroot_HR", "'dataroot_H'"),
    (["netG.nff=8"], "netG.nff", "'nf'"),
    (["netD.base_cn=8"], "netD.base_cn", "'base_nc'"),
    (["path.rot=x"], "path.rot", "'root'"),
    (["test.tiel=8"], "test.tiel", "'tile'"),
    (["zzzzzz=1"], "zzzzzz", "valid are"),
    (["netG.net_type=rrdbnett"], "netG.net_type", "'rrdbnet'"),
    (["netG.net_type=7"], "netG.net_type", "valid are"),
    (["netD.net_type=discriminator_vgg"], "netD.net_type", "discriminator_vgg_"),
    (['netG={"nf": 8}'], "netG.net_type", "valid are"),
    (["netG=null"], "netG", "required"),
    (["netD=null"], "netD", "discriminator_unet"),
    (["netG.in_nc=1"], "netG.in_nc", "remove it"),
    (["netG.init_type=orthogonl"], "netG.init_type", "'orthogonal'"),
    (["netG.nf=0"], "netG.nf", "greater than or equal to 1"),
    (["netG.nf=8.5"], "netG.nf", "valid integer"),
    (["model=dmm"], "model", "dm"),
    (["model=[1]"], "model", "gan"),
    (["task=a/b"], "task", "plain name"),
    (["task=.hidden"], "task", "plain name"),
    (["task="], "task", "plain name"),
    (['task="a\\u0000b"'], "task", "plain name"),
    (["task=2024"], "task", "double quotes"),
    (["scale=0"], "scale", "1"),
    (["scale=four"], "scale", "valid integer"),
    (["scale=5", "netG.net_type=rrdbnet"], "scale", "2, 3, 4"),
    (["n_channels=2"], "n_channels", "1 or 3"),
    (["n_channels=true"], "n_channels", "1 or 3"),
    (["gpu_ids=0"], "gpu_ids", "valid list"),
    (["gpu_ids=[-1]"], "gpu_ids.0", "greater than or equal to 0"),
    (["datasets.train=null"], "datasets.train", "required"),
    (["datasets=x"], "datasets", "section"),
    (["datasets.train=[1]"], "datasets.train", "section"),
    (["datasets.extra.dataroot_H=x"], "datasets.extra", "test or val"),
    (["datasets.test/5.dataroot_H=x"], "datasets.test/5", "test or val"),
    (["datasets.train.dataroot_H=null"], "datasets.train.dataroot_H", "folder"),
    (["datasets.train.dataset_type=srr"], "datasets.train.dataset_type", "'sr'"),
    (["datasets.train.dataset_type=l"], "datasets.train.dataset_type", "sr, blindsr or plain"),
    (["datasets.test.dataset_type=l"], "datasets.test.dataroot_L", "folder"),
    (["datasets.train.dataset_type=plain"], "datasets.train", "dataroot_L"),
    (["datasets.train.dataroot_H_mask=m"], "datasets.train.dataroot_H_mask", "srmask"),
    (["datasets.train.H_size=97"], "datasets.train.H_size", "divisible by scale 4"),
    (["datasets.train.H_size=100"], "netD.net_type", "divisible by 8"),
    (["datasets.train.H_size=true"], "datasets.train.H_size", "valid integer"),
    (["datasets.train.lq_patchsize=25"], "datasets.train.lq_patchsize", "larger than H_size"),
    (["datasets.train.dataloader_batch_size=0"], "datasets.train.dataloader_batch_size", "greater than or equal to 1"),
    (["datasets.train.dataloader_num_workers=-1"], "datasets.train.dataloader_num_workers", "equal to 0"),
    (["datasets.train.use_sharp=yes"], "datasets.train.use_sharp", "valid boolean"),
    (["datasets.train.shuffle_prob=2"], "datasets.train.shuffle_prob", "less than or equal to 1"),
    (["datasets.train.scale=2"], "datasets.train.scale", "remove it"),
    (["datasets.train.degradation_type=bsrgan_pluss"], "datasets.train.degradation_type", "bsrgan"),
    (["datasets.train.dataroot_H=[1]"], "datasets.train.dataroot_H", "must be"),
    (["netD.net_type=discriminator_vgg_128"], "netD.net_type", "128 pixels, not 96"),
    (["train.G_lossfn_weight=-1"], "train.G_lossfn_weight", "greater than or equal to 0"),
    (["train.G_lossfn_weight=NaN"], "train.G_lossfn_weight", "finite"),
    (["train.G_lossfn_weight=1e999"], "train.G_lossfn_weight", "finite"),
    (['train.G_lossfn_weight="1"'], "train.G_lossfn_weight", "valid number"),
    (["train.G_lossfn_type=l3"], "train.G_lossfn_type", "l1"),
    (["train.gan_type=gann"], "train.gan_type", "'gan'"),
    (["train.iterations=0"], "train.iterations", "greater than or equal to 1"),
    (["train.iterations=1.5"], "train.iterations", "valid integer"),
    (["train.manual_seed=-1"], "train.manual_seed", "greater than or equal to 0"),
    (["train.E_decay=1"], "train.E_decay", "less than 1"),
    (["train.G_optimizer_lr=0"], "train.G_optimizer_lr", "greater than 0"),
    (["train.G_optimizer_betas=[0.9]"], "train.G_optimizer_betas", "at least 2"),
    (["train.G_optimizer_betas=[0.9, 1.0]"], "train.G_optimizer_betas", "[0, 1)"),
    (["train.G_optimizer_type=sgd"], "train.G_optimizer_type", "adam"),
    (["train.G_optimizer_betas=[0.9, 0.9, 0.9]"], "train.G_optimizer_betas", "adam takes 2"),
    (["train.D_optimizer_type=adan", "train.D_optimizer_betas=[0.9, 0.9]"], "train.D_optimizer_betas", "adan takes 3"),
    (["train.G_scheduler_type=StepLR"], "train.G_scheduler_type", "MultiStepLR"),
    (["train.G_scheduler_type=CosineAnnealingLR"], "train.iterations", "required"),
    (["train.D_scheduler_type=CosineAnnealingLR"], "train.iterations", "required"),
    (
        ["train.D_scheduler_type=CosineAnnealingLR", "train.iterations=4", "train.D_scheduler_eta_min=1"],
        "train.D_scheduler_eta_min",
        "more than the rate it falls from",
    ),
    (
        ["train.D_scheduler_type=CosineAnnealingLR", "train.D_scheduler_warmup=4", "train.iterations=4"],
        "train.D_scheduler_warmup",
        "must be more",
    ),
    (["train.G_scheduler_milestones=5"], "train.G_scheduler_milestones", "valid list"),
    (["train.D_update_ratio=0"], "train.D_update_ratio", "greater than or equal to 1"),
    (["train.kernel_size_search=24"], "train.kernel_size_search", "odd"),
    (["train.kernel_size_window=27"], "train.kernel_size_window", "not be larger"),
    (["train.ssl_l1_weight=1", "datasets.train.H_size=8"], "train.kernel_size_search", "patches larger than 12"),
    (["train.ssl_mode=gpu"], "train.ssl_mode", "valid are"),
    (["train.sigma=0"], "train.sigma", "greater than 0"),
    (["train.F_feature_layer=[2, 7]"], "train.F_weights", "1 weights for 2 layers"),
    (["train.F_feature_layer=37"], "train.F_feature_layer", "0 to 36"),
    (["train.F_feature_layer=[]", "train.F_weights=[]"], "train.F_feature_layer", "at least one"),
    (["train.F_feature_layer=x"], "train.F_feature_layer", "valid integer"),
    (["train.F_lossfn_weight=1", "datasets.train.H_size=8"], "train.F_feature_layer", "at least 16 pixels"),
    (["train.G_lossfn_weight=0", "train.D_lossfn_weight=0"], "train", "nothing to train"),
    (["model=plain", "train.G_lossfn_weight=0"], "train.G_lossfn_weight", "nothing to train"),
    (["train.SSL_loss_weight=1", "train.ssl_l1_weight=1"], "train.SSL_loss_weight", "one of them"),
    (["train=null"], "train", "section"),
    (["train.checkpoint_save=0"], "train.checkpoint_save", "greater than or equal to 1"),
    (["test.tile=32", "test.tile_overlap=32"], "test.tile_overlap", "smaller than test.tile"),
    (["task.name=x"], "task", "not a section"),
    (["train.iterations"], "train.iterations", "key.path=value"),
    (["=5"], "=5", "key.path=value"),
    (["train.=5"], "train.=5", "key.path=value"),
]


@pytest.mark.parametrize(("overrides", "named", "offered"), WRONG, ids=[" ".join(w[0]) for w in WRONG])
def test_a_wrong_value_is_one_line_with_its_key_and_the_remedy(base, overrides, named, offered) -> None:
    with pytest.raises(UserError) as error:
        parse(base, overrides=overrides)
    message = str(error.value)
    assert "\n" not in message
    assert named in message
    assert offered in message[message.index(named) :], message
    # The key is told as it is written in the file: no name of a Python class or of a union's branch between.
    assert not re.search(r"Options|constrained|function-|union|srvgg_compact\.", message), message


HUGE = [
    *("train.ssl_l1_weight=1e308", "train.F_weights=[1e308]", "train.G_optimizer_lr=1e300", "train.iterations=1e300"),
    *("train.manual_seed=1e12", "train.kernel_size_search=1000000001", "train.mask_threshold=1e999"),
    *("train.checkpoint_save=1e18", "train.sigma=1e-320", "train.G_optimizer_wd=1e300", "train.dm_weight=1e30"),
    *("datasets.train.dataloader_batch_size=1e18", "datasets.train.H_size=1e9", "datasets.train.pair_pool=1e9"),
    *("netG.nf=1e9", "netG.nc=1e9", "netD.base_nc=1e9", "scale=1e9", "gpu_ids=[1e30]", "test.tile=1e300"),
    *("task=" + 90 * "\u6f22", "path.root=" + 300 * "x", "path.pretrained_netG=" + 3000 * "x/"),
    *('netG={"net_type": "swinir", "window_size": 1000000000}', 'netG={"net_type": "elan", "n_share": 1000000000}'),
    *('netG={"net_type": "swinir", "mlp_ratio": 1e300}', 'netG={"net_type": "rrdbnet", "nb": 1000000000}'),
    *('diffusion={"type": "ddpm", "steps": 1000000000}', 'diffusion={"type": "resshift", "seed": 1e30}'),
]


@pytest.mark.parametrize("override", HUGE)
def test_what_no_machine_can_compute_is_one_line(base: Path, override: str) -> None:
    with pytest.raises(UserError, match=r"must be|finite|too long") as error:
        parse(base, overrides=[override])
    assert "\n" not in str(error.value)


BROKEN_FILES = {
    "a_list": ("[1, 2]", "one {...} object"),
    "a_twin_key": ('{"task": "a",\n "task": "b"}', "'task' stands twice"),
    "a_twin_key_below": (BASE.replace('"H_size": 96', '"H_size": 96, "H_size": 64'), "'H_size' stands twice"),
    "no_task": ("{}", "task: is required"),
    "brackets": ("[" * 100000, "nested too deeply|line 1"),
    "digits": ('{"scale": ' + "1" * 5000 + "}", "digits"),
    "a_single_quote": ("{'task': 't'}", "check commas and quotes"),
    "yaml": ("task: t\nscale: 4", "check commas and quotes"),
    "surrogate": (BASE.replace('"t"', '"\\ud800"'), "task"),
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_a_broken_file_is_one_line_with_its_name(write, name: str) -> None:
    text, reason = BROKEN_FILES[name]
    path = write(text)
    with pytest.raises(UserError, match=reason) as error:
        parse(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


def test_a_missing_file_is_answered_with_the_nearest_name(base: Path, tmp_path: Path) -> None:
    (tmp_path / "train_bsrgan.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=r"no such option file; did you mean .*train_bsrgan\.json"):
        parse(tmp_path / "train_bsrgn.json")
    with pytest.raises(UserError, match="give an option file with --opt"):
        parse(tmp_path / "nowhere" / "zzz.json")


def test_what_is_no_text_file_is_said_to_be_none(tmp_path: Path) -> None:
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00\x80")
    for path in (tmp_path / "binary.json", tmp_path):
        with pytest.raises(UserError, match="cannot be read as a text file"):
            parse(path)


def test_several_mistakes_are_counted_in_one_line(base: Path) -> None:
    with pytest.raises(UserError, match=r"and 1 more: train\.bb") as error:
        parse(base, overrides=["train.aa=1", "train.bb=1"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("side", ["G", "D", "R"])
def test_each_side_has_its_optimizer_and_schedule(base: Path, side: str) -> None:
    cosine = [f"train.{side}_scheduler_type=CosineAnnealingLR", "train.iterations=12"]
    cosine += [f"train.{side}_scheduler_warmup=2", f"train.{side}_optimizer_lr=4", f"train.{side}_scheduler_eta_min=1"]
    train = parse(base, overrides=cosine).train
    schedule = train.optimizer(side)  # type: ignore[arg-type]
    assert [schedule.lr_at(step) for step in (1, 2, 7, 12)] == pytest.approx([2, 4, 2.5, 1])
    for other in {"G", "D", "R"} - {side}:
        theirs = train.optimizer(other)  # type: ignore[arg-type]
        assert (theirs.warmup, theirs.cosine_end, theirs.clipgrad, theirs.betas) == (0, None, None, None)
        assert theirs.lr_at(12) == theirs.lr == (1e-3 if other == "R" else 1e-4)
    steps = [f"train.{side}_optimizer_lr=4", f"train.{side}_scheduler_milestones=[5, 9]"]
    schedule = parse(base, overrides=steps).train.optimizer(side)  # type: ignore[arg-type]
    assert [schedule.lr_at(step) for step in (1, 4, 5, 8, 9)] == [4, 4, 2, 2, 1]  # gamma is 0.5


def test_testing_needs_no_training_set_and_no_discriminator(base: Path) -> None:
    opt = parse(base, is_train=False, overrides=["datasets.train=null", "netD.net_type=nonsense"])
    assert opt.netD is None
    assert not opt.is_train


def test_a_plain_dict_makes_network_options() -> None:
    raw = {"scale": 2, "n_channels": 1, "is_train": False, "netG": {"net_type": "rrdb", "nc": 8}, "other": 1}
    assert network_options(raw).netG["nf"] == 8
    assert raw["netG"] == {"net_type": "rrdb", "nc": 8}  # the caller's dict is left alone
    with pytest.raises(UserError, match=r"netG\.nbb: unknown key; did you mean 'nb'"):
        network_options({"netG": {"net_type": "rrdb", "nbb": 8}})


def test_resolved_options_parse_to_themselves(base: Path, write) -> None:
    opt = parse(base, overrides=["train.manual_seed=3", "datasets.train.name=x"])
    resolved = write(opt.model_dump_json(), "resolved.json")
    assert parse(resolved) == opt
    assert isinstance(parse(resolved), Options)
