"""Attention of packed texts against softmax attention of each text, written out; the GPU's way against the CPU's."""

import math

import pytest
import torch
from torch import Tensor

from dmoerm_trl.modeling import attention
from dmoerm_trl.modeling.attention import packed_attention
from dmoerm_trl.modeling.prefix_tree import PackedSequences, pack

PROMPT = list(range(100, 120))
TEXTS = [PROMPT + [1, 2, 3], PROMPT + [4], PROMPT, PROMPT + list(range(200, 220)) + [5], list(range(300, 309))]
TEXTS.insert(2, TEXTS[3] + [6, 7])
HEADS, KEY_HEADS, SIZE = 4, 2, 8

CASES = {
    "plain": {},
    "scaling": {"scaling": 0.7},
    "window": {"window": 7},
    "window of one": {"window": 1},
    "window over all": {"window": 1000},
    "softcap": {"softcap": 0.8},
    "softcap, window, scaling": {"softcap": 0.8, "window": 7, "scaling": 0.7},
    "not causal": {"causal": False},
    "softcap, not causal": {"softcap": 0.8, "causal": False},
}
CAUSAL = {name: options for name, options in CASES.items() if "causal" not in options}
cases = pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
both = pytest.mark.parametrize("last_tokens", [False, True], ids=["all tokens", "last tokens"])


def make_forest(share: bool) -> PackedSequences:
    width = max(map(len, TEXTS))
    ids = torch.tensor([text + [0] * (width - len(text)) for text in TEXTS])
    return pack(ids, torch.tensor([len(text) for text in TEXTS]), share=share)


def make_states(
    packed: PackedSequences, experts: int = 3, key_heads: int = KEY_HEADS, dtype=torch.float64
) -> list[Tensor]:
    """Query, key and value of all packed tokens."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(experts, heads, len(packed.input_ids), SIZE) for heads in (HEADS, key_heads, key_heads)]
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


def path_of(packed: PackedSequences, end: int) -> list[int]:
    """Places of a text's tokens, by its last one."""
    return [place for place in range(end + 1) if packed.reach[place] > end]


