"""Distil a student: train it to reproduce the teacher's cached embeddings."""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import nn

from edgeclip.compress.compute import fused_attention
from edgeclip.compress.data.mixture import parts_of
from edgeclip.compress.data.sampling import Sampling
from edgeclip.compress.data.sources import Source
from edgeclip.compress.processes import processes
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.compress.teachers.own_settings import own_settings
from edgeclip.compress.teachers.teacher_cache import TeacherCache
from edgeclip.compress.train.batch_losses import (
    batch_losses,
    embed_batch,
    length_cuts,
    most_learnable,
)
from edgeclip.compress.train.distillation_batches import DistillationBatches
from edgeclip.compress.train.held_out import HeldOut
from edgeclip.compress.train.kept_weights import BestStep, Validation
from edgeclip.compress.train.losses import LossWeights
from edgeclip.compress.train.text_bank import BankReader, TextBank
from edgeclip.compress.train.train_loop import (
    TrainSettings,
    TrainTask,
    check_batch_norm,
    train,
)
from edgeclip.runtime.errors import ConfigError
from edgeclip.runtime.inputs.find_images import DEFAULT_MAX_BAD, MaxBad, report_bad

_log = logging.getLogger(__name__)

_TRAINED_PER_HELD_OUT = 4  # pictures to train on, at least, for each that is validated


def distill(
    student: DualEncoder,
    caches: TeacherCache | Sequence[TeacherCache],
    source: Source,
    *,
    loss_weights: LossWeights,
    settings: TrainSettings,
    out: Path,
    held_out: int | None = None,
    max_bad: MaxBad = DEFAULT_MAX_BAD,
    start: str = "",
    begin: Callable[[], None] = lambda: None,
) -> BestStep | None:
    """Train `student` in place; write checkpoints and `log.jsonl` to `out`.

    `held_out` pictures (default: see `Sampling`) are not trained on: on them student and teacher
    are compared while training goes on, and the student ends as it was where they agreed best.
    Returns that step; None if nothing is held out.

    With `student.basis` the losses are the mean of those of the full embeddings and those of each
    length that it cuts to (Matryoshka representation learning, Kusupati et al., NeurIPS 2022),
    student and first teacher cut alike; other teachers' similarities stay those of their space. The
    losses of masked pictures and of patches count at the full length alone.

    Pictures without captions train the image tower alone, by the feature loss. If none has a
    caption, the text tower is frozen. It should be the teacher's unmodified text tower; this is
    not checked here.

    Args:
        caches: the embeddings of one teacher or several; the student lives in the space of the
            first. See `affinity_loss` for what the others do.
        start: names the model that the student was, if it is no part of the teacher; resuming with
            another is refused.
        begin: see `TrainTask`.

    Raises:
        ConfigError: a cache was made from other data than `source`, the student's embeddings have
            another length than the first teacher's, nothing teaches pictures without captions, or
            a loss is one that the teachers cannot teach.
    """
    caches = [caches] if isinstance(caches, TeacherCache) else list(caches)
    first = caches[0].settings
    for cache in caches:
        if cache.settings.source != source.identity:
            raise ConfigError(f"the teacher cache was made from other data than {source.name}")
    if first.dim != student.spec.dim:
        raise ConfigError(
            f"the teacher embeds to {first.dim} numbers, the student to "
            f"{student.spec.dim}: they must share one space"
        )
    if len({(own.settings.views, own.settings.augmentation) for own in caches}) > 1:
        raise ConfigError(
            "the teachers' caches hold other views of the pictures: make them with the same --views"
        )
    loss_weights.check([own.settings.logit_bias for own in caches])
    check_batch_norm(student, settings, processes(), masked=loss_weights.masked > 0)
    if not first.captions:
        if loss_weights.selection != "none":
            raise ConfigError("--selection needs captions, which these pictures have not")
        if not loss_weights.feature:
            raise ConfigError(
                f"{source.name}: pictures without captions learn by --feature alone, whose weight "
                "is 0: choose one above 0"
            )
        prefixes = student.tower_parts("text")
        for name, weight in student.named_parameters():
            weight.requires_grad_(weight.requires_grad and not name.startswith(prefixes))
    sampling = Sampling(parts_of(source), seed=settings.seed, held_out=held_out)
    if settings.batch_size > sampling.train_count:
        _log.warning(
            "a batch of %d is more than the %d pictures to train on, and holds them several times: "
            "choose a smaller --batch-size",
            settings.batch_size,
            sampling.train_count,
        )
    patch_map = _patch_map(student, caches[0], loss_weights, settings.seed)
    hide = loss_weights.mask_share if loss_weights.masked else 0.0
    reader = _bank_reader(loss_weights.bank, caches, sampling, settings.batch_size)
    bank = None if reader is None else TextBank(reader, student.device)
    validate = None
    if len(sampling.held_out):
        validate = _Later(
            lambda: HeldOut(student, caches[0], source, sampling.held_out, compute=settings.compute)
        )
    else:
        _log.info(
            "none of %d pictures is held out, so nothing tells whether student and teacher agree "
            "on others",
            len(source),
        )
    switch_off_dropout(student)
    if settings.gradient_checkpointing:
        student.checkpoint_gradients()
    seldom = _TRAINED_PER_HELD_OUT * len(sampling.held_out) // settings.batch_size
    task = TrainTask(
        title="distill",
        module=student if patch_map is None else _Taught(student, patch_map),
        batch=DistillationBatches(
            student,
            caches,
            source,
            sampling,
            settings,
            bank=reader,
            hide=hide,
            patches=0 if patch_map is None else _patches_of(student)[0],
            selection=loss_weights.selection,
            candidates=loss_weights.candidates,
        ),
        embed=partial(embed_batch, student, patch_map=patch_map),
        losses=partial(
            batch_losses, loss_weights, [own.settings for own in caches], bank, length_cuts(student)
        ),
        identity=_identity(student, caches, loss_weights, source, len(sampling.held_out), start),
        begin=begin,
        validate=validate,
        validate_every=seldom,
        note_bad=_BadPictures(len(source), max_bad),
        choose=(
            partial(most_learnable, loss_weights.candidates)
            if loss_weights.selection == "learnable"
            else None
        ),
        not_chosen_by=("hidden",),
    )
    with fused_attention(student.model, student.device):
        return train(task, settings, out)


