"""Search for the fastest quantization of a tower that passes its gates (mixed precision)."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from edgeclip.export.errors import ExportError
from edgeclip.export.quantizing.candidate_evaluator import FinalJudgement
from edgeclip.export.quantizing.config import Config, Float16, Float32, StaticInt8, describe
from edgeclip.export.quantizing.node_groups import Gains, NodeGroup
from edgeclip.export.quantizing.quantization_candidate import (
    MEAN_COSINE,
    CandidateLatency,
    QuantizationCandidate,
    pareto_front,
    rank_shippable,
)
from edgeclip.export.quantizing.search_task import MAX_TEST_JUDGEMENTS, SearchSpace
from edgeclip.export.quantizing.sensitivity import GroupDamage, Sensitivity
from edgeclip.runtime.errors import EngineError

_MAX_RACING = 4  # candidates that are timed against each other at the end
_RECOVERABLE = 8.0  # times the allowed loss of cosine: beyond that no remedy is tried
_MAX_REQUANTIZED = 8  # groups that are tried in int8 again at the end


class Evaluator(Protocol):
    """Makes, judges and times configs of one tower. `CandidateEvaluator` is the real one."""

    @property
    def groups(self) -> tuple[NodeGroup, ...]:
        """The groups of products that can be quantized."""

    def is_known(self, config: Config) -> bool:
        """Return whether a config was measured before."""

    def evaluate(self, config: Config) -> QuantizationCandidate:
        """Make, judge and time a config."""

    def damage(self, config: StaticInt8) -> Sensitivity:
        """Measure the error that each group causes when it alone is quantized."""

    def gains(self, config: StaticInt8) -> Gains:
        """Measure the time that quantizing each group saves."""

    def with_smoothing(self, config: StaticInt8) -> StaticInt8:
        """Return the config with the SmoothQuant alphas that suit it best."""

    def with_islands(self, config: Float16) -> Float16:
        """Return the config with the fp32 nodes that it needs to pass its gates."""

    def race(self, configs: Sequence[Config]) -> tuple[CandidateLatency, ...]:
        """Time configs and fp32 in the same interleaved rounds."""

    def judge_on_test(self, config: Config) -> FinalJudgement:
        """Judge a config on the test pairs."""


class TimeUpError(Exception):
    """The time limit has passed; nothing new may begin. It never leaves a search."""


class TrialLog:
    """Run trials within a time limit and record their candidates and failures.

    Args:
        evaluator: measures configs; those that it knows already take no time.
        minutes: nothing new begins after this time; None for no limit.
        progress: called with one line of text after each step.
        clock: returns seconds, from any zero.

    Attributes:
        candidates: candidates by key, in the order in which they were tried.
        failed: why a config could not be made or run, by its description.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        minutes: float | None = None,
        progress: Callable[[str], None] = lambda line: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.evaluator, self.report = evaluator, progress
        self.candidates: dict[str, QuantizationCandidate] = {}
        self.failed: dict[str, str] = {}
        self._clock = clock
        self._end = None if minutes is None else clock() + 60 * minutes

    def evaluate(self, config: Config) -> QuantizationCandidate | None:
        """Return a config's candidate; None if the config cannot be made or run.

        Raises:
            TimeUpError: the config is not known yet, and time is up.
        """
        if not self.evaluator.is_known(config):
            self.check_time()
        try:
            candidate = self.evaluator.evaluate(config)
        except (ExportError, EngineError) as error:
            self.record_failure(config, error)
            return None
        if candidate.key not in self.candidates:
            self.candidates[candidate.key] = candidate
            self.report(describe_candidate(candidate))
        return candidate

    def evaluate_fp16(self, config: Float16) -> QuantizationCandidate | None:
        """Find the fp32 islands that an fp16 config needs, and evaluate the result.

        Raises:
            TimeUpError: time is up.
        """
        self.check_time()
        try:
            complete = self.evaluator.with_islands(config)
        except (ExportError, EngineError) as error:
            self.record_failure(config, error)
            return None
        return self.evaluate(complete)

    def record_failure(self, config: Config, error: Exception) -> None:
        """Record that a config cannot be made or run."""
        self.failed[describe(config)] = str(error)
        self.report(f"{describe(config)}: not possible here ({error})")

    def check_time(self) -> None:
        """Stop the search if its time is up.

        Raises:
            TimeUpError: it is.
        """
        if self._end is not None and self._clock() >= self._end:
            raise TimeUpError


