"""The loop: it learns, goes on exactly where it stopped, and nothing that happens costs the checkpoint."""
from __future__ import annotations

import csv
import json
import os
import shutil
import signal

import pytest
import torch

from likeness.models.common import files
from likeness.models.common.errors import LikenessError
from likeness.models.custany import config as configs
from likeness.models.training import checkpoint, loop
from likeness.models.training.config import TrainConfig
from likeness.models.training.custany import CustAnyTask
from likeness.models.training.loop import train
from unit.training_toy import CONFIG, ToyBase, ToySource, settings


def start(out, source=None, **changes):
    options = {name: changes.pop(name) for name in ("log", "should_stop", "metadata", "resume")
               if name in changes}
    cfg = settings(**changes)
    return train(CustAnyTask(ToyBase(), CONFIG, cfg), cfg, source or ToySource(), out, **options)


def stop_after(steps: int):
    calls = iter(range(1, 10_000))
    return lambda: next(calls) >= steps


def rows(out) -> list[dict[str, str]]:
    with open(out / "loss.csv", newline="") as file:
        table = list(csv.DictReader(file))
    return [{name: value for name, value in row.items() if name != "seconds"} for row in table]


def state(out) -> dict:
    saved = checkpoint.load(out)
    adapter = files.load(out / "adapter.safetensors")[0]
    return {"weights": saved.weights, "ema": saved.ema, "optimizer": saved.optimizer, "adapter": adapter}


def assert_same(one, two) -> None:
    assert rows(one) == rows(two)
    first, second = state(one), state(two)
    for part, tensors in first.items():
        assert set(tensors) == set(second[part])
        for key, value in tensors.items():
            assert torch.equal(value, second[part][key]), (part, key)
    a, b = checkpoint.load(one).state, checkpoint.load(two).state
    assert a["generator"] == b["generator"] and a["window"] == b["window"] and a["step"] == b["step"]


def test_the_loss_falls(tmp_path):
    start(tmp_path, steps=80, batch=8, save_every=1000, decouple="off", warmup=5, lr=2e-2, drop_text=0.0,
          drop_reference=0.0, drop_both=0.0)
    normal = [float(row["normal"]) for row in rows(tmp_path)]
    assert sum(normal[-10:]) < 0.8 * sum(normal[:10])


