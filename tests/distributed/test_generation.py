"""Generation against a loop without cache, batches or stages: the same tokens, log-probabilities, lengths and ends
under every layout, batch size and block of the cache, with responses that end at different steps."""

from dataclasses import dataclass, replace

import pytest
import torch

from megatron_ral.attention.group_layout import GroupLayout
from megatron_ral.data.processor import PromptProcessor
from megatron_ral.engine import decoding_batch as in_flight
from megatron_ral.engine.decoding_batch import SamplingSettings
from megatron_ral.engine.pipelined_decoder import PromptResponses, generate, sample_responses
from megatron_ral.errors import UserError
from megatron_ral.functional.sampling import sample_tokens, uniform_stream
from megatron_ral.models.attention_pass import AttentionPass
from megatron_ral.models.kv_cache import GroupKVCache
from megatron_ral.parallel.collectives import gather_objects
from megatron_ral.parallel.process_groups import start_groups, stop_groups
from megatron_ral.parallel.vocab import vocab_parallel_logprobs
from megatron_ral.parallel.vocab_sampling import begin_draw
from megatron_ral.types import GroupBatch, pad_prompts
from tests.distributed.cases import open_policy
from tests.distributed.runner import run_ranks
from tests.distributed.test_mixed_batches import samples
from tests.tiers import chosen

NUM_PROMPTS, R = 6, 14
IDENTITY = (11, "test")


@dataclass(frozen=True)
class Case:
    """How to draw. `ends`: with the end token that lets responses end at most different steps; else there is none. Few
    tokens to draw from make it likely; and among all of an untrained model's, two are as likely to six digits so often
    that rounding would decide."""

    G: int
    temperature: float
    top_p: float
    ends: bool
    num_tokens: int = 0


CASES = {
    "free": Case(2, 1.0, 1.0, False, 60),
    "ends apart": Case(4, 1.3, 1.0, True, 10),
    "nucleus": Case(3, 0.9, 0.8, True, 20),
    "greedy": Case(1, 0.0, 1.0, True),
    "odd": Case(5, 1.0, 0.5, True, 7),
}


def slow_generation(policy, prompts, settings):
    """Every token from a whole forward pass over one prompt and one response."""
    rows = []
    for prompt in prompts:
        batch = pad_prompts([prompt], 0)
        embeds = policy.encode_visual(batch)
        ids = torch.zeros(settings.group_size, R, dtype=torch.int64)
        lengths, logprobs = torch.zeros(settings.group_size, dtype=torch.int64), torch.zeros(settings.group_size, R)
        finished = torch.zeros(settings.group_size, dtype=torch.bool)
        for g in range(settings.group_size):
            uniform = uniform_stream(R, *IDENTITY, prompt.sample.identity, g)
            for step in range(R):
                groups = GroupBatch(batch, ids[None, g : g + 1, : step + 1], torch.tensor([[step + 1]]), embeds)
                with torch.no_grad():
                    logits = policy.stage(groups, AttentionPass(GroupLayout.of(groups)))[step].float()
                allowed = logits.clone()
                allowed[list(policy.shape.visual_token_ids)] = float("-inf")
                drawn = allowed[: settings.num_tokens or None][None]
                token = sample_tokens(drawn, uniform[step : step + 1], settings.temperature, settings.top_p)[0]
                ids[g, step] = token
                logprobs[g, step] = torch.log_softmax(logits / (settings.temperature or 1.0), dim=-1)[token]
                lengths[g] += 1
                finished[g] = token == settings.end_token_id
                if finished[g]:
                    break
        rows.append(PromptResponses(ids, lengths, logprobs, finished))
    return rows


def make_settings(policy, prompts, case):
    settings = SamplingSettings(case.G, R, -1, 0, case.temperature, case.top_p, case.num_tokens)
    if not case.ends:
        return settings
    tokens = torch.cat([row.response_ids for row in slow_generation(policy, prompts, settings)])

    def different_ends(token):
        hit = tokens == token
        return len(torch.where(hit.any(1), hit.int().argmax(1), R).unique())

    return replace(settings, end_token_id=max(tokens.unique().tolist(), key=different_ends))


def read(path):
    processor = PromptProcessor(path, 128)
    prompts = [processor(sample) for sample in samples()[:NUM_PROMPTS]]
    assert len({len(prompt.input_ids) for prompt in prompts}) > 3
    assert any(prompt.visual_mask.any() for prompt in prompts) and not all(p.visual_mask.any() for p in prompts)
    return prompts


