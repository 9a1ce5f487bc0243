"""What an audit found, with the history that shows it."""

from dataclasses import dataclass, field

CATEGORIES = ("lost", "duplicated", "overlaps", "stale_writes")


@dataclass(frozen=True)
class Finding:
    """One broken promise: which count it belongs to, which job, what is wrong, and everything known about the job."""

    category: str
    job: str
    what: str
    history: tuple[str, ...] = ()

    def text(self) -> str:
        """For the person who looks into it."""
        return "\n    ".join([f"FOUND {self.category}: job {self.job}: {self.what}", *self.history])


@dataclass
class Report:
    """All findings, the kills that count, and remarks that are no fault of the product."""

    kills: int = 0
    findings: list[Finding] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def count(self, category: str) -> int:
        """Findings of one category."""
        return sum(finding.category == category for finding in self.findings)

    def counts(self) -> str:
        """The four counts, as the last line shows them."""
        return " ".join(f"{category}={self.count(category)}" for category in CATEGORIES)
