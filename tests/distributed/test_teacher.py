"""A teacher in a layout of its own: the same losses, gradients and weights as one process, whatever the two layouts
are; nothing where teacher and student are one model; and against stock transformers in float64."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForImageTextToText

from megatron_ral.config.distill import DistillConfig
from megatron_ral.data.loader import open_sources
from megatron_ral.data.processor import PromptProcessor
from megatron_ral.engine.decoding_batch import SamplingSettings
from megatron_ral.engine.settings import EngineSettings
from megatron_ral.engine.teacher import TeacherEngine
from megatron_ral.evaluation.prompt_set import read_prompts
from megatron_ral.models.shape import read_shape
from megatron_ral.objectives.base import finish_metrics
from megatron_ral.objectives.distillation import AttentionDistillationTerm, TokenDistillationTerm
from megatron_ral.parallel.collectives import gather_objects
from megatron_ral.parallel.process_groups import another_layout, start_groups, stop_groups
from megatron_ral.training.step import StepSettings, add_teacher_outputs
from tests.distributed.cases import fixed_groups, fixed_minibatch, full_weights, open_policy
from tests.distributed.runner import run_ranks
from tests.distributed.test_layouts import close
from tests.tiers import chosen

SETTINGS = {
    "paper": {"attention_layers": (-1,)},
    "all layers, predicting rows": {
        "token_divergence": "jsd",
        "beta": 0.3,
        "attention_row": "predictor",
        "attention_coef": 3.0,
    },
    "top tokens, visual keys": {
        "token_divergence": "forward_kl",
        "top_tokens": 9,
        "temperature": 1.5,
        "attention_keys": "visual",
        "attention_layers": (0, 2),
        "attention_normalizer": "sequence_sum",
        "attention_rows": "shuffled",
    },
    "tokens alone": {"attention_coef": 0.0, "token_coef": 0.5},
    "attention alone": {"token_coef": 0.0, "attention_divergence": "reverse_kl", "attention_row_cap": 1.0},
}
#            world, student (tensor, pipeline), teacher (tensor, pipeline), micro-batch
LAYOUTS = {
    "student PP=2, teacher TP=2": (2, (1, 2), (2, 1), 2),
    "student TP=2, teacher PP=2": (2, (2, 1), (1, 2), 2),
    "student DP=2, teacher TP=2": (2, (1, 1), (2, 1), 1),
    "student TP=2 PP=2, teacher DP=4": (4, (2, 2), (1, 1), 4),
    "student DP=4, teacher TP=2 PP=2": (4, (1, 1), (2, 2), 2),
    "same layout, TP=2 PP=2": (4, (2, 2), (2, 2), 4),
}


def open_teacher(opened, path, layout, **settings):
    """Teacher and term for an open policy."""
    config, process_groups, shape, _, objective = opened
    config = replace(config, distill=DistillConfig(**settings))
    processor = PromptProcessor(config.model.path, 128)
    teacher = TeacherEngine(
        read_shape(path),
        another_layout(process_groups, tensor_size=layout[0], pipeline_size=layout[1]),
        EngineSettings(path, "float32"),
        student=process_groups,
        student_shape=shape,
        processor=processor,
    )
    layers = shape.layer_indices(config.distill.attention_layers) or range(shape.num_layers)
    terms = (
        *objective.terms,
        TokenDistillationTerm(config.distill, process_groups.tensor, teacher.head),
        AttentionDistillationTerm(config.distill, frozenset(layers)),
    )
    return config, teacher, replace(objective, terms=terms)


def steps(paths, student, teacher_layout, micro_batch_size) -> dict:
    """One optimizer step per setting: losses, norms, and how the weights change."""
    path, other, teacher_path, data = paths
    process_groups = start_groups(tensor_size=student[0], pipeline_size=student[1], seed=0)
    result = {}
    for name, settings in SETTINGS.items():
        opened = open_policy(path, *student, process_groups, attention_coef=0.5)
        policy = opened[3]
        config, teacher, objective = open_teacher(opened, teacher_path, teacher_layout, **settings)
        minibatch = fixed_minibatch(opened, other, data, micro_batch_size)
        held = [parameter.ds_tensor.clone() for parameter in teacher.stage.parameters()]
        minibatch = add_teacher_outputs(teacher, minibatch, objective, StepSettings.from_config(config), step=4)
        assert not any(row.requires_grad for batch in minibatch for row in batch.teacher.attention.values())
        before, norms = full_weights(policy), {}
        parts = {"distill_attention": objective.only("distill_attention"), "attention": objective.only("attention")}
        for name_of_part, part in {**parts, "tokens": objective.without("attention")}.items():
            policy.forward_backward(minibatch, part)
            norms[f"norm of {name_of_part}"] = policy.gradient_norm(policy.gradient_shards())
        metrics = finish_metrics(policy.forward_backward(minibatch, objective))
        norm = policy.step().grad_norm
        after = full_weights(policy)
        assert all(
            parameter.grad is None and torch.equal(parameter.ds_tensor, old)
            for parameter, old in zip(teacher.stage.parameters(), held)
        )
        result[name] = {
            "metrics": {**metrics, **norms, "grad_norm": norm},
            "changes": {key: after[key] - before[key] for key in after},
        }
    stop_groups()
    return result


@pytest.fixture(scope="module")
def paths(material):
    return tuple(str(material[name]) for name in ("tiny", "tiny_other", "teacher", "data"))


@pytest.fixture(scope="module")
def alone(paths):
    return run_ranks(1, steps, paths, (1, 1), (1, 1), 8)[0]


def test_every_term_acts_in_one_process(alone):
    """The comparison would be worth little if a term were zero."""
    for name, settings in SETTINGS.items():
        metrics = alone[name]["metrics"]
        for key in (
            "distill/token_divergence",
            "distill/attention_divergence",
            "distill/teacher_target_mass",
            "distill/student_target_mass",
            "norm of attention",
            "norm of tokens",
        ):
            assert metrics[key] > 1e-4, (name, key, metrics[key])
        assert (metrics["norm of distill_attention"] > 1e-4) == (settings.get("attention_coef", 1.0) > 0), name
    assert alone["tokens alone"]["metrics"]["norm of tokens"] != alone["attention alone"]["metrics"]["norm of tokens"]


@pytest.mark.parametrize(
    "layout",
    chosen(list(LAYOUTS), [name for name in LAYOUTS if "=4" in name or name == "student PP=2, teacher TP=2"]),
)
def test_layouts_equal_one_process(paths, alone, layout):
    world, student, teacher, micro_batch_size = LAYOUTS[layout]
    for rank, result in enumerate(run_ranks(world, steps, paths, student, teacher, micro_batch_size, timeout=420.0)):
        for name, wanted in alone.items():
            for key, value in wanted["metrics"].items():
                close(f"rank {rank}, {name}, {key}", result[name]["metrics"][key], value)
            if rank == 0:
                for key, change in wanted["changes"].items():
                    assert (result[name]["changes"][key] - change).norm() <= 1e-3 * change.norm(), (name, key)


# --- one model as teacher and student ---------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that is made inside, views of `known` left out."""

    def __init__(self, known):
        super().__init__()
        self.known, self.numel = known.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if torch.is_tensor(tensor) and tensor.untyped_storage().data_ptr() != self.known:
                self.numel = max(self.numel, tensor.numel())
        return result


