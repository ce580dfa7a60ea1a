import { describe, expect, it } from 'vitest';
import { checkSampleOptions, sampleToken, uniform } from '../src/sample.js';

const logits = Float32Array.of(1, 3, 2, -1, 3);
const counts = (options: Parameters<typeof sampleToken>[1], draws = 4000): number[] => {
  const seen = new Array<number>(logits.length).fill(0);
  for (let i = 0; i < draws; i++) {
    const id = sampleToken(logits, options, i);
    seen[id] = (seen[id] ?? 0) + 1;
  }
  return seen.map((n) => n / draws);
};

describe('sampleToken', () => {
  it('is greedy without a temperature, the first of equals', () => {
    expect(sampleToken(logits, {}, 0)).toBe(1);
    expect(sampleToken(logits, { topK: 3, seed: 4 }, 9)).toBe(1);
  });

  it('draws in proportion to the probabilities', () => {
    const weights = [...logits].map((value) => Math.exp(value / 2));
    const total = weights.reduce((a, b) => a + b, 0);
    for (const [i, share] of counts({ temperature: 2 }, 20000).entries()) expect(share).toBeCloseTo((weights[i] as number) / total, 1.5);
  });

  it('keeps the topK most likely, and the fewest that make topP', () => {
    expect(counts({ temperature: 1, topK: 2 }).map((share) => share > 0)).toEqual([false, true, false, false, true]);
    expect(counts({ temperature: 1, topP: 0.01 })).toEqual([0, 1, 0, 0, 0]);
    expect(counts({ temperature: 1, topP: 0.85 }).map((share) => share > 0)).toEqual([false, true, true, false, true]);
  });

  it('draws the same for the same seed, and by index alone', () => {
    const draw = (seed: number): number[] => Array.from({ length: 50 }, (_, i) => sampleToken(logits, { temperature: 1, seed }, i));
    expect(draw(1)).toEqual(draw(1));
    expect(draw(1)).not.toEqual(draw(2));
    const mean = Array.from({ length: 10000 }, (_, i) => uniform(3, i)).reduce((a, b) => a + b, 0) / 10000;
    expect(mean).toBeCloseTo(0.5, 1.5);
  });

  it('refuses bad options and logits that are no numbers', () => {
    for (const bad of [{ temperature: -1 }, { temperature: Number.NaN }, { topP: 0 }, { topP: 2 }, { topK: 1.5 }, { seed: 0.5 }]) {
      expect(() => checkSampleOptions(bad)).toThrow(expect.objectContaining({ code: 'ERR_LC_ARGUMENT' }));
    }
    expect(() => sampleToken(Float32Array.of(1, Number.NaN), {}, 0)).toThrow(expect.objectContaining({ code: 'ERR_LC_NAN' }));
  });
});
