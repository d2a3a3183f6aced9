"""The demo: a softmax model and an ASEntmax model, twins but for their attention, learn to retrieve and are taken far
beyond the length they were trained on.

Both start from the same weights and compute the same function at first: alpha is 1 and the query scale is 1 in both.
Then ASEntmax's alpha moves to 1.5 and its query scale learns. Data, order, steps, learning rate and sizes are the same.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    set_seed,
)

from .checkpoints import write_json
from .ladder import synthetic_ladder
from .methods import METHODS
from .model_card import write_model_card
from .patching import patch_model, set_alpha
from .plots import plot_ladder
from .tasks import IGNORED, MaxRetrieval, render, sample_batch, save_task
from .training import AlphaSchedule

TWINS = ("softmax", "asentmax")
UNKNOWN = "<unk>"


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class DemoArguments:
    """What the demo trains and measures."""

    output_dir: str = field(
        default="runs/demo", metadata=_help("Gets the ASEntmax checkpoint, the card, results and picture.")
    )
    seed: int = field(default=0, metadata=_help("Decides the first weights, the training data and the test samples."))
    steps: int = field(default=1000, metadata=_help("Training steps of each twin."))
    batch_size: int = field(default=128, metadata=_help("Sequences a step."))
    learning_rate: float = field(default=3e-3, metadata=_help("Peak learning rate, of both twins."))
    alpha_fraction: float = field(
        default=0.9, metadata=_help("ASEntmax: share of the steps in which alpha moves from 1 (softmax) to 1.5.")
    )
    train_length: int = field(
        default=32, metadata=_help("Longest source trained on; each batch draws a length from half of it to it.")
    )
    lengths: list[int] = field(
        default_factory=lambda: [32, 64, 128, 256, 512, 1024, 2048],
        metadata=_help("Lengths of the source to evaluate at, the training length first."),
    )
    samples: int = field(default=500, metadata=_help("Test sequences at each length, fewer beyond 512 tokens."))
    stream: str = field(
        default="test",
        metadata={"help": "What to evaluate on; choose settings on validation.", "choices": ["validation", "test"]},
    )
    priorities: int = field(default=512, metadata=_help("Priority levels of an item."))
    values: int = field(default=10, metadata=_help("Values of an item."))
    hidden_size: int = field(default=64, metadata=_help("Width of the models."))
    layers: int = field(default=1, metadata=_help("Layers of the models."))
    heads: int = field(default=8, metadata=_help("Heads of the models: half of them ALiBi, half without positions."))


def build_twin(method: str, args: DemoArguments) -> PreTrainedModel:
    """Return an untrained twin, the same weights for both: Qwen3's layers (q/k norm), NAPE positions.

    Args:
        method: "softmax" or "asentmax".
        args: sizes and seed.
    """
    task = _task(args)
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=task.vocab_size + 1,  # and the unknown token
        hidden_size=args.hidden_size,
        intermediate_size=2 * args.hidden_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        head_dim=args.hidden_size // args.heads,
        max_position_embeddings=args.train_length + 2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=task.vocab_size,
    )
    set_seed(args.seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return patch_model(model, method=method, positions="nape")


def train_twin(method: str, args: DemoArguments) -> tuple[PreTrainedModel, float]:
    """Train a twin on the training stream.

    Args:
        method: "softmax" or "asentmax".
        args: everything else.

    Returns:
        The model, and its mean loss in nats over the last twentieth of the steps.
    """
    task, model = _task(args), build_twin(method, args)
    target = METHODS[method]["entmax_alpha"]
    alpha = AlphaSchedule(target, start=1.0, fraction=args.alpha_fraction)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    warmup = max(1, args.steps // 10)
    lengths = torch.Generator().manual_seed(args.seed)
    losses: list[float] = []
    model.train()
    with tqdm(range(args.steps), desc=f"training {method}", unit=" steps") as bar:
        for step in bar:
            for group in optimizer.param_groups:
                cosine = 0.5 * (1 + math.cos(math.pi * step / args.steps))
                group["lr"] = args.learning_rate * min(1.0, (step + 1) / warmup) * cosine
            set_alpha(model, alpha.alpha_at(step, args.steps))
            length = int(torch.randint(args.train_length // 2, args.train_length + 1, (), generator=lengths))
            batch = sample_batch(task, args.batch_size, length, seed=args.seed, index=step)
            loss = _answer_loss(model, batch)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            if step % 20 == 0:
                bar.set_postfix(loss=f"{losses[-1]:.3f}")
    set_alpha(model, target)
    last = losses[-max(1, args.steps // 20) :]
    return model.eval(), sum(last) / len(last)


def _answer_loss(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Cross entropy of the answers; logits from the batch's first label on only."""
    input_ids, labels = batch["input_ids"], batch["labels"]
    first = int((labels != IGNORED).any(0).nonzero()[0])
    logits = model(input_ids[:, :-1], logits_to_keep=input_ids.shape[1] - first, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), labels[:, first:].flatten(), ignore_index=IGNORED)


def samples_at(length: int, samples: int) -> int:
    """Return how many samples a length gets: all up to 512 tokens, then fewer, as the cost grows with the square."""
    return max(min(samples, 50), samples * 512 // max(length, 512))


def demo_tokenizer(args: DemoArguments) -> PreTrainedTokenizerFast:
    """Return a tokenizer that reads and writes the task's tokens, separated by spaces."""
    names = [*_task(args).vocabulary(), UNKNOWN]
    tokenizer = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=UNKNOWN, pad_token=UNKNOWN)


