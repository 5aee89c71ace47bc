"""`edgeclip distill`: train a student in the teacher's embedding space."""

import argparse
import dataclasses
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgeclip.compress.built_in import model_source
from edgeclip.compress.cli.options import add_strict, max_bad
from edgeclip.compress.data.sampling import MOST_HELD_OUT
from edgeclip.compress.processes import is_helper, processes, silence_helpers
from edgeclip.compress.teachers.dual_encoder import MARKER
from edgeclip.compress.train.curves import write_curves
from edgeclip.compress.train.losses import TERMS
from edgeclip.compress.train.recipe import SECTIONS, DistillRecipe, load_recipe
from edgeclip.compress.train.run_recipe import prepare_run
from edgeclip.runtime.bundle.files import check_target, require_space
from edgeclip.runtime.cli.options import Targets
from edgeclip.runtime.errors import ConfigError
from edgeclip.runtime.inputs.find_images import add_max_bad_option

_HELP = {
    "teacher": "directory or hub id of a dual encoder; may be given several times: the student "
    "lives in the space of the first, and mimics the mean similarity of all",
    "data": "emoji, a folder of pictures, WebDataset shards, or data of Hugging Face, see "
    "docs/data.md; may be given several times, each with =WEIGHT behind it",
    "count": "number of built-in scenes",
    "keep": "train on the pictures of this list alone; `edgeclip data-report` writes one",
    "translations": "CSV table with the columns caption and translation: the student reads a "
    "caption or one of its translations, and learns the teacher's embedding of the caption",
    "views": "augmented views of each picture (default: those of an existing cache, else 1)",
    "held_out": "pictures that are not trained on, but tell whether student and teacher agree; "
    f"the student is kept as it was when they agreed best (default: a tenth, at most "
    f"{MOST_HELD_OUT})",
    "start": "begin with this dual encoder, such as a TinyCLIP, in place of a part of the teacher",
    "dims": "lengths, such as 128,64, that embeddings can be cut to: the losses count for each of "
    "them as well, and the student keeps the axes by which any embedding of the space is cut",
    "family": "the image tower: a smaller copy of the teacher's, or one of random weights, where "
    "convolutional is a ConvNeXt",
    "image_heads": "attention heads of the image tower (default: half of the teacher's)",
    "image_layers": "layers of the image tower (default: half of the teacher's)",
    "text_heads": "attention heads of the text tower (default: half of the teacher's)",
    "text_layers": "layers of the text tower (default: half of the teacher's)",
    "whole_text": "begin with the teacher's whole text tower",
    "image_size": "side of the student's pictures in pixels (default: the teacher's)",
    "patch_size": "side of the image tower's patches in pixels (default: the teacher's)",
    "inherit": "what a smaller tower takes of the teacher's: the leading heads, channels, neurons "
    "and every so many layers, those selected by importance, these mapped by a learned linear map, "
    "or nothing (random)",
    "mapping_steps": "steps in which the map is learned, before those of --steps",
    "conv_widths": "channels of each stage of an image tower of random weights (default: those "
    "of its family, see docs/compression.md)",
    "conv_depths": "blocks of each stage of such a tower (likewise)",
    "merge_after": "layers of the image tower, counted from 1, after which four neighbouring "
    "patches become one token",
    "text_tokenizer": "what the student reads texts as: the teacher's tokens, or bytes, for any "
    "language and a small table",
    "vocabulary": "keep of the teacher's tokens those of this file alone, one text per line; see "
    "`edgeclip prune-vocabulary`",
    "token_rank": "numbers of a token in the table of token embeddings, which one matrix makes as "
    "wide as the tower (default: as wide)",
    **dict.fromkeys(TERMS, "weight of this loss"),
    "affinity_scale": "factor on each teacher's logit scale in the affinity loss, or one for all",
    "row_weights": "rows of the affinity and interactive losses count as much as the teacher knows "
    "of them, or all the same",
    "row_focus": "exponent by which those rows count more that the student gets wrong",
    "bank": "captions of the cache that are compared with each picture beside those of its batch",
    "hard_count": "hard negatives of each picture",
    "logit_temperature": "of the logit loss",
    "selection": "train on the best of some candidates each: the pair that the teacher knows best, "
    "or that the student has most to learn of, which embeds all of them",
    "candidates": "pairs that each is chosen of",
    "mask_share": "share of a picture that the masked loss hides",
    "steps": "may be raised for a run that has ended: its learning rate then goes on as in a run "
    "of so many steps",
    "batch_size": "pictures of a step, over all processes",
    "optimizer": "AdamW for all weights, or Muon for the matrices of linear layers",
    "learning_rate": "that of AdamW at its highest, after the warm-up",
    "matrix_rate": "that of Muon",
    "schedule": "how the learning rates fall",
    "final_rate": "share of the learning rate at the last step",
    "weight_decay": "of matrices",
    "warmup_steps": "steps in which the learning rate rises",
    "clip_norm": "the largest norm of the gradient",
    "seed": "of the order of the data, and of what a student does not inherit",
    "compute": "number format of products; auto is bfloat16 where the hardware has it",
    "accumulate": "parts that a batch is embedded in, one after the other: less memory, more time",
    "gradient_checkpointing": "compute activations again in the backward pass: likewise",
    "compile": "compile the towers with torch.compile",
    "ema": "decay of the moving average of the weights, which is then what is kept",
    "validations": "how often student and teacher are compared",
    "patience": "end after so many comparisons without a better one; 0 for never",
    "checkpoint_seconds": "time between two checkpoints",
    "workers": "processes that read pictures (default: 1, with a GPU up to 8)",
    "track": "send losses to a tracker, such as tensorboard, wandb, trackio or mlflow",
}
_SHOWN = {
    "teacher": "the built-in one",
    "data": "emoji, the built-in scenes",
    "track": "none",
    "merge_after": "none",
    "dims": "none",
}
_REPEATED = ("teacher", "data", "track")  # options that are given once for each value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--out", type=Path, required=True, help="directory of the student")
    parser.add_argument(
        "--run", type=Path, help="directory of checkpoints and log (default: OUT-run)"
    )
    parser.add_argument(
        "--cache",
        type=Path,
        help="directory of the teacher cache, made if missing (default: RUN/cache)",
    )
    parser.add_argument(
        "--recipe",
        help="name or YAML file of settings, which options here replace; `edgeclip recipes` lists "
        "those that come with it, and every run writes its own, RUN/recipe.yaml",
    )
    add_settings(parser)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add an option for every setting of a recipe, `--strict` and `--max-bad`."""
    add_strict(parser)
    add_max_bad_option(parser)
    for name, hint, default in _settings():
        _add_setting(parser, name, hint, default)


def _settings() -> Iterator[tuple[str, Any, Any]]:
    """Yield the name, type and default of every setting of a recipe."""
    whole = DistillRecipe()
    for made in (whole, *(getattr(whole, name) for name in SECTIONS)):
        hints = typing.get_type_hints(type(made))  # without the bounds, which `parse` checks
        for item in dataclasses.fields(made):
            if item.name not in (*SECTIONS, "stages"):
                yield item.name, hints[item.name], getattr(made, item.name)


def _add_setting(parser: argparse.ArgumentParser, name: str, hint: Any, default: Any) -> None:
    """Add an option of a setting; None, its default here, leaves it to the recipe."""
    told = _HELP[name]
    if default is not None and default is not False:
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        told += f" (default: {_SHOWN.get(name, shown)})"
    option = f"--{name.replace('_', '-')}"
    if hint is bool:
        parser.add_argument(
            option, action=argparse.BooleanOptionalAction, default=None, help=_HELP[name]
        )
        return
    plain = next((one for one in typing.get_args(hint) if one is not type(None)), hint)
    if typing.get_origin(hint) is typing.Literal:
        parser.add_argument(option, choices=typing.get_args(hint), help=told)
    elif name in _REPEATED:
        parser.add_argument(option, action="append", help=told)
    elif name == "dims":
        parser.add_argument(option, type=_lengths, help=told)
    elif typing.get_origin(plain) is tuple or typing.get_origin(hint) is tuple:
        kind = next(iter(typing.get_args(plain)), plain)
        parser.add_argument(option, type=kind, nargs="+", help=told)
    else:
        parser.add_argument(option, type=plain, help=told)


def _lengths(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(length) for length in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not a list such as 128,64") from None


def targets(args: argparse.Namespace) -> Targets:
    """Return what the command writes."""
    if not args.out.name or is_helper():  # refused below; the first process writes
        return Targets()
    folder = _run_folder(args)
    cache = args.cache or folder / "cache"
    return Targets(directories=(args.out,), folders=(folder,), shared=(cache,))


def _run_folder(args: argparse.Namespace) -> Path:
    folder: Path = args.run or args.out.with_name(args.out.name + "-run")
    return folder


def run(args: argparse.Namespace) -> int:
    """Cache, distil and save; a run that was stopped goes on where it was."""
    silence_helpers()
    recipe = recipe_of(args)
    _refuse_teachers_as_output(recipe, args.out)
    check_target(args.out, replace=True, marker=MARKER)
    folder = _run_folder(args)
    prepared = prepare_run(
        recipe, run=folder, cache=args.cache, strict=args.strict, max_bad=max_bad(args)
    )
    require_space(args.out, prepared.weight_bytes)
    end = prepared.train()
    if not processes().is_first:
        return 0
    end.student.save(args.out)
    shown = ""
    for number, stage in enumerate(end.stages, 1):
        where = f"stage {number}: " if recipe.stages else ""
        if stage.best is not None:
            print(
                f"{where}held-out pictures: {stage.best.validation.says} at step "
                f"{stage.best.step} of {stage.steps}, which is kept"
            )
        title = f"Training of {args.out.name}" + (f", stage {number}" if recipe.stages else "")
        curves = write_curves(stage.run, title=title)
        shown = "" if curves is None else f"; curves in {curves}"
    print(f"student written to {args.out}; log, checkpoints and recipe in {folder}{shown}")
    return 0


def recipe_of(args: argparse.Namespace, *, command: str = "distill") -> DistillRecipe:
    """Return the recipe of `args.recipe` with the options of the command line in it."""
    given = {name: getattr(args, name) for name, _, _ in _settings()}
    given = {name: value for name, value in given.items() if value is not None}
    recipe = load_recipe(args.recipe) if args.recipe else DistillRecipe()
    return recipe.replaced(given, source=f"edgeclip {command}: the command line")


def _refuse_teachers_as_output(recipe: DistillRecipe, out: Path) -> None:
    """Refuse an `--out` that would replace the directory of a teacher, or of what to start from.

    Raises:
        ConfigError: `--out` is that directory, or holds it.
    """
    teachers = [name for own in recipe.stage_recipes() for name in own.teacher]
    for name in (*teachers, recipe.start):
        folder = Path(model_source(name or ""))
        if name and folder.is_dir() and folder.resolve().is_relative_to(out.resolve()):
            raise ConfigError(
                f"--out {out} would replace the teacher {folder}: choose another directory"
            )
