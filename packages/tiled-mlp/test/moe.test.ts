import { deviceMemory, empty, emptyLike, type LcError, PlainExpertLinear, type Tensor, Workspace } from '@lc/tensor';
import { expectNoLeaks, randomNormal, relativeError } from '@lc/tensor/testing';
import { describe, expect, test } from 'vitest';
import { reference, TiledMoE } from '../src/index.js';
import { native } from '../src/native.js';
import { finiteDifferences, span, TrainedExpertLinear, tensorOf } from './helpers.js';

expectNoLeaks();

interface Case {
  kind: 'gpt-oss' | 'qwen3-moe';
  tokens: number;
  hidden: number;
  intermediate: number;
  experts: number;
  topK: number;
  normTopkProb?: boolean;
  norm?: boolean;
  residual?: boolean;
  limit?: number;
  /** Factor on the router's weights. */
  routerScale?: number;
  /** Added to the last expert's router bias: nobody goes there. */
  lonely?: boolean;
}

function data(c: Case, seed = 1) {
  const { tokens, hidden, intermediate, experts } = c;
  const oss = c.kind === 'gpt-oss';
  const routerBias = oss || c.lonely ? randomNormal(experts, seed + 2, 0.3) : null;
  if (c.lonely && routerBias) routerBias[experts - 1] = -1e4;
  return {
    x: randomNormal(tokens * hidden, seed),
    router: randomNormal(experts * hidden, seed + 1, (c.routerScale ?? 1) / Math.sqrt(hidden)),
    routerBias,
    gateUp: randomNormal(experts * 2 * intermediate * hidden, seed + 3, 2 / Math.sqrt(hidden)),
    gateUpBias: oss ? randomNormal(experts * 2 * intermediate, seed + 4, 0.5) : null,
    down: randomNormal(experts * hidden * intermediate, seed + 5, 1 / Math.sqrt(intermediate)),
    downBias: oss ? randomNormal(experts * hidden, seed + 6, 0.5) : null,
    normWeight: randomNormal(hidden, seed + 7).map((v) => 1 + v / 4),
    dout: randomNormal(tokens * hidden, seed + 8),
  };
}
type Data = ReturnType<typeof data>;

const referenceArgs = (c: Case, d: Data) => {
  const norm = c.norm ? { weight: d.normWeight, eps: 1e-5 } : null;
  return { ...c, ...d, norm, residual: c.residual ?? c.norm ?? false };
};

function run(c: Case, tile: number, d = data(c), options: { alias?: boolean; frozenDown?: boolean } = {}) {
  const { tokens, hidden, intermediate, experts } = c;
  const owned: Tensor[] = [];
  const own = (values: ArrayLike<number>, shape: number[]): Tensor => {
    owned.push(tensorOf(values, shape));
    return owned[owned.length - 1] as Tensor;
  };
  const optional = (values: Float32Array | null, shape: number[]): Tensor | null => values && own(values, shape);
  const gateUp = new TrainedExpertLinear(own(d.gateUp, [experts, 2 * intermediate, hidden]));
  const down = new TrainedExpertLinear(own(d.down, [experts, hidden, intermediate]));
  const frozen = options.frozenDown ? new PlainExpertLinear({ weight: down.value }) : null;
  const moe = new TiledMoE({
    kind: c.kind,
    router: { weight: own(d.router, [experts, hidden]), bias: optional(d.routerBias, [experts]) },
    gateUp,
    gateUpBias: optional(d.gateUpBias, [experts, 2 * intermediate]),
    down: frozen ?? down,
    downBias: optional(d.downBias, [experts, hidden]),
    topK: c.topK,
    normTopkProb: c.normTopkProb,
    limit: c.limit,
    tile,
    norm: c.norm ? { weight: own(d.normWeight, [hidden]), eps: 1e-5 } : null,
    residual: c.residual,
  });
  using ws = new Workspace();
  const x = own(d.x, [tokens, hidden]);
  const dout = own(d.dout, [tokens, hidden]);
  const [out, dx] = [emptyLike(x), options.alias ? dout : emptyLike(x)];
  moe.forward(x, out, span(tokens, 3), ws);
  const forwards = down.forwards;
  moe.backward(x, dout, dx, span(tokens, 3), ws);
  expect(down.forwards, 'backward does not run the down projection').toBe(forwards);
  expect(ws.usedBytes).toBe(0);
  const again = emptyLike(x);
  moe.forward(x, again, span(tokens, 3), ws);
  expect(again.data()).toEqual(out.data());
  const result = {
    out: out.data().slice(),
    dx: dx.data().slice(),
    dGateUp: gateUp.grad.data().slice(),
    dDown: down.grad.data().slice(),
    peak: ws.peakBytes,
  };
  for (const t of [...owned, out, again, gateUp.grad, down.grad, ...(options.alias ? [] : [dx])]) t.dispose();
  return result;
}

