"""The native scorers against lm-evaluation-harness, item by item: its own task definitions over the same rows, and the
same model behind both. Prompts, log-likelihoods, answers and scores must agree."""

import csv
import importlib.util
import io
import json
import tarfile
from pathlib import Path

import pytest

from warploom.errors import UserError
from warploom.evaluation.config import EvalConfig
from warploom.evaluation.run import evaluate_tasks, find_tasks
from warploom.train.load_model import load_model

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(
        importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness is missing: warploom[lm-eval]"
    ),
]
NUM_ITEMS = 4
SUBJECTS = ("anatomy", "college_physics")


def lines(file, count):
    with open(file, encoding="utf-8") as stream:
        return [json.loads(line) for line, _ in zip(stream, range(count), strict=False)]


@pytest.fixture(scope="module")
def rows(shared_data):
    """The first rows of the official files, as the hub's data sets have them: by task of the harness, by split."""
    folder = shared_data / "eval"
    arc = [
        {
            "id": row["id"],
            "question": row["question"]["stem"],
            "choices": {key: [choice[key] for choice in row["question"]["choices"]] for key in ("text", "label")},
            "answerKey": row["answerKey"],
        }
        for row in lines(folder / "arc" / "ARC-Challenge-Test.jsonl", NUM_ITEMS)
    ]
    hellaswag = lines(folder / "hellaswag" / "hellaswag_val_1000_official_fields.jsonl", NUM_ITEMS)
    truthful = json.loads((folder / "truthfulqa" / "mc_task.json").read_text("utf-8"))[:NUM_ITEMS]
    multiple_choice = [
        {
            "question": row["question"],
            **{
                name: {"choices": list(row[name]), "labels": list(row[name].values())}
                for name in ("mc1_targets", "mc2_targets")
            },
        }
        for row in truthful
    ]
    with open(folder / "truthfulqa" / "TruthfulQA.csv", encoding="utf-8", newline="") as stream:
        generation = [
            {
                "question": row["Question"],
                "correct_answers": row["Correct Answers"].split("; "),
                "incorrect_answers": row["Incorrect Answers"].split("; "),
            }
            for row, _ in zip(csv.DictReader(stream), range(NUM_ITEMS), strict=False)
        ]
    gsm8k = lines(folder / "gsm8k" / "test.jsonl", 5 + NUM_ITEMS)
    return {
        "arc_easy": {"test": arc},
        "arc_challenge": {"test": arc},
        "hellaswag": {"validation": hellaswag},
        "truthfulqa_mc1": {"validation": multiple_choice},
        "truthfulqa_mc2": {"validation": multiple_choice},
        "truthfulqa_gen": {"validation": generation},
        "gsm8k": {"train": gsm8k[:5], "test": gsm8k[5:]},
        **{f"mmlu_{subject}": mmlu_rows(folder, subject) for subject in SUBJECTS},
    }


def mmlu_rows(folder, subject):
    splits = {}
    with tarfile.open(folder / "mmlu" / "data.tar.xz") as archive:
        for split, count in (("dev", 5), ("test", NUM_ITEMS)):
            member = archive.extractfile(f"data/{split}/{subject}_{split}.csv")
            table = list(csv.reader(io.TextIOWrapper(member, "utf-8")))[:count]
            splits[split] = [
                {"question": row[0], "subject": subject, "choices": row[1:5], "answer": "ABCD".index(row[5])}
                for row in table
            ]
    return splits


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint):
    return make_checkpoint(max_seq_len=4096, init_std=0.1)


