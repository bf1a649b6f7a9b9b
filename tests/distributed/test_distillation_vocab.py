"""Token distillation over real tensor-parallel ranks: values and gradients against the definition over the whole
vocabulary in float64, what is kept for the backward pass, and what is alive at any time."""

import weakref

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_ral.functional import distillation_loss
from megatron_ral.parallel.collectives import gather_shards
from megatron_ral.parallel.process_groups import start_groups, stop_groups
from megatron_ral.parallel.vocab_distillation import (
    vocab_parallel_divergence,
    vocab_parallel_top_divergence,
    vocab_parallel_top_tokens,
)
from tests.distributed.runner import run_ranks
from tests.unit.distillation_references import KINDS, NAMES, by_definition, of_logprobs, rand

LEADING, V, PADDED, K = (3, 4), 22, 32, 5  # on four ranks the last holds padding alone
GRAD = rand(*LEADING, seed=3)


def logits(seed, dtype=torch.float32):
    values = 3 * rand(*LEADING, V, seed=seed, dtype=dtype)
    return torch.cat([values, torch.full((*LEADING, PADDED - V), -1e9, dtype=dtype)], -1)


def shard(tensor, groups):
    layout = groups.layout
    return tensor.chunk(layout.tensor_size, -1)[layout.tensor_rank].contiguous()


def gathered(value, student, groups):
    (gradient,) = torch.autograd.grad(value, student, GRAD.to(value.dtype))
    return value.detach(), torch.cat(gather_shards(gradient, groups.tensor), -1)


def alone():
    """A group of this rank only: a teacher in another layout."""
    return [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]


def values_and_gradients(tensor: int):
    process_groups = start_groups(tensor_size=tensor, pipeline_size=1, seed=0)
    own, results = alone(), {}
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher = (logits(seed, dtype) for seed in (1, 2))
        student_v, teacher_v = (
            shard(student, process_groups).requires_grad_(),
            shard(teacher, process_groups).requires_grad_(),
        )
        for name, divergence in zip(NAMES, KINDS):
            tokens, tokens_alone, tokens_same = (
                vocab_parallel_top_tokens(of, K, divergence.temperature, group)
                for of, group in (
                    (teacher_v, process_groups.tensor),
                    (teacher, own),
                    (student_v, process_groups.tensor),
                )
            )
            full = {"full": teacher_v, "zero": student_v.detach().clone()}
            top = {"top": tokens, "top_alone": tokens_alone, "zero_top": tokens_same}
            values = {
                form: vocab_parallel_divergence(student_v, of, divergence, process_groups.tensor)
                for form, of in full.items()
            }
            values |= {
                form: vocab_parallel_top_divergence(student_v, of, divergence, process_groups.tensor)
                for form, of in top.items()
            }
            results[name, dtype] = {form: gathered(value, student_v, process_groups) for form, value in values.items()}
            results[name, dtype]["tokens"] = tokens
    empty = vocab_parallel_divergence(student_v[:0], teacher_v[:0], KINDS[0], process_groups.tensor)
    assert empty.shape == (0, 4) and vocab_parallel_top_tokens(student_v[:0], K, 1.0, own).logprobs.shape == (0, 4, K)
    stop_groups()
    return results


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_values_and_gradients_equal_the_definition(tensor):
    ranks = run_ranks(tensor, values_and_gradients, tensor)
    for (name, dtype), first in ranks[0].items():
        divergence = KINDS[NAMES.index(name)]
        student, teacher = (logits(seed, dtype)[..., :V].double() for seed in (1, 2))
        log_p = torch.log_softmax(teacher / divergence.temperature, -1)
        chosen = torch.zeros_like(log_p, dtype=torch.bool).scatter(-1, first["tokens"].indices, True)

        def outcomes(logprobs, chosen=chosen, first=first):
            others = logprobs.masked_fill(chosen, float("-inf")).logsumexp(-1, keepdim=True)
            return torch.cat([logprobs.gather(-1, first["tokens"].indices), others], -1)

        student.requires_grad_()
        log_q = torch.log_softmax(student / divergence.temperature, -1)
        wanted = {
            "full": by_definition(student, teacher, divergence),
            "top": of_logprobs(outcomes(log_q), outcomes(log_p), divergence),
        }
        wanted["top_alone"] = wanted["top"]
        exact = torch.allclose(log_p.gather(-1, first["tokens"].indices), log_p.topk(K, -1).values)  # bfloat16 has ties
        assert exact and (log_p.gather(-1, first["tokens"].indices) - first["tokens"].logprobs).abs().max() < 1e-5
        assert (outcomes(log_p)[..., -1] - first["tokens"].others).abs().max() < 1e-5
        for result in ranks:
            for form, value in wanted.items():
                (gradient,) = torch.autograd.grad(value, student, GRAD, retain_graph=True)
                ours, ours_gradient = result[name, dtype][form]
                assert ours.shape == LEADING and ours.dtype == torch.float32 and ours_gradient.dtype == dtype
                assert (ours - value).abs().max() < 1e-5 and value.max() > 0.02, (name, form)
                tolerance = 1e-5 if dtype == torch.float32 else 2**-8 * gradient.abs().max()
                assert (ours_gradient[..., :V] - gradient).abs().max() < tolerance, (name, form)
                assert gradient.abs().max() > 1e-2 and not ours_gradient[..., V:].any()
                assert torch.equal(ours, first[form][0])
            for form in ("zero", "zero_top"):
                assert not any(part.any() for part in result[name, dtype][form]), (name, form)


