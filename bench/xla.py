"""The same step and meta-gradient in JAX, compiled by XLA: what the compiler of another library
makes of them. An optional extra: pip install jax.

Arrays as in `l2l_ref.equations`.
"""

import math
import os
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from bench.case import SHARE, UNROLL_BYTES, Case, Peer, Unavailable, must_fit, need, ns
from l2l_ref.equations import THETA_CLAMP, THETA_SCALE, phi_shapes


def started() -> Any:
    """The module `jax`, on the CPU and as many threads as PyTorch has now.

    Raises:
        Unavailable: it is not installed, or began with another number of threads.
    """
    threads = str(torch.get_num_threads())
    if os.environ.setdefault("PJRT_NPROC", threads) != threads:
        raise Unavailable(f"began with PJRT_NPROC={os.environ['PJRT_NPROC']}, and keeps to that")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    try:
        import jax
    except ImportError:
        raise Unavailable("is not installed: pip install jax") from None
    return jax


def array(tensor: Tensor) -> Any:
    """A copy for JAX."""
    return started().numpy.array(tensor.numpy(), copy=True)


def update(case: Case) -> Any:
    """`equations.update` of the case's φ: (theta, gradient, state, phi) -> (u, next state)."""
    jax, form = started(), case.meta.form
    jnp, p = jax.numpy, form["p"]
    layers, _, hidden, _ = case.state.shape
    shapes = phi_shapes(layers, hidden, 3 if form["theta_input"] else 2)

    ends = list(accumulate(map(math.prod, shapes)))

    def unpacked(phi: Any) -> list[Any]:
        parts = jnp.split(phi, ends[:-1])
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    def inputs(theta: Any, gradient: Any) -> Any:
        size = jnp.abs(gradient)
        large = size >= jnp.exp(jnp.float32(-p))
        log = jnp.where(large, jnp.log(jnp.where(large, size, 1)) / p, -1)
        rows = [log, jnp.where(large, jnp.sign(gradient), jnp.exp(jnp.float32(p)) * gradient)]
        if form["theta_input"]:
            rows.append(jnp.clip(THETA_SCALE * theta, -THETA_CLAMP, THETA_CLAMP))
        if form["odd"]:
            rows = [jnp.concatenate((row, row if i == 0 else -row)) for i, row in enumerate(rows)]
        return jnp.stack(rows)

    def one(theta: Any, gradient: Any, state: Any, phi: Any) -> Any:
        *weights, head, bias = unpacked(phi)
        below, after = inputs(theta, gradient), []
        for layer in range(layers):
            w_ih, w_hh, b_ih, b_hh = weights[4 * layer : 4 * layer + 4]
            gates = w_ih @ below + w_hh @ state[layer, 0] + (b_ih + b_hh)[:, None]
            i, f, g, o = jnp.split(gates, 4)
            c = jax.nn.sigmoid(f) * state[layer, 1] + jax.nn.sigmoid(i) * jnp.tanh(g)
            below = jax.nn.sigmoid(o) * jnp.tanh(c)
            after.append(jnp.stack((below, c)))
        u = (head @ below)[0] + bias
        if form["odd"]:
            u = jnp.subtract(*jnp.split(u, 2))
        return form["output_scale"] * u, jnp.stack(after)

    return one


def step(case: Case) -> Peer:
    """T jitted updates, each in the memory of the last (donated buffers)."""
    jax, one = started(), update(case)
    must_fit(case)

    def advance(theta: Any, gradient: Any, state: Any, phi: Any) -> Any:
        u, state = one(theta, gradient, state, phi)
        return theta + u, state

    jitted = jax.jit(advance, donate_argnums=(0, 2))
    theta, state, phi = map(array, (case.theta, case.state, case.phi))
    gradients = [array(gradient) for gradient in case.gradients]

    def run() -> Tensor:
        nonlocal theta, state
        for gradient in gradients:
            theta, state = jitted(theta, gradient, state, phi)
        theta.block_until_ready()
        return torch.from_dlpack(theta)

    return Peer(run, ns(case))


def meta_gradient(case: Case) -> Peer:
    """Reverse mode through a scan over the steps, jitted, for all coordinates at once."""
    jax, one = started(), update(case)
    need(UNROLL_BYTES * len(case.gradients) * case.state.shape[-1], case.theta.device, SHARE)

    def surrogate(phi: Any, state: Any, rows: Any) -> Any:
        def advance(state: Any, row: Any) -> Any:
            theta, gradient, cotangent = row
            u, state = one(theta, gradient, state, phi)
            return state, (u * cotangent).sum()

        return jax.lax.scan(advance, state, rows)[1].sum()

    jitted = jax.jit(jax.grad(surrogate))
    unread = case.gradients  # stands where φ does not see θ, and costs nothing
    rows = (unread if case.thetas is None else case.thetas, case.gradients, case.cotangents)
    data = array(case.phi), array(case.state), tuple(map(array, rows))
    return Peer(lambda: torch.from_numpy(jax.device_get(jitted(*data)).copy()), ns(case))
