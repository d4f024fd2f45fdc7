"""Train a language model to predict the next item, on batches of user windows, with transformers.Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

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

from lwa_helpers.configs.students import TuningConfig
from lwa_helpers.data.windows import LengthBatches, Window, collate
from lwa_helpers.errors import LwaError
from lwa_helpers.files import remove
from lwa_helpers.fisher.losses import counted
from lwa_helpers.models.language_model import plain
from lwa_helpers.models.precision import computes_in_bf16
from lwa_helpers.paths import TRAINER_OUTPUT
from lwa_helpers.ranking.item_head import sampled_nll
from lwa_helpers.ranking.model_checks import plain_model
from lwa_helpers.ranking.outputs import LabelOutputs, in_parts, label_outputs
from lwa_helpers.ranking.while_training import dropout_at_the_ends, eager_attention_on_cpu, through

VALID = "ndcg"  # name of the validation metric in the trainer's logs


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
        checkpoints: a folder for the checkpoints of this run alone (see train_or_resume); None saves none, whatever
            config.save_steps says.
        evaluate_every: number of epochs between two evaluations on the validation part, or None for no evaluation. The
            best checkpoint is the one that is kept, so `checkpoints` is needed.

    Returns:
        The arguments for the trainer.

    Raises:
        LwaError: if `evaluate_every` is given without `checkpoints`, or neither it nor config.save_steps with them.
    """
    if evaluate_every and not checkpoints:
        raise LwaError("evaluate_every keeps the best checkpoint: pass checkpoints, a folder for this run alone")
    if checkpoints and not (evaluate_every or config.save_steps):
        raise LwaError(f"nothing says when to save to {checkpoints}: set save_steps, or pass no checkpoints")
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
    )


class RankingTrainer(Trainer):
    """transformers.Trainer with a ready-made DataLoader and the mean -log p of the labels as its loss.

    The rows of the embedding and the head have their own learning rate. The loss is computed from the positions that
    predict labels; the model's own loss, which needs the logits of every position, is not used.

    The batches of a step (gradient accumulation, several processes) have together the gradient of one batch of all
    their rows. A process uses one GPU; start several processes with torchrun or accelerate for several GPUs.

    Args:
        model: the model to train, or a wrapper around it (see plain_model). Of a PEFT model, the adapter is trained.
        args: settings of the training run.
        loader: the batches.
        head_learning_rate: learning rate of the rows of the embedding and the head; None takes that of `args`.
        dropout: share of the entries of the input embeddings and the final states that are dropped in training.
        sampled: log q and n of sampled_nll, for a catalogue too large for the full softmax; None for the full softmax.
        valid: maps the model to the validation metric, evaluated every `args.eval_steps` steps; higher is better.
            Needed where `args` schedules evaluations.
        patience: number of evaluations without an improvement after which training stops.
        logs: folder for TensorBoard; None writes no such logs.
        callbacks: further callbacks.

    Raises:
        LwaError: if the model has no weight to train, or `valid` is missing.
    """

    model: PreTrainedModel

    control: TrainerControl

    def __init__(
        self,
        model: nn.Module,
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
        self.given, model = model, plain_model(model)
        self.share: Tensor | float = 1.0  # the weight of the batch at hand in its step
        check_trainable(model, args, valid)
        one_gpu(args)
        # Batches of a token budget differ in rows: none is filled up with rows of another to make processes equal.
        args.accelerator_config.even_batches = False
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
        self.model_accepts_loss_kwargs = True  # compute_loss weights each batch, so Trainer must not average them

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train, with dropout at both ends of the model and eager attention on a CPU."""
        one_gpu(self.args)
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

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write a checkpoint that from_pretrained loads without us; an adapter is merged into a copy of its model."""
        if _internal_call or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            plain(self.given).save_pretrained(output_dir or self.args.output_dir)

    def get_train_dataloader(self) -> DataLoader:
        """Return the ready-made loader, prepared by accelerate; several processes take the same number of batches."""
        batches = getattr(self.loader, "batch_sampler", None)
        if self.accelerator.num_processes > 1 and batches is not None:
            batches.drop_last = True  # otherwise one process waits for another that has no batch left
        return self.accelerator.prepare(self.loader)

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor]:
        """Return the batches of one step in this process, and at how many positions all processes predict labels."""
        batches = list(islice(epoch_iterator, num_batches))
        own = sum((counted(batch).sum().to(device) for batch in batches), start=torch.zeros((), device=device))
        if self.args.average_tokens_across_devices:
            return batches, self.accelerator.gather(own).sum()
        return batches, own * self.accelerator.num_processes

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
        """Compute the loss of a batch inside the forward pass of the model, which may be wrapped for sharding.

        Args:
            model: the model, as accelerate wrapped it.
            inputs: the batch.
            return_outputs: whether to return a pair with an empty dict.
            num_items_in_batch: number of positions that predict labels in all batches of the step; None if this batch
                is the only one.

        Returns:
            The mean over the positions of the batch, times their share of those of the step. Trainer adds the losses of
            a process's batches and averages over processes, so the share is multiplied by the number of processes.
        """
        self.share = 1.0
        if num_items_in_batch is not None:
            own, n = counted(inputs).sum(), torch.as_tensor(num_items_in_batch).clamp_min(1)
            self.share = own * self.accelerator.num_processes / n
        # Accelerate wraps only the model's forward method in autocast, and the loss bypasses that method.
        with self.accelerator.autocast():
            total = through(model, self.accelerator.unwrap_model(model), self.total, inputs)
        total = total * self.share
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


def one_gpu(args: TrainingArguments) -> None:
    """Make a process use one GPU, `args.device`: the losses here are not written for replicas (nn.DataParallel)."""
    args._n_gpu = min(args.n_gpu, 1)


def check_trainable(model: nn.Module, args: TrainingArguments, valid: Callable | None) -> None:
    """Raise LwaError if a model has no weight to train, or evaluations are scheduled without a metric."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise LwaError(
            f"no weight of {type(model).__name__} is trained: call requires_grad_(True), or load its adapter with "
            "is_trainable=True"
        )
    if args.eval_strategy != "no" and valid is None:
        raise LwaError("the arguments schedule evaluations: pass valid, which maps the model to the metric")


def zero_loss(own: LabelOutputs) -> Tensor:
    """Return the loss of a batch without labels: 0, with a zero gradient for everything the outputs depend on."""
    return sum((state.sum() for state in own.hidden), start=own.logits.sum())


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
        if path.read_text(encoding="utf-8").rstrip().endswith("}")
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
