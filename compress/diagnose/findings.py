"""Say in words what the figures of a diagnosis show, and only what they show.

Every rule rests on an interval or a test. Where several of a kind are tested, such as the layers of
a tower or the groups of the data, they are tested together by Holm's method, so that one fault is
found and noise is not.
"""

import math
from collections.abc import Iterator, Sequence

from edgeclip.compress.diagnose.diagnosis import (
    ConceptScore,
    Confusion,
    DiagnosedModel,
    Finding,
    TowerAgreement,
    TowerLayers,
    exact_of,
)
from edgeclip.compress.diagnose.groups import LEAST_IN_GROUP, GroupQuality
from edgeclip.runtime.console import percent, percent_interval
from edgeclip.runtime.spec import Tower
from edgeclip.runtime.stats.interval import Interval

_HALF_WAY = 0.5  # of the way from chance to what the other tower tells apart
_LEARNED = 0.5  # of the teacher's own cosine to its mean: what an untrained tower never has
_POINTS = 0.02  # a loss that is worth a word
_WRONG = 0.2  # of a group's pictures with a word, read as one other more often than by the teacher
_AT_MOST = 0.5  # of a column's groups


def find(
    models: Sequence[DiagnosedModel], towers: Sequence[TowerLayers], group_sizes: Sequence[int]
) -> tuple[Finding, ...]:
    """Return what the figures show, the gravest first.

    Args:
        models: teacher first, then the student, then precisions.
        towers: layers of the student; () without one.
        group_sizes: pictures of each group, also of those too small to judge.
    """
    found: list[Finding] = []
    for tower in towers:
        found += _broken_layers(tower)
    broken = {finding.subject.split(":")[0] for finding in found}
    judged = [model for model in models[1:] if model.name == "student"] or list(models[1:2])
    for model in judged:
        found += _tower_at_chance(model, broken)
        found += _groups(model, broken)
        found += _concepts(model)
        found += _reliability(model, models[0])
    found += _precisions(models)
    found += _too_few(judged, group_sizes)
    return tuple(found)


def _broken_layers(tower: TowerLayers) -> Iterator[Finding]:
    """Layers of random weights among trained ones; else those that the tower is better without.

    What follows a layer of random weights works on garbage, so it is not judged.
    """
    noise = [layer.number for layer in tower.layers if layer.noise]
    if len(noise) == len(tower.layers):
        noise = []  # a tower that was never trained, which its agreement tells
    harmful = [layer.number for layer in tower.layers if layer.does_harm]
    if noise:
        harmful = [number for number in harmful if number < min(noise)]
    for number in sorted({*noise, *harmful}):
        layer = tower.layers[number - 1]
        before = tower.layers[number - 2] if number > 1 else None
        evidence = [
            f"CKA with the most alike of the teacher's layers: {_figure(layer.cka)}"
            + (f", after {_figure(before.cka)} in the layer before it" if before else "")
        ]
        if layer.noise:
            evidence.append(
                "none of its weight matrices has a larger singular value than its entries have in "
                "any order (by so many permutations that 95% of layers of random weights are "
                "found); in other layers of the tower they have"
            )
        if layer.gain_without is not None:
            change = layer.gain_without
            words = "rises" if layer.does_harm else "changes"
            evidence.append(
                f"without it the cosine to the teacher's embeddings {words} by {_figure(change)}, "
                f"over {tower.items} items"
            )
        if layer.noise:
            title = (
                f"Layer {number} of the {tower.tower} tower has random weights: it is broken, or "
                "was never trained."
            )
        else:
            title = (
                f"Layer {number} of the {tower.tower} tower does harm: the tower agrees better "
                "with its teacher without it."
            )
        yield Finding(
            kind="broken layer",
            subject=f"{tower.tower} tower: layer {number}",
            title=title,
            evidence=tuple(evidence),
            advice=(
                "Compare its weights with those of an earlier checkpoint of the run; a file that "
                "was damaged, or a name that did not match when weights were loaded, leaves a "
                "layer like this. Then load that checkpoint, or leave the layer out and distil on."
            ),
        )


