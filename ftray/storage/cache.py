"""Where this machine keeps what can be fetched or made again."""

from pathlib import Path

import platformdirs


def cache_directory() -> Path:
    return Path(platformdirs.user_cache_dir("ftray"))
