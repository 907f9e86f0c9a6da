"""Faults in what the tables of evidence rest on."""
from __future__ import annotations

from harness.mutate import Mutation

UNIT, HOST = "tests/unit/test_evidence.py::test_", "tests/host/test_evidence.py::test_"
POSES = (f"{UNIT}a_share_of_references_stands_as_the_target",)
CLIP = (f"{UNIT}the_clip_encoder_is_read_as_any_clip_file", f"{UNIT}the_clip_encoder_is_transformers_clip",
        f"{UNIT}info_nce_by_hand")
HARD = (f"{UNIT}hard_candidates",)
NUMBERS = (f"{UNIT}intervals_are_over_seeds_and_pictures", f"{UNIT}summary_verdicts_and_goals",
           f"{UNIT}what_decoupling_loses_is_told_of_the_same_training_seeds")
TRIALS = (f"{UNIT}trials_and_measures",)
DEVICE = (f"{HOST}nothing_of_the_miniature_stays_behind_on_the_cpu",)
WORLD = (f"{HOST}lessons_are_of_the_world_that_the_base_draws",)
LABEL = (f"{UNIT}a_base_of_either_world_is_labelled_when_it_is_one",)
KEPT = (f"{HOST}the_whole_table_resumes_and_names_what_is_missing",)
LEAKS = ("tests/host/test_decoupling_bench.py",)
OWN = (f"{HOST}an_adapter_is_measured_where_it_was_trained_only",)
RUNS = (f"{HOST}a_run_goes_on_and_never_on_other_lessons",)
BATCH = (f"{HOST}a_batch_is_what_the_nodes_make_one_by_one", f"{HOST}a_shuffled_row_takes_another_creatures_reference")
FOLDER = ("tests/host/test_training_realcustom.py::test_a_folder_of_another_run_is_refused",)

