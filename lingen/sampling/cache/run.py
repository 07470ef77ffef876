"""One generation with a cache: all of its state, which nothing else holds and which goes with it.

Shapes: R rows; latents (R, C, T', H', W').
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from lingen.cache_config import CacheConfig
from lingen.models import Backbone
from lingen.models.embed import token_grid
from lingen.reuse_config import Reusing
from lingen.sampling.cache.lanes import Lane, PlainLane, SiteLane, StackLane
from lingen.sampling.cache.make import policies_of
from lingen.sampling.cache.policy import Policy, SitePolicy
from lingen.sampling.cache.record import CacheSummary, Costs
from lingen.sampling.cache.sites import check_sites
from lingen.sampling.call import Call, Context


class CacheRun:
    """The caches of one generation, one a context, which know nothing of each other.

    ``forward`` stands for the model's: a ``lingen.sampling.call.Forward``.
    """

    def __init__(self, config: CacheConfig, model: Backbone, *, calls: int, contexts: Collection[Context]) -> None:
        """A run of the cache that is configured.

        Args:
            calls: N, the solver's evaluations of the model in this generation.
            contexts: those that guidance will name.

        Raises:
            UserError: the model has not what the cache asks for; a calibration is not for this model and so many calls.
        """
        how = config if isinstance(config, Reusing) else Reusing()
        self._set(config.policy, how, policies_of(config, model, calls), model, calls, contexts)

    @classmethod
    def measuring(
        cls, make: Callable[[Context], Policy], model: Backbone, *, calls: int, contexts: Collection[Context]
    ) -> CacheRun:
        """A run with policies of one's own, which ``make`` gives for each context: to measure, as calibrations do."""
        run = cls.__new__(cls)
        run._set("measuring", Reusing(), make, model, calls, contexts)
        return run

    def _set(
        self,
        name: str,
        how: Reusing,
        make: Callable[[Context], Policy | None],
        model: Backbone,
        calls: int,
        contexts: Collection[Context],
    ) -> None:
        self._name, self._model, self._calls = name, model, calls
        self._lanes = {context: _lane(make(context), how, model, f"cache: policy={name}") for context in contexts}
        self._costs: dict[object, Costs] = {}

    @torch.no_grad()
    def forward(
        self, latents: Tensor, sigma: Tensor, text: Mapping[str, Tensor], mask: Tensor, call: Call, /
    ) -> Tensor:
        """The velocity (R, C, T', H', W'); see ``Backbone.forward``.

        Raises:
            ValueError: the call is of a generation of another length.
        """
        if call.count != self._calls:
            raise ValueError(f"this run was made for {self._calls} calls, and is asked for one of {call.count}")
        inputs = (latents, sigma, text, mask)
        return self._lanes[call.context].forward(inputs, call, self._costs_of(latents, text))

    def _costs_of(self, latents: Tensor, text: Mapping[str, Tensor]) -> Costs:
        lengths = {name: states.shape[1] for name, states in text.items()}
        key = (latents.shape[2:], *lengths.items())
        if key not in self._costs:
            grid = token_grid(tuple(latents.shape[2:]), self._model.patch)  # type: ignore[arg-type]
            self._costs[key] = Costs.of(self._model, grid, lengths)
        return self._costs[key]

    def summary(self) -> CacheSummary:
        """What has been computed and reused so far."""
        records = {context: lane.record for context, lane in self._lanes.items()}
        return CacheSummary(
            self._name,
            self._calls,
            {context: record.summary() for context, record in records.items()},
            sum(record.full_flops for record in records.values()),
        )

    @property
    def stored(self) -> dict[Context, list[Tensor]]:
        """The tensors that each context stores."""
        return {context: lane.tensors for context, lane in self._lanes.items()}


def _lane(policy: Policy | None, how: Reusing, model: Backbone, key: str) -> Lane:
    if policy is None:
        return PlainLane(model)
    if isinstance(policy, SitePolicy):
        check_sites(model, policy.sites, key)
        return SiteLane(model, how, policy)
    if policy.probe is not None:
        check_sites(model, [policy.probe.site], f"{key}, probe")
    return StackLane(model, how, policy)
