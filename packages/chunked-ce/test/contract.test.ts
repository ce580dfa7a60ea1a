/** What callers build on besides the numbers: memory, accumulation, which outputs are written, and errors. */
import {
  copy,
  deviceMemory,
  empty,
  fill,
  fromTypedArray,
  LcError,
  memInfo,
  memory,
  Scope,
  setRamLimit,
  type Tensor,
  Workspace,
  zeros,
} from '@lc/tensor';
import { expectNoLeaks, randomNormal, relativeError } from '@lc/tensor/testing';
import { afterAll, describe, expect, it } from 'vitest';
import { bytesPerRow, type ChunkedCrossEntropyArgs, chunkedCrossEntropy, chunkRows, readLossSum, reference } from '../src/index.js';
import { native } from '../src/native.js';
import { type Problem, problem } from './problem.js';

expectNoLeaks();
const scope = new Scope();
const ws = scope.own(new Workspace());
afterAll(() => scope.dispose());

const code = (expected: string) => expect.objectContaining({ code: expected });
const filled = (shape: number[], value: number): Tensor => {
  const t = scope.own(empty(shape));
  fill(t, value);
  return t;
};
/** The tensors of a problem, and the call that takes them. */
function tensors(p: Problem) {
  const hidden = scope.own(fromTypedArray(p.hidden.slice(), [p.n, p.width]));
  const weight = scope.own(fromTypedArray(p.weight, [p.vocab, p.width]));
  const labels = scope.own(fromTypedArray(p.labels, [p.n]));
  const run = (more: Partial<ChunkedCrossEntropyArgs> = {}) =>
    chunkedCrossEntropy({ hidden, weight, labels, numTokens: p.numTokens, ws, ...more });
  return { hidden, weight, labels, run };
}

