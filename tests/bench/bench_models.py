"""Our Transformer with a GPT-2 configuration against GPT2LMHeadModel: the same weights, the same ids, float32 on the CPU, no dropout.

Training is forward and backward with labels, with GPT-2's vocabulary of 50,257; the peer runs in its default settings (fused attention).
Memory is what one such step adds to the resident set of a fresh process at its peak, gradients included, the model and the ids there before.
Decoding is greedy with a cache, 16 tokens of prompt and 100 new ones, a vocabulary of 4,096, no end token; `generate` of transformers with
its defaults. All tokens must be the same.
"""
import torch
from harness import Row, peak_memory

SHAPE = dict(n_embd=256, n_layer=4, n_head=4, n_positions=512, resid_pdrop=0., embd_pdrop=0., attn_pdrop=0.)

SETUP = """
import torch, transformers
from lmnotes.hub import from_hf
torch.manual_seed(0)
peer = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50257, **{shape})).train()
ours = from_hf(peer).train()
ids = torch.randint(0, 50257, (8, 128))
small = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=64, n_embd=8, n_layer=1, n_head=1))
for m in (small, from_hf(small)): m(input_ids=ids[:1, :4] % 64, labels=ids[:1, :4] % 64).loss.backward()     # what torch loads at first use
del small, m
"""


def pair(vocab_size):
    "The reference and ours with its weights."
    import transformers
    from lmnotes.hub import from_hf
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    peer = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=vocab_size, bos_token_id=None, eos_token_id=None, pad_token_id=0, **SHAPE))
    return from_hf(peer), peer


def step(model, ids):
    "One forward and backward; the loss and the norm of the gradient."
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach()


def gradients(model): return torch.stack([p.grad.double().square().sum() for p in model.parameters()]).sum().sqrt()


def training():
    ours, peer = (m.train() for m in pair(50257))
    ids = torch.randint(0, 50257, (8, 128))
    def same(a, b):
        def check():
            torch.testing.assert_close(step(a, ids), step(b, ids), atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(gradients(ours), gradients(peer), atol=1e-4, rtol=1e-4)
        return check
    what = 'GPT-2 4 x 256, 8 x 128 tokens'
    yield Row(f'forward and backward, {what}', lambda: step(ours, ids), lambda: step(peer, ids), target=1.1, check=same(ours, peer), note='GPT2LMHeadModel')
    setup, run = SETUP.format(shape=SHAPE), '{}(input_ids=ids, labels=ids).loss.backward()'
    yield Row('  its memory', lambda: peak_memory(setup, run.format('ours')), lambda: peak_memory(setup, run.format('peer')), target=1 / .7, unit='B', note='added at the peak')
    a, b = torch.compile(ours), torch.compile(peer)
    yield Row('  both compiled', lambda: step(a, ids), lambda: step(b, ids), target=1.15, check=same(a, b), note='torch.compile of each, default mode')


def decoding():
    from lmnotes.decoding import generate
    ours, peer = (m.eval() for m in pair(4096))
    for B, target in ((1, 2.4), (8, 1.7)):
        ids = torch.randint(0, 4096, (B, 16))
        mask = torch.ones_like(ids)
        def run(ids=ids): return generate(ours, ids, max_new_tokens=100, eos_id=None).sequences
        def other(ids=ids, mask=mask): return peer.generate(ids, attention_mask=mask, max_new_tokens=100, do_sample=False)
        def same(run=run, other=other): assert torch.equal(run(), other())
        for threads in (1, 2):
            yield Row(f'greedy decoding, batch {B}, {threads} thread{"s" * (threads > 1)}', on(threads, run), on(threads, other), target=target, check=same, note='transformers.generate')


def on(threads, call):
    "The call with so many threads."
    def run():
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try: return call()
        finally: torch.set_num_threads(before)
    return run


def rows():
    yield from decoding()
    yield from training()
