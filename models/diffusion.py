"""Diffusion processes: how noise is put on an image, and how one step takes it off again.

A process knows no network and draws nothing: noise is handed in. Images are (N, C, H, W), of pixels or of a latent:
``x0`` is the ground truth, ``y`` the enlarged low-quality image, ``x_t`` the state at time ``t``, a long tensor (N,)
that counts from 0 (the papers count from 1). Every process has

* ``times``: the t that are trained on;
* ``q_sample(x0, y, t, noise)``: a sample of q(x_t | x0, y);
* ``scale_input(x_t, t)``: what the network is shown of x_t;
* ``target(x0, noise)``: what the network's output is trained to be;
* ``x0_of(output, x_t, t)``: the estimate of x0 that this output amounts to;
* ``start(y, noise)``: the state that sampling starts from;
* ``timesteps(steps)``: the t to visit, from last to first, all of them or ``steps`` spread evenly;
* ``step(x0, x_t, t, previous, noise)``: a sample of q(x_previous | x_t, x0) for the visited time before t, -1 standing
  for x0 itself. Times that are left out need no tables of their own: the transition from ``previous`` to ``t`` follows
  from the marginals at both.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from utils.utils_error import UserError


def _of_images(values: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """values[t] in the type and on the device of ``like``, shaped to multiply a batch of images."""
    return values.to(like)[t].reshape(-1, 1, 1, 1)


class Process(ABC):
    """What the processes share; see the module's docstring."""

    times: Tensor

    @abstractmethod
    def q_sample(self, x0: Tensor, y: Tensor, t: Tensor, noise: Tensor) -> Tensor: ...

    def scale_input(self, x_t: Tensor, t: Tensor) -> Tensor:
        return x_t

    def target(self, x0: Tensor, noise: Tensor) -> Tensor:
        return x0

    def x0_of(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return output

    @abstractmethod
    def start(self, y: Tensor, noise: Tensor) -> Tensor: ...

    def timesteps(self, steps: int | None = None) -> list[int]:
        """The times to visit, from last to first.

        Raises:
            UserError: more steps than the process has.
        """
        count = len(self.times)
        if steps is None:
            steps = count
        if not 1 <= steps <= count:
            raise UserError(f"{steps} sampling steps: this process has {count}; give 1 to {count}")
        # Both ends and an even spread between them: a stride of (T - 1) / (steps - 1), rounded.
        visited = torch.linspace(count - 1, 0, steps, dtype=torch.float64).round().long()
        return self.times[visited].tolist()

    @abstractmethod
    def step(self, x0: Tensor, x_t: Tensor, t: int, previous: int, noise: Tensor) -> Tensor: ...


class ResShift(Process):
    """ResShift (Yue, Wang, Loy, arXiv 2307.12348): the residual e0 = y - x0 is shifted in while noise is added.

    q(x_t | x_{t-1}, x0, y) = N(x_{t-1} + alpha_t e0, kappa^2 alpha_t I), alpha_t = eta_t - eta_{t-1}, eta_0 = 0   (1)
    q(x_t | x0, y) = N(x0 + eta_t e0, kappa^2 eta_t I)                                                             (2)
    q(x_{t-1} | x_t, x0, y) = N(eta_{t-1} / eta_t x_t + alpha_t / eta_t x0, kappa^2 eta_{t-1} / eta_t alpha_t I)   (6)

    The network predicts x0.

    Args:
        steps: T, at least 2.
        min_noise_level: m; the first shift is sqrt(eta_1) = min(m / kappa, m).
        kappa: noise against residual; the last state has a deviation of kappa sqrt(eta_T).
        etas_end: sqrt(eta_T), the square root, as in the published code.
        power: p of the schedule; the smaller, the earlier the shift.
    """

    def __init__(
        self,
        steps: int,
        min_noise_level: float,
        kappa: float = 2.0,
        etas_end: float = 0.99,
        power: float = 0.3,
    ) -> None:
        first = min(min_noise_level / kappa, min_noise_level)
        # sqrt(eta_t) = sqrt(eta_1) b^beta_t: from the first to the last, evenly in the logarithm where p = 1.
        beta = (torch.arange(steps, dtype=torch.float64) / (steps - 1)) ** power * (steps - 1)
        b = math.exp(math.log(etas_end / first) / (steps - 1))
        self.sqrt_eta = first * b**beta
        self.eta = self.sqrt_eta**2
        self.kappa = kappa
        self.times = torch.arange(steps)

    def q_sample(self, x0: Tensor, y: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        eta, deviation = (_of_images(v, t, x0) for v in (self.eta, self.kappa * self.sqrt_eta))
        return x0 + eta * (y - x0) + deviation * noise

    def scale_input(self, x_t: Tensor, t: Tensor) -> Tensor:
        """x_t at a deviation near 1, images being in [-1, 1]."""
        return x_t / _of_images((1 + self.kappa**2 * self.eta).sqrt(), t, x_t)

    def start(self, y: Tensor, noise: Tensor) -> Tensor:
        return y + self.kappa * self.sqrt_eta[-1].item() * noise

    def step(self, x0: Tensor, x_t: Tensor, t: int, previous: int, noise: Tensor) -> Tensor:
        if previous < 0:
            return x0
        kept = (self.eta[previous] / self.eta[t]).item()
        return kept * x_t + (1 - kept) * x0 + math.sqrt(self.posterior_variance(t, previous)) * noise

    def posterior_variance(self, t: int, previous: int) -> float:
        """kappa^2 eta_previous / eta_t (eta_t - eta_previous), 0 where previous = -1."""
        if previous < 0:
            return 0.0
        before, eta = self.eta[previous].item(), self.eta[t].item()
        return self.kappa**2 * before / eta * (eta - before)


class DDPM(Process):
    """DDPM (Ho, Jain, Abbeel, arXiv 2006.11239) with Stable Diffusion's "scaled linear" betas, noise being predicted.

    q(x_t | x0) = N(sqrt(abar_t) x0, (1 - abar_t) I), abar_t = product of the (1 - beta_s) up to t                 (4)
    q(x_{t-1} | x_t, x0) = N(sqrt(abar_{t-1}) beta_t / (1 - abar_t) x0
                             + sqrt(1 - beta_t) (1 - abar_{t-1}) / (1 - abar_t) x_t, beta~_t I)                 (6, 7)
    beta~_t = (1 - abar_{t-1}) / (1 - abar_t) beta_t

    With some times left out beta_t = 1 - abar_t / abar_previous (arXiv 2102.09672, section 4); the network is shown t
    itself. x0 is not clipped. Sampling starts from the noised y, as StableSR's does: abar of the last time is not 0.

    Args:
        steps: T.
        beta_start, beta_end: the betas are the squares of an even spread between their square roots.
    """

    def __init__(self, steps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> None:
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64) ** 2
        self.abar = (1 - betas).cumprod(0)
        self.times = torch.arange(steps)

    def q_sample(self, x0: Tensor, y: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return _of_images(self.abar.sqrt(), t, x0) * x0 + _of_images((1 - self.abar).sqrt(), t, x0) * noise

    def target(self, x0: Tensor, noise: Tensor) -> Tensor:
        return noise

    def x0_of(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return (x_t - _of_images((1 - self.abar).sqrt(), t, x_t) * output) / _of_images(self.abar.sqrt(), t, x_t)

    def start(self, y: Tensor, noise: Tensor) -> Tensor:
        return self.q_sample(y, y, self.times[-1:], noise)

    def step(self, x0: Tensor, x_t: Tensor, t: int, previous: int, noise: Tensor) -> Tensor:
        if previous < 0:
            return x0
        abar, before = self.abar[t].item(), self.abar[previous].item()
        beta = 1 - abar / before
        of_x0 = math.sqrt(before) * beta / (1 - abar)
        of_x_t = math.sqrt(1 - beta) * (1 - before) / (1 - abar)
        return of_x0 * x0 + of_x_t * x_t + math.sqrt(self.posterior_variance(t, previous)) * noise

    def posterior_variance(self, t: int, previous: int) -> float:
        """beta~ of the transition between the two times, 0 where previous = -1."""
        if previous < 0:
            return 0.0
        abar, before = self.abar[t].item(), self.abar[previous].item()
        return (1 - before) / (1 - abar) * (1 - abar / before)


class OneStep(Process):
    """No process: the network makes x0 of y in one call, as the one-step diffusion networks do (arXiv 2406.08177).

    Args:
        timestep: the t that the network is shown, for one that was trained as a diffusion model: its last.
    """

    def __init__(self, timestep: int = 0) -> None:
        self.times = torch.tensor([timestep])

    def q_sample(self, x0: Tensor, y: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return y

    def start(self, y: Tensor, noise: Tensor) -> Tensor:
        return y

    def step(self, x0: Tensor, x_t: Tensor, t: int, previous: int, noise: Tensor) -> Tensor:
        return x0
