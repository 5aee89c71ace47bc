"""The built-in teacher: where its files are, and an error where only its weights are missing.

A wheel leaves out the demo's weights (35 MB): they are found in a checkout of the repository.
"""

from pathlib import Path

from edgeclip.runtime.errors import ConfigError

BUILT_IN = "built-in"  # what `--teacher` calls it
BUILT_IN_TEACHER = Path(__file__).parent / "emoji_teacher"


def built_in_teacher() -> Path:
    """Return the directory of the built-in teacher, with its weights.

    Raises:
        ConfigError: edgeclip was installed from a wheel, which leaves the weights out.
    """
    require_checkout(BUILT_IN_TEACHER / "model.safetensors", "the weights of the built-in teacher")
    return BUILT_IN_TEACHER


def model_source(name: str) -> str | Path:
    """Return the directory or hub id of a model as it is named on the command line.

    Raises:
        ConfigError: see `built_in_teacher`.
    """
    return built_in_teacher() if name == BUILT_IN else name


def require_checkout(file: Path, what: str) -> None:
    """Check that a file which only the repository holds is here.

    Args:
        file: one that a wheel leaves out.
        what: what the file belongs to, in the plural, for the message.

    Raises:
        ConfigError: it is not here; the message says how to get it.
    """
    if not file.is_file():
        raise ConfigError(
            f"{what} are not part of the installed package: clone the EdgeCLIP repository, run "
            "`pip install -e '.[cpu,export]'` in it, and use that installation"
        )
