"""Measure teacher, student and each precision of a bundle on the same pictures."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn
from tqdm import tqdm

from edgeclip.compress.data.picture_groups import Groups
from edgeclip.compress.data.sources import Source, relevance_of
from edgeclip.compress.diagnose.concepts import ConceptQuestions, concept_questions
from edgeclip.compress.diagnose.diagnosis import (
    ConceptScore,
    Confusion,
    DiagnosedModel,
    LayerFigures,
    TowerAgreement,
    TowerLayers,
    exact_of,
)
from edgeclip.compress.diagnose.groups import group_quality
from edgeclip.compress.diagnose.layers import (
    Attention,
    TowerRun,
    are_noise,
    attention,
    embed_without,
    find_layers,
    hidden_states,
    without_each,
)
from edgeclip.compress.diagnose.reliability import Separation, calibration, separation
from edgeclip.compress.diagnose.similarity import (
    LEAST_ITEMS,
    alignment,
    gaussian_information,
    jackknifed,
    linear_cka,
    modality_gap,
    neighbour_agreement,
    uniformity,
)
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.runtime.arrays import FloatArray, Values
from edgeclip.runtime.bundle.index import unit_rows
from edgeclip.runtime.console import progress_bar
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.quality.relevance import Relevance
from edgeclip.runtime.quality.retrieval import TIE, pair_ranks
from edgeclip.runtime.spec import Tower
from edgeclip.runtime.stats.interval import Interval
from edgeclip.runtime.stats.shares import estimate_kept, estimate_loss, estimate_share
from edgeclip.runtime.stats.student_t import MeanEstimate, estimate_mean
from edgeclip.runtime.stats.three_outcomes import BoundTest, judge

_BATCH = 32
_NEIGHBOURS = 10
_PAIRWISE = 2000  # items of which all pairs are compared
_CONFUSED = 8  # pictures of a word in a group, at least
_AT_ONCE = 1 << 22  # cosines
LAYER_ITEMS = 128  # pictures, and their captions, that layers are looked at with
SHOWN = 6  # pictures whose attention is drawn


class Embedder(Protocol):
    """What embeds pictures and texts as float32 [N, dim]."""

    scale: float

    def images(self, pictures: Sequence[Image.Image]) -> FloatArray: ...
    def texts(self, texts: Sequence[str]) -> FloatArray: ...


class ModelEmbedder:
    """A model in torch, in full precision."""

    def __init__(self, model: DualEncoder) -> None:
        self._model = model.eval()
        self.scale = float(model.logit_scale.detach().exp())

    def images(self, pictures: Sequence[Image.Image]) -> FloatArray:
        """Embed pictures."""
        with torch.inference_mode():
            found: FloatArray = (
                self._model.embed_image(self._model.preprocess(pictures)).cpu().numpy()
            )
        return found

    def texts(self, texts: Sequence[str]) -> FloatArray:
        """Embed texts, cut where they are too long."""
        with torch.inference_mode():
            found: FloatArray = self._model.embed_text(self._model.tokenize(texts)).cpu().numpy()
        return found


class BundleEmbedder:
    """A precision of a bundle, run as a device runs it."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self.scale = encoder.spec.logit_scale

    def images(self, pictures: Sequence[Image.Image]) -> FloatArray:
        """Embed pictures."""
        return self._encoder.encode_image(list(pictures))

    def texts(self, texts: Sequence[str]) -> FloatArray:
        """Embed texts, cut where they are too long."""
        return self._encoder.encode_text(list(texts), truncate=True)


@dataclass(frozen=True, slots=True, eq=False)
class Embedded:
    """The embeddings of one model, L2-normalised.

    Attributes:
        name: of the model.
        image: of all pictures [N, dim].
        text: of all captions [M, dim].
        outside: of pictures from outside [K, dim]; K may be 0.
        scale: from cosines to logits.
    """

    name: str
    image: Values
    text: Values
    outside: Values
    scale: float


