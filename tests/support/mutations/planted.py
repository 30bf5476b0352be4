"""Hand-written faults: likely errors of parallel and numerical steps.

Each is a snippet that occurs exactly once in its file, and its replacement.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plant:
    file: str
    name: str
    old: str
    new: str


PLANTED = (
    Plant(
        "models/build.py",
        "frozen parameters that require a gradient",
        "parameter.requires_grad_(not parameterization.resolve(specs[name]).frozen)",
        "parameter.requires_grad_(True)",
    ),
    Plant(
        "models/products.py",
        "gradients of joined weights given to the first that are there",
        "return [next(each) if wanted else None for wanted in trained]",
        "return [next(each, None) for wanted in trained]",
    ),
    Plant(
        "models/moe.py",
        "the bias of a frozen router moved",
        "if isinstance(balance, BiasBalance) and router.weight.requires_grad:",
        "if isinstance(balance, BiasBalance):",
    ),
    Plant(
        "parallel/tied.py",
        "the gradient of a frozen tied embedding awaited",
        "if not all(_weight(module).requires_grad for module in ends):",
        "if False:",
    ),
    Plant(
        "models/transformer.py",
        "attention of a block without its residual scale",
        "x_BLD + self._scaled(self.attention_post_norm(y_BLD))",
        "x_BLD + self.attention_post_norm(y_BLD)",
    ),
    Plant(
        "models/documents.py",
        "a window one key too long",
        "seen_LL.triu(1 - window)",
        "seen_LL.triu(-window)",
    ),
    Plant(
        "models/transformer.py",
        "layers with a window turned like the others",
        "geometry.turn if self.window is None else geometry.windowed",
        "geometry.turn",
    ),
    Plant(
        "parallel/tensor.py",
        "a norm over all heads that sees those of its rank alone",
        "summands.redistribute(placements=[Replicate()])",
        "DTensor.from_local(own_BL2, mesh, [Replicate()], run_check=False)",
    ),
    Plant(
        "parallel/tensor.py",
        "the gradient of a norm's sum over ranks not summed",
        "whole.to_local(grad_placements=[Partial()]).split(1, dim=-1)",
        "whole.to_local().split(1, dim=-1)",
    ),
    Plant(
        "trainer/feed.py",
        "sequences dealt to hdp ranks in blocks",
        "(turn * mesh.hdp.size + mesh.hdp.rank) * size",
        "(mesh.hdp.rank * plan.micro_batches(step) + turn) * size",
    ),
    Plant(
        "trainer/balance.py",
        "the load of the step before counted on all ranks of a stage",
        "self._mesh.stage.rank == 0",
        "True",
    ),
    Plant(
        "trainer/step.py",
        "targets counted for tokens",
        "counts[1] += batch.num_tokens",
        "counts[1] += (batch.targets_BL != IGNORE).sum()",
    ),
    Plant(
        "trainer/step.py",
        "loss over the number of micro-batches",
        "scale = 1.0 / targets.clamp(min=1.0)",
        "scale = len(batches) / targets.clamp(min=1.0)",
    ),
    Plant(
        "parallel/mesh.py",
        "the norm of one pipeline rank",
        "self.stage.group if self.pp.size == 1 else dist.group.WORLD",
        "self.stage.group",
    ),
    Plant(
        "trainer/step.py",
        "losses counted on every tp rank",
        "sums_2S *= self._mesh.tp.rank == 0",
        "pass",
    ),
    Plant(
        "trainer/step.py",
        "rate of the step before",
        "self._schedule.fraction(step)",
        "self._schedule.fraction(max(1, step - 1))",
    ),
    Plant(
        "trainer/step.py",
        "gradients of the step before kept",
        "self._optimizer.zero_grad(set_to_none=True)\n        sums_2S",
        "sums_2S",
    ),
    Plant(
        "optim/clip.py",
        "clipping without its guard",
        ".where(norm.isfinite(), 1.0)",
        "",
    ),
    Plant(
        "trainer/evaluate.py",
        "evaluation in training mode",
        "part.eval()",
        "part.train()",
    ),
    Plant(
        "trainer/loop.py",
        "FLOPs of tokens alone",
        "int(outcome.squared_lengths))",
        "int(outcome.tokens))",
    ),
    Plant(
        "models/moe.py",
        "biases away from the mean load",
        "wanted_E = (wide_E.mean(-1, keepdim=True) - wide_E).sign()",
        "wanted_E = (wide_E - wide_E.mean(-1, keepdim=True)).sign()",
    ),
    Plant(
        "models/router.py",
        "balance by the number of experts squared",
        "ctx.coefficient * load_E.shape[0] * load_E",
        "ctx.coefficient * load_E.shape[0] ** 2 * load_E",
    ),
    Plant(
        "models/router.py",
        "groups as good as their best expert",
        "pair = min(2, scores_TGe.shape[2])",
        "pair = 1",
    ),
    Plant(
        "trainer/evaluate.py",
        "an idle rank counts its micro-batch",
        "idle = place >= len(batches)",
        "idle = False",
    ),
)
