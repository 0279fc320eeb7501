"""The command `t2i-align demo`, and what the server lets a browser reach."""

from __future__ import annotations

import logging
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2i_align.errors import UserError
from t2i_align.inference.options import TESTBED, resolve_prompts
from t2i_align.quickstart import CONFIG
from t2i_align.utils.settings import read_yaml

if TYPE_CHECKING:
    import gradio

    from t2i_align.demo.session import Demo

QUICKSTART = Path("runs/quickstart/run")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
COMPARED = 1000  # samples that the tab "Compare" keeps
MAX_UPLOAD = "50mb"  # per file
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What the pages offer at first. prompts: to draw for. steps, guidance: None is the model's own."""

    prompts: Sequence[str] = ()
    steps: int | None = None
    guidance: float | None = None


def demo(
    models: Sequence[str | Path] = (),
    *,
    base: str | Path = "testbed:sd",
    sources: Sequence[str | Path] = (),
    out: str | Path = "runs/demo",
    prompts: str | Path | Sequence[str] | None = None,
    scorers: Sequence[str] | None = None,
    config: str | Path | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    batch_size: int | None = None,
    segment_seconds: float = 1.0,
    precision: str = "fp32",
    device: str | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
    auth: Sequence[str] = (),
    queue: int = 32,
    browser: bool = False,
) -> Path:
    """Serve the demo until Ctrl-C; returns the file of the votes.

    Args:
        models: LoRAs, training runs or whole models to compare with the base (default: the quickstart's run, if there
            is one in `runs/`).
        base: diffusers folder, single file, Hub id, or `testbed:sd` for the bundled model.
        sources: images to vote on: folders that `generate` wrote (of several, the same prompts and seeds are compared),
            a folder of images with captions, or preference data of any format.
        out: folder for votes, images and runs; an earlier demo's is continued.
        prompts: prompts to draw for: a file, `testbed:dev`, or a list (default: `testbed:dev` for the bundled model).
        scorers: scorers whose scores are shown (default: `oracle` for the bundled model).
        config: configuration whose values a training run starts from (default: the quickstart's for the bundled model).
        steps: denoising steps (default: the model's own; of the bundled model the quickstart's).
        guidance: guidance scale (default: likewise).
        segment_seconds: clips can be voted on in segments of so many seconds.
        precision: of the weights: `fp32`, `tf32`, `bf16` or `fp16`.
        host: address to serve on; 0.0.0.0 lets other machines in.
        port: default: the first free one from 7860.
        share: also serve under a public address, through Gradio's servers.
        auth: who may come in: `name:password`, or a file with a line of this form for each. Names are the voters'.
        queue: drawings that may wait; more are refused.
        browser: open a browser.

    Others as in `t2i_align.inference.generate.generate`.

    Raises:
        UserError: a model, source, folder or option that cannot be used; Gradio is not installed.
    """
    accounts = accounts_of(auth)
    if not 0 < segment_seconds < math.inf:
        raise UserError(f"segment_seconds must be a number above 0, found {segment_seconds}")
    if queue < 1:
        raise UserError(f"queue must be a whole number of at least 1, found {queue}")
    bundled = str(base).startswith(TESTBED)
    first = read_yaml(CONFIG)["validation"] if bundled else {}
    defaults = Defaults(
        prompts=resolve_prompts(prompts if prompts is not None else "testbed:dev") if prompts or bundled else (),
        steps=steps or first.get("steps"),
        guidance=first.get("guidance") if guidance is None else guidance,
    )
    from t2i_align.utils.signals import graceful_shutdown

    gradio = import_gradio()
    if not models and bundled and (QUICKSTART / "lora").is_dir():
        models = [QUICKSTART]
    if scorers is None:
        scorers = ["oracle"] if bundled else []
    studio: dict[str, Any] = {"precision": precision, "device": device, "batch_size": batch_size}
    studio |= {"height": height, "width": width, "frames": frames}
    with opened(base, models, sources, out, scorers, config, segment_seconds, **studio) as shared:
        if not accounts and (share or host not in LOOPBACK):
            logger.warning("anybody who reaches this address can draw, vote and train: give --auth name:password")
        blocks = build(gradio, shared, defaults, accounts=bool(accounts), queue=queue)
        launch(blocks, shared, host=host, port=port, share=share, accounts=accounts, browser=browser)
        try:
            with graceful_shutdown() as stop:
                while not stop.wait(1):
                    pass
        finally:
            blocks.close(verbose=False)
        return shared.votes.folder / "votes.jsonl"


