"""The findings of scripts/gpu_check.py as one page."""

from __future__ import annotations

from typing import Any

from lingen.bench import ablation, latency, memory
from lingen.bench.tables import markdown, named

Finding = dict[str, Any]


def render(result: dict[str, Any]) -> str:
    """Markdown: what it ran on, how each part went, and a table for each kind of finding."""
    findings = [finding for part in result["parts"] for finding in part["findings"]]
    good = [finding for finding in findings if "error" not in finding]
    sections = [
        "# GPU check",
        _where(result),
        _parts(result["parts"]),
        *_section("Latency", latency.table, [f for f in good if "tokens_per_s" in f]),
        *_section("Ablation", ablation.table, [f for f in good if "published_s" in f]),
        *_section("Memory of a training step", memory.measured_table, [f for f in good if "predicted" in f]),
        *_section("Numerics", _numerics, [f for f in findings if "check" in f]),
        *_section("One LinGen block", _profile, [f for f in good if "share" in f]),
        *_section("What failed", _failures, [f for f in findings if "error" in f]),
    ]
    return "\n\n".join(sections) + "\n"


def _section(title: str, table: Any, findings: list[Finding]) -> list[str]:
    return [f"## {title}", table(findings)] if findings else []


def _where(result: dict[str, Any]) -> str:
    facts = dict(result["environment"])
    kernels = facts.pop("kernels", {})
    lines = [f"{key}: {value}" for key, value in {"date": result["date"], **facts, "kernels": named(kernels)}.items()]
    return "\n".join(f"- {line}" for line in [*lines, f"command: {result['command']}"])


def _parts(parts: list[dict[str, Any]]) -> str:
    lines = [(p["name"], p["status"], f"{p['seconds']:.0f}", len(p["findings"]), p["note"]) for p in parts]
    return markdown(("part", "status", "s", "findings", ""), lines)


def _numerics(rows: list[Finding]) -> str:
    """Errors are ||error|| / ||reference||."""
    lines = [
        (
            r["check"],
            r["form"],
            r["dtype"],
            f"{max(r['errors'].values()):.1e}",
            r["worst"],
            "" if r["ok"] else "TOO LARGE",
        )
        if "errors" in r
        else (r["check"], r["form"], r["dtype"], "", r["error"][:60], "FAILED")
        for r in rows
    ]
    return markdown(("kernel", "form", "dtype", "error", "of", ""), lines)


def _profile(rows: list[Finding]) -> str:
    headers = ("kernel", "pass", "calls", "ms", "share")
    return markdown(
        headers, [(r["kernel"][:80], r["pass"], r["calls"], f"{r['ms']:.3f}", f"{r['share']:.1%}") for r in rows]
    )


def _failures(rows: list[Finding]) -> str:
    return "\n".join(f"- {r.get('case') or r.get('check', '')}: {' '.join(r['error'].split())[:300]}" for r in rows)
