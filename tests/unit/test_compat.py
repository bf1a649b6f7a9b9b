"""Every workaround in `compat/` is still needed. A test that fails here names a workaround that can be removed."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

COMPAT = Path(__file__).parents[2] / "megatron_ral" / "compat"


@pytest.mark.parametrize(
    "path", sorted({*COMPAT.glob("[!_]*.py")} - {COMPAT / "versions.py"}), ids=lambda path: path.stem
)
def test_every_workaround_names_its_versions_and_the_test_that_retires_it(path):
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert re.search(r"^Tried on: .*(megatron-core 0\.16\.1|DeepSpeed 0\.19\.8)", text, re.MULTILINE)
    named = re.findall(r"`(test_\w+)`", text[text.index("Retired by:") :])
    assert named and all(name in globals() for name in named)


def test_megatron_schedules_still_name_cuda():
    from megatron.core.pipeline_parallel import p2p_communication, schedules

    assert 'device="cuda"' in inspect.getsource(schedules.forward_backward_no_pipelining)
    assert "torch.cuda.current_device()" in inspect.getsource(p2p_communication)


def test_fake_cuda_tensors_still_need_a_device():
    program = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
with FakeTensorMode():
    torch.empty(2, device="cuda", requires_grad=True).sum().backward()
"""
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode != 0


def test_megatron_still_forms_rotations_in_every_layer():
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.transformer import attention

    assert "torch.cos(freqs)" in inspect.getsource(rope_utils._apply_rotary_pos_emb_bshd)
    assert "query = apply_rotary_pos_emb(" in inspect.getsource(attention.Attention)


@pytest.mark.parametrize("library", ["megatron.core", "deepspeed.runtime.zero.muon.original_muon"])
def test_libraries_still_compile_functions_while_they_are_imported(library):
    program = f"import sys, {library}; print('torch._inductor.compile_fx' in sys.modules)"
    output = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True).stdout
    assert output.split()[-1] == "True"


def test_commands_import_libraries_without_the_compiler():
    program = """
import sys, torch
compile = torch.compile
from megatron_ral.commands.common import import_libraries
import_libraries()
from megatron.core.fusions.fused_bias_gelu import bias_gelu
import megatron_ral.training.trainer
import deepspeed.runtime.zero.muon.muon_optimizer
print("megatron.core" in sys.modules, "torch._inductor.compile_fx" in sys.modules, torch.compile is compile)
"""
    output = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True).stdout
    assert output.split() == ["True", "False", "True"]


def test_a_function_is_compiled_once_at_its_first_call(monkeypatch):
    from megatron_ral.compat import lazy_compile as lazy

    compiled = []

    def record(model, **options):
        compiled.append((model, options))
        return lambda *args: ("compiled", *args)

    monkeypatch.setattr(lazy, "_compile", record)

    @lazy.compile_at_first_call
    def plain(value):
        """Text."""

    @lazy.compile_at_first_call(dynamic=True)
    def with_options(value): ...

    assert not compiled and plain.__doc__ == "Text."
    assert [plain(1), plain(2), with_options(3)] == [("compiled", 1), ("compiled", 2), ("compiled", 3)]
    assert [(model.__name__, options) for model, options in compiled] == [
        ("plain", {}),
        ("with_options", {"dynamic": True}),
    ]
    module = torch.nn.Identity()  # compiled at once: it is an object that others read
    lazy.compile_at_first_call(module, mode="default")
    assert compiled[-1] == (module, {"mode": "default"})


def test_a_compiled_function_holds_another_in_its_own_graph(monkeypatch):
    """Functions of megatron-core call each other, and are then one graph, as behind torch.compile."""
    from torch._dynamo.testing import CompileCounter

    from megatron_ral.compat import lazy_compile as lazy

    counter, compile_now = CompileCounter(), torch.compile
    monkeypatch.setattr(lazy, "_compile", lambda model, **options: compile_now(model, backend=counter, **options))

    @lazy.compile_at_first_call
    def inner(value):
        return value * 2

    @lazy.compile_at_first_call
    def outer(value):
        return inner(value) + 1

    value = torch.ones(3)
    assert [outer(value).sum() for _ in range(3)] == [9.0] * 3 and counter.frame_count == 1
    assert inner(value).sum() == 6.0 and outer(value).sum() == 9.0 and counter.frame_count == 2