@pytest.fixture(scope="module")
def native(rows, checkpoint, tmp_path_factory):
    """Records of warploom's own tasks, by task and item."""
    folder, out = tmp_path_factory.mktemp("rows"), tmp_path_factory.mktemp("out")

    def write(name, *parts):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for part in parts for row in part), encoding="utf-8")

    write("arc_easy/test.jsonl", rows["arc_easy"]["test"])
    write("arc_challenge/test.jsonl", rows["arc_challenge"]["test"])
    write("hellaswag_val.jsonl", rows["hellaswag"]["validation"])
    write("truthful_qa_multiple_choice/validation.jsonl", rows["truthfulqa_mc1"]["validation"])
    write("truthful_qa_generation/validation.jsonl", rows["truthfulqa_gen"]["validation"])
    for split in ("train", "test"):
        write(f"gsm8k/{split}.jsonl", rows["gsm8k"][split])
    for split in ("dev", "test"):
        for subject in SUBJECTS:
            with open(folder / f"{subject}_{split}.csv", "w", newline="") as stream:
                for row in rows[f"mmlu_{subject}"][split]:
                    csv.writer(stream).writerow([row["question"], *row["choices"], "ABCD"[row["answer"]]])
            target = folder / "mmlu" / split
            target.mkdir(parents=True, exist_ok=True)
            (folder / f"{subject}_{split}.csv").rename(target / f"{subject}_{split}.csv")
    names = ["arc_easy", "arc_challenge", "hellaswag", "mmlu", "truthfulqa", "truthfulqa_gen", "gsm8k"]
    evaluate_tasks(load_model(checkpoint), find_tasks(names), [folder], out, EvalConfig(max_new_tokens=12))
    found = {}
    for name in names:
        head, *records = [json.loads(line) for line in (out / f"{name}.jsonl").read_text("utf-8").splitlines()]
        found[name] = {record["id"]: record for record in records}
    return found


