"""Serve a trained recommender over HTTP, requests that come together in one batch.

    pip install "sce_lm[serve]"
    python examples/serve.py runs/mine/model --port 8000 [--index index]
    curl -X POST localhost:8000/recommend -H 'content-type: application/json' \\
         -d '{"history": ["item-3", "item-4"], "k": 5}'

The model reads a batch of histories nearly as fast as one, so a request waits until the batch
before it is done, a few milliseconds at least, and goes along with whatever came meanwhile. Lists
are those of `recsys.recommend`. There is no authentication here: put it behind what has it.
"""

import argparse
import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, Field
from transformers import AutoModelForCausalLM, AutoTokenizer

from sce_lm import recsys

LONGEST_LIST = 100
LONGEST_HISTORY = 10_000
WAITING = 10_000
"""Requests that may wait; more are refused, rather than answered when nobody listens any more."""


class Question(BaseModel):
    """What is asked."""

    history: list[str | int] = Field(max_length=LONGEST_HISTORY)
    k: int = Field(10, ge=1, le=LONGEST_LIST)


class Answer(BaseModel):
    """A list, best first, and what it was made by: "model", "popularity" or "none"."""

    items: list[str]
    scores: list[float]
    source: str


@dataclass
class Batcher:
    """Answers questions together."""

    model: Any
    tokenizer: Any
    options: dict[str, Any]
    max_batch: int
    max_wait: float
    """Seconds that the first question of a batch waits for others."""

    def __post_init__(self) -> None:
        self.waiting: asyncio.Queue[tuple[Question, asyncio.Future]] = asyncio.Queue(WAITING)

    async def ask(self, question: Question) -> Answer:
        """Wait for the answer; raises asyncio.QueueFull where too many wait already."""
        answer: asyncio.Future = asyncio.get_running_loop().create_future()
        self.waiting.put_nowait((question, answer))
        return await answer

    async def work(self) -> None:
        """Answer batch after batch, until cancelled."""
        while True:
            batch = [await self.waiting.get()]
            await asyncio.sleep(self.max_wait)
            while len(batch) < self.max_batch and not self.waiting.empty():
                batch.append(self.waiting.get_nowait())
            questions = [question for question, _ in batch]
            try:
                answers = await asyncio.to_thread(self.answer, questions)
            except Exception as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), answer in zip(batch, answers, strict=True):
                if not future.done():  # else whoever asked has gone
                    future.set_result(answer)

    def answer(self, questions: list[Question]) -> list[Answer]:
        """The lists; the first k of a longer list are the list of k."""
        k = max(question.k for question in questions)
        histories = [question.history for question in questions]
        found = recsys.recommend(self.model, self.tokenizer, histories, k, **self.options)
        lists = zip(questions, found.items, found.scores, found.sources, strict=True)
        return [
            Answer(items=items[: q.k], scores=scores[: q.k], source=source)
            for q, items, scores, source in lists
        ]


def create_app(batcher: Batcher) -> FastAPI:
    """The application: POST /recommend, GET /health."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker = asyncio.create_task(batcher.work())
        yield
        worker.cancel()

    app = FastAPI(title="sce_lm recommender", lifespan=lifespan)
    num_items = len(recsys.item_tokens(batcher.tokenizer))

    @app.post("/recommend")
    async def recommend(question: Question) -> Answer:
        if question.k > num_items:
            raise HTTPException(422, f"k is {question.k} and there are {num_items} items.")
        try:
            return await batcher.ask(question)
        except asyncio.QueueFull:
            raise HTTPException(503, "Too many requests are waiting; try again later.") from None

    @app.get("/health")
    async def health() -> dict[str, int]:
        return {"items": num_items, "waiting": batcher.waiting.qsize()}

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve a trained recommender over HTTP.")
    parser.add_argument("model", type=Path, help="folder of save_pretrained, such as RUN/model")
    parser.add_argument("--index", type=Path, help="folder of sce-lm export --format faiss")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--max_batch", type=int, default=256)
    parser.add_argument("--max_wait", type=float, default=0.003, help="seconds")
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    index = None if options.index is None else recsys.load_index(options.index, tokenizer)
    batcher = Batcher(model, tokenizer, {"index": index}, options.max_batch, options.max_wait)
    uvicorn.run(create_app(batcher), host=options.host, port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
