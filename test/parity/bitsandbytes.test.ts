/**
 * NF4, double quantization and 8-bit AdamW against an independent implementation, in Python, of what bitsandbytes publishes
 * (test/fixtures/bitsandbytes/make.py); not against bitsandbytes itself.
 */
import { readFileSync } from 'node:fs';
import { AdamW, Nf4Weight } from '@lc/qlora';
import { empty, fromTypedArray, type Parameter, Scope } from '@lc/tensor';
import { expectNoLeaks, relativeError } from '@lc/tensor/testing';
import { expect, it } from 'vitest';
import { native } from '../../packages/qlora/src/native.js';

expectNoLeaks();

interface Expected {
  nf4Levels: number[];
  signedMap: number[];
  unsignedMap: number[];
  nf4: { n: number; codes: string; absmaxCodes: string; absmaxScales: number[]; offset: number };
  adamw8: { n: number; steps: number; value: number[]; m: string; v: string };
}
const expected = JSON.parse(readFileSync(new URL('../fixtures/bitsandbytes/expected.json', import.meta.url), 'utf8')) as Expected;

/** make.py's numbers: the fraction of i * 2654435769 / 2^32, of which 24 bits, less a half. */
const inputs = (n: number, seed: number): Float32Array =>
  Float32Array.from({ length: n }, (_, i) => (Math.imul(i + seed, 2654435769 | 0) >>> 8) / 2 ** 24 - 0.5);

const bytes = (hex: string): number[] => Array.from({ length: hex.length / 2 }, (_, i) => Number.parseInt(hex.slice(2 * i, 2 * i + 2), 16));

it('has the levels of NF4 and the two dynamic maps', () => {
  using codes = fromTypedArray(
    Uint8Array.from({ length: 8 }, (_, i) => ((2 * i) << 4) | (2 * i + 1)),
    [8],
  );
  using absmax = fromTypedArray(Float32Array.of(1), [1]);
  using levels = empty([16]);
  native().nf4Dequantize({ codes, out: levels, block: 64, absmax });
  expect(relativeError(levels.data(), expected.nf4Levels)).toBeLessThan(4e-7); // f32 quantiles: the published constants' last digits hang on the library
  for (const [signed, map] of [
    [true, expected.signedMap],
    [false, expected.unsignedMap],
  ] as const) {
    using out = empty([256]);
    native().dynamicMap({ out, signed });
    expect([...out.data()].map((v, i) => Math.abs(v - (map[i] as number)) <= Math.abs(v) * 2 ** -22)).not.toContain(false);
  }
});

it('quantizes to the same codes, scales included', () => {
  const { n, codes, absmaxCodes, absmaxScales, offset } = expected.nf4;
  // (f32 products in NumPy's order: x ** 3 is rounded twice.)
  using x = fromTypedArray(
    inputs(n, 7).map((v) => Math.fround(v * v) * v),
    [n],
  );
  using weight = Nf4Weight.quantize(x);
  const { parts } = weight;
  const hex = [...parts.codes.data<Uint8Array>()].map((byte) => byte.toString(16).padStart(2, '0')).join('');
  expect(hex.slice(0, n)).toBe(codes);
  expect([...(parts.absmaxCodes?.data<Uint8Array>() ?? [])]).toEqual(bytes(absmaxCodes));
  expect(relativeError(parts.absmaxScales?.data() ?? [], absmaxScales)).toBeLessThan(1e-6);
  expect(parts.absmaxOffset?.data()[0]).toBeCloseTo(offset, 6);
});

it('takes the same 8-bit AdamW steps', () => {
  using scope = new Scope();
  const { n, steps, value, m, v } = expected.adamw8;
  const p: Parameter = { name: 'p', value: scope.own(fromTypedArray(inputs(n, 1), [n])), grad: scope.own(empty([n])) };
  using optimizer = new AdamW([p], { optimBits: 8, lr: 1e-2, weightDecay: 0.01 });
  for (let step = 1; step <= steps; step++) {
    p.grad.data().set(inputs(n, 100 * step));
    optimizer.step();
  }
  const { tensors } = optimizer.state();
  for (const [name, want] of [
    ['exp_avg', bytes(m)],
    ['exp_avg_sq', bytes(v)],
  ] as const) {
    const got = tensors[`p.${name}`]?.data<Uint8Array>() as Uint8Array;
    // f32 here, f64 there: a state within rounding of the middle of two levels may take either, and then differ in the next step as well.
    const apart = want.map((code, i) => Math.abs(code - (got[i] as number)));
    expect(Math.max(...apart), name).toBeLessThanOrEqual(1);
    expect(apart.filter((d) => d > 0).length, name).toBeLessThanOrEqual(n / 1000);
  }
  expect(
    relativeError(
      p.value.data().filter((_, i) => i % 50 === 0),
      value,
    ),
  ).toBeLessThan(1e-5);
});
