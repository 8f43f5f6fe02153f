"""What a run directory holds, but for what its workers leave of themselves: that has hosts, processes and times."""

from pathlib import Path

from gvendi_fast.data.run_files import PASSES
from gvendi_fast.data.worker_records import FOLDERS


def contents(folder: Path) -> dict[str, bytes]:
    """{path in the run directory: bytes} of every file that two runs have in common."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0] not in (*FOLDERS, PASSES)
    }
