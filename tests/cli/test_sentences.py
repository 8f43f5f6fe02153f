"""Every sentence that a command or a page prints about diversity, with a case that makes it true and one that does not.

A row of SENTENCES is (file, words of it in the source, what is seen where it is true, the two cases, what is seen in
the second case instead). EXPLANATIONS are printed whatever the data are; each has a fact that must hold. A printed
string about diversity that is in neither table nor among NO_STATEMENTS fails a test: add it with its cases.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import warnings
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from places import PACKAGE
from printed_strings import printed_strings

from gvendi_fast.analysis.set_numbers import SetNumbers, limits, noise_sentence
from gvendi_fast.data.index import Fields
from gvendi_fast.data.run_directory import Part, RunDirectory
from gvendi_fast.vendi import VendiState, gvendi
from gvendi_fast.vendi.centered import CenteredScore, RowMean, centered
from gvendi_fast.vendi.diagnosis import Diagnosis
from gvendi_fast.vendi.jackknife import Interval
from gvendi_fast.vendi.unlimited_k import UnlimitedK

K = 16
AXES = np.eye(K, dtype=np.float32)
SIGNED = np.eye(4, 64, dtype=np.float32)


def random_rows(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, K)).astype(np.float32)


# Rows by name, with a group for each or none; spectra are known: axes have nothing in common, copies everything.
RUNS: dict[str, tuple[np.ndarray, list[str] | None]] = {
    "one": (AXES[:1], None),
    "copies": (AXES[[0] * 40], None),
    "orthogonal": (AXES[:8], None),
    "orthogonal too few": (AXES, None),
    "orthogonal too": (AXES[8:], None),
    "flat": (np.tile(AXES, (4, 1)), None),
    "flat too": (np.tile(AXES, (4, 1)), None),
    "flat again": (np.tile(AXES, (4, 1)), None),
    "steep": (AXES[[0] * 60 + [1, 2, 3, 4]], None),
    "first half": (np.tile(AXES[:8], (8, 1)), None),
    "second half": (np.tile(AXES[8:], (8, 1)), None),
    # Unit gradients without anything in common, as sketches of so few numbers show them.
    "noise": (random_rows(64), None),
    "noise too": (random_rows(64, seed=1), None),
    "much noise": (random_rows(200), None),
    "half of the axes": (np.eye(64, dtype=np.float32)[:32], None),
    # Every kind in another number: nothing limits the score, exp of the entropy of these shares.
    "many kinds": (np.eye(256, dtype=np.float32)[np.repeat(np.arange(16), np.arange(1, 17))], None),
    "both signs": (np.concatenate([AXES[[0] * 20], -AXES[[0] * 20], AXES[1:]]), None),
    "uneven": (AXES[[0] * 40 + [1] * 8], None),
    # One axis and four: the best mixture has 5 directions of equal weight.
    "one and four": (AXES[[0, 0, 0, 0, 4, 5, 6, 7]], ["one"] * 4 + ["four"] * 4),
    "like and like": (AXES[[0, 0, 0, 0, 1, 1, 1, 1]], ["one"] * 4 + ["two"] * 4),
    "many and few": (AXES[[0] * 40 + [1] * 8], ["many"] * 40 + ["few"] * 8),
    "two large and one small": (AXES[[0] * 40 + [1] * 40 + [2] * 8], ["a"] * 40 + ["b"] * 40 + ["few"] * 8),
    "one large and two small": (AXES[[0] * 80 + [1] * 20 + [2] * 20], ["a"] * 80 + ["b"] * 20 + ["c"] * 20),
    # Both signs of four axes of 64: no mean, no dominant direction, half of what 8 different rows can have, a large K.
    "cancelling": (np.tile(np.concatenate([SIGNED, -SIGNED]), (40, 1)), None),
    "new at each": (np.random.default_rng(0).standard_normal((32, K)).astype(np.float32), None),
    "broad and narrow": (
        np.concatenate([np.tile(AXES[:8], (5, 1)), AXES[[8] * 40]]),
        ["broad"] * 40 + ["narrow"] * 40,
    ),
}


class World:
    """Run directories made at their first use, and what commands and pages say of them."""

    def __init__(self, folder) -> None:
        self.folder = folder
        self.said: dict[tuple, str] = {}

    def run(self, name: str) -> RunDirectory:
        path = self.folder / name.replace(" ", "-")
        if path.is_dir():
            return RunDirectory.load(path)
        rows, groups = RUNS[name]
        n = len(rows)
        spec = {
            "sketch": {"dim": rows.shape[1], "kind": "hadamard"},
            "coverage": {"sketched": 1, "total": 1},
            "proxy": {"name": "none"},
            "dtype": "float32",
        }
        source = {"path": "nowhere.jsonl", "kind": "jsonl", "size": 1, "rows": n, "digest": ""}
        fields = vars(Fields(by="kind" if groups else None))
        manifest = {"units_total": 1, "rows": n, "limit": None, "fields": fields, "files": [source]}
        made = RunDirectory.open(path, spec, manifest)
        ones = {name: np.ones(n) for name in ("tokens", "length", "loss", "gradient_norm")}
        # Ids of one run are those of no other.
        ids = [f"{name} {i}" for i in range(n)]
        made.write_part(Part(0, ids=ids, groups=groups or [""] * n, rows=np.arange(n), sketches=rows, **ones))
        return made

    def command(self, *words: str) -> str:
        """What `gvendi` prints, on both streams; names of RUNS in the words stand for their directories."""
        from gvendi_fast.cli.app import app

        if words not in self.said:
            given = [str(self.run(word).path) if word in RUNS else word for word in words]
            given = [word.replace("OUT", str(self.folder / "out")) for word in given]
            out = io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                app(given, standalone_mode=False)
            self.said[words] = out.getvalue()
        return self.said[words]

    def page(self, name: str, clusters: int | None = None) -> str:
        """The text of the report's page, without tags."""
        from gvendi_fast.report.data import report_data
        from gvendi_fast.report.page import render

        if ("page", name, clusters) not in self.said:
            text = render(report_data(self.run(name), clusters=clusters))
            self.said["page", name, clusters] = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", text))
        return self.said["page", name, clusters]


Case = Callable[[World], str]


def score(name: str) -> Case:
    return lambda world: world.command("score", name)


def centred_by(name: str, other: str) -> Case:
    """The score of a run less the mean of another."""

    def said(world: World) -> str:
        mean = str(world.folder / f"{other}.mean")
        world.command("score", other, "--save-mean", mean)
        return world.command("score", name, "--mean", mean)

    return said


def grouped(name: str, command: str = "score", *options: str) -> Case:
    return lambda world: world.command(command, name, "--by", "kind", *options)


def unlimited(
    plain: float, value: float, dim: int = 1024, halved: int = 2048, unseen: float = 0.0
) -> UnlimitedK:
    """What is found of rows whose score at K is `plain`, and `value` of exact gradients."""
    return UnlimitedK(value, 0.9 * value, 1.1 * value, plain, dim, 5000, halved, unseen, 0.01)


def beside(*values: UnlimitedK) -> Case:
    return lambda world: noise_sentence(values) or "nothing"


