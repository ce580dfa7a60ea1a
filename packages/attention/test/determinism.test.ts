import { numThreads } from '@lc/tensor';
import { expectNoLeaks, relativeError } from '@lc/tensor/testing';
import { afterAll, describe, expect, test, vi } from 'vitest';
import { reference } from '../src/index.js';
import { type Isa, native } from '../src/native.js';
import { type Case, makeProblem, type Result, run } from './cases.js';

const threads = vi.hoisted(() => ({ slots: 0 }));
vi.mock('@lc/tensor', async (load) => {
  const tensor = await load<typeof import('@lc/tensor')>();
  return { ...tensor, numThreads: () => threads.slots || tensor.numThreads() };
});

expectNoLeaks();

const bits = (r: Result): string =>
  Object.values(r)
    .map((x: Float32Array) => Buffer.from(x.buffer).toString('base64'))
    .join();

describe('the same bits', () => {
  const c: Case = { n: 1100, heads: 4, kvHeads: 1, headDim: 32, sinks: true, documents: [0, 500] };

  test('call after call', () => {
    const p = makeProblem(c, 7);
    const first = bits(run(p, [600]));
    for (let round = 0; round < 3; round++) expect(bits(run(p, [600])) === first).toBe(true);
  });

  test('with 1, 2 and 5 workers', () => {
    const p = makeProblem(c, 8);
    const want = bits(run(p));
    for (const slots of [1, 2, 5]) {
      threads.slots = slots;
      expect(numThreads()).toBe(slots);
      expect(bits(run(p)) === want).toBe(true);
    }
    threads.slots = 0;
  });
});

describe('every instruction set', () => {
  const best = native().isa() as Isa;
  afterAll(() => {
    native().isa(best);
  });

  const cases: [string, Case][] = [
    ['head dim 64', { n: 131, heads: 4, kvHeads: 2, headDim: 64, start: 40, window: 100, documents: [0, 60], sinks: true }],
    ['head dim 80', { n: 70, heads: 5, kvHeads: 1, headDim: 80, sinks: true }],
    ['head dim 7, 3 heads', { n: 131, heads: 3, kvHeads: 3, headDim: 7 }],
    ['1 token', { n: 1, heads: 2, kvHeads: 1, headDim: 20, start: 66 }],
  ];
  for (const isa of ['generic', 'avx2', 'avx512'] as const) {
    test.skipIf(native().isa(isa) === null).each(cases)(`${isa} agrees with the f64 reference: %s`, (_, c) => {
      expect(native().isa(isa)).toBe(isa);
      const p = makeProblem(c, 9);
      const got = run(p);
      for (const [name, want] of Object.entries({ ...reference.forward(p), ...reference.backward(p) })) {
        if (name !== 'dSinks' || p.sinks) expect(relativeError(got[name as keyof Result], want), name).toBeLessThan(1e-5);
      }
    });
  }
});
