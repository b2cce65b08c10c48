"""What only a GPU can show. Needs torch, numpy and pytest with the checkout on the path; no nbdev, plotly or datasets:

    python -m pytest tests/gpu -q
"""
import pytest, torch

from lmnotes.core import best_device, best_dtype, profile, seed_everything

pytestmark = pytest.mark.gpu


def tiny():
    from lmnotes.models import Transformer, TransformerConfig
    seed_everything(0)
    return Transformer(TransformerConfig(vocab_size=97, d_model=64, n_layers=2, n_heads=4, d_ff=128, max_len=64))


def test_best_device_and_dtype(monkeypatch):
    monkeypatch.delenv('LMNOTES_PROFILE', raising=False)
    assert best_device().type == 'cuda'
    assert best_dtype(best_device()) == (torch.bfloat16 if torch.cuda.get_device_capability()[0] >= 8 else torch.float32)
    assert profile(test=1, cpu=2, gpu=3) == 3


def test_seed_covers_the_gpu():
    seed_everything(3)
    a = torch.rand(1000, device='cuda')
    seed_everything(3)
    torch.testing.assert_close(a, torch.rand(1000, device='cuda'), rtol=0, atol=0)


def test_attention_equals_cpu():
    from lmnotes.attention import attention, causal_mask, sdpa
    seed_everything(0)
    q, k, v = torch.randn(3, 2, 4, 33, 16, dtype=torch.float64).unbind(0)
    expected, _ = attention(q, k, v, mask=causal_mask(33))
    for f in (lambda *a, **kw: attention(*a, **kw)[0], sdpa):
        out = f(q.cuda(), k.cuda(), v.cuda(), mask=causal_mask(33).cuda())
        torch.testing.assert_close(out.cpu(), expected, rtol=1e-10, atol=1e-10)


def test_model_equals_cpu():
    from lmnotes.lm import nll
    model = tiny().eval()
    ids = torch.randint(0, 97, (3, 40), generator=torch.Generator().manual_seed(1))
    def run(device):
        with torch.no_grad(): return nll(model.to(device), dict(input_ids=ids.to(device), labels=ids.to(device)))
    (cpu, n), (gpu, m) = run('cpu'), run('cuda')
    assert int(n) == int(m)
    torch.testing.assert_close(torch.as_tensor(gpu).cpu(), torch.as_tensor(cpu), rtol=1e-4, atol=1e-3)


def test_a_few_steps_lower_the_loss():
    model = tiny().cuda().train()
    ids = torch.randint(0, 97, (8, 32), generator=torch.Generator().manual_seed(2)).cuda()
    opt, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(30):
        with torch.autocast('cuda', best_dtype('cuda'), enabled=best_dtype('cuda') != torch.float32): loss = model(input_ids=ids, labels=ids).loss
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
