/** What the tests of workers run in threads and processes of their own: one real piece of work per package, from the built packages, as users import them. */
import { fileURLToPath } from 'node:url';
import { attentionBackward, attentionForward } from '@lc/attention';
import { chunkedCrossEntropy, shiftLabels } from '@lc/chunked-ce';
import { loadAdapterOnto, loadModel, TrainingSession } from '@lc/models';
import { AdamW, LoraLinear, Nf4Weight, QuantizedLinear } from '@lc/qlora';
import { empty, fromTypedArray, gemm, LcError, PlainLinear, Scope, Workspace, zeros } from '@lc/tensor';
import { TiledMLP } from '@lc/tiled-mlp';

const models = fileURLToPath(new URL('../fixtures/reference-models/', import.meta.url));
const values = (count, seed) => Float32Array.from({ length: count }, (_, i) => Math.sin(i * 0.37 + seed) / 2);
const size = (shape) => shape.reduce((a, b) => a * b, 1);
const make = (scope, shape, seed) => scope.own(fromTypedArray(values(size(shape), seed), shape, { label: 'task' }));
/** Every bit counts: results must not depend on who else computes. */
const digest = (...tensors) => {
  let hash = 2166136261;
  for (const t of tensors) {
    const data = t.data();
    for (const byte of new Uint8Array(data.buffer, data.byteOffset, data.byteLength)) hash = Math.imul(hash ^ byte, 16777619);
  }
  return hash >>> 0;
};
/** What native code throws is typed in every thread. */
function refusal() {
  try {
    empty([2 ** 44], { dtype: 'u8' });
  } catch (error) {
    return `${error instanceof LcError} ${error.code}`;
  }
}

export const tasks = {
  tensor(scope) {
    const c = scope.own(zeros([192, 160]));
    gemm({ a: make(scope, [192, 256], 1), b: make(scope, [256, 160], 2), c });
    return `${digest(c)} ${refusal()}`;
  },
  attention(scope) {
    const [tokens, heads, kvHeads, headDim] = [200, 4, 2, 64];
    const ws = scope.own(new Workspace());
    const q = make(scope, [tokens, heads, headDim], 1);
    const [k, v] = [2, 3].map((seed) => make(scope, [tokens, kvHeads, headDim], seed));
    const [out, dq] = [scope.own(empty(q.shape)), scope.own(empty(q.shape))];
    const [dk, dv] = [scope.own(zeros(k.shape)), scope.own(zeros(v.shape))];
    const lse = scope.own(empty([tokens, heads]));
    const at = { q, k, v, out, lse, start: 0, window: 128, ws };
    attentionForward(at);
    attentionBackward({ ...at, dout: make(scope, q.shape, 4), dq, dk, dv });
    return digest(out, dq, dk, dv);
  },
  'chunked-ce'(scope) {
    const ids = Int32Array.from({ length: 200 }, (_, i) => (i * 7) % 900);
    const hidden = make(scope, [200, 64], 1);
    const labels = scope.own(fromTypedArray(shiftLabels(ids), [200]));
    const ws = scope.own(new Workspace());
    const { loss } = chunkedCrossEntropy({ hidden, weight: make(scope, [900, 64], 2), labels, chunk: 64, dHidden: hidden, ws });
    return `${loss} ${digest(hidden)}`;
  },
  'tiled-mlp'(scope) {
    const linear = (rows, columns, seed) => new PlainLinear({ weight: make(scope, [rows, columns], seed) });
    const norm = { weight: make(scope, [64], 4), eps: 1e-5 };
    const mlp = new TiledMLP({
      gateProj: linear(160, 64, 1),
      upProj: linear(160, 64, 2),
      downProj: linear(64, 160, 3),
      activation: 'silu',
      tile: 64,
      norm,
    });
    const [x, out] = [make(scope, [300, 64], 5), scope.own(zeros([300, 64]))];
    const ws = scope.own(new Workspace());
    const at = { start: 0, length: 300, docStart: null };
    mlp.forward(x, out, at, ws);
    mlp.backward(x, out, out, at, ws);
    return digest(out);
  },
  qlora(scope) {
    const weight = scope.own(Nf4Weight.quantize(make(scope, [48, 64], 1)));
    const linear = scope.own(new LoraLinear({ base: new QuantizedLinear({ weight }), r: 8, loraAlpha: 16, name: 'q_proj' }));
    const optimizer = scope.own(new AdamW(linear.parameters, { lr: 1e-2 }));
    linear.parameters.forEach(({ value }, i) => value.data().set(values(value.numel, 10 + i)));
    const [x, y, dy] = [make(scope, [96, 64], 2), scope.own(empty([96, 48])), make(scope, [96, 48], 3)];
    const ws = scope.own(new Workspace());
    const at = { start: 0, length: 96, docStart: null };
    ws.scoped(() => {
      linear.open('backward', ws);
      linear.forward(x, y, at, ws);
      linear.backward(x, dy, null, at, ws);
      linear.close();
    });
    optimizer.step({ maxGradNorm: 1 });
    return digest(y, ...linear.parameters.map((p) => p.value));
  },
  /** offload-ckpt's schedule, the model and the session: whole steps, with the event loop in between. */
  async models(scope, { name = 'gpt-oss', tokens = 100, steps = 2, onStep } = {}) {
    const model = scope.own(await loadModel(models + name, { tile: 16 }));
    await loadAdapterOnto(model, `${models}${name}/adapter`);
    const session = scope.own(
      new TrainingSession({ model, tokens, chunk: 32, ws: scope.own(new Workspace()), storeOptions: { deviceBytes: 0 } }),
    );
    const inputIds = Int32Array.from({ length: tokens }, (_, i) => (i * 7919 + 13) % 512);
    const losses = [];
    for (let step = 0; step < steps; step++) {
      losses.push((await session.step({ inputIds, labels: inputIds }, { dropoutSeed: 1 })).loss);
      onStep?.(step);
    }
    return `${losses} ${digest(...model.parameters.map((p) => p.grad))}`;
  },
};

export async function runTask(name, options) {
  const scope = new Scope();
  try {
    return await tasks[name](scope, options);
  } finally {
    scope.dispose();
  }
}
