/**
 * Every CUDA op that can meet it, on more than 2^31 elements. The tensors repeat one block of rows, so that a run on that block alone says what the rows
 * beyond 2^31 must hold: the same bits where a row's result hangs on the row alone, the same up to an order of additions where a larger product takes other tiles.
 * (gemm, rmsNorm, add and embeddingGather: tensor.gpu.ts; attention: attention.gpu.ts.)
 */
import { ropeBackward, ropeForward, ropeInit } from '@lc/attention';
import { chunkedCrossEntropy } from '@lc/chunked-ce';
import { LoraLinear, Mxfp4Weight, Nf4Weight } from '@lc/qlora';
import {
  addBias,
  axpy,
  copy,
  cublasLt,
  type DType,
  embeddingScatterAdd,
  empty,
  fill,
  fromTypedArray,
  gemm,
  groupedGemm,
  groupedGemmWeightGrad,
  PlainExpertLinear,
  PlainLinear,
  rmsNormBackward,
  Scope,
  scale,
  sumRows,
  type Tensor,
  upload,
  Workspace,
  zeros,
} from '@lc/tensor';
import { TiledMLP, TiledMoE } from '@lc/tiled-mlp';
import { randomNormal as random } from '../../packages/tensor/src/seeded.js';
import { assert, largeTest } from './harness.js';
import { difference, values } from './numbers.js';

const PERIOD = 4096;
const WIDTH = 2880;
const ROWS = 186 * PERIOD; // 2^31 / 2,880 = 745,654 rows
const BEYOND = Math.ceil(2 ** 31 / WIDTH);
/** Rows on both sides of the 2^31st element, and the last. */
const SAMPLED = [0, BEYOND - 2, BEYOND - 1, BEYOND, ROWS - PERIOD + 1, ROWS - 1];

const count = (shape: readonly number[]): number => shape.reduce((a, b) => a * b, 1);

/** bf16 (or f32) on the GPU, of values that bf16 holds. */
function block(scope: Scope, shape: number[], seed: number, std = 1, dtype: DType = 'bf16'): Tensor {
  using source = fromTypedArray(random(count(shape), seed, std), shape);
  using low = empty(shape, { dtype: 'bf16' });
  copy(low, source);
  const out = scope.own(empty(shape, { dtype, device: 'cuda' }));
  copy(out, low);
  return out;
}
const make = (scope: Scope, shape: number[], dtype: DType = 'bf16'): Tensor => scope.own(empty(shape, { dtype, device: 'cuda' }));

/** `rows` rows: those of `x` again and again. */
function repeated(scope: Scope, x: Tensor, rows: number): Tensor {
  const out = make(scope, [rows, ...x.shape.slice(1)], x.dtype);
  const period = x.shape[0] as number;
  for (let at = 0; at < rows; at += period) copy(out.rows(at, Math.min(period, rows - at)), x.rows(0, Math.min(period, rows - at)));
  return out;
}
/** Rows of `big` against the rows of `small` that they repeat. `allowed` 0: the same bits; else the relative error that another order of additions may make. */
async function sameRows(what: string, big: Tensor, small: Tensor, allowed = 0, rows: readonly number[] = SAMPLED): Promise<void> {
  const period = small.shape[0] as number;
  for (const row of rows) {
    const [got, want] = [await values(big.rows(row, 1)), await values(small.rows(row % period, 1))];
    const error = difference(got, want);
    const same = allowed === 0 ? got.every((v, i) => Object.is(v, want[i])) : error <= allowed;
    assert(same && want.some((v) => v !== 0), `${what}, row ${row}: off by ${error.toExponential(2)}, allowed ${allowed}`);
  }
}
/** A sum over all rows is that of the block, times how often it is repeated. */
async function sameSum(what: string, big: Tensor, small: Tensor, times: number, allowed: number): Promise<void> {
  const error = difference(
    await values(big),
    (await values(small)).map((v) => v * times),
  );
  assert(error <= allowed, `${what}: off by ${error.toExponential(2)}, allowed ${allowed}`);
}
/** Results in bf16 that sums in another order made: a few of them round to the neighbour, 2^-8 away at most. */
const ROUNDED = 2 ** -9;

