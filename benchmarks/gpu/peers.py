"""Train the same model with other frameworks as their users would, one process per measurement.

    python peers.py TASK.json

Frameworks: torchtitan through its own Trainer, a hand-written loop over transformers' Llama with
compiled layers, and transformers' Trainer; random tokens, bf16, AdamW, gradient clipping, one GPU.
``benchmarks/gpu/throughput.py`` writes the task and reads the JSON lines that this script appends
to ``out``: one for each step, with its seconds and the peak of allocated memory, and a final one.
torchtitan 0.2.2 is the newest release that torch 2.11 imports; it also needs torchdata, tyro,
docstring_parser, typeguard and triton. Its text loaders import ``datasets``, which is not used.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BETAS, EPS, WEIGHT_DECAY, LR, CLIP = (0.9, 0.95), 1e-8, 0.1, 3e-4, 1.0


@dataclass(frozen=True)
class Task:
    """``steps`` of ``sequences`` in micro-batches of ``micro_batch``, of a given Llama."""

    contender: str
    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    ffn_width: int
    length: int
    sequences: int
    micro_batch: int
    steps: int
    device: str
    out: str

    def batches(self, count: int) -> Iterator[Tensor]:
        """Yield random tokens [count, length + 1], without end."""
        generator = torch.Generator().manual_seed(1)
        shape = (count, self.length + 1)
        while True:
            yield torch.randint(0, self.vocab_size, shape, generator=generator)


class Watch:
    """Time steps from end to end, with the device synchronized."""

    def __init__(self, task: Task) -> None:
        self._task, self._steps = task, 0
        self._out = Path(task.out)
        self._last = time.perf_counter()

    def start(self) -> None:
        self._synchronize()
        self._last = time.perf_counter()

    def step(self) -> bool:
        """Record a step; return True if more steps are needed."""
        self._synchronize()
        now = time.perf_counter()
        self._steps += 1
        on_gpu = self._task.device == "cuda"
        peak = torch.cuda.max_memory_allocated() if on_gpu else 0
        self.note(seconds=now - self._last, peak_bytes=peak)
        self._last = time.perf_counter()
        return self._steps < self._task.steps

    def note(self, **facts: object) -> None:
        with self._out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(facts) + "\n")

    def _synchronize(self) -> None:
        if self._task.device == "cuda":
            torch.cuda.synchronize()


def llama(task: Task) -> Any:
    """Return transformers' Llama in fp32, with torch's scaled_dot_product_attention."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=task.vocab_size,
        hidden_size=task.width,
        intermediate_size=task.ffn_width,
        num_hidden_layers=task.num_layers,
        num_attention_heads=task.num_heads,
        num_key_value_heads=task.num_kv_heads,
        head_dim=task.width // task.num_heads,
        max_position_embeddings=task.length,
        tie_word_embeddings=False,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=1,
    )
    with torch.device(task.device):
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def run_hf_loop(task: Task, watch: Watch) -> None:
    torch.set_float32_matmul_precision("high")
    model = llama(task).train()
    # Compile by layer: in a trace of the full model, transformers 5 makes the causal mask a tensor,
    # which disables the flash kernel of attention.
    for layer in model.model.layers:
        layer.compile()

    @torch.compile
    def loss_of(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = model.lm_head(hidden).flatten(0, 1).float()
        return torch.nn.functional.cross_entropy(logits, targets.flatten())

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, fused=True
    )
    parts = task.sequences // task.micro_batch
    watch.start()
    for tokens in task.batches(task.sequences):
        for part in tokens.split(task.micro_batch):
            part = part.to(task.device)
            inputs, targets = part[:, :-1].contiguous(), part[:, 1:].contiguous()
            with torch.autocast(task.device, dtype=torch.bfloat16):
                hidden = model.model(input_ids=inputs).last_hidden_state
                loss = loss_of(hidden, targets) / parts
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if not watch.step():
            return


def run_hf_trainer(task: Task, watch: Watch) -> None:
    # accelerate then compiles layer by layer, as above.
    os.environ["ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION"] = "True"
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Samples(torch.utils.data.Dataset[dict[str, Tensor]]):
        def __init__(self) -> None:
            self.tokens = next(task.batches(4 * task.sequences))[:, :-1]

        def __len__(self) -> int:
            return task.sequences * (task.steps + 1)

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            row = self.tokens[index % len(self.tokens)]
            return {"input_ids": row, "labels": row}

    class Steps(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: object, **__: object) -> None:
            watch.start()

        def on_step_end(self, args: object, state: object, control: Any, **__: object) -> Any:
            control.should_training_stop = not watch.step()
            return control

    with tempfile.TemporaryDirectory(prefix="allometry-hf-trainer-") as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            use_cpu=task.device == "cpu",
            bf16=True,
            torch_compile=True,
            optim="adamw_torch_fused",
            learning_rate=LR,
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            weight_decay=WEIGHT_DECAY,
            max_grad_norm=CLIP,
            lr_scheduler_type="constant",
            per_device_train_batch_size=task.micro_batch,
            gradient_accumulation_steps=task.sequences // task.micro_batch,
            max_steps=task.steps,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        Trainer(llama(task), arguments, train_dataset=Samples(), callbacks=[Steps()]).train()


