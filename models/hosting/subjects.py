"""Subjects: taken from pictures, blended, saved and loaded."""
from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..common import files
from ..common.errors import LikenessError
from ..common.masks import cut_out
from ..common.records import SUBJECT_VERSION, Subject
from ..common.reference import check_found, subject_mask
from ..vision.preprocess import common_size
from .adapters import Adapter, encoder_hashes, extract, picture_hash
from .encoders import Encoders
from .realcustom import reference_pictures

FORMAT = "likeness.subject"
PAIRINGS = ("all", "per latent")
BLEND_MODES = ("average", "concat")
# Names of a subject's tokens; "black" has one row, whatever the number of pictures.
TOKENS = {"custany": ("global", "local"), "realcustom": ("local", "black")}


class Extracted(NamedTuple):
    """subject; picture (b, s, s, 3): what the encoders saw; report; whether any picture held a subject."""
    subject: Subject
    picture: Tensor
    report: str
    found: bool


def empty_subject(adapter: Adapter, encoders: Encoders, source: str = "") -> Subject:
    """A subject of no pictures: the injector passes model and prompts through."""
    config = adapter.config
    rows = {"global": len(config.encoders)}
    tokens = tuple((name, torch.zeros(0, rows.get(name, 0), config.width)) for name in TOKENS[adapter.method])
    return Subject(adapter.method, tokens, "all", config.base, config.width, source, encoders.hash,
                   adapter.sha256, adapter)


def extract_from_picture(adapter: Adapter, encoders: Encoders, image: Tensor, mask: Tensor | None,
                         combine: str, margin: float, on_missing: str) -> Extracted:
    """Picture (b, h, w, c) and mask -> the subject. Raises LikenessError for an empty mask that may not pass."""
    sizes = adapter.config.resolutions or common_size([item.config for item in encoders.items])
    own = subject_mask(image, mask)
    if adapter.method == "realcustom":
        cut = reference_pictures(image, mask, own, margin, max(sizes))
    else:  # background and size as the adapter had them in training; at this size little is resampled twice
        cut = cut_out(image, mask, adapter.config.background, margin, max(sizes))
    check_found(cut.found, on_missing)
    kept = [index for index, ok in enumerate(cut.found) if ok]
    source = picture_hash(image, mask)
    if not kept:
        return Extracted(empty_subject(adapter, encoders, source), cut.image,
                         "no picture holds a subject: SUBJECT is empty and nothing will be injected", False)
    if len(kept) < len(cut.found) and combine == "one per latent":
        raise LikenessError(f"With one per latent every picture needs a subject, and only {len(kept)} of "
                            f"{len(cut.found)} have one; correct the masks, or choose concat or average.")
    picture = cut.image[kept]
    subject = extract(adapter, encoders, picture, combine, source)
    report = _report(subject, encoders, sizes, cut.found, own, combine, margin)
    return Extracted(subject, picture, report, True)


def _report(subject: Subject, encoders: Encoders, sizes: tuple[int, ...], found: list[bool],
            mask: Tensor | None, combine: str, margin: float) -> str:
    kept = sum(found)
    pictures = f"pictures: {kept}"
    if kept < len(found):
        pictures += f" of {len(found)}, the others have an empty mask"
    if kept > 1:
        pictures += f", {combine}"
    seen = ", ".join(f"{item.config.family} {item.config.width} ({item.name}, {size} px)"
                     for item, size in zip(encoders.items, sizes, strict=True))
    lines = [f"method {subject.method}, adapter {subject.adapter.name}", pictures,
             f"tokens: {_count(subject)} of width {subject.width}", f"encoders: {seen}"]
    trained_with = encoder_hashes(dict(subject.adapter.metadata))
    lines += [f"note: {item.name} is not the very file that the adapter was trained with; unless it is the same in another "
              "precision, the likeness is lost" for item, digest in zip(encoders.items, trained_with, strict=False)
              if not item.is_file(digest)]
    if mask is None:
        lines.append("no mask: the whole picture counts as the subject, background too")
    else:
        rows = (row for row, ok in zip(mask, found, strict=True) if ok)
        shares = ", ".join(f"{100 * float(row.mean()):.1f} %" for row in rows)
        lines.append(f"the mask keeps {shares} of the picture")
    if subject.method == "realcustom":
        if mask is None:
            lines.append("it is squeezed into a square; for small details crop the picture to the subject first")
        lines += [f"note: {item.name} has the tanh form of GELU, the release has the exact one; let Load Subject Adapter load it"
                  for item in encoders.items if item.config.activation == "gelu_tanh"]
    trained = getattr(subject.adapter.config, "margin", margin)
    if abs(margin - trained) > 0.01:
        lines.append(f"margin {margin:g}, the adapter was trained with {trained:g}")
    return "\n".join(lines)


