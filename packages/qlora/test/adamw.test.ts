import { copy, empty, fromTypedArray, type Parameter, Scope } from '@lc/tensor';
import { expectNoLeaks, randomNormal, relativeError } from '@lc/tensor/testing';
import { describe, expect, it } from 'vitest';
import { AdamW, type AdamWOptions, reference } from '../src/index.js';

expectNoLeaks();

function make(scope: Scope, sizes: number[], seed = 1): Parameter[] {
  return sizes.map((n, i) => ({
    name: `p${i}`,
    value: scope.own(fromTypedArray(randomNormal(n, seed + i), [n])),
    grad: scope.own(fromTypedArray(new Float32Array(n), [n])),
  }));
}
const setGrads = (parameters: Parameter[], step: number, std = 1): void => {
  parameters.forEach((p, i) => {
    p.grad.data().set(randomNormal(p.grad.numel, 1000 * step + i, std));
  });
};

describe('AdamW', () => {
  it('reference: one step from zero moves every value by lr against its gradient', () => {
    const s = { value: Float64Array.of(1, 1), m: new Float64Array(2), v: new Float64Array(2) };
    reference.adamw(s, [0.5, -3], 1, { lr: 0.1, beta1: 0.9, beta2: 0.999, eps: 0, weightDecay: 0 });
    expect([...s.value]).toEqual([expect.closeTo(0.9, 12), expect.closeTo(1.1, 12)]);
    reference.adamw(s, [0, 0], 2, { lr: 0.1, beta1: 0, beta2: 0, eps: 1, weightDecay: 0.5 });
    expect(s.value[0]).toBeCloseTo(0.9 * 0.95, 12);
  });

  it('matches the reference over steps, clipping included, in 32 bits', () => {
    using scope = new Scope();
    const parameters = make(scope, [1, 7, 257, 40_000]);
    using optimizer = new AdamW(parameters, { lr: 2e-3, weightDecay: 0.1 });
    const states = parameters.map((p) => ({
      value: Float64Array.from(p.value.data()),
      m: new Float64Array(p.value.numel),
      v: new Float64Array(p.value.numel),
    }));
    for (let step = 1; step <= 5; step++) {
      setGrads(parameters, step, step);
      const norm = Math.sqrt(parameters.reduce((sum, p) => sum + p.grad.data().reduce((a, g) => a + g * g, 0), 0));
      const { gradNorm, applied } = optimizer.step({ maxGradNorm: 1 });
      expect(applied).toBe(true);
      expect(Math.abs(gradNorm / norm - 1)).toBeLessThan(1e-12);
      states.forEach((s, i) => {
        const grad = Float64Array.from((parameters[i] as Parameter).grad.data(), (g) => g * Math.min(1, 1 / (norm + 1e-6)));
        reference.adamw(s, grad, step, { lr: 2e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, weightDecay: 0.1 });
        expect(relativeError((parameters[i] as Parameter).value.data(), s.value)).toBeLessThan(3e-7);
      });
    }
    expect(optimizer.stepsTaken).toBe(5);
  });

  it('leaves small gradients unclipped and obeys lr set between steps', () => {
    using scope = new Scope();
    const [p] = make(scope, [3]) as [Parameter];
    using optimizer = new AdamW([p], { lr: 0.1, weightDecay: 0 });
    p.grad.data().fill(1e-3);
    const before = p.value.data().slice();
    optimizer.lr = 0;
    optimizer.step({ maxGradNorm: 1 });
    expect(p.value.data()).toEqual(before);
    expect(optimizer.state().tensors['p0.exp_avg']?.data()[0]).toBeCloseTo(1e-4, 9);
    optimizer.zeroGrad();
    expect([...p.grad.data()]).toEqual([0, 0, 0]);
  });

  it.each([8, 32] as const)('stops at NaN and infinity without touching anything (%d bits)', (optimBits) => {
    using scope = new Scope();
    const parameters = make(scope, [5000, 300]);
    using optimizer = new AdamW(parameters, { optimBits });
    setGrads(parameters, 1);
    optimizer.step();
    const before = parameters.map((p) => p.value.data().slice());
    for (const bad of [Number.NaN, Number.POSITIVE_INFINITY]) {
      setGrads(parameters, 2);
      (parameters[1] as Parameter).grad.data()[299] = bad;
      const { gradNorm, applied } = optimizer.step({ maxGradNorm: 1 });
      expect(Number.isFinite(gradNorm)).toBe(false);
      expect(applied).toBe(false);
    }
    expect(optimizer.stepsTaken).toBe(1);
    expect(parameters.map((p) => p.value.data().slice())).toEqual(before);
  });

  it('takes the norm of huge gradients without overflow', () => {
    using scope = new Scope();
    const [p] = make(scope, [100]) as [Parameter];
    using optimizer = new AdamW([p]);
    p.grad.data().fill(3e38);
    expect(optimizer.gradNorm() / (Math.fround(3e38) * 10)).toBeCloseTo(1, 12);
  });

  it('8 bits: the state after a step is the reference state within the data type, and the step itself is exact', () => {
    using scope = new Scope();
    const n = 4096 + 77;
    const [p] = make(scope, [n]) as [Parameter];
    using optimizer = new AdamW([p], { optimBits: 8, lr: 1e-2, weightDecay: 0 });
    const s = { value: Float64Array.from(p.value.data()), m: new Float64Array(n), v: new Float64Array(n) };
    setGrads([p], 1);
    optimizer.step();
    reference.adamw(s, p.grad.data(), 1, { lr: 1e-2, beta1: 0.9, beta2: 0.999, eps: 1e-8, weightDecay: 0 });
    expect(relativeError(p.value.data(), s.value)).toBeLessThan(3e-7);
    const { tensors } = optimizer.state();
    for (const [name, map, want] of [
      ['exp_avg', reference.dynamicMap(true), s.m],
      ['exp_avg_sq', reference.dynamicMap(false), s.v],
    ] as const) {
      const codes = tensors[`p0.${name}`]?.data<Uint8Array>() as Uint8Array;
      const scales = tensors[`p0.${name}_scale`]?.data() as Float32Array;
      expect(codes).toBeInstanceOf(Uint8Array);
      let worst = 0;
      for (let i = 0; i < n; i++) {
        const x = (want[i] as number) / (scales[i >> 8] as number);
        const got = map[codes[i] as number] as number;
        const best = map.reduce((a, level) => Math.min(a, Math.abs(level - x)), 2);
        worst = Math.max(worst, Math.abs(got - x) - best);
      }
      expect(worst).toBeLessThan(1e-6);
    }
    expect(p.value.nbytes / 4).toBe(n);
    expect(Object.values(tensors).reduce((sum, t) => sum + t.nbytes, 0)).toBe(2 * n + 2 * 4 * Math.ceil(n / 256));
  });

  it('8 bits stays close to 32 bits over a hundred steps to a minimum', () => {
    using scope = new Scope();
    const n = 8192;
    const target = randomNormal(n, 99);
    const run = (optimBits: 8 | 32): Float32Array => {
      const [p] = make(scope, [n]) as [Parameter];
      using optimizer = new AdamW([p], { optimBits, lr: 0.05, weightDecay: 0 });
      for (let step = 0; step < 100; step++) {
        const [value, grad] = [p.value.data(), p.grad.data()];
        for (let i = 0; i < n; i++) grad[i] = (value[i] as number) - (target[i] as number);
        expect(optimizer.step().applied).toBe(true);
      }
      return p.value.data().slice();
    };
    const distance = (x: Float32Array, y: Float32Array): number =>
      Math.sqrt(x.reduce((sum, v, i) => sum + (v - (y[i] as number)) ** 2, 0) / n);
    const full = run(32);
    const eight = run(8);
    const start = distance(randomNormal(n, 1), target);
    expect(distance(full, target)).toBeLessThan(0.1 * start);
    expect(distance(eight, target)).toBeLessThan(0.1 * start);
    expect(distance(eight, full)).toBeLessThan(0.03 * start);
  });

  it('8 bits: a second moment far below its block keeps a level, so no step runs away', () => {
    using scope = new Scope();
    const [p] = make(scope, [4096]) as [Parameter];
    using optimizer = new AdamW([p], { optimBits: 8, lr: 1e-3, weightDecay: 0 });
    const before = p.value.data().slice();
    p.grad.data().fill(1e-4);
    for (let i = 0; i < 4096; i += 256) p.grad.data()[i] = 100;
    optimizer.step();
    p.grad.data().fill(0);
    optimizer.step();
    const moved = p.value.data().reduce((a, v, i) => Math.max(a, Math.abs(v - (before[i] as number))), 0);
    expect(moved).toBeLessThan(3e-3);
  });

  it('keeps 32-bit states for small parameters, as bitsandbytes does', () => {
    using scope = new Scope();
    using optimizer = new AdamW(make(scope, [4095, 4096]), { optimBits: 8 });
    const { tensors } = optimizer.state();
    expect(tensors['p0.exp_avg']?.dtype).toBe('f32');
    expect(tensors['p1.exp_avg']?.dtype).toBe('u8');
  });

  it.each<AdamWOptions>([{ optimBits: 32 }, { optimBits: 8 }])('goes on from a saved state with the same bits: %j', (options) => {
    using scope = new Scope();
    const run = (parameters: Parameter[], optimizer: AdamW, from: number, to: number): void => {
      for (let step = from; step < to; step++) {
        setGrads(parameters, step);
        optimizer.step({ maxGradNorm: 1 });
      }
    };
    const a = make(scope, [5000, 12]);
    using whole = new AdamW(a, options);
    run(a, whole, 0, 6);
    const b = make(scope, [5000, 12]);
    using first = new AdamW(b, options);
    run(b, first, 0, 3);
    const saved = first.state();
    const c = make(scope, [5000, 12]);
    c.forEach((p, i) => {
      copy(p.value, (b[i] as Parameter).value);
    });
    using second = new AdamW(c, options);
    second.restore({
      step: saved.step,
      tensors: Object.fromEntries(Object.entries(saved.tensors).map(([k, t], i) => [k, i % 2 ? t : t.data().slice()])),
    });
    run(c, second, 3, 6);
    a.forEach((p, i) => {
      expect((c[i] as Parameter).value.data()).toEqual(p.value.data());
    });
    // One error for everything that does not fit; nothing is changed.
    const { 'p1.exp_avg': dropped, ...rest } = second.state().tensors;
    expect(dropped).toBeDefined();
    const wrong = { step: 3, tensors: { ...rest, 'p0.exp_avg': new Float32Array(3), extra: new Float32Array(1) } };
    expect(() => second.restore(wrong)).toThrow(/'p0.exp_avg' must be.*'p1.exp_avg' is missing.*'extra' belongs to no/s);
    expect(second.stepsTaken).toBe(6);
  });

  it('refuses bad hyperparameters and parameters', () => {
    using scope = new Scope();
    const parameters = make(scope, [3]);
    for (const bad of [
      { lr: -1 },
      { lr: Number.NaN },
      { betas: [1, 0.9] as const },
      { eps: -1 },
      { weightDecay: Number.POSITIVE_INFINITY },
      { optimBits: 16 as 8 },
    ]) {
      expect(() => new AdamW(parameters, bad)).toThrow(expect.objectContaining({ code: 'ERR_LC_ARGUMENT' }));
    }
    expect(() => new AdamW([...parameters, ...parameters])).toThrow(/'p0' twice/);
    const half = scope.own(empty([3], { dtype: 'bf16' }));
    expect(() => new AdamW([{ name: 'h', value: half, grad: half }])).toThrow(expect.objectContaining({ code: 'ERR_LC_DTYPE' }));
    using optimizer = new AdamW(parameters);
    expect(() => optimizer.step({ maxGradNorm: 0 })).toThrow(expect.objectContaining({ code: 'ERR_LC_ARGUMENT' }));
  });
});
