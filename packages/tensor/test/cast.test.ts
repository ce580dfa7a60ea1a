import { describe, expect, it } from 'vitest';
import { copy, empty, fill, fromTypedArray } from '../src/index.js';
import { expectNoLeaks, randomNormal } from '../src/testing.js';

expectNoLeaks();

/** Nearest even, by search over the format's values: shares nothing with the native bit tricks. */
function nearest(value: number, decode: (bits: number) => number, largestFinite: number): number[] {
  let best = Number.POSITIVE_INFINITY;
  let found: number[] = [];
  for (let bits = 0; bits <= largestFinite; bits++) {
    const distance = Math.abs(decode(bits) - Math.abs(value));
    if (distance < best) {
      best = distance;
      found = [bits];
    } else if (distance === best) found.push(bits);
  }
  const even = found.length > 1 ? found.filter((bits) => bits % 2 === 0) : found;
  return even.map((bits) => bits | (value < 0 || Object.is(value, -0) ? 0x8000 : 0));
}
const f16 = (bits: number): number => {
  const exponent = (bits >> 10) & 31;
  const mantissa = bits & 1023;
  return exponent === 0 ? mantissa * 2 ** -24 : (1 + mantissa / 1024) * 2 ** (exponent - 15);
};

describe('casts', () => {
  it('f32 to f16 rounds to nearest even and comes back', () => {
    const values = Float32Array.from([
      0,
      -0,
      1,
      -1.0009765625,
      1.00048828125,
      1.00146484375,
      65504,
      6e-8,
      2.98e-8,
      2.99e-8,
      6.1e-5,
      3.14159,
      1e-4,
      -0.333,
      ...randomNormal(20, 1),
    ]);
    using x = fromTypedArray(values, [values.length]);
    using half = empty([values.length], { dtype: 'f16' });
    copy(half, x);
    values.forEach((v, i) => expect(nearest(v, f16, 0x7bff), `${v}`).toContain(half.data<Uint16Array>()[i]));
    using back = empty([values.length]);
    copy(back, half);
    half.data<Uint16Array>().forEach((bits, i) => expect(Math.abs(back.data()[i] as number)).toBe(f16(bits & 0x7fff)));
  });

  it('f32 to bf16: ties to even, overflow to infinity, NaN stays NaN', () => {
    const values = Float32Array.from([1, 1.00390625, 1.01171875, -2.5, 3.4e38, Number.POSITIVE_INFINITY, Number.NaN, 1e-40]);
    using x = fromTypedArray(values, [8]);
    using half = empty([8], { dtype: 'bf16' });
    copy(half, x);
    const bits = half.data<Uint16Array>();
    expect(Array.from(bits.slice(0, 6))).toEqual([0x3f80, 0x3f80, 0x3f82, 0xc020, 0x7f80, 0x7f80]);
    expect((bits[6] as number) & 0x7fff).toBeGreaterThan(0x7f80);
    using back = empty([8]);
    copy(back, half);
    expect(Array.from(back.data().slice(0, 4))).toEqual([1, 1, 1.015625, -2.5]);
  });

  it('f16 overflow is infinity; integers truncate and saturate', () => {
    using x = fromTypedArray(Float32Array.from([65520, -1e9, 2.9, -2.9, 3e9, Number.NaN, 300, -4]), [8]);
    using half = empty([8], { dtype: 'f16' });
    copy(half, x);
    expect(half.data<Uint16Array>()[0]).toBe(0x7c00);
    using i32 = empty([8], { dtype: 'i32' });
    using u8 = empty([8], { dtype: 'u8' });
    using i64 = empty([8], { dtype: 'i64' });
    copy(i32, x);
    copy(u8, x);
    copy(i64, x);
    expect(Array.from(i32.data<Int32Array>())).toEqual([65520, -1e9, 2, -2, 2147483647, 0, 300, -4]);
    expect(Array.from(u8.data<Uint8Array>())).toEqual([255, 0, 2, 0, 255, 0, 255, 0]);
    expect(i64.data<BigInt64Array>()[4]).toBe(3000000000n);
  });

  it('copies between strided views of three dimensions', () => {
    using x = fromTypedArray(
      Int32Array.from({ length: 60 }, (_, i) => i),
      [3, 4, 5],
    );
    using y = empty([2, 4, 7], { dtype: 'i32' });
    fill(y, -1);
    copy(y.slice(2, 3, 2), x.rows(1, 2).slice(2, 1, 2));
    const got = y.data<Int32Array>();
    for (let i = 0; i < 2; i++)
      for (let j = 0; j < 4; j++)
        for (let k = 0; k < 7; k++) expect(got[(i * 4 + j) * 7 + k]).toBe(k === 3 || k === 4 ? (i + 1) * 20 + j * 5 + 1 + k - 3 : -1);
    expect(() => copy(y, x)).toThrow(expect.objectContaining({ code: 'ERR_LC_SHAPE' }));
  });

  it('fills every dtype', () => {
    for (const [dtype, value] of [
      ['f32', 1.5],
      ['bf16', 0x3fc0],
      ['f16', 0x3e00],
      ['i32', 1],
      ['u8', 1],
    ] as const) {
      using t = empty([5], { dtype });
      fill(t, 1.5);
      expect(Array.from(t.data<Uint8Array>())).toEqual(Array(5).fill(value));
    }
  });
});