def limited(value: float, n: int, distinct: int, of: UnlimitedK) -> Case:
    """What limits a score of so many rows, of which none has a direction in common with most."""

    def said(world: World) -> str:
        numbers = SetNumbers(
            Interval(value, value, value, 0.0, n),
            math.log(value),
            of.dim,
            of,
            CenteredScore(value, n, 0, None),
            Diagnosis(n, value, 0.01, 0.01, 0.01, 0.0, 0.01, value, value),
            distinct,
        )
        return "\n".join(limits(numbers)) or "nothing"

    return said


def of_dims(sketches: Callable[[], torch.Tensor], rows: int) -> Case:
    from gvendi_fast.vendi.choose_dim import choose_dim

    return lambda world: choose_dim(sketches(), rows).sentence


def compared(*names: str) -> Case:
    return lambda world: world.command("compare", *names, "--no-text")


def compared_by_mean(*names: str) -> Case:
    """A comparison by the mean of its first set, from a file."""

    def said(world: World) -> str:
        run, path = world.run(names[0]), world.folder / "mean.safetensors"
        mean = RowMean(K, run.sketch_spec)
        for part in run.iterate(["sketch"]):
            mean.update(part.sketches)
        mean.save(path)
        return world.command("compare", *names, "--no-text", "--mean", str(path))

    return said


def measured(name: str, *options: str) -> Case:
    return lambda world: world.command("measures", name, "--no-text", *options)


def clustered(name: str, clusters: int) -> Case:
    return lambda world: world.command(
        "cluster", name, "--clusters", str(clusters), "--out", "OUT.parquet", "--force"
    )


def weighed(name: str) -> Case:
    return lambda world: world.command("weights", name, "--by", "kind", "--tolerance", "1e-7")


def page(name: str, clusters: int | None = None) -> Case:
    return lambda world: world.page(name, clusters)


def chosen(name: str, size: int, **options) -> Case:
    """The summary of a choice, as `gvendi select` prints it: that command needs the corpus' texts."""

    def said(world: World) -> str:
        from gvendi_fast.cli.select import _print_summary
        from gvendi_fast.selection import select

        found = select(torch.from_numpy(RUNS[name][0]), size, **options)
        summary = {
            **found.to_dict(),
            "pool_rows": len(RUNS[name][0]),
            "out": "rows.jsonl",
            "sidecar": "rows.parquet",
        }
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            _print_summary(summary)
        return out.getvalue()

    return said


def relaxing(name: str) -> Case:
    def said(world: World) -> str:
        from gvendi_fast.data.pool import MatrixPool
        from gvendi_fast.selection.rounding import relaxed_select

        lines: list[str] = []
        relaxed_select(MatrixPool(RUNS[name][0]), 4, progress=lines.append)
        return "\n".join(lines)

    return said


def warned(matrix: list[list[float]], normalize: bool = False) -> Case:
    def said(world: World) -> str:
        from gvendi_fast.vendi import score_K

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            score_K(np.array(matrix), normalize=normalize)
        return "\n".join(str(item.message) for item in caught)

    return said


def set_of(unlimited: float) -> SimpleNamespace:
    """Of the numbers of a set, those that the status of a synthesis names."""
    return SimpleNamespace(
        unlimited_k=SimpleNamespace(value=unlimited),
        centered=SimpleNamespace(value=None, why_not=None, left_out=0),
        dim=K,
    )


def status(rows: int, ended: bool = False) -> Case:
    """The status of a synthesis that has grown from 100 rows to 134, its score being of the first `rows`."""

    def said(world: World) -> str:
        from gvendi_fast.cli.synthesize import status_lines
        from gvendi_fast.synthesis.loop.status import Status

        now = Status(
            pool=134,
            seeds=100,
            target=200,
            round=0,
            clusters=4,
            accepted=34,
            rejected={},
            gvendi=30.0,
            gvendi_rows=rows,
            start_gvendi=20.0,
            requests=40,
            tokens=(1, 1),
            cost=None,
            at_start=set_of(22.0) if ended else None,
            at_end=set_of(33.0) if ended else None,
        )
        return "\n".join(f"{name}: {value}" for name, value in status_lines(now).items())

    return said


def pool_of(axes: int):
    """The numbers of a pool that began with four axes and has so many now, at the start and the end."""
    from gvendi_fast.synthesis.loop.pool_numbers import pool_numbers

    return pool_numbers(torch.from_numpy(AXES[:axes]), 4)


def ended(axes: int) -> Case:
    """The status of a synthesis at its end."""

    def said(world: World) -> str:
        from gvendi_fast.cli.synthesize import status_lines
        from gvendi_fast.synthesis.loop.status import Status

        at_start, at_end = pool_of(axes)
        now = Status(
            pool=axes,
            seeds=4,
            target=20,
            round=0,
            clusters=1,
            accepted=axes - 4,
            rejected={},
            gvendi=at_end.gvendi,
            gvendi_rows=axes,
            start_gvendi=at_start.gvendi,
            requests=1,
            tokens=(1, 1),
            cost=None,
            at_start=at_start,
            at_end=at_end,
        )
        return "\n".join(f"{name}: {value}" for name, value in status_lines(now).items())

    return said


def notes(seeds: int, rule: str = "cluster") -> Case:
    def said(world: World) -> str:
        from gvendi_fast.synthesis.run import _notes

        accept = SimpleNamespace(clusters=0.01, rule=rule)
        config = SimpleNamespace(accept=accept, block=1, stop=SimpleNamespace(requests=None))
        return "\n".join(_notes(config, seeds))

    return said


def verdict(rule: str, sparse: bool, above: bool) -> Case:
    """What is said of a candidate in a sparse cluster or not, with enough gain or not."""

    def said(world: World) -> str:
        from gvendi_fast.synthesis.loop.judge import Judgement
        from gvendi_fast.synthesis.loop.loop import _NOT_WANTED

        judged = Judgement(0, sparse, 0.1, above)
        return "accepted" if judged.accepted(rule) else ": ".join(_NOT_WANTED[rule])

    return said


