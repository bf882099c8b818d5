"""From checkpoints to a server that listens."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import uvicorn

from warploom.errors import UserError
from warploom.serve.app import ServedModel, build_app
from warploom.serve.batcher import Batcher
from warploom.serve.config import LOOPBACK, ServeConfig
from warploom.serve.limits import deadline_protocol
from warploom.train.load_model import LoadedModel, load_model

_SHUTDOWN_S = 5


def load_models(
    checkpoints: Sequence[Path],
    config: ServeConfig,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    base: Path | None = None,
    on_skip: Callable[[str], None],
) -> dict[str, ServedModel]:
    """Load each checkpoint and name it after its folder. Raises UserError for one that cannot be served."""
    models: dict[str, ServedModel] = {}
    for path in checkpoints:
        loaded = load_model(path, device=device, dtype=dtype, base=base, on_skip=on_skip)
        if loaded.tokenizer is None or loaded.config.model.architecture != "decoder":
            raise UserError(f"{loaded.path} cannot be served: only a decoder that was trained on text can")
        batcher = Batcher(loaded.model, loaded.tokenizer, num_slots=config.slots, max_queue=config.queue)
        models[_free_name(path, loaded, models)] = ServedModel(batcher, loaded.tokenizer, loaded.chat_template)
    return models


def _free_name(path: Path, loaded: LoadedModel, taken: Mapping[str, ServedModel]) -> str:
    run, step = loaded.path.resolve().parent.name, loaded.path.name
    name = run if path.resolve() != loaded.path.resolve() else f"{run}/{step}"
    number = 2
    while name in taken:
        name, number = f"{run}/{step}-{number}", number + 1
    return name


def listen(config: ServeConfig) -> socket.socket:
    """Return the listening socket. Raises UserError if the address cannot be had."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
        listener.listen()  # from now on nobody is turned away, though the first answer waits for the server
    except OSError as error:
        listener.close()
        raise UserError(
            f"cannot listen on {config.host}:{config.port}: {error.strerror or error}; choose another port"
        ) from error
    return listener


def build_server(models: Mapping[str, ServedModel], config: ServeConfig) -> uvicorn.Server:
    """Return the server; run(sockets=[listen(config)]) serves until a signal, or until should_exit is set."""
    is_local = config.host in LOOPBACK
    app = build_app(
        models,
        token=config.read_token(),
        hosts=frozenset((*LOOPBACK, "[::1]")) if is_local else None,
        requests_per_minute=config.requests_per_minute,
        max_body_bytes=config.max_body_bytes,
        read_timeout_s=config.read_timeout_s,
    )
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=deadline_protocol(config.read_timeout_s),
            ws="none",
            lifespan="on",
            log_level="error",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=config.max_connections,
            h11_max_incomplete_event_size=config.max_header_bytes,
            timeout_keep_alive=max(1, round(config.read_timeout_s)),
            timeout_graceful_shutdown=_SHUTDOWN_S,
        )
    )


def serve(models: Mapping[str, ServedModel], config: ServeConfig, say: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM."""
    with listen(config) as listener:
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        say(f"Serving {', '.join(models)} on http://{shown}:{port}/ (the page) and http://{shown}:{port}/v1 (the API).")
        build_server(models, config).run(sockets=[listener])
