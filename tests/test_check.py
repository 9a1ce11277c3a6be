"""``fa.check_rule`` accepts every published rule, and says of a wrong rule what is wrong and where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

import fa
from fa.rules import uniform


class Own(fa.Rule):
    """A right rule to spoil: Kolen and Pollack's, written anew."""

    name = "own"
    learned = ("B",)

    def init_state(self, op, W, gen):
        return {"B": uniform(W.shape, self.std(W), W, gen)}

    def kernel(self, B):
        return B

    def feedback_grad(self, dW):
        return {"B": dW}


class WrongShape(Own):
    def kernel(self, B):
        return B.mT


class NotThroughTheKernel(Own):
    def send_error(self, op, x, dy, B):
        return op.grad_input(dy, 2 * B, x)


class DrawnAtEveryCall(Own):
    def kernel(self, B):
        return B * torch.rand_like(B)


class Backprop(Own):
    def kernel(self, W):
        return W.clone()


class Zero(Own):
    def kernel(self, B):
        return 0 * B


class NoState(Own):
    def init_state(self, op, W, gen):
        return {}


class LearnsWhatIsNotThere(Own):
    learned = ("B", "R")


class GradientOfAnotherShape(Own):
    def feedback_grad(self, dW):
        return {"B": dW.sum(0)}


class GradientOfAnotherName(Own):
    def feedback_grad(self, dW):
        return {"R": dW}


class GradientZero(Own):
    def feedback_grad(self, dW):
        return {"B": 0 * dW}


class GradientNotFinite(Own):
    def feedback_grad(self, dW):
        return {"B": dW / 0}


class NoGradient(fa.Rule):
    learned = ("B",)
    init_state, kernel = Own.init_state, Own.kernel


class WritesIntoTheWeightGradient(Own):
    def feedback_grad(self, dW):
        return {"B": dW.mul_(2)}


class WritesIntoTheFeedback(Own):
    def feedback_grad(self, dW, B):
        B.data.mul_(0.5)
        return {"B": dW}


class StepOfAnotherShape(Own):
    def after_step(self, B):
        return {"B": B[:1, :1, None]}


class Raises(Own):
    def kernel(self, B):
        return {"a": B}["b"]


class ConvolutionsOnly(Own):
    """Wrong on linear layers alone."""

    def kernel(self, B):
        return B if B.dim() == 4 else B[:, :1]


WRONG = {
    WrongShape: r"kernel returns shape \(24, 20\) for W of shape \(20, 24\)",
    NotThroughTheKernel: "the error does not go down through the kernel: dx is 1.*send_error.*every layer",
    DrawnAtEveryCall: "kernel returns another K at every call",
    Backprop: "the kernel is W itself, which makes the rule backprop",
    Zero: "the kernel is all zeros",
    NoState: "NoState is wrong: .*kernel asks for 'B'; it can have W|asks for 'B'; it can have W",
    LearnsWhatIsNotThere: "learned names 'R', a tensor that init_state does not return",
    GradientOfAnotherShape: r"gradient of shape \(24,\) for 'B' of shape \(20, 24\)",
    GradientOfAnotherName: "feedback_grad returns gradients for 'R'; learned asks for 'B'",
    GradientZero: "the gradient of 'B' is zero, so that it never learns",
    GradientNotFinite: "the gradient of 'B' has entries that are not finite",
    NoGradient: "B is learned, but the rule has no feedback_grad",
    WritesIntoTheWeightGradient: "dW is not the local product",
    WritesIntoTheFeedback: "changed B: a rule returns new tensors",
    StepOfAnotherShape: "after_step returns what the layer does not hold",
    Raises: "KeyError: 'b'",
}


@pytest.mark.parametrize("name", [n for n in fa.RULES if n not in ("bp", "dfa", "primitives")])
def test_the_published_rules_are_right(name: str) -> None:
    assert fa.check_rule(name).startswith(f"{name} is right: on 8 layers")


@pytest.mark.parametrize(
    "name, options",
    [
        ("pfa", {"implicit": True}),
        ("pfa", {"density": 0.3}),
        ("pfa", {"implicit": "first", "density": 0.3}),
        ("fa", {"norm": "track"}),
        ("usf", {"scale": "track"}),
        ("primitives", {"amp": 1.0}),
    ],
)
def test_options_are_right_too(name: str, options: dict[str, Any]) -> None:
    assert fa.check_rule(name, **options).startswith(f"{name} is right")


def test_a_class_an_object_and_a_name_are_one() -> None:
    told = fa.check_rule(Own)
    assert told == fa.check_rule(Own()) and "Angle of W and K: 8" in told


@pytest.mark.parametrize("rule", WRONG, ids=lambda rule: rule.__name__)
def test_a_wrong_rule_is_told_what_is_wrong(rule: type[fa.Rule]) -> None:
    with pytest.raises(fa.UserError, match=WRONG[rule]):
        fa.check_rule(rule)


def test_the_layers_on_which_a_rule_is_wrong_are_named() -> None:
    with pytest.raises(fa.UserError) as refused:
        fa.check_rule(ConvolutionsOnly)
    assert "leading dimensions" in str(refused.value) and "convolution" not in str(refused.value)


def test_backprop_is_told_by_its_own_name() -> None:
    with pytest.raises(fa.UserError, match="bp is wrong: the kernel is W itself"):
        fa.check_rule("bp")


def test_what_is_no_layerwise_rule_is_refused() -> None:
    for rule, message in [
        ("dfa", "dfa is not layer-wise"),
        ("pfaa", "did you mean 'pfa'"),
        (3, "a fa.Rule or its class"),
    ]:
        with pytest.raises(fa.UserError, match=message):
            fa.check_rule(rule)  # type: ignore[arg-type]


def test_the_check_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    fa.check_rule("wm")
    assert torch.equal(before, torch.get_rng_state())


def test_an_after_step_that_is_right_is_called() -> None:
    called = []

    @dataclass(frozen=True)
    class Redrawn(Own):
        def after_step(self, B, gen):
            called.append(B.shape)
            return {"B": uniform(B.shape, 0.1, B, gen())}

    assert fa.check_rule(Redrawn).startswith("own is right")
    assert len(called) == 8
