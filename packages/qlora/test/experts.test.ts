import { copy, type ExpertLinear, empty, fromTypedArray, PlainExpertLinear, Scope, Workspace } from '@lc/tensor';
import { expectNoLeaks, randomNormal, relativeError } from '@lc/tensor/testing';
import { describe, expect, it } from 'vitest';
import { LoraExpertLinear, Mxfp4Weight, Nf4Weight, QuantizedExpertLinear, reference } from '../src/index.js';

expectNoLeaks();

interface Case {
  experts: number;
  counts: number[];
  inFeatures: number;
  outFeatures: number;
  r: number;
  store: 'plain' | 'nf4' | 'mxfp4';
  opened: boolean;
}
const cases: Case[] = [
  { experts: 1, counts: [1], inFeatures: 7, outFeatures: 5, r: 1, store: 'plain', opened: false },
  { experts: 4, counts: [0, 7, 0, 3], inFeatures: 32, outFeatures: 13, r: 4, store: 'mxfp4', opened: true },
  { experts: 3, counts: [40, 91, 0], inFeatures: 64, outFeatures: 33, r: 5, store: 'nf4', opened: true },
  { experts: 5, counts: [1, 0, 60, 9, 61], inFeatures: 96, outFeatures: 130, r: 8, store: 'nf4', opened: false },
  { experts: 2, counts: [0, 0], inFeatures: 32, outFeatures: 8, r: 2, store: 'plain', opened: true },
];

describe('LoraExpertLinear', () => {
  it.each(cases)('$experts experts with $counts rows, $inFeatures -> $outFeatures, r $r over $store', (c) => {
    using scope = new Scope();
    using ws = new Workspace();
    const { experts, inFeatures, outFeatures, r } = c;
    const rows = c.counts.reduce((a, b) => a + b, 0);
    const starts = [0];
    for (const n of c.counts) starts.push((starts.at(-1) as number) + n);
    const offsets = scope.own(fromTypedArray(Int32Array.from(starts), [experts + 1]));
    const dense = scope.own(fromTypedArray(randomNormal(experts * outFeatures * inFeatures, 1, 0.2), [experts, outFeatures, inFeatures]));
    const w = scope.own(empty(dense.shape));
    let base: ExpertLinear;
    if (c.store === 'plain') {
      base = new PlainExpertLinear({ weight: dense });
      copy(w, dense);
    } else {
      const weight = scope.own(c.store === 'nf4' ? Nf4Weight.quantize(dense) : Mxfp4Weight.quantize(dense));
      base = new QuantizedExpertLinear({ weight });
      base.materialize(w);
      expect(base.plain).toBeNull();
    }
    const lora = scope.own(new LoraExpertLinear({ base, r, loraAlpha: 3 * r, name: 'mlp.experts' }));
    expect(lora.a.value.shape).toEqual([experts * r, inFeatures]);
    expect(lora.b.value.shape).toEqual([outFeatures, r * experts]);
    lora.b.value.data().set(randomNormal(outFeatures * r * experts, 2, 0.3));

    // The dense way: W_e + delta_e^T with PEFT's delta, checked per expert with its own A and B.
    const delta = reference.expertDelta(lora.a.value.data(), lora.b.value.data(), experts, r, inFeatures, outFeatures, lora.scale);
    const effective = Float64Array.from(w.data(), (v, at) => {
      const e = Math.floor(at / (outFeatures * inFeatures));
      const o = Math.floor(at / inFeatures) % outFeatures;
      return v + (delta[(e * inFeatures + (at % inFeatures)) * outFeatures + o] as number);
    });
    const merged = scope.own(empty(dense.shape));
    lora.materialize(merged);
    expect(relativeError(merged.data(), effective)).toBeLessThan(1e-6);

    if (rows === 0) return;
    const x = scope.own(fromTypedArray(randomNormal(rows * inFeatures, 3), [rows, inFeatures]));
    const dy = randomNormal(rows * outFeatures, 4);
    const dout = scope.own(fromTypedArray(dy, [rows, outFeatures]));
    const out = scope.own(empty([rows, outFeatures]));
    const dx = scope.own(fromTypedArray(new Float32Array(rows * inFeatures).fill(9), [rows, inFeatures]));
    const wantY = new Float64Array(rows * outFeatures);
    const wantDx = new Float64Array(rows * inFeatures);
    const wantDa = new Float64Array(experts * r * inFeatures);
    const wantDb = new Float64Array(outFeatures * r * experts);
    for (let e = 0; e < experts; e++) {
      const [first, last] = [starts[e] as number, starts[e + 1] as number];
      const b = Float64Array.from({ length: outFeatures * r }, (_, i) => lora.b.value.data()[i * experts + e] as number);
      const problem: reference.LoraProblem = {
        tokens: last - first,
        inFeatures,
        outFeatures,
        r,
        scale: lora.scale,
        x: x.data().subarray(first * inFeatures, last * inFeatures),
        w: w.data().subarray(e * outFeatures * inFeatures, (e + 1) * outFeatures * inFeatures),
        a: lora.a.value.data().subarray(e * r * inFeatures, (e + 1) * r * inFeatures),
        b,
      };
      wantY.set(reference.forward(problem), first * outFeatures);
      const grads = reference.backward(problem, dy.subarray(first * outFeatures, last * outFeatures));
      wantDx.set(grads.dx, first * inFeatures);
      wantDa.set(grads.da, e * r * inFeatures);
      grads.db.forEach((v, i) => {
        wantDb[i * experts + e] = v;
      });
    }
    if (c.opened) lora.open('backward', ws);
    const used = ws.usedBytes;
    lora.forward(x, out, offsets, ws);
    expect(relativeError(out.data(), wantY)).toBeLessThan(2e-6);
    lora.backward(x, dout, dx, offsets, ws);
    expect(relativeError(dx.data(), wantDx)).toBeLessThan(2e-6);
    expect(relativeError(lora.a.grad.data(), wantDa)).toBeLessThan(2e-6);
    expect(relativeError(lora.b.grad.data(), wantDb)).toBeLessThan(2e-6);
    lora.backward(x, dout, dx, offsets, ws, true);
    lora.backward(x, dout, null, offsets, ws);
    expect(
      relativeError(
        dx.data(),
        wantDx.map((v) => 2 * v),
      ),
    ).toBeLessThan(2e-6);
    expect(
      relativeError(
        lora.a.grad.data(),
        wantDa.map((v) => 3 * v),
      ),
    ).toBeLessThan(2e-6);
    expect(ws.usedBytes).toBe(used);
    lora.close();
  });

  it('refuses dropout, as PEFT does', () => {
    using weight = empty([2, 3, 4]);
    const base = new PlainExpertLinear({ weight });
    expect(() => new LoraExpertLinear({ base, r: 2, loraDropout: 0.1, name: 'x' })).toThrow(
      expect.objectContaining({ code: 'ERR_LC_ARGUMENT' }),
    );
  });
});
