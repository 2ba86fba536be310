"""Preparing data: each step's figures, stopping and going on, odd and bad images, LMDB, the report."""

import dataclasses
import json
import multiprocessing
import os
import shutil
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import loadmat
from torch.utils.data import DataLoader

from data.degradations.select_degradation import degrade_image
from data.preparation import pack, run
from data.preparation.alignment import find_shifts, unlikeness_of_shifts
from data.preparation.duplicates import near_duplicates, thumbnail
from data.preparation.steps import MULTISCALE_PRESETS, Subimages, matlab_bicubic
from data.select_dataset import define_Dataset
from main_prepare_data import main
from tests.conftest import photograph
from utils import utils_lmdb
from utils.utils_error import UserError
from utils.utils_image import get_image_paths, get_mask_paths, image_size, imread_uint, imsave, modcrop, read_mask
from utils.utils_option import DatasetOptions


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """Nothing here takes so long that other processes should help; one test asks for them."""
    monkeypatch.setattr(run, "ALONE", float("inf"))


@pytest.fixture
def photos(tmp_path):
    """Three photographs of odd sizes, one in a sub-folder."""
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for i, name in enumerate(("a", "b", "sub/c")):
        imsave(photograph(50 + 7 * i, 61 - i, seed=i), str(folder / f"{name}.png"))
    return folder


def prepare(command, source, output, *options):
    return main([*command.split(), "--input", str(source), "--output", str(output), *map(str, options)])


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flat(path, height, width):
    Image.new("L", (width, height)).save(path)
    return str(path)


# ------------------------------------------------------------------------------------------------- figures of each step


def test_multiscale_versions_have_the_published_sizes(tmp_path):
    ssl, realesrgan = MULTISCALE_PRESETS["ssl"], MULTISCALE_PRESETS["realesrgan"]
    large, small = flat(tmp_path / "large.png", 1100, 1601), flat(tmp_path / "small.png", 300, 200)
    # a third of 1100 is below 512
    assert ssl._sizes("large", image_size(large)) == {
        "largeT0.png": (825, 1200),
        "largeT1.png": (660, 960),
        "large.png": (1100, 1601),
        "largeS.png": (512, 745),
    }
    assert ssl.outputs(small, "small") == []
    assert dataclasses.replace(ssl, enlarge=True)._sizes("small", image_size(small)) == {"smallS.png": (768, 512)}
    assert ssl._sizes("just", (768, 512)) == {"just.png": (768, 512), "justS.png": (768, 512)}
    assert realesrgan._sizes("large", (1100, 1601)) == {
        "largeT0.png": (825, 1200),
        "largeT1.png": (550, 800),
        "largeT2.png": (366, 533),
        "largeT3.png": (400, 582),
    }


def test_multiscale_enlarges_nothing_and_counts_what_is_too_small(tmp_path, photos, capsys):
    # 50x61, 57x60 and 64x59, rows first: one shorter side is not below 58
    command = "multiscale --shortest 58 --min_side 0 --factors 1/2"
    why = "a shorter side below 58, and an enlarged photograph is no ground truth (--enlarge)"
    for more in ("--dry-run", "", ""):  # the last finds all finished
        assert prepare(f"{command} {more}", photos, tmp_path / "out") == 0
        assert capsys.readouterr().err.splitlines() == [f"2 images without S: {why}"]
    assert sorted(content(tmp_path / "out")) == sorted(
        ["prepared.json", "sub/cS.png", *(f"{name}{T}.png" for name in ("a", "b", "sub/c") for T in ("", "T0"))]
    )
    assert prepare("multiscale --shortest 58 --min_side 51", photos, tmp_path / "large") == 0
    assert sorted(capsys.readouterr().err.splitlines()) == [f"1 image left out: {why}", f"1 image without S: {why}"]
    assert not list((tmp_path / "large").glob("a*.png"))


def test_a_folder_of_multiscale_from_before_enlarge_was_a_choice_is_gone_on_with_by_it(tmp_path, photos):
    command = "multiscale --shortest 58 --min_side 0 --factors 1/2"
    assert prepare(f"{command} --enlarge", photos, tmp_path / "out") == 0
    written = tmp_path / "out" / "prepared.json"
    said = json.loads(written.read_text())
    del said["settings"]["enlarge"]
    written.write_text(json.dumps(said))
    with pytest.raises(UserError, match="was prepared with enlarge True, not False"):
        prepare(command, photos, tmp_path / "out")
    assert prepare(f"{command} --enlarge", photos, tmp_path / "out") == 0


def test_two_images_that_would_become_one_file_are_named(tmp_path):
    for name in ("scan", "scanS"):
        (tmp_path / "in").mkdir(exist_ok=True)
        imsave(photograph(60, 70), str(tmp_path / "in" / f"{name}.png"))
    with pytest.raises(UserError, match=r"scan\.png and .*scanS\.png would both become scanS\.png: rename one"):
        prepare("multiscale --shortest 20 --min_side 20", tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "in" / "scan.png").write_bytes(b"no image")  # of a bad one nothing is made
    assert prepare("multiscale --shortest 20 --min_side 20", tmp_path / "in", tmp_path / "out") == 1


