"""Train the built-in teacher, a CLIP and its tokenizer, from scratch on EmojiScenes."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from edgeclip.compress.compute import best_device
from edgeclip.compress.data.emoji_scenes import Drawing
from edgeclip.compress.data.sources import EmojiSource, captions_of
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.compress.train.batch_losses import embed_batch
from edgeclip.compress.train.distillation_batches import caption_keys
from edgeclip.compress.train.loss_terms import contrastive_loss, equal_captions
from edgeclip.compress.train.train_loop import (
    Batch,
    BatchPart,
    Rows,
    TrainSettings,
    TrainTask,
    train,
)
from edgeclip.runtime.errors import ConfigError
from edgeclip.runtime.inputs.preprocess import crop_batch
from edgeclip.runtime.spec import ImageSpec

_BOS, _EOS, _PAD = "<|startoftext|>", "<|endoftext|>", "<|pad|>"


def train_tokenizer(
    texts: Iterable[str], *, vocab_size: int, context_length: int
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, lower case, `bos text eos`, like CLIP's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_BOS, _EOS, _PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_BOS} $A {_EOS}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (_BOS, _EOS)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=_BOS,
        eos_token=_EOS,
        pad_token=_PAD,
        model_max_length=context_length,
    )


_MAX_LOGIT_SCALE = 4.6052  # ln 100, as CLIP clips it


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherShape:
    """Sizes of a CLIP with plain transformer towers; heads are `head_size` wide."""

    image_size: int = 64
    patch_size: int = 8
    image_width: int = 256
    image_layers: int = 8
    text_width: int = 256
    text_layers: int = 3
    head_size: int = 64
    dim: int = 256
    vocab_size: int = 2048
    context_length: int = 40

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"image_size {self.image_size} is no multiple of patch_size {self.patch_size}"
            )
        for name, width in (("image_width", self.image_width), ("text_width", self.text_width)):
            if width % self.head_size:
                raise ConfigError(f"{name} {width} is no multiple of head_size {self.head_size}")


def new_teacher(shape: TeacherShape, *, seed: int, drawing: Drawing = "colour") -> DualEncoder:
    """Make an untrained teacher, with a tokenizer trained on 20,000 captions."""
    captions = EmojiSource("train", 20_000, size=shape.image_size, seed=seed, drawing=drawing)
    tokenizer = train_tokenizer(
        (captions.caption(index) for index in range(len(captions))),
        vocab_size=shape.vocab_size,
        context_length=shape.context_length,
    )
    config = CLIPConfig(
        projection_dim=shape.dim,
        vision_config={
            "image_size": shape.image_size,
            "patch_size": shape.patch_size,
            **_tower(shape.image_width, shape.image_layers, shape),
        },
        text_config={
            "vocab_size": len(tokenizer),
            "max_position_embeddings": shape.context_length,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            **_tower(shape.text_width, shape.text_layers, shape),
        },
    )
    torch.manual_seed(seed)
    half = (0.5, 0.5, 0.5)
    image = ImageSpec(size=shape.image_size, resize=shape.image_size, mean=half, std=half)
    return DualEncoder(CLIPModel(config), image, tokenizer)


def _tower(width: int, layers: int, shape: TeacherShape) -> dict[str, int]:
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // shape.head_size,
        "projection_dim": shape.dim,
    }


def pretrain(
    shape: TeacherShape, settings: TrainSettings, out: Path, *, drawing: Drawing = "colour"
) -> DualEncoder:
    """Train a teacher with the contrastive loss on scenes that are never shown twice.

    Checkpoints and `log.jsonl` go to `out`; a run that was stopped goes on from there.
    Returns the trained teacher; the caller saves it.
    """
    teacher = new_teacher(shape, seed=settings.seed, drawing=drawing).to(best_device())
    count = settings.steps * settings.batch_size
    source = EmojiSource("train", count, size=shape.image_size, seed=settings.seed, drawing=drawing)

    def batch(part: BatchPart) -> Batch:
        size = settings.batch_size // part.count
        first = part.step * settings.batch_size + part.number * size
        chunk = range(first, first + size)
        crops = crop_batch([source[index].image for index in chunk], teacher.image_spec)
        ids = teacher.text_tokenizer.encode(captions_of(source, chunk), truncate=True)
        inputs = {"pixels": torch.from_numpy(crops), "ids": torch.from_numpy(ids)}
        targets = {"caption": torch.from_numpy(caption_keys(ids, teacher.spec.text.pad_id))}
        return Batch(inputs=inputs, targets=targets)

    def embed(inputs: Rows) -> Rows:
        scale = teacher.logit_scale.clamp(max=_MAX_LOGIT_SCALE).exp()
        found = embed_batch(teacher, inputs)
        return {**found, "scale": scale.expand(len(found["image"]))}

    def losses(found: Rows, targets: Rows) -> dict[str, Tensor]:
        same, scale = equal_captions(targets["caption"]), found["scale"].mean()
        return {"total": contrastive_loss(found["image"], found["text"], scale, same)}

    task = TrainTask(
        title="pretrain",
        module=teacher,
        batch=batch,
        embed=embed,
        losses=losses,
        # Without the number of scenes, which grows with that of steps.
        identity=f"pretrain {source.of_world} {sorted(asdict(shape).items())}",
    )
    train(task, settings, out)
    return teacher
