"""One training run from its settings to the saved model: what the training scripts share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME

from .checkpoints import claim_output_dir, write_json
from .losses import LOSSES, output_loss
from .methods import METHODS, method_name, method_settings
from .options import option
from .packing import PackedDataset, PackedStream
from .patching import patch_model, set_alpha
from .positions import POSITIONS
from .scaling import QUERY_SCALINGS
from .synthetic import TaskStream
from .training import AlphaSchedule, ASEntmaxTrainer, current_alpha, is_asentmax
from .validation import has_tokenizer

# Settings that change nothing about the weights, and the Trainer's arguments that do.
WITHOUT_INFLUENCE = ("eval_data", "eval_split", "max_eval_rows", "support_tokens", "resume")
INFLUENTIAL = (
    "seed", "data_seed", "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps",
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "adam_beta1", "adam_beta2",
    "adam_epsilon", "weight_decay", "max_grad_norm", "bf16", "fp16", "dataloader_drop_last", "neftune_noise_alpha",
)  # fmt: skip


@dataclass
class RunArguments:
    """What the attention becomes and how it is trained, beside what TrainingArguments say."""

    attention: str | None = option(
        None,
        "The method: 'asentmax' (the default; of an ASEntmax checkpoint its own), or one to compare with, such as "
        "'softmax' (alpha 1 and no query scale throughout).",
        tuple(METHODS),
    )
    query_scaling: str | None = option(
        None,
        "Factor of the scores: adaptive (ASEntmax), static, log (SSMax) or none; by default the method's own.",
        QUERY_SCALINGS,
    )
    positions: str | None = option(
        None,
        "rope (the family's own; what pretrain.py and finetune.py take by default), nope, alibi, or nape (half ALiBi, "
        "half NoPE: the paper's best). A pretrained model keeps what it knows with rope only.",
        POSITIONS,
    )
    alpha: float | None = option(
        None, "The alpha to arrive at: 1 is softmax, 2 sparsemax. By default the method's, or an ASEntmax model's own."
    )
    alpha_start: float | None = option(
        None, "The alpha to begin with. By default 1 for a softmax model that is converted, else no schedule."
    )
    alpha_hold: float = option(0.0, "Share of the steps to stay at --alpha_start.")
    alpha_fraction: float = option(
        0.5, "Share of the steps in which alpha then moves, linearly; the rest is at --alpha."
    )
    query_scale_learning_rate: float | None = option(
        None, "Learning rate of the query scale's parameters; by default that of the others. They start at zero."
    )
    attn_implementation: str | None = option(
        None,
        "With --attention softmax: train Transformers' own softmax model, not ours at alpha 1, with this attention: "
        "sdpa, flex_attention, or another that Transformers knows. Its positions are the family's.",
    )
    loss: str = option(
        "cross_entropy",
        "Loss of the output layer, in training and eval_loss: cross_entropy, or a sparse one of the `entmax` package.",
        LOSSES,
    )
    support_tokens: int = option(
        256, "Log support size and zero share on so many tokens of one row at each logging step; 0: don't."
    )
    resume: str = option(
        "auto", "'auto' goes on from the last complete checkpoint in --output_dir; 'never'; or a checkpoint's folder."
    )

    def __post_init__(self) -> None:
        if self.attention == "softmax":
            self.alpha, self.alpha_start, self.query_scaling = 1.0, 1.0, "none"
        elif self.target_alpha == 1.0:
            self.alpha_start = 1.0
        if self.attn_implementation is not None and (self.attention, self.positions or "rope") != ("softmax", "rope"):
            raise ValueError(
                "attn_implementation must go with attention 'softmax' and positions 'rope', "
                f"got {self.attention!r} and {self.positions!r}; leave --attn_implementation out"
            )
        if self.settings["entmax_alpha_learned"] and (self.alpha, self.alpha_start) != (None, None):
            raise ValueError(
                f"alpha must be left out where it is learned, as by {self.method!r}, got --alpha {self.alpha!r} and "
                f"--alpha_start {self.alpha_start!r}; remove them, or choose another method with --attention"
            )

    @property
    def method(self) -> str:
        """The method that a softmax model gets."""
        return self.attention or "asentmax"

    @property
    def settings(self) -> dict[str, Any]:
        """The method's configuration values."""
        return method_settings(self.method)

    @property
    def target_alpha(self) -> float:
        return float(self.settings["entmax_alpha"]) if self.alpha is None else self.alpha

    def schedule(self, start: float, target: float) -> AlphaSchedule:
        """Alpha's schedule from `start` to `target`, where the arguments don't say otherwise."""
        start, target = (
            given if own is None else own for given, own in ((start, self.alpha_start), (target, self.alpha))
        )
        return AlphaSchedule(target, start=start, hold=self.alpha_hold, fraction=self.alpha_fraction)


