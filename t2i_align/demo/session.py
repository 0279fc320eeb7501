"""What the pages do, without a browser: one `Demo` for all users, and the jobs of each session."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from t2i_align.data.media import ImageError
from t2i_align.demo.media import MediaFolder
from t2i_align.demo.pairs import Candidate, pair
from t2i_align.demo.studio import Cancelled, Drawn, Job, Studio
from t2i_align.demo.training import State, Training
from t2i_align.demo.votes import VOTES, Votes
from t2i_align.errors import UserError, shown, unknown
from t2i_align.inference.generate import sample_seed
from t2i_align.inference.users import resolve_user

MAX_SAMPLES, MAX_PROMPT = 256, 2000  # drawn at once; characters of a prompt
MAX_UPLOADS = 64  # files at once
POLL = 0.2  # seconds between two looks at a job


@dataclass
class Demo:
    """What all users share. compared: where the tab "Compare" puts its samples, for a while."""

    votes: Votes
    studio: Studio
    training: Training
    compared: MediaFolder
    jobs: dict[str, Job] = field(default_factory=dict)  # by session

    def draw(
        self,
        session: str,
        weights: Mapping[str, float],
        rows: Sequence[tuple[str, int]],
        folder: MediaFolder,
        **options: Any,
    ) -> Iterator[tuple[Job, list[Drawn]]]:
        """Draw in a thread; yields the job as it goes on, with the samples so far. `cancel(session)` ends it.

        options: of `Studio.draw`.

        Raises:
            UserError: too much, nothing, or options that cannot be used.
        """
        if (count := len(rows) * len(weights)) > MAX_SAMPLES:
            raise UserError(f"{count} samples at once; at most {MAX_SAMPLES}: fewer prompts, seeds or models")
        if long := [prompt for prompt, _ in rows if len(prompt) > MAX_PROMPT]:
            raise UserError(f"a prompt has at most {MAX_PROMPT} characters, found {shown(long[0])}")
        self.cancel(session)
        job = self.jobs[session] = Job()
        drawn: list[Drawn] = []
        failed: list[BaseException] = []

        def work() -> None:
            try:
                for batch in self.studio.draw(weights, rows, folder, job, **options):
                    drawn.extend(batch)
            except BaseException as error:  # raised in the caller's thread
                failed.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            while thread.is_alive() and not job.cancelled.is_set():
                yield job, list(drawn)
                thread.join(POLL)
            job.stopped = job.cancelled.is_set()
            job.note = f"{'stopped after' if job.stopped else 'drawn:'} {len(drawn)} samples"
        finally:
            job.cancelled.set()  # also where the caller goes away; of a finished job it changes nothing
            if self.jobs.get(session) is job:
                del self.jobs[session]
        if failed and not isinstance(failed[0], Cancelled):
            raise failed[0]
        yield job, list(drawn)

    def draw_for(
        self, session: str, name: str, user: str, rows: Sequence[tuple[str, int]], *, scale: float = 1.0, **options: Any
    ) -> Iterator[tuple[Job, list[Drawn]]]:
        """Draw with a personal model for nobody, and then for a user by their votes; see `draw`.

        Raises:
            UserError: no such model, or too few votes of this user that prefer one of two.
        """
        if name not in self.studio.entries:
            raise unknown("model", name, self.studio.entries)
        if not any(row.get("user") == user and row.get("vote") in ("left", "right") for row in self.votes.snapshot()):
            raise UserError(f"{user} has no vote yet that prefers one of two; pick favourites first")
        adapter = self.studio.entries[name].adapter
        served = resolve_user(adapter, self.votes.folder / VOTES, {user: 1.0}, scale)
        done: list[Drawn] = []
        for whom, label in ((None, "for nobody"), (served, f"for {user}")):
            drawn: list[Drawn] = []
            for job, drawn in self.draw(session, {name: 1.0}, rows, self.compared, served=whom, **options):
                drawn = [*done, *(replace(one, model=label) for one in drawn)]
                yield job, drawn
            done = drawn
            if job.stopped:
                break

    def cancel(self, session: str) -> None:
        """Cancel what a session is drawing, at the next step of the sampler."""
        if job := self.jobs.get(session):
            job.cancelled.set()

    def offer(self, drawn: Sequence[Drawn]) -> int:
        """Make pairs to vote on of samples: of each prompt, two models with the same seed, or two seeds of one model.

        Returns how many are new.
        """
        candidates = [Candidate(one.file, one.file, one.prompt, _label(one), one.seed) for one in drawn]
        couples = [
            couple
            for couple in combinations(candidates, 2)
            if couple[0].prompt == couple[1].prompt
            and (couple[0].seed == couple[1].seed) != (couple[0].model == couple[1].model)
            and couple[0].media != couple[1].media
        ]
        return self.votes.offer([pair(couple[0].prompt, couple) for couple in couples], store=True)

    def upload(self, files: Sequence[str | Path], prompt: str) -> tuple[int, list[str]]:
        """Make pairs of uploaded images or clips for a prompt; returns how many are new, and what was refused and why.

        Raises:
            UserError: no prompt, too many files, or fewer than two that can be used.
        """
        if not prompt.strip() or len(prompt) > MAX_PROMPT:
            raise UserError(f"a prompt of 1 to {MAX_PROMPT} characters is needed: votes say which image fits it better")
        if len(files) > MAX_UPLOADS:
            raise UserError(f"{len(files)} files at once; at most {MAX_UPLOADS}")
        names, refused = dict[str, None](), []
        for file in map(Path, files):
            try:
                names[self.votes.images.add(file)] = None
            except ImageError as error:
                refused.append(f"{file.name}: {error}")
        if len(names) < 2:
            raise UserError("; ".join(["two different images are needed", *refused]))
        made = [pair(prompt.strip(), [Candidate(n, n, prompt, "") for n in two]) for two in combinations(names, 2)]
        return self.votes.offer(made, store=True), refused

    def trained(self) -> State | None:
        """The newest run; a LoRA that it has left is among the models from now on."""
        state = self.training.state()
        if state and state.weights and (name := f"votes {state.number}") not in self.studio.entries:
            self.studio.add(state.weights, name)
        return state


def prompts_of(text: str) -> list[str]:
    """The prompts in a text box, one a line."""
    return list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))


def rows_of(prompts: Sequence[str], count: int, seed: int) -> list[tuple[str, int]]:
    """So many seeds of each prompt, those of `generate` and `evaluate`."""
    return [(prompt, sample_seed(seed, i, k)) for i, prompt in enumerate(prompts) for k in range(count)]


def _label(one: Drawn) -> str:
    return one.model if one.weight == 1 else f"{one.model} × {one.weight:g}"
