import { describe, expect, it } from 'vitest';
import {
  add,
  addBias,
  axpy,
  copy,
  embeddingGather,
  embeddingScatterAdd,
  empty,
  fromTypedArray,
  reference,
  rmsNorm,
  rmsNormBackward,
  scale,
  sumRows,
  type Tensor,
  zeros,
} from '../src/index.js';
import { expectNoLeaks, randomNormal, relativeError } from '../src/testing.js';

expectNoLeaks();
const tensor = (shape: number[], seed: number): Tensor =>
  fromTypedArray(
    randomNormal(
      shape.reduce((a, b) => a * b, 1),
      seed,
    ),
    shape,
  );

describe('the RMSNorm reference', () => {
  it('has the gradient that finite differences show', () => {
    const [rows, width, eps] = [3, 5, 1e-5];
    const x = Float64Array.from(randomNormal(rows * width, 1));
    const weight = Float64Array.from(randomNormal(width, 2));
    const dout = randomNormal(rows * width, 3);
    const loss = (): number => reference.rmsNorm({ x, weight, rows, width, eps }).reduce((sum, v, i) => sum + v * (dout[i] as number), 0);
    const { dx, dWeight } = reference.rmsNormBackward({ x, weight, dout, rows, width, eps });
    for (const [values, gradient] of [
      [x, dx],
      [weight, dWeight],
    ] as const) {
      for (let i = 0; i < values.length; i++) {
        const keep = values[i] as number;
        values[i] = keep + 1e-5;
        const up = loss();
        values[i] = keep - 1e-5;
        const down = loss();
        values[i] = keep;
        expect((up - down) / 2e-5).toBeCloseTo(gradient[i] as number, 7);
      }
    }
  });
});

describe('rmsNorm', () => {
  it.each([
    [1, 2],
    [1, 7],
    [7, 64],
    [131, 33],
    [300, 192],
  ])('%i rows of %i', (rows, width) => {
    using x = tensor([rows, width], 1);
    using weight = tensor([width], 2);
    using dout = tensor([rows, width], 3);
    using out = empty([rows, width]);
    using dx = tensor([rows, width], 4);
    using dWeight = zeros([width]);
    const o = { x: x.data(), weight: weight.data(), dout: dout.data(), rows, width, eps: 1e-5 };
    const wantOut = reference.rmsNorm(o);
    const want = reference.rmsNormBackward(o);
    rmsNorm({ x, weight, out, eps: 1e-5 });
    expect(relativeError(out.data(), wantOut)).toBeLessThan(1e-6);
    const before = dx.data().slice();
    rmsNormBackward({ x, weight, dout, dx, eps: 1e-5, accumulate: true, dWeight });
    expect(
      relativeError(
        dx.data(),
        want.dx.map((v, i) => v + (before[i] as number)),
      ),
    ).toBeLessThan(2e-6);
    expect(relativeError(dWeight.data(), want.dWeight)).toBeLessThan(5e-6);
    rmsNormBackward({ x, weight, dout, dx: dout, eps: 1e-5 }); // dx may be dout
    expect(relativeError(dout.data(), want.dx)).toBeLessThan(2e-6);
  });

  it('normalises heads of a strided row', () => {
    using buffer = tensor([5, 40], 1);
    using weight = tensor([8], 2);
    const heads = buffer.slice(1, 8, 24).view([5, 3, 8]);
    const original = buffer.data().slice();
    rmsNorm({ x: heads, weight, out: heads, eps: 1e-6 });
    for (let r = 0; r < 5; r++) {
      const x = original.slice(r * 40 + 8, r * 40 + 32);
      const want = reference.rmsNorm({ x, weight: weight.data(), rows: 3, width: 8, eps: 1e-6 });
      expect(relativeError(buffer.data().slice(r * 40 + 8, r * 40 + 32), want)).toBeLessThan(1e-6);
      expect(buffer.data()[r * 40 + 7]).toBe(original[r * 40 + 7]);
      expect(buffer.data()[r * 40 + 32]).toBe(original[r * 40 + 32]);
    }
  });

  it('refuses shapes that do not match', () => {
    using x = tensor([2, 4], 1);
    using weight = tensor([5], 2);
    expect(() => rmsNorm({ x, weight, out: x, eps: 1e-5 })).toThrow(expect.objectContaining({ code: 'ERR_LC_SHAPE' }));
    expect(() => rmsNorm({ x, weight, out: x, eps: Number.NaN })).toThrow(expect.objectContaining({ code: 'ERR_LC_ARGUMENT' }));
  });
});