def embed_all(
    models: Mapping[str, Embedder], source: Source, outside: Sequence[Image.Image] | Source
) -> list[Embedded]:
    """Embed all pictures and captions by each model; each picture is decoded once."""
    image: dict[str, list[FloatArray]] = {name: [] for name in models}
    others: dict[str, list[FloatArray]] = {name: [] for name in models}
    captions = [text for index in range(len(source)) for text in source.captions(index)]
    with tqdm(
        total=len(source) + len(outside), desc="embed", unit="img", dynamic_ncols=True
    ) as bar:
        for parts, items in ((image, source), (others, outside)):
            for first in range(0, len(items), _BATCH):
                chunk = [items[at] for at in range(first, min(first + _BATCH, len(items)))]
                pictures = [item if isinstance(item, Image.Image) else item.image for item in chunk]
                for name, model in models.items():
                    parts[name].append(model.images(pictures))
                bar.update(len(chunk))
    return [
        Embedded(
            name,
            unit_rows(np.concatenate(image[name]), f"image embeddings of the {name}"),
            unit_rows(_texts(model, captions), f"text embeddings of the {name}"),
            unit_rows(np.concatenate(others[name]), "embeddings of pictures from outside")
            if others[name]
            else np.zeros((0, image[name][0].shape[1])),
            model.scale,
        )
        for name, model in models.items()
    ]


def _texts(model: Embedder, texts: Sequence[str]) -> FloatArray:
    size = 4 * _BATCH
    return np.concatenate(
        [model.texts(texts[first : first + size]) for first in range(0, len(texts), size)]
    )


@dataclass(frozen=True, slots=True, eq=False)
class Questions:
    """The words that pictures are asked about, and their prompts embedded by the teacher."""

    asked: tuple[ConceptQuestions, ...]
    texts: tuple[Values, ...]

    @classmethod
    def of(cls, teacher: DualEncoder, captions: Sequence[str], seed: int) -> "Questions":
        """Make the questions of captions, one of each picture, and embed them."""
        tokenizer = teacher.text_tokenizer
        limit = tokenizer.spec.context_length - 1  # another word may take one token more

        def fits(caption: str) -> bool:
            return tokenizer.token_counts([caption])[0] <= limit

        asked = concept_questions(captions, seed=seed, fits=fits)
        embedder = ModelEmbedder(teacher)
        texts = tuple(unit_rows(_texts(embedder, item.prompts), "prompts") for item in asked)
        return cls(asked, texts)


