"""Attention of PyTorch on the shapes that `./run bench attention` times: FlashAttention-2 and cuDNN through scaled_dot_product_attention, FlexAttention.

    python3 attention.py [--only flash,cudnn,flex] [--cases 64k,16k,...] [--list]

Causal, bf16, batch 1, random data. TFLOP/s as ours are counted: 4 per visible pair, query head and head dim forward, 10 backward. None of them is given
gpt-oss's sinks: a sink only rescales O by sigmoid(LSE - s), which costs nothing beside the products, so the comparison leaves the peers that work out.
Fewer K/V heads than query heads: both `enable_gqa` and K/V expanded to the query heads beforehand (neither the expansion nor the sum of dK and dV over the
group is timed) are tried, the faster is given and named. FlexAttention has the window and the prefix as a block mask, made beforehand and not timed.
FlashAttention-2's and cuDNN's backward add dQ in no fixed order.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from timing import allow_recompiles, heading, median_ms
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

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
}
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--only", default="flash,cudnn,flex")
parser.add_argument("--cases", default="16k,64k,window-16k,window-64k,d128-16k,d128-64k")
parser.add_argument("--list", action="store_true")
options = parser.parse_args()
if options.list:
    raise SystemExit("\n".join(f"{name}: {case}" for name, case in CASES.items()))

compiled_flex = torch.compile(flex_attention, dynamic=False)
allow_recompiles()


def sdpa(backend, n, prefix, window, heads, kv_heads, d, expand):
    if window is not None:
        return None
    bias = causal_lower_right(n, prefix + n) if prefix else None

    def run(q, k, v):
        with sdpa_kernel(backend):
            causal = {"attn_mask": bias} if bias is not None else {"is_causal": True}
            return F.scaled_dot_product_attention(q, k, v, **causal, enable_gqa=not expand and heads != kv_heads)

    return run


def flex(n, prefix, window, heads, kv_heads, d, expand):
    if expand:
        return None  # its kernel takes groups as they are

    def visible(b, h, i, j):
        at = i + prefix
        return (j <= at) if window is None else (j <= at) & (at - j < window)

    mask = create_block_mask(visible, None, None, n, prefix + n, device="cuda", _compile=True)
    return lambda q, k, v: compiled_flex(q, k, v, block_mask=mask, enable_gqa=heads != kv_heads)


def pairs(n, prefix, window):
    if window is None:
        return n * prefix + n * (n + 1) // 2
    return n * window if window <= prefix else n * window - window * (window - 1) // 2


def measure(make, case):
    """The faster of groups as they are and expanded: (forward ms, backward ms, which)."""
    n, prefix, window, heads, kv_heads, d = case
    best, why = None, ""
    for expand in (False, True):
        try:
            run = make(*case, expand)
            if run is None:
                continue
            rows = heads if expand else kv_heads
            torch.manual_seed(1)
            tensor = lambda h, length: torch.randn(1, h, length, d, device="cuda", dtype=torch.bfloat16)
            q, k, v = (tensor(h, length).requires_grad_(True) for h, length in ((heads, n), (rows, prefix + n), (rows, prefix + n)))
            dout = tensor(heads, n)
            forward = median_ms(lambda: run(q, k, v))
            out = run(q, k, v)
            backward = median_ms(lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True))
            del out
            if best is None or forward + backward < best[0] + best[1]:
                best = (forward, backward, "expanded K/V" if expand else "groups")
        except Exception as error:  # a backend that does not take the shape says so, and the others are still timed
            why = (str(error) or type(error).__name__).splitlines()[0][:90]
    return best, why


print(heading())
print("| heads x dim, tokens | which | forward, ms | TFLOP/s | backward, ms | TFLOP/s | |\n|---|---|---|---|---|---|---|")
makers = {
    "flash": ("FlashAttention-2", lambda *a: sdpa(SDPBackend.FLASH_ATTENTION, *a)),
    "cudnn": ("cuDNN", lambda *a: sdpa(SDPBackend.CUDNN_ATTENTION, *a)),
    "flex": ("FlexAttention", flex),
}
started = time.time()
for name in options.cases.split(","):
    n, prefix, window, heads, kv_heads, d = case = CASES[name]
    label = f"{heads}/{kv_heads} x {d}, {n:,}" + (f" after {prefix:,}" if prefix else "") + (f", window {window}" if window else "")
    for key in options.only.split(","):
        which, make = makers[key]
        best, why = measure(make, case)
        if best is None:
            if why:
                print(f"| {label} | {which} | refused: {why} | | | | |", flush=True)
            continue
        forward, backward, how = best
        rate = lambda products, ms: 2 * products * pairs(n, prefix, window) * heads * d / ms / 1e9
        print(f"| {label} | {which} | {forward:.2f} | {rate(2, forward):.0f} | {backward:.2f} | {rate(5, backward):.0f} | {how} |", flush=True)
    torch.cuda.empty_cache()
print(f"{time.time() - started:.0f} s")
