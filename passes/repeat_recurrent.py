"""Pass 0, too: recurrent layers are made again in the backward, from their packed inputs.

What an LSTM or a GRU keeps, gates and states of every step, is made and read inside of one op,
where no codec sees it. So each call of one becomes a checkpointed region of the graph: kept are its
inputs, packed as those of any region (``op: checkpoint`` of a config), and the layer runs once more
in the backward. That costs its forward again. Where the rules do not pack what a region is made
again from, the layer stays as it is; so it does in a region of the model's own.

Requires: a graph and fake inputs. Ensures: nothing is kept inside of what became a region.
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx, nn

from dropit_fx.capture.provenance import node_module
from dropit_fx.capture.regions import REGION, Mark, outline
from dropit_fx.config import Config
from dropit_fx.ops.table import CHECKPOINT
from dropit_fx.passes.explain_saved import differentiated
from dropit_fx.passes.find_saved import find_saved
from dropit_fx.passes.plan import Plan
from dropit_fx.runtime.regions import name_of

_SEQUENCES = ("lstm", "gru", "rnn_tanh", "rnn_relu")
_LAYERS = (*_SEQUENCES, *(f"{name}_cell" for name in _SEQUENCES))


def repeat_recurrent(plan: Plan) -> Plan:
    """Rewrites ``plan.module`` in place; fills ``plan.repeated``, ``unrepeated`` and ``unfused``.

    Raises:
        FakeRunError: A node cannot run on fake tensors of the example's shapes.
    """
    graph = plan.module.graph
    layers = [n for n in graph.nodes if _is_recurrent(plan.module, n)]
    fixed = differentiated(graph)
    stays = [n for n in layers if n in fixed or not _is_packed(plan.config, n)]
    plan = replace(plan, unrepeated=tuple(map(node_module, stays)))
    layers = [n for n in layers if n not in stays]
    if not layers:
        return plan
    before = find_saved(plan).sites
    names = {n.name for n in layers}
    for number, node in enumerate(layers, start=1):
        node.meta[REGION] = (Mark(-number, ()),)  # no mark of a model's own is negative
    outline(plan.module)
    gone = {s.name for s in before if any(r.node in names for r in s.reads)}
    return replace(plan, unfused=plan.unfused or before, repeated=frozenset(gone))


def _is_recurrent(module: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(module.get_submodule(str(node.target)), nn.RNNBase)
    return node.op == "call_function" and name_of(node) in _LAYERS


def _is_packed(config: Config, node: fx.Node) -> bool:
    """Whether the rules pack what a region in the place of this call would be made again from."""
    rule = config.rule_for(node_module(node), CHECKPOINT.name, CHECKPOINT.reads[0])
    return REGION not in node.meta and rule is not None and rule.codec != "keep"