def run_titan(task: Task, watch: Watch) -> None:
    _prepare_titan(task)
    from torchtitan.components.dataloader import BaseDataLoader
    from torchtitan.config import JobConfig
    from torchtitan.models.llama3 import TransformerModelArgs, get_train_spec
    from torchtitan.protocols.train_spec import register_train_spec
    from torchtitan.tools.logging import init_logger
    from torchtitan.train import Trainer

    class Tokens(BaseDataLoader):  # type: ignore[misc]
        def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
            for tokens in task.batches(task.micro_batch):
                yield {"input": tokens[:, :-1].contiguous()}, tokens[:, 1:].contiguous()

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            del state_dict

    class Timed(Trainer):  # type: ignore[misc]
        wanted = True

        def train_step(self, iterator: Any) -> None:
            super().train_step(iterator)
            self.wanted = watch.step()

        def should_continue_training(self) -> bool:
            return self.wanted and super().should_continue_training()

    spec = get_train_spec()
    spec.model_args = {
        "same": TransformerModelArgs(
            dim=task.width,
            n_layers=task.num_layers,
            n_heads=task.num_heads,
            n_kv_heads=task.num_kv_heads,
            vocab_size=task.vocab_size,
            multiple_of=_multiple_of(task),
            max_seq_len=task.length,
        )
    }
    spec.build_tokenizer_fn = spec.build_validator_fn = None
    spec.build_dataloader_fn = lambda **_: Tokens()
    register_train_spec("same", spec)
    config = JobConfig()
    _configure_titan(config, task)
    init_logger()
    with tempfile.TemporaryDirectory(prefix="allometry-titan-") as folder:
        config.job.dump_folder = folder
        trainer = Timed(config)
        assert trainer.model_parts[0].layers["0"].feed_forward.w1.weight.shape[0] == task.ffn_width
        watch.start()
        trainer.train()
        trainer.close()
    torch.distributed.destroy_process_group()


def _configure_titan(config: Any, task: Task) -> None:
    config.model.name = config.model.flavor = "same"
    config.metrics.log_freq = 1_000_000  # its log resets the peak memory
    config.optimizer.lr, config.training.max_norm = LR, CLIP
    config.training.local_batch_size = task.micro_batch
    config.training.global_batch_size = task.sequences
    config.training.seq_len, config.training.steps = task.length, 1_000_000
    config.lr_scheduler.warmup_steps = 2
    config.activation_checkpoint.mode = "none"
    config.compile.enable = True
    config.checkpoint.enable = False
    config.comm.trace_buf_size = 0


def _multiple_of(task: Task) -> int:
    """Return torchtitan's ``multiple_of`` that rounds 8/3 of the width up to our ffn_width."""
    least = int(2 * 4 * task.width / 3)
    fitting = (m for m in (64, 128, 256, 512, 1024) if -(-least // m) * m == task.ffn_width)
    return next(fitting)


def _prepare_titan(task: Task) -> None:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port = opened.getsockname()[1]
    os.environ.update(
        {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    )

    def missing(*_: object, **__: object) -> None:
        raise RuntimeError("no data sets in this benchmark")

    for name, function in (("datasets", "load_dataset"), ("datasets.distributed", "split_by")):
        module: Any = types.ModuleType(name)
        module.Dataset = module.IterableDataset = object
        setattr(module, function, missing)
        module.split_dataset_by_node = missing
        sys.modules.setdefault(name, module)
    if task.device == "cpu":
        _pretend_to_be_an_accelerator()


def _pretend_to_be_an_accelerator() -> None:
    """Make torchtitan use the CPU as its device, for a rehearsal only."""
    module = types.SimpleNamespace(
        set_device=lambda device: None,
        current_device=lambda: 0,
        get_device_name=lambda device=None: "CPU",
        get_device_properties=lambda device=None: types.SimpleNamespace(total_memory=2**34),
        memory_stats=lambda device=None: {},
        reset_peak_memory_stats=lambda: None,
        empty_cache=lambda: None,
        synchronize=lambda: None,
    )
    torch._utils._get_available_device_type = lambda: "cpu"
    torch._utils._get_device_module = lambda kind: module
    barrier = torch.distributed.barrier
    torch.distributed.barrier = lambda *given, device_ids=None, **more: barrier(*given, **more)


CONTENDERS: dict[str, Callable[[Task, Watch], None]] = {
    "torchtitan": run_titan,
    "hf_loop": run_hf_loop,
    "hf_trainer": run_hf_trainer,
}


def main() -> None:
    task = Task(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    torch.manual_seed(0)
    watch = Watch(task)
    CONTENDERS[task.contender](task, watch)
    watch.note(finished=True)


if __name__ == "__main__":
    main()
