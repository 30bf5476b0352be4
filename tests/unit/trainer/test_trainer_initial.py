"""Runs that start from another run's checkpoint: kept state, and refusals."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typing_extensions import override

from allometry.configs.errors import ConfigError, UserError
from allometry.configs.run import RunConfig
from allometry.launch.runs.dry_run import planned
from allometry.trainer.record.callbacks import Callback
from allometry.trainer.state import checkpoint
from allometry.trainer.train import train
from run_folders import events, rows
from shell import Shell

Make = Callable[..., RunConfig]
CONSTANT = "schedule={kind: constant}"
ALL = "[weights, optimizer, data]"
NEVER = "checkpoint.every_steps=null"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(config: RunConfig, **options: Any) -> Path:
    train(config, **{"device": torch.device("cpu"), "callbacks": [], **options})
    return Path(config.run.folder)


def initial(folder: Path, keep: str = "[weights]", step: int | str = "latest") -> str:
    return f"run.initial={{folder: {folder}, step: {step}, keep: {keep}}}"


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in rows(folder)]


def one_source(store: Path) -> str:
    return (
        f"data.sources=[{{name: up, train: {store}/up.train, validation: {store}/up.validation}}]"
    )


class Crash(Callback):
    """End the launch at a step, without a checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    @override
    def before_step(self, step: int) -> None:
        if step == self.step:
            raise RuntimeError("as if the machine had gone")


@pytest.mark.parametrize(
    "optimizer",
    ["{kind: adamw, lr: 1e-2}", pytest.param("{kind: muon, lr: 1e-2}", marks=pytest.mark.slow)],
)
def test_what_keeps_all_is_the_run_itself_to_the_bit(
    tiny: Make, tiny_store: Path, tmp_path: Path, optimizer: str
) -> None:
    """With one source and a constant rate, the new run's step 1 equals the old run's step 9."""
    same = (CONSTANT, one_source(tiny_store), f"optimizer={optimizer}")
    length = "training.total_steps=14"
    kept = (length, "checkpoint.keep_steps=[8]")
    first = run(tiny(*same, *kept, folder=tmp_path / "first"))
    made = tiny(*same, initial(first, ALL, 8), "training.total_steps=6", folder=tmp_path / "new")
    new = run(made)
    assert losses(new) == losses(first)[8:]
    assert [row["step"] for row in rows(new)] == list(range(1, 7))
    assert rows(new)[0]["tokens"] == 256, "its own, counted from its own beginning"
    less = tiny(
        *same, initial(first, "[weights, data]", 8), "training.total_steps=3", folder=tmp_path / "b"
    )
    fresh = losses(run(less))
    assert fresh[0] == losses(first)[8], "the same weights, on the same samples"
    assert fresh[1] != losses(first)[9], "what the optimizer remembers does something"


def test_it_is_resumed_twice_and_needs_the_other_run_no_more(tiny: Make, tmp_path: Path) -> None:
    first = run(tiny(folder=tmp_path / "first"), stop_at_step=7)
    shutil.copytree(first, tmp_path / "kept")
    short = ("training.total_steps=10", initial(first, ALL))
    straight = run(tiny(*short, folder=tmp_path / "straight"))
    config = tiny(*short, NEVER, folder=tmp_path / "new")
    with pytest.raises(RuntimeError, match="the machine had gone"):
        run(config, callbacks=[Crash(3)])
    shutil.rmtree(first)
    with pytest.raises(RuntimeError, match="the machine had gone"):
        run(config, callbacks=[Crash(2)])  # from the weights again: no checkpoint exists yet
    run(config, stop_at_step=4)
    run(config, stop_at_step=7)
    new = run(config)
    assert losses(new) == losses(straight)
    kinds = [event["event"] for event in events(new)]
    told = [kind for kind in kinds if kind in ("initial", "started", "resumed", "finished")]
    assert told == [*(3 * ["initial", "started"]), "resumed", "resumed", "finished"]
    (said, *_) = [event for event in events(new) if event["event"] == "initial"]
    assert said["keep"] == ["weights", "optimizer", "data"]
    assert (said["run"], said["at"]) == (str(first), 7)
    record = json.loads((new / "run.json").read_text())
    assert len(record["launches"]) == 5
    origin = record["origin"]
    assert (origin["source"], origin["step"]) == (str(first), 7)
    assert origin["hash"] == said["hash"]
    assert len(origin["hash"]) == 16
    # A change of its origin is refused, because it would have no effect.
    (tmp_path / "kept").rename(first)
    for edit in (initial(first, ALL, 5), initial(first), "run.initial=null"):
        with pytest.raises(UserError, match=r"run\.initial.* may not change when a run continues"):
            run(tiny("training.total_steps=10", edit, NEVER, folder=new))


