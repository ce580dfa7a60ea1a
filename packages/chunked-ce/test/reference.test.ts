import { describe, expect, it } from 'vitest';
import { reference } from '../src/index.js';
import { combinations, problem } from './problem.js';

describe('the reference', () => {
  it.each(combinations)('%s: finite differences agree with its gradient', (_, o) => {
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
        expect((up - down) / 2e-5).toBeCloseTo(gradient[i] as number, 8);
      }
    }
  });

  it('is the cross-entropy of three words, by hand', () => {
    // logits ln 1, ln 2, ln 5: probabilities 1/8, 2/8, 5/8
    const o = { hidden: [1], weight: [0, Math.log(2), Math.log(5)], labels: [2], n: 1, width: 1, vocab: 3 };
    expect(reference.forward(o)).toBeCloseTo(Math.log(8 / 5), 12);
    expect([...reference.backward(o).dBias].map((v) => v * 8)).toEqual([1, 2, -3].map((v) => expect.closeTo(v, 12)));
    const mean = (Math.log(8) + Math.log(4) + Math.log(8 / 5)) / 3;
    expect(reference.forward({ ...o, labelSmoothing: 0.1 })).toBeCloseTo(0.9 * Math.log(8 / 5) + 0.1 * mean, 12); // as PyTorch defines it
    expect(reference.forward({ ...o, zLoss: 0.5 })).toBeCloseTo(Math.log(8 / 5) + 0.5 * Math.log(8) ** 2, 12);
  });
});
