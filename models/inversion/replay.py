"""The way down: Bi-directional Manipulation Denoising, from noise back to the picture with an identity inside it.

x_{i-1} = x_i + h [d_f + lamF M (d_id - d_f)] + lamB r_i - tether (x_i - x*_i)  (CustomEnhancer, arXiv 2509.20775, eq. 4 as we
read it; the tether is ours). lamF = 1 needs the identity branch alone, lamF = 0 the free branch alone, and with lamB = 1 on an
anchor the next anchor is the answer, so nothing is evaluated.
"""
from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .anchors import check_finite
from .records import Flows, Inversion
from .steps import euler

Mixed = Callable[[int, Tensor, Tensor, float], Tensor]  # (step, x, sigma, lamF) -> denoised of the mixed flows
OnStep = Callable[[int, Tensor, Tensor], None]          # (step, denoised, x)


def replay(inversion: Inversion, flows: Flows, mixed: Mixed, device_like: Tensor, on_step: OnStep, mask: Tensor | None = None,
           evaluate_all: bool = False) -> Tensor:
    """x_0 (b, c, ...) after a replay; anchors and residuals come to the device of `device_like` one level at a time.

    mask: 1 where the picture may change, for the mode "anchor" (x <- M x + (1 - M) x*, exact outside). evaluate_all: never copy
    an anchor, to measure what the recording is worth. b may be larger than the recording's when that is 1.
    """
    batch, length = device_like.shape[0], len(inversion.levels) - 1
    levels = inversion.levels.to(device_like.device)

    def level(rows: Tensor, index: int) -> Tensor:
        row = rows[index].to(device_like.device)
        return row if row.shape[0] == batch else row.expand(batch, *row.shape[1:])

    x = level(inversion.anchors, length)
    # null-text and plain DDIM have no residuals: they have to walk every step
    copies = inversion.method == "resinversion" and flows.backward == 1.0 and not evaluate_all
    on_anchor = True
    for n, i in enumerate(range(length, 0, -1)):
        forward = flows.forward_at(inversion.start + n, inversion.steps)
        if forward == 0.0 and copies and on_anchor:
            below = level(inversion.anchors, i - 1)
            denoised = x + levels[i] * (below - x) / (levels[i] - levels[i - 1])  # where this step points: what a preview shows
            x = below
        else:
            denoised = mixed(i, x, levels[i], forward)
            after = euler(x, denoised, levels[i], levels[i - 1])
            if flows.backward and inversion.method == "resinversion":
                after = after + flows.backward * level(inversion.residuals, i - 1)
            if flows.tether and not on_anchor:
                after = after - flows.tether * (x - level(inversion.anchors, i))
            if mask is not None:
                below = level(inversion.anchors, i - 1)
                after = mask * after + (1 - mask) * below
            x, on_anchor = after, False
            check_finite(x, f"The model gave no numbers (NaN or infinite) at step {inversion.start + n + 1} of "
                            f"{inversion.steps}; lower cfg or the forward strength, or set a tether.")
        on_step(n, denoised, x)
    return x