def test_what_is_kept_and_what_begins_afresh(tiny: Make, tmp_path: Path) -> None:
    first = run(tiny(folder=tmp_path / "first"), stop_at_step=5)
    there = checkpoint.read_facts(first / "checkpoints/step-5")["reading"]["ledger"]
    for keep in ("[weights]", "[weights, optimizer]", "[weights, data]"):
        folder = tmp_path / keep.replace(" ", "")
        config = tiny(initial(first, keep), "training.total_steps=4", folder=folder)
        run(config, stop_at_step=2)
        facts = checkpoint.read_facts(folder / "checkpoints/step-2")
        starts = {n: read["samples"] for n, read in there.items()} if "data" in keep else None
        assert facts["reading"]["starts"] == (starts or {"up": 0, "down": 0})
        assert facts["areas"]["step"] == 2
        kinds = [event["event"] for event in events(folder)]
        assert ("sources_continued" in kinds) == ("data" in keep)
        assert kinds[0] == "initial"
        assert ("same_documents" in kinds) == ("data" not in keep)
        read: dict[str, torch.Tensor] = {"optimizer.head.weight.step": torch.zeros(())}
        torch.distributed.checkpoint.load(
            read, checkpoint_id=folder / "checkpoints/step-2", no_dist=True
        )
        taken = 7 if "optimizer" in keep else 2
        assert read["optimizer.head.weight.step"] == taken
    plan = planned(tiny(initial(first, ALL), folder=tmp_path / "not-yet"), 1).facts
    for name, account in plan["data"]["sources"].items():
        assert account["samples"] > there[name]["samples"]
    assert not (tmp_path / "not-yet").exists()


def test_a_router_s_bias_is_part_of_the_weights(tiny: Make, tmp_path: Path) -> None:
    experts = (
        "model={kind: moe, vocab_size: 64, width: 32, num_layers: 2, num_heads: 4, "
        "experts: {kind: swiglu, num_experts: 4, experts_per_token: 2, width: 16}, "
        "router: {balance: {kind: bias, rate: 0.1}}}"
    )
    first = run(tiny(experts, folder=tmp_path / "first"), stop_at_step=5)
    slowly = ("model.router.balance.rate=1e-4", initial(first, "[weights]"))
    new = run(tiny(experts, *slowly, folder=tmp_path / "new"), stop_at_step=1)
    names = sorted(checkpoint.names(first / "checkpoints/step-5"))
    (name, *_) = [name for name in names if name.endswith("router.bias")]
    found = []
    for path in (first / "checkpoints/step-5", new / "checkpoints/step-1"):
        tensor = {name: torch.zeros(4)}
        torch.distributed.checkpoint.load(tensor, checkpoint_id=path, no_dist=True)
        found.append(tensor[name])
    assert found[0].abs().min() > 0.05
    assert (found[1] - found[0]).abs().max() < 1e-3, "one step on from what it was"