def learn_from_itself(path, data, layout, top_tokens) -> dict:
    process_groups = start_groups(tensor_size=layout[0], pipeline_size=layout[1], seed=0)
    opened = open_policy(path, *layout, process_groups, kl_coef=0.0, attention_coef=0.0, policy_coef=0.0)
    policy = opened[3]
    config, teacher, objective = open_teacher(opened, path, layout, top_tokens=top_tokens)
    minibatch = add_teacher_outputs(
        teacher, fixed_minibatch(opened, path, data, 4), objective, StepSettings.from_config(config), step=0
    )
    seen = {}

    class Spy:
        """The objective, with the memory of its token loss measured."""

        def __getattr__(self, name):
            return getattr(objective, name)

        def token_loss(self, outputs, batch):
            with LargestTensor(teacher.head.weight) as largest:
                result = objective.token_loss(outputs, batch)
            rows = int(batch.groups.response_lengths.sum())  # padding has no logits
            seen["share"] = largest.numel / (rows * policy.shape.padded_vocab_size(layout[0]) / layout[0])
            return result

    metrics = finish_metrics(policy.forward_backward(minibatch, Spy()))
    norm = policy.gradient_norm(policy.gradient_shards())
    stop_groups()
    return {**metrics, "norm": norm, **seen}


