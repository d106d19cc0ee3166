"""`ray job submit --working-dir` unpacks into a session directory that goes away with the job."""

from pathlib import Path


def vanishes_with_the_job(location: str) -> bool:
    """A relative path in such a directory would be lost."""
    return "://" not in location and "working_dir_files" in Path.cwd().parts and not Path(location).is_absolute()
