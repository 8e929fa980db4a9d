"""What the fused operators cannot take raises a RuntimeError that names it; nothing crashes."""

import itertools
import math
import re
from functools import partial

import engine_cases
import pytest
import torch
from engine_cases import OPERATORS, STEP, UNROLL, Case, listed

from l2l_ref import equations
from l2l_ref.backend import MAX_HIDDEN

CASE = Case(6, 2, 4, odd=True, steps=3)
every_operator = pytest.mark.parametrize("name", OPERATORS)


@pytest.fixture
def arguments(device):
    """`engine_cases.arguments` on the CPU, then on a GPU."""
    return partial(engine_cases.arguments, dtype=torch.float32, device=device)


DEFECTS = {
    "float64": torch.Tensor.double,
    "float16": torch.Tensor.half,
    "0-dim": lambda x: torch.tensor(1.0, device=x.device),
    "empty": lambda x: x.flatten()[:0],
    "one axis more": lambda x: x[None],
    "one element more": lambda x: torch.cat((x, x[..., :1]), dim=-1),
    "one row more": lambda x: torch.cat((x, x[:1])),
    "every other element": lambda x: torch.stack((x, x), dim=-1)[..., 0],
}
# Where the first tensor differs from the rest, the rest may be named; the state says how many
# layers φ has, and `gradients` how many steps.
EITHER = {"float64", "one element more", "one row more", "empty"}
OTHERS = {
    ("state", "one row more"): "phi",
    ("state", "one axis more"): "state|phi",
    ("gradients", "one row more"): "cotangents",
}


def call(name, given, **form):
    tensors = [given[argument] for argument in OPERATORS[name]]
    if name == "theta_step_":
        tensors = listed(*tensors)
    return getattr(torch.ops.l2l_ref, name)(*tensors, **CASE.form | form)


@every_operator
def test_a_wrong_tensor_is_named(fused, arguments, name):
    """Each argument with each defect; nothing has changed by then."""
    given = arguments(CASE)
    call(name, given)
    before = {argument: x.clone() for argument, x in given.items()}
    for argument, defect in itertools.product(OPERATORS[name], DEFECTS):
        words = OTHERS.get((argument, defect), argument)
        any_shape = name == "theta_step_"  # it is the rest that differs
        if argument == OPERATORS[name][0] and (defect in EITHER or any_shape):
            words = "|".join(OPERATORS[name])
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
    ({"state": (2, 2, MAX_HIDDEN, 12)}, "phi has shape .*, expected"),  # as many as promised
    ({"n": 0}, "phi has shape .*, expected"),  # though it then updates nothing
]  # fmt: skip


@every_operator
@pytest.mark.parametrize("wrong, words", WRONG)
def test_a_wrong_form_or_state_is_named(fused, arguments, name, wrong, words):
    given, form = arguments(CASE), dict(wrong)
    if shape := form.pop("state", None):
        given["state"] = given["state"].new_zeros(shape)
    if form.pop("n", None) == 0:
        given = arguments(CASE._replace(n=0))
        call(name, given)
        given["phi"] = given["phi"][1:]
    with pytest.raises(RuntimeError, match=words):
        call(name, given, **form)


def test_missing_thetas(fused, arguments):
    """The reference refuses as the engine does, also those of another shape."""
    case = CASE._replace(theta_input=True)
    *given, thetas = (arguments(case)[name] for name in UNROLL)
    for module in (fused, equations):
        with pytest.raises(RuntimeError, match="thetas is missing: phi sees theta, pass"):
            module.unroll_meta_gradient(*given, **case.form)
    with pytest.raises(RuntimeError, match="thetas has shape .*, expected"):
        equations.unroll_meta_gradient(*given, thetas[1:], **case.form)


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

    def refused(self, words, *lists):
        with pytest.raises(RuntimeError, match=words):
            self.step(*lists)

    def test_one_is_shorter(self, fused, few):
        thetas, gradients, states, phi = few(3, 4)
        words = "are 2 thetas, . gradients and . states: give"
        self.refused(words, thetas, gradients[:1], states, phi)
        self.refused(words, thetas, gradients, states[1:], phi)
        self.step([], [], [], phi)

    @pytest.mark.parametrize("which", range(3))
    def test_a_wrong_tensor_is_named_by_its_place(self, fused, few, which):
        *lists, phi = few(3, 4, 5)
        for defect in ("float64", "every other element"):
            wrong = [list(tensors) for tensors in lists]
            wrong[which][1] = DEFECTS[defect](wrong[which][1])
            self.refused(("thetas", "gradients", "states")[which] + r"\[1\]", *wrong, phi)

    def test_tensors_lie_apart(self, fused, few):
        """What is written in nothing else, whichever tensors they are; what is read may be
        shared."""
        thetas, gradients, states, phi = few(6, 6, 6)
        self.step(thetas, [gradients[0]] * 3, states, phi)
        (a, b, _), (d, e, _), (s, r, _) = thetas, gradients, states
        end, inner = s.view(-1)[-6:], phi[:6]
        for wrong, words in (
            (([a, b, a], gradients, states), r"thetas\[.\] and thetas\[.\]"),
            (([a, b, end], gradients, states), r"(thetas|states)\[.\] and (thetas|states)\[.\]"),
            (([a, b, inner], gradients, states), r"thetas\[2\] and phi"),
            ((thetas, gradients, [s, r, r]), r"states\[.\] and states\[.\]"),
            ((thetas, [d, e, a], states), r"thetas\[0\] and gradients\[2\]"),
            ((thetas, [d, e, end], states), r"states\[0\] and gradients\[2\]"),
        ):
            self.refused(words + ".* share memory", *wrong, phi)
        memory = torch.zeros(1000, device=phi.device)
        beside = [memory[:6], memory[6:12], memory[12:18]]
        self.step(beside, gradients, states, phi)