describe('memory', () => {
  it('holds the logits of one chunk, whatever the length', () => {
    const p = problem(400, 8, 1000, {}, 0);
    const { hidden, run } = tensors(p);
    using fixed = new Workspace({ bytes: 10 * bytesPerRow(1000, 8) + 7 * 256, fixed: true });
    const before = deviceMemory('cpu').allocations;
    expect(run({ chunk: 10, dHidden: hidden, ws: fixed }).loss).toBeGreaterThan(0);
    expect(deviceMemory('cpu').allocations).toBe(before);
    expect(() => run({ chunk: 20, dHidden: hidden, ws: fixed })).toThrow(code('ERR_LC_OUT_OF_MEMORY'));
    expect(fixed.usedBytes).toBe(0);
  });

  it("stays under 'auto' within what the allocator may take", () => {
    const p = problem(400, 8, 1000, {}, 0);
    const { run } = tensors(p);
    const want = run({ chunk: 400, dHidden: null }).loss;
    using ws = new Workspace();
    const taken = Object.values(memory().devices).reduce((sum, { liveBytes }) => sum + liveBytes, 0);
    setRamLimit(taken + 1_300_000); // 400 rows take 1.6 MB, 200 fit; a workspace grows by at least 1 MiB
    try {
      expect(() => run({ chunk: 400, dHidden: null, ws })).toThrow(code('ERR_LC_OUT_OF_MEMORY'));
      expect(run({ chunk: 'auto', dHidden: null, ws }).loss).toBeCloseTo(want, 5);
    } finally {
      setRamLimit(null);
    }
  });

  it('a budget in bytes is kept by a workspace that grows', () => {
    const { hidden, run } = tensors(problem(100, 8, 40_000, {}, 0));
    using growing = new Workspace();
    const { chunkRows: rows } = run({ chunk: { bytes: 3e6 }, dHidden: hidden, ws: growing });
    expect(rows).toBe(18);
    expect(growing.capacity).toBeLessThan(3e6 + 8 * 256);
  });

  it("'auto' takes smaller chunks where the workspace is fixed and small, with the same result", () => {
    const { run } = tensors(problem(100, 8, 1000, {}));
    using small = new Workspace({ bytes: 12 * bytesPerRow(1000, 8), fixed: true });
    const [a, b] = [filled([100, 8], 7), filled([100, 8], 7)];
    const few = run({ dHidden: a, ws: small });
    const many = run({ dHidden: b });
    expect(few.chunkRows).toBeLessThanOrEqual(12);
    expect(few.chunkRows).toBeGreaterThanOrEqual(5);
    expect(many.chunkRows).toBe(many.supervised);
    expect(Math.abs(few.loss - many.loss)).toBeLessThan(1e-6 * many.loss);
    expect(relativeError(a.data(), b.data())).toBeLessThan(1e-6);
  });

  it('a chunk is rows, bytes, or a share of what is free now, at least one row', () => {
    const row = bytesPerRow(201_088, 2880);
    expect(chunkRows({ bytes: 10.5 * row }, 1000, 201_088, 2880, 'cpu')).toBe(10);
    expect(chunkRows({ bytes: 1 }, 1000, 201_088, 2880, 'cpu')).toBe(1);
    expect(chunkRows(4096, 1000, 201_088, 2880, 'cpu')).toBe(1000);
    const auto = chunkRows('auto', 2 ** 31, 201_088, 2880, 'cpu');
    expect(auto).toBeGreaterThanOrEqual(1);
    expect((auto - 1) * row).toBeLessThanOrEqual(Math.min(2 ** 30, memInfo('cpu').totalBytes / 4));
  });

  it("gpt-oss's 201,088 words: every digit of a sum that long", () => {
    for (const o of [{}, { labelSmoothing: 0.1, softCap: 30, zLoss: 1e-4 }]) {
      const p = problem(3, 5, 201_088, o, 0);
      p.hidden.forEach((h, i) => {
        p.hidden[i] = 3 * h;
      });
      const { run } = tensors(p);
      const [dHidden, dWeight] = [filled([3, 5], 7), filled([201_088, 5], 0)];
      const lossPerToken = filled([3], 7);
      const { loss } = run({ ...o, chunk: 2, dHidden, dWeight, lossPerToken });
      const want = reference.backward(p);
      expect(Math.abs(loss - reference.forward(p))).toBeLessThan(2e-7 * loss);
      expect(relativeError(dHidden.data(), want.dHidden)).toBeLessThan(2e-6);
      expect(relativeError(dWeight.data(), want.dWeight)).toBeLessThan(1e-6);
    }
  });

  /** Address space only: a machine may refuse even that. */
  const huge = (context: { skip: () => void }, make: () => Tensor | Workspace): Tensor | Workspace | undefined => {
    try {
      return make();
    } catch (error) {
      if (!(error instanceof LcError) || error.code !== 'ERR_LC_OUT_OF_MEMORY') throw error;
      context.skip();
    }
  };

  it('offsets beyond 2^31 elements', (context) => {
    const [rows, vocab] = [3, 37];
    using far = huge(context, () => empty([rows, 2 ** 30 + 64])) as Tensor; // 12 GiB, of which three pages are touched
    const logits = far.slice(1, 0, vocab);
    const near = scope.own(fromTypedArray(randomNormal(rows * vocab, 5), [rows, vocab]));
    copy(logits, near);
    const labels = scope.own(fromTypedArray(Int32Array.of(3, 36, 0), [rows]));
    const off = { bias: null, weights: null, logitScale: 1, softCap: 0, labelSmoothing: 0, zLoss: 0 };
    const run = (z: Tensor): number[][] => {
      const loss = filled([rows], 0);
      native().crossEntropyRows({ ...off, logits: z, labels, loss, inverseTokens: 1, gradient: true });
      const gradient = filled([rows, vocab], 0);
      copy(gradient, z);
      return [[...loss.data<Float32Array>()], [...gradient.data<Float32Array>()]];
    };
    expect(run(logits)).toEqual(run(near));
  });

  it('works from a workspace of more than 4 GiB', (context) => {
    using ws = huge(context, () => new Workspace({ bytes: 2 ** 32 + 4096 })) as Workspace;
    const p = problem(7, 13, 50, {});
    expect(tensors(p).run({ chunk: 3, ws }).loss).toBeCloseTo(reference.forward(p), 5);
  });
});

