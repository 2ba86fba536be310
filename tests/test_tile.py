"""Whole images and tiles: utils/utils_tile.py."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.select_network import define_G
from utils.utils_error import UserError
from utils.utils_tile import restore

# The same sums in another order: a few units in the last place of float32 at values around 1.
TOLERANCE = 1e-5


class Enlarge(nn.Module):
    """Nearest-neighbour enlargement that remembers the sizes it was given."""

    def __init__(self, scale: int = 2) -> None:
        super().__init__()
        self.scale = scale
        self.sizes: list[tuple[int, int]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append((x.shape[-2], x.shape[-1]))
        return F.interpolate(x, scale_factor=self.scale)


def image(height: int, width: int, channels: int = 3) -> Tensor:
    return torch.rand(1, channels, height, width, generator=torch.Generator().manual_seed(0))


def small_network(scale: int = 4, nc: int = 3) -> nn.Module:
    """Its nc + 2 convolutions of 3 x 3 see nc + 2 pixels in each direction."""
    torch.manual_seed(0)
    return define_G({"scale": scale, "netG": {"net_type": "srvgg_compact", "nf": 8, "nc": nc}}).eval()


@pytest.mark.parametrize(("height", "width"), [(41, 67), (24, 90), (23, 25), (24, 24), (16, 100)])
def test_tiles_equal_the_whole_image_where_half_the_overlap_covers_the_receptive_field(height, width):
    netG, L = small_network(nc=3), image(height, width)
    whole, tiled = restore(netG, L, 4), restore(netG, L, 4, tile=24, tile_overlap=10)
    torch.testing.assert_close(tiled, whole, atol=TOLERANCE, rtol=0)


def test_tiles_differ_where_the_overlap_is_one_pixel_too_small():
    # Else the test above would not notice a seam.
    netG, L = small_network(nc=3), image(41, 67)
    difference = restore(netG, L, 4) - restore(netG, L, 4, tile=24, tile_overlap=8)
    assert difference.abs().max() > 10 * TOLERANCE


@pytest.mark.parametrize("multiple", [1, 4, 8])
@pytest.mark.parametrize(
    ("height", "width", "tile", "overlap"), [(510, 339, 256, 32), (50, 33, 16, 5), (10, 33, 16, 5), (257, 257, 256, 32)]
)
def test_tiles_share_the_work_evenly(height, width, tile, overlap, multiple):
    netG = Enlarge()
    netG.size_multiple = multiple
    restore(netG, image(height, width), 2, tile, overlap)
    assert len(set(netG.sizes)) == 1
    (side_y, side_x) = netG.sizes[0]
    assert max(side_y, side_x) <= tile
    assert (side_y % multiple, side_x % multiple) == (0, 0)
    overlap = -(-overlap // multiple) * multiple
    for size, side in ((height, side_y), (width, side_x)):
        if size > tile:
            padded = -(-size // multiple) * multiple
            n = -(-(padded - overlap) // (tile - overlap))  # as few as of full tiles
            assert 0 <= n * side - (n - 1) * overlap - padded < n * multiple


def test_equal_tiles_cost_a_quarter_more_than_the_image_where_full_ones_cost_more_than_twice_as_much():
    netG = Enlarge()
    restore(netG, image(510, 339), 2, 256, 32)
    assert sum(h * w for h, w in netG.sizes) / (510 * 339) < 1.25


def test_small_tiles_go_through_the_network_together_but_are_no_more_pixels_than_a_full_one():
    class Counts(Enlarge):
        def forward(self, x: Tensor) -> Tensor:
            shapes.append(tuple(x.shape))
            return super().forward(x)

    shapes: list[tuple[int, ...]] = []
    L = image(9, 100)
    assert torch.equal(restore(Counts(), L, 2, 32, 4), F.interpolate(L, scale_factor=2))
    # Four tiles of 9 x 28; as many of them as 32 x 32 has pixels, which is all four.
    assert shapes == [(4, 3, 9, 28)]
    shapes.clear()
    restore(Counts(), image(30, 100), 2, 32, 4)
    assert shapes == [(1, 3, 30, 28)] * 4


@pytest.mark.parametrize("tile", [0, 40])
def test_an_image_that_fits_goes_through_in_one_call(tile):
    netG = Enlarge()
    restore(netG, image(40, 31), 2, tile, 8)
    assert netG.sizes == [(40, 31)]


@pytest.mark.parametrize(("overlap", "tile"), [(0, 1), (0, 7), (1, 2), (6, 7)])
def test_no_pixel_is_lost_with_extreme_tiles(overlap, tile):
    L = image(9, 20)
    assert torch.equal(restore(Enlarge(3), L, 3, tile, overlap), F.interpolate(L, scale_factor=3))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (5, 3), (8, 8), (30, 17)])
@pytest.mark.parametrize("tile", [0, 16])
def test_sizes_are_extended_to_what_the_network_takes_and_cropped(height, width, tile):
    netG, L = Enlarge(), image(height, width)
    netG.size_multiple = 8
    assert torch.equal(restore(netG, L, 2, tile, 8), F.interpolate(L, scale_factor=2))
    assert all(h % 8 == 0 and w % 8 == 0 for h, w in netG.sizes)


def test_tiles_start_on_the_grid_of_a_network_that_folds_pixels():
    class Folded(nn.Module):
        size_multiple = 4

        def forward(self, x: Tensor) -> Tensor:
            coarse = F.avg_pool2d(x, 4)
            return F.interpolate(coarse, scale_factor=4)

    L = image(44, 61)
    whole, tiled = restore(Folded(), L, 1), restore(Folded(), L, 1, tile=18, tile_overlap=5)
    # The last block of a row is extended by reflection in both.
    torch.testing.assert_close(tiled, whole, atol=TOLERANCE, rtol=0)


def test_one_pixel_is_enough():
    assert restore(small_network(), image(1, 1), 4, tile=64).shape == (1, 3, 4, 4)


def test_batches_and_gray_images_keep_their_shape():
    L = torch.rand(2, 1, 30, 21)
    assert torch.equal(restore(Enlarge(), L, 2, 16, 4), F.interpolate(L, scale_factor=2))


def test_the_result_is_not_clamped_and_has_no_gradient():
    netG = nn.Conv2d(3, 3, 1)
    nn.init.constant_(netG.bias, 5.0)
    E = restore(netG, image(4, 4), 1)
    assert E.max() > 1
    assert not E.requires_grad


@pytest.mark.parametrize(
    ("tile", "overlap", "multiple"), [(32, 32, 1), (16, 32, 1), (36, 32, 8), (-1, 0, 1), (8, -1, 1)]
)
def test_tiles_that_do_not_exceed_their_overlap_are_refused(tile, overlap, multiple):
    netG = Enlarge()
    netG.size_multiple = multiple
    with pytest.raises(UserError, match="tile"):
        restore(netG, image(64, 64), 2, tile, overlap)


def test_a_network_of_another_scale_is_refused():
    with pytest.raises(ValueError, match="scale 4"):
        restore(Enlarge(2), image(5, 5), 4)


class Greedy(Enlarge):
    """Finds too little memory for more than so many pixels."""

    def __init__(self, error: Exception, most: int) -> None:
        super().__init__()
        self.error, self.most = error, most

    def forward(self, x: Tensor) -> Tensor:
        E = super().forward(x)
        if x[:, :1].numel() > self.most:
            raise self.error
        return E


def test_auto_takes_the_whole_image_where_the_memory_is_enough():
    netG = Enlarge()
    restore(netG, image(90, 70), 2, "auto", 8)
    assert netG.sizes == [(90, 70)]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("can't allocate memory"), MemoryError()]
)
def test_auto_halves_the_tile_where_the_memory_runs_out_says_so_once_and_remembers(error, caplog):
    netG, L = Greedy(error, 50 * 50), image(150, 120)
    for _ in range(2):
        assert torch.equal(restore(netG, L, 2, "auto", 8), F.interpolate(L, scale_factor=2))
    # The whole image and the first tile no larger than 75, then tiles of 37. The second image starts with those.
    assert sum(h * w > netG.most for h, w in netG.sizes) == 2
    assert len(caplog.messages) == 2
    assert "tiles of 37 from here on" in caplog.messages[-1]


def test_auto_gives_up_below_what_is_all_border_and_on_errors_of_another_kind():
    netG = Greedy(MemoryError(), 0)
    with pytest.raises(MemoryError):
        restore(netG, image(150, 120), 2, "auto", 8)
    assert min(map(max, netG.sizes)) >= 32
    netG = Greedy(RuntimeError("of another kind"), 0)
    with pytest.raises(RuntimeError, match="another kind"):
        restore(netG, image(150, 120), 2, "auto", 8)
    assert len(netG.sizes) == 1


def test_auto_on_the_cpu_keeps_to_half_of_the_free_memory(monkeypatch):
    monkeypatch.setattr("utils.utils_tile._free_memory", lambda: 2.0 * 12 * 64 * 4 * (2**2 + 16) * 50**2)
    netG, L = Enlarge(), image(150, 120)
    assert torch.equal(restore(netG, L, 2, "auto", 8), F.interpolate(L, scale_factor=2))
    assert max(max(size) for size in netG.sizes) <= 50 < max(L.shape)
    netG = Enlarge()
    restore(netG, image(50, 50), 2, "auto", 8)
    assert netG.sizes == [(50, 50)]


def test_auto_with_a_negative_overlap_is_refused():
    with pytest.raises(UserError, match="tile_overlap -1"):
        restore(Enlarge(), image(9, 9), 2, "auto", -1)
