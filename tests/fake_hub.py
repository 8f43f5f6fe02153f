"""The Hugging Face hub in small: what the packages `datasets` and `huggingface_hub` ask it for, without a network."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Any

OLD, NEW = "a" * 40, "b" * 40


class FakeHub:
    """Data sets {repo: {configuration: {split: rows}}} at the commits that `revisions` names.

    row: {fields} of commit and number. breaks_at: a row whose download fails once, with `error`. asked: every (what,
    repo) that was asked for. read: numbers of the rows that were downloaded.
    """

    def __init__(self) -> None:
        self.sets: dict[str, dict[str, dict[str, int]]] = {}
        self.revisions = {"main": OLD, OLD: OLD, NEW: NEW, "next": NEW}
        self.breaks_at: int | None = None
        self.error: Callable[[], BaseException] = lambda: ConnectionError("the line is dead")
        self.asked: list[tuple[str, str]] = []
        self.read: list[int] = []
        self.row = lambda commit, n: {"prompt": f"{n}?", "completion": f"{n} in {commit[0]}"}

    def install(self, monkeypatch: Any) -> FakeHub:
        import datasets
        import huggingface_hub
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(
            huggingface_hub.HfApi, "dataset_info", lambda _, *given, **more: self.info(*given, **more)
        )
        monkeypatch.setattr(datasets, "get_dataset_config_names", self.configs)
        monkeypatch.setattr(datasets, "get_dataset_split_names", self.splits)
        monkeypatch.setattr(datasets, "load_dataset", self.load)
        return self

    def info(self, repo: str, revision: str | None = None, timeout: float | None = None) -> Any:
        assert timeout
        self.asked.append(("commit", repo))
        if repo not in self.sets:
            raise hub_error("RepositoryNotFoundError")
        if (revision or "main") not in self.revisions:
            raise hub_error("RevisionNotFoundError")
        return types.SimpleNamespace(sha=self.revisions[revision or "main"])

    def configs(self, repo: str, revision: str) -> list[str]:
        self.asked.append(("configurations", repo))
        return list(self.sets[repo])

    def splits(self, repo: str, config: str, revision: str) -> list[str]:
        self.asked.append(("splits", repo))
        return list(self.sets[repo][config])

    def load(self, repo: str, config: str, split: str, streaming: bool, revision: str) -> Any:
        from datasets import IterableDataset

        assert streaming
        self.asked.append(("rows", repo))
        count = self.sets[repo][config][split]

        def rows() -> Iterator[dict[str, Any]]:
            for number in range(count):
                if number == self.breaks_at:
                    self.breaks_at = None
                    raise self.error()
                self.read.append(number)
                yield self.row(revision, number)

        return IterableDataset.from_generator(rows)


def hub_error(name: str) -> Exception:
    """An error of `huggingface_hub` as a request raises it."""
    from huggingface_hub import errors

    kind = getattr(errors, name)
    response = types.SimpleNamespace(headers={}, status_code=404, request=None)
    return kind("404", response=response)