@contextmanager
def opened(
    base: str | Path,
    models: Sequence[str | Path] = (),
    sources: Sequence[str | Path] = (),
    out: str | Path = "runs/demo",
    scorers: Sequence[str] = (),
    config: str | Path | None = None,
    segment_seconds: float = 1.0,
    **options: Any,
) -> Iterator[Demo]:
    """All that the pages work on, without the pages; a run that is still going on is stopped and saved at the end."""
    from t2i_align.demo.media import MediaFolder
    from t2i_align.demo.pairs import pairs_of
    from t2i_align.demo.session import Demo
    from t2i_align.demo.studio import Studio
    from t2i_align.demo.training import STOP_SECONDS, Training
    from t2i_align.demo.votes import Votes

    studio = Studio(base, models, scorers, **options)
    pairs = pairs_of(sources) if sources else []
    with (
        Votes.opened(out, segment_seconds) as votes,
        tempfile.TemporaryDirectory(prefix="t2i-align-demo-") as temporary,
    ):
        votes.offer(pairs)
        training = Training(votes, str(base), config)
        try:
            yield Demo(votes, studio, training, MediaFolder(Path(temporary) / "compared", COMPARED))
        finally:
            training.stop(wait=STOP_SECONDS)


def build(gradio: Any, shared: Demo, defaults: Defaults, *, accounts: bool = False, queue: int = 32) -> gradio.Blocks:
    """The pages."""
    from t2i_align.demo import compare, personal, results, vote
    from t2i_align.demo.page import Page

    with gradio.Blocks(title="t2i-align", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        with gradio.Row():
            with gradio.Column(scale=3):
                gradio.Markdown("# t2i-align\nCompare models, vote, train on the votes, and read the result.")
            # Outside the tabs: what lies in one is not there before it is opened.
            name = gradio.Textbox(
                label="Your name", max_length=64, interactive=not accounts, elem_id="user", min_width=200
            )
        page = Page(blocks, shared, defaults, accounts, name)
        page.settle_name()
        with gradio.Tabs():
            for title, add in (
                ("Compare", compare.add),
                ("Vote", vote.add),
                ("Personal", personal.add),
                ("Train", results.add_training),
                ("Report", results.add_report),
            ):
                with gradio.Tab(title, id=title) as tab:
                    add(page, tab)
        blocks.unload(page.left)
    return blocks.queue(max_size=queue, api_open=False)


def launch(
    blocks: gradio.Blocks,
    shared: Demo,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
    accounts: Sequence[tuple[str, str]] = (),
    browser: bool = False,
) -> str:
    """Start the server in a thread; returns its address.

    A browser reaches the folders of images and exported LoRAs, and what it has uploaded itself; no other file.
    """
    import gradio

    from t2i_align.demo import view
    from t2i_align.demo.training import LORAS

    uploads = shared.compared.path.parent / "uploads"
    uploads.mkdir(exist_ok=True)
    os.environ["GRADIO_TEMP_DIR"] = str(uploads)  # not the folder of all of this machine's Gradio programs
    fonts: Any = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # none fetched
    folders = [shared.votes.images.path, shared.compared.path, (shared.votes.folder / LORAS).absolute()]
    try:
        _, address, public = blocks.launch(
            server_name=host,
            server_port=port,
            share=share,
            auth=list(accounts) or None,
            inbrowser=browser,
            allowed_paths=[str(folder) for folder in folders],
            max_file_size=MAX_UPLOAD,
            prevent_thread_lock=True,
            quiet=True,
            ssr_mode=False,
            footer_links=[],
            theme=gradio.themes.Default(**fonts),
            css=view.STYLE,
            head=f"<script>{view.SCRIPT}</script>",
            _frontend=False,  # a second look at the server, which gives up after three seconds on a busy machine
        )
    except OSError as error:
        raise UserError(f"{host}, port {port or 'from 7860 on'}: cannot be served on: {error}") from error
    print(f"demo: {address} (Ctrl-C ends it)" + (f"\npublic: {public}" if public else ""), flush=True)
    return str(address)


def accounts_of(auth: Sequence[str]) -> list[tuple[str, str]]:
    """Names and passwords, from `name:password` or files of such lines.

    Raises:
        UserError: another form, or a name twice.
    """
    lines = []
    for text in auth:
        is_file = ":" not in text or Path(text).expanduser().is_file()
        if is_file and not Path(text).expanduser().is_file():
            raise UserError(f"auth: expected name:password or a file of such lines, found {text!r}")
        lines += Path(text).expanduser().read_text(encoding="utf-8").splitlines() if is_file else [text]
    accounts: dict[str, str] = {}
    for line in filter(str.strip, lines):
        name, _, password = line.strip().partition(":")
        if not name or not password or name in accounts:
            raise UserError("auth: each line must be name:password, and each name must be there once")
        accounts[name] = password
    return list(accounts.items())


def import_gradio() -> Any:
    """Gradio, an optional dependency that takes seconds to import."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError as error:
        raise UserError("the demo needs Gradio: pip install 't2i-align[demo]'") from error
    return gradio
