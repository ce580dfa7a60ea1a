import { copy, empty, fill, fromTypedArray, type Linear, memory, PlainLinear, Scope, type Span, Workspace } from '@lc/tensor';
import { expectNoLeaks, randomNormal, relativeError, seededRandom } from '@lc/tensor/testing';
import { describe, expect, it } from 'vitest';
import { DenseWeight, LoraLinear, Mxfp4Weight, Nf4Weight, QuantizedLinear, reference, type WeightStorage } from '../src/index.js';
import { siteOf } from '../src/lora-parameters.js';
import { native } from '../src/native.js';

expectNoLeaks();
const span = (length: number, more: Partial<Span> = {}): Span => ({ start: 0, length, docStart: null, ...more });
const dot = (a: ArrayLike<number>, b: ArrayLike<number>): number => Array.from(a).reduce((sum, v, i) => sum + v * (b[i] as number), 0);

describe('reference', () => {
  it('has the gradients that finite differences find', () => {
    const p: reference.LoraProblem = {
      tokens: 3,
      inFeatures: 5,
      outFeatures: 4,
      r: 2,
      scale: 0.7,
      x: Float64Array.from(randomNormal(15, 1)),
      w: Float64Array.from(randomNormal(20, 2)),
      a: Float64Array.from(randomNormal(10, 3)),
      b: Float64Array.from(randomNormal(8, 4)),
      mask: Float64Array.from({ length: 15 }, (_, i) => (i % 3 === 0 ? 0 : 1.5)),
    };
    const dy = randomNormal(12, 5);
    const grads = reference.backward(p, dy);
    for (const [key, grad] of [
      ['x', grads.dx],
      ['a', grads.da],
      ['b', grads.db],
    ] as const) {
      const values = p[key] as Float64Array;
      const numeric = Array.from(values, (v, i) => {
        values[i] = v + 1e-5;
        const up = dot(reference.forward(p), dy);
        values[i] = v - 1e-5;
        const down = dot(reference.forward(p), dy);
        values[i] = v;
        return (up - down) / 2e-5;
      });
      expect(relativeError(grad, numeric)).toBeLessThan(1e-9);
    }
  });

  it('draws the published Philox4x32-10 numbers', () => {
    // Random123's known answers.
    expect(reference.philox([0, 0, 0, 0], 0)).toEqual([0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
  });
});

interface Case {
  tokens: number;
  inFeatures: number;
  outFeatures: number;
  r: number;
  store: 'plain' | 'f32' | 'bf16' | 'nf4' | 'mxfp4';
  bias: boolean;
  loraDropout: number;
  opened: boolean;
}
const cases: Case[] = [
  { tokens: 1, inFeatures: 7, outFeatures: 5, r: 1, store: 'plain', bias: true, loraDropout: 0, opened: false },
  { tokens: 7, inFeatures: 33, outFeatures: 1, r: 3, store: 'f32', bias: false, loraDropout: 0, opened: true },
  { tokens: 131, inFeatures: 96, outFeatures: 70, r: 4, store: 'nf4', bias: true, loraDropout: 0, opened: true },
  { tokens: 131, inFeatures: 96, outFeatures: 70, r: 8, store: 'mxfp4', bias: false, loraDropout: 0.3, opened: false },
  { tokens: 7, inFeatures: 100, outFeatures: 31, r: 16, store: 'bf16', bias: true, loraDropout: 0.5, opened: true },
  { tokens: 64, inFeatures: 65, outFeatures: 129, r: 5, store: 'nf4', bias: false, loraDropout: 0.1, opened: false },
];

function build(scope: Scope, c: Case): { base: Linear; lora: LoraLinear; w: Float32Array; bias: Float32Array | null } {
  const dense = scope.own(fromTypedArray(randomNormal(c.outFeatures * c.inFeatures, 11, 0.2), [c.outFeatures, c.inFeatures]));
  const biasTensor = c.bias ? scope.own(fromTypedArray(randomNormal(c.outFeatures, 12), [c.outFeatures])) : null;
  let base: Linear;
  const w = scope.own(empty(dense.shape));
  if (c.store === 'plain') {
    base = new PlainLinear({ weight: dense, bias: biasTensor });
    copy(w, dense);
  } else {
    const make: Record<'f32' | 'bf16' | 'nf4' | 'mxfp4', () => WeightStorage> = {
      f32: () => new DenseWeight(scope.own(fromTypedArray(dense.data().slice(), dense.shape))),
      bf16: () => {
        const half = scope.own(empty(dense.shape, { dtype: 'bf16' }));
        copy(half, dense);
        return new DenseWeight(half);
      },
      nf4: () => scope.own(Nf4Weight.quantize(dense)),
      mxfp4: () => scope.own(Mxfp4Weight.quantize(dense)),
    };
    const weight = make[c.store]();
    weight.dequantize(w);
    base = new QuantizedLinear({ weight, bias: biasTensor });
  }
  const lora = scope.own(
    new LoraLinear({ base, r: c.r, loraAlpha: 2 * c.r + 1, loraDropout: c.loraDropout, seed: 5, name: 'layers.0.q_proj' }),
  );
  lora.b.value.data().set(randomNormal(c.outFeatures * c.r, 13, 0.3));
  return { base, lora, w: w.data(), bias: biasTensor?.data() ?? null };
}

describe('LoraLinear', () => {
  it.each(cases)('$tokens tokens $inFeatures -> $outFeatures, r $r over $store, dropout $loraDropout', (c) => {
    using scope = new Scope();
    using ws = new Workspace();
    const { lora, w, bias } = build(scope, c);
    const seed = 2 ** 40 + 77;
    const at = span(c.tokens, { start: 1000, dropoutSeed: seed });
    // Strided rows, as columns of a wider tensor.
    const wideX = scope.own(fromTypedArray(randomNormal(c.tokens * (c.inFeatures + 3), 21), [c.tokens, c.inFeatures + 3]));
    const wideY = scope.own(fromTypedArray(randomNormal(c.tokens * (c.outFeatures + 2), 22), [c.tokens, c.outFeatures + 2]));
    const x = wideX.slice(1, 2, c.inFeatures);
    const out = wideY.slice(1, 1, c.outFeatures);
    const packed = (t: typeof x): Float32Array => {
      const p = scope.own(empty(t.shape));
      copy(p, t);
      return p.data();
    };
    const problem: reference.LoraProblem = {
      ...c,
      scale: lora.scale,
      x: packed(x),
      w,
      a: lora.a.value.data(),
      b: lora.b.value.data(),
      bias,
    };
    if (c.loraDropout > 0) {
      problem.mask = Float64Array.from({ length: c.tokens * c.inFeatures }, (_, i) =>
        reference.dropoutFactor(c.loraDropout, seed, siteOf('layers.0.q_proj'), 1000 + Math.floor(i / c.inFeatures), i % c.inFeatures),
      );
    }
    if (c.opened) lora.open('forward', ws);
    const used = ws.usedBytes;
    lora.forward(x, out, at, ws);
    expect(relativeError(packed(out), reference.forward(problem))).toBeLessThan(2e-6);

    const dy = randomNormal(c.tokens * c.outFeatures, 23);
    const dout = scope.own(fromTypedArray(dy, [c.tokens, c.outFeatures]));
    const want = reference.backward(problem, dy);
    const dx = scope.own(fromTypedArray(new Float32Array(c.tokens * c.inFeatures).fill(9), [c.tokens, c.inFeatures]));
    lora.backward(x, dout, dx, at, ws);
    expect(relativeError(dx.data(), want.dx)).toBeLessThan(2e-6);
    expect(relativeError(lora.a.grad.data(), want.da)).toBeLessThan(2e-6);
    expect(relativeError(lora.b.grad.data(), want.db)).toBeLessThan(2e-6);
    // Once more: gradients add up, dx accumulates where told, null is skipped.
    lora.backward(x, dout, dx, at, ws, true);
    expect(
      relativeError(
        dx.data(),
        want.dx.map((v) => 2 * v),
      ),
    ).toBeLessThan(2e-6);
    lora.backward(x, dout, null, at, ws);
    expect(
      relativeError(
        lora.b.grad.data(),
        want.db.map((v) => 3 * v),
      ),
    ).toBeLessThan(2e-6);
    expect(ws.usedBytes).toBe(used);
    lora.close();
  });

  it('starts as its base, with lora_A uniform within 1 / sqrt(in), the same for a seed and name', () => {
    using scope = new Scope();
    using ws = new Workspace();
    const weight = scope.own(fromTypedArray(randomNormal(64 * 256, 1), [64, 256]));
    const base = new PlainLinear({ weight });
    const make = (name: string, seed: number): LoraLinear => scope.own(new LoraLinear({ base, r: 16, name, seed }));
    const one = make('a', 3);
    const x = scope.own(fromTypedArray(randomNormal(5 * 256, 2), [5, 256]));
    const plain = scope.own(empty([5, 64]));
    const out = scope.own(empty([5, 64]));
    base.forward(x, plain, span(5), ws);
    one.forward(x, out, span(5), ws);
    expect(out.data()).toEqual(plain.data());
    const a = one.a.value.data();
    expect(Math.max(...a.map(Math.abs))).toBeLessThanOrEqual(1 / 16);
    expect(Math.abs(a.reduce((s, v) => s + v, 0) / a.length)).toBeLessThan(4 / 16 / Math.sqrt(3 * a.length)); // 4 sigma
    expect(a.reduce((s, v) => s + v * v, 0) / a.length).toBeCloseTo(1 / 256 / 3, 4);
    expect(make('a', 3).a.value.data()).toEqual(a);
    expect(make('a', 4).a.value.data()).not.toEqual(a);
    expect(make('b', 3).a.value.data()).not.toEqual(a);
    expect(one.parameters.map((p) => p.name)).toEqual(['a.lora_A.weight', 'a.lora_B.weight']);
    expect(one.scale).toBe(1);
    expect(scope.own(new LoraLinear({ base, r: 16, loraAlpha: 8, useRslora: true, name: 'c' })).scale).toBe(2);
  });

  it('drops by counter: the same however spans are cut, its share and mean right, no dropout in evaluation', () => {
    using scope = new Scope();
    const tokens = 500;
    const width = 200;
    const ones = scope.own(fromTypedArray(new Float32Array(tokens * width).fill(1), [tokens, width]));
    const whole = scope.own(empty([tokens, width]));
    const cut = scope.own(empty([tokens, width]));
    const args = { p: 0.25, seed: 12345, site: 7 };
    native().dropout({ x: ones, out: whole, start: 2 ** 33, ...args });
    for (let start = 0; start < tokens; start += 37) {
      const n = Math.min(37, tokens - start);
      native().dropout({ x: ones.rows(start, n), out: cut.rows(start, n), start: 2 ** 33 + start, ...args });
    }
    expect(cut.data()).toEqual(whole.data());
    const kept = whole.data().reduce((s, v) => s + (v > 0 ? 1 : 0), 0) / (tokens * width);
    expect(Math.abs(kept - 0.75)).toBeLessThan((4 * Math.sqrt(0.75 * 0.25)) / Math.sqrt(tokens * width));
    expect(new Set(whole.data())).toEqual(new Set([0, Math.fround(1 / 0.75)]));
    for (const other of [{ seed: 12346 }, { site: 8 }]) {
      native().dropout({ x: ones, out: cut, start: 2 ** 33, ...args, ...other });
      const same = cut.data().reduce((s, v, i) => s + (v === whole.data()[i] ? 1 : 0), 0) / (tokens * width);
      expect(Math.abs(same - (0.75 ** 2 + 0.25 ** 2))).toBeLessThan(0.02);
    }
    // NaN that is dropped does not come through.
    fill(ones, Number.NaN);
    native().dropout({ x: ones, out: cut, start: 2 ** 33, ...args });
    expect(cut.data().filter((v) => v === 0).length).toBe(whole.data().filter((v) => v === 0).length);

    using ws = new Workspace();
    const lora = scope.own(
      new LoraLinear({
        base: new PlainLinear({ weight: scope.own(fromTypedArray(randomNormal(12, 1), [3, 4])) }),
        r: 2,
        loraDropout: 0.9,
        name: 'd',
      }),
    );
    lora.b.value.data().fill(1);
    const x = scope.own(fromTypedArray(randomNormal(8, 3), [2, 4]));
    const [e1, e2, t1] = [0, 1, 2].map(() => scope.own(empty([2, 3]))) as [typeof x, typeof x, typeof x];
    lora.forward(x, e1, span(2), ws);
    lora.forward(x, e2, span(2), ws);
    lora.forward(x, t1, span(2, { dropoutSeed: 1 }), ws);
    expect(e1.data()).toEqual(e2.data());
    expect(t1.data()).not.toEqual(e1.data());
  });

  it('allocates nothing once the workspace has grown', () => {
    using scope = new Scope();
    using ws = new Workspace({ bytes: 1 << 20 });
    const { lora } = build(scope, { ...(cases[3] as Case) });
    const [x, out, dx] = [scope.own(empty([131, 96])), scope.own(empty([131, 70])), scope.own(empty([131, 96]))];
    fill(x, 1);
    fill(out, 1);
    const step = (): void => {
      lora.open('backward', ws);
      lora.forward(x, out, span(131, { dropoutSeed: 3 }), ws);
      lora.backward(x, out, dx, span(131, { dropoutSeed: 3 }), ws);
      lora.close();
      ws.reset();
    };
    step();
    const before = memory().devices.cpu?.allocations;
    step();
    expect(memory().devices.cpu?.allocations).toBe(before);
  });

  it('refuses bad options', () => {
    using scope = new Scope();
    const weight = scope.own(empty([2, 3]));
    const base = new PlainLinear({ weight });
    const random = seededRandom(1)();
    for (const bad of [
      { r: 0 },
      { r: 1.5 },
      { r: 2, loraAlpha: 0 },
      { r: 2, loraAlpha: Number.NaN },
      { r: 2, loraDropout: 1 },
      { r: 2, loraDropout: Number.NaN },
      { r: 2, seed: random },
    ]) {
      expect(() => new LoraLinear({ base, name: 'x', ...bad })).toThrow(expect.objectContaining({ code: 'ERR_LC_ARGUMENT' }));
    }
    const dense = new DenseWeight(weight);
    const bias = scope.own(empty([3]));
    expect(() => new QuantizedLinear({ weight: dense, bias })).toThrow(expect.objectContaining({ code: 'ERR_LC_SHAPE' }));
    const ints = scope.own(empty([2, 3], { dtype: 'i32' }));
    expect(() => new DenseWeight(ints)).toThrow(expect.objectContaining({ code: 'ERR_LC_DTYPE' }));
  });
});
