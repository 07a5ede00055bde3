# SPDX-License-Identifier: Apache-2.0
"""Families: where units are and what belongs to them, against the models' own arithmetic written out slowly."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from shadowc.checkpoint.llama import LlamaFacts
from shadowc.checkpoint.opt import OptFacts
from shadowc.checkpoint.resolve import ModelCheckpoint
from shadowc.sparsity import record
from shadowc.sparsity.collect import collect
from shadowc.sparsity.criteria import find_criterion
from shadowc.sparsity.families import UnitWeights, decoder_of, watched
from shadowc.sparsity.importance import ImportanceTrace
from shadowc.sparsity.record import record_batch, stream_signals, summed_loss
from shadowc.sparsity.signals import LayerSignals
from shadowc.spec.errors import UnsupportedError
from shadowc.spec.options import CollectOptions
from tests.conftest import LLAMA, TINY, random_llama, random_model

FLOAT32 = 2e-5
HALF_STEP = 2.0**-11
GRADIENT = 1e-4
EFFECT = 1e-3
KV = ("k_proj", "v_proj")


@pytest.fixture(scope="module", params=["opt", "llama"])
def model(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue({"opt": "tiny_model", "llama": "llama_model"}[request.param])


@pytest.fixture(scope="module")
def ids_BT() -> torch.Tensor:
    return torch.randint(4, 320, (2, 12), generator=torch.Generator().manual_seed(5))


def slow_llama_layer(layer: Any, normed_TE: torch.Tensor, heads: int, kv_heads: int, base: float) -> torch.Tensor:
    """Contexts [T,H,D] of one text, head by head and token by token, from the weights alone."""
    attention, size = layer.self_attn, normed_TE.shape[1] // heads
    steps = base ** (-torch.arange(0, size, 2) / size)

    def turned(row_D: torch.Tensor, t: int) -> torch.Tensor:
        angle = torch.cat([t * steps, t * steps])
        halves = torch.cat([-row_D[size // 2 :], row_D[: size // 2]])
        return row_D * angle.cos() + halves * angle.sin()

    def rows(projection: Any, head: int) -> torch.Tensor:
        return normed_TE @ projection.weight[head * size : (head + 1) * size].T

    contexts = torch.zeros(len(normed_TE), heads, size)
    for head in range(heads):
        group = head // (heads // kv_heads)
        q, k, v = rows(attention.q_proj, head), rows(attention.k_proj, group), rows(attention.v_proj, group)
        for t in range(len(normed_TE)):
            scores = torch.stack([turned(q[t], t) @ turned(k[s], s) / size**0.5 for s in range(t + 1)])
            contexts[t, head] = scores.softmax(0) @ v[: t + 1]
    return contexts


def test_llama_signals_are_the_models_arithmetic_written_out(llama_model: Any, ids_BT: torch.Tensor) -> None:
    decoder, read, signals = decoder_of(llama_model), {}, {}
    sites = [(block.reads, lambda x, n=n: read.__setitem__(n, x)) for n, block in enumerate(decoder.blocks)]
    entered: dict[int, torch.Tensor] = {}
    handles = [
        layer.mlp.register_forward_pre_hook(lambda _, inputs, n=n: entered.__setitem__(n, inputs[0]))
        for n, layer in enumerate(llama_model.model.layers)
    ]
    with watched(*sites):
        stream_signals(decoder, ids_BT, signals.__setitem__, gradients=False)
    for handle in handles:
        handle.remove()
    for n, layer in enumerate(llama_model.model.layers):
        contexts = slow_llama_layer(layer, read[n][1], heads=4, kv_heads=2, base=10000.0)
        torch.testing.assert_close(signals[n].context_BTHD[1], contexts, rtol=0, atol=FLOAT32)
        gate, up = (entered[n] @ projection.weight.T for projection in (layer.mlp.gate_proj, layer.mlp.up_proj))
        product = gate / (1 + torch.exp(-gate)) * up
        torch.testing.assert_close(signals[n].hidden_BTF, product, rtol=0, atol=FLOAT32)
        assert torch.equal(signals[n].preactivation_BTF, signals[n].hidden_BTF)


@pytest.mark.parametrize("group", [1, 2, 3, 4])
def test_gradients_are_those_of_additions_at_the_places_that_masks_reach(
    model: Any, ids_BT: torch.Tensor, group: int
) -> None:
    """Whatever the groups: dLoss/da and dLoss/dh are the slopes of a zero that is added where the units are masked."""
    decoder, given = decoder_of(model), {}
    losses_B = stream_signals(decoder, ids_BT, given.__setitem__, gradients=True, group=group)
    added: list[torch.Tensor] = []

    def add(tensor: torch.Tensor) -> torch.Tensor:
        added.append(torch.zeros_like(tensor).requires_grad_())
        return tensor + added[-1]

    sites = [(site, add) for block in decoder.blocks for site in (block.context, block.hidden)]
    with watched(*sites):
        whole = summed_loss(model(input_ids=ids_BT).logits, ids_BT)
    slopes = [slope.reshape(2, 12, -1) for slope in torch.autograd.grad(whole, added)]
    assert float(losses_B.sum()) == pytest.approx(float(whole.detach()), rel=1e-6)
    assert sorted(given) == [0, 1, 2, 3]
    for layer, signals in given.items():
        found = (signals.context_gradient_BTHD.flatten(2), signals.hidden_gradient_BTF)
        for mine, slope in zip(found, slopes[2 * layer : 2 * layer + 2], strict=True):
            assert slope.abs().max() > EFFECT
            torch.testing.assert_close(mine, slope, rtol=GRADIENT, atol=GRADIENT)


def test_the_gradient_before_relu_is_that_behind_it_where_the_neuron_fired(
    tiny_model: Any, ids_BT: torch.Tensor
) -> None:
    given: dict[int, LayerSignals] = {}
    stream_signals(decoder_of(tiny_model), ids_BT, given.__setitem__, gradients=True)
    for signals in given.values():
        assert torch.equal(signals.hidden_BTF, signals.preactivation_BTF.relu())
        fired = signals.preactivation_BTF > 0
        assert torch.equal(signals.gradients()[1], torch.where(fired, signals.hidden_gradient(), 0.0))


def assert_units_own_their_weights(model: Any, ids_BT: torch.Tensor, kind: str, decoder_of: Any = decoder_of) -> None:
    """Zeroing all weights that are said to belong to a unit equals masking it, and no other unit changes."""
    pruned, unit, layer = copy.deepcopy(model), 1, 2
    with torch.no_grad():
        for part in getattr(decoder_of(pruned).blocks[layer], kind):
            keep = torch.ones(part.units, dtype=torch.bool)
            keep[unit] = False
            mask = keep.repeat_interleave(part.parameter.shape[part.axis] // part.units)
            shape = [-1 if axis == part.axis else 1 for axis in range(part.parameter.ndim)]
            part.parameter.mul_(mask.reshape(shape))
            assert not part.by_unit()[unit].any()
    decoder = decoder_of(model)
    size = decoder.head_size if kind == "heads" else 1

    def silence(tensor: torch.Tensor) -> torch.Tensor:
        changed = tensor.clone()
        changed[..., unit * size : (unit + 1) * size] = 0
        return changed

    site = decoder.blocks[layer].context if kind == "heads" else decoder.blocks[layer].hidden
    with torch.no_grad(), watched((site, silence)):
        masked = model(input_ids=ids_BT).logits
    with torch.no_grad():
        dense, without = model(input_ids=ids_BT).logits, pruned(input_ids=ids_BT).logits
    assert (masked - dense).abs().max() > EFFECT
    torch.testing.assert_close(without, masked, rtol=0, atol=FLOAT32)


@pytest.mark.parametrize("kind", ["heads", "neurons"])
def test_without_its_weights_a_unit_gives_what_a_masked_one_gives(model: Any, ids_BT: torch.Tensor, kind: str) -> None:
    assert_units_own_their_weights(model, ids_BT, kind)


def test_shared_keys_counted_as_one_heads_own_would_be_noticed(llama_model: Any, ids_BT: torch.Tensor) -> None:
    """Planted defect: rows of k_proj and v_proj, which a group of query heads shares, are given to single heads."""

    def greedy(model: Any) -> Any:
        decoder = decoder_of(model)
        blocks = [
            dataclasses.replace(
                block,
                heads=(*block.heads, *(UnitWeights(n, getattr(block.layer.self_attn, n).weight, 0, 4) for n in KV)),
            )
            for block in decoder.blocks
        ]
        return dataclasses.replace(decoder, blocks=tuple(blocks))

    with pytest.raises(AssertionError, match="not close"):
        assert_units_own_their_weights(llama_model, ids_BT, "heads", greedy)


def test_unit_weights_are_all_of_a_layers_but_those_that_units_share(model: Any) -> None:
    shared = {"opt": set(), "llama": {"k_proj", "v_proj"}}[model.config.model_type]
    for number, block in enumerate(decoder_of(model).blocks):
        named = {part.name for part in (*block.heads, *block.neurons)}
        matrices = {
            name
            for name, parameter in model.named_parameters()
            if f".layers.{number}." in name and parameter.ndim == 2 and name.split(".")[-2] not in shared
        }
        assert {name for name in named if name.endswith(".weight")} == matrices
        assert all(dict(model.named_parameters())[part.name] is part.parameter for part in block.heads)


def test_facts_say_what_a_units_weights_are(checkpoint: Any, llama_checkpoint: ModelCheckpoint) -> None:
    """Heads, what they share, and neurons make up the matrices of all layers."""
    for found in (checkpoint, llama_checkpoint):
        facts, names = found.facts, [name for name in found.weights.names() if ".layers." in name]
        matrices = sum(found.weights.tensor(name).size for name in names if found.weights.tensor(name).ndim == 2)
        per_layer = facts.heads * facts.head_values + facts.kept_values + facts.ffn * facts.neuron_values
        assert facts.layers * per_layer == matrices


def test_a_model_of_another_family_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="are not handled; handled are llama, opt"):
        decoder_of(torch.nn.Linear(2, 2))


def held_floats(model: Any, texts: int, length: int) -> float:
    """Numbers per token that one backward pass holds: what autograd saves, the signals, their gradients."""
    storages: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    given: list[LayerSignals] = []  # keeps them alive, so that no place in memory is counted once for two tensors

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids_BT = torch.randint(4, 320, (texts, length), generator=torch.Generator().manual_seed(1))
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        stream_signals(decoder_of(model), ids_BT, lambda _, signals: given.append(signals), gradients=True)
    for signals in given:
        tensors = (getattr(signals, field.name) for field in dataclasses.fields(signals))
        for tensor in (tensor for tensor in tensors if isinstance(tensor, torch.Tensor)):
            count(tensor)
    return sum(storages.values()) / 4 / texts / length


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_groups_are_made_for_what_a_layer_really_holds(family: str) -> None:
    make, config, kind = {"opt": (random_model, TINY, OptFacts), "llama": (random_llama, LLAMA, LlamaFacts)}[family]
    shallow, deep = (make({**config, "num_hidden_layers": layers}) for layers in (2, 5))
    facts = kind.from_config(deep.config.to_dict(), "deep")
    real = (held_floats(deep, 2, 48) - held_floats(shallow, 2, 48)) / 3
    assert 0.6 * record._layer_floats(facts, 48) < real <= record._layer_floats(facts, 48)


# --- collect -----------------------------------------------------------------------------------------------


def dense_run(model: Any, ids_T: np.ndarray[Any, Any]) -> tuple[Any, ...]:
    """The last token's layer-0 context, gated products and norm outputs, from the prefix alone, with hooks by hand."""
    contexts, products, normed = [], [], []
    layers = model.model.layers
    hooks = [layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _, inputs: contexts.append(inputs[0]))]
    for layer in layers:
        hooks.append(layer.mlp.down_proj.register_forward_pre_hook(lambda _, inputs: products.append(inputs[0])))
        hooks.append(layer.input_layernorm.register_forward_hook(lambda _, __, output: normed.append(output)))
    with torch.no_grad():
        model(input_ids=torch.from_numpy(ids_T.astype(np.int64))[None])
    for hook in hooks:
        hook.remove()
    return contexts[0][0, -1].numpy(), [x[0, -1].numpy() for x in products], [x[0, -1].numpy() for x in normed]


