"""Published architectures by way of spandrel: trained with SSL, saved, and loaded again by spandrel and by us."""

import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from spandrel import ModelLoader
from spandrel.architectures.ATD import ATD
from spandrel.architectures.Compact import Compact
from spandrel.architectures.DAT import DAT
from spandrel.architectures.ESRGAN import ESRGAN
from spandrel.architectures.HAT import HAT
from spandrel.architectures.OmniSR import OmniSR
from spandrel.architectures.PLKSR import RealPLKSR
from spandrel.architectures.RCAN import RCAN
from spandrel.architectures.SAFMN import SAFMN
from spandrel.architectures.SPAN import SPAN
from spandrel.architectures.SwinIR import SwinIR
from torch import Tensor, nn

from main_test import main as main_test
from models.network_infer import infer_netG
from models.network_rrdbnet import RRDBNetBasicSR
from models.network_spandrel import SpandrelNetwork
from models.restorer import Restorer, load_restorer
from models.select_network import define_G
from tests.conftest import REPOSITORY
from tests.training import SSL, Workplace, assert_same
from utils.utils_checkpoint import load_network, load_state_dict, save_network
from utils.utils_error import UserError
from utils.utils_option import parse
from utils.utils_spandrel import describe_weights
from utils.utils_tile import restore

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # torch about the networks' code

# As small as lets spandrel tell the network from its shapes; all enlarge by 2.
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ATD": lambda: ATD(
        embed_dim=12,
        depths=(2,),
        num_heads=(2,),
        window_size=4,
        num_tokens=8,
        reducted_dim=4,
        upscale=2,
        upsampler="pixelshuffle",
    ),
    "Compact": lambda: Compact(num_in_ch=3, num_out_ch=3, num_feat=8, num_conv=2, upscale=2),
    "DAT": lambda: DAT(embed_dim=32, depth=[3], num_heads=[2], expansion_factor=2.0, upscale=2),
    "ESRGAN": lambda: ESRGAN(num_filters=8, num_blocks=1, scale=2),
    "HAT": lambda: HAT(
        embed_dim=12, depths=(2,), num_heads=(2,), window_size=4, squeeze_factor=4, mlp_ratio=2.0, upscale=2
    ),
    "OmniSR": lambda: OmniSR(num_feat=16, up_scale=2),
    "RCAN": lambda: RCAN(scale=2, n_resgroups=1, n_resblocks=1, n_feats=16, reduction=4),
    "RealPLKSR": lambda: RealPLKSR(dim=16, n_blocks=2, upscaling_factor=2, kernel_size=5),
    "SAFMN": lambda: SAFMN(dim=16, n_blocks=1, upscaling_factor=2),
    "SPAN": lambda: SPAN(num_in_ch=3, num_out_ch=3, feature_channels=8, upscale=2),
    "SwinIR": lambda: SwinIR(
        img_size=16, embed_dim=12, depths=[2], num_heads=[2], window_size=4, upscale=2, upsampler="pixelshuffle"
    ),
}


def published(name: str, folder: Path) -> Path:
    """A checkpoint of random weights as its authors would publish it."""
    torch.manual_seed(3)
    path = folder / f"{name}.pth"
    torch.save({"params_ema": NETWORKS[name]().state_dict()}, path)
    return path


def overrides(path: Path | str, *more: str) -> list[str]:
    netG = ("scale=2", 'netG={"net_type": "spandrel"}', f"path.pretrained_netG={path}")
    return [*netG, *SSL, "train.F_lossfn_weight=0", *more]


def restorer(path: Path | str) -> Restorer:
    return load_restorer(str(path), 2, None, torch.device("cpu"))


def image() -> Tensor:
    """No size that a window or a pyramid divides, and smaller than what some take."""
    return torch.rand(1, 3, 13, 19, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("place"))