def _count(subject: Subject) -> str:
    parts = " + ".join(f"{tensor.shape[1]} {name}" for name, tensor in subject.tokens if name != "black")
    return f"{subject.pictures} x ({parts})"


def _maker(subject: Subject) -> str:
    name = getattr(subject.adapter, "name", "an unknown file")
    return f"{subject.method} with the adapter {name} ({subject.adapter_hash[:8]})"


def blend(a: Subject, b: Subject, weight: float, mode: str) -> tuple[Subject, str]:
    """Subject between a (weight 0) and b (weight 1), and a report. Raises LikenessError for different adapters.

    average mixes every token. concat keeps the local tokens of both and mixes only what goes into the word.
    """
    if (a.method, a.base, a.width, a.adapter_hash) != (b.method, b.base, b.width, b.adapter_hash):
        raise LikenessError(f"Only subjects of one adapter can be blended: subject_a was made by {_maker(a)}, "
                            f"subject_b by {_maker(b)}; extract both with the same adapter.")
    if not a.pictures:
        return b, "subject_a is empty: subject_b as it is"
    if not b.pictures:
        return a, "subject_b is empty: subject_a as it is"
    pairing = "per latent" if "per latent" in (a.pairing, b.pairing) else "all"
    tokens = tuple((name, _mix(name, tensor, b.get(name), weight, mode, pairing)) for name, tensor in a.tokens)
    label = repr((a.source_hash, b.source_hash, weight, mode, a.pairing, b.pairing))
    same = a.encoder_hash == b.encoder_hash
    subject = a._replace(tokens=tokens, pairing=pairing, source_hash=hashlib.sha256(label.encode()).hexdigest(),
                         encoder_hash=a.encoder_hash if same else f"{a.encoder_hash}|{b.encoder_hash}",
                         maker=a.maker or b.maker)
    lines = [f"{mode}: {100 * (1 - weight):.0f} % subject_a, {100 * weight:.0f} % subject_b",
             f"tokens: {_count(subject)}"]
    if mode == "concat":
        lines.append("the weight acts on the word; the local level sees the tokens of both")
    if not same:
        lines.append("note: the two were extracted with different encoder files")
    return subject, "\n".join(lines)


def _mix(name: str, a: Tensor, b: Tensor, weight: float, mode: str, pairing: str) -> Tensor:
    """Tokens (n, t, d) of two subjects -> those of their blend."""
    if name == "black":
        return a
    if pairing == "per latent":  # row by row
        a, b = _matched(a, b)
        return torch.cat([a, b], 1) if mode == "concat" and name == "local" else torch.lerp(a, b, weight)
    if mode == "average":
        return torch.lerp(a.mean(0, keepdim=True), b.mean(0, keepdim=True), weight)
    if name == "local":
        if a.shape[1] != b.shape[1]:
            raise LikenessError(f"The subjects have {a.shape[1]} and {b.shape[1]} local tokens a picture, and "
                                "concat needs equal numbers; choose average, or extract both in one way.")
        return torch.cat([a, b])
    # The word takes the mean over all rows: these factors make it the mix of the two subjects' means.
    total = a.shape[0] + b.shape[0]
    return torch.cat([a * ((1 - weight) * total / a.shape[0]), b * (weight * total / b.shape[0])])


