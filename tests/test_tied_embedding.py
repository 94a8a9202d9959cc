"""One gradient for a tied embedding: autograd's bits, in one tensor."""

import copy
import io

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from grpo_fast.attention import packed_attention
from grpo_fast.packing import pack_rows
from grpo_fast.policy import install_scoring, score, score_loss
from grpo_fast.tied_embedding import _Lookup, head_weight, joined_lookups, one_gradient
from grpo_kernels.policy_terms import PolicyLoss
from tests.allocations import Allocations
from tests.tiny_models import gemma2, llama, qwen2

V, D = 60, 8
IDS = torch.tensor([[3, 5, 3, 3], [0, 59, 5, 7]])


class Tied(nn.Module):
    """Looks up, mixes, and multiplies by the embedding's weight: `uses` gives the head's rows of each product."""

    def __init__(self, *, lookups=(IDS,), heads=1, **options):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(V, D, **options)
        self.head = nn.Linear(D, V, bias=False)
        self.head.weight = self.embedding.weight
        self.lookups, self.heads = lookups, heads

    def forward(self):
        with one_gradient():
            hidden = torch.cat([self.embedding(ids).reshape(-1, D) * (i + 2) for i, ids in enumerate(self.lookups)])
            outs = [nn.functional.linear(hidden.sin(), head_weight(self.head.weight)) for _ in range(self.heads)]
            return torch.cat([hidden.flatten(), *(out.square().flatten() for out in outs)])


def gradient(model):
    out = model()
    (out * torch.linspace(-1, 2, out.numel())).sum().backward()
    return model.embedding.weight.grad


@pytest.fixture
def runs(monkeypatch):
    """How often rows were looked up here."""
    counts, forward = [], _Lookup.forward
    monkeypatch.setattr(_Lookup, "forward", staticmethod(lambda ctx, *args: counts.append(1) or forward(ctx, *args)))
    return counts


@pytest.mark.parametrize(
    ("settings", "num_lookups"),
    [
        ({}, 1),
        ({"lookups": (IDS, IDS[1:], IDS.flip(1))}, 3),
        ({"heads": 2}, 1),
        ({"lookups": (IDS, IDS), "heads": 3}, 2),
        # rows alone
        ({"heads": 0}, 1),
        ({"heads": 0, "lookups": (IDS, IDS)}, 2),
        ({"padding_idx": 3}, 1),
        ({"padding_idx": -1, "lookups": (IDS, IDS)}, 2),
        ({"lookups": (IDS[:0],)}, 1),
        ({"lookups": (IDS[0, 0],)}, 1),
        ({"lookups": (torch.full((4,), 3),), "padding_idx": 3}, 1),
        # left to torch
        ({"scale_grad_by_freq": True}, 0),
        ({"max_norm": 0.5}, 0),
    ],
    ids=str,
)
def test_the_gradient_is_autograd_s(settings, num_lookups, runs):
    model = Tied(**settings)
    expected = gradient(copy.deepcopy(model))
    with joined_lookups(model, model.head) as count:
        assert count == 1
        found = gradient(model)
    if num_lookups > 1:
        # autograd adds up each lookup's rows alone
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)
    else:
        assert torch.equal(found, expected)
    assert len(runs) == num_lookups
    assert "forward" not in vars(model.embedding)


def test_the_head_s_gradient_alone(runs):
    model = Tied()

    def gradient_of_head():
        model.zero_grad()
        with one_gradient():
            hidden = model.embedding(IDS).detach()
            nn.functional.linear(hidden, head_weight(model.head.weight)).square().sum().backward()
        return model.embedding.weight.grad

    expected = gradient_of_head()
    with joined_lookups(model, model.head):
        found = gradient_of_head()
    assert runs
    assert expected.any()
    assert torch.equal(found, expected)