@pytest.fixture(scope="module")
def harness(rows, checkpoint):
    """Samples of the harness, by task and item: its own YAML files, their data set replaced by the rows."""
    patch = pytest.MonkeyPatch()
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        patch.setenv(name, "1")
    import datasets
    import lm_eval
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    from warploom.evaluation.lm_eval import lm_eval_model

    root = Path(lm_eval.__file__).parent / "tasks"
    files = {
        **{name: root / "arc" / f"{name}.yaml" for name in ("arc_easy", "arc_challenge")},
        "hellaswag": root / "hellaswag" / "hellaswag.yaml",
        **{name: root / "truthfulqa" / f"{name}.yaml" for name in rows if name.startswith("truthfulqa")},
        "gsm8k": root / "gsm8k" / "gsm8k.yaml",
        **{f"mmlu_{subject}": root / "mmlu" / "default" / f"mmlu_{subject}.yaml" for subject in SUBJECTS},
    }
    tasks = []
    for name, splits in rows.items():
        config = load_yaml(files[name])
        data = {split: datasets.Dataset.from_list(found) for split, found in splits.items()}
        config |= {"custom_dataset": lambda data=data, **_: data, "dataset_path": name, "dataset_name": None}
        splits_named = ("training_split", "validation_split", "test_split", "fewshot_split")
        config |= {key: None for key in splits_named if config.get(key) not in splits}
        # The harness draws GSM8K's examples at random; here both take the first.
        config |= {"fewshot_config": {"sampler": "first_n"}} if name == "gsm8k" else {}
        config |= {"num_fewshot": 5} if name.startswith("mmlu") else {}
        if config["output_type"] == "generate_until":
            arguments = config.get("generation_kwargs") or {"until": ["\n\n"], "do_sample": False}
            config["generation_kwargs"] = arguments | {"max_gen_toks": 12}
        else:
            metrics = ({"metric": metric} for metric in ("acc", "acc_norm", "acc_bytes"))
            named = [
                {**metric, "aggregation": "mean", "higher_is_better": True}
                for metric in metrics
                if metric["metric"] == "acc" or "mc2" not in name
            ]
            config["metric_list"] = named
        tasks.append(ConfigurableTask(config=config))
    results = lm_eval.simple_evaluate(
        model=lm_eval_model(load_model(checkpoint)),
        tasks=tasks,
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    patch.undo()
    return {
        name: {(sample["doc_id"], sample["filter"]): sample for sample in samples}
        for name, samples in results["samples"].items()
    }


def pairs(native, harness, task, theirs, ids):
    for (number, name), sample in harness[theirs].items():
        yield native[task][ids(number, sample)], sample, name


@pytest.mark.parametrize(
    ("task", "theirs"),
    [
        ("arc_easy", "arc_easy"),
        ("arc_challenge", "arc_challenge"),
        ("hellaswag", "hellaswag"),
        *(("mmlu", f"mmlu_{subject}") for subject in SUBJECTS),
    ],
)
def test_multiple_choice_agrees(native, harness, task, theirs):
    def item(number, sample):
        if task == "mmlu":
            return f"{theirs.removeprefix('mmlu_')}/{number}"
        return sample["doc"]["id"] if "id" in sample["doc"] else str(number)

    compared = list(pairs(native, harness, task, theirs, item))
    assert len(compared) == NUM_ITEMS
    for record, sample, _ in compared:
        asked = sample["arguments"]
        assert [context for context, _ in asked] == [record["prompt"]] * len(record["choices"])
        assert [continuation for _, continuation in asked] == [f" {choice}" for choice in record["choices"]]
        theirs_log_probs = [float(response[0][0]) for response in sample["resps"]]
        assert record["log_probs"] == pytest.approx(theirs_log_probs, abs=1e-3)
        for name in ("acc", "acc_norm", "acc_bytes"):
            assert record["scores"][name] == sample[name]


def test_truthfulqa_agrees(native, harness):
    for theirs, ours in (("truthfulqa_mc1", "mc1"), ("truthfulqa_mc2", "mc2")):
        compared = list(pairs(native, harness, "truthfulqa", theirs, lambda number, _: str(number)))
        assert len(compared) == NUM_ITEMS
        for record, sample, _ in compared:
            assert sample["arguments"][0][0] == record["prompt"]
            log_probs = [record["log_probs"][place] for place, _ in record[ours]]
            assert log_probs == pytest.approx([float(response[0][0]) for response in sample["resps"]], abs=1e-3)
            assert record["scores"][ours] == pytest.approx(sample["acc"], abs=1e-4)


def test_gsm8k_agrees(native, harness):
    names = {"strict-match": "strict", "flexible-extract": "flexible"}
    compared = list(pairs(native, harness, "gsm8k", "gsm8k", lambda number, _: str(number)))
    assert len(compared) == 2 * NUM_ITEMS
    for record, sample, filter_name in compared:
        assert sample["arguments"][0][0] == record["prompt"]
        assert sample["resps"][0][0] == record["answer"]
        answer = record["found"][names[filter_name]]
        assert sample["filtered_resps"][0] == ("[invalid]" if answer is None else answer)
        assert record["scores"][names[filter_name]] == sample["exact_match"]


def test_truthfulqa_generation_agrees(native, harness):
    compared = list(pairs(native, harness, "truthfulqa_gen", "truthfulqa_gen", lambda number, _: str(number)))
    assert len(compared) == NUM_ITEMS
    for record, sample, _ in compared:
        assert sample["arguments"][0][0] == record["prompt"]
        assert sample["resps"][0][0] == record["answer"]
        assert len(record["scores"]) == 12
        for name, score in record["scores"].items():
            assert score == pytest.approx(sample[name], abs=1e-6), name


def test_rolling_is_the_likelihood_of_the_whole_text(make_model, tokenizer, checkpoint):
    from lm_eval.api.instance import Instance

    from warploom.evaluation.lm_eval import lm_eval_model

    loaded = load_model(checkpoint)
    text = "what is a plant? the green leaf, and the other one."
    ids = tokenizer.encode_beginning(text)
    import torch

    with torch.no_grad():
        log_probs = loaded.model.logits(loaded.model(torch.tensor([ids[:-1]])))[0].log_softmax(-1)
    expected = float(log_probs.gather(1, torch.tensor(ids[1:])[:, None]).sum())
    lm = lm_eval_model(loaded)
    request = Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=0)
    assert lm.loglikelihood_rolling([request]) == [pytest.approx(expected, abs=1e-3)]
    unknown = Instance(request_type="generate_until", doc={}, arguments=("a", {"num_beams": 4}), idx=0)
    with pytest.raises(UserError, match="num_beams is not known here"):
        lm.generate_until([unknown])
