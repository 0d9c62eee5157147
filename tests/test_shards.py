"""What each of several processes keeps of a weight that they keep together."""

import math

import pytest
import tiny
import torch
from mergekit.options import MergeOptions

from somf_mergekit import RecipeError
from somf_mergekit.common import machine
from somf_mergekit.common.process_group import Processes
from somf_mergekit.fusion.merges import AutogradMerge, LinearMerge, LoadedTensor
from somf_mergekit.fusion.shards import Shard
from somf_mergekit.learner.learning_model import Placement
from somf_mergekit.plugin.merge_check import planned_merge
from somf_mergekit.prepass.forecast import forecast
from somf_mergekit.prepass.learning_data import checked_data
from somf_mergekit.recipe.validate import read_recipe


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("shape", [(1,), (4, 3), (7, 2, 2), (15, 4)], ids=str)
def test_the_shards_of_all_processes_are_the_whole(shape, count):
    whole = torch.arange(float(torch.Size(shape).numel())).view(shape)
    shards = [Shard(shape, Processes(rank, count)) for rank in range(count)]
    own = [shard.own(whole) for shard in shards]
    assert torch.equal(torch.cat(own), whole)
    for shard, rows in zip(shards, own, strict=True):
        assert shard.own_shape == rows.shape
        assert shard.entries == whole.numel()
        if len(rows):
            assert shard.first_entry == rows.flatten()[0]
    # Dealt out as FSDP does: torch.chunk.
    assert [len(rows) for rows in own if len(rows)] == [len(c) for c in whole.chunk(count)]


def test_what_is_one_for_all_rows_is_stored_by_all():
    shard = Shard((6, 4), Processes(1, 2))
    for shape in ((), (1, 4), (1, 1), (4,)):
        assert shard.own(torch.ones(shape)).shape == shape
    assert shard.own(torch.ones(6, 1)).shape == (3, 1)
    scalar = Shard((), Processes(1, 2))
    assert scalar.is_whole
    assert scalar.own(torch.ones(())).shape == scalar.own_shape == ()


def test_a_process_keeps_its_rows_alone_unless_the_fusion_needs_all():
    base, change = torch.ones(9, 4), torch.full((9, 4), 0.5)
    linear = LinearMerge(base, (change,))
    placement = Placement("cpu", torch.bfloat16, shard_group=Processes(2, 3))
    loaded = LoadedTensor("w", (9, 4), base, linear, (("m",),), True, {}, None)
    stored = placement.placed(loaded)
    assert stored.base is stored.merge.start
    assert stored.merge.deltas[0].dtype == torch.bfloat16
    for tensor, size in ((stored.base, 4), (stored.merge.deltas[0], 2)):
        assert tensor.shape == (3, 4)
        assert tensor.untyped_storage().nbytes() == 12 * size
    fused = AutogradMerge(group=None, values={}, learned=())
    assert placement.shard(LoadedTensor("w", (9, 4), base, fused, (), True, {}, None)).is_whole


class Two(Processes):
    """The first of two processes, of which the other has half the memory."""

    def gathered(self, values):
        return [*values, *(value // 2 for value in values)]


def test_a_model_that_does_not_fit_in_each_process_is_stored_by_all_together(
    monkeypatch, family_recipe
):
    planned = tiny.on_machine(
        planned_merge(read_recipe(family_recipe()), MergeOptions()), micro_batch_size=1
    )
    data = checked_data(planned)
    needs = {}
    for name in (machine.RESIDENT, machine.SHARDED, machine.STREAMING):
        chosen = tiny.on_machine(planned, micro_batch_size=1, engine=name)
        if name == "sharded":
            with pytest.raises(RecipeError, match="needs several processes"):
                forecast(chosen, data)
        needs[name] = forecast(chosen, data, Two(0, 2)).memory
    assert needs["streaming"] < needs["sharded"] < needs["resident"]
    for name, usable in (
        ("resident", needs["resident"]),
        ("sharded", needs["resident"] - 1),
        ("sharded", needs["sharded"]),
        ("streaming", needs["sharded"] - 1),
    ):
        free = 2 * math.ceil(usable / 0.9)
        monkeypatch.setattr(machine, "free_memory", lambda device, free=free: free)
        found = forecast(planned, data, Two(0, 2))
        assert (found.engine, found.free) == (name, free // 2)
