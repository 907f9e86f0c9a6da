"""The one training loop: it knows a method by the Task protocol, data by `source.batch`, no base."""
from __future__ import annotations

import json
import logging
import math
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.errors import LikenessError
from . import checkpoint
from .base import Positioned, Rated, Source, Task
from .checkpoint import Checkpoint
from .config import TrainConfig

logger = logging.getLogger("likeness")
WINDOW = 100  # steps over which the losses in the final file's metadata are averaged


class TrainResult(NamedTuple):
    """Where a run ended; losses are means of the last steps, path is the file for use."""
    step: int
    finished: bool
    seconds: float
    losses: dict[str, float]
    path: Path


def train(task: Task, cfg: TrainConfig, source: Source, out_dir: str | Path, *,
          log: Callable[[dict[str, float]], None] | None = None,
          should_stop: Callable[[], bool] | None = None,
          metadata: dict[str, str] | None = None, resume: bool = True) -> TrainResult:
    """Train until cfg.steps or should_stop(); writes loss.csv, state/ and adapter.safetensors into out_dir.

    A run found in out_dir goes on from its last checkpoint, bit for bit on a CPU. log gets one row a step.
    metadata: command, dataset_license, pack_version and more. Raises LikenessError for a loss or
    gradient that is not a number (the checkpoint stays) and for settings other than the run's, and
    KeyboardInterrupt after Ctrl-C, when the step is done and its checkpoint written.
    """
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    run = Run(task, cfg, source)
    saved = checkpoint.load(out) if resume else None
    if saved is not None:
        run.restore(saved)
        logger.info("Training goes on at step %d of %d.", run.step, cfg.steps)
    columns = ("step", *task.columns, "lr", "seconds")
    table = LossTable(out / "loss.csv", columns, saved and saved.state["csv_bytes"])
    last_save = run.step if saved is not None else None
    started = time.perf_counter() - run.seconds
    stopped = False
    interrupt = Interrupt()
    try:
        interrupt.listen()
        while run.step < cfg.steps and not stopped and not interrupt.asked:
            row = run.advance()
            run.seconds = time.perf_counter() - started
            row["seconds"] = round(run.seconds, 3)
            table.add(row)
            if run.step % cfg.csv_every == 0:
                table.flush()
            if log is not None:
                log(row)
            stopped = should_stop is not None and should_stop()
            if run.step % cfg.save_every == 0 and run.step < cfg.steps:
                checkpoint.save(out, run.checkpoint(table.flush()))
                last_save = run.step
        if last_save != run.step:
            checkpoint.save(out, run.checkpoint(table.flush()))
        if interrupt.asked and run.step < cfg.steps:
            logger.warning("Training was stopped at step %d of %d and its checkpoint is saved in %s; the same command goes "
                           "on from there.", run.step, cfg.steps, out)
            raise KeyboardInterrupt
    finally:
        table.flush()
        interrupt.end()
    path = out / "adapter.safetensors"
    task.export(path, run.ema_state(), run.metadata() | (metadata or {}))
    return TrainResult(run.step, run.step >= cfg.steps, run.seconds, run.losses(), path)


