"""The Trainer for ASEntmax models, which knows the query scale, and the schedule that moves alpha."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)
from transformers.integrations import is_deepspeed_zero3_enabled

from .adapters import adapter_base, base_beside, is_adapter
from .analysis import attention_support
from .packing import PackedDataset, PackedStream
from .patching import set_alpha
from .synthetic import TaskStream

QUERY_SCALE = ".query_scale."  # within the names of the parameters of the scale and of a learned alpha


def is_asentmax(model: nn.Module) -> bool:
    """Whether the model, or the base model of an adapter, computes ASEntmax attention."""
    return hasattr(getattr(model, "config", None), "entmax_alpha")


@torch.no_grad()
def current_alpha(model: nn.Module) -> dict[str, float]:
    """The alpha of an ASEntmax model as its Trainer logs it, under "entmax_alpha".

    A learned one is the mean of all heads, and is also given for each layer and head, as "alpha/layer0/head3". Where
    the weights are sharded (FSDP2, tensor parallel, ZeRO-3) every process must call it.
    """
    config: Any = model.config
    if not config.entmax_alpha_learned:
        return {"entmax_alpha": float(config.entmax_alpha)}
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "query_scale")]
    with _gathered([layer.query_scale.alpha_logit for layer in layers]):
        heads = {
            f"alpha/layer{layer.layer_idx}/head{head}": alpha
            for layer in layers
            for head, alpha in enumerate(layer.query_scale.alpha(whole=True).tolist())
        }
    return {"entmax_alpha": fmean(heads.values()), **heads}


def _gathered(parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:
    """Within, DeepSpeed's ZeRO-3 holds the parameters whole; they are empty outside of a forward pass."""
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed

    gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(parameters)
    return gathered


