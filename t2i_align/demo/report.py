"""What the votes say so far: win rates with intervals, how far users agree, and whether one side is preferred."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from t2i_align.data.spec import normalise
from t2i_align.evaluation.result import shown
from t2i_align.evaluation.stats import Comparison, Interval, compare
from t2i_align.utils import html

LEFT = {"left": 1.0, "right": 0.0, "tie": 0.5, "neither": 0.5}  # the left one's share of a vote
NAMES = {"neither": "both bad"}  # on the page
Votes = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Report:
    """counts: of votes by choice. users: of votes by user. models: the second of two models against the first.

    left: how often the left one of two is preferred; far from a half, somebody votes without looking. agreement: the
    share of pairs of decided votes on the same pair, by different users, that are the same; NaN where there are none.
    """

    counts: Mapping[str, int]
    users: Mapping[str, int]
    models: Mapping[tuple[str, str], Comparison]
    left: Comparison
    agreement: float
    judged_twice: int

    def to_html(self) -> str:
        """Tables for a page."""
        total = sum(self.counts.values())
        if not total:
            return "<p>No votes yet.</p>"
        parts = [f"<p>{total} votes by {len(self.users)} {'user' if len(self.users) == 1 else 'users'}.</p>"]
        if self.models:
            head = ["model", "against", "win rate [95 % interval]", "won", "lost", "ties", "prompts"]
            rows = [
                [b, a, _rate(c), str(c.wins), str(c.losses), str(c.tied), str(c.prompts_compared)]
                for (a, b), c in self.models.items()
            ]
            parts += [
                html.table(head, rows),
                "<p><small>A tie is half a win; the interval is over prompts.</small></p>",
            ]
        else:
            parts.append("<p>All votes are between samples of one model: they train it, but there is no win rate.</p>")
        parts.append(
            html.table(["vote", "count"], [(NAMES.get(name, name), str(self.counts.get(name, 0))) for name in LEFT])
        )
        parts.append(html.table(["user", "votes"], [(name, str(n)) for name, n in self.users.items()]))
        if self.judged_twice:
            text = "unknown (ties only)" if math.isnan(self.agreement) else f"{self.agreement:.0%}"
            parts.append(f"<p>Agreement of different users on the same pair: {text}, {self.judged_twice} pairs.</p>")
        parts.append(f"<p>The left one is preferred in {_rate(self.left)} of the votes; a half is to be expected.</p>")
        return "".join(parts)


def report(votes: Votes) -> Report:
    """Count votes; rows as in `votes.jsonl`, others are left out."""
    votes = [row for row in votes if row.get("vote") in LEFT]
    sides: dict[tuple[str, str], list[tuple[float, str]]] = defaultdict(list)
    for row in votes:
        models = str(row.get("left_model") or ""), str(row.get("right_model") or "")
        if all(models) and models[0] != models[1]:
            share = LEFT[row["vote"]]
            # The second name's share, whichever side it was on.
            sides[min(models), max(models)].append((share if models[0] == max(models) else 1 - share, _prompt(row)))
    by_pair: dict[Any, dict[Any, str]] = defaultdict(dict)
    for row in votes:
        liked = row.get(row["vote"]) if row["vote"] in ("left", "right") else None
        by_pair[row.get("pair")][row.get("user")] = str(liked or "")
    twice = [list(by_user.values()) for by_user in by_pair.values() if len(by_user) > 1]
    same = [one == other for liked in twice for one, other in combinations(filter(None, liked), 2)]
    return Report(
        counts=Counter(row["vote"] for row in votes),
        users=Counter(str(row.get("user", "")) for row in votes),
        models={names: _compared(shares) for names, shares in sorted(sides.items())},
        left=_compared([(LEFT[row["vote"]], _prompt(row)) for row in votes]),
        agreement=sum(same) / len(same) if same else math.nan,
        judged_twice=len(twice),
    )


def _compared(shares: Sequence[tuple[float, str]]) -> Comparison:
    """The win rate of what has these shares of the votes, with the prompts as clusters."""
    after = [share for share, _ in shares]
    return compare([1 - share for share in after], after, [prompt for _, prompt in shares])


def _rate(comparison: Comparison) -> str:
    interval: Interval = comparison.win_rate_ci
    return shown(comparison.win_rate, interval).strip()


def _prompt(row: Mapping[str, Any]) -> str:
    return normalise(str(row.get("prompt", "")))
