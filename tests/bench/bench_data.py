"Packing and collation against the collators of transformers, on chapters of the King James Bible."
from harness import Row


def rows():
    import numpy as np
    import torch
    from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, logging

    from lmnotes.data import collate, load_corpus, pack, train_tokenizer
    logging.set_verbosity_error()
    texts = load_corpus('kjv', 'train')['text'][:256]
    tokenizer = train_tokenizer(texts, vocab_size=2000)
    docs = tokenizer(texts)['input_ids']
    rng = np.random.default_rng(0)
    for side in ('right', 'left'):
        # a batch as fine-tuning sees it: 32 rows of 16 to 512 ids with labels, lists of int as `datasets` gives them
        batch = [dict(input_ids=d[:n], labels=d[:n]) for d, n in zip(docs, rng.integers(16, 512, 32))]
        seq2seq = DataCollatorForSeq2Seq(type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, pad_token='<|endoftext|>', padding_side=side))

        def same(batch=batch, seq2seq=seq2seq, side=side):
            ours, theirs = collate(batch, pad_id=0, side=side), seq2seq(batch)
            for key in ('input_ids', 'labels'): torch.testing.assert_close(ours[key], theirs[key])
            torch.testing.assert_close(ours['attention_mask'], theirs['attention_mask'].bool())

        yield Row(f'collate 32 rows, padding {side}', ours=lambda batch=batch, side=side: collate(batch, pad_id=0, side=side),
                  peer=lambda batch=batch, seq2seq=seq2seq: seq2seq(batch), target=10, check=same, note='peer: DataCollatorForSeq2Seq; ours makes position_ids too')
    flatten, some = DataCollatorWithFlattening(), [dict(input_ids=d) for d in docs]
    total = sum(map(len, docs))

    def same_packing():
        ours, theirs = pack(docs, block_size=total, eos_id=None)[0], flatten(some)
        for key in ('input_ids', 'position_ids', 'labels'): torch.testing.assert_close(torch.from_numpy(ours[key])[None], theirs[key])

    yield Row(f'pack {total:,} ids into one row', ours=lambda: pack(docs, block_size=total, eos_id=None), peer=lambda: flatten(some), target=2, check=same_packing,
              note='peer: DataCollatorWithFlattening; ours makes segment_ids too')
    yield Row(f'pack {total:,} ids into rows of 256', ours=lambda: pack(docs, block_size=256, eos_id=0), peer=lambda: flatten(some), target=2,
              note='peer: DataCollatorWithFlattening, which does not cut into rows')
