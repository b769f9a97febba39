"""Norms in training: what their shares make of them, and gradients."""

from __future__ import annotations

import pytest
import torch
from tests.opened import open_trained, tiny_job
from tests.tiny import FAMILIES
from torch import Tensor, nn
from torch.func import functional_call
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from crossbit.engine.norms import TrainedNorm, trained_norms

NORMS = [(LlamaRMSNorm, 0), (Gemma3RMSNorm, 1), (nn.LayerNorm, 0)]


def trained(kind: type[nn.Module], offset: int) -> TrainedNorm:
    """A norm of 12 channels with gains of both signs, half trained."""
    torch.manual_seed(0)
    module = nn.Sequential(kind(12))
    for parameter in module.parameters():
        parameter.data.normal_()
    module.requires_grad_(False)
    (norm,) = trained_norms(module, offset)
    for share in norm.parameters.values():
        share.normal_(std=0.1)
    norm.apply()
    return norm


@pytest.mark.parametrize(("kind", "offset"), NORMS)
def test_gradients_are_those_of_autograd(kind: type[nn.Module], offset: int) -> None:
    norm = trained(kind, offset)
    x, pull = torch.randn(2, 5, 7, 12).double()
    norm.leaves(True)
    with torch.enable_grad():
        (norm.module(x.float()) * pull.float()).sum().backward()
    found = norm.gradients({})
    norm.leaves(False)
    assert all(p.grad is None and not p.requires_grad for p in norm.module.parameters())

    shares = {k: p.double().requires_grad_() for k, p in norm.parameters.items()}
    gain = norm.own["weight"].double() + offset
    made = {"weight": gain * (1 + shares["gain"]) - offset}
    if "bias" in shares:
        made["bias"] = norm.own["bias"].double() + shares["bias"] * gain.abs().mean()
    with torch.enable_grad():
        loss = (functional_call(norm.module.double(), made, (x,)) * pull).sum()
    wanted = torch.autograd.grad(loss, list(shares.values()))
    assert found.keys() == shares.keys()
    for key, gradient in zip(shares, wanted, strict=True):
        torch.testing.assert_close(found[key].double(), gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_norm_of_a_block_is_found_and_begins_as_it_is(family: str) -> None:
    job = tiny_job(family, norms=True)
    block = open_trained(job)
    before = {n: p.detach().clone() for n, p in block.module.named_parameters()}
    found = trained_norms(block.module, job.shell.structure.family.gain_offset)
    named = {f"{norm.name}.{key}" for norm in found for key in norm.own}
    linear = {f"{name}.{key}" for name in block.layers for key in ("weight", "bias")}
    routers = {n for n, p in before.items() if p.ndim > 1}
    assert named == before.keys() - linear - routers
    assert found
    for norm in found:
        norm.apply()
    after: dict[str, Tensor] = dict(block.module.named_parameters())
    for name, parameter in before.items():
        assert torch.equal(parameter, after[name]), name
