"""What the fused operators cannot take raises a RuntimeError that names it; nothing crashes."""

import itertools
import math
import re

import pytest
import torch
from engine_cases import BACKWARD, STEP, UNROLL, Case, listed, run_unroll
from engine_cases import arguments as cpu_arguments

from l2l_ref import equations
from l2l_ref.backend import MAX_HIDDEN

OPERATORS = {
    "theta_step_": STEP,
    "theta_step": STEP,
    "theta_step_backward": BACKWARD,
    "unroll_meta_gradient": UNROLL,
}
CASE = Case(6, 2, 4, odd=True, steps=3)
every_operator = pytest.mark.parametrize("name", OPERATORS)


@pytest.fixture
def arguments(device):
    """`engine_cases.arguments` on the CPU, then on a GPU."""

    def make(case=CASE, dtype=torch.float32):
        return {name: x.to(device) for name, x in cpu_arguments(case, dtype).items()}

    return make


def every_other(x):
    """The same shape and numbers, a stride of 2 in the last axis."""
    wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], device=x.device)
    wide[..., ::2] = x
    return wide[..., ::2]


DEFECTS = {
    "float64": torch.Tensor.double,
    "float16": torch.Tensor.half,
    "integers": torch.Tensor.long,
    "complex": lambda x: x.to(torch.complex64),
    "0-dim": lambda x: torch.tensor(1.0, device=x.device),
    "empty": lambda x: x.flatten()[:0],
    "one axis more": lambda x: x[None],
    "one element more": lambda x: torch.cat((x, x[..., :1]), dim=-1),
    "one row more": lambda x: torch.cat((x, x[:1])),
    "every other element": every_other,
    "broadcast": lambda x: torch.zeros(1, device=x.device).expand(x.shape),
}
# Where the first tensor differs from the rest, the rest may be named; the state says how many
# layers φ has, and `gradients` how many steps.
EITHER = {"float64", "one element more", "one row more", "empty"}
OTHERS = {"state": "phi", "gradients": "cotangents"}


def call(name, given, **form):
    tensors = [given[argument] for argument in OPERATORS[name]]
    if name == "theta_step_":
        tensors = listed(*tensors)
    return getattr(torch.ops.l2l_ref, name)(*tensors, **CASE.form | form)


@every_operator
def test_a_wrong_tensor_is_named(fused, arguments, name):
    """Each argument with each defect; nothing has changed by then."""
    given = arguments()
    call(name, given)
    before = {argument: x.clone() for argument, x in given.items()}
    for argument, defect in itertools.product(OPERATORS[name], DEFECTS):
        words = argument
        any_shape = name == "theta_step_"  # it is the rest that differs
        if argument == OPERATORS[name][0] and (defect in EITHER or any_shape):
            words = "|".join(OPERATORS[name])
        if argument in OTHERS and defect == "one row more":
            words = OTHERS[argument]
        if argument == "state" and defect == "one axis more":
            words = "state|phi"
        with pytest.raises(RuntimeError) as raised:
            call(name, given | {argument: DEFECTS[defect](given[argument])})
            pytest.fail(f"{name} takes {argument} with the defect: {defect}")
        said = str(raised.value)
        assert re.search(rf"\b({words})(s\[0\])?", said), (argument, defect, said)
        assert not isinstance(raised.value, NotImplementedError), (argument, defect)
        assert all(torch.equal(given[key], x) for key, x in before.items()), (argument, defect)


STATES = [(0, 2, 4, 12), (2, 2, 0, 12), (2, 1, 4, 12), (2, 3, 4, 12), (2, 4, 12)]
WRONG = [  # the form, or the state's shape, and what is said of it
    *[({"p": p}, "p is .*: it must be above 0 and at most 80")
      for p in (0.0, -1.0, 80.5, math.inf, math.nan)],
    *[({"output_scale": s}, "output_scale is -?(nan|inf): it must be finite")
      for s in (math.nan, math.inf, -math.inf)],
    *[(form, r"(phi|state\S*) has shape .*, expected")
      for form in ({"theta_input": True}, {"odd": False})],
    *[({"state": shape}, r"(state\S*|phi) has shape .*, expected") for shape in STATES],
    ({"state": (2, 2, MAX_HIDDEN + 1, 12)}, r"state\S* has 257 units, .* at most 256"),
]  # fmt: skip


@every_operator
@pytest.mark.parametrize("wrong, words", WRONG)
def test_a_wrong_form_or_state_is_named(fused, arguments, name, wrong, words):
    given, form = arguments(), dict(wrong)
    if shape := form.pop("state", None):
        given["state"] = given["state"].new_zeros(shape)
    with pytest.raises(RuntimeError, match=words):
        call(name, given, **form)


@every_operator
def test_no_coordinates_still_need_a_phi_that_fits(fused, arguments, name):
    given = arguments(CASE._replace(n=0))
    call(name, given)
    with pytest.raises(RuntimeError, match="phi has shape"):
        call(name, given | {"phi": given["phi"][1:]})


