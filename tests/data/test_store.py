"""Prepared data: round trip, skipped groups, kills and resumption, several writers."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipelines import PipelineError
from pipelines.process import RectifiedFlow
from t2i_align.data import encode
from t2i_align.data.batch import Batch
from t2i_align.data.encode import Latents
from t2i_align.data.loader import PreparedDataset
from t2i_align.data.opening import survey
from t2i_align.data.readers import read
from t2i_align.data.schema import COLUMNS, Group, Selection
from t2i_align.data.store import TEXTS, Store, write
from t2i_align.diffusion.noising import drop_captions
from t2i_align.diffusion.randomness import SampleRNG
from t2i_align.errors import UserError
from t2i_align.objectives.base import Requirements
from tests.data.test_examples import StandIn, colour, jpeg, pick_rows, write_images, write_jsonl, write_parquet

PARTS = {"source": "abc", "height": 8}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "MAX_ROWS_PER_SHARD", 4)


def encoder(pipeline: Any = None, batch_size: int = 3, size: tuple[int, int] = (8, 8)) -> Latents:
    return Latents(pipeline or StandIn(), [size], batch_size=batch_size)


def make(source: Path, out: Path, pipeline: Any = None, batch_size: int = 3, **options: Any) -> Store:
    write(read(source), encoder(pipeline, batch_size), out, **{"fingerprint": PARTS, "progress": False, **options})
    return Store(out)


def images(groups: Store) -> dict[str, list[tuple[int, ...]]]:
    """The colours of each group's candidates, read back from its latents."""
    colours = {}
    for number in range(len(groups)):
        columns, row = groups.locate(number)
        latents = np.frombuffer(columns["latents"][row].as_py(), np.float16).reshape(-1, 3, 16)
        colours[columns["id"][row].as_py()] = list(map(tuple, np.round(latents.mean(2, float) * 255).astype(int)))
    return colours


def fetched(store: Store, *numbers: int, columns: Sequence[str] = ()) -> Batch:
    """The batch of these groups, in epoch 0."""
    dataset = PreparedDataset(store, np.array(numbers), Requirements(columns=tuple(columns)), {})
    return dataset.to_batch(dataset.__getitems__([(0, number) for number in numbers]), torch.device("cpu"))


def assert_paired(groups: Store, rows: list[int]) -> None:
    """Exactly these rows of `pick_rows`, each with its own two images, the preferred first."""
    found = images(groups)
    assert list(found) == [str(1000 + row) for row in rows]
    for row in rows:
        expected = [colour(2 * row), colour(2 * row + 1)]
        assert np.abs(np.array(found[str(1000 + row)]) - np.array(expected)).max() <= 3, row


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_what_goes_in_comes_out(tmp_path: Path, batch_size: int) -> None:
    pipeline = StandIn()
    groups = make(write_parquet(tmp_path / "a.parquet", pick_rows(10)), tmp_path / "out", pipeline, batch_size)
    assert_paired(groups, list(range(10)))
    assert sorted(pipeline.prompts) == sorted(["", "", *(f"caption {n}" for n in range(5))])  # once; "" also to probe
    dataset = PreparedDataset(groups, np.arange(10), Requirements(candidates=2), {})
    batch = dataset.to_batch(dataset.__getitems__([(2, 7), (0, 1)]), torch.device("cpu"))
    assert batch.keys == ("2/1007", "0/1001")
    assert batch.latents.shape == (2, 2, 3, 4, 4) and batch.latents.dtype == torch.float32
    assert batch.scores.tolist() == [[1.0, 0.0]] * 2
    expected = StandIn().encode_prompts(["caption 2", "caption 1"])
    assert torch.equal(batch.conditioning["embeds"], expected["embeds"])
    assert torch.equal(batch.conditioning["mask"], expected["mask"])  # stays bool
    empty = dataset.empty_conditioning(torch.device("cpu"))
    assert all(torch.equal(empty[name], tensor) for name, tensor in StandIn().encode_prompts([""]).items())
    assert groups.manifest["counts"] == {
        "groups": 10, "skipped": 0, "ties": 0, "texts": 6, "candidates": {"2": 10},
        "columns": {"scores": 0, **dict.fromkeys(COLUMNS, 0), "user": 10},
    }  # fmt: skip


