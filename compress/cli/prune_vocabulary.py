"""`edgeclip prune-vocabulary`: leave a text tower the tokens of a corpus alone.

A text of the corpus keeps its embedding bit by bit; any other text becomes more and smaller tokens.
Indexes and label sets of the model stay valid.
"""

import argparse
import logging
from pathlib import Path

from edgeclip.compress.built_in import model_source
from edgeclip.compress.students.vocabulary import TokenChange, compare_tokens, prune_vocabulary
from edgeclip.compress.teachers.dual_encoder import MARKER, DualEncoder
from edgeclip.runtime.bundle.files import check_target, require_space
from edgeclip.runtime.cli.options import Targets
from edgeclip.runtime.console import megabytes, percent
from edgeclip.runtime.errors import ConfigError
from edgeclip.runtime.inputs.text_files import read_lines

_log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("model", help="directory or hub id of a student, or of any dual encoder")
    parser.add_argument(
        "--texts",
        type=Path,
        action="append",
        required=True,
        help="a file with one text per line, whose embeddings stay exactly the same; may be given "
        "several times",
    )
    parser.add_argument(
        "--compare",
        type=Path,
        help="a file of other texts: tell how many of them get other tokens (default: none)",
    )
    parser.add_argument("--out", type=Path, required=True, help="directory of the pruned model")


def targets(args: argparse.Namespace) -> Targets:
    """Return what the command writes."""
    return Targets(directories=(args.out,))


def run(args: argparse.Namespace) -> int:
    """Prune, check every text, save."""
    source = Path(args.model)
    if source.is_dir() and source.resolve().is_relative_to(args.out.resolve()):
        raise ConfigError(f"--out {args.out} would replace {source}: choose another directory")
    check_target(args.out, replace=True, marker=MARKER)
    texts = list(dict.fromkeys(line for path in args.texts for line in read_lines(path)))
    others = [] if args.compare is None else read_lines(args.compare)
    dual = DualEncoder.load(model_source(args.model))
    pruned = prune_vocabulary(dual, texts)
    require_space(args.out, pruned.weight_bytes)
    pruned.save(args.out)
    before, after = (own.spec.text.vocab_size for own in (dual, pruned))
    saved = dual.weight_bytes - pruned.weight_bytes
    if before == after:
        _log.warning("%s uses every token of the vocabulary: nothing was saved", args.model)
    print(
        f"{after:,} of {before:,} tokens kept: {megabytes(pruned.weight_bytes)} of weights in "
        f"float32, {megabytes(saved)} less ({percent(saved / dual.weight_bytes)})"
    )
    print(f"all {len(texts):,} different texts have the tokens and embeddings of before")
    if others:
        print(_told(args.compare, compare_tokens(dual, pruned, others)))
    print(f"written to {args.out}, in the embedding space of {args.model}")
    return 0


def _told(path: Path, found: TokenChange) -> str:
    return (
        f"{path}: {found.same:,} of {found.texts:,} texts "
        f"({percent(found.same / found.texts)}) have the tokens of before; all have "
        f"{found.after:,} tokens in place of {found.before:,}, {found.unknown_after:,} unknown in "
        f"place of {found.unknown_before:,}"
    )
