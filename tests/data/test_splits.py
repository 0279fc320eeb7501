"""The held-out part of a data set: stable, by prompt, and by prompt and user."""

from __future__ import annotations

from pathlib import Path

from tests.data.test_examples import write_jsonl
from tests.formats import groups, images, skips


def test_no_prompt_of_the_held_out_part_is_in_the_other(tmp_path: Path) -> None:
    """Prompts that differ in case and spaces only are one; the other part of a pair's rows is in the other file."""
    images(tmp_path)
    entries = [
        {"prompt": text, "chosen": "0.png", "rejected": "1.png", "user": n % 7}
        for n in range(60)
        for text in (f"A fox  {n % 30}", f"a fox {n % 30} ")
    ]
    write_jsonl(tmp_path / "d.jsonl", entries)
    parts = {}
    for of in ("train", "held_out"):
        (tmp_path / f"{of}.yaml").write_text(f"path: d.jsonl\npart: {{of: {of}, held_out: 0.3}}\n")
        parts[of] = groups(tmp_path / f"{of}.yaml")
    assert sorted(group.id for part in parts.values() for group in part) == sorted(
        group.id for group in groups(tmp_path / "d.jsonl")
    )
    texts = [{" ".join(group.prompt.lower().split()) for group in part} for part in parts.values()]
    assert not texts[0] & texts[1] and 3 <= len(texts[1]) <= 16 and len(texts[0] | texts[1]) == 30
    # More data and another order leave each prompt where it was.
    more = [{"prompt": f"new {n}", "chosen": "0.png", "rejected": "1.png"} for n in range(20)]
    write_jsonl(tmp_path / "d.jsonl", more + entries[::-1])
    again = {" ".join(group.prompt.lower().split()) for group in groups(tmp_path / "held_out.yaml")}
    assert {text for text in again if text.startswith("a fox")} == texts[1]


def test_by_prompt_and_user_nothing_is_shared(tmp_path: Path) -> None:
    images(tmp_path)
    entries = [
        {"prompt": f"fox {n % 12}", "chosen": "0.png", "rejected": "1.png", "user": n // 12, "id": str(n)}
        for n in range(144)
    ]
    write_jsonl(tmp_path / "d.jsonl", entries)
    parts, neither = {}, {}
    for of in ("train", "held_out"):
        (tmp_path / f"{of}.yaml").write_text(f"path: d.jsonl\npart: {{of: {of}, held_out: 0.4, by: [prompt, user]}}\n")
        parts[of], neither[of] = groups(tmp_path / f"{of}.yaml"), skips(tmp_path / f"{of}.yaml")
    assert parts["train"] and parts["held_out"] and neither["train"] == neither["held_out"]
    for what in ("prompt", "user"):
        assert not {getattr(g, what) for g in parts["train"]} & {getattr(g, what) for g in parts["held_out"]}
    assert sum(map(len, parts.values())) + len(neither["train"]) == 144
    assert set(neither["train"].values()) == {"its prompt and its user are on two sides of the split"}
