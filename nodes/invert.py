"""Inversion: record a picture's way to noise, replay it with an identity, keep and judge the recording."""
from __future__ import annotations

from comfy_api.latest import io, ui

from ..models.common.errors import LikenessError
from ..models.hosting.baseline import record_ddim, record_null_text
from ..models.hosting.bimd import BiMDSampler as Replay
from ..models.hosting.guider import EnhancerGuider as Guider
from ..models.hosting.inversions import build_guider, check_belongs, judge, samples_of
from ..models.hosting.memory import to_intermediate
from ..models.hosting.recorder import Settings, record
from ..models.inversion import report
from ..models.inversion.records import ESTIMATES, MASK_MODES, Flows, Inversion
from ..models.inversion.storage import PRECISIONS, load_inversion, save_inversion
from . import _paths, _types

_START = ("Steps at the beginning without the identity: 0 lets it act from the first step, the number of steps keeps "
          "the picture as it was (with backward_strength 1). This is the dial for how much of the picture stays.")
_SIGMAS = "Falling noise levels, as a sampler takes them. Goes to SamplerCustomAdvanced, so that both use the same steps."
_KIN = ["ddim inversion", "unsampler", "noise inversion", "exact inversion", "direct inversion", "rf inversion", "edit image"]


class EnhancerGuider(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Likeness_EnhancerGuider",
            display_name="CustomEnhancer Guider",
            category=_types.INVERT,
            description="Guides with three prompts: one with the identity, the same one without it, and the negative. The "
                        "difference of the first two is what the identity adds.",
            search_aliases=["cfg guider", "dual cfg", "custom enhancer", "customenhancer", "bimd", "guider"],
            inputs=[
                io.Model.Input("model", tooltip="The model with its subject, from Dual-Level Injector or any other pack."),
                io.Conditioning.Input("positive", tooltip="The prompt with the identity, from Dual-Level Injector."),
                io.Conditioning.Input(
                    "free",
                    tooltip="The same prompt without the identity: Subject Prompt before the injector, or CLIP Text Encode.",
                ),
                io.Conditioning.Input("negative", tooltip="The negative prompt, from the injector if there is one."),
                io.Float.Input(
                    "cfg", default=4.0, min=0.0, max=100.0, step=0.1, round=0.01,
                    tooltip="How strongly the prompts are followed. Recording and replay need the same number.",
                ),
                io.Model.Input(
                    "free_model", optional=True,
                    tooltip="Only for other packs (IPAdapter and its kin) that act on every prompt: the same model before that "
                            "pack, used for the free prompt.",
                ),
            ],
            outputs=[io.Guider.Output(display_name="guider", tooltip="Goes to ResInversion Sampler and SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, model: io.Model.Type, positive: io.Conditioning.Type, free: io.Conditioning.Type,
                negative: io.Conditioning.Type, cfg: float, free_model: io.Model.Type | None = None) -> io.NodeOutput:
        return io.NodeOutput(build_guider(model, positive, free, negative, cfg, free_model))


class ResInversion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Likeness_ResInversion",
            display_name="ResInversion Sampler",
            category=_types.INVERT,
            description="Records how a picture turns into noise, and what sampling back would miss at each step, so that BiMD "
                        "Sampler can bring it back exactly at any cfg.",
            search_aliases=["resinversion", "res inversion", *_KIN],
            inputs=[
                io.Guider.Input("guider", tooltip="CustomEnhancer Guider; core's CFGGuider is fine to bring a picture back."),
                io.Sigmas.Input("sigmas", tooltip="From a scheduler node, whole, falling to 0."),
                io.Latent.Input("latent_image", tooltip="The picture, through VAE Encode."),
                io.Combo.Input(
                    "estimate", options=list(ESTIMATES), advanced=True,
                    tooltip="Where the noise of a step is estimated. source is the cheapest and the best; target is what DDIM "
                            "inversion usually does; midpoint follows the true path closer for up to twice the time.",
                ),
                io.Int.Input(
                    "refine", default=0, min=0, max=4, advanced=True,
                    tooltip="Rounds of refinement a step: smaller residuals and gentler edits, one more evaluation each.",
                ),
                io.Int.Input(
                    "manipulation_start", default=0, min=0, max=10000,
                    tooltip=_START + " What lies above is not even recorded, which saves time.",
                ),
                io.Boolean.Input(
                    "closed_loop", default=False, advanced=True,
                    tooltip="Records the rounding of the replay as well: exact even at high cfg with every step evaluated, for "
                            "half as much time again (at cfg 1 for twice the time).",
                ),
                io.Int.Input(
                    "chunk", default=0, min=0, max=16, advanced=True,
                    tooltip="Steps that go through the model together where that is right. 0 chooses by itself.",
                ),
            ],
            outputs=[
                _types.Inversion.Output(display_name="inversion", tooltip="The recording. Goes to BiMD Sampler."),
                io.Sigmas.Output(display_name="sigmas", tooltip=_SIGMAS),
                io.String.Output(display_name="text", tooltip="Evaluations, size of the residuals, and the recording's own "
                                                              "error."),
            ],
        )

    @classmethod
    def execute(cls, guider: io.Guider.Type, sigmas: io.Sigmas.Type, latent_image: io.Latent.Type, estimate: str, refine: int,
                manipulation_start: int, closed_loop: bool, chunk: int) -> io.NodeOutput:
        settings = Settings(estimate, refine, manipulation_start, closed_loop, chunk)
        inversion = record(guider, sigmas, samples_of(guider, latent_image), settings)
        return io.NodeOutput(inversion, inversion.sigmas, report.describe(inversion))


class BiMDSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Likeness_BiMDSampler",
            display_name="BiMD Sampler",
            category=_types.INVERT,
            description="Walks a recorded picture down from noise again while the identity works inside it: the backward flow "
                        "keeps the scene, the forward flow brings the identity.",
            search_aliases=["bimd", "replay inversion", "resampler", "edit sampler", "img2img", *_KIN],
            inputs=[
                _types.Inversion.Input("inversion", tooltip="From ResInversion Sampler, Load Inversion or Baseline Inversion."),
                io.Int.Input(
                    "manipulation_start", default=0, min=0, max=10000,
                    tooltip=_START + " Less than the recording's own start means that start.",
                ),
                io.Float.Input(
                    "forward_strength", default=1.0, min=0.0, max=2.0, step=0.05, display_mode=io.NumberDisplay.slider,
                    tooltip="How strongly the identity acts. 0 brings the picture back, 1 is the model's own strength, 2 "
                            "doubles it.",
                ),
                io.Float.Input(
                    "backward_strength", default=1.0, min=0.0, max=1.0, step=0.05, display_mode=io.NumberDisplay.slider,
                    tooltip="How strongly the picture holds on to itself. 0 is plain sampling from the picture's noise.",
                ),
                io.Float.Input(
                    "tether", default=0.0, min=0.0, max=1.0, step=0.01, advanced=True,
                    tooltip="Pulls every step back to the recorded path by this share. A little (0.05) calms high cfg; 0 is the "
                            "paper.",
                ),
                io.Combo.Input(
                    "mask_mode", options=list(MASK_MODES), advanced=True,
                    tooltip="anchor: outside the mask the picture stays exactly as it was. difference: the identity pushes only "
                            "inside, the rest may follow a little.",
                ),
                io.Boolean.Input(
                    "accept_mismatch", default=False, advanced=True,
                    tooltip="Go on although model, cfg, prompts or steps are not those of the recording. The picture will not "
                            "come back exactly.",
                ),
                io.Mask.Input("mask", optional=True, tooltip="Where the picture may change, white is yes; any size."),
                _types.Curve.Input(
                    "curve", optional=True, extra_dict=_types.SOCKET,
                    tooltip="From core's Curve Editor: forward strength over the steps, first step on the left. It multiplies "
                            "forward_strength.",
                ),
            ],
            outputs=[io.Sampler.Output(
                display_name="sampler",
                tooltip="Goes to SamplerCustomAdvanced, with the same guider, the SIGMAS of the recording and Disable Noise.",
            )],
        )

    @classmethod
    def execute(cls, inversion: Inversion, manipulation_start: int, forward_strength: float, backward_strength: float,
                tether: float, mask_mode: str, accept_mismatch: bool, mask: io.Mask.Type | None = None,
                curve: object = None) -> io.NodeOutput:
        _types.check_curve(curve)
        flows = Flows(manipulation_start, forward_strength, backward_strength, tether, mask, mask_mode, curve)
        return io.NodeOutput(Replay(inversion, flows, accept_mismatch))


