"""`t2i-align data split`: a held-out part of a source, by prompt or user."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from t2i_align.data import hub, readers, spec
from t2i_align.data.schema import Skipped
from t2i_align.data.spec import By, Part
from t2i_align.errors import UserError
from t2i_align.utils.settings import read_yaml


def split(
    source: str | Path,
    out: str | Path,
    *,
    held_out: float = 0.1,
    by: Sequence[By] = ("prompt",),
    seed: int = 0,
    format: str = "auto",
) -> dict[str, int]:
    """Write `train.yaml`, `held_out.yaml` and `held_out_prompts.txt`; returns how many groups and prompts are in each.

    No group is copied: the files say by which rule a group belongs to them (`spec.Part`).

    Args:
        source: preference data: file, folder, dataset spec, `hub:owner/name`, or `testbed:pairs`.
        out: folder to write them to.
        held_out: share of prompts or users that is held out.
        by: what is kept apart: `prompt`, `user` or both.
        seed: selects which are held out.
        format: format of the source; `auto` detects it.

    Raises:
        UserError: a source that cannot be read, is a part already, or leaves one side empty.
    """
    path = readers.resolve(source).absolute()
    values: dict[str, Any] = {"path": str(path), "format": readers.detect(path, format)}
    if spec.is_spec(path):
        described, file = spec.load(path)
        if described.part:
            raise UserError(f"{source}: this is one part of a split already; split what it describes")
        values = read_yaml(path)
        if not described.path.startswith(hub.PREFIX):
            values["path"] = str(file)
    part = {"held_out": held_out, "by": list(by), "seed": seed}
    sides = {name: Part(of=name, **part) for name in ("train", "held_out")}  # type: ignore[arg-type]
    counts = dict.fromkeys([*sides, "on_neither_side", "skipped"], 0)
    prompts: dict[str, None] = {}
    for item in readers.read(path, format, images=False):
        if isinstance(item, Skipped):
            counts["skipped"] += 1
            continue
        belongs = {name: side.belongs(item) for name, side in sides.items()}
        counts[next((name for name, on in belongs.items() if on), "on_neither_side")] += 1
        if belongs["held_out"]:
            prompts[" ".join(item.prompt.split())] = None
    if empty := [name for name in sides if not counts[name]]:
        raise UserError(f"{source}: with held_out={held_out:g} and seed={seed}, {empty[0]} is empty; choose others")
    folder = Path(out).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    for name in sides:
        text = yaml.safe_dump({**values, "part": {"of": name, **part}}, sort_keys=False, allow_unicode=True)
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    (folder / "held_out_prompts.txt").write_text("".join(f"{text}\n" for text in prompts), encoding="utf-8")
    return {**counts, "held_out_prompts": len(prompts)}
