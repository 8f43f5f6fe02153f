"""A step of a datatrove pipeline that sketches the documents in passing.

    pip install gvendi-fast datatrove && python docs/examples/datatrove_step.py

Each document leaves with its sketch in its metadata; a document that cannot be scored gets the reason.
"""

from collections.abc import Iterable, Iterator
from itertools import islice

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from gvendi_fast import SketchSpec
from gvendi_fast.engines import SketchActor
from gvendi_fast.sketching.corpus import Settings


class SketchStep(PipelineStep):
    """Documents with `metadata["sketch"]`, a list of `dim` floats, or `metadata["sketch_rejected"]`, a sentence.

    at_once: documents that share batches.
    """

    type, name = "sketch", "gvendi"

    def __init__(self, proxy: str = "tiny", dim: int = 1024, at_once: int = 256) -> None:
        super().__init__()
        self.proxy, self.dim, self.at_once = proxy, dim, at_once

    def run(self, data: Iterable[Document] | None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        # Here and not where the step is made, since that is pickled on its way to a worker.
        actor = SketchActor(self.proxy, Settings(spec=SketchSpec(dim=self.dim)))
        documents = iter(data or ())
        while block := list(islice(documents, self.at_once)):
            with self.track_time("batch"):
                sketches, reasons = actor.sketch([{"text": document.text} for document in block])
            for document, sketch, reason in zip(block, sketches, reasons, strict=True):
                if reason is None:
                    document.metadata["sketch"] = sketch.tolist()
                else:
                    document.metadata["sketch_rejected"] = reason
                self.stat_update("sketched" if reason is None else "rejected")
                self.update_doc_stats(document)
                yield document


def main() -> list[Document]:
    texts = [
        "Twice two is four.",
        "The river is wide and slow.",
        "",
        "Bread wants flour, water, salt and time.",
    ]
    documents = [Document(text=text, id=str(place)) for place, text in enumerate(texts)]
    found = list(SketchStep(dim=256, at_once=3).run(documents))
    for document in found:
        sketch = document.metadata.get("sketch")
        print(
            document.id, document.metadata["sketch_rejected"] if sketch is None else f"{len(sketch)} numbers"
        )
    return found


if __name__ == "__main__":
    main()
