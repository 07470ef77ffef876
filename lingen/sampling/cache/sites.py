"""What: the branches of a block by name, and a block run with somebody at them.

A DiT's sites are "self", "cross" and "mlp"; a LinGen's "mate", its branches "ma" and "te", "cross" and "mlp".
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import cache, partial, reduce

import torch
from torch import Tensor

from lingen.errors import UserError, nearest
from lingen.kernels.index import Grid
from lingen.models import Backbone
from lingen.models.backbone import Context
from lingen.models.block import Block, Mixer, Part
from lingen.models.mixers.mate import Mate

# Site, its part, and what computes the branch's output (R, n, D) -> the output to go on with.
Visit = Callable[[str, Part, Callable[[], Tensor]], Tensor]


def mixer_site(block: Block) -> str:
    """What the whole mixer is called."""
    return "mate" if isinstance(block.mixer, Mate) else "self"


def mixer_branches(block: Block) -> dict[str, Mixer]:
    """The branches that sum up to the mixer, by site; none where it is one piece."""
    return block.mixer.branches if isinstance(block.mixer, Mate) else {}


def blocks_of(model: Backbone) -> list[Block]:
    """A model's blocks."""
    return [block for block in model.blocks if isinstance(block, Block)]


def sites_of(model: Backbone) -> tuple[str, ...]:
    """The sites that a model has."""
    block = blocks_of(model)[0]
    return (mixer_site(block), *mixer_branches(block), "cross", "mlp")


def check_sites(model: Backbone, wanted: Iterable[str], key: str) -> None:
    """Refuse what a model cannot be asked.

    Raises:
        UserError: a site that it does not have; a mixer and a branch of it.
    """
    known, wanted = sites_of(model), list(wanted)
    for site in wanted:
        if site not in known:
            hint = nearest(site, known)
            raise UserError(f"{key}: this model has no site '{site}'{hint}")
    if "mate" in wanted and {"ma", "te"} & set(wanted):
        raise UserError(f"{key}: 'mate' is both of its branches; name it, or 'ma' and 'te', not all of them")


def site_flops(block: Block, grid: Grid, text_tokens: int) -> dict[str, int]:
    """Forward FLOPs of one sample at each site; the mixer's branches are counted in it too."""
    parts = block.part_flops(grid, text_tokens)
    inner = {name: branch.flops(grid) for name, branch in mixer_branches(block).items()}
    return {mixer_site(block): parts["mixer"], **inner, "cross": parts["cross"], "mlp": parts["mlp"]}


def run_block(block: Block, x: Tensor, context: Context, sites: Collection[str], visit: Visit) -> Tensor:
    """``block(x, ...)`` (R, n, D), bit for bit where ``visit`` computes; it is called at each of ``sites``."""
    inner = mixer_branches(block)
    for name, part in block.parts(*context.of_blocks).items():
        site = mixer_site(block) if name == "mixer" else name
        if site in sites:
            x = part.add(x, visit(site, part, partial(_compute, part, x)))
        elif name == "mixer" and any(branch in sites for branch in inner):
            view = cache(partial(part.view, x))  # once for both, and not at all where neither needs it
            outputs = []
            for branch, mixer in inner.items():
                compute = partial(_mix, mixer, view, context.grid)
                outputs.append(visit(branch, part, compute) if branch in sites else compute())
            x = part.add(x, reduce(torch.add, outputs))
        else:
            x = part(x)
    return x


def _compute(part: Part, x: Tensor) -> Tensor:
    return part.branch(part.view(x))


def _mix(mixer: Mixer, view: Callable[[], Tensor], grid: Grid) -> Tensor:
    return mixer(view(), grid)
