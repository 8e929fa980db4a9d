"""The mathematics as plain PyTorch: the specification that every kernel is tested against.

Shapes: N coordinates, H hidden units, L layers, F inputs (2, or 3 with `theta_input`), T steps.

    theta      [N]           all parameters of a φ-group on one flat axis
    gradient   [N]           what φ takes as input; the `gradients` of an unroll are [T, N]
    state      [L, 2, H, M]  layer, (h, c), unit, coordinate. M = N, or 2N in the odd form:
                             the states of m(x) first, then those of m(-x)
    phi        [P]           φ packed in the order of `MetaOptimizer.weights()`
    moments    [3, N]        of the nominal term: Adam's two, and how many gradients they hold

The coordinate is the contiguous axis, so SIMD lanes and GPU warps read neighbours. `theta_step_`,
`theta_step` and `unroll_meta_gradient` are the three operators of the engine, with the signatures
of their fused forms. All tensors of a call share one floating dtype and one device; any will do.
"""

import math
from collections.abc import Callable, Sequence
from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

THETA_SCALE, THETA_CLAMP = 10.0, 5.0  # the optional third input is clamp(10·θ, ±5)
MAX_P = 80  # beyond, e^p overflows float32 and a zero gradient would become nan
BETAS, EPSILON = (0.9, 0.999), 1e-8  # of Adam's direction (Kingma & Ba 2015)
Tensors = Sequence[Tensor]
Loss = Callable[..., Tensor]  # (model, x, y) -> 0-dim loss, averaged over the batch
BLOCK = 2048  # coordinates whose graph `unroll_meta_gradient` holds at once


class Form(TypedDict):
    """The settings of the update rule that are not weights; every operator takes them by name."""

    p: float  # in (0, MAX_P], range of the logarithm in Eq. 5
    output_scale: float  # s, multiplies the head's output
    theta_input: bool  # θ is a third input of the LSTM
    odd: bool  # the update is m(x) - m(-x)


def preprocess(gradient: Tensor, p: float) -> Tensor:
    """Eq. 5: split a gradient into the logarithm of its size and its direction.

    Args:
        gradient: any shape.
        p: in (0, MAX_P], the range of the logarithm; a gradient below e^-p enters linearly.

    Returns:
        [2, *gradient.shape]: (log|g| / p, sign g) where |g| >= e^-p, else (-1, e^p·g). NaN and
        infinities propagate.
    """
    magnitude = gradient.abs()
    large = magnitude >= math.exp(-p)
    # log 1 in the branch not taken: its derivative is 0 there, where that of log 0 would be nan.
    log = torch.where(large, magnitude, 1.0).log() / p
    direction = torch.where(large, gradient.sign(), math.exp(p) * gradient)
    return torch.stack((torch.where(large, log, -1.0), direction))


def lstm_cell(
    x: Tensor, h: Tensor, c: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor
) -> tuple[Tensor, Tensor]:
    """One LSTM layer, one step: x [F, M], h and c [H, M] -> the next h and c [H, M].

    Weights [4H, F] and [4H, H], biases [4H], in PyTorch's gate order (i, f, g, o). The cell state
    is the c_t of the paper's Eq. 3 (Hochreiter & Schmidhuber 1997).
    """
    gates = w_ih @ x + w_hh @ h + (b_ih + b_hh)[:, None]  # [4H, M]
    i, f, g, o = gates.chunk(4)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def phi_shapes(num_layers: int, hidden_size: int, inputs: int) -> list[tuple[int, ...]]:
    """Shapes of φ's tensors in packed order: w_ih, w_hh, b_ih, b_hh a layer, then the head."""
    gates = 4 * hidden_size
    shapes: list[tuple[int, ...]] = []
    for layer in range(num_layers):
        width = hidden_size if layer else inputs
        shapes += [(gates, width), (gates, hidden_size), (gates,), (gates,)]
    return [*shapes, (1, hidden_size), (1,)]


