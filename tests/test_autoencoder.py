"""The autoencoders of diffusion: published weights compute what they should, gradients pass, mistakes end in a line."""

import builtins
import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from main_test import main as main_test
from models.autoencoder import KLAutoencoder, PixelSpace, VQAutoencoder, define_autoencoder, vq_in_diffusers_names
from models.select_network import define_G
from tests.conftest import photograph
from tests.test_strangers import TRAPS, Trap
from tests.tiny_sd import write_tiny_sd
from utils.utils_error import UserError
from utils.utils_image import imread_uint, imsave
from utils.utils_option import network_options

pytest.importorskip("diffusers", reason="diffusers is an extra requirement")

CH, MULT, CODES = 32, (1, 2, 2), 64
# Two float32 orders of the same sums, a few times 1e-7 each, through some thirty layers.
REORDERED = {"rtol": 1e-4, "atol": 1e-5}


def is_near(found: Tensor, expected: Tensor) -> bool:
    """As REORDERED, beside the largest value: sums that cancel keep the errors of their terms."""
    return float((found - expected).abs().max()) < 1e-4 * float(expected.abs().max())


# ------------------------------------------------- VQ-f4 under its published names, as the papers and the spec describe


class PublishedBlock(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(32, before, eps=1e-6), nn.Conv2d(before, after, 3, 1, 1)
        self.norm2, self.conv2 = nn.GroupNorm(32, after, eps=1e-6), nn.Conv2d(after, after, 3, 1, 1)
        if before != after:
            self.nin_shortcut = nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class PublishedAttention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.q, self.k, self.v))
        weights = (q.mT @ k / q.shape[1] ** 0.5).softmax(-1)
        return x + self.proj_out((v @ weights.mT).view_as(x))


def middle(channels: int) -> nn.ModuleDict:
    parts = {"block_1": PublishedBlock(channels, channels), "attn_1": PublishedAttention(channels)}
    return nn.ModuleDict({**parts, "block_2": PublishedBlock(channels, channels)})


def through(mid: nn.ModuleDict, h: Tensor) -> Tensor:
    return mid["block_2"](mid["attn_1"](mid["block_1"](h)))


class PublishedEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, CH, 3, 1, 1)
        self.down = nn.ModuleList()
        width = CH
        for level, mult in enumerate(MULT):
            blocks = nn.ModuleList([PublishedBlock(width, mult * CH), PublishedBlock(mult * CH, mult * CH)])
            width = mult * CH
            part = nn.ModuleDict({"block": blocks})
            if level < len(MULT) - 1:
                part["downsample"] = nn.ModuleDict({"conv": nn.Conv2d(width, width, 3, 2, 0)})
            self.down.append(part)
        self.mid = middle(width)
        self.norm_out, self.conv_out = nn.GroupNorm(32, width, eps=1e-6), nn.Conv2d(width, 3, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for part in self.down:
            for block in part["block"]:
                h = block(h)
            if "downsample" in part:
                h = part["downsample"]["conv"](F.pad(h, (0, 1, 0, 1)))
        return self.conv_out(F.silu(self.norm_out(through(self.mid, h))))


class PublishedDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        width = MULT[-1] * CH
        self.conv_in = nn.Conv2d(3, width, 3, 1, 1)
        self.mid = middle(width)
        parts = []
        for level in range(len(MULT) - 1, -1, -1):
            blocks = [PublishedBlock(width if n == 0 else MULT[level] * CH, MULT[level] * CH) for n in range(3)]
            width = MULT[level] * CH
            part = nn.ModuleDict({"block": nn.ModuleList(blocks)})
            if level:
                part["upsample"] = nn.ModuleDict({"conv": nn.Conv2d(width, width, 3, 1, 1)})
            parts.insert(0, part)
        self.up = nn.ModuleList(parts)
        self.norm_out, self.conv_out = nn.GroupNorm(32, width, eps=1e-6), nn.Conv2d(width, 3, 3, 1, 1)

    def forward(self, z: Tensor) -> Tensor:
        h = through(self.mid, self.conv_in(z))
        for part in reversed(self.up):
            for block in part["block"]:
                h = block(h)
            if "upsample" in part:
                h = part["upsample"]["conv"](h.repeat_interleave(2, 2).repeat_interleave(2, 3))
        return self.conv_out(F.silu(self.norm_out(h)))


class PublishedVQ(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder = PublishedEncoder(), PublishedDecoder()
        self.quantize = nn.ModuleDict({"embedding": nn.Embedding(CODES, 3)})
        self.quant_conv, self.post_quant_conv = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        for parameter in self.parameters():  # norms that do nothing would hide each other's place
            nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.1)
        nn.init.normal_(self.quantize["embedding"].weight)

    def encode(self, image: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(image))

    def nearest(self, latent: Tensor) -> Tensor:
        codes = self.quantize["embedding"].weight
        distance = (latent[:, None] - codes[None, :, :, None, None]).square().sum(2)
        return codes[distance.argmin(1)].permute(0, 3, 1, 2)

    def decode(self, latent: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(self.nearest(latent)))


@pytest.fixture(scope="module")
def published() -> PublishedVQ:
    return PublishedVQ().eval()


@pytest.fixture(scope="module")
def vq_file(published: PublishedVQ, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As a training of latent diffusion stores it: under a key, with what else was trained, and an average's names."""
    others = {"loss.discriminator.main.0.weight": torch.ones(2), "model_ema.decay": torch.ones(())}
    path = tmp_path_factory.mktemp("vq") / "autoencoder_vq_f4.pth"
    torch.save({"state_dict": {**published.state_dict(), **others}}, path)
    return path


@pytest.fixture(scope="module")
def vq(vq_file: Path) -> VQAutoencoder:
    return VQAutoencoder(str(vq_file))


@pytest.fixture(scope="module")
def sd_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_sd(tmp_path_factory.mktemp("sd") / "tiny", factor=8)


def image(height: int = 8, width: int = 16) -> Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def latent(height: int = 2, width: int = 4, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(2))


# --------------------------------------------------------------------------------------------------------------- pixels


def test_pixel_space_is_the_image() -> None:
    space = define_autoencoder(network_options({"n_channels": 1}))
    assert isinstance(space, PixelSpace)
    assert (space.factor, space.channels, list(space.parameters())) == (1, 1, [])
    assert space.decode(space.encode(image())).equal(image())


# ------------------------------------------------------------------------------------------------------------------- VQ


@torch.no_grad()
def test_published_vq_weights_encode_and_decode_as_published(published: PublishedVQ, vq: VQAutoencoder) -> None:
    assert (vq.factor, vq.channels) == (4, 3)
    assert is_near(vq.encode(image()), published.encode(image()))
    assert is_near(vq.decode(latent()), published.decode(latent()))
    assert published.decode(latent()).std() > 0.01  # there is something to compare


def test_vq_f4_of_published_size_has_every_published_name() -> None:
    # Written out from the description of VQ-f4: 128, 256, 512 features, two blocks a level, three on the way up.
    from diffusers import VQModel

    def conv(name: str, before: int, after: int, side: int) -> dict[str, list[int]]:
        return {f"{name}.weight": [after, before, side, side], f"{name}.bias": [after]}

    def norm(name: str, width: int) -> dict[str, list[int]]:
        return {f"{name}.weight": [width], f"{name}.bias": [width]}

    def block(name: str, before: int, after: int) -> dict[str, list[int]]:
        shortcut = conv(f"{name}.nin_shortcut", before, after, 1) if before != after else {}
        second = norm(f"{name}.norm2", after) | conv(f"{name}.conv2", after, after, 3) | shortcut
        return norm(f"{name}.norm1", before) | conv(f"{name}.conv1", before, after, 3) | second

    def mid(name: str) -> dict[str, list[int]]:
        shapes = (
            block(f"{name}.block_1", 512, 512) | block(f"{name}.block_2", 512, 512) | norm(f"{name}.attn_1.norm", 512)
        )
        for layer in ("q", "k", "v", "proj_out"):
            shapes |= conv(f"{name}.attn_1.{layer}", 512, 512, 1)
        return shapes

    widths = (128, 256, 512)
    shapes = conv("quant_conv", 3, 3, 1) | conv("post_quant_conv", 3, 3, 1) | {"quantize.embedding.weight": [8192, 3]}
    for part in ("encoder", "decoder"):
        shapes |= mid(f"{part}.mid")
    shapes |= conv("encoder.conv_in", 3, 128, 3) | norm("encoder.norm_out", 512) | conv("encoder.conv_out", 512, 3, 3)
    shapes |= conv("decoder.conv_in", 3, 512, 3) | norm("decoder.norm_out", 128) | conv("decoder.conv_out", 128, 3, 3)
    for level, width in enumerate(widths):
        for n in range(2):
            shapes |= block(f"encoder.down.{level}.block.{n}", widths[max(level - 1, 0)] if n == 0 else width, width)
        for n in range(3):
            shapes |= block(f"decoder.up.{level}.block.{n}", widths[min(level + 1, 2)] if n == 0 else width, width)
        if level < 2:
            shapes |= conv(f"encoder.down.{level}.downsample.conv", width, width, 3)
        if level > 0:
            shapes |= conv(f"decoder.up.{level}.upsample.conv", width, width, 3)
    with torch.device("meta"):
        weights = vq_in_diffusers_names({name: torch.empty(shape) for name, shape in shapes.items()})
        model = VQModel(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=widths,
            layers_per_block=2,
            num_vq_embeddings=8192,
        )
    expected = {name: value.shape for name, value in model.state_dict().items()}
    assert {name: value.shape for name, value in weights.items()} == expected


@torch.no_grad()
@pytest.mark.parametrize("layout", ["safetensors", "pth", "folder", "subfolder"])
def test_a_vq_autoencoder_in_the_layout_of_diffusers_loads_too(layout: str, vq: VQAutoencoder, tmp_path: Path) -> None:
    place = tmp_path / "vqvae" if layout == "subfolder" else tmp_path
    vq.model.save_pretrained(place)
    path = tmp_path
    if layout == "safetensors":
        path = tmp_path / "diffusion_pytorch_model.safetensors"
    elif layout == "pth":
        path = tmp_path / "vq.pth"
        torch.save(vq.model.state_dict(), path)
    loaded = VQAutoencoder(str(path))
    assert loaded.encode(image()).equal(vq.encode(image()))
    assert loaded.decode(latent()).equal(vq.decode(latent()))


def test_decoding_takes_the_nearest_code(vq: VQAutoencoder) -> None:
    codes = vq.model.quantize.embedding.weight
    chosen = torch.arange(8).view(1, 2, 4)
    exact = codes[chosen].permute(0, 3, 1, 2)
    # A nudge that is small beside the distance between any two codes.
    nudge = 0.1 * torch.pdist(codes).min() * torch.randn(exact.shape).clamp(-1, 1)
    torch.testing.assert_close(vq.decode(exact + nudge), vq.decode(exact), **REORDERED)


def test_the_nearest_codes_are_found_piece_by_piece(
    vq: VQAutoencoder, published: PublishedVQ, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.autoencoder._CODES_AT_ONCE", 5)
    assert vq._nearest(latent()).equal(published.nearest(latent()))


@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_the_gradient_goes_straight_through_the_codebook(
    use_checkpoint: bool, published: PublishedVQ, vq_file: Path
) -> None:
    vq = VQAutoencoder(str(vq_file), use_checkpoint=use_checkpoint)
    given = latent().requires_grad_()
    vq.decode(given).square().sum().backward()
    # What reaches the latent is the decoder's gradient at the nearest codes, as if these had been given.
    codes = published.nearest(latent()).detach().requires_grad_()
    published.decoder(published.post_quant_conv(codes)).square().sum().backward()
    assert is_near(given.grad, codes.grad)
    assert all(p.grad is None and not p.requires_grad for p in vq.parameters())


# ------------------------------------------------------------------------------------------------------------------- KL


@torch.no_grad()
def test_a_kl_autoencoder_scales_the_posterior(sd_folder: Path) -> None:
    from diffusers import AutoencoderKL

    kl, model = KLAutoencoder(str(sd_folder)), AutoencoderKL.from_pretrained(sd_folder / "vae").eval()
    assert (kl.factor, kl.channels, kl.scaling_factor) == (8, 4, 0.18215)
    posterior, noise = model.encode(image()).latent_dist, latent(1, 2, 4)
    torch.testing.assert_close(kl.encode(image()), 0.18215 * posterior.mean)
    torch.testing.assert_close(kl.encode(image(), noise), 0.18215 * (posterior.mean + posterior.std * noise))
    torch.testing.assert_close(kl.encode(3 * image()), kl.encode((3 * image()).clamp(-1, 1)))
    torch.testing.assert_close(kl.decode(0.18215 * noise), model.decode(noise).sample, **REORDERED)


@torch.no_grad()
def test_a_kl_autoencoder_takes_scale_and_shift_of_its_settings(sd_folder: Path) -> None:
    from diffusers import AutoencoderKL

    kl = KLAutoencoder(str(sd_folder / "vae"))
    plain = kl.encode(image()) / 0.18215
    folder = sd_folder.parent / "shifted"
    AutoencoderKL.from_pretrained(sd_folder / "vae").save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text()) | {"scaling_factor": 1.5, "shift_factor": 0.06}
    (folder / "config.json").write_text(json.dumps(settings))
    shifted = KLAutoencoder(str(folder))
    torch.testing.assert_close(shifted.encode(image()), 1.5 * (plain - 0.06), **REORDERED)
    torch.testing.assert_close(shifted.decode(shifted.encode(image())), kl.decode(kl.encode(image())), **REORDERED)


def test_gradients_pass_the_kl_decoder_to_the_latent_alone(sd_folder: Path) -> None:
    found = []
    for use_checkpoint in (False, True):
        kl = KLAutoencoder(str(sd_folder), use_checkpoint=use_checkpoint)
        given = latent(1, 2, 4).requires_grad_()
        kl.decode(given).square().sum().backward()
        assert given.grad.any()
        assert all(p.grad is None and not p.requires_grad for p in kl.parameters())
        found.append(given.grad)
    torch.testing.assert_close(*found)


# ----------------------------------------------------------------------------------------------------------------- both


@pytest.fixture(params=["vq", "kl"])
def settings(request: pytest.FixtureRequest, vq_file: Path, sd_folder: Path) -> dict[str, Any]:
    return {"type": request.param, "path": str(vq_file if request.param == "vq" else sd_folder)}


def build(settings: dict[str, Any], **changed: Any) -> Any:
    return define_autoencoder(network_options({"autoencoder": {**settings, **changed}}))


def test_options_build_an_autoencoder_that_stays_frozen(settings: dict[str, Any]) -> None:
    autoencoder = build(settings)
    assert not any(module.training for module in autoencoder.train().model.modules())
    assert not any(p.requires_grad for p in copy.deepcopy(autoencoder).parameters())


def test_checkpointing_stores_less(settings: dict[str, Any]) -> None:
    stored = {}
    for use_checkpoint in (False, True):
        autoencoder, sizes = build(settings, use_checkpoint=use_checkpoint), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            autoencoder.decode(latent(channels=autoencoder.channels).requires_grad_())
        stored[use_checkpoint] = sum(sizes)
    assert stored[True] < stored[False] / 2


@pytest.mark.parametrize(("precision", "bits"), [("bf16", 8), ("fp16", 11)])
def test_half_precision_stays_near_and_comes_back_in_float32(
    settings: dict[str, Any], precision: str, bits: int
) -> None:
    exact, half = build(settings), build(settings, precision=precision)
    kept = {p.dtype for name, p in half.named_parameters() if "quantize" not in name}
    assert kept == {torch.bfloat16 if precision == "bf16" else torch.float16}
    # Some thirty layers, each rounded to this many bits; the decoder's input is the same codes.
    allowed = 30 * 2.0**-bits
    given = latent(channels=exact.channels)
    for expected, found in (
        (exact.encode(image()), half.encode(image())),
        (exact.decode(given), half.decode(given)),
    ):
        assert found.dtype == torch.float32
        assert (found - expected).abs().mean() < allowed * expected.std()


@pytest.mark.parametrize("size", [(18, 24), (16, 25)])
def test_a_size_that_does_not_divide_is_named(settings: dict[str, Any], size: tuple[int, int]) -> None:
    autoencoder = build(settings)
    factor = autoencoder.factor
    with pytest.raises(ValueError, match=f"the image is {size[0]} x {size[1]}: its sides must divide by {factor}"):
        autoencoder.encode(image(*size))


def refused(call: Callable[[], Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_an_autoencoder_that_cannot_be_had_ends_in_one_line(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*args: Any, **kwargs: Any) -> None:
        raise OSError("cannot be reached\nsecond line")

    monkeypatch.setattr("huggingface_hub.snapshot_download", no_network)
    refused(lambda: build(settings, path="nobody/none"), r"autoencoder\.path: nobody/none: .*cannot be reached")
    refused(lambda: build(settings, path="no such folder"), r"autoencoder\.path: no such folder: ")
    refused(lambda: build(settings, path=str(tmp_path)), r"autoencoder\.path: .*no config\.json")


def test_a_missing_or_foreign_file_ends_in_one_line(published: PublishedVQ, tmp_path: Path) -> None:
    missing, path = tmp_path / "vq.pth", tmp_path / "other.pth"
    refused(lambda: VQAutoencoder(str(missing)), rf"autoencoder\.path: {re.escape(str(missing))}: no such file")
    for weights in (
        {"conv.weight": torch.ones(1)},
        {name: value for name, value in published.state_dict().items() if "norm1" not in name},
        {**published.state_dict(), "encoder.down.0.attn.0.q.weight": torch.ones(1)},
        {**published.state_dict(), "decoder.conv_out.bias": torch.ones(5)},
    ):
        torch.save(weights, path)
        refused(lambda: VQAutoencoder(str(path)), r"autoencoder\.path: .*other\.pth holds no VQ autoencoder")


def test_weights_of_a_folder_that_are_no_safetensors_run_no_code(settings: dict[str, Any], tmp_path: Path) -> None:
    build(settings).model.save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    for make in TRAPS.values():
        (tmp_path / "diffusion_pytorch_model.bin").write_bytes(make(Trap(tmp_path / "trap")))
        refused(lambda: build(settings, path=str(tmp_path)), r"autoencoder\.path: .* cannot be read")
        assert not (tmp_path / "trap").exists()


def test_a_damaged_folder_ends_in_one_line(settings: dict[str, Any], tmp_path: Path) -> None:
    build(settings).model.save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refused(lambda: build(settings, path=str(tmp_path)), r"autoencoder\.path: .* cannot be read")
    (tmp_path / "config.json").write_text("{")
    refused(lambda: build(settings, path=str(tmp_path)), r"autoencoder\.path: .* cannot be read")


def test_an_autoencoder_of_the_other_kind_is_refused(vq: VQAutoencoder, sd_folder: Path, tmp_path: Path) -> None:
    vq.model.save_pretrained(tmp_path)
    refused(lambda: KLAutoencoder(str(tmp_path)), "holds a VQModel, .*needs a AutoencoderKL")
    refused(lambda: VQAutoencoder(str(sd_folder)), "holds a AutoencoderKL, .*needs a VQModel")


def test_without_diffusers_the_command_that_installs_it_is_named(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def absent(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "diffusers":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    refused(lambda: build(settings), r"python -m pip install -r requirements-extra\.txt")


# -------------------------------------------------------------------------------------- ResShift's files, as they are


@pytest.fixture
def published_files(tmp_path: Path) -> Path:
    """A tiny network and autoencoder under their published names, and an image."""
    torch.manual_seed(0)
    netG = {"net_type": "resshift_unet_swin", "image_size": 16, "model_channels": 64, "channel_mult": [1, 2]}
    netG |= {"attention_resolutions": [16, 8], "num_res_blocks": [1, 1], "num_head_channels": 16, "window_size": 4}
    netG |= {"swin_embed_dim": 64, "mlp_ratio": 2, "lq_size": 16}
    network = define_G({"scale": 4, "n_channels": 3, "netG": netG})
    torch.save(network.state_dict(), tmp_path / "resshift.pth")
    torch.save(PublishedVQ().state_dict(), tmp_path / "autoencoder_vq_f4.pth")
    imsave(photograph(13, 21, 0), str(tmp_path / "L.png"))
    return tmp_path


def test_published_files_restore_an_image_once_the_steps_are_told(published_files: Path) -> None:
    command = ["--model_path", str(published_files / "resshift.pth"), "--input", str(published_files / "L.png")]
    main_test([*command, "--steps", "4", "--output", str(published_files / "E")])
    (image,) = (published_files / "E").rglob("L.png")
    assert imread_uint(image).shape == (52, 84, 3)


def test_what_published_weights_do_not_say_is_asked_for_in_one_line(published_files: Path) -> None:
    command = ["--model_path", str(published_files / "resshift.pth"), "--input", str(published_files / "L.png")]
    with pytest.raises(UserError, match=r"resshift\.pth: ResShift's weights do not say .* give --steps 15"):
        main_test(command)
    (published_files / "autoencoder_vq_f4.pth").unlink()
    with pytest.raises(UserError, match=r"resshift\.pth: autoencoder_vq_f4\.pth must lie beside it") as error:
        main_test([*command, "--steps", "15"])
    assert "\n" not in str(error.value)
