"""Data sets: pairing by name, one place and one flip for L, H and mask, repeatable draws, the check before training."""

import os
import pickle
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torch.utils.data import DataLoader

from data import dataset_blindsr, dataset_rank, dataset_sr
from data.check import check_dataset, find_problems
from data.files import find_partners, group_files
from data.select_dataset import define_Dataset
from tests.conftest import photograph
from utils import utils_image
from utils.utils_error import UserError
from utils.utils_image import (
    IMAGE_SUFFIXES,
    get_image_paths,
    image_size,
    imread_uint,
    imresize_np,
    imsave,
    modcrop,
    read_mask,
    uint2single,
)

SCALE = 4


def options(**changes):
    """The options of a training set; a SimpleNamespace stands for the typed ones."""
    return SimpleNamespace(
        **{
            "phase": "train",
            "scale": SCALE,
            "n_channels": 3,
            "dataset_type": "sr",
            "dataroot_H": None,
            "dataroot_L": None,
            "dataroot_H_mask": None,
            "H_size": 32,
            "lq_patchsize": None,
            "degradation_type": "bsrgan",
            "use_sharp": False,
            "shuffle_prob": 0.1,
            "degradation_device": "cpu",
            "camera_prob": 0.0,
            "mask_augment": True,
            "use_rot": True,
            "seed": 0,
            "rank_csv": None,
            **changes,
        }
    )


def position_image(height, width):
    """16 bits a channel that say where a pixel is: row, column, 0. Multiples of 256 survive anything lossless."""
    row, column = np.mgrid[:height, :width]
    return np.dstack([row, column, 0 * row]).astype(np.uint16) * 256


def positions(tensor):
    """(row, column) of every pixel of a patch of :func:`position_image`."""
    return (tensor[:2] * 65535 / 256).round().int().permute(1, 2, 0)


@pytest.fixture
def folders(tmp_path):
    """Three H of 61 x 83 (no multiple of 4), whose L and masks carry the position as well, in nested folders."""
    for i, name in enumerate(("a", "sub/b", "sub/c")):
        for kind in "HLM":
            (tmp_path / kind / name).parent.mkdir(parents=True, exist_ok=True)
        H = position_image(61, 83)
        imsave(H, str(tmp_path / "H" / f"{name}.png"))
        imsave(np.ascontiguousarray(modcrop(H, SCALE)[::SCALE, ::SCALE]), str(tmp_path / "L" / f"{name}x4.png"))
        mask = np.random.default_rng(i).integers(0, 2, (61, 83))
        savemat(tmp_path / "M" / f"{name}.mat", {"mat": mask})
    return SimpleNamespace(H=str(tmp_path / "H"), L=str(tmp_path / "L"), M=str(tmp_path / "M"), path=tmp_path)


def photos(folder, count=3, height=64, width=72):
    folder.mkdir()
    for i in range(count):
        noise = np.random.default_rng(i).integers(0, 256, (height // 8, width // 8, 1), np.uint8).repeat(3, axis=2)
        imsave(np.kron(noise, np.ones((8, 8, 1), np.uint8)), str(folder / f"{i}.png"))
    return str(folder)


# ----------------------------------------------------------------------------------------------------------- pairing


@pytest.mark.parametrize(
    ("H", "L"),
    [
        ("0001.png", "0001.jpg"),
        ("0001.png", "0001x4.png"),
        ("baby.png", "baby_LRBI_x4.png"),
        ("img_001_SRF_4_HR.png", "img_001_SRF_4_LR.png"),
        ("baby_HR.png", "baby_LR.png"),
        ("baby_GT.png", "baby-x4.PNG"),
        ("0801.png", "0801x4m.png"),
        ("max4.png", "max4x4.png"),
    ],
)
def test_partners_are_found_behind_the_usual_endings(H, L):
    others = ["other.png", "0001x3.png", "10001.png"]
    assert find_partners([f"H/{H}"], [*others, f"L/{L}"], 4) == [[f"L/{L}"]]


def test_the_exact_name_wins_and_another_scale_is_no_partner():
    assert find_partners(["a.png"], ["a_LR.png", "L/a.png"], 4) == [["L/a.png"]]
    assert find_partners(["a.png"], ["ax2.png"], 4) == [[]]


def test_namesakes_are_told_apart_by_their_folders():
    L = ["L/x/1.png", "L/y/1.png"]
    assert find_partners(["H/y/1.png", "H/x/1.png"], L, 4) == [["L/y/1.png"], ["L/x/1.png"]]
    assert find_partners(["H/z/1.png"], L, 4) == [L]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataroot_H": None}, "dataroot_H is not set"),
        ({"dataset_type": "plain"}, "dataroot_L is not set"),
        ({"dataset_type": "l"}, "dataroot_L is not set"),
        ({"dataset_type": "video"}, "no data set 'video'"),
        ({"dataroot_L": "nowhere"}, "nowhere does not exist"),
        ({"dataset_type": "srmask", "dataroot_H_mask": "no_masks"}, "no_masks does not exist"),
    ],
)
def test_wrong_options_are_one_line(folders, changes, message):
    with pytest.raises(UserError, match=message) as error:
        define_Dataset(options(**{"dataroot_H": folders.H, **changes}))
    assert "\n" not in str(error.value)