def expected(path):
    policy, prompts = open_policy(path, 1, 1)[3], read(path)
    with policy.resident():
        settings = {name: make_settings(policy, prompts, case) for name, case in CASES.items()}
        rows = {name: slow_generation(policy, prompts, settings[name]) for name in CASES}
    stop_groups()
    return settings, rows


def slow_responses(material, name):
    """Folder, settings and responses of the slow loop."""
    path = str(material[name])
    return path, *run_ranks(1, expected, path)[0]


@pytest.fixture(scope="module")
def wanted(material):
    return slow_responses(material, "tiny")


@pytest.fixture(scope="module", params=["qwen3", "internvl", "qwen3_5"])
def wanted_of_others(material, request):
    return slow_responses(material, request.param)


def test_responses_end_at_different_steps(wanted):
    """The comparison below would be worth little if all ended together, or none."""
    _, _, rows = wanted
    lengths = [row.response_lengths.tolist() for row in rows["ends apart"]]
    assert len({length for row in lengths for length in row}) > 4
    assert any(max(row) < R for row in lengths), "a prompt whose responses all end early"
    assert any(len(set(row)) > 1 for row in lengths)
    for name, case in CASES.items():
        finished = torch.stack([row.finished for row in rows[name]])
        assert not case.ends or (finished.any() and not finished.all()), name
        assert not case.num_tokens or all((row.response_ids < case.num_tokens).all() for row in rows[name])


def spread(total, data_size, data_rank):
    """This replica's prompts: unequal numbers, and none for the last of three or more."""
    cuts = {1: [0, total], 2: [0, total - 1, total], 3: [0, 4, total, total]}[data_size]
    return slice(cuts[data_rank], cuts[data_rank + 1])


class Watch:
    """Notes every pass of every batch and the rows it computes."""

    def __init__(self, monkeypatch):
        self.passes, self.rows = [], 0
        run_pass, watch = in_flight.DecodingBatch.run_pass, self

        def seen(batch, *arguments):
            watch.passes.append((batch.prompts.identities, batch.step))
            watch.rows += len(batch.rows) if batch.step else 0
            return run_pass(batch, *arguments)

        monkeypatch.setattr(in_flight.DecodingBatch, "run_pass", seen)


def generated(path, settings, tensor, pipeline, batch_size, block):
    GroupKVCache.BLOCK = block
    policy = open_policy(path, tensor, pipeline)[3]
    layout, prompts = policy.layout, read(path)
    mine = prompts[spread(len(prompts), layout.data_size, layout.data_rank)]
    found, notes = {}, {}
    with pytest.MonkeyPatch.context() as patch, policy.resident():
        for name in CASES:
            watch, rows, seen = Watch(patch), [], 0
            for batch, embeds in sample_responses(policy, mine, settings[name], batch_size, *IDENTITY):
                rows += PromptResponses.split(batch)
                # the caller uses the stages while other batches are in flight
                groups = GroupBatch(batch.prompts, batch.response_ids, batch.response_lengths, embeds)
                output = policy.forward([groups], temperature=settings[name].temperature or 1.0)[0].tokens
                if output is not None:
                    assert torch.allclose(output.logprobs * groups.response_mask, batch.rollout_logprobs, atol=1e-4)
                seen += len(batch.prompts)
            assert seen == len(mine)
            found[name], notes[name] = rows, (watch.passes, watch.rows)
            patch.undo()
    everything = gather_objects(found, policy.process_groups.data)
    stop_groups()
    return {name: [row for part in everything for row in part[name]] for name in CASES}, notes


#          world, tensor, pipeline, batch size, block of the cache
LAYOUTS = {
    "one process, all at once": (1, 1, 1, 6, 64),
    "one process, by two, block 3": (1, 1, 1, 2, 3),
    "TP=2": (2, 2, 1, 6, 4),
    "PP=2": (2, 1, 2, 2, 5),
    "PP=4": (4, 1, 4, 1, 64),
    "TP=2 PP=2": (4, 2, 2, 2, 2),
    "DP=2, unequal": (2, 1, 1, 3, 64),
    "DP=3, one with nothing": (3, 1, 1, 2, 64),
    "PP=2 DP=2": (4, 1, 2, 1, 7),
}


SIMPLER = ("TP=2", "PP=2", "DP=2, unequal")
"""Layouts that differ from another one of the table in nothing but its further dimensions."""


