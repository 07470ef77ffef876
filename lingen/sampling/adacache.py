"""AdaCache's decisions as the published code makes them, faults included (Kahatapitiya et al., arXiv 2411.02397).

The published code is the Open-Sora 1.2 of AdaCache-DiT/AdaCache (stdit3.py); where it and the paper differ, the code is
followed: the change is divided by |p'| and by the rate, the motion is normalised and counts inside a window only, its
gradient is taken absolute, and calls 1, N-1 and N are always computed. ``lingen.sampling.cache`` mends its faults.

Shapes: N calls of the model, counted from 1; p the probe's residual at a computed call, frames first: (T, ...); p' that
of the computed call before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lingen.adacache_config import Codebook, MoReg, codebook_of
from lingen.compose import validate
from lingen.errors import UserError

WINDOWS = {30: (4, 26), 100: (10, 90)}  # the published windows of MoReg, by the number of calls


class Reference:
    """One schedule: ask ``computes`` at each call, and tell ``saw`` the probe of each call that was computed.

    Everything is measured in the probe's own dtype, as published: in fp16 the sums overflow, the change is no number,
    and the last rate is taken.
    """

    def __init__(self, calls: int, codebook: Codebook, moreg: MoReg | None) -> None:
        self.calls, self.codebook, self.moreg = calls, codebook, moreg
        self.guards = (1, calls - 1, calls)
        self.last, self.rate = 0, 1  # the last computed call, and after how many calls comes the next
        self.probe: Tensor | None = None
        self.motion: Tensor | None = None  # of the last computed call; None: 1

    def computes(self, call: int) -> bool:
        """Whether ``call`` is computed."""
        return call == self.last + self.rate or call in self.guards

    def saw(self, call: int, probe: Tensor) -> None:
        """The probe (T, ...) of a computed call decides the rate; on a GPU this waits once for the device."""
        if self.probe is not None and call < self.calls - 2:  # later ones decide nothing: the guards follow
            self.rate = self._rate(call, self.probe, probe)
        self.last, self.probe = call, probe

    def _rate(self, call: int, old: Tensor, new: Tensor) -> int:
        # The rate is taken for the gap, also where a guard came sooner.
        change = (old - new).norm(p=1) / old.norm(p=1) / self.rate
        if self.moreg is not None:
            # Outside the window the motion is 1, so its gradient jumps where the window ends: a fault that is kept.
            inside = self.moreg.window[0] <= call <= self.moreg.window[1]
            motion = motion_factor(new, self.moreg) if inside else torch.ones_like(change)
            before = torch.ones_like(change) if self.motion is None else self.motion
            self.motion = motion
            change = change * (motion + (self.moreg.weight * (motion - before) / self.rate).abs())
        # 0/0 and inf/inf are below no threshold. One transfer for all comparisons, each in the probe's precision.
        below = [change < threshold for threshold, _ in self.codebook.entries]
        found = torch.stack(below).tolist() if below else []
        rates = [rate for _, rate in self.codebook.entries]
        return next((rate for rate, hit in zip(rates, found, strict=True) if hit), self.codebook.last)


def motion_factor(probe: Tensor, moreg: MoReg) -> Tensor:
    """(r / scale)^power: r is the L1 distance of frames ``stride`` apart over the sum of their norms, the mean over the
    strides. probe (T, ...) -> (); no number where there are too few frames to compare, or where all are zero."""
    total = torch.zeros((), dtype=probe.dtype, device=probe.device)
    for stride in moreg.strides:
        later, earlier = probe[stride:], probe[:-stride]
        total = total + (later - earlier).norm(p=1) / (later.norm(p=1) + earlier.norm(p=1))
    return torch.pow(1 / moreg.scale * (total / len(moreg.strides)), moreg.power)


def moreg_of(given: MoReg | Mapping[str, Any] | Sequence[int] | bool | None, num_steps: int) -> MoReg | None:
    """A ``MoReg`` from what stands for one: None or False, there is none; True, the published constants; (first, last),
    those with this window; a mapping, ``MoReg``'s fields. A window that is not given is that of 30 or 100 calls.

    Raises:
        UserError: no window is published for ``num_steps``; a field is wrong.
    """
    if given is None or given is False or isinstance(given, MoReg):
        return given or None
    fields = {} if given is True else dict(given) if isinstance(given, Mapping) else {"window": given}
    if "window" not in fields:
        if num_steps not in WINDOWS:
            raise UserError(f"moreg={given!r}: windows are published for 30 and 100 calls, not {num_steps}; give one")
        fields["window"] = WINDOWS[num_steps]
    try:
        return validate(MoReg, fields)
    except UserError as error:
        raise UserError(f"moreg={given!r}: {error}") from error


def reference_schedule(
    probes: Sequence[Tensor],
    num_steps: int,
    codebook: Codebook | Mapping[float, int] | Sequence[Any],
    moreg: MoReg | Mapping[str, Any] | Sequence[int] | bool | None = None,
) -> list[bool]:
    """Which of ``num_steps`` calls the published code would compute.

    Args:
        probes: the probe's residual of every call, frames first: (T, ...). Those of calls that would not be computed
            are not looked at.
        codebook: a ``Codebook``, or what ``codebook_of`` takes for one, such as the published
            {.08: 6, .16: 5, .24: 4, .32: 3, .40: 2, 1.: 1}.
        moreg: a ``MoReg``, or what ``moreg_of`` takes for one; None: without motion regularisation.

    Returns:
        For each call, whether it would be computed.

    Raises:
        UserError: ``num_steps`` below 1, or not as many probes; a codebook or a ``moreg`` that is none.
    """
    if num_steps < 1:
        raise UserError(f"num_steps={num_steps}: must be 1 or more")
    if len(probes) != num_steps:
        raise UserError(f"probes: {len(probes)} for num_steps={num_steps}; give one for each call")
    schedule = Reference(num_steps, codebook_of(codebook), moreg_of(moreg, num_steps))
    computed = []
    for call in range(1, num_steps + 1):
        computed.append(schedule.computes(call))
        if computed[-1]:
            schedule.saw(call, probes[call - 1])
    return computed