const keys = ['out', 'dx', 'dGateUp', 'dDown'] as const;
const cases: Case[] = [
  { kind: 'gpt-oss', tokens: 1, hidden: 1, intermediate: 1, experts: 1, topK: 1 },
  { kind: 'gpt-oss', tokens: 1, hidden: 9, intermediate: 5, experts: 3, topK: 2, norm: true },
  { kind: 'gpt-oss', tokens: 7, hidden: 16, intermediate: 11, experts: 4, topK: 4, norm: true },
  { kind: 'gpt-oss', tokens: 131, hidden: 36, intermediate: 27, experts: 8, topK: 3, norm: true, limit: 1, lonely: true },
  { kind: 'gpt-oss', tokens: 40, hidden: 20, intermediate: 17, experts: 33, topK: 4, residual: true },
  { kind: 'qwen3-moe', tokens: 1, hidden: 3, intermediate: 2, experts: 2, topK: 1 },
  { kind: 'qwen3-moe', tokens: 7, hidden: 16, intermediate: 13, experts: 5, topK: 2, norm: true, normTopkProb: false },
  { kind: 'qwen3-moe', tokens: 131, hidden: 36, intermediate: 27, experts: 16, topK: 4, norm: true },
  {
    kind: 'qwen3-moe',
    tokens: 131,
    hidden: 36,
    intermediate: 27,
    experts: 16,
    topK: 4,
    norm: true,
    residual: false,
    normTopkProb: false,
    lonely: true,
  },
];

