import { join } from 'node:path';
import { empty, fromTypedArray } from '@lc/tensor';
import { openSafetensors } from '@lc/tensor/safetensors';
import { expectNoLeaks, randomNormal } from '@lc/tensor/testing';
import { describe, expect, it } from 'vitest';
import { Mxfp4Weight, reference, weightBytes } from '../src/index.js';

expectNoLeaks();
const fixture = join(import.meta.dirname, 'fixtures/mxfp4.safetensors');

const weight = (blocks: Uint8Array, scales: Uint8Array, groups: number[]): Mxfp4Weight =>
  new Mxfp4Weight({ blocks: fromTypedArray(blocks, [...groups, 16]), scales: fromTypedArray(scales, groups) });
const dequantized = (w: Mxfp4Weight): Float32Array => {
  using out = empty(w.shape);
  w.dequantize(out);
  return out.data().slice();
};

describe('MXFP4', () => {
  it('matches what transformers dequantizes gpt-oss blocks to, bit for bit', async () => {
    using file = await openSafetensors(fixture);
    const want = await file.read<Uint16Array>('dequantised_bf16'); // [3, 192, 64] = [experts, in, out]
    using w = weight(await file.read<Uint8Array>('blocks'), await file.read<Uint8Array>('scales'), [3, 64, 6]);
    expect(w.shape).toEqual([3, 64, 192]);
    expect(w.nbytes).toBe(weightBytes('mxfp4', w.shape));
    using out = empty(w.shape, { dtype: 'bf16' });
    w.dequantize(out);
    const got = out.data<Uint16Array>();
    const f32 = dequantized(w);
    for (let e = 0; e < 3; e++) {
      for (let o = 0; o < 64; o++) {
        for (let i = 0; i < 192; i++) {
          const at = (e * 64 + o) * 192 + i;
          const bits = want[(e * 192 + i) * 64 + o] as number;
          if (got[at] !== bits) expect.fail(`expert ${e}, out ${o}, in ${i}: ${got[at]} is not ${bits}`);
          if (new Uint32Array(Float32Array.of(f32[at] as number).buffer)[0] !== bits * 65536) expect.fail('f32 differs');
        }
      }
    }
  });

  it('decodes every code and scale as its definition says', () => {
    const blocks = Uint8Array.from({ length: 256 * 16 }, (_, i) => (((2 * i + 1) & 15) << 4) | ((2 * i) & 15));
    const scales = Uint8Array.from({ length: 256 }, (_, i) => i);
    using w = weight(blocks, scales, [1, 256]);
    const got = dequantized(w);
    const want = reference.mxfp4Dequantize(blocks, scales);
    for (let i = 0; i < want.length; i++) {
      // 6 * 2^127 is above f32; -0 is kept.
      if (!Object.is(got[i], Math.fround(want[i] as number))) expect.fail(`element ${i}: ${got[i]}, not ${want[i]}`);
    }
  });

  it('quantizes what it can represent without loss, twice the same', () => {
    for (const n of [1, 3, 40]) {
      using x = fromTypedArray(randomNormal(n * 96, n, 0.05), [n, 96]);
      using w = Mxfp4Weight.quantize(x);
      const once = dequantized(w);
      using y = fromTypedArray(once.slice(), [n, 96]);
      using again = Mxfp4Weight.quantize(y);
      expect(dequantized(again)).toEqual(once);
    }
  });

  it('rounds to nearest, ties to even, and saturates', () => {
    const cases: [number, number][] = [
      [6, 6],
      [0, 0],
      [-0, -0],
      [0.25, 0],
      [0.26, 0.5],
      [0.75, 1],
      [1.25, 1],
      [1.75, 2],
      [2.5, 2],
      [2.6, 3],
      [3.5, 4],
      [5, 4],
      [5.1, 6],
      [7.9, 6],
      [-7.9, -6],
      [-0.75, -1],
      [-0.2, -0],
    ];
    for (const exponent of [0, -20, 100, -126]) {
      const values = new Float32Array(32);
      cases.forEach(([v], i) => {
        values[i] = v * 2 ** exponent;
      });
      using x = fromTypedArray(values, [1, 32]);
      using w = Mxfp4Weight.quantize(x);
      expect([...w.scales.data<Uint8Array>()]).toEqual([exponent + 127]);
      expect([...dequantized(w)].slice(0, cases.length)).toEqual(cases.map(([, v]) => v * 2 ** exponent));
    }
    using zeros = fromTypedArray(new Float32Array(32), [1, 32]);
    using wz = Mxfp4Weight.quantize(zeros);
    expect(dequantized(wz).every((v) => v === 0)).toBe(true);
  });

  it('errs by at most two scales of its block', () => {
    const values = randomNormal(64 * 256, 9, 0.02);
    using x = fromTypedArray(values, [256, 64]);
    using w = Mxfp4Weight.quantize(x);
    const got = dequantized(w);
    for (let b = 0; b < values.length / 32; b++) {
      const block = values.subarray(b * 32, b * 32 + 32);
      const largest = block.reduce((a, v) => Math.max(a, Math.abs(v)), 0);
      const scale = 2 ** (Math.floor(Math.log2(largest)) - 2);
      // Half a step of 2 between 4 and 6; up to 2 above 6, where it saturates.
      for (let i = 0; i < 32; i++) expect(Math.abs((block[i] as number) - (got[b * 32 + i] as number))).toBeLessThanOrEqual(2 * scale);
    }
  });

  it('refuses bad shapes, dtypes and NaN', () => {
    using blocks = empty([2, 3, 16], { dtype: 'u8' });
    using scales = empty([3, 2], { dtype: 'u8' });
    expect(() => new Mxfp4Weight({ blocks, scales })).toThrow(expect.objectContaining({ code: 'ERR_LC_SHAPE' }));
    using floats = empty([2, 3]);
    expect(() => new Mxfp4Weight({ blocks, scales: floats })).toThrow(expect.objectContaining({ code: 'ERR_LC_DTYPE' }));
    using odd = empty([2, 33]);
    expect(() => Mxfp4Weight.quantize(odd)).toThrow(expect.objectContaining({ code: 'ERR_LC_SHAPE' }));
    using nan = fromTypedArray(new Float32Array(32).fill(Number.NaN, 3, 4), [1, 32]);
    expect(() => Mxfp4Weight.quantize(nan)).toThrow(expect.objectContaining({ code: 'ERR_LC_NAN' }));
  });
});