def _tower_at_chance(model: DiagnosedModel, broken: set[str]) -> Iterator[Finding]:
    """A tower that hardly tells its items apart where the other one does."""
    both: dict[Tower, TowerAgreement | None] = {"image": model.image, "text": model.text}
    pairs: tuple[tuple[Tower, Tower], ...] = (("text", "image"), ("image", "text"))
    for tower, other in pairs:
        own, beside = both[tower], both[other]
        if own is None or beside is None or f"{tower} tower" in broken:
            continue
        mine, theirs = own.told_apart, beside.told_apart
        if mine is None or theirs is None:
            continue
        if not mine.high - 0.5 < _HALF_WAY * (theirs.low - 0.5):
            continue
        evidence = (
            f"the chance that an embedding is closer to the teacher's of its own item than to that "
            f"of another: {_share(mine)} for the {tower} tower, {_share(theirs)} for the {other} "
            "tower, where 50% is chance",
            f"neighbours shared with the teacher, above chance: {_share(own.neighbours)} and "
            f"{_share(beside.neighbours)}",
            *_towards(own),
        )
        learned = _has_learned_mean(own)
        if tower == "text" and learned:
            yield Finding(
                kind="shuffled captions",
                subject="text tower",
                title="The text tower learned where texts lie, but not which text is which: it was "
                "trained on captions of other pictures.",
                evidence=evidence,
                advice="Check that captions and pictures of the training data are in one order "
                "(`edgeclip data-report` shows pairs side by side), and that a cache belongs to "
                "these data; then distil the text tower again, beginning with the teacher's own "
                "(`--whole-text`).",
            )
        else:
            yield Finding(
                kind="tower at chance",
                subject=f"{tower} tower",
                title=f"The {tower} tower agrees with its teacher hardly more than by chance"
                + (", though it learned where its embeddings lie." if learned else "."),
                evidence=evidence,
                advice="Check that its weights were loaded, and that its inputs (tokenizer, "
                "normalisation) are those that it was trained with; then distil it again.",
            )


def _towards(own: TowerAgreement) -> Iterator[str]:
    if own.towards_mean is not None and own.teacher_towards_mean is not None:
        yield (
            f"cosine to the mean of the teacher's embeddings: {_figure(own.towards_mean)}; the "
            f"teacher's own have {_figure(own.teacher_towards_mean)}"
        )


def _has_learned_mean(own: TowerAgreement) -> bool:
    if own.towards_mean is None or own.teacher_towards_mean is None:
        return False
    return own.towards_mean.low > _LEARNED * own.teacher_towards_mean.high > 0


def _groups(model: DiagnosedModel, broken: set[str]) -> Iterator[Finding]:
    """Groups whose colours are read wrongly, and others of which less is kept than of the rest.

    Behind a broken layer of the image tower any word may be lost, which says nothing of colours.

    A picture is in a group of each column. Colours that are wrong in one background are also seen
    in every layout; so the column is named of whose groups the least share has them, and none where
    that is more than half: then colours are lost everywhere, which the words tell.
    """
    confused: dict[str, dict[str, list[Confusion]]] = {}
    confusions = () if "image tower" in broken else model.confusions
    for item in confusions:
        if item.more.low > _WRONG:
            confused.setdefault(item.column, {}).setdefault(item.group, []).append(item)
    judged = {(group.column, group.name): group for group in model.groups}

    def share(column: str) -> float:
        groups = {name for own, name in judged if own == column} | confused[column].keys()
        return len(confused[column]) / len(groups)

    column = min(confused, key=share, default=None)
    named = confused[column] if column is not None and share(column) <= _AT_MOST else {}
    # Where colours of one group were learned wrongly, those like them suffer a little as well.
    lost = {
        name: own for name, own in named.items() if _is_behind(judged.get((column or "", name)))
    }
    named = lost or named
    for name, own in named.items():
        assert column is not None
        yield _wrong_colours(column, name, judged.get((column, name)), own)
    for group in model.groups:
        is_named = group.column == column and group.name in named
        if group.is_behind and group.behind.low > _POINTS and not is_named:
            yield _behind(group)


