"""10,000 malformed requests from several connections, while a good client is served all along."""

import asyncio
import json
import random
import threading
import time

import numpy as np
import pytest

NUM_MALFORMED = 10_000
NUM_CONNECTIONS = 8
BODY = json.dumps({"prompt": "the quick", "max_tokens": 4, "temperature": 0}).encode()


def head(method="POST", path="/v1/completions", length=None, kind="application/json", host="localhost", more=b""):
    lines = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: {kind}\r\n".encode()
    return lines + (b"" if length is None else f"Content-Length: {length}\r\n".encode()) + more + b"\r\n"


def with_body(body, **settings):
    return head(length=len(body), **settings) + body


def good():
    return with_body(BODY)


# Each makes bytes of a request that must not succeed, from a random.Random. Those marked True leave the connection
# usable, so that many are sent over one; the others end it.
def mangled_json(chance):
    body = bytearray(BODY)
    for _ in range(chance.randint(1, 4)):
        body[chance.randrange(len(body))] = chance.choice(b'{}[]",:\\\x00\xff0e-')
    body[0:1] = chance.choice([b"[", b"", b"}", b'"', b"\xff"])
    return with_body(bytes(body))


def wrong_values(chance):
    junk = [None, True, -1, 1e308, 2**80, "", "x" * 300, [], {}, [[]], {"a": {}}, "\ud800", [None], -0.0]
    names = [
        "prompt",
        "n",
        "stop",
        "stream",
        "logprobs",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "max_tokens",
        "seed",
    ]
    value = {"prompt": "a", "max_tokens": 1}
    for _ in range(chance.randint(1, 5)):
        value[chance.choice(names)] = chance.choice(junk)
    value["unheard_of"] = chance.choice(junk)  # refused whatever the others are
    path = chance.choice(["/v1/completions", "/v1/chat/completions"])
    return with_body(json.dumps(value).encode(), path=path)


def wrong_messages(chance):
    piece = chance.choice([None, 1, "x", [], {}, {"role": "user"}, {"role": 3, "content": "x"}, {"content": "x"}])
    return with_body(json.dumps({"messages": [piece] * chance.randint(0, 3)}).encode(), path="/v1/chat/completions")


def deep_json(chance):
    depth = chance.randint(1000, 20_000)
    return with_body(
        chance.choice([b"[" * depth, b'{"a":' * depth, b'{"prompt":' + b"[" * depth + b"]" * depth + b"}"])
    )


def wrong_route(chance):
    path = chance.choice(
        ["/v1", "/v2/models", "//", "/%00", "/page.js/../../etc/passwd", "/" + "a" * 500, "/v1/models?x"]
    )
    return with_body(b"{}", method=chance.choice(["DELETE", "PATCH", "PUT", "OPTIONS", "POST"]), path=path)


def wrong_kind(chance):
    return with_body(BODY, kind=chance.choice(["text/plain", "application/x-www-form-urlencoded", "", "json", "a/b;c"]))


def wrong_host(chance):
    return with_body(BODY, host=chance.choice(["evil.example", "", "127.0.0.1.evil.example:80", "localhost@x", "[::"]))


def garbage(chance):
    return chance.randbytes(chance.randint(1, 400)) + b"\r\n\r\n"


def mangled_head(chance):
    data = bytearray(head(length=len(BODY)))
    for _ in range(chance.randint(1, 3)):
        data[chance.randrange(len(data) - 4)] = chance.choice(b"\x00\r\n :\xff\t/")
    return b"\x01" + bytes(data) + BODY


def wrong_length(chance):
    length = chance.choice(["-1", "1e9", "0x10", "9" * 30, "5, 6", ""])
    return head(more=f"Content-Length: {length}\r\n".encode()) + BODY


def wrong_chunks(chance):
    chunks = chance.choice([b"zz\r\n", b"-5\r\nabc\r\n", b"ffffffffffffffffffff\r\n", b"5\r\nabc"])
    return head(more=b"Transfer-Encoding: chunked\r\n") + chunks


def huge_head(chance):
    return head(more=b"X-A: " + b"a" * 40_000 + b"\r\n")


def cut_short(chance):
    data = good()
    return data[: chance.randrange(1, len(data))]


