"""A configuration's paths made absolute, so that its run is resumed from any working directory.

What a path is resolved against is the working directory when the run begins. Of a run's settings the content of these
files counts and not where they lie (`Config.deciding`).
"""

from __future__ import annotations

import glob
import os
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gvendi_fast.data.run_directory import RunDirectory
from gvendi_fast.sketching.proxy.load import TINY
from gvendi_fast.synthesis.config.config import Config, config_from, is_path_setting
from gvendi_fast.synthesis.config.modules import find_module


def absolute(config: Config) -> Config:
    """The configuration with absolute paths, a leading ~ being the home folder.

    These are out, pool.data, pool.corpus, filter.tests, template files, verifier_folder, and the folders of local
    models. Where the module of a verifier lies in the working directory or on Python's path outside of the installed
    packages, its folder becomes verifier_folder. A run directory in pool.data whose corpus has relative paths gets the
    working directory as pool.corpus. Nothing is checked here, so a path that does not exist stays an error of whoever
    opens it.
    """
    whole = config.to_dict()
    whole["out"] = _absolute(config.out)
    pool, filters, task = whole["pool"], whole["filter"], whole["task"]["settings"]
    pool["data"] = [_absolute_glob(item) for item in pool["data"]]
    pool["corpus"] = _corpus(pool)
    filters["tests"] = [_absolute_glob(item) for item in filters["tests"]]
    for settings in (filters, task):
        for name, value in settings.items():
            if is_path_setting(name) and isinstance(value, str):
                settings[name] = _absolute(value)
    if isinstance(task.get("verifier"), str) and not task.get("verifier_folder"):
        folder = _folder_of(task["verifier"])
        if folder is not None:
            task["verifier_folder"] = folder
    whole["proxy"]["name"] = _absolute_model(whole["proxy"]["name"])
    if config.generator.kind == "local":
        whole["generator"]["model"] = _absolute_model(whole["generator"]["model"])
    return config_from(whole)


def is_run_directory(data: Sequence[str]) -> bool:
    """Whether pool.data is one run directory of `gvendi sketch`."""
    return len(data) == 1 and (Path(data[0]) / "spec.json").is_file()


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _absolute_glob(item: str) -> str:
    item = os.path.expanduser(item)
    if glob.has_magic(item) and not os.path.exists(item) and not os.path.isabs(item):
        # The working directory's own name may hold brackets.
        return os.path.join(glob.escape(os.getcwd()), item)
    return os.path.abspath(item)


def _absolute_model(name: str) -> str:
    # A name of the hub looks like a relative path, so only a folder that is there is one.
    path = os.path.expanduser(name)
    return os.path.abspath(path) if name != TINY and os.path.isdir(path) else name


def _corpus(pool: Mapping[str, Any]) -> str | None:
    if pool["corpus"] is not None:
        return _absolute(pool["corpus"])
    if not is_run_directory(pool["data"]):
        return None
    manifest = RunDirectory.load(pool["data"][0]).manifest or {}
    paths = [source["path"] for source in manifest.get("files", ())]
    return os.getcwd() if paths and not any(map(os.path.isabs, paths)) else None


def _folder_of(verifier: str) -> str | None:
    """The folder that Python's path needs for this module, None for an installed one and where there is none."""
    top = verifier.partition(":")[0].partition(".")[0]
    spec = find_module(top) or find_module(top, os.getcwd())
    if spec is None:
        return None
    places = list(spec.submodule_search_locations or ()) or [spec.origin]
    folder = os.path.dirname(os.path.abspath(places[0]))
    installed = {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}
    return None if any(Path(folder).is_relative_to(place) for place in installed) else folder