def begin_run(args: TrainingArguments, *groups: Any) -> tuple[dict[str, Any], str | None]:
    """Claim `args.output_dir` for a run, and set the seed for building its model, which comes next.

    Args:
        args: the Trainer's arguments, of which those that touch the weights are noted.
        groups: dataclass instances with the run's other settings, a RunArguments among them.

    Returns:
        The settings, and the checkpoint to go on from (None: none); both for `run_training`.

    Raises:
        ValueError: as `claim_output_dir`, where another run lives in the folder; or several processes were started that
            the Trainer does not join.
    """
    started = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if started > args.world_size:  # each would train by itself on the same rows, and write to the same folder
        raise ValueError(
            f"use_cpu must be True where processes are started without a GPU, got {args.use_cpu} in {started} of them; "
            "add --use_cpu true"
        )
    settings: dict[str, Any] = {}
    for group in groups:
        settings |= asdict(group)
    resume = settings["resume"]
    settings = {name: value for name, value in settings.items() if name not in WITHOUT_INFLUENCE}
    # The workers of a stream share out its files.
    trainer = (*INFLUENTIAL, *(["dataloader_num_workers"] if settings.get("streaming") else []))
    settings |= {name: str(getattr(args, name)) for name in trainer} | {"world_size": args.world_size}
    main = args.process_index == 0
    with args.main_process_first(local=False, desc="claiming the output folder"):
        checkpoint = claim_output_dir(
            str(args.output_dir), settings, resume=resume, world_size=args.world_size, main_process=main
        )
    set_seed(args.seed)
    return settings, checkpoint


def load_for_finetuning(
    path: str, run: RunArguments, *, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, AlphaSchedule | None]:
    """A causal language model as ASEntmax, converted where it is softmax, and the schedule of its alpha.

    Args:
        path: a folder or Hub id.
        run: query scaling, positions and alpha.
        dtype: dtype of the weights.

    Raises:
        ValueError: the checkpoint is ASEntmax with other settings already, or its family is not supported.
    """
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=run.attn_implementation)
    if is_asentmax(model):
        return _as_asked(model, run, path)
    if run.attn_implementation is not None:
        return model, None
    schedule = None if run.settings["entmax_alpha_learned"] else run.schedule(start=1.0, target=run.target_alpha)
    patch_model(
        model,
        method=run.method,
        alpha=None if schedule is None else schedule.start,
        query_scaling=run.query_scaling,
        positions=run.positions or "rope",
    )
    return model, schedule


def build_from_config(
    path: str, run: RunArguments, tokenizer: PreTrainedTokenizerBase, *, length: int
) -> tuple[PreTrainedModel, AlphaSchedule | None]:
    """A causal language model from scratch, float32, and the schedule of its alpha.

    Args:
        path: a config.json, a folder with one, or a Hub id; softmax or ASEntmax.
        run: query scaling, positions and alpha, for a softmax config.
        tokenizer: the tokenizer; all of its tokens must have an embedding.
        length: the training length, at which the query scale "log" starts with r = 1.

    Raises:
        ValueError: the tokenizer has more tokens than the config, or the family is not supported.
    """
    config = AutoConfig.from_pretrained(path)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"vocab_size in {path} must be at least the tokenizer's {len(tokenizer)} tokens, got {config.vocab_size}; "
            "raise it in the config"
        )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=run.attn_implementation)
    if is_asentmax(model):
        return _as_asked(model, run, path)
    if run.attn_implementation is not None:
        return model, None
    learned, alpha = run.settings["entmax_alpha_learned"], run.target_alpha
    schedule = None if learned else run.schedule(start=alpha, target=alpha)
    patch_model(
        model,
        method=run.method,
        alpha=None if schedule is None else schedule.start,
        query_scaling=run.query_scaling,
        positions=run.positions or "rope",
        query_scale_delta=1.0,
        query_scale_length=length,
    )
    return model, schedule


def _as_asked(model: Any, run: RunArguments, path: str) -> tuple[PreTrainedModel, AlphaSchedule | None]:
    """Check that an ASEntmax model is what the arguments ask for, and set the alpha it starts with."""
    config = model.config
    for name, wanted in (("query_scaling", run.query_scaling), ("positions", run.positions)):
        if wanted is not None and wanted != getattr(config, name):
            raise ValueError(
                f"{name} must be {getattr(config, name)!r} as {path} has it, got {wanted!r}; "
                "leave it out, or begin with a softmax model"
            )
    if run.attention is not None and not _has_method(config, run):
        raise ValueError(
            f"attention must be {method_name(config)!r} as {path} has it, got {run.attention!r}; "
            "leave --attention out, or begin with a softmax model"
        )
    if config.entmax_alpha_learned:
        if run.alpha is not None or run.alpha_start is not None:
            raise ValueError(f"alpha must be left out where {path} learns it, got {run.alpha!r}; remove --alpha")
        return model, None
    schedule = run.schedule(start=config.entmax_alpha, target=config.entmax_alpha)
    set_alpha(model, schedule.start)
    return model, schedule


