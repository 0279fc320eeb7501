"""Histories of users: their choices as rows of features, and which of them stand for a user with a training pair.

A user's pairs are shuffled once and cut into disjoint entries of as many as the embedder reads together; each entry is
embedded once and kept, a file per user. With a training pair come entries of the same user that hold no pair of its
prompt, so that nothing of the pair leaks. Which ones depends on (seed, epoch, group id) alone. Ties are no choices.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from t2i_align.conditioning.config import USER, PersonalConfig
from t2i_align.config import RunConfig
from t2i_align.data import readers
from t2i_align.data.annotations import NONE, Annotations
from t2i_align.data.batch import Batch
from t2i_align.data.loader import PreparedDataset, digest
from t2i_align.data.media import ImageError, decode
from t2i_align.data.schema import COLUMNS, Group, Selection, Skipped
from t2i_align.data.spec import normalise
from t2i_align.data.store import is_store
from t2i_align.diffusion.randomness import permutation, stable_seed
from t2i_align.errors import UserError
from t2i_align.utils.files import atomic_file

if TYPE_CHECKING:
    from t2i_align.conditioning.personal import Embedding, Encoder
    from t2i_align.conditioning.preferences import Choice, Embedder

logger = logging.getLogger(__name__)
SHOWN = 3  # users in a message


@dataclass(frozen=True, kw_only=True)
class History:
    """One user's entries: rows [entries, rows, features] and, of each, the prompts in it, normalised."""

    rows: Tensor
    prompts: Sequence[frozenset[str]]

    def without(self, prompt: str) -> list[int]:
        """The entries that hold no pair of a prompt."""
        own = normalise(prompt)
        return [number for number, prompts in enumerate(self.prompts) if own not in prompts]


@dataclass(frozen=True, kw_only=True)
class Users:
    """Rows of users for batches, [B, N, features].

    histories: by user. eligible: of each group by id, its user and the entries that may stand for them.
    """

    config: PersonalConfig
    embedding: Embedding
    seed: int
    histories: Mapping[str, History] = field(repr=False)
    eligible: Mapping[str, tuple[str, Sequence[int]]] = field(repr=False)
    fingerprint: str

    def rows(self, keys: Sequence[str]) -> Tensor:
        """The rows that stand for each sample's user; zeros beyond their number, and where the user is dropped."""
        fewest, most = self.config.entries(self.embedding.together)
        shape = next(iter(self.histories.values())).rows.shape[1:]
        out = torch.zeros(len(keys), most, *shape)
        for row, key in zip(out, keys, strict=True):
            user, entries = self.eligible[key.partition("/")[2]]
            if len(entries) < fewest or self._share(key, "dropout") < self.config.dropout:
                continue
            chosen = self.drawn(key, len(entries))
            row[: len(chosen)] = self.histories[user].rows[[entries[place] for place in chosen]].float()
        return out.flatten(1, 2)

    def drawn(self, key: str, count: int) -> list[int]:
        """Which of so many entries stand for the user of a sample."""
        fewest, most = self.config.entries(self.embedding.together)
        wanted = fewest + int(self._share(key, "examples") * (most - fewest + 1))
        return permutation(count, self.seed, key, "support")[:wanted].tolist()

    def attached(self, batch: Batch) -> Batch:
        """The batch with the rows of its users in the conditioning of its prompts and other texts."""
        rows = self.rows(batch.keys).to(batch.latents.device)

        def with_rows(name: str, value: Any) -> Any:
            if not COLUMNS[name].text:
                return value
            per_candidate = rows.unsqueeze(1).expand(-1, batch.latents.shape[1], -1, -1)
            return {**value, USER: per_candidate if COLUMNS[name].per_candidate else rows}

        columns = {name: with_rows(name, value) for name, value in batch.columns.items()}
        return replace(batch, conditioning={**batch.conditioning, USER: rows}, columns=columns)

    def pretrain(self, encoder: Encoder) -> None:
        """Teach a branch's encoder to tell these users apart, as the configuration says."""
        from t2i_align.conditioning.personal import tell_apart

        rows = {user: one.rows for user, one in self.histories.items()}
        draw = self.config.entries(self.embedding.together)
        loss = tell_apart(encoder, rows, draw, steps=self.config.pretrain, seed=self.seed)
        if loss is None:
            logger.warning("personal.pretrain: fewer than two users have choices for two embeddings; it is left out")
        else:
            logger.info("users are told apart by choices: InfoNCE %.2f, chance %.2f", loss, math.log(len(rows)))

    def _share(self, key: str, name: str) -> float:
        return stable_seed(self.seed, key, USER, name) / 2**63


def choices_by_user(items: Iterable[Group | Skipped], source: str) -> dict[str, list[Group]]:
    """The pairs of each user ("" where none is named) that prefer one image to another, in the source's order.

    Raises:
        UserError: there are none.
    """
    out: dict[str, list[Group]] = {}
    for item in items:
        if isinstance(item, Group) and len(item.candidates) > 1 and not item.is_tie:
            out.setdefault(item.user or "", []).append(item.take([0, len(item.candidates) - 1]))
    if not out:
        raise UserError(f"{source}: no pair that prefers one of two images (a tie does not)")
    return out


def choice(group: Group) -> Choice:
    """A pair, decoded. Raises UserError where an image is missing or damaged."""
    from t2i_align.conditioning.preferences import Choice

    try:
        liked, disliked = map(decode, (group.candidates[0], group.candidates[-1]))
    except ImageError as error:
        raise UserError(f"{group.origin}: {error}; a user's choices need both images") from error
    return Choice(group.prompt, liked, disliked)


