"""The nodes of the inversion family, one after the other as an artist wires them."""
from __future__ import annotations

import pytest
import torch

from host.inversion_nets import FREE, ID, NEG, OTHER, lora, net, picture, schedule
from host.support import CURVES, CurveInput, cfg_guider, comfy_extras
from likeness.models.common.errors import LikenessError


@pytest.fixture(autouse=True)
def _as_a_node(host, nodes, tmp_path, monkeypatch):
    import folder_paths
    for name in ("output", "input", "temp"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(tmp_path / name))
    with torch.inference_mode():
        yield


@pytest.fixture
def node(nodes):
    return lambda name, *values, **named: nodes[f"Likeness_{name}"].execute(*values, **named).args


class Vae:
    @staticmethod
    def decode(samples):
        return samples[:, :3].movedim(1, -1).sigmoid()


def sampled(who, sampler, sigmas, latent):
    custom = comfy_extras.nodes_custom_sampler
    noise = custom.DisableNoise.execute()[0]
    return custom.SamplerCustomAdvanced.execute(noise, who, sampler, sigmas, {"samples": latent})[0]["samples"]


@CURVES
def test_record_save_load_replay_report(node, nodes, tmp_path):
    model, latent = net("eps"), picture("eps")
    who = node("EnhancerGuider", model, ID, FREE, NEG, 3.0)[0]
    inversion, sigmas, text = node("ResInversion", who, schedule(model, 5), {"samples": latent}, "source", 0, 2, False, 0)
    assert "7 evaluations" in text and len(sigmas) == 4
    written = node("SaveInversion", inversion, "scene/one", "fp32")[0]
    folder = tmp_path / "output" / "likeness" / "inversions"
    found = [path for path in folder.rglob("*") if path.is_file()]
    assert len(found) == 1 and str(found[0]) in written and found[0].suffix == ".safetensors"
    file = nodes["Likeness_LoadInversion"].define_schema().inputs[0].options[0]
    assert nodes["Likeness_LoadInversion"].validate_inputs(file) is True
    loaded, again, said = node("LoadInversion", file, False, who)
    assert torch.equal(again, sigmas) and "note" not in said and torch.equal(loaded.residuals, inversion.residuals)
    stamp = nodes["Likeness_LoadInversion"].fingerprint_inputs(file)
    other = node("EnhancerGuider", lora(model), ID, OTHER, NEG, 3.0)[0]
    with pytest.raises(LikenessError, match="fingerprint"):
        node("LoadInversion", file, False, other)
    assert "accepted" in node("LoadInversion", file, True, other)[2]
    back = node("BiMDSampler", loaded, 5, 1.0, 1.0, 0.0, "anchor", False)[0]
    round_trip = model.model.process_latent_out(model.model.process_latent_in(latent))
    assert torch.equal(sampled(who, back, sigmas, latent), round_trip)
    ramp = CurveInput.from_raw([(0.0, 0.0), (1.0, 1.0)])
    edit = node("BiMDSampler", loaded, 2, 1.0, 1.0, 0.0, "anchor", False, torch.ones(1, 64, 64), ramp)[0]
    assert not torch.allclose(sampled(who, edit, sigmas, latent), round_trip, atol=1e-3)
    words, plot, strip = node("InversionReport", loaded, Vae(), 3, who)
    assert " dB" in words and plot.shape[-1] == 3 and strip.shape == (1, 8, 24, 3)
    found[0].write_bytes(found[0].read_bytes()[:-7])
    assert nodes["Likeness_LoadInversion"].fingerprint_inputs(file) != stamp
    with pytest.raises(LikenessError, match="cut off"):
        node("LoadInversion", file, False)
    found[0].unlink()
    assert nodes["Likeness_LoadInversion"].validate_inputs(file) is not True
    with pytest.raises(LikenessError):
        node("LoadInversion", file, False)


def test_fusion_and_baseline(node):
    model, latent = net("eps"), picture("eps")
    who = node("EnhancerGuider", model, ID, FREE, NEG, 3.0)[0]
    fused = node("IdentityFusion", who, OTHER, 0.5, 0.5, False)[0]
    assert fused is not who and len(fused.identities) == 2 and len(who.identities) == 1
    with pytest.raises(LikenessError, match="connect a CustomEnhancer Guider"):
        node("IdentityFusion", cfg_guider(model, ID, NEG), OTHER, 0.5, 0.5, False)
    for method, says in (("ddim", "ddim: 3 of 3"), ("null-text", "null-text: 3 of 3")):
        inversion, sigmas, text = node("BaselineInversion", who, schedule(model, 3), {"samples": latent}, method, 1, True, 0)
        assert says in text and inversion.method == method
        sampler = node("BiMDSampler", inversion, 0, 1.0, 1.0, 0.0, "anchor", False)[0]
        assert torch.isfinite(sampled(fused, sampler, sigmas, latent)).all()
