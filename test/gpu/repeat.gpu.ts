/**
 * The same call twice gives the same bits: every CUDA op whose result is a sum that blocks could finish in any order. (gemm, norms, experts and attention
 * are held to it where they are tested; single steps of whole models by `parity`.)
 */
import { chunkedCrossEntropy } from '@lc/chunked-ce';
import { AdamW, LoraExpertLinear, LoraLinear } from '@lc/qlora';
import {
  copy,
  type DType,
  embeddingScatterAdd,
  empty,
  fill,
  fromTypedArray,
  groupedGemm,
  groupedGemmWeightGrad,
  type Parameter,
  PlainExpertLinear,
  PlainLinear,
  Scope,
  sumRows,
  type Tensor,
  upload,
  Workspace,
  zeros,
} from '@lc/tensor';
import { TiledMLP } from '@lc/tiled-mlp';
import { randomNormal as random } from '../../packages/tensor/src/seeded.js';
import { assert, small, test } from './harness.js';
import { values } from './numbers.js';

function normal(scope: Scope, shape: number[], seed: number, std = 1, dtype: DType = 'bf16'): Tensor {
  using source = fromTypedArray(
    random(
      shape.reduce((a, b) => a * b, 1),
      seed,
      std,
    ),
    shape,
  );
  const out = scope.own(empty(shape, { dtype, device: 'cuda' }));
  copy(out, source);
  return out;
}
/** `fn` fills tensors that begin as NaN (or as zeros where it adds). */
async function twice(what: string, fn: (scope: Scope, ws: Workspace) => Record<string, Tensor>): Promise<void> {
  const runs: Record<string, Float32Array>[] = [];
  for (let i = 0; i < 3; i++) {
    using scope = new Scope();
    using ws = new Workspace({ device: 'cuda' });
    const out: Record<string, Float32Array> = {};
    for (const [name, t] of Object.entries(fn(scope, ws))) out[name] = await values(t);
    runs.push(out);
  }
  const [first, ...others] = runs as [Record<string, Float32Array>, ...Record<string, Float32Array>[]];
  for (const other of others)
    for (const [name, x] of Object.entries(first)) {
      assert(x.some((v) => v !== 0) && !x.some(Number.isNaN), `${what}: ${name} holds nothing, or NaN`);
      assert(
        x.every((v, i) => Object.is(v, other[name]?.[i])),
        `${what}: ${name} has other bits the next time`,
      );
    }
}

// Enough rows for many blocks; 8,191 is no multiple of anything.
const rows = small ? 517 : 8191;
const at = { start: 0, length: rows, docStart: null, dropoutSeed: 5 };

test('repeats: cross-entropy', async () => {
  const [width, vocab] = [136, 3001];
  await twice('cross-entropy', (scope, ws) => {
    const hidden = normal(scope, [rows, width], 1);
    const labels = scope.own(
      fromTypedArray(
        Int32Array.from({ length: rows }, (_, i) => (i % 5 === 2 ? -100 : (i * 11) % vocab)),
        [rows],
      ),
    );
    const [dWeight, lossPerToken, lossSum] = [[vocab, width], [rows], [2]].map((shape) => scope.own(zeros(shape, { device: 'cuda' }))) as [
      Tensor,
      Tensor,
      Tensor,
    ];
    const weight = normal(scope, [vocab, width], 2, 0.1);
    chunkedCrossEntropy({ hidden, weight, labels, chunk: 1000, dHidden: hidden, dWeight, lossPerToken, lossSum, ws });
    return { hidden, dWeight, lossPerToken, lossSum };
  });
});

