"""MT-Bench: answers, judges over HTTP and from a checkpoint, judgments without a rating."""

import http.server
import json
import threading

import pytest

from warploom.data.chat import ChatTemplate
from warploom.errors import UserError
from warploom.evaluation.config import EvalConfig
from warploom.evaluation.judge import EndpointJudge, ModelJudge, make_judge, rating_of
from warploom.evaluation.run import evaluate_tasks, find_tasks
from warploom.evaluation.task import TaskFiles
from warploom.evaluation.tasks import TASKS
from warploom.evaluation.tasks.mt_bench import judge_messages
from warploom.evaluation.text_model import TextModel
from warploom.train.load_model import load_model


@pytest.mark.parametrize(
    ("judgment", "rating"),
    [
        ("Rating: [[7]]", 7.0),
        ("first [3], then [[8.5]]", 8.5),
        ("Rating: [6]", 6.0),
        ("[[11]]", None),
        ("[[0]]", None),
        ("ten of ten", None),
        ("", None),
    ],
)
def test_ratings_are_read(judgment, rating):
    assert rating_of(judgment) == rating


@pytest.fixture
def judge_server():
    """An OpenAI-compatible address that says what `replies` holds, in turn, and keeps what it was asked."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.server.asked.append((self.path, self.headers.get("Authorization"), body))
            reply = self.server.replies.pop(0)
            status, payload = (200, reply) if isinstance(reply, bytes) else reply
            self.send_response(status)
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, *arguments):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.replies = [], []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server, f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


def said(text):
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "tasks" / "mt_bench"
    (root / "reference_answer").mkdir(parents=True)
    questions = [
        {"question_id": 81, "category": "writing", "turns": ["what is a leaf?", "and a plant?"]},
        {"question_id": 101, "category": "math", "turns": ["one and one?", "and one?"]},
    ]
    (root / "question.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    reference = {"question_id": 101, "choices": [{"turns": ["two", "three"]}]}
    (root / "reference_answer" / "gpt-4.jsonl").write_text(json.dumps(reference))
    prompts = {
        "single-v1": "{question}|{answer}",
        "single-v1-multi-turn": "{question_1}|{answer_1}|{question_2}|{answer_2}",
        "single-math-v1": "{question}|{ref_answer_1}|{answer}",
        "single-math-v1-multi-turn": "{question_1}|{ref_answer_1}|{ref_answer_2}|{answer_1}|{question_2}|{answer_2}",
    }
    rows = [{"name": name, "system_prompt": "judge", "prompt_template": text} for name, text in prompts.items()]
    (root / "judge_prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "tasks"


def test_answers_wait_for_a_judge_and_judgments_without_rating_are_counted(
    make_checkpoint, folder, tmp_path, judge_server
):
    loaded, out = load_model(make_checkpoint()), tmp_path / "out"
    settings = {"max_new_tokens": 5, "chat_template": "turns"}
    waiting = evaluate_tasks(loaded, find_tasks(["mt_bench"]), [folder], out, EvalConfig(**settings))["mt_bench"]
    assert waiting["figures"] == {} and waiting["flags"] == {"waits for a judge": 2}
    answers = [json.loads(line) for line in (out / "mt_bench.jsonl").read_text("utf-8").splitlines()[1:]]

    server, address = judge_server
    server.replies = [said("good. [[8]]"), said("so so: [[4]]"), said("I cannot say"), said("[[9]]")]
    key = tmp_path / "key"
    key.write_text("sesame\n")
    config = EvalConfig(**settings, judge=address, judge_model="strict", judge_key_file=key)
    judged = evaluate_tasks(loaded, find_tasks(["mt_bench"]), [folder], out, config)["mt_bench"]
    assert judged["figures"]["rating"]["value"] == pytest.approx((6 + 9) / 2)
    assert judged["figures"]["rating_unparsable_as_1"]["value"] == pytest.approx((6 + 5) / 2)
    assert judged["figures"]["turn_1"]["num_items"] == 1 and judged["figures"]["turn_2"]["num_items"] == 2
    assert judged["flags"] == {"turn 1: unparsable judgment": 1}
    assert set(judged["groups"]) == {"writing", "math"}

    path, header, body = server.asked[3]
    assert (path, header) == ("/v1/chat/completions", "Bearer sesame")
    assert body["model"] == "strict" and body["temperature"] == 0
    math = next(record["answers"] for record in answers if record["id"] == "101")
    assert body["messages"][1]["content"] == f"one and one?|two|three|{math[0]}|and one?|{math[1]}"
    # All is judged now: nobody is asked again.
    evaluate_tasks(loaded, find_tasks(["mt_bench"]), [folder], out, config)
    assert len(server.asked) == 4


def test_an_endpoint_that_fails_is_an_error_and_not_a_rating(judge_server):
    server, address = judge_server
    judge = EndpointJudge(address, "strict")
    server.replies = [(429, b"slow down"), b"<html>", b'{"choices": []}']
    for message in ("answers 429: slow down", "sent no chat completion", "sent no chat completion"):
        with pytest.raises(UserError, match=message):
            judge([{"role": "user", "content": "?"}])
    with pytest.raises(UserError, match="cannot be reached"):
        EndpointJudge("http://127.0.0.1:9/v1", "strict")([{"role": "user", "content": "?"}])


def test_a_checkpoint_judges_in_its_template(make_model, tokenizer, monkeypatch):
    template = ChatTemplate.named("turns")
    model = TextModel(make_model(), tokenizer, chat_template=template)
    asked = []

    def complete(prompts, sampling, end_id=None):
        asked.append((list(prompts), sampling.temperature, end_id))
        yield 0, ["rated [[5]]"], False

    monkeypatch.setattr(model, "complete", complete)
    messages = [{"role": "system", "content": "judge"}, {"role": "user", "content": "is it good?"}]
    assert rating_of(ModelJudge("mine", model)(messages)) == 5
    expected = template.encode(tokenizer, messages, add_generation_prompt=True).ids
    assert asked == [([expected], 0.0, template.end_id(tokenizer))]


def test_a_random_model_as_judge_says_nothing_that_parses(make_model, tokenizer):
    judge = ModelJudge("random", TextModel(make_model(), tokenizer, chat_template=ChatTemplate.named("turns")))
    text = judge([{"role": "user", "content": "rate"}])
    assert isinstance(text, str) and rating_of(text) is None
    with pytest.raises(UserError, match="holds no chat template"):
        ModelJudge("random", TextModel(make_model(), tokenizer))


def test_judges_that_are_not_there(tmp_path, make_checkpoint):
    with pytest.raises(UserError, match="neither an http address nor the folder"):
        make_judge(EvalConfig(judge=str(tmp_path / "none")))
    with pytest.raises(UserError, match="key cannot be read"):
        make_judge(EvalConfig(judge="http://127.0.0.1:9/v1", judge_key_file=tmp_path / "none"))
    with pytest.raises(UserError, match="holds no chat template"):
        make_judge(EvalConfig(judge=str(make_checkpoint())))
    assert make_judge(EvalConfig()) is None


def test_the_official_files(shared_data):
    items = TASKS["mt_bench"].items(TaskFiles([shared_data / "eval"]), 0)
    assert len(items) == 80 and sum(item.values["reference"] is not None for item in items) == 30
    for item in items:
        for turn in range(2):
            (_, user) = judge_messages(item.values, ["MINE 1", "MINE 2"], turn)
            assert "MINE 1" in user["content"] and ("MINE 2" in user["content"]) == (turn == 1)
            assert item.values["turns"][turn] in user["content"]
