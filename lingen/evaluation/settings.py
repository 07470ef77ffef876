"""The words of scripts/evaluate.py."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from lingen.evaluation.vbench import VBenchConfig


class EvaluateWords(BaseModel):
    """What is compared, and how."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    out: str
    runs: Annotated[list[str], Field(min_length=1)] | None = None  # folders of sampled videos
    labels: list[str] | None = None  # other names for them
    baseline: str | None = None  # the run that the others are measured against; None: the first
    reference: str | None = None  # a run of many steps, that all are measured against too
    lpips: str | None = None  # a safetensors file with LPIPS' weights for VGG
    vbench: VBenchConfig | None = None
    shown: Annotated[int, Field(ge=0, le=200)] = 8  # videos on the page, of each run
    side: Annotated[int, Field(ge=16)] = 320  # pixels of the longer side of what the page shows
    device: str = "cpu"