def test_a_missing_partner_stops_the_data_set(folders):
    (folders.path / "L/sub/bx4.png").unlink()
    with pytest.raises(UserError, match=r"1 problem with the train images: .*b\.png: no image in dataroot_L"):
        define_Dataset(options(dataroot_H=folders.H, dataroot_L=folders.L))


# -------------------------------------------------------------------------------------------------- L, H and mask


def places(dataset, index, masks, seeds):
    """Check that L and mask of every item lie where H does, and yield where its first two pixels come from."""
    for seed in seeds:
        item = dataset[index, seed]
        assert item["L"].shape == (3, 8, 8)
        assert item["H"].shape == (3, 32, 32)
        place = positions(item["H"])
        if "mask" in item:
            assert torch.equal(item["mask"][0], masks[place[..., 0], place[..., 1]])
        yield item, place


def test_L_H_and_mask_are_aligned_under_all_eight_modes(folders):
    opt = options(dataset_type="srmask", dataroot_H=folders.H, dataroot_L=folders.L, dataroot_H_mask=folders.M)
    dataset = define_Dataset(opt)
    masks = torch.from_numpy(np.random.default_rng(1).integers(0, 2, (61, 83))).float()
    directions = set()
    for item, place in places(dataset, 1, masks, range(60)):
        assert item["L_path"].endswith("bx4.png")
        # a pixel of L stands for a 4 x 4 block of H and carries the position of its upper left corner
        blocks = place.reshape(8, 4, 8, 4, 2).amin(dim=(1, 3))
        assert torch.equal(positions(item["L"]), blocks)
        directions.add((*(place[0, 1] - place[0, 0]).tolist(), *(place[1, 0] - place[0, 0]).tolist()))
    assert len(directions) == 8