def check_layout(wanted, layout):
    path, settings, slow = wanted
    world, *rest = LAYOUTS[layout]
    results = run_ranks(world, generated, path, settings, *rest)
    for found, _ in results:
        for name in CASES:
            assert len(found[name]) == NUM_PROMPTS
            for mine, theirs in zip(found[name], slow[name]):
                length = min(mine.response_ids.shape[1], R)  # padded to the longest of its batch
                assert mine.response_lengths.tolist() == theirs.response_lengths.tolist(), name
                assert torch.equal(mine.response_ids, theirs.response_ids[:, :length]), name
                assert torch.equal(mine.finished, theirs.finished), name
                assert torch.allclose(mine.rollout_logprobs, theirs.rollout_logprobs[:, :length], atol=1e-4), name
    if world == rest[0] * rest[1]:
        for _, notes in results:
            assert notes == results[0][1], "every rank must take the same turns"


@pytest.mark.parametrize("layout", chosen(list(LAYOUTS), [name for name in LAYOUTS if name not in SIMPLER]))
def test_equals_a_loop_without_cache(wanted, layout):
    check_layout(wanted, layout)


@pytest.mark.parametrize("layout", ["one process, by two, block 3", "TP=2 PP=2"])
def test_other_families_equal_a_loop_without_cache(wanted_of_others, layout):
    """Qwen3-VL: the tower adds to the first two layers, and queries and keys are normed. InternVL: tiles.
    Qwen3.5: half of the layers have a state in place of a cache."""
    check_layout(wanted_of_others, layout)


def test_batches_take_turns_on_the_stages(wanted):
    """With two stages two batches are in flight; few prompts are spread over them; the next takes the turn of the one
    that ended."""
    path, settings, _ = wanted
    for batch_size, count in ((6, 2), (2, 4)):
        _, notes = run_ranks(2, generated, path, settings, 1, 2, batch_size, 64)[0]
        passes = notes["free"][0]
        batches = list(dict.fromkeys(identities for identities, _ in passes))
        assert len(batches) == count
        assert passes == [
            (batches[first + index], step) for first in range(0, count, 2) for step in range(R) for index in (0, 1)
        ]
    # a batch that ends early hands its turn on while the other goes on
    _, notes = run_ranks(2, generated, path, settings, 1, 2, 1, 64)[0]
    passes = notes["greedy"][0]
    batches = list(dict.fromkeys(identities for identities, _ in passes))
    last = {batch: max(index for index, (other, _) in enumerate(passes) if other == batch) for batch in batches}
    assert len(batches) == NUM_PROMPTS
    assert any(passes.index((batches[index], 0)) < last[batches[index - 1]] for index in range(2, len(batches)))


def test_ended_rows_leave(wanted):
    """Ended rows take less than running ones, whenever they end; without the rule every row would be fed to the end."""
    path, settings, slow = wanted
    _, notes = run_ranks(1, generated, path, settings, 1, 1, NUM_PROMPTS, 64)[0]
    for name, case in CASES.items():
        lengths = torch.cat([row.response_lengths for row in slow[name]])
        running, fed = int((lengths - 1).sum()), notes[name][1]
        assert running <= fed < 2 * running, name
        if case.ends:
            assert fed < 0.9 * len(lengths) * (int(lengths.max()) - 1), name
        else:
            assert fed == running == len(lengths) * (R - 1)


def without_visual_tokens(path, tensor, pipeline):
    """Responses and log-probabilities' differences where what this model likes most would be visual tokens."""
    policy, prompts = open_policy(path, tensor, pipeline)[3], pad_prompts(read(path), 0)
    embeds, found = policy.encode_visual(prompts), {}
    for temperature in (0.0, 1.0):
        settings, rows = SamplingSettings(2, R, -1, 0, temperature), []
        for forbidden in (policy.shape.visual_token_ids, None):
            if forbidden is None:
                likely = rows[0].response_ids.flatten().bincount().topk(12).indices.tolist()
                policy.shape = replace(policy.shape, visual_token_ids=tuple(likely))
            batch = generate(policy, prompts, embeds, settings, *IDENTITY)
            groups = GroupBatch(batch.prompts, batch.response_ids, batch.response_lengths, embeds)
            output = policy.forward([groups])[0].tokens
            if output is not None:
                assert torch.allclose(output.logprobs, batch.rollout_logprobs, atol=1e-4)
            rows.append(batch)
        found[temperature] = likely, [batch.response_ids for batch in rows]
    stop_groups()
    return found


