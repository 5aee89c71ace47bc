"""The `edgeclip` program: find the command that was asked for, import its module and run it."""

import argparse
import contextlib
import difflib
import importlib
import importlib.metadata
import io
import itertools
import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, cast

from edgeclip.runtime.cli.options import Targets, claim_targets
from edgeclip.runtime.console import EscapedOutput, escape_controls
from edgeclip.runtime.errors import EdgeClipError, MissingExtraError, without_colour
from edgeclip.runtime.logs import log_to_stderr

_log = logging.getLogger("edgeclip.runtime.cli.main")  # not __name__, which may be "__main__"


@dataclass(frozen=True, slots=True)
class Command:
    """A command of the program.

    Attributes:
        module: defines `add_arguments(parser)` and `run(args)`, which returns the exit status.
            `args.command` is the whole command line, for records. One that writes files also
            defines `targets(args)`, which are checked and locked while it runs.
        help: one line for the overview.
        extra: the optional dependency group that the command needs, if any.
    """

    module: str
    help: str
    extra: str | None = None

    @property
    def trains(self) -> bool:
        """Whether it is of the rooms that train and export, which no device has to run."""
        return self.module.startswith(("edgeclip.compress.", "edgeclip.export."))


COMMANDS: dict[str, Command] = {
    "demo": Command(
        "edgeclip.export.cli.demo", "distil, export and verify on the built-in data", "export"
    ),
    "scenes": Command(
        "edgeclip.compress.cli.scenes", "draw images of the built-in data set", "scenes"
    ),
    "pretrain": Command(
        "edgeclip.compress.cli.pretrain", "train the teacher of the built-in data set", "compress"
    ),
    "cache": Command(
        "edgeclip.compress.cli.cache", "compute and store a teacher's embeddings", "compress"
    ),
    "data-report": Command(
        "edgeclip.compress.cli.data_report",
        "judge pictures and captions, and list those to keep",
        "compress",
    ),
    "distill": Command(
        "edgeclip.compress.cli.distill", "train a student from a teacher", "compress"
    ),
    "diagnose": Command(
        "edgeclip.compress.cli.diagnose",
        "tell what a student lost of its teacher, and what to try",
        "compress",
    ),
    "recipes": Command(
        "edgeclip.compress.cli.recipes", "list the recipes of distill, or print one", "compress"
    ),
    "ablate": Command(
        "edgeclip.compress.cli.ablate", "say what each setting of a recipe buys", "compress"
    ),
    "prune-vocabulary": Command(
        "edgeclip.compress.cli.prune_vocabulary",
        "leave a text tower the tokens of a corpus alone",
        "compress",
    ),
    "scaling": Command(
        "edgeclip.compress.cli.scaling",
        "train several sizes, and say which meets a bar",
        "compress",
    ),
    "quantize": Command(
        "edgeclip.export.cli.quantize",
        "find the fastest quantization that passes the quality gates",
        "export",
    ),
    "export": Command("edgeclip.export.cli.export", "export a student as a bundle", "export"),
    "verify": Command(
        "edgeclip.runtime.cli.verify", "check a bundle's files and its outputs on this device"
    ),
    "embed": Command("edgeclip.runtime.cli.embed", "embed images or texts and write an index"),
    "classify": Command("edgeclip.runtime.cli.classify", "classify images by label names"),
    "search": Command("edgeclip.runtime.cli.search", "search an index by text or image"),
    "eval": Command("edgeclip.runtime.cli.eval", "measure retrieval or zero-shot accuracy"),
    "profile": Command(
        "edgeclip.profiles.cli.profile", "measure latency, throughput, memory, energy", "profile"
    ),
    "tune": Command(
        "edgeclip.profiles.cli.tune", "find a bundle's fastest engine and threads here, and keep it"
    ),
    "report": Command(
        "edgeclip.profiles.cli.report", "write a report as HTML or Markdown", "report"
    ),
    "probes": Command(
        "edgeclip.export.cli.probes", "write small graphs that tell a device's speed", "export"
    ),
    "measure-probes": Command(
        "edgeclip.profiles.cli.measure_probes", "measure these graphs on this device"
    ),
    "plan-student": Command(
        "edgeclip.compress.cli.plan_student",
        "find the largest students that are fast enough on a device",
        "compress",
    ),
    "build": Command("edgeclip.runtime.cli.build", "compile a bundle's towers on the device"),
    "serve": Command(
        "edgeclip.runtime.cli.serve", "serve bundles and indexes over the network", "serve"
    ),
    "cut": Command(
        "edgeclip.export.cli.cut", "cut a tower into a device part and a server part", "export"
    ),
    "measure-cuts": Command(
        "edgeclip.profiles.cli.measure_cuts", "measure the parts of a cut tower here", "split"
    ),
    "plan": Command(
        "edgeclip.profiles.cli.plan", "plan what runs on the device and on the server", "split"
    ),
    "cascade": Command(
        "edgeclip.export.cli.cascade", "certify when to escalate to the teacher", "export"
    ),
    "push": Command("edgeclip.runtime.cli.push", "upload a bundle to the Hugging Face Hub", "hub"),
    "pull": Command(
        "edgeclip.runtime.cli.pull", "download a bundle from the Hugging Face Hub", "hub"
    ),
    "device": Command("edgeclip.runtime.cli.device", "list device profiles, or print one"),
}
_ENGINES = "'edgeclip[cpu]' or 'edgeclip[gpu]'"
_VERBOSE, _LOG_JSON = ("-v", "--verbose"), "--log-json"
_USAGE = 2
_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status.

    0 is success; 1 a check that failed (`verify`, the bars of `demo`); 2 an error that the
    message explains, such as wrong input, a full disk, or an export whose gates were missed
    and which wrote no bundle; 130 an interruption.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = set(arguments[: arguments.index("--")] if "--" in arguments else arguments)
    is_verbose, is_json = bool(options & set(_VERBOSE)), _LOG_JSON in options
    out = contextlib.redirect_stdout(cast(Any, EscapedOutput(sys.stdout or io.StringIO())))
    with out, log_to_stderr(verbose=is_verbose, as_json=is_json) as configure_log:
        try:
            if "HOME" not in os.environ:
                from edgeclip.runtime.bundle.files import ensure_home  # loads numpy

                ensure_home()
            status = _dispatch(arguments, configure_log)
            sys.stdout.flush()
            return status
        except EdgeClipError as error:
            return _fail(str(error))
        except UnicodeEncodeError as error:
            if not all("\ud800" <= c <= "\udfff" for c in error.object[error.start : error.end]):
                raise
            # Libraries in C++ and Rust open no such file.
            return _fail(f"{error.object} is not valid UTF-8: rename it")
        except BrokenPipeError:
            _release_stdout()  # the reader, such as `head`, has seen enough
            return 0
        except OSError as error:
            _release_stdout()  # it may be the one that failed: a full disk has no file name
            reason = error.strerror or str(error) or type(error).__name__
            return _fail(reason if error.filename is None else f"{error.filename}: {reason}")
        except KeyboardInterrupt as interruption:  # training says how to resume
            _log.warning("%s", str(interruption) or "interrupted")
            return _INTERRUPTED