def describe_candidate(candidate: QuantizationCandidate) -> str:
    """Return one line for the terminal: config, cosine, time ratio and gates."""
    words = [candidate.name]
    if candidate.cosine is not None:
        words.append(f"cosine {candidate.cosine.value:.5f}")
    if candidate.latency is not None:
        ratio = candidate.latency.ratio
        words.append(f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}] of the time of fp32")
    words.append("inside its gates" if candidate.passed else "misses its gates")
    return ", ".join(words)


def mixed_precision_search(
    log: TrialLog,
    config: StaticInt8,
    always_float: tuple[str, ...],
    damage: Sensitivity,
    gains: Gains,
    *,
    allowed: float,
) -> None:
    """Find the smallest set of groups to leave in float so that an int8 config passes its gates.

    Groups are tried in two orders: by damage for the time saved, then by damage alone. All that
    was tried is in `log`.

    Args:
        log: runs the trials.
        config: has every product in int8, and fails its gates.
        always_float: nodes that int8 makes no faster; they stay in float in any case.
        damage: error that each group causes alone, with this config.
        gains: time that quantizing each group saves, with this config.
        allowed: loss of mean cosine that the gates allow.

    Raises:
        TimeUpError: time is up.
    """

    def evaluate(in_float: Sequence[GroupDamage]) -> QuantizationCandidate | None:
        kept = (*always_float, *product_names(in_float))
        return log.evaluate(replace(config, kept=kept))

    for order in (order_by_damage_per_time(damage, gains, allowed), damage.groups):
        groups = [group for group in order if not set(group.nodes) <= set(always_float)]
        count = _smallest_passing(groups, evaluate)
        if count is not None:
            _requantize(groups[:count], gains, evaluate)
            return


_EvaluateMixed = Callable[[Sequence[GroupDamage]], QuantizationCandidate | None]


def _smallest_passing(order: Sequence[GroupDamage], evaluate: _EvaluateMixed) -> int | None:
    """Return how many groups, the first of `order`, must stay in float; None if all would have to.

    Steps double until the gates hold, then the last step is bisected.
    """
    most = len(order) - 1  # with all groups in float it would be fp32
    low, high = 0, min(1, most)
    while not _passes(candidate := evaluate(order[:high])):
        latency = None if candidate is None else candidate.latency
        if high >= most or (latency is not None and latency.ratio.low >= 1):
            return None  # more in float would be slower still than fp32
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _passes(evaluate(order[:middle])) else (middle, high)
    return high


def _requantize(in_float: Sequence[GroupDamage], gains: Gains, evaluate: _EvaluateMixed) -> None:
    """Quantize again the groups that save most time, one by one, while the gates hold."""
    left = list(in_float)
    # The last group is needed: without it the gates did not hold.
    by_gain = sorted(in_float[:-1], key=lambda group: -gains.of(group.nodes))
    for group in by_gain[:_MAX_REQUANTIZED]:
        fewer = [other for other in left if other is not group]
        if _passes(evaluate(fewer)):
            left = fewer


def _passes(candidate: QuantizationCandidate | None) -> bool:
    return candidate is not None and candidate.passed


def order_by_damage_per_time(
    damage: Sensitivity, gains: Gains, allowed: float
) -> tuple[GroupDamage, ...]:
    """Sort groups by the damage that leaving them in float avoids for each unit of time.

    Groups that save no time in int8 come first, then groups that lose more than `allowed` alone.
    """

    def priority(group: GroupDamage) -> tuple[bool, bool, float]:
        saved = gains.of(group.nodes)
        too_much = group.cosine_loss.value > allowed
        return saved <= 0, too_much, group.divergence.value / (saved if saved > 0 else 1.0)

    return tuple(sorted(damage.groups, key=priority, reverse=True))