def unpack(phi: Tensor, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """Views of the packed φ [P], one for each of `shapes`."""
    parts = phi.split([math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def update(
    theta: Tensor | None, gradient: Tensor, state: Tensor, phi: Tensor, **form: Unpack[Form]
) -> tuple[Tensor, Tensor]:
    """Eq. 4: what φ proposes for each coordinate, u = s·(w·h + b), and the next state.

    Eq. 3 reads θ ← θ + c, but the cell has 20 units and θ is one number: a linear head (w, b) on
    the top layer's h makes it one, and the output scale s keeps early updates small
    (Andrychowicz et al. 2016). Odd: u = m(x) - m(-x), so that u(-g) = -u(g); the head's bias
    cancels and φ cannot drift where there is no gradient. Only a φ that sees θ needs `theta`.

    Returns:
        u [N] and the next state, shaped like `state`.
    """
    inputs = preprocess(gradient, form["p"])  # [F, N]
    if form["theta_input"]:
        assert theta is not None, "phi sees theta"
        seen = (THETA_SCALE * theta).clamp(-THETA_CLAMP, THETA_CLAMP)
        inputs = torch.cat((inputs, seen[None]))
    if form["odd"]:  # Eq. 5 of -g: the first number stays, the second flips; so does θ
        mirrored = torch.cat((inputs[:1], -inputs[1:]))
        inputs = torch.cat((inputs, mirrored), dim=1)  # [F, 2N]

    num_layers, _, hidden_size, _ = state.shape
    shapes = phi_shapes(num_layers, hidden_size, inputs.shape[0])
    *weights, head_weight, head_bias = unpack(phi, shapes)
    below, next_state = inputs, []
    for layer in range(num_layers):
        h, c = lstm_cell(below, *state[layer], *weights[4 * layer : 4 * layer + 4])
        next_state.append(torch.stack((h, c)))
        below = h
    out = (head_weight @ below).squeeze(0) + head_bias
    if form["odd"]:
        out = torch.sub(*out.chunk(2))
    return form["output_scale"] * out, torch.stack(next_state)


def theta_step(
    theta: Tensor, gradient: Tensor, state: Tensor, phi: Tensor, **form: Unpack[Form]
) -> tuple[Tensor, Tensor]:
    """Eq. 3, differentiable in theta, gradient, state and phi: returns θ + u and the next state."""
    u, state = update(theta, gradient, state, phi, **form)
    return theta + u, state


@torch.no_grad()
def theta_step_(
    thetas: Tensors, gradients: Tensors, states: Tensors, phi: Tensor, **form: Unpack[Form]
) -> None:
    """Eq. 3 in place: θ + u into `thetas`, of any shapes S; `states` [L, 2, H, signs, *S]."""
    for theta, gradient, state in zip(thetas, gradients, states, strict=True):
        inputs = theta.flatten(), gradient.flatten(), state.flatten(3)
        for own, following in zip((theta, state), theta_step(*inputs, phi, **form), strict=True):
            own.copy_(following.view_as(own))


def unroll_meta_gradient(
    gradients: Tensor,
    state: Tensor,
    cotangents: Tensor,
    phi: Tensor,
    thetas: Tensor | None = None,
    **form: Unpack[Form],
) -> Tensor:
    """dφ of an unroll in closed form: Σ_s (du_s/dφ)ᵀ · cotangents[s], back through time.

    To first order nothing of the optimizee's graph is needed: `cotangents` says all that the
    meta-loss has to say about the updates (see `update_cotangents`). One block of coordinates goes
    forward and back at a time, so memory does not grow with N·T times the activations.

    Args:
        gradients: [T, N], the inputs of φ.
        state: [L, 2, H, M], before the first update.
        cotangents: [T, N], derivative of the meta-loss with respect to each update.
        phi: [P].
        thetas: [T, N], θ before each update; only a φ that sees θ (`theta_input`) needs them. What
            moved θ from row to row does not matter: φ's updates need not be all.

    Returns:
        [P], packed like `phi`.
    """
    if thetas is not None and thetas.shape != gradients.shape:
        shape, expected = list(thetas.shape), list(gradients.shape)
        raise RuntimeError(f"thetas has shape {shape}, expected {expected}")
    if thetas is None and form["theta_input"]:
        raise RuntimeError(
            "thetas is missing: phi sees theta, pass the theta [T, N] that each update saw"
        )
    steps, n = gradients.shape
    by_sign = state.view(*state.shape[:3], 2 if form["odd"] else 1, n)
    phi = phi.detach().requires_grad_()
    total = torch.zeros_like(phi)
    for start in range(0, n, BLOCK):
        part, updates = slice(start, start + BLOCK), []
        own_state = by_sign[..., part].flatten(3)
        with torch.enable_grad():
            for t in range(steps):
                theta = None if thetas is None else thetas[t, part].detach()
                gradient = gradients[t, part].detach()
                u, own_state = update(theta, gradient, own_state, phi, **form)
                updates.append(u)
        total += torch.autograd.grad(torch.stack(updates), phi, cotangents[:, part])[0]
    return total


def update_cotangents(loss_gradients: Tensor, weights: Tensor | None = None) -> Tensor:
    """Derivative of Σ_t L_t with respect to each update, [T, N] -> [T, N].

    `loss_gradients[t]` is ∇L at the θ that update t led to. Update s moves every later θ by as much
    as itself: suffix sums. With `weights` w [T] it is ∇L at the running average
    θ̄_t = (1 - w_t)·θ̄_{t-1} + w_t·θ_t, which update s moves by 1 - Π_{k=s..t} (1 - w_k) of that.
    """
    if weights is None:
        return loss_gradients.flip(0).cumsum(0).flip(0)
    later = torch.ones_like(weights).expand(len(weights), -1).triu() > 0
    return (1 - torch.where(later, 1 - weights, 1.0).cumprod(1)) @ loss_gradients


def adam_direction(gradient: Tensor, moments: Tensor) -> tuple[Tensor, Tensor]:
    """Adam's direction d = m̂ / (√v̂ + 1e-8), which the nominal term follows: θ ← θ + u - η·d.

    With it φ begins as Adam of learning rate η, and learns what to add (a nominal term in the sense
    of Harrison et al. 2022; not in the paper).

    Args:
        gradient: [N], the input of φ.
        moments: [3, N]: first and second moment and how many gradients they hold, 0 at the start.

    Returns:
        d [N] and the next moments [3, N].
    """
    first, second, count = *moments[:2], moments[2] + 1
    first = torch.lerp(first, gradient, 1 - BETAS[0])
    second = torch.lerp(second, gradient.square(), 1 - BETAS[1])
    weights = [-torch.expm1(math.log(beta) * count) for beta in BETAS]  # 1 - βᵗ
    seen = second > 0  # a root's slope at 0 is infinite; there d is 0 anyway
    root = torch.where(seen, second / weights[1], 1.0).sqrt()
    d = torch.where(seen, first / weights[0] / (root + EPSILON), 0.0)
    return d, torch.stack((first, second, count))


def cross_entropy(model: Callable, x: Tensor, y: Tensor) -> Tensor:
    """The loss of a classifier: logits model(x) [b, classes] and labels y [b], averaged."""
    return F.cross_entropy(model(x), y)


def robust_loss(
    loss: Loss,
    model: Callable,
    x: Tensor,
    y: Tensor,
    *,
    attack: Callable,
    alpha: float,
    penalty: float = 0.0,
) -> Tensor:
    """Eq. 6: α·l(θ, x, y) + (1 - α)·l(θ, x', y), with x' crafted against the current θ.

    Args:
        attack: (model, x, y) -> x'; not called for alpha = 1.
        alpha: in [0, 1]; 1 is the clean loss alone, 0 the adversarial loss alone. A loss that
            weighs nothing is not computed.
        penalty: λ >= 0 of `penalised`, which takes the place of the clean loss.
    """
    if alpha < 1:
        adversarial = loss(model, attack(model, x, y), y)
        if alpha == 0:
            return adversarial
    clean = penalised(loss, model, x, y, penalty) if penalty else loss(model, x, y)
    return clean if alpha == 1 else alpha * clean + (1 - alpha) * adversarial


def penalised(loss: Loss, model: Callable, x: Tensor, y: Tensor, penalty: float) -> Tensor:
    """l + λ·Σ|∂l/∂x|, of a batch x whose loss l is its mean; differentiable (double backward).

    To first order l + ε·‖∂l/∂x‖₁ is the loss under any attack of l∞ radius ε, and no attacked
    sample is needed to know it (Drucker & Le Cun 1992; Ross & Doshi-Velez 2018; not in the paper).
    """
    x = x.detach().requires_grad_()
    value = loss(model, x, y)
    (slope,) = torch.autograd.grad(value, x, create_graph=True)
    return value + penalty * slope.abs().sum()