def _is_behind(group: GroupQuality | None) -> bool:
    return group is not None and group.is_behind


def _wrong_colours(
    column: str, name: str, group: GroupQuality | None, confusions: Sequence[Confusion]
) -> Finding:
    told = [
        f"{item.word} is read as {item.read_as} in {_share(item.share)} of {item.pictures} "
        f"pictures, by the teacher in {_share(item.teacher)}"
        for item in sorted(confusions, key=lambda item: -item.more.low)[:4]
    ]
    first = max(confusions, key=lambda item: item.more.low)
    return Finding(
        kind="wrong colours",
        subject=f"{column} {name}",
        title=f"Pictures of {column} {name} have wrong colours for the student: it reads "
        f"{first.word} as {first.read_as}.",
        evidence=(*told, *(() if group is None else _of_group(group))),
        advice="Look at pictures of this group as training read them: red and blue may be "
        "exchanged (BGR), or a colour profile was lost. Mend them, compute the teacher's cache "
        "of them again, and distil on.",
    )


def _behind(group: GroupQuality) -> Finding:
    return Finding(
        kind="group behind",
        subject=f"{group.column} {group.name}",
        title=f"Of pictures of {group.column} {group.name} less is kept than of the others.",
        evidence=_of_group(group),
        advice="Give more pictures like these to train on, or weigh them higher (`--data "
        "DIR=WEIGHT`); `edgeclip data-report --group-by` tells how groups differ.",
    )


def _of_group(group: GroupQuality) -> tuple[str, ...]:
    return (
        f"kept R@1 {_share(group.kept)} of {group.pictures} pictures; others keep "
        f"{_share(group.behind)} more",
    )


def _concepts(model: DiagnosedModel) -> Iterator[Finding]:
    """Families of words that the student lost, as a whole."""
    for score in model.concepts:
        if score.word or score.lost is None or score.lost.low <= _POINTS:
            continue
        words = [item for item in model.concepts if item.family == score.family and item.word]
        worst = max(words, key=_lost_at_least)
        yield Finding(
            kind="concept lost",
            subject=score.family,
            title=f"The student tells {score.family} words worse than its teacher.",
            evidence=(
                f"of {score.pictures} pictures {_share(score.right)} fit their own caption best; "
                f"that is {_share(score.lost)} less than the teacher",
                f"the worst word is {worst.word}: {_share(worst.right)} of {worst.pictures}",
            ),
            advice="Train longer, or on more pictures whose captions differ in these words; a "
            "smaller patch or a larger picture helps where they are about small things.",
        )


def _lost_at_least(score: ConceptScore) -> float:
    return -math.inf if score.lost is None else score.lost.low


def _reliability(model: DiagnosedModel, teacher: DiagnosedModel) -> Iterator[Finding]:
    """Confidence that is no probability, and pictures from outside that are no longer noticed."""
    own = model.calibration
    above = own.confidence_above_accuracy
    surely = above.low > max(_POINTS, teacher.calibration.confidence_above_accuracy.high)
    if own.error > own.limit and surely:
        yield Finding(
            kind="too sure",
            subject=model.name,
            title="The student is surer of its answers than it is right, more than its teacher.",
            evidence=(
                f"mean confidence less accuracy: {_share(above)} (teacher "
                f"{_share(teacher.calibration.confidence_above_accuracy)})",
                f"ECE {percent(own.error)}, where perfect calibration shows "
                f"{percent(own.expected)} with so many pictures",
            ),
            advice=f"Divide the logits by {own.temperature_told} where probabilities are shown, "
            "or certify a threshold (`edgeclip cascade`). No ranking changes.",
        )
    if model.outside_lost is not None and model.outside_lost.low > _POINTS:
        assert model.outside is not None
        yield Finding(
            kind="outside the world",
            subject=model.name,
            title="The student notices pictures from outside the data worse than its teacher.",
            evidence=(
                f"AUROC of the best cosine {_figure(model.outside)}, by "
                f"{_figure(model.outside_lost)} below the teacher's",
            ),
            advice="Reject by a threshold only what it tells apart, or add pictures from outside "
            "without captions to the training (they teach the image tower alone).",
        )


