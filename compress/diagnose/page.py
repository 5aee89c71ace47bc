"""The page of a diagnosis: what was found, all models, layers, attention, groups and words."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from edgeclip.compress.diagnose.diagnosis import (
    ConceptScore,
    DiagnosedModel,
    Diagnosis,
    Finding,
    TowerAgreement,
    TowerLayers,
    headline,
    not_compared,
)
from edgeclip.compress.diagnose.heat_chart import HeatChart
from edgeclip.compress.diagnose.measure import LooksAt
from edgeclip.profiles.report.charts import Dot, DotRow, RowChart
from edgeclip.profiles.report.sections import (
    NOT_AVAILABLE,
    AdviceList,
    AdviceNote,
    Block,
    Card,
    Cell,
    Commands,
    Facts,
    Figure,
    FigureGrid,
    Heading,
    Note,
    Page,
    PageSummary,
    Pictures,
    Section,
    ShownPicture,
    Table,
    columns,
    count,
    section_of,
    sections,
)
from edgeclip.profiles.report.write_page import write_html
from edgeclip.runtime.arrays import Values
from edgeclip.runtime.console import percent, percent_interval
from edgeclip.runtime.stats.interval import Interval

_SIDE = 128  # px of a picture with attention
_NONE = Cell(NOT_AVAILABLE)


def write_diagnosis(found: Diagnosis, looks: LooksAt | None, command: str, path: Path) -> None:
    """Write the page to `path`, whole or not at all.

    Raises:
        InputError: it cannot be written.
        MissingExtraError: jinja2 or matplotlib is not installed.
    """
    write_html(diagnosis_page(found, looks, command), path)


def diagnosis_page(found: Diagnosis, looks: LooksAt | None, command: str) -> Page:
    """What was found first, then the figures behind it, and how they were made."""
    lead = [f"{count(found.pictures)} pictures, {count(found.captions)} captions: {found.data}."]
    lead += [f"Left out: {found.left_out}."] if found.left_out else []
    lead += not_compared(found)
    faults = any(item.kind != "too few pictures" for item in found.findings)
    return Page(
        title="Diagnosis of a student",
        lead=tuple(lead),
        summary=PageSummary(headline(found), "miss" if faults else "", cards=tuple(_cards(found))),
        sections=sections(
            _findings_section(found.findings),
            _models_section(found.models),
            *(_layers_section(tower) for tower in found.towers),
            _attention_section(found.towers, looks),
            _groups_section(found.models),
            _concepts_section(found.models),
            _trust_section(found),
            _method_section(found, command),
        ),
        footer=("Written by EdgeCLIP.",),
    )


def _cards(found: Diagnosis) -> Iterable[Card]:
    model = found.models[1]
    if model.kept is not None:
        yield Card("Kept R@1", percent(model.kept.value), percent_interval(model.kept), model.name)
    for tower, own in (("image", model.image), ("text", model.text)):
        if own is not None and own.cosine is not None:
            yield Card(
                f"Cosine of the {tower} tower",
                f"{own.cosine.value:.3f}",
                _ends(own.cosine),
                "to the teacher's embeddings",
            )


def _findings_section(findings: Sequence[Finding]) -> Section | None:
    if not findings:
        return section_of(
            "findings",
            "What the data show",
            [Note("Nothing that a test over these pictures can tell from chance.")],
        )
    entries = tuple(
        AdviceNote(
            subject=f"{item.kind}: {item.subject}",
            title=item.title,
            text=item.advice,
            evidence=item.evidence,
        )
        for item in findings
    )
    return section_of("findings", "What the data show, and what to try", [AdviceList(entries)])


def _models_section(models: Sequence[DiagnosedModel]) -> Section | None:
    """All models side by side."""
    rows = tuple(
        (
            Cell(model.name, tone="strong"),
            _share(model.r1),
            _share(model.kept),
            *_agreement(model.image),
            *_agreement(model.text),
        )
        for model in models
    )
    names = ("model", "R@1", "kept", "image: cosine", "neighbours", "bits")
    geometry = tuple(
        (
            Cell(model.name, tone="strong"),
            _number(model.gap),
            _number(model.alignment),
            _number(model.image_uniformity),
            _number(model.text_uniformity),
        )
        for model in models
    )
    shapes = ("model", "modality gap", "alignment", "uniformity: image", "text")
    return section_of(
        "models",
        "Teacher, student and each precision",
        [
            Note(
                "Below each figure its 95% interval. Neighbours: how many of the 10 nearest are "
                "the teacher's, above chance. Bits: Gaussian mutual information with the teacher."
            ),
            Table(
                name="Quality and agreement",
                columns=columns(*names, "text: cosine", "neighbours", "bits"),
                rows=rows,
            ),
            Table(name="Geometry", columns=columns(*shapes), rows=geometry),
        ],
    )


def _agreement(own: TowerAgreement | None) -> tuple[Cell, ...]:
    if own is None:
        return Cell(""), Cell(""), Cell("")
    information = own.information
    bits = Cell(f"{information.bits:.1f}", f"by chance\n{information.null:.1f}")
    return _number(own.cosine), _share(own.neighbours), bits


def _layers_section(tower: TowerLayers) -> Section | None:
    """CKA of all layers, and what each is worth."""
    charts = [
        HeatChart(
            title="Linear CKA",
            rows="student's layer",
            columns="teacher's layer",
            values=tower.cka,
        )
    ]
    gains = tuple(
        DotRow(f"without layer {layer.number}", (Dot(layer.gain_without),),
               f"{layer.gain_without.value:+.3f}")
        for layer in tower.layers
        if layer.gain_without is not None
    )  # fmt: skip
    blocks: list[Block] = [FigureGrid(tuple(charts))]
    if gains:
        chart = RowChart(
            rows=gains,
            axis_name="change of the cosine to the teacher",
            title=f"What each layer of the {tower.tower} tower is worth",
            reference=(0.0, "no change"),
            log=False,
        )
        words = "Left of the line the layer is needed; right of it the tower is better without it."
        blocks.append(Figure(chart, words))
    rows = tuple(
        (
            Cell(str(layer.number)),
            Cell(str(layer.best)),
            _number(layer.cka),
            _number(layer.cosine),
            Cell("random", tone="miss") if layer.noise else Cell("trained"),
        )
        for layer in tower.layers
    )
    names = ("layer", "most alike", "CKA", "cosine", "weights")
    blocks.append(Table(name="Layers", columns=columns(*names), rows=rows, folded=len(rows) > 12))
    return section_of(f"{tower.tower}-layers", f"Layers of the {tower.tower} tower", blocks)


def _attention_section(towers: Sequence[TowerLayers], looks: LooksAt | None) -> Section | None:
    """Entropy of attention of both models, and where they look."""
    charts, words = [], []
    for tower in towers:
        for name, entropy in (("teacher", tower.teacher_entropy), ("student", tower.entropy)):
            if entropy is None:
                words.append(f"The {tower.tower} tower of the {name}: attention is not available.")
                continue
            charts.append(
                HeatChart(
                    title=f"{name}, {tower.tower} tower: entropy",
                    rows="layer",
                    columns="head",
                    values=entropy,
                )
            )
    blocks: list[Block] = [Note(text) for text in words]
    if charts:
        note = "1 looks everywhere alike, 0 at one place. Heads near 1 in all layers add little."
        blocks.append(FigureGrid(tuple(charts), note))
    if looks is not None:
        shown = _looks(looks)
        blocks += [Heading("Where the last layer looks"), shown] if shown.entries else []
    return section_of("attention", "Attention", blocks)


def _looks(looks: LooksAt) -> Pictures:
    """Each picture as the teacher looks at it, beside the student."""
    entries = []
    for at, picture in enumerate(looks.pictures):
        drawn = [
            None if maps is None else overlay(picture, maps[at])
            for maps in (looks.teacher, looks.student)
        ]
        there = [item for item in drawn if item is not None]
        if len(there) == 2:
            entries.append(
                ShownPicture(picture=there[1], figure="teacher, student", beside=there[0])
            )
        elif there:
            name = "teacher" if drawn[0] is not None else "student"
            plain = picture.convert("RGB").resize((_SIDE, _SIDE))
            entries.append(ShownPicture(picture=there[0], figure=name, beside=plain))
    return Pictures(tuple(entries))


def overlay(picture: Image.Image, looked: Values) -> Image.Image:
    """Darken a picture where it is not looked at.

    Args:
        picture: the picture; its centre square is shown.
        looked: how much each patch is looked at, [rows, columns].
    """
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    square = picture.convert("RGB").crop((left, top, left + side, top + side))
    square = square.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
    scaled = looked / max(float(looked.max()), 1e-12)
    mask = Image.fromarray((255 * scaled).astype(np.uint8)).resize(
        (_SIDE, _SIDE), Image.Resampling.BILINEAR
    )
    light = 0.15 + 0.85 * np.asarray(mask, np.float64)[..., None] / 255
    return Image.fromarray((np.asarray(square, np.float64) * light).astype(np.uint8))


def _groups_section(models: Sequence[DiagnosedModel]) -> Section | None:
    """What is kept of each group, by each model."""
    blocks: list[Block] = []
    for model in models[1:]:
        if not model.groups:
            continue
        rows = tuple(
            DotRow(
                f"{group.column} {group.name}, {group.pictures}",
                (Dot(group.kept),),
                percent(group.kept.value) + (" behind" if group.is_behind else ""),
            )
            for group in model.groups
        )
        overall = None if model.kept is None else (model.kept.value, "all")
        chart = RowChart(
            rows=rows,
            axis_name="kept R@1",
            title=f"Kept R@1 by group, {model.name}",
            reference=overall,
            log=False,
        )
        if model is models[1]:
            words = (
                f"{model.name}. Behind is a group that keeps less than all others together, "
                "tested over all groups by Holm's method."
            )
            blocks.append(Figure(chart, words))
        table = tuple(
            (
                Cell(f"{group.column} {group.name}"),
                Cell(count(group.pictures)),
                _share(group.teacher_r1),
                _share(group.r1),
                _share(group.kept),
                _share(group.behind),
            )
            for group in model.groups
        )
        names = ("group", "pictures", "teacher", "R@1", "kept", "others keep more")
        blocks.append(
            Table(name=f"Groups, {model.name}", columns=columns(*names), rows=table, folded=True)
        )
    return section_of("groups", "Quality by group", blocks)


def _concepts_section(models: Sequence[DiagnosedModel]) -> Section | None:
    """Scores of families of words, and of each word."""
    teacher, others = models[0], [model for model in models[1:] if model.concepts]
    if not teacher.concepts:
        return None

    def cells(score: ConceptScore) -> tuple[Cell, ...]:
        own = [
            next(
                (
                    item
                    for item in model.concepts
                    if (item.family, item.word) == (score.family, score.word)
                ),
                None,
            )
            for model in others
        ]
        name = score.word or f"all of {score.family}"
        shares = (_NONE if item is None else _share(item.right) for item in own)
        return Cell(name), Cell(count(score.pictures)), _share(score.right), *shares

    names = columns("word", "pictures", "teacher", *(model.name for model in others))
    whole = tuple(cells(score) for score in teacher.concepts if not score.word)
    each = tuple(cells(score) for score in teacher.concepts if score.word)
    return section_of(
        "words",
        "Words",
        [
            Note(
                "How many pictures fit their caption better than the same caption with another "
                "word of its kind, by the teacher's text tower."
            ),
            Table(name="Kinds of words", columns=names, rows=whole),
            Table(name="Each word", columns=names, rows=each, folded=True),
        ],
    )


def _trust_section(found: Diagnosis) -> Section | None:
    """Calibration, and what is outside the world."""
    rows = []
    for model in found.models:
        own = model.calibration
        rows.append(
            (
                Cell(model.name, tone="strong"),
                Cell(percent(own.error), f"if perfect\n{percent(own.expected)}"),
                _share(own.confidence_above_accuracy),
                Cell(own.temperature_told),
                _number(model.outside),
                _number(model.outside_lost),
            )
        )
    names = ("model", "ECE", "surer than right", "temperature", "AUROC outside", "less by")
    return section_of(
        "trust",
        "Calibration, and pictures from outside",
        [
            Note(
                "Of the best caption of each picture among all. Dividing logits by the temperature "
                f"mends what one number can. Outside: {found.outside}."
            ),
            Table(name="Calibration and outside", columns=columns(*names), rows=tuple(rows)),
        ],
    )


def _method_section(found: Diagnosis, command: str) -> Section | None:
    informations = [
        own.information
        for model in found.models
        for own in (model.image, model.text)
        if own is not None
    ]
    shrinkage = ", ".join(f"{item.shrinkage:.3f}" for item in informations)
    dims = ", ".join(sorted({str(item.dims) for item in informations}))
    return section_of(
        "method",
        "How it was measured",
        [
            Facts(
                (
                    (
                        "CKA",
                        "Linear CKA (Kornblith et al. 2019) with the unbiased HSIC (Song et al. "
                        "2012), of hidden states averaged over positions; intervals by a jackknife "
                        "over 20 groups of items.",
                    ),
                    (
                        "Without a layer",
                        "The layer gives what it takes; the cosine to the teacher's embedding is "
                        "compared picture by picture.",
                    ),
                    (
                        "Random weights",
                        "No largest singular value above that of the same entries in another "
                        "order (so many permutations that 95% of layers of random weights are "
                        "found, by Bonferroni's bound over the matrices).",
                    ),
                    (
                        "Neighbours",
                        "(o - c) / (1 - c): o the shared part of the 10 nearest, c that of chance.",
                    ),
                    (
                        "Mutual information",
                        f"Of a joint Gaussian in {dims} principal components of each side, with "
                        f"Ledoit and Wolf's (2004) shrinkage ({shrinkage}); chance is the largest "
                        "of 19 permutations.",
                    ),
                    ("Modality gap", "Distance of the means (Liang et al. 2022)."),
                    ("Alignment, uniformity", "Wang and Isola (2020), alpha 2 and t 2."),
                    (
                        "ECE",
                        "15 bins of equally many pictures; what perfect calibration shows is drawn "
                        "(Broecker and Smith 2007). Temperature by likelihood (Guo et al. 2017).",
                    ),
                    (
                        "Outside",
                        "AUROC of the best cosine to any caption, with DeLong's (1988) interval.",
                    ),
                    (
                        "Groups",
                        "Share of the teacher's R@1, Fieller's interval; the difference to all "
                        "others by Zou and Donner (2008), tested by Holm's method.",
                    ),
                )
            ),
            Heading("Again"),
            Commands((command,)),
        ],
    )


def _share(value: Interval | None) -> Cell:
    if value is None:
        return Cell("")
    return Cell(percent(value.value), percent_interval(value))


def _number(value: Interval | None) -> Cell:
    return Cell("") if value is None else Cell(f"{value.value:.3f}", _ends(value))


def _ends(value: Interval) -> str:
    return f"{value.low:.3f} to {value.high:.3f}"
