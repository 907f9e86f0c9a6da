"""Faces of a video: the same face from picture to picture, and its points steadied."""
from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

import torch
from torch import Tensor

from .analyse import likeness
from .faces import Face

NEAR, SAME = 0.3, 0.2  # intersection over union, and similarity, below which two faces are not one


def _overlap(a: Tensor, b: Tensor) -> float:
    low, high = torch.maximum(a[:2], b[:2]), torch.minimum(a[2:], b[2:])
    common = float((high - low).clamp(min=0).prod())
    whole = float((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod()) - common
    return common / whole if whole > 0 else 0.0


def _alike(a: Face, b: Face) -> float | None:
    """Similarity of two faces, None where one of them was not recognised."""
    return None if a.embedding is None or b.embedding is None else likeness(a, b)


def _best_first(pairs: Iterable[tuple[float, int, int]]) -> dict[int, int]:
    """(share, a, b) of all that may go together -> a: b, each of them once, the largest share first."""
    out: dict[int, int] = {}
    for _, a, b in sorted(pairs, reverse=True):
        if a not in out and b not in out.values():
            out[a] = b
    return out


def tracks(frames: list[tuple[Face, ...]]) -> list[list[tuple[int, int]]]:
    """Chains of (picture, place) of one face through neighbouring pictures; a cut or a gap begins a new chain."""
    chains: list[list[tuple[int, int]]] = []
    open_chains: list[list[tuple[int, int]]] = []
    for number, frame in enumerate(frames):
        before = [frames[number - 1][chain[-1][1]] for chain in open_chains]
        pairs = [(share, index, place) for index, was in enumerate(before) for place, face in enumerate(frame)
                 if (share := _overlap(was.box, face.box)) >= NEAR and ((alike := _alike(was, face)) is None or alike >= SAME)]
        taken = {place: open_chains[index] for index, place in _best_first(pairs).items()}
        for place in range(len(frame)):
            if place not in taken:
                taken[place] = []
                chains.append(taken[place])
            taken[place].append((number, place))
        open_chains = list(taken.values())
    return chains


def smooth(frames: list[tuple[Face, ...]], reach: int) -> list[tuple[Face, ...]]:
    """Keypoints and landmarks as a Gaussian mean over `reach` pictures to each side of the same face: a swap that is calm.

    Both sides count, so nothing lags behind; at the ends of a chain the window shrinks to stay centred. Landmarks, which
    the hull is made of, need to be known of every face of the window."""
    if reach <= 0:
        return frames
    out = [list(frame) for frame in frames]
    for chain in tracks(frames):
        faces = [frames[number][place] for number, place in chain]
        for index, (number, place) in enumerate(chain):
            side = min(reach, index, len(chain) - 1 - index)
            steps = torch.arange(-side, side + 1).float()
            weights = torch.exp(-0.5 * (steps / max(reach / 2, 0.5)) ** 2)
            near = faces[index - side:index + side + 1]
            marks = [face.landmarks for face in near if face.landmarks is not None]
            steady = faces[index]._replace(keypoints=_mean([face.keypoints for face in near], weights))
            out[number][place] = steady._replace(landmarks=_mean(marks, weights)) if len(marks) == len(near) else steady
    return [tuple(frame) for frame in out]


def _mean(points: list[Tensor], weights: Tensor) -> Tensor:
    """Of points (n, 2) in several pictures."""
    return (torch.stack(points) * weights[:, None, None]).sum(0) / weights.sum()


def seats(frames: list[tuple[Face, ...]]) -> list[list[int]]:
    """For each picture a number of each of its faces, the same one as long as a face stays. Who comes back after a gap gets the
    old one where it is free, by likeness; who comes anew gets one that nobody had, or the lowest that is free where nobody of
    the picture before is left. Pictures that have nothing to do with each other number their faces in order."""
    out = [[-1] * len(frame) for frame in frames]
    last: dict[int, Face] = {}  # seat -> who had it last
    for first, group in groupby(sorted(tracks(frames), key=lambda chain: chain[0]), key=lambda chain: chain[0][0]):
        coming = {chain[0][1]: chain for chain in group}  # by place in the picture
        free = [seat for seat in range(len(last) + len(frames[first])) if seat not in out[first]]
        given = _returning({place: frames[first][place] for place in coming}, {seat: last[seat] for seat in free if seat in last})
        # While somebody goes on, those who left may come back; where all are new, as in a batch of photographs, none will.
        goes_on = any(seat >= 0 for seat in out[first])
        fresh = iter([seat for seat in free if seat not in given.values() and not (goes_on and seat in last)])
        for place, chain in coming.items():
            seat = given[place] if place in given else next(fresh)
            for number, own in chain:
                out[number][own] = seat
            number, own = chain[-1]
            last[seat] = frames[number][own]
    return out


def _returning(coming: dict[int, Face], gone: dict[int, Face]) -> dict[int, int]:
    """place -> seat of those who had one before, the likest pair first."""
    return _best_first((alike, place, seat) for place, face in coming.items() for seat, before in gone.items()
                       if (alike := _alike(face, before)) is not None and alike >= SAME)
