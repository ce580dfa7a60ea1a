"""Attention of PyTorch on the shapes of `./run bench attention`: FlashAttention-2 and cuDNN through scaled_dot_product_attention, FlexAttention.

    python3 attention.py [--only flash,flash-det,cudnn,flex] [--cases 64k,16k,...] [--list]
    python3 attention.py --errors DIR       errors against f64, beside ours: see attention_errors.py

Causal, bf16, batch 1, random data. TFLOP/s as ours are counted: 4 per visible pair, query head and head dim forward, 10 backward. None of them is given
gpt-oss's sinks: a sink only rescales O by sigmoid(LSE - s), which costs nothing beside the products, so the comparison leaves the peers that work out.

Fewer K/V heads than query heads: both `enable_gqa` and K/V expanded to the query heads beforehand (neither the expansion nor the sum of dK and dV over the
group is timed) are tried on 4,096 tokens; the faster is timed and named. cuDNN has no mask for a prefix: there it is timed in two calls, of the chunk's queries
on the prefix without a mask and on the chunk causally; joining the two is not timed. FlexAttention has window and prefix as a block mask, made beforehand.
`flash-det`: FlashAttention-2 under torch.use_deterministic_algorithms; its other backward, and cuDNN's, add dQ in no fixed order.
Compilation and planning are not timed. A few rows of every output are held against f32. Long shapes are timed once, as ours are.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from timing import allow_recompiles, heading, median_ms
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

# name: query tokens, tokens before them, window, query heads, K/V heads, head dim
CASES = {
    "16k": (16384, 0, None, 64, 8, 64),
    "64k": (65536, 0, None, 64, 8, 64),
    "256k": (262144, 0, None, 64, 8, 64),
    "chunk": (8192, 57344, None, 64, 8, 64),
    "32k-after-512k": (32768, 524288, None, 64, 8, 64),
    "window-16k": (16384, 0, 128, 64, 8, 64),
    "window-64k": (65536, 0, 128, 64, 8, 64),
    "window-256k": (262144, 0, 128, 64, 8, 64),
    "d128-16k": (16384, 0, None, 32, 8, 128),
    "d128-64k": (65536, 0, None, 32, 8, 128),
    "d256-8k": (8192, 0, None, 16, 8, 256),
}
LONG = 2e14  # forward FLOPs from which a shape is timed once
BLOCK = 128

compiled_flex = torch.compile(flex_attention, dynamic=False)


class Refused(Exception):
    """A backend has nothing for a shape: not a failure."""


def random(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


class Sdpa:
    """One of scaled_dot_product_attention's backends. `inputs` are leaves, `outputs` a list, so that a prefix can be a call of its own."""

    def __init__(self, backend, case, expand):
        n, prefix, window, heads, kv_heads, d = case
        if window is not None:
            raise Refused("no windows")
        self.backend, self.gqa = backend, not expand and heads != kv_heads
        self.joined = backend == SDPBackend.FLASH_ATTENTION or not prefix
        lengths = [prefix + n] if self.joined else [prefix, n]
        rows = heads if expand else kv_heads
        self.inputs = [random(1, heads, n, d)] + [random(1, rows, length, d) for length in lengths for _ in "kv"]
        self.prefix = prefix

    def outputs(self):
        q, *kv = self.inputs
        with sdpa_kernel(self.backend):
            if self.joined and self.prefix:  # FlashAttention-2's causal mask is aligned to the last key; scaled_dot_product_attention would not let it
                return [torch.ops.aten._scaled_dot_product_flash_attention(q, *kv, 0.0, True)[0]]
            last = F.scaled_dot_product_attention(q, *kv[-2:], is_causal=True, enable_gqa=self.gqa)
            if self.joined:
                return [last]
            return [F.scaled_dot_product_attention(q, *kv[:2], enable_gqa=self.gqa), last]


def block_mask(n, prefix, window):
    """The key blocks that a block of queries sees wholly, and those it sees in part: by arithmetic, so that nothing of n x n is made."""

    def visible(b, h, i, j):
        at = i + prefix
        return (j <= at) if window is None else (j <= at) & (at - j < window)

    rows, columns = n // BLOCK, (prefix + n) // BLOCK
    first = torch.arange(rows, device="cuda") * BLOCK + prefix  # position of a block's first query
    last = first + BLOCK - 1
    key = torch.arange(columns, device="cuda") * BLOCK
    seen, whole = key[None, :] <= last[:, None], key[None, :] + BLOCK - 1 <= first[:, None]
    if window is not None:
        seen &= key[None, :] + BLOCK - 1 > first[:, None] - window
        whole &= key[None, :] > last[:, None] - window
    lists = lambda blocks: (blocks.sum(1, dtype=torch.int32)[None, None], torch.argsort(blocks.to(torch.int8), dim=1, descending=True, stable=True).to(torch.int32)[None, None])
    return BlockMask.from_kv_blocks(*lists(seen & ~whole), *lists(whole), BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(n, prefix + n))


class Flex:
    joined = True

    def __init__(self, case, expand):
        n, prefix, window, heads, kv_heads, d = case
        if expand:
            raise Refused("")  # its kernel takes groups as they are
        self.mask, self.gqa = block_mask(n, prefix, window), heads != kv_heads
        self.inputs = [random(1, heads, n, d), random(1, kv_heads, prefix + n, d), random(1, kv_heads, prefix + n, d)]

    def outputs(self):
        return [compiled_flex(*self.inputs, block_mask=self.mask, enable_gqa=self.gqa)]


