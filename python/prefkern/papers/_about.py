"""What is said about every paper: where it is from, and how sure its formulas are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Evidence = Literal["code", "paper", "part", "inferred"]

EVIDENCE: dict[str, str] = {
    "code": "checked numerically against released code",
    "paper": "from the paper's equations, not confirmed by code",
    "part": "partly recovered; what is not is named in the module",
    "inferred": "only the mechanism is known; the parameterisation is this library's own and reproduces nothing",
}
assert set(EVIDENCE) == set(get_args(Evidence))


@dataclass(frozen=True)
class About:
    """A paper, or a baseline that every trainer ships."""

    name: str
    """Of the method, such as "NGRPO"."""
    title: str
    arxiv: str
    year: int
    family: str
    """What the method changes: advantage, objective, mask, reward, ..."""
    evidence: Evidence
    note: str = ""
    """What the evidence rests on, or what it leaves open."""

    @property
    def link(self) -> str:
        return f"https://arxiv.org/abs/{self.arxiv}"

    @property
    def evidence_text(self) -> str:
        """The evidence in words."""
        return EVIDENCE[self.evidence] + (f": {self.note}" if self.note else "")