def test_a_trace_of_a_llama_is_causal_and_holds_its_scores(
    llama_checkpoint: ModelCheckpoint, llama_model: Any, tmp_path: Path
) -> None:
    options = CollectOptions(positions=48, length=16, criterion="activation")
    trace = collect(llama_checkpoint, options, tmp_path / "t")
    assert trace.facts == llama_checkpoint.facts
    assert ImportanceTrace.load(tmp_path / "t").facts.family == "Llama-type"
    assert (trace.tokens_NT[:, 0] == 0).all()
    neurons_LMF = [trace.neurons_MF(layer) for layer in range(4)]
    inputs_LME = [trace.input_ME(layer) for layer in range(1, 4)]
    for m in range(0, 48, 7):
        n, t = int(trace.sequence_M[m]), int(trace.position_M[m])
        context_E, products, normed = dense_run(llama_model, trace.tokens_NT[n, : t + 1])
        np.testing.assert_allclose(trace.context_ME[m], context_E, atol=FLOAT32)
        np.testing.assert_allclose(
            trace.heads_MLH[m, 0], np.linalg.norm(context_E.reshape(4, 16), axis=1), rtol=1e-4, atol=FLOAT32
        )
        for layer in range(4):
            np.testing.assert_allclose(neurons_LMF[layer][m], np.abs(products[layer]), rtol=HALF_STEP, atol=2e-3)
        for input_ME, normed_E in zip(inputs_LME, normed[1:], strict=True):
            np.testing.assert_allclose(input_ME[m], normed_E, atol=2e-3)


