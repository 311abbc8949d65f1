"""A Mamba-2 mixer that continues from a state, on any number of tokens and differentiably.

transformers continues its own by single tokens only (5.2), or in place (5.24).
"""

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class States(Protocol):
    """The states of a mixer before and after a forward; see ``Carried``."""

    def get(self, name: str) -> Tensor | None:
        """Return the state of that name; None at the start of a text."""
        ...

    def set(self, name: str, state: Tensor) -> None:
        """Keep a state."""
        ...

    def with_inputs(self, inputs: Tensor, width: int) -> Tensor:
        """Return a convolution's inputs (B, C, T) after the ``width`` before them, and keep the newest ones."""
        ...


def mamba2(module: Any, states: States, hidden: Tensor) -> Tensor:
    """Run a Mamba-2 mixer on hidden states (B, T, E) after ``states``.

    ``module`` is that of Falcon-H1, Bamba or Granite 4 (https://arxiv.org/abs/2405.21060, section 7).
    """
    batch, tokens, _ = hidden.shape
    projected = module.in_proj(hidden * getattr(module, "ssm_in_multiplier", 1.0))
    if hasattr(module, "mup_vector"):
        projected = projected * module.mup_vector
    gate, mixed, steps = projected.split([module.intermediate_size, module.conv_dim, module.num_heads], dim=-1)
    width = module.conv1d.kernel_size[0] - 1
    convolved = module.conv1d(states.with_inputs(mixed.transpose(1, 2), width))[..., width : width + tokens]
    grouped = module.n_groups * module.ssm_state_size
    inputs, write, read = module.act(convolved).transpose(1, 2).split([module.intermediate_size, grouped, grouped], -1)
    exact = torch.promote_types(hidden.dtype, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        steps = F.softplus(steps.to(exact) + module.dt_bias.to(exact)).clamp(*module.time_step_limit)
        inputs = inputs.to(exact).unflatten(-1, (module.num_heads, -1))
        write, read = (
            each.to(exact)
            .unflatten(-1, (module.n_groups, -1))
            .repeat_interleave(module.num_heads // module.n_groups, 2)
            for each in (write, read)
        )
        decays = -module.A_log.to(exact).exp() * steps
        scanned, state = scan(
            inputs * steps[..., None], decays, write, read, states.get("recurrent"), module.chunk_size
        )
        scanned = (scanned + inputs * module.D.to(exact)[:, None]).flatten(2)
    states.set("recurrent", state)
    if getattr(module, "mamba_rms_norm", True):
        rows = 1, batch * tokens, -1  # Falcon-H1's norm drops a dimension of 1
        scanned = module.norm(scanned.reshape(rows), gate.reshape(rows)).reshape(batch, tokens, -1)
    else:
        scanned = scanned * F.silu(gate)
    output: Tensor = module.out_proj(scanned.to(hidden.dtype))
    return output


def scan(
    inputs: Tensor, decays: Tensor, write: Tensor, read: Tensor, state: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor]:
    """Return outputs (B, T, H, P) and the last state (B, H, P, N) of a linear recurrence, ``chunk`` tokens at a time.

    ``state_t = exp(decays_t) * state_(t - 1) + inputs_t write_t^T``, and the output is ``state_t read_t``. Within a
    chunk all tokens are computed together.

    Parameters
    ----------
    inputs, decays, write, read
        (B, T, H, P), (B, T, H) not above 0, (B, T, H, N) and (B, T, H, N).
    state
        That before the first token; None for zeros.
    chunk
        Tokens.
    """
    if state is None:
        state = inputs.new_zeros(len(inputs), *inputs.shape[2:], write.shape[-1])
    outputs = []
    for each, decay, into, out_of in zip(
        *(part.split(chunk, dim=1) for part in (inputs, decays, write, read)), strict=True
    ):
        passed = decay.cumsum(1)  # (B, Q, H)
        between = passed[:, :, None] - passed[:, None]
        future = torch.ones(between.shape[1:3], dtype=torch.bool, device=between.device).triu(1)
        weights = torch.einsum("bqhn,bkhn->bqkh", out_of, into)
        weights = weights * between.masked_fill(future[..., None], -torch.inf).exp()
        before = torch.einsum("bqhn,bhpn->bqhp", out_of, state) * passed[..., None].exp()
        outputs.append(torch.einsum("bqkh,bkhp->bqhp", weights, each) + before)
        left = (passed[:, -1:] - passed).exp()[..., None]
        state = state * passed[:, -1, :, None, None].exp() + torch.einsum("bkhp,bkhn->bhpn", each * left, into)
    return torch.cat(outputs, dim=1), state
