"""What an inversion costs and how exact it is, in the miniature: counts from a hook on the network, not our own bookkeeping."""
from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

STEPS, START, CFG = 50, 20, 7.5
INNER, NULL_STEPS = 10, 10


class Counter:
    """Rows that go through a network and come back through it as gradients, and how often it runs."""

    def __init__(self, pictures: int):
        self.pictures, self.rows, self.back, self.calls, self.seconds, self.cpu = pictures, 0, 0, 0, 0.0, 0.0

    @property
    def evaluations(self) -> float:
        """Latents through the network for one picture."""
        return self.rows / self.pictures


@contextmanager
def counted(model: Any, pictures: int) -> Iterator[Counter]:
    """Counts and times everything inside. The null-text baseline copies the network; a plain function is copied along."""
    counter = Counter(pictures)

    def seen(module: Any, args: tuple, kwargs: dict, output: Tensor) -> None:
        counter.rows += args[0].shape[0]
        counter.calls += 1
        if output.requires_grad:
            output.register_hook(lambda gradient: setattr(counter, "back", counter.back + gradient.shape[0]))

    handle = model.model.diffusion_model.register_forward_hook(seen, with_kwargs=True)
    begin, cpu = time.perf_counter(), time.process_time()
    try:
        yield counter
    finally:
        counter.seconds, counter.cpu = time.perf_counter() - begin, time.process_time() - cpu
        handle.remove()


def least(counters: list[Counter], what: str) -> float:
    return min(getattr(counter, what) for counter in counters)


class Bench:
    """The shipped miniature in this process, held-out creatures as latents, and a guider with two prompts.

    The identity is a described look here: counts and reconstruction do not depend on where a conditioning comes from.
    """

    def __init__(self, pictures: int):
        import comfy.samplers
        from bench.custany import candidates

        from likeness.models.demo import captions, creatures, world
        from likeness.models.hosting.demo import load_base

        self.model, self.clip, self.vae = load_base()
        ids = world.select(candidates(), torch.arange(pictures) % 16)
        generator = torch.Generator().manual_seed(11)
        pose = world.draw_poses(pictures, generator)
        scene = torch.arange(pictures) % len(world.SCENES)
        parameters = world.draw_scene_parameters(pictures, generator, world.Variation(scene=1.0))
        drawn = creatures.draw_pictures(ids, pose, scene, parameters)
        encoded = self.vae.encode(drawn.picture.permute(0, 2, 3, 1))
        self.latents = self.model.model.process_latent_out(self.model.model.process_latent_in(encoded))
        self.texts = []  # of each picture: the sentence, and the same one with the look of another creature
        for k in range(pictures):
            kind, place = world.KINDS[int(ids["kind"][k])], world.PLACES[int(pose["place"][k])]
            before, after = captions.look(ids, (k + 1) % pictures)
            where = f"{world.SCENES[int(scene[k])]}, {place}"
            self.texts.append((f"a photo of a {kind} {where}", f"a photo of a {before} {kind}{after} {where}"))
        self.sampling = self.model.get_model_object("model_sampling")
        self.sigmas = lambda steps: comfy.samplers.calculate_sigmas(self.sampling, "normal", steps)

    def text(self, words: str) -> Any:
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(words))

    def guider(self, cfg: float, picture: int = 0) -> Any:
        from likeness.models.hosting.inversions import build_guider

        free, look = self.texts[picture]
        return build_guider(self.model, self.text(look), self.text(free), self.text(""), cfg)

    def replay(self, guider: Any, inversion: Any, picture: int = 0, evaluate_all: bool = False, **flows: Any) -> Tensor:
        """x_0 in model space."""
        from likeness.models.hosting.bimd import BiMDSampler
        from likeness.models.inversion.records import Flows

        latent = self.latents[picture:picture + 1]
        sampler = BiMDSampler(inversion, Flows(**flows), evaluate_all=evaluate_all)
        out = guider.sample(torch.zeros_like(latent), latent, sampler, inversion.sigmas, disable_pbar=True, seed=0)
        return self.model.model.process_latent_in(out)

    def plain_ddim(self, guider: Any, start: int, steps: int) -> None:
        """Plain DDIM inversion at cfg 1 and sampling back with the identity, both cut at the same step."""
        from likeness.models.hosting.baseline import record_ddim

        inversion = record_ddim(guider, self.sigmas(steps), self.latents[:1], start)
        self.replay(guider, inversion, start=start, backward=0.0)

    def pipeline(self, guider: Any, start: int, steps: int) -> Any:
        """ResInversion and BiMD with the identity after `start` steps."""
        from likeness.models.hosting.recorder import Settings, record

        inversion = record(guider, self.sigmas(steps), self.latents[:1], Settings(start=start))
        self.replay(guider, inversion, start=start)
        return inversion