@given(bad=st.sets(st.tuples(st.integers(0, 10), st.sampled_from(["jpg_0", "jpg_1"])), max_size=14))
@settings(max_examples=25, deadline=None)
def test_a_bad_image_never_mispairs_its_neighbours(
    tmp_path_factory: pytest.TempPathFactory, bad: set[tuple[int, str]]
) -> None:
    folder = tmp_path_factory.mktemp("bad")
    rows = pick_rows(12)  # row 11 stays good
    for row, name in bad:
        rows[name][row] = rows[name][row][: len(rows[name][row]) // 2]
    groups = make(write_parquet(folder / "a.parquet", rows), folder / "out")
    skipped = [json.loads(line) for line in (folder / "out" / "skipped.jsonl").read_text().splitlines()]
    lost = sorted({row for row, _ in bad})
    assert_paired(groups, [row for row in range(12) if row not in lost])
    assert [row["id"] for row in skipped] == [str(1000 + row) for row in lost]
    assert all("cannot be decoded" in row["reason"] and "a.parquet, row" in row["origin"] for row in skipped)
    assert groups.manifest["counts"]["skipped"] == len(lost)


def test_images_are_decoded_while_those_before_are_encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight pairs, four images at once: each encoder but the last waits until one of the next is there."""
    loaded: list[Any] = []
    genuine = encode.load
    monkeypatch.setattr(encode, "load", lambda *args: loaded.append(genuine(*args)) or loaded[-1])

    class Waiting(StandIn):
        def encode_pixels(self, pixels: Tensor) -> Tensor:
            encoded = super().encode_pixels(pixels)
            deadline = time.monotonic() + 20
            while len(loaded) < min(self.images, 16) and len(pixels) > 1:  # the first was a blank one
                assert time.monotonic() < deadline, "nothing is decoded meanwhile"
                time.sleep(0.001)
            return encoded

    monkeypatch.setattr(encode, "MAX_ROWS_PER_SHARD", 8)
    groups = make(write_parquet(tmp_path / "a.parquet", pick_rows(8)), tmp_path / "out", Waiting(), batch_size=4)
    assert_paired(groups, list(range(8)))


def test_a_finished_cache_is_reused_and_another_refused(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "a.parquet", pick_rows(3))
    make(source, tmp_path / "out")
    pipeline = StandIn()
    make(source, tmp_path / "out", pipeline)
    assert pipeline.images == 1  # the blank one that tells the latents' shape
    with pytest.raises(UserError, match="height is 8 there, 16 here"):
        make(source, tmp_path / "out", fingerprint={**PARTS, "height": 16})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not empty"):
        make(source, tmp_path / "full")


def test_names_that_are_not_unicode_are_skipped_and_written_down(tmp_path: Path) -> None:
    """A file system's names are bytes, and JSON can escape half a surrogate pair; neither can be an id."""
    name = os.fsdecode(b"caf\xe9")
    for folder in ("chosen", "rejected"):
        write_images(tmp_path / "pairs" / folder, ["fox.jpg", f"{name}.jpg"])
    for stem in ("fox", name):
        (tmp_path / "pairs" / "chosen" / f"{stem}.txt").write_text("a caption")
    pair = {"prompt": "x", "chosen": "chosen/fox.jpg", "rejected": "rejected/fox.jpg"}
    lines = write_jsonl(tmp_path / "pairs" / "d.jsonl", [{**pair, "id": "\ud800"}, {**pair, "id": "fine"}])
    for source, kept, lost in ((tmp_path / "pairs", "fox", name), (lines, "fine", "\ud800")):
        out = tmp_path / f"out of {source.name}"
        assert list(images(make(source, out, fingerprint={"source": os.fsdecode(b"\xff")}))) == [kept]
        skipped = json.loads((out / "skipped.jsonl").read_text())
        assert skipped["id"] == lost and "not valid Unicode" in skipped["reason"]


class NotFinite(StandIn):
    """Overflows half precision for image 4 and for one prompt."""

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        latents = super().encode_pixels(pixels)
        for row, image in enumerate(pixels):
            if abs(image[0].mean() * 255 - colour(4)[0]) < 3:
                latents[row, 0, 0, 0] = 1e6
        return latents

    def encode_prompts(self, prompts: Any) -> dict[str, Tensor]:
        encoded = super().encode_prompts(prompts)
        for row, prompt in enumerate(prompts):
            if prompt == "caption 1":
                encoded["embeds"][row] = float("nan")
        return encoded


def test_what_half_precision_cannot_hold_is_skipped(tmp_path: Path) -> None:
    groups = make(write_parquet(tmp_path / "a.parquet", pick_rows(7)), tmp_path / "out", NotFinite())
    assert_paired(groups, [0, 3, 4, 5])
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert ["embedding" in reason for reason in reasons] == [True, False, True]
    assert "latents are not finite" in reasons[1]


def test_nothing_usable_leaves_nothing(tmp_path: Path) -> None:
    rows = pick_rows(5)
    rows["jpg_0"] = [b"x"] * 5
    with pytest.raises(UserError, match=r"no usable group among 5 rows.*row 0: candidate.*known format"):
        make(write_parquet(tmp_path / "a.parquet", rows), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_size_the_vae_cannot_take_is_found_first(tmp_path: Path) -> None:
    def unread() -> Any:
        yield pytest.fail("data was read")

    with pytest.raises(PipelineError, match="7 x 8"):
        write(unread(), encoder(size=(7, 8)), tmp_path / "out", fingerprint=PARTS)
    assert not (tmp_path / "out").exists()


def test_space_is_checked_before_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """10 pairs of 3 x 4 x 4 halves and 6 prompts of 9 halves and 8 bytes: 10 * 2 * 96 + 6 * 26 = 2076 bytes."""
    source = write_parquet(tmp_path / "a.parquet", pick_rows(10))
    for free, fits in ((2075, False), (2076, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: shutil._ntuple_diskusage(0, 0, free))
        if fits:
            encoder().check_space(tmp_path / "out", survey(source))
        else:
            with pytest.raises(UserError, match=r"needs about 2\.03kB, but only 2\.03kB are free"):
                encoder().check_space(tmp_path / "out", survey(source))


def test_other_folders_are_no_prepared_data(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(write_parquet(tmp_path / "a.parquet", pick_rows(2)), out)
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps({**manifest, "layout": 99}))
    with pytest.raises(UserError, match="prepared with layout 99"):
        Store(out)
    with pytest.raises(UserError, match="no prepared data"):
        Store(tmp_path)


@pytest.mark.parametrize("stop", [None, 9])
def test_a_limit_counts_what_the_objective_can_use(tmp_path: Path, stop: int | None) -> None:
    """Ties at rows 0 and 2, a bad image at 3: five usable groups end with row 7, also after an interruption."""
    rows = pick_rows(12)
    for row in (0, 2):
        rows["label_0"][row] = rows["label_1"][row] = 0.5
    rows["jpg_0"][3] = b"x"
    source = write_parquet(tmp_path / "a.parquet", rows)
    selection = Selection(limit=5, candidates=2, ties=False)
    if stop is not None:
        with pytest.raises(RuntimeError):
            make(source, tmp_path / "out", StandIn(fail_after=stop), selection=selection)
    groups = make(source, tmp_path / "out", selection=selection)
    assert list(images(groups)) == [str(1000 + row) for row in (0, 1, 2, 4, 5, 6, 7)]


def test_groups_of_any_k_and_all_columns_are_kept(tmp_path: Path) -> None:
    items = [
        Group(id=f"g{k}", prompt="p", candidates=tuple(jpeg(n) for n in range(k)), scores=tuple(range(k, 0, -1)),
              origin="here", columns={"captions": tuple("abc"[:k]), **({"user": "ü"} if k == 2 else {})})
        for k in (3, 1, 2)
    ]  # fmt: skip
    write(items, encoder(), tmp_path / "out", fingerprint=PARTS, progress=False)
    groups = Store(tmp_path / "out")
    assert groups.k.tolist() == [3, 1, 2]
    assert [len(colours) for colours in images(groups).values()] == [3, 1, 2]
    table, _ = groups.locate(0)
    assert table["captions"].to_pylist() == [["a", "b", "c"], ["a"], ["a", "b"]]
    assert table["user"].to_pylist() == [None, None, "ü"]
    assert table["scores"].to_pylist() == [[3, 2, 1], [1], [2, 1]]


class Varying(StandIn):
    """As many tokens as the prompt has letters, padded to the longest of a call, in bfloat16."""

    conditioning_dtype = torch.bfloat16
    conditioning_masks = {"embeds": "mask"}

    def encode_prompts(self, prompts: Any) -> dict[str, Tensor]:
        longest = max(1, *map(len, prompts))
        letters = [[*map(ord, prompt), *[0] * (longest - len(prompt))] for prompt in prompts]
        mask = torch.arange(longest) < torch.tensor([max(1, len(prompt)) for prompt in prompts])[:, None]
        return {"embeds": torch.tensor(letters).float()[..., None].expand(-1, -1, 2) / 3, "mask": mask}


def test_sequences_of_varying_length_are_padded_per_batch(tmp_path: Path) -> None:
    """Stored at their own length: 2 values of 2 bytes a letter; a batch's captions are as long as its prompts."""
    texts = [("ab", "abcdef"), ("abcd", "x")]
    items = [
        Group(id=str(n), prompt=prompt, candidates=(jpeg(0), jpeg(1)), scores=(1, 0), origin="x",
              columns={"negative_caption": text})
        for n, (prompt, text) in enumerate(texts)
    ]  # fmt: skip
    write(items, encoder(Varying()), tmp_path / "out", fingerprint=PARTS, progress=False)
    groups = Store(tmp_path / "out")
    stored = [groups.locate(number, TEXTS)[0]["embedding:embeds"][number].as_py() for number in range(5)]
    assert [len(value) for value in stored] == [4 * max(1, n) for n in (0, 2, 6, 4, 1)]
    batch = fetched(groups, 0, 1, columns=["negative_caption"])
    expected = Varying().encode_prompts([prompt for prompt, _ in texts] + [text for _, text in texts])
    for place, conditioning in enumerate((batch.conditioning, batch.negative_caption)):
        own = slice(2 * place, 2 * place + 2)
        assert torch.equal(conditioning["embeds"], expected["embeds"][own].bfloat16().float())
        assert torch.equal(conditioning["mask"], expected["mask"][own])
    assert fetched(groups, 1).conditioning["embeds"].shape == (1, 4, 2)
    batch = fetched(groups, 0)
    dataset = PreparedDataset(groups, np.arange(2), Requirements(), {})
    empty = dataset.empty_conditioning(torch.device("cpu"))
    for share, kept in ((0.0, 2), (1.0, 0)):
        dropped = drop_captions(batch, empty, SampleRNG(0, batch.keys, RectifiedFlow()), share).conditioning
        assert int((dropped["embeds"][0, :, 0] > 0).sum()) == kept and dropped["embeds"].shape[1] == 2
