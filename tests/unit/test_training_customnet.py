"""One training step of CustomNet: what is left out and how often, the null row, the ablations, the rates and the file."""
from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from likeness.models.common import files
from likeness.models.common.errors import LikenessError
from likeness.models.training.customnet import CustomNetTask, ViewBatch
from likeness.models.training.loop import Run, train
from unit.training_toy import settings

WIDTH, EMBED, CHANNELS = 8, 8, 2


class ToyNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn2 = nn.ModuleDict({name: nn.Linear(WIDTH, 4, bias=False) for name in ("to_k", "to_v", "to_k_obj", "to_v_obj")})
        self.read = nn.Linear(2 * CHANNELS, CHANNELS)


class ToyViews:
    """Keeps what the network was given."""
    width, embed_width, device = WIDTH, EMBED, torch.device("cpu")

    def __init__(self) -> None:
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            self.unet = nn.ModuleDict({"block": ToyNet()})
        self.given: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self.told: list[str] = []

    def encode_text(self, captions):
        self.told += captions
        return torch.stack([torch.full((3, WIDTH), float(len(text))) for text in captions])

    def timesteps(self, n, generator):
        return torch.randint(0, 10, (n,), generator=generator)

    def noised(self, latents, t, noise):
        return latents + noise, noise, None

    def predict(self, x, t, rows, tokens):
        self.given.append((x.detach(), rows.detach(), None if tokens is None else tokens.detach()))
        net = self.unet["block"]
        text = net.attn2["to_v"](rows).mean((1, 2))
        if tokens is not None:
            text = text + net.attn2["to_v_obj"](tokens).mean((1, 2))
        return net.read(x.movedim(1, -1)).movedim(-1, 1) + text[:, None, None, None]

    def names(self, state):
        return {f"renamed.{name}": value for name, value in state.items()}


class ToyBatches:
    def batch(self, n: int, generator: torch.Generator) -> ViewBatch:
        return ViewBatch(torch.randn(n, CHANNELS, 4, 4, generator=generator), torch.full((n, CHANNELS, 4, 4), 7.0),
                         torch.rand(n, EMBED, generator=generator) + 1, torch.rand(n, 4, generator=generator), ["a house"] * n)


def step(n: int = 4000, seed: int = 3, **changes):
    base = ToyViews()
    task = CustomNetTask(base, settings(drop_text=0.15), **changes)
    generator = torch.Generator().manual_seed(seed)
    task.step(ToyBatches().batch(n, generator), generator)
    x, rows, tokens = base.given[0]
    return task, base, x, rows, tokens


def test_what_is_left_out_and_how_often():
    """One number a sample decides: 5 % lose the object only, 5 % both, 5 % the place only; the text goes by itself."""
    _, base, x, _, tokens = step(null="token")
    no_object = ~tokens.flatten(1).any(1)
    no_place = ~(x[:, CHANNELS:] == 7).flatten(1).all(1)
    assert (x[no_place][:, CHANNELS:] == 0).all()
    shares = [float(rows.float().mean()) for rows in (no_object & ~no_place, no_object & no_place, ~no_object & no_place)]
    assert shares == pytest.approx([0.05] * 3, abs=0.015)
    no_text = torch.tensor([text == "" for text in base.told])
    assert float(no_text.float().mean()) == pytest.approx(0.15, abs=0.02)
    assert float((no_text & no_object).float().mean()) == pytest.approx(0.015, abs=0.01)


def test_the_releases_null_keeps_the_camera():
    """A zero embedding before the layer: the token of such a row is camera and bias alone."""
    task, _, _, _, tokens = step()
    weight, bias = task.projection.cc_projection.weight, task.projection.cc_projection.bias
    generator = torch.Generator().manual_seed(3)
    batch = ToyBatches().batch(4000, generator)
    draws = torch.rand(4000, 2, generator=generator)[:, 0]
    bare = batch.camera @ weight[:, -4:].T + bias
    gone = draws < 0.10
    torch.testing.assert_close(tokens[gone, 0], bare[gone])
    whole = torch.cat([batch.embed, batch.camera], 1) @ weight.T + bias
    torch.testing.assert_close(tokens[~gone, 0], whole[~gone])


def test_ablations():
    _, _, x, rows, tokens = step(50, ablation="shared attention")
    assert tokens is None and rows.shape[1] == 4
    _, _, x, _, _ = step(50, ablation="no location")
    assert not x[:, CHANNELS:].any()
    with pytest.raises(LikenessError, match="no location"):
        step(2, ablation="nothing")
    with pytest.raises(LikenessError, match="embedding or token"):
        step(2, null="zero")


def test_the_texts_keys_and_values_learn_faster():
    task = CustomNetTask(ToyViews(), settings(warmup=0, schedule="constant"))
    run = Run(task, task.train, ToyBatches())
    run.advance()
    rates = {id(p): group["lr"] / task.train.lr for group in run.optimizer.param_groups for p in group["params"]}
    found = {name: rates[id(p)] for name, p in zip(run.names, run.params, strict=True)}
    fast = {name for name, rate in found.items() if rate == 10}
    assert fast == {f"unet.block.attn2.{part}.weight" for part in ("to_k", "to_v")}
    assert set(found.values()) == {1.0, 10.0}


def test_a_run_learns_and_writes_the_releases_names(tmp_path):
    task = CustomNetTask(ToyViews(), settings(steps=60, save_every=30, export_dtype="fp16", drop_text=0.15))
    losses = []
    result = train(task, task.train, ToyBatches(), tmp_path, log=lambda row: losses.append(row["total"]))
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    state, metadata = files.load(result.path)
    assert metadata["method"] == "customnet"
    assert state["cc_projection.weight"].dtype == torch.float32
    assert state["model.diffusion_model.renamed.block.read.weight"].dtype == torch.float16