largeTest('beyond 2^31 elements: row ops', async () => {
  using scope = new Scope();
  const small = { x: block(scope, [PERIOD, WIDTH], 1), dout: block(scope, [PERIOD, WIDTH], 2) };
  const weight = block(scope, [WIDTH], 3);
  const big = { x: repeated(scope, small.x, ROWS), dout: repeated(scope, small.dout, ROWS) };
  const ids = { small: make(scope, [PERIOD], 'i32'), big: make(scope, [ROWS], 'i32') };
  const id = Int32Array.from({ length: PERIOD }, (_, i) => (i * 7) % 50);
  upload(ids.small, id);
  upload(
    ids.big,
    Int32Array.from({ length: ROWS }, (_, i) => id[i % PERIOD] as number),
  );
  const run = (t: typeof small, at: Tensor) => {
    const [dWeight, sums, dTable] = [
      zeros([WIDTH], { device: 'cuda' }),
      zeros([WIDTH], { device: 'cuda' }),
      zeros([50, WIDTH], { device: 'cuda' }),
    ];
    for (const s of [dWeight, sums, dTable]) scope.own(s);
    embeddingScatterAdd({ dout: t.dout, ids: at, dTable });
    sumRows({ x: t.dout, out: sums, accumulate: true });
    rmsNormBackward({ x: t.x, weight, dout: t.dout, dx: t.dout, eps: 1e-5, dWeight });
    addBias({ x: t.x, bias: weight });
    axpy({ x: t.dout, y: t.x, alpha: -0.5 });
    scale({ x: t.x, factor: 0.3 });
    return { dWeight, sums, dTable };
  };
  const want = run(small, ids.small);
  const got = run(big, ids.big);
  await sameRows('rmsNormBackward', big.dout, small.dout);
  await sameRows('addBias, axpy, scale', big.x, small.x);
  // f32 sums of 762,000 terms against sums of 4,096: each loses some 2^-24 of its parts, the parts being larger than the sum by the root of their number.
  for (const key of ['dWeight', 'sums', 'dTable'] as const) await sameSum(key, got[key], want[key], ROWS / PERIOD, 1e-3);
  big.dout.dispose();
  const wide = make(scope, [ROWS, WIDTH], 'f32');
  const wideSmall = make(scope, [PERIOD, WIDTH], 'f32');
  copy(wide, big.x);
  copy(wideSmall, small.x);
  await sameRows('cast to f32', wide, wideSmall);
  const half = big.x.slice(1, 8, WIDTH - 8);
  fill(half, 0.25);
  copy(half, wide.slice(1, 0, WIDTH - 8));
  const halfSmall = small.x.slice(1, 8, WIDTH - 8);
  copy(halfSmall, wideSmall.slice(1, 0, WIDTH - 8));
  await sameRows('cast of strided rows', big.x, small.x);
});

largeTest('beyond 2^31 elements: results of gemm, grouped gemm and its weight gradient', async () => {
  {
    using scope = new Scope();
    const [m, n, k] = [11_000, 201_088, 64];
    const a = block(scope, [1000, k], 1);
    const b = block(scope, [n, k], 2);
    const small = make(scope, [1000, n]);
    const c = make(scope, [m, n]);
    const repeatedA = repeated(scope, a, m);
    for (const backend of cublasLt() ? ([1, 2] as const) : ([1] as const)) {
      fill(c, Number.NaN);
      gemm({ a, b, c: small, transB: true, backend });
      gemm({ a: repeatedA, b, c, transB: true, backend });
      await sameRows(`gemm, backend ${backend}`, c, small, ROUNDED, [0, 10_678, 10_679, 10_680, m - 1]);
    }
  }
  using scope = new Scope();
  const [experts, n] = [4, 64];
  const offsets = (rows: number): Tensor => {
    const out = make(scope, [experts + 1], 'i32');
    upload(out, Int32Array.of(0, rows / 4, rows / 4, (rows * 3) / 4, rows));
    return out;
  };
  const small = block(scope, [PERIOD, WIDTH], 3);
  const gSmall = block(scope, [PERIOD, n], 4);
  const a = repeated(scope, small, ROWS);
  const g = repeated(scope, gSmall, ROWS);
  const b = block(scope, [experts, n, WIDTH], 5, 0.02);
  const c = make(scope, [ROWS, n]);
  fill(c, Number.NaN);
  groupedGemm({ a, b, c, offsets: offsets(ROWS), transB: true });
  // Row by row, each with its own expert.
  const one = make(scope, [1, n]);
  for (const row of SAMPLED) {
    const expert = row < ROWS / 4 ? 0 : row < (ROWS * 3) / 4 ? 2 : 3;
    gemm({ a: small.rows(row % PERIOD, 1), b: b.rows(expert, 1).view([n, WIDTH]), c: one, transB: true, backend: 1 });
    await sameRows('grouped gemm', c.rows(row, 1), one, ROUNDED, [0]);
  }
  const wide = make(scope, [ROWS, WIDTH]); // and as the result
  const back = block(scope, [experts, n, WIDTH], 6, 0.1);
  fill(wide, Number.NaN);
  groupedGemm({ a: g, b: back, c: wide, offsets: offsets(ROWS) });
  const oneWide = make(scope, [1, WIDTH]);
  for (const row of SAMPLED) {
    const expert = row < ROWS / 4 ? 0 : row < (ROWS * 3) / 4 ? 2 : 3;
    gemm({ a: gSmall.rows(row % PERIOD, 1), b: back.rows(expert, 1).view([n, WIDTH]), c: oneWide, backend: 1 });
    await sameRows('grouped gemm, wide result', wide.rows(row, 1), oneWide, ROUNDED, [0]);
  }
  const dw = make(scope, [experts, WIDTH, n], 'f32');
  groupedGemmWeightGrad({ a, b: g, c: dw, offsets: offsets(ROWS) });
  // Expert 3 has the last quarter, 46.5 periods: 46 whole ones and the second half of a block.
  const want = make(scope, [WIDTH, n], 'f32');
  gemm({ a: small, b: gSmall, c: want, transA: true, alpha: 46, backend: 1 });
  gemm({ a: small.rows(PERIOD / 2, PERIOD / 2), b: gSmall.rows(PERIOD / 2, PERIOD / 2), c: want, transA: true, beta: 1, backend: 1 });
  await sameSum('weight gradient', dw.rows(3, 1).view([WIDTH, n]), want, 1, 1e-3);
});

