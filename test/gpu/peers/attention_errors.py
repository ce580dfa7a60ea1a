"""`attention.py --errors DIR`: errors of attention against f64, ours and PyTorch's, on the same bf16 inputs.

DIR is what `./run bench attention --errors DIR` wrote: per case one safetensors file of q, k, v, dout, out, lse, dq, dk, dv [tokens, heads, dim] (and sinks,
dSinks), with our results. Reference: plain softmax attention in f64 and its gradients by autograd. Printed: Frobenius norm of the error over that of the
reference's result (the norm of the error itself where that is 0, marked with *). dK and dV are f32 of ours, bf16 of theirs: in brackets, ours as bf16.
FlashAttention-2 and cuDNN have no sinks; FlexAttention gets them by rescaling its output by sigmoid(LSE - sink).
"""

import functools
import glob
import json
import os
import time
import warnings

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

NAMES = ("out", "dq", "dk", "dv")
SDPA = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
compiled = torch.compile(flex_attention, dynamic=False)


def read(path):
    """A safetensors file: 8 bytes of length, a JSON header, the data."""
    with open(path, "rb") as file:
        data = bytearray(file.read())
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    meta = header.pop("__metadata__", {})
    kinds = {"BF16": torch.bfloat16, "F32": torch.float32}

    def tensor(entry):
        kind, (start, end) = kinds[entry["dtype"]], entry["data_offsets"]
        return torch.frombuffer(data, dtype=kind, count=(end - start) // kind.itemsize, offset=8 + size + start).view(entry["shape"]).cuda()

    return {name: tensor(entry) for name, entry in header.items()}, meta


def causal(b, h, i, j):
    return i >= j


def itself(b, h, i, j):
    return i == j


@functools.cache
def block_mask(n, alone):
    """One object per form: FlexAttention is compiled for it once."""
    return create_block_mask(itself if alone else causal, None, None, n, n, device="cuda")


def visible(n, alone):
    i = torch.arange(n, device="cuda")
    return i[:, None] == i[None, :] if alone else i[:, None] >= i[None, :]


def gradients(attention, inputs, dout):
    """out, dq, dk, dv of `attention` on leaves made of q, k, v."""
    leaves = [x.detach().clone().requires_grad_(True) for x in inputs]
    out = attention(*leaves)
    return dict(zip(NAMES, (out.detach(), *torch.autograd.grad(out, leaves, dout))))


def in_f64(q, k, v, sinks, alone):
    """[heads, n, d]; K/V heads are repeated for their group."""
    group = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    scores = (q @ k.transpose(1, 2) / q.shape[2] ** 0.5).masked_fill(~visible(q.shape[1], alone), float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(-1, q.shape[1], 1)], 2)
    return torch.softmax(scores, 2)[:, :, : k.shape[1]] @ v


def peer(key, q, k, v, dout, sinks, alone):
    """The same dictionary from one of PyTorch's, all [heads, n, d]; None where it does not do this."""
    if key in SDPA:
        if sinks is not None:
            return None
        # Tokens that see only themselves are the first of sequences of two (cuDNN takes no shorter ones), whose second neither gives nor gets anything.
        batched = (lambda x: F.pad(x.transpose(0, 1)[:, :, None], (0, 0, 0, 1))) if alone else (lambda x: x[None])
        back = (lambda x: x[:, :, 0].transpose(0, 1)) if alone else (lambda x: x[0])
        run = lambda a, b, c: F.scaled_dot_product_attention(a, b, c, is_causal=True, enable_gqa=a.shape[1] != b.shape[1])
        with sdpa_kernel(SDPA[key]):
            return {name: back(x) for name, x in gradients(run, [batched(x).contiguous() for x in (q, k, v)], batched(dout).contiguous()).items()}
    mask = block_mask(q.shape[1], alone)

    def run(a, b, c):
        if sinks is None:
            return compiled(a, b, c, block_mask=mask, enable_gqa=True)
        out, lse = compiled(a, b, c, block_mask=mask, enable_gqa=True, return_lse=True)
        return out * torch.sigmoid(lse - sinks[None, :, None])[..., None].to(out.dtype)

    return {name: x[0] for name, x in gradients(run, [x[None] for x in (q, k, v)], dout[None]).items()}


def compare(folder, keys):
    paths = sorted(glob.glob(os.path.join(folder, "*.safetensors")))
    if not paths:
        raise SystemExit(f"{folder}: no safetensors files; ./run bench attention --errors {folder} writes them")
    print("| case | which | out | dq | dk | dv |\n|---|---|---|---|---|---|")
    worst, started = {}, time.time()
    warnings.filterwarnings("ignore")  # every backend that was not asked for says why it did not run
    for path in paths:
        t, meta = read(path)
        alone = meta["alone"] == "true"
        by_head = {name: x.transpose(0, 1).contiguous() for name, x in t.items() if x.dim() == 3}
        q, k, v, dout = (by_head[name] for name in ("q", "k", "v", "dout"))
        sinks = t.get("sinks")
        f64 = lambda a, b, c: in_f64(a, b, c, None if sinks is None else sinks.double(), alone)
        want = gradients(f64, [x.double() for x in (q, k, v)], dout.double())

        def errors(got):
            found = {}
            for name in NAMES:
                size = want[name].norm().item()
                found[name] = ((got[name].double() - want[name]).norm().item() / (size or 1), size == 0)
            return found

        text = lambda e: f"{e[0]:.2e}" + ("*" if e[1] else "")
        ours = errors(by_head)
        as_bf16 = errors({name: by_head[name].to(torch.bfloat16) for name in NAMES})
        cells = [text(ours[name]) + (f" ({text(as_bf16[name])})" if name in ("dk", "dv") else "") for name in NAMES]
        print(f"| {meta['case']} | lc | {' | '.join(cells)} |", flush=True)
        for key in keys:
            try:
                got = peer(key, q, k, v, dout, sinks, alone)
            except Exception as error:
                print(f"| | {key} | refused: {(str(error) or type(error).__name__).strip().splitlines()[0][:110]} | | | |", flush=True)
                continue
            if got is None:
                continue
            theirs = errors(got)
            print(f"| | {key} | {' | '.join(text(theirs[name]) for name in NAMES)} |", flush=True)
            for name in NAMES:
                # f32 sums in another order are off by some 1e-7, which is nobody's rounding of bf16.
                ratio = max(ours[name][0], 1e-6) / max(theirs[name][0], 1e-6)
                if ratio > worst.get((key, name), (0, ""))[0]:
                    worst[key, name] = (ratio, meta["case"])
        del want
    for (key, name), (ratio, where) in sorted(worst.items()):
        print(f"lc's error of {name} over {key}'s, largest: {ratio:.3f} ({where})")
    print(f"{time.time() - started:.0f} s")
