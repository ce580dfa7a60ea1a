import { expectNoLeaks, randomNormal } from '@lc/tensor/testing';
import { expect, test } from 'vitest';
import { reference } from '../src/index.js';
import { type Case, makeProblem } from './cases.js';

expectNoLeaks();

/** Central differences of <dout, out> against the analytic gradient, in f64; the step's own error is of order 1e-9. */
function differences(c: Case): void {
  const p = makeProblem(c, 11);
  const want = reference.backward(p);
  const loss = (change: Partial<typeof p>): number =>
    reference.forward({ ...p, ...change }).out.reduce((sum, o, i) => sum + o * (p.dout[i] as number), 0);
  const check = (name: 'q' | 'k' | 'v' | 'sinks', got: Float64Array): void => {
    const values = Float64Array.from(p[name] ?? []);
    const step = 1e-5;
    for (let x = 0; x < values.length; x += Math.max(1, Math.floor(values.length / 23))) {
      const numeric = [step, -step].map((s) => loss({ [name]: values.map((v, i) => (i === x ? v + s : v)) } as never)) as [number, number];
      expect(Math.abs((numeric[0] - numeric[1]) / (2 * step) - (got[x] as number)), `${name}[${x}]`).toBeLessThan(2e-8);
    }
  };
  check('q', want.dq);
  check('k', want.dk);
  check('v', want.dv);
  if (p.sinks) check('sinks', want.dSinks);
}

test.each<[string, Case]>([
  ['causal', { n: 7, heads: 2, kvHeads: 2, headDim: 5 }],
  ['grouped heads, prefix', { n: 5, heads: 4, kvHeads: 2, headDim: 4, start: 6, extraKeys: 2 }],
  ['sinks', { n: 7, heads: 4, kvHeads: 2, headDim: 4, sinks: true }],
  [
    'sinks, window, documents, scale',
    { n: 9, heads: 3, kvHeads: 1, headDim: 4, start: 3, sinks: true, window: 4, documents: [0, 2, 7], scale: 0.7 },
  ],
])('finite differences agree with the reference: %s', (_, c) => differences(c));

test('the reference of RoPE: backward is the transpose of forward', () => {
  const rope = { invFreq: [1, 0.1, 0.01], attentionFactor: 1.3, rotaryDim: 6 };
  const at = { n: 3, heads: 2, headDim: 8, start: 100, docStart: [0, 101, 101], rope };
  const [x, g] = [randomNormal(48, 1), randomNormal(48, 2)];
  const dot = (a: ArrayLike<number>, b: ArrayLike<number>): number => Array.from(a).reduce((sum, v, i) => sum + v * (b[i] as number), 0);
  expect(dot(reference.ropeForward({ ...at, x }), g)).toBeCloseTo(dot(x, reference.ropeBackward({ ...at, x: g })), 12);
});
