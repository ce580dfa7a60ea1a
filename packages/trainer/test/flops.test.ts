import { parseModelConfig, presets } from '@lc/models';
import { describe, expect, it } from 'vitest';
import { stepFlops, visiblePairs } from '../src/bench/flops.js';

const config = (name: string) => parseModelConfig(presets[name]);

describe('work of a step', () => {
  it('counts the pairs that a query sees', () => {
    for (const [n, window] of [
      [7, null],
      [7, 3],
      [2, 5],
      [1, 1],
      [131, 128],
    ] as const) {
      let pairs = 0;
      for (let i = 0; i < n; i++) pairs += Math.min(i + 1, window ?? n);
      expect(visiblePairs(n, window)).toBe(pairs);
    }
  });

  it('is 3 x 6.06 GFLOP and 2.3 for the head per token of gpt-oss-20b', () => {
    const { linear, head } = stepFlops(config('gpt-oss-20b'), 1);
    expect(linear / 1e9).toBeCloseTo(6.06, 2);
    expect(head / 1e9).toBeCloseTo(2.3, 1);
  });

  it('gives the floor of 530,000 tokens: linears and head at 750 TFLOP/s, 4.5 attention forwards at 450', () => {
    const tokens = 530_000;
    const model = config('gpt-oss-20b');
    const { linear, head, attention, step, floorSeconds } = stepFlops(model, tokens);
    const full = 12 * 4 * 4096 * ((tokens * (tokens + 1)) / 2);
    const windowed = 12 * 4 * 4096 * (128 * tokens - (128 * 127) / 2);
    expect(attention).toBe(full + windowed);
    const gemms = (3 * linear + head) * tokens;
    expect(step).toBeCloseTo(gemms + 4.5 * attention, -6);
    expect(floorSeconds).toBeCloseTo(gemms / 750e12 + (4.5 * attention) / 450e12, 6);
    // Where the output of a full layer is kept, backward does not compute it again.
    expect(stepFlops(model, tokens, { kept: { layers: 12, tokens } }).step).toBeCloseTo(gemms + 3.5 * full + 4.5 * windowed, -6);
    // The last half of the tokens has three quarters of the pairs.
    const half = { layers: 12, tokens: tokens / 2 };
    expect(stepFlops(model, tokens, { kept: half }).step / (gemms + 3.75 * full + 4.5 * windowed)).toBeCloseTo(1, 4);
    expect(stepFlops(model, tokens, { layers: 2 }).attention).toBe((full + windowed) / 12);
  });

  it('counts dense and other mixtures of experts, active experts only', () => {
    const llama = stepFlops(config('Llama-3.1-8B'), 1).linear / 2;
    expect(llama).toBe(32 * (4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336));
    const qwen = stepFlops(config('Qwen3-30B-A3B'), 1).linear / 2;
    expect(qwen).toBe(48 * (2048 * (4096 + 2 * 512) + 4096 * 2048 + 2048 * 128 + 8 * 3 * 2048 * 768));
    expect(stepFlops(config('Qwen2.5-3B'), 1).linear / 2).toBe(36 * (2048 * (2048 + 2 * 256) + 2048 * 2048 + 3 * 2048 * 11008));
  });
});