describe('TiledMoE', () => {
  test('reference gradients agree with finite differences', () => {
    for (const c of [
      { kind: 'gpt-oss', tokens: 3, hidden: 5, intermediate: 3, experts: 4, topK: 2, norm: true, limit: 1 },
      { kind: 'qwen3-moe', tokens: 3, hidden: 5, intermediate: 3, experts: 4, topK: 2, norm: true },
      { kind: 'qwen3-moe', tokens: 3, hidden: 5, intermediate: 3, experts: 4, topK: 3, normTopkProb: false },
    ] as Case[]) {
      const d = data(c);
      const [x, gateUp, down] = [Float64Array.from(d.x), Float64Array.from(d.gateUp), Float64Array.from(d.down)];
      const args = { ...referenceArgs(c, d), x, gateUp, down };
      const g = reference.moe.backward(args, d.dout);
      const f = (): Float64Array => reference.moe.forward(args);
      for (const [values, gradient] of [
        [x, g.dx],
        [gateUp, g.dGateUp],
        [down, g.dDown],
      ] as const) {
        expect(finiteDifferences(values, gradient, d.dout, f)).toBeLessThan(1e-7);
      }
    }
  });

  for (const c of cases) {
    test(`${JSON.stringify(c)}: against the reference, tiles of 1, 5, 16 and all`, () => {
      const d = data(c);
      const args = referenceArgs(c, d);
      const want = { out: reference.moe.forward(args), ...reference.moe.backward(args, d.dout) };
      const whole = run(c, c.tokens);
      for (const key of keys) expect(relativeError(whole[key], want[key]), key).toBeLessThan(3e-6);
      for (const tile of [1, 5, 16]) {
        const tiled = run(c, tile);
        for (const key of ['out', 'dx'] as const) expect(tiled[key], key).toEqual(whole[key]);
        for (const key of keys) expect(relativeError(tiled[key], whole[key]), key).toBeLessThan(2e-6);
      }
      expect(run(c, 16, d, { alias: true }).dx).toEqual(whole.dx);
      // Where down trains nothing, the activation is not stored in backward.
      for (const tile of [c.tokens, 16]) {
        const frozen = run(c, tile, d, { frozenDown: true });
        expect(frozen.out).toEqual(whole.out);
        for (const key of ['dx', 'dGateUp'] as const) expect(relativeError(frozen[key], want[key]), key).toBeLessThan(3e-6);
        expect(relativeError(frozen.dx, whole.dx)).toBeLessThan(2e-6);
      }
    });
  }

  test('routing weights that underflow to 0 leave finite, right gradients', () => {
    for (const kind of ['gpt-oss', 'qwen3-moe'] as const) {
      const c: Case = { kind, tokens: 5, hidden: 8, intermediate: 4, experts: 3, topK: 3, routerScale: 0 };
      const d = data(c);
      d.routerBias = Float32Array.from([0, -200, 0.25]);
      const args = referenceArgs(c, d);
      const want = { out: reference.moe.forward(args), ...reference.moe.backward(args, d.dout) };
      const [got, frozen] = [run(c, 5, d), run(c, 5, d, { frozenDown: true })];
      for (const key of keys) expect(relativeError(got[key], want[key]), key).toBeLessThan(3e-6);
      expect(relativeError(frozen.dx, want.dx)).toBeLessThan(3e-6);
    }
  });

  test('clamps: at the limit the gradient passes, beyond it stops', () => {
    // One expert, identity-like weights: gate and up are x itself.
    const c: Case = { kind: 'gpt-oss', tokens: 5, hidden: 2, intermediate: 1, experts: 1, topK: 1, limit: 7 };
    const d = data(c);
    Object.assign(d, { gateUp: Float32Array.of(1, 0, 0, 1), gateUpBias: new Float32Array(2), down: Float32Array.of(1, 0), downBias: null });
    d.x = Float32Array.of(7, 7, 7.5, -7.5, -9, -7, 6.9, 7.5, 8, 0);
    d.dout.fill(1);
    const args = referenceArgs(c, d);
    const got = run(c, 5, d);
    const want = reference.moe.backward(args, d.dout).dx;
    expect(relativeError(got.dx, want)).toBeLessThan(1e-6);
    expect([got.dx[2], got.dx[3], got.dx[7], got.dx[8]].every((v) => v === 0)).toBe(true);
    expect(got.dx[0]).toBeGreaterThan(1);
    expect(got.dx[1]).toBeGreaterThan(1);
  });

  test('route: ties to the lower expert, rows stable by expert then token, NaN stays in range', () => {
    const [experts, topK] = [4, 2];
    const rows = [
      [1, 2, 2, 2],
      [0, 0, 0, 0],
      [3, -1, 5, 3],
      [Number.NaN, Number.NaN, Number.NaN, Number.NaN],
      [-5, Number.NEGATIVE_INFINITY, -5, -5],
    ];
    const pairs = rows.length * topK;
    for (const softmaxFirst of [false, true]) {
      const logits = tensorOf(rows.flat(), [rows.length, experts]);
      const list = (): Tensor => empty([pairs], { dtype: 'i32', label: 'test' });
      const [ids, pairOf, rowOf, weights, offsets] = [
        list(),
        list(),
        list(),
        empty([pairs], { label: 'test' }),
        empty([experts + 1], { dtype: 'i32', label: 'test' }),
      ];
      native().route({ logits, topK, softmaxFirst, normalize: true, ids, weights, pairOf, rowOf, offsets });
      expect([...ids.data<Int32Array>()]).toEqual([1, 2, 0, 1, 2, 0, 0, 1, 0, 2]);
      const w = weights.data();
      expect(w[0]).toBe(0.5);
      expect(w[4]).toBeCloseTo(1 / (1 + Math.exp(-2)), 6);
      expect(w[8]).toBe(0.5);
      expect([...offsets.data<Int32Array>()]).toEqual([0, 4, 7, 10, 10]);
      expect([...pairOf.data<Int32Array>()]).toEqual([2, 5, 6, 8, 0, 3, 7, 1, 4, 9]);
      pairOf.data<Int32Array>().forEach((pair, row) => expect(rowOf.data<Int32Array>()[pair]).toBe(row));
      for (const t of [logits, ids, pairOf, rowOf, weights, offsets]) t.dispose();
    }
  });

  test('memory is that of a tile, and a second step allocates nothing', () => {
    const c: Case = { kind: 'gpt-oss', tokens: 64, hidden: 32, intermediate: 48, experts: 4, topK: 2, norm: true };
    const peak = run(c, 16).peak;
    expect(run({ ...c, tokens: 640 }, 16).peak).toBe(peak);
    const [h, i, k, e] = [32, 48, 2, 4]; // README's formula; each of the 13 tensors is padded to 256 bytes
    const bytes = 16 * 4 * (2 * h + k * (2 * h + 4 * i) + 2 * e + 4 * k);
    expect(peak).toBeGreaterThanOrEqual(bytes);
    expect(peak).toBeLessThan(bytes + 14 * 256);
    const frozen = bytes + 16 * 4 * k * (1 - i); // a number per row in place of the activation
    expect(run(c, 16, data(c), { frozenDown: true }).peak).toBeLessThan(frozen + 14 * 256);
    const before = deviceMemory('cpu').byLabel.workspace?.allocations ?? 0;
    run(c, 16);
    expect((deviceMemory('cpu').byLabel.workspace?.allocations ?? 0) - before).toBeLessThanOrEqual(2);
  });

  test('bad input is refused with a code', () => {
    const owned: Tensor[] = [];
    const make = (...shape: number[]): Tensor => {
      const t = tensorOf(new Float32Array(shape.reduce((a, b) => a * b, 1)), shape);
      owned.push(t);
      return t;
    };
    const expert = (...shape: number[]): TrainedExpertLinear => {
      const linear = new TrainedExpertLinear(make(...shape));
      owned.push(linear.grad);
      return linear;
    };
    const base = { kind: 'gpt-oss', router: { weight: make(3, 4) }, gateUp: expert(3, 10, 4), down: expert(3, 4, 5), topK: 2 };
    const code = (over: object): string => {
      try {
        new TiledMoE({ ...base, ...over } as ConstructorParameters<typeof TiledMoE>[0]);
        return 'none';
      } catch (error) {
        return (error as LcError).code;
      }
    };
    expect(code({})).toBe('none');
    expect(code({ kind: 'mixtral' })).toBe('ERR_LC_ARGUMENT');
    expect(code({ topK: 4 })).toBe('ERR_LC_ARGUMENT');
    expect(code({ topK: 0 })).toBe('ERR_LC_ARGUMENT');
    expect(code({ limit: Number.NaN })).toBe('ERR_LC_ARGUMENT');
    expect(code({ alpha: Number.POSITIVE_INFINITY })).toBe('ERR_LC_ARGUMENT');
    expect(code({ router: { weight: make(4, 3) } })).toBe('ERR_LC_SHAPE');
    expect(code({ router: { ...base.router, bias: make(4) } })).toBe('ERR_LC_SHAPE');
    expect(code({ gateUp: expert(3, 9, 4) })).toBe('ERR_LC_SHAPE');
    expect(code({ down: expert(2, 4, 5) })).toBe('ERR_LC_SHAPE');
    expect(code({ gateUpBias: make(3, 9) })).toBe('ERR_LC_SHAPE');
    expect(code({ downBias: make(3, 5) })).toBe('ERR_LC_SHAPE');
    // The kernels hold every index against its range.
    const [y, out, rowOf] = [make(4, 3), make(2, 3), empty([4], { dtype: 'i32', label: 'test' })];
    rowOf.data<Int32Array>().set([0, 1, 2, 4]);
    expect(() => native().combine({ y, out, rowOf, topK: 2 })).toThrow(/rowOf\[3\] is 4, must be in 0..3/);
    expect(() => native().gather({ x: out, out: y, rowOf, topK: 2 })).toThrow(/rowOf\[3\] is 4/);
    for (const t of [...owned, rowOf]) t.dispose();
  });
});
