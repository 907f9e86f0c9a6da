"""Faults in ResInversion, BiMD and the baselines."""
from __future__ import annotations

from harness.mutate import Mutation

HOSTING, COMMON, CUSTANY, REALCUSTOM = "models/hosting/", "models/common/", "models/custany/", "models/realcustom/"
INVERSION = "models/inversion/"
HOST = "tests/host/test_"
UNIT_INVERSION = ("tests/unit/test_inversion.py",)
RECORDING = tuple(f"{HOST}inversion.py::test_{name}" for name in (
    "target_is_plain_ddim_inversion", "batched_residuals_are_the_sequential_ones", "what_looks_at_one_sigma_is_never_batched",
    "evaluations_of_the_other_ways", "patches_with_two_slots"))
CLOSED = (f"{HOST}inversion.py::test_closed_loop_is_bit_exact",)
BELONGS = (f"{HOST}inversion_belongs.py", f"{HOST}inversion.py::test_guidance_functions_are_recorded_as_they_are_replayed")
HALF = (f"{HOST}inversion.py::test_recording_and_replay_see_the_same_schedule",)
BIMD = tuple(f"{HOST}bimd.py::test_{name}" for name in (
    "mss_n_is_the_hosts_own_round_trip", "outside_a_hard_mask_the_picture_stays", "difference_mask_pushes_inside_only",
    "a_guidance_pass_fires_at_every_step", "free_model_keeps_the_options_apart", "guidance_functions_act_on_each_branch",
    "fusion_against_the_formula", "fusion_over_a_batch_is_a_path", "what_does_not_belong_together_is_refused"))
NULL_TEXT = tuple(f"{HOST}baseline.py::test_{name}" for name in (
    "null_text_comes_nearer_than_ddim", "null_text_leaves_nothing_behind", "null_text_beside_a_controlnet"))

