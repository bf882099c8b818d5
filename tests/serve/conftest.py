"""A server in a thread of this process, on a real socket, with small models of random weights."""

import contextlib
import threading

import pytest
import torch

from warploom.data.chat import ChatTemplate
from warploom.data.tokenizer import Tokenizer
from warploom.models.config import TransformerConfig
from warploom.models.transformer import Transformer
from warploom.serve.app import ServedModel
from warploom.serve.batcher import Batcher
from warploom.serve.config import ServeConfig
from warploom.serve.server import build_server, listen

TEXT = "the quick brown fox jumps over the lazy dog, and the dog sleeps on the mat; naïve café 你好 "


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.train([TEXT * 5], 320)


@pytest.fixture(scope="session")
def make_model(tokenizer):
    def make(seed=0, max_seq_len=64, **changes):
        torch.manual_seed(seed)
        values = {"d_model": 16, "num_layers": 2, "num_heads": 2, "init_std": 0.2}
        values |= {"vocab_size": tokenizer.vocab_size, "max_seq_len": max_seq_len, **changes}
        return Transformer(TransformerConfig(**values))

    return make


@pytest.fixture(scope="session")
def serving(make_model, tokenizer):
    """Serve models for the time of a block; yields the port."""

    @contextlib.contextmanager
    def run(models=None, **settings):
        config = ServeConfig(**{"port": 0, "requests_per_minute": 10**7, **settings})
        models = {"small": make_model()} if models is None else models
        served = {
            name: ServedModel(
                Batcher(model, tokenizer, num_slots=config.slots, max_queue=config.queue),
                tokenizer,
                ChatTemplate.named("turns"),
            )
            for name, model in models.items()
        }
        server = build_server(served, config)
        listener = listen(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(timeout=30)
            listener.close()
            assert not thread.is_alive()

    return run
