"""The API over a real socket, as OpenAI's clients speak it: answers, streams, refusals, limits."""

import http.client
import json
import socket
import threading

import pytest

from warploom.errors import UserError
from warploom.generate.distribution import SamplingConfig
from warploom.generate.sampler import generate
from warploom.serve.config import ServeConfig
from warploom.serve.limits import RateLimiter
from warploom.serve.server import listen


@pytest.fixture(scope="module")
def port(serving):
    """A server of one small model."""
    with serving() as port:
        yield port


GREEDY = {"temperature": 0, "max_tokens": 12}


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"


def request(port, path, body=None, *, method=None, headers=None, raw=None):
    """Return status, headers and body of one request; a dictionary is sent as JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    data = raw if raw is not None else None if body is None else json.dumps(body)
    sent = {"Content-Type": "application/json", **(headers or {})}
    connection.request(method or ("GET" if data is None else "POST"), path, data, sent)
    response = connection.getresponse()
    content = response.read().decode()
    connection.close()
    is_json = response.getheader("content-type", "").startswith("application/json")
    return response.status, response.headers, json.loads(content) if is_json else content


def chunks(content):
    events = [event.removeprefix("data: ") for event in content.split("\n\n") if event]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


def test_completions_whole_and_streamed(serving, make_model, tokenizer):
    model = make_model()
    expected = generate(model, tokenizer, ["the quick"], SamplingConfig(temperature=0.0, max_new_tokens=12))[0][0]
    with serving({"small": model}) as port:
        status, _, whole = request(port, "/v1/completions", {"prompt": "the quick", "logprobs": 2, **GREEDY})
        assert status == 200 and whole["object"] == "text_completion" and whole["model"] == "small"
        (choice,) = whole["choices"]
        assert choice["text"] == expected and choice["finish_reason"] in ("stop", "length")
        log_probs = choice["logprobs"]
        assert len(log_probs["tokens"]) == len(log_probs["token_logprobs"]) == whole["usage"]["completion_tokens"]
        assert all(value <= 0 for value in log_probs["token_logprobs"]) and len(log_probs["top_logprobs"][0]) == 2
        body = {"prompt": "the quick", "stream": True, "stream_options": {"include_usage": True}, **GREEDY}
        status, headers, content = request(port, "/v1/completions", body)
        assert status == 200 and headers["content-type"].startswith("text/event-stream")
        *parts, usage = chunks(content)
        assert "".join(part["choices"][0]["text"] for part in parts) == expected
        assert parts[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]
        assert usage["choices"] == [] and usage["usage"] == whole["usage"]


def test_chat_whole_and_streamed(serving):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the quick?"}]
    with serving() as port:
        body = {"messages": messages, "logprobs": True, "top_logprobs": 1, **GREEDY}
        status, _, whole = request(port, "/v1/chat/completions", body)
        assert status == 200 and whole["object"] == "chat.completion"
        message = whole["choices"][0]["message"]
        entries = whole["choices"][0]["logprobs"]["content"]
        assert message["role"] == "assistant" and len(entries) == whole["usage"]["completion_tokens"]
        assert set(entries[0]) == {"token", "logprob", "bytes", "top_logprobs"}
        assert entries[0]["top_logprobs"][0]["token"] == entries[0]["token"]  # greedy takes the likeliest
        _, _, content = request(port, "/v1/chat/completions", {"messages": messages, "stream": True, **GREEDY})
        parts = chunks(content)
        assert parts[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert parts[0]["object"] == "chat.completion.chunk"
        text = "".join(part["choices"][0]["delta"].get("content", "") for part in parts)
        assert text == message["content"]


def test_several_choices_seeds_and_stops(serving):
    with serving() as port:
        body = {"prompt": ["the quick", "a"], "n": 2, "max_tokens": 8, "seed": 5, "temperature": 1.5}
        _, _, first = request(port, "/v1/completions", body)
        _, _, again = request(port, "/v1/completions", body)
        texts = [choice["text"] for choice in first["choices"]]
        assert texts == [choice["text"] for choice in again["choices"]] and len(set(texts)) == 4
        assert [choice["index"] for choice in first["choices"]] == [0, 1, 2, 3]
        _, _, other = request(port, "/v1/completions", {**body, "seed": 6})
        assert texts != [choice["text"] for choice in other["choices"]]
        stop = texts[0][2:3]
        _, _, cut = request(port, "/v1/completions", {**body, "prompt": "the quick", "n": 1, "stop": stop})
        assert cut["choices"][0]["text"] == texts[0][: texts[0].index(stop)]
        assert cut["choices"][0]["finish_reason"] == "stop"


def test_two_models_by_name(serving, make_model):
    with serving({"one": make_model(seed=1), "two": make_model(seed=2)}) as port:
        _, _, listed = request(port, "/v1/models")
        assert [model["id"] for model in listed["data"]] == ["one", "two"]
        answers = {
            name: request(port, "/v1/completions", {"prompt": "the", "model": name, **GREEDY})[2]
            for name in ("one", "two")
        }
        assert all(answer["model"] == name for name, answer in answers.items())
        assert answers["one"]["choices"][0]["text"] != answers["two"]["choices"][0]["text"]
        default = request(port, "/v1/completions", {"prompt": "the", **GREEDY})[2]
        assert default["choices"][0]["text"] == answers["one"]["choices"][0]["text"]


@pytest.mark.parametrize(
    "body, param, words",
    [
        ({}, "prompt", "missing"),
        ({"prompt": 3}, "prompt", "a text or token ids"),
        ({"prompt": [10**9]}, "prompt", "token ids from 0"),
        ({"prompt": [True]}, "prompt", "a text or token ids"),
        ({"prompt": ["a"] * 9}, "prompt", "up to 8"),
        ({"prompt": "\ud800"}, "prompt", "surrogate"),
        ({"prompt": "a", "n": 9}, "n", "from 1 to 8"),
        ({"prompt": ["a", "b"], "n": 5}, "n", "more than 8 choices"),
        ({"prompt": "a", "temperature": 3}, None, "temperature is 3"),
        ({"prompt": "a", "temperature": "hot"}, "temperature", "give a number"),
        ({"prompt": "a", "top_p": 0}, None, "top_p is 0"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens", "whole number"),
        ({"prompt": "a", "max_tokens": 1.5}, "max_tokens", "whole number"),
        ({"prompt": "a", "stop": [1]}, "stop", "a text or up to"),
        ({"prompt": "a", "stop": [""]}, None, "not empty"),
        ({"prompt": "a", "stream": "yes"}, "stream", "true or false"),
        ({"prompt": "a", "seed": 2**70}, "seed", "whole number"),
        ({"prompt": "a", "logprobs": 99}, "logprobs", "from 0 to 20"),
        ({"prompt": "a", "echo": True}, "echo", "not supported"),
        ({"prompt": "a", "presence_penalty": 1}, "presence_penalty", "not supported"),
        ({"prompt": "a", "colour": "red"}, "colour", "not supported"),
        ({"prompt": "the quick brown fox jumps over the lazy dog " * 20}, None, "context is 64"),
    ],
    ids=lambda value: None,
)
def test_bad_requests_say_what_is_wrong(port, body, param, words):
    status, _, answer = request(port, "/v1/completions", body)
    assert status == 400 and words in answer["error"]["message"] and answer["error"]["param"] == param


def test_what_asks_for_nothing_is_taken(port):
    body = {"prompt": "a", "presence_penalty": 0, "tools": [], "user": "me", "n": None, **GREEDY}
    assert request(port, "/v1/completions", body)[0] == 200


@pytest.mark.parametrize(
    "path, arguments, status",
    [
        ("/v1/completions", {"raw": "{"}, 400),
        ("/v1/completions", {"raw": "[1]"}, 400),
        ("/v1/completions", {"raw": '{"prompt": "a", "prompt": "b"}'}, 400),
        ("/v1/completions", {"raw": '{"prompt": "a", "temperature": NaN}'}, 400),
        ("/v1/completions", {"raw": "[" * 100_000}, 400),
        ("/v1/completions", {"raw": b"\xff\xfe"}, 400),
        ("/v1/completions", {"body": {"prompt": "a"}, "headers": {"Content-Type": "text/plain"}}, 415),
        ("/v1/completions", {"body": {"prompt": "a", "model": "gpt-9"}}, 404),
        ("/v1/completions", {"method": "PUT", "body": {}}, 405),
        ("/v1/completions", {"raw": " " * ((1 << 20) + 1)}, 413),
        ("/v1/chat/completions", {"body": {"messages": []}}, 400),
        ("/v1/chat/completions", {"body": {"messages": [{"role": "x", "content": "y"}]}}, 400),
        ("/v1/chat/completions", {"body": {"messages": [{"role": "user", "content": "y"}], "top_logprobs": 1}}, 400),
        ("/v1/nothing", {}, 404),
        ("/v1/models", {"headers": {"Host": "evil.example"}}, 400),
    ],
    ids=lambda value: None,
)
def test_what_is_refused_is_refused_in_json(port, path, arguments, status):
    found, _, answer = request(port, path, **arguments)
    assert found == status and answer["error"]["message"]


def test_a_token_is_asked_for_where_one_is_set(serving, tmp_path):
    secret = tmp_path / "token"
    secret.write_text("0123456789abcdef\n")
    with serving(token_file=secret, host="0.0.0.0") as port:
        assert request(port, "/v1/models")[0] == 401
        assert request(port, "/v1/models", headers={"Authorization": "Bearer wrong"})[0] == 401
        assert request(port, "/v1/models", headers={"Authorization": "Bearer 0123456789abcdef"})[0] == 200
        assert request(port, "/")[0] == 200  # the page asks for it
    with pytest.raises(UserError, match="others may reach"):
        ServeConfig(host="0.0.0.0")
    secret.write_text("short")
    with pytest.raises(UserError, match="16 ASCII characters"):
        ServeConfig(token_file=secret)


def test_too_many_requests_are_told_when_to_come_back(serving):
    with serving(requests_per_minute=8) as port:  # a burst of 2
        found = [request(port, "/v1/models") for _ in range(3)]
        assert [status for status, _, _ in found] == [200, 200, 429]
        assert 1 <= int(found[-1][1]["retry-after"]) <= 8
        assert request(port, "/health")[0] == 200


def test_a_rate_fills_up_again():
    now = [0.0]
    limiter = RateLimiter(60, 2, clock=lambda: now[0])
    assert [limiter.wait_s("a") for _ in range(3)] == [0.0, 0.0, 1.0]
    assert limiter.wait_s("b") == 0.0
    now[0] = 0.5
    assert limiter.wait_s("a") == 0.5
    now[0] = 1.0
    assert limiter.wait_s("a") == 0.0


def test_a_full_queue_is_503(serving, make_model):
    """One slot and no queue: while a stream is read the next request is refused, and served when it is over."""
    long = make_model(max_seq_len=8192)
    with serving({"long": long}, slots=1, queue=0) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        body = {"prompt": [1], "stream": True, "max_tokens": 8000, "temperature": 0, "logprobs": 0}
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        response.read(100)
        status, headers, answer = request(port, "/v1/completions", {"prompt": "a", **GREEDY})
        assert status == 503 and headers["retry-after"] and answer["error"]["code"] == "queue_full"
        response.close()
        connection.close()  # the server notices, and the slot is free
        for _ in range(1000):
            if request(port, "/v1/completions", {"prompt": "a", **GREEDY})[0] == 200:
                return
        raise AssertionError("the slot of a client that went away was never freed")


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET / HT",
        HEAD + b"X: ",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /",
    ],
    ids=["nothing", "half a line", "half a header", "a second request's beginning"],
)
def test_a_slow_head_is_cut_off(serving, sent):
    with serving(read_timeout_s=0.3) as port, socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        client.sendall(sent)
        while client.recv(4096):  # ends when the server closes; the socket's own timeout would raise
            pass


def test_a_slow_body_is_answered_408(serving):
    head = HEAD + b"Content-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
    with serving(read_timeout_s=0.3) as port, socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        client.sendall(head)
        assert client.recv(4096).startswith(b"HTTP/1.1 408")


def test_long_heads_are_refused(serving):
    with serving(max_header_bytes=4096) as port, socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 10_000)
        assert client.recv(4096).startswith(b"HTTP/1.1 400")


def test_requests_at_once_are_each_answered(serving):
    answers = {}

    def ask(number):
        body = {"prompt": "the quick", "max_tokens": 5 + number, "temperature": 0, "stream": number % 2 == 0}
        answers[number] = request(port, "/v1/completions", body)[0]

    with serving(slots=3) as port:
        threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert answers == dict.fromkeys(range(12), 200)


def test_a_taken_port_is_named():
    config = ServeConfig(port=0)
    with listen(config) as first:
        port = first.getsockname()[1]
        first.listen()
        with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1:{port}"):
            listen(ServeConfig(port=port))


def test_the_page_brings_its_own_and_nothing_else(serving):
    with serving() as port:
        for path, kind in {"/": "text/html", "/page.css": "text/css", "/page.js": "text/javascript"}.items():
            status, headers, content = request(port, path)
            assert status == 200 and headers["content-type"].startswith(kind)
            assert "script-src 'self'" in headers["content-security-policy"]
            assert "http://" not in content and "https://" not in content
