"""report.html: one page that needs nothing but itself."""

from __future__ import annotations

import base64
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from lingen.comparison import panels, plot, tables
from lingen.comparison.result import Result
from lingen.comparison.style import colours

TEMPLATE = "report.html.j2"


def render(result: Result, axes: list[str], figure: bytes, *, log: bool) -> str:
    """The page, with ``figure`` (loss_curves.png) and the closer figures inside. All text is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # labels, paths and stage names come from run folders
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    images = {"loss_curves": figure} | closer_figures(result, axes, log=log)
    return environment.get_template(TEMPLATE).render(
        title=plot.title(result),
        colours=colours(result),
        warnings=result.warnings,
        notes=result.notes,
        sentences=tables.jumps(result) + tables.leads(result),
        progress=tables.progress_table(result.runs),
        transfers=[table for t in result.transfers if (table := tables.transfer_table(t)).rows],
        stages=[_stage_tables(result, i) for i in range(len(result.stages))],
        images={name: base64.b64encode(png).decode() for name, png in images.items()},
        smoothing=result.smoothing,
    )


def closer_figures(result: Result, axes: list[str], *, log: bool) -> dict[str, bytes]:
    """The figures for which the runs recorded something."""
    stages = [stage for run in result.runs for stage in run.stages]
    figures = {}
    if result.transfers:
        figures["transfers"] = panels.transfer_panels(result)
    if any(result.runs[0].label in stage.losses and len(stage.losses) > 1 for stage in result.stages):
        figures["lead"] = panels.lead_panels(result)
    if any(stage.buckets for stage in stages):
        figures["buckets"] = panels.bucket_panels(result)
    if any(stage.bins for stage in stages):
        figures["bins"] = panels.bin_panels(result)
    if axes[1:]:
        figures["training"] = plot.training_curves(result, axes[1:], log=log)
    return figures


def _stage_tables(result: Result, i: int) -> list[tables.Table]:
    stage = result.stages[i]
    found = [tables.finals_table(stage), tables.reach_table(stage)]
    if len(stage.losses) > 1:
        found.append(tables.lead_table(stage))
    return [table for table in found if table.rows]