MUTATIONS = [
    # -- lessons
    Mutation("correlated pairs share the turn alone", "models/demo/lessons.py", 'CORRELATED = ("mirror", "turn")',
             'CORRELATED = ("turn",)', POSES),
    Mutation("all references stand as the target once any does", "models/demo/lessons.py",
             "same = torch.rand(n, generator=generator) < correlate", "same = torch.rand(n, generator=generator) < 1", POSES),
    # -- the world of a base
    Mutation("adapters of a wide base are taught with easy lessons", "nodes/training_miniature.py",
             'WORLDS[world_of(files.read_header(weights / "base.safetensors").metadata)]', 'WORLDS["easy"]', WORLD),
    Mutation("a wide base does not say so", "models/demo/recipe.py", '{} if world == "easy" else {"world": world}', "{}", LABEL),
    Mutation("a wide base says so after its easy stages", "models/demo/recipe.py", 'world if done == stages else "easy"', "world",
             LABEL),
    Mutation("runs of both worlds share a checkpoint", "models/demo/recipe.py",
             'self.folder if world == "easy" else self.folder / world', "self.folder", LABEL),
    Mutation("references of the tables are easy on any base", "tests/bench/_ablation.py", "WORLDS[self.world]", 'WORLDS["easy"]',
             WORLD),
    # -- the encoder that learned from captions
    Mutation("clip's norms before and after the blocks are swapped", "models/demo/pretrain.py",
             '"pre_norm": "pre_layrnorm", "norm": "post_layernorm"', '"pre_norm": "post_layernorm", "norm": "pre_layrnorm"',
             CLIP),
    Mutation("clip has the exact GELU", "models/demo/pretrain.py", '"quick_gelu" if clip else "gelu"', '"gelu"', CLIP),
    Mutation("contrast looks one way only", "models/demo/pretrain.py", "F.cross_entropy(similarity.T, own)",
             "F.cross_entropy(similarity, own)", CLIP),
    # -- any device
    Mutation("time steps stay on the CPU", "models/hosting/training_base.py", "self.unet(x_t, t.to(x_t.device).float(),",
             "self.unet(x_t, t.float(),", DEVICE),
    Mutation("captions stay on the CPU", "models/hosting/training_base.py", "row_ids(captions).to(self.device)",
             "row_ids(captions)", DEVICE),
    Mutation("encoders stay on the CPU", "models/hosting/training_base.py", "load_vit(tensors, metadata, device=self.device)",
             "load_vit(tensors, metadata)", DEVICE),
    # -- runs
    Mutation("a run goes on with other lessons", "nodes/training_miniature.py",
             "if json.loads(note.read_text(encoding=\"utf-8\")) != recipe:", "if not recipe:", RUNS),
    Mutation("a run that was stopped counts as finished", "nodes/training_miniature.py", 'int(said["steps"]) >= wanted.steps and',
             "", RUNS),
    Mutation("a wrong first command locks the folder", "nodes/training_miniature.py", "    if not begin:\n        return\n", "",
             FOLDER),
    Mutation("a run goes on with other pictures", "nodes/training_miniature.py",
             '"lessons": files.sha256(args.data / "metadata.jsonl"), ', "", FOLDER),
    # -- what is measured
    Mutation("accents of nothing worn count as differences", "tests/bench/_looks.py",
             '(others["accessory"] > 0) & (look["accessory"] > 0)', '(others["accessory"] >= 0) & (look["accessory"] >= 0)',
             HARD),
    Mutation("hard candidates are any looks", "tests/bench/_looks.py", "(far == 1).nonzero()", "(far >= 1).nonzero()", HARD),
    Mutation("leak is counted the wrong way round", "tests/bench/_ablation.py", '("leak", "mirror", t.mirror)',
             '("leak", "mirror", 1 - t.mirror)', TRIALS),
    Mutation("every reference faces right", "tests/bench/_ablation.py", "mirror = (identity + j) % 2", "mirror = 0 * identity",
             TRIALS),
    Mutation("training seeds are not drawn anew", "tests/bench/_ablation_table.py",
             "seed = torch.randint(0, seeds, (seeds, 1, 1), generator=g)", "seed = torch.arange(seeds).view(seeds, 1, 1)",
             NUMBERS),
    Mutation("identities are not drawn anew", "tests/bench/_ablation_table.py",
             "group = torch.randint(0, groups, (seeds, groups, 1), generator=g)",
             "group = torch.arange(groups).view(1, groups, 1)", NUMBERS),
    Mutation("a row that was kept is taken for other trials", "tests/bench/_ablation.py", "own, self.asked[seed],", "own,", KEPT),
    Mutation("an adapter is measured on any base", "tests/bench/_ablation.py",
             'if dict(adapter.metadata).get("base_sha256") != self.common[0] or any(', "if any(", OWN),
    Mutation("an adapter is measured with any encoder", "tests/bench/_ablation.py",
             "not item.is_file(wish)", "not item", OWN),
    Mutation("one training is a verdict", "tests/bench/_ablation_table.py",
             'if min(numbers[f"seeds_{a}"], numbers[f"seeds_{b}"]) < FEWEST:', "if False:", NUMBERS),
    Mutation("any judge judges any world", "tests/bench/custany.py",
             'if world not in metadata.get("worlds", "easy").split():', "if False:", WORLD),
    Mutation("what decoupling loses pairs any seeds", "tests/bench/_ablation_table.py",
             "seeds = sorted(more.keys() & less.keys())", "seeds = sorted(more)[:min(len(more), len(less))]", NUMBERS),
    Mutation("overlapping intervals count as shown", "tests/bench/_ablation_table.py",
             '_{a}_lo"] > numbers[f"{measure}_{b}_hi"]:', '_{a}"] > numbers[f"{measure}_{b}"]:', NUMBERS),
    Mutation("a leak is a creature that turns away", "tests/bench/_decoupling.py",
             '"leak": side == t.facing', '"leak": side != t.facing',
             LEAKS),
    Mutation("the decoupling branch is never trained", "tests/bench/_decoupling.py", "decouple=case.decouple, contrast",
             'decouple="off", contrast', LEAKS),
    Mutation("retrieval looks at the asked facing alone", "tests/bench/_decoupling.py", "far.amin(2).argmin(1)",
             "far[:, :, 0].argmin(1)", LEAKS),
    # -- pictures
    Mutation("a batch has the first picture's prompt", "tests/bench/_ablation.py", "torch.cat([rows[text] for text in texts])",
             "torch.cat([rows[texts[0]] for text in texts])", BATCH),
    Mutation("no sentence tells the look", "tests/bench/_ablation.py", 'if row.described else ("", "")', 'if False else ("", "")',
             (f"{HOST}a_described_row_has_its_whole_look_in_words",)),
    Mutation("a batch shares one reference", "tests/bench/_ablation.py", '"one per latent", 0.1, "error").subject',
             '"average", 0.1, "error").subject', BATCH),
    Mutation("a shuffled reference is one's own", "tests/bench/_ablation.py", "if row.shuffled else t.identity[index]",
             "if row.variant is None else t.identity[index]", BATCH),
]
