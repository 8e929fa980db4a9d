"""What the fused operators cannot take raises a RuntimeError that names it; nothing crashes."""

import itertools
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
    "bfloat16": torch.Tensor.bfloat16,
    "integers": torch.Tensor.long,
    "complex": lambda x: x.to(torch.complex64),
    "bool": torch.Tensor.bool,
    "0-dim": lambda x: torch.tensor(1.0, device=x.device),
    "empty": lambda x: x.flatten()[:0],
    "one axis more": lambda x: x[None],
    "one element more": lambda x: torch.cat((x, x[..., :1]), dim=-1),
    "one row more": lambda x: torch.cat((x, x[:1])),
    "every other element": every_other,
    "broadcast": lambda x: torch.zeros(1, device=x.device).expand(x.shape),
    "meta": lambda x: x.to("meta"),
}
# Where the first tensor differs from the rest, the rest may be named; the state says how many
# layers φ has, and `gradients` how many steps.
EITHER = {"float64", "one element more", "one row more", "empty", "meta"}
OTHERS = {"state": "phi", "gradients": "cotangents"}


def call(name, given, **form):
    operator = getattr(torch.ops.l2l_ref, name)
    tensors = [given[argument] for argument in OPERATORS[name]]
    if name == "theta_step_":
        tensors = listed(*tensors)
    return operator(*tensors, **CASE.form | form)


@pytest.mark.parametrize("name", OPERATORS)
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


@pytest.mark.parametrize("name", OPERATORS)
class TestWhateverTheOperator:
    @pytest.mark.parametrize("p", [0.0, -1.0, 80.5, float("inf"), float("nan")])
    def test_p_out_of_range(self, fused, arguments, name, p):
        with pytest.raises(RuntimeError, match="p is .*: it must be above 0 and at most 80"):
            call(name, arguments(), p=p)

    @pytest.mark.parametrize("form", [{"theta_input": True}, {"odd": False}])
    def test_a_form_that_the_tensors_do_not_fit(self, fused, arguments, name, form):
        with pytest.raises(RuntimeError, match=r"(phi|state\S*) has shape .*, expected"):
            call(name, arguments(), **form)

    @pytest.mark.parametrize(
        "shape", [(0, 2, 4, 12), (2, 2, 0, 12), (2, 1, 4, 12), (2, 3, 4, 12), (2, 4, 12)]
    )
    def test_a_state_of_another_layout(self, fused, arguments, name, shape):
        given = arguments()
        given["state"] = given["state"].new_zeros(shape)
        with pytest.raises(RuntimeError, match=r"(state\S*|phi) has shape .*, expected"):
            call(name, given)

    def test_too_many_units(self, fused, arguments, name):
        given = arguments()
        given["state"] = given["state"].new_zeros(2, 2, 257, 12)
        with pytest.raises(RuntimeError, match=r"state\S* has 257 units, .* at most 256"):
            call(name, given)

    def test_a_sparse_tensor(self, fused, arguments, name):
        given = arguments()
        with pytest.raises((RuntimeError, NotImplementedError)):
            call(name, given | {(first := OPERATORS[name][0]): given[first].to_sparse()})

    def test_no_coordinates_still_need_a_phi_that_fits(self, fused, arguments, name):
        case = CASE._replace(n=0)
        given = arguments(case)
        call(name, given)
        with pytest.raises(RuntimeError, match="phi has shape"):
            call(name, given | {"phi": given["phi"][1:]})


@pytest.mark.parametrize(
    "argument, named", [("gradients", "cotangents"), ("cotangents",) * 2, ("thetas",) * 2]
)
def test_steps_that_differ(fused, arguments, argument, named):
    """`gradients` says how many steps there are."""
    given = arguments()
    given[argument] = given[argument][:2]
    with pytest.raises(RuntimeError, match=f"{named} has shape"):
        call("unroll_meta_gradient", given)


def test_thetas_that_are_missing(fused, arguments):
    """Only where φ sees them, and the reference says the same."""
    case = CASE._replace(theta_input=True)
    tensors = [arguments(case)[name] for name in UNROLL[:-1]]
    for module in (fused, equations):
        with pytest.raises(RuntimeError, match="thetas is missing: phi sees theta, pass"):
            module.unroll_meta_gradient(*tensors, **case.form)
    given = arguments() | {"thetas": None}
    assert call("unroll_meta_gradient", given).isfinite().all()


@pytest.mark.parametrize("theta_input", [False, True])
@pytest.mark.parametrize("defect", ["one row more", "one element more", "one axis more", "empty"])
def test_the_reference_refuses_thetas_of_another_shape(arguments, theta_input, defect):
    case = CASE._replace(theta_input=theta_input)
    given = arguments(case)
    given["thetas"] = DEFECTS[defect](given["thetas"])
    with pytest.raises(RuntimeError, match="thetas has shape .*, expected"):
        equations.unroll_meta_gradient(*(given[name] for name in UNROLL), **case.form)
    few = [given[name] for name in ("gradients", "state", "phi", "thetas")]
    with pytest.raises(RuntimeError, match="thetas has shape .*, expected"):
        equations.unroll(*few, **case.form)


@pytest.mark.parametrize("hidden", [MAX_HIDDEN - 1, MAX_HIDDEN])
def test_as_many_units_as_promised(fused, hidden):
    case = Case(3, 1, hidden, steps=1)
    (results,) = run_unroll(fused, case, cpu_arguments(case, torch.float32))
    assert results.isfinite().all() and results.any()


