"""What every model shares: its networks, their files, one optimizer step; and a generator, its EMA, its losses."""

import copy
import inspect
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from models.card import check_start, save_with_cards
from models.loss import PerceptualLoss, color_loss, pixel_loss
from models.loss_metric import metric_loss
from models.loss_systems import RankLoss, artifact_loss, back_projection_loss, best_buddy_loss
from models.network_spsr import GradientMap, SPSROutput
from models.precision import autocast, in_float32, of_many_sizes, training_layout, warn_if_slow
from models.select_network import define_G, define_R
from utils import utils_dist
from utils.utils_checkpoint import (
    Fingerprint,
    load_checkpoint_file,
    load_network,
    save_atomically,
    save_network,
    unwrap,
)
from utils.utils_error import UserError
from utils.utils_option import Options
from utils.utils_option_sections import Side
from utils.utils_ssl import SelfSimilarityLoss, edge_mask, mask_stride_pattern
from utils.utils_tile import image_of, restore

logger = logging.getLogger(__name__)

# The terms that are means over the batch's edge pixels, and those that are sums over its images; every other one is a
# mean over its images.
OVER_EDGES = ("ssl", "ssl_l1", "ssl_kl")
SUMS = ("rank",)
_ADAM = ("adam", "adamw")  # PyTorch's, whose moments are each other's; all other optimizers are timm's


def _side(name: str) -> Side:
    """Whose training options a network has: D's each discriminator, D_grad too, G's the generator and its average."""
    sides: dict[str, Side] = {"G": "G", "E": "G", "D": "D", "R": "R"}
    return sides[name[0]]


