import { deviceMemory, empty, fromTypedArray, type Tensor, Workspace, zeros } from '@lc/tensor';
import { expectNoLeaks, randomNormal, relativeError, seededRandom } from '@lc/tensor/testing';
import { describe, expect, it } from 'vitest';
import { type ChunkSize, type CrossEntropyOptions, chunkedCrossEntropy, reference, shiftLabels } from '../src/index.js';

expectNoLeaks();

const options: [string, CrossEntropyOptions & { weighted?: boolean; bias?: boolean }][] = [
  ['plain', {}],
  ['bias', { bias: true }],
  ['label smoothing', { labelSmoothing: 0.1 }],
  ['z-loss', { zLoss: 1e-2 }],
  ['soft cap', { softCap: 3 }],
  ['logit scale', { logitScale: 0.25 }],
  ['token weights', { weighted: true }],
  ['everything', { bias: true, labelSmoothing: 0.2, zLoss: 1e-2, softCap: 5, logitScale: 1.7, weighted: true }],
];

function problem(n: number, width: number, vocab: number, o: (typeof options)[number][1], ignored = 0.3) {
  const random = seededRandom(n * 7 + vocab);
  const { weighted, bias, ...rest } = o;
  return {
    ...rest,
    n,
    width,
    vocab,
    hidden: randomNormal(n * width, 1),
    weight: randomNormal(vocab * width, 2, 1 / Math.sqrt(width)),
    bias: bias ? randomNormal(vocab, 3) : null,
    labels: Int32Array.from({ length: n }, () => (random() < ignored ? -100 : Math.floor(random() * vocab))),
    tokenWeights: weighted ? Float32Array.from({ length: n }, (_, i) => (i % 4 === 0 ? 0 : random() + 0.5)) : null,
    numTokens: 17,
  };
}

describe('the reference', () => {
  it.each(options)('%s: finite differences agree with its gradient', (_, o) => {
    const p = problem(5, 3, 7, o);
    const f64 = {
      ...p,
      hidden: Float64Array.from(p.hidden),
      weight: Float64Array.from(p.weight),
      bias: Float64Array.from(p.bias ?? new Float32Array(7)),
    };
    const g = reference.backward(f64);
    for (const [values, gradient] of [
      [f64.hidden, g.dHidden],
      [f64.weight, g.dWeight],
      [f64.bias, g.dBias],
    ] as const) {
      for (let i = 0; i < values.length; i++) {
        const keep = values[i] as number;
        values[i] = keep + 1e-5;
        const up = reference.forward(f64);
        values[i] = keep - 1e-5;
        const down = reference.forward(f64);
        values[i] = keep;
        expect((up - down) / 2e-5).toBeCloseTo(gradient[i] as number, 7);
      }
    }
  });
});