largeTest('beyond 2^31 elements: RoPE', async () => {
  using scope = new Scope();
  const [heads, d, rows] = [64, 64, 540_672]; // 132 periods
  const rope = ropeInit({ ropeType: 'default', ropeTheta: 150_000 }, { headDim: d, maxPositionEmbeddings: 131_072 });
  const small = block(scope, [PERIOD, heads, d], 1);
  const big = repeated(scope, small, rows);
  // Every block is a document of its own, but the small run's is where the large one's last is: positions from 0, tokens from there.
  const starts = make(scope, [rows], 'i32');
  upload(
    starts,
    Int32Array.from({ length: rows }, (_, i) => i - (i % PERIOD)),
  );
  for (const op of [ropeForward, ropeBackward]) {
    op({ x: big, start: 0, docStart: starts, rope });
    op({ x: small, start: 0, docStart: null, rope });
    await sameRows(op.name, big, small, 0, [1, 524_287, 524_288, 524_289, rows - 1]);
  }
});

largeTest('beyond 2^31 elements: NF4 and MXFP4 dequantization', async () => {
  const [period, n] = [1 << 22, 2 ** 31 + (1 << 22)];
  for (const format of ['nf4', 'nf4, double', 'mxfp4'] as const) {
    using scope = new Scope();
    using source = fromTypedArray(random(period, 1), [period / 64, 64]);
    const many = (t: Tensor): Tensor => {
      using there = empty(t.shape, { dtype: t.dtype, device: 'cuda' });
      copy(there, t);
      const out = empty([(t.shape[0] as number) * (n / period), ...t.shape.slice(1)], { dtype: t.dtype, device: 'cuda' });
      for (let at = 0; at < (out.shape[0] as number); at += t.shape[0] as number) copy(out.rows(at, t.shape[0] as number), there);
      return out;
    };
    const out = make(scope, [n / 64, 64]);
    const want = scope.own(empty([period / 64, 64], { dtype: 'bf16' }));
    fill(out, Number.NaN);
    if (format === 'mxfp4') {
      using one = Mxfp4Weight.quantize(source);
      one.dequantize(want);
      using all = new Mxfp4Weight({ blocks: many(one.blocks), scales: many(one.scales) });
      all.dequantize(out);
    } else {
      using one = Nf4Weight.quantize(source, { doubleQuant: format === 'nf4, double' });
      one.dequantize(want);
      const { codes, absmax, absmaxCodes, absmaxScales, absmaxOffset } = one.parts;
      const maybe = (t: Tensor | null): Tensor | null => (t ? many(t) : null);
      let offset: Tensor | null = null;
      if (absmaxOffset) {
        offset = empty([1], { device: 'cuda' });
        copy(offset, absmaxOffset);
      }
      using all = Nf4Weight.fromParts([n / 64, 64], {
        codes: many(codes),
        absmax: maybe(absmax),
        absmaxCodes: maybe(absmaxCodes),
        absmaxScales: maybe(absmaxScales),
        absmaxOffset: offset,
      });
      all.dequantize(out);
    }
    const there = make(scope, [period / 64, 64]);
    copy(there, want);
    await sameRows(format, out, there, 0, [0, 2 ** 25 - 1, 2 ** 25, 2 ** 25 + 1, n / 64 - 1]);
  }
});

