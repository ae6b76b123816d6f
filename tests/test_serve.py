"""examples/serve.py as a process, asked over loopback."""

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import polars as pl
import pytest
import torch
from support.launch import ONE_THREAD

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("sce_lm.recsys.sasrec", exc_type=ImportError)

from sce_lm import recsys

PROGRAM = Path(__file__).resolve().parents[1] / "examples" / "serve.py"
NUM_ITEMS = 300


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    tokenizer = recsys.build_item_tokenizer(f"i{n}" for n in range(NUM_ITEMS))
    recsys.count_items(tokenizer, pl.DataFrame({"items": [[5, 5, 9, 5, 9, 7]]}))
    config = recsys.SASRecConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        max_position_embeddings=20,
        initializer_range=1.0,
    )
    return recsys.SASRecForCausalLM(config).eval(), tokenizer


@pytest.fixture(scope="module")
def address(model, tmp_path_factory):
    """Of a server of the model."""
    folder = tmp_path_factory.mktemp("model")
    for part in model:
        part.save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(PROGRAM), str(folder), "--port", str(port)]
    server = subprocess.Popen(command, env=ONE_THREAD, stderr=subprocess.PIPE, text=True)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert server.poll() is None, server.stderr.read()
            try:
                with urllib.request.urlopen(f"{address}/health") as response:
                    assert json.load(response) == {"items": NUM_ITEMS, "waiting": 0}
                break
            except urllib.error.URLError:
                time.sleep(0.1)
        yield address
    finally:
        server.terminate()
        server.wait(20)


def ask(address, **question):
    request = urllib.request.Request(
        f"{address}/recommend",
        json.dumps(question).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def test_a_hundred_requests_at_once_get_the_lists_of_recommend(model, address):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 30, (100,), generator=generator).tolist()
    histories = [
        [f"i{i}" for i in torch.randint(0, NUM_ITEMS, (n,), generator=generator)] for n in lengths
    ]
    histories[3] = ["never heard of"]
    with ThreadPoolExecutor(100) as pool:
        answers = list(
            pool.map(
                lambda user: ask(address, history=histories[user], k=1 + user % 20), range(100)
            )
        )
    found = recsys.recommend(*model, histories, 20)
    for user, answer in enumerate(answers):
        k = 1 + user % 20
        assert answer["items"] == found.items[user][:k]
        assert answer["scores"] == pytest.approx(found.scores[user][:k], abs=1e-4)
        assert answer["source"] == found.sources[user]
    assert answers[3]["source"] == "popularity"


@pytest.mark.parametrize(
    "question", [{"k": 3}, {"history": "i3"}, {"history": [], "k": 0}, {"history": [], "k": 101}]
)
def test_what_is_no_question_is_refused(address, question):
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(address, **question)
    assert refused.value.code == 422
