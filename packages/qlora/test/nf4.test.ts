import { copy, empty, fromTypedArray, memory } from '@lc/tensor';
import { expectNoLeaks, randomNormal, relativeError } from '@lc/tensor/testing';
import { describe, expect, it } from 'vitest';
import { Nf4Weight, reference, weightBytes } from '../src/index.js';
import { native } from '../src/native.js';

expectNoLeaks();

const dequantized = (w: Nf4Weight): Float32Array => {
  using out = empty(w.shape);
  w.dequantize(out);
  return out.data().slice();
};
const codesOf = (w: Nf4Weight, n: number): number[] => {
  const packed = w.parts.codes.data<Uint8Array>();
  return Array.from({ length: n }, (_, i) => ((packed[i >> 1] as number) >> (i & 1 ? 0 : 4)) & 15);
};

describe('NF4', () => {
  it('decodes to the published levels, which follow from their definition', () => {
    const published = [
      -1, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495,
      0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
      0.7229568362236023, 1,
    ];
    expect(relativeError(reference.nf4Levels, published)).toBeLessThan(2e-6); // theirs come from f32 quantiles
    using codes = fromTypedArray(
      Uint8Array.from({ length: 8 }, (_, i) => ((2 * i) << 4) | (2 * i + 1)),
      [8],
    );
    using absmax = fromTypedArray(Float32Array.of(1), [1]);
    using out = empty([16]);
    native().nf4Dequantize({ codes, out, block: 64, absmax });
    expect([...out.data()]).toEqual(published.map(Math.fround));
  });

  it.each([
    [[1], 64],
    [[7], 64],
    [[64], 64],
    [[5, 13], 64],
    [[131, 33], 64],
    [[3, 40, 96], 64],
    [[700, 64], 32],
    [[9, 1000], 4096],
  ])('%j in blocks of %d matches the reference, codes and values', (shape, blockSize) => {
    const n = shape.reduce((a, b) => a * b, 1);
    const values = randomNormal(n, n, 0.02);
    using x = fromTypedArray(values, shape);
    for (const doubleQuant of [false, true]) {
      using w = Nf4Weight.quantize(x, { blockSize, doubleQuant });
      const want = reference.nf4RoundTrip(values, blockSize, doubleQuant);
      expect(codesOf(w, n)).toEqual([...want.codes]);
      expect(relativeError(dequantized(w), want.values)).toBeLessThan(2e-6); // the levels' own distance
      if (blockSize === 64) expect(w.nbytes).toBe(weightBytes(doubleQuant ? 'nf4-double' : 'nf4', shape));
    }
  });

  it('errs by at most half the widest gap of its levels, and double quantization adds little', () => {
    const values = randomNormal(64 * 4096, 3, 0.02);
    using x = fromTypedArray(values, [4096, 64]);
    using single = Nf4Weight.quantize(x, { doubleQuant: false });
    const got = dequantized(single);
    const bound = (1 - 0.6961928009986877) / 2;
    for (let b = 0; b < 4096; b++) {
      const block = values.subarray(b * 64, b * 64 + 64);
      const absmax = block.reduce((a, v) => Math.max(a, Math.abs(v)), 0);
      const worst = block.reduce((a, v, i) => Math.max(a, Math.abs(v - (got[b * 64 + i] as number))), 0);
      expect(worst).toBeLessThanOrEqual(absmax * bound * (1 + 1e-6));
    }
    const rms = (a: Float32Array): number =>
      Math.sqrt(a.reduce((sum, v, i) => sum + (v - (values[i] as number)) ** 2, 0) / a.length) / 0.02;
    using both = Nf4Weight.quantize(x);
    expect(rms(got)).toBeLessThan(0.1);
    expect(rms(dequantized(both))).toBeLessThan(rms(got) * 1.02);
    expect((both.nbytes * 8) / values.length).toBeCloseTo(4.127, 3);
  });

  it('puts the first element into the high nibble and fills the odd half with the code of zero', () => {
    using x = fromTypedArray(Float32Array.of(1, -1, 0), [3]);
    using w = Nf4Weight.quantize(x);
    expect([...w.parts.codes.data<Uint8Array>()]).toEqual([0xf0, 0x77]);
  });

  it('keeps zero blocks and the smallest and largest floats', () => {
    const values = new Float32Array(256);
    values.fill(2 ** -149, 64, 128);
    values.fill(3.4e38, 128, 192);
    values[200] = -(2 ** -130);
    using x = fromTypedArray(values, [256]);
    using w = Nf4Weight.quantize(x, { doubleQuant: false });
    expect([...dequantized(w)]).toEqual([...values]);
    using zero = fromTypedArray(new Float32Array(128), [2, 64]);
    using wz = Nf4Weight.quantize(zero);
    expect(dequantized(wz).every((v) => v === 0)).toBe(true);
  });

  it('reads bf16 and f16, and writes bf16', () => {
    using x = fromTypedArray(randomNormal(640, 5), [10, 64]);
    for (const dtype of ['bf16', 'f16'] as const) {
      using half = empty([10, 64], { dtype });
      copy(half, x);
      using back = empty([10, 64]);
      copy(back, half);
      using a = Nf4Weight.quantize(half);
      using b = Nf4Weight.quantize(back);
      expect(a.parts.codes.data()).toEqual(b.parts.codes.data());
      expect(dequantized(a)).toEqual(dequantized(b));
      using out = empty([10, 64], { dtype: 'bf16' });
      a.dequantize(out);
      using wide = empty([10, 64]);
      copy(wide, out);
      using rounded = empty([10, 64], { dtype: 'bf16' });
      using full = fromTypedArray(dequantized(a), [10, 64]);
      copy(rounded, full);
      expect(out.data()).toEqual(rounded.data());
    }
  });

  it('gives back parts and takes them again', () => {
    using x = fromTypedArray(randomNormal(1000, 6), [10, 100]);
    for (const doubleQuant of [false, true]) {
      using w = Nf4Weight.quantize(x, { doubleQuant });
      const clone = (t: (typeof w.parts)['absmax']) => {
        if (!t) return null;
        const c = empty(t.shape, { dtype: t.dtype });
        copy(c, t);
        return c;
      };
      const parts = Object.fromEntries(Object.entries(w.parts).map(([k, t]) => [k, clone(t)])) as unknown as typeof w.parts;
      using again = Nf4Weight.fromParts([10, 100], parts);
      expect(dequantized(again)).toEqual(dequantized(w));
      expect(() => Nf4Weight.fromParts([10, 200], parts)).toThrow(expect.objectContaining({ code: 'ERR_LC_SHAPE' }));
    }
  });

  it('holds the 8-bit dynamic map', () => {
    for (const signed of [true, false]) {
      using out = empty([256]);
      native().dynamicMap({ out, signed });
      const want = reference.dynamicMap(signed);
      expect(want.length).toBe(256);
      expect(new Set(want).size).toBe(256);
      expect([...out.data()]).toEqual(want.map(Math.fround));
      expect(want[255]).toBe(1);
      expect(want[0]).toBe(signed ? -0.99296875 : 0);
    }
  });

  it('refuses NaN, infinity, odd block sizes and wrong outputs, and leaves nothing behind', () => {
    const before = memory().devices.cpu?.liveBytes;
    for (const bad of [Number.NaN, Number.POSITIVE_INFINITY]) {
      const values = randomNormal(100, 1);
      values[77] = bad;
      using x = fromTypedArray(values, [100]);
      expect(() => Nf4Weight.quantize(x)).toThrow(expect.objectContaining({ code: 'ERR_LC_NAN' }));
    }
    using x = fromTypedArray(new Float32Array(64), [64]);
    for (const blockSize of [0, 16, 48, 8192, Number.NaN])
      expect(() => Nf4Weight.quantize(x, { blockSize })).toThrow(expect.objectContaining({ code: 'ERR_LC_ARGUMENT' }));
    using ints = empty([4], { dtype: 'i32' });
    expect(() => Nf4Weight.quantize(ints)).toThrow(expect.objectContaining({ code: 'ERR_LC_DTYPE' }));
    using w = Nf4Weight.quantize(x);
    using out = empty([65]);
    expect(() => w.dequantize(out)).toThrow(expect.objectContaining({ code: 'ERR_LC_SHAPE' }));
    expect(before).toBeDefined();
  });
});