def test_other_rates_and_another_base_of_rotary_frequencies(tiny: Make, tmp_path: Path) -> None:
    """A new run may change training settings; model changes are recorded as an event."""
    first = run(tiny(folder=tmp_path / "first"), stop_at_step=5)
    changed = ("model.rope_theta=50000", "model.dropout=0.1", "optimizer.lr=3e-3", "run.seed=9")
    config = tiny(
        *changed, initial(first, "[weights, optimizer]"), CONSTANT, folder=tmp_path / "new"
    )
    new = run(config, stop_at_step=2)
    assert [row["lr"] for row in rows(new)] == [3e-3, 3e-3]
    said = [event for event in events(new) if event["event"] == "config_changed"]
    assert [(e["key"], e["before"], e["after"]) for e in said] == [
        ("model.dropout", 0.0, 0.1),
        ("model.rope_theta", 10_000.0, 50_000.0),
    ]


def test_the_model_is_the_one_of_the_stage_where_the_checkpoint_lies(
    tiny: Make, tmp_path: Path
) -> None:
    """A stage's own keys differ between stages, but the keys of the full run do not."""
    length = ("training.total_tokens=null", "training.total_steps=null")

    def stages(first: int, second: int) -> str:
        parts = [
            f"{{name: s{theta}, steps: 2, model: {{rope_theta: {theta}}}}}"
            for theta in (first, second)
        ]
        return f"stages=[{', '.join(parts)}]"

    trunk = run(tiny(*length, CONSTANT, stages(20_000, 50_000), folder=tmp_path / "trunk"))
    one = tiny(initial(trunk), CONSTANT, folder=tmp_path / "one")
    two = tiny(initial(trunk, step=2), *length, CONSTANT, stages(30_000, 50_000))
    for config, before, after in ((one, 50_000.0, 10_000.0), (two, 20_000.0, 30_000.0)):
        new = run(config, stop_at_step=1)
        said = [event for event in events(new) if event["event"] == "config_changed"]
        assert [(e["key"], e["before"], e["after"]) for e in said] == [
            ("model.rope_theta", before, after)
        ]


REFUSED = (
    (("model.width=48",), r"run\.initial\.folder=.* has another model: model\.width=48 \(there 32"),
    (("run.initial.step=4",), r"run\.initial\.step=4: .* no such checkpoint; it has step-5"),
    (("run.initial.folder=nowhere",), r"run\.initial\.folder=nowhere holds no run"),
    (("optimizer={kind: lion, lr: 1e-3}",), r"optimizer\.kind=lion \(there adamw\) does not read"),
    (("run.seed=4",), r"data\.continue_sources.*run\.seed=3.*run\.seed=4"),
    (("data.sources.0.name=other",), r"under the name 'up'"),
    (("parameterization={kind: mup, base_width: 16}",), r"multiplies otherwise in the forward"),
    (("run.resume=step-5",), "holds no run to go back to"),
)


def test_what_cannot_begin_is_one_sentence_and_leaves_no_run(tiny: Make, tmp_path: Path) -> None:
    first = run(tiny(folder=tmp_path / "first"), stop_at_step=5)
    for change, said in REFUSED:
        with pytest.raises(UserError, match=said) as refused:
            run(tiny(initial(first, ALL), *change, folder=tmp_path / "new"))
        assert "\n" not in str(refused.value)
        assert not (tmp_path / "new").exists(), change
    with pytest.raises(UserError, match=r"run's own folder"):
        run(tiny(initial(tmp_path / "new"), folder=tmp_path / "new"))
    empty = tiny(folder=tmp_path / "empty")
    train(empty, device=torch.device("cpu"), callbacks=[], stop_at_step=1)
    shutil.rmtree(tmp_path / "empty/checkpoints")
    with pytest.raises(UserError, match="has no checkpoint yet"):
        run(tiny(initial(tmp_path / "empty"), folder=tmp_path / "new"))
    # In the folder of an existing run, run.initial would have no effect.
    with pytest.raises(UserError, match=r"run\.initial.* may not change"):
        run(tiny(initial(tmp_path / "empty"), folder=first))


