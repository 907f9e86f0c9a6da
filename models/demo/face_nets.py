"""Three tiny networks with the inputs and outputs of an insightface pack, for the heads of creatures.

Together with the swapper's identity map they stay below a megabyte as ONNX files.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRIDES = (8, 16, 32)
WIDTH = 512  # of an embedding
SIDE = 32    # pixels of the swapper's inner picture; a head of the miniature is no sharper


def _conv(before: int, after: int, stride: int = 1, kernel: int = 3, dilation: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, kernel, stride, dilation * (kernel // 2), dilation), nn.ReLU())


class HeadDetector(nn.Module):
    """(1, 3, h, w), h and w multiples of 32 -> score, box, keypoints at strides 8, 16, 32 as SCRFD gives them.

    One small network looks at the picture, at its half and at its quarter: whatever it learned of heads of about 48
    pixels holds for those of 96 and 192."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv(3, 12, 2, 5), _conv(12, 20, 2), _conv(20, 24, 2), _conv(24, 28, 1, 3, 2),
                                  _conv(28, 28, 1, 3, 2))
        self.head = nn.Conv2d(28, 15, 1)  # score, four distances, five points

    def look(self, picture: Tensor) -> Tensor:
        """One level: (n, 3, h, w) -> (n, 15, h / 8, w / 8)."""
        return self.head(self.body(picture))

    def forward(self, picture: Tensor) -> tuple[Tensor, ...]:
        levels = []
        for _ in STRIDES:
            levels.append(self.look(picture))
            picture = F.avg_pool2d(picture, 2)
        scores, boxes, points = [], [], []
        for level in levels:
            rows = level.permute(0, 2, 3, 1).reshape(-1, 15)
            # SCRFD has two anchors a cell: the second one never fires.
            silent = torch.cat([rows[:, :1], rows[:, :1] * 0 - 20], 1)
            scores.append(torch.sigmoid(silent.reshape(-1, 1)))
            boxes.append(torch.cat([rows[:, 1:5], rows[:, 1:5]], 1).reshape(-1, 4))
            points.append(torch.cat([rows[:, 5:], rows[:, 5:]], 1).reshape(-1, 10))
        return (*scores, *boxes, *points)


class HeadRecogniser(nn.Module):
    """(n, 3, 112, 112) -> (n, 512) raw embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.AvgPool2d(4), _conv(3, 16), _conv(16, 32, 2), _conv(32, 44, 2),
                                  nn.Conv2d(44, 32, 3, 2, 1), nn.Flatten(1))

    def forward(self, crop: Tensor) -> Tensor:
        return self.body(crop)


class _Styled(nn.Module):
    """A residual step whose result is scaled and shifted by the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, 1, 1)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        scale, shift = style.chunk(2, 1)
        return x + F.relu(self.conv(x) * (1 + scale) + shift)


class HeadSwapper(nn.Module):
    """target (n, 3, 128, 128) in 0..1, source (1, 512) -> (n, 3, 128, 128).

    The identity gives two colours; the picture and the identity together say which pixels take the first, which the second
    and which stay. Creatures are painted in flat colours, so that is all a face of theirs needs."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first, self.down = _conv(3, 16), _conv(16, width, 2)
        self.place = nn.Parameter(torch.zeros(1, width, SIDE // 2, SIDE // 2))  # crops are aligned, so places mean something
        self.style = nn.Sequential(nn.Linear(WIDTH, 64), nn.ReLU(), nn.Linear(64, 4 * width))
        self.colours = nn.Sequential(nn.Linear(WIDTH, 64), nn.ReLU(), nn.Linear(64, 6), nn.Sigmoid())
        self.steps = nn.ModuleList([_Styled(width), _Styled(width)])
        self.up, self.last = nn.Conv2d(width, 16, 3, 1, 1), nn.Sequential(_conv(32, 16), nn.Conv2d(16, 3, 3, 1, 1))

    def forward(self, target: Tensor, source: Tensor) -> Tensor:
        skip = self.first(F.avg_pool2d(target, 4))
        x = self.down(skip) + self.place
        source = source * 8  # numbers of about one third
        style = self.style(source)[:, :, None, None]
        wide = 2 * x.shape[1]
        for number, step in enumerate(self.steps):
            x = step(x, style[:, number * wide:(number + 1) * wide])
        x = torch.cat([F.relu(self.up(F.interpolate(x, scale_factor=2, mode="nearest"))), skip], 1)
        shares = F.interpolate(self.last(x), scale_factor=4, mode="bilinear", align_corners=False).softmax(1)
        colours = self.colours(source)[:, :, None, None]
        return target * shares[:, :1] + colours[:, :3] * shares[:, 1:2] + colours[:, 3:] * shares[:, 2:]
