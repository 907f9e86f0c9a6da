"""Inversion without a network: algebra against float64 formulas, levels, masks, files, report."""
from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from likeness.models.common import files
from likeness.models.common.errors import LikenessError
from likeness.models.inversion import report
from likeness.models.inversion.anchors import climb
from likeness.models.inversion.levels import ascending, differ, truncated
from likeness.models.inversion.masks import fit_mask
from likeness.models.inversion.records import INVERSION_VERSION, Flows, Inversion
from likeness.models.inversion.replay import replay
from likeness.models.inversion.steps import euler, residual
from likeness.models.inversion.storage import load_inversion, save_inversion

SIGMAS = torch.tensor([14.0, 6.0, 2.5, 1.0, 0.3, 0.0])


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def soft(x: Tensor, sigma: Tensor) -> Tensor:
    """A denoiser that any precision can compute: it looks at the whole latent and at sigma."""
    return torch.tanh(x / (1 + sigma)) + 0.1 * x.mean((1, 2, 3), keepdim=True)


def identity(x: Tensor, sigma: Tensor) -> Tensor:
    return soft(x, sigma) + 0.3 * torch.sin(x.flip(-1))


def vp(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return x * ((1 + high ** 2) / (1 + low ** 2)).sqrt()


def recorded(x: Tensor, sigmas: Tensor = SIGMAS, start: int = 0, method: str = "resinversion", **more) -> Inversion:
    """A recording of `soft` made by the pack's own steps."""
    levels = truncated(ascending(sigmas), start)
    anchors = [x, *(anchor.x for anchor in climb(x, levels, soft, vp))]
    residuals = [residual(anchors[i], anchors[i - 1], soft(anchors[i], levels[i]), levels[i], levels[i - 1])
                 for i in range(1, len(levels))]
    fields = {"steps": len(sigmas) - 1, "start": start, "cfg": 4.0, "estimate": "source", "refine": 0, "closed": False,
              "prediction": "EPS", "latent_format": "SD15", "model_hash": "a", "conditioning_hash": "b", "evaluations": 11,
              "calls": 6, "to_latent": torch.tensor([[5.0] * x.shape[1], [0.5] * x.shape[1]])} | more
    return Inversion(method, torch.stack(anchors), torch.stack(residuals) if residuals else x[None][:0], levels, **fields)


def walk(inversion: Inversion, flows: Flows, x: Tensor, **more) -> tuple[Tensor, list[tuple[int, float]]]:
    asked = []

    def mixed(level, here, sigma, forward):
        asked.append((level, forward))
        return soft(here, sigma) + forward * (identity(here, sigma) - soft(here, sigma))
    return replay(inversion, flows, mixed, x, lambda n, denoised, here: None, **more), asked


# -- the way up ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("estimate", ["source", "target", "midpoint"])
@pytest.mark.parametrize("refine", [0, 2])
def test_anchors_against_float64(estimate, refine):
    x = draw(1, 2, 3, 4, 4)
    levels = ascending(SIGMAS)
    found = list(climb(x, levels, soft, vp, estimate, refine))
    here, s = x.double(), levels.double()
    for k, anchor in enumerate(found):
        a, b = s[k], s[k + 1]
        first = k == 0 or estimate == "target"
        label = b if first else a
        seen = here * math.sqrt((1 + float(b) ** 2) / (1 + float(a) ** 2)) if first else here
        slope = (seen - soft(seen, label)) / label
        if estimate == "midpoint":
            middle = b / 2 if k == 0 else (a * b).sqrt()
            there = here + (middle - a) * slope
            slope = (there - soft(there, middle)) / middle
        for _ in range(refine):
            there = here + (b - a) * slope
            slope = (there - soft(there, b)) / b
        if first:
            assert anchor.denoised is None, "no residual may be made from an estimate at another point"
        else:
            assert torch.allclose(anchor.denoised.double(), soft(here, label), atol=1e-4)
        here = here + (b - a) * slope
        assert anchor.level == k + 1
        assert torch.allclose(anchor.x.double(), here, rtol=1e-5, atol=1e-4)


def test_refining_shrinks_the_residuals():
    """The fixed point is the inverse of Euler's own step, so in the limit nothing is left to record."""
    x, levels = draw(1, 1, 3, 4, 4), ascending(torch.linspace(2, 0, 21))
    sizes = []
    for refine in (0, 1, 4):
        anchors = [x, *(anchor.x for anchor in climb(x, levels, soft, vp, "source", refine))]
        sizes.append(sum(float(residual(anchors[i], anchors[i - 1], soft(anchors[i], levels[i]), levels[i],
                                        levels[i - 1]).square().sum()) for i in range(2, len(levels))))
    assert sizes[0] > 2 * sizes[1] > 4 * sizes[2]


def test_numbers_that_are_none_are_named_with_their_step():
    x = draw(1, 1, 3, 4, 4)
    with pytest.raises(LikenessError, match="The latent holds"):
        list(climb(x.index_fill(3, torch.tensor([1]), math.nan), ascending(SIGMAS), soft, vp))

    def breaks(here, sigma):
        return here * math.nan if float(sigma) > 2 else soft(here, sigma)
    with pytest.raises(LikenessError, match=r"step 4 of 5 of the inversion, sigma 6\b"):
        list(climb(x, ascending(SIGMAS), breaks, vp))
    inversion = recorded(x)
    with pytest.raises(LikenessError, match="at step 3 of 5"):
        replay(inversion, Flows(start=1), lambda level, here, sigma, forward: here * (math.nan if level == 3 else 1), x,
               lambda *_: None)


# -- the way down --------------------------------------------------------------------------------------
@pytest.mark.parametrize("flows", [Flows(), Flows(start=2), Flows(forward=0.4, backward=0.5), Flows(forward=2.0, tether=0.25),
                                   Flows(backward=0.0), Flows(1, 0.7, 0.9, 0.1)])
def test_replay_against_float64(flows):
    x = draw(1, 2, 3, 4, 4)
    inversion = recorded(x)
    got, _ = walk(inversion, flows, x)
    s, anchors, r = (t.double() for t in (inversion.levels, inversion.anchors, inversion.residuals))
    here = anchors[5]
    for n, i in enumerate(range(5, 0, -1)):
        forward = flows.forward if n >= flows.start else 0.0
        d_free, d_id = ((here - net(here, s[i])) / s[i] for net in (soft, identity))
        after = here + (s[i - 1] - s[i]) * (d_free + forward * (d_id - d_free)) + flows.backward * r[i - 1]
        here = after - flows.tether * (here - anchors[i])
    assert torch.allclose(got.double(), here, rtol=1e-4, atol=1e-4)


def test_a_picture_comes_back_and_costs_nothing():
    x = draw(1, 2, 3, 4, 4)
    inversion = recorded(x)
    for flows in (Flows(start=5), Flows(forward=0.0)):
        got, asked = walk(inversion, flows, x)
        assert torch.equal(got, x) and not asked
    got, asked = walk(inversion, Flows(forward=0.0), x, evaluate_all=True)
    assert torch.allclose(got, x, atol=1e-4) and len(asked) == 5
    _, asked = walk(inversion, Flows(start=3), x)
    assert asked == [(2, 1.0), (1, 1.0)]
    _, asked = walk(inversion, Flows(start=3, backward=0.5), x)
    assert len(asked) == 5, "with half the backward flow the anchors are not on the way"


def test_baselines_have_to_walk():
    x = draw(1, 1, 3, 4, 4)
    inversion = recorded(x, method="ddim")
    got, asked = walk(inversion, Flows(forward=0.0), x)
    assert len(asked) == 5 and not torch.allclose(got, x, atol=1e-3)
    levels, here = inversion.levels, inversion.anchors[5]
    for i in range(5, 0, -1):
        here = euler(here, soft(here, levels[i]), levels[i], levels[i - 1])
    assert torch.equal(got, here)


def test_mss_counts_the_whole_schedule():
    """Recorded from step 2 on: the same anchors, and the replay asks for the same steps."""
    x = draw(1, 1, 3, 4, 4)
    whole, cut = recorded(x), recorded(x, start=2)
    assert torch.equal(cut.anchors, whole.anchors[:4]) and torch.equal(cut.residuals, whole.residuals[:3])
    assert torch.equal(walk(whole, Flows(start=3), x)[0], walk(cut, Flows(start=3), x)[0])
    assert torch.equal(walk(whole, Flows(start=2), x)[0], walk(cut, Flows(start=0), x)[0])


def test_hard_mask_is_exact_outside():
    x, mask = draw(1, 1, 3, 4, 4), torch.zeros(1, 1, 4, 4)
    mask[..., :2] = 1.0
    inversion = recorded(x)
    got, _ = walk(inversion, Flows(), x, mask=mask)
    assert torch.equal(got[..., 2:], x[..., 2:]) and not torch.allclose(got[..., :2], x[..., :2], atol=1e-2)


def test_one_recording_for_a_batch():
    x = draw(1, 1, 3, 4, 4)
    inversion = recorded(x)
    got, _ = walk(inversion, Flows(), x.expand(3, -1, -1, -1))
    single, _ = walk(inversion, Flows(), x)
    assert got.shape[0] == 3 and torch.allclose(got, single.expand(3, -1, -1, -1), atol=1e-5)


def test_curve_multiplies_the_forward_flow():
    class Ramp:
        @staticmethod
        def interp(at):
            return 1 - at
    flows = Flows(1, 2.0, curve=Ramp())
    assert [flows.forward_at(k, 5) for k in range(5)] == [0.0, 1.5, 1.0, 0.5, 0.0]


# -- levels --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("sigmas", "says"), [
    ([0.0, 1.0, 2.0], "rise from 0 to 2"), ([3.0, 1.0, 0.5], "end at 0.5"), ([3.0, 0.0, 1.0, 0.0], "0 at step 1 of 3"),
    ([3.0, 1.0, 2.0, 0.0], r"between steps 1 and 2 \(1 to 2\)"), ([3.0, 3.0, 0.0], "between steps 0 and 1"), ([0.0], "one step"),
    ([], "one step"), ([math.inf, 1.0, 0.0], "no noise levels"), ([math.nan, 1.0, 0.0], "no noise levels"),
    ([1.0, -1.0, 0.0], "no noise levels"), ([[1.0, 0.0]], "one step"), ([2.0, 0.0, 0.0], "0 at step 1 of 2")])
