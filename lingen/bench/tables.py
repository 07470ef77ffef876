"""Tables that read well in a terminal and in a page: aligned Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def markdown(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """The first column to the left, the others to the right."""
    lines = [list(headers), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headers))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

    def aligned(line: Sequence[str]) -> str:
        first, *others = zip(line, widths, strict=True)
        return f"| {' | '.join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)])} |"

    return "\n".join(map(aligned, [lines[0], rule, *lines[1:]]))


def gb(size: float) -> str:
    """Bytes in GB of 1e9."""
    return f"{size / 1e9:,.1f}" if size >= 1e9 else f"{size / 1e9:.2g}"


def named(kernels: Mapping[str, str]) -> str:
    """The form of each kernel, in one line."""
    return ", ".join(f"{kernel} {form}" for kernel, form in kernels.items())