describe('chunkedCrossEntropy', () => {
  const run = (p: ReturnType<typeof problem>, chunk: ChunkSize, inPlace: boolean) => {
    using ws = new Workspace();
    using hidden = fromTypedArray(p.hidden.slice(), [p.n, p.width]);
    using weight = fromTypedArray(p.weight, [p.vocab, p.width]);
    const bias: Tensor | null = p.bias ? fromTypedArray(p.bias, [p.vocab]) : null;
    const tokenWeights: Tensor | null = p.tokenWeights ? fromTypedArray(p.tokenWeights, [p.n]) : null;
    using labels = fromTypedArray(p.labels, [p.n]);
    using other = empty([p.n, p.width]);
    using dWeight = zeros([p.vocab, p.width]);
    using dBias = zeros([p.vocab]);
    using lossPerToken = empty([p.n]);
    const dHidden = inPlace ? hidden : other;
    const result = chunkedCrossEntropy({
      ...p,
      hidden,
      weight,
      bias,
      labels,
      tokenWeights,
      chunk,
      dHidden,
      dWeight,
      dBias,
      lossPerToken,
      ws,
    });
    bias?.dispose();
    tokenWeights?.dispose();
    return {
      ...result,
      dHidden: dHidden.data().slice(),
      dWeight: dWeight.data().slice(),
      dBias: dBias.data().slice(),
      perToken: lossPerToken.data().slice(),
    };
  };

  it.each(options)('%s: loss and gradients match the reference for any chunk, also in place', (_, o) => {
    for (const [n, width, vocab] of [
      [1, 5, 3],
      [7, 13, 50],
      [131, 20, 97],
    ] as const) {
      const p = problem(n, width, vocab, o);
      const want = reference.backward(p);
      const loss = reference.forward(p);
      for (const [chunk, inPlace] of [
        [1, false],
        [5, true],
        [n, false],
        ['auto', true],
        [{ bytes: 3000 }, true],
      ] as const) {
        const got = run(p, chunk, inPlace);
        expect(Math.abs(got.loss - loss)).toBeLessThanOrEqual(2e-6 * Math.max(1, Math.abs(loss)));
        expect(relativeError(got.dHidden, want.dHidden), `dHidden ${n} ${JSON.stringify(chunk)}`).toBeLessThan(3e-6);
        expect(relativeError(got.dWeight, want.dWeight)).toBeLessThan(3e-6);
        expect(relativeError(got.dBias, want.dBias)).toBeLessThan(3e-6);
        expect(got.perToken.reduce((a, b) => a + b, 0) / 17).toBeCloseTo(loss, 4);
        expect(got.gemmRows).toBe(p.labels.filter((y) => y !== -100).length);
      }
    }
  });

  it('all labels ignored: loss 0, gradients 0, no GEMM', () => {
    const p = problem(7, 5, 11, {}, 1.1);
    const got = run(p, 3, true);
    expect([got.loss, got.supervised, got.gemmRows]).toEqual([0, 0, 0]);
    expect([...got.dHidden, ...got.dWeight].every((v) => v === 0)).toBe(true);
  });

  it('large and equal logits stay finite and right', () => {
    const p = problem(9, 4, 33, {}, 0);
    p.hidden.fill(0, 0, 4); // all logits equal
    for (let i = 4; i < 36; i++) p.hidden[i] = (p.hidden[i] as number) * 80;
    const got = run(p, 4, false);
    expect(Math.abs(got.loss - reference.forward(p))).toBeLessThan(1e-5 * got.loss);
    expect(relativeError(got.dHidden, reference.backward(p).dHidden)).toBeLessThan(1e-5);
    expect(got.perToken[0]).toBeCloseTo(Math.log(33), 6);
  });

  it('a NaN or infinity in the input gives a loss that is not finite, not a crash', () => {
    for (const bad of [Number.NaN, Number.POSITIVE_INFINITY]) {
      const p = problem(5, 4, 20, {}, 0);
      p.hidden[6] = bad;
      expect(Number.isFinite(run(p, 2, true).loss)).toBe(false);
    }
  });

  it('holds the logits of one chunk, whatever the length', () => {
    const p = problem(400, 8, 1000, {}, 0);
    using ws = new Workspace({ bytes: 10 * 1000 * 4 + 10 * 8 * 8 + 4096, fixed: true });
    using hidden = fromTypedArray(p.hidden, [400, 8]);
    using weight = fromTypedArray(p.weight, [1000, 8]);
    using labels = fromTypedArray(p.labels, [400]);
    const before = deviceMemory('cpu').allocations;
    const { loss } = chunkedCrossEntropy({ hidden, weight, labels, chunk: 10, dHidden: hidden, ws });
    expect(loss).toBeGreaterThan(0);
    expect(deviceMemory('cpu').allocations).toBe(before);
  });

  it('says which label is out of range, and which shape is wrong', () => {
    using ws = new Workspace();
    using hidden = zeros([3, 2]);
    using weight = zeros([4, 2]);
    using labels = fromTypedArray(Int32Array.of(1, 4, -100), [3]);
    using short = zeros([2], { dtype: 'i32' });
    expect(() => chunkedCrossEntropy({ hidden, weight, labels, ws })).toThrow(/labels\[1\] is 4, expected 0\.\.3/);
    expect(() => chunkedCrossEntropy({ hidden, weight, labels: short, ws })).toThrow(expect.objectContaining({ code: 'ERR_LC_SHAPE' }));
    labels.data<Int32Array>()[1] = 0;
    for (const bad of [
      { chunk: 0 },
      { chunk: { bytes: -1 } },
      { labelSmoothing: 2 },
      { zLoss: Number.NaN },
      { softCap: -1 },
      { logitScale: 0 },
      { numTokens: 0 },
    ]) {
      expect(() => chunkedCrossEntropy({ hidden, weight, labels, ws, ...bad })).toThrow(
        expect.objectContaining({ code: 'ERR_LC_ARGUMENT' }),
      );
    }
    expect(ws.usedBytes).toBe(0);
  });
});

describe('shiftLabels', () => {
  it('never crosses documents', () => {
    expect([...shiftLabels([10, 11, 12, 20, 21], [0, 0, 0, 3, 3])]).toEqual([11, 12, -100, 21, -100]);
    expect([...shiftLabels([1, -100, 3])]).toEqual([-100, 3, -100]);
  });
});
