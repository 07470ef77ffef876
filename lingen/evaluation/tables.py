"""The measurements as tables: for the page and the terminal, as markdown, and as CSV for whoever draws their own."""

from __future__ import annotations

import csv
import io

from lingen.comparison.style import si
from lingen.comparison.tables import Table
from lingen.evaluation.result import Measured, Result, metric
from lingen.evaluation.statistics import Interval

NONE = "-"
CSV_COLUMNS = (
    "run", "metric", "mean", "low", "high", "spread", "worst_5_percent", "videos", "gain", "gain_low", "gain_high",
    "saving", "saving_low", "saving_high",
)  # fmt: skip


def overview(result: Result) -> list[Table]:
    """One row a run with the mean of every metric: of quality, and of costs with what is saved on the baseline."""
    quality = [key for key in result.keys if not metric(key).cost]
    costs = [key for key in result.keys if metric(key).cost]
    against = f"PSNR, SSIM and LPIPS against {result.baseline}"
    against += f"; ref.: against {result.reference}" if result.reference is not None else ""
    titles = (f"Quality: {against}", f"Cost of a video, and {result.baseline}'s as a multiple of it")
    return [
        Table(title, ["run", *(metric(key).short for key in keys)], [_row(one, keys) for one in result.runs])
        for title, keys in zip(titles, (quality, costs), strict=True)
    ]


def _row(one: Measured, keys: list[str]) -> list[str]:
    return [one.run.name, *(_brief(one, key) for key in keys)]


def details(result: Result, key: str) -> Table:
    """One row a run: all that is known of one metric."""
    headers = ["run", "mean", "95% interval", "spread", "worst 5%", "videos", _against(result, key)]
    rows = [
        [
            one.run.name,
            number(key, summary.mean.value),
            span(key, summary.mean),
            number(key, summary.spread),
            number(key, summary.worst),
            str(summary.count),
            _difference(one, key),
        ]
        for one in result.runs
        if (summary := one.summaries.get(key)) is not None
    ]
    return Table(full_title(result, key), headers, rows)


def full_title(result: Result, key: str) -> str:
    """Of a table or a panel: what is measured, against whom, and which way is better."""
    known = metric(key)
    other = {"baseline": f" to {result.baseline}", "reference": f" to {result.reference}", "": ""}[known.against]
    return f"{known.title}{other}, {'higher' if known.higher_is_better else 'lower'} is better"


def number(key: str, value: float) -> str:
    """In the unit of the metric's title."""
    known = metric(key)
    if key == "flops":  # of a laptop's model to a cluster's
        return si(value)
    return f"{value * known.scale:.{known.digits}f}"


def span(key: str, interval: Interval) -> str:
    """The 95% interval."""
    if interval.low is None or interval.high is None:
        return NONE
    return f"{number(key, interval.low)} to {number(key, interval.high)}"


def _against(result: Result, key: str) -> str:
    return f"{result.baseline} / this" if metric(key).cost else f"this - {result.baseline}"


def _brief(one: Measured, key: str) -> str:
    if key not in one.summaries:
        return NONE
    saving = one.savings.get(key)
    return number(key, one.summaries[key].mean.value) + (f" ({saving.value:.2f}x)" if saving is not None else "")


def _difference(one: Measured, key: str) -> str:
    """To the baseline, video by video."""
    if (saving := one.savings.get(key)) is not None:
        between = f" ({saving.low:.3f} to {saving.high:.3f})" if saving.low is not None else ""
        return f"{saving.value:.3f}x{between}"
    if (gain := one.gains.get(key)) is not None:
        scale, digits = metric(key).scale, metric(key).digits
        ends = [f"{end * scale:+.{digits}f}" for end in (gain.low, gain.high) if end is not None]
        return f"{gain.value * scale:+.{digits}f}" + (f" ({ends[0]} to {ends[1]})" if ends else "")
    return NONE


def as_markdown(table: Table) -> str:
    """For a README."""
    lines = [table.headers, ["---", *["---:"] * (len(table.headers) - 1)], *table.rows]
    body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return f"**{table.title}**\n\n{body}\n"


def as_csv(result: Result) -> str:
    """A row for each run and metric, in SI units and shares."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for one in result.runs:
        for key, summary in one.summaries.items():
            row = [one.run.name, key, *_ends(summary.mean), summary.spread, summary.worst, summary.count]
            writer.writerow(row + _ends(one.gains.get(key)) + _ends(one.savings.get(key)))
    return stream.getvalue()


def _ends(interval: Interval | None) -> list[float | None]:
    return [None] * 3 if interval is None else [interval.value, interval.low, interval.high]