def _dispatch(arguments: list[str], configure_log: Callable[..., None]) -> int:
    before = list(itertools.takewhile({*_VERBOSE, _LOG_JSON}.__contains__, arguments))
    name, *rest = arguments[len(before) :] or [""]
    if name in ("", "-h", "--help", "help"):
        print(_overview())
        return 0 if name else _USAGE
    if name in ("-V", "--version"):
        print(f"edgeclip {importlib.metadata.version('edgeclip')}")
        return 0
    if name not in COMMANDS:
        return _fail(_unknown(name))
    return _run(name, before + rest, configure_log)


def _run(name: str, rest: list[str], configure_log: Callable[..., None]) -> int:
    command = COMMANDS[name]
    if command.trains and sys.version_info < (3, 11):
        raise MissingExtraError(
            f"edgeclip {name} needs Python 3.11 or later, and this is "
            f"{sys.version_info[0]}.{sys.version_info[1]}, with which bundles only run and are "
            "measured: run it where students are trained"
        )
    try:
        module = importlib.import_module(command.module)
        parser = _Parser(prog=f"edgeclip {name}", description=module.__doc__)
        parser.logs_errors = _LOG_JSON in rest
        module.add_arguments(parser)
        parser.add_argument(*_VERBOSE, action="store_true", help="log debug messages too")
        parser.add_argument(
            _LOG_JSON, action="store_true", help="log to stderr as JSON, one object a line"
        )
        command_line = escape_controls(shlex.join(["edgeclip", name, *rest]))
        typed = argparse.Namespace(command=command_line)
        args = parser.parse_args(rest, typed)
        if args.verbose or args.log_json:  # argparse also takes shortened names
            configure_log(verbose=args.verbose, as_json=args.log_json)
        targets = getattr(module, "targets", lambda _: Targets())(args)
        with _left_out_told(), claim_targets(targets):
            status: int = module.run(args)
    except ImportError as error:
        package = (error.name or "").split(".")[0]
        # No extra brings onnxruntime: which of its builds fits is the user's choice.
        extras = (
            _ENGINES
            if package == "onnxruntime"
            else command.extra and f"'edgeclip[{command.extra}]'"
        )
        if not extras or package in ("", "edgeclip"):
            raise  # a fault of this software, not a package to install
        raise MissingExtraError(
            f"edgeclip {name} needs the package {package!r}: pip install {extras}"
        ) from error
    return status


@contextmanager
def _left_out_told() -> Iterator[None]:
    """Tell at the end of the block what it was given and did not use; few commands note any."""
    name = "edgeclip.runtime.inputs.find_images"  # it loads numpy, which not every command does
    if name in sys.modules:
        sys.modules[name].forget_left_out()
    try:
        yield
    finally:
        if name in sys.modules:
            sys.modules[name].report_left_out()


class _Parser(argparse.ArgumentParser):
    """Reports wrong arguments with the usage, or as a log message if stderr is to hold JSON."""

    logs_errors = False

    def format_help(self) -> str:
        return without_colour(super().format_help())  # stdout shows no control characters

    def error(self, message: str) -> NoReturn:
        if not self.logs_errors:
            super().error(escape_controls(message))
        _log.error("%s: %s", self.prog, message)
        raise SystemExit(_USAGE)


def _release_stdout() -> None:
    """Drop what stdout cannot take, or Python would complain again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: edgeclip COMMAND [options]",
            "",
            "Compress a CLIP teacher to a small, verified bundle for a device, and run it there.",
            "",
            *lines,
            "",
            "edgeclip COMMAND --help explains a command; edgeclip --version prints the version.",
            "Every command takes -v for debug messages and --log-json for log messages as JSON.",
        ]
    )


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "edgeclip --help lists all"
    return f"no command {name!r}: {hint}"


def _fail(message: str) -> int:
    _log.error("%s", message)
    return _USAGE


if __name__ == "__main__":
    sys.exit(main())