def grown(
    rows: int = 134,
    accepted: int = 34,
    after: float = 24.0,
    apart: bool = True,
    stage: str = "low gain",
    judged: int = 4,
    unlimited: float = 33.0,
) -> Case:
    """The page of a synthesis with these numbers; all others are made up, and the pictures are left out."""

    def said(world: World) -> str:
        from gvendi_fast.synthesis.report import page as of_synthesis

        at_start, at_end = pool_of(8 if accepted else 4)
        bar = {"gvendi": 20.0, "low": 20.0, "high": 20.0, "draws": 1, "reach": 0.0, "rows": 100}
        drawn = {**bar, "gvendi": after, "low": after - 1, "high": after + 1, "draws": 20, "rows": rows}
        cluster = {
            "clusters": 2,
            "before": [60, 40],
            "after": [60, 40 + accepted],
            "sparse": 1,
            "sparse_before": 0.4,
            "sparse_after": 0.6,
            "sparse_joined": 1.0 if accepted else None,
            "entropy_before": 0.673,
            "entropy_after": 0.69,
            "largest": [],
            "smallest": [],
            "elsewhere": 0,
        }
        data = {
            "version": "0",
            "run": "grown",
            "seed": 0,
            "task": "math",
            "rule": "gain",
            "proxy": "none",
            "generator": "a model",
            "stop": None,
            "score": {
                "seeds": 100,
                "accepted": accepted,
                "rows": rows,
                "target": 200,
                "dim": K,
                "decided": accepted + 5,
                "rounds": 1,
                "gvendi_start": 20.0,
                "gvendi": 30.0,
                "at_start": at_start.to_dict(),
                "at_end": at_end.to_dict(),
                "equal": {
                    "pool": {"n": 100, "seeds": bar, "grown": drawn, "told_apart": apart},
                    "alone": None,
                },
            },
            "growth": {"points": [], "rounds": []},
            "acceptance": {
                "windows": [{"decided": accepted + 5, "accepted": accepted, "rejected": {}}],
                "blocks": 1,
                "stages": [{"stage": stage, "count": 5, "share": 0.1, "examples": []}],
            },
            "clusters": cluster,
            "rules": {
                "judged": judged,
                "sparse_above": 2,
                "sparse_below": 1,
                "dense_above": 1,
                "dense_below": 0,
            },
            "accepted": {"gain": [], "first": [], "last": []},
            "spent": {"requests": None, "cost": None, "seconds": {}, "runs": 0, "later": False},
            "settings": {},
            "texts_missing": None,
        }
        text = of_synthesis.render(data)
        return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", text))

    return said


