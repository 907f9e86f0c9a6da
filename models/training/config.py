"""The settings of a training run."""
from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

from ..common.errors import LikenessError

CHOICES = {
    "schedule": ("cosine", "constant"),
    "contrast_mode": ("raw", "clamp", "abs"),
    "decouple": ("channel", "token", "off"),
    "mode": ("modules",),
    "export_dtype": ("fp32", "fp16"),
}
DROPS = ("drop_text", "drop_reference", "drop_both", "global_off", "local_off")
# What a resumed run may have changed without becoming another run.
RESUMABLE = ("steps", "save_every", "csv_every", "export_dtype")


@dataclass(frozen=True)
class TrainConfig:
    """All settings of a run; with the same source and seed they fix the result bit for bit on a CPU.

    drop_*: chance of training without the text, the reference, both (three independent draws a sample).
    global_off, local_off: chance of one level of the injection off, so that one run serves all ablations.
    noisiest_of: the timestep is the noisiest of so many draws (density k t^(k - 1)): what a reference can tell is decided early.
    subject_weight: how much more the loss counts inside the subject, where the data has its mask: 1 + weight * mask.
    mode "modules" trains the new modules on a frozen base (the paper trains the base too).
    """
    steps: int = 1000
    batch: int = 4
    accumulation: int = 1
    lr: float = 1e-4
    warmup: int = 100
    schedule: str = "cosine"
    lr_floor: float = 0.03
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.999
    drop_text: float = 0.05
    drop_reference: float = 0.05
    drop_both: float = 0.05
    global_off: float = 0.0
    local_off: float = 0.0
    noisiest_of: int = 1
    subject_weight: float = 0.0
    weight_normal: float = 2.0
    weight_decouple: float = 1.0
    weight_contrast: float = 0.5
    contrast_mode: str = "raw"
    decouple: str = "channel"
    save_every: int = 500
    csv_every: int = 20
    seed: int = 0
    mode: str = "modules"
    reference_augment: bool = True
    export_dtype: str = "fp32"

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise LikenessError(f"The training setting {name} may be {', '.join(known)}, got "
                                    f"'{getattr(self, name)}'.")
        for name in ("steps", "batch", "accumulation", "noisiest_of", "save_every", "csv_every"):
            self._expect(name, getattr(self, name) >= 1, "at least 1")
        for name in (*DROPS, "ema", "lr_floor"):
            self._expect(name, 0 <= getattr(self, name) <= 1, "between 0 and 1")
        for name in ("beta1", "beta2"):
            self._expect(name, 0 <= getattr(self, name) < 1, "between 0 and 1, without 1")
        for name in ("warmup", "clip", "weight_decay", "subject_weight"):
            self._expect(name, 0 <= getattr(self, name) < math.inf, "0 or more")
        for name in ("weight_normal", "weight_decouple", "weight_contrast"):
            self._expect(name, math.isfinite(getattr(self, name)), "a number")
        self._expect("lr", 0 < self.lr < math.inf, "above 0")

    def _expect(self, name: str, good: bool, what: str) -> None:
        if not good:
            raise LikenessError(f"The training setting {name} has to be {what}, got {getattr(self, name)}.")

    @property
    def loss_weights(self) -> tuple[float, float, float]:
        """Weights of the normal, decoupling and contrast loss."""
        return self.weight_normal, self.weight_decouple, self.weight_contrast

    def lr_at(self, step: int) -> float:
        """Learning rate of a step (from 0): linear warm-up, then half a cosine down to lr * lr_floor."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.lr
        progress = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return self.lr * (self.lr_floor + (1 - self.lr_floor) * (0.5 + 0.5 * math.cos(math.pi * progress)))

    def to_json(self) -> str:
        """JSON text with one entry a setting."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> TrainConfig:
        """Read `to_json` text; missing settings take their default, unknown ones raise LikenessError."""
        try:
            fields = json.loads(text)
            unknown = sorted(set(fields) - {field.name for field in dataclasses.fields(cls)})
            if unknown:
                raise LikenessError(f"These training settings are not known: {', '.join(unknown)}.")
            # JSON written by hand has 1 for 1.0; the types decide how a value is compared and stored.
            return cls(**{name: _as(type(getattr(cls, name)), name, value) for name, value in fields.items()})
        except LikenessError:
            raise
        except (ValueError, TypeError) as error:
            raise LikenessError(f"The training settings cannot be read as JSON ({error}).") from error

    def differences(self, other: TrainConfig) -> list[str]:
        """Settings of a saved run (`other`) that this run may not change, as "lr 0.001 -> 0.002"."""
        return [f"{name} {getattr(other, name)} -> {getattr(self, name)}"
                for name in (field.name for field in dataclasses.fields(self))
                if name not in RESUMABLE and getattr(other, name) != getattr(self, name)]


def _as(kind: type, name: str, value: Any) -> Any:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is float and number:
        return float(value)
    if type(value) is not kind:
        raise LikenessError(f"The training setting {name} has to be of the kind {kind.__name__}, got "
                            f"{value!r}.")
    return value