def evaluations(bench: Bench) -> dict[str, Any]:
    """Counts of every scheme for one picture, and one run's wall times of the pipeline and of plain DDIM."""
    from likeness.models.hosting.recorder import Settings, record

    out: dict[str, Any] = {}
    agree = []
    for name, cfg in (("evals_cfg1", 1.0), ("evals_cfg", CFG)):
        guider = bench.guider(cfg)
        with counted(bench.model, 1) as counter:
            inversion = record(guider, bench.sigmas(STEPS), bench.latents[:1])
        out[name] = counter.evaluations
        out[name.replace("evals", "calls")] = counter.calls
        agree += [inversion.evaluations == counter.evaluations, inversion.calls == counter.calls]
    guider = bench.guider(CFG)
    ours, plain = [], []
    for _ in range(2):  # alternating, because the machine is shared
        with counted(bench.model, 1) as counter:
            bench.pipeline(guider, START, STEPS)
        ours.append(counter)
        with counted(bench.model, 1) as counter:
            bench.plain_ddim(guider, START, STEPS)
        plain.append(counter)
    # the straight reading: inversion with the labels of the step's end, each residual sampled for itself, every step sampled
    with counted(bench.model, 1) as counter:
        straight = record(guider, bench.sigmas(STEPS), bench.latents[:1], Settings("target", chunk=1))
        bench.replay(guider, straight, start=START, evaluate_all=True)
    out |= {"evals_pipeline_mss20": ours[0].evaluations, "evals_paper_mss20": counter.evaluations,
            "evals_ddim_mss20": plain[0].evaluations, "evals_over_ddim": ours[0].evaluations / plain[0].evaluations,
            "own_count_agrees": int(all(agree)), "wall_over_ddim": least(ours, "seconds") / least(plain, "seconds"),
            "cpu_over_ddim": least(ours, "cpu") / least(plain, "cpu"), "seconds_pipeline": least(ours, "seconds"),
            "seconds_ddim": least(plain, "seconds")}
    return out | levels_held(bench)


class _Away(Tensor):
    """A tensor that counts as lying outside of the sampling device until it is moved there with `to(device)`."""
    brought: list[Any] = []
    peak = between = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        moved = func is Tensor.to and len(args) > 1 and isinstance(args[1], torch.device)
        if not moved:
            return super().__torch_function__(func, types, args, kwargs or {})
        from torch.multiprocessing.reductions import StorageWeakRef

        here = args[0].as_subclass(Tensor).clone()
        cls.brought.append((StorageWeakRef(here.untyped_storage()), here.untyped_storage().nbytes()))
        cls.between = max(cls.between, cls.held())
        return here

    @classmethod
    def held(cls) -> int:
        """Bytes that were brought to the device and are still alive there."""
        cls.brought = [(weak, size) for weak, size in cls.brought if not weak.expired()]
        return sum(size for _, size in cls.brought)


@contextmanager
def _watched(model: Any, level_bytes: int, found: dict[str, float], name: str) -> Iterator[None]:
    """Levels on the device whenever the network runs, and at any moment (a new one comes before the last one goes)."""
    _Away.brought, _Away.peak, _Away.between = [], 0, 0
    handle = model.model.diffusion_model.register_forward_pre_hook(
        lambda module, args: setattr(_Away, "peak", max(_Away.peak, _Away.held())))
    try:
        yield
    finally:
        handle.remove()
    found[name], found[f"{name}_handover"] = _Away.peak / level_bytes, _Away.between / level_bytes


def levels_held(bench: Bench) -> dict[str, Any]:
    """Levels of the trajectory on the sampling device, by following where the code moves tensors (no card is needed).

    gpu_levels: recording, closed loop, and replay with mask and tether, a level at a time. gpu_levels_chunk: recording when the
    network is fed several levels in one call, which is chosen only for small pictures.
    """
    from likeness.models.hosting import recorder
    from likeness.models.hosting.recorder import Settings, record

    guider, latent, steps = bench.guider(CFG), bench.latents[:1], 20
    size = latent.numel() * 4
    found: dict[str, float] = {}
    kept = recorder.to_intermediate
    recorder.to_intermediate = lambda tensor: kept(tensor).clone().as_subclass(_Away)
    try:
        for name, settings in (("record", Settings(chunk=1)), ("closed", Settings(closed=True)), ("chunk", Settings())):
            with _watched(bench.model, size, found, name):
                inversion = record(guider, bench.sigmas(steps), latent, settings)
        mask = torch.zeros(1, *latent.shape[-2:])
        mask[..., 2:6] = 1
        with _watched(bench.model, size, found, "replay"):
            bench.replay(guider, inversion, start=5, tether=0.05, mask=mask)
    finally:
        recorder.to_intermediate = kept
    single = ("record", "closed", "replay")
    return {"gpu_levels": max(found[name] for name in single),
            "gpu_levels_handover": max(found[f"{name}_handover"] for name in single), "gpu_levels_chunk": found["chunk"]}


