"""PyTorch's linear cross-entropy at gpt-oss's head: loss and gradient to the hidden states, head frozen, bf16 with f32 softmax.

    python3 cross_entropy.py [--tokens 8192] [--width 2880] [--vocab 201088] [--chunks 1024,4096] [--no-whole]

Beside `./run bench ce`, best in the same call. Compared are
  compiled, chunk N  the usual chunked recipe: torch.func.grad_and_value of one chunk's loss under torch.compile, chunk after chunk (what Unsloth and TRL do)
  compiled, whole    the same with all tokens in one chunk
  plain, whole       eager: logits of all tokens, .float(), F.cross_entropy, backward, as transformers does
Time: median by device events, compilation not counted. Memory: what PyTorch's allocator holds at most in the call, over hidden states, head and labels
(which all have); the gradient to the hidden states is counted. TFLOP/s: two products of tokens x width x vocab.
"""

import argparse
import math
import time

import torch
import torch.nn.functional as F
from timing import added_bytes, allow_recompiles, heading, median_ms

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--tokens", type=int, default=8192)
parser.add_argument("--width", type=int, default=2880)
parser.add_argument("--vocab", type=int, default=201088)
parser.add_argument("--chunks", default="1024,4096")
parser.add_argument("--no-whole", action="store_true")
options = parser.parse_args()
tokens, width, vocab = options.tokens, options.width, options.vocab

torch.manual_seed(1)
hidden = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
head = torch.randn(vocab, width, device="cuda", dtype=torch.bfloat16) / math.sqrt(width)
labels = torch.randint(0, vocab, (tokens,), device="cuda")
labels[::7] = -100
count = int((labels != -100).sum())


def loss_of(h, weight, target):
    logits = F.linear(h, weight).float()
    return F.cross_entropy(logits, target, ignore_index=-100, reduction="sum") / count


step = torch.compile(torch.func.grad_and_value(loss_of), dynamic=False)


def chunked(chunk):
    gradient = torch.empty_like(hidden)
    total = torch.zeros((), device="cuda")
    for at in range(0, tokens, chunk):
        g, loss = step(hidden[at : at + chunk], head, labels[at : at + chunk])
        gradient[at : at + chunk] = g
        total += loss
    return total, gradient


def plain():
    h = hidden.detach().requires_grad_(True)
    loss = loss_of(h, head, labels)
    loss.backward()
    return loss.detach(), h.grad


allow_recompiles()
flops = 2 * 2 * tokens * width * vocab
print(f"{heading()}; {tokens} x {width} x {vocab}, {count} labels, chunks compiled each on its own")
print("| | ms | TFLOP/s | added at most, MiB | compiled in, s |\n|---|---|---|---|---|", flush=True)
variants = [(f"compiled, chunk {c}", lambda c=int(c): chunked(c)) for c in options.chunks.split(",") if c]
if not options.no_whole:
    variants += [("compiled, whole", lambda: chunked(tokens)), ("plain, whole", plain)]
results = {}
for name, fn in variants:
    try:
        start = time.time()
        loss, gradient = fn()
        torch.cuda.synchronize()
        compiled = time.time() - start
        results[name] = (loss.item(), gradient)
        memory = added_bytes(fn)
        ms = median_ms(fn)
        print(f"| {name} | {ms:.2f} | {flops / ms / 1e9:.0f} | {memory / 2**20:.0f} | {compiled:.1f} |", flush=True)
    except torch.OutOfMemoryError:
        print(f"| {name} | does not fit | | | |", flush=True)
# They must compute the same thing: against f32 products on a sample of the rows.
rows = torch.arange(0, tokens, max(1, tokens // 64), device="cuda")
h = hidden[rows].float().requires_grad_(True)
parts = [F.linear(h, head[at : at + 16384].float()) for at in range(0, vocab, 16384)]
F.cross_entropy(torch.cat(parts, 1), labels[rows], ignore_index=-100, reduction="sum").div(count).backward()
for name, (loss, gradient) in results.items():
    error = ((gradient[rows].float() - h.grad).norm() / h.grad.norm()).item()
    print(f"{name}: loss {loss:.6f}, gradient off by {error:.1e} on {len(rows)} rows")