def by_hand(query, key, value, *, causal=True, scaling=None, window=None, softcap=None) -> Tensor:
    """Attention of one text, (B, heads, L, D) -> (B, L, heads, D), score by score."""
    key, value = (torch.repeat_interleave(states, HEADS // states.shape[1], 1) for states in (key, value))
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * (1 / math.sqrt(SIZE) if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    for q in range(scores.shape[2]):
        for k in range(scores.shape[3]):
            if causal and (k > q or (window is not None and q - k >= window)):
                scores[:, :, q, k] = -math.inf
    return torch.einsum("bhqk,bhkd->bqhd", scores.softmax(-1), value)


def expected(packed: PackedSequences, query, key, value, **options) -> list[Tensor]:
    """For each text: what its tokens get when it is alone."""
    outputs = []
    for end in packed.ends.tolist():
        path = path_of(packed, end)
        outputs.append(by_hand(*(states[:, :, path] for states in (query, key, value)), **options))
    return outputs


def found(function, packed: PackedSequences, query, key, value, last_tokens: bool, **options) -> list[Tensor]:
    """The same of packed tokens; of the last tokens alone with `last_tokens`."""
    if last_tokens:
        out = function(query[:, :, packed.ends], key, value, packed, last_tokens=True, **options)
        return list(out.unsqueeze(2).unbind(1))
    out = function(query, key, value, packed, **options)
    return [out[:, path_of(packed, end)] for end in packed.ends.tolist()]


def flex(query, key, value, packed, last_tokens=False, scaling=None, window=None, softcap=None):
    """The GPU's way; PyTorch runs it on the CPU too, without the kernel."""
    return attention._flex_attention(query, key, value, packed, last_tokens, scaling, window, softcap)


def padded(query, key, value, packed, last_tokens=False, causal=False, scaling=None, softcap=None, dropout=0.0):
    """The GPU's way for encoders."""
    return attention._padded_attention(query, key, value, packed, last_tokens, scaling, dropout, softcap)


@pytest.mark.parametrize("key_heads", [HEADS, KEY_HEADS, 1])
@cases
@both
def test_a_packed_text_attends_as_it_does_alone(options, last_tokens, key_heads):
    packed = make_forest(share=options.get("causal", True))
    states = make_states(packed, key_heads=key_heads)
    tolerance = 1e-6 if "softcap" in options else 1e-12  # its softmax is in fp32, as that of transformers
    for got, alone in zip(
        found(packed_attention, packed, *states, last_tokens, **options),
        expected(packed, *states, **options),
        strict=True,
    ):
        torch.testing.assert_close(got, alone[:, -1:] if last_tokens else alone, atol=tolerance, rtol=0)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("options", CAUSAL.values(), ids=CAUSAL.keys())
@both
def test_the_gpus_way_is_the_cpus(options, last_tokens):
    packed = make_forest(share=True)
    states = make_states(packed, dtype=torch.float32)
    ways = [found(way, packed, *states, last_tokens, **options) for way in (flex, packed_attention)]
    for gpu, cpu in zip(*ways, strict=True):
        torch.testing.assert_close(gpu, cpu, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"scaling": 0.7}, {"softcap": 0.8}], ids=["plain", "scaling", "softcap"])
@pytest.mark.parametrize("key_heads", [HEADS, KEY_HEADS])
@both
def test_the_gpus_way_for_encoders_is_the_cpus(options, key_heads, last_tokens):
    packed = make_forest(share=False)
    states = [state.requires_grad_() for state in make_states(packed, key_heads=key_heads)]
    gradients = []
    for way in (padded, packed_attention):
        outputs = found(way, packed, *states, last_tokens, causal=False, **options)
        gradients.append([*outputs, *torch.autograd.grad(sum((output**2).sum() for output in outputs), states)])
    for gpu, cpu in zip(*gradients, strict=True):
        torch.testing.assert_close(gpu, cpu, atol=1e-5 if "softcap" in options else 1e-12, rtol=0)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("way", [packed_attention, flex, padded])
def test_one_text_of_one_token(way):
    packed = pack(torch.tensor([[7]]), torch.tensor([1]))
    query, key, value = make_states(packed, dtype=torch.float32)
    torch.testing.assert_close(way(query, key, value, packed), value.repeat_interleave(2, 1).transpose(1, 2))


@cases
def test_gradients_are_those_of_the_texts_alone(options):
    packed = make_forest(share=options.get("causal", True))
    states = [state.requires_grad_() for state in make_states(packed)]
    weights = torch.randn(3, 1, HEADS, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = []
    for outputs in (found(packed_attention, packed, *states, False, **options), expected(packed, *states, **options)):
        gradients.append(torch.autograd.grad(sum((output * weights).sum() for output in outputs), states))
    for got, alone in zip(*gradients, strict=True):
        torch.testing.assert_close(got, alone, atol=1e-5 if "softcap" in options else 1e-12, rtol=0)


@pytest.mark.parametrize("options", [{}, {"softcap": 0.8}], ids=["plain", "softcap"])
@pytest.mark.parametrize(("way", "causal"), [(packed_attention, True), (packed_attention, False), (padded, False)])
def test_dropout_drops_weights_and_keeps_their_mean(way, causal, options):
    packed = make_forest(share=causal)
    states = make_states(packed)
    options = options | {"causal": causal}
    torch.manual_seed(0)
    without = way(*states, packed, **options)
    draws = torch.stack([way(*states, packed, dropout=0.5, **options) for _ in range(400)])
    assert not torch.equal(draws[0], draws[1])
    torch.testing.assert_close(draws.mean(0), without, atol=0.5, rtol=0)
    assert (draws.mean(0) - without).abs().mean() < 0.05