def product_names(groups: Iterable[NodeGroup | GroupDamage]) -> tuple[str, ...]:
    """Return the names of all products of some groups."""
    return tuple(node for group in groups for node in group.nodes)


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """The candidates of a search, and the one to ship.

    Attributes:
        candidates: all that were tried, in order; the first is fp32. Those that were raced have
            their times from the race.
        front: the Pareto front of time (bytes, where no time was measured) and mean cosine, the
            fastest first.
        chosen: the one to ship.
        why: the reason for that choice.
        judged: candidates that were judged on the test pairs, in order.
        damage: error that each group causes alone; None if it was not measured.
        gains: time that quantizing each group saves; None if it was not measured.
        failed: configs that could not be made or run, each with the reason.
        complete: False where time ran out before everything useful was tried.
    """

    candidates: tuple[QuantizationCandidate, ...]
    front: tuple[QuantizationCandidate, ...]
    chosen: QuantizationCandidate
    why: str
    judged: tuple[FinalJudgement, ...]
    damage: Sensitivity | None
    gains: Gains | None
    failed: tuple[tuple[str, str], ...]
    complete: bool


def search(
    evaluator: Evaluator,
    space: SearchSpace,
    *,
    minutes: float | None = None,
    rank: bool = False,
    accept_undecided: bool = False,
    progress: Callable[[str], None] = lambda line: None,
    clock: Callable[[], float] = time.monotonic,
) -> SearchResult:
    """Search for the fastest config that passes its gates.

    Args:
        evaluator: measures configs; those that it knows already take no time.
        space: the configs to try.
        minutes: nothing new begins after this time; None for no limit.
        rank: measure the damage of each group even where the gates hold without it.
        accept_undecided: choose also what is inside its gates by the measured values, though the
            test pairs are too few to show it.
        progress: called with one line of text after each step.
        clock: returns seconds, from any zero.

    Raises:
        ExportError: fp32 cannot be made.
        EngineError: the tower cannot be run in fp32.
    """
    log = TrialLog(evaluator, minutes, progress, clock)
    return _Search(log, space, rank=rank, accept_undecided=accept_undecided).run()