describe('outputs', () => {
  const p = problem(131, 20, 97, {});
  const want = reference.backward(p);

  it('only what is asked for; forward alone leaves hidden as it was', () => {
    const { hidden, run } = tensors(p);
    const only = run({ chunk: 9 });
    expect(only.loss).toBeCloseTo(reference.forward(p), 5);
    expect([...hidden.data()]).toEqual([...p.hidden]);
    const dWeight = filled([97, 20], 0);
    const dBias = filled([97], 0);
    expect(run({ chunk: 9, dWeight }).loss).toBe(only.loss);
    expect(relativeError(dWeight.data(), want.dWeight)).toBeLessThan(3e-6);
    run({ chunk: 9, dBias });
    expect(relativeError(dBias.data(), want.dBias)).toBeLessThan(3e-6);
    expect([...hidden.data()]).toEqual([...p.hidden]);
  });

  it.each([1, 5, 131])('chunks of %i: ignored rows get exactly 0 and no GEMM, whatever lay there', (chunk) => {
    const { run } = tensors(p);
    const [dHidden, lossPerToken] = [filled([131, 20], 7), filled([131], 7)];
    const { gemmRows, supervised } = run({ chunk, dHidden, lossPerToken });
    expect(gemmRows).toBe(supervised);
    expect(relativeError(dHidden.data(), want.dHidden)).toBeLessThan(3e-6);
    p.labels.forEach((y, i) => {
      expect(
        dHidden
          .rows(i, 1)
          .data()
          .every((v) => v === 0),
      ).toBe(y === -100);
      expect(lossPerToken.data()[i] === 0).toBe(y === -100);
    });
  });

  it('hidden and its gradient may be columns of something wider', () => {
    const { run } = tensors(p);
    const wide = filled([131, 32], 7);
    const hidden = wide.slice(1, 4, 20);
    for (let i = 0; i < 131; i++)
      hidden
        .rows(i, 1)
        .view([20])
        .data<Float32Array>()
        .set(p.hidden.subarray(i * 20, i * 20 + 20));
    run({ hidden, dHidden: hidden, chunk: 7 });
    const got = Float32Array.from({ length: 131 * 20 }, (_, i) => wide.data()[Math.floor(i / 20) * 32 + 4 + (i % 20)] as number);
    expect(relativeError(got, want.dHidden)).toBeLessThan(3e-6);
    expect(wide.data().filter((v) => v === 7).length).toBe(131 * 12);
  });

  it('in parts with the count of the whole, losses and gradients add up to the whole', () => {
    const { hidden, labels, run } = tensors(p);
    const supervised = p.labels.filter((y) => y !== -100).length;
    const [dHidden, dWeight, lossSum] = [filled([131, 20], 7), filled([97, 20], 0), filled([2], 0)];
    let loss = 0;
    for (const [start, count] of [
      [0, 100],
      [100, 1],
      [101, 30],
    ] as const) {
      const part = { hidden: hidden.rows(start, count), labels: labels.rows(start, count), dHidden: dHidden.rows(start, count) };
      loss += run({ ...part, dWeight, lossSum, numTokens: supervised, chunk: 8 }).loss;
    }
    const whole = { ...p, numTokens: supervised };
    const g = reference.backward(whole);
    expect(Math.abs(loss - reference.forward(whole))).toBeLessThan(1e-6);
    expect(readLossSum(lossSum) / supervised).toBeCloseTo(loss, 10);
    expect(relativeError(dHidden.data(), g.dHidden)).toBeLessThan(3e-6);
    expect(relativeError(dWeight.data(), g.dWeight)).toBeLessThan(3e-6);
  });

  it('the same call twice gives the same bits', () => {
    const { run } = tensors(p);
    const [a, b] = [filled([97, 20], 0), filled([97, 20], 0)];
    expect(run({ dWeight: a, chunk: 7 }).loss).toBe(run({ dWeight: b, chunk: 7 }).loss);
    expect([...a.data()]).toEqual([...b.data()]);
  });
});

