"""The command line: a table of verbs, each imported only when it is asked for."""

import argparse
import difflib
import importlib
import importlib.metadata
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from edgeclip.runtime.errors import EdgeClipError, MissingExtraError


@dataclass(frozen=True, slots=True)
class Command:
    """A command: `module` gives `add_arguments(parser)` and `run(args) -> exit status`.

    `args.command` is what was typed, for the record.

    `extra` is the optional dependency group that the verb needs, if any.
    """

    module: str
    help: str
    extra: str | None = None


COMMANDS: dict[str, Command] = {
    "demo": Command("edgeclip.export.cli.demo", "the whole road on the built-in data", "export"),
    "scenes": Command("edgeclip.compress.cli.scenes", "draw some built-in scenes", "scenes"),
    "pretrain": Command("edgeclip.compress.cli.pretrain", "train the built-in teacher", "compress"),
    "cache": Command("edgeclip.compress.cli.cache", "compute a teacher's answers once", "compress"),
    "distill": Command("edgeclip.compress.cli.distill", "train a student of a teacher", "compress"),
    "quantize": Command(
        "edgeclip.export.cli.quantize", "find the fastest form inside its gates", "export"
    ),
    "export": Command("edgeclip.export.cli.export", "turn a student into a bundle", "export"),
    "verify": Command("edgeclip.runtime.cli.verify", "check a bundle and replay it on this device"),
    "embed": Command("edgeclip.runtime.cli.embed", "turn images or texts into an index"),
    "classify": Command("edgeclip.runtime.cli.classify", "name what images show"),
    "search": Command("edgeclip.runtime.cli.search", "look for texts or images in an index"),
    "eval": Command("edgeclip.runtime.cli.eval", "measure retrieval or zero-shot quality"),
    "profile": Command(
        "edgeclip.profiles.cli.profile", "measure speed, memory and energy", "profile"
    ),
    "report": Command("edgeclip.profiles.cli.report", "write a report, HTML or Markdown", "report"),
    "probes": Command("edgeclip.export.cli.probes", "write graphs that tell a speed", "export"),
    "measure-probes": Command("edgeclip.profiles.cli.measure_probes", "measure such graphs here"),
    "plan-student": Command(
        "edgeclip.compress.cli.plan_student",
        "find students that a device is fast with",
        "compress",
    ),
    "build": Command("edgeclip.runtime.cli.build", "compile a bundle's towers on the device"),
    "serve": Command("edgeclip.runtime.cli.serve", "answer devices over the network", "serve"),
    "cut": Command("edgeclip.export.cli.cut", "cut a tower wherever it can be cut", "export"),
    "measure-cuts": Command(
        "edgeclip.profiles.cli.measure_cuts", "measure the parts of a cut tower here", "split"
    ),
    "plan": Command(
        "edgeclip.profiles.cli.plan", "say what should run on device and server", "split"
    ),
    "cascade": Command(
        "edgeclip.export.cli.cascade", "certify when the teacher is asked instead", "export"
    ),
    "push": Command("edgeclip.runtime.cli.push", "send a bundle to the Hugging Face hub", "hub"),
    "pull": Command("edgeclip.runtime.cli.pull", "fetch a bundle from the Hugging Face hub", "hub"),
    "device": Command("edgeclip.runtime.cli.device", "list device profiles, or show one"),
}
_ENGINES = "'edgeclip[cpu]' or 'edgeclip[gpu]'"
_USAGE = 2
_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit status.

    0 is success; 1 a check that did not hold (`verify`, the bars of `demo`); 2 a fault that
    the message explains, such as wrong input, a full disk, or an export whose gates were
    missed and which wrote no bundle; 130 an interruption.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _dispatch(arguments)
        sys.stdout.flush()
        return status
    except EdgeClipError as error:
        return _fail(str(error))
    except BrokenPipeError:
        _release_stdout()  # the reader, such as `head`, has seen enough
        return 0
    except OSError as error:
        _release_stdout()  # it may be the one that failed: a full disk has no file name
        reason = error.strerror or str(error) or type(error).__name__
        return _fail(reason if error.filename is None else f"{error.filename}: {reason}")
    except KeyboardInterrupt as interruption:  # training says how to go on
        print(f"edgeclip: {str(interruption) or 'interrupted'}", file=sys.stderr)
        return _INTERRUPTED


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if arguments else _USAGE
    if arguments[0] in ("-V", "--version"):
        print(f"edgeclip {importlib.metadata.version('edgeclip')}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        return _fail(_unknown(name))
    return _run(name, COMMANDS[name], rest)


def _run(name: str, verb: Command, rest: list[str]) -> int:
    try:
        module = importlib.import_module(verb.module)
        parser = argparse.ArgumentParser(prog=f"edgeclip {name}", description=module.__doc__)
        module.add_arguments(parser)
        typed = argparse.Namespace(command=shlex.join(["edgeclip", name, *rest]))
        status: int = module.run(parser.parse_args(rest, typed))
    except ImportError as error:
        package = (error.name or "").split(".")[0]
        # No verb's extra brings onnxruntime: which of the two builds suits is the user's choice.
        extras = (
            _ENGINES if package == "onnxruntime" else verb.extra and f"'edgeclip[{verb.extra}]'"
        )
        if not extras or package in ("", "edgeclip"):
            raise  # a fault of this software, not a package to install
        raise MissingExtraError(
            f"edgeclip {name} needs the package {package!r}: pip install {extras}"
        ) from error
    return status


def _release_stdout() -> None:
    """Drop what stdout cannot take, or Python would complain again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {verb.help}" for name, verb in COMMANDS.items()]
    return "\n".join(
        [
            "usage: edgeclip VERB [options]",
            "",
            "Any CLIP teacher into a small, verified bundle for a device.",
            "",
            *lines,
            "",
            "edgeclip VERB --help explains a verb; edgeclip --version prints the version.",
        ]
    )


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    mend = f"did you mean {near[0]!r}?" if near else "edgeclip --help lists all"
    return f"no verb {name!r}: {mend}"


def _fail(message: str) -> int:
    print(f"edgeclip: error: {message}", file=sys.stderr)
    return _USAGE


if __name__ == "__main__":
    sys.exit(main())