_REPORT, _GROWN = (f"report/templates/{name}.html.jinja" for name in ("report", "synthesis"))
_PARTS = "report/templates/macros.html.jinja"
# (file, words in the source, seen where true, the case that makes it true, the one that makes it false, seen instead)
SENTENCES: list[tuple[str, str, str, Case, Case, str]] = [
    # score
    ("cli/score.py", "G-Vendi {} 95 % interval {} to {} n = {} K = {}",
     r"G-Vendi 16\.00  95 % interval 1[0-6]\.\d\d to 16\.00  n = 64  K = 16",
     score("flat"), score("copies"), r"G-Vendi 1\.00  95 % interval 1\.00 to 1\.00  n = 40  K = 16"),
    ("cli/score.py", "is for another {} row{} of the same source", r"another 1 row of the same source",
     score("one"), score("flat"), r"another 64 rows of the same source"),
    ("cli/score.py", "not known: {}", r"unlimited n +not known: the last doubling",
     score("half of the axes"), score("copies"), r"unlimited n +1\.00 \(1\.00 to 1\.00\)"),
    ("cli/score.py", "; mean cosine of two rows {}", r"mean cosine of two rows 1\.000",
     score("copies"), score("orthogonal"), r"mean cosine of two rows 0\.000"),
    ("cli/score.py", "; G-Vendi of the others {}", r"the first holds 6\.\d %; G-Vendi of the others 15\.00",
     score("flat"), score("copies"), r"the first holds 100\.0 %; mean"),
    ("cli/score.py", "the mean of {}", r"centred +1\.00, rows less the mean of copies\.mean",
     centred_by("uneven", "copies"), score("uneven"), r"rows less their mean"),
    ("cli/score.py", "their mean", r"centred +15\.00, rows less their mean",
     score("flat"), centred_by("flat", "copies"), r"rows less the mean of copies"),
    ("vendi/centered.py", "and {} only in the plain value", r"40 rows equal the mean and count only in the plain",
     centred_by("uneven", "copies"), score("uneven"), r"less their mean\n"),
    ("vendi/centered.py", "the only row equals the mean", r"centred +none.*the only row equals the mean",
     score("one"), score("flat"), r"centred +15\.00"),
    ("vendi/centered.py", "all {} rows equal the mean", r"centred +none.*all 40 rows equal the mean",
     score("copies"), score("flat"), r"centred +15\.00"),
    # what limits a score
    ("analysis/set_numbers.py", "n: {} cannot score above {}, and those of any diverse data come near that; {}",
     r"n: 8 rows cannot score above 8, .*; only more rows can tell\n", score("orthogonal"), score("steep"),
     r"G-Vendi 1\."),
    ("analysis/set_numbers.py", "{} different rows of {}",
     r"n: 8 different rows of 64 cannot score above 8, .*; only more rows can tell\n",
     score("first half"), score("orthogonal"), r"n: 8 rows cannot"),
    ("analysis/most.py", "only more rows and a larger --dim can tell",
     r"n: 16 different rows of 64 .*; only more rows and a larger --dim can tell", score("flat"),
     score("orthogonal"), r"only more rows can tell"),
    ("analysis/most.py", "no --dim is large enough for the rows that could tell",
     r"n: 8,000 rows .*; no --dim is large enough for the rows", limited(7900, 8000, 8000, unlimited(7900, 7900, 8192)),
     limited(3900, 4000, 4000, unlimited(3900, 3900, 8192)), r"n: 4,000 rows .*; only more rows can tell"),
    ("analysis/set_numbers.py", "K: no data scores above {}, the numbers of a sketch, and this is near it; {}",
     r"K: no data scores above 16, .* near it; only a larger --dim can tell", score("much noise"), score("flat"),
     r"n: 16 different rows"),
    ("analysis/most.py", "no --dim is large enough to tell", r"above 8,192, .*; no --dim is large enough to tell",
     limited(8000, 90_000, 90_000, unlimited(8000, 8000, 8192)),
     limited(1000, 90_000, 90_000, unlimited(1000, 1000)), r"only a larger --dim can tell"),
    ("analysis/set_numbers.py", "K: the noise of sketches of {} numbers {} the score by about {}; {}",
     r"of 16 numbers lowers the score by about 7\d %; --dim 128 would", score("noise"), score("flat"),
     r"unlimited K +16\.00"),
    ("analysis/set_numbers.py", "raises", r"raises the score by about 25 %", limited(50, 5000, 5000, unlimited(50, 40)),
     limited(40, 5000, 5000, unlimited(40, 50)), r"lowers the score by about 20 %"),
    ("analysis/set_numbers.py", "--dim {} would at least halve the bias", r"--dim 8192 would at least halve",
     limited(40, 5000, 5000, unlimited(40, 50, 4096, 8192)), limited(40, 5000, 5000, unlimited(40, 50, 4096, 16384)),
     r"takes more than the largest"),
    ("analysis/set_numbers.py", "to halve the bias takes more than the largest --dim, {}",
     r"to halve the bias takes more than the largest --dim, 8,192",
     limited(40, 5000, 5000, unlimited(40, 50, 4096, 16384)),
     limited(40, 5000, 5000, unlimited(40, 50, 4096, 8192)), r"--dim 8192"),
    ("analysis/set_numbers.py", "K: exact gradients would score from about {} to {}",
     r"from about 45\.0 to 55\.0; of so many rows K = 1,024 shows too little",
     limited(40, 5000, 5000, unlimited(40, 50, unseen=0.2)), limited(40, 5000, 5000, unlimited(40, 50)),
     r"lowers the score by about 20 %"),
    ("analysis/set_numbers.py", "n: still growing; {} rows of the same source would score about {}",
     r"still growing; 64 rows of the same source would score about 64\.0", score("half of the axes"),
     score("many kinds"), r"forecast 13\.\d+ at 272"),
    ("analysis/set_numbers.py", "one direction: {}", r"limited by one direction: 100 % of the squared",
     score("copies"), score("flat"), r"the first holds 6"),
    ("vendi/diagnosis.py", "lies along the mean of the rows, and two rows have a cosine of {} on average",
     r"100 % of the squared gradients lies along the mean of the rows, and two rows have a cosine of 1\.00",
     score("copies"), score("flat"), r"mean cosine of two rows 0\.0"),
    ("vendi/diagnosis.py", "lies along one direction that is not the mean of the rows",
     r"7\d % of the squared gradients lies along one direction that is not the mean",
     score("both signs"), score("copies"), r"lies along the mean of the rows"),
    ("vendi/growth.py", "growth does not slow down enough to say where it ends",
     r"added 100 % and the next is expected to add 100 %: growth does not", score("half of the axes"),
     score("copies"), r"unlimited n +1\.00"),
    ("vendi/growth.py", "more rows more still: too far from",
     r"expected to score 6\.\d % more, and more rows more still", score("noise"), score("copies"),
     r"unlimited n +1\.00"),
    # groups and sets side by side
    ("analysis/set_numbers.py", "takes about {} off these scores", r"takes about 7\d( to 7\d)? % off these scores",
     compared("noise", "noise too"), compared("flat", "flat too"), r"16\.00"),
    ("analysis/set_numbers.py", "changes these scores by about {}", r"changes these scores by about -20 to \+3 %",
     beside(unlimited(40, 50), unlimited(103, 100)), beside(unlimited(40, 50), unlimited(97, 100)),
     r"takes about 3 to 20 % off"),
    ("analysis/set_numbers.py", ", known only roughly of so many rows,", r"unlimited K, known only roughly of so many",
     beside(unlimited(40, 50, unseen=0.2)), beside(unlimited(40, 50)), r"about 20 % off .* unlimited K stand beside"),
    ("analysis/set_numbers.py", "the noise of sketches of K = {} numbers {}; values for unlimited K{} stand beside",
     r"K = 1,024 numbers takes about 6 %", beside(unlimited(94, 100)), beside(unlimited(96, 100)), r"nothing"),
    ("analysis/equal_n.py", "{}: {}, as those of any diverse data would at this n; {}",
     r"8 rows cannot show more than 8: every score lies within 10 % of that, as .*; only more rows can tell how",
     compared("orthogonal", "orthogonal too"), compared("steep", "uneven"), r"steep"),
    ("analysis/equal_n.py", "{} how diverse such sets are",
     r"sketches of K = 16 cannot show more than 16: 1 of 2 scores lies within 10 % of that; only a larger --dim",
     compared("flat", "steep"), compared("orthogonal", "orthogonal too"), r"only more rows can tell how diverse"),
    ("analysis/equal_n.py", "{} group{} with too few rows to compare",
     r"2 groups with too few rows to compare \(40 rows in all, fewer than 40 each\): counted together as \(others\)",
     grouped("one large and two small"), grouped("two large and one small"),
     r"1 group with too few rows to compare \(8 rows in all, fewer than 40 each\): not compared"),
    ("analysis/equal_n.py", "not compared", r"8 rows in all, .*: not compared",
     grouped("two large and one small", "measures", "--no-text"),
     grouped("like and like", "measures", "--no-text"), ""),
    # how many numbers a sketch needs
    ("vendi/choose_dim.py", "K = {}, {}: G-Vendi of {} has a predicted bias of {}",
     r"K = 512, the smallest of 512 and above with a bias below 5 %: G-Vendi of 40 rows has a predicted bias of -1\.0",
     of_dims(lambda: torch.ones(4, 8192), 40), of_dims(lambda: torch.eye(8192)[:64], 1_000_000),
     r"K = 8192, the largest there is: G-Vendi of 1,000,000 rows has a predicted bias of -[1-9]"),
    # compare
    ("analysis/set_numbers.py", "n: the interval of fewer than {} rows may be too narrow",
     r"n: the interval of fewer than 16 rows may be too narrow", score("orthogonal"), score("flat"), r"n = 64"),
    ("vendi/growth.py", "fewer than {} rows are too few to say what many more of them would lead to",
     r"not known: fewer than 32 rows are too few", score("orthogonal too few"), score("half of the axes"),
     r"growth does not slow down"),
    ("cli/compare.py", "adds: G-Vendi of {} rows, the set's equal share among them, less that of {} of the others",
     r"adds: G-Vendi of 64 rows", compared("flat", "flat too"), compared("orthogonal", "orthogonal too"),
     r"adds: G-Vendi of 8 rows"),
    ("cli/compare.py", "centred: rows less {}", r"centred: rows less the mean of .*mean",
     compared_by_mean("flat", "flat too"),
     compared("flat", "flat too"), r"centred: rows less one mean"),
    ("cli/compare.py", "one mean, in which each of these sets weighs the same",
     r"centred: rows less one mean, in which each of these sets weighs the same", compared("flat", "flat too"),
     compared_by_mean("flat", "flat too"), r"centred: rows less the mean of .*mean"),
    ("cli/compare.py", "all {} rows together: G-Vendi {}", r"all 128 rows together: G-Vendi 16\.00",
     compared("flat", "flat too"), compared("flat", "steep"), r"together: G-Vendi [2-9]\."),
    ("cli/compare.py", "{} is more diverse than {}", r"flat is more diverse than steep: .* more than noise\.",
     compared("flat", "steep"), compared("flat", "flat too"),
     r"do not differ by more than noise"),
    ("cli/compare.py", "{} and {} do not differ by more than noise",
     r"flat and flat-too do not differ by more than noise",
     compared("flat", "flat too"), compared("flat", "steep"), r"is more diverse than"),
    ("cli/compare.py", "{} of {} differences of G-Vendi at n are more than noise",
     r"2 of 3 differences of G-Vendi at n",
     compared("flat", "flat too", "steep"), compared("flat", "flat too", "flat again"), r"0 of 3 differences"),
    ("cli/compare.py", "% of the way from one kind of data to nothing in common", r"100 % of the way",
     compared("first half", "second half"), compared("flat", "flat too"), r"[-\d]+ % of the way"),
    ("cli/compare.py", "have a neighbour in", r"100\.0 % of flat have a neighbour in flat-too",
     compared("flat", "flat too"), compared("first half", "second half"), r" 0\.0 % of first-half have a neighbour"),
    # select
    ("cli/select.py", "random subsets {}", r"G-Vendi +2   random subsets 1\.\d+ ",
     chosen("uneven", 2), chosen("copies", 2), r"G-Vendi +1   random subsets 1 "),
    ("cli/select.py", "a random subset reaches as much", r"a random subset reaches as much",
     chosen("copies", 4), chosen("steep", 4), r"G-Vendi +4 "),
    ("cli/select.py", "the most unlike the others first", r"the most unlike the others first",
     chosen("steep", 4, method="relaxed"), chosen("steep", 4), r"best first"),
    ("cli/select.py", "no choice of as many rows has a {} above {}", r"has a G-Vendi above 4\n",
     chosen("flat", 4, method="relaxed"), chosen("copies", 4, method="relaxed"), r"has a G-Vendi above 1\n"),
    ("cli/select.py", "rows are chosen by {}, and gain and surprisal are of centred rows: less the mean of {}",
     r"chosen by their centred G-Vendi, and gain and surprisal are of centred rows: less the mean of 64 rows\n",
     chosen("flat", 4, center=True), chosen("flat", 4), r"best first"),
    ("cli/select.py", "{} of centred rows", r"chosen by logdet of centred rows",
     chosen("flat", 4, center=True, objective="logdet"), chosen("flat", 4, center=True),
     r"chosen by their centred G-Vendi,"),
    ("cli/select.py", "{} {} equal to it left out", r"; 60 rows of the pool equal to it left out",
     chosen("steep", 4, center=RowMean(K).update(AXES[:1])), chosen("flat", 4, center=True), r"mean of 64 rows\n"),
    ("cli/select.py", "centred G-Vendi", r"has a centred G-Vendi above",
     chosen("flat", 4, method="relaxed", center=True), chosen("flat", 4, method="relaxed"), r"has a G-Vendi above"),
    ("cli/select.py", "{} (centred)", r"has a quality \(centred\) above",
     chosen("flat", 4, method="relaxed", objective="quality", quality=np.ones(64), center=True),
     chosen("flat", 4, method="relaxed", objective="quality", quality=np.ones(64)), r"has a quality above"),
    ("selection/relaxed.py", "weights of entropy {} nats, at most {} below", r"weights of entropy 2\.7726 nats",
     relaxing("flat"), relaxing("copies"), r"weights of entropy 0\.0000 nats, at most 0\.0000 below"),
    # weights
    ("cli/weights.py", "G-Vendi {} of the best mixture", r"G-Vendi 5\.00  of the best mixture",
     weighed("one and four"), weighed("like and like"), r"G-Vendi 2\.00  of the best mixture"),
    ("cli/weights.py", "no weights within the limits give a G-Vendi above", r"give a G-Vendi above 5\n",
     weighed("one and four"), weighed("like and like"), r"give a G-Vendi above 2\n"),
    ("cli/weights.py", "rows that repeat bring no direction", r"rows that repeat bring no direction",
     weighed("one and four"), weighed("like and like"), ""),
    ("cli/weights.py", "G-Vendi grows with them: to compare sources", r"the sources have different numbers of rows",
     weighed("many and few"), weighed("like and like"), ""),
    # measures
    ("cli/measures.py", "G-Vendi {} (n = {}, K = {})", r"G-Vendi 16\.00  \(n = 64, K = 16\)",
     measured("flat"), measured("copies"), r"G-Vendi 1\.00  \(n = 40"),
    ("cli/measures.py", "mean cosine", r"mean cosine +1\.0000",
     measured("copies"), measured("orthogonal"), r"mean cosine +0\.0000"),
    # cluster
    ("cli/cluster.py", "iteration {}: mean cosine {}{}", r"iteration 0: mean cosine 1\.000000",
     clustered("copies", 1), clustered("flat", 2), r"iteration 0: mean cosine 0\."),
    ("cli/cluster.py", "mean cosine", r"mean cosine      1\.0000",
     clustered("copies", 1), clustered("flat", 2), r"mean cosine      0\."),
    ("cli/cluster.py", "sparse clusters", r"sparse clusters  1 with 8 rows",
     clustered("uneven", 2), clustered("copies", 1), r"sparse clusters  none: all have the same size"),
    # similarity matrices
    ("vendi/similarity.py", "the diagonal of K is not 1", r"the diagonal of K is not 1",
     warned([[2.0, 0.0], [0.0, 2.0]]), warned([[1.0, 0.0], [0.0, 1.0]]), ""),
    ("vendi/similarity.py", "K is not positive semi-definite", r"an eigenvalue is -0\.5",
     warned([[1.0, 2.0], [2.0, 1.0]]), warned([[1.0, 0.5], [0.5, 1.0]]), ""),
    # report
    (_REPORT, "The last doubling, from {} to {} rows", r"from 4 to 8 rows, raised",
     page("orthogonal", 1), page("copies", 1), r"from 20 to 40 rows, left G-Vendi as it was"),
    (_REPORT, "{} G-Vendi by {}.", r"raised G-Vendi by 100 %",
     page("orthogonal", 1), page("copies", 1), r"left G-Vendi as it was"),
    (_REPORT, "unless G-Vendi is near its ceiling of {}", r"near its ceiling of 1\.",
     page("copies", 1), page("flat", 2), r"near its ceiling of 16\."),
    (_REPORT, "There are too few rows for a curve", r"There are too few rows for a curve",
     page("one", 1), page("flat", 2), r"The last doubling"),
    (_REPORT, "G-Vendi at equal n, which {} rows bring to {} at most",
     r"which 40 rows bring to 16 at most", page("broad and narrow", 2), page("one and four", 1),
     r"which 4 rows bring to 4 at most"),
    (_REPORT, "The sparse half, {} of {} clusters", r"The sparse half, 1 of 2 clusters, holds 8 rows",
     page("uneven", 2), page("copies", 1), r"There is one cluster, so none is sparse"),
    (_REPORT, ", so none is sparse", r"There is one cluster, so none is sparse",
     page("copies", 1), page("uneven", 2), r"The sparse half"),
    (_REPORT, "mean cosine of a row to its centroid", r"mean cosine of a row to its centroid 1\.00",
     page("copies", 1), page("flat", 2), r"to its centroid 0\."),
    (_PARTS, "mean cosine to the centroid", r"mean cosine to the centroid 1\.00",
     page("copies", 1), page("orthogonal", 1), r"mean cosine to the centroid 0\."),
    (_PARTS, "{} of the rows, {} of the entropy", r"50 % of the rows, 80 % of the entropy",
     page("broad and narrow", 2), page("like and like", 1), r"50 % of the rows, 50 % of the entropy"),
    (_REPORT, "rows have such a twin", r"40 rows have such a twin; leaving out 39",
     page("copies", 1), page("orthogonal", 1), r"No row has such a twin"),
    (_REPORT, "clusters between; the sparsest are", r"2 clusters between; the sparsest are",
     page("flat", 12), page("uneven", 2), ""),
    (_REPORT, ", which {} rows are too many for", r"There is only one row",
     page("one", 1), page("flat", 2), ""),
    # synthesis
    ("cli/synthesize.py", "more rows alone raise it", r"G-Vendi: 30\.00 of 129 rows, 20\.00 of the 100 at the start",
     status(129), status(134), r"30\.00 of 134 rows"),
    ("cli/synthesize.py", "{}, {} at the start; G-Vendi is at K = {}",
     r"unlimited K: 33\.00, 22\.00 at the start; G-Vendi is at K = 16", status(134, ended=True), status(134),
     r"G-Vendi: 30"),
    ("synthesis/run.py", "too few to tell sparse regions", r"makes 1 of 100 seeds, too few to tell sparse regions",
     notes(100), notes(1000), ""),
    ("synthesis/loop/loop.py", "its cluster is not among the sparse ones", r"not among the sparse ones",
     verdict("cluster", False, True), verdict("cluster", True, False), r"accepted"),
    ("synthesis/loop/loop.py", "it raises the entropy by too little", r"raises the entropy by too little",
     verdict("gain", True, False), verdict("gain", False, True), r"accepted"),
    ("synthesis/report/page.py", "it raises the entropy by too little",
     r"low gain · it raises the entropy by too little",
     grown(stage="low gain"), grown(stage="copy"), r"copy · its prompt is in the pool"),
    (_GROWN, "at the start: more rows alone raise it",
     r"30\.0 of 134 rows; 20\.0 of the 100 at the start: more rows alone raise it", grown(), grown(rows=150),
     r"30\.0 of 150 rows"),
    (_GROWN, "not told apart", r"which rows of the same kind could do too: not told apart",
     grown(apart=False), grown(), r"20 % more than the 100 seeds ?\."),
    (_GROWN, "rows drawn from the grown pool score", r"20 % more than the 100 seeds",
     grown(), grown(after=16.0), r"20 % less than the 100 seeds"),
    (_GROWN, "No row has been accepted", r"No row has been accepted",
     grown(accepted=0, rows=100), grown(), r"rows drawn from the grown pool score 24\.0"),
    (_GROWN, "Entropy of the rows over the clusters", r"0\.690 nats, 0\.673 at the start",
     grown(), grown(accepted=0, rows=100), r"over the clusters: 0\.690 nats\."),
    (_GROWN, "Both questions were put to all {} candidates", r"put to all 4 candidates",
     grown(), grown(judged=0), r"No candidate has come as far as the rules"),
    (_GROWN, "in a sparse cluster", r"in a sparse cluster 2 \(67 %\) 1 \(33 %\)",
     grown(), grown(judged=0), r"No candidate has come as far as the rules"),
    # report and synthesis: the numbers of a score
    (_REPORT, "95 % interval {} to {} for another {}; at most {}", r"1\.00 to 1\.00 for another 40 rows; at most 1 ",
     page("copies", 1), page("flat", 2), r"14\.1 to 16\.0 for another 64 rows; at most 16 "),
    (_REPORT, "what exact gradients of these rows would score", r"95 % interval 1\.00 to 1\.00: what exact gradients",
     page("copies", 1), page("steep", 2), r"95 % interval 1\.21 to 1\.76: what exact gradients"),
    (_REPORT, "a diagnosis, not a better score", r"Centred 15\.0 the rows less their mean",
     page("flat", 2), page("copies", 1), r"Centred – all 40 rows equal the mean"),
    (_REPORT, "G-Vendi is not near its most, the noise of K changes it by", r"and no direction dominates",
     page("cancelling", 2), page("steep", 2), r"What limits this number K: the noise of sketches"),
    (_REPORT, "one row always scores 1", r"n: one row always scores 1",
     page("one", 1), page("copies", 1), r"100 % of the squared gradients lies along the mean"),
    (_REPORT, "are expected to score {} (95 % band {} to {})",
     r"are expected to score 1\.00 \(95 % band 1\.00 to 1\.00\)",
     page("copies", 1), page("orthogonal", 1), r"A forecast needs quarters of the rows, and so at least 16"),
    (_REPORT, "What unlimited data would score is not known",
     r"unlimited data would score is not known: twice the rows",
     page("new at each", 1), page("copies", 1), r"Unlimited data of the same source would score about 1\.00"),
    (_REPORT, "Unlimited data of the same source would score about",
     r"would score about 1\.00 \(95 % band 1\.00 to 1\.00",
     page("copies", 1), page("new at each", 1), r"What unlimited data would score is not known"),
    (_REPORT, "No single direction dominates these rows", r"No single direction dominates these rows",
     page("flat", 2), page("copies", 1), r"100 % of the squared gradients lies along the mean"),
    (_REPORT, "One row has one direction", r"One row has one direction, which says nothing of either",
     page("one", 1), page("flat", 2), r"No single direction dominates"),
    (_REPORT, "share of the first direction", r"share of the first direction 100 % ",
     page("copies", 1), page("flat", 2), r"share of the first direction 6\.2 %, of the second 6\.2 %"),
    (_REPORT, "mean cosine of two rows", r"mean cosine of two rows 1\.000",
     page("copies", 1), page("orthogonal", 1), r"mean cosine of two rows 0\.000"),
    (_REPORT, "without the first direction", r"without the first direction 8\.00",
     page("broad and narrow", 2), page("copies", 1), r"without the first direction –"),
    (_REPORT, "centred (without the mean)", r"centred \(without the mean\) 15\.0",
     page("flat", 2), page("copies", 1), r"centred \(without the mean\) –"),
    (_PARTS, "95 % interval {} to {} · unlimited K {} · centred {}", r"broad 8\.00 95 % interval 6\.97 to 9\.19 · unl",
     page("broad and narrow", 2), page("like and like", 1), r"one 1\.00 95 % interval 1\.00 to 1\.00 · unl"),
    ("cli/synthesize.py", "{}, {} at the start; G-Vendi is at K = {}", r"unlimited K: 8\.00, 4\.00 at the start",
     ended(8), ended(4), r"unlimited K: 4\.00, 4\.00 at the start"),
    (_GROWN, "what exact gradients of these rows would score", r"Unlimited K 8\.00 4\.00 at the start",
     grown(), grown(accepted=0, rows=100), r"Unlimited K 4\.00 4\.00 at the start"),
    (_GROWN, "both less the mean of the seeds: a diagnosis, not a better score",
     r"Centred [5-8]\.\d\d 3\.00 at the start",
     grown(), grown(accepted=0, rows=100), r"Centred 3\.00 3\.00 at the start"),
]  # fmt: skip


