"""Who this process works for."""

import getpass
import os


def user_name() -> str:
    """The name, or in a container that has none for its user the number."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # Python 3.13 raises the latter
        return f"uid-{os.getuid()}"