def test_sigmas_that_are_refused(sigmas, says):
    with pytest.raises(LikenessError, match=says):
        ascending(torch.tensor(sigmas))


def test_levels_are_turned_and_cut():
    levels = ascending(SIGMAS)
    assert torch.equal(levels, SIGMAS.flip(0)) and torch.equal(truncated(levels, 2), levels[:4])
    assert truncated(levels, 5).tolist() == [0.0]
    for start in (6, -1):
        with pytest.raises(LikenessError, match="0 to 5"):
            truncated(levels, start)
    assert not differ(SIGMAS[2:], SIGMAS, 2) and not differ(SIGMAS[2:], SIGMAS[2:], 2)
    assert differ(SIGMAS, SIGMAS * 1.001, 0) and differ(SIGMAS, SIGMAS[1:], 0) and differ(SIGMAS[2:], SIGMAS[1:], 2)


# -- masks ---------------------------------------------------------------------------------------------
def test_masks_take_the_shape_of_the_latent():
    mask = torch.zeros(64, 32)
    mask[:32] = 1.0
    fitted = fit_mask(mask[None], (3, 4, 8, 8))
    assert fitted.shape == (1, 1, 8, 8) and fitted[0, 0, 0, 0] == 1.0 and fitted[0, 0, -1, 0] == 0.0
    assert torch.equal(fit_mask(torch.ones(1, 100, 60), (1, 4, 8, 8)), torch.ones(1, 1, 8, 8)), "a white mask is no mask"
    hard = torch.zeros(1, 64, 128)
    hard[:, 8:24, 64:] = 1.0
    cells = torch.zeros(1, 1, 8, 16)
    cells[..., 1:3, 8:] = 1.0
    assert torch.equal(fit_mask(hard, (1, 4, 8, 16)), cells), "a hard mask on the borders of the cells stays hard"
    assert torch.equal(fit_mask(hard[:, ::16, ::16], (1, 4, 4, 8)), hard[:, None, ::16, ::16])
    assert torch.equal(fit_mask(torch.ones(3, 1, 8, 8), (3, 4, 8, 8)), torch.ones(3, 1, 8, 8))
    assert fit_mask(torch.ones(5, 16, 16), (1, 4, 5, 8, 8)).shape == (1, 1, 5, 8, 8)
    assert fit_mask(torch.ones(10, 16, 16), (2, 4, 5, 8, 8)).shape == (2, 1, 5, 8, 8)
    for bad, shape, says in ((torch.zeros(1, 8, 8), (1, 4, 8, 8), "empty"), (torch.ones(2, 8, 8), (3, 4, 8, 8), "2 masks for 3"),
                             (torch.ones(1, 8, 8), (1, 4, 5, 8, 8), "video of 5 frames, the MASK has 1")):
        with pytest.raises(LikenessError, match=says):
            fit_mask(bad, shape)