def test_llama_plainact_is_the_slope_when_a_unit_is_scaled(
    llama_model: Any, llama_checkpoint: ModelCheckpoint, ids_BT: torch.Tensor
) -> None:
    exact = copy.deepcopy(llama_model).double()  # its norms stay in float32, hence the step
    rows = record_batch(
        exact, llama_checkpoint.facts, find_criterion("plainact"), ids_BT.numpy(), [np.arange(12)] * len(ids_BT)
    )
    block, t, head, step = decoder_of(exact).blocks[1], 5, 3, 1e-2
    neuron = int(rows.neurons_LMF[1][t].argmax())
    places = {
        "head": (block.context, slice(16 * head, 16 * head + 16), rows.heads_MLH[t, 1, head]),
        "neuron": (block.hidden, neuron, rows.neurons_LMF[1][t, neuron]),
    }
    for kind, (site, where, found) in places.items():

        def loss(factor: float, site: Any = site, where: Any = where) -> float:
            def scale(tensor: torch.Tensor) -> torch.Tensor:
                changed = tensor.clone()
                changed[0, t, where] *= factor
                return changed

            with torch.no_grad(), watched((site, scale)):
                logits = exact(input_ids=ids_BT).logits
            return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="sum"))

        assert found == pytest.approx(abs(loss(1 + step) - loss(1 - step)) / (2 * step), rel=5e-3), kind