class IdentityFusion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Likeness_IdentityFusion",
            display_name="Identity Fusion",
            category=_types.INVERT,
            description="Adds one more identity to a CustomEnhancer Guider. Chain it for more; their differences add up.",
            search_aliases=["mix identities", "blend faces", "identity mix", "interpolate", "morph"],
            inputs=[
                io.Guider.Input("guider", tooltip="From CustomEnhancer Guider or another Identity Fusion."),
                io.Conditioning.Input(
                    "positive", tooltip="The prompt with the further identity, from an injector on the model of the guider."),
                io.Float.Input(
                    "weight", default=0.5, min=0.0, max=2.0, step=0.05, display_mode=io.NumberDisplay.slider,
                    tooltip="How much of this identity. Weights of about 1 together look natural.",
                ),
                io.Float.Input(
                    "keep", default=0.5, min=0.0, max=2.0, step=0.05, display_mode=io.NumberDisplay.slider,
                    tooltip="What the identities already in the guider are multiplied by.",
                ),
                io.Boolean.Input(
                    "path", default=False,
                    tooltip="Over a batch: the first picture has the old identities alone, the last one the weights above, the "
                            "others lie evenly between. Use Repeat Latent Batch.",
                ),
                io.Mask.Input("mask", optional=True, tooltip="Where this identity acts, white is yes; any size."),
            ],
            outputs=[io.Guider.Output(display_name="guider", tooltip="A new guider with one more identity.")],
        )

    @classmethod
    def execute(cls, guider: io.Guider.Type, positive: io.Conditioning.Type, weight: float, keep: float, path: bool,
                mask: io.Mask.Type | None = None) -> io.NodeOutput:
        if not isinstance(guider, Guider):
            raise LikenessError("Identity Fusion needs a guider with a free prompt; connect a CustomEnhancer Guider.")
        return io.NodeOutput(guider.with_identity(positive, weight, mask, keep, path))


