"""One layer's feedback: the module that holds the rule's tensors, and what it computes from them in a backward pass."""

from __future__ import annotations

import hashlib
import inspect
import warnings
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from fa.errors import UserError
from fa.layers import passes
from fa.layers.maps import ConvMap, LinearMap, flat, nested
from fa.layers.steps import under_way
from fa.rules.base import Rule, Terms, gradient_of, multiply, terms_of


@cache
def _arguments(method: Any, names: tuple[str, ...]) -> tuple[str, ...]:
    """Those of ``names`` that a rule's method has as parameters, with ``**`` all; one that nothing can fill raises.

    A rule's methods are called by name, so that ``kernel(self, W, B)`` reads like its equation.
    """
    wanted = inspect.signature(method).parameters
    if any(p.kind is p.VAR_KEYWORD for p in wanted.values()):
        return names
    for name, p in list(wanted.items())[1:]:
        if name not in names and p.default is p.empty:
            raise UserError(f"{method.__qualname__} asks for {name!r}; it can have {', '.join(names)}")
    return tuple(n for n in wanted if n in names)


class Feedback(nn.Module):
    """What a converted layer keeps besides its own parameters: ``layer.feedback``.

    Buffers and parameters carry the names that the rule gave them (``layer.feedback.B``, ...).
    """

    def __init__(self, rule: Rule, op: LinearMap | ConvMap, layer: nn.Module, name: str, seed: int) -> None:
        super().__init__()
        self.rule, self.op, self.layer_name, self.seed = rule, op, name, seed
        if rule.needs_sgd and not layer.weight.requires_grad:
            raise UserError(f"implicit feedback moves with W, and that of layer {name!r} is frozen; leave implicit out")
        W = layer.weight.detach()
        try:
            state = rule.state(op, W, generator(seed, name))
        except UserError as error:
            raise UserError(f"layer {name!r}: {error}" if name else str(error)) from None
        for key, value in state.items():
            if key in rule.learned:
                self.register_parameter(key, nn.Parameter(value))
            else:
                self.register_buffer(key, value)
        self.names, self.shape, self.gains = tuple(state), W.shape, rule.gain != 1  # compared once: a compiler's floats
        self.numbers = tuple(option for option, value in vars(rule).items() if type(value) is float)
        local = ("W", "op", "x", "y", "dy", "dW", *state)
        self.kernel_args = _arguments(type(rule).kernel, ("W", *state))
        self.grad_args = _arguments(type(rule).feedback_grad, local) if rule.learned else ()
        self.keeps_y = "y" in self.grad_args and rule.needs_y
        send = getattr(type(rule), "send_error", None)
        self.send_args = _arguments(send, ("W", "op", "x", "dy", *state)) if send else ()
        if rule.clamp_forward:
            self.register_buffer("forward_norm", torch.linalg.vector_norm(W))
            if not self.forward_norm:
                raise UserError(
                    f"layer {name!r}: its weight is all zeros, and clamp_forward would hold it there; initialise it "
                    "before fa.convert, leave the layer out with skip, or leave clamp_forward out"
                )
        after = getattr(type(rule), "after_step", None)
        self.after_args = _arguments(after, ("W", "gen", "step", *state)) if after else None
        if after:
            self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=W.device))
        self.steps: tuple[int, Tensor | None, int] = (0, None, 0)  # the buffer's value, the buffer, and its version
        self.seen: tuple[int, Tensor] | None = None  # of the weight as the last step left it (steps.note_weight)
        self.use_backprop = False  # True: plain backprop for the moment (fa.exact_backprop)
        # A gradient without the error in it does not scale with the loss.
        self.follows_error = not rule.own_decay and not {"dy", "dW"}.isdisjoint(self.grad_args)
        self.made = -1, 0  # the last backward pass, by autograd's number, and gradients that the layer made in it
        self.exact_ran = self.traced = False  # a stock pass under exact backprop, and a compiled one
        self.steps_alone = 0  # optimizer steps of the weight without its learned feedback
        self.acts = rule.clamp_forward or bool(after)  # after every optimizer step
        self.waits = self.acts or bool(rule.learned and not rule.needs_sgd)  # for an optimizer step, without one so far
        self.sizes: list[Any] = []  # ``made``, norms of the weight and of the learned feedback, when last looked at
        self.stepped(layer.weight)

    def forward(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        """The layer's output, y = W x + b; x, W, b as the layer holds them.

        Raises:
            RuntimeError: under a transformation of ``torch.func``, or of a nested tensor that is not jagged.
            UserError: the weight has another shape than at the conversion.
        """
        if x.is_nested and isinstance(self.op, LinearMap):
            return nested(self.forward(flat(x), W, b), x)
        if torch._C._are_functorch_transforms_active():  # compiled, upper layers would get gradients of zero
            raise RuntimeError(passes.NO_FUNCTORCH)
        if torch.compiler.is_compiling():
            passes.note_trace(self)
            # Dynamo makes inputs of floats that differ between two rules in the forward pass alone: use each once.
            for option in self.numbers:
                getattr(self.rule, option) * 1.0
        elif self.waits and W.is_leaf and not W.is_meta:
            vars(self)["uses"] = uses = self.uses + 1
            often = uses > 2 and (not uses & (uses - 1) or (uses < 7 and W.is_cpu))  # a GPU's values are waited for
            if often or W._version != self.version:
                self.look(W)
        if dtype := passes.autocast_dtype(x.device):
            x, b = passes.lowered(x, dtype), b if b is None else passes.lowered(b, dtype)
        if W.shape != self.shape and (x.requires_grad or self.rule.learned):  # the first layer may need no feedback
            if any(getattr(self, n).dim() for n in self.names):
                raise passes.misfit(self.layer_name, self.shape, W.shape)
        function = passes.ExactBackward if self.use_backprop else passes.LocalBackward
        return function.apply(x, W, b, self, *[getattr(self, n) for n in self.names])

    def tensors(self, W: Tensor) -> dict[str, Any]:
        """The rule's tensors and the weight, by the names that the rule's methods know."""
        return {"W": W, **{n: getattr(self, n) for n in self.names}}

    def kernel(self, W: Tensor) -> Tensor:
        """The effective feedback weight, of W's shape."""
        return self.product(self.terms(self.tensors(W)), W)

    def terms(self, known: dict[str, Any]) -> Terms:
        """The effective feedback weight as terms (see :mod:`fa.rules.base`), on the entries that exist."""
        return terms_of(self.rule.kernel(**{n: known[n] for n in self.kernel_args}), known.get("mask"))

    def product(self, terms: Terms, W: Tensor) -> Tensor:
        """The effective feedback weight from its terms; under ``norm="track"`` of W's norm; times the rule's gain."""
        K = multiply(terms)  # (out, in)
        if self.rule.norm == "track":  # a kernel of zeros stays one
            size = torch.linalg.vector_norm(K)
            K = K * (torch.linalg.vector_norm(W) / size.clamp_min(torch.finfo(size.dtype).tiny))
        return K * self.rule.gain if self.gains else K

    def few(self, dy: Tensor, W: Tensor) -> bool:
        """Whether a product of weights costs more than the error through its factors: samples, positions < outputs."""
        return self.op.groups == 1 and dy.numel() < W.shape[0] ** 2

    def send(self, known: dict[str, Any]) -> tuple[Tensor | None, Tensor]:
        """(dx, W), or (None, K) where the error is to go through the kernel K."""
        op, x, dy, W = known["op"], known["x"], known["dy"], known["W"]
        dx = self.rule.send_error(**{n: known[n] for n in self.send_args}) if self.send_args else None
        if dx is not None:
            return dx, W
        terms = self.terms(known)
        if terms[0][0] is None or self.gains or self.rule.norm != "fixed" or not self.few(dy, W):
            return None, self.product(terms, W)
        for A, M, *c in terms:
            e = (dy * c[0].flatten()).to(dy.dtype) if c else dy  # (n, out) (1,)
            if A is not None:
                e = op.matmul_channels(e, A.to(dy.dtype))  # (n, out) (out, mid) -> (n, mid)
                known["activity"] = A, e
            part = op.grad_input(e, M.to(dy.dtype), x)  # (n, mid) (mid, in) -> (n, in)
            dx = part if dx is None else dx + part
        return dx, W

    def gradient_from(self, known: dict[str, Any]) -> dict[str, Tensor]:
        """The gradients of the learned tensors, from all that the rule may name."""
        op, dy, found = known["op"], known["dy"], {}
        for name, grad in self.rule.feedback_grad(**{n: known[n] for n in self.grad_args}).items():
            if isinstance(grad, Tensor) or not self.few(dy, known["W"]):
                found[name] = gradient_of(grad)
                continue
            B = grad[0]  # B^T dW, for few samples as (B^T dy) x^T
            A, activity = known.get("activity", (None, None))
            if A is not B:  # else the error has passed B already
                activity = op.matmul_channels(dy, B.to(dy.dtype))  # (n, out) (out, mid) -> (n, mid)
            found[name] = op.grad_weight(known["x"], activity, known[name]).to(B.dtype)  # (mid, n) (n, in) -> (mid, in)
        return found

    def after_step(self, W: Tensor) -> None:
        """What the rule does once per optimizer step."""
        # The number of steps is read from its device, which waits, only where something else has set the buffer.
        known, buffer, version = self.steps
        steps = (known if buffer is self.step and version == buffer._version else int(self.step)) + 1
        self.step.fill_(steps)
        self.steps = steps, self.step, self.step._version
        gen = partial(generator, self.seed, self.layer_name, "step", steps, device=W.device)
        known = self.tensors(W) | {"gen": gen, "step": steps}
        for name, value in self.rule.after_step(**{n: known[n] for n in self.after_args}).items():
            getattr(self, name).copy_(value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if all(prefix + name in state_dict for name in self.names):
            self.seen = None  # weight and feedback were loaded together

    def bypassed(self, x: Any) -> bool:
        """Whether the forward pass at hand is the stock layer's: an ``x`` that is no tensor, no graph to make, or exact
        backprop; a reentrant gradient checkpoint that began under that runs again under it, wherever that is."""
        if not (torch.is_grad_enabled() and isinstance(x, Tensor)):
            if self.use_backprop and (node := passes.running()):
                node.exact = True
            return True
        stock = torch.compiler.is_compiling() or not passes.saved_elsewhere()
        again = stock and not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
        if self.use_backprop or (again and getattr(passes.running(), "exact", False)):
            self.exact_ran = True  # the gradient to come is meant
            return stock  # else ExactBackward, which saves what the rule saves
        return False

    def own_gradient(self, grad: Tensor) -> bool:
        """Whether the layer's own passes made the whole of the weight's gradient, as far as the gradient itself tells.

        Autograd adds further gradients to the first one in place, which raises its version, or makes a new tensor.
        """
        task, made = self.made
        version = getattr(grad, "own", None) if task == torch._C._current_graph_task_id() else None
        if version is not None and grad._version - version == made - 1:
            return True
        exact, self.exact_ran = self.exact_ran or self.use_backprop, False
        return exact

    def stepped(self, W: Tensor) -> None:
        """Count anew, from an optimizer step on: forward passes, and changes of the weight between them."""
        vars(self).update(version=W._version, uses=0, moves=0, sizes=[])

    def look(self, W: Tensor) -> None:
        """Warn once where a weight with gradients moves and no optimizer steps, so that its rule will not act or learn.

        The weight's version tells when to look; steps through ``weight.data`` leave it, and are seen now and then.
        """
        before, self.version = self.sizes, W._version
        learned = [p for p in self.parameters() if p.requires_grad]
        self.sizes = [self.made, *(torch.linalg.vector_norm(t.detach()).item() for t in (W, *learned))]
        vars(self)["moves"] += bool(before) and before[0] != self.sizes[0] and before[1] != self.sizes[1]
        if self.moves < 3 or under_way():
            return
        self.waits, why = False, "acts after every step: call fa.after_step(net) after each step"
        if not self.acts:
            why = "learns feedback that has not changed: step fa.feedback_parameters(net) as well"
        if self.acts or (learned and before[2:] == self.sizes[2:]):
            warnings.warn(
                f"the weight of layer {self.layer_name!r} has changed three times without a step of a torch.optim "
                f"optimizer that holds it, and rule {self.rule.name!r} {why}",
                stacklevel=3,
            )


class NoisyFeedback(Feedback):
    """Feedback that learns from noise: the noise has a generator of its own, whose state is saved with the rest.

    Such a layer is not compiled, since a compiled graph cannot hold a generator.
    """

    def __init__(self, rule: Rule, op: LinearMap | ConvMap, layer: nn.Module, name: str, seed: int) -> None:
        super().__init__(rule, op, layer, name, seed)
        if "forward" not in vars(NoisyFeedback):  # not at import: the call imports the compiler, which takes a second
            why = "this rule draws noise (input='normal' or 'uniform') and is not compiled; leave fullgraph out"
            NoisyFeedback.forward = torch.compiler.disable(Feedback.forward, reason=why)  # type: ignore[method-assign]
        op.gen = generator(seed, name, "noise", device=layer.weight.device)

    def get_extra_state(self) -> Tensor:
        """State of the generator, so that a resumed run goes on with its noise."""
        return self.op.gen.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """See :meth:`get_extra_state`. With the state of another kind of device the noise starts anew."""
        device = next(self.parameters()).device
        if self.op.gen.device.type != device.type:
            self.op.gen = torch.Generator(device).manual_seed(self.op.gen.initial_seed())
        if state.numel() == self.op.gen.get_state().numel():
            self.op.gen.set_state(state.cpu())


def generator(seed: int, *labels: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of its own for (seed, labels), so that no draw depends on what was drawn before."""
    digest = hashlib.sha256("/".join(map(str, (seed, *labels))).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