@pytest.mark.parametrize("layout", [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("top_tokens", [0, 5])
def test_a_teacher_that_is_the_student_teaches_nothing(material, layout, top_tokens):
    """Both terms and the whole gradient are exactly 0; logits take no more than rows x V / TP."""
    results = run_ranks(
        layout[0] * layout[1], learn_from_itself, str(material["tiny"]), str(material["data"]), layout, top_tokens
    )
    for result in results:
        for name in ("distill/token_divergence", "distill/attention_divergence", "norm", "loss/token"):
            assert result[name] == 0.0, name
        assert result["distill/agreement"] == 1.0
        assert result["distill/student_target_mass"] == result["distill/teacher_target_mass"] > 0
    assert results[-1]["share"] == 1.0


# --- stock transformers -----------------------------------------------------------------------------------------------


def measured(path, teacher_path, data, settings) -> dict:
    process_groups = start_groups(tensor_size=1, pipeline_size=1, seed=0)
    opened = open_policy(path, 1, 1, process_groups, attention_coef=0.0)
    config, teacher, objective = open_teacher(opened, teacher_path, (1, 1), **settings)
    minibatch = add_teacher_outputs(
        teacher, fixed_minibatch(opened, path, data, 8), objective, StepSettings.from_config(config), step=0
    )
    result = finish_metrics(opened[3].forward_backward(minibatch, objective))
    stop_groups()
    return result


@pytest.mark.parametrize("row", ["token", "predictor"])
def test_divergences_equal_those_of_stock_transformers(material, paths, row):
    """Full vocabularies and eager attention in float64, a loop over rows."""
    path, _, teacher_path, data = paths
    (found,) = run_ranks(1, measured, path, teacher_path, data, {"attention_row": row})
    models = [
        AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager").double().eval()
        for folder in (path, teacher_path)
    ]
    # student layer -> teacher layer at the same share of the depth, of 4 and 6 layers
    match = {0: 1, 1: 2, 2: 4, 3: 5}
    processor, count, kl, jsd, agreed = PromptProcessor(path, 128), 0, 0.0, 0.0, 0
    for prompt, ids, lengths, _ in fixed_groups(path, data):
        P = len(prompt.input_ids)
        for g in range(len(ids)):
            tokens = torch.cat([prompt.input_ids, ids[g, : lengths[g]]])
            inputs = {
                name: value.double() if value.is_floating_point() else value
                for name, value in processor.stock_inputs(prompt, tokens).items()
            }
            with torch.no_grad():
                student, teacher = (model(**inputs, output_attentions=True) for model in models)
            for t in range(P, len(tokens)):
                log_q, log_p = (out.logits[0, t - 1, :500].log_softmax(0) for out in (student, teacher))
                kl += float((log_q.exp() * (log_q - log_p)).sum())
                agreed += int(log_q.argmax() == log_p.argmax())
                at = t if row == "token" else t - 1
                for mine, theirs in match.items():
                    q, p = (
                        out.attentions[layer][0].mean(0)[at, :at] for out, layer in ((student, mine), (teacher, theirs))
                    )
                    q, p = q / q.sum(), p / p.sum()
                    m = (p + q) / 2
                    jsd += float((p * (p / m).log() + q * (q / m).log()).sum() / 2) / len(match)
                count += 1
    close("token divergence", found["distill/token_divergence"], kl / count)
    close("attention divergence", found["distill/attention_divergence"], jsd / count)
    close("agreement", found["distill/agreement"], agreed / count)
    assert found["loss/distill_attention"] == pytest.approx(jsd / count, rel=1e-5)


# --- the teacher's own responses --------------------------------------------------------------------------------------


def answers(paths, student, teacher_layout) -> list:
    """The teacher's responses to 6 prompts, of which data rank 0 asks 5 where there are two."""
    path, _, teacher_path, data = paths
    process_groups = start_groups(tensor_size=student[0], pipeline_size=student[1], seed=0)
    opened = open_policy(path, *student, process_groups)
    _, teacher, _ = open_teacher(opened, teacher_path, teacher_layout)
    prompts = read_prompts(
        open_sources([(f"{data}/rl-*.tar", 0)], "data.train")[0].shards, PromptProcessor(path, 128), 6
    )
    share = {1: [slice(0, 6)], 2: [slice(0, 5), slice(5, 6)]}[process_groups.layout.data_size][
        process_groups.layout.data_rank
    ]
    rows = teacher.answer(prompts[share], SamplingSettings(2, 6, 319, 0), 4, "seed")
    found = [row for part in gather_objects(rows, process_groups.data) for row in part]
    stop_groups()
    return [(row.response_ids.tolist(), row.response_lengths.tolist(), row.finished.tolist()) for row in found]


def test_the_teachers_responses_do_not_depend_on_the_layouts(paths):
    [wanted] = run_ranks(1, answers, paths, (1, 1), (1, 1))
    assert len(wanted) == 6 and len({str(row) for row in wanted}) == 6
    for student, teacher in (((1, 2), (2, 1)), ((1, 1), (1, 2)), ((2, 1), (1, 1))):
        for found in run_ranks(2, answers, paths, student, teacher):
            for mine, theirs in zip(found, wanted):
                longest = min(len(mine[0][0]), len(theirs[0][0]))  # padded to the longest of its batch
                assert [row[:longest] for row in mine[0]] == [row[:longest] for row in theirs[0]]
                assert mine[1:] == theirs[1:]
