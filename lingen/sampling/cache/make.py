"""From a configuration to the policies of a generation."""

from __future__ import annotations

from collections.abc import Callable

from lingen.adacache_config import AdaCacheConfig
from lingen.cache_config import (
    CacheConfig,
    DeltaDitConfig,
    FirstBlockConfig,
    FixedConfig,
    MagCacheConfig,
    NeverConfig,
    PabConfig,
    ScheduleConfig,
    TeaCacheConfig,
    TGateConfig,
)
from lingen.errors import UserError
from lingen.models import Backbone
from lingen.sampling.cache.adacache import adacache_policies
from lingen.sampling.cache.magcache import magcache_policies
from lingen.sampling.cache.measured import FirstBlock, TeaCache
from lingen.sampling.cache.policy import Policy
from lingen.sampling.cache.scheduled import DeltaDit, Interval, Pab, Replay, SiteIntervals, TGate
from lingen.sampling.cache.sites import blocks_of, mixer_site, sites_of
from lingen.sampling.call import Context


def policies_of(config: CacheConfig, model: Backbone, calls: int) -> Callable[[Context], Policy | None]:
    """What makes the policy of each context of one generation of ``calls`` calls; None: everything is computed.

    Raises:
        UserError: the model has not what the cache asks for; a calibration is not for this model and so many calls.
    """
    blocks = blocks_of(model)
    depth = len(blocks)
    match config:
        case NeverConfig():
            return lambda context: None
        case FixedConfig(period=None):
            for site, period in config.sites.items():
                _within(f"sites.{site}", period, calls)
            return lambda context: SiteIntervals(config)
        case FixedConfig():
            _within("period", config.period, calls)
            return lambda context: Interval(config, depth)
        case ScheduleConfig():
            if len(config.schedules[0]) != calls:
                given = len(config.schedules[0])
                raise UserError(f"cache: policy=schedule: schedules are of {given} calls; this generation has {calls}")
            return lambda context: Replay(config, depth)
        case AdaCacheConfig():
            return adacache_policies(config, model, calls)
        case PabConfig():
            attention = tuple(site for site in sites_of(model) if site in ("self", "te", "ma", "cross"))
            return lambda context: Pab(config, attention)
        case TGateConfig():
            return lambda context: TGate(config, mixer_site(blocks[0]))
        case DeltaDitConfig():
            return lambda context: DeltaDit(config, depth)
        case TeaCacheConfig():
            return lambda context: TeaCache(config, depth)
        case FirstBlockConfig():
            if depth < 2:
                raise UserError("cache: policy=first_block needs a model of two blocks or more; this one has 1")
            return lambda context: FirstBlock(config, depth)
        case MagCacheConfig():
            return magcache_policies(config, model, calls)


def _within(key: str, period: int | None, calls: int) -> None:
    if period is not None and period > calls:
        raise UserError(f"cache: policy=fixed: {key}={period}: this generation has {calls} calls")