def test_a_retained_graph_gives_the_same_again():
    model = Tied()
    with joined_lookups(model, model.head):
        out = model().sum()
        first, second = (torch.autograd.grad(out, model.embedding.weight, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr()


def test_gradients_add_up_over_passes_and_hooks_see_their_sum():
    model, seen = Tied(), []
    twin = copy.deepcopy(model)
    model.embedding.weight.register_hook(lambda grad: seen.append(grad.clone()))
    with joined_lookups(model, model.head):
        single = gradient(model).clone()
        assert torch.equal(seen[0], single)
        assert torch.equal(gradient(model), gradient(twin) * 0 + 2 * single)
    assert torch.equal(seen[1], single)


def test_frozen_and_foreign_embeddings_are_torch_s_own(runs, monkeypatch):
    class Scaled(nn.Embedding):
        def forward(self, input):
            return 2 * super().forward(input)

    model = Tied()
    model.scaled, model.untied = Scaled(V, D), nn.Embedding(V, D)
    model.scaled.weight = model.embedding.weight
    with joined_lookups(model, model.head) as count:
        assert count == 1
        with torch.no_grad():
            model()
        # outside of a pass
        model.embedding(IDS).sum().backward()
        model.embedding.weight.requires_grad = False
        model()
        model.embedding.weight.requires_grad = True
        monkeypatch.setattr(nn.Embedding, "forward", lambda self, input: "theirs")
        with one_gradient():
            assert model.embedding(IDS) == "theirs"
    assert not runs


def test_copies_look_up_their_own_rows():
    model = Tied()
    with joined_lookups(model, model.head):
        twin = copy.deepcopy(model)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        expected = gradient(model).clone()
        with torch.no_grad():
            model.embedding.weight.zero_()
        twin.embedding.weight.grad = None
        assert torch.equal(gradient(twin), expected)
        assert torch.equal(gradient(loaded), expected)


# -- models ------------------------------------------------------------------------------------------------------------


def summed(logps, entropies, rows):
    """Each token's loss is minus its log-prob."""
    slope, never = torch.full_like(logps, -1.0), torch.zeros_like(logps, dtype=torch.bool)
    return PolicyLoss(
        loss=-logps,
        slope=slope,
        entropy_slope=None,
        ratio=torch.ones_like(logps),
        kl=None,
        is_low_clipped=never,
        is_high_clipped=never,
        phi=None,
    )


def rows():
    generator = torch.Generator().manual_seed(3)
    draw = lambda n: torch.randint(3, 97, (n,), generator=generator).tolist()  # noqa: E731
    return [draw(4) for _ in range(3)], [draw(6) for _ in range(3)]


def model_gradients(model, *, through_loss):
    (pack,) = pack_rows(*rows(), max_tokens=None, share_prompts=False)
    model.zero_grad()
    with packed_attention(model):
        if through_loss:
            loss, *_ = score_loss(model, pack, summed, temperature=1.0)
        else:
            loss = -score(model, pack, temperature=1.0)[0].sum()
        loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("through_loss", [True, False])
@pytest.mark.parametrize("family", [llama, qwen2, gemma2])
def test_a_model_s_gradients_are_the_same_bits(family, through_loss, runs):
    model = family(tied=True)
    install_scoring(model)
    expected = model_gradients(model, through_loss=through_loss)
    with joined_lookups(model, model.get_output_embeddings()) as count:
        found = model_gradients(model, through_loss=through_loss)
    # Gemma scales what it looks up in a class of its own
    assert count == len(runs) == (family is not gemma2)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_untied_model_and_one_whose_embedding_has_an_adapter_are_left_alone(runs):
    model = llama(tied=False)
    install_scoring(model)
    with joined_lookups(model, model.get_output_embeddings()) as count:
        assert count == 0
    model = get_peft_model(
        llama(tied=True), LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], init_lora_weights=False)
    )
    install_scoring(model)
    expected = model_gradients(model, through_loss=True)
    lm = model.get_base_model()
    with joined_lookups(lm, lm.get_output_embeddings()):
        found = model_gradients(model, through_loss=True)
    assert not runs
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_head_s_gradient_is_the_only_one():
    model = llama(tied=True)
    install_scoring(model)
    (pack,) = pack_rows(*rows(), max_tokens=None, share_prompts=False)
    made = {}
    for name, head in {"theirs": nn.Module(), "ours": model.get_output_embeddings()}.items():
        model.zero_grad()
        with joined_lookups(model, head), packed_attention(model):
            loss, *_ = score_loss(model, pack, summed, temperature=1.0)
            # the head's gradient is there already
            with Gradients(model.lm_head.weight.shape) as gradients:
                loss.backward()
        made[name] = gradients.num_made
    # of the rows, and the sum of both
    assert made == {"theirs": 2, "ours": 0}


def test_several_lookups_add_to_the_same_gradient():
    model = Tied(lookups=(IDS, IDS, IDS))
    with joined_lookups(model, model.head):
        out = model().sum()
        with Gradients((V, D)) as gradients:
            out.backward()
    # the head's
    assert gradients.num_made == 1


class Gradients(Allocations):
    """Counts what is made in the shape of the weight."""

    def __init__(self, shape):
        super().__init__()
        self.num_made, self._shape = 0, tuple(shape)

    def _record(self, op, tensor):
        super()._record(op, tensor)
        self.num_made += tuple(tensor.shape) == self._shape
