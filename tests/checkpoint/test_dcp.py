"""Save and resume across real ranks: bit-identical states, any number of trainers, no hangs."""

import pytest
import torch
import torch.distributed as dist

from colospec.checkpoint import state
from colospec.checkpoint.dcp import Checkpointer
from colospec.checkpoint.manifest import latest
from colospec.checkpoint.rng import restore_rng
from colospec.checkpoint.state import load_model
from tests.checkpoint.training import Run, assert_same
from tests.ranks import run_ranks


def train_and_save(_rank, directory, file_bytes=100):
    state.FILE_BYTES = file_bytes
    run = Run(directory, seed=5)
    for _ in range(3):
        run.step()
    before = run.snapshot()
    run.save(3, epoch=1, micro_batch=7, nested={"note": ["a", 1.5, None]})
    # Training goes on at once: the checkpoint must hold the state of the call.
    for _ in range(3):
        run.step()
    run.checkpointer.wait()
    return before, run.snapshot(), torch.rand(3, generator=run.generator).tolist()


def resume(rank, directory):
    run = Run(directory, seed=99)
    run.optimizer.param_groups[0]["lr"] = 0.5
    found = run.checkpointer.choose("auto")
    meta, states = run.load(found)
    loaded = run.snapshot()
    restore_rng(states, run.generator, rank=rank, seed=99, step=meta.get("step", 3))
    for _ in range(3):
        run.step()
    numbers = torch.rand(3, generator=run.generator).tolist()
    return meta, loaded, run.snapshot(), run.checkpointer.newest_step(), numbers


@pytest.mark.parametrize("file_bytes", [2**28, 100])
@pytest.mark.parametrize(("saving", "loading"), [(1, 1), (2, 2), (2, 1), (1, 2)])
def test_state_is_bit_identical_after_resuming_on_other_trainers(
    tmp_path, saving, loading, file_bytes
):
    saved = run_ranks(train_and_save, saving, tmp_path, file_bytes)
    files = list((tmp_path / "step-000003").glob("*.distcp"))
    assert len(files) == saving * (1 if file_bytes == 2**28 else 8)
    resumed = run_ranks(resume, loading, tmp_path)

    before, after, numbers = saved[0]
    meta, loaded, went_on, newest, _ = resumed[0]
    assert meta == {"epoch": 1, "micro_batch": 7, "nested": {"note": ["a", 1.5, None]}}
    assert newest == 3
    assert_same(loaded, before)
    if saving == loading:
        # Weights, Adam states and every rank's own random numbers: the run goes on as if unbroken.
        assert_same(went_on, after)
        assert [result[-1] for result in resumed] == [result[-1] for result in saved]
    if loading == 2:
        assert resumed[0][-1] != resumed[1][-1]
    assert resumed[0][-1] == numbers or saving != loading


def load_elsewhere(_rank, directory, other):
    run = Run(other)
    run.load(run.checkpointer.choose(str(latest(directory).path)))
    return run.checkpointer.newest_step()


def test_a_checkpoint_of_another_directory_is_not_one_of_this(tmp_path):
    run_ranks(train_and_save, 1, tmp_path / "one")
    assert run_ranks(load_elsewhere, 1, tmp_path / "one", tmp_path / "two") == [None]
    assert latest(tmp_path / "two") is None


def test_weights_load_whole_in_one_process_without_a_group(tmp_path):
    (before, _, _), _ = run_ranks(train_and_save, 2, tmp_path)
    model = load_model(latest(tmp_path).path)
    weights = {f"model.{name}": tensor.numpy() for name, tensor in model.items()}
    assert_same((weights, 0), ({k: v for k, v in before[0].items() if k in weights}, 0))
    assert set(model) == {"up.weight", "up.bias", "down.weight", "t2d", "d2t"}


def save_beside_training(_rank, directory):
    run = Run(directory, keep=6)
    for step in range(60):
        run.step()
        total = torch.ones(3) * step
        dist.all_reduce(total)
        assert total[0] == step * dist.get_world_size()
        if step % 10 == 0:
            run.save(step, epoch=step)
    run.checkpointer.wait()
    return run.checkpointer.newest_step()


