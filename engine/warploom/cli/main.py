"""The `warploom` command: finds the verb, lets it parse its own flags, turns errors a person can mend into one line."""

from __future__ import annotations

import importlib
import keyword
import sys
from collections.abc import Sequence

from warploom.cli.flags import parse
from warploom.errors import ProcessLost, UserError, nearest

# A verb is the file warploom/cli/<verb>.py (import_.py: the word is Python's) with a dataclass Command; only the verb
# that was asked for is imported.
VERBS = {
    "doctor": "what was built, what this machine has, and which back end each op will use and why",
    "tokenize": "train a tokenizer on text and encode the text into token shards",
    "train": "train a model on text; with --budget 10m everything else is chosen for you",
    "launch": "run a verb in many processes, watch over them, and start again from the last checkpoint",
    "data": "curate raw text: read, clean, filter, deduplicate, redact, split, mix",
    "finetune": "go on from a trained model: instructions, preferences or text; in full, some layers, or LoRA",
    "sample": "write text with a trained model",
    "serve": "serve checkpoints over HTTP: OpenAI's API, and a page to try and compare them",
    "eval": "held-out loss, perplexity and bits per byte of checkpoints, or their scores on benchmarks",
    "import": "a model of Hugging Face transformers, llama.cpp or CTranslate2 as a checkpoint",
    "export": "a checkpoint for Hugging Face transformers, llama.cpp or ONNX Runtime",
    "checkpoint": "inspect, verify or export a checkpoint: what it holds, whether it is whole, its weights elsewhere",
    "plan": "what a run will take: FLOPs, memory, the layouts that fit, days, cost; and how right that was",
    "verify": "prove every op right on this machine, on each back end and instruction-set level",
    "ladder": "from a naive training loop to this engine, one optimisation at a time: speed, memory, equal losses",
    "tune": "measure the GPU kernels' configurations for a model's shapes and keep the fastest for this card",
    "bench": "time the ops on this machine, after checking that they are right",
}


def usage() -> str:
    lines = ["usage: warploom VERB [flags]", "", "Train transformer language models from scratch.", "", "verbs:"]
    lines += [f"  {verb:<11}{text}" for verb, text in VERBS.items()]
    lines += ["", "`warploom VERB --help` lists the flags of a verb, with meaning, unit and default."]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Returns the exit code: 0, 2 for bad input, 75 when another process of the run is gone, 128 + signal
    when one ended the run."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    verb, rest = argv[0], argv[1:]
    try:
        if verb not in VERBS:
            raise UserError(f"there is no verb {verb!r}{nearest(verb, VERBS)}")
        module = f"warploom.cli.{verb}_" if keyword.iskeyword(verb) else f"warploom.cli.{verb}"
        command = parse(importlib.import_module(module).Command, f"warploom {verb}", rest)
        return command.run() or 0
    except UserError as error:
        print(f"warploom: {error}", file=sys.stderr)
        return 2
    except ProcessLost as error:
        print(f"warploom: {error}", file=sys.stderr)
        return 75
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
