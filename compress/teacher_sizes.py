"""What sizes a teacher has, read from its configuration alone; and how large its students are."""

from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, CLIPConfig, CLIPTextConfig, CLIPVisionConfig

from edgeclip.profiles.errors import ConfigError
from edgeclip.runtime.errors import first_line
from edgeclip.runtime.predicting.tower_pieces import (
    CONV_PATCH,
    AnyTower,
    ConvTower,
    TransformerTower,
    image_tokens,
)
from edgeclip.runtime.spec import Tower


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherSizes:
    """Both towers of a CLIP, as far as their sizes go.

    Attributes:
        image, text: the towers; `tokens` of the text tower is the whole context.
        image_size: side of a picture in pixels.
        vocab_size: token vectors of the text tower.
    """

    image: TransformerTower
    text: TransformerTower
    image_size: int
    vocab_size: int

    @classmethod
    def read(cls, source: str | Path) -> "TeacherSizes":
        """Read `config.json` of a directory or hub id; no weights are loaded.

        Raises:
            ConfigError: not found, or not a CLIP.
        """
        try:
            config = AutoConfig.from_pretrained(source)
        except Exception as error:  # transformers raises many kinds on damaged files
            raise ConfigError(
                f"cannot read the configuration of the teacher {source}: {first_line(error)}"
            ) from error
        if not isinstance(config, CLIPConfig):
            raise ConfigError("only a CLIP model can be a teacher of students so far")
        vision, text = config.vision_config, config.text_config
        assert isinstance(vision, CLIPVisionConfig)
        assert isinstance(text, CLIPTextConfig)
        size, patch = _whole(vision.image_size), _whole(vision.patch_size)
        dim, tokens = _whole(config.projection_dim), image_tokens(size, patch)
        return cls(
            image=_tower("image", vision, tokens, dim, patch),
            text=_tower("text", text, int(text.max_position_embeddings), dim, 0),
            image_size=size,
            vocab_size=int(text.vocab_size),
        )

    def tower(self, part: Tower) -> TransformerTower:
        """One of the two."""
        return self.image if part == "image" else self.text

    def parameters(self, tower: AnyTower) -> int:
        """Weights of a tower of this teacher or of a student, projection included."""
        if isinstance(tower, ConvTower):
            return _conv_parameters(tower)
        width, hidden = tower.width, tower.hidden
        layer = 4 * (width**2 + width) + 2 * width * hidden + hidden + width + 4 * width
        around = 2 * width + width * tower.dim
        if tower.part == "image":
            before = width * (3 * tower.patch**2 + 1 + tower.tokens + 2)
        else:
            before = width * (self.vocab_size + self.text.tokens)
        return before + tower.layers * layer + around


def _whole(value: object) -> int:
    if not isinstance(value, int):
        raise ConfigError(
            f"config.json has {value} where one whole number is needed: only square pictures and "
            "patches can be planned"
        )
    return value


def _tower(
    part: Tower, config: CLIPVisionConfig | CLIPTextConfig, tokens: int, dim: int, patch: int
) -> TransformerTower:
    return TransformerTower(
        part=part,
        width=int(config.hidden_size),
        heads=int(config.num_attention_heads),
        hidden=int(config.intermediate_size),
        layers=int(config.num_hidden_layers),
        tokens=tokens,
        dim=dim,
        patch=patch,
        gelu=config.hidden_act != "quick_gelu",
    )


def _conv_parameters(tower: ConvTower) -> int:
    first, last = tower.widths[0], tower.widths[-1]
    count = first * (3 * CONV_PATCH**2 + 1 + 2) + 2 * last + last * tower.dim
    for before, width in zip(tower.widths, tower.widths[1:], strict=False):
        count += 2 * before + 4 * before * width + width
    for width, depth in zip(tower.widths, tower.depths, strict=True):
        count += depth * (8 * width**2 + (49 + 1 + 2 + 4 + 1) * width)
    return count
