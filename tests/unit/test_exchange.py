"""Assignment of work of one layout to the replicas of another, and the transfers that follow, as pure integers."""

import itertools

import pytest

from megatron_ral.parallel.exchange import Assignment
from megatron_ral.parallel.rank_layout import RankLayout

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2), (3, 1), (6, 2)]


def everywhere(world, home, away, counts):
    """Return the assignment as each rank sees it."""
    return [Assignment(RankLayout(rank, world, *home), RankLayout(rank, world, *away), counts) for rank in range(world)]


@pytest.mark.parametrize("home, away", itertools.product(LAYOUTS, LAYOUTS))
@pytest.mark.parametrize("per_rank", [1, 3])
def test_every_item_is_taken_by_one_replica_and_arrives_everywhere_it_is_needed(home, away, per_rank):
    world = 12
    D, E = (world // (tensor * pipeline) for tensor, pipeline in (home, away))
    views = everywhere(world, home, away, (per_rank,) * D)
    plan = views[0]
    for view in views:  # every rank derives the same transfers
        assert view.inputs() == plan.inputs() and view.answers() == plan.answers()
    load = [sum(plan.replica(item) == replica for item in plan.items()) for replica in range(E)]
    assert sum(load) == D * per_rank and max(load) - min(load) <= 1
    taken = {rank: set(view.taken()) for rank, view in enumerate(views)}
    for transfer in plan.inputs():
        assert transfer.what in taken[transfer.target]
        assert views[transfer.source].home.data_rank == transfer.what[0], "who sends an item has it"
    assert {(t.target, t.what) for t in plan.inputs()} == {(rank, item) for rank in taken for item in taken[rank]}
    for transfer in plan.answers():
        assert transfer.what in taken[transfer.source]
        assert views[transfer.target].home.data_rank == transfer.what[0]
    assert {(t.target, t.what) for t in plan.answers()} == {
        (rank, item) for rank, view in enumerate(views) for item in plan.items() if item[0] == view.home.data_rank
    }
    for away_stage, home_stage in itertools.product(range(away[1]), range(home[1])):
        transfers = plan.stage_results("rows", away_stage, home_stage)
        for transfer in transfers:
            item, name = transfer.what
            source, target = views[transfer.source].away, views[transfer.target].home
            assert name == "rows" and item in taken[transfer.source] and source.pipeline_rank == away_stage
            assert (target.data_rank, target.pipeline_rank) == (item[0], home_stage)
        assert len({(t.target, t.what) for t in transfers}) == len(transfers) == D * per_rank * home[0]


def test_nothing_is_sent_in_one_common_layout():
    for plan in everywhere(8, (2, 2), (2, 2), (3, 3)):
        transfers = plan.inputs() + plan.answers() + plan.stage_results("rows", 1, 1)
        assert all(transfer.source == transfer.target for transfer in transfers)
        assert plan.taken() == [(plan.home.data_rank, index) for index in range(3)]


def test_uneven_work_is_spread_in_order():
    """Data-parallel ranks have 5, 0 and 1 items. Two replicas take three each, in order."""
    plan = Assignment(RankLayout(0, 6, 2, 1), RankLayout(0, 6, 1, 3), (5, 0, 1))
    assert [plan.replica(item) for item in plan.items()] == [0, 0, 0, 1, 1, 1]
    assert plan.items()[-1] == (2, 0) and plan.taken() == [(0, 0), (0, 1), (0, 2)]


def test_rank_of_inverts_the_layout():
    for rank in range(24):
        layout = RankLayout(rank, 24, 2, 3)
        assert layout.rank_of(layout.tensor_rank, layout.data_rank, layout.pipeline_rank) == rank