@pytest.mark.parametrize("layout", ["one process, all at once", "TP=2", "PP=2"])
def test_visual_tokens_are_never_drawn_and_log_probabilities_are_those_of_the_update(material, layout):
    world, tensor, pipeline, *_ = LAYOUTS[layout]
    for found in run_ranks(world, without_visual_tokens, str(material["tiny"]), tensor, pipeline):
        for temperature, (likely, (free, forbidden)) in found.items():
            assert torch.isin(free, torch.tensor(likely)).float().mean() > 0.1, temperature
            assert not torch.isin(forbidden, torch.tensor(likely)).any(), temperature


def one_batch(path, settings, tensor, pipeline):
    policy, prompts = open_policy(path, tensor, pipeline)[3], pad_prompts(read(path), 0)
    embeds = policy.encode_visual(prompts)
    result = {
        name: PromptResponses.split(generate(policy, prompts, embeds, settings[name], *IDENTITY)) for name in CASES
    }
    stop_groups()
    return result


def test_the_simple_call_is_the_same(wanted):
    path, settings, slow = wanted
    for found in run_ranks(2, one_batch, path, settings, 1, 2):
        for name in CASES:
            for mine, theirs in zip(found[name], slow[name]):
                assert torch.equal(mine.response_ids, theirs.response_ids[:, : mine.response_ids.shape[1]])
                assert mine.response_lengths.tolist() == theirs.response_lengths.tolist()


def draws(world):
    """True if 300 rows, flat to peaked, with ties, draw from tensor ranks' shares the whole vocabulary's tokens."""
    process_groups = start_groups(tensor_size=world, pipeline_size=1, seed=0)
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(300, 48, generator=generator) * torch.linspace(0.1, 8, 300)[:, None] * 4).round() / 4
    uniform = torch.rand(300, generator=generator, dtype=torch.float64)
    mine = logits.chunk(world, dim=1)[process_groups.layout.tensor_rank]
    result = {}
    plain = ((0.0, 1.0, 0), (1.0, 1.0, 0), (0.7, 0.8, 0), (1.3, 1.0, 20), (0.0, 1.0, 20), (1.0, 0.6, 30))
    likely = tuple(logits.argmax(dim=1).bincount().topk(5).indices.tolist()) + (47,)
    for how in [(*item, ()) for item in plain] + [(*item, likely) for item in plain]:
        temperature, top_p, num_tokens, forbidden = how
        allowed, before = logits.clone(), mine.clone()
        allowed[:, list(forbidden)] = float("-inf")
        wanted = sample_tokens(allowed[:, : num_tokens or None], uniform, temperature, top_p)
        assert not set(wanted.tolist()) & set(forbidden)
        found = [
            begin_draw(
                mine,
                uniform,
                temperature,
                top_p,
                process_groups.tensor,
                num_tokens=num_tokens,
                forbidden=forbidden,
                num_candidates=count,
                on_host=on_host,
            ).finish()
            for count in (1, 4, 48)
            for on_host in (False, True)
        ]
        assert torch.equal(mine, before), "the update takes log-probabilities from the same logits"
        logprobs, _ = vocab_parallel_logprobs(mine / (temperature or 1.0), wanted, process_groups.tensor)
        for draw in found:
            assert torch.equal(draw.token, draw.token_on_host)
            torch.testing.assert_close(draw.logprob, logprobs, rtol=1e-5, atol=1e-5)
        result[how] = [torch.equal(draw.token, wanted) for draw in found], len(wanted.unique())
    stop_groups()
    return result


@pytest.mark.parametrize("world", [1, 2, 4])
def test_tensor_ranks_draw_what_one_would(world):
    for result in run_ranks(world, draws, world):
        for how, (equal, different) in result.items():
            assert all(equal), (how, equal)
            assert different > 10


def draw_from_broken_logits(world: int) -> str:
    process_groups = start_groups(tensor_size=world, pipeline_size=1, seed=0)
    logits = torch.randn(3, 48, generator=torch.Generator().manual_seed(0))
    if process_groups.layout.tensor_rank == 0:
        logits[1, 5] = float("nan")
    message = ""
    try:
        begin_draw(logits, torch.full((3,), 0.5), 1.0, 1.0, process_groups.tensor, num_candidates=4).finish()
    except UserError as error:
        message = str(error)
    stop_groups()
    return message


def test_logits_that_are_not_a_number_end_the_rollout_with_a_sentence_on_all_ranks():
    for message in run_ranks(2, draw_from_broken_logits, 2):
        assert "logits that are not a number" in message and "learning_rate" in message
