"""Gradients through a network in float16, whose range those of a mean over a large latent would fall out of."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Middle = Callable[[str, Tensor], Tensor]
Cross = Callable[[str, Tensor, Tensor, int], Tensor]
SMALLEST = -100  # exponent: for gradients below it the factor would leave the range of float32


class HalfGradients:
    """One pass through a network in half precision. On the way back the gradients inside it are multiplied by a power of two,
    so that the largest one at its end lies in 0.5..1; what is trained outside, in float32, gets them as they are.

    A tensor is led through `end`, `out_of` or `into` wherever it crosses the border; its values stay the same."""

    def __init__(self) -> None:
        self.scale = torch.ones(())

    def end(self, x: Tensor) -> Tensor:
        """The network's output in float32: the first gradient on the way back, which decides the factor."""
        return _Border.apply(x.float(), self._begin)

    def out_of(self, x: Tensor) -> Tensor:
        """What a trained module reads of the network, in float32."""
        return _Border.apply(x.float(), lambda gradient: gradient * self.scale)

    def into(self, x: Tensor) -> Tensor:
        """What the network reads of a trained module, in float16."""
        return _Border.apply(x.float(), lambda gradient: gradient / self.scale).half()

    def middle(self, trained: Middle) -> Middle:
        """`trained` in float32 for a network that calls it in float16."""
        return lambda key, x: self.into(trained(key, self.out_of(x)))

    def cross(self, trained: Cross) -> Cross:
        """The same for a module beside the text attention."""
        return lambda key, q, text, heads: self.into(trained(key, self.out_of(q), self.out_of(text), heads))

    def _begin(self, gradient: Tensor) -> Tensor:
        exponent = torch.frexp(gradient.abs().amax())[1].clamp(min=SMALLEST)
        self.scale = torch.ldexp(gradient.new_ones(()), -exponent)
        return gradient * self.scale


class _Border(torch.autograd.Function):
    """x as it is; its gradient is what `change` makes of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.change(gradient), None