@dataclass(frozen=True, slots=True, eq=False)
class Answers:
    """What a model answers, computed once: the teacher's are compared with those of every other.

    Attributes:
        hits: R@1 of each picture, the mean of both directions, [N].
        separation: from pictures outside; None without two of these.
        choices: the word that each picture fits best, for each family; () for a model of another
            space.
    """

    hits: Values
    separation: Separation | None
    choices: tuple[NDArray[np.int64], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Measuring:
    """What all models are measured on.

    Attributes:
        relevance: which captions are right for which pictures.
        first: the place of each picture's first caption, int64 [N].
        groups: of pictures.
        questions: of words.
        in_space: names of the models in the teacher's space.
        seed: of every draw.
    """

    relevance: Relevance
    first: NDArray[np.int64]
    groups: tuple[Groups, ...]
    questions: Questions
    in_space: frozenset[str]
    seed: int

    @classmethod
    def of(
        cls,
        source: Source,
        groups: tuple[Groups, ...],
        questions: Questions,
        in_space: Iterable[str],
        seed: int,
    ) -> "Measuring":
        """Take captions and groups of a source, all of whose pictures have captions."""
        relevance = relevance_of(source)
        first = np.searchsorted(relevance.owner, np.arange(relevance.images))
        return cls(relevance, first, groups, questions, frozenset(in_space), seed)

    @property
    def distinct(self) -> NDArray[np.int64]:
        """The places of pictures' first captions, each of equal ones once, int64 [at most N]."""
        _, places = np.unique(self.relevance.group[self.first], return_index=True)
        found: NDArray[np.int64] = self.first[np.sort(places)]
        return found

    def qualities(self, models: Sequence[Embedded]) -> Iterator[DiagnosedModel]:
        """Measure the models one after the other, the teacher first."""
        teacher = models[0]
        exact = exact_of([model.name for model in models])
        known = {
            model.name: self._answers(model) for model in models if model.name in ("teacher", exact)
        }
        for model in models:
            ours = known.get(model.name) or self._answers(model)
            found = self._quality(model, teacher, ours, known["teacher"])
            if exact is not None and model.name not in ("teacher", "student", exact):
                found = replace(found, kept_of_exact=_kept(ours, known[exact]))
            yield found

    def _answers(self, model: Embedded) -> Answers:
        choices: tuple[NDArray[np.int64], ...] = ()
        if model.name == "teacher" or model.name in self.in_space:
            asked = zip(self.questions.asked, self.questions.texts, strict=True)
            choices = tuple(own.choices(model.image, texts) for own, texts in asked)
        hits = pair_ranks(model.image, model.text, self.relevance).hits(1)
        return Answers(hits, _separation(model), choices)

    def _quality(
        self, model: Embedded, teacher: Embedded, ours: Answers, theirs: Answers
    ) -> DiagnosedModel:
        """Measure one model; of the teacher what needs no other model."""
        is_teacher = model is teacher
        captions, distinct = model.text[self.first], self.distinct
        pairs = self._pairwise(len(model.image))
        image, text = model.image[pairs], captions[pairs]
        outside, lost = ours.separation, None
        if outside is not None and theirs.separation is not None and not is_teacher:
            lost = theirs.separation.above(outside).interval
        scores, confusions = self._words(ours, None if is_teacher else theirs)
        return DiagnosedModel(
            name=model.name,
            r1=estimate_share(ours.hits).interval,
            kept=None if is_teacher else _kept(ours, theirs),
            kept_of_exact=None,
            image=None if is_teacher else self._agreement(model, model.image, teacher.image),
            text=None
            if is_teacher or len(distinct) < LEAST_ITEMS
            else self._agreement(model, model.text[distinct], teacher.text[distinct]),
            gap=self._figure(lambda rows: modality_gap(image[rows], text[rows]), len(pairs), 0.0),
            alignment=estimate_mean(alignment(model.image, captions), least=0.0, most=4.0).interval,
            image_uniformity=self._figure(lambda rows: uniformity(image[rows]), len(pairs)),
            text_uniformity=self._figure(lambda rows: uniformity(text[rows]), len(pairs)),
            calibration=calibration(
                model.image, model.text, self.relevance, model.scale, seed=self.seed
            ),
            outside=None if outside is None else outside.estimate().interval,
            outside_lost=lost,
            concepts=scores,
            groups=() if is_teacher else group_quality(self.groups, ours.hits, theirs.hits),
            confusions=confusions,
        )

    def _pairwise(self, count: int) -> NDArray[np.int64]:
        if count <= _PAIRWISE:
            return np.arange(count)
        rng = np.random.default_rng(self.seed)
        return np.sort(rng.choice(count, _PAIRWISE, replace=False))

    def _figure(
        self, figure: Callable[[NDArray[np.int64]], float], count: int, least: float = -math.inf
    ) -> Interval:
        return jackknifed(figure, count, seed=self.seed, least=least).interval

    def _agreement(self, model: Embedded, ours: Values, theirs: Values) -> TowerAgreement:
        pairs = self._pairwise(len(ours))
        ours, theirs = ours[pairs], theirs[pairs]
        near = min(_NEIGHBOURS, len(pairs) - 2)
        shared = neighbour_agreement(ours, theirs, neighbours=near)
        information = gaussian_information(ours, theirs, seed=self.seed)
        found = TowerAgreement(
            cosine=None,
            told_apart=None,
            towards_mean=None,
            teacher_towards_mean=None,
            neighbours=estimate_mean(shared, most=1.0).interval,
            information=information,
        )
        if model.name not in self.in_space:
            return found
        mean = theirs.mean(axis=0)
        mean = mean / np.linalg.norm(mean)
        cosines = ours @ theirs.T
        own = np.diagonal(cosines)
        others = cosines - np.diag(np.full(len(pairs), np.inf))
        wins = (others < own[:, None] - TIE).sum(axis=1) - 1  # less the own one
        wins = wins / (len(pairs) - 1)
        return replace(
            found,
            cosine=estimate_mean(own, least=-1, most=1).interval,
            told_apart=estimate_mean(wins, least=0, most=1).interval,
            towards_mean=estimate_mean(ours @ mean, least=-1, most=1).interval,
            teacher_towards_mean=estimate_mean(theirs @ mean, least=-1, most=1).interval,
        )

    def _words(
        self, ours: Answers, theirs: Answers | None
    ) -> tuple[tuple[ConceptScore, ...], tuple[Confusion, ...]]:
        """The scores of words, judged by the teacher's texts; `theirs` is None for the teacher."""
        scores: list[ConceptScore] = []
        confusions: list[Confusion] = []
        for at, chosen in enumerate(ours.choices):
            asked = self.questions.asked[at]
            scores += _scores(asked, chosen, None if theirs is None else theirs.choices[at])
            if asked.family == "colour" and theirs is not None:
                confusions += self._confusions(asked, chosen, theirs.choices[at])
        return tuple(scores), tuple(confusions)

    def _confusions(
        self, asked: ConceptQuestions, ours: NDArray[np.int64], theirs: NDArray[np.int64]
    ) -> Iterable[Confusion]:
        """Find words that the pictures of a group have and are read as one other, by Holm."""
        found: list[tuple[Confusion, BoundTest]] = []
        for groups in self.groups:
            number = groups.number[asked.rows]
            for place, name in enumerate(groups.names):
                for word in range(len(asked.words)):
                    inside = (number == place) & (asked.right == word)
                    if inside.sum() < _CONFUSED:
                        continue
                    wrong = np.bincount(ours[inside], minlength=len(asked.words))
                    wrong[word] = -1  # also where no other word was chosen
                    read_as = int(wrong.argmax())
                    own, other = ours[inside] == read_as, theirs[inside] == read_as
                    more = estimate_loss(own, other)
                    confusion = Confusion(
                        column=groups.column,
                        group=name,
                        word=asked.words[word],
                        read_as=asked.words[read_as],
                        pictures=int(inside.sum()),
                        share=estimate_share(own).interval,
                        teacher=estimate_share(other).interval,
                        more=more.interval,
                    )
                    found.append((confusion, BoundTest((more,), "<=", 0.0)))
        outcomes = judge([test for _, test in found])
        return [
            item for (item, _), outcome in zip(found, outcomes, strict=True) if outcome == "failed"
        ]


def _kept(ours: Answers, reference: Answers) -> Interval | None:
    if not reference.hits.any():
        return None
    return estimate_kept(ours.hits, reference.hits).interval


def _separation(model: Embedded) -> Separation | None:
    if len(model.outside) < 2:
        return None
    return separation(*(_best(rows, model.text) for rows in (model.image, model.outside)))


def _best(rows: Values, texts: Values) -> Values:
    step = max(1, _AT_ONCE // len(texts))
    parts = [rows[start : start + step] for start in range(0, len(rows), step)]
    return np.concatenate([(part @ texts.T).max(axis=1) for part in parts])


def _scores(
    asked: ConceptQuestions, ours: NDArray[np.int64], theirs: NDArray[np.int64] | None
) -> Iterable[ConceptScore]:
    """The scores of a family, and of each of its words."""
    right = ours == asked.right
    reference = None if theirs is None else theirs == asked.right
    for number, word in ((-1, ""), *enumerate(asked.words)):
        inside = np.ones(len(right), np.bool_) if number < 0 else asked.right == number
        if inside.any():
            yield ConceptScore(
                family=asked.family,
                word=word,
                pictures=int(inside.sum()),
                right=estimate_share(right[inside]).interval,
                lost=None
                if reference is None
                else estimate_loss(reference[inside], right[inside]).interval,
            )


# Layers ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class LooksAt:
    """Where the last layer looks in the first pictures: maps [shown, rows, columns]."""

    pictures: tuple[Image.Image, ...]
    teacher: Values | None
    student: Values | None


def measure_layers(
    student: DualEncoder, teacher: DualEncoder, source: Source, *, in_space: bool, seed: int
) -> tuple[tuple[TowerLayers, ...], LooksAt]:
    """Look at the layers of both towers with `LAYER_ITEMS` pictures and their first captions."""
    rng = np.random.default_rng(seed)
    count = min(LAYER_ITEMS, len(source))
    rows = np.sort(rng.choice(len(source), count, replace=False)).tolist()
    pairs = [source[index] for index in rows]
    pictures, captions = [pair.image for pair in pairs], [pair.caption or "" for pair in pairs]
    towers = []
    seen: list[Attention | None] = []
    both: tuple[Tower, Tower] = ("image", "text")
    for tower in both:
        runs = [_tower_run(model, tower, pictures, captions) for model in (student, teacher)]
        found, looked = _tower_layers(*runs, in_space=in_space, seed=seed)
        towers += [] if found is None else [found]
        seen = seen or list(looked)
    maps = [None if own is None else own.maps for own in seen]
    return tuple(towers), LooksAt(tuple(pictures[:SHOWN]), maps[1], maps[0])


def _tower_run(
    model: DualEncoder, tower: Tower, pictures: Sequence[Image.Image], captions: Sequence[str]
) -> TowerRun:
    inputs = model.preprocess(pictures) if tower == "image" else model.tokenize(captions)
    return TowerRun(model, tower, inputs)


def _tower_layers(
    ours: TowerRun, theirs: TowerRun, *, in_space: bool, seed: int
) -> tuple[TowerLayers | None, tuple[Attention | None, Attention | None]]:
    """Compare the layers of a student's tower with its teacher's."""
    mine, other = (attention(run, shown=SHOWN) for run in (ours, theirs))
    layers, teacher_layers = find_layers(ours), find_layers(theirs)
    if not layers or not teacher_layers:
        return None, (mine, other)
    states, reference = hidden_states(ours, layers), hidden_states(theirs, teacher_layers)
    cka = linear_cka(states, reference, seed=seed)
    gains = _gains(ours, theirs, layers) if in_space else None
    harmful = [False] * len(layers)
    if gains is not None:
        harmful = [
            outcome == "failed" for outcome in judge([BoundTest((g,), "<=", 0.0) for g in gains])
        ]
    noise = are_noise(layers, seed=seed)
    figures = []
    for at in range(len(layers)):
        best, value = cka.best(at)
        figures.append(
            LayerFigures(
                number=at + 1,
                best=best + 1,
                cka=value.interval,
                cosine=_cosine(states[at], reference[best]),
                noise=noise[at],
                gain_without=None if gains is None else gains[at].interval,
                does_harm=harmful[at],
            )
        )
    found = TowerLayers(
        tower=ours.tower,
        items=len(ours.inputs),
        layers=tuple(figures),
        cka=_rows(cka.values),
        entropy=None if mine is None else _rows(mine.entropy),
        teacher_entropy=None if other is None else _rows(other.entropy),
    )
    return found, (mine, other)


def _gains(ours: TowerRun, theirs: TowerRun, layers: Sequence[nn.Module]) -> list[MeanEstimate]:
    """What the cosine to the teacher's embedding gains by leaving out each layer, paired."""
    target = embed_without(theirs, ())
    whole = np.einsum("nd,nd->n", embed_without(ours, ()), target)
    with progress_bar(f"layers of the {ours.tower} tower") as progress:
        found = without_each(ours, layers, target, progress)
    return [estimate_mean(own - whole, least=-2, most=2) for own in found]


def _cosine(states: Values, reference: Values) -> Interval | None:
    if states.shape != reference.shape:
        return None
    lengths = np.linalg.norm(states, axis=1) * np.linalg.norm(reference, axis=1)
    found = np.einsum("nd,nd->n", states, reference) / np.maximum(lengths, 1e-300)
    return estimate_mean(found, least=-1, most=1).interval


def _rows(values: Values) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(round(float(value), 6) for value in row) for row in values)