KEEPING = [mangled_json, wrong_values, wrong_messages, wrong_route, wrong_kind, wrong_host]
ENDING = [garbage, mangled_head, wrong_length, wrong_chunks, huge_head, cut_short, deep_json]


class Attacker:
    """Sends malformed requests over one connection after another, and counts what came back."""

    def __init__(self, port, seed):
        self.port, self.chance = port, random.Random(seed)
        self.sent, self.statuses, self.by_kind = 0, {}, {}

    async def run(self, count):
        while self.sent < count:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            try:
                for _ in range(self.chance.randint(1, 12)):
                    if not await self._send(reader, writer, self.chance.choice(KEEPING)):
                        break
                else:
                    await self._send(reader, writer, self.chance.choice(ENDING))
            except ConnectionError:
                pass
            finally:
                writer.close()

    async def _send(self, reader, writer, make):
        """Send one; return whether the connection can take another."""
        self.sent += 1
        self.by_kind[make.__name__] = self.by_kind.get(make.__name__, 0) + 1
        writer.write(make(self.chance))
        await writer.drain()
        if make is cut_short or make is wrong_chunks:
            return False
        line = await reader.readline()
        if not line:
            return False
        status = int(line.split()[1])
        self.statuses[status] = self.statuses.get(status, 0) + 1
        length = None
        while (header := await reader.readline()) not in (b"\r\n", b""):
            name, _, value = header.decode().partition(":")
            if name.lower() == "content-length":
                length = int(value)
            if name.lower() == "connection" and value.strip() == "close":
                return False
        await reader.readexactly(length or 0)
        return make in KEEPING


async def good_client(port, is_done, statuses, seconds):
    """Ask again and again, each time over a connection of its own."""
    while not is_done():
        started = time.perf_counter()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head(length=len(BODY), more=b"Connection: close\r\n") + BODY)
        answer = await reader.read()
        writer.close()
        seconds.append(time.perf_counter() - started)
        content = answer.partition(b"\r\n\r\n")[2]
        statuses.append((int(answer.split()[1]), json.loads(content)["choices"][0]["text"]))


async def attack(port, seed):
    """Return the attackers, and the answers that a good client got meanwhile and their seconds."""
    attackers = [Attacker(port, (seed << 8) + number) for number in range(NUM_CONNECTIONS)]
    done, answers, seconds = asyncio.Event(), [], []
    client = asyncio.create_task(good_client(port, done.is_set, answers, seconds))
    await asyncio.gather(*(attacker.run(NUM_MALFORMED // NUM_CONNECTIONS) for attacker in attackers))
    done.set()
    await client
    return attackers, answers, seconds


@pytest.mark.slow
def test_what_a_good_client_waits_beside_them(serving, capsys):
    """Prints it, and asserts none of it: server, client and attackers share one process here."""
    with serving() as port:
        alone, answers = [], []
        asyncio.run(good_client(port, lambda: len(answers) == 1000, answers, alone))
        _, beside_answers, beside = asyncio.run(attack(port, 0))
    assert set(beside_answers) == set(answers) and len(set(answers)) == 1
    with capsys.disabled():
        for name, seconds in (("alone", alone), (f"beside {NUM_MALFORMED:,} malformed requests", beside)):
            p50, p99 = np.percentile(1e3 * np.array(seconds), [50, 99])
            print(f"\n{len(seconds):,} good requests {name}: {p50:.1f} ms, p99 {p99:.1f} ms")


@pytest.mark.parametrize("seed", [0])
def test_malformed_requests_neither_stop_the_server_nor_succeed(serving, seed):
    with serving() as port:
        threads = threading.active_count()
        attackers, answers, _ = asyncio.run(attack(port, seed))
        assert threading.active_count() <= threads + 16  # the pool that encodes prompts
    assert sum(attacker.sent for attacker in attackers) >= NUM_MALFORMED
    kinds = {name for attacker in attackers for name in attacker.by_kind}
    assert kinds == {make.__name__ for make in KEEPING + ENDING}
    statuses = {}
    for attacker in attackers:
        for status, count in attacker.statuses.items():
            statuses[status] = statuses.get(status, 0) + count
    # None succeeded, none made the server fail, and the queue was never full: all were refused for what they are.
    assert set(statuses) <= {400, 404, 405, 413, 415} and statuses[400] > 1000
    assert len(answers) > 20 and len(set(answers)) == 1 and answers[0][0] == 200