def growth_is_of_n(world: World) -> None:
    """G-Vendi of random subsets rises with their rows, unless all rows are alike."""
    rows = torch.randn(400, K, generator=torch.Generator().manual_seed(0))
    scores = [gvendi(rows[:n]) for n in (8, 20, 100, 400)]
    assert scores == sorted(scores)
    assert scores[-1] > 1.5 * scores[0]
    assert gvendi(torch.ones(4, K)) == pytest.approx(gvendi(torch.ones(40, K)))


def entropy_is_the_mean_surprisal(world: World) -> None:
    rows = torch.randn(50, K, generator=torch.Generator().manual_seed(1))
    state = VendiState(K).update(rows)
    assert float(state.contributions(rows).mean()) == pytest.approx(state.entropy(), abs=1e-6)
    assert math.exp(state.entropy()) == pytest.approx(state.gvendi())
    # A rare direction is the more surprising one.
    steep = torch.from_numpy(RUNS["steep"][0])
    surprisal = VendiState(K).update(steep).contributions(steep)
    assert surprisal[0] < surprisal[-1]


def a_share_is_worth_raising(world: World) -> None:
    """To first order in the share: the broad group's is worth raising, the narrow one's is not."""
    from gvendi_fast.analysis.mixture import mixture_entropy

    rows, groups = RUNS["broad and narrow"]
    whole, is_broad = torch.from_numpy(rows), np.array(groups) == "broad"
    surprisal = VendiState(K).update(whole).contributions(whole).numpy()
    assert surprisal[is_broad].sum() / surprisal.sum() > is_broad.mean()
    states = {name: VendiState(K).update(whole[np.array(groups) == name]) for name in ("broad", "narrow")}
    now, more, less = (mixture_entropy(states, {"broad": w, "narrow": 1 - w}) for w in (0.5, 0.51, 0.49))
    assert less < now < more


