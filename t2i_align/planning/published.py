"""Published models' configurations as folders, so that they can be planned for without a download."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from t2i_align.config import RunConfig
from t2i_align.utils.files import read_json

TABLE = Path(__file__).parents[1] / "assets" / "published.yaml"


def published() -> dict[str, dict[str, Any]]:
    """The bundled configurations by Hub id: `model_index.json`, with each component's configuration as third entry."""
    models: dict[str, dict[str, Any]] = yaml.safe_load(TABLE.read_text(encoding="utf-8"))["models"]
    return models


@contextmanager
def described(config: RunConfig) -> Iterator[RunConfig]:
    """The run with a local folder of configurations in place of a Hub id whose configurations are bundled."""
    index = published().get(config.model.path)
    if index is None:
        yield config
        return
    with tempfile.TemporaryDirectory() as folder:
        listed: dict[str, Any] = {}
        for name, entry in index.items():
            listed[name] = entry[:2] if isinstance(entry, list) else entry
            if isinstance(entry, list) and len(entry) == 3:
                kind = "scheduler_config.json" if name == "scheduler" else "config.json"
                (Path(folder) / name).mkdir()
                (Path(folder) / name / kind).write_text(json.dumps({"_class_name": entry[1], **entry[2]}))
        (Path(folder) / "model_index.json").write_text(json.dumps(listed))
        yield replace(config, model=replace(config.model, path=folder, revision=None, variant=None))


def components(folder: Path) -> dict[str, list[str]]:
    """Library and class of the components in a local folder that have a configuration."""
    index = read_json(folder / "model_index.json")
    return {name: entry for name, entry in index.items() if (folder / name / "config.json").is_file()}
