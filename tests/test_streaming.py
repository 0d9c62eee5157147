"""The engine that brings one layer at a time gives what the resident engine gives."""

import pytest
import torch
from test_learner import TRAJECTORIES, make_problem, trajectory

from somf_mergekit.learner import streaming


def streamed(**changes):
    problem = make_problem(**changes)
    return trajectory(problem)


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_trajectory_is_that_of_the_resident_engine_bit_for_bit(name, monkeypatch):
    changes = {"max_steps": 3, "micro_batch": 2} | TRAJECTORIES[name]
    losses, logits = trajectory(make_problem(**changes))
    other_losses, other = trajectory(make_problem(runs=streaming.StreamingEngine, **changes))
    assert losses == other_losses
    assert all(torch.equal(a, b) for a, b in zip(logits, other, strict=True))
