"""transformers + PEFT in bf16 on a GPU, against the reference models' f32 numbers: what our own bf16 run is compared with.

    python3 parity_bf16.py DIR OUT.json [MODEL ...]

DIR: reference models as test/fixtures/reference-models/README.md describes them. OUT.json then goes to `./run parity DIR --peer OUT.json`.
Needs PyTorch with CUDA, transformers and PEFT; nothing is downloaded.

Every model runs with its own weights, adapter, inputs and ten AdamW steps:
  check     f32, TF32 off, eager attention: must equal the reference to 1e-4, or nothing here means anything (exit code 1)
  autocast  the peer: base weights bf16, LoRA parameters f32 (PEFT's autocast_adapter_dtype default), torch.autocast(bfloat16), as Trainer(bf16=True) runs it
  plain     the same without autocast: what is not LoRA runs in bf16, LoRA's two products in f32 (PEFT casts their input up)
  forced    `autocast`, each token sent to the experts that the f32 run chose (mixture-of-experts models only): rounding without flipped near-ties

Attention is what transformers picks by itself (sdpa; gpt-oss, with its sinks, eager), experts likewise. OUT.json holds, per model and run, the relative error
of the base and the adapter loss, the relative Frobenius error of each LoRA gradient, and the relative deviation of each of the ten losses.
"""

import json
import os
import re
import sys
import time
import traceback

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
import peft
import torch
import transformers
from safetensors.torch import load_file

torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cudnn.allow_tf32 = False
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
LR, STEPS = 2e-3, 10


class Routing:
    """Every torch.topk of a run, in order; or the answers of an earlier run instead of its own."""

    def __init__(self, forced=None):
        self.chosen, self.forced, self.original = [], forced, torch.topk

    def __enter__(self):
        def topk(x, k, *args, **kwargs):
            values, indices = self.original(x, k, *args, **kwargs)
            if self.forced is not None:
                indices = self.forced[len(self.chosen)]
                values = x.gather(-1, indices)
            self.chosen.append(indices.detach())
            return torch.return_types.topk((values, indices))

        torch.topk = topk
        return self

    def __exit__(self, *_):
        torch.topk = self.original


def flips(a, b):
    """Choices of (token, layer) whose set of experts differs, and how many there are."""
    differ = [(x.sort(-1).values != y.sort(-1).values).any(-1) for x, y in zip(a, b)]
    return int(sum(int(d.sum()) for d in differ)), int(sum(d.numel() for d in differ))


def load(folder, dtype, attention):
    extra = {} if attention is None else {"attn_implementation": attention}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **extra)
    return model.to("cuda")


def short(name):
    return re.sub(r"\.default\.weight$", ".weight", name)


def measure(folder, reference, dtype, autocast=False, attention=None, forced=None, steps=STEPS):
    """One run. Returns its errors, and the routing of the gradient pass and the ten steps."""
    ids, labels = (reference[k].to("cuda", torch.long) for k in ("input_ids", "labels"))
    model = load(folder, dtype, attention)

    def loss_of(m):
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
            return m(input_ids=ids, labels=labels, use_cache=False).loss

    relative = lambda got, want: abs(got - want) / abs(want)
    with torch.no_grad():
        base = relative(loss_of(model.eval()).item(), reference["loss"].item())
    model = peft.PeftModel.from_pretrained(model, f"{folder}/adapter", is_trainable=True).eval()  # no dropout in these models either way
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    wanted = {k[len("grad."):] for k in reference if k.startswith("grad.")}
    if set(trainable) != wanted:
        raise SystemExit(f"{folder}: the adapter's parameters are not the reference's: {sorted(set(trainable) ^ wanted)[:4]}")
    dtypes = sorted({str(p.dtype) for p in trainable.values()})
    with Routing(forced) as routing:
        loss = loss_of(model)
        loss.backward()
        gradients = {}
        for name, p in trainable.items():
            want = reference[f"grad.{name}"].to("cuda", torch.float64)
            gradients[short(name)] = ((p.grad.double() - want).norm() / want.norm()).item()
        adapter = relative(loss.item(), reference["adapter_loss"].item())
        optimizer = torch.optim.AdamW(trainable.values(), lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
        losses = []
        for want in reference["adamw_curve_loss_gradnorm"][:steps, 0].tolist():
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of(model)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trainable.values(), 1.0)
            optimizer.step()
            losses.append(relative(loss.item(), want))
    config = model.get_base_model().config
    errors = {
        "attention": config._attn_implementation,
        "experts": getattr(config, "_experts_implementation", None),
        "loraDtype": dtypes,
        "baseLoss": base,
        "adapterLoss": adapter,
        "gradients": gradients,
        "losses": losses,
    }
    return errors, routing.chosen


def main(folder, out, only):
    start = time.time()
    names = sorted(n for n in os.listdir(folder) if os.path.exists(f"{folder}/{n}/reference.safetensors") and (not only or n in only))
    if not names:
        raise SystemExit(f"{folder}: no reference models")
    result = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "models": {},
    }
    print("| model | run | attention, experts, LoRA | base loss | adapter loss | gradients: median | worst | ten losses: median | worst | routings flipped |")
    print("|---|---|---|---|---|---|---|---|---|---|")

    def row(name, run, errors, flipped=None):
        middle = lambda v: sorted(v)[len(v) // 2]
        g, c = list(errors["gradients"].values()), errors["losses"]
        print(
            f"| {name} | {run} | {errors['attention']}, {errors['experts']}, {','.join(errors['loraDtype'])} | {errors['baseLoss']:.1e} |"
            f" {errors['adapterLoss']:.1e} | {middle(g):.1e} | {max(g):.1e} | {middle(c):.1e} | {max(c):.1e} |"
            f" {'' if flipped is None else f'{flipped[0]} of {flipped[1]}'} |",
            flush=True,
        )

    def one(name):
        path = f"{folder}/{name}"
        reference = load_file(f"{path}/reference.safetensors")
        f32, chosen = measure(path, reference, torch.float32, attention="eager")
        runs = {"check": f32}
        worst = max([f32["baseLoss"], f32["adapterLoss"], *f32["gradients"].values(), *f32["losses"]])
        sound = worst < 1e-4
        if not sound:
            print(f"{name}: the f32 check is off by {worst:.1e}", flush=True)
        for run, autocast in (("autocast", True), ("plain", False)):
            errors, own = measure(path, reference, torch.bfloat16, autocast=autocast)
            if chosen:
                layers = len(chosen) // (STEPS + 1)
                errors["flipped"], errors["routed"] = flips(own[:layers], chosen[:layers])
            runs[run] = errors
            row(name, run, errors, flips(own[:layers], chosen[:layers]) if chosen else None)
        if chosen:
            runs["forced"], _ = measure(path, reference, torch.bfloat16, autocast=True, forced=chosen)
            row(name, "forced", runs["forced"])
        result["models"][name] = runs
        with open(out, "w") as file:
            json.dump(result, file, indent=1)
        return sound

    sound = True
    for name in names:
        try:
            sound = one(name) and sound
        except Exception:  # the others still count
            sound = False
            print(f"{name}:\n{traceback.format_exc()}", flush=True)
    print(f"{len(names)} models on {result['device']}, torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}: {time.time() - start:.1f} s")
    return 0 if sound else 1


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    sys.exit(main(sys.argv[1], sys.argv[2], set(sys.argv[3:])))