MAKERS = {
    "flash": ("FlashAttention-2", lambda *a: Sdpa(SDPBackend.FLASH_ATTENTION, *a)),
    "flash-det": ("FlashAttention-2, fixed order", lambda *a: Sdpa(SDPBackend.FLASH_ATTENTION, *a)),
    "cudnn": ("cuDNN", lambda *a: Sdpa(SDPBackend.CUDNN_ATTENTION, *a)),
    "flex": ("FlexAttention", Flex),
}


def pairs(n, prefix, window):
    if window is None:
        return n * prefix + n * (n + 1) // 2
    return n * window if window <= prefix else n * window - window * (window - 1) // 2


def check(out, inputs, case):
    """Three rows of head 0 in f32: a peer that computes something else is not a peer."""
    n, prefix, window, _, _, d = case
    q, k, v = (x[0, 0] for x in inputs)
    for i in (0, n // 2 + 1, n - 1):
        at = prefix + i
        low = 0 if window is None else max(0, at - window + 1)
        scores = k[low : at + 1].float() @ q[i].float() / d**0.5
        want = torch.softmax(scores, 0) @ v[low : at + 1].float()
        error = ((out[0, 0, i].float() - want).norm() / want.norm()).item()
        if not error < 2e-2:
            raise RuntimeError(f"query {i} is off by {error:.1e}")


def time_case(make, case, expand, key, long):
    """Milliseconds forward and backward."""
    torch.manual_seed(1)
    run = make(case, expand)
    for x in run.inputs:
        x.requires_grad_(True)
    outs = run.outputs()
    if run.joined:
        with torch.no_grad():
            check(outs[0], run.inputs, case)
    options = {"rounds": 1, "least": 1, "warm": 0} if long else {}

    def step():
        nonlocal outs
        outs = run.outputs()

    outs = None
    forward = median_ms(step, **options)
    douts = [random(*out.shape) for out in outs]
    torch.use_deterministic_algorithms(key == "flash-det")
    try:
        grad = lambda: torch.autograd.grad(outs, run.inputs, douts, retain_graph=True)
        # cuDNN plans and FlexAttention compiles at the first call of a shape; FlashAttention-2 does neither.
        backward = median_ms(grad, **{**options, "warm": 0 if long and key.startswith("flash") else 1})
    finally:
        torch.use_deterministic_algorithms(False)
    return forward, backward


def reason(error):
    return (str(error) or type(error).__name__).strip().splitlines()[0][:110]


def measure(key, case):
    """((forward ms, backward ms, how), why not)."""
    n, prefix, window, heads, kv_heads, d = case
    make = MAKERS[key][1]
    long = 4 * pairs(n, prefix, window) * heads * d > LONG
    why, trials = "", []
    if key == "flex" or heads == kv_heads:
        trials = [(0.0, False)]
    else:  # which form is faster, on few tokens
        short = (min(n, 4096), min(prefix, 4096), window, heads, kv_heads, d)
        for expand in (False, True):
            try:
                trials.append((sum(time_case(make, short, expand, key, False)), expand))
            except Exception as error:  # a backend that does not take the shape says so, and the others are still timed
                why = reason(error)
    for _, expand in sorted(trials):
        try:
            torch.cuda.empty_cache()
            forward, backward = time_case(make, case, expand, key, long)
            how = "expanded K/V" if expand else "groups"
            return (forward, backward, how + (", two calls" if key == "cudnn" and prefix else "")), ""
        except Exception as error:
            why = reason(error)
    return None, why


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="flash,cudnn,flex")
    parser.add_argument("--cases", default="16k,64k,chunk,window-16k,window-64k,d128-16k,d256-8k")
    parser.add_argument("--errors", metavar="DIR")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    if options.list:
        raise SystemExit("\n".join(f"{name}: {case}" for name, case in CASES.items()))
    allow_recompiles()
    print(heading(), flush=True)
    if options.errors:
        from attention_errors import compare

        return compare(options.errors, options.only.split(","))
    print("| heads x dim, tokens | which | forward, ms | TFLOP/s | backward, ms | TFLOP/s | |\n|---|---|---|---|---|---|---|")
    started = time.time()
    for name in options.cases.split(","):
        n, prefix, window, heads, kv_heads, d = case = CASES[name]
        label = f"{heads}/{kv_heads} x {d}, {n:,}" + (f" after {prefix:,}" if prefix else "") + (f", window {window}" if window else "")
        for key in options.only.split(","):
            before = time.time()
            best, why = measure(key, case)
            took = f"{time.time() - before:.0f} s in all"
            torch.cuda.empty_cache()
            if best is None:
                print(f"| {label} | {MAKERS[key][0]} | refused: {why} | | | | {took} |", flush=True)
                continue
            forward, backward, how = best
            rate = lambda products, ms: 2 * products * pairs(n, prefix, window) * heads * d / ms / 1e9
            print(f"| {label} | {MAKERS[key][0]} | {forward:.2f} | {rate(2, forward):.0f} | {backward:.2f} | {rate(5, backward):.0f} | {how}; {took} |", flush=True)
    print(f"{time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
