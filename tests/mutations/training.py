"""Faults in training on checkpoints and folders of pictures."""
from __future__ import annotations

from harness.mutate import Mutation

ROWS = ("tests/unit/test_training_data.py::test_each_bad_row_is_named",)
LICENCE = ("tests/host/test_training_realcustom.py::test_the_file_tells_the_licence_of_its_pictures",)
HOST = "tests/host/test_training_host.py::test_"
CAPTIONS = (f"{HOST}captions_are_read_letter_by_letter",)
TARGET = (f"{HOST}denoise_is_the_hosts_own_prediction",)
KINDS = (f"{HOST}kinds_that_cannot_be_trained", f"{HOST}the_preset_goes_by_blocks_and_text")
HALF = (f"{HOST}a_network_in_half_precision_gives_the_same_gradient", f"{HOST}the_factor_of_a_vanished_gradient_is_finite",
        "tests/host/test_training_realcustom.py::test_a_network_in_half_precision_gives_the_same_gradient")

MUTATIONS = [
    Mutation("frozen weights gather gradients on the oldest host", "models/hosting/training_base.py",
             "self.unet.requires_grad_(False)", "pass", (f"{HOST}the_base_is_frozen_on_any_host",)),
    # -- checkpoints
    Mutation("captions have prompt weights", "models/hosting/training_base.py",
             "self.clip.tokenize(caption, disable_weights=True)", "self.clip.tokenize(caption)", CAPTIONS),
    Mutation("an EDM network is to predict noise", "models/hosting/training_base.py",
             'if self.model.model.model_type.name == "EPS":', 'if self.model.model.model_type.name in ("EPS", "EDM"):', TARGET),
    Mutation("a checkpoint for inpainting is trained on", "models/hosting/training_base.py", "if channels != own:", "if False:",
             KINDS),
    Mutation("any prediction is trained on", "models/hosting/training_base.py", "if predicts not in PREDICTIONS:", "if False:",
             KINDS),
    Mutation("SD2 counts as SD1.5", "models/hosting/training_base.py", "if width == base.width and all(", "if all(", KINDS),
    # -- a network in float16
    Mutation("gradients inside a network in half precision stay small", "models/hosting/half_gradients.py",
             "torch.ldexp(gradient.new_ones(()), -exponent)", "gradient.new_ones(())", HALF),
    Mutation("the factor of a vanished gradient is infinite", "models/hosting/half_gradients.py", ".clamp(min=SMALLEST)", "",
             HALF),
    Mutation("the text's gradient keeps the network's factor", "models/hosting/training_base.py", "half.into(rows)", "rows",
             HALF),
    Mutation("what a trained layer reads has the gradient of outside", "models/hosting/half_gradients.py",
             "self.into(trained(key, self.out_of(x)))", "self.into(trained(key, x.float()))", HALF),
    Mutation("the image attention's gradient keeps the network's factor", "models/hosting/half_gradients.py",
             "self.into(trained(key, self.out_of(q), self.out_of(text), heads))",
             "trained(key, q.float(), text.float(), heads).half()", HALF),
    # -- folders of pictures
    Mutation("a broken picture stops the check of its folder", "models/training/data.py",
             "except (Image.DecompressionBombError, SyntaxError) as error:", "except Image.DecompressionBombError as error:",
             ROWS),
    Mutation("a licence that was not given is an empty one", "nodes/training_miniature.py",
             '({"dataset_license": args.license} if args.license else {})', '{"dataset_license": args.license}', LICENCE),
]
