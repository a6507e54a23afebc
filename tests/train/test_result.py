"""The result of a finished run, for sweepers."""

import json
import random

import pytest

from colospec.train.result import write_result


@pytest.mark.parametrize(("name", "sign"), [("eval/loss", 1), ("probe/real_acceptance_length", -1)])
def test_the_objective_is_lower_for_the_better(tmp_path, name, sign):
    value = random.random()
    write_result(tmp_path, name, {name: value, "train/loss": 9.0}, steps=7)

    result = json.loads((tmp_path / "result.json").read_text())

    assert result["objective"] == sign * value
    assert (result["objective_name"], result["steps"]) == (name, 7)
    assert result["metrics"] == {name: value, "train/loss": 9.0}
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_a_metric_that_the_last_step_does_not_have_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"step 9 is exported, but trainer.best_metric=eval/loss"):
        write_result(tmp_path, "eval/loss", {"train/loss": 2.0}, steps=9)
    assert not list(tmp_path.iterdir())