# -- files ---------------------------------------------------------------------------------------------
def test_a_file_gives_back_what_was_saved(tmp_path):
    inversion = recorded(draw(1, 2, 3, 4, 4), start=1, drift=1e-7, closed=True, nulls=draw(2, 4, 2, 3, 8))
    save_inversion(inversion, tmp_path / "a.safetensors")
    got = load_inversion(tmp_path / "a.safetensors")
    for name, value in inversion._asdict().items():
        same = torch.equal(value, getattr(got, name)) if isinstance(value, Tensor) else value == getattr(got, name)
        assert same, name
    plain = recorded(draw(1, 1, 3, 4, 4))
    save_inversion(plain, tmp_path / "b.safetensors")
    assert load_inversion(tmp_path / "b.safetensors").nulls is None and load_inversion(tmp_path / "b.safetensors").drift is None
    save_inversion(plain, tmp_path / "half.safetensors", "fp16 residuals")
    half = load_inversion(tmp_path / "half.safetensors")
    assert torch.equal(half.anchors, plain.anchors) and half.residuals.dtype == torch.float32
    assert torch.equal(half.residuals, plain.residuals.half().float())
    empty = recorded(draw(1, 1, 3, 4, 4), start=5)
    save_inversion(empty, tmp_path / "none.safetensors")
    assert load_inversion(tmp_path / "none.safetensors").residuals.shape[0] == 0