class _Search:
    def __init__(
        self, log: TrialLog, space: SearchSpace, *, rank: bool, accept_undecided: bool
    ) -> None:
        self._log, self._evaluator = log, log.evaluator
        self._space, self._rank, self._accept_undecided = space, rank, accept_undecided
        self._damage: Sensitivity | None = None
        self._gains: Gains | None = None

    def run(self) -> SearchResult:
        """Try int8, then the other precisions; race and judge what passes."""
        log = self._log
        fp32 = self._evaluator.evaluate(Float32())
        log.candidates[fp32.key] = fp32
        complete = True
        try:
            if self._space.recipe is not None:
                self._try_int8(self._space.recipe)
            for config in self._space.others:
                if isinstance(config, Float16):
                    log.evaluate_fp16(config)
                else:
                    log.evaluate(config)
        except TimeUpError:
            complete = False
            log.report("time is up")
        self._race(fp32)
        chosen, judged, why = self._choose(fp32)
        candidates = tuple(log.candidates.values())
        return SearchResult(
            candidates=candidates,
            front=pareto_front(candidates),
            chosen=chosen,
            why=why,
            judged=judged,
            damage=self._damage,
            gains=self._gains,
            failed=tuple(log.failed.items()),
            complete=complete,
        )

    def _try_int8(self, recipe: StaticInt8) -> None:
        """Search static int8; if a measurement fails, keep what was found so far."""
        try:
            self._search_int8(recipe)
        except (ExportError, EngineError) as error:  # such as of the engine's profiler
            self._log.record_failure(recipe, error)

    def _search_int8(self, recipe: StaticInt8) -> None:
        """Find the fastest static int8 that passes the gates."""
        log = self._log
        first = log.evaluate(recipe)
        if first is None:
            return
        best = first if first.passed else self._remedy(first)
        config = best.config
        assert isinstance(config, StaticInt8)
        log.check_time()
        self._gains = gains = self._evaluator.gains(config)
        always_float = self._no_faster_in_int8(gains)
        if always_float:
            log.report(f"{len(always_float)} products are no faster in int8: tried in float")
            best = log.evaluate(replace(config, kept=always_float)) or best
        if best.passed:
            for change in self._space.cheaper:
                assert isinstance(best.config, StaticInt8)
                log.evaluate(change(best.config))
        if self._rank or not best.passed:
            log.check_time()
            log.report("measuring the damage that each group does alone")
            self._damage = damage = self._evaluator.damage(config)
            if not best.passed:
                mixed_precision_search(
                    log, config, always_float, damage, gains, allowed=_allowed_loss(best)
                )

    def _remedy(self, best: QuantizationCandidate) -> QuantizationCandidate:
        """Return the first remedied form of a candidate that passes, else the most exact one."""
        log = self._log
        smoothing = [self._evaluator.with_smoothing] if self._space.smoothing else []
        for change in (*smoothing, *self._space.remedies):
            assert isinstance(best.config, StaticInt8)
            recoverable = 1 - _mean_cosine(best) <= _RECOVERABLE * _allowed_loss(best)
            if change in self._space.remedies and not recoverable:
                break
            log.check_time()
            changed = change(best.config)
            candidate = None if changed == best.config else log.evaluate(changed)
            if candidate is not None and _quality(candidate) > _quality(best):
                best = candidate
            if best.passed:
                break
        return best

    def _no_faster_in_int8(self, gains: Gains) -> tuple[str, ...]:
        """Return the products that int8 makes no faster; none if that holds for all of them."""
        groups = self._evaluator.groups
        names = product_names(group for group in groups if gains.of(group.nodes) <= 0)
        return () if not gains.measured or len(names) == len(product_names(groups)) else names

    def _race(self, fp32: QuantizationCandidate) -> None:
        """Time the best candidates in the same rounds, if there are several and times at all."""
        log = self._log
        ranked, _ = rank_shippable(list(log.candidates.values()), fp32)
        finalists = ranked[:_MAX_RACING]
        if len(finalists) < 2 or fp32.latency is None:
            return
        log.report(f"{len(finalists)} that may be shipped: timed in the same rounds")
        latencies = self._evaluator.race([candidate.config for candidate in finalists])
        for candidate, latency in zip(finalists, latencies, strict=True):
            raced = replace(candidate, latency=latency)
            log.candidates[candidate.key] = raced
            log.report(describe_candidate(raced))

    def _choose(
        self, fp32: QuantizationCandidate
    ) -> tuple[QuantizationCandidate, tuple[FinalJudgement, ...], str]:
        """Judge the best candidate on the test pairs, and the next best if it fails there."""
        ranked, reason = rank_shippable(list(self._log.candidates.values()), fp32)
        judged: list[FinalJudgement] = []
        for candidate in ranked[:MAX_TEST_JUDGEMENTS]:
            self._log.report(f"judging on the test pairs: {candidate.name}")
            judged.append(self._evaluator.judge_on_test(candidate.config))
            if judged[-1].may_ship(accept_undecided=self._accept_undecided):
                before = f"; {len(judged) - 1} before it missed on the test pairs"
                return candidate, tuple(judged), reason + (before if len(judged) > 1 else "")
        if judged:
            reason = f"the best {len(judged)} inside their gates missed on the test pairs"
        return fp32, tuple(judged), reason


def _allowed_loss(candidate: QuantizationCandidate) -> float:
    """Return the loss of mean cosine that the gates allow; 0 if no embedding is usable."""
    bounds = [record.bound for record in candidate.records if record.name == MEAN_COSINE]
    return 1 - bounds[0] if bounds else 0.0


def _quality(candidate: QuantizationCandidate) -> tuple[bool, float]:
    """Sort key: passing candidates first, then by mean cosine."""
    return candidate.passed, _mean_cosine(candidate)


def _mean_cosine(candidate: QuantizationCandidate) -> float:
    return -1.0 if candidate.cosine is None else candidate.cosine.value
