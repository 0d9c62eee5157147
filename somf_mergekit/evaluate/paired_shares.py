"""Two shares of the same examples compared: an interval of their difference, and its power.

Outcomes are yes or no, and often nearly all alike: a bootstrap of 48 equal ones has no width.
Tango's score interval has (Statistics in Medicine 17:891, 1998). It leaves out 0 where McNemar's
test without a correction does, and its ends serve as tests that a share is smaller by less than so
much. Fagerland, Lydersen and Laake recommend it (Statistics in Medicine 33:2850, 2014).
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

COVERED, POWER = 0.95, 0.8
_QUANTILE = NormalDist().inv_cdf((1 + COVERED) / 2)
_OF_POWER = NormalDist().inv_cdf(POWER)
# Halvings of [-1, 1], down to the last binary digits.
_HALVINGS = 60


@dataclass(frozen=True)
class PairedShares:
    """How one model's yes and no go with another's on the same examples.

    Attributes:
        examples: of which both say something.
        both: yes of both models.
        lost: yes of the other model alone.
        gained: yes of the first model alone.
    """

    examples: int
    both: int
    lost: int
    gained: int

    @property
    def difference(self) -> float | None:
        """The first model's share of yes minus the other's; None without examples."""
        return (self.gained - self.lost) / self.examples if self.examples else None

    @property
    def interval(self) -> tuple[float, float]:
        """Tango's 95 % interval of the difference: where its score is within the quantiles."""
        if not self.examples:
            return -1.0, 1.0
        return self._where_score_is(_QUANTILE), self._where_score_is(-_QUANTILE)

    def examples_needed(self, difference: float) -> int:
        """Return how many examples tell a difference from 0, by McNemar's test with 80 % power.

        The share of examples on which models differ is taken to be as seen, or as large as the
        difference where less was seen (Connor, Biometrics 43:207, 1987).

        Args:
            difference: a share above 0.
        """
        seen = (self.lost + self.gained) / self.examples if self.examples else 0.0
        discordant = max(seen, difference)
        by_chance = _QUANTILE * math.sqrt(discordant)
        of_power = _OF_POWER * math.sqrt(discordant - difference**2)
        return math.ceil(((by_chance + of_power) / difference) ** 2)

    def _where_score_is(self, wanted: float) -> float:
        """Return the difference at which the score, which falls with it, is ``wanted``."""
        low, high = -1.0, 1.0
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if self._score(middle) > wanted else (low, middle)
        return (low + high) / 2

    def _score(self, difference: float) -> float:
        """Return how many standard errors, if ``difference`` is true, what is seen is above it."""
        count, lost, gained = self.examples, self.lost, self.gained
        # The likeliest share of the lost under that truth, a root of a t² + b t + c.
        a = 2 * count
        b = (a + lost - gained) * difference - lost - gained
        c = -lost * difference * (1 - difference)
        share = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
        variance = count * (2 * share + difference * (1 - difference))
        above = gained - lost - count * difference
        if not above:
            return 0.0
        return above / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, above)
