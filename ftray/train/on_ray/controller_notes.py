"""What Ray Train would write for itself beside the checkpoints, for runs whose directory no disk holds.

Such a run gives Ray no checkpoints: its workers store them and find them again (checkpoints/stored.py). Ray still wants
a place that all nodes see, and looks for its marker there.
"""

import io
from typing import Any

import pyarrow
import pyarrow.fs


class UnkeptNotes(pyarrow.fs.FileSystemHandler):
    """A file system that takes everything and keeps nothing; only Ray's marker is always there."""

    MARKER = ".validate_storage_marker"

    def get_type_name(self) -> str:
        return "unkept"

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: list[str]) -> list[Any]:
        kinds = pyarrow.fs.FileType
        return [
            pyarrow.fs.FileInfo(path, kinds.File if path.endswith(self.MARKER) else kinds.NotFound) for path in paths
        ]

    def get_file_info_selector(self, selector: Any) -> list[Any]:
        return []

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        return pyarrow.PythonFile(io.BytesIO(), mode="w")

    def open_append_stream(self, path: str, metadata: Any) -> Any:
        return self.open_output_stream(path, metadata)

    def open_input_stream(self, path: str) -> Any:
        raise FileNotFoundError(path)

    def open_input_file(self, path: str) -> Any:
        raise FileNotFoundError(path)

    def create_dir(self, path: str, recursive: bool) -> None: ...

    def delete_dir(self, path: str) -> None: ...

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None: ...

    def delete_root_dir_contents(self) -> None: ...

    def delete_file(self, path: str) -> None: ...

    def move(self, src: str, dest: str) -> None: ...

    def copy_file(self, src: str, dest: str) -> None: ...


def unkept_notes() -> Any:
    return pyarrow.fs.PyFileSystem(UnkeptNotes())
