"""The masks of the last runs, for the preview: kept by the finished latent, so that no run can be taken for another."""
from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from typing import Any, NamedTuple

import comfy.model_management as management
import torch
from torch import Tensor

KEPT = 8


class WordRun(NamedTuple):
    """text: the word. masks: (step, (b, 1, h, w)) of every step that changed it; later ones kept the last. steps: of the run."""
    text: str
    masks: tuple[tuple[int, Tensor], ...]
    steps: int


class Runs:
    """The masks of the last KEPT runs: the one thing here that outlives a sampling, some kilobytes each."""

    def __init__(self) -> None:
        self._runs: OrderedDict[Any, dict[str, WordRun]] = OrderedDict()
        self._lock = threading.Lock()

    def keep(self, latent: Tensor, words: dict[str, WordRun]) -> None:
        """words: {name of a guidance: its masks}; the oldest run makes room."""
        # samplings that differ only in what changes nothing (an early end) end at one latent, each with names of its own
        key = latent_hash(latent), tuple(sorted(words))
        with self._lock:
            self._runs.pop(key, None)
            self._runs[key] = words
            while len(self._runs) > KEPT:
                self._runs.popitem(last=False)

    def find(self, latent: Tensor, name: str = "") -> dict[str, WordRun] | None:
        """What was kept for this very latent, or None: the last run that had a guidance of this name, else the last."""
        digest = latent_hash(latent)
        with self._lock:
            found = [words for (own, _), words in self._runs.items() if own == digest]
        return next((words for words in reversed(found) if name in words), found[-1] if found else None)


RUNS = Runs()


def latent_hash(latent: Tensor) -> str:
    """Name of a finished latent (b, c, h, w), the same inside the sampler and behind it."""
    # some of core's samplers hand on the intermediate type, others float32
    plain = latent.detach().to("cpu", management.intermediate_dtype()).contiguous()
    digest = hashlib.sha256(repr(tuple(plain.shape)).encode())
    digest.update(plain.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