def test_resume_equals_no_interruption(tmp_path):
    start(tmp_path / "whole", save_every=100)
    result = start(tmp_path / "parts", save_every=100, should_stop=stop_after(4))
    assert (result.step, result.finished) == (4, False) and len(rows(tmp_path / "parts")) == 4
    with pytest.raises(AssertionError):
        assert_same(tmp_path / "whole", tmp_path / "parts")
    result = start(tmp_path / "parts", save_every=100)
    assert (result.step, result.finished) == (8, True) and len(rows(tmp_path / "parts")) == 8
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_ctrl_c_saves_and_goes_on_as_if_nothing_had_been(tmp_path, caplog):
    """Pressed in the middle of step 6, between two checkpoints: the step is finished, saved and said."""
    class Pressing(ToySource):
        def batch(self, n, generator):
            if self.count == 5:
                signal.raise_signal(signal.SIGINT)
            return super().batch(n, generator)

    before = signal.getsignal(signal.SIGINT)
    start(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "parts", Pressing())
    assert "stopped at step 6 of 8" in caplog.text and signal.getsignal(signal.SIGINT) is before
    assert len(rows(tmp_path / "parts")) == 6 and checkpoint.load(tmp_path / "parts").state["step"] == 6
    start(tmp_path / "parts")
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_a_second_ctrl_c_does_not_wait(tmp_path):
    class Pressing(ToySource):
        def batch(self, n, generator):
            if self.count == 5:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
                raise AssertionError("went on")
            return super().batch(n, generator)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path, Pressing())
    assert checkpoint.load(tmp_path).state["step"] == 4 and signal.getsignal(signal.SIGINT) is before


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path):
    """Killed at step 6 after the checkpoint of step 4: rows 5 and 6 are cut off the table and made again."""
    class Killed(Exception):
        pass

    def kill(row):
        if row["step"] == 6:
            raise Killed
    start(tmp_path / "whole")
    with pytest.raises(Killed):
        start(tmp_path / "parts", log=kill)
    assert len(rows(tmp_path / "parts")) == 6 and checkpoint.load(tmp_path / "parts").state["step"] == 4
    start(tmp_path / "parts")
    assert_same(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("moment", ["first file", "state.json", "first rename", "second rename", "clean up"])
def test_a_kill_while_saving_leaves_a_whole_checkpoint(tmp_path, monkeypatch, moment):
    start(tmp_path, should_stop=stop_after(3))
    before = checkpoint.load(tmp_path)
    after = before._replace(state=before.state | {"step": 4})

    class Killed(BaseException):
        pass

    def kill(*args, **kwargs):
        raise Killed
    if moment == "first file":
        real, calls = files.save, []

        def save(path, *args):  # the second of three files breaks in the middle
            calls.append(path)
            if len(calls) == 2:
                path.write_bytes(b"half")
                kill()
            real(path, *args)
        monkeypatch.setattr(checkpoint.files, "save", save)
    elif moment == "state.json":
        monkeypatch.setattr(checkpoint.json, "dump", kill)
    elif moment == "clean up":
        monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda path, **kwargs: kill() if (
            path.name == "state.old" and path.exists() and (tmp_path / "state").exists()) else None)
    else:
        real, calls = type(tmp_path).rename, []

        def rename(self, target):
            calls.append(target)
            if len(calls) == (1 if moment == "first rename" else 2):
                kill()
            return real(self, target)
        monkeypatch.setattr(type(tmp_path), "rename", rename)
    with pytest.raises(Killed):
        checkpoint.save(tmp_path, after)
    monkeypatch.undo()
    loaded = checkpoint.load(tmp_path)
    assert loaded.state["step"] == (4 if moment == "clean up" else 3)
    assert all(torch.equal(value, before.weights[key]) for key, value in loaded.weights.items())
    checkpoint.save(tmp_path, after)  # leftovers do not disturb the next one
    assert checkpoint.load(tmp_path).state["step"] == 4
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["state"]


@pytest.mark.parametrize("spoil", ["cut", "missing", "json", "version"])
def test_a_damaged_checkpoint_is_named(tmp_path, spoil):
    start(tmp_path, should_stop=stop_after(2))
    path = tmp_path / "state" / ("ema.safetensors" if spoil in ("cut", "missing") else "state.json")
    if spoil == "cut":
        os.truncate(path, path.stat().st_size - 8)
    elif spoil == "missing":
        path.unlink()
    else:
        newer = json.dumps(json.loads(path.read_text()) | {"format_version": 99})
        path.write_text("{" if spoil == "json" else newer)
    with pytest.raises(LikenessError, match="checkpoint"):
        start(tmp_path)


def test_a_bad_loss_names_its_step_and_keeps_the_checkpoint(tmp_path):
    source = ToySource()
    source.poison_at = 5
    with pytest.raises(LikenessError, match="step 6.*normal|step 6.*total"):
        start(tmp_path, source)
    saved = checkpoint.load(tmp_path)
    assert saved.state["step"] == 4 and len(rows(tmp_path)) == 5
    assert all(torch.isfinite(value).all() for value in (*saved.weights.values(), *saved.optimizer.values()))
    start(tmp_path)
    start(tmp_path.with_name("whole"))
    assert_same(tmp_path, tmp_path.with_name("whole"))


def test_a_bad_gradient_stops_before_the_weights(tmp_path):
    class Task(CustAnyTask):
        def step(self, batch, generator):
            row = super().step(batch, generator)
            self.adapter.local_mlp.out.bias.grad = torch.full((16,), float("inf"))
            return row
    cfg = settings()
    task = Task(ToyBase(), CONFIG, cfg)
    with pytest.raises(LikenessError, match="step 1.*gradient"):
        train(task, cfg, ToySource(), tmp_path)
    assert all(torch.isfinite(p).all() for p in task.adapter.parameters())


