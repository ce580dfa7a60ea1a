import { expectNoLeaks, relativeError } from '@lc/tensor/testing';
import { describe, expect, test } from 'vitest';
import { reference } from '../src/index.js';
import { type Case, makeProblem, type Problem, type Result, run } from './cases.js';

expectNoLeaks();

/**
 * Bound on the error relative to the largest magnitude. A score is a dot product of f32 values: its rounding error, and that of the stored lse, are a few
 * 2^-24 of the scores' magnitude and become relative errors of the probabilities. Up to |score| = 8 that is below 1e-5; beyond, it grows in proportion.
 */
function tolerance(p: Problem): number {
  let largest = 0;
  const { lse } = reference.forward(p);
  for (const x of lse) largest = Math.max(largest, Math.abs(x));
  return 1e-5 * Math.max(1, largest / 8);
}

function check(p: Problem, got: Result, bound = tolerance(p)): void {
  const out = reference.forward(p);
  const grads = reference.backward(p);
  for (const [name, want] of Object.entries({ ...out, ...grads })) {
    if (name === 'dSinks' && !p.sinks) continue;
    expect(relativeError(got[name as keyof Result], want), name).toBeLessThan(bound);
  }
}

const cases: [string, Case][] = [];
for (const n of [1, 7, 131]) {
  for (const headDim of [16, 32, 64, 80]) cases.push([`${n} tokens, 4/2 heads x ${headDim}`, { n, heads: 4, kvHeads: 2, headDim }]);
  cases.push([`${n} tokens, 1 head x 20`, { n, heads: 1, kvHeads: 1, headDim: 20, sinks: true }]);
  cases.push([`${n} tokens, 3/1 heads x 7`, { n, heads: 3, kvHeads: 1, headDim: 7 }]);
  cases.push([`${n} tokens after 90, sinks`, { n, heads: 8, kvHeads: 2, headDim: 32, start: 90, sinks: true, extraKeys: 3 }]);
}
for (const window of [1, 11, 16, 128, 1000]) {
  cases.push([`window ${window}`, { n: 300, heads: 4, kvHeads: 2, headDim: 16, window, sinks: true }]);
  cases.push([
    `window ${window}, prefix, documents`,
    { n: 77, heads: 2, kvHeads: 1, headDim: 16, start: 201, window, documents: [0, 150, 201, 202, 240] },
  ]);
}
cases.push(
  ['several documents', { n: 200, heads: 4, kvHeads: 2, headDim: 32, documents: [0, 1, 2, 64, 65, 130, 199], sinks: true }],
  ['documents that begin in the prefix', { n: 130, heads: 4, kvHeads: 4, headDim: 16, start: 100, documents: [0, 37, 101, 164] }],
  [
    'every token its own document (rows that see one key)',
    { n: 70, heads: 2, kvHeads: 1, headDim: 16, documents: Array.from({ length: 70 }, (_, i) => i) },
  ],
  ['71 heads on one K/V head', { n: 9, heads: 71, kvHeads: 1, headDim: 8, start: 70, sinks: true }],
  ['130 heads on one K/V head', { n: 3, heads: 130, kvHeads: 1, headDim: 8, window: 2 }],
  ['scale 0', { n: 40, heads: 2, kvHeads: 2, headDim: 16, scale: 0 }],
  ['negative scale', { n: 40, heads: 2, kvHeads: 2, headDim: 16, scale: -0.3, sinks: true }],
  ['several key segments in backward', { n: 1200, heads: 2, kvHeads: 1, headDim: 16, documents: [0, 700], sinks: true }],
  ['several key segments in backward, window', { n: 1300, heads: 2, kvHeads: 2, headDim: 8, window: 600 }],
);

test.each(cases)('agrees with the f64 reference: %s', (_, c) => {
  const p = makeProblem(c, 3);
  check(p, run(p));
});

describe('extreme scores', () => {
  test('scores of +-80 and more', () => {
    const p = makeProblem({ n: 131, heads: 4, kvHeads: 2, headDim: 32, spread: 25, sinks: true });
    const { lse } = reference.forward(p);
    expect(Math.max(...lse)).toBeGreaterThan(80);
    check(p, run(p));
  });

  test('sinks that dominate, and sinks that vanish', () => {
    const p = makeProblem({ n: 50, heads: 4, kvHeads: 2, headDim: 16, sinks: true });
    p.sinks = [90, -90, 0, Number.NEGATIVE_INFINITY];
    const got = run(p);
    const want = reference.forward(p);
    expect(relativeError(got.lse, want.lse)).toBeLessThan(1e-6);
    for (let h = 0; h < 4; h++) {
      const of = (x: ArrayLike<number>): number[] => Array.from(x).filter((__, i) => Math.floor(i / 16) % 4 === h);
      expect(relativeError(of(got.out), of(want.out)), `head ${h}`).toBeLessThan(h === 0 ? 2e-5 : 1e-5);
    }
    expect(got.dSinks[3]).toBe(0);
  });

  test('equal scores: the mean of the values', () => {
    const p = makeProblem({ n: 100, heads: 2, kvHeads: 2, headDim: 16 });
    for (let x = 0; x < p.q.length; x++) p.q[x] = x % 16 === 0 ? 30 : 0;
    for (let x = 0; x < p.k.length; x += 16) p.k[x] = 1;
    check(p, run(p));
    p.q.fill(0);
    check(p, run(p));
  });

  test('NaN comes out as NaN, in its own row only', () => {
    const p = makeProblem({ n: 70, heads: 1, kvHeads: 1, headDim: 16 });
    p.q[5 * 16 + 3] = Number.NaN;
    const { out } = run(p);
    for (let i = 0; i < 70; i++) expect(Number.isNaN(out[i * 16]), `row ${i}`).toBe(i === 5);
  });
});

describe('chunks', () => {
  test.each<[string, number[], Case]>([
    ['equal', [64], { n: 300, heads: 4, kvHeads: 2, headDim: 32, sinks: true }],
    [
      'odd, window, documents',
      [1, 7, 131],
      { n: 300, heads: 4, kvHeads: 2, headDim: 16, window: 50, documents: [0, 111, 112, 250], sinks: true },
    ],
    ['long', [700], { n: 1500, heads: 2, kvHeads: 1, headDim: 16 }],
  ])('chunked equals whole: %s', (_, chunks, c) => {
    const p = makeProblem(c, 5);
    const [whole, chunked] = [run(p), run(p, chunks)];
    for (const name of Object.keys(whole) as (keyof Result)[]) expect(relativeError(chunked[name], whole[name]), name).toBeLessThan(1e-5);
  });
});
