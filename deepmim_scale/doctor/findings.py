"""What a check found, on one rank and on all of them. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

State = Literal["ok", "bad", "none"]
NO_GPU = "no GPU here"


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    check: str
    state: State
    """none: does not apply here."""
    found: str
    remedy: str = ""
    """What to do; empty where nothing is to be done."""


def ok(check: str, found: str) -> Finding:
    """All is well."""
    return Finding(check, "ok", found)


def bad(check: str, found: str, remedy: str) -> Finding:
    """Something is to be done."""
    return Finding(check, "bad", found, remedy)


def not_here(check: str, found: str = NO_GPU) -> Finding:
    """The check does not apply."""
    return Finding(check, "none", found)


def merge(by_rank: Sequence[tuple[str, Sequence[Finding]]]) -> list[Finding]:
    """One list of (host, findings) of every rank: the first that is bad stands for its check."""
    merged = []
    for number, first in enumerate(by_rank[0][1]):
        wrong = [(host, some[number]) for host, some in by_rank if some[number].state == "bad"]
        if not wrong:
            merged.append(first)
            continue
        hosts = ", ".join(dict.fromkeys(host for host, _ in wrong))
        finding = wrong[0][1]
        merged.append(bad(finding.check, f"{hosts}: {finding.found}", finding.remedy))
    return merged


def same_everywhere(check: str, values: Sequence[tuple[str, str]], remedy: str) -> Finding:
    """A value that must be equal on all hosts; (host, value) of every rank."""
    expected = values[0][1]
    others = {host: value for host, value in values if value != expected}
    if not others:
        return ok(check, expected)
    told = "; ".join(f"{host}: {value}" for host, value in [values[0], *others.items()])
    return bad(check, told, remedy)


def table(findings: Sequence[Finding]) -> str:
    """A line for each finding, with its remedy."""
    width = max(len(finding.check) for finding in findings)
    marks = {"ok": "ok", "bad": "BAD", "none": "-"}
    lines = []
    for finding in findings:
        told = "; ".join(text for text in (finding.found, finding.remedy) if text)
        lines.append(f"{finding.check:{width}s}  {marks[finding.state]:3s}  {told}")
    return "\n".join(lines)


def to_json(findings: Sequence[Finding], environment: dict[str, Any]) -> dict[str, Any]:
    """The same as plain values."""
    return {
        "ok": all(finding.state != "bad" for finding in findings),
        "environment": environment,
        "findings": [asdict(finding) for finding in findings],
    }
