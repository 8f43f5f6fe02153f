"""A stage of a NeMo Curator pipeline that sketches the documents in passing.

    pip install gvendi-fast nemo-curator && python docs/examples/curator_stage.py

A batch leaves with a column of sketches, and one that says why a document has none.
"""

from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from nemo_curator.stages.base import ProcessingStage
from nemo_curator.stages.resources import Resources
from nemo_curator.tasks import DocumentBatch

from gvendi_fast import SketchSpec
from gvendi_fast.engines import SketchActor
from gvendi_fast.sketching.corpus import Settings


@dataclass
class SketchStage(ProcessingStage[DocumentBatch, DocumentBatch]):
    """Batches with the columns `sketch` and `sketch_rejected`."""

    proxy: str = "tiny"
    dim: int = 1024
    gpus: float = 0.0
    name: str = "gvendi_sketch"

    def __post_init__(self) -> None:
        self.resources = Resources(cpus=1.0, gpus=self.gpus)

    def inputs(self) -> tuple[list[str], list[str]]:
        return ["data"], ["text"]

    def outputs(self) -> tuple[list[str], list[str]]:
        return ["data"], ["sketch", "sketch_rejected"]

    def setup(self, worker_metadata: Any = None) -> None:
        # Once a worker.
        self._actor = SketchActor(self.proxy, Settings(spec=SketchSpec(dim=self.dim)))

    def process(self, task: DocumentBatch) -> DocumentBatch:
        table = task.to_pyarrow()
        found = self._actor(table.select(["text"]))
        for column in ("sketch", "sketch_rejected"):
            table = table.append_column(column, found.column(column))
        return DocumentBatch(dataset_name=task.dataset_name, data=table, _metadata=task._metadata)


def main() -> pa.Table:
    texts = ["Twice two is four.", "The river is wide and slow.", ""]
    batch = DocumentBatch(dataset_name="example", data=pa.table({"text": texts, "url": ["a", "b", "c"]}))
    stage = SketchStage(dim=256)
    stage.setup()
    found = stage.process(batch).to_pyarrow()
    print(found.schema.names, found.column("sketch_rejected").to_pylist())
    return found


if __name__ == "__main__":
    main()
