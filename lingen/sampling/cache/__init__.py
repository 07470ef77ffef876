"""Caches of the denoiser: when (a policy), what (named sites, or a range of blocks), how (held, or extrapolated)."""

from lingen.sampling.cache.record import CacheSummary, ContextSummary
from lingen.sampling.cache.run import CacheRun

__all__ = ["CacheRun", "CacheSummary", "ContextSummary"]
