"""transformers + PEFT in bf16 on a GPU, against the reference models' f32 numbers: what our own bf16 run is compared with.

    python3 parity_bf16.py DIR OUT.json [--seed K,... --write FRESH] [--jobs N] [MODEL ...]

DIR: reference models as test/fixtures/reference-models/README.md describes them. OUT.json then goes to `./run parity DIR --peer OUT.json`.
Needs PyTorch with CUDA, transformers and PEFT; nothing is downloaded.

Every model runs with its own weights, adapter, inputs and ten AdamW steps:
  check     f32, TF32 off, eager attention: must equal the reference to 1e-4, or nothing here means anything (exit code 1)
  autocast  the peer: base weights bf16, LoRA parameters f32 (PEFT's autocast_adapter_dtype default), torch.autocast(bfloat16), as Trainer(bf16=True) runs it
  plain     the same without autocast: what is not LoRA runs in bf16, LoRA's two products in f32 (PEFT casts their input up)
  forced    `autocast`, each token sent to the experts that the f32 run chose (mixture-of-experts models only): rounding without flipped near-ties

Attention is what transformers picks by itself (sdpa; gpt-oss, with its sinks, eager), experts likewise. OUT.json holds, per model and run, the relative error
of the base and the adapter loss, the relative Frobenius error of each LoRA gradient, and the relative deviation of each of the ten losses.

One set of inputs gives ten losses, which are few draws of rounding noise. With --seed K every model gets other token ids (uniform, of a generator seeded with K; the same
positions are learnt), the f32 run here becomes the reference, and FRESH/MODEL.sK a folder like those of DIR, for `./run parity FRESH --peer OUT.json`.
"""

import argparse
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
from safetensors.torch import load_file, save_file

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


