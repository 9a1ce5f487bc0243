"""Two samplers of WebUI that diffusers lacks in this form. Made by `core.samplers` alone."""

from typing import Any

import numpy as np
import torch
from diffusers import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteSchedulerOutput
from torch import Tensor

LMS_ORDER = 4

# To a type checker the classes of diffusers lack most of what they have.
_Euler: Any = EulerDiscreteScheduler
_EulerAncestral: Any = EulerAncestralDiscreteScheduler


class SpacedEulerAncestral(_EulerAncestral):
    """Euler a on the noise levels of a Karras or exponential schedule; diffusers' own knows only even spacing."""

    spacing: dict[str, Any] = {}

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Take the levels of the plain Euler sampler."""
        plain = _Euler.from_config(self.config, **self.spacing)
        plain.set_timesteps(num_inference_steps, device=device)
        super().set_timesteps(num_inference_steps, device=device)
        self.sigmas, self.timesteps = plain.sigmas, plain.timesteps  # (steps + 1,), (steps,)


class LinearMultistep(_Euler):
    """k-diffusion's `sample_lms`: Adams-Bashforth over up to four past derivatives, coefficients integrated exactly.

    diffusers' own integrates by quadrature through SciPy, which nothing else here needs.
    """

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        """As Euler; forgets the past."""
        super().set_timesteps(*args, **kwargs)
        self.derivatives: list[Tensor] = []

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True
    ) -> EulerDiscreteSchedulerOutput | tuple[Tensor, Tensor]:
        """One step.

        Args:
            model_output: (n, c, h, w) fp32.
            timestep: One of `timesteps`.
            sample: (n, c, h, w) fp32.
            return_dict: False gives a tuple, as pipelines of diffusers ask for.
        """
        if self.step_index is None:
            self._init_step_index(timestep)
        index: int = self.step_index
        sigma = self.sigmas[index]
        if self.config.prediction_type == "epsilon":
            original = sample - sigma * model_output
        else:
            original = model_output * (-sigma / (sigma**2 + 1) ** 0.5) + sample / (sigma**2 + 1)
        self.derivatives = [(sample - original) / sigma, *self.derivatives][:LMS_ORDER]  # newest first
        weights = lms_weights(self.sigmas.tolist(), index, len(self.derivatives))
        for weight, derivative in zip(weights, self.derivatives, strict=True):
            sample = sample + weight * derivative  # (n, c, h, w)
        self._step_index += 1
        if not return_dict:
            return sample, original
        return EulerDiscreteSchedulerOutput(prev_sample=sample, pred_original_sample=original)


def lms_weights(sigmas: list[float], index: int, order: int) -> list[float]:
    """Of each of the last `order` derivatives, newest first: their Lagrange polynomials integrated over the step."""
    weights = []
    for own in range(order):
        polynomial = np.poly1d([1.0])
        for other in range(order):
            if other != own:
                node, own_node = sigmas[index - other], sigmas[index - own]
                polynomial = polynomial * np.poly1d([1.0, -node]) / (own_node - node)
        integral = polynomial.integ()
        weights.append(float(integral(sigmas[index + 1]) - integral(sigmas[index])))
    return weights