@pytest.mark.parametrize("name", NETWORKS)
def test_two_steps_with_ssl_are_saved_so_that_spandrel_and_we_load_them_alike(name, place, tmp_path):
    before = published(name, tmp_path)
    # Written out: in another layout convolutions add in another order.
    model = place.model(*overrides(before, "train.E_decay=0.5", "train.channels_last=false"))
    for step in (1, 2):
        batch = place.batch(*overrides(before), number=step)
        model.feed_data({name: images.clone() for name, images in batch.items()})
        model.optimize_parameters(step)
        assert torch.equal(model.L, batch["L"])
        assert model.current_log()["ssl"] > 0
        model.test()  # between two steps, as validation is: it must leave the networks trainable
    # Distributed training waits for the gradient of every parameter that asks for one.
    assert all(p.grad is not None for p in model.netG.parameters() if p.requires_grad)
    model.save(tmp_path, 2)

    first, trained = load_state_dict(before), load_state_dict(tmp_path / "2_G.pth")
    assert first.keys() <= describe_weights(first).model.state_dict().keys() == trained.keys()
    assert any(not torch.equal(first[key], trained[key]) for key in first)
    for file in ("2_G.pth", "2_E.pth"):
        theirs = ModelLoader().load_from_file(tmp_path / file)
        ours = restorer(tmp_path / file)
        assert (theirs.scale, theirs.input_channels) == (ours.scale, ours.n_channels) == (2, 3)
        # Where our own network of that architecture computes it, the order of the operations may differ, in single
        # precision, on values of about 1.
        tolerance = 0.0 if isinstance(ours.netG, SpandrelNetwork) else 1e-5
        E = restore(ours.netG, image(), 2)
        torch.testing.assert_close(E.clamp(0, 1), theirs(image()), rtol=0, atol=tolerance)
    network = define_G({"scale": 2, "netG": {"net_type": "spandrel", "path": str(tmp_path / "2_E.pth")}}).eval()
    assert model.netE is not None
    torch.testing.assert_close(restore(network, image(), 2), restore(model.netE, image(), 2), rtol=0, atol=0)


def test_a_run_resumes_without_the_file_it_began_with_bit_for_bit_and_is_tested(tmp_path):
    test_set = [f'datasets={{"test": {{"dataset_type": "sr", "dataroot_H": "{tmp_path / "T"}"}}}}']
    place = Workplace(tmp_path)
    original = published("HAT", tmp_path)
    place.run(*overrides(original, "task=whole", "train.iterations=2"))
    place.run(*overrides(original, "task=halves", "train.iterations=1"))
    original.unlink()
    place.run(*overrides(original, "task=halves", "train.iterations=2"))
    assert "resumed at step 1" in place.log("halves")
    assert_same(place.saved(2, "halves"), place.saved(2, "whole"))
    main_test(["--model_path", str(place.folder("halves")), "--gt", str(tmp_path / "T"), "--tile", "40"])
    assert (place.folder("halves") / "results" / "results.csv").is_file()
    run = f"path.pretrained_netG={place.folder('halves')}"
    main_test(["--opt", str(REPOSITORY / "options" / "test_spandrel.json"), run, f"path.root={tmp_path}", *test_set])
    assert (tmp_path / "test_spandrel" / "results" / "results.csv").is_file()
    # The saved options can be given again, for another beginning too.
    [saved, *_] = sorted((place.folder("whole") / "options").glob("*.json"))
    assert parse(saved, overrides=["path.pretrained_netG=other.pth", "task=new"]).netG.path == "other.pth"


def test_spans_merged_kernels_in_the_file_are_those_of_its_weights(place, tmp_path):
    before = published("SPAN", tmp_path)
    model = place.model(*overrides(before))
    model.feed_data(place.batch(*overrides(before)))
    model.optimize_parameters(1)
    model.save(tmp_path, 1)
    for file in ("1_G.pth", "1_E.pth"):
        saved = load_state_dict(tmp_path / file)
        found = describe_weights(saved)
        found(image())  # merges them anew
        key = "block_1.c1_r.eval_conv.weight"
        # Products of three kernels, summed in an order that the number of threads decides.
        torch.testing.assert_close(found.model.state_dict()[key], saved[key], rtol=1e-5, atol=1e-7)