def run(folder, inputs, dtype, autocast=False, attention=None, forced=None):
    """One run: the loss without and with the adapter, the gradients, ten steps' losses and gradient norms; what it ran with; the routing of the gradient pass and the ten steps."""
    ids, labels = (inputs[k].to("cuda", torch.long) for k in ("input_ids", "labels"))
    model = load(folder, dtype, attention)

    def loss_of(m):
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
            return m(input_ids=ids, labels=labels, use_cache=False).loss

    with torch.no_grad():
        base = loss_of(model.eval()).item()
    model = peft.PeftModel.from_pretrained(model, f"{folder}/adapter", is_trainable=True).eval()  # no dropout in these models either way
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with Routing(forced) as routing:
        loss = loss_of(model)
        loss.backward()
        gradients = {name: p.grad.detach().float().cpu() for name, p in trainable.items()}
        adapter = loss.item()
        optimizer = torch.optim.AdamW(trainable.values(), lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
        curve = []
        for _ in range(STEPS):
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of(model)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(trainable.values(), 1.0)
            optimizer.step()
            curve.append([loss.item(), norm.item()])
    config = model.get_base_model().config
    numbers = {
        "loss": torch.tensor([base]),
        "adapter_loss": torch.tensor([adapter]),
        "adamw_curve_loss_gradnorm": torch.tensor(curve),
        **{f"grad.{name}": g for name, g in gradients.items()},
    }
    about = {
        "attention": config._attn_implementation,
        "experts": getattr(config, "_experts_implementation", None),
        "loraDtype": sorted({str(p.dtype) for p in trainable.values()}),
    }
    return numbers, about, routing.chosen


def errors(got, want):
    """Relative errors of the losses, relative Frobenius errors of the gradients."""
    relative = lambda key: (abs(got[key].double() - want[key].double()) / abs(want[key].double())).item()
    names = [k for k in want if k.startswith("grad.")]
    if set(names) != {k for k in got if k.startswith("grad.")}:
        raise SystemExit(f"the adapter's parameters are not the reference's: {names[:4]}")
    frobenius = lambda k: ((got[k].double() - want[k].double()).norm() / want[k].double().norm()).item()
    curves = zip(got["adamw_curve_loss_gradnorm"][:, 0].tolist(), want["adamw_curve_loss_gradnorm"][:STEPS, 0].tolist())
    return {
        "baseLoss": relative("loss"),
        "adapterLoss": relative("adapter_loss"),
        "gradients": {short(k[len("grad."):]): frobenius(k) for k in names},
        "losses": [abs(g - w) / abs(w) for g, w in curves],
    }


def other_inputs(reference, vocabulary, seed):
    """Other token ids at the same positions, learnt where the reference's are."""
    ids = torch.randint(0, vocabulary, reference["input_ids"].shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    learnt = reference["labels"] != -100
    return {"input_ids": ids, "labels": torch.where(learnt, ids, torch.full_like(ids, -100))}


def write_model(folder, to, numbers):
    os.makedirs(to, exist_ok=True)
    for name in os.listdir(folder):
        if name != "reference.safetensors" and not os.path.lexists(f"{to}/{name}"):
            os.symlink(os.path.abspath(f"{folder}/{name}"), f"{to}/{name}")
    save_file({k: v.contiguous() for k, v in numbers.items()}, f"{to}/reference.safetensors")


def main(folder, out, only, seeds=(None,), fresh=None, jobs=1):
    start = time.time()
    names = sorted(n for n in os.listdir(folder) if os.path.exists(f"{folder}/{n}/reference.safetensors") and (not only or n in only))
    if not names:
        raise SystemExit(f"{folder}: no reference models")
    pairs = [(name, seed) for name in names for seed in seeds]
    mine, total, children = 0, jobs, []
    for job in range(1, jobs):  # before CUDA starts
        child = os.fork()
        if child == 0:
            mine, children = job, []
            break
        children.append(child)
    part = lambda job: out if job == 0 else f"{out}.{job}"
    result = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "models": {},
    }
    if mine == 0:
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

    def one(name, seed):
        path, label = f"{folder}/{name}", name if seed is None else f"{name}.s{seed}"
        reference = load_file(f"{path}/reference.safetensors")
        if seed is not None:
            with open(f"{path}/config.json") as file:
                reference = other_inputs(reference, json.load(file)["vocab_size"], seed)
        numbers, about, chosen = run(path, reference, torch.float32, attention="eager")
        sound = True
        runs = {}
        if seed is None:
            runs["check"] = {**about, **errors(numbers, reference)}
            worst = max([runs["check"]["baseLoss"], runs["check"]["adapterLoss"], *runs["check"]["gradients"].values(), *runs["check"]["losses"]])
            sound = worst < 1e-4
            if not sound:
                print(f"{name}: the f32 check is off by {worst:.1e}", flush=True)
        else:
            reference = {**reference, **numbers}
            write_model(path, f"{fresh}/{label}", reference)
        for kind, autocast in (("autocast", True), ("plain", False)):
            got, about, own = run(path, reference, torch.bfloat16, autocast=autocast)
            runs[kind] = {**about, **errors(got, reference)}
            if chosen:
                layers = len(chosen) // (STEPS + 1)
                runs[kind]["flipped"], runs[kind]["routed"] = flips(own[:layers], chosen[:layers])
            row(label, kind, runs[kind], flips(own[:layers], chosen[:layers]) if chosen else None)
        if chosen:
            got, about, _ = run(path, reference, torch.bfloat16, autocast=True, forced=chosen)
            runs["forced"] = {**about, **errors(got, reference)}
            row(label, "forced", runs["forced"])
        result["models"][label] = runs
        with open(part(mine), "w") as file:
            json.dump(result, file, indent=1)
        return sound

    sound = True
    for name, seed in pairs[mine::total]:
        try:
            sound = one(name, seed) and sound
        except Exception:  # the others still count
            sound = False
            print(f"{name}:\n{traceback.format_exc()}", flush=True)
    if mine:
        return 0 if sound else 1
    for job, child in enumerate(children, 1):
        sound = os.waitpid(child, 0)[1] == 0 and sound
        if os.path.exists(part(job)):
            with open(part(job)) as file:
                result["models"].update(json.load(file)["models"])
            os.remove(part(job))
    with open(out, "w") as file:
        json.dump(result, file, indent=1)
    print(f"{len(pairs)} runs of {len(names)} models on {result['device']}, torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}: {time.time() - start:.1f} s")
    return 0 if sound else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("out", metavar="OUT.json")
    parser.add_argument("models", metavar="MODEL", nargs="*")
    parser.add_argument("--seed", metavar="K,...")
    parser.add_argument("--write", metavar="FRESH")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="that many processes share the models and seeds (each run is bound by launches)")
    args = parser.parse_intermixed_args()
    if (args.seed is None) != (args.write is None):
        parser.error("--seed and --write go together")
    seeds = [int(k) for k in args.seed.split(",")] if args.seed else [None]
    sys.exit(main(args.folder, args.out, set(args.models), seeds, args.write, args.jobs))
