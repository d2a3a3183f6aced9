"""lm-eval on a saved checkpoint: log-likelihoods through the Auto classes are the model's, in batches as one by one."""

from __future__ import annotations

import inspect
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_python
from test_patching import entmax_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from training_setup import tiny_texts, tiny_tokenizer, write_texts
from transformers import PreTrainedTokenizerFast

from hf_asentmax.cloze import write_cloze

QUESTIONS = tiny_texts(6)
ANSWERS = ["a", "bcd", "efghijklm"]
CLOSE = {"rtol": 1e-5, "atol": 1e-4}  # sums of up to nine float32 log-likelihoods


def task(folder: Path) -> dict[str, Any]:
    """Which of three answers follows: questions and answers of different lengths, so that batches are padded."""
    return {
        "task": "tiny_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(write_texts(folder / "questions.jsonl", QUESTIONS))}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": ANSWERS,
        "doc_to_target": 0,
        "target_delimiter": "",
        "metric_list": [{"metric": "acc_norm"}],
    }


def save(folder: Path, family: str = "llama") -> Any:
    model = entmax_model(family)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


@torch.no_grad()
def log_likelihoods(model: Any) -> torch.Tensor:
    """(questions, answers), each computed alone, in float64 from the logits on."""
    tokenizer, rows = tiny_tokenizer(), []
    for question in QUESTIONS:
        start = len(tokenizer(question)["input_ids"])
        row = []
        for answer in ANSWERS:
            tokens = torch.tensor(tokenizer(question + answer)["input_ids"])[None]
            scores = model(tokens).logits.double().log_softmax(-1)[0, :-1].gather(-1, tokens[0, 1:, None])
            row.append(scores[start - 1 :].sum())
        rows.append(torch.stack(row))
    return torch.stack(rows)


def evaluate(model_args: str, task: dict[str, Any], batch_size: int) -> tuple[list[list[float]], float]:
    """lm-eval's own log-likelihoods of every answer to every question, and its accuracy by letter."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    result: Any = simple_evaluate(
        model="hf",
        model_args=model_args,
        tasks=[task],
        batch_size=batch_size,
        device="cpu",
        bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),  # it reads for ten seconds what tasks there are
    )
    samples = sorted(result["samples"]["tiny_choice"], key=lambda sample: sample["doc_id"])
    found = [[float(answer[0]) for answer in sample["filtered_resps"]] for sample in samples]
    return found, result["results"]["tiny_choice"]["acc_norm,none"]


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_lm_eval_log_likelihoods_are_those_of_the_model(family: str, tmp_path: Path) -> None:
    expected = log_likelihoods(save(tmp_path / "model", family))
    by_letter = expected / torch.tensor([len(answer) for answer in ANSWERS])
    accuracy = (by_letter.argmax(-1) == 0).double().mean().item()
    assert 0 < accuracy < 1
    for batch_size in (1, 4):
        found, acc = evaluate(f"pretrained={tmp_path / 'model'},dtype=float32", task(tmp_path), batch_size)
        torch.testing.assert_close(torch.tensor(found).double(), expected, **CLOSE)
        assert acc == pytest.approx(accuracy)


def test_lm_eval_needs_no_import_of_the_package(tmp_path: Path) -> None:
    """As under the command `lm_eval --model hf`, which knows the model by the code in its folder."""
    expected = log_likelihoods(save(tmp_path / "model"))
    arguments = f"pretrained={tmp_path / 'model'},dtype=float32,trust_remote_code=True"
    code = "import json, sys\nfrom typing import Any\n" + inspect.getsource(evaluate)
    code += "found, _ = evaluate(sys.argv[1], json.loads(sys.argv[2]), 4)\n"
    code += "assert 'hf_asentmax' not in sys.modules\nprint(json.dumps(found))"
    done = run_python("-c", code, arguments, json.dumps(task(tmp_path)))
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    torch.testing.assert_close(torch.tensor(found).double(), expected, **CLOSE)


def test_lm_eval_runs_a_written_cloze_set(tmp_path: Path) -> None:
    """Accuracy and perplexity of the last words are those of the model, by the folder's name as the command says."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    model, tokenizer = save(tmp_path / "model"), tiny_tokenizer()
    source = random.Random(0)
    texts = []
    for _ in range(3):
        words = ["".join(source.choices("abcdefgh", k=source.randint(4, 6))) for _ in range(60)]
        texts.append(f"{' '.join(words)}. One more is the {words[7]}.")
    assert write_cloze(texts, tmp_path / "words") == 3
    result: Any = simple_evaluate(
        model="hf",
        model_args=f"pretrained={tmp_path / 'model'},dtype=float32",
        tasks=["words"],
        batch_size=2,
        device="cpu",
        bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False, include_path=str(tmp_path / "words")),
    )
    losses, right = [], []
    for line in (tmp_path / "words" / "words.jsonl").read_text(encoding="utf-8").splitlines():
        item = json.loads(line)
        start = len(tokenizer(item["context"])["input_ids"])
        ids = torch.tensor(tokenizer(f"{item['context']} {item['word']}")["input_ids"])
        with torch.no_grad():
            scores = model(ids[None]).logits[0, start - 1 : -1].double().log_softmax(-1)
        losses.append(-scores.gather(-1, ids[start:, None]).sum())
        right.append(bool((scores.argmax(-1) == ids[start:]).all()))
    found = result["results"]["words"]
    assert found["perplexity,none"] == pytest.approx(torch.stack(losses).mean().exp().item(), rel=1e-4)
    assert found["acc,none"] == pytest.approx(sum(right) / 3)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A token a word: RULER builds its texts to a number of tokens, and of letters a sentence would have too many."""
    tokenizer = Tokenizer(WordLevel({"<unk>": 0, "<pad>": 1, "magic": 2, "number": 3, "grass": 4}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="<pad>")


@pytest.mark.slow  # lm-eval draws 500 texts of each task, whatever the limit
@pytest.mark.parametrize("name", ["niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe"])
def test_lm_eval_answers_ruler_in_batches_as_one_by_one(name: str, tmp_path: Path) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    save(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    manager = TaskManager(include_defaults=False, metadata={"pretrained": str(tmp_path)})
    path = Path(lm_eval.__file__).parent / "tasks" / "ruler" / f"{name}.yaml"
    tasks = list(manager.load([str(path)])["tasks"].values())  # drawn once: not all tasks draw the same texts again
    answers = []
    for batch_size in (1, 3):
        result: Any = lm_eval.simple_evaluate(
            model="hf",
            model_args=f"pretrained={tmp_path},dtype=float32,max_length=4096",
            tasks=tasks,
            batch_size=batch_size,
            device="cpu",
            bootstrap_iters=0,
            limit=3,
            gen_kwargs={"max_gen_toks": 4},
            task_manager=manager,
        )
        (samples,) = result["samples"].values()
        assert all(sample["4096"] is not None for sample in samples)
        answers.append({sample["doc"]["input"]: sample["filtered_resps"] for sample in samples})
    assert answers[0] == answers[1]
    assert len(answers[0]) == 3
