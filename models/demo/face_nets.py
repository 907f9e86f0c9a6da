"""Three tiny networks with the inputs and outputs of an insightface pack, for the heads of creatures.

Together with the swapper's identity map they stay below a megabyte as ONNX files.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .world import PALETTE, PATTERNS

STRIDES = (8, 16, 32)
WIDTH = 512  # of an embedding
SIDE = 32    # pixels of the swapper's inner picture; a head of the miniature is no sharper


def _conv(before: int, after: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, stride, 1), nn.ReLU())


def _normed(before: int, after: int, stride: int = 1, kernel: int = 3, dilation: int = 1) -> nn.Sequential:
    """The norm becomes a part of the convolution when the network is exported."""
    return nn.Sequential(nn.Conv2d(before, after, kernel, stride, dilation * (kernel // 2), dilation, bias=False),
                         nn.BatchNorm2d(after), nn.ReLU())


class HeadDetector(nn.Module):
    """(1, 3, h, w), h and w multiples of 32 -> score, box, keypoints at strides 8, 16, 32 as SCRFD gives them.

    One small network looks at the picture, at its half and at its quarter: whatever it learned of heads of about 48
    pixels holds for those of 96 and 192."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(_normed(3, 12, 2, 5), _normed(12, 20, 2), _normed(20, 24, 2), _normed(24, 28, dilation=2),
                                  _normed(28, 28, dilation=2))
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


class _Step(nn.Module):
    """A residual step."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.body = _normed(width, width, dilation=dilation)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class HeadSwapper(nn.Module):
    """target (n, 3, 128, 128) in 0..1, source (1, 512) -> (n, 3, 128, 128).

    The identity says which two paints and which pattern; the picture and the pattern together say which pixels take the first
    paint, which the second and which stay. Creatures are painted in flat colours, so that is all a face of theirs needs."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        paints, patterns = len(PALETTE), len(PATTERNS)
        self.parts = (paints, paints, patterns)
        self.read = nn.Linear(WIDTH, sum(self.parts))
        self.paints = nn.Parameter(PALETTE.clone())
        # Crops are aligned, so a place in them means something, and another thing for each pattern.
        self.place = nn.Parameter(torch.zeros(patterns, width * (SIDE // 2) ** 2))
        self.first, self.down = _normed(3, 16), _normed(16, width, 2)
        self.steps = nn.Sequential(*(_Step(width, dilation) for dilation in (1, 2, 4)))
        self.up, self.last = _normed(width, 16), nn.Sequential(_normed(32, 16), nn.Conv2d(16, 3, 3, 1, 1))

    def choose(self, small: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of keep, first and second paint (n, 3, 32, 32) for pictures of that size, and the two paints (n, 6)."""
        one, two, pattern = self.read(source).split(self.parts, 1)
        paints = torch.cat([one.softmax(1) @ self.paints, two.softmax(1) @ self.paints], 1)
        skip = self.first(small)
        x = self.down(skip)
        x = self.steps(x + (pattern.softmax(1) @ self.place).reshape(-1, *x.shape[1:]))
        x = self.up(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.last(torch.cat([x, skip], 1)), paints

    @staticmethod
    def paint(target: Tensor, logits: Tensor, paints: Tensor) -> Tensor:
        """Each pixel of target (n, 3, h, w) mixed of itself and the two paints (n, 6)."""
        shares = logits.softmax(1)
        paints = paints[:, :, None, None]
        return target * shares[:, :1] + paints[:, :3] * shares[:, 1:2] + paints[:, 3:] * shares[:, 2:]

    def forward(self, target: Tensor, source: Tensor) -> Tensor:
        logits, paints = self.choose(F.avg_pool2d(target, 4), source)
        return self.paint(target, F.interpolate(logits, scale_factor=4.0, mode="bilinear", align_corners=False), paints)
