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

  it('adds a bias to every row', () => {
    using a = tensor([5, 7], 1);
    using b = tensor([9, 7], 2);
    using bias = tensor([9], 3);
    using out = zeros([5, 20]);
    const c = out.slice(1, 4, 9);
    gemm({ a, b, c, transB: true, bias });
    const want = reference.gemm({ a: a.data(), b: b.data(), m: 5, n: 9, k: 7, transB: true });
    for (let i = 0; i < 5; i++)
      for (let j = 0; j < 20; j++) {
        const inside = j >= 4 && j < 13;
        expect(out.data()[i * 20 + j]).toBeCloseTo(inside ? (want[i * 9 + j - 4] as number) + (bias.data()[j - 4] as number) : 0, 5);
      }
    using short = tensor([8], 3);
    using half = empty([9], { dtype: 'bf16' });
    expect(() => gemm({ a, b, c, transB: true, bias: short })).toThrow(expect.objectContaining({ code: 'ERR_LC_SHAPE' }));
    expect(() => gemm({ a, b, c, transB: true, bias: half })).toThrow(expect.objectContaining({ code: 'ERR_LC_DTYPE' }));
    using square = tensor([5, 5], 4);
    expect(() => gemm({ a, b: a, c: square, transB: true, bias: square.rows(0, 1).view([5]) })).toThrow(
      expect.objectContaining({ code: 'ERR_LC_ARGUMENT' }),
    );
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

describe('gemm and aliases', () => {
  it('refuses c that overlaps an operand, and takes disjoint columns of one matrix', () => {
    using t = tensor([8, 24], 1);
    const [a, b, c] = [t.slice(1, 0, 8), t.slice(1, 8, 8), t.slice(1, 16, 8)];
    const want = reference.gemm({
      a: Float32Array.from({ length: 64 }, (_, i) => t.data()[Math.floor(i / 8) * 24 + (i % 8)] as number),
      b: Float32Array.from({ length: 64 }, (_, i) => t.data()[Math.floor(i / 8) * 24 + 8 + (i % 8)] as number),
      m: 8,
      n: 8,
      k: 8,
    });
    gemm({ a, b, c });
    const got = Float64Array.from({ length: 64 }, (_, i) => t.data()[Math.floor(i / 8) * 24 + 16 + (i % 8)] as number);
    expect(relativeError(got, want)).toBeLessThanOrEqual(tolerance(8));
    for (const bad of [a, b, t.slice(1, 4, 8), t.slice(1, 15, 8), t.view([24, 8]).rows(16, 8)]) {
      expect(() => gemm({ a, b, c: bad })).toThrow(
        expect.objectContaining({ code: 'ERR_LC_ARGUMENT', message: expect.stringMatching(/overlaps/) }),
      );
    }
  });

  it('alpha 0 and k 0 scale c and read neither a nor b', () => {
    using a = fromTypedArray(new Float32Array(6).fill(Number.NaN), [2, 3]);
    using b = fromTypedArray(new Float32Array(6).fill(Number.NaN), [3, 2]);
    using c = fromTypedArray(Float32Array.of(1, 2, 3, 4), [2, 2]);
    gemm({ a, b, c, alpha: 0, beta: 0.5 });
    expect(Array.from(c.data())).toEqual([0.5, 1, 1.5, 2]);
    gemm({ a: a.slice(1, 0, 0), b: b.rows(0, 0), c, beta: 2 });
    expect(Array.from(c.data())).toEqual([1, 2, 3, 4]);
    c.data().fill(Number.NaN);
    gemm({ a: a.slice(1, 0, 0), b: b.rows(0, 0), c });
    expect(Array.from(c.data())).toEqual([0, 0, 0, 0]);
  });

  it('names what is missing or disposed', () => {
    using a = tensor([2, 2], 1);
    const gone = tensor([2, 2], 2);
    gone.dispose();
    expect(() => gemm({ a, b: gone, c: a })).toThrow(
      expect.objectContaining({ code: 'ERR_LC_DISPOSED', message: expect.stringMatching(/gemm: b/) }),
    );
    expect(() => gemm({ a, b: a, c: undefined as unknown as Tensor })).toThrow(expect.objectContaining({ code: 'ERR_LC_NOT_A_TENSOR' }));
    expect(() => gemm({ a, b: a.view([1, 2, 2]), c: a })).toThrow(expect.objectContaining({ code: 'ERR_LC_SHAPE' }));
  });
});

describe('grouped gemm', () => {
  it.each([false, true])('of views, with alpha and beta, transB %s', (transB) => {
    const [experts, k, n] = [3, 17, 33];
    const offsets = Int32Array.from([0, 200, 200, 231]);
    using at = fromTypedArray(offsets, [4]);
    using wide = tensor([240, k + 5], 1); // rows beyond the last expert's stay as they are
    using fused = tensor(transB ? [experts, 2 * n, k] : [experts, k, 2 * n], 2);
    using c = tensor([240, n], 3);
    const b = fused.slice(transB ? 1 : 2, n, n);
    const o = {
      a: Float32Array.from({ length: 240 * k }, (_, i) => wide.data()[Math.floor(i / k) * (k + 5) + 2 + (i % k)] as number),
      b: Float32Array.from({ length: experts * k * n }, (_, i) => {
        const [e, rest] = [Math.floor(i / (k * n)), i % (k * n)];
        const [row, column] = transB ? [n + Math.floor(rest / k), rest % k] : [Math.floor(rest / n), n + (rest % n)];
        return fused.data()[e * 2 * k * n + row * (transB ? k : 2 * n) + column] as number;
      }),
      c: c.data().slice(),
      offsets,
      rows: 240,
      n,
      k,
      transB,
      alpha: 0.5,
      beta: -1,
    };
    groupedGemm({ a: wide.slice(1, 2, k), b, c, offsets: at, transB, alpha: 0.5, beta: -1 });
    const want = reference.groupedGemm(o);
    expect(relativeError(c.rows(0, 231).data(), want.subarray(0, 231 * n))).toBeLessThanOrEqual(tolerance(k));
    expect(Array.from(c.rows(231, 9).data())).toEqual(Array.from(o.c.subarray(231 * n)));
  });

  it('gives an expert without rows a gradient of zero, whatever c held', () => {
    using a = tensor([5, 3], 1);
    using b = tensor([5, 4], 2);
    using c = fromTypedArray(new Float32Array(2 * 12).fill(Number.NaN), [2, 3, 4]);
    const offsets = Int32Array.from([0, 0, 5]);
    using at = fromTypedArray(offsets, [3]);
    groupedGemmWeightGrad({ a, b, c, offsets: at, alpha: 2 });
    const want = reference.groupedGemmWeightGrad({ a: a.data(), b: b.data(), offsets, m: 3, n: 4, alpha: 2 });
    expect(relativeError(c.data(), want)).toBeLessThanOrEqual(tolerance(5));
    expect(Array.from(c.rows(0, 1).data())).toEqual(Array(12).fill(0));
  });

  it('says what does not fit', () => {
    using a = tensor([4, 2], 1);
    using b = tensor([2, 2, 3], 2);
    using c = tensor([4, 3], 3);
    using offsets = fromTypedArray(Int32Array.from([0, 4]), [2]);
    expect(() => groupedGemm({ a, b, c, offsets })).toThrow(/offsets: expected i32\[3\] \(experts \+ 1\), got i32\[2\]/);
    expect(() => groupedGemm({ a, b, c, offsets, transB: true })).toThrow(
      /groupedGemm: b: expected \[2,3,2\] beside a f32\[4,2\] and c f32\[4,3\], got f32\[2,2,3\]/,
    );
    expect(() => groupedGemm({ a, b: b.view([4, 3]), c, offsets })).toThrow(/b: expected one matrix per expert/);
  });
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
