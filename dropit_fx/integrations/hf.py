"""Hugging Face ``Trainer``: ``Trainer(..., callbacks=[DropITCallback()])`` trains with packing.

The callback compiles the model in place (``nn.Module.compile``), with the plug-in as its backend:
class, signature of ``forward``, state-dict keys and ``save_pretrained`` stay what they are, which
``Trainer`` goes by. Its own ``torch_compile_backend`` takes no backend that it does not know.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from dropit_fx.compile.backend import CompiledGraph, compiled_graphs, dropit, dropit_eager
from dropit_fx.config import Config, ConfigError, make_config
from dropit_fx.holders import alive
from dropit_fx.measure import Watch
from dropit_fx.private import compiled_in_place, shows_saved, undo_compile
from dropit_fx.private_hooks import is_at_work

try:
    from transformers import PreTrainedModel, Trainer, TrainerCallback
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"dropit_fx.integrations.hf needs the package {error.name} (pip install 'dropit-fx[hf]')",
        name=error.name,
    ) from error

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

log = logging.getLogger(__name__)

BACKENDS: dict[str, Callable[..., Any]] = {"dropit_eager": dropit_eager, "dropit": dropit}


def _reads_no_logits(callback: TrainerCallback) -> bool:
    """Whether the training step of the callback's trainer reads the loss alone of an output.

    ``Trainer``'s own does: where it computes a loss itself, the model is given no labels, and its
    logits are no part of a fused loss. A subclass with a step of its own may read them (TRL's
    ``SFTTrainer`` counts right tokens).
    """
    trainers = [t for t in alive(Trainer) if callback in t.callback_handler.callbacks]
    return bool(trainers) and all(map(_steps_as_it_does, trainers))


def _in_state(state: TrainerState) -> list[Trainer]:
    """The trainer that a state is of."""
    return [t for t in alive(Trainer) if t.state is state]


def _steps_as_it_does(trainer: Trainer) -> bool:
    parts = [(getattr(trainer, n), getattr(Trainer, n)) for n in ("training_step", "compute_loss")]
    reads_by_place = getattr(trainer.args, "past_index", -1) >= 0  # None has no place in an output
    return not reads_by_place and all(getattr(p, "__func__", p) is usual for p, usual in parts)


class DropITCallback(TrainerCallback):
    """Packs what the training step of a ``Trainer`` saves for the backward.

    The model is rewritten from the first step to the end of ``train()``, and is the same object
    before, meanwhile and afterwards. After the first batch its bytes are logged once, put into
    ``trainer.state.log_history`` and handed to every callback's ``on_log`` (the console,
    TensorBoard, W&B): ``saved_bytes``, what autograd held when the loss was there, the loss
    included, as measured on this rank; ``saved_bytes_dense`` and ``saved_bytes_packed``, what the
    graphs of the model save. ``graphs`` has the reports.

    Args:
        config: As for ``transform``; so are `preset`, `strategy`, `gamma` and `bits`.
        preset: Name of a preset.
        strategy: Codec of linear and convolution inputs; without a preset or a config, the preset
            is then ``"dropit"``.
        gamma: Dropping rate in [0, 1), for all rules of the preset whose codec has one.
        bits: Bits of a kept value, 1 to 8, for all rules of the preset whose codec has them.
        drop_logits: Whether the logits of a language model are never whole in training, where the
            model returns None for them; evaluation has them. None: where the loop does not read
            them, which is so where it is ``Trainer``'s own, and where the config says so.
        backend: ``"dropit_eager"`` runs the rewritten graphs as they are: every value that is not
            approximated has the bits of training without the callback. ``"dropit"`` compiles them.
        options: More options of the backend: ``inner``, and inductor's own.
        compile_loss: Whether the loss is rewritten too, where ``Trainer`` computes it outside the
            model: its ``compute_loss_func``, else its label smoother. The attribute is another
            from the first step to the end of ``train()``; where an error ends that, the first call
            of it puts the usual one back, and is one of that.

    Attributes:
        graphs: The graphs that the first batch was compiled to; empty before it.

    Raises:
        ConfigError: The config cannot mean anything, or there is no such backend.
    """

    def __init__(
        self,
        config: str | PathLike[str] | Mapping[str, Any] | Config | None = None,
        *,
        preset: str | None = None,
        strategy: str | None = None,
        gamma: float | None = None,
        bits: int | None = None,
        drop_logits: bool | None = None,
        backend: str = "dropit_eager",
        options: Mapping[str, Any] | None = None,
        compile_loss: bool = False,
    ) -> None:
        if backend not in BACKENDS:
            raise ConfigError(f"no backend {backend!r}. Choose one of: {', '.join(BACKENDS)}.")
        ours: dict[str, Any] = {
            "config": config,
            "preset": preset,
            "strategy": strategy,
            "gamma": gamma,
            "bits": bits,
            "drop_logits": drop_logits,
        }
        self._drops = make_config(**ours).drop_logits  # errors now
        self.backend = backend
        self.options = {k: v for k, v in ours.items() if v is not None} | dict(options or {})
        self.graphs: tuple[CompiledGraph, ...] = ()
        self.compile_loss = compile_loss
        self._losses: list[tuple[Trainer, str, Any, Any]] = []  # as they were, and compiled
        self._model: nn.Module | None = None
        self._compiled: list[CompiledGraph] = []  # in the whole life of the callback
        self._before: int | None = None  # how many before the first batch; None after it
        self._unread = False  # whether the loop reads no logits of a training step
        self._measured: int | None = None  # of the first batch
        self._watched: list[tuple[Any, Any, Any]] = []  # its backward, as it was and ours

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Compiles the model in place.

        Raises:
            RuntimeError: It is compiled already: by ``torch_compile``, or by its own ``compile``.
                With `compile_loss`: the trainer computes no loss outside the model.
        """
        assert model is not None
        self._put_losses_back()
        self._stop_watching()
        if args.torch_compile or (compiled_in_place(model) and model is not self._model):
            raise RuntimeError(
                "DropITCallback compiles the model itself, and it is compiled already. Leave out"
                " torch_compile=True and model.compile(): DropITCallback(backend='dropit') compiles"
                " with inductor."
            )
        if self.compile_loss:
            self._compile_losses(state)
        self._model, self._before = model, len(self._compiled)
        self._unread = self._drops or _reads_no_logits(self)
        for part in model.modules():
            if isinstance(part, PreTrainedModel):  # looked up now: the look-up may log a warning,
                part.loss_function = part.loss_function  # which would cut the graph in two
        model.compile(backend=self._compile)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Has the first batch measured, when its loss comes to ``accelerator.backward``."""
        if self._before is not None and shows_saved() and not self._watched:
            for trainer in _in_state(state):
                self._watch(trainer.accelerator)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Logs the saved bytes, once."""
        if (logs := self._count()) is None:
            return
        state.log_history.append(logs | {"step": state.global_step})
        due = control.should_log  # of the step's own loss; the event says that it is done
        for trainer in _in_state(state):
            # the event, not trainer.log(): a subclass's own (TRL's) would give out its averages
            trainer.callback_handler.on_log(args, state, control, logs)
        control.should_log = due

    on_substep_end = on_step_end  # where a step is several batches

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Makes the model what it was."""
        if self._model is not None:
            undo_compile(self._model)
        self._model = None
        self._put_losses_back()
        self._stop_watching()

    def _watch(self, accelerator: Any) -> None:
        watch, usual = Watch(), accelerator.backward

        def backward(loss: Any, *args: Any, **kwargs: Any) -> Any:
            self._stop_watching()
            self._measured = watch.saved_bytes(loss)
            return usual(loss, *args, **kwargs)

        self._watched.append((accelerator, vars(accelerator).get("backward"), backward))
        accelerator.backward = backward

    def _stop_watching(self) -> None:
        self._measured = None
        for accelerator, usual, ours in self._watched:
            if vars(accelerator).get("backward") is ours:
                del accelerator.backward
                if usual is not None:  # it was no method of the class
                    accelerator.backward = usual
        self._watched = []

    def _compile_losses(self, state: TrainerState) -> None:
        for trainer in _in_state(state):
            names = [n for n in ("compute_loss_func", "label_smoother") if getattr(trainer, n)]
            if not names:
                raise RuntimeError(
                    "compile_loss=True, but this trainer has no compute_loss_func and no"
                    " label_smoothing_factor: its loss is computed in the model, which is compiled"
                    " as a whole. Leave out compile_loss."
                )
            usual = getattr(trainer, names[0])
            loss = self._compiled_loss(trainer, usual)
            setattr(trainer, names[0], loss)
            self._losses.append((trainer, names[0], usual, loss))

    def _compiled_loss(self, trainer: Trainer, usual: Any) -> Callable[..., Any]:
        """A loss, compiled in ``train()`` and put back behind it: no event tells of an error."""
        called = usual if inspect.isroutine(usual) else usual.__call__
        compiled = torch.compile(called, backend=self._compile)

        def loss(*args: Any, **kwargs: Any) -> Any:
            if is_at_work(trainer, Trainer.train):
                return compiled(*args, **kwargs)
            self._put_losses_back()
            return usual(*args, **kwargs)

        return loss

    def _put_losses_back(self) -> None:
        for trainer, name, usual, compiled in self._losses:
            if getattr(trainer, name) is compiled:
                setattr(trainer, name, usual)
        self._losses = []

    def _compile(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        before = len(compiled_graphs())
        options = {"drop_logits": self._unread} | self.options
        compiled = BACKENDS[self.backend](gm, example_inputs, options=options)
        self._compiled += compiled_graphs()[before:]
        return compiled

    def _count(self) -> dict[str, float] | None:
        """What to log after the first batch; None after the others."""
        if self._before is None:
            return None
        # in a second train() the graphs of the first may still be good
        self.graphs = tuple(self._compiled[self._before :]) or self.graphs
        self._before = None
        dense = sum(graph.report.dense_bytes for graph in self.graphs)
        packed = sum(graph.saved_bytes for graph in self.graphs)
        if dense == 0:
            log.warning("nothing is packed: no compiled graph of the model saves anything")
        log.info("a batch saves %d bytes, %d without packing", packed, dense)
        held = {} if self._measured is None else {"saved_bytes": self._measured}
        return {**held, "saved_bytes_dense": dense, "saved_bytes_packed": packed}
