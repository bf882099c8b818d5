"""Where a server listens and what it bears."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from warploom.errors import UserError

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class ServeConfig:
    host: str = "127.0.0.1"
    """Address to listen on. One that others can reach needs token-file."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    token_file: Path | None = None
    """A file that holds the token which requests must bring (Authorization: Bearer ...)."""
    slots: int = 8
    """Requests decoded at once, per checkpoint."""
    queue: int = 32
    """Requests that may wait, per checkpoint; more are answered 503."""
    requests_per_minute: int = 120
    """Of one address, with bursts of up to a quarter of it; more are answered 429."""
    max_body_bytes: int = 1 << 20
    """Longest body of a request; more is answered 413."""
    max_header_bytes: int = 16 << 10
    """Longest head of a request; more is answered 400."""
    read_timeout_s: float = 10.0
    """Time in which a request's head must have come, and again its body."""
    max_connections: int = 256
    """Connections at a time; more are answered 503."""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 1 << 16:
            raise UserError(f"port is {self.port}; give a number from 0 to 65535")
        for name in ("slots", "requests_per_minute", "max_body_bytes", "max_header_bytes", "max_connections"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; give 1 or more")
        if self.queue < 0:
            raise UserError(f"queue is {self.queue}; give 0 or more")
        if not self.read_timeout_s > 0:
            raise UserError(f"read_timeout_s is {self.read_timeout_s}; give a number of seconds above 0")
        if self.host not in LOOPBACK and self.token_file is None:
            raise UserError(
                f"host is {self.host}, which others may reach; set token_file to a file with a long secret, or listen "
                f"on {LOOPBACK[0]}"
            )
        if self.token_file is not None:
            self.read_token()

    def read_token(self) -> str | None:
        """Return the token; None if none is set. Raises UserError for a file that holds none to speak of."""
        if self.token_file is None:
            return None
        try:
            token = self.token_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"token_file {self.token_file} cannot be read: {error}") from error
        if len(token) < 16 or not token.isascii() or any(char.isspace() for char in token):
            raise UserError(
                f"token_file {self.token_file} must hold one word of 16 ASCII characters or more; "
                "`openssl rand -hex 32` makes one"
            )
        return token
