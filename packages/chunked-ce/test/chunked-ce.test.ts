import { empty, fromTypedArray, type Tensor, Workspace, zeros } from '@lc/tensor';
import { expectNoLeaks, relativeError } from '@lc/tensor/testing';
import { describe, expect, it } from 'vitest';
import { type ChunkSize, chunkedCrossEntropy, reference, shiftLabels } from '../src/index.js';
import { combinations, type Problem, problem } from './problem.js';

expectNoLeaks();

describe('chunkedCrossEntropy', () => {
  const run = (p: Problem, chunk: ChunkSize, inPlace: boolean) => {
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

  it.each(combinations)('%s: loss and gradients match the reference for any chunk, also in place', (_, o) => {
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
});

describe('shiftLabels', () => {
  it('never crosses documents', () => {
    expect([...shiftLabels([10, 11, 12, 20, 21], [0, 0, 0, 3, 3])]).toEqual([11, 12, -100, 21, -100]);
    expect([...shiftLabels([1, -100, 3])]).toEqual([-100, 3, -100]);
  });
});