class Interrupt:
    """Ctrl-C waits for the end of a step: half a step is a state that no run could go on from. A second one does not."""

    def __init__(self) -> None:
        self.asked = self.listening = False

    def listen(self) -> None:
        """Takes Ctrl-C over, unless it is someone else's already; signals belong to the main thread."""
        if threading.current_thread() is threading.main_thread() and (
                signal.getsignal(signal.SIGINT) is signal.default_int_handler):
            signal.signal(signal.SIGINT, self._note)
            self.listening = True

    def end(self) -> None:
        """Gives it back."""
        if self.listening:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self.listening = False

    def _note(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


class Run:
    """Weights, averages, optimizer and chance of one run."""

    def __init__(self, task: Task, cfg: TrainConfig, source: Source):
        self.task, self.cfg, self.source = task, cfg, source
        self.step, self.seconds = 0, 0.0
        self.generator = torch.Generator().manual_seed(cfg.seed)
        self.window: deque[dict[str, float]] = deque(maxlen=WINDOW)
        self.names = [f"{prefix}.{name}" for prefix, module in task.modules().items()
                      for name, _ in module.named_parameters()]
        self.params: list[Tensor] = [p for module in task.modules().values() for p in module.parameters()]
        self.ema = [p.detach().clone() for p in self.params]
        rates = [task.rate(name) if isinstance(task, Rated) else 1.0 for name in self.names]
        groups: list[dict[str, Any]] = []
        for rate in dict.fromkeys(rates):
            own = [p for p, other in zip(self.params, rates, strict=True) if other == rate]
            # Decay pulls matrices only: norms, biases and gates have no reason to go to zero.
            groups += [{"params": [p for p in own if p.ndim > 1], "rate": rate},
                       {"params": [p for p in own if p.ndim <= 1], "rate": rate, "weight_decay": 0.0}]
        # Fused on the CPU, where it keeps a small adapter's step cheap; elsewhere the ordinary choice.
        on_cpu = all(p.device.type == "cpu" for p in self.params)
        self.optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=cfg.lr,
                                           betas=(cfg.beta1, cfg.beta2), weight_decay=cfg.weight_decay,
                                           fused=on_cpu, foreach=not on_cpu)

    def advance(self) -> dict[str, float]:
        """One optimizer step; returns its row of the table without the seconds."""
        cfg = self.cfg
        self.optimizer.zero_grad(set_to_none=True)
        sums = dict.fromkeys(self.task.columns, 0.0)
        for _ in range(cfg.accumulation):
            batch = self.source.batch(cfg.batch, self.generator)
            for name, value in self.task.step(batch, self.generator).items():
                sums[name] += value / cfg.accumulation
        bad = [name for name, value in sums.items() if not math.isfinite(value)]
        if bad:
            self._fail(f"the loss '{bad[0]}' is {sums[bad[0]]}")
        if cfg.accumulation > 1:
            torch._foreach_div_([p.grad for p in self.params if p.grad is not None], cfg.accumulation)
        norm = torch.nn.utils.clip_grad_norm_(self.params, cfg.clip or math.inf, foreach=True)
        if not torch.isfinite(norm):
            self._fail(f"the size of the gradient is {norm.item()}")
        lr = cfg.lr_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["rate"]
        self.optimizer.step()
        # Young averages would remember the start for long, so their memory grows with the number of steps.
        decay = min(cfg.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, self.params, 1 - decay)
        self.step += 1
        self.window.append(sums)
        return {"step": self.step, **sums, "lr": lr}

    def _fail(self, what: str) -> None:
        raise LikenessError(f"Training stopped at step {self.step + 1}: {what}, so the weights would be "
                            "lost; the last checkpoint is untouched. Lower the learning rate or check the "
                            "training pictures, then start in a new folder.")

    def losses(self) -> dict[str, float]:
        """Mean of each loss over the last steps."""
        count = max(1, len(self.window))
        return {name: sum(row[name] for row in self.window) / count for name in self.task.columns}

    def metadata(self) -> dict[str, str]:
        """What the final file says about its training; the caller's entries stand above these."""
        return {"steps": str(self.step), "seconds": f"{self.seconds:.0f}", "lr": repr(self.cfg.lr),
                "losses": json.dumps({name: round(value, 6) for name, value in self.losses().items()}),
                "train_config": self.cfg.to_json(), "dataset_license": "unknown", "command": "not recorded",
                "pack_version": "unknown"}

    def ema_state(self) -> dict[str, dict[str, Tensor]]:
        """Module -> state dict with the averages in place of the parameters (buffers as they are)."""
        averages = dict(zip(self.names, self.ema, strict=True))
        return {prefix: {key: averages.get(f"{prefix}.{key}", value) for key, value in state.items()}
                for prefix, state in self.weights().items()}

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """Module -> its state dict."""
        return {prefix: module.state_dict() for prefix, module in self.task.modules().items()}

    def checkpoint(self, csv_bytes: int) -> Checkpoint:
        """The whole state; csv_bytes is the length of the loss table at this step."""
        optimizer = {f"{name}/{key}": value for name, p in zip(self.names, self.params, strict=True)
                     for key, value in self.optimizer.state.get(p, {}).items()}
        position = self.source.state_dict() if isinstance(self.source, Positioned) else None
        state: dict[str, Any] = {
            "step": self.step, "seconds": self.seconds, "csv_bytes": csv_bytes, "source": position,
            "generator": checkpoint.pack_rng(self.generator), "window": list(self.window),
            "config": json.loads(self.cfg.to_json())}
        return Checkpoint(_flat(self.weights()), _flat(self.ema_state()), optimizer, state)

    def restore(self, saved: Checkpoint) -> None:
        """Take over a saved run; raises LikenessError when it is another one."""
        changed = self.cfg.differences(TrainConfig.from_json(json.dumps(saved.state["config"])))
        if changed:
            raise LikenessError(f"The folder holds a run with other settings ({', '.join(changed)}); keep "
                                "them to go on with it, or train in a new folder.")
        own = {key: tuple(value.shape) for key, value in _flat(self.weights()).items()}
        for key in sorted(set(own) | set(saved.weights)):
            shape = tuple(saved.weights[key].shape) if key in saved.weights else None
            if own.get(key) != shape:
                raise LikenessError(f"The folder holds a run of another model: {key} has the shape {shape} "
                                    f"there and {own.get(key)} here; train in a new folder.")
        for prefix, module in self.task.modules().items():
            module.load_state_dict({key: saved.weights[f"{prefix}.{key}"] for key in module.state_dict()})
        moments: dict[str, dict[str, Tensor]] = {}
        for key, value in saved.optimizer.items():
            name, kind = key.rsplit("/", 1)
            moments.setdefault(name, {})[kind] = value
        for name, p, average in zip(self.names, self.params, self.ema, strict=True):
            average.copy_(saved.ema[name])
            if name in moments:
                # "step" stays on the CPU, as the optimizer itself keeps it.
                self.optimizer.state[p] = {key: value if key == "step" else value.to(p)
                                           for key, value in moments[name].items()}
        self.generator.set_state(checkpoint.unpack_rng(saved.state["generator"]))
        if saved.state["source"] is not None:
            assert isinstance(self.source, Positioned)
            self.source.load_state_dict(saved.state["source"])
        self.window.extend(saved.state["window"])
        self.step, self.seconds = saved.state["step"], saved.state["seconds"]


def _flat(states: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{prefix}.{key}": value for prefix, state in states.items() for key, value in state.items()}


class LossTable:
    """A CSV that is appended to in blocks and cut back to its length at the checkpoint when a run goes on."""

    def __init__(self, path: Path, columns: tuple[str, ...], resume_at: int | None):
        self.path, self.columns = path, columns
        self.rows: list[str] = []
        if resume_at and path.is_file() and path.stat().st_size >= resume_at:
            with open(path, "r+b") as file:
                file.truncate(resume_at)
        else:
            path.write_bytes((",".join(columns) + "\n").encode())

    def add(self, row: dict[str, float]) -> None:
        """Keep one row for the next flush."""
        self.rows.append(",".join(f"{row[name]:.9g}" for name in self.columns) + "\n")

    def flush(self) -> int:
        """Append what was kept; returns the length of the file in bytes."""
        if self.rows:
            with open(self.path, "ab") as file:
                file.write("".join(self.rows).encode())
            self.rows = []
        return self.path.stat().st_size