SAID = (
    ("{folder: a, hf: b}", "give exactly one of folder"),
    ("{step: 4}", "give exactly one of folder"),
    ("{folder: a, keep: [optimizer]}", r"keep=\[optimizer\] has no weights"),
    ("{folder: a, keep: []}", "keep"),
    ("{folder: a, keep: [weights, moments]}", "keep"),
    ("{folder: a, keep: [weights, weights]}", "keep names something twice"),
    ("{hf: a, keep: [weights, optimizer]}", r"asks more of hf=a than a Hugging Face model has"),
    ("{hf: a, step: 5}", "the model in hf=a has no steps"),
    ("{folder: a, step: last}", r"run\.initial\.step"),
    ("{folder: a, from: 4}", "from"),
)


@pytest.mark.parametrize(("section", "sentence"), SAID)
def test_descriptions_that_contradict_themselves(tiny: Make, section: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as refused:
        tiny(f"run.initial={section}")
    assert "\n" not in str(refused.value)


def test_two_ways_to_say_where_data_go_on(tiny: Make) -> None:
    on = "data.continue_sources=true"
    assert tiny("run.initial={folder: a, keep: [weights, data]}", on).data.continue_sources
    for section, said in (
        ("{folder: a}", r"contradicts run\.initial\.keep=\[weights\].* add data to keep"),
        ("{hf: a}", r"run\.initial\.hf=a is a model; leave it out"),
    ):
        with pytest.raises(ConfigError, match=said):
            tiny(f"run.initial={section}", on)
    with pytest.raises(ConfigError, match="two ways to begin"):
        tiny("run.initial={folder: a}", "run.parent={folder: a, step: 1}")


def test_damaged_checkpoints_are_refused(tiny: Make, tmp_path: Path) -> None:
    first = run(tiny(folder=tmp_path / "first"), stop_at_step=5)
    path = first / "checkpoints/step-5"
    shutil.copytree(path, tmp_path / "kept")
    for name, said in (
        ("__0_0.distcp", r"step-5 cannot be begun with \(__0_0\.distcp has changed"),
        ("trainer.json", r"cannot be begun with \((trainer\.json has changed|it is not whole)"),
        (".metadata", r"cannot be begun with \(\.metadata has changed"),
    ):
        content = bytearray((path / name).read_bytes())
        content[len(content) // 2] ^= 1
        (path / name).write_bytes(content)
        with pytest.raises(UserError, match=said) as refused:
            run(tiny(initial(first, ALL), folder=tmp_path / "new"))
        assert "\n" not in str(refused.value)
        assert not (tmp_path / "new").exists()
        shutil.copyfile(tmp_path / "kept" / name, path / name)
    (path / "__0_0.distcp").unlink()
    with pytest.raises(UserError, match=r"__0_0\.distcp is missing"):
        run(tiny(initial(first, ALL), folder=tmp_path / "new"))
    shutil.copyfile(tmp_path / "kept/__0_0.distcp", path / "__0_0.distcp")
    assert len(rows(run(tiny(initial(first, ALL), folder=tmp_path / "new"), stop_at_step=2))) == 2


def test_a_run_of_weights_alone_has_no_states_to_keep(
    tiny: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run(tiny(folder=tmp_path / "first"), stop_at_step=2)
    second = tiny(initial(first), NEVER, folder=tmp_path / "second")
    with pytest.raises(RuntimeError, match="the machine had gone"):
        run(second, callbacks=[Crash(1)])
    with pytest.raises(UserError, match=r"step-0 holds weights alone; take optimizer out of"):
        run(tiny(initial(tmp_path / "second", ALL), folder=tmp_path / "third"))
    third = run(tiny(initial(tmp_path / "second"), folder=tmp_path / "third"), stop_at_step=1)
    origin = json.loads((third / "run.json").read_text())["origin"]
    assert origin["source"] == str(tmp_path / "second")
    assert origin["origin"]["source"] == str(first), "and where that one began"
    told = {one["run"]: one["initial"] for one in Shell(capsys).json("runs", tmp_path)["runs"]}
    assert told["first"] is None
    assert told["third"] == {key: origin[key] for key in ("run", "source", "step", "hash", "keep")}
    assert "(weights of second, step 0)" in Shell(capsys)("runs", tmp_path)