def test_deepspeed_still_compiles_a_collective_on_cpu():
    assert hasattr(importlib.import_module("deepspeed.comm.torch"), "build_shm_op")


def method_source(owner: type, name: str) -> str:
    """Return the source of a method, without following decorators of the third party."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(owner)))
    return next(ast.unparse(node) for node in tree.body[0].body if getattr(node, "name", "") == name)


def test_megatron_still_forgets_to_cut_the_output_gate():
    from megatron.core.transformer.attention import SelfAttention

    source = method_source(SelfAttention, "get_query_key_value_tensors")
    assert "query = query[:, :, idx * size" in source and "gate = gate[:, :, idx * size" not in source
    with pytest.raises(RuntimeError):  # four heads of gates for two heads of outputs
        SelfAttention._apply_output_gate(None, torch.ones(1, 1, 2 * 8), torch.ones(1, 1, 4, 8))


def test_deepspeed_norm_still_counts_tied_copies():
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as optimizer

    assert "shared" not in method_source(optimizer, "get_grad_norm_direct")
    assert "self.get_grad_norm_direct" in method_source(optimizer, "_get_norm_groups")
    assert "self._get_norm_groups()" in method_source(optimizer, "step"), "where ours is put in"


def test_deepspeed_norm_of_an_offloaded_optimizer_is_still_taken_when_gradients_are_reduced():
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as optimizer

    assert "self.norm_for_param_grads[" in method_source(optimizer, "_offload_grad_partition_at_boundary")


def test_deepspeed_still_reduces_only_at_the_end_of_a_coalesced_step():
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as optimizer

    source = method_source(optimizer, "reduce_ready_partitions_and_remove_grads")
    assert "if self._coalesce_grad_reduction:\n        return" in source


def test_deepspeed_still_reduces_after_an_error():
    from deepspeed.runtime.engine import DeepSpeedEngine

    tree = ast.parse(method_source(DeepSpeedEngine, "coalesce_grad_reduction"))
    finals = [ast.unparse(part) for node in ast.walk(tree) if isinstance(node, ast.Try) for part in node.finalbody]
    assert any("self._flush_coalesced_reduction_zero3(optimizer)" in part for part in finals)
    assert not any(node.handlers for node in ast.walk(tree) if isinstance(node, ast.Try))


def test_megatron_still_lacks_the_names_deepspeed_calls():
    from megatron.core import parallel_state

    assert not hasattr(parallel_state, "get_model_parallel_world_size")


def test_deepspeed_still_compares_module_order_over_all_ranks():
    from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator

    source = inspect.getsource(coordinator.PartitionedParameterCoordinator.reset_step)
    assert "assert_ints_same_as_other_ranks" in source


def test_megatron_still_keeps_one_layout_in_globals():
    from megatron.core import parallel_state

    assert "global _TENSOR_MODEL_PARALLEL_GROUP" in inspect.getsource(parallel_state.initialize_model_parallel)
    assert "return _TENSOR_MODEL_PARALLEL_GROUP" in inspect.getsource(parallel_state.get_tensor_model_parallel_group)


def test_a_layout_that_was_put_aside_comes_back():
    from megatron.core import parallel_state

    from megatron_ral.compat.model_layouts import layout_globals, no_layout, use_layout

    name = "_MPU_TENSOR_MODEL_PARALLEL_WORLD_SIZE"
    with use_layout({name: 5}), no_layout():
        assert layout_globals()[name] is None
        with use_layout({name: 3}):
            assert getattr(parallel_state, name) == 3
        assert getattr(parallel_state, name) is None
    assert getattr(parallel_state, name) is None
    with pytest.raises(RuntimeError), use_layout({name: 5}):
        raise RuntimeError
    assert getattr(parallel_state, name) is None


def test_cpu_shims_refuse_a_machine_with_an_accelerator(monkeypatch):
    from megatron_ral.compat import cpu_backend

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(AssertionError, match="accelerator"):
        cpu_backend.install()