largeTest('beyond 2^31 elements: cross-entropy, hidden states and logits', async () => {
  {
    using scope = new Scope();
    using ws = new Workspace({ device: 'cuda' });
    const weight = block(scope, [1000, WIDTH], 2, 0.02);
    const small = block(scope, [PERIOD, WIDTH], 1);
    const big = repeated(scope, small, ROWS);
    const scored = [BEYOND - 1, BEYOND, ...Array.from({ length: 300 }, (_, i) => ROWS - 600 + 2 * i)];
    const run = (hidden: Tensor, rows: readonly number[]): number => {
      const labels = scope.own(fromTypedArray(new Int32Array(hidden.shape[0] as number).fill(-100), [hidden.shape[0] as number]));
      for (const row of rows) labels.data<Int32Array>()[row] = (row % PERIOD) % 1000;
      return chunkedCrossEntropy({ hidden, weight, labels, numTokens: 302, chunk: 151, dHidden: hidden, ws }).loss;
    };
    const [far, near] = [
      run(big, scored),
      run(
        small,
        scored.map((row) => row % PERIOD).sort((a, b) => a - b),
      ),
    ];
    assert(Math.abs(far - near) <= 1e-6 * near, `loss ${far}, expected ${near}`);
    await sameRows('dHidden', big, small, ROUNDED, [BEYOND - 1, BEYOND, ROWS - 600, ROWS - 2]);
    assert(
      (await values(big.rows(ROWS - 1, 1))).every((v) => v === 0),
      'an ignored row has a gradient',
    );
  }
  using scope = new Scope();
  using ws = new Workspace({ device: 'cuda' });
  const [n, width, vocab] = [11_000, 64, 201_088];
  const weight = block(scope, [vocab, width], 2, 0.2);
  const labels = scope.own(
    fromTypedArray(
      Int32Array.from({ length: n }, (_, i) => ((i % 1000) * 199) % vocab),
      [n],
    ),
  );
  const base = block(scope, [1000, width], 1);
  const results: { loss: Tensor; hidden: Tensor }[] = [];
  for (const [rows, chunk] of [
    [1000, 100],
    [n, n],
  ] as const) {
    const hidden = repeated(scope, base, rows);
    const loss = scope.own(zeros([rows], { device: 'cuda' }));
    chunkedCrossEntropy({ hidden, weight, labels: labels.rows(0, rows), numTokens: 1000, chunk, dHidden: hidden, lossPerToken: loss, ws });
    results.push({ loss: loss.view([rows, 1]), hidden });
  }
  const [small, big] = results as [(typeof results)[0], (typeof results)[0]];
  const rows = [0, 5_339, 5_340, 10_679, 10_680, n - 1];
  await sameRows('loss of a token', big.loss, small.loss, 1e-5, rows);
  await sameRows('dHidden', big.hidden, small.hidden, ROUNDED, rows);
});

largeTest('beyond 2^31 elements: LoRA with dropout', async () => {
  using scope = new Scope();
  using ws = new Workspace({ device: 'cuda' });
  const [r, outer] = [4, 64];
  const small = { x: block(scope, [PERIOD, WIDTH], 1), dout: block(scope, [PERIOD, outer], 2) };
  const big = { x: repeated(scope, small.x, ROWS), dout: repeated(scope, small.dout, ROWS) };
  const base = new PlainLinear({ weight: block(scope, [outer, WIDTH], 3, 0.02) });
  const results = [small, big].map(({ x, dout }, i) => {
    const lora = scope.own(new LoraLinear({ base, r, loraDropout: 0.25, name: 'probe', device: 'cuda' }));
    copy(lora.a.value, block(scope, [r, WIDTH], 5, 0.02, 'f32'));
    copy(lora.b.value, block(scope, [outer, r], 4, 0.5, 'f32'));
    const rows = x.shape[0] as number;
    // Dropout draws by token: the small run has the tokens of the large one's last block.
    const at = { start: i === 0 ? ROWS - PERIOD : 0, length: rows, docStart: null, dropoutSeed: 77 };
    const [out, dx] = [make(scope, [rows, outer]), make(scope, [rows, WIDTH])];
    lora.forward(x, out, at, ws);
    lora.backward(x, dout, dx, at, ws);
    return { out, dx };
  });
  const [want, got] = results as [(typeof results)[0], (typeof results)[0]];
  const last = [ROWS - PERIOD, ROWS - 1000, ROWS - 1];
  await sameRows('out', got.out, want.out, ROUNDED, last);
  await sameRows('dx', got.dx, want.dx, ROUNDED, last);
});

