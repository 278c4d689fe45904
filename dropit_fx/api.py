"""``transform``: a model in, a rewritten ``GraphModule`` out."""

from __future__ import annotations

import glob
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any

from torch import fx, nn

from dropit_fx.capture import example_inputs
from dropit_fx.capture.trace import LOCK, CaptureError, capture
from dropit_fx.capture.untouched import untouched
from dropit_fx.config import Config, ConfigError, make_config
from dropit_fx.passes.choose_codecs import check_rules_matched
from dropit_fx.planner import Step, plan_step
from dropit_fx.report.origin import Origin
from dropit_fx.report.rows import attach
from dropit_fx.rewriting import rewrite as rewrite
from dropit_fx.rules import Rule
from dropit_fx.words import matches, unmatched


def transform(
    model: nn.Module,
    config: str | PathLike[str] | Mapping[str, Any] | Config | None = None,
    *,
    example_args: tuple[Any, ...] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    modules: str | Sequence[str] | None = None,
    preset: str | None = None,
    strategy: str | None = None,
    gamma: float | None = None,
    bits: int | None = None,
    peak: str | int | float | None = None,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
) -> fx.GraphModule:
    """Rewrites a model so that what its training step saves is kept packed.

    The forward result has the same bits; parameters and buffers are the model's own tensors, under
    the same state-dict keys. The result trains as it is and compiles with ``torch.compile``.

    Args:
        model: Any module that ``torch.fx.symbolic_trace`` or ``torch.export`` takes.
        config: A YAML path, a mapping or a Config: rules that say which saved tensor gets which
            codec.
        example_args: Positional inputs of the usual shapes, on the model's device; only their
            shapes and dtypes are read. Without them, shapes are taken from the model where it tells
            them (``example_inputs.guess``).
        example_kwargs: Keyword inputs.
        modules: A glob on qualified names, or several: rewrites each matching submodule in place,
            leaves the rest of the model alone, and returns ``model``. What the submodules are
            called with is seen in a run on fake tensors; a model that decides by values (a
            detector) is copied and run for real, without gradients.
        preset: Name of a preset; its rules come after the config's own.
        strategy: Codec of linear and convolution inputs: ``"mink"``, ``"random"``, ``"quant"``.
            Without a preset or a config, the preset is then ``"dropit"``, the published algorithm.
        gamma: Dropping rate in [0, 1), for all rules of the preset whose codec has one.
        bits: Bits of a kept value, 1 to 8, for all rules of the preset whose codec has them.
        peak: In the place of a config: the memory that a step may take, as for ``dropit_fx.plan``,
            which runs a batch of real inputs; for a loss or an optimizer of one's own, call that.
        filter_fn: Called with each module and its qualified name (``""``: the model's own); where
            it says False, what the module itself reads (not its children) is kept dense, whatever
            the rules say.

    Returns:
        The rewritten GraphModule; ``dropit_fx.report`` tells what became of each saved tensor.

    Raises:
        CaptureError: No tracer takes the model, or shapes are needed and cannot be guessed.
        ConfigError: The config cannot mean anything, or a rule of it matches nothing.
        PlanError: The peak cannot be understood, or cannot be kept.
    """
    if peak is not None:
        beside = (config, modules, preset, strategy, gamma, bits, filter_fn)
        if any(given is not None for given in beside):
            raise ConfigError("peak= plans the whole config: give no config or modules beside it.")
        args, kwargs = example_inputs.resolve(model, example_args, example_kwargs)
        config = plan_step(Step(model, args, kwargs), peak)
    resolved = make_config(config, preset=preset, strategy=strategy, gamma=gamma, bits=bits)
    if filter_fn is not None:
        if modules is not None:
            raise ConfigError("modules= and filter_fn= both say what is rewritten: give one.")
        resolved = _filtered(resolved, model, filter_fn)
    if modules is not None:
        whole: fx.GraphModule = _transform_submodules(
            model,
            resolved,
            (modules,) if isinstance(modules, str) else tuple(modules),
            example_args,
            example_kwargs,
        )
        return whole
    with LOCK, untouched(model, generators=True):
        args, kwargs = example_inputs.resolve(model, example_args, example_kwargs)
        graph_module = capture(model, args, kwargs)
        plan = rewrite(graph_module, resolved, args, kwargs)
    check_rules_matched((plan,), resolved)
    attach(graph_module, plan, origin=Origin.of(model, args, kwargs, resolved))
    return graph_module


def _filtered(
    config: Config, model: nn.Module, filter_fn: Callable[[nn.Module, str], bool]
) -> Config:
    """With a rule before all others that keeps what the function refuses."""
    named = model.named_modules(remove_duplicate=False)
    refused = tuple(glob.escape(name) for name, module in named if not filter_fn(module, name))
    rule = Rule(module=refused, codec="keep", preset=True)  # it may match nothing
    return replace(config, rules=(rule, *config.rules)) if refused else config


def _transform_submodules(
    model: nn.Module,
    config: Config,
    globs: tuple[str, ...],
    example_args: tuple[Any, ...] | None,
    example_kwargs: Mapping[str, Any] | None,
) -> Any:  # the model, of whatever class it is
    if not globs:
        raise ConfigError("modules is an empty list: name a submodule, or leave it out.")
    known = [n for n, _ in model.named_modules() if n]
    for none in unmatched(globs, known):
        children = ", ".join(n for n, _ in model.named_children())
        raise ConfigError(f"modules={none!r} matches no submodule. Direct children: {children}.")
    names = [n for n in known if matches(n, globs)]
    names = [n for n in names if not any(n.startswith(f"{other}.") for other in names)]
    made: dict[str, fx.GraphModule] = {}
    plans = []
    with LOCK, untouched(model, generators=True):
        args, kwargs = example_inputs.resolve(model, example_args, example_kwargs)
        seen = example_inputs.record(model, names, args, kwargs)
        for name in names:
            if name not in seen:
                raise CaptureError(f"submodule '{name}' is not called with the example inputs")
            try:
                made[name] = capture(model.get_submodule(name), *seen[name])
                plans.append(rewrite(made[name], config, *seen[name]))
            except CaptureError as error:
                raise type(error)(f"submodule '{name}': {error}") from error
            attach(made[name], plans[-1], prefix=name)
    check_rules_matched(tuple(plans), config)
    for name, inner in made.items():  # all of them, or none
        model.set_submodule(name, inner)
    return model
