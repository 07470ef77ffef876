"""MagCache (Ma et al., arXiv 2506.09045): the norm of what the stack adds shrinks by ratios that hardly depend on the
prompt. They are measured once for a model and a number of calls, and foresee the error of a skip.

Shapes: R rows, n tokens of this rank, D width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pydantic import NonNegativeFloat, PositiveInt, ValidationError
from torch import Tensor

from lingen.cache_config import MagCacheConfig
from lingen.errors import UserError
from lingen.model_config import Section
from lingen.models import Backbone
from lingen.runfolder import write_aside
from lingen.sampling.cache.policy import Front, Seen
from lingen.sampling.cache.sites import blocks_of
from lingen.sampling.call import Call, Context


class MagRatios(Section):
    """The file of a calibration."""

    model: str  # ``fingerprint``
    calls: PositiveInt
    ratios: dict[Context, list[NonNegativeFloat]]  # of each call: its norm over that of the call before; 1 at the first


@dataclass
class MagCache:
    """Reuses while the ratios since the last computed call, multiplied up, have strayed from 1 by less than the
    threshold, summed over the calls (equations 5 and 6)."""

    config: MagCacheConfig
    ratios: list[float]
    depth: int
    probe: None = None
    ratio: float = 1.0
    error: float = 0.0
    skips: int = 0

    def span(self, call: Call) -> range:
        """All blocks."""
        return range(self.depth)

    def decide(self, call: Call, front: Front) -> list[bool]:
        """The same for all samples."""
        if call.index < int(self.config.retention * call.count + 0.5):
            return [True] * front.layout.samples
        self.ratio *= self.ratios[call.index]
        self.error += abs(1.0 - self.ratio)
        self.skips += 1
        due = not self.error <= self.config.threshold or self.skips > self.config.max_skips
        return [due] * front.layout.samples

    def learn(self, call: Call, seen: Seen) -> None:
        """Begin to sum anew."""
        self.ratio, self.error, self.skips = 1.0, 0.0, 0


@dataclass
class MeasureNorms:
    """Computes every call, and measures the ratios that ``MagCache`` needs."""

    depth: int
    probe: None = None
    norms: Tensor | None = None  # (R, n), of the last call
    ratios: list[Tensor] = field(default_factory=list)  # (), of each call

    def span(self, call: Call) -> range:
        """All blocks."""
        return range(self.depth)

    def decide(self, call: Call, front: Front) -> list[bool]:
        """All."""
        return [True] * front.layout.samples

    def learn(self, call: Call, seen: Seen) -> None:
        """The norm of each token's residual over that at the call before, the mean over all tokens."""
        tokens = seen.residual[:, seen.layout.tokens_here]
        norms = torch.linalg.vector_norm(tokens, dim=-1, dtype=torch.float32)  # (R, n)
        if self.norms is None:
            self.ratios.append(torch.ones((), device=norms.device))
        else:
            sums = (norms / self.norms.clamp_min(torch.finfo(torch.float32).tiny)).sum(-1)  # (R,)
            count = torch.full_like(sums, norms.shape[-1])
            total, tokens_in_all = seen.layout.totals(torch.stack([sums, count])).sum(-1)
            self.ratios.append(total / tokens_in_all)
        self.norms = norms


def magcache_policies(config: MagCacheConfig, model: Backbone, calls: int) -> Callable[[Context], MagCache]:
    """What makes the policy of each context of one generation.

    Raises:
        UserError: see ``read_ratios``; the calibration is of the other mode of guidance.
    """
    found, depth = read_ratios(Path(config.ratios), model, calls), len(blocks_of(model))

    def make(context: Context) -> MagCache:
        if context not in found.ratios:
            raise UserError(
                f"ratios={config.ratios} is for '{', '.join(found.ratios)}', this generation has '{context}'; "
                "calibrate with guidance as it is here: in one batch, in two passes, or none"
            )
        return MagCache(config, found.ratios[context], depth)

    return make


def mean_ratios(measured: list[MeasureNorms]) -> list[float]:
    """The mean of several generations of as many calls."""
    stacked = torch.stack([torch.stack(one.ratios) for one in measured])  # (generations, calls)
    return stacked.mean(0).tolist()


def write_ratios(path: Path, model: Backbone, calls: int, ratios: dict[Context, list[float]]) -> None:
    """Write a calibration of a model, aside and renamed."""
    write_aside(path, MagRatios(model=fingerprint(model), calls=calls, ratios=ratios).model_dump_json(indent=1))


def read_ratios(path: Path, model: Backbone, calls: int) -> MagRatios:
    """A calibration.

    Raises:
        UserError: it cannot be read; it is of another model (which a model on the meta device cannot tell), or of
            another number of calls.
    """
    try:
        found = MagRatios.model_validate_json(path.read_bytes())
    except OSError as error:
        hint = "scripts/calibrate_cache.py writes it"
        raise UserError(f"ratios={path} cannot be read: {error.strerror}; {hint}") from error
    except ValidationError as error:
        raise UserError(f"ratios={path} is no calibration of MagCache: {error.errors()[0]['msg']}") from error
    if found.calls != calls or any(len(each) != calls for each in found.ratios.values()):
        raise UserError(f"ratios={path} was calibrated for {found.calls} calls, this generation has {calls}")
    without_weights = model.patch_in.weight.is_meta  # a model that is only planned with
    if not without_weights and found.model != fingerprint(model):
        raise UserError(f"ratios={path} was calibrated for another model; run scripts/calibrate_cache.py for this one")
    return found


def fingerprint(model: Backbone) -> str:
    """Tells models apart: their shapes, and the weights of the blocks' tables as bf16 has them, so that a model is the
    same in both precisions and on any device."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        digest.update(f"{name} {tuple(weight.shape)}\n".encode())
    for block in blocks_of(model):
        digest.update(block.table.detach().to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