def test_a_partner_in_another_folder_goes_with_one_image_alone(tmp_path):
    for name in ("H/a/1", "H/b/1", "L/a/1"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        side = 32 if name.startswith("H") else 8
        imsave(photograph(side, side), f"{tmp_path / name}.png")
    opt = options(dataroot_H=str(tmp_path / "H"), dataroot_L=str(tmp_path / "L"))
    wrong = find_problems(opt).wrong
    assert len(wrong) == 1
    assert re.search(r"H.b.1\.png: no image in dataroot_L of its name but .*L.a.1\.png, which fits .*H.a.1", wrong[0])
    for name in ("H/1", "H2/1", "L2/1"):  # and a partner that fits both alike with none
        (tmp_path / name).parent.mkdir(exist_ok=True)
        imsave(photograph(8 if name[0] == "L" else 32, 8 if name[0] == "L" else 32), f"{tmp_path / name}.png")
    opt = options(dataroot_H=[str(tmp_path / "H" / "1.png"), str(tmp_path / "H2")], dataroot_L=str(tmp_path / "L2"))
    assert len(find_problems(opt).wrong) == 2


def test_use_rot_off_only_mirrors(folders):
    ways = {}
    for on in (True, False):
        dataset = define_Dataset(options(dataroot_H=folders.H, use_rot=on))
        H = [positions(dataset[0, seed]["H"]) for seed in range(60)]
        ways[on] = {(*(p[0, 1] - p[0, 0]).tolist(), *(p[1, 0] - p[0, 0]).tolist()) for p in H}
    assert len(ways[True]) == 8
    assert len(ways[False]) == 2  # each missing with a chance of 2 ** -60
    assert all(way[2:] == (1, 0) for way in ways[False])  # rows go on downwards


def test_mask_augment_off_leaves_the_mask_as_it_was_cut(folders):
    common = {"dataset_type": "srmask", "dataroot_H": folders.H, "dataroot_H_mask": folders.M}
    aligned, askew = (define_Dataset(options(**common, mask_augment=on)) for on in (True, False))
    different = 0
    for seed in range(40):
        a, b = aligned[0, seed], askew[0, seed]
        assert torch.equal(a["H"], b["H"])
        assert a["mask"].sum() == b["mask"].sum()
        different += not torch.equal(a["mask"], b["mask"])
    assert 27 <= different <= 40  # seven of eight: 35, standard deviation 2


def test_no_mask_comes_without_a_mask_folder_or_a_mask_variant(folders):
    assert "mask" not in define_Dataset(options(dataset_type="srmask", dataroot_H=folders.H))[0]
    assert "mask" not in define_Dataset(options(dataroot_H=folders.H, dataroot_H_mask=folders.M))[0]


def test_L_made_on_the_fly_is_the_bicubic_of_the_whole_image(tmp_path):
    dataset = define_Dataset(options(dataroot_H=photos(tmp_path / "H", 1)))
    H = uint2single(imread_uint(str(tmp_path / "H/0.png")))
    L = imresize_np(H, 1 / SCALE)
    for seed in range(8):
        item = dataset[0, seed]
        window = np.lib.stride_tricks.sliding_window_view(L, (8, 8), axis=(0, 1)).reshape(-1, 3, 8, 8)
        views = [torch.rot90(flip, k, (1, 2)) for k in range(4) for flip in (item["L"], item["L"].flip(2))]
        assert any((window == view.numpy()).all(axis=(1, 2, 3)).any() for view in views)
    whole = define_Dataset(options(phase="test", dataroot_H=str(tmp_path / "H")))[0]
    np.testing.assert_array_equal(whole["L"].permute(1, 2, 0), L)


def test_the_test_phase_gives_whole_images_cut_to_the_scale(folders):
    opt = options(phase="test", dataset_type="plainmask", dataroot_H=folders.H, dataroot_L=folders.L)
    opt.dataroot_H_mask = folders.M
    item = define_Dataset(opt)[2]
    assert (item["L"].shape, item["H"].shape, item["mask"].shape) == ((3, 15, 20), (3, 60, 80), (1, 60, 80))
    assert torch.equal(positions(item["H"])[::4, ::4], positions(item["L"]))


def test_plain_at_scale_1_pairs_images_of_one_size(folders):
    opt = options(dataset_type="plain", scale=1, dataroot_H=folders.H, dataroot_L=folders.H)
    item = define_Dataset(opt)[0]
    assert torch.equal(item["L"], item["H"])


def test_one_channel_is_one_channel(tmp_path):
    for dataset_type in ("sr", "blindsr"):
        root = str(tmp_path / "H") if dataset_type == "blindsr" else photos(tmp_path / "H")
        item = define_Dataset(options(dataset_type=dataset_type, n_channels=1, dataroot_H=root))[0]
        assert (item["L"].shape, item["H"].shape) == ((1, 8, 8), (1, 32, 32))


def test_images_without_ground_truth(folders):
    item = define_Dataset(options(phase="test", dataset_type="l", dataroot_L=folders.L))[0]
    assert item["L"].shape == (3, 15, 20)
    assert sorted(item) == ["L", "L_extras", "L_path"]


# --------------------------------------------------------------------------------------------------------- raw images


def make_raw(folder):
    """A copy of a folder of images or masks beside it, raw; -> its path."""
    for path in Path(folder).rglob("*.*"):
        raw = Path(f"{folder}_raw") / path.relative_to(folder).with_suffix(".npy")
        raw.parent.mkdir(parents=True, exist_ok=True)
        is_mask = path.suffix == ".mat"
        imsave(read_mask(str(path)).astype(np.uint8) if is_mask else imread_uint(str(path), None), str(raw))
    return f"{folder}_raw"


KINDS = ("sr", "plain", "srmask", "blindsr", "blindsrmask", "rank")


@pytest.mark.parametrize("phase", ["train", "test"])
@pytest.mark.parametrize("kind", KINDS)
def test_raw_images_give_the_items_of_the_png_bit_for_bit(folders, kind, phase):
    roots = {"dataroot_H": folders.H}
    if kind in ("plain", "srmask"):
        roots["dataroot_L"] = folders.L
    if kind == "rank":
        roots = {"dataroot_ranked": [folders.H, str(shutil.copytree(folders.H, folders.path / "worse"))]}
    if kind.endswith("mask"):
        roots["dataroot_H_mask"] = folders.M
    raw_roots = {
        key: [make_raw(r) for r in root] if isinstance(root, list) else make_raw(root) for key, root in roots.items()
    }
    encoded, raw = (
        define_Dataset(options(dataset_type=kind, phase=phase, use_sharp=True, **r)) for r in (roots, raw_roots)
    )
    assert len(raw) == len(encoded)
    for n in range(12):
        item, expected = raw[(n % len(raw), (0, n))], encoded[(n % len(raw), (0, n))]
        assert item.keys() == expected.keys()
        assert item["H_path"].endswith(".npy")
        for name, value in expected.items():
            if torch.is_tensor(value):
                assert torch.equal(item[name], value), name


@pytest.mark.parametrize("kind", KINDS)
def test_training_reads_no_more_of_a_raw_image_than_it_cuts(folders, kind, monkeypatch):
    H = make_raw(folders.H)
    roots = {"dataroot_H": H}
    if kind == "rank":
        roots = {"dataroot_ranked": [H, str(shutil.copytree(H, folders.path / "worse"))]}
    if kind in ("plain", "srmask"):
        roots["dataroot_L"] = make_raw(folders.L)
    if kind.endswith("mask"):
        roots["dataroot_H_mask"] = make_raw(folders.M)
    dataset = define_Dataset(options(dataset_type=kind, **roots))
    sizes = []

    def watched(img, convert=uint2single):
        sizes.append(img.shape[:2])
        return convert(img)

    for module in (dataset_sr, dataset_blindsr, dataset_rank, utils_image):
        monkeypatch.setattr(module, "uint2single", watched)
    monkeypatch.setattr(utils_image, "read_file", lambda path: pytest.fail(f"{path} was read whole"))
    for n in range(8):
        dataset[(0, (0, n))]
    # a patch of 32, or what the bicubic kernel needs around it: 8 pixels at each side and the rounding of both ends
    assert max(max(size) for size in sizes) <= 32 + 2 * 10


def test_raw_images_without_ground_truth_are_restored(folders):
    encoded, raw = (
        define_Dataset(options(phase="test", dataset_type="l", dataroot_L=root))[1]
        for root in (folders.L, make_raw(folders.L))
    )
    assert torch.equal(raw["L"], encoded["L"])
    assert raw["L_extras"].bits == 16


def test_workers_and_batches_take_raw_images(folders):
    dataset = define_Dataset(options(dataset_type="srmask", dataroot_H=make_raw(folders.H), dataroot_H_mask=folders.M))
    batch = next(iter(DataLoader(dataset, batch_size=3)))
    assert batch["L"].shape == (3, 3, 8, 8)
    pickle.loads(pickle.dumps(dataset))


def test_raw_images_that_are_cut_short_are_named_and_replaced(folders, caplog):
    H = Path(make_raw(folders.H))
    dataset = define_Dataset(options(dataroot_H=str(H)))
    whole = (H / "a.npy").read_bytes()
    (H / "a.npy").write_bytes(whole[:-1])
    assert dataset[(0, (0, 0))]["H_path"].endswith("b.npy")
    assert "a.npy has " in caplog.messages[0]
    unreadable = find_problems(dataset.opt).unreadable
    assert len(unreadable) == 1
    assert "cut short" in unreadable[0]
    assert len(define_Dataset(options(dataroot_H=str(H), phase="test"))) == 2


# ------------------------------------------------------------------------------------------------------------- blind


@pytest.mark.parametrize("degradation_type", ["bsrgan", "bsrgan_light"])
def test_blind_items_are_aligned_with_their_mask(folders, degradation_type):
    opt = options(dataset_type="blindsrmask", dataroot_H=folders.H, dataroot_H_mask=folders.M)
    opt.degradation_type = degradation_type
    masks = torch.from_numpy(np.random.default_rng(0).integers(0, 2, (61, 83))).float()
    for item, _ in places(define_Dataset(opt), 0, masks, range(16)):
        assert item["L_path"] == item["H_path"]


def test_lq_patchsize_keeps_an_aligned_part(folders):
    opt = options(dataset_type="blindsrmask", dataroot_H=folders.H, dataroot_H_mask=folders.M)
    opt.H_size, opt.lq_patchsize = 48, 8
    masks = torch.from_numpy(np.random.default_rng(0).integers(0, 2, (61, 83))).float()
    corners = {tuple(place[0, 0].tolist()) for _, place in places(define_Dataset(opt), 0, masks, range(16))}
    assert len(corners) > 8


def test_blind_L_shows_what_H_shows(tmp_path):
    opt = options(dataset_type="blindsr", degradation_type="bsrgan_light", dataroot_H=photos(tmp_path / "H"))
    for seed in range(10):
        item = define_Dataset(opt)[0, seed]
        small = imresize_np(item["H"].permute(1, 2, 0).numpy(), 1 / SCALE)
        # 4 x 4 blocks of random gray: those of unrelated patches correlate by 0 +- 0.15
        assert np.corrcoef(small.ravel(), item["L"].permute(1, 2, 0).numpy().ravel())[0, 1] > 0.6


def test_faces_stay_upright_in_blind_training(tmp_path):
    (tmp_path / "H").mkdir()
    imsave(position_image(40, 40), str(tmp_path / "H/face_1.png"))
    dataset = define_Dataset(options(dataset_type="blindsr", dataroot_H=str(tmp_path / "H")))
    for seed in range(16):
        place = positions(dataset[0, seed]["H"])
        assert (place[1, 0] - place[0, 0]).tolist() == [1, 0]


def test_use_sharp_sharpens_H(tmp_path):
    root = photos(tmp_path / "H")
    plain, sharp = (define_Dataset(options(dataset_type="blindsr", dataroot_H=root, use_sharp=on)) for on in (0, 1))
    assert sharp[0, 1]["H"].std() > plain[0, 1]["H"].std()


# -------------------------------------------------------------------------------------------------- repeatability


@pytest.mark.parametrize("dataset_type", ["sr", "blindsr"])
def test_an_item_is_decided_by_its_seed_else_drawn_afresh(tmp_path, dataset_type):
    dataset = define_Dataset(options(dataset_type=dataset_type, dataroot_H=photos(tmp_path / "H")))
    assert torch.equal(dataset[1, 7]["L"], dataset[1, 7]["L"])
    assert not torch.equal(dataset[1, 7]["L"], dataset[1, 8]["L"])
    assert not all(torch.equal(dataset[1]["L"], dataset[1]["L"]) for _ in range(4))


def test_the_blind_test_phase_is_decided_by_seed_and_index(tmp_path):
    common = {"phase": "test", "dataset_type": "blindsr", "dataroot_H": photos(tmp_path / "H")}
    first, again, other = (define_Dataset(options(**common, seed=seed))[1] for seed in (0, 0, 1))
    assert first["H"].shape == (3, 64, 72)
    assert torch.equal(first["L"], again["L"])
    assert not torch.equal(first["L"], other["L"])


def test_spawned_workers_give_what_the_main_process_gives(tmp_path):
    dataset = define_Dataset(options(dataset_type="blindsr", dataroot_H=photos(tmp_path / "H")))
    dataset = pickle.loads(pickle.dumps(dataset))
    keys = [(0, 5), (1, 6), (2, 7), (0, 8)]
    loader = DataLoader(dataset, batch_size=2, sampler=keys, num_workers=2, multiprocessing_context="spawn")
    batches = list(loader)
    expected = [dataset[key] for key in keys]
    assert torch.equal(torch.cat([batch["L"] for batch in batches]), torch.stack([item["L"] for item in expected]))
    assert [path for batch in batches for path in batch["H_path"]] == [item["H_path"] for item in expected]


# ------------------------------------------------------------------------------------------------------------- check


def test_a_sound_data_set_has_no_problems(folders):
    opt = options(dataset_type="srmask", dataroot_H=folders.H, dataroot_L=folders.L, dataroot_H_mask=folders.M)
    assert find_problems(opt) == ([], [])
    check_dataset(opt)
    assert find_problems(options(phase="test", dataset_type="l", dataroot_L=folders.L)) == ([], [])


def test_every_bad_image_is_listed_by_name_and_size(folders):
    H, L, M = (folders.path / kind for kind in "HLM")
    imsave(position_image(20, 90), str(H / "small.png"))
    imsave(position_image(5, 22), str(L / "small.png"))
    (H / "zero.png").touch()
    imsave(position_image(9, 9), str(L / "zero.png"))
    imsave(position_image(40, 40), str(H / "alone.png"))
    imsave(position_image(14, 20), str(L / "ax4.png"))
    encoded = (L / "sub/bx4.png").read_bytes()
    (L / "sub/bx4.png").write_bytes(encoded[: len(encoded) // 2])
    for name, shape in (("small", (20, 90)), ("zero", (9, 9)), ("alone", (40, 40)), ("sub/c", (61, 84))):
        savemat(M / f"{name}.mat", {"mat": np.zeros(shape, int)})
    opt = options(dataset_type="srmask", dataroot_H=folders.H, dataroot_L=folders.L, dataroot_H_mask=folders.M)
    problems = find_problems(opt)
    for name, why in {
        "alone.png": ": no image in dataroot_L",
        "ax4.png": " (20x14): not 1/4 of ",
        "small.png": " (90x20): smaller than H_size 32",
        "c.mat": " (84x61): not the size of ",
    }.items():
        assert sum(f"{name}{why}" in problem for problem in problems.wrong) == 1, (name, problems)
    for name, why in {"zero.png": " is empty", "bx4.png": " cannot be decoded"}.items():
        assert sum(f"{name}{why}" in problem for problem in problems.unreadable) == 1, (name, problems)
    assert (len(problems.wrong), len(problems.unreadable)) == (4, 2)
    with pytest.raises(UserError, match=r"^4 problems with the train images: .*") as error:
        check_dataset(opt)
    assert "\n" not in str(error.value)


def test_small_images_are_fine_to_test_on(tmp_path):
    root = photos(tmp_path / "H", 1, 16, 24)
    assert find_problems(options(phase="test", dataroot_H=root)).wrong == []
    assert len(find_problems(options(dataroot_H=root)).wrong) == 1


def damage(path):
    encoded = path.read_bytes()
    path.write_bytes(encoded[: len(encoded) // 2])


def test_a_file_that_cannot_be_read_is_named_and_stops_no_training(tmp_path, caplog):
    opt = options(dataroot_H=photos(tmp_path / "H"))
    damage(tmp_path / "H/1.png")
    dataset = define_Dataset(opt)
    check_dataset(opt)
    assert "1.png cannot be decoded" in caplog.text
    replaced, expected = dataset[1, 5], dataset[2, 5]
    assert replaced["H_path"].endswith("2.png")
    assert torch.equal(replaced["L"], expected["L"])


@pytest.mark.parametrize("dataset_type", ["sr", "l"])
def test_a_file_that_cannot_be_read_is_named_and_left_out_of_a_test_set(tmp_path, caplog, dataset_type):
    root = photos(tmp_path / "H")
    opt = options(phase="test", dataset_type=dataset_type, dataroot_H=root, dataroot_L=root, scale=1)
    damage(tmp_path / "H/1.png")
    dataset = define_Dataset(opt)
    assert [item["L_path"][-5:] for item in (dataset[0], dataset[1])] == ["0.png", "2.png"]
    assert len(dataset) == 2
    assert "1.png cannot be decoded" in caplog.text
    caplog.clear()
    check_dataset(opt)
    assert caplog.text == ""


def test_a_set_of_which_nothing_can_be_read_is_an_error(tmp_path):
    opt = options(dataroot_H=photos(tmp_path / "H", 2))
    for name in "01":
        damage(tmp_path / f"H/{name}.png")
    with pytest.raises(UserError, match=r"png cannot be decoded"):
        define_Dataset(opt)[0, 0]
    for phase in ("train", "test"):
        with pytest.raises(UserError, match=f"^none of the {phase} images can be read: 2 problems"):
            check_dataset(options(dataroot_H=str(tmp_path / "H"), phase=phase))
    with pytest.raises(UserError, match="none of the test images can be read"):
        define_Dataset(options(dataroot_H=str(tmp_path / "H"), phase="test"))


def test_several_L_of_one_H_are_items_of_their_own(folders):
    L = folders.path / "L"
    for version in ("00", "01"):
        (L / f"a+{version}.png").write_bytes((L / "ax4.png").read_bytes())
    (L / "ax4.png").unlink()
    dataset = define_Dataset(options(phase="test", dataroot_H=folders.H, dataroot_L=folders.L))
    assert [(item.H[-5:], item.L[-8:]) for item in dataset.files][:2] == [("a.png", "a+00.png"), ("a.png", "a+01.png")]
    assert len(dataset) == 4


def test_a_plus_that_belongs_to_the_name_is_kept(folders):
    for kind in "HL":
        (folders.path / kind / "a+b.png").write_bytes((folders.path / "H" / "a.png").read_bytes())
    (folders.path / "L" / "ax4.png").rename(folders.path / "L" / "a.png")
    dataset = define_Dataset(options(phase="test", dataroot_H=folders.H, dataroot_L=folders.L))
    assert [(item.H[-7:], item.L[-7:]) for item in dataset.files][:2] == [
        ("a+b.png", "a+b.png"),
        ("H/a.png", "L/a.png"),
    ]


# ------------------------------------------------------------------------------------------------------ walking folders


def put(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def found(root):
    return [Path(path).relative_to(root).as_posix() for path in get_image_paths(str(root))]


def test_hidden_files_and_those_of_systems_are_left_out(tmp_path):
    put(tmp_path, "a.png", "@user/b.png", "._a.png", ".ipynb_checkpoints/a.png", "@eaDir/a.png/thumb.jpg")
    put(tmp_path, "#recycle/a.png", "$RECYCLE.BIN/a.png", "System Volume Information/a.png", "__MACOSX/._a.png")
    put(tmp_path, "lost+found/a.png", "sub/.trash/a.png", "Thumbs.db", "sub/desktop.ini")
    assert found(tmp_path) == ["@user/b.png", "a.png"]
    put(tmp_path, ".mine/a.png")
    assert found(tmp_path / ".mine") == ["a.png"]


def test_links_are_followed_and_loops_of_links_end(tmp_path):
    root = tmp_path / "H"
    put(tmp_path, "H/a.png", "H/sub/b.png", "out/c.png", "beside.png")
    for link, target in (("H/sub/up", "H"), ("H/over", "."), ("H/0", "H/sub"), ("H/out", "out"), ("out/back", "H")):
        (tmp_path / link).symlink_to(tmp_path / target, target_is_directory=True)
    assert found(root) == ["a.png", "out/c.png", "sub/b.png"]


def test_files_of_other_kinds_are_counted_in_one_line(tmp_path, caplog):
    put(tmp_path, "a.png", "b.heic", "sub/c.HEIC", "d.cr2", "prepared.json")
    for _ in range(2):
        assert found(tmp_path) == ["a.png"]
    assert caplog.messages == [f"{tmp_path}: 3 files of other kinds were not read (.heic, .cr2)"]


def test_a_folder_that_cannot_be_opened_is_named(tmp_path, caplog, monkeypatch, capsys):
    put(tmp_path, "a.png", "shut/b.png")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert found(tmp_path) == ["a.png"]
    assert caplog.messages == [f"{tmp_path}: 1 folder cannot be read ({tmp_path / 'shut'}: Permission denied)"]


@pytest.mark.parametrize(
    ("suffix", "kind", "lossless"),
    [
        ("jfif", "JPEG", False),
        ("jpe", "JPEG", False),
        ("dib", "DIB", True),
        ("gif", "GIF", True),
        ("ppm", "PPM", True),
        ("pgm", "PPM", True),
        ("tga", "TGA", True),
        ("apng", "PNG", True),
        ("avif", "AVIF", False),
        ("jp2", "JPEG2000", True),
    ],
)
@pytest.mark.parametrize("without_opencv", [False, True])
def test_images_of_more_kinds_are_read(tmp_path, monkeypatch, suffix, kind, lossless, without_opencv):
    if f".{suffix}" not in IMAGE_SUFFIXES:
        pytest.skip(f"this Pillow cannot read {suffix}")
    if without_opencv and kind in ("JPEG", "PNG"):
        pytest.skip("every OpenCV reads it")
    image = photograph(40, 52, channels=1 if suffix == "pgm" else 3)
    path = tmp_path / f"a.{suffix}"
    source = Image.fromarray(image if suffix != "pgm" else image[..., 0])
    source = source.quantize(64) if suffix == "gif" else source
    source.save(path, format=kind, **({} if lossless else {"quality": 95, "subsampling": "4:4:4"}))
    if without_opencv:
        monkeypatch.setattr(cv2, "imdecode", lambda *_: None)
    shown = np.asarray(source.convert("RGB"))
    assert found(tmp_path) == [path.name]
    assert image_size(str(path)) == (40, 52)
    read = imread_uint(str(path))
    # losses at quality 95 are a level or two; swapped channels would be off by 50
    assert np.abs(read.astype(int) - shown).mean() <= (0 if lossless else 3)
    assert imread_uint(str(path), None).shape[2] == (1 if suffix == "pgm" else 3)
    assert imread_uint(str(path), 1).shape == (40, 52, 1)


def test_of_a_gif_the_first_frame_is_read_with_the_colours_below_what_is_transparent(tmp_path):
    first = Image.fromarray(photograph(20, 30)).quantize(16)
    first.save(tmp_path / "a.gif", transparency=3, save_all=True, append_images=[first.rotate(180)])
    np.testing.assert_array_equal(imread_uint(str(tmp_path / "a.gif")), np.asarray(first.convert("RGB")))


def test_new_kinds_are_read_but_not_written(tmp_path):
    with pytest.raises(UserError, match="no image format is called"):
        imsave(photograph(8, 8), str(tmp_path / "a.gif"))


def test_names_pair_however_accents_are_written():
    assert find_partners(["H/e\u0301te\u0301.png"], ["L/\u00e9t\u00e9x4.png"], 4) == [["L/\u00e9t\u00e9x4.png"]]
    # where both are there each has its own
    both = ["a/e\u0301.png", "a/\u00e9.png"]
    assert find_partners(both, both, 4) == [[path] for path in both]


def test_names_that_differ_in_case_are_two():
    assert find_partners(["H/a.png", "H/A.png"], ["L/A.png"], 4) == [[], ["L/A.png"]]


def test_files_that_stand_together_are_a_group(tmp_path):
    put(tmp_path, "x/a.png", "x/b.png", "y/c.png", "z/d.png")
    x, y = tmp_path / "x", tmp_path / "y"
    given = [f"{x}/a.png", f"{x}/b.png", f"{x}/b.png", f"{y}/c.png", "-", str(tmp_path / "z"), str(tmp_path / "z")]
    assert group_files(given) == [given[:2], given[3:4], ["-"], given[5:6], given[6:]]