test('repeats: LoRA with dropout, and on experts', async () => {
  await twice('LoRA', (scope, ws) => {
    const base = new PlainLinear({ weight: normal(scope, [200, 136], 1, 0.1) });
    const lora = scope.own(new LoraLinear({ base, r: 8, loraDropout: 0.1, name: 'probe', device: 'cuda' }));
    copy(lora.b.value, normal(scope, [200, 8], 2, 0.1, 'f32'));
    const [x, dout] = [normal(scope, [rows, 136], 3), normal(scope, [rows, 200], 4)];
    const [out, dx] = [normal(scope, [rows, 200], 5), normal(scope, [rows, 136], 5)];
    lora.forward(x, out, at, ws);
    lora.backward(x, dout, dx, at, ws);
    return { out, dx, a: lora.a.grad, b: lora.b.grad };
  });
  await twice('LoRA on experts', (scope, ws) => {
    const base = new PlainExpertLinear({ weight: normal(scope, [5, 96, 64], 1, 0.1) });
    const lora = scope.own(new LoraExpertLinear({ base, r: 4, name: 'experts', device: 'cuda' }));
    copy(lora.b.value, normal(scope, [96, 20], 3, 0.1, 'f32'));
    const offsets = scope.own(empty([6], { dtype: 'i32', device: 'cuda' }));
    upload(offsets, Int32Array.of(0, 7, 7, Math.floor(rows / 2), rows - 1, rows));
    const [x, dout] = [normal(scope, [rows, 64], 4), normal(scope, [rows, 96], 5)];
    const [out, dx] = [normal(scope, [rows, 96], 6), normal(scope, [rows, 64], 6)];
    lora.forward(x, out, offsets, ws);
    lora.backward(x, dout, dx, offsets, ws);
    return { out, dx, a: lora.a.grad, b: lora.b.grad };
  });
});

test('repeats: AdamW and its gradient norm', async () => {
  for (const optimBits of [32, 8] as const)
    await twice(`AdamW, ${optimBits} bits`, (scope) => {
      const parameters: Parameter[] = [[rows * 8], [64, 129], [5]].map((shape, i) => ({
        name: `p${i}`,
        value: normal(scope, shape, i, 1, 'f32'),
        grad: normal(scope, shape, 10 + i, 1, 'f32'),
      }));
      const optimizer = scope.own(new AdamW(parameters, { optimBits }));
      const norms: number[] = [];
      for (let step = 0; step < 3; step++) norms.push(optimizer.step({ maxGradNorm: 1 }).gradNorm);
      const norm = normal(scope, [norms.length], 1, 1, 'f32');
      upload(norm, Float32Array.from(norms));
      return { norm, ...Object.fromEntries(parameters.map((p) => [p.name, p.value])) };
    });
});

test('repeats: sums over rows, scatter into an embedding, grouped products', async () => {
  await twice('rows', (scope) => {
    const x = normal(scope, [rows, 136], 1);
    const ids = scope.own(empty([rows], { dtype: 'i32', device: 'cuda' }));
    upload(
      ids,
      Int32Array.from({ length: rows }, (_, i) => (i % 2 ? 3 : (i * i) % 40)),
    ); // half of them one id
    const [sums, dTable] = [scope.own(zeros([136], { device: 'cuda' })), scope.own(zeros([40, 136], { device: 'cuda' }))];
    sumRows({ x, out: sums, accumulate: true });
    embeddingScatterAdd({ dout: x, ids, dTable });
    const offsets = scope.own(empty([4], { dtype: 'i32', device: 'cuda' }));
    upload(offsets, Int32Array.of(0, 11, rows - 5, rows));
    const out = scope.own(empty([rows, 72], { dtype: 'bf16', device: 'cuda' }));
    fill(out, Number.NaN);
    groupedGemm({ a: x, b: normal(scope, [3, 136, 72], 2, 0.1), c: out, offsets });
    const dw = scope.own(empty([3, 136, 72], { device: 'cuda' }));
    groupedGemmWeightGrad({ a: x, b: out, c: dw, offsets });
    return { sums, dTable, out, dw };
  });
});

test('repeats: dense MLP with a norm', async () => {
  await twice('dense MLP', (scope, ws) => {
    const linear = (o: number, i: number, seed: number): PlainLinear => new PlainLinear({ weight: normal(scope, [o, i], seed, 0.1) });
    const norm = { weight: normal(scope, [136], 9), eps: 1e-5 };
    const mlp = new TiledMLP({
      ...{ gateProj: linear(200, 136, 1), upProj: linear(200, 136, 2), downProj: linear(136, 200, 3) },
      ...{ activation: 'silu', tile: 1000, norm },
    });
    const [x, dout] = [normal(scope, [rows, 136], 4), normal(scope, [rows, 136], 5)];
    const [out, dx] = [normal(scope, [rows, 136], 6), normal(scope, [rows, 136], 6)];
    mlp.forward(x, out, at, ws);
    mlp.backward(x, dout, dx, at, ws);
    return { out, dx };
  });
});
