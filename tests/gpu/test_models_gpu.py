"What our Transformer does on a GPU: bf16 through the fused kernels, compiled without graph breaks, equal to transformers, its rate reported."
import time

import pytest, torch

from lmnotes.core import seed_everything

pytestmark = pytest.mark.gpu


def shape(**more): return dict(d_model=256, n_layers=3, n_heads=4, d_ff=1024, max_len=256) | more


def build(name, **more):
    from lmnotes import models
    seed_everything(0)
    return getattr(models, name)(997, **shape(**more)).cuda()


def inputs(model, B=4, T=128):
    ids = torch.randint(3, 997, (B, T), device='cuda', generator=torch.Generator('cuda').manual_seed(0))
    return dict(input_ids=ids, labels=ids)


@pytest.mark.parametrize('name', ['gpt2', 'llama', 'bert', 't5', 'bart'])
def test_equals_the_cpu(name):
    model = build(name, max_len=None if name == 't5' else 256).eval()
    batch = inputs(model)
    with torch.no_grad():
        gpu = model(**batch)
        cpu = model.cpu()(**{k: v.cpu() for k, v in batch.items()})
    torch.testing.assert_close(gpu.logits.cpu(), cpu.logits, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(gpu.loss.cpu(), cpu.loss, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('name', ['gpt2', 'llama', 'bert'])
def test_bf16_runs_a_fused_kernel(name):
    from lmnotes.attention import attention_kernels
    model = build(name).to(torch.bfloat16).eval()
    batch = inputs(model)
    with torch.no_grad(): kernels = attention_kernels(lambda: model(input_ids=batch['input_ids']))
    assert kernels and 'math' not in kernels, kernels


@pytest.mark.parametrize('name', ['gpt2', 'llama', 'bert', 't5'])
def test_compiles_without_graph_breaks(name):
    model = build(name, max_len=None if name == 't5' else 256)
    batch = inputs(model)
    want = model(**batch).loss
    got = torch.compile(model, fullgraph=True)(**batch).loss
    torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)
    got.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_random_references_on_the_gpu():
    transformers = pytest.importorskip('transformers')
    from lmnotes.hub import from_hf
    tiny = dict(vocab_size=61, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    torch.manual_seed(0)
    for ref in (transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=24, n_layer=3, n_head=3, n_positions=40, **tiny)),
                transformers.LlamaForCausalLM(transformers.LlamaConfig(hidden_size=24, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, intermediate_size=37, **tiny)),
                transformers.BertForMaskedLM(transformers.BertConfig(hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=40, **tiny))):
        ref = ref.cuda().eval()
        ours, ids = from_hf(ref), torch.randint(3, 61, (3, 17), device='cuda')
        assert ours.embed.weight.device.type == 'cuda'
        with torch.no_grad(): torch.testing.assert_close(ours(ids).logits, ref(input_ids=ids).logits, atol=1e-3, rtol=1e-3)
        with torch.no_grad():
            exact = ref(input_ids=ids).logits
            a, b = (m.to(torch.bfloat16)(input_ids=ids).logits.float() for m in (ours, ref))
        assert (a - b).norm() < 2e-2 * exact.norm()


def test_report_of_gpt2_124m(capsys):
    "No threshold: prints tokens per second and the share of the GPU's peak, for the record."
    from lmnotes.costs import model_card
    from lmnotes.models import gpt2
    seed_everything(0)
    B, T = 8, 1024
    model = torch.compile(gpt2(50257, d_model=768, n_layers=12, n_heads=12, max_len=T).cuda())
    ids = torch.randint(0, 50257, (B, T), device='cuda')
    def step():
        with torch.autocast('cuda', torch.bfloat16): loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss
    for _ in range(3): step()
    torch.cuda.synchronize(); start = time.perf_counter()
    for _ in range(10): loss = step()
    torch.cuda.synchronize(); seconds = (time.perf_counter() - start) / 10
    rate = model_card(model.config, B, T).flops['training step'] / seconds / 1e12
    with capsys.disabled():
        print(f'\nGPT-2 124M, bf16, compiled, {torch.cuda.get_device_name()}: {B * T / seconds:,.0f} tokens/s, {rate:.0f} TFLOP/s (divide by the peak of the device '
              f'for the model FLOPs utilization), {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at the peak')
    assert loss.isfinite()


def test_decoding_equals_the_cpu():
    from lmnotes.decoding import generate
    model = build('llama').eval()
    ids = inputs(model, 3, 9)['input_ids']
    gpu = generate(model, ids, max_new_tokens=20, eos_id=None).sequences.cpu()
    cpu = generate(model.cpu().double(), ids.cpu(), max_new_tokens=20, eos_id=None).sequences
    assert (gpu == cpu).float().mean() > .9          # two equal logits may part the ways