def _bank_reader(
    wanted: int, caches: Sequence[TeacherCache], sampling: Sampling, batch_size: int
) -> BankReader | None:
    """Return what reads the captions of a bank; None if none is wanted.

    Raises:
        ConfigError: there are no captions, or none beside those of a batch.
    """
    if not wanted:
        return None
    if not caches[0].settings.captions:
        raise ConfigError("--bank needs captions, which these pictures have not: leave it out")
    size = min(wanted, sampling.train_count - batch_size)
    if size < 1:
        raise ConfigError(
            f"a batch of {batch_size} leaves none of {sampling.train_count} captions for the "
            "--bank: choose a smaller --batch-size, or leave it out"
        )
    if size < wanted:
        _log.info("the bank holds the %d captions that a batch leaves of all", size)
    return BankReader(caches, sampling, size)


def switch_off_dropout(module: nn.Module) -> None:
    """Leave no activation to chance, so that the parts of a batch and its whole give the same.

    A student is taught what its teacher answers without dropout; BERT's towers have some.
    """
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        for name in ("dropout", "attention_dropout", "dropout_prob", "drop_prob"):
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, 0.0)


class _Later:
    """Makes a validation when it is first asked for, which the first process alone is."""

    def __init__(self, make: Callable[[], HeldOut]) -> None:
        self._make = make
        self._made: HeldOut | None = None

    def __call__(self) -> Validation:
        self._made = self._made or self._make()
        return self._made()


class _Taught(nn.Module):
    """A student with the map that is trained beside it, and is no part of it when it is saved."""

    def __init__(self, student: DualEncoder, patch_map: nn.Linear) -> None:
        super().__init__()
        self.student = student
        self.patch_map = patch_map


def _patch_map(
    student: DualEncoder, cache: TeacherCache, weights: LossWeights, seed: int
) -> nn.Linear | None:
    """Return a map from the student's patches to the teacher's; None without a loss of them.

    Raises:
        ConfigError: the cache holds no patches.
    """
    if not weights.patches:
        return None
    if not cache.has_patches:
        raise ConfigError("--patches needs a teacher cache that was opened with patches")
    readable = next(own for own in range(cache.settings.count) if own not in cache.unreadable)
    theirs = cache.patches([readable]).shape[-1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(_patches_of(student)[1], theirs).to(student.device)


def _patches_of(student: DualEncoder) -> tuple[int, int]:
    """Return how many patches the student's image tower has, and their width."""
    size = student.image_spec.size
    was_training = student.training
    student.eval()
    with torch.inference_mode():
        black = torch.zeros(1, 3, size, size, device=student.device)
        _, count, width = student.embed_image_and_patches(black)[1].shape
    student.train(was_training)
    return count, width


class _BadPictures:
    """Names each picture once that can no longer be read, though it could when it was cached."""

    def __init__(self, count: int, limit: MaxBad) -> None:
        self._count, self._limit = count, limit
        self._reasons: dict[int, str] = {}

    def __call__(self, bad: dict[int, str]) -> None:
        """Note bad pictures by their index.

        Raises:
            InputError: there are more of them than may be.
        """
        for index, reason in bad.items():
            if reason and index not in self._reasons:
                self._reasons[index] = reason
                _log.warning("left out of training: %s", reason)
        if len(self._reasons) > self._limit.allowed(self._count):
            report_bad(list(self._reasons.values()), self._count, self._limit)


def _identity(
    student: DualEncoder,
    caches: Sequence[TeacherCache],
    weights: LossWeights,
    source: Source,
    held_out: int,
    start: str,
) -> str:
    """Return the identity of a run.

    The full model config is not part of it, because it contains the teacher's path and a date. The
    input contract is: a convolutional tower has the same weights for pictures of any size.
    """
    sizes = {name: list(value.shape) for name, value in student.model.state_dict().items()}
    settings = [asdict(own.settings) for own in caches]
    shares = [part.weight for part in parts_of(source)]
    basis = student.basis
    cut = (
        ""
        if basis is None
        else f" to {basis.lengths} by {hashlib.sha256(basis.axes.tobytes()).hexdigest()}"
    )
    model = student.model.config.model_type
    inputs = (asdict(student.image_spec), asdict(student.spec.text))
    own = own_settings(student.model.config)  # some change no weight
    changed = f" with {json.dumps(own)}" if own else ""
    settings_text = json.dumps(
        (settings, model, sizes, inputs, asdict(weights), shares, held_out, start),
        sort_keys=True,
    )
    return f"distill {settings_text}{cut}{changed}"
