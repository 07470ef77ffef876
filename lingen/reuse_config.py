"""What every cache's schema has that says how a residual is reused."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from lingen.model_config import Section


class Reusing(Section):
    """How what was stored stands for what is not computed.

    ``hold`` takes it as it was. ``taylor`` extrapolates through the last ``order + 1`` computed ones (TaylorSeer, Liu
    et al., arXiv 2503.06923), by the real distances between them: of their places in the generation, or of their noise
    levels. It stores so many times more.
    """

    reuse: Literal["hold", "taylor"] = "hold"
    order: Literal[1, 2] = 1  # of taylor
    over: Literal["call", "sigma"] = "call"  # what taylor's distances are measured in

    @model_validator(mode="after")
    def _taylors_keys_are_read(self) -> Self:
        for key in ("order", "over") if self.reuse == "hold" else ():
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} is of reuse=taylor, and reuse=hold does not read it; set one of the two")
        return self

    @property
    def kept(self) -> int:
        """How many computed residuals are stored."""
        return 1 if self.reuse == "hold" else 1 + self.order