def embed(groups: Mapping[str, Sequence[Group]], embedder: Embedder, cache: Path, progress: bool) -> dict[str, History]:
    """The histories of users, from the cache where they are there. Users with less than one entry have none.

    A pair with a missing or damaged image is left out and reported, as it is in training.
    """
    out: dict[str, History] = {}
    cache.mkdir(parents=True, exist_ok=True)
    for user, pairs in tqdm(groups.items(), desc="users", unit="user", disable=not progress):
        together = embedder.together
        identity = [embedder.version, together, embedder.shape, user, *map(_identity, pairs)]
        file = cache / f"user-{digest(identity)}.safetensors"
        kept = _read(file)
        if kept is None:
            found = [(place, choice) for place in permutation(len(pairs), "history", user).tolist()
                     if (choice := _decoded(pairs[place]))]  # fmt: skip
            found = found[: len(found) - len(found) % together]
            rows = embedder([choice for _, choice in found]) if found else torch.zeros(0, *embedder.shape)
            if not rows.isfinite().all():
                raise UserError(f"the embedding of user {user!r} is not finite")
            kept = {"rows": rows.half().contiguous(), "places": torch.tensor([place for place, _ in found])}
            with atomic_file(file) as temporary:
                save_file(kept, temporary)
        texts = [normalise(pairs[place].prompt) for place in kept["places"].int().tolist()]
        prompts = [frozenset(texts[at : at + together]) for at in range(0, len(texts), together)]
        if prompts:
            out[user] = History(rows=kept["rows"], prompts=prompts)
    return out


def add_users(
    source: PreparedDataset, run: RunConfig, cache: Path, device: torch.device, progress: bool
) -> PreparedDataset:
    """The data with rows of their users, from a user's other choices; users with too few as `personal.few` says.

    Raises:
        UserError: an embedder that cannot be used; data without its images; users with too few choices where `few` is
            `error`, or all of them.
    """
    from t2i_align.conditioning.preferences import build_embedder, describe

    config, data = run.personal, run.data
    assert config is not None
    if not data.path.startswith("testbed:") and is_store(Path(data.path)):
        raise UserError(f"{data.path}: this folder holds latents; personal needs the images: name the source itself")
    embedder = build_embedder(config).to(device)
    annotations = Annotations.load(data.annotations) if data.annotations else NONE
    selection = Selection(candidates=2, ties=False, limit=data.limit)
    items = readers.read(data.path, data.format, annotations, selection=selection)
    histories = embed(choices_by_user(items, data.path), embedder, cache, progress)
    fewest, _ = config.entries(embedder.together)
    eligible: dict[str, tuple[str, Sequence[int]]] = {}
    keep, few = [], set[str]()
    for number in source.numbers.tolist():
        columns, row = source.store.locate(number)
        group, user, prompt = (columns[name][row].as_py() for name in ("id", "user", "prompt"))
        entries = histories[user].without(prompt) if user in histories else []
        enough = len(entries) >= fewest
        few |= set() if enough else {user}
        keep.append(enough or config.few == "null")
        eligible[group] = user, entries
    lacking = sum(len(entries) < fewest for _, entries in eligible.values())
    shown = f"{', '.join(sorted(few)[:SHOWN])}{' …' * (len(few) > SHOWN)}"
    if lacking == len(keep) or (lacking and config.few == "error"):
        raise UserError(
            f"{data.path}: {lacking} of {len(keep)} groups are of {len(few)} users with fewer than {config.fewest} "
            f"choices for other prompts (personal.examples), such as {shown}. personal.few: drop leaves these groups "
            "out, null trains them without a user."
        )
    if lacking:
        what = "left out" if config.few == "drop" else "trained without a user"
        logger.warning("%d groups of %d users with too few choices are %s: %s", lacking, len(few), what, shown)
    name = "of_users_with_few_choices_left_out" if config.few == "drop" else "without_a_user"
    counts = {**source.counts, "groups": sum(keep), "users": len(histories), name: lacking}
    numbers = source.numbers[torch.tensor(keep).numpy()]
    content = hashlib.sha256(b"".join(history.rows.numpy().tobytes() for _, history in sorted(histories.items())))
    users = Users(
        config=config, embedding=describe(config, embedder), seed=run.train.seed, histories=histories,
        eligible=eligible, fingerprint=digest([embedder.version, sorted(histories), content.hexdigest()]),
    )  # fmt: skip
    return PreparedDataset(source.store, numbers, source.needs, counts, users)


def _identity(group: Group) -> list[Any]:
    """What a choice's embedding depends on; of a file its name, size and time."""
    media: list[Any] = []
    for one in group.candidates:
        if isinstance(one, Path):
            stat = one.stat() if one.is_file() else None
            media.append([str(one), stat and stat.st_size, stat and stat.st_mtime_ns])
        else:
            media.append(hashlib.sha256(one).hexdigest())
    return [group.prompt, media]


def _decoded(group: Group) -> Choice | None:
    try:
        return choice(group)
    except UserError as error:
        logger.warning("%s; this one is left out", error)
        return None


def _read(file: Path) -> dict[str, Tensor] | None:
    try:
        return load_file(file) if file.is_file() else None
    except SafetensorError:  # damaged: it is made anew
        return None
