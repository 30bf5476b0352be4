"""transformers' Trainer with its Llama: ``python -m contenders.hf_trainer --out FILE``."""

from __future__ import annotations

import os
import tempfile
import time
from typing import Any

import torch

from contenders.shape import Shape, Task, parse_task, report


class RandomTokens(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __init__(self, shape: Shape, sequences: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(
            0, shape.vocab_size, (sequences, shape.sequence_length), generator=generator
        )

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def arguments(task: Task, folder: str) -> Any:
    from transformers import TrainingArguments

    shape = task.shape
    return TrainingArguments(
        output_dir=folder,
        use_cpu=True,
        bf16=task.dtype == "bf16",
        optim="adamw_torch_fused",
        learning_rate=shape.lr,
        adam_beta1=shape.beta1,
        adam_beta2=shape.beta2,
        weight_decay=shape.weight_decay,
        max_grad_norm=shape.clip_grad_norm,
        lr_scheduler_type="constant",
        per_device_train_batch_size=shape.sequences,
        max_steps=task.total_steps,
        torch_compile=task.compile,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


def main() -> None:
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback

    class StepTimes(TrainerCallback):
        """Time steps from end to end, so that a step includes loading its data."""

        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.ends.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ends.append(time.perf_counter())

    task = parse_task()
    shape = task.shape
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.width,
        intermediate_size=shape.ffn_width,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_heads,
        max_position_embeddings=shape.sequence_length,
        rms_norm_eps=shape.norm_eps,
        tie_word_embeddings=False,
        use_cache=False,
    )
    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=LlamaForCausalLM(config),
            args=arguments(task, folder),
            train_dataset=RandomTokens(shape, shape.sequences * task.total_steps),
            callbacks=[times],
        )
        result = trainer.train()
    seconds = [end - start for start, end in zip(times.ends, times.ends[1:], strict=False)]
    report(task, seconds, [result.training_loss])


if __name__ == "__main__":
    main()