def test_another_run_in_the_folder_is_refused(tmp_path):
    start(tmp_path, should_stop=stop_after(2))
    with pytest.raises(LikenessError, match="lr 0.01 -> 0.02"):
        start(tmp_path, lr=0.02)
    cfg = settings()
    with pytest.raises(LikenessError, match="output_1_0"):
        smaller = CONFIG._replace(layers=CONFIG.layers[:1])
        train(CustAnyTask(ToyBase(), smaller, cfg), cfg, ToySource(), tmp_path)
    assert start(tmp_path, steps=10, save_every=3).step == 10  # a longer run of the same settings may go on
    assert start(tmp_path, lr=0.02, resume=False).step == 8
    assert [row["step"] for row in rows(tmp_path)] == [str(step) for step in range(1, 9)]


def test_a_finished_run_is_not_trained_again(tmp_path):
    start(tmp_path)
    (tmp_path / "adapter.safetensors").unlink()
    seen = []
    assert start(tmp_path, log=seen.append).finished and seen == []
    assert (tmp_path / "adapter.safetensors").is_file()


def test_a_lost_table_is_begun_again(tmp_path):
    start(tmp_path, should_stop=stop_after(4))
    (tmp_path / "loss.csv").unlink()
    start(tmp_path)
    assert [row["step"] for row in rows(tmp_path)] == ["5", "6", "7", "8"]


def test_table_and_log(tmp_path):
    seen = []
    start(tmp_path, log=seen.append)
    text = (tmp_path / "loss.csv").read_text().splitlines()
    assert text[0] == "step,total,normal,decouple,contrast,cosine,lr,seconds" and len(text) == 9
    assert [row["step"] for row in seen] == list(range(1, 9))
    for row, line in zip(seen, csv.DictReader(text), strict=True):
        assert float(line["total"]) == pytest.approx(row["total"])
        assert row["total"] == pytest.approx(2 * row["normal"] + row["decouple"] + 0.5 * row["contrast"])
    seconds = [row["seconds"] for row in seen]
    assert seconds == sorted(seconds) and 0 < seconds[-1] < 60


def test_final_file_holds_the_averages_and_the_story(tmp_path):
    result = start(tmp_path, metadata={"command": "dev.py train", "dataset_license": "CC0"})
    tensors, meta = files.load(result.path)
    saved = checkpoint.load(tmp_path)
    assert all(torch.equal(value, saved.ema[f"adapter.{key}"]) for key, value in tensors.items())
    assert any(not torch.equal(value, saved.weights[f"adapter.{key}"]) for key, value in tensors.items())
    assert configs.from_metadata(meta) == CONFIG
    assert (meta["steps"], meta["command"], meta["dataset_license"]) == ("8", "dev.py train", "CC0")
    assert TrainConfig.from_json(meta["train_config"]) == settings()
    losses = json.loads(meta["losses"])
    table = rows(tmp_path)
    assert losses["normal"] == pytest.approx(sum(float(row["normal"]) for row in table) / 8, rel=1e-4)
    assert set(meta) >= {"format_version", "method", "base", "encoders", "background", "lr", "seconds",
                         "pack_version"}


