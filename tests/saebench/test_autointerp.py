"""Autointerp against a judge of our own: a real server that speaks chat completions and answers by a rule."""

import asyncio
import json
import random
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from builders.planted import CONTEXT, NOISE, planted_model, reading_sae
from builders.saebench import make_bench

from dmsae_lib.data.language_model import LanguageModel
from dmsae_lib.saebench import autointerp as saebench_autointerp
from dmsae_lib.saebench.autointerp import run_autointerp
from dmsae_lib.saebench.runner import NotRun
from dmsae_lib.store.artifacts import UserError

KEY = "sk-a-key-that-nobody-may-see"
READ = "ABCD"  # one latent for each


def knows(token: str, examples: list[str]) -> str:
    return ", ".join(str(i) for i, text in enumerate(examples, 1) if token in text) or "None"


def knows_the_opposite(token: str, examples: list[str]) -> str:
    return ", ".join(str(i) for i, text in enumerate(examples, 1) if token not in text)


def guesses(token: str, examples: list[str]) -> str:
    return ", ".join(str(i) for i in range(1, 15) if random.Random(f"{i}{examples}").random() < 0.5)


@pytest.fixture
def judge(monkeypatch):
    """Base URL of a server whose ``answer`` can be set; it notes the ``asked`` and quotes the key in all it
    says."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.asked.append((self.path, self.headers["Authorization"], request["model"]))
            text = request["messages"][1]["content"]
            if server.status == 200 and "activating documents" in text:
                marked = set(re.findall("<<(.)>>", text))
                said = f"This neuron activates on {' or '.join(sorted(marked))} said {KEY}."
            elif server.status == 200:
                token = re.search(r"fires on (.+) said", text)[1]
                said = server.answer(token, re.findall(r"^\d+\. (.*)$", text, flags=re.M))
            content = (
                {
                    "id": "1",
                    "object": "chat.completion",
                    "created": 0,
                    "model": "rule",
                    "choices": [
                        {
                            "index": 0,
                            "finish_reason": "stop",
                            "message": {"role": "assistant", "content": said},
                        }
                    ],
                }
                if (server.status == 200)
                else {"error": {"message": f"wrong key: {KEY}"}}
            )
            body = json.dumps(content).encode()
            self.send_response(server.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.answer, server.status = [], knows, 200
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def model(one_thread, tmp_path_factory) -> LanguageModel:
    return planted_model(tmp_path_factory.mktemp("models") / "planted", stir=0.5)


@pytest.fixture(scope="module")
def tokens(model) -> np.ndarray:
    """(1504, 32): noise, each of ABCD once in 32 rows, where it has company on both sides; four rows end in
    padding."""
    source, ids = np.random.default_rng(0), model.tokenizer.convert_tokens_to_ids
    rows = source.choice(ids(list(NOISE)), (1504, CONTEXT))
    rows[:, 0] = model.bos
    for i, character in enumerate(READ):
        rows[32 * i : 32 * (i + 1), 15] = ids(character)
    rows[-4:, 5:] = model.bos
    return rows


def run(sae, model, tokens, judge, latents=1000):
    settings = {"judge_url": judge.url, "judge": "rule-1", "judge_latents": latents}
    return run_autointerp(sae, model, make_bench(None, tokens, **settings), 0)


def test_a_judge_who_knows_scores_1_and_one_who_guesses_a_half(model, tokens, judge, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.chdir(tmp_path)
    kept = []  # whatever was written, before it is removed again
    real = saebench_autointerp.evaluate

    def listening(*given, **options):
        found = real(*given, **options)
        kept.extend(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
        return found

    monkeypatch.setattr(saebench_autointerp, "evaluate", listening)
    sae = reading_sae(model.d_model, [0, 1, 2, 3, 20])
    some = torch.from_numpy(tokens[:256])
    stands = torch.stack(
        [some == model.tokenizer.convert_tokens_to_ids(character) for character in READ], dim=-1
    )
    assert torch.equal(sae.encode(model.lower(some))[..., :4] > 0, stands)

    found = run(sae, model, tokens, judge)
    assert found["metrics"] == {"autointerp_score": 1, "autointerp_std_dev": 0}
    assert (found["n_latents"], found["n_scored"], found["judge_model"]) == (4, 4, "rule-1")
    assert [one["explanation"] for one in found["latents"].values()] == [
        f"{character} said ..." for character in READ
    ]
    assert set(judge.asked) == {("/v1/chat/completions", f"Bearer {KEY}", "rule-1")} and len(judge.asked) == 8
    assert not any(KEY.encode() in content for content in kept) and KEY not in json.dumps(found)
    assert not list(tmp_path.rglob("*.*")) and torch.is_grad_enabled()

    judge.answer = knows_the_opposite
    assert run(sae, model, tokens, judge)["metrics"]["autointerp_score"] == 0
    judge.answer = lambda *_: "None"
    assert run(sae, model, tokens, judge)["metrics"]["autointerp_score"] == pytest.approx(10 / 14)
    judge.answer = guesses
    # 56 examples: standard error 0.07
    assert abs(run(sae, model, tokens, judge)["metrics"]["autointerp_score"] - 0.5) < 0.2
    one = run(reading_sae(model.d_model, [0, 20]), model, tokens, judge, latents=1)
    assert one["metrics"]["autointerp_std_dev"] is None and list(one["latents"]) == ["0"]


def test_it_runs_where_an_event_loop_runs_already(model, tokens, judge):
    async def notebook():
        return run(reading_sae(model.d_model, [0, 1]), model, tokens, judge)

    assert asyncio.run(notebook())["metrics"]["autointerp_score"] == 1


@pytest.mark.parametrize("status", [401, 404])
def test_a_judge_that_fails_is_asked_no_more_and_gives_no_key_away(model, tokens, judge, status):
    judge.status = status
    with pytest.raises(
        NotRun, match=rf"judge failed with \w+ \({status}\): check .*rule-1.* OPENAI_API_KEY"
    ) as found:
        run(reading_sae(model.d_model, [0, 1, 2, 3]), model, tokens, judge)
    assert KEY not in str(found.value) and len(judge.asked) <= 4 and torch.is_grad_enabled()


def test_what_cannot_be_judged_is_not_run(model, tokens, judge, monkeypatch):
    sae = reading_sae(model.d_model, [0, 1])
    judge.answer = lambda *_: "I cannot tell"
    with pytest.raises(NotRun, match="none of the answers of rule-1 about 2 latents could be read"):
        run(sae, model, tokens, judge)
    with pytest.raises(NotRun, match="no latent fires often enough on 48000 tokens"):
        run(reading_sae(model.d_model, [20, 21]), model, tokens, judge)
    with pytest.raises(UserError, match="got 0 full rows of 32 tokens"):
        run(sae, model, tokens[-4:], judge)
    monkeypatch.setattr(saebench_autointerp, "RETRIES", 0)
    judge.answer = lambda *_: None
    with pytest.raises(NotRun, match="judge rule-1 gave no text in 33 tokens"):
        run(sae, model, tokens, judge)
    judge.url = "http://127.0.0.1:9/v1"
    with pytest.raises(NotRun, match="judge failed with APIConnectionError: check"):
        run(sae, model, tokens, judge)
    asked = len(judge.asked)
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(NotRun, match="in the environment variable OPENAI_API_KEY"):
        run(sae, model, tokens, judge)
    assert len(judge.asked) == asked