def _check_moments(optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError where its state is not of its parameters; torch would find out in the middle of a step."""
    adam = isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW))
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state: dict[str, Any] = optimizer.state.get(parameter) or {}
            # Of other optimizers nothing is known but that what has sides is of the parameter.
            moments = [name for name, value in state.items() if isinstance(value, Tensor) and value.ndim]
            for name in ("exp_avg", "exp_avg_sq") if state and adam else moments:
                found = state.get(name)
                if not isinstance(found, Tensor) or found.shape != parameter.shape or (adam and "step" not in state):
                    shape = f"of shape {tuple(found.shape)}" if isinstance(found, Tensor) else "missing"
                    raise ValueError(f"{name} of a weight of shape {tuple(parameter.shape)} is {shape}")


def _lay_as_weights(optimizer: torch.optim.Optimizer) -> None:
    """Give each moment the memory layout of its weight: PyTorch's fused steps go over both as they lie in memory.

    They come with the layout of the run that saved them, which may have trained in another (``train.channels_last``).
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.ndim and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def synchronised(network: nn.Module, device: torch.device) -> nn.Module:
    """A network whose batch norms take their statistics over all processes; names and parameters are the same ones.

    Raises:
        UserError: the device is a CPU, for which PyTorch has no such layer.
    """
    if device.type == "cpu":
        raise UserError(
            "train.sync_batchnorm: PyTorch has it for GPUs alone, these processes compute on CPUs; set it to false"
        )
    return nn.SyncBatchNorm.convert_sync_batchnorm(network)


class Kept(NamedTuple):
    """A buffer, and what it held."""

    buffer: Tensor
    value: Tensor

    @classmethod
    def of(cls, networks: Iterable[nn.Module], endings: tuple[str, ...] = ("",)) -> "list[Kept]":
        """The networks' buffers whose names end so."""
        named = (pair for network in networks for pair in network.named_buffers())
        return [cls(buffer, buffer.clone()) for name, buffer in named if name.endswith(endings)]

    def put_back(self) -> None:
        """Have the buffer hold it again."""
        self.buffer.copy_(self.value)


class Bad(NamedTuple):
    """A number of a step that is not finite."""

    term: str
    value: float
    is_loss: bool  # or else a gradient's norm, to which all processes have added
    paths: list[str]  # of the process's images


class Piece(NamedTuple):
    """A part of a batch that goes through the networks at once."""

    images: slice  # of the batch
    share: float = 1.0  # of its images
    edges: float | Tensor = 1.0  # of its edge pixels, a scalar on the device where they are counted; see _all_edges

    def weight(self, term: str) -> float | Tensor:
        """What a term of this piece counts in that of the batch."""
        return 1.0 if term in SUMS else self.edges if term in OVER_EDGES else self.share


class ModelBase:
    """Networks that are trained: their optimizers and learning rates, their files, one step of one of them.

    A model adds its networks (:meth:`add_network`), takes a batch (``feed_data(data)``) and makes a training step of it
    (``optimize_parameters(current_step)``). All ``networks`` and ``optimizers`` are saved, as ``{iter}_{name}.pth``.
    """

    def __init__(self, opt: Options, device: torch.device) -> None:
        self.opt = opt
        self.device = device
        self.log: dict[str, float] = {}
        self.shown: dict[str, Tensor] = {}  # what else is to be logged of the step at hand, parts of a loss for example
        self.networks: dict[str, nn.Module] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        warn_if_slow(device, opt.train.precision)
        # Of each network's loss in half precision, whose gradient would vanish; elsewhere they do nothing.
        self.scalers: dict[str, torch.amp.GradScaler] = {}
        self.piece = Piece(slice(None))  # of the batch, at hand
        self.trained: dict[str, dict[str, Tensor]] = {}  # of the step at hand: network -> its loss's terms
        self.paths: list[str] = []  # of the fed images, where the data set gives them
        self.bad_steps = self.bad_in_a_row = 0  # left out so far, and since the last sound one (train.skip_bad_steps)
        self._begun: list[Kept] = []  # the buffers as they were before the step at hand

    # ------------------------------------------------------------------------------------------------------ building

    def add_network(self, name: str, network: nn.Module, pretrained: str | None, strict: bool) -> nn.Module:
        """Register a trained network with its optimizer: on the device, loaded, wrapped for several processes."""
        if pretrained:
            load_network(pretrained, network, strict)
        if self.opt.train.sync_batchnorm and utils_dist.world_size() > 1:
            network = synchronised(network, self.device)
        # Convolutions give what their weights' layout is: the images need not be turned.
        network = network.to(self.device).to(memory_format=training_layout(self.device, self.opt.train))
        if self.opt.train.compile:
            network.compile()  # in place: the names in checkpoints stay
        self.optimizers[name] = self._optimizer(name, network.parameters())
        self.scalers[name] = torch.amp.GradScaler(self.device.type, enabled=self.opt.train.precision == "fp16")
        has_batch_norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules())
        if self.in_pieces and has_batch_norms:
            self.warn_of_pieces(f"the batch norms of net{name} take the statistics")
        if utils_dist.world_size() > 1:
            if has_batch_norms and not self.opt.train.sync_batchnorm:
                logger.info(
                    "net%s: batch norms take each process's own statistics, checkpoints hold the first one's; on GPUs "
                    "train.sync_batchnorm takes them over all processes, as one process would over the batch",
                    name,
                )
            # Buffers (spectral norm, batch statistics) stay each process's own: a broadcast in the middle of a step
            # would change in place what the other forward pass of the discriminator still needs.
            is_new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
            settings: dict[str, Any] = {"forward_sync_buffers" if is_new else "broadcast_buffers": False}
            device_ids = [self.device] if self.device.type == "cuda" else None
            network = DistributedDataParallel(network, device_ids=device_ids, **settings)
        self.networks[name] = network
        return network

    def _optimizer(self, name: str, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        settings = self.opt.train.optimizer(_side(name))
        trained = [p for p in parameters if p.requires_grad]
        wanted: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.wd}
        if settings.betas:
            wanted["betas"] = settings.betas
        if settings.type in _ADAM:
            return (torch.optim.AdamW if settings.type == "adamw" else torch.optim.Adam)(trained, fused=True, **wanted)
        try:
            from timm.optim import create_optimizer_v2
        except ImportError:
            raise UserError(
                f"train.{_side(name)}_optimizer_type: {settings.type} needs the package timm; "
                f"python -m pip install -r requirements-extra.txt"
            ) from None
        return create_optimizer_v2(trained, opt=settings.type, filter_bias_and_bn=False, **wanted)

    # --------------------------------------------------------------------------------------------------- checkpoints

    def files(self, folder: Path, step: int) -> dict[str, Path]:
        """The files of one checkpoint, by what they hold: G, E, D and optimizerG, optimizerD; SPSR's D_grad."""
        names = [*self.networks, *(f"optimizer{name}" for name in self.optimizers)]
        return {name: folder / f"{step}_{name}.pth" for name in names}

    def files_to_load(
        self, folder: Path, step: int, expected: Mapping[str, Fingerprint] | None = None
    ) -> dict[str, Path]:
        """Those of :meth:`files` that a saved one must have: an average E only if it was saved with one.

        Args:
            expected: what :meth:`save` wrote; None = not known.
        """
        files = self.files(folder, step)
        average = files.get("E")
        if average and (average.name not in expected if expected else not average.is_file()):
            del files["E"]
        return files

    def save(
        self, folder: Path, step: int, validation: Mapping[str, Mapping[str, float]] | None = None
    ) -> dict[str, Fingerprint]:
        """Write all files of a checkpoint, each of them atomically; -> what was written, by the files' names.

        Args:
            validation: of this step: test set -> metric -> value.

        Raises:
            UserError: weights are NaN, infinite or so large that the output is; nothing is written then.
        """
        for name in self.networks:
            if not self._is_sound(name):
                raise UserError(
                    f"step {step}: weights or output of net{name} are not finite, this step is not saved; lower "
                    f"train.{_side(name)}_optimizer_lr, then start again to go on from the last checkpoint"
                )
        written = {}
        for name, path in self.files(folder, step).items():
            if name in self.networks:
                written[path.name] = save_network(self.networks[name], path)
            else:
                of = name.removeprefix("optimizer")
                state: dict[str, Any] = dict(self.optimizers[of].state_dict())
                if (kind := self.opt.train.optimizer(_side(of)).type) not in _ADAM:
                    state["type"] = kind
                if self.scalers[of].is_enabled():
                    state["scaler"] = self.scalers[of].state_dict()
                written[path.name] = save_atomically(state, path)
        generators = {name: network for name, network in self.networks.items() if _side(name) == "G"}
        if self.opt.train.checkpoint_safetensors:
            written |= save_with_cards(generators, self.opt, folder, step, validation or {})
        return written

    def _is_sound(self, name: str) -> bool:
        """Whether a network can be used: all its weights are finite."""
        return all(bool(p.isfinite().all()) for p in unwrap(self.networks[name]).parameters())

    def load(self, folder: Path, step: int, expected: Mapping[str, Fingerprint] | None = None) -> None:
        """Go on from a checkpoint of :meth:`save`.

        Args:
            expected: what it wrote; None = not known, of a checkpoint of before it was kept.

        Raises:
            DamagedError: a file cannot be read or is another one; what was loaded before it has stayed.
            UserError: a file does not fit this run.
        """
        files = self.files_to_load(folder, step, expected)
        for name, path in files.items():
            fingerprint = expected[path.name] if expected else None
            if name in self.networks:
                load_network(path, self.networks[name], strict=True, expected=fingerprint)
                continue
            of = name.removeprefix("optimizer")
            optimizer = self.optimizers[of]
            settings = [
                {k: v for k, v in group.items() if k not in ("params", "step")} for group in optimizer.param_groups
            ]
            try:
                state = load_checkpoint_file(path, fingerprint)
                made_by, kind = state.pop("type", "adam"), self.opt.train.optimizer(_side(of)).type
                if made_by != kind and not {made_by, kind} <= set(_ADAM):
                    raise ValueError(f"it is of {made_by}, not {kind}")
                scaler = state.pop("scaler", None)  # of the same run in another precision: none, or of no use
                if scaler and self.scalers[of].is_enabled():
                    self.scalers[of].load_state_dict(scaler)
                # Only the moments come from the file: betas and weight decay are what the options say now.
                for group, own in zip(state["param_groups"], settings, strict=True):
                    group.update(own)
                optimizer.load_state_dict(state)
                _check_moments(optimizer)
                _lay_as_weights(optimizer)
            except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
                raise UserError(f"{path}: does not fit this run's optimizer ({error}); use another task") from error
        if "E" in self.networks and "E" not in files:
            logger.info("step %d was saved without an average E: it begins as a copy of G", step)
            self.networks["E"].load_state_dict(unwrap(self.networks["G"]).state_dict())

    # ------------------------------------------------------------------------------------------------------ training

    def feed_data(self, data: dict[str, Any]) -> None:
        """Take a batch, or a piece of one: its tensors, on the device; each kind of model says which."""
        self.log = {}  # of the step to come
        paths = (data[name] for name in ("H_path", "L_path") if name in data)
        self.paths = list(dict.fromkeys(path for of_images in paths for path in of_images))
        tensors = {name: value for name, value in data.items() if isinstance(value, Tensor)}
        self.fed = {name: value.to(self.device, non_blocking=True) for name, value in tensors.items()}

    def optimize_parameters(self, current_step: int) -> None:
        """One training step; each model's own."""
        raise NotImplementedError

    def autocast(self) -> torch.autocast:
        """Within it, networks compute in ``train.precision``; losses stay outside."""
        return autocast(self.device, self.opt.train.precision)

    def call(self, network: nn.Module, *inputs: Tensor) -> Any:
        """A network's output in float32, computed in ``train.precision``."""
        with self.autocast():
            output = network(*inputs)
        return in_float32(output)

    @property
    def in_pieces(self) -> bool:
        """Whether ``train.micro_batch`` divides the batches of this process."""
        size, data = self.opt.train.micro_batch, self.opt.train_set
        return size is not None and data is not None and size * utils_dist.world_size() < data.dataloader_batch_size

    def warn_of_pieces(self, what: str) -> None:
        """Say that something is of each piece where it would be of the batch; ``what`` is a subject and a verb."""
        size = self.opt.train.micro_batch
        logger.warning("train.micro_batch: %s of a piece of %d, not of the batch: results differ a little", what, size)

    def pieces(self) -> Iterator[Piece]:
        """The fed batch in pieces of ``train.micro_batch`` images, each of them fed in its turn: one step.

        In each of them :meth:`backward` adds to the gradients, whose sums are those of the batch.
        """
        self.trained = {}
        if self.opt.train.skip_bad_steps:
            self._begun = Kept.of(self.networks[name] for name in self.optimizers)
        whole = len(next(iter(self.fed.values())))
        size = min(self.opt.train.micro_batch or whole, whole)
        over_processes = self.opt.train.ssl_over_processes and utils_dist.world_size() > 1
        edges = self._count_edges() if size < whole or over_processes else None
        all_edges = torch.ones(()) if edges is None else self._all_edges(edges)
        batch, paths = self.fed, self.paths  # perhaps with the masks that were counted
        # Spectral norms take a step of the power iteration in each call. Without data in it, it is repeated from where
        # the batch began: each piece sees the very weights that the whole batch would.
        begun = Kept.of(self.networks.values(), ("_u", "_v")) if size < whole else []
        shown: dict[str, Tensor] = {}
        for first in range(0, whole, size):
            images = slice(first, min(first + size, whole))
            if size < whole or edges is not None:
                self.feed_data({name: values[images] for name, values in batch.items()})
            share = len(range(whole)[images]) / whole
            self.piece = Piece(images, share, share if edges is None else edges[images].sum() / all_edges)
            for kept in begun:
                kept.put_back()
            with ExitStack() as stack:
                # Several processes exchange their gradients once a step, after the last piece.
                for network in self.networks.values():
                    if isinstance(network, DistributedDataParallel) and images.stop < whole:
                        stack.enter_context(network.no_sync())
                yield self.piece
            self._add(shown, self.shown)
            self.shown = {}
        self.shown, self.paths = shown, paths

    def _count_edges(self) -> Tensor | None:
        """The edge pixels of each fed image, (N,) on the device; None where no loss is a mean over them."""
        return None

    def _all_edges(self, edges: Tensor) -> Tensor:
        """What those of a piece are divided by, a scalar: those of the process, or with ssl_over_processes of all.

        Gradients, and terms in the log, are means over the processes: their number is taken out of it again.
        """
        own = edges.sum()
        if not self.opt.train.ssl_over_processes:
            return own.clamp_min(1)
        return utils_dist.summed(own).clamp_min(1) / utils_dist.world_size()

    def _add(self, sums: dict[str, Tensor], terms: Mapping[str, Tensor]) -> None:
        """Add terms of the piece at hand to those of the batch."""
        for name, value in terms.items():
            weighted = self.piece.weight(name) * value.detach()
            sums[name] = sums[name] + weighted if name in sums else weighted

    def backward(self, name: str, terms: dict[str, Tensor]) -> None:
        """The gradient of the sum of the terms with respect to one network.

        The first of a step takes the place of the last step's; others, of more terms or of the next of the
        :meth:`pieces`, are added.
        """
        if name not in self.trained:
            self.optimizers[name].zero_grad(set_to_none=True)
        weighted = [self.piece.weight(term) * value for term, value in terms.items()]
        self.scalers[name].scale(torch.stack(weighted).sum()).backward()
        self._add(self.trained.setdefault(name, {}), terms)

    def update(self, current_step: int) -> bool:
        """Step the networks that :meth:`backward` has given gradients, and log their terms, norms, ``shown``.

        Args:
            current_step: for messages.

        Returns:
            False where a loss or a gradient is NaN or infinite and the step is left out (``train.skip_bad_steps``), in
            all processes alike: weights, moments, buffers and loss scalers are those of before, nothing is logged.

        Raises:
            UserError: a loss or a gradient is NaN or infinite, too often in a row; all weights are left as they were.
        """
        trained, self.trained = self.trained, {}
        if not trained:  # a step in which everything rests
            return True
        terms = {term: value for of_one in trained.values() for term, value in of_one.items()}
        norms = {}
        for name in trained:
            self.scalers[name].unscale_(self.optimizers[name])
            parameters = list(self.networks[name].parameters())
            clip = self.opt.train.optimizer(_side(name)).clipgrad
            norms[f"{name}_grad"] = (
                torch.nn.utils.clip_grad_norm_(parameters, clip)
                if clip
                else torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            )
        losses = terms | self.shown
        named = losses | norms
        self.shown = {}
        numbers = torch.stack([v.detach().float() for v in named.values()])
        if self.opt.train.skip_bad_steps:
            # Gradients are the same in all processes, a loss is each one's own: where one is broken, all must know.
            broken = numbers[: len(losses)].isfinite().logical_not().any()
            numbers = torch.cat([numbers, utils_dist.summed(broken.float())[None]])
        # One host synchronisation a step buys that no broken update is ever applied, let alone saved.
        values = numbers.tolist()
        found = dict(zip(named, values, strict=False))
        # A gradient beyond half precision makes its network's scaler leave this step out and halve its factor,
        # which helps once.
        bad = [
            Bad(term, value, term in losses, self.paths)
            for term, value in found.items()
            if not math.isfinite(value)
            and not (term in norms and self._can_halve(self.scalers[term.removesuffix("_grad")]))
        ]
        if bad or any(values[len(named) :]):
            owner = {term: name for name, of_one in trained.items() for term in (*of_one, f"{name}_grad")}
            self._leave_out(current_step, bad[:1], owner)
            return False
        self.bad_in_a_row = 0
        # The norm of a gradient that is beyond half precision for once says nothing of the run.
        self.log.update({term: value for term, value in found.items() if math.isfinite(value)})
        for name in trained:
            self.scalers[name].step(self.optimizers[name])
            self.scalers[name].update()
        return True

    def _leave_out(self, current_step: int, own: list[Bad], owner: Mapping[str, str]) -> None:
        """Put back what a bad step has changed and tell of it, or end the run.

        Args:
            own: what is broken in this process; nothing where it is so in another one alone.
            owner: term -> the trained network of whose loss it is a part.
        """
        most = self.opt.train.skip_bad_steps
        found = [bad for of_one in utils_dist.gathered(own) for bad in of_one] if most else own
        found = [bad for bad in found if bad.is_loss] or found  # of a gradient alone nobody can say whose it is
        term, value = found[0].term, found[0].value
        paths = ", ".join(path for bad in found for path in bad.paths)
        images = f"; images: {paths}" if most and paths else ""
        self.bad_in_a_row += 1
        if self.bad_in_a_row >= most:
            row = f", bad step {most} of {most} in a row (train.skip_bad_steps)" if most > 1 else ""
            side = _side(owner.get(term, "G"))
            raise UserError(
                f"step {current_step}: {term} is {value}{row}, training stops before it spoils the weights; lower "
                f"train.{side}_optimizer_lr or set train.{side}_optimizer_clipgrad, then start again to resume{images}"
            )
        for kept in self._begun:
            kept.put_back()
        for name in set(owner.values()):
            self.scalers[name].update(self.scalers[name].get_scale())  # neither halved nor nearer to being doubled
        self.bad_steps += 1
        if utils_dist.rank() == 0:
            logger.warning(
                "step %d: %s is %s, the step is left out (%d in a row, the run ends at %d; %d in all)%s",
                *(current_step, term, value, self.bad_in_a_row, most, self.bad_steps, images),
            )

    @staticmethod
    def _can_halve(scaler: torch.amp.GradScaler) -> bool:
        return scaler.is_enabled() and scaler.get_scale() > 1

    def update_learning_rate(self, current_step: int) -> None:
        """Set the learning rates of this step, in closed form."""
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = self.opt.train.optimizer(_side(name)).lr_at(current_step)

    def current_learning_rate(self) -> float:
        """The learning rate of the first network, netG in all models that have one."""
        return next(iter(self.optimizers.values())).param_groups[0]["lr"]

    def current_log(self) -> dict[str, float]:
        """The weighted losses and gradient norms of the last step, by name."""
        return dict(self.log)

    def describe(self) -> str:
        """One line: the networks and their sizes."""
        sizes = {name: sum(p.numel() for p in net.parameters()) for name, net in self.networks.items() if name != "E"}
        return ", ".join(f"net{name} {type(unwrap(self.networks[name])).__name__} {n:,}" for name, n in sizes.items())


