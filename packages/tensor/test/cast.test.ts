import { describe, expect, it } from 'vitest';
import { copy, empty, fill, fromTypedArray, reference } from '../src/index.js';
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
      Math.PI,
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

  it.each(['bf16', 'f16'] as const)('every %s value survives f32, and random f32 round like the reference', (dtype) => {
    const bits = Uint16Array.from({ length: 65536 }, (_, i) => i);
    using low = fromTypedArray(bits, [65536], { dtype });
    using wide = empty([65536]);
    using back = empty([65536], { dtype });
    copy(wide, low);
    copy(back, wide);
    const [infinity, values] = [dtype === 'f16' ? 0x7c00 : 0x7f80, wide.data()];
    back.data<Uint16Array>().forEach((b, i) => {
      if ((i & 0x7fff) > infinity) expect(Number.isNaN(values[i]) && (b & 0x7fff) > infinity).toBe(true);
      else if (b !== i) expect(b).toBe(i);
    });
    // Magnitudes over the whole range, and the ties between neighbours.
    const random = randomNormal(20000, 5);
    const list = Float32Array.from(random, (v, i) => v * 2 ** ((i % 300) - 160));
    for (let i = 0; i < 10000; i++) list[i] = ((values[(i * 37) % infinity] as number) + (values[((i * 37) % infinity) + 1] as number)) / 2;
    using x = fromTypedArray(list, [20000]);
    using y = empty([20000], { dtype });
    using z = empty([20000]);
    copy(y, x);
    copy(z, y);
    list.forEach((v, i) => {
      const want = reference.round(v, dtype);
      if (!Object.is(z.data()[i], want)) expect([v, z.data()[i]]).toEqual([v, want]);
    });
  });

  it('casts every dtype to every dtype', () => {
    const dtypes = ['f32', 'bf16', 'f16', 'i32', 'i64', 'u8'] as const;
    const values = Float32Array.of(0, 1, 2, 100, 127);
    using x = fromTypedArray(values, [5]);
    for (const from of dtypes) {
      for (const to of dtypes) {
        using a = empty([5], { dtype: from });
        using b = empty([5], { dtype: to });
        using back = empty([5]);
        copy(a, x);
        copy(b, a);
        copy(back, b);
        expect(Array.from(back.data()), `${from} to ${to}`).toEqual(Array.from(values));
      }
    }
  });

  it('copies a transposed view of six dimensions', () => {
    const shape = [2, 3, 1, 4, 2, 5];
    using x = fromTypedArray(
      Float32Array.from({ length: 240 }, (_, i) => i),
      shape,
    );
    const wide = [2, 3, 2, 4, 2, 6];
    using y = empty(wide, { dtype: 'bf16' });
    fill(y, -1);
    copy(y.slice(2, 1, 1).slice(5, 1, 5), x);
    using z = empty(wide);
    copy(z, y);
    const got = z.data();
    let at = 0;
    let sum = 0;
    for (let i = 0; i < got.length; i++) {
      const inside = i % 6 >= 1 && Math.floor(i / 48) % 2 === 1;
      expect(got[i]).toBe(inside ? at++ : -1);
      sum += inside ? 1 : 0;
    }
    expect(sum).toBe(240);
  });

  it('refuses a copy onto itself, shifted', () => {
    using x = fromTypedArray(Float32Array.of(1, 2, 3, 4), [4]);
    copy(x, x);
    expect(() => copy(x.rows(1, 3), x.rows(0, 3))).toThrow(expect.objectContaining({ code: 'ERR_LC_ARGUMENT' }));
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
