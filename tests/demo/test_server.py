"""The demo as a server: many voters at once, and what a browser must not reach."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import gradio_client
import httpx
import pytest

from t2i_align.demo import app
from t2i_align.demo.votes import MAX_SEGMENTS
from tests.demo.conftest import PROMPTS, Served, generated
from tests.runs import image

NO_SEGMENTS = [None] * MAX_SEGMENTS
CLIENTS, VOTES = 20, 3  # at once, and of each
SECONDS = float(os.environ.get("DEMO_VOTING_SECONDS", "0"))  # that they go on after that


def client(served: Served) -> gradio_client.Client:
    return gradio_client.Client(served.url, verbose=False)


def test_many_clients_at_once_lose_and_mix_no_vote(served: Served) -> None:
    """Each client votes with one button alone, so that a vote that went to somebody else would show."""
    clients = [client(served) for _ in range(CLIENTS)]
    acknowledged: Counter[str] = Counter()
    before = len(served.demo.votes.snapshot())
    end = time.monotonic() + SECONDS
    pairs = served.demo.votes.pairs

    def work(number: int) -> None:
        user, button = f"client {number}", ("left", "right", "tie", "neither")[number % 4]
        shown = clients[number].predict(user, api_name="/enter")
        while acknowledged[user] < VOTES or (time.monotonic() < end and acknowledged[user] < pairs):
            shown = clients[number].predict(shown[0], user, *NO_SEGMENTS, api_name=f"/vote_{button}")
            acknowledged[user] += 1

    threads = [threading.Thread(target=work, args=[number]) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = (served.demo.votes.folder / "votes.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines][before:]
    print(f"{len(rows)} votes by {CLIENTS} clients")
    assert Counter(row["user"] for row in rows) == acknowledged and acknowledged.total() >= CLIENTS * VOTES
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        assert row["vote"] == ("left", "right", "tie", "neither")[int(row["user"].split()[1]) % 4]


@pytest.mark.parametrize(
    "path",
    [
        "{out}/votes.jsonl", "{out}/images/../votes.jsonl", "{out}/images/%2e%2e/votes.jsonl", "/etc/passwd",
        "{out}/images/link.png", "{repo}/README.md", "README.md", "../../../../etc/passwd", "{home}/.bashrc",
        "{out}/images/..%2f..%2f..%2fetc/passwd",
    ],
)  # fmt: skip
def test_no_other_file_is_served(served: Served, path: str) -> None:
    images = served.demo.votes.images.path
    link = images / "link.png"
    if not link.is_symlink():
        link.symlink_to(images.parent / "votes.jsonl")
    (images.parent / "votes.jsonl").touch()
    name = path.format(out=images.parent, repo=Path.cwd(), home=Path.home())
    with httpx.Client(base_url=served.url) as http:
        for route in ("gradio_api/file=", "file="):
            assert http.get(f"{route}{name}").status_code in (403, 404), route
    link.unlink()


def test_the_images_are_served(served: Served) -> None:
    pair = served.demo.votes.next("somebody")
    assert pair
    answer = httpx.get(f"{served.url}gradio_api/file={served.demo.votes.images.path / pair.left}")
    assert answer.status_code == 200 and answer.headers["content-type"] == "image/png"


def test_uploads_are_bounded_in_size_and_kind(served: Served, tmp_path: Path) -> None:
    big = {"files": ("big.png", b"\0" * (51 << 20))}
    assert httpx.post(f"{served.url}gradio_api/upload", files=big, timeout=60).status_code == 413
    image(1).save(tmp_path / "a.png")
    image(2).save(tmp_path / "b.png")
    (tmp_path / "c.png").write_bytes(b"#!/bin/sh\n")
    (tmp_path / "d.sh").write_bytes(b"#!/bin/sh\n")
    good, script = [tmp_path / "a.png", tmp_path / "b.png", tmp_path / "c.png"], tmp_path / "d.sh"
    pairs = served.demo.votes.pairs
    api = client(served)
    api.predict([gradio_client.handle_file(str(file)) for file in good], "a fox", "ben", api_name="/upload_pairs")
    assert served.demo.votes.pairs == pairs + 1
    with pytest.raises(Exception, match="Invalid file type"):
        api.predict([gradio_client.handle_file(str(script))] * 2, "a fox", "ben", api_name="/upload_pairs")
    # A browser's own uploads by their paths, and then other files of the server, as if they had been uploaded.
    for number in (3, 4):
        image(number).save(tmp_path / f"{number}.png")
    others = [tmp_path / "3.png", tmp_path / "4.png"]
    answer = httpx.post(
        f"{served.url}gradio_api/upload", files=[("files", (file.name, file.read_bytes())) for file in others]
    )
    for paths, event, new in ((answer.json(), "complete", 2), (list(map(str, others)), "error", 2)):
        files = [{"path": path, "orig_name": "a.png", "meta": {"_type": "gradio.FileData"}} for path in paths]
        call = httpx.post(f"{served.url}gradio_api/call/upload_pairs", json={"data": [files, "an owl", "ben"]})
        events = httpx.get(f"{served.url}gradio_api/call/upload_pairs/{call.json()['event_id']}", timeout=60).text
        assert f"event: {event}" in events
        assert served.demo.votes.pairs == pairs + new


def test_samples_are_drawn_with_progress_and_errors_are_messages(served: Served) -> None:
    api = client(served)
    job = api.submit(PROMPTS[0], ["base"], 2, 0, 4, 1.0, "carl", api_name="/draw_pairs")
    *_, last = job
    assert "1 new pairs" in last[0] and any("progress" in part[0] for part in job.outputs())
    with pytest.raises(Exception, match="at most 256"):
        api.predict("\n".join(map(str, range(200))), ["base"], 2, 0, 4, 1.0, "carl", api_name="/draw_pairs")
    with pytest.raises(Exception, match="user name"):
        api.predict("x" * 100, api_name="/enter")


def test_only_those_with_an_account_come_in_and_vote_under_its_name(tmp_path: Path) -> None:
    source = generated(tmp_path / "source")
    with app.opened("testbed:sd", sources=[source], out=tmp_path / "demo") as demo:
        blocks = app.build(app.import_gradio(), demo, app.Defaults(), accounts=True)
        url = app.launch(blocks, demo, accounts=[("anna", "secret")])
        pair = demo.votes.next("anna")
        assert pair
        name = f"{url}gradio_api/file={demo.votes.images.path / pair.left}"
        assert httpx.get(name).status_code == 401
        with pytest.raises(Exception, match=r"(?i)auth|login|credentials"):
            gradio_client.Client(url, verbose=False)
        api = gradio_client.Client(url, verbose=False, auth=("anna", "secret"))
        shown = api.predict("ben", api_name="/enter")
        api.predict(shown[0], "ben", *NO_SEGMENTS, api_name="/vote_left")
        assert [row["user"] for row in demo.votes.snapshot()] == ["anna"]
        blocks.close(verbose=False)


def test_it_listens_on_this_machine_alone(served: Served) -> None:
    assert served.url.startswith("http://127.0.0.1:")


def test_the_command_serves_until_it_is_interrupted(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "t2i_align", "demo", "--out", str(tmp_path / "demo"), "--steps", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        line = process.stdout.readline()
        assert (found := re.match(r"demo: (http://127\.0\.0\.1:\d+/) ", line)), line
        assert "t2i-align" in httpx.get(found[1], timeout=60).text
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and f"votes in {tmp_path / 'demo' / 'votes.jsonl'}" in rest