class ModelSR(ModelBase):
    """A generator ``netG``, its moving average ``netE``, and the losses that compare E with the ground truth H."""

    def __init__(self, opt: Options, device: torch.device) -> None:
        super().__init__(opt, device)
        train = opt.train
        if opt.path.pretrained_netG:
            check_start(Path(opt.path.pretrained_netG), opt)
        self.netG = self.add_network("G", define_G(opt), opt.path.pretrained_netG, train.G_param_strict)
        self.netE: nn.Module | None = None
        if train.E_decay > 0:
            self.netE = copy.deepcopy(unwrap(self.netG)).eval().requires_grad_(False)
            self.networks["E"] = self.netE
            if opt.path.pretrained_netE:
                load_network(opt.path.pretrained_netE, self.netE, train.E_param_strict)

        layout = training_layout(device, train)
        self.pixel = pixel_loss(train.G_lossfn_type, train.G_charbonnier_eps)
        self.perceptual: PerceptualLoss | None = None
        if train.F_lossfn_weight > 0:
            self.perceptual = PerceptualLoss(
                train.F_feature_layer,
                train.F_weights,
                train.F_lossfn_type,
                train.F_use_input_norm,
                train.F_use_range_norm,
                opt.path.pretrained_netF,
            ).to(device)
            self.perceptual.to(memory_format=layout)
        self.metrics = {name: metric_loss(name, device).to(memory_format=layout) for name in train.iqa_losses}
        self.gradient_map = GradientMap().to(device)
        self.rank: RankLoss | None = None
        if train.rank_weight > 0:
            assert opt.path.pretrained_netR is not None  # the options have been checked
            ranker = define_R(opt)
            load_network(opt.path.pretrained_netR, ranker)
            self.rank = RankLoss(ranker.to(device), published=train.rank_published)
        self.ssl: SelfSimilarityLoss | None = None
        if train.ssl_l1_weight > 0 or train.ssl_kl_weight > 0:
            try:
                self.ssl = SelfSimilarityLoss(
                    train.ssl_l1_weight,
                    train.ssl_kl_weight,
                    train.kernel_size_search,
                    train.kernel_size_window,
                    train.sigma,
                    train.generalization,
                    train.mask_stride,
                    train.mask_threshold,
                    train.ssl_mode,
                    train.search_border,
                )
                self.ssl.prepare(device)
            except ValueError as error:
                raise UserError(f"train.ssl_mode: {error}; use auto") from error

    def generator(self, network: nn.Module, quick: bool = False) -> nn.Module:
        """What makes E of L with a network of G's kind; with ``quick`` it need not be good. Here the network itself."""
        return network

    def losses(self) -> dict[str, Tensor]:
        """The generator's weighted losses of the fed images, by name; each model's own."""
        raise NotImplementedError

    def _is_sound(self, name: str) -> bool:
        """Whether all weights are finite and, of a generator, what it makes of a grey square."""
        sound = super()._is_sound(name)
        if sound and _side(name) == "G":
            network = unwrap(self.networks[name])
            was_training = network.training
            grey = torch.full((1, self.opt.n_channels, 16, 16), 0.5, device=self.device)
            generator = self.generator(network.eval(), quick=True)
            sound = bool(restore(generator, grey, self.opt.scale).isfinite().all())
            network.train(was_training)
        return sound

    # ------------------------------------------------------------------------------------------------------ training

    def feed_data(self, data: dict[str, Any], need_H: bool = True) -> None:
        """Take a batch: ``L`` (N, C, h, w), ``H`` (N, C, h * scale, w * scale), RGB in [0, 1].

        Perhaps ``mask`` (N, 1, ...) of H's edges, and ``H_usm``, H sharpened.
        """
        super().feed_data(data if need_H else {"L": data["L"]})
        self.L: Tensor = self.fed["L"]
        self.has_H = need_H
        if need_H:
            self.H: Tensor = self.fed["H"]
            self.H_usm: Tensor = self.fed.get("H_usm", self.H)
            self._gradient_H: Tensor | None = None
            self.mask: Tensor | None = self.fed.get("mask")

    def _count_edges(self) -> Tensor | None:
        if self.ssl is None:
            return None
        mask = self.fed["mask"] if self.mask is not None else edge_mask(self.H, self.ssl.threshold)
        self.fed["mask"] = mask
        pattern = mask_stride_pattern(mask.shape[2], mask.shape[3], self.ssl.mask_stride, mask.device)
        return (mask * pattern).sum((1, 2, 3))

    @property
    def gradient_H(self) -> Tensor:
        """The gradient map of the fed H, computed once for all that compare with it."""
        if self._gradient_H is None:
            self._gradient_H = self.gradient_map(self.H)
        return self._gradient_H

    def fidelity_terms(self, output: Tensor | SPSROutput) -> dict[str, Tensor]:
        """The weighted losses of what netG returned, by name, those that are on: all but the adversarial ones."""
        train, terms, E = self.opt.train, {}, image_of(output)
        if train.G_lossfn_weight > 0:
            terms["G_loss"] = train.G_lossfn_weight * self.pixel(E, self.H_usm if train.l1_gt_usm else self.H)
        if self.perceptual is not None:
            terms["F_loss"] = train.F_lossfn_weight * self.perceptual(E, self.H_usm if train.percep_gt_usm else self.H)
        for name, weight in train.iqa_losses.items():
            terms[name] = weight * self.metrics[name](E, self.H).mean()
        if train.gradient_weight > 0:
            terms["gradient"] = train.gradient_weight * F.mse_loss(self.gradient_map(E), self.gradient_H)
        if isinstance(output, SPSROutput):
            # At weight 0 too: several processes wait for a gradient of each parameter, the branch's last layer as well.
            terms["branch"] = train.branch_weight * F.l1_loss(output.gradient, self.gradient_H)
        if train.ldl_weight > 0 and self.netE is not None:
            with torch.no_grad():
                E_ema = image_of(self.call(self.netE, self.L))
            terms["ldl"] = train.ldl_weight * artifact_loss(E, self.H, E_ema)
        if train.best_buddy_weight > 0:
            terms["best_buddy"] = train.best_buddy_weight * best_buddy_loss(E, self.H)
        if train.color_weight > 0:
            terms["color"] = train.color_weight * color_loss(E, self.H)
        if train.back_projection_weight > 0:
            terms["back_projection"] = train.back_projection_weight * back_projection_loss(E, self.L)
        if self.rank is not None:
            with self.autocast():
                terms["rank"] = train.rank_weight * self.rank(E)
        if self.ssl is not None:
            terms["ssl"], self.shown["ssl_l1"], self.shown["ssl_kl"] = self.ssl.parts(E, self.H, self.mask)
        return terms

    @torch.no_grad()
    def update_E(self) -> None:
        """Move netE's parameters towards netG's by 1 - E_decay; running statistics are averages already: copied."""
        if self.netE is not None:
            netG = unwrap(self.netG)
            averaged: list[Tensor] = list(self.netE.parameters())
            current: list[Tensor] = list(netG.parameters())
            torch._foreach_lerp_(averaged, current, 1 - self.opt.train.E_decay)
            for mine, theirs in zip(self.netE.buffers(), netG.buffers(), strict=True):
                mine.copy_(theirs)

    # ---------------------------------------------------------------------------------------------------- validation

    def test(self) -> None:
        """Restore the fed L with the averaged generator, or with netG where there is no average, into ``self.E``."""
        network = self.netE if self.netE is not None else unwrap(self.netG)
        network.eval()
        generator = self.generator(network)
        test = self.opt.test
        with autocast(self.device, test.precision), of_many_sizes():
            E = restore(generator, self.L, self.opt.scale, test.tile, test.tile_overlap)
        self.E = in_float32(E)
        if network is not self.netE:
            network.train()

    def current_visuals(self) -> dict[str, Tensor]:
        """The first image of the fed batch, its estimate, and H where it was fed; (C, H, W) on the CPU."""
        shown = {"L": self.L, "E": self.E} | ({"H": self.H} if self.has_H else {})
        return {name: images[0].float().cpu() for name, images in shown.items()}