def eigenvalues_are_shares(world: World) -> None:
    flat, steep = (VendiState(K).update(torch.from_numpy(RUNS[name][0])) for name in ("flat", "steep"))
    assert float(flat.spectrum().sum()) == pytest.approx(1)
    assert flat.effective_spectrum((0.9,))[0.9] > steep.effective_spectrum((0.9,))[0.9]
    assert flat.gvendi() == pytest.approx(K)
    assert steep.gvendi() < 2


def centring_takes_out_what_all_rows_share(world: World) -> None:
    """A shared direction lowers the score of diverse rows, whatever it is, and the centred value is without it."""
    from gvendi_fast.vendi import RowMean, centered

    rows = torch.randn(400, 40, generator=torch.Generator().manual_seed(2))
    shared = rows + 8 * torch.eye(40)[0]
    plain, pressed = gvendi(rows), gvendi(shared)
    assert pressed < 0.7 * plain
    assert centered(shared, RowMean(40).update(shared)).value > 0.9 * plain
    # By the mean of another set a set has another value.
    apart = centered(shared, RowMean(40).update(rows)).value
    assert apart < 0.8 * centered(shared, RowMean(40).update(shared)).value


def large_clusters_hold_most_rows(world: World) -> None:
    from gvendi_fast.clusters.kmeans import sparse_clusters

    sizes = torch.tensor([40, 8, 3, 20])
    assert sparse_clusters(sizes).tolist() == [False, True, True, False]