largeTest('beyond 2^31 elements: dense MLP and experts in one tile', async () => {
  const at = { start: 0, docStart: null };
  {
    using scope = new Scope();
    using ws = new Workspace({ device: 'cuda' });
    const hidden = 64;
    const linear = (o: number, i: number, seed: number): PlainLinear => new PlainLinear({ weight: block(scope, [o, i], seed, 0.1) });
    const mlp = new TiledMLP({
      gateProj: linear(WIDTH, hidden, 1),
      upProj: linear(WIDTH, hidden, 2),
      downProj: linear(hidden, WIDTH, 3),
      activation: 'silu',
      tile: ROWS,
    });
    const small = { x: block(scope, [PERIOD, hidden], 4), dout: block(scope, [PERIOD, hidden], 5) };
    const big = { x: repeated(scope, small.x, ROWS), dout: repeated(scope, small.dout, ROWS) };
    const [want, got] = [small, big].map(({ x, dout }) => {
      const span = { ...at, length: x.shape[0] as number };
      const [out, dx] = [make(scope, [...x.shape]), make(scope, [...x.shape])];
      mlp.forward(x, out, span, ws);
      mlp.backward(x, dout, dx, span, ws);
      return { out, dx };
    }) as [{ out: Tensor; dx: Tensor }, { out: Tensor; dx: Tensor }];
    await sameRows('dense MLP: out', got.out, want.out, ROUNDED);
    await sameRows('dense MLP: dx', got.dx, want.dx, 2 * ROUNDED);
  }
  // 4 experts a token: 786,432 rows of 2,880 (gate and up), then of 2,880 (hidden).
  for (const [hidden, inner] of [
    [64, WIDTH / 2],
    [WIDTH, 64],
  ] as const) {
    using scope = new Scope();
    using ws = new Workspace({ device: 'cuda' });
    const [experts, topK, tokens] = [8, 4, 48 * PERIOD];
    const expert = (o: number, i: number, seed: number): PlainExpertLinear =>
      new PlainExpertLinear({ weight: block(scope, [experts, o, i], seed, 0.1) });
    const moe = new TiledMoE({
      kind: 'gpt-oss',
      router: { weight: block(scope, [experts, hidden], 1, 0.1, 'f32'), bias: block(scope, [experts], 2, 1, 'f32') },
      gateUp: expert(2 * inner, hidden, 3),
      gateUpBias: block(scope, [experts, 2 * inner], 4),
      down: expert(hidden, inner, 5),
      downBias: block(scope, [experts, hidden], 6),
      topK,
      tile: tokens,
    });
    const small = { x: block(scope, [PERIOD, hidden], 7), dout: block(scope, [PERIOD, hidden], 8) };
    const big = { x: repeated(scope, small.x, tokens), dout: repeated(scope, small.dout, tokens) };
    const [want, got] = [small, big].map(({ x, dout }) => {
      const span = { ...at, length: x.shape[0] as number };
      const [out, dx] = [make(scope, [...x.shape]), make(scope, [...x.shape])];
      moe.forward(x, out, span, ws);
      moe.backward(x, dout, dx, span, ws);
      return { out, dx };
    }) as [{ out: Tensor; dx: Tensor }, { out: Tensor; dx: Tensor }];
    const rows = [0, tokens / 2, tokens - PERIOD, tokens - 1001, tokens - 1];
    await sameRows(`experts ${hidden} x ${inner}: out`, got.out, want.out, ROUNDED, rows);
    await sameRows(`experts ${hidden} x ${inner}: dx`, got.dx, want.dx, 2 * ROUNDED, rows);
  }
});
