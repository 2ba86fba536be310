"""The self-similarity loss for any layout in memory of what it is given: the numbers of a contiguous copy."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.conftest import photograph
from tests.test_ssl import CPP, CUDA, WHY_NO_CPP
from utils.utils_ssl import SelfSimilarityLoss, edge_mask, self_similarity_graph

needs_cpp = pytest.mark.skipif(WHY_NO_CPP is not None, reason=f"no C++ kernels: {WHY_NO_CPP}")
SIZES = 5, 3  # search area and window
SHAPES = [(2, 3, 9, 11), (1, 3, 10, 9), (2, 1, 9, 10)]
# Float64 differs by the order of sums. Float32 has 7 digits, of which differences of nearly equal graphs cost two. A
# misread layout is off by more than a tenth.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


def dims_in_memory(*order: int) -> Callable[[Tensor], Tensor]:
    """The outermost dimension in memory first."""
    back = [order.index(dim) for dim in range(len(order))]
    return lambda x: x.permute(order).contiguous().permute(back)


def sliced(x: Tensor) -> Tensor:
    """Every other row, every third column and inner channels of something larger, which holds NaN."""
    larger = x.new_full([size * step + 3 for size, step in zip(x.shape, (1, 1, 2, 3), strict=False)], float("nan"))
    view = larger[tuple(slice(2, 2 + n * s, s) for n, s in zip(x.shape, (1, 1, 2, 3), strict=False))]
    assert view.storage_offset() > 0
    return view.copy_(x)


def negated(x: Tensor) -> Tensor:
    """Numbers that PyTorch has only promised to negate, each second one of its memory."""
    view = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert view.is_neg()
    return view


# Those that expand change the numbers too: they are equal along a dimension.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "permuted HWC": lambda x: torch.cat([x.permute(0, 2, 3, 1)], 1).permute(0, 3, 1, 2),
    "one permuted HWC": lambda x: x[0].permute(1, 2, 0).contiguous().permute(2, 0, 1)[None].expand_as(x),
    "transposed": dims_in_memory(0, 1, 3, 2),
    "images innermost": dims_in_memory(3, 1, 2, 0),
    "channels outermost": dims_in_memory(1, 0, 2, 3),
    "sliced": sliced,
    "expanded channels": lambda x: x[:, :1].expand_as(x),
    "expanded images": lambda x: x[:1].expand_as(x),
    "expanded rows": lambda x: x[:, :, 4:5].expand_as(x),
    "negated": negated,
}
GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {  # of distances, (M, k, k)
    "contiguous": lambda x: x,
    "pixels innermost": dims_in_memory(1, 2, 0),
    "transposed": dims_in_memory(0, 2, 1),
    "sliced": sliced,
    "expanded": lambda x: x[:1, :1, :1].expand_as(x),
    "expanded pixels": lambda x: x[:1].expand_as(x),
    "negated": negated,
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
every_form = pytest.mark.parametrize("mode", ["pytorch", "boxsum", CPP, CUDA])
both_borders = pytest.mark.parametrize("border", ["zero", "image"])
both_types = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def example(shape: tuple[int, ...], dtype: torch.dtype, mode: str = "cpp") -> tuple[Tensor, Tensor, Tensor]:
    """sr, hr and a mask of every third pixel or so, contiguous, where the form can work on them."""
    rng = torch.Generator().manual_seed(sum(shape))
    hr = torch.rand(shape, generator=rng, dtype=torch.float64)
    sr = hr + 0.1 * torch.randn(shape, generator=rng, dtype=torch.float64)
    mask = torch.rand(shape[0], 1, *shape[2:], generator=rng) < 0.3
    device = "cuda" if mode == "cuda" else "cpu"
    sr, hr, mask = (x.to(device, dtype) for x in (sr, hr, mask))
    return sr, hr, mask


def specified(x: Tensor) -> Tensor:
    """What the specification is computed on: a contiguous float64 copy on the CPU."""
    return x.detach().to("cpu", torch.float64).clone(memory_format=torch.contiguous_format).resolve_neg()


def assert_equal(ours: Tensor, right: Tensor, dtype: torch.dtype) -> None:
    """Up to TOLERANCE of the largest number."""
    scale = right.abs().max().item()
    torch.testing.assert_close(ours.detach().cpu().double(), right.detach(), rtol=0, atol=TOLERANCE[dtype] * scale)


@both_types
@both_borders
@every_form
@every_layout
def test_loss_and_gradient_are_those_of_contiguous_copies(layout, mode, border, dtype):
    for shape in SHAPES:
        for role in ("sr", "hr", "mask") if shape is SHAPES[0] else ("all",):
            given = dict(zip(("sr", "hr", "mask"), example(shape, dtype, mode), strict=True))
            given |= {name: LAYOUTS[layout](x) for name, x in given.items() if role in (name, "all")}
            results = []
            for inputs, form in ((given, mode), ({name: specified(x) for name, x in given.items()}, "pytorch")):
                sr = inputs["sr"].detach().requires_grad_()
                loss = SelfSimilarityLoss(300, 700, *SIZES, sigma=0.1, ssl_mode=form, search_border=border)
                parts = loss.parts(sr, inputs["hr"], inputs["mask"])
                results.append((torch.stack(parts), torch.autograd.grad(2.5 * parts[0], sr)[0]))
            for ours, right in zip(*results, strict=True):
                assert_equal(ours, right, dtype)


@both_types
@both_borders
@every_form
@every_layout
def test_graph_and_gradient_are_those_of_contiguous_copies(layout, mode, border, dtype):
    for shape in SHAPES:
        for role in ("img", "mask"):
            img, _, mask = example(shape, dtype, mode)
            img, mask = (LAYOUTS[layout](img), mask) if role == "img" else (img, LAYOUTS[layout](mask))
            results = []
            for x, where, form in ((img, mask, mode), (specified(img), specified(mask), "pytorch")):
                x = x.detach().requires_grad_()
                graph = self_similarity_graph(x, where, *SIZES, sigma=0.1, ssl_mode=form, search_border=border)
                upstream = torch.rand(graph.shape, generator=torch.Generator().manual_seed(3)).to(graph)
                results.append((graph, torch.autograd.grad(graph, x, upstream)[0]))
            for ours, right in zip(*results, strict=True):
                assert_equal(ours, right, dtype)


@both_types
@both_borders
@pytest.mark.parametrize("mode", [CPP, CUDA])
@pytest.mark.parametrize("layout", GRADIENTS)
def test_distances_take_any_layout_of_the_incoming_gradient_and_of_the_places(layout, mode, border, dtype):
    """A gradient of .sum() is expanded, places that come from a table are its columns."""
    for shape in SHAPES:
        img, _, mask = example(shape, dtype, mode)
        places = mask[:, 0].nonzero(as_tuple=True)
        table = torch.stack(places, 1)
        results = []
        for x, where in ((img, table.unbind(1)), (img.double(), places)):
            x = x.detach().requires_grad_()
            distances = torch.ops.similarity.distances(x, *where, *SIZES, border == "zero")
            upstream = torch.rand(distances.shape, generator=torch.Generator().manual_seed(3)).to(distances)
            upstream = GRADIENTS[layout](upstream) if where is not places else specified(GRADIENTS[layout](upstream))
            results.append((distances, torch.autograd.grad(distances, x, upstream.to(img.device))[0].cpu()))
        for ours, right in zip(*results, strict=True):
            assert_equal(ours, right.cpu(), dtype)


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "expanded channels", "transposed"])
@pytest.mark.parametrize("mode", [CPP, CUDA])
def test_operators_give_contiguous_results_and_tell_the_compiler_so(layout, mode):
    sr, hr, mask = (LAYOUTS[layout](x) for x in example((2, 3, 9, 11), torch.float32, mode))
    places = mask[:, 0].nonzero().unbind(1)
    sr = sr.detach().requires_grad_()
    settings = (*SIZES, True, 0.1, True, 1.0, 1.0)
    upstream = GRADIENTS["pixels innermost"](torch.rand(len(places[0]), 5, 5, device=sr.device))
    calls = [
        (torch.ops.similarity.distances, (sr, *places, *SIZES, True)),
        (torch.ops.similarity.distances_backward, (upstream, sr.detach(), *places, *SIZES, True)),
        (torch.ops.similarity.loss, (sr, hr, mask, *settings, True)),
        (torch.ops.similarity.loss, (sr.detach(), hr, mask, *settings, False)),
        (torch.ops.similarity.loss, (sr, hr, torch.zeros_like(mask), *settings, True)),
    ]
    for operator, arguments in calls:
        results = operator(*arguments)
        for result in results if isinstance(results, tuple) else [results]:
            assert result.stride() == torch.empty(result.shape).stride()
        torch.library.opcheck(operator.default, arguments)


@needs_cpp
@pytest.mark.parametrize("layout", ["channels_last", "sliced", "expanded images"])
def test_torch_compile_changes_no_bit_for_any_layout(layout):
    loss = SelfSimilarityLoss(1000, 1000, *SIZES, sigma=0.1, mask_stride=2)
    results = []
    for module in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        sr, hr, mask = (LAYOUTS[layout](x) for x in example((2, 3, 9, 11), torch.float32))
        value = module(sr.detach().requires_grad_(), hr, mask)
        value.backward()
        results.append(value)
    assert results[0] == results[1] != 0


@every_form
@pytest.mark.parametrize("plug_in", [lambda x: x.permute(2, 0, 1)[None], lambda x: x[None].permute(0, 3, 1, 2)])
def test_a_photograph_from_numpy_has_no_loss_against_itself(plug_in, mode):
    """The two ways of writing it give other strides."""
    hwc = plug_in(torch.from_numpy(photograph(40, 36)).to("cuda" if mode == "cuda" else "cpu")) / 255
    loss = SelfSimilarityLoss(1000, 1000, 9, 3, ssl_mode=mode)
    assert edge_mask(hwc).sum() > 100
    for one, other in ((hwc, hwc.contiguous()), (hwc.contiguous(), hwc)):
        assert loss(one, other) < 1e-5  # PyTorch's sums follow the memory: float32 rounding
    assert loss(hwc.flip(3), hwc) > 1


@every_layout
def test_edge_masks_are_those_of_contiguous_copies(layout):
    for shape in SHAPES:
        if shape[1] in (1, 3):
            img = LAYOUTS[layout](example(shape, torch.float32)[1])
            right = edge_mask(specified(img))
            assert torch.equal(edge_mask(img), right)
            assert 0 < right.sum() < right.numel()
