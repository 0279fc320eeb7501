"""Answers of the Hub in words of what to do: the genuine client against a server that refuses as the Hub does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.runs import jsonl_pairs

ANSWERS = {"nobody": (401, "RepoNotFound"), "gated": (403, "GatedRepo"), "bare": (404, "EntryNotFound"),
           "old": (404, "RevisionNotFound")}  # fmt: skip
ASK = """
import sys, json, pipelines
from t2i_align import align
from t2i_align.inference.models import resolve_aligned
from t2i_align.data import hub
out = {}
for owner in sys.argv[2:]:
    for name, ask in (("model", lambda x: pipelines.load(x)), ("lora", resolve_aligned),
                      ("data", lambda x: hub.folder("hub:" + x))):
        try:
            ask(owner + "/thing")
        except ValueError as error:
            out[f"{owner} {name}"] = str(error)
try:
    align({"output_dir": "run", "objective": "dcpo", "model": {"path": "gated/thing"}, "data": {"path": sys.argv[1]}})
except ValueError as error:
    out["order"] = str(error)
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def refusing() -> Iterator[str]:
    """The address of a server that answers as the Hub does for the owners in ANSWERS."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            owner = next((owner for owner in ANSWERS if f"/{owner}/" in self.path), "nobody")
            status, code = ANSWERS[owner]
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def asked(folder: Path, *owners: str, **environment: str) -> dict[str, str]:
    data = jsonl_pairs(folder / "data", 2)
    done = subprocess.run(
        [sys.executable, "-c", ASK, str(data), *owners], capture_output=True, text=True, cwd=folder,
        env={**os.environ, "HF_HOME": str(folder), "PYTHONPATH": str(Path(__file__).parents[2]), **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return answers


def test_each_refusal_of_the_hub_has_its_own_message(refusing: str, tmp_path: Path) -> None:
    """Data that the objective cannot learn from are refused before a model is asked for."""
    answers = asked(tmp_path, *ANSWERS, HF_ENDPOINT=refusing, HF_HUB_OFFLINE="0")
    for name in ("model", "lora", "data"):
        assert "no such repository, or a private one: check the name, or log in" in answers[f"nobody {name}"], name
        page = "https://huggingface.co/" + ("datasets/" if name == "data" else "") + "gated/thing"
        assert f"accept its terms at {page} and log in with `hf auth login` or set HF_TOKEN" in answers[f"gated {name}"]
        assert "no such revision" in answers[f"old {name}"]
    assert "nor a pipeline on the Hub: it is there, but without the file" in answers["bare model"]
    assert "pairs.jsonl: the objective needs 'captions' with each group" in answers["order"]


def test_no_network_and_offline_mode_are_told_apart(tmp_path: Path) -> None:
    closed = asked(tmp_path, "some", HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="0")
    offline = asked(tmp_path, "some", HF_HUB_OFFLINE="1")
    for name in ("model", "lora", "data"):
        assert "the Hub cannot be reached" in closed[f"some {name}"], closed[f"some {name}"]
        assert "HF_HUB_OFFLINE is set" in offline[f"some {name}"], offline[f"some {name}"]