def assert_groups_change_no_score(
    model: Any, facts: Any, ids_BT: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (model, facts, find_criterion("plainact"), ids_BT.numpy(), [np.arange(1, 11)] * 2)
    whole = record_batch(*arguments)
    assert record.layers_at_once(facts, 2, 12) == facts.layers
    monkeypatch.setattr(record, "BATCH_BYTES", 1)
    assert record.layers_at_once(facts, 2, 12) == 1
    parts = record_batch(*arguments)
    assert parts.loss == whole.loss
    np.testing.assert_allclose(parts.heads_MLH, whole.heads_MLH, rtol=1e-4, atol=FLOAT32)
    for mine, theirs in zip(parts.neurons_LMF + parts.inputs_LME, whole.neurons_LMF + whole.inputs_LME, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=FLOAT32)


def test_groups_of_layers_change_no_score(
    model: Any, ids_BT: torch.Tensor, checkpoint: Any, llama_checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = {"opt": checkpoint, "llama": llama_checkpoint}[model.config.model_type].facts
    assert_groups_change_no_score(model, facts, ids_BT, monkeypatch)


def test_a_groups_input_that_changed_before_it_runs_again_would_be_noticed(
    tiny_model: Any, ids_BT: torch.Tensor, checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted defect: what a group stored of the forward pass is written to before its turn comes."""
    original = record._Backwards._again

    def again(self: Any, group: range, held: Any) -> torch.Tensor:
        self._starts[group[0]][:, 5, 0] += 1.0
        return original(self, group, held)

    monkeypatch.setattr(record._Backwards, "_again", again)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_groups_change_no_score(tiny_model, checkpoint.facts, ids_BT, monkeypatch)


PEAK = """
import resource, sys
from pathlib import Path
import numpy as np
from shadowc.checkpoint.resolve import resolve
from shadowc.sparsity.collect import sampled_positions
from shadowc.sparsity import collect as module
from shadowc.sparsity.importance import TraceWriter, trace_layout
from shadowc.sparsity.record import record_batch
from shadowc.sparsity.criteria import find_criterion
from shadowc.sparsity.reference import load_torch_model

checkpoint = resolve("opt-1.3b", load_format="dummy")
model, facts = load_torch_model(checkpoint), checkpoint.facts
writer = TraceWriter(Path(sys.argv[1]), "key")
writer.begin(trace_layout(facts, 2048, 32, 256), {})
ids = np.random.default_rng(0).integers(4, 50000, (1, 256))
(positions,) = sampled_positions(1, 256, 64, 0)
rows = record_batch(model, facts, find_criterion(sys.argv[2]), ids, [positions])
for row in range(0, 2048, 64):
    module._put(writer, rows, row, 0)
    writer.commit(row + 64, {})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("criterion", ["plainact", "plainact_weight", "grasp"])
def test_a_trace_of_2048_positions_of_opt_1_3b_takes_less_than_8_gb(criterion: str, tmp_path: Path) -> None:
    """One text with what the criterion reads and all rows of the trace; further texts take that memory again."""
    run = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "t"), criterion], capture_output=True, text=True, check=True
    )
    assert 5.2e9 < int(run.stdout) < 8e9  # the weights alone are 5.26e9
