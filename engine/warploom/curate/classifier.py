"""A small text classifier: logistic regression over hashed words and word pairs, trained in seconds on a user's labels.

It serves two steps: harmful speech from labelled comments, and quality from two folders of examples. The model is a
safetensors file; the same examples give the same model.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from warploom.curate.document import Document, Step, at_least, at_most
from warploom.curate.records import ENDINGS, read_records
from warploom.curate.words import gram_hashes, mix, split_words
from warploom.data.documents import list_files
from warploom.errors import UserError

FORMAT = "warploom-classifier"
_BITS = 18
_MAX_CHARS = 20_000  # of a text; the beginning tells enough


def features(text: str) -> tuple[np.ndarray, np.ndarray]:
    """(indices, values): distinct buckets of the text's words and word pairs, and weights of unit Euclidean norm."""
    hashes = split_words(text[:_MAX_CHARS], "letters").hashes
    keys = np.concatenate([hashes, gram_hashes(hashes, 2)]) >> np.uint64(64 - _BITS)
    indices, counts = np.unique(keys, return_counts=True)
    values = np.sqrt(counts)
    return indices.astype(np.int64), values / max(float(np.linalg.norm(values)), 1e-9)


@dataclass(frozen=True)
class Classifier:
    """weights: (2**18,) float32; probability of the positive class = sigmoid(bias + weights . features)."""

    weights: np.ndarray
    bias: float

    def probability(self, text: str) -> float:
        indices, values = features(text)
        return float(1 / (1 + np.exp(-(self.bias + float(self.weights[indices] @ values)))))

    @classmethod
    def train(
        cls, positive: Iterable[str], negative: Iterable[str], epochs: int = 20, l2: float = 1e-5, seed: int = 0
    ) -> Classifier:
        """Fit by AdaGrad over single examples, the two classes weighted to count the same.

        Raises UserError if a class has no example.
        """
        examples = [(features(text), 1.0) for text in positive]
        num_positive = len(examples)
        examples += [(features(text), 0.0) for text in negative]
        num_negative = len(examples) - num_positive
        if not num_positive or not num_negative:
            raise UserError(
                f"a classifier needs examples of both classes, got {num_positive} positive and {num_negative} negative"
            )
        weights = np.zeros(1 << _BITS)
        squares = np.full(1 << _BITS, 1e-8)
        bias, bias_square = 0.0, 1e-8
        half = len(examples) / 2
        for epoch in range(epochs):
            order = np.argsort(mix(np.arange(len(examples), dtype=np.uint64) + np.uint64((seed + epoch) << 32)))
            for index in order.tolist():
                (indices, values), label = examples[index]
                score = bias + float(weights[indices] @ values)
                error = (1 / (1 + np.exp(-score)) - label) * half / (num_positive if label else num_negative)
                gradient = error * values + l2 * weights[indices]
                squares[indices] += gradient**2
                weights[indices] -= 0.5 * gradient / np.sqrt(squares[indices])
                bias_square += error**2
                bias -= 0.1 * error / bias_square**0.5
        return cls(weights.astype(np.float32), float(bias))

    def save(self, path: Path) -> None:
        bias = np.array([self.bias], np.float32)
        save_file({"weights": self.weights, "bias": bias}, path, metadata={"format": FORMAT})

    @classmethod
    def load(cls, path: Path) -> Classifier:
        """Raises UserError if the file is no classifier of this version."""
        try:
            with safe_open(path, "numpy") as file:
                if (file.metadata() or {}).get("format") != FORMAT:
                    raise UserError(f"{path} is no classifier; train one with warploom data classifier")
                weights, bias = file.get_tensor("weights"), file.get_tensor("bias")
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot read the classifier {path}: {error}") from error
        if weights.shape != (1 << _BITS,):
            raise UserError(f"the classifier {path} has {weights.shape} weights, not {1 << _BITS}; train it again")
        return cls(weights, float(bias[0]))


def accuracy(model: Classifier, positive: Sequence[str], negative: Sequence[str]) -> dict[str, float]:
    """Accuracy, precision and recall of the positive class at probability 0.5, and the area under the ROC curve."""
    ups = np.array([model.probability(text) for text in positive])
    downs = np.array([model.probability(text) for text in negative])
    hits, false = int((ups >= 0.5).sum()), int((downs >= 0.5).sum())
    return {
        "accuracy": (hits + len(downs) - false) / (len(ups) + len(downs)),
        "precision": hits / max(hits + false, 1),
        "recall": hits / max(len(ups), 1),
        "auc": float((ups[:, None] > downs).mean() + (ups[:, None] == downs).mean() / 2),
    }


def read_examples(path: Path, label_column: str = "label") -> dict[str, list[str]]:
    """Texts by label: of a folder or a file without labels under "", of a .csv or .jsonl with a label column by it.

    Raises UserError if there is nothing to read.
    """
    texts: dict[str, list[str]] = {}
    if path.suffix == ".csv":
        with open(path, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                label = row.get(label_column)
                if label is None:
                    raise UserError(f"{path} has no column {label_column!r}, it has {', '.join(row)}; set label-column")
                texts.setdefault(label, []).append(row.get("text") or next(iter(row.values())))
        return texts
    if path.is_file() and path.suffix == ".jsonl":
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            texts.setdefault(str(row.get(label_column, "")), []).append(row["text"])
        return texts
    for name in list_files(path, ENDINGS):
        texts.setdefault("", []).extend(record.text for record in read_records(str(name)) if record.text)
    return texts


@dataclass(kw_only=True)
class Classify(Step):
    """Score each document with a trained classifier: quality, with min_score, or harm, with max_score."""

    NAME = "classifier"

    model: str = ""
    """The file that warploom data classifier wrote."""
    min_score: float = at_least("score", float("-inf"))
    max_score: float = at_most("score", float("inf"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model:
            raise UserError("the step classifier needs model = the file of a trained classifier")
        self._model = Classifier.load(Path(self.model))

    def files(self) -> list[Path]:
        return [Path(self.model)]

    def apply(self, document: Document) -> None:
        self.put(document, {"score": self._model.probability(document.text)})
