"""The home directory of this user, also of one who has none, as in many containers."""

import os
import stat
import tempfile
from pathlib import Path

from edgeclip.runtime.errors import ConfigError


def home_folder() -> Path:
    """Return the user's home directory.

    A user without $HOME and without an entry in the list of users gets a folder among the
    temporary files that no other user can read or write.

    Raises:
        ConfigError: that folder belongs to somebody else.
        OSError: it cannot be made.
    """
    try:
        return Path.home()
    except RuntimeError:
        return _temporary_home()


def _temporary_home() -> Path:
    user = os.getuid()
    folder = Path(tempfile.gettempdir()) / f"edgeclip-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()  # a link here could lead anywhere
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != user or found.st_mode & 0o077:
        raise ConfigError(
            f"this user has no home directory, and {folder} is open to others: set HOME to a "
            "folder of the user's own"
        )
    return folder


def ensure_home() -> None:
    """Set $HOME where it is missing: other packages would fail, or write to a folder named "~".

    Raises:
        ConfigError, OSError: see `home_folder`.
    """
    if os.name == "posix" and "HOME" not in os.environ:
        os.environ["HOME"] = str(home_folder())