def _matched(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Equal numbers of rows: a single one serves all rows of the other."""
    count = max(a.shape[0], b.shape[0])
    if a.shape[0] not in (1, count) or b.shape[0] not in (1, count):
        raise LikenessError(f"One subject has references for {a.shape[0]} latents, the other for {b.shape[0]}; "
                            "give both as many, or extract them with average.")
    return a.expand(count, *a.shape[1:]), b.expand(count, *b.shape[1:])


def save_subject(subject: Subject, path: str | Path) -> None:
    """Tokens and their origin as safetensors, whole or not at all; the adapter itself is not in the file."""
    if not subject.pictures:
        raise LikenessError("This subject is empty because no reference held one, so there is nothing to save; "
                            "mend the mask, or connect found to a switch.")
    name, digest = subject.maker or (getattr(subject.adapter, "name", ""), subject.adapter_hash)
    metadata = {"format": FORMAT, "format_version": str(subject.version), "method": subject.method,
                "base": subject.base, "width": str(subject.width), "pairing": subject.pairing,
                "source_hash": subject.source_hash, "encoder_hash": subject.encoder_hash,
                "adapter_hash": digest, "adapter": name,
                "pictures": str(subject.pictures)}
    files.save(path, dict(subject.tokens), metadata)


def load_subject(path: str | Path, adapter: Adapter, encoders: Encoders | None = None,
                 accept_other: bool = False) -> tuple[Subject, str]:
    """A saved subject for this adapter, and a report.

    Raises LikenessError when the file, the adapter or the encoders do not fit; accept_other lets another file of
    the same method, base and width pass.
    """
    name = Path(path).name
    metadata = files.read_saved(path, "subject", SUBJECT_VERSION)
    config = adapter.config
    made = f"{metadata.get('method')} for {metadata.get('base')}, width {metadata.get('width')}"
    have = f"{adapter.method} for {config.base}, width {config.width}"
    if made != have:
        raise LikenessError(f"The subject {name} was made by {made}, the adapter {adapter.name} is {have}; load "
                            f"the adapter {metadata.get('adapter', 'that it was made with')}.")
    notes = _compare(name, metadata, adapter, encoders, accept_other)
    tokens, _ = files.load(path)
    if not _sound(tokens, adapter) or metadata.get("pairing") not in PAIRINGS:
        raise LikenessError(f"The subject {name} is damaged, its tokens are not those of {made}; save it again.")
    maker = metadata.get("adapter", ""), metadata.get("adapter_hash", "")
    subject = Subject(adapter.method, tuple((key, tokens[key].float()) for key in TOKENS[adapter.method]),
                      metadata["pairing"], config.base, config.width, metadata.get("source_hash", ""),
                      metadata.get("encoder_hash", ""), adapter.sha256, adapter,
                      maker=None if maker[1] == adapter.sha256 else maker)
    return subject, "\n".join([f"subject {name}: {made}", f"tokens: {_count(subject)}", *notes])


def _sound(tokens: dict[str, Tensor], adapter: Adapter) -> bool:
    """Whether a file's tokens are of the shapes that this adapter makes."""
    if set(tokens) != set(TOKENS[adapter.method]) or any(t.ndim != 3 for t in tokens.values()):
        return False
    rows, width = tokens["local"].shape[0], adapter.config.width
    wanted = {"global": (rows, len(adapter.config.encoders)), "black": (1, tokens["local"].shape[1])}
    return (tokens["local"].numel() > 0 and all(t.shape[2] == width and bool(torch.isfinite(t).all()) for t in tokens.values())
            and all(tuple(tokens[name].shape[:2]) == wanted.get(name, tuple(tokens[name].shape[:2])) for name in tokens))


def _named_hash(adapter: Adapter) -> str:
    """Encoders.hash of the encoders in the adapter's training, "" when its file does not name them all."""
    hashes = [digest[:16] for digest in encoder_hashes(dict(adapter.metadata))]
    return "+".join(hashes) if hashes and all(hashes) else ""


def _compare(name: str, metadata: dict[str, str], adapter: Adapter, encoders: Encoders | None,
             accept_other: bool) -> list[str]:
    """Notes about differences; those that matter raise LikenessError unless they are accepted."""
    notes = []
    if metadata.get("adapter_hash") != adapter.sha256:
        text = (f"The subject {name} was made with the adapter {metadata.get('adapter', '')} "
                f"({metadata.get('adapter_hash', '')[:8]}), the connected one is {adapter.name} "
                f"({adapter.sha256[:8]})")
        if not accept_other:
            raise LikenessError(f"{text}; connect that adapter, or switch accept_other_adapter on.")
        notes.append(f"note: {text}; accepted")
    made = metadata.get("encoder_hash", "")
    have = encoders.hash if encoders is not None else _named_hash(adapter)
    if have and made != have:
        what = "the connected ones" if encoders is not None else "those of the adapter's training"
        text = f"The subject {name} was made with other encoder files ({made}) than {what} ({have})"
        if encoders is not None and not accept_other:
            raise LikenessError(f"{text}; connect the right ones, extract the subject again, or switch "
                                "accept_other_adapter on.")
        notes.append(f"note: {text}")
    return notes