def a_shared_direction_presses_more_diverse_rows_more(world: World) -> None:
    """A direction of half of the squares, added to flat rows: exp(h) G^(1/2) in place of G."""
    loss = []
    for rest in (4, 12):
        rows = torch.cat([torch.full((rest, 1), 1.0), torch.eye(rest)], dim=1)
        score_of_rest, pressed = gvendi(rows[:, 1:]), gvendi(rows)
        assert score_of_rest == pytest.approx(rest)
        own = RowMean(rest + 1).update(rows)
        assert centered(rows, own).value == pytest.approx(rest - 1, rel=1e-4)
        loss.append(pressed / score_of_rest)
    assert loss[1] < loss[0] <= 1


def a_mean_of_its_own_takes_more_from_a_set_than_its_difference(world: World) -> None:
    """Copies of one row and copies of another: each is nothing without its own mean, and differs by a common one."""
    one, other = torch.eye(4)[[0] * 5], torch.eye(4)[[1] * 5]
    both = RowMean(4).update(torch.cat([one, other]))
    assert centered(one, RowMean(4).update(one)).value is None
    assert centered(one, both).value == pytest.approx(1)
    assert centered(torch.cat([one, other]), both).value == pytest.approx(1)


def gains_are_what_they_are_called(world: World) -> None:
    from gvendi_fast import select

    rows = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    rows, quality = torch.nn.functional.normalize(rows, dim=1), np.linspace(1, 5, 40)

    def entropy(of: torch.Tensor) -> float:
        return math.log(gvendi(of))

    found = select(rows, 6)
    values = torch.linalg.eigvalsh(rows[found.rows].double().T @ rows[found.rows].double()).clamp(min=1e-300)
    assert found.gain.sum() == pytest.approx(-float((values * values.log()).sum()), abs=1e-5)
    # Less its 6 ln 6, the same for any 6 rows, that is 6 times the entropy.
    assert found.gain.sum() / 6 + math.log(6) == pytest.approx(entropy(rows[found.rows]), abs=1e-6)
    assert found.surprisal.mean() == pytest.approx(entropy(rows[found.rows]), abs=1e-6)
    found = select(rows, 6, "quality", quality=quality)
    value = math.log(quality[found.rows].mean()) + entropy(rows[found.rows])
    assert found.gain.sum() == pytest.approx(value, abs=1e-5)
    found = select(rows, 6, "facility")
    nearest = (rows @ rows[found.rows].T).max(dim=1).values
    assert found.gain.sum() == pytest.approx(float(nearest.mean()), abs=1e-5)
    found = select(rows, 6, "logdet")
    assert found.gain.sum() == pytest.approx(found.value, abs=1e-5)
    found = select(rows, 6, method="relaxed")
    chosen = rows[found.rows]
    lost = [entropy(chosen) - entropy(torch.cat([chosen[:i], chosen[i + 1 :]])) for i in range(6)]
    assert found.gain == pytest.approx(lost, abs=1e-5)