def test_other_names_of_an_architecture_are_translated_as_spandrel_does(tmp_path):
    basicsr = RRDBNetBasicSR(3, 3, 8, 1, 32, 4)  # spandrel renames them to old ESRGAN's
    save_network(basicsr, tmp_path / "basicsr.pth")
    network = define_G({"scale": 4, "netG": {"net_type": "spandrel", "path": str(tmp_path / "basicsr.pth")}})
    report = load_network(tmp_path / "basicsr.pth", network)
    assert report.complete
    assert report.total == len(basicsr.state_dict())
    # The same operations on the same numbers, in an order that torch may choose.
    torch.testing.assert_close(network(image()), basicsr(image()), rtol=1e-5, atol=1e-6)


def test_a_checkpoint_of_no_network_of_ours_is_left_to_spandrel(tmp_path):
    found = infer_netG(load_state_dict(published("OmniSR", tmp_path)))
    assert found == {"scale": 2, "n_channels": 3, "is_train": False, "netG": {"net_type": "spandrel"}}
    with pytest.raises(UserError, match="scale 4 contradicts the weights, which are made for scale 2"):
        infer_netG(load_state_dict(tmp_path / "OmniSR.pth"), scale=4)


def test_scale_and_channels_that_the_options_leave_open_are_the_checkpoints(tmp_path):
    file = tmp_path / "options.json"
    dataset = {"dataset_type": "sr", "dataroot_H": str(tmp_path), "H_size": 64}
    path = {"root": str(tmp_path), "pretrained_netG": str(published("SPAN", tmp_path))}
    file.write_text(
        json.dumps({"task": "t", "netG": {"net_type": "spandrel"}, "path": path, "datasets": {"train": dataset}})
    )
    opt = parse(file)
    assert (opt.scale, opt.n_channels) == (2, 3)
    assert opt.train_set is not None
    assert opt.train_set.scale == 2
    assert parse(file, overrides=["scale=4"]).scale == 4  # what is stated is checked when the network is built


def test_tiles_begin_at_the_networks_multiples_and_small_images_pass(tmp_path):
    path = published("SAFMN", tmp_path)
    network = restorer(path).netG
    assert network.size_multiple == 8
    assert restore(network, torch.rand(1, 3, 37, 41), 2, tile=24, tile_overlap=8).shape == (1, 3, 74, 82)
    assert restore(network, torch.rand(1, 3, 1, 1), 2).shape == (1, 3, 2, 2)
    tiny = image()[..., :3, :2]  # the mirror is used up before the size is reached
    direct = network(tiny).clamp(0, 1)
    torch.testing.assert_close(direct, ModelLoader().load_from_file(path)(tiny), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["path.pretrained_netG=null"], "path.pretrained_netG: is required for net_type spandrel"),
        (["path.pretrained_netG=gone.pth"], "gone.pth: no such file"),
        (["scale=4", "datasets.train.H_size=64"], r"scale: .*HAT\.pth holds HAT for scale 2, not 4; set scale to 2"),
        (["n_channels=1"], "n_channels: .* holds HAT for 3 channels, not 1"),
        (
            ["datasets.train.H_size=24"],
            "H_size: HAT takes patches of L of at least 16 pixels and multiples of 1, not 12; the next .* H_size 32",
        ),
        (['netG={"net_type": "spandrel", "path": "x.pth"}'], r"netG.path: x.pth contradicts .*HAT\.pth; remove it"),
        (["path.pretrained_netG={folder}/unknown.pth"], r"unknown\.pth: spandrel knows no network .*called gamma"),
        (["path.pretrained_netG={folder}/code.pth"], "refused"),
    ],
)
def test_what_cannot_be_trained_is_one_line(change, message, place, tmp_path):
    path = published("HAT", tmp_path)
    torch.save({"gamma": torch.zeros(2)}, tmp_path / "unknown.pth")
    (tmp_path / "code.pth").write_bytes(pickle.dumps({"a": print}))
    with pytest.raises(UserError, match=message) as error:
        place.model(*overrides(path, *(text.replace("{folder}", str(tmp_path)) for text in change)))
    assert "\n" not in str(error.value)


def test_without_spandrel_the_install_command_is_named(place, tmp_path, monkeypatch):
    path = published("HAT", tmp_path)
    monkeypatch.setitem(sys.modules, "spandrel", None)  # what import then finds
    for use in (lambda: place.model(*overrides(path)), lambda: restorer(path)):
        with pytest.raises(UserError, match=r"pip install -r requirements-extra\.txt"):
            use()