def _precisions(models: Sequence[DiagnosedModel]) -> Iterator[Finding]:
    """Precisions that surely lose some of what fp32, or else the student in torch, finds."""
    exact = exact_of([model.name for model in models])
    for model in models:
        if model.kept_of_exact is None or model.kept_of_exact.high >= 1 - _POINTS:
            continue
        yield Finding(
            kind="precision",
            subject=model.name,
            title=f"{model.name} loses quality that the {exact} has."
            if exact == "student"
            else f"{model.name} loses quality that {exact} has.",
            evidence=(
                f"R@1 kept of that of {exact}: {_share(model.kept_of_exact)}, picture by picture",
            ),
            advice="Search a quantization that keeps its gates (`edgeclip quantize`), or ship "
            "fp16.",
        )


def _too_few(models: Sequence[DiagnosedModel], sizes: Sequence[int]) -> Iterator[Finding]:
    """Groups that are too small to be judged, and groups whose interval says nothing."""
    small = [size for size in sizes if 0 < size < LEAST_IN_GROUP]
    if small:
        yield Finding(
            kind="too few pictures",
            subject="groups",
            title=f"{len(small)} of {len(sizes)} groups have too few pictures to tell.",
            evidence=(
                f"the smallest has {min(small)}, and {LEAST_IN_GROUP} are needed to judge one",
            ),
            advice=f"About {math.ceil(LEAST_IN_GROUP / min(small))} times as many pictures would "
            "do.",
        )
    for model in models:
        wide = [
            group
            for group in model.groups
            if not group.is_behind and group.behind.high > 0.1 and group.behind.low < 0
        ]
        if wide:
            yield _wide(wide)


def _wide(groups: Sequence[GroupQuality]) -> Finding:
    """Groups whose interval says nothing; that of a few hits of the teacher may have no end."""
    ended = [own for own in groups if math.isfinite(own.behind.high - own.behind.low)]
    endless = [own for own in groups if own not in ended]
    evidence, advice = [], []
    if ended:
        group = max(ended, key=lambda item: item.behind.high)
        half = (group.behind.high - group.behind.low) / 2
        needed = math.ceil(group.pictures * (half / 0.05) ** 2 / 10) * 10
        evidence.append(
            f"the widest: {group.column} {group.name}, {group.pictures} pictures, "
            f"{_share(group.behind)} behind"
        )
        advice.append(f"Some {needed} pictures of each group would tell five points.")
    if endless:
        names = ", ".join(f"{own.column} {own.name} ({own.pictures} pictures)" for own in endless)
        evidence.append(f"the teacher has too few hits in the group, or in all others: {names}")
        advice.append("Where the teacher has too few hits, how many would do is not known.")
    return Finding(
        kind="too few pictures",
        subject="groups",
        title=f"Of {len(groups)} groups it cannot be told whether 10 points less are kept than of "
        "the others.",
        evidence=tuple(evidence),
        advice=" ".join(advice),
    )


def _figure(value: Interval) -> str:
    return f"{value.value:.3f} ({value.low:.3f} to {value.high:.3f})"


def _share(value: Interval) -> str:
    return f"{percent(value.value)} ({percent_interval(value)})"
