"""`warploom sample`: write text with a trained model."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from warploom.errors import UserError
from warploom.generate.beam import beam_search
from warploom.generate.distribution import SamplingConfig
from warploom.generate.sampler import generate, pad_right
from warploom.train.device import choose_device, choose_dtype
from warploom.train.load_model import LoadedModel, load_model


@dataclass(frozen=True)
class Command:
    """Write text with a trained model; it streams as it comes when there is one sample to write."""

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A step-... folder, or a run folder, whose newest sound checkpoint is taken."""
    prompt: tuple[str, ...] = ("",)
    """Texts to continue, or, for an encoder-decoder, to translate; the empty text begins a document."""
    chat: bool = False
    """Take each prompt as what a user says, written in the chat template of the checkpoint."""
    base: Path | None = None
    """The base of an adapter, where it is no longer where it was."""
    num_beams: int = 0
    """encoder-decoder: beam search of this width instead of sampling; 0 samples."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes a GPU if there is one."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Compute type of the model but for the last layer's products, which are float32; auto takes bf16 on a GPU. bf16
    reads half the bytes a token."""
    threads: int = 0
    """CPU threads; 0 leaves PyTorch's choice."""
    sampling: Annotated[SamplingConfig, tyro.conf.arg(name="")] = field(default_factory=SamplingConfig)

    def run(self) -> None:
        if self.threads:
            torch.set_num_threads(self.threads)
        device = choose_device(self.device)
        loaded = load_model(
            self.checkpoint,
            device=device,
            dtype=choose_dtype(self.dtype, device),
            base=self.base,
            on_skip=lambda text: print(text, file=sys.stderr),
        )
        if loaded.tokenizer is None:
            raise UserError(f"{loaded.path} holds no tokenizer, so it cannot read or write text")
        if self.num_beams:
            self._translate(loaded)
        else:
            self._sample(loaded)

    def _sample(self, loaded: LoadedModel) -> None:
        is_translating = loaded.config.model.architecture == "encoder-decoder"
        prompts: list[str] | list[list[int]] = [""] * len(self.prompt) if is_translating else list(self.prompt)
        sources = list(self.prompt) if is_translating else None
        template, end_id = loaded.chat_template, None
        assert loaded.tokenizer is not None
        if self.chat:
            if template is None:
                raise UserError(f"{loaded.path} holds no chat template; leave chat out, or tune it with finetune")
            talks = [[{"role": "user", "content": prompt}] for prompt in self.prompt]
            prompts = [template.encode(loaded.tokenizer, talk, add_generation_prompt=True).ids for talk in talks]
            end_id = template.end_id(loaded.tokenizer)
        streams = len(prompts) * self.sampling.num_samples == 1

        def on_text(prompt: int, sample: int, piece: str) -> None:
            sys.stdout.write(piece)
            sys.stdout.flush()

        if streams:
            sys.stdout.write("" if is_translating or self.chat else self.prompt[0])
        texts = generate(
            loaded.model,
            loaded.tokenizer,
            prompts,
            self.sampling,
            sources=sources,
            end_id=end_id,
            on_text=on_text if streams else None,
        )
        if streams:
            print()
            return
        for number, (prompt, samples) in enumerate(zip(self.prompt, texts, strict=True)):
            for sample, text in enumerate(samples):
                print(f"--- prompt {number + 1} of {len(texts)}, sample {sample + 1} of {len(samples)} ---")
                print(text if is_translating or self.chat else prompt + text)

    def _translate(self, loaded: LoadedModel) -> None:
        if loaded.config.model.architecture != "encoder-decoder":
            raise UserError(
                f"num_beams is {self.num_beams}, but {loaded.path} is a {loaded.config.model.architecture}; "
                "beam search is for an encoder-decoder, leave num-beams out"
            )
        tokenizer = loaded.tokenizer
        assert tokenizer is not None
        device = next(loaded.model.parameters()).device
        source, lengths = pad_right([[*tokenizer.encode(text), tokenizer.eos_id] for text in self.prompt], device)
        found = beam_search(
            loaded.model,
            source,
            lengths,
            num_beams=self.num_beams,
            max_new_tokens=self.sampling.max_new_tokens,
            bos_id=tokenizer.eos_id,
            eos_id=tokenizer.eos_id,
        )
        for text, hypotheses in zip(self.prompt, found, strict=True):
            print(f"--- {text} ---")
            for hypothesis in hypotheses:
                print(f"{hypothesis.score:9.4f}  {tokenizer.decode(hypothesis.tokens)}")
