"""Train a language model to predict the next item, on batches of user windows, with transformers.Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainingArguments,
)
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import TrainOutput
from transformers.utils import SAFE_WEIGHTS_NAME

from lwa_helpers.config import TuningConfig
from lwa_helpers.data.windows import LengthBatches, Window, collate
from lwa_helpers.files import remove
from lwa_helpers.models.layers import backbone
from lwa_helpers.models.precision import computes_in_bf16
from lwa_helpers.paths import TRAINER_OUTPUT
from lwa_helpers.ranking.item_head import sampled_nll
from lwa_helpers.ranking.outputs import LabelOutputs, in_parts, label_outputs

T = TypeVar("T")

VALID = "ndcg"  # name of the validation metric in the trainer's logs
UNEVEN = {"even_batches": False}  # batches of a token budget differ in rows, so none is padded for another process


class IndexedWindows(torch.utils.data.Dataset):
    """Windows with their position in the list, which is the key to their cached teacher outputs."""

    def __init__(self, windows: Sequence[Window]):
        self.windows = list(windows)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> tuple[int, Window]:
        return index, self.windows[index]


def window_loader(
    windows: Sequence[Window], tokens_per_batch: int, pad_id: int, seed: int, shuffle: bool = True
) -> DataLoader:
    """Return a loader of batches of windows, with each row's index in `windows` as batch["window"], (B,).

    Args:
        windows: the windows.
        tokens_per_batch: maximum number of tokens in a batch, padding included.
        pad_id: token used for padding.
        seed: of the order of the batches.
        shuffle: whether to shuffle the windows and batch those of similar length together; if not, the rows come in
            the order given.
    """

    def batch(rows: list[tuple[int, Window]]) -> dict[str, torch.Tensor]:
        return collate([window for _, window in rows], pad_id) | {"window": torch.tensor([index for index, _ in rows])}

    if not shuffle:
        longest = max(len(window.input_ids) for window in windows)
        return DataLoader(IndexedWindows(windows), batch_size=max(1, tokens_per_batch // longest), collate_fn=batch)
    sampler = LengthBatches(windows, tokens_per_batch, seed=seed)
    # Accelerate reads drop_last where several processes share the batches: all then take the same number of steps.
    sampler.drop_last = True  # type: ignore[attr-defined]  # LengthBatches itself does not use it
    return DataLoader(IndexedWindows(windows), batch_sampler=sampler, collate_fn=batch)


def training_arguments(
    config: TuningConfig,
    steps_per_epoch: int,
    seed: int,
    logging_steps: int = 5,
    checkpoints: Path | None = None,
    evaluate_every: float | None = None,
) -> TrainingArguments:
    """Translate a section of the settings for transformers.Trainer.

    The learning rate rises linearly during the warm-up and then falls as a cosine.

    Args:
        config: the section.
        steps_per_epoch: number of batches in an epoch.
        seed: of the training run.
        logging_steps: number of steps between two entries of the log, at most a quarter of the run.
        checkpoints: a folder for the checkpoints of this run alone (see train_or_resume). It is needed if
            config.save_steps or `evaluate_every` is set.
        evaluate_every: number of epochs between two evaluations on the validation part, or None for no evaluation. The
            best checkpoint is the one that is kept.

    Returns:
        The arguments for the trainer.
    """
    steps = max(1, round(config.epochs * steps_per_epoch))
    saving: dict[str, Any] = {"save_strategy": "no", "output_dir": str(TRAINER_OUTPUT)}
    if checkpoints:
        every = config.save_steps
        saving = {"save_strategy": "steps", "output_dir": str(checkpoints), "save_total_limit": 1}
        if evaluate_every:
            every = max(1, round(evaluate_every * steps_per_epoch))
            saving |= {"eval_strategy": "steps", "eval_steps": every, "metric_for_best_model": VALID}
            saving |= {"load_best_model_at_end": True, "greater_is_better": True}
            saving["restore_callback_states_from_checkpoint"] = True  # keeps the count of patience
        saving["save_steps"] = every
    bf16 = computes_in_bf16(config.bf16, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return TrainingArguments(
        **saving,
        max_steps=steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(config.warmup_ratio * steps),
        weight_decay=config.weight_decay,
        bf16=bf16,
        seed=seed,
        max_grad_norm=1.0,
        logging_steps=min(logging_steps, max(1, steps // 4)),
        report_to="none",
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        gradient_checkpointing=config.gradient_checkpointing or None,
        accelerator_config=UNEVEN,
    )


class RankingTrainer(Trainer):
    """transformers.Trainer with a ready-made DataLoader and the mean -log p of the labels as its loss.

    The rows of the embedding and the head have their own learning rate. The loss is computed from the positions that
    predict labels; the model's own loss, which needs the logits of every position, is not used.

    Args:
        model: the model to train.
        args: settings of the training run.
        loader: the batches.
        head_learning_rate: learning rate of the rows of the embedding and the head; None takes that of `args`.
        dropout: share of the entries of the input embeddings and the final states that are dropped in training.
        sampled: log q and n of sampled_nll, for a catalogue too large for the full softmax; None for the full softmax.
        valid: maps the model to the validation metric, evaluated every `args.eval_steps` steps; higher is better.
        patience: number of evaluations without an improvement after which training stops.
        logs: folder for TensorBoard; None writes no such logs.
        callbacks: further callbacks.
    """

    model: PreTrainedModel

    control: TrainerControl

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        loader: DataLoader | None = None,
        head_learning_rate: float | None = None,
        dropout: float = 0.0,
        sampled: tuple[Tensor, int] | None = None,
        valid: Callable[[PreTrainedModel], float] | None = None,
        patience: int = 2,
        logs: str | Path | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ):
        self.loader, self.dropout, self.sampled, self.valid = loader, dropout, sampled, valid
        groups = parameter_groups(model, args.learning_rate, head_learning_rate or args.learning_rate)
        optimizer = (
            torch.optim.AdamW,
            {"params": groups, "lr": args.learning_rate, "weight_decay": args.weight_decay, "fused": True},
        )
        more: list[TrainerCallback] = [TensorBoardCallback(SummaryWriter(str(logs)))] if logs else []
        more += [EarlyStoppingCallback(patience)] if args.load_best_model_at_end else []
        dataset = loader.dataset if loader else None
        super().__init__(
            model=model,
            args=args,
            train_dataset=dataset,
            eval_dataset=dataset,
            optimizer_cls_and_kwargs=optimizer,
            callbacks=[*callbacks, *more],
        )
        self.model_accepts_loss_kwargs = False

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train, with dropout at both ends of the model and eager attention on a CPU."""
        with dropout_at_the_ends(self.model, self.dropout), eager_attention_on_cpu(self.model):
            return super().train(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write all entries of the state dict, those of parametrised weights too, and tied weights as copies."""
        target = output_dir or self.args.output_dir
        assert target is not None  # TrainingArguments sets a default
        folder = Path(target)
        folder.mkdir(parents=True, exist_ok=True)
        state = self.model.state_dict() if state_dict is None else state_dict
        save_file({name: value.clone().contiguous() for name, value in state.items()}, folder / SAFE_WEIGHTS_NAME)

    def get_train_dataloader(self) -> DataLoader:
        """Return the ready-made loader, prepared by accelerate."""
        return self.accelerator.prepare(self.loader)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Compute the validation metric, log it and notify the callbacks."""
        assert self.valid is not None  # needed wherever evaluations are scheduled
        training = self.model.training
        with self.accelerator.autocast():
            found = {f"eval_{VALID}": float(self.valid(self.accelerator.unwrap_model(self.model)))}
        self.model.train(training)
        self.log(dict(found))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of a batch inside the forward pass of the model, which may be wrapped for sharding."""
        # Accelerate wraps only the model's forward method in autocast, and the loss bypasses that method.
        with self.accelerator.autocast():
            total = through(model, self.accelerator.unwrap_model(model), self.total, inputs)
        return (total, {}) if return_outputs else total

    def total(self, model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
        """Return the loss of a batch, a scalar."""
        own = label_outputs(model, inputs)
        if not len(own.states):
            return zero_loss(own)
        if self.sampled and model.training:
            log_q, n = self.sampled
            return sampled_nll(model.get_output_embeddings(), own.states, own.targets, log_q.to(own.states.device), n)

        def losses(rows: slice) -> Tensor:
            return F.cross_entropy(own.head(own.states[rows]).float(), own.targets[rows])[None]

        return in_parts(losses, own)[0]


def through(wrapped: nn.Module, model: nn.Module, function: Callable[..., T], *args: Any) -> T:
    """Return function(model, *args), computed inside the forward pass of `wrapped`.

    DistributedDataParallel and FSDP gather weights and gradients only for what happens inside their forward pass. FSDP
    either wraps a model or hooks into it.

    Args:
        wrapped: `model` itself, or a wrapper around it.
        model: the model that `function` is called with.
        function: what to compute.
        args: further arguments of `function`.
    """
    own = model.__dict__.get("forward")

    def restore() -> None:
        model.__dict__.pop("forward", None)
        if own is not None:
            model.forward = own

    def redirected(*inputs):
        restore()
        return function(model, *inputs)

    model.forward = redirected
    try:
        return wrapped(*args)
    finally:
        restore()


def zero_loss(own: LabelOutputs) -> Tensor:
    """Return the loss of a batch without labels: 0, with a zero gradient for everything the outputs depend on."""
    return sum((state.sum() for state in own.hidden), start=own.logits.sum())


@contextmanager
def dropout_at_the_ends(model: PreTrainedModel, p: float) -> Iterator[None]:
    """Within this context, apply dropout with probability p to the input embeddings and the final states in training.

    Decoder language models come without dropout, and item histories are few: on MovieLens-100K, a model trained without
    dropout is at its best after a fraction of an epoch.
    """

    def drop_output(_module: nn.Module, _args: tuple, out):
        if isinstance(out, Tensor):
            return F.dropout(out, p, model.training)
        if isinstance(out, tuple):
            return F.dropout(out[0], p, model.training), *out[1:]
        out.last_hidden_state = F.dropout(out.last_hidden_state, p, model.training)
        return out

    ends = (model.get_input_embeddings(), backbone(model)) if p else ()
    handles = [module.register_forward_hook(drop_output) for module in ends]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def eager_attention_on_cpu(model: PreTrainedModel) -> Iterator[None]:
    """Within this context, a model on a CPU computes attention by plain matrix products.

    On a CPU, the backward pass of torch's fused attention is slow in bfloat16. On windows of 32 items, a training step
    of 30 layers with plain products takes 0.89 times as long in bfloat16, and equally long in float32.
    """
    before = model.config._attn_implementation
    if model.device.type == "cpu":
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def train_or_resume(trainer: Trainer, checkpoints: Path) -> None:
    """Train, resuming from the last complete checkpoint if there is one, and delete the checkpoints at the end.

    In a single CPU process, the weights are bit for bit those of a run that was never interrupted.

    Args:
        trainer: the trainer.
        checkpoints: the folder that it writes checkpoints to.
    """
    trainer.train(resume_from_checkpoint=last_checkpoint(checkpoints))
    if trainer.is_world_process_zero():
        remove(checkpoints)


def last_checkpoint(folder: Path) -> str | None:
    """Return the newest complete checkpoint in `folder`: its last file, trainer_state.json, is written to the end."""
    whole = [
        path.parent
        for path in folder.glob("checkpoint-*/trainer_state.json")
        if path.read_text().rstrip().endswith("}")
    ]
    return str(max(whole, key=lambda path: int(path.name.split("-")[1]))) if whole else None


def parameter_groups(model: PreTrainedModel, learning_rate: float, head_learning_rate: float) -> list[dict]:
    """Split the trained parameters into those of the layers and the new ones: embedding and head rows, projections."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings(), getattr(model, "projections", None))
    new = {id(p) for module in ends if module is not None for p in module.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) not in new], "lr": learning_rate},
        {"params": [p for p in trained if id(p) in new], "lr": head_learning_rate},
    ]
    return [group for group in groups if group["params"]]


def loss_frame(trainer: Trainer, run: str) -> pd.DataFrame:
    """Return the trainer's logged losses, with columns run, step, epoch and one for each loss."""
    rows = [row for row in trainer.state.log_history if "loss" in row]
    return pd.DataFrame(rows).assign(run=run)
