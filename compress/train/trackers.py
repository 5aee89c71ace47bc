"""Send a run's settings and losses to experiment trackers, through accelerate."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from edgeclip.runtime.errors import ConfigError, MissingExtraError, first_line


def check_trackers(names: Sequence[str]) -> None:
    """Check that every tracker can be used, before long work.

    Raises:
        ConfigError: a name that accelerate does not know.
        MissingExtraError: the package of a tracker is not installed.
    """
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known = sorted(map(str, LOGGER_TYPE_TO_CLASS))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(f"no tracker is called {unknown[0]}: choose from {', '.join(known)}")
    available = set(map(str, get_available_trackers()))
    missing = [name for name in names if name not in available]
    if missing:
        raise MissingExtraError(
            f"the tracker {missing[0]} is not installed: pip install {missing[0]}"
        )


class Trackers:
    """Trackers of accelerate, such as tensorboard, wandb, trackio or mlflow; a context manager.

    Files of local ones go to the directory of the run.

    Raises:
        ConfigError, MissingExtraError: see `check_trackers`.
    """

    def __init__(self, names: Sequence[str], run: Path) -> None:
        self._accelerator: Any = None
        if names:
            from accelerate import Accelerator

            check_trackers(names)
            self._accelerator = Accelerator(log_with=list(names), project_dir=run)

    def begin(self, settings: Mapping[str, object]) -> None:
        """Send the settings of the run.

        Raises:
            ConfigError: a tracker cannot begin, such as one that nobody has logged in to.
        """
        if self._accelerator is not None:
            plain = {
                name: value if isinstance(value, int | float | str) else str(value)
                for name, value in settings.items()
            }
            try:
                self._accelerator.init_trackers("edgeclip", config=plain)
            except Exception as error:  # of any kind, such as a login that is missing
                names = ", ".join(map(str, self._accelerator.log_with))
                raise ConfigError(
                    f"the tracker {names} cannot begin: {first_line(error)}; mend it, or leave out "
                    "--track"
                ) from error

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send the values of a step, which is counted from 1."""
        if self._accelerator is not None:
            self._accelerator.log(dict(values), step=step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._accelerator is not None:
            self._accelerator.end_training()
