"""What the tabs have in common: who is there, and errors as messages."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gradio

from pipelines import PipelineError
from reward_scorers import ScorerError
from t2i_align.data.media import ImageError
from t2i_align.demo.votes import user_name
from t2i_align.errors import UserError

if TYPE_CHECKING:
    from t2i_align.demo.app import Defaults
    from t2i_align.demo.session import Demo

MAX_SAMPLING = 200  # steps
VOTER, SETTLED = "(typed) => voter(typed)", "(typed) => settled(typed)"  # in demo.js
DEVICE: dict[str, Any] = {
    "concurrency_id": "device",
    "concurrency_limit": 4,
}  # jobs under way; the studio draws one at a time


@dataclass(frozen=True)
class Page:
    """The pages of one demo.

    accounts: users have logged in, and vote under that name. name: the box with the name of those who have not, which
    the browser keeps, so that a reload, or the next day, goes on where it was.
    """

    blocks: gradio.Blocks
    demo: Demo
    defaults: Defaults
    accounts: bool
    name: gradio.Textbox

    def user(self, typed: str | None, request: gradio.Request) -> str:
        """Who is voting: the account, or the name in the box.

        Raises:
            UserError: a name that cannot be used.
        """
        return user_name(request.username if self.accounts and request.username else typed or "")

    def settle_name(self) -> None:
        """Fill the box of the name; demo.js keeps what is typed in it.

        The page does this by itself: an answer of the server would come late and undo what was typed meanwhile.
        """

        def account(request: gradio.Request) -> str | None:
            return request.username

        if self.accounts:
            self.blocks.load(account, None, self.name, api_visibility="private", queue=False)
            return
        gradio.on([self.blocks.load, self.name.blur], None, self.name, self.name, js=SETTLED)

    def on_user(self, tab: gradio.Tab, function: Callable[..., Any], outputs: Sequence[Any], **options: Any) -> None:
        """Call a function of the user's name where a tab is opened and where the name has changed.

        The last one counts: it waits for an answer that is under way instead of being dropped.
        """
        gradio.on(
            [tab.select, self.name.submit, self.name.blur], answered(function), self.name, outputs,
            js=None if self.accounts else VOTER, trigger_mode="always_last", queue=False, show_progress="hidden",
            **options,
        )  # fmt: skip

    def left(self, request: gradio.Request) -> None:
        """Somebody closed the page: nobody waits for what they were drawing."""
        self.demo.cancel(str(request.session_hash))


def sampling_inputs(defaults: Defaults, count: int = 1) -> tuple[gradio.components.Component, ...]:
    """Boxes for seeds per prompt, first seed, steps and guidance; an empty one is the model's own."""
    with gradio.Row():
        return (
            gradio.Slider(1, 8, count, step=1, precision=0, label="Seeds per prompt", min_width=120),
            gradio.Number(0, label="First seed", precision=0, minimum=0, maximum=2**31, min_width=120),
            gradio.Number(
                defaults.steps,
                label="Steps",
                precision=0,
                minimum=1,
                maximum=MAX_SAMPLING,
                placeholder="the model's",
                min_width=120,
            ),
            gradio.Number(
                defaults.guidance, label="Guidance", minimum=0, maximum=50, placeholder="the model's", min_width=120
            ),
        )


def answered(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of an event, whose errors for users become messages on the page."""
    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def generator(*args: Any, **kwargs: Any) -> Any:
            try:
                yield from function(*args, **kwargs)
            except (UserError, PipelineError, ScorerError, ImageError, OSError) as error:
                raise gradio.Error(str(error), duration=None, print_exception=False) from error

        return generator

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (UserError, PipelineError, ScorerError, ImageError, OSError) as error:
            raise gradio.Error(str(error), duration=None, print_exception=False) from error

    return call
