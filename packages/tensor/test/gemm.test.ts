import { describe, expect, it } from 'vitest';
import { empty, fromTypedArray, gemm, groupedGemm, groupedGemmWeightGrad, reference, type Tensor, zeros } from '../src/index.js';
import { expectNoLeaks, randomNormal, relativeError, seededRandom } from '../src/testing.js';

expectNoLeaks();
const tensor = (shape: number[], seed: number): Tensor =>
  fromTypedArray(
    randomNormal(
      shape.reduce((a, b) => a * b, 1),
      seed,
    ),
    shape,
  );
/** Rounding of an f32 sum is proportional to the sum of magnitudes, not to the result, which may cancel: max |got - want| / sum |terms|. */
function backwardError(got: ArrayLike<number>, want: ArrayLike<number>, o: Parameters<typeof reference.gemm>[0]): number {
  const magnitude = (values: ArrayLike<number>): Float64Array => Float64Array.from(values, Math.abs);
  const scale = reference.gemm({
    ...o,
    a: magnitude(o.a),
    b: magnitude(o.b),
    c: o.c && magnitude(o.c),
    alpha: Math.abs(o.alpha ?? 1),
    beta: Math.abs(o.beta ?? 0),
  });
  return Array.from(want).reduce((worst, w, i) => {
    const difference = Math.abs((got[i] as number) - w);
    return Number.isNaN(difference) ? Number.NaN : Math.max(worst, difference === 0 ? 0 : difference / (scale[i] as number));
  }, 0);
}
// Expected growth is sqrt(k) ulp; 4 times that.
const tolerance = (k: number): number => 4 * Math.sqrt(k + 1) * 2 ** -24;

describe('gemm', () => {
  const sizes = [0, 1, 7, 14, 33, 131];
  it('matches f64 for every transposition, edge size, alpha and beta', () => {
    const random = seededRandom(1);
    const pick = (): number => sizes[Math.floor(random() * sizes.length)] as number;
    for (let trial = 0; trial < 150; trial++) {
      const [m, n, k] = [pick(), pick(), trial % 5 === 0 ? 300 : pick()];
      const transA = trial % 2 === 1;
      const transB = trial % 4 >= 2;
      const alpha = trial % 3 === 0 ? 1 : -0.7;
      const beta = trial % 3 === 1 ? 0.5 : 0;
      const a = tensor(transA ? [k, m] : [m, k], trial);
      const b = tensor(transB ? [n, k] : [k, n], trial + 1000);
      const c = tensor([m, n], trial + 2000);
      if (beta === 0) c.data().fill(Number.NaN); // must not be read
      const o = { a: a.data(), b: b.data(), c: c.data().slice(), m, n, k, transA, transB, alpha, beta };
      const want = reference.gemm(o);
      gemm({ a, b, c, transA, transB, alpha, beta });
      expect(backwardError(c.data(), want, o), `${m}x${n}x${k} ${transA} ${transB}`).toBeLessThanOrEqual(tolerance(k));
      for (const t of [a, b, c]) t.dispose();
    }
  });

  it('takes strided views and leaves the gaps alone', () => {
    using big = tensor([20, 50], 1);
    using b = tensor([9, 12], 2);
    using out = zeros([20, 30]);
    gemm({ a: big.slice(1, 5, 9).rows(2, 11), b, c: out.slice(1, 10, 12).rows(3, 11) });
    const a = Float32Array.from({ length: 99 }, (_, i) => big.data()[(2 + Math.floor(i / 9)) * 50 + 5 + (i % 9)] as number);
    const want = reference.gemm({ a, b: b.data(), m: 11, n: 12, k: 9 });
    const got = out.data();
    for (let i = 0; i < 20; i++) {
      for (let j = 0; j < 30; j++) {
        const inside = i >= 3 && i < 14 && j >= 10 && j < 22;
        if (inside) expect(got[i * 30 + j]).toBeCloseTo(want[(i - 3) * 12 + j - 10] as number, 5);
        else expect(got[i * 30 + j]).toBe(0);
      }
    }
  });

  it('gives an element the same bits alone and in a large product', () => {
    using a = tensor([500, 700], 1);
    using b = tensor([300, 700], 2);
    using whole = empty([500, 300]);
    using part = empty([3, 5]);
    gemm({ a, b, c: whole, transB: true });
    gemm({ a: a.rows(200, 3), b: b.rows(100, 5), c: part, transB: true });
    for (let i = 0; i < 3; i++) for (let j = 0; j < 5; j++) expect(part.data()[i * 5 + j]).toBe(whole.data()[(200 + i) * 300 + 100 + j]);
  });

  it('says what does not fit', () => {
    using a = tensor([2, 3], 1);
    using b = tensor([4, 5], 2);
    using c = tensor([2, 5], 3);
    using half = empty([3, 5], { dtype: 'bf16' });
    expect(() => gemm({ a, b, c })).toThrow(
      expect.objectContaining({ code: 'ERR_LC_SHAPE', message: expect.stringMatching(/f32\[2,3\].*f32\[4,5\]/) }),
    );
    expect(() => gemm({ a, b: half, c })).toThrow(expect.objectContaining({ code: 'ERR_LC_DTYPE' }));
    expect(() => gemm({ a, b, c, alpha: Number.NaN })).toThrow(expect.objectContaining({ code: 'ERR_LC_ARGUMENT' }));
  });
});

describe('grouped gemm', () => {
  it.each([
    [[0, 7, 7, 20], 4],
    [[0, 0, 0, 131], 3],
    [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], 5],
  ])('offsets %j', (offsets, seed) => {
    const experts = offsets.length - 1;
    const rows = offsets[experts] as number;
    const [k, n] = [19, 23];
    using a = tensor([rows, k], seed);
    using b = tensor([experts, k, n], seed + 1);
    using c = tensor([rows, n], seed + 2);
    using dw = tensor([experts, k, n], seed + 3);
    using at = fromTypedArray(Int32Array.from(offsets), [experts + 1]);
    const before = dw.data().slice();
    groupedGemm({ a, b, c, offsets: at });
    groupedGemmWeightGrad({ a, b: c, c: dw, offsets: at, beta: 1 });
    for (let e = 0; e < experts; e++) {
      const [first, last] = [offsets[e] as number, offsets[e + 1] as number];
      const ae = a.data().slice(first * k, last * k);
      const want = reference.gemm({ a: ae, b: b.data().slice(e * k * n, (e + 1) * k * n), m: last - first, n, k });
      const got = c.data().slice(first * n, last * n);
      expect(relativeError(got, want)).toBeLessThanOrEqual(tolerance(k));
      const wantDw = reference.gemm({
        a: ae,
        b: got,
        c: before.slice(e * k * n, (e + 1) * k * n),
        m: k,
        n,
        k: last - first,
        transA: true,
        beta: 1,
      });
      expect(relativeError(dw.data().slice(e * k * n, (e + 1) * k * n), wantDw)).toBeLessThanOrEqual(tolerance(last - first));
    }
  });

  it('refuses offsets that leave the rows', () => {
    using a = tensor([4, 2], 1);
    using b = tensor([2, 2, 3], 2);
    using c = tensor([4, 3], 3);
    for (const bad of [
      [0, 5, 4],
      [0, 3, 5],
      [-1, 2, 4],
    ]) {
      using offsets = fromTypedArray(Int32Array.from(bad), [3]);
      expect(() => groupedGemm({ a, b, c, offsets })).toThrow(expect.objectContaining({ code: 'ERR_LC_ARGUMENT' }));
    }
  });
});
