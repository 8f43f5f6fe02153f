"""Sketches as a column of a Ray data set, without a run directory, and the G-Vendi of what passes by.

    pip install "gvendi-fast[ray]" && python docs/examples/ray_map_batches.py

For a corpus that is to be scored, selected from and resumed, `gvendi sketch --engine ray` is what to use.
"""

import ray

from gvendi_fast import SketchSpec, VendiState
from gvendi_fast.engines import SketchActor
from gvendi_fast.sketching.corpus import Settings

ROWS = [
    {"prompt": f"What is {a} times {b}?", "completion": f"{a} times {b} is {a * b}."}
    for a in range(2, 8)
    for b in range(2, 8)
]


def sketched(rows: ray.data.Dataset, actors: int = 1, gpus: float = 0) -> ray.data.Dataset:
    """The rows with their sketches; each actor loads the proxy once."""
    return rows.map_batches(
        SketchActor,
        fn_constructor_kwargs={"proxy": "tiny", "settings": Settings(spec=SketchSpec(dim=256))},
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_gpus=gpus or None,
        batch_size=64,
        batch_format="pyarrow",
    )


def main() -> float:
    state = VendiState(256)
    sketches = sketched(ray.data.from_items(ROWS)).select_columns("sketch")
    for batch in sketches.iter_torch_batches(batch_size=64):
        state.update(batch["sketch"])
    print(f"G-Vendi of {len(ROWS)} rows: {state.gvendi():.2f}")
    return state.gvendi()


if __name__ == "__main__":
    main()
