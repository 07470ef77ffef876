"""The caches of one context each. What a context is: see ``lingen.sampling.call``.

Shapes: as in ``lingen.sampling.cache.layout``; latents (R, C, T', H', W').
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Protocol

from torch import Tensor

from lingen.models import Backbone
from lingen.models.backbone import Context
from lingen.models.block import Part
from lingen.reuse_config import Reusing
from lingen.sampling.cache.layout import Layout, index_of
from lingen.sampling.cache.policy import Front, Seen, SitePolicy, StackPolicy
from lingen.sampling.cache.record import Costs, Record
from lingen.sampling.cache.sites import Visit, blocks_of, run_block
from lingen.sampling.cache.store import Stored
from lingen.sampling.call import Call

Inputs = tuple[Tensor, Tensor, Mapping[str, Tensor], Tensor]  # a model's: latents, sigma, text, mask


class Lane(Protocol):
    """One context's forward, and what it has done."""

    record: Record

    @property
    def tensors(self) -> list[Tensor]:
        """Those stored."""

    def forward(self, inputs: Inputs, call: Call, costs: Costs) -> Tensor:
        """The velocity (R, C, T', H', W')."""


class PlainLane:
    """Computes everything: the model's own forward."""

    def __init__(self, model: Backbone) -> None:
        self.model, self.record, self.tensors = model, Record(), list[Tensor]()

    def forward(self, inputs: Inputs, call: Call, costs: Costs) -> Tensor:
        """The velocity (R, C, T', H', W')."""
        full = costs.total * _rows_each(call)
        self.record.ran([full] * (len(inputs[0]) // _rows_each(call)), full)
        return self.model(*inputs)  # type: ignore[no-any-return]


class StackLane:
    """Its policy decides for a range of blocks, whose summed residual is stored."""

    def __init__(self, model: Backbone, how: Reusing, policy: StackPolicy) -> None:
        self.model, self.record, self.policy, self.blocks = model, Record(), policy, blocks_of(model)
        self.stored, self.span = Stored(how), range(0)

    @property
    def tensors(self) -> list[Tensor]:
        """Those stored."""
        return self.stored.values

    def forward(self, inputs: Inputs, call: Call, costs: Costs) -> Tensor:
        """The velocity (R, C, T', H', W')."""
        x, context = self.model.enter(*inputs)  # (R, n, D)
        rows, span = len(x), self.policy.span(call)
        layout = Layout(rows // _rows_each(call), rows, context.grid, self.model.sequence)
        if span != self.span:
            self.stored.clear()
            self.span = span
        start = x
        for block in self.blocks[: span.start]:
            x = block(x, *context.of_blocks)
        front = Front(layout, start, x, partial(self._modulated, start, context))
        computed = self.policy.decide(call, front)
        if not self.stored:
            computed = [True] * layout.samples
        x = self._reuse(x, context, call, layout, computed)
        for block in self.blocks[span.stop :]:
            x = block(x, *context.of_blocks)
        full, inside = (n * _rows_each(call) for n in (costs.total, sum(costs.blocks[span.start : span.stop])))
        self.record.ran([full if decision else full - inside for decision in computed], full)
        self.record.decided(computed)
        return self.model.leave(x, context)

    def _reuse(self, x: Tensor, context: Context, call: Call, layout: Layout, computed: list[bool]) -> Tensor:
        """What leaves the span (R, n, D): computed for some samples, and for the others x plus what is stored."""
        chosen = [sample for sample, decision in enumerate(computed) if decision]
        if not chosen:
            self.stored.add_to(x, call)
            return x
        if len(chosen) == layout.samples:
            out, probe = self._compute(x, context)
            residual = out - x
            self.stored.put(call, residual)
            self.policy.learn(call, Seen(chosen, layout, probe, residual))
            return out
        rows = layout.rows_of(chosen)
        index = index_of(rows, x.device)
        given = x.index_select(0, index)  # (R', n, D)
        out, probe = self._compute(given, _of_rows(context, index))
        residual = out - given
        self.stored.add_to(x, call, layout.rows_of([s for s, decision in enumerate(computed) if not decision]))
        self.stored.put(call, residual, rows)
        theirs = replace(layout, samples=len(chosen), rows=len(rows))
        self.policy.learn(call, Seen(chosen, theirs, probe, residual))
        return x.index_copy_(0, index, out)

    def _compute(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
        """The span's blocks on x (R', n, D), and what the policy's probe saw in them."""
        probe, seen = self.policy.probe, list[Tensor]()
        for i in self.span:
            if probe is not None and probe.block == i:
                x = run_block(self.blocks[i], x, context, (probe.site,), _watch(seen))
            else:
                x = self.blocks[i](x, *context.of_blocks)
        return x, seen[0] if seen else None

    def _modulated(self, start: Tensor, context: Context) -> Tensor:
        return self.blocks[0].parts(*context.of_blocks)["mixer"].view(start)


class SiteLane:
    """Its policy decides for named branches of each block. Their outputs are stored ahead of the gates, so that a
    reused one gets the gate of its own call."""

    def __init__(self, model: Backbone, how: Reusing, policy: SitePolicy) -> None:
        self.model, self.how, self.record, self.policy = model, how, Record(), policy
        self.blocks = blocks_of(model)
        self.stored: dict[tuple[int, str], Stored] = {}

    @property
    def tensors(self) -> list[Tensor]:
        """Those stored."""
        return [value for stored in self.stored.values() for value in stored.values]

    def forward(self, inputs: Inputs, call: Call, costs: Costs) -> Tensor:
        """The velocity (R, C, T', H', W')."""
        x, context = self.model.enter(*inputs)  # (R, n, D)
        computes = {site: self.policy.computes(call, site) for site in self.policy.sites}
        skipped = 0

        def visited(i: int) -> Visit:
            def visit(site: str, part: Part, compute: Callable[[], Tensor]) -> Tensor:
                nonlocal skipped
                stored = self.stored.setdefault((i, site), Stored(self.how))
                if stored and not computes[site]:
                    self.record.reused[site] += 1
                    skipped += costs.sites[i][site]
                    return stored.get(call)
                self.record.computed[site] += 1
                output = compute()
                stored.put(call, output)
                return output

            return visit

        for i, block in enumerate(self.blocks):
            x = run_block(block, x, context, self.policy.sites, visited(i))
        each = _rows_each(call)
        self.record.ran([(costs.total - skipped) * each] * (len(x) // each), costs.total * each)
        return self.model.leave(x, context)


def _rows_each(call: Call) -> int:
    """Rows of one sample."""
    return 2 if call.context == "pair" else 1


def _watch(seen: list[Tensor]) -> Visit:
    """A visit that computes, and puts the gated residual into ``seen``."""

    def visit(site: str, part: Part, compute: Callable[[], Tensor]) -> Tensor:
        output = compute()
        seen.append(part.residual(output))
        return output

    return visit


def _of_rows(context: Context, rows: Tensor) -> Context:
    """The context of these rows."""
    return replace(
        context,
        modulation=context.modulation.index_select(0, rows),
        text=context.text.index_select(0, rows),
        text_mask=context.text_mask.index_select(0, rows),
        condition=context.condition.index_select(0, rows),
    )