MUTATIONS = [
    # -- inversion: algebra
    Mutation("the residual has the wrong sign", INVERSION + "steps.py", "return below - euler(anchor, denoised, sigma, target)",
             "return euler(anchor, denoised, sigma, target) - below", UNIT_INVERSION),
    Mutation("an estimate at another label counts as known", INVERSION + "anchors.py", "denoised if exact else None)",
             "denoised)", UNIT_INVERSION),
    Mutation("half the backward flow copies the anchors", INVERSION + "replay.py", "and flows.backward == 1.0 and", "and",
             UNIT_INVERSION),
    Mutation("the dial counts from the cut", INVERSION + "replay.py", "flows.forward_at(inversion.start + n,",
             "flows.forward_at(n,", UNIT_INVERSION),
    Mutation("the tether pulls away", INVERSION + "replay.py", "after = after - flows.tether", "after = after + flows.tether",
             UNIT_INVERSION),
    Mutation("a file with levels that are no numbers", INVERSION + "storage.py",
             "not bool((levels[1:] > levels[:-1]).all() & levels.isfinite().all())", "bool((levels[1:] <= levels[:-1]).any())",
             UNIT_INVERSION),
    Mutation("a zero inside the sigmas", INVERSION + "levels.py", "if bool((sigmas[:-1] == 0).any()):", "if False:",
             UNIT_INVERSION),
    Mutation("a hard mask bleeds into its neighbours", INVERSION + "masks.py", 'mode="area")', 'mode="bilinear", antialias=True)',
             UNIT_INVERSION),
    # -- inversion: recording
    Mutation("the network's input is not scaled to the label", HOSTING + "guider.py", "return x * factor.to(x).view(-1)",
             "return x", RECORDING),
    Mutation("every level has the first one's negative", HOSTING + "recorder.py", "mine, uncond[rows])",
             "mine, uncond[:x.shape[0]])", RECORDING),
    Mutation("prompts with ranges are batched", HOSTING + "recorder.py", "if tied or stamps or", "if stamps or", RECORDING),
    Mutation("nothing is known from the way up", HOSTING + "recorder.py",
             "if anchor.denoised is not None and reusable:", "if False:", RECORDING),
    Mutation("patches of a pair get a third slot", HOSTING + "guider.py", "        if counts_slots(model_options):\n",
             "        if False:\n", RECORDING),
    Mutation("the closed loop does not record its rounding", HOSTING + "recorder.py", "        here = plain + found[i]\n",
             "        here = anchors[i - 1].to(x.device)\n", CLOSED),
    Mutation("the fingerprint is that of the loaded weights", HOSTING + "fingerprint.py",
             "kept.weight if kept is not None else state[name]", "state[name]", BELONGS),
    Mutation("the fingerprint holds the loaded schedule", HOSTING + "fingerprint.py",
             'if name.startswith("diffusion_model.")}', "}", BELONGS),
    Mutation("a LoRA counts at any strength", HOSTING + "fingerprint.py", "repr((name, strength, strength_model))",
             "repr((name, strength_model))", BELONGS),
    Mutation("guidance without cfg has no negative", HOSTING + "fingerprint.py",
             'or bool(guider.model_options.get("disable_cfg1_optimization", False))', "or False", BELONGS),
    Mutation("what hangs on a prompt does not count", HOSTING + "fingerprint.py", "            _describe(digest, {**entry,",
             "            _describe(digest, {'cross_attn': entry.get('cross_attn'),", BELONGS),
    Mutation("a control counts at any strength", HOSTING + "fingerprint.py", '"cond_hint_original", "strength", "timestep',
             '"cond_hint_original", "timestep', BELONGS),
    Mutation("another free prompt is no mismatch", HOSTING + "bimd.py", "and free_hash(guider) != inversion.conditioning_hash:\n"
             "        out", "and False:\n        out", BELONGS),
    Mutation("a guider of its own kind counts once a call", HOSTING + "recorder.py", "self.count(x.shape[0] // self.batch or 1)",
             "self.count(1)", BELONGS),
    Mutation("only one strength of two belongs to the recording", HOSTING + "fingerprint.py", "settings=settings)",
             "settings={})", BELONGS),
    Mutation("a step cache is recorded", HOSTING + "recorder.py", "    if skips:\n", "    if False:\n", BELONGS),
    Mutation("the recording sees the uncut schedule", HOSTING + "recorder.py", "recorder, kept.flip(0), callback",
             "recorder, sigmas, callback", HALF),
    Mutation("a subject without its injector passes", HOSTING + "guider.py", "if any(number not in here", "if all(number in here",
             (f"{HOST}bimd.py::test_a_subject_without_its_injector_is_refused",)),
    Mutation("another prediction is no mismatch", HOSTING + "bimd.py", "if predicts != inversion.prediction:", "if False:",
             BELONGS),
    # -- inversion: replay and guider
    Mutation("a replay walks although it stands on the anchors", INVERSION + "replay.py",
             "if forward == 0.0 and copies and on_anchor:", "if False:", BIMD),
    Mutation("the anchor mask is turned round", INVERSION + "replay.py", "after = mask * after + (1 - mask) * below",
             "after = (1 - mask) * after + mask * below", BIMD),
    Mutation("the latent's noise mask is ignored", HOSTING + "bimd.py", "mask, difference = denoise_mask, None",
             "mask, difference = None, None", BIMD),
    Mutation("the difference mask is dead", HOSTING + "guider.py", "share = share * difference", "share = share * 1.0", BIMD),
    Mutation("any sigmas will do", HOSTING + "bimd.py", "if sigmas is not None and differ", "if sigmas is None and differ",
             BIMD),
    Mutation("the free calls miss their wrappers", HOSTING + "guider.py", 'for kind in ("wrappers", "callbacks"):',
             "for kind in ():", BIMD),
    Mutation("the free branch has the identity's patches", HOSTING + "guider.py",
             "free_options if slot == FREE else model_options", "model_options", BIMD),
    Mutation("a node's guidance does not act on a branch", HOSTING + "guider.py",
             "pair[0], pair[1], self.cfg, x, sigma, model_options=options,", "pair[0], pair[1], self.cfg, x, sigma,", BIMD),
    Mutation("fusion keeps all of the first identity", HOSTING + "guider.py", "item._replace(weight=item.weight * keep,",
             "item._replace(weight=item.weight,", BIMD),
    Mutation("a path runs backwards", HOSTING + "guider.py", "(self.weight - self.first) * k /",
             "(self.weight - self.first) * (batch - 1 - k) /", BIMD),
    # -- inversion: null-text
    Mutation("the null texts lie upside down", HOSTING + "baseline.py", "torch.stack(optimiser.nulls[::-1])",
             "torch.stack(optimiser.nulls)", NULL_TEXT),
    Mutation("the network with gradients stays in the model", HOSTING + "baseline.py",
             "    finally:\n        model.diffusion_model = network", "    finally:\n        pass", NULL_TEXT),
    Mutation("a control is added in place", HOSTING + "baseline.py", 'if func.__name__ in ("add_", "__iadd__"):', "if False:",
             NULL_TEXT),
]