def test_multiscale_is_lanczos_and_keeps_gray_and_16_bits(tmp_path, photos):
    img = photograph(50, 61)
    imsave(img.astype(np.uint16) * 257, str(photos / "deep.png"))
    imsave(img[..., 0], str(photos / "gray.png"))
    assert prepare("multiscale --shortest 20 --min_side 20 --factors 1/2", photos, tmp_path / "out") == 0
    expected = np.asarray(Image.fromarray(img).resize((30, 25), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(imread_uint(str(tmp_path / "out/aT0.png")), expected)
    deep = imread_uint(str(tmp_path / "out/deepT0.png"))
    assert deep.dtype == np.uint16
    # 8 bits are computed in fixed point and rounded after each of the two directions
    assert np.abs(deep / 257 - expected).max() < 1.5
    gray = imread_uint(str(tmp_path / "out/grayT0.png"), None)
    np.testing.assert_array_equal(
        gray[..., 0], np.asarray(Image.fromarray(img[..., 0]).resize((30, 25), Image.Resampling.LANCZOS))
    )
    np.testing.assert_array_equal(imread_uint(str(tmp_path / "out/a.png")), img)


def test_subimages_lie_every_step_and_against_the_far_edges(tmp_path):
    img = photograph(21, 16)
    imsave(img, str(tmp_path / "x.png"))
    assert prepare("subimages --size 8 --step 4", tmp_path / "x.png", tmp_path / "out") == 0
    corners = [(y, x) for y in (0, 4, 8, 12, 13) for x in (0, 4, 8)]
    assert len(get_image_paths(str(tmp_path / "out"))) == len(corners)
    for i, (y, x) in enumerate(corners, 1):
        piece = imread_uint(str(tmp_path / f"out/x_s{i:03d}.png"))
        np.testing.assert_array_equal(piece, img[y : y + 8, x : x + 8])


def test_subimages_have_the_published_figures(tmp_path):
    # 512 every 256 pixels of 1100 x 1024: rows 0, 256, 512, 588 and columns 0, 256, 512
    path = flat(tmp_path / "x.png", 1100, 1024)
    assert len(Subimages().outputs(path, "x")) == 12
    assert len(Subimages(threshold=76).outputs(path, "x")) == 9


def test_masks_are_the_saturated_laplacian_of_pillows_gray(tmp_path, photos):
    assert prepare("masks --format both", photos, tmp_path / "out") == 0
    for path in get_image_paths(str(photos)):
        gray = np.asarray(Image.open(path).convert("L"))
        expected = cv2.Laplacian(gray, cv2.CV_8U) > 20
        assert 0.01 < expected.mean() < 0.9
        mask = tmp_path / "out" / Path(path).relative_to(photos)
        mat = loadmat(mask.with_suffix(".mat"))["mat"]
        assert np.issubdtype(mat.dtype, np.integer)
        np.testing.assert_array_equal(mat, expected)
        np.testing.assert_array_equal(imread_uint(str(mask), None)[..., 0], 255 * expected)
        np.testing.assert_array_equal(read_mask(str(mask)), expected)


def test_masks_equal_the_published_ones(tmp_path, golden):
    images, masks = golden("ssl/images_set5.npz"), golden("ssl/masks_laplacian.npz")
    names = [name for name in masks.files if name in images.files]
    assert names
    for name in names:
        imsave(images[name], str(tmp_path / f"{name}.png"))
    assert prepare("masks", tmp_path, tmp_path.with_name("masks")) == 0
    for name in names:
        np.testing.assert_array_equal(loadmat(tmp_path.with_name("masks") / f"{name}.mat")["mat"], masks[name])


def test_bicubic_L_equals_the_published_numbers_within_one_level(golden):
    z = golden("image/imresize.npz")
    tried = [key for key in z.files if key.startswith("output/") and "no_antialias" not in key]
    assert len(tried) > 3
    for key in tried:
        _, crop, scale = key.split("/")
        img = z[f"input/{crop}"]
        img = img if img.ndim == 3 else img[..., None]
        above, _, below = scale[1:].partition("_")  # x1_4, x2
        ours = matlab_bicubic(img, int(above) / int(below or 1)).astype(int)
        published = (z[key].reshape(ours.shape) * 255).round().clip(0, 255)
        # the published numbers are computed in float32: a tie can fall the other way
        assert np.abs(ours - published).max() <= 1, key
        assert np.mean(ours != published) < 1e-3, key


def test_bicubic_L_is_pillows_bicubic_away_from_the_border(tmp_path, photos):
    assert prepare("lr-bicubic", photos, tmp_path / "out") == 0
    for path in get_image_paths(str(photos)):
        img = imread_uint(path)
        height, width = (side // 4 for side in img.shape[:2])
        reduced = Image.fromarray(img[: 4 * height, : 4 * width]).resize((width, height), Image.Resampling.BICUBIC)
        L = imread_uint(str(tmp_path / "out" / Path(path).relative_to(photos)))
        assert L.shape == (height, width, 3)
        # The same kernel, 16 pixels wide; at the border MATLAB mirrors and Pillow does not. Pillow rounds twice.
        inside = np.s_[2:-2, 2:-2]
        assert np.abs(L[inside].astype(int) - np.asarray(reduced)[inside]).max() <= 1


def test_enlarged_images_have_the_scale_and_keep_their_mean(tmp_path, photos):
    assert prepare("enlarge --scale 3", photos, tmp_path / "out") == 0
    small, large = imread_uint(str(photos / "a.png")), imread_uint(str(tmp_path / "out/a.png"))
    assert large.shape == (150, 183, 3)
    # interpolation weights sum to 1; mirrored borders and clipping move the mean a little
    assert abs(large.mean() - small.mean()) < 1


def test_modcrop_cuts_to_multiples(tmp_path, photos):
    assert prepare("modcrop", photos, tmp_path / "out") == 0
    np.testing.assert_array_equal(
        imread_uint(str(tmp_path / "out/a.png")), imread_uint(str(photos / "a.png"))[:48, :60]
    )
    assert prepare("modcrop --multiple 60", photos, tmp_path / "none") == 1


def test_blind_L_are_decided_by_seed_and_name_and_written_down(tmp_path, photos):
    def degrade(output, *options):
        return prepare("lr-blind --type blind_test --versions 3", photos, tmp_path / output, *options)

    assert degrade("out") == degrade("again") == degrade("other", "--seed", 1) == 0
    out = content(tmp_path / "out")
    names = [name for name in out if name.endswith(".png")]
    assert sorted(names) == [f"{H}+0{version}.png" for H in ("a", "b", "sub/c") for version in range(3)]
    assert len({out[name] for name in names}) == len(names)
    assert content(tmp_path / "again") == out
    other = content(tmp_path / "other")
    assert all(out[name] != other[name] for name in names)
    records = [json.loads(line) for line in out["manifest.jsonl"].decode().splitlines()]
    assert [record["file"] for record in records] == sorted(names)
    assert [record["H"] for record in records[::3]] == ["a.png", "b.png", "sub/c.png"]
    assert all(record["steps"] for record in records)
    L = imread_uint(str(tmp_path / "out/a+00.png"))
    assert L.shape == (12, 15, 3)
    # it shows its H
    assert np.abs(L.mean((0, 1)) - imread_uint(str(photos / "a.png")).mean((0, 1))).max() < 20


def test_data_sets_pair_all_versions_with_their_H(tmp_path, photos):
    prepare("lr-blind --type bsrgan_light --versions 2", photos, tmp_path / "L")
    opt = DatasetOptions(phase="test", scale=4, dataroot_H=str(photos), dataroot_L=str(tmp_path / "L"))
    dataset = define_Dataset(opt)
    assert [(item["H_path"][-5:], item["L_path"][-8:]) for item in (dataset[i] for i in range(6))] == [
        ("a.png", "a+00.png"),
        ("a.png", "a+01.png"),
        ("b.png", "b+00.png"),
        ("b.png", "b+01.png"),
        ("c.png", "c+00.png"),
        ("c.png", "c+01.png"),
    ]


def test_a_plus_in_the_name_of_an_H_would_cut_it_short(tmp_path, photos, capsys):
    (photos / "a.png").rename(photos / "a+b.png")
    assert prepare("lr-blind --type bsrgan --versions 2", photos, tmp_path / "L") == 1
    assert "a+b.png: several versions" in capsys.readouterr().err
    assert prepare("lr-blind --type bsrgan", photos, tmp_path / "one") == 0


# ------------------------------------------------------------------------------------------------ stopping and going on

STEPS = (
    "subimages --size 32 --step 16",
    "subimages --size 32 --step 16 --format npy",
    "masks --format both",
    "lr-bicubic",
    "lr-blind --type bsrgan --versions 3",
)


@pytest.mark.parametrize("command", STEPS)
def test_a_killed_preparation_goes_on_to_the_same_result(tmp_path, photos, command, monkeypatch):
    class KilledError(Exception):
        pass

    calls = count()

    def kill_in_the_second(image, path, save=run._save, calls=calls):
        if next(calls) == 1:
            path.with_name(f"{path.name}.999.part").write_bytes(b"half")
            raise KilledError
        save(image, path)

    prepare(command, photos, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(run, "_save", kill_in_the_second)
        with pytest.raises(KilledError):
            prepare(command, photos, tmp_path / "killed")
    if (manifest := tmp_path / "killed/manifest.jsonl").exists():
        manifest.write_text(manifest.read_text()[:-20])  # the last line cut short
    before = content(tmp_path / "killed")
    assert prepare(command, photos, tmp_path / "killed") == 0
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    assert any(name.endswith(".part") for name in before)


@pytest.mark.parametrize(
    "command",
    [
        "subimages --size 32 --step 16",
        "multiscale --shortest 30 --min_side 20",
        "modcrop",
        "lr-bicubic",
        "lr-blind --type bsrgan --versions 2",
        "enlarge --scale 2",
    ],
)
def test_raw_images_hold_the_pixels_of_the_png(tmp_path, photos, command):
    imsave(photograph(41, 40)[..., 0], str(photos / "gray.png"))
    imsave(photograph(40, 45).astype(np.uint16) * 257, str(photos / "deep.png"))
    for kind in ("png", "npy"):
        assert prepare(f"{command} --format {kind}", photos, tmp_path / kind) == 0
    raw, encoded = (get_image_paths(str(tmp_path / kind)) for kind in ("npy", "png"))
    assert [path[:-4].replace("/npy/", "/png/") for path in raw] == [path[:-4] for path in encoded]
    for path, other in zip(raw, encoded, strict=True):
        img, expected = np.load(path, allow_pickle=False), imread_uint(other, None)
        assert img.dtype == expected.dtype
        np.testing.assert_array_equal(img, expected, err_msg=path)


def test_raw_pairs_and_masks_hold_what_the_others_do(tmp_path, photos):
    assert prepare("lr-bicubic", photos, tmp_path / "L") == 0
    assert prepare("masks", photos, tmp_path / "mat") == prepare("masks --format npy", photos, tmp_path / "npy") == 0
    for kind in ("png", "npy"):
        pairs = f"subimages --size 32 --step 16 --format {kind} --L {tmp_path / 'L'}"
        assert prepare(pairs, photos, tmp_path / f"pairs_{kind}") == 0
    raw = get_image_paths(str(tmp_path / "pairs_npy"))
    assert {Path(path).parent.name for path in raw} >= {"H", "L"}
    for path in raw:
        other = path.replace("pairs_npy", "pairs_png").replace(".npy", ".png")
        np.testing.assert_array_equal(np.load(path), imread_uint(other))
    masks = get_mask_paths(str(tmp_path / "npy"))
    assert len(masks) == 3
    for path in masks:
        np.testing.assert_array_equal(read_mask(path), read_mask(path.replace("npy", "mat")))


@pytest.mark.parametrize("command", ["subimages --size 32 --step 16", "lr-bicubic", "lr-blind --type bsrgan", "masks"])
def test_the_bytes_of_raw_images_are_said_before_any_is_written(tmp_path, photos, command, capsys, monkeypatch):
    gray = Image.fromarray(photograph(41, 40)[..., 0])
    gray.save(photos / "gray.png")
    gray.save(photos / "key.png", transparency=3)  # RGB to OpenCV
    gray.save(photos / "gray.jpg.jpeg")
    Image.fromarray(photograph(44, 40)).convert("CMYK").save(photos / "cmyk.jpg")
    Image.fromarray(photograph(44, 40)).save(photos / "colour.tif")
    imsave(photograph(40, 45).astype(np.uint16) * 257, str(photos / "deep.png"))
    (photos / "bad.png").write_text("no image")
    claimed = []
    claim = run.claim
    monkeypatch.setattr(run, "claim", lambda *a: (claimed.append(capsys.readouterr().out), claim(*a)))
    assert prepare(f"{command} --format npy", photos, tmp_path / "out") == 1
    size = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*.npy"))
    assert f" MiB ({size:,} bytes) to write, " in claimed[0]
    capsys.readouterr()
    prepare(f"{command} --format npy --dry-run", photos, tmp_path / "out")
    assert "(0 bytes) to write" in capsys.readouterr().out


def test_an_lmdb_of_raw_images_reads_like_the_folder(tmp_path, photos):
    assert prepare("modcrop --format npy", photos, tmp_path / "raw") == 0
    assert prepare("lmdb", tmp_path / "raw", tmp_path / "raw.lmdb") == 0
    raw, packed = (get_image_paths(str(tmp_path / name)) for name in ("raw", "raw.lmdb"))
    assert len(packed) == len(raw) == 3
    for path, other in zip(raw, packed, strict=True):
        np.testing.assert_array_equal(imread_uint(other), np.load(path))
        assert image_size(other) == image_size(path)


@pytest.mark.parametrize("how", ["", "--dry-run"])
def test_raw_images_that_the_disk_cannot_hold_are_not_begun(tmp_path, photos, monkeypatch, how):
    disk = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(run.shutil, "disk_usage", lambda path: disk)
    with pytest.raises(UserError, match=r"subimages: .* to write, 0\.0 MiB \(1,000 bytes\) free on the disk of .*out"):
        prepare(f"subimages --size 32 --format npy {how}", photos, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_finished_files_are_counted_and_left_alone(tmp_path, photos, capsys):
    prepare("modcrop", photos, tmp_path / "out")
    (tmp_path / "out/b.png").unlink()
    stamps = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in ("a.png", "sub/c.png")}
    capsys.readouterr()
    assert prepare("modcrop", photos, tmp_path / "out") == 0
    assert capsys.readouterr().out == f"modcrop: 3 images, wrote 1 file, 2 were finished before: {tmp_path / 'out'}\n"
    assert stamps == {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in stamps}


def test_an_image_that_changed_afterwards_is_named(tmp_path, photos, capsys):
    prepare("modcrop", photos, tmp_path / "out")
    late = (tmp_path / "out/a.png").stat().st_mtime + 10
    os.utime(photos / "a.png", (late, late))
    assert prepare("modcrop", photos, tmp_path / "out") == 0
    assert "a.png: changed after files were made of it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("masks", "masks --threshold 8", r"threshold 20\.0, not 8\.0; give another --output"),
        ("masks", "modcrop", "masks, not modcrop"),
        ("lr-blind --type bsrgan", "lr-blind --type bsrgan --seed 3", "seed 0, not 3"),
        ("modcrop --format npy", "modcrop", "format npy, not None"),
        (None, "masks", "holds files that were not prepared by this program"),
    ],
)
def test_a_folder_filled_by_something_else_is_left_alone(tmp_path, photos, first, second, message):
    if first:
        prepare(first, photos, tmp_path / "out")
    else:
        (tmp_path / "out").mkdir()
        (tmp_path / "out/mine.txt").write_text("mine")
    before = content(tmp_path / "out")
    with pytest.raises(UserError, match=message):
        prepare(second, photos, tmp_path / "out")
    assert content(tmp_path / "out") == before


def test_other_images_do_not_go_into_a_folder_that_is_filled(tmp_path, photos):
    prepare("modcrop", photos, tmp_path / "out")
    shutil.copytree(photos, tmp_path / "others")
    with pytest.raises(UserError, match=r"input .*photos, not .*others"):
        prepare("modcrop", tmp_path / "others", tmp_path / "out")


def test_outputs_stay_clear_of_inputs_and_of_each_other(tmp_path, photos):
    with pytest.raises(UserError, match="lies among the input images"):
        prepare("modcrop", photos, photos / "out")
    with pytest.raises(UserError, match="holds the input image"):
        prepare("modcrop", photos / "sub", photos)
    Image.open(photos / "a.png").save(photos / "a.jpg")
    with pytest.raises(UserError, match=r"both would be saved as a\.png"):
        prepare("modcrop", photos, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [*STEPS, "multiscale --shortest 55 --min_side 20", "lmdb"])
def test_a_dry_run_counts_what_a_run_writes_and_writes_nothing(tmp_path, photos, command, capsys):
    output = tmp_path / "out.lmdb"
    assert prepare(f"{command} --dry-run", photos, output) == 0
    would = capsys.readouterr().out.splitlines()[-1]
    assert not output.exists()
    prepare(command, photos, output)
    assert capsys.readouterr().out.splitlines()[-1] == would.replace("would write", "wrote")
    prepare(f"{command} --dry-run", photos, output)
    assert "would write 0 files" in capsys.readouterr().out


def test_a_disk_that_cannot_be_written_ends_the_command(tmp_path, photos, monkeypatch):
    def full(*_, **__):
        raise UserError("out/a.png cannot be written: No space left on device")

    monkeypatch.setattr(run, "imsave", full)
    with pytest.raises(UserError, match="No space left"):
        prepare("modcrop", photos, tmp_path / "out")


def test_processes_give_what_one_process_gives(tmp_path, photos, monkeypatch):
    (photos / "zero.png").touch()
    command = "lr-blind --type realesrgan --versions 2"
    assert prepare(command, photos, tmp_path / "one") == 1
    monkeypatch.setattr(run, "ALONE", -1.0)
    assert prepare(f"{command} --workers 2", photos, tmp_path / "two") == 1
    assert content(tmp_path / "two") == content(tmp_path / "one")


# -------------------------------------------------------------------------------------------------- odd and bad images


def odd_images(folder):
    """Files of all kinds that show one picture, and where they are read otherwise: what they show."""
    folder.mkdir()
    img = photograph(40, 52)
    picture, gray = Image.fromarray(img), Image.fromarray(img).convert("L")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    turned = np.rot90(img, -1)
    shown = {}
    for suffix, lossless in (("png", {}), ("webp", {"lossless": True}), ("tif", {})):
        picture.save(folder / f"turned_{suffix}.{suffix}", exif=exif, **lossless)
        shown[f"turned_{suffix}.{suffix}"] = turned
    alpha = np.full((40, 52, 1), 90, np.uint8)
    alpha[:20] = 0
    for suffix, lossless in (("png", {}), ("webp", {"lossless": True, "exact": True}), ("tif", {})):
        Image.fromarray(np.dstack([img, alpha])).save(folder / f"alpha_{suffix}.{suffix}", **lossless)
        shown[f"alpha_{suffix}.{suffix}"] = img
    for suffix, lossless in (("png", {}), ("webp", {"lossless": True}), ("tif", {})):
        others = [Image.fromarray(255 - img)]
        picture.save(folder / f"moving_{suffix}.{suffix}", save_all=True, append_images=others, **lossless)
        shown[f"moving_{suffix}.{suffix}"] = img
    picture.convert("CMYK").save(folder / "cmyk.tif")
    shown["cmyk.tif"] = img
    gray.save(folder / "gray.png")
    shown["gray.png"] = np.asarray(gray)[..., None]
    picture.quantize(16).save(folder / "palette.png", transparency=3)
    shown["palette.png"] = np.asarray(picture.quantize(16).convert("RGB"))
    imsave(img.astype(np.uint16) * 257, str(folder / "deep.png"))
    shown["deep.png"] = img.astype(np.uint16) * 257
    return shown


def test_odd_images_are_read_alike_everywhere(tmp_path):
    shown = odd_images(tmp_path / "odd")
    assert prepare("modcrop --multiple 1", tmp_path / "odd", tmp_path / "out") == 0
    assert prepare("lmdb", tmp_path / "odd", tmp_path / "odd.lmdb") == 0
    for name, expected in shown.items():
        made = imread_uint(str(tmp_path / "out" / name.replace(Path(name).suffix, ".png")), None)
        assert made.dtype == expected.dtype, name
        np.testing.assert_array_equal(made, expected, err_msg=name)
        np.testing.assert_array_equal(imread_uint(f"{tmp_path}/odd.lmdb/{name}", None), expected, err_msg=name)
        assert image_size(str(tmp_path / "odd" / name)) == expected.shape[:2], name


def test_cmyk_jpegs_come_as_rgb(tmp_path):
    img = photograph(40, 52)
    Image.fromarray(img).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=98)
    # four full-size planes at quality 98; an inverted or swapped channel would be off by 50
    assert np.abs(imread_uint(str(tmp_path / "cmyk.jpg")).astype(int) - img).mean() < 4


def spoil(folder):
    """Bad files, and what is said of each."""
    encoded = cv2.imencode(".png", photograph(64, 64))[1].tobytes()
    (folder / "zero.png").touch()
    (folder / "cut.png").write_bytes(encoded[: len(encoded) // 2])
    (folder / "cut.jpg").write_bytes(cv2.imencode(".jpg", photograph(64, 64))[1].tobytes()[:900])
    (folder / "text.webp").write_text("no image")
    cv2.imwrite(str(folder / "float.tif"), np.zeros((64, 64), np.float32))
    return {"zero.png": "empty", "cut.png": "decoded", "text.webp": "decoded", "float.tif": "float32"}


@pytest.mark.parametrize("command", [*STEPS, "multiscale --shortest 30", "lmdb"])
def test_bad_images_are_named_and_do_not_stop_the_rest(tmp_path, photos, command, capsys):
    output = tmp_path / "out.lmdb"
    good = "clean.lmdb"
    prepare(command, photos, tmp_path / good)
    expected = set(content(tmp_path / good)) - {"data.mdb"}
    bad = spoil(photos)
    (photos / "cut.jpg").rename(photos / "short.jpg")
    capsys.readouterr()
    assert prepare(command, photos, output) == 1
    said = capsys.readouterr()
    for name, why in {**bad, "short.jpg": "decoded"}.items():
        lines = [line for line in said.err.splitlines() if name in line]
        assert len(lines) == 1, (name, said.err)
        assert why in lines[0]
    assert "5 bad images left out" in said.out
    assert set(content(output)) - {"data.mdb"} == expected


def test_training_and_testing_go_on_without_bad_images(photos, caplog):
    spoil(photos)
    test = define_Dataset(DatasetOptions(phase="test", scale=4, dataroot_H=str(photos)))
    assert [Path(item["H_path"]).name for item in (test[i] for i in range(len(test)))] == ["a.png", "b.png", "c.png"]
    assert "5 problems with the test images" in caplog.text
    train = define_Dataset(DatasetOptions(phase="train", scale=4, H_size=32, dataroot_H=str(photos)))
    assert len(train) == 8
    assert {Path(train[i, 0]["H_path"]).name for i in range(8)} == {"a.png", "b.png", "c.png"}


def test_an_image_too_small_for_a_subimage_is_named(tmp_path, photos, capsys):
    assert prepare("subimages --size 60 --step 30", photos, tmp_path / "out") == 1
    assert "a.png: 61x50 pixels are less than one sub-image of 60" in capsys.readouterr().err
    assert (tmp_path / "out/sub").exists() is False


# ----------------------------------------------------------------------------------------------------------------- LMDB


@pytest.fixture
def packed(tmp_path, photos):
    """The photographs and their masks, as folders and as LMDB folders."""
    prepare("masks", photos, tmp_path / "masks")
    prepare("lmdb", photos, tmp_path / "photos.lmdb")
    prepare("lmdb --masks", tmp_path / "masks", tmp_path / "masks.lmdb")
    yield tmp_path
    utils_lmdb.close_all()


def dataset_of(photos, masks):
    common = {"dataset_type": "srmask", "phase": "train", "scale": 4, "H_size": 32}
    return define_Dataset(DatasetOptions(**common, dataroot_H=str(photos), dataroot_H_mask=str(masks)))


def test_an_lmdb_folder_has_the_published_form(packed, photos):
    lines = (packed / "photos.lmdb/meta_info.txt").read_text().splitlines()
    assert lines == ["a.png (50,61,3) 1", "b.png (57,60,3) 1", "sub/c.png (64,59,3) 1"]
    for key in ("a", "b", "sub/c"):
        value = utils_lmdb.read_lmdb(str(packed / "photos.lmdb"), key)
        assert value == (photos / f"{key}.png").read_bytes()


def test_a_damaged_lmdb_folder_is_not_packed_into_and_says_so(packed, photos):
    utils_lmdb.close_all()
    (packed / "photos.lmdb" / "meta_info.txt").unlink()  # as where packing was cut short
    (packed / "photos.lmdb" / "data.mdb").write_bytes(b"no LMDB" * 10000)
    with pytest.raises(UserError, match=r"photos\.lmdb: cannot be written as LMDB .*; see to the disk, or remove it"):
        prepare("lmdb", photos, packed / "photos.lmdb")


def test_a_data_set_reads_an_lmdb_folder_as_any_other(packed, photos):
    plain, lmdb = dataset_of(photos, packed / "masks"), dataset_of(packed / "photos.lmdb", packed / "masks.lmdb")
    assert len(lmdb) == 3
    for i in range(3):
        for name in ("L", "H", "mask"):
            assert torch.equal(plain[i, 5][name], lmdb[i, 5][name])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_an_lmdb_folder_that_their_parent_has_open(packed, method):
    dataset = dataset_of(packed / "photos.lmdb", packed / "masks.lmdb")
    keys = [(0, 5), (1, 6), (2, 7), (0, 8)]
    expected = [dataset[key]["L"] for key in keys]
    loader = DataLoader(dataset, batch_size=2, sampler=keys, num_workers=1, multiprocessing_context=method)
    assert torch.equal(torch.cat([batch["L"] for batch in loader]), torch.stack(expected))
    assert torch.equal(dataset[keys[0]]["L"], expected[0])


def open_folders():
    return list(utils_lmdb._open)


def test_a_forked_process_does_not_use_what_its_parent_has_open(packed):
    dataset_of(packed / "photos.lmdb", packed / "masks.lmdb")[0, 0]
    assert {str(packed / name) for name in ("photos.lmdb", "masks.lmdb")} <= set(open_folders())  # beside other tests'
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        assert pool.submit(open_folders).result() == []


def test_threads_that_read_an_lmdb_folder_at_once_open_it_once(packed, monkeypatch):
    folder, lmdb = str(packed / "photos.lmdb"), utils_lmdb.import_lmdb()
    utils_lmdb.close_all()

    def slow(*args, **settings):
        env = lmdb.open(*args, **settings)
        time.sleep(0.1)  # the others come meanwhile
        return env

    monkeypatch.setattr(utils_lmdb, "import_lmdb", lambda: SimpleNamespace(open=slow, Error=lmdb.Error))
    keys = [utils_lmdb.split_path(path)[1] for path in utils_lmdb.list_lmdb(folder)]
    with ThreadPoolExecutor(3) as threads:
        assert all(threads.map(utils_lmdb.read_lmdb, [folder] * len(keys), keys))


def test_steps_read_an_lmdb_folder(packed, photos):
    prepare("lr-bicubic", packed / "photos.lmdb", packed / "one")
    prepare("lr-bicubic", photos, packed / "two")
    one, two = content(packed / "one"), content(packed / "two")
    one.pop("prepared.json"), two.pop("prepared.json")
    assert one == two


def test_an_unfinished_lmdb_folder_is_refused_and_finished(packed, photos, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    def read(folder):
        return {path.split(".lmdb/")[1]: imread_uint(path).tobytes() for path in get_image_paths(str(folder))}

    output = packed / "again.lmdb"
    with monkeypatch.context() as patch:
        patch.setattr(pack._MetaInfo, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare("lmdb", photos, output)
    with pytest.raises(UserError, match=r"again\.lmdb has no meta_info\.txt, so it is not finished"):
        get_image_paths(str(output))
    unfinished = output / "meta_info.unfinished"
    unfinished.write_text(unfinished.read_text()[:-6])
    capsys.readouterr()
    assert prepare("lmdb", photos, output) == 0
    assert "wrote 1 file, 2 were finished before" in capsys.readouterr().out
    assert read(output) == read(packed / "photos.lmdb")
    assert not unfinished.exists()


def test_more_than_expected_fits_into_an_lmdb_folder(tmp_path):
    with pack._writing(str(tmp_path / "x.lmdb"), size=0) as writer:
        for i in range(5):
            writer.put(str(i), bytes([i]) * (1 << 20))
    assert utils_lmdb.read_lmdb(str(tmp_path / "x.lmdb"), "4") == b"\4" * (1 << 20)
    utils_lmdb.close_all()


def test_the_name_of_an_lmdb_folder_ends_in_lmdb(tmp_path, photos):
    with pytest.raises(UserError, match=r"ends in \.lmdb"):
        prepare("lmdb", photos, tmp_path / "out")


# ---------------------------------------------------------------------------------------------------------------- check


def test_a_sound_data_set_has_nothing_the_matter(tmp_path, photos, capsys):
    prepare("masks", photos, tmp_path / "M")
    prepare("lr-bicubic", photos, tmp_path / "L")
    capsys.readouterr()
    command = ["check", "--H", str(photos), "--L", str(tmp_path / "L"), "--H_mask", str(tmp_path / "M")]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "complete          3 of 3 H" in out
    assert "sizes             1 61x50, 1 60x57, 1 59x64" in out
    assert out.endswith("nothing is the matter\n")
    assert max(len(line) for line in out.splitlines() if str(tmp_path) not in line) <= 80


def test_all_that_is_the_matter_is_named(tmp_path, photos, capsys):
    prepare("masks", photos, tmp_path / "M")
    prepare("lr-bicubic", photos, tmp_path / "L")
    shutil.copy(photos / "b.png", photos / "twin.png")
    (tmp_path / "L/sub/c.png").rename(tmp_path / "L/d.png")
    imsave(photograph(10, 10), str(tmp_path / "L/b.png"))
    imsave(np.zeros((9, 9), np.uint8), str(tmp_path / "M/twin.png"))
    (tmp_path / "M/twin.mat").write_bytes(b"no mask")
    (photos / "zero.png").touch()
    (photos / "photo.heic").touch()
    capsys.readouterr()
    command = ["check", "--H", str(photos), "--L", str(tmp_path / "L"), "--H_mask", str(tmp_path / "M")]
    assert main([*command, "--H_size", "55"]) == 1
    said = " ".join(capsys.readouterr().out.split())
    for text in (
        "! cannot be read 1",
        "zero.png is empty",
        f"! too small 1 below 55 {photos / 'a.png'} (61x50)",
        f"! equal pixels 1 groups {photos / 'b.png'} = {photos / 'twin.png'}",
        "files of other kinds: 1 .heic",
        "twin.mat cannot be read",
        "! incomplete 4",
        f"{photos / 'sub/c.png'}: no image in dataroot_L",
        f"! without H 1 {tmp_path / 'L/d.png'}",
        f"! of another size 1 {tmp_path / 'L/b.png'} (10x10), not 15x14",
        "7 kinds of trouble",
    ):
        assert text in said, (text, said)


def test_test_images_in_the_training_set_are_found(tmp_path, photos, capsys):
    (tmp_path / "test").mkdir()
    shutil.copy(photos / "a.png", tmp_path / "test/equal.png")
    other = imread_uint(str(photos / "b.png"))
    imsave(cv2.resize(np.ascontiguousarray(other[:, ::-1]), (44, 40)), str(tmp_path / "test/mirrored.png"))
    imsave(photograph(60, 60, seed=99), str(tmp_path / "test/new.png"))
    assert main(["check", "--H", str(photos), "--test", str(tmp_path / "test")]) == 1
    out = capsys.readouterr().out
    assert f"equal.png = {photos / 'a.png'}" in out
    assert f"mirrored.png ~ {photos / 'b.png'} (correlation " in out
    assert ", turned)" in out
    assert "new.png ~" not in out


@pytest.mark.parametrize("change", ["jpeg", "quarter", "gray", "noise", "cut"])
def test_a_changed_image_is_known_again(change):
    rng = np.random.default_rng(0)
    images = [photograph(160, 200, seed=i) for i in range(20)]
    img = images[7]
    test = {
        "jpeg": lambda: cv2.imdecode(cv2.imencode(".jpg", img, [cv2.IMWRITE_JPEG_QUALITY, 30])[1], 1),
        "quarter": lambda: cv2.resize(img, (50, 40), interpolation=cv2.INTER_AREA),
        "gray": lambda: cv2.cvtColor(img, cv2.COLOR_RGB2GRAY)[..., None],
        "noise": lambda: (img + rng.normal(0, 25, img.shape)).clip(0, 255).astype(np.uint8),
        "cut": lambda: np.ascontiguousarray(img[2:-2, 2:-2]),
    }[change]()
    twins = near_duplicates([thumbnail(x) for x in images], [thumbnail(test)])
    assert [(twin.train, twin.test, twin.turned) for twin in twins] == [(7, 0, False)]


def test_check_reads_an_option_file(tmp_path, photos, capsys):
    option_file = tmp_path / "train.json"
    text = json.dumps(
        {
            "task": "t",
            "model": "plain",
            "scale": 4,
            "netG": {"net_type": "rrdbnet", "nf": 8, "nb": 1, "gc": 4},
            "datasets": {
                "train": {"dataset_type": "sr", "dataroot_H": str(photos), "H_size": 56},
                "test": {"dataset_type": "sr", "dataroot_H": str(photos / "sub")},
            },
            "train": {"G_lossfn_weight": 1.0},
        }
    )
    option_file.write_text(text)
    assert main(["check", "--opt", str(option_file)]) == 1
    out = capsys.readouterr().out
    assert "too small         1 below 56" in out
    assert f"{photos / 'sub/c.png'} = {photos / 'sub/c.png'}" in out


def test_check_looks_at_what_the_kind_of_data_set_reads(tmp_path, photos, capsys):
    for i, file in enumerate(("best/a", "best/b", "worst/a", "worst/b", "L/a")):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        side = 16 if file == "L/a" else 64
        imsave(photograph(side, side, seed=i), str(tmp_path / f"{file}.png"))

    def status_of(model: str, **data: object) -> int:
        options = {"task": "t", "model": model, "scale": 4, "datasets": {"train": data}}
        options |= {"netR": {"net_type": "ranker_vgg12"}} if model == "ranker" else {"netG": {"net_type": "rrdbnet"}}
        (tmp_path / "o.json").write_text(json.dumps(options))
        return main(["check", "--opt", str(tmp_path / "o.json")])

    ranked = [str(tmp_path / name) for name in ("best", "worst")]
    assert status_of("ranker", dataset_type="rank", dataroot_ranked=ranked, H_size=32) == 0
    assert "images            4, " in capsys.readouterr().out
    # Of several L an H training takes the H that have one.
    roots = {"dataroot_H": ranked[0], "dataroot_L": str(tmp_path / "L"), "H_size": 32}
    assert status_of("plain", dataset_type="multiLR_oneGT", **roots) == 0
    assert status_of("plain", dataset_type="plain", **roots) == 1


# ----------------------------------------------------------------------------------------------------- pairs, cut apart


@pytest.fixture
def pairs(tmp_path):
    """H of sides that 3 does not divide, and its bicubic L."""
    (tmp_path / "H/sub").mkdir(parents=True)
    for i, name in enumerate(("a", "sub/b")):
        imsave(photograph(185, 223 + i, seed=i), str(tmp_path / "H" / f"{name}.png"))
    prepare("lr-bicubic --scale 3", tmp_path / "H", tmp_path / "L")
    return tmp_path


def check(folder, capsys, scale=3):
    capsys.readouterr()
    status = main(["check", "--H", str(folder / "H"), "--L", str(folder / "L"), "--scale", str(scale)])
    return status, " ".join(capsys.readouterr().out.split())


def test_pairs_that_are_cut_together_show_the_same(pairs, capsys):
    command = f"subimages --L {pairs / 'L'} --scale 3 --size 96 --step 48"
    assert prepare(command, pairs / "H", pairs / "out") == 0
    pieces = get_image_paths(str(pairs / "out/H"))
    # rows and columns 0, 48, 87 (183 - 96) and 0, 48, 96, 126 (222 - 96)
    assert len(pieces) == 2 * 3 * 4
    for H_path in pieces:
        H, L = imread_uint(H_path), imread_uint(H_path.replace("/out/H/", "/out/L/"))
        assert (H.shape, L.shape) == ((96, 96, 3), (32, 32, 3))
        # alike but for the borders, where the whole image goes on and a piece is mirrored
        inside = np.s_[3:-3, 3:-3]
        assert np.abs(matlab_bicubic(H, 1 / 3).astype(int) - L)[inside].max() <= 1
    assert check(pairs / "out", capsys)[0] == 0
    assert prepare(command, pairs / "H", pairs / "out") == 0
    assert "24" not in capsys.readouterr().out.partition("were finished")[0].partition("wrote")[2]


def test_several_L_of_one_H_are_cut_together(pairs, capsys):
    prepare("lr-blind --type bsrgan --versions 2 --scale 3", pairs / "H", pairs / "blind")
    assert prepare(f"subimages --L {pairs / 'blind'} --scale 3 --size 96 --step 96", pairs / "H", pairs / "out") == 0
    names = {path.name for path in (pairs / "out/L").glob("*.png")}
    assert {"a_s001+00.png", "a_s001+01.png"} <= names
    assert check(pairs / "out", capsys)[0] == 0


def test_an_H_without_an_L_or_with_one_of_another_size_is_named(pairs, capsys):
    (pairs / "L/sub/b.png").unlink()
    imsave(photograph(30, 30), str(pairs / "L/a.png"))
    assert prepare(f"subimages --L {pairs / 'L'} --scale 3 --size 96 --step 48", pairs / "H", pairs / "out") == 1
    said = capsys.readouterr().err
    assert "b.png: no image in dataroot_L of its name" in said
    assert "a.png is 30x30, not 1/3 of" in said


def test_pairs_that_are_cut_apart_are_found_and_counted(pairs, capsys):
    prepare("subimages --size 96 --step 48", pairs / "H", pairs / "apart/H")
    prepare("subimages --size 32 --step 16", pairs / "L", pairs / "apart/L")
    status, said = check(pairs / "apart", capsys)
    # the last of three rows begins at 89 of H and 29 of L; the last column of b at 128 and 42, of a at 127 and 42
    assert status == 1
    assert "! shifted 12 of 24 L" in said
    assert "a_s009.png (2 up)" in said
    assert "a_s004.png (1 left)" in said


@pytest.mark.parametrize(
    "how", ["bicubic", "area", "jpeg", "noise", "bsrgan", "blind_test", "realesrgan", "every third"]
)
def test_L_that_lies_where_H_does_is_not_accused(pairs, capsys, how):
    rng = np.random.default_rng(0)
    for path in get_image_paths(str(pairs / "H")):
        H, to = modcrop(imread_uint(path), 3), path.replace("/H/", "/L/")
        L = imread_uint(to)
        if how == "area":
            L = cv2.resize(H, L.shape[1::-1], interpolation=cv2.INTER_AREA)
        elif how == "jpeg":
            L = cv2.imdecode(cv2.imencode(".jpg", L, [cv2.IMWRITE_JPEG_QUALITY, 50])[1], cv2.IMREAD_COLOR)
        elif how == "noise":
            L = (L + rng.normal(0, 20, L.shape)).clip(0, 255).astype(np.uint8)
        elif how == "every third":  # a pixel off all over: that is how it was made
            L = cv2.GaussianBlur(H, (0, 0), 1.6)[::3, ::3]
        elif how != "bicubic":
            L, _ = degrade_image(H, how, 3, 0, path[-5])
        imsave(np.ascontiguousarray(L), to)
    status, said = check(pairs, capsys)
    assert status == 0
    assert "shifted" not in said


def test_a_way_of_making_L_that_shifts_all_of_it_is_said_but_no_trouble():
    images = [photograph(120, 160, seed=i) for i in range(5)]
    every_fourth = [cv2.GaussianBlur(H, (0, 0), 1.6)[::4, ::4] for H in images]
    found = find_shifts([unlikeness_of_shifts(H, L, 4) for H, L in zip(images, every_fourth, strict=True)])
    # 1.5 pixels of H up and left, which lies between two
    assert {*found.common} <= {-1, -2}
    assert found.single == {}


@pytest.mark.parametrize("options", ["--size 97 --step 48", "--size 96 --step 50"])
def test_pieces_of_a_pair_divide_by_the_scale(pairs, options):
    with pytest.raises(UserError, match="--scale 3 times those of L; take"):
        prepare(f"subimages --L {pairs / 'L'} --scale 3 {options}", pairs / "H", pairs / "out")
    with pytest.raises(UserError, match="is for pairs"):
        prepare("subimages --scale 3", pairs / "H", pairs / "out")


# -------------------------------------------------------------------------------------------------- the command line


def test_single_files_of_a_folder_are_prepared_and_checked_together(tmp_path, photos, capsys):
    files = sorted(map(str, photos.glob("*.png")))
    assert main(["modcrop", "--input", *files, "--output", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == ["a.png", "b.png"]
    capsys.readouterr()
    main(["check", "--test", *files])
    assert f"test set {photos}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        "multiscale --factors 1/0",
        "multiscale --factors inf",
        "multiscale --factors nan",
        "multiscale --factors 0.5 1e9",
        "multiscale --factors 1/inf",
        "multiscale --shortest 1000000000",
        "subimages --step 0",
        "subimages --size 1000000000",
        "lr-bicubic --scale 1000000000",
        "lr-bicubic --scale 0",
        "enlarge --scale 1000000000",
        "modcrop --multiple 1000000000",
        "lr-blind --type bsrgan --versions 1000000000",
        "lr-blind --type bsrgan --seed -1",
        "masks --threshold nan",
        "masks --workers 1000000000",
        "masks --workers 0",
    ],
)
def test_a_number_out_of_range_is_one_line_and_no_endless_work(tmp_path, photos, arguments):
    with pytest.raises(UserError, match="invalid"):
        prepare(arguments, photos, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_image_that_would_become_enormous_is_left_out(tmp_path, photos, capsys):
    flat(photos / "strip.png", 1000, 3000)
    assert prepare("multiscale --factors 16", photos / "strip.png", tmp_path / "out") == 1
    assert "strip.png: would become 48000x16000 pixels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["masks", "--output", "x"], "--input"),
        (["subimages", "--input", "x", "--output", "y", "--size", "0"], "number from 1 up"),
        (["masks", "--input", "nowhere", "--output", "y"], "nowhere does not exist"),
        (["lr-blind", "--input", "x", "--output", "y", "--type", "bicubic"], "invalid choice"),
        (["check"], "give either --opt FILE or folders"),
        (["wrong"], "invalid choice"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(arguments, message):
    with pytest.raises(UserError, match=message) as error:
        main(arguments)
    assert "\n" not in str(error.value)