def test_thetas_that_are_missing(fused, arguments):
    """Only where φ sees them, and the reference says the same."""
    case = CASE._replace(theta_input=True)
    tensors = [arguments(case)[name] for name in UNROLL[:-1]]
    for module in (fused, equations):
        with pytest.raises(RuntimeError, match="thetas is missing: phi sees theta, pass"):
            module.unroll_meta_gradient(*tensors, **case.form)
    assert call("unroll_meta_gradient", arguments() | {"thetas": None}).isfinite().all()


@pytest.mark.parametrize("theta_input", [False, True])
@pytest.mark.parametrize("defect", ["one row more", "one element more", "one axis more", "empty"])
def test_the_reference_refuses_thetas_of_another_shape(theta_input, defect):
    case = CASE._replace(theta_input=theta_input)
    given = cpu_arguments(case)
    given["thetas"] = DEFECTS[defect](given["thetas"])
    with pytest.raises(RuntimeError, match="thetas has shape .*, expected"):
        equations.unroll_meta_gradient(*(given[name] for name in UNROLL), **case.form)


@pytest.mark.parametrize("hidden", [MAX_HIDDEN - 1, MAX_HIDDEN])
def test_as_many_units_as_promised(fused, hidden):
    case = Case(3, 1, hidden, steps=1)
    (results,) = run_unroll(fused, case, cpu_arguments(case, torch.float32))
    assert results.isfinite().all() and results.any()


@pytest.mark.parametrize("inside", ["state", "phi", "gradient"])
@pytest.mark.parametrize("written", ["theta", "state"])
def test_what_is_written_does_not_lie_in_what_is_read(fused, arguments, written, inside):
    """In place, one tensor in the memory of another, at its beginning and at its end."""
    if written == inside:
        return
    given = arguments()
    a, b = given[written].numel(), given[inside].numel()
    memory = torch.zeros(a + b, device=given["phi"].device)
    for begin in (0, b - 1, b):
        given[written] = memory[begin : begin + a].view(given[written].shape)
        given[inside] = memory[:b].view(given[inside].shape)
        if begin == b:
            call("theta_step_", given)
            continue
        words = rf"{written}\S* and {inside}\S* share|{inside}\S* and {written}\S* share"
        with pytest.raises(RuntimeError, match=words):
            call("theta_step_", given)


class TestLists:
    @pytest.fixture
    def few(self, arguments):
        """Arguments of theta_step_, of tensors of those sizes."""

        def make(*sizes):
            given = [arguments(CASE._replace(n=n)) for n in sizes]
            return *([each[name] for each in given] for name in STEP[:3]), given[0]["phi"]

        return make

    def step(self, *lists):
        torch.ops.l2l_ref.theta_step_(*lists, **CASE.form)

    def test_one_is_shorter(self, fused, few):
        thetas, gradients, states, phi = few(3, 4)
        for wrong in ((thetas, gradients[:1], states), (thetas, gradients, states[1:])):
            with pytest.raises(RuntimeError, match="are 2 thetas, . gradients and . states: give"):
                self.step(*wrong, phi)
        self.step([], [], [], phi)

    @pytest.mark.parametrize("which", range(3))
    def test_a_wrong_tensor_is_named_by_its_place(self, fused, few, which):
        lists, argument = few(3, 4, 5), ("thetas", "gradients", "states")[which]
        for defect in ("float64", "every other element"):
            wrong = [list(tensors) for tensors in lists[:3]]
            wrong[which][1] = DEFECTS[defect](wrong[which][1])
            with pytest.raises(RuntimeError, match=argument + r"\[1\]"):
                self.step(*wrong, lists[3])

    def test_tensors_lie_apart(self, fused, few):
        """What is written in nothing else, whichever tensors they are; what is read may be
        shared."""
        thetas, gradients, states, phi = few(6, 6, 6)
        self.step(thetas, [gradients[0]] * 3, states, phi)
        for wrong, words in (
            (([*thetas[:2], thetas[0]], gradients, states), r"thetas\[.\] and thetas\[.\]"),
            (
                (thetas, gradients, [states[0], states[1], states[1]]),
                r"states\[.\] and states\[.\]",
            ),
            ((thetas, [*gradients[:2], thetas[0]], states), r"thetas\[0\] and gradients\[2\]"),
            ((thetas, [*gradients[:2], states[0].view(-1)[:6]], states), r"states\[0\] and grad"),
        ):
            with pytest.raises(RuntimeError, match=words + ".* share memory"):
                self.step(*wrong, phi)
        memory = torch.zeros(1000, device=phi.device)  # a long one, a short one within, one beyond
        inside = [memory[:6], memory[2:4], memory[10:16]]
        with pytest.raises(RuntimeError, match="share memory"):
            self.step(inside, [torch.zeros_like(x) for x in inside], few(6, 2, 6)[2], phi)