class AlphaSchedule(TrainerCallback):
    """Moves alpha linearly from `start` to `target`, a function of the global step alone: it resumes exactly.

    While it moves, alpha is a tensor (one compiled graph for all of its values); before and after it is a float. The
    config says at every step, and so in every checkpoint, what the model computes.

    Args:
        target: the alpha to arrive at.
        start: the alpha to begin with.
        hold: share of the steps at `start`.
        fraction: share of the steps in which alpha moves.

    Raises:
        ValueError: alpha lies outside [1, 2], or the shares are negative or add up to more than 1.
    """

    def __init__(self, target: float = 1.5, *, start: float = 1.0, hold: float = 0.0, fraction: float = 0.5) -> None:
        for name, alpha in (("target", target), ("start", start)):
            if not 1.0 <= alpha <= 2.0:
                raise ValueError(f"{name} must be in [1, 2], got {alpha!r}; 1 is softmax, 1.5 usual, 2 sparsemax")
        if hold < 0 or fraction < 0 or hold + fraction > 1:
            raise ValueError(
                f"hold and fraction must be shares of the steps, together at most 1, got {hold!r} and {fraction!r}; "
                "leave some steps for the target"
            )
        self.target, self.start, self.hold, self.fraction = float(target), float(start), hold, fraction

    def alpha_at(self, step: int, max_steps: int) -> float:
        """Alpha during the step after `step` completed ones, of `max_steps`."""
        begin, end = self._bounds(max_steps)
        if step >= end:
            return self.target
        return self.start + (self.target - self.start) * (max(step - begin, 0) / max(end - begin, 1))

    def _bounds(self, max_steps: int) -> tuple[int, int]:
        return round(self.hold * max_steps), round((self.hold + self.fraction) * max_steps)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        begin, end = self._bounds(state.max_steps)
        moves = self.start != self.target and begin <= state.global_step < end
        set_alpha(kwargs["model"], self.alpha_at(state.global_step, state.max_steps), as_tensor=moves)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.settle(kwargs["model"], state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.load_best_model_at_end and state.best_global_step:
            # The weights are the best checkpoint's, and so is alpha: that of its last step.
            set_alpha(kwargs["model"], self.alpha_at(state.best_global_step - 1, state.max_steps))
        else:
            self.settle(kwargs["model"], state)

    def settle(self, model: nn.Module, state: TrainerState) -> None:
        """Give the model the alpha of the current step as a float: the target, unless training stops early."""
        set_alpha(model, self.alpha_at(state.global_step, state.max_steps))


class ASEntmaxTrainer(Trainer):
    """A Trainer with a learning rate for the query scale, that logs speed, alpha and support, and saves adapters' base.

    tokens_per_second in the log is that since the line before, of all processes, whatever took the time.

    Args:
        query_scale_learning_rate: of the parameters of the query scale, which get no weight decay; None: as the others.
        support_tokens: log support size and zero share on so many tokens of the last batch's first row; 0: don't.

    The other arguments are the Trainer's. Packed data needs no collator; a TaskStream's batches are used as they are.

    Raises:
        ValueError: labels are smoothed, which the Trainer does not do as asked for these models and losses.
        RuntimeError: the model is an adapter over an ASEntmax model whose converted base is not saved.
    """

    model: Any

    def __init__(
        self, *args: Any, query_scale_learning_rate: float | None = None, support_tokens: int = 256, **kwargs: Any
    ) -> None:
        evaluation = kwargs.get("eval_dataset")
        given = [kwargs.get("train_dataset"), *(evaluation.values() if isinstance(evaluation, dict) else [evaluation])]
        if any(isinstance(data, (PackedDataset, PackedStream)) for data in given):
            # The default for a tokenizer pads, and an attention_mask would join the packed documents.
            kwargs.setdefault("data_collator", default_data_collator)
        super().__init__(*args, **kwargs)
        if self.label_smoother is not None and (is_asentmax(self.model) or self.compute_loss_func is not None):
            # The Trainer shifts smoothed labels for Transformers' own classes only, and leaves a given loss as it is.
            raise ValueError(
                "label_smoothing_factor must be 0 with ASEntmax or a loss of its own, got "
                f"{self.args.label_smoothing_factor!r}; leave it out"
            )
        if is_adapter(self.model) and is_asentmax(self.model):
            adapter_base(self.model)
        self.query_scale_learning_rate = query_scale_learning_rate
        self.support_tokens = support_tokens
        self._sample: dict[str, Tensor] = {}
        self._tokens, self._since = 0, 0.0  # read since the last line of the log, and its time

    def get_train_dataloader(self) -> DataLoader:
        """The Trainer's; or a :class:`TaskStream` as it is, from the batch at which a resumed run left off."""
        if not isinstance(self.train_dataset, TaskStream):
            return super().get_train_dataloader()
        self.args.ignore_data_skip = True  # drawing batches to throw them away takes as long as training on them
        accumulated = self.args.gradient_accumulation_steps
        self.train_dataset.begin = lambda: self.state.global_step * accumulated
        return DataLoader(self.train_dataset, batch_size=None)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The Trainer's, which leaves out biases; and without what other query scales and a learned alpha have in their
        place."""
        names: list[str] = super().get_decay_parameter_names(model)
        return [name for name in names if QUERY_SCALE not in name or name.endswith(".weight")]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer, with a parameter group of their own for the query scale's parameters."""
        if self.optimizer is None and self.query_scale_learning_rate is not None:
            optimizer = super().create_optimizer(model)
            names = (self.model if model is None else model).named_parameters()
            scale = {id(p): p for name, p in names if QUERY_SCALE in name and p.requires_grad}
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in scale]
            if scale:
                own = {"params": list(scale.values()), "lr": self.query_scale_learning_rate, "weight_decay": 0.0}
                optimizer.add_param_group(own)
        return super().create_optimizer(model)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        self._since = self._since or time.perf_counter()
        self._tokens += inputs["input_ids"].numel()
        if self.support_tokens and is_asentmax(self.model):
            names = ("input_ids", "position_ids", "attention_mask")
            cut = slice(self.support_tokens)
            self._sample = {name: inputs[name][:1, cut] for name in names if inputs.get(name) is not None}
        return super().training_step(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._tokens:
            now = time.perf_counter()
            logs["tokens_per_second"] = self._tokens * self.args.world_size / (now - self._since)
            self._tokens, self._since = 0, now
        if "loss" in logs and is_asentmax(self.model):
            logs.update(current_alpha(self.model))
        if "loss" in logs and self._sample:
            logs.update(attention_support(self.model, **self._prepare_inputs(self._sample)).means())
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        folder = output_dir or str(self.args.output_dir)
        beside = is_adapter(self.model) and is_asentmax(self.model) and self.args.should_save
        with base_beside(self.model, folder) if beside else nullcontext():
            super().save_model(output_dir, _internal_call)