@pytest.mark.parametrize("argument", STEP)
def test_the_functions_refuse_what_the_operators_refuse(fused, arguments, argument):
    given = arguments()
    given[argument] = every_other(given[argument])
    tensors = [given[name] for name in STEP]
    for function, inputs in ((fused.theta_step_, listed(*tensors)), (fused.theta_step, tensors)):
        with pytest.raises(RuntimeError, match=rf"({argument}\S*) is not contiguous: pass \1"):
            function(*inputs, **CASE.form)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", OPERATORS)
def test_an_output_scale_that_is_no_number(fused, arguments, name, scale):
    given = arguments()
    with pytest.raises(RuntimeError, match="output_scale is -?(nan|inf): it must be finite"):
        call(name, given, output_scale=scale)


@pytest.mark.parametrize("inside", ["state", "phi", "gradient"])
@pytest.mark.parametrize("written", ["theta", "state"])
def test_what_is_written_does_not_lie_in_what_is_read(fused, device, written, inside):
    """In place, one tensor in the memory of another, at its beginning and at its end."""
    if written == inside:
        return
    given = {name: x.to(device) for name, x in cpu_arguments(CASE, torch.float32).items()}
    a, b = given[written].numel(), given[inside].numel()
    memory = torch.zeros(a + b, device=device)
    for begin, ok in ((0, False), (b - 1, False), (b, True)):
        given[written] = memory[begin : begin + a].view(given[written].shape)
        given[inside] = memory[:b].view(given[inside].shape)
        if ok:
            call("theta_step_", given)
            continue
        words = rf"{written}\S* and {inside}\S* share|{inside}\S* and {written}\S* share"
        with pytest.raises(RuntimeError, match=words):
            call("theta_step_", given)


def test_a_wrong_keyword_is_refused(fused, arguments):
    given = arguments()
    tensors = [given[name] for name in STEP]
    form = {**CASE.form}
    del form["odd"]
    for wrong in (form, CASE.form | {"scale": 1.0}):
        with pytest.raises((RuntimeError, TypeError)):
            fused.theta_step_(*listed(*tensors), **wrong)


def test_a_gradient_in_an_arbitrary_layout_gets_its_derivative(fused, arguments):
    """Cotangents come from autograd in any layout."""
    case = Case(4, 1, 3)
    given = arguments(case)
    tensors = [given[name].requires_grad_() for name in STEP]
    theta, state = fused.theta_step(*tensors, **case.form)
    grads = torch.autograd.grad((theta.sum(), state.transpose(2, 3).square().sum()), tensors)
    assert all(g.isfinite().all() for g in grads)


def few(arguments, *sizes):
    """Arguments of theta_step_, of tensors of those sizes."""
    given = [arguments(CASE._replace(n=n)) for n in sizes]
    lists = [[each[name] for each in given] for name in STEP[:3]]
    return *lists, given[0]["phi"]


def step_(*lists):
    torch.ops.l2l_ref.theta_step_(*lists, **CASE.form)


def test_lists_of_which_one_is_shorter(fused, arguments):
    thetas, gradients, states, phi = few(arguments, 3, 4)
    for wrong in ((thetas, gradients[:1], states), (thetas, gradients, states[1:])):
        with pytest.raises(
            RuntimeError, match="there are 2 thetas, . gradients and . states: give"
        ):
            step_(*wrong, phi)


@pytest.mark.parametrize("which", range(3))
def test_a_wrong_tensor_of_a_list_is_named_by_its_place(fused, arguments, which):
    lists = few(arguments, 3, 4, 5)
    for defect in ("float64", "every other element", "meta"):
        wrong = [list(tensors) for tensors in lists[:3]]
        wrong[which][1] = DEFECTS[defect](wrong[which][1])
        argument = ("thetas", "gradients", "states")[which]
        with pytest.raises(RuntimeError, match=argument + (r"\[1\]" if defect != "meta" else "")):
            step_(*wrong, lists[3])


def test_tensors_of_a_list_lie_apart(fused, arguments):
    """What is written in nothing else, whichever tensors they are; what is read may be shared."""
    thetas, gradients, states, phi = few(arguments, 6, 6, 6)
    step_(thetas, [gradients[0]] * 3, states, phi)
    for wrong, words in (
        (([thetas[0], thetas[1], thetas[0]], gradients, states), r"thetas\[.\] and thetas\[.\]"),
        ((thetas, gradients, [states[0], states[1], states[1]]), r"states\[.\] and states\[.\]"),
        ((thetas, [*gradients[:2], thetas[0]], states), r"thetas\[0\] and gradients\[2\]"),
        ((thetas, [*gradients[:2], states[0].view(-1)[:6]], states), r"states\[0\] and gradients"),
    ):
        with pytest.raises(RuntimeError, match=words + ".* share memory"):
            step_(*wrong, phi)
    memory = torch.zeros(1000, device=phi.device)  # a long one, a short one within, one beyond
    inside = [memory[:6], memory[2:4], memory[10:16]]
    with pytest.raises(RuntimeError, match="share memory"):
        step_(inside, [torch.zeros_like(x) for x in inside], few(arguments, 6, 2, 6)[2], phi)


def test_a_list_of_none(fused, arguments):
    step_([], [], [], arguments()["phi"])