# Printed whatever the data are: (file, words in the source, what must hold for them to be true).
EXPLANATIONS: list[tuple[str, str, Callable[[World], None]]] = [
    ("cli/app.py", "how many directions n rows use, from 1 to the smaller of n and K. It grows with n", growth_is_of_n),
    ("cli/select.py", "how unlike the other chosen rows it is, in nats", gains_are_what_they_are_called),
    ("selection/result.py", "rise by this pick of the mean cosine of the pool's", gains_are_what_they_are_called),
    ("selection/result.py", "rise of ln(mean quality) + entropy by this pick", gains_are_what_they_are_called),
    ("selection/result.py", "what the entropy of the choice would lose", gains_are_what_they_are_called),
    (_REPORT, "for what all rows have in common goes with it; and sets compare only by one and the same mean",
     a_mean_of_its_own_takes_more_from_a_set_than_its_difference),
    (_REPORT, "nats; its exponential is G-Vendi", entropy_is_the_mean_surprisal),
    (_REPORT, "G-Vendi counts, roughly, how many different directions", eigenvalues_are_shares),
    (_REPORT, "It grows with the number of rows.", growth_is_of_n),
    (_REPORT, "A group with a larger part of the entropy than of the rows", a_share_is_worth_raising),
    (_REPORT, "that makes the whole more diverse, until the two parts agree", a_share_is_worth_raising),
    (_REPORT, "Large clusters are what the corpus already has plenty of", large_clusters_hold_most_rows),
    (_REPORT, "Surprisal says how rare a row's direction is", entropy_is_the_mean_surprisal),
    (_REPORT, "Look through the most surprising rows", entropy_is_the_mean_surprisal),
    (_REPORT, "The least surprising ones are what the corpus repeats most", entropy_is_the_mean_surprisal),
    (_REPORT, "Each eigenvalue is the share of one direction in the whole", eigenvalues_are_shares),
    (_REPORT, "A line that falls slowly is data that uses many directions evenly", eigenvalues_are_shares),
    (_GROWN, "G-Vendi counts, roughly, how many different directions", eigenvalues_are_shares),
    (_GROWN, "It grows with the number of rows, so the fair question", growth_is_of_n),
    (_GROWN, "The whole pool, so a part of any climb is its rows alone", growth_is_of_n),
    (_REPORT, "A direction that all rows share may be either.", centring_takes_out_what_all_rows_share),
    (_REPORT, "Where the rows are diverse without it, it presses", centring_takes_out_what_all_rows_share),
    (_REPORT, "for what all rows have in common goes with it", centring_takes_out_what_all_rows_share),
    (_REPORT, "sets compare only by one and the same mean", centring_takes_out_what_all_rows_share),
]  # fmt: skip
# Whole strings that say nothing about data: headings, labels of axes and columns, steps of the work, limits of lengths.
NO_STATEMENTS: list[tuple[str, str]] = [
    ("cli/compare.py", "unlimited K"),
    ("cli/score.py", "one direction"),
    ("cli/score.py", "unlimited K"),
    ("cli/score.py", "unlimited n"),
    ("cli/synthesize.py", "unlimited K"),
    (_REPORT, "Unlimited K"),
    (_REPORT, "Centred:"),
    (_REPORT, "share of the first direction"),
    (_REPORT, "mean cosine of two rows"),
    (_REPORT, "without the first direction"),
    (_REPORT, "centred (without the mean)"),
    (_GROWN, "Unlimited K"),
    ("cli/measures.py", "2-gram entropy"),
    ("cli/select.py", "id, rank, gain, surprisal and cluster of each: {}"),
    ("cli/wording.py", "at most {}"),
    ("selection/result.py", ", of centred rows"),
    ("cli/weights.py", "G-Vendi (all rows)"),
    ("report/data.py", "surprisal of every row"),
    ("report/data.py", "map and near-duplicates"),
    ("report/figures.py", "eigenvalue number"),
    ("report/figures.py", "surprisal in nats"),
    ("report/figures.py", "sparse half"),
    ("report/page.py", "Diversity of {}"),
    (_REPORT, "mean over random subsets of each size; band:"),
    (_REPORT, "is diverse, and which is not?"),
    (_REPORT, "First two principal axes of the sketches, scaled to length 1 and centred."),
    (_REPORT, "Which rows are unlike the others, and which are not?"),
    (_REPORT, "Surprisal of all {} rows, in nats."),
    (_REPORT, "Most surprising"),
    (_REPORT, "Least surprising"),
    (_REPORT, "Cosine of each row to the row nearest to it; right of the dashed line are near-duplicates."),
    (_REPORT, "How many directions carry it?"),
    (_REPORT, "Eigenvalues of the sketches' covariance, largest first."),
    (_GROWN, "G-Vendi at equal n"),
    (_GROWN, "Is the pool more diverse than it was?"),
    (_GROWN, "G-Vendi of {} rows, in the lower pair of {}; compare inside a pair only."),
    (
        _GROWN,
        "The run clusters anew in every round, so that what is sparse changes; here all rows are put to the clusters "
        "of its start.",
    ),
    ("synthesis/checks/verifiers.py", "answer of {} characters; at most {} are compared"),
    ("synthesis/config/schema.py", "and at most {}"),
    ("synthesis/report/figures.py", "G-Vendi of the pool"),
    ("synthesis/tasks/nli.py", "a pair of {} characters; at most {} are shown in a prompt"),
    ("synthesis/tasks/sections.py", "answer of {} characters; at most {} are read"),
    ("synthesis/tasks/task.py", "a row of {} characters; at most {} are shown in a prompt"),
    (_REPORT, "Unlimited K"),
    (_REPORT, "Centred:"),
    (_GROWN, "Unlimited K"),
    ("cli/synthesize.py", "unlimited K"),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """All runs and what was said of them; pages come without pictures, which take most of the time."""
    from gvendi_fast.report import page as of_run
    from gvendi_fast.synthesis.report import page as of_synthesis

    def blank(numbers):
        return {"wide": "", "narrow": ""}

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")
        patch.setattr(of_run, "_FIGURES", dict.fromkeys(of_run._FIGURES, blank))
        for name in ("growth_figure", "acceptance_figure", "clusters_figure"):
            patch.setattr(of_synthesis.figures, name, blank)
        yield World(tmp_path_factory.mktemp("sentences"))


@pytest.mark.parametrize(
    ("seen", "true", "false", "instead"),
    [row[2:] for row in SENTENCES],
    ids=[f"{row[0]}: {row[1][:40]}" for row in SENTENCES],
)
def test_a_sentence_is_printed_where_it_is_true_and_not_where_it_is_false(world, seen, true, false, instead):
    said, otherwise = true(world), false(world)
    assert re.search(seen, said), said
    assert not re.search(seen, otherwise), otherwise
    assert re.search(instead, otherwise), otherwise


@pytest.mark.parametrize(
    "fact", dict.fromkeys(fact for _, _, fact in EXPLANATIONS), ids=lambda fact: fact.__name__
)
def test_what_is_printed_whatever_the_data_are_holds(world, fact):
    fact(world)


def test_every_printed_string_about_diversity_is_in_a_table():
    listed = [*SENTENCES, *EXPLANATIONS]
    missing = [
        (name, text)
        for name, text in printed_strings(PACKAGE)
        if (name, text) not in NO_STATEMENTS and not any(row[0] == name and row[1] in text for row in listed)
    ]
    assert missing == [], "add each with the case that makes it true and the one that makes it false"


def test_no_row_of_a_table_is_left_over():
    """Words that are nowhere in their file any more would hide a sentence that came in their place."""
    strings = {row[0]: " ".join((PACKAGE / row[0]).read_text().split()) for row in SENTENCES}
    known = printed_strings(PACKAGE)
    for row in [*SENTENCES, *EXPLANATIONS, *NO_STATEMENTS]:
        whole = any(name == row[0] and row[1] in text for name, text in known)
        # A sentence without a word of the subject is found by its longest part between values.
        part = max(row[1].split("{}"), key=len)
        assert whole or part.strip() in strings.get(row[0], ""), row[:2]


def test_the_scan_finds_what_is_printed_and_nothing_else(tmp_path):
    (tmp_path / "cli").mkdir()
    (tmp_path / "report").mkdir()
    (tmp_path / "cli" / "new.py").write_text(
        '"""A docstring on diversity."""\n'
        "def say(x: Annotated[int, typer.Option(help='more diverse')] = 1):\n"
        '    """Another on G-Vendi."""\n'
        "    print(f'this set is {x:.2f} times as diverse'\n"
        "          f' as that one')\n"
        "    print('two sparse' if x else f'{x} near duplicates')\n"
        "    lines = {'a label': 'nothing here', 'G-Vendi': 1}\n"
        "    raise GvendiError('a diverse error')\n"
    )
    (tmp_path / "report" / "page.jinja").write_text(
        "{# diversity #}<p>Rows are diverse.\nOthers are not: {{ x }} alike.</p>{% if sparse %}<b>fine</b>{% endif %}"
    )
    assert printed_strings(tmp_path) == [
        ("cli/new.py", "this set is {} times as diverse as that one"),
        ("cli/new.py", "two sparse"),
        ("cli/new.py", "{} near duplicates"),
        ("report/page.jinja", "Rows are diverse."),
        ("report/page.jinja", "{} alike."),
    ]