def shapes_refused(tensor: int):
    process_groups = start_groups(tensor_size=tensor, pipeline_size=1, seed=0)
    teacher = vocab_parallel_top_tokens(torch.zeros(4, 6), 3, 1.0, process_groups.tensor)
    for call, message in (
        (
            lambda: vocab_parallel_divergence(torch.zeros(4, 6), torch.zeros(4, 12), KINDS[0], process_groups.tensor),
            r"\(4, 6\) of the student and \(4, 12\) of the teacher",
        ),
        (
            lambda: vocab_parallel_divergence(torch.zeros(1, 6), torch.zeros(4, 6), KINDS[0], process_groups.tensor),
            r"\(1, 6\) of the student and \(4, 6\) of the teacher",
        ),
        (
            lambda: vocab_parallel_top_divergence(torch.zeros(5, 6), teacher, KINDS[0], process_groups.tensor),
            r"\(5, 6\).*\(4, 3\)",
        ),
        (
            lambda: vocab_parallel_top_divergence(
                torch.zeros(4, 6), teacher._replace(others=torch.zeros(3)), KINDS[0], process_groups.tensor
            ),
            r"others \(3,\)",
        ),
        (
            lambda: vocab_parallel_top_tokens(torch.zeros(4, 6), 13, 1.0, process_groups.tensor),
            "k = 13 is not in 1 .. 12",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    stop_groups()


def test_shapes_that_do_not_go_together_are_refused():
    run_ranks(2, shapes_refused, 2)


class Alive(TorchDispatchMode):
    """Most elements alive at once in tensors made inside, views not counted."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        known = {leaf.untyped_storage().data_ptr() for leaf in given}
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.numel() and leaf.untyped_storage().data_ptr() not in known:
                self.now += leaf.numel()
                weakref.finalize(leaf, self.free, leaf.numel())
        self.peak = max(self.peak, self.now)
        return result

    def free(self, elements):
        self.now -= elements


def elements(tensor: int):
    """Elements and bytes kept for the backward pass, and the most elements alive in each direction, for both forms."""
    process_groups = start_groups(tensor_size=tensor, pipeline_size=1, seed=0)
    distillation_loss._CHUNK_ELEMENTS = 1 << 10
    rows, columns, found = 256, 1024, {}
    for name, divergence in zip(NAMES, KINDS):
        student_v, teacher_v = (rand(rows, columns, seed=seed, dtype=torch.bfloat16) for seed in (1, 2))
        student_v.requires_grad_()
        tokens = vocab_parallel_top_tokens(teacher_v, K, divergence.temperature, process_groups.tensor)
        for form, function, teacher in (
            ("full", vocab_parallel_divergence, teacher_v),
            ("top", vocab_parallel_top_divergence, tokens),
        ):
            saved, forward, backward = [], Alive(), Alive()
            with (
                torch.autograd.graph.saved_tensors_hooks(
                    lambda tensor, saved=saved: saved.append(tensor) or tensor, lambda tensor: tensor
                ),
                forward,
            ):
                value = function(student_v, teacher, divergence, process_groups.tensor)
            with backward:
                (gradient,) = torch.autograd.grad(value.sum(), student_v)
            assert gradient.abs().max() > 0
            count = sum(tensor.numel() for tensor in saved), sum(tensor.nbytes for tensor in saved)
            found[form, name] = *count, forward.peak, backward.peak
    stop_groups()
    return rows, columns, found


@pytest.mark.parametrize("tensor", [1, 2])
def test_memory_is_that_of_the_logits(tensor):
    for rows, columns, found in run_ranks(tensor, elements, tensor):
        for (form, name), (saved, saved_bytes, forward, backward) in found.items():
            wanted = 2 * rows * columns + 5 * rows if form == "full" else rows * (columns + 2 * K + 3)
            assert saved == wanted, (form, name, saved)
            assert saved_bytes == 2 * wanted + rows * (10 if form == "full" else 8 * K + 6), "bfloat16 logits stay so"
            assert forward < 0.3 * rows * columns and backward < 1.3 * rows * columns, (form, name, forward, backward)
            assert backward >= rows * columns, "the count must see the gradient"