def run_demo(args: DemoArguments) -> dict[str, Any]:
    """Train and evaluate both twins, and write everything into `args.output_dir`.

    The folder gets the ASEntmax checkpoint with its tokenizer, task.json and README.md (the card); `softmax/`, the
    other twin; results.json, a list of method, seed, length, accuracy (%), its 95 % interval low and high, samples;
    results.md and ladder.png.

    Returns:
        results (the list), losses and seconds by twin, and table (Markdown).

    Raises:
        ValueError: a setting is out of range.
    """
    if args.steps < 1 or args.train_length < 2 or args.hidden_size % args.heads:
        raise ValueError(
            "steps must be at least 1, train_length 2, and hidden_size a multiple of heads, got "
            f"{args.steps}, {args.train_length}, {args.hidden_size} and {args.heads}; correct them"
        )
    folder, task = Path(args.output_dir), _task(args)
    results: list[dict[str, Any]] = []
    losses, seconds = {}, {}
    for method in TWINS:
        begun = time.perf_counter()
        model, losses[method] = train_twin(method, args)
        trained = time.perf_counter()
        for length in args.lengths:
            count = samples_at(length, args.samples)
            rows = synthetic_ladder(model, task, [length], samples=count, seed=args.seed, stream=args.stream)
            results += rows
        seconds[method] = {"training": trained - begun, "evaluation": time.perf_counter() - trained}
        where = folder if method == "asentmax" else folder / method
        model.save_pretrained(where)
        demo_tokenizer(args).save_pretrained(where)
        save_task(task, where)
    table = comparison_table(results)
    write_json(folder / "results.json", results)
    (folder / "results.md").write_text(table + "\n", encoding="utf-8")
    title = f"Max Retrieval, trained on {args.train_length // 2} to {args.train_length} tokens"
    picture = plot_ladder(results, folder / "ladder.png", train_length=args.train_length, title=title)
    write_model_card(
        folder,
        results=results,
        pictures=[picture],
        title="ASEntmax demo: Max Retrieval",
        name=str(args.output_dir),
        prompt="7:v3 490:v1 12:v8 ?",  # the value of the largest priority
        new_tokens=1,
        training=_training_text(args),
    )
    return {"results": results, "losses": losses, "seconds": seconds, "table": table}


def comparison_table(results: list[dict[str, Any]]) -> str:
    """Return the twins side by side, a Markdown table with 95 % intervals."""
    methods = list(dict.fromkeys(row["method"] for row in results))
    cells = {(row["length"], row["method"]): row for row in results}
    lines = [["length", *(f"{method}, %" for method in methods), "samples"]]
    for length in sorted({row["length"] for row in results}):
        rows = [cells[length, method] for method in methods]
        shares = [f"{row['accuracy']:.1f} ({row['low']:.1f} to {row['high']:.1f})" for row in rows]
        lines.append([f"{length:,}", *shares, str(rows[0]["samples"])])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * (width - 1) + ":" for width in widths])
    return "\n".join("| " + " | ".join(map(str.rjust, line, widths)) + " |" for line in lines)


def answer_prompts(folder: str, args: DemoArguments, *, length: int, count: int = 3) -> list[dict[str, Any]]:
    """Load the checkpoint as any user would, and let it answer test prompts by `generate`.

    Args:
        folder: what `run_demo` wrote.
        args: its arguments.
        length: tokens of each source.
        count: number of prompts.

    Returns:
        For each: prompt (text), highest (its item of highest priority), generated and expected.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer, task = AutoTokenizer.from_pretrained(folder), _task(args)
    input_ids = sample_batch(task, count, length, stream=args.stream, seed=args.seed, index=1 << 20)["input_ids"]
    found = []
    for row in input_ids:
        prompt = render(task, row[:-1])
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=1, do_sample=False)
        highest = max(prompt.split()[:-1], key=lambda item: int(item.split(":")[0]))
        generated = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
        found.append({"prompt": prompt, "highest": highest, "generated": generated, "expected": render(task, row[-1:])})
    return found


def _task(args: DemoArguments) -> MaxRetrieval:
    return MaxRetrieval(priorities=args.priorities, values=args.values)


def _training_text(args: DemoArguments) -> str:
    settings = "\n".join(f"| {name} | {value} |" for name, value in asdict(args).items() if name != "output_dir")
    shortest, longest = args.train_length // 2, args.train_length
    return f"""Made by `make demo` (scripts/demo.py) on generated data: *Max Retrieval*, where each token is an item
`priority:value` and the answer after `?` is the value of the item of highest priority:

    7:v3 490:v1 12:v8 ?  ->  v1

Trained from scratch on sources of {shortest} to {longest} items, and tested on the test stream, which training never
sees, from {longest} items on. Its softmax twin, in `softmax/`, is the same class with alpha = 1 and no query scale:
same first weights, data, order, steps, learning rate and schedule. Alpha moved from 1 (softmax) to 1.5 over the first
{args.alpha_fraction:.0%} of the steps.

What it shows, and what not: with q/k norm (Qwen3's) the scores of a head are bounded, so softmax cannot keep its weight
on one item among ever more that come close to it; entmax gives those exactly zero, and the learned scale grows with the
length. A softmax twin without q/k norm learns larger scores and fails later, and so does one at a higher learning rate:
in validation probes the lead at 16 times the training length fell from 34 points at 3e-3 to 19 at 1.2e-2 (table in the
repository's README). One layer on one synthetic task says nothing about language.

| setting | value |
|---|---|
{settings}"""