class BaselineInversion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Likeness_BaselineInversion",
            display_name="Baseline Inversion",
            category=_types.INVERT,
            description="The two older ways to invert a picture, for comparison: plain DDIM inversion, and null-text "
                        "optimisation.",
            search_aliases=["ddim inversion", "null text inversion", "nti", "null-text", "unsampler"],
            inputs=[
                io.Guider.Input("guider", tooltip="The guider that the replay will use."),
                io.Sigmas.Input("sigmas", tooltip="From a scheduler node, whole, falling to 0."),
                io.Latent.Input("latent_image", tooltip="The picture, through VAE Encode."),
                io.Combo.Input(
                    "method", options=["ddim", "null-text"],
                    tooltip="ddim: one pass, drifts off at cfg above 1. null-text: fits a negative text for every step; slow, "
                            "and needs a second copy of the model and room for gradients.",
                ),
                io.Int.Input("inner_steps", default=10, min=1, max=100, tooltip="null-text: optimisation steps for each step."),
                io.Boolean.Input("early_stop", default=True, tooltip="null-text: stop a step's optimisation once it is close "
                                                                     "enough."),
                io.Int.Input("manipulation_start", default=0, min=0, max=10000, tooltip=_START),
            ],
            outputs=[
                _types.Inversion.Output(display_name="inversion", tooltip="Goes to BiMD Sampler."),
                io.Sigmas.Output(display_name="sigmas", tooltip=_SIGMAS),
                io.String.Output(display_name="text", tooltip="Evaluations, and for null-text how near it came."),
            ],
        )

    @classmethod
    def execute(cls, guider: io.Guider.Type, sigmas: io.Sigmas.Type, latent_image: io.Latent.Type, method: str, inner_steps: int,
                early_stop: bool, manipulation_start: int) -> io.NodeOutput:
        samples = samples_of(guider, latent_image)
        if method == "ddim":
            inversion, said = record_ddim(guider, sigmas, samples, manipulation_start), ""
        else:
            inversion, said = record_null_text(guider, sigmas, samples, inner_steps, early_stop, manipulation_start)
        text = "\n".join(filter(None, [report.describe(inversion), said]))
        return io.NodeOutput(inversion, inversion.sigmas, text)


