"Recurrent models on a GPU: what the CPU computes, in any layout of texts, with a cache and in bfloat16."
import pytest, torch
from torch.testing import assert_close

from lmnotes.batches import collate, pack
from lmnotes.recurrent import NNLM, RNNLM

pytestmark = pytest.mark.gpu
MODELS = {'nnlm': lambda: NNLM(50, d_model=16, direct=True), **{c: (lambda c=c: RNNLM(50, cell=c, d_model=16, d_hidden=24, n_layers=2)) for c in ('rnn', 'lstm', 'gru')}}


@pytest.mark.parametrize('name', MODELS)
def test_equals_cpu(name):
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    texts = [torch.randint(50, (n,)).tolist() for n in (3, 9, 1, 6)]
    batches = [collate(texts, pad_id=0, side=side) for side in ('left', 'right')] + [collate(pack(texts, block_size=10, eos_id=None), pad_id=0)]
    for batch in batches:
        batch.pop('segment_ids', None)
        want = model(**batch, use_cache=True)
        got = model.cuda()(**{k: v.cuda() for k, v in batch.items()}, use_cache=True)
        assert_close(got.logits.cpu(), want.logits)
        assert_close(got.loss.cpu(), want.loss)
        for a, b in zip(got.past_key_values.tensors, want.past_key_values.tensors): assert_close(a.cpu(), b)
        model.cpu()


@pytest.mark.parametrize('name', MODELS)
def test_trains_in_bf16(name):
    torch.manual_seed(0)
    model = MODELS[name]().cuda()
    ids = torch.arange(40, device='cuda')[None] % 7
    opt = torch.optim.Adam(model.parameters(), lr=.02)
    for _ in range(60):
        with torch.autocast('cuda', torch.bfloat16): loss = model(ids, labels=ids).loss
        opt.zero_grad(); loss.backward(); opt.step()
    assert loss < .2
