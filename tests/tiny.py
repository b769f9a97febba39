"""Tiny random models of every family, hard enough for bugs in folds to show.

Default initialisation has norm gains of 1 and biases of 0, grouped heads of one group and no
outliers, all of which hide mistakes. Here gains are random (some negative), biases are not zero,
key/value heads are shared, one channel is an outlier and one token is massive at `down_proj` of one
block.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

BLOCKS, WIDTH, INNER, VOCAB = 3, 64, 128, 264
BOS, EOS, PAD = 256, 257, 258
MASSIVE_TOKEN = 7  # its embedding is large and hits MASSIVE_UNIT of the MLP of block 1
MASSIVE_UNIT = 3
OUTLIER_CHANNEL = 5  # of the residual stream
SLIDING_WINDOW = 8

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
_GATED: dict[str, Any] = {**_COMMON, "num_key_value_heads": 2, "intermediate_size": INNER}
_GEMMA: dict[str, Any] = {
    **_GATED,
    "head_dim": 32,
    "query_pre_attn_scalar": 24,
    "sliding_window": SLIDING_WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
_QWEN_MOE: dict[str, Any] = {
    **_GATED,
    "moe_intermediate_size": 64,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "mlp_only_layers": [1],  # one dense block between blocks of experts
}
_OPT: dict[str, Any] = {**_COMMON, "ffn_dim": INNER, "word_embed_proj_dim": WIDTH}
_NEOX: dict[str, Any] = {**_COMMON, "intermediate_size": INNER}

_CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaConfig(**_GATED, attention_bias=True, mlp_bias=True),
    "mistral": lambda: hf.MistralConfig(**_GATED, sliding_window=SLIDING_WINDOW),
    "qwen2": lambda: hf.Qwen2Config(**_GATED),
    "qwen3": lambda: hf.Qwen3Config(**_GATED, head_dim=32),
    "gemma2": lambda: hf.Gemma2Config(**_GEMMA),
    "gemma3_text": lambda: hf.Gemma3TextConfig(**_GEMMA),
    "opt": lambda: hf.OPTConfig(**_OPT),
    "phi3": lambda: hf.Phi3Config(**_GATED),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**_NEOX, use_parallel_residual=True),
    "mixtral": lambda: hf.MixtralConfig(**_GATED, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(**_QWEN_MOE, head_dim=32, norm_topk_prob=True),
    "qwen2_moe": lambda: hf.Qwen2MoeConfig(**_QWEN_MOE, shared_expert_intermediate_size=96),
    # The other setting of a family's switch.
    "gpt_neox_serial": lambda: hf.GPTNeoXConfig(**_NEOX, use_parallel_residual=False),
    "opt_post_norm": lambda: hf.OPTConfig(
        **{**_OPT, "word_embed_proj_dim": 48}, do_layer_norm_before=False
    ),
}
FAMILIES = [n for n in _CONFIGS if n not in ("gpt_neox_serial", "opt_post_norm")]
VARIANTS = list(_CONFIGS)  # every family, and the other setting of its switches


def tiny_config(family: str, *, tied: bool) -> Any:
    """Config of the tiny model; every family supports tied and untied heads."""
    config = _CONFIGS[family]()
    config.tie_word_embeddings = tied
    return config


def tiny_model(
    family: str, *, tied: bool = False, seed: int = 0, dtype: torch.dtype = torch.float64
) -> Any:
    """A tiny transformers causal LM in eval mode (experts fused, as transformers builds them).

    Values are drawn in float64 and then cast, so the same seed gives the same model in every dtype.
    """
    config = tiny_config(family, tied=tied)
    model: Any = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model = model.double().eval().requires_grad_(False)
    if hasattr(model.config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")
    _randomise(model, torch.Generator().manual_seed(seed))
    _plant_massive_token(model)
    return model.to(dtype)


def _randomise(model: Any, rng: torch.Generator) -> None:
    gain_offset = 1.0 if model.config.model_type.startswith("gemma") else 0.0
    embedding = model.get_input_embeddings().weight

    def normal(p: Tensor, std: float) -> Tensor:
        return torch.randn(p.shape, generator=rng, dtype=torch.float64) * std

    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.copy_(normal(p, 0.3))
        elif p.ndim == 1:
            sign = torch.where(torch.rand(p.shape, generator=rng) < 0.06, -1.0, 1.0)
            p.copy_(torch.exp(normal(p, 0.5)) * sign - gain_offset)
        elif p is embedding:
            scale = WIDTH**-0.5 if gain_offset else 1.0  # Gemma multiplies by sqrt(width)
            p.copy_(normal(p, scale))
            p[:, OUTLIER_CHANNEL] *= 15
        elif "embed_positions" in name:
            p.copy_(normal(p, 0.5))
        else:
            p.copy_(normal(p, p.shape[-1] ** -0.5))


def _plant_massive_token(model: Any) -> None:
    """A large embedding for MASSIVE_TOKEN, and a unit of block 1 that answers it."""
    embedding = model.get_input_embeddings().weight
    row = embedding[MASSIVE_TOKEN]
    # A tied head would answer a row of 40 with logits of hundreds.
    row *= 6 if model.config.tie_word_embeddings else 40
    row[OUTLIER_CHANNEL] = 0
    name = next(
        n
        for n, _ in model.named_modules()
        if re.search(r"layers\.1\.(mlp\.(experts|up_proj|gate_up_proj|dense_h_to_4h)|fc1)$", n)
    )
    module = model.get_submodule(name)
    seen: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(input_ids=torch.tensor([[MASSIVE_TOKEN]]))
    hook.remove()
    x = seen[0].reshape(-1)[-WIDTH:]
    direction = x / x.dot(x)
    direction[OUTLIER_CHANNEL] = 0  # which every token has
    if name.endswith(("fc1", "dense_h_to_4h")):
        module.weight[MASSIVE_UNIT] += 1000 * direction
    elif name.endswith("up_proj") and not name.endswith("gate_up_proj"):
        gate = model.get_submodule(name.replace("up_proj", "gate_proj"))
        for linear in (gate, module):
            linear.weight[MASSIVE_UNIT] += 40 * direction
    else:  # gate and up fused: of all experts [E, 2I, D], or of one linear layer [2I, D]
        experts = name.endswith("experts")
        fused = module.gate_up_proj if experts else module.weight
        inner = fused.shape[-2] // 2
        for unit in (MASSIVE_UNIT, inner + MASSIVE_UNIT):
            fused[..., unit, :] += 40 * direction


def tiny_tokenizer() -> Any:
    """Byte-level tokenizer: byte b is token b; <s> 256, </s> 257, <pad> 258; chat template."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    chars = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab={chars[b]: b for b in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return fast


def tiny_folder(
    folder: Path,
    family: str,
    tied: bool = False,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Save a tiny model and its tokenizer as transformers does; returns the folder."""
    tiny_model(family, tied=tied, seed=seed, dtype=dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


class DictCheckpoint:
    """A checkpoint in memory."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors


class _Float64(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double

        def wide(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        return func(*map(wide, args), **{k: wide(v) for k, v in (kwargs or {}).items()})


@contextmanager
def exact_float64() -> Iterator[None]:
    """Casts to float32 inside models (norms, softmax, routers) become casts to float64.

    transformers computes norms in float32 whatever the model's dtype; a difference of 1e-16 before
    such a cast can become one of 6e-8 after it. With this, float64 models are float64 throughout.
    """
    with _Float64():
        yield


@torch.no_grad()
def logits_float64(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits [B, L, V] of a float64 model, computed in float64 throughout."""
    with exact_float64():
        return cast(Tensor, model(input_ids=ids, use_cache=False).logits)


def sample_ids(batch: int, length: int, seed: int = 0) -> Tensor:
    """Token ids int64 [batch, length], the massive token first and in the middle."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (batch, length), generator=rng)
    ids[:, 0] = BOS
    ids[:, length // 2] = MASSIVE_TOKEN
    return ids