describe('errors, before anything is written', () => {
  const p = problem(3, 2, 4, {}, 0);
  const { hidden, labels, run } = tensors(p);

  it('says which label is out of range', () => {
    labels.data<Int32Array>().set([1, 4, -100]);
    expect(() => run()).toThrow(/labels\[1\] is 4, expected 0\.\.3/);
    labels.data<Int32Array>().set([1, 3, -101]);
    expect(() => run()).toThrow(/labels\[2\] is -101/);
    expect(run({ ignoreIndex: -101 }).supervised).toBe(2);
    labels.data<Int32Array>().set([1, 3, 0]);
  });

  it.each<[string, Partial<Record<keyof ChunkedCrossEntropyArgs, unknown>>]>([
    ['chunk', { chunk: 0 }],
    ['chunk', { chunk: Number.NaN }],
    ['chunk', { chunk: { bytes: -1 } }],
    ['chunk', { chunk: 'all' }],
    ['labelSmoothing', { labelSmoothing: 2 }],
    ['zLoss', { zLoss: Number.NaN }],
    ['softCap', { softCap: -1 }],
    ['logitScale', { logitScale: 0 }],
    ['ignoreIndex', { ignoreIndex: 0.5 }],
    ['numTokens', { numTokens: 0 }],
    ['numTokens', { numTokens: Number.NaN }],
  ])('%s: %j', (name, bad) => {
    const attempt = (): unknown => run(bad as Partial<ChunkedCrossEntropyArgs>);
    expect(attempt).toThrow(code('ERR_LC_ARGUMENT'));
    expect(attempt).toThrow(name);
  });

  it('shapes, dtypes and aliases', () => {
    const i32 = scope.own(zeros([3], { dtype: 'i32' }));
    const f32 = scope.own(zeros([3]));
    const wrong: [Partial<ChunkedCrossEntropyArgs>, string, RegExp][] = [
      [{ labels: i32.rows(0, 2) }, 'ERR_LC_SHAPE', /labels must be \[3\]/],
      [{ labels: f32 }, 'ERR_LC_DTYPE', /labels must be i32/],
      [{ weight: scope.own(zeros([4, 3])) }, 'ERR_LC_SHAPE', /weight must be \[vocab, 2\]/],
      [{ bias: f32 }, 'ERR_LC_SHAPE', /bias must be \[4\]/],
      [{ dHidden: scope.own(zeros([3, 3])) }, 'ERR_LC_SHAPE', /dHidden must be \[3, 2\]/],
      [{ tokenWeights: i32 }, 'ERR_LC_DTYPE', /tokenWeights must be f32/],
      [{ lossPerToken: i32 }, 'ERR_LC_DTYPE', /lossPerToken must be f32/],
      [{ lossSum: f32 }, 'ERR_LC_SHAPE', /lossSum must be \[2\]/],
      [{ tokenWeights: scope.own(fromTypedArray(Float32Array.of(1, Number.NaN, 1), [3])) }, 'ERR_LC_ARGUMENT', /tokenWeights\[1\] is NaN/],
    ];
    for (const [bad, expected, message] of wrong) {
      expect(() => run(bad)).toThrow(code(expected));
      expect(() => run(bad)).toThrow(message);
    }
    const both = scope.own(zeros([4, 2]));
    expect(() => run({ hidden: both.rows(0, 3), dHidden: both.rows(1, 3) })).toThrow(/dHidden must be hidden itself or apart/);
    expect([...hidden.data()]).toEqual([...p.hidden]);
    expect(ws.usedBytes).toBe(0);
  });

  it('numTokens 0 is the count of a step whose labels are all ignored: whether that is an error is for the caller', () => {
    labels.data<Int32Array>().fill(-100);
    const dHidden = filled([3, 2], 7);
    expect(run({ numTokens: 0, dHidden })).toMatchObject({ loss: 0, supervised: 0, gemmRows: 0 });
    expect([...dHidden.data()].every((v) => v === 0)).toBe(true);
  });
});