describe('rmsNorm of width 1', () => {
  it('has a gradient near zero: rounding is measured against what cancels', () => {
    using x = fromTypedArray(Float32Array.of(-0.7), [1, 1]);
    using weight = fromTypedArray(Float32Array.of(1.3), [1]);
    using dout = fromTypedArray(Float32Array.of(2), [1, 1]);
    using dx = empty([1, 1]);
    rmsNormBackward({ x, weight, dout, dx, eps: 1e-5 });
    const { dx: want } = reference.rmsNormBackward({ x: x.data(), weight: weight.data(), dout: dout.data(), rows: 1, width: 1, eps: 1e-5 });
    expect(Math.abs((dx.data()[0] as number) - (want[0] as number))).toBeLessThan(((2 * 1.3) / 0.7) * 2 ** -22);
  });
});

describe('rows', () => {
  it('add, addBias, axpy, scale, sumRows', () => {
    using a = tensor([131, 7], 1);
    using b = tensor([131, 7], 2);
    using bias = tensor([7], 3);
    using out = empty([131, 7]);
    using sums = zeros([7]);
    const [A, B, bs] = [a.data().slice(), b.data().slice(), bias.data()];
    add({ a, b, out });
    addBias({ x: out, bias });
    axpy({ x: a, y: out, alpha: 2 });
    scale({ x: out, factor: 0.5 });
    const want = Float64Array.from(A, (v, i) => 0.5 * (v + (B[i] as number) + (bs[i % 7] as number) + 2 * v));
    expect(relativeError(out.data(), want)).toBeLessThan(1e-6);
    sumRows({ x: out, out: sums });
    sumRows({ x: out, out: sums, accumulate: true });
    const wantSums = new Float64Array(7);
    want.forEach((v, i) => {
      wantSums[i % 7] = (wantSums[i % 7] as number) + 2 * v;
    });
    expect(relativeError(sums.data(), wantSums)).toBeLessThan(2e-6);
  });

  it.each([
    [0, 5],
    [1, 1],
    [7, 131],
    [1000, 8],
    [4097, 33],
  ])('sums %i rows of %i, also strided', (rows, width) => {
    using big = tensor([Math.max(rows, 1), width + 3], 1);
    const x = big.rows(0, rows).slice(1, 1, width);
    using out = tensor([width], 2);
    const before = out.data().slice();
    const values = Float32Array.from(
      { length: rows * width },
      (_, i) => big.data()[Math.floor(i / width) * (width + 3) + 1 + (i % width)] as number,
    );
    const want = reference.sumRows(values, width);
    sumRows({ x, out, accumulate: true });
    // Rounding is measured against the magnitudes that were added, which may cancel.
    const largest = Math.max(1, ...reference.sumRows(values.map(Math.abs), width));
    out.data().forEach((v, i) => expect(Math.abs(v - (want[i] as number) - (before[i] as number)) / largest).toBeLessThan(5e-7));
    sumRows({ x, out });
    out.data().forEach((v, i) => expect(Math.abs(v - (want[i] as number)) / largest).toBeLessThan(5e-7));
  });

  it('works on strided rows, long rows and single vectors, and leaves the gaps alone', () => {
    using big = tensor([9, 50], 1);
    using bias = tensor([20], 2);
    const before = big.data().slice();
    const [x, y] = [big.slice(1, 0, 20), big.slice(1, 25, 20)];
    axpy({ x, y, alpha: -2 });
    scale({ x, factor: 3 });
    addBias({ x, bias });
    add({ a: x, b: y, out: y });
    for (let i = 0; i < big.numel; i++) {
      const [column, value] = [i % 50, before[i] as number];
      let want = value;
      if (column < 20) want = 3 * value + (bias.data()[column] as number);
      else if (column >= 25 && column < 45) {
        const xv = before[i - 25] as number;
        want = value - 2 * xv + 3 * xv + (bias.data()[column - 25] as number);
      }
      expect(Math.abs((big.data()[i] as number) - want)).toBeLessThan(3e-6);
    }
    using long = tensor([100_003], 3);
    const values = long.data().slice();
    axpy({ x: long, y: long, alpha: 1 });
    scale({ x: long, factor: 0.5 });
    expect(long.data()).toEqual(values);
  });

  it('refuses outputs that overlap an input partly, and the wrong dtype', () => {
    using t = tensor([10, 8], 1);
    using half = empty([4, 8], { dtype: 'bf16' });
    using weight = tensor([8], 2);
    const overlapping = expect.objectContaining({ code: 'ERR_LC_ARGUMENT', message: expect.stringMatching(/overlaps/) });
    expect(() => add({ a: t.rows(0, 4), b: t.rows(4, 4), out: t.rows(1, 4) })).toThrow(overlapping);
    expect(() => axpy({ x: t.rows(0, 4), y: t.rows(3, 4) })).toThrow(overlapping);
    expect(() => rmsNorm({ x: t.rows(0, 4), weight, out: t.rows(2, 4), eps: 1e-5 })).toThrow(overlapping);
    expect(() => addBias({ x: t.rows(0, 4), bias: t.rows(3, 1).view([8]) })).toThrow(overlapping);
    expect(() => scale({ x: half, factor: 2 })).toThrow(expect.objectContaining({ code: 'ERR_LC_DTYPE' }));
    expect(() => scale({ x: t, factor: Number.NaN })).toThrow(expect.objectContaining({ code: 'ERR_LC_ARGUMENT' }));
    expect(() => add({ a: t.rows(0, 2), b: t.rows(2, 3), out: t.rows(5, 2) })).toThrow(
      /add: b: expected the shape of out f32\[2,8\], got f32\[3,8\]/,
    );
  });

  it.each(['bf16', 'f16'] as const)('gathers from a %s table', (dtype) => {
    using table = tensor([13, 37], 1);
    using low = empty([13, 37], { dtype });
    copy(low, table);
    const ids = Int32Array.from([12, 0, 5, 5]);
    using at = fromTypedArray(ids, [4]);
    using out = empty([4, 37]);
    embeddingGather({ table: low, ids: at, out });
    const want = reference.embeddingGather(table.data(), ids, 37).map((v) => reference.round(v, dtype));
    expect(Array.from(out.data())).toEqual(Array.from(want));
  });

  it('scatter-adds many tokens like the reference', () => {
    const ids = Int32Array.from({ length: 500 }, (_, i) => (i * i) % 11);
    using at = fromTypedArray(ids, [500]);
    using dout = tensor([500, 70], 1);
    using dTable = tensor([11, 70], 2);
    const want = reference.embeddingScatterAdd(dout.data(), ids, dTable.data().slice(), 70);
    embeddingScatterAdd({ dout, ids: at, dTable });
    expect(relativeError(dTable.data(), want)).toBeLessThan(1e-6);
  });

  it('embedding gather and scatter-add, with repeated ids', () => {
    using table = tensor([11, 6], 1);
    const ids = Int32Array.from([3, 0, 3, 10, 3]);
    using idTensor = fromTypedArray(ids, [5]);
    using out = empty([5, 6]);
    embeddingGather({ table, ids: idTensor, out });
    ids.forEach((id, i) => expect(Array.from(out.rows(i, 1).data())).toEqual(Array.from(table.rows(id, 1).data())));
    using dTable = zeros([11, 6]);
    embeddingScatterAdd({ dout: out, ids: idTensor, dTable });
    expect(
      relativeError(
        dTable.rows(3, 1).data(),
        table
          .rows(3, 1)
          .data()
          .map((v) => 3 * v),
      ),
    ).toBeLessThan(1e-6);
    expect(
      dTable
        .rows(1, 1)
        .data()
        .every((v) => v === 0),
    ).toBe(true);
    ids[1] = 11;
    expect(() => embeddingGather({ table, ids: idTensor, out })).toThrow(/ids\[1\] is 11, the table has 11 rows/);
  });
});