def test_saving_beside_training_collectives_neither_hangs_nor_mixes(tmp_path):
    assert run_ranks(save_beside_training, 2, tmp_path) == [50, 50]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"step-0000{step:02d}" for step in range(0, 60, 10)
    ]


def load_into_another_model(_rank, directory):
    run = Run(directory, width=14)
    with pytest.raises(ValueError, match=r"model.down.weight has shape \(3, 13\), expected"):
        run.load(run.checkpointer.choose("auto"))
    state = run.state()
    del state["model"]["t2d"]
    state["model"]["fc_norm"] = torch.ones(2)
    with pytest.raises(ValueError, match=r"fc_norm is not in(.*)t2d is only in the checkpoint"):
        run.checkpointer.load(run.checkpointer.choose("auto"), state)


def test_a_checkpoint_of_another_model_is_refused_on_all_ranks(tmp_path):
    run_ranks(train_and_save, 2, tmp_path)
    run_ranks(load_into_another_model, 2, tmp_path)


def save_some(_rank, directory, losses, keep):
    run = Run(directory, keep=keep)
    for step, loss in losses:
        run.save(step, loss)
        run.checkpointer.wait()


def names(directory):
    return sorted(int(path.name.removeprefix("step-")) for path in directory.iterdir())


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    losses = [(1, 5.0), (2, 1.0), (3, float("nan")), (4, 4.0), (5, 3.0)]
    run_ranks(save_some, 1, tmp_path, losses, 2)
    assert names(tmp_path) == [2, 4, 5]


def test_a_run_that_goes_on_from_an_earlier_step_drops_the_abandoned_ones(tmp_path):
    run_ranks(save_some, 1, tmp_path, [(1, 5.0), (2, 1.0), (3, 2.0)], 3)
    run_ranks(save_some, 1, tmp_path, [(2, 4.0)], 3)
    assert names(tmp_path) == [1, 2]
    assert latest(tmp_path).manifest.metrics == {"train/loss": 4.0}


def lone(directory, keep=2, best_metric="eval/acceptance_length"):
    return Checkpointer(
        directory, group=None, rank=0, world_size=1, keep=keep, best_metric=best_metric, limit_s=60
    )


def test_one_process_without_a_group_saves_and_keeps_the_longest_acceptance(tmp_path):
    checkpointer = lone(tmp_path, keep=1)
    weight = torch.randn(5)
    for step, length in enumerate((1.5, 2.5, 2.0, 1.0)):
        metrics = {"eval/acceptance_length": length}
        checkpointer.save(step, {"model": {"w": weight * step}}, {}, metrics=metrics)
    checkpointer.wait()
    assert names(tmp_path) == [1, 3]
    state = {"model": {"w": torch.empty(5)}}
    checkpointer.load(tmp_path / "step-000001", state)
    assert torch.equal(state["model"]["w"], weight)


def test_a_metric_that_never_comes_is_warned_of(tmp_path, caplog):
    checkpointer = lone(tmp_path)
    checkpointer.save(1, {"model": {"w": torch.ones(1)}}, {}, metrics={"train/loss": 1.0})
    checkpointer.wait()
    assert "no trainer.best_metric=eval/acceptance_length, only train/loss" in caplog.text


def test_resume_never_refuses_a_directory_with_a_checkpoint(tmp_path):
    checkpointer = lone(tmp_path)
    assert checkpointer.choose("never") is None
    assert checkpointer.choose("auto") is None
    checkpointer.save(1, {"model": {"w": torch.ones(1)}}, {}, metrics={})
    with pytest.raises(
        ValueError, match=r"resume=never, but .*step-000001 is there; .*resume=auto"
    ):
        checkpointer.choose("never")


def test_meta_that_is_not_json_is_refused_in_the_call(tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        lone(tmp_path).save(1, {}, {"place": tmp_path}, metrics={})


def test_several_trainers_without_a_group_are_refused(tmp_path):
    with pytest.raises(ValueError, match="2 trainers need a process group"):
        Checkpointer(tmp_path, group=None, rank=0, world_size=2, keep=1, best_metric="x", limit_s=1)