def test_files_that_are_refused(tmp_path):
    inversion = recorded(draw(1, 1, 3, 4, 4))
    path = tmp_path / "a.safetensors"
    save_inversion(inversion, path)
    whole = path.read_bytes()
    tensors, said = files.load(path)

    def refused(says, **changed):
        metadata = {key: str(changed.get(key, value)) for key, value in said.items()}
        files.save(path, {name: changed.get(name, tensor) for name, tensor in tensors.items()}, metadata)
        with pytest.raises(LikenessError, match=says):
            load_inversion(path)
    refused("format version 2", format_version=INVERSION_VERSION + 1)
    refused("unknown|x", format_version="x")
    refused("no saved inversion", format="likeness.subject")
    refused("damaged", steps="9")
    refused("damaged", steps="many")
    refused("damaged", method="magic")
    refused("damaged", residuals=tensors["residuals"][1:])
    refused("damaged", levels=tensors["levels"].flip(0))
    refused("damaged", anchors=tensors["anchors"] * math.nan)
    refused("damaged", levels=torch.tensor([0.0, 0.3, math.nan, 2.5, 6.0, 14.0]))
    refused("damaged", levels=torch.tensor([0.0, 0.3, 1.0, 2.5, 6.0, math.inf]))
    refused("damaged", anchors=torch.zeros(6))
    refused("damaged", levels=torch.tensor(0.0))
    files.save(path, {name: tensor for name, tensor in tensors.items() if name != "anchors"}, said)
    with pytest.raises(LikenessError, match="damaged"):
        load_inversion(path)
    for length in (0, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(LikenessError):
            load_inversion(path)


def test_nothing_half_written(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_inversion(recorded(draw(1, 1, 3, 4, 4)), path)
    before = path.read_bytes()

    def full(*_, **__):
        raise OSError("No space left on device")
    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match="space"):
        save_inversion(recorded(draw(2, 1, 3, 4, 4)), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


# -- report --------------------------------------------------------------------------------------------
def test_report_tells_numbers(tmp_path):
    x = draw(1, 2, 3, 4, 4)
    inversion = recorded(x)
    sizes = report.residual_sizes(inversion)
    by_hand = [math.sqrt(float((r.double() ** 2).mean())) / float(inversion.levels[k + 1] - inversion.levels[k])
               for k, r in enumerate(inversion.residuals)]
    assert torch.allclose(sizes.double(), torch.tensor(by_hand).double(), rtol=1e-4)
    text = report.describe(inversion, x)
    assert "exact" in text and "11 evaluations a picture in 6 calls" in text and "2 x 3 x 4 x 4" in text
    error = x + 0.01 * (x.max() - x.min())
    assert report.psnr(error, x) == pytest.approx(40.0, abs=0.1) and "40.0 dB" in report.describe(inversion, error)
    assert report.strip_levels(inversion, 3) == [5, 2, 0] and report.strip_levels(inversion, 50) == [5, 4, 3, 2, 1, 0]
    for shown in (inversion, recorded(x, start=5)):
        picture = report.plot(shown)
        assert picture.shape == (1, 360, 640, 3) and 0 <= float(picture.min()) and float(picture.max()) <= 1
        report.describe(shown)


def test_the_tallest_bar_is_the_largest_residual():
    inversion = recorded(draw(1, 1, 3, 4, 4))
    picture = report.plot(inversion)[0]
    blue = ((picture - torch.tensor(report.BAR) / 255).abs().sum(-1) < 0.02)
    width = (report.WIDTH - 2 * report.MARGIN) / 5
    heights = [int(blue[:, int(report.MARGIN + width * (k + 0.5))].sum()) for k in range(5)]
    assert heights.index(max(heights)) == 4 - int(report.residual_sizes(inversion).argmax())


def test_anchors_as_latents():
    inversion = recorded(draw(1, 2, 3, 4, 4))
    assert torch.allclose(inversion.as_latent(2), inversion.anchors[2] * 5 + 0.5)
    assert torch.equal(inversion.sigmas, SIGMAS) and inversion.shape == (2, 3, 4, 4)
