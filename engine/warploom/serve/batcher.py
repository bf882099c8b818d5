"""A thread that decodes a model's continuous batch, and the queue of requests before it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence

import torch

from warploom.data.tokenizer import Tokenizer
from warploom.generate.continuous import ContinuousBatch, Finish, Generation
from warploom.models.transformer import Transformer


class BatcherFull(Exception):
    """The queue of waiting requests is full; try later."""


class BatcherStopped(Exception):
    """The batcher takes no requests any more; the message says why."""


class Batcher:
    """Decodes one model for up to num_slots requests at once, with up to max_queue more waiting."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, *, num_slots: int = 8, max_queue: int = 32) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self._num_slots, self._max_queue = num_slots, max_queue
        self._batch = ContinuousBatch(self.model, tokenizer, num_slots=num_slots)
        self._waiting: deque[Generation] = deque()
        self._changed = threading.Condition()
        self._stopped: str | None = None
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End after the pass that is being made; what is not finished gets an error."""
        with self._changed:
            self._stopped = self._stopped or "the server is shutting down"
            self._changed.notify()
        self._thread.join()

    @property
    def stopped(self) -> str | None:
        """Why no requests are taken any more; None as long as they are."""
        return self._stopped

    @property
    def load(self) -> tuple[int, int]:
        """Requests being decoded, and requests that wait."""
        return self._batch.num_rows, len(self._waiting)

    def submit(self, generations: Sequence[Generation]) -> None:
        """Take all of the requests, or raise BatcherFull or BatcherStopped and take none."""
        with self._changed:
            if self._stopped is not None:
                raise BatcherStopped(self._stopped)
            if len(self._waiting) + len(generations) > self._max_queue + self._num_slots - self._batch.num_rows:
                raise BatcherFull
            self._waiting.extend(generations)
            self._changed.notify()

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                with self._changed:  # so that the queue is never taken for shorter than it is
                    self._batch.admit(self._waiting)
                with torch.inference_mode():
                    self._batch.step()
        except BaseException as error:
            self._stopped = f"the model stopped with {type(error).__name__}: {error}"
            raise
        finally:
            # Under the lock, so that no request is taken after the last look at the queue.
            with self._changed:
                left = [*self._batch.generations, *self._waiting]
                self._waiting.clear()
            for generation in left:
                generation.on_event(Finish("error", "", self._stopped or ""))

    def _wait_for_work(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._stopped is not None or self._batch.num_rows or self._waiting)
            return self._stopped is None
