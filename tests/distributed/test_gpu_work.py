"""One RL step on CUDA tensors without memory: no devices are mixed, and the host waits for the device where it must.

Every case is a process of its own, because a process can simulate either a GPU or the CPU.
"""

import shutil

import pytest
import torch

from megatron_ral.models.shape import read_shape
from megatron_ral.planning.launch_plan import LaunchPlan
from tests.distributed.cases import make_config
from tests.distributed.runner import run_ranks

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="the fakes need a C++ compiler"
)
TENSOR, PIPELINE = 2, 2


def plan_of(path, **loss):
    config = make_config(path, tensor=TENSOR, pipeline=PIPELINE, num_groups=16, dtype="bfloat16", **loss)
    return LaunchPlan.from_config(config, TENSOR * PIPELINE), read_shape(path)


def simulated(path, stage, loss):
    """Return the work of each phase of a stage: (kernels, recorded kernels, waits, attention calls, mask bytes)."""
    from megatron_ral.planning.simulate import simulate

    plan, shape = plan_of(path, **loss)
    rank = simulate(shape, plan, plan.layout.with_rank(plan.layout.rank_of(0, 0, stage)))
    return {
        name: (
            phase.seen.kernels.total(),
            phase.seen.recorded.total(),
            dict(phase.seen.waits),
            dict(phase.seen.attention),
            phase.seen.mask_bytes,
        )
        for name, phase in rank.phases.items()
    }


@pytest.mark.parametrize("family", ["tiny", "qwen3"])
@pytest.mark.parametrize("loss", [{}, {"attention_target": "hindsight"}], ids=["reference", "hindsight"])
def test_a_step_mixes_no_devices_and_waits_for_tokens_alone(material, family, loss):
    for stage in range(PIPELINE):
        [phases] = run_ranks(1, simulated, str(material[family]), stage, loss)
        kernels, recorded, waits, _, _ = phases["token"]
        assert kernels <= 8 and recorded > 50, "a pass over one token of each row is one launch of a graph"
        assert sum(waits.values()) == (1 if stage == PIPELINE - 1 else 0), waits  # other stages wait in `take`
        for name in ("old", "reference", "update"):
            _, _, waits, attention, mask_bytes = phases[name]
            assert mask_bytes == 0 and attention, name
            assert not any(what.startswith(("value", "size")) for what in waits), (name, waits)


def added_by_the_term(path, stage, loss):
    """Return kernels of a micro-batch by operator, as far as an update with recorded rows has more than one without."""
    from megatron_ral.planning.simulate import simulate, term_kernels

    plan, shape = plan_of(path, **loss)
    rank = simulate(shape, plan, plan.layout.with_rank(plan.layout.rank_of(0, 0, stage)))
    return {name: number for name, number in term_kernels(shape, plan, rank).items() if number > 0}


@pytest.mark.parametrize(
    "loss, most",
    [({}, 60), ({"attention_target": "old"}, 60), ({"attention_target": "contrast"}, 80)],  # two maps of rows
    ids=["reference", "old", "contrast"],
)
def test_the_attention_term_takes_few_kernels(material, loss, most):
    [kernels] = run_ranks(1, added_by_the_term, str(material["tiny"]), PIPELINE - 1, loss)
    assert {"_masses_of_rows", "_divergence_of_rows", "_slope_of_rows"} <= set(kernels)
    assert sum(kernels.values()) <= most, sorted(kernels.items(), key=lambda item: -item[1])


def planted(path, fault, stage):
    """Return the error of a step into which a tensor of the host was planted."""
    from megatron_ral.attention.shared_prompt import FlashKernel
    from megatron_ral.models import multimodal
    from megatron_ral.models.kv_cache import GroupKVCache
    from megatron_ral.objectives.attention import AttentionTerm
    from megatron_ral.parallel import vocab_sampling
    from megatron_ral.planning.simulate import simulate

    def to_host(owner, name):
        plain = getattr(owner, name)

        def on_host(*args, **kwargs):
            result = plain(*args, **kwargs)
            return result.cpu() if isinstance(result, torch.Tensor) else tuple(part.cpu() for part in result)

        setattr(owner, name, on_host)

    places = {
        "rotary angles": (multimodal, "rotary_angles"),
        "padding of the prompt": (GroupKVCache, "hidden_keys"),
        "logits of a draw": (vocab_sampling, "_allowed_logits"),
        "mask of the attention term": (AttentionTerm, "_mask"),
        "gradient of attention": (FlashKernel, "backward"),
    }
    to_host(*places[fault])
    plan, shape = plan_of(path)
    try:
        simulate(shape, plan, plan.layout.with_rank(plan.layout.rank_of(0, 0, stage)))
    except Exception as error:
        return " ".join(str(error).split())
    return "nothing"


@pytest.mark.parametrize(
    "fault",
    [
        "rotary angles",
        "padding of the prompt",
        "logits of a draw",
        "mask of the attention term",
        "gradient of attention",
    ],
)
def test_a_tensor_of_the_host_is_caught(material, fault):
    [error] = run_ranks(1, planted, str(material["tiny"]), fault, PIPELINE - 1)
    assert "device" in error and "cpu" in error and "cuda" in error, error


def test_known_integers_keep_their_device():
    [(devices, number, mixed)] = run_ranks(1, integers)
    assert devices == ["cuda:0", "cpu"] and number == 3 and "cuda" in mixed


def integers():
    from megatron_ral.compat import cuda_fakes
    from megatron_ral.planning.fakes import fake_tensors

    device = cuda_fakes.install()
    with fake_tensors():
        here, there = torch.arange(4, device=device), torch.arange(4)
        number = int((here > 0).sum())
        try:
            here + there
        except RuntimeError as error:
            return [str(here.device), str(there.device)], number, str(error)
    return [], number, "nothing"


def test_attention_in_float32_is_chosen_without_the_libraries_of_a_gpu():
    """A CUDA build of torch asks for cuDNN's version first."""
    assert run_ranks(1, attention_shapes) == [[(1, 2, 8, 16), (1, 2, 8, 16)]]


def attention_shapes():
    from megatron_ral.compat import cuda_fakes
    from megatron_ral.planning.fakes import fake_tensors

    device = cuda_fakes.install()
    with fake_tensors():
        rows = torch.empty(1, 2, 8, 16, device=device, requires_grad=True)
        masks = None, torch.ones(1, 1, 1, 8, dtype=torch.bool, device=device)
        attention = torch.nn.functional.scaled_dot_product_attention
        return [tuple(attention(rows, rows, rows, attn_mask=mask).shape) for mask in masks]