class SaveInversion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Likeness_SaveInversion",
            display_name="Save Inversion",
            category=_types.INVERT,
            description="Writes a recording into output/likeness/inversions, so that other edits of the same picture need not "
                        "record it again.",
            search_aliases=["export inversion", "save noise", "store trajectory"],
            inputs=[
                _types.Inversion.Input("inversion", tooltip="The recording to keep."),
                io.String.Input(
                    "filename_prefix", default="inversion",
                    tooltip="Name of the file below output/likeness/inversions; a number is added. Sub-folders and date marks "
                            "work as in Save Image.",
                ),
                io.Combo.Input(
                    "precision", options=list(PRECISIONS), advanced=True,
                    tooltip="fp32 loses nothing. fp16 residuals make the file a quarter smaller and cost 20 to 50 dB of "
                            "exactness.",
                ),
            ],
            outputs=[io.String.Output(display_name="text", tooltip="Path and size of the written file.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, inversion: Inversion, filename_prefix: str, precision: str) -> io.NodeOutput:
        path = _paths.new_path(_paths.INVERSIONS, filename_prefix)
        save_inversion(inversion, path, precision)
        text = f"{path}\n{path.stat().st_size / 2 ** 20:.1f} MiB"
        return io.NodeOutput(text, ui=ui.PreviewText(text))


class LoadInversion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Likeness_LoadInversion",
            display_name="Load Inversion",
            category=_types.INVERT,
            description="Reads a recording that Save Inversion wrote.",
            search_aliases=["import inversion", "load noise", "saved trajectory"],
            inputs=[
                io.Combo.Input(
                    "file", options=list(_paths.saved_files(_paths.INVERSIONS)) or [_paths.nothing_saved(_paths.INVERSIONS)],
                    tooltip="Saved recording from output/likeness/inversions, from input, or from models/likeness/inversions. "
                            "Press R after saving a new one.",
                ),
                io.Boolean.Input(
                    "accept_mismatch", default=False, advanced=True,
                    tooltip="Take it although it was recorded with another model, cfg or prompt than the connected guider's.",
                ),
                io.Guider.Input(
                    "guider", optional=True,
                    tooltip="Connect it to check now, not only while sampling, that the recording was made with this model, cfg "
                            "and these prompts.",
                ),
            ],
            outputs=[
                _types.Inversion.Output(display_name="inversion", tooltip="Goes to BiMD Sampler."),
                io.Sigmas.Output(display_name="sigmas", tooltip=_SIGMAS),
                io.String.Output(display_name="text", tooltip="What the file says about itself, and what differs."),
            ],
        )

    @classmethod
    def validate_inputs(cls, file: str | None = None) -> bool | str:
        known = file is None or file in _paths.saved_files(_paths.INVERSIONS)
        return True if known else _paths.missing_saved(_paths.INVERSIONS, file)

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None, **others: object) -> str:
        return _paths.stamp(_paths.saved_files(_paths.INVERSIONS).get(file or ""))

    @classmethod
    def execute(cls, file: str, accept_mismatch: bool, guider: io.Guider.Type | None = None) -> io.NodeOutput:
        path = _paths.saved_files(_paths.INVERSIONS).get(file)
        if path is None:
            raise LikenessError(_paths.missing_saved(_paths.INVERSIONS, file))
        inversion = load_inversion(path)
        notes = check_belongs(inversion, guider, accept_mismatch) if guider is not None else []
        return io.NodeOutput(inversion, inversion.sigmas, "\n".join([report.describe(inversion), *notes]))


class InversionReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Likeness_InversionReport",
            display_name="Inversion Report",
            category=_types.INVERT,
            description="Shows what a recording is worth: its residuals as a plot, its steps as a strip, and with a guider how "
                        "exactly the picture comes back.",
            search_aliases=["inversion info", "psnr", "residual plot", "trajectory"],
            inputs=[
                _types.Inversion.Input("inversion", tooltip="The recording to look at."),
                io.Vae.Input("vae", tooltip="The VAE that encoded the picture; it draws the strip."),
                io.Int.Input("pictures", default=8, min=2, max=32, tooltip="Steps in the strip, from the noise to the picture."),
                io.Guider.Input(
                    "guider", optional=True,
                    tooltip="Connect it to replay the whole recording without an identity and tell the error. It takes as long "
                            "as sampling.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="text", tooltip="Evaluations, residuals, size, and with a guider the error in dB."),
                io.Image.Output(display_name="plot", tooltip="Residual of each step; small and even is good."),
                io.Image.Output(display_name="strip", tooltip="The recorded steps side by side."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, inversion: Inversion, vae: io.Vae.Type, pictures: int,
                guider: io.Guider.Type | None = None) -> io.NodeOutput:
        text, plot, strip = judge(inversion, vae, pictures, guider)
        plot, strip = to_intermediate(plot), to_intermediate(strip)
        return io.NodeOutput(text, plot, strip, ui=ui.PreviewImage(plot, cls=cls))


NODES = [EnhancerGuider, ResInversion, BiMDSampler, IdentityFusion, BaselineInversion, SaveInversion, LoadInversion,
         InversionReport]
