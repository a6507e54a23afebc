"""Whole jobs: what they write, what they must not ask for, and how a bad one ends."""

import json
import math
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from colospec.checkpoint.manifest import open_checkpoint
from tests.jobs.start import job


@pytest.fixture(scope="module")
def hub():
    """A model hub on this machine that counts what it is asked for, and has nothing."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_POST = do_CONNECT = do_GET  # noqa: N815

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    names = ("HF_ENDPOINT", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"), "0")
    yield dict.fromkeys(names, address) | offline | {"no_proxy": "", "NO_PROXY": ""}, asked
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def five_steps(tiny_job, hub, tmp_path_factory):
    """The run directory and the console of five steps with a checkpoint every second one."""
    run_dir = tmp_path_factory.mktemp("five") / "run"
    words = ["trainer.max_steps=5", "trainer.save_interval=2", "trainer.keep=9"]
    output = job(1, "+mode=alternate", *tiny_job, *words, f"run_dir={run_dir}", env=hub[0])
    return run_dir, output


def test_checkpoints_are_named_after_completed_steps(five_steps):
    run_dir, _ = five_steps
    directories = sorted((run_dir / "checkpoint").iterdir())
    assert [d.name for d in directories] == ["step-000002", "step-000004", "step-000005"]
    for directory in directories:
        manifest = open_checkpoint(directory).manifest
        assert manifest.step == manifest.meta["step"] == int(directory.name.removeprefix("step-"))
    assert json.loads((run_dir / "result.json").read_text())["steps"] == 5


def test_every_logged_step_has_its_loss_in_the_file_and_on_the_console(five_steps):
    run_dir, output = five_steps
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert all(math.isfinite(row["train/loss"]) and row["train/loss"] > 0 for row in rows)
    shown = re.findall(r"^step +(\d)/5  loss (\d+\.\d{3})  acc ", output, re.M)
    assert shown == [(str(row["step"]), f"{row['train/loss']:.3f}") for row in rows]


def test_a_job_asks_no_model_hub_for_anything(five_steps, hub):
    assert five_steps
    assert hub[1] == []


def test_an_error_of_the_trainer_ends_the_waiting_engine_and_is_the_one_that_is_shown(
    tiny_job, tmp_path
):
    words = [word for word in tiny_job if not word.startswith("trainer.lr=")]
    began = time.monotonic()
    words += ["trainer.lr=1e37", "trainer.max_steps=5000", "trainer.max_skipped_steps=3"]
    output = job(2, "+mode=colocate", *words, f"run_dir={tmp_path}/run", expect="error")
    assert time.monotonic() - began < 60
    assert len(re.findall(r"warning: step \d+ skipped: gradient norm (?:nan|inf)", output)) == 3
    assert re.findall("error: .*", output)[0].startswith("error: rank 0 (trainer 0 on cpu): Runti")
    assert "gradients were not finite for 3 steps in a row" in output
    assert "lower trainer.lr" in "\n".join(output.splitlines()[-45:])
    assert not (tmp_path / "run" / "export").exists()