def test_average_warms_up():
    class Task:
        columns = ("total",)
        module = torch.nn.Linear(1, 1, bias=False)

        def modules(self):
            return {"m": self.module}

        def step(self, batch, generator):
            loss = self.module.weight.sum()
            loss.backward()
            return {"total": loss.item()}
    task = Task()
    task.module.weight.data.fill_(0.0)
    cfg = settings(ema=0.15, warmup=0, schedule="constant", lr=1.0, weight_decay=0.0)
    run = loop.Run(task, cfg, ToySource())
    average = 0.0
    for step in range(4):
        run.advance()
        weight = task.module.weight.item()
        assert weight == pytest.approx(-1.0 - step, rel=1e-4)
        decay = min(0.15, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * weight
        assert run.ema_state()["m"]["weight"].item() == pytest.approx(average, rel=1e-5)


def test_accumulation_is_the_mean_of_its_parts():
    class Batches:
        def __init__(self):
            self.all = [ToySource().batch(4, torch.Generator().manual_seed(seed)) for seed in (1, 2)]

        def batch(self, n, generator):
            return self.all.pop(0)

    def gradient(accumulation, parts):
        cfg = settings(accumulation=accumulation, clip=0.0)
        run = loop.Run(CustAnyTask(ToyBase(), CONFIG, cfg), cfg, Batches())
        run.source.all = run.source.all[parts]
        row = run.advance()
        return run.params[-1].grad.clone(), row["total"], run

    grad, total, run = gradient(2, slice(0, 2))
    generator = torch.Generator().manual_seed(run.cfg.seed)
    cfg = settings()
    task = CustAnyTask(ToyBase(), CONFIG, cfg)
    totals = [task.step(batch, generator)["total"] for batch in Batches().all]
    assert total == pytest.approx(sum(totals) / 2)
    last = [p for module in task.modules().values() for p in module.parameters()][-1]
    assert grad.abs().sum() > 0 and torch.allclose(grad, last.grad / 2, rtol=1e-5, atol=1e-8)


def test_gradient_is_clipped():
    norms = []
    for clip in (1e-3, 0.0):
        cfg = settings(clip=clip)
        run = loop.Run(CustAnyTask(ToyBase(), CONFIG, cfg), cfg, ToySource())
        run.advance()
        norms.append(torch.cat([p.grad.flatten() for p in run.params if p.grad is not None]).norm().item())
    assert norms[0] == pytest.approx(1e-3, rel=1e-3) and norms[1] > 1e-2


def test_only_matrices_decay():
    cfg = settings(weight_decay=0.5)
    run = loop.Run(CustAnyTask(ToyBase(), CONFIG, cfg), cfg, ToySource())
    decays = {id(p): group["weight_decay"] for group in run.optimizer.param_groups for p in group["params"]}
    assert {decays[id(p)] for p in run.params if p.ndim > 1} == {0.5}
    assert {decays[id(p)] for p in run.params if p.ndim <= 1} == {0.0} and len(decays) == len(run.params)


def test_source_position_is_kept(tmp_path):
    class Source(ToySource):
        def state_dict(self):
            return {"count": self.count}

        def load_state_dict(self, data):
            self.count = data["count"]
    start(tmp_path, Source(), should_stop=stop_after(3))
    source = Source()
    start(tmp_path, source)
    assert source.count == 8


def test_moving_the_folder_is_harmless(tmp_path):
    start(tmp_path / "a", should_stop=stop_after(4))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    start(tmp_path / "a")
    start(tmp_path / "b")
    assert_same(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("step, factor", [
    (0, 0.25), (1, 0.5), (3, 1.0), (4, 1.0), (8, 0.55), (12, 0.1), (20, 0.1)])
def test_learning_rate(step, factor):
    assert settings(steps=12, warmup=4, lr_floor=0.1, lr=0.2).lr_at(step) == pytest.approx(0.2 * factor)
    constant = settings(steps=12, warmup=4, lr=0.2, schedule="constant").lr_at(step)
    assert constant == pytest.approx(0.2 * min(1, (step + 1) / 4))


def test_settings_survive_json():
    cfg = settings(seed=7, contrast_mode="clamp", reference_augment=False)
    assert TrainConfig.from_json(cfg.to_json()) == cfg
    assert TrainConfig.from_json('{"lr": 1, "steps": 5}') == TrainConfig(lr=1.0, steps=5)
    for text, word in (('{"speed": 1}', "speed"), ("[", "JSON"), ('{"steps": "many"}', "steps"),
                       ('{"steps": 1.5}', "steps"), ('{"steps": true}', "steps"), ("[1]", "JSON"),
                       ("5", "JSON")):
        with pytest.raises(LikenessError, match=word):
            TrainConfig.from_json(text)


@pytest.mark.parametrize("change, word", [
    ({"steps": 0}, "steps"), ({"drop_text": 1.5}, "drop_text"), ({"lr": 0.0}, "lr"),
    ({"lr": float("nan")}, "lr"), ({"mode": "full"}, "modules"),
    ({"contrast_mode": "x"}, "raw"), ({"decouple": "on"}, "decouple"),
    ({"clip": -1.0}, "clip"), ({"weight_contrast": float("nan")}, "weight_contrast"), ({"ema": -0.1}, "ema"),
    ({"schedule": "linear"}, "cosine")])
def test_settings_refuse_nonsense(change, word):
    with pytest.raises(LikenessError, match=word):
        settings(**change)