def exactness(bench: Bench, pictures: int, null_pictures: int) -> dict[str, float]:
    """PSNR in model space, every step evaluated, at cfg 7.5 and 50 steps; mean and worst over the pictures."""
    from likeness.models.hosting.baseline import record_ddim, record_null_text
    from likeness.models.hosting.recorder import Settings, record
    from likeness.models.inversion.report import psnr

    sigmas = bench.sigmas(STEPS)
    found: dict[str, list[float]] = {"default": [], "closed": [], "ddim": [], "nti": []}
    for k in range(pictures):
        guider, latent = bench.guider(CFG, k), bench.latents[k:k + 1]
        right = bench.model.model.process_latent_in(latent)
        recordings = {"default": record(guider, sigmas, latent), "closed": record(guider, sigmas, latent, Settings(closed=True)),
                      "ddim": record_ddim(guider, sigmas, latent)}
        if k < null_pictures:
            recordings["nti"] = record_null_text(guider, sigmas, latent, INNER, False)[0]
        for name, inversion in recordings.items():
            x = bench.replay(guider, inversion, k, evaluate_all=True, forward=0.0)
            found[name].append(min(psnr(x, right), 200.0))
            print(f"picture {k}, {name}: {found[name][-1]:.1f} dB", flush=True)
    out: dict[str, float] = {"psnr_pictures": pictures, "psnr_pictures_nti": null_pictures}
    for name, values in found.items():
        out |= {f"psnr_{name}": sum(values) / len(values), f"psnr_{name}_worst": min(values)}
    return out


def baselines(bench: Bench, steps: int) -> dict[str, float]:
    """Null-text against ResInversion, recording only, the same steps on both sides, without and with early stop."""
    from likeness.models.hosting.baseline import record_null_text
    from likeness.models.hosting.recorder import record

    guider, sigmas, latent = bench.guider(CFG), bench.sigmas(steps), bench.latents[:1]
    ours = []
    for _ in range(2):
        with counted(bench.model, 1) as counter:
            record(guider, sigmas, latent)
        ours.append(counter)
    out = {"nti_steps": steps, "nti_inner": INNER, "evals_res_same_steps": counter.evaluations,
           "seconds_res": least(ours, "seconds")}
    for end, early in (("", False), ("_early", True)):
        with counted(bench.model, 1) as counter:
            inversion, _ = record_null_text(guider, sigmas, latent, INNER, early)
        out |= {f"evals_nti_fwd{end}": counter.evaluations, f"evals_nti_bwd{end}": counter.back,
                f"seconds_nti{end}": counter.seconds, f"wall_nti_over_res{end}": counter.seconds / least(ours, "seconds"),
                f"cpu_nti_over_res{end}": counter.cpu / least(ours, "cpu"),
                f"own_count_agrees_nti{end}": int(inversion.evaluations == counter.evaluations)}
    return out


def file_size() -> dict[str, float]:
    """A recording with the shape of SDXL at 1024 and 50 steps, written and read three times."""
    from likeness.models.inversion.records import Inversion
    from likeness.models.inversion.storage import load_inversion, save_inversion

    generator = torch.Generator().manual_seed(0)
    inversion = Inversion(
        method="resinversion", anchors=torch.randn(STEPS + 1, 1, 4, 128, 128, generator=generator),
        residuals=torch.randn(STEPS, 1, 4, 128, 128, generator=generator), levels=torch.linspace(0, 14.6, STEPS + 1), steps=STEPS,
        start=0, cfg=CFG, estimate="source", refine=0, closed=False, prediction="EPS", latent_format="SDXL", model_hash="0" * 16,
        conditioning_hash="0" * 16, evaluations=2 * STEPS + 1, calls=STEPS + 1, to_latent=torch.ones(2, 4))
    wrote, read = [], []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sdxl.safetensors"
        for _ in range(3):
            begin = time.perf_counter()
            save_inversion(inversion, path)
            wrote.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            again = load_inversion(path)
            read.append(time.perf_counter() - begin)
        size = path.stat().st_size / 2 ** 20
    same = torch.equal(again.anchors, inversion.anchors) and torch.equal(again.residuals, inversion.residuals)
    return {"file_mib_sdxl": size, "file_seconds": max(max(wrote), max(read)), "file_seconds_write": max(wrote),
            "file_seconds_read": max(read), "file_same": int(same)}