def _has_method(config: Any, run: RunArguments) -> bool:
    """Whether a model's attention is of the method that is asked for, but for an alpha that may move."""
    wanted: dict[str, Any] = run.settings
    alpha = wanted.pop("entmax_alpha")
    if run.query_scaling is not None:
        del wanted["query_scaling"]  # asked for by itself, and compared before
    moves = run.alpha is not None or config.entmax_alpha_learned or run.method.startswith("asentmax")
    return (moves or config.entmax_alpha == alpha) and all(getattr(config, k) == v for k, v in wanted.items())


def run_training(
    model: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    train: PackedDataset | PackedStream | TaskStream,
    evaluation: PackedDataset | None,
    args: TrainingArguments,
    run: RunArguments,
    *,
    schedule: AlphaSchedule | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    checkpoint: str | None = None,
    settings: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train, evaluate and save a model; on the CPU a resumed run ends with an uninterrupted one's weights, bit by bit.

    Args:
        model: a causal language model, possibly a PEFT one made by `add_lora`.
        tokenizer: saved with the model, where there is one.
        train: packed rows, or a generated task.
        evaluation: held-out packed rows, evaluated at the end.
        args: the Trainer's arguments; the model is saved to `args.output_dir`.
        run: the loss, learning rate of the query scale, and how much of the support to log.
        schedule: moves alpha; None leaves it.
        callbacks: what else the Trainer calls.
        checkpoint: where to go on from, as `begin_run` gives it.
        settings: written into results.json.

    Returns:
        What is written to results.json: settings, steps, losses, perplexity (of cross entropy), support, and the log.
        eval_loss is the Trainer's, the mean over rows of their batch's mean over tokens, so that where rows have
        different numbers of labels it depends on the batch size; train_loss and train_runtime are of the last start.
    """
    batch = args.eval_batch_size * args.world_size
    if evaluation is not None and args.dataloader_drop_last and len(evaluation) < batch:
        raise ValueError(
            f"the evaluation data must fill a batch of {batch} rows where incomplete ones are left out "
            f"(dataloader_drop_last), got {len(evaluation)}; lower per_device_eval_batch_size, or give more"
        )
    trainer = ASEntmaxTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        callbacks=[*callbacks, *([] if schedule is None else [schedule])],
        compute_loss_func=output_loss(run.loss),
        query_scale_learning_rate=run.query_scale_learning_rate,
        support_tokens=run.support_tokens,
    )
    state = None if checkpoint is None else TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
    if checkpoint is not None and state is not None and state.global_step >= state.max_steps:
        # Killed after its last step: the Trainer would train one step more.
        trainer._load_from_checkpoint(checkpoint)
        trainer.state = state
        if schedule is not None:
            schedule.settle(model, state)
    else:
        trainer.train(resume_from_checkpoint=checkpoint)
    metrics = trainer.evaluate() if evaluation is not None else {}
    trainer.save_model()
    results = {"settings": settings or {}, "steps": trainer.state.global_step}
    for entry in trainer.state.log_history:
        kept = ("loss", "train_loss", "train_runtime", "support_size", "zero_share")
        results |= {name: entry[name] for name in kept if name in entry}
    if metrics:
        results["eval_loss"] = metrics["eval_loss"]
        if run.loss == "cross_entropy":
            results["perplexity"] = math.exp(min(metrics["eval_loss"], 700.0))
    if is_asentmax(model):
        results["entmax_alpha"] = current_alpha(model)["entmax_alpha"]
    results["log"] = trainer.state.log_history
    if trainer.is_world_process_zero():
        write_json(Path(str(args.output_dir)) / "results.json", results)
    return results


def summary(results: dict[str, Any], output_dir: str) -> str:
    """The numbers of a run as a table, and where the rest is."""
    numbers = {name: value for name, value in results.items() if isinstance(value, (int, float))}
    lines = [f"{name:<14} {value:>12.5g}" for name, value in numbers.items()]
    saved = "model, tokenizer" if has_tokenizer(output_dir) else "model"
    return "\n".join([*lines, f"{saved} and results.json: {output_dir}"])
