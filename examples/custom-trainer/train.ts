// A trainer of one's own from four optimizations, without @lc/models and @lc/trainer: a neural n-gram language model over characters (Bengio et al., 2003).
// A token's input is the embeddings of the 12 characters up to it; three gated MLPs follow, with frozen 4-bit weights and LoRA, and a head that is trained whole.
// Attention is the one thing left out: docs/compose.md has a layer with it. Run: npm start [-- your.txt]
import { mkdirSync } from 'node:fs';
import { chunkedCrossEntropy } from '@lc/chunked-ce';
import { LayerSchedule } from '@lc/offload-ckpt';
import { AdamW, LoraLinear, Nf4Weight, QuantizedLinear } from '@lc/qlora';
import {
  type Block,
  embeddingGather,
  empty,
  fromTypedArray,
  type Layer,
  rmsNorm,
  rmsNormBackward,
  Scope,
  type Span,
  type Tensor,
  Workspace,
  zeros,
} from '@lc/tensor';
import { writeSafetensors } from '@lc/tensor/safetensors';
import { TiledMLP } from '@lc/tiled-mlp';
import { random, readText } from './data.js';

const [tokens, chunk, context, embedding, intermediate, depth, steps, eps] = [8192, 2048, 12, 16, 384, 3, 60, 1e-5];
const width = context * embedding;

const { ids, vocab, heldOutFrom } = readText(process.argv[2]);

using ws = new Workspace(); // everything temporary
using scope = new Scope(); // disposes the model

// The model. Weights are random here; yours come from a file.
const norm = { weight: scope.own(fromTypedArray(new Float32Array(width).fill(1), [width])), eps };
function linear(name: string, outFeatures: number, inFeatures: number): LoraLinear {
  using weight = random([outFeatures, inFeatures], inFeatures ** -0.5);
  const base = new QuantizedLinear({ weight: scope.own(Nf4Weight.quantize(weight)) });
  return scope.own(new LoraLinear({ base, r: 32, loraAlpha: 32, name }));
}
/** The schedule walks layers that may look at earlier tokens through a state of theirs; a block looks at each token alone and keeps none. */
const asLayer = (block: Block): Layer => ({
  parameters: block.parameters,
  open(tokens, pass, ws) {
    block.open(pass, ws); // unpacks 4-bit weights, once for all chunks
    return { tokens };
  },
  close: () => block.close(),
  forward: (x, out, at, _, ws) => block.forward(x, out, at, ws),
  fill: () => {},
  backward: (x, dout, dx, at, _, ws) => block.backward(x, dout, dx, at, ws),
});
const layers = Array.from({ length: depth }, (_, i) => {
  const gateProj = linear(`layers.${i}.gate_proj`, intermediate, width);
  const upProj = linear(`layers.${i}.up_proj`, intermediate, width);
  const downProj = linear(`layers.${i}.down_proj`, width, intermediate);
  return asLayer(new TiledMLP({ gateProj, upProj, downProj, activation: 'silu', norm, tile: 512 }));
});
const table = scope.own(random([vocab, embedding], 1));
const head = {
  name: 'head',
  value: scope.own(random([vocab, width], width ** -0.5)),
  grad: scope.own(zeros([vocab, width])),
};
const parameters = [...layers.flatMap((layer) => layer.parameters), head];
const optimizer = scope.own(new AdamW(parameters, { lr: 1e-2, weightDecay: 0 }));

// Layer inputs are the checkpoints: half of their bytes may stay on the device, the rest goes to host memory and comes back ahead of its use.
const deviceBytes = (depth * tokens * width * 4) / 2;
const schedule = scope.own(new LayerSchedule({ layers, tokens, chunk, width, ws, storeOptions: { deviceBytes } }));
const windows = scope.own(empty([tokens * context], { dtype: 'i32' })); // ids of the characters that each token sees
const labels = scope.own(empty([tokens], { dtype: 'i32' }));

/** Takes the sequence that starts at a position of the text. */
function load(start: number): void {
  const seen = windows.data<Int32Array>();
  for (let i = 0; i < tokens; i++) seen.set(ids.subarray(start + i, start + i + context), i * context);
  labels.data<Int32Array>().set(ids.subarray(start + context, start + context + tokens));
}
function input(out: Tensor, at: Span): void {
  embeddingGather({ table, ids: windows.rows(at.start * context, at.length * context), out: out.view([at.length * context, embedding]) });
}
/** Loss of a chunk, divided by the tokens of the whole step; with `dx`, its gradients too. */
function loss(x: Tensor, dx: Tensor | null, at: Span): number {
  return ws.scoped(() => {
    const hidden = ws.alloc(x.shape);
    rmsNorm({ x, weight: norm.weight, out: hidden, eps });
    const gradients = dx ? { dHidden: hidden, dWeight: head.grad } : {};
    const result = chunkedCrossEntropy({
      hidden,
      weight: head.value,
      labels: labels.rows(at.start, at.length),
      numTokens: tokens,
      chunk: 512,
      ws,
      ...gradients,
    });
    if (dx) rmsNormBackward({ x, weight: norm.weight, dout: hidden, dx, eps });
    return result.loss;
  });
}
function heldOut(): number {
  load(heldOutFrom);
  let sum = 0;
  schedule.forwardOnly(input, (x, at) => {
    sum += loss(x, null, at);
  });
  return sum;
}

console.log(`held-out loss before: ${heldOut().toFixed(3)}`);
for (let step = 0; step < steps; step++) {
  load(Math.floor((step / steps) * (heldOutFrom - tokens - context)));
  optimizer.zeroGrad();
  let sum = 0;
  schedule.forward(input);
  schedule.loss((x, dx, at) => {
    sum += loss(x, dx, at);
  });
  schedule.backward(); // the table is frozen: nothing to do with its gradient
  optimizer.lr = 1e-2 * (1 - step / steps);
  optimizer.step({ maxGradNorm: 1 });
  if (step % 10 === 0 || step === steps - 1) console.log(`step ${step + 1}: loss ${sum.toFixed(3)}`);
}
console.log(`held-out loss after: ${heldOut().toFixed(3)}`);
console.log(`${(ws.peakBytes / 2 ** 20).toFixed(1)} MiB of workspace`);
mkdirSync('outputs', { recursive: true });
await writeSafetensors(
  'outputs/trained.safetensors',
  parameters.map(({ name, value }) => ({ name, dtype: value.dtype, shape: value.shape, data: value })),
);
