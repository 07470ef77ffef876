"""The schema of caches: when a generation computes, and where and how it reuses what it computed before.

A cache is named on a command line by a file of conf/cache (``cache=pab_slow``), by any other file
(``cache=FILE.yaml``), or by its keys (``cache="{policy: fixed, period: 2}"``). A generation has N calls of the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from lingen.adacache_config import AdaCacheConfig
from lingen.compose import CONF_DIR, validate
from lingen.errors import UserError, nearest
from lingen.model_config import PathText, Section
from lingen.reuse_config import Reusing

Site = Literal["self", "mate", "ma", "te", "cross", "mlp"]  # a DiT has self, cross, mlp; a LinGen all but self
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Period = Annotated[int, Field(ge=1)]  # every so many calls are computed


class NeverConfig(Section):
    """Everything is computed."""

    policy: Literal["never"] = "never"


class FixedConfig(Reusing):
    """Every so many calls are computed: the whole stack of blocks, or each of ``sites`` at a period of its own."""

    policy: Literal["fixed"] = "fixed"
    period: Period | None = None
    sites: dict[Site, Period] = Field(default_factory=dict)
    first: PositiveInt = 1  # so many calls at the start and at the end are computed anyway
    last: NonNegativeInt = 1

    @model_validator(mode="after")
    def _one_of_both(self) -> FixedConfig:
        if (self.period is None) == (not self.sites):
            raise ValueError("fixed needs either period, of the whole stack, or sites with a period each, not both")
        return self


class ScheduleConfig(Reusing):
    """Given calls are computed by the whole stack, whatever the video shows: the schedules that another policy made,
    or those of other videos, as a control."""

    policy: Literal["schedule"] = "schedule"
    # "1" for each call that is computed, "0" for each that is not; one for all samples, or one for each of a batch.
    schedules: Annotated[tuple[Annotated[str, Field(pattern=r"^1[01]*$")], ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _of_one_length(self) -> ScheduleConfig:
        if len(lengths := {len(schedule) for schedule in self.schedules}) > 1:
            raise ValueError(f"schedules are of one generation's calls, and have {sorted(lengths)}")
        return self

    def of(self, places: Sequence[int]) -> ScheduleConfig:
        """The schedules of these samples alone; one for all stays one."""
        if len(self.schedules) == 1:
            return self
        return self.model_copy(update={"schedules": tuple(self.schedules[place] for place in places)})


class PabConfig(Reusing):
    """Pyramid Attention Broadcast (Zhao et al., arXiv 2408.12588): what changes slower is computed less often.

    The published model attends in space, in time and to the text by turns. Here the period ``spatial``, the most
    careful one, is for attention that sees the neighbours, ``temporal`` for what carries the whole video: a LinGen's
    TE-branch and MA-branch. A DiT's attention does both at once and takes ``spatial``.
    """

    policy: Literal["pab"] = "pab"
    spatial: Period = 2
    temporal: Period = 4
    cross: Period = 6
    window: tuple[Share, Share] = (0.45, 0.93)  # of noise levels between which anything is reused: timesteps 450-930

    @model_validator(mode="after")
    def _window_ascends(self) -> PabConfig:
        if self.window[0] >= self.window[1]:
            raise ValueError(f"window={list(self.window)}: the first noise level must be below the second")
        return self


class TGateConfig(Reusing):
    """T-GATE (Liu et al., arXiv 2404.02747): before a gate the mixer is computed every ``period`` calls, behind it the
    cross-attention stays what it was."""

    policy: Literal["tgate"] = "tgate"
    gate: Share = 0.4  # of the calls
    period: Period = 2


class DeltaDitConfig(Reusing):
    """Delta-DiT (Chen et al., arXiv 2406.01125): what a range of blocks adds is computed every ``period`` calls; the
    rear blocks' before a gate, the front ones' behind it."""

    policy: Literal["delta_dit"] = "delta_dit"
    period: Period = 2
    gate: Share = 0.5  # of the calls
    blocks: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5  # of all


class TeaCacheConfig(Reusing):
    """TeaCache (Liu et al., arXiv 2411.19108): computes when the summed relative change of what the first block's mixer
    sees, rescaled by a polynomial, comes to the threshold."""

    policy: Literal["teacache"] = "teacache"
    threshold: PositiveFloat = 0.1
    coefficients: Annotated[tuple[float, ...], Field(min_length=1)] = (1.0, 0.0)  # highest power first; the identity


class FirstBlockConfig(Reusing):
    """First-block cache (ParaAttention): the first block always runs; the others when what it adds has changed by more
    than the threshold since they last ran."""

    policy: Literal["first_block"] = "first_block"
    threshold: PositiveFloat = 0.08


class MagCacheConfig(Reusing):
    """MagCache (Ma et al., arXiv 2506.09045): reuses while the error that calibrated ratios of the residual's norms
    foresee, summed, is within the threshold."""

    policy: Literal["magcache"] = "magcache"
    ratios: PathText  # a file that scripts/calibrate_cache.py wrote for this model and this number of calls; in a
    # cache that is a file, relative to that file
    threshold: PositiveFloat = 0.24
    max_skips: PositiveInt = 5  # one behind the other
    retention: Share = 0.2  # of the calls: so many at the start are computed


CacheConfig = Annotated[
    NeverConfig
    | FixedConfig
    | ScheduleConfig
    | AdaCacheConfig
    | PabConfig
    | TGateConfig
    | DeltaDitConfig
    | TeaCacheConfig
    | FirstBlockConfig
    | MagCacheConfig,
    Field(discriminator="policy"),
]
POLICIES: dict[str, type[Section]] = {
    "never": NeverConfig,
    "fixed": FixedConfig,
    "schedule": ScheduleConfig,
    "adacache": AdaCacheConfig,
    "pab": PabConfig,
    "tgate": TGateConfig,
    "delta_dit": DeltaDitConfig,
    "teacache": TeaCacheConfig,
    "first_block": FirstBlockConfig,
    "magcache": MagCacheConfig,
}


def read_cache(given: str | Path | Mapping[str, Any] | Section) -> CacheConfig:
    """A cache from its name in conf/cache, a file, its keys (as a mapping, or as the text of one), or itself.

    Raises:
        UserError: there is no such name, file or policy; a key or a value is wrong.
    """
    if isinstance(given, Section):
        given = given.model_dump()
    tree = given if isinstance(given, Mapping) else _read(str(given))
    if not isinstance(tree, Mapping) or not isinstance(tree.get("policy"), str):
        raise UserError(f"cache={given}: policy is not set; give policy=NAME, one of {', '.join(POLICIES)}")
    if tree["policy"] not in POLICIES:
        raise UserError(f"cache: policy={tree['policy']} does not exist{nearest(tree['policy'], POLICIES)}")
    try:
        return validate(POLICIES[tree["policy"]], dict(tree))  # type: ignore[return-value]
    except UserError as error:
        raise UserError(f"cache of policy {tree['policy']}: {error}") from error


def _read(word: str) -> Any:
    if word.lstrip().startswith("{"):
        return _parse(word, word)
    folder = CONF_DIR / "cache"
    path = Path(word).expanduser() if word.endswith((".yaml", ".yml")) else folder / f"{word}.yaml"
    if path.parent == folder and not path.exists():
        hint = nearest(word, (file.stem for file in folder.glob("*.yaml")))
        raise UserError(f"cache={word} does not exist in conf/cache{hint}")
    try:
        text = path.read_text()
    except OSError as error:
        raise UserError(f"cache={word} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"cache={word} is no text: {error}") from error
    tree = _parse(word, text)
    if path.parent != folder and isinstance(tree, dict) and isinstance(ratios := tree.get("ratios"), str):
        tree["ratios"] = str(path.parent / Path(ratios).expanduser())
    return tree


def cache_yaml(cache: CacheConfig, folder: Path) -> str:
    """A cache as a file in ``folder``: a line for each key that is not as it is by default, and its value in one piece.
    What lies in the folder too is named relative to it, so that both can be moved together."""
    tree = {"policy": cache.policy} | cache.model_dump(mode="json", exclude_defaults=True)
    if isinstance(cache, MagCacheConfig) and Path(cache.ratios).resolve().parent == folder.resolve():
        tree["ratios"] = Path(cache.ratios).name
    values = {key: yaml.safe_dump([value], default_flow_style=True, width=math.inf) for key, value in tree.items()}
    return "".join(f"{key}: {value.strip()[1:-1]}\n" for key, value in values.items())


def _parse(word: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"cache={word} cannot be read: {error}") from error
