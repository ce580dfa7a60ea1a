import { deviceMemory, emptyLike, type LcError, memory, type Tensor, Workspace } from '@lc/tensor';
import { expectNoLeaks, randomNormal, relativeError } from '@lc/tensor/testing';
import { describe, expect, test } from 'vitest';
import { type HiddenAct, reference, TiledMLP } from '../src/index.js';
import { finiteDifferences, span, TrainedLinear, tensorOf } from './helpers.js';

expectNoLeaks();

interface Shape {
  tokens: number;
  hidden: number;
  intermediate: number;
}
interface Variant {
  activation: HiddenAct;
  norm?: boolean;
  residual?: boolean;
}

const data = ({ tokens, hidden, intermediate }: Shape, seed = 1, scale = 1) => ({
  x: randomNormal(tokens * hidden, seed, scale),
  gate: randomNormal(intermediate * hidden, seed + 1, 1 / Math.sqrt(hidden)),
  up: randomNormal(intermediate * hidden, seed + 2, 1 / Math.sqrt(hidden)),
  down: randomNormal(hidden * intermediate, seed + 3, 1 / Math.sqrt(intermediate)),
  normWeight: randomNormal(hidden, seed + 4).map((v) => 1 + v / 4),
  dout: randomNormal(tokens * hidden, seed + 5),
});

/** Everything the op computes. */
function run(shape: Shape, variant: Variant, tile: number, options: { alias?: boolean; open?: boolean; scale?: number } = {}) {
  const { tokens, hidden, intermediate } = shape;
  const d = data(shape, 1, options.scale);
  const linears = [
    new TrainedLinear(tensorOf(d.gate, [intermediate, hidden])),
    new TrainedLinear(tensorOf(d.up, [intermediate, hidden])),
    new TrainedLinear(tensorOf(d.down, [hidden, intermediate])),
  ] as const;
  const [gateProj, upProj, downProj] = linears;
  const weight = tensorOf(d.normWeight, [hidden]);
  const mlp = new TiledMLP({
    gateProj,
    upProj,
    downProj,
    activation: variant.activation,
    tile,
    norm: variant.norm ? { weight, eps: 1e-5 } : null,
    ...(variant.residual === undefined ? {} : { residual: variant.residual }),
  });
  using ws = new Workspace();
  const x = tensorOf(d.x, [tokens, hidden]);
  const out = emptyLike(x);
  const dout = tensorOf(d.dout, [tokens, hidden]);
  const dx = options.alias ? dout : emptyLike(x);
  const at = span(tokens, 11, 5);
  if (options.open) mlp.open('forward', ws);
  mlp.forward(x, out, at, ws);
  if (options.open) {
    mlp.close();
    mlp.open('backward', ws);
  }
  const forwards = downProj.spans.length;
  expect(downProj.spans.map((s) => [s.start, s.length, s.dropoutSeed])).toEqual(
    Array.from({ length: Math.ceil(tokens / tile) }, (_, i) => [11 + i * tile, Math.min(tile, tokens - i * tile), 5]),
  );
  mlp.backward(x, dout, dx, at, ws);
  if (options.open) mlp.close();
  expect(downProj.spans.length, 'backward does not run the down projection').toBe(forwards);
  expect(ws.usedBytes).toBe(0);
  const copyOf = (t: Tensor): Float32Array => t.data().slice();
  const result = { out: copyOf(out), dx: copyOf(dx), dGate: copyOf(gateProj.grad), dUp: copyOf(upProj.grad), dDown: copyOf(downProj.grad) };
  for (const t of [x, out, dout, weight, ...linears.flatMap((l) => [l.value, l.grad])]) t.dispose();
  if (!options.alias) dx.dispose();
  expect(linears.map((l) => l.opened)).toEqual([0, 0, 0]);
  return result;
}

function referenceOf(shape: Shape, variant: Variant, scale = 1) {
  const d = data(shape, 1, scale);
  const norm = variant.norm ? { weight: d.normWeight, eps: 1e-5 } : null;
  const args = { ...shape, ...d, activation: variant.activation, norm, residual: variant.residual ?? norm !== null };
  return { out: reference.dense.forward(args), ...reference.dense.backward(args, d.dout) };
}

const shapes: Shape[] = [
  { tokens: 1, hidden: 1, intermediate: 1 },
  { tokens: 1, hidden: 9, intermediate: 13 },
  { tokens: 7, hidden: 16, intermediate: 37 },
  { tokens: 131, hidden: 36, intermediate: 75 },
];
const variants: Variant[] = [
  { activation: 'silu', norm: true },
  { activation: 'silu' },
  { activation: 'silu', residual: true },
  { activation: 'gelu', norm: true, residual: false },
  { activation: 'gelu', residual: false },
  { activation: 'gelu_pytorch_tanh', norm: true },
];
const keys = ['out', 'dx', 'dGate', 'dUp', 'dDown'] as const;

describe('TiledMLP', () => {
  test('reference gradients agree with finite differences', () => {
    const shape = { tokens: 3, hidden: 5, intermediate: 4 };
    for (const { activation, norm = false, residual = norm } of variants) {
      const d = data(shape);
      const args = {
        ...shape,
        activation,
        residual,
        x: Float64Array.from(d.x),
        gate: Float64Array.from(d.gate),
        up: Float64Array.from(d.up),
        down: Float64Array.from(d.down),
        norm: norm ? { weight: d.normWeight, eps: 1e-5 } : null,
      };
      const g = reference.dense.backward(args, d.dout);
      const f = (): Float64Array => reference.dense.forward(args);
      for (const [values, gradient] of [
        [args.x, g.dx],
        [args.gate, g.dGate],
        [args.up, g.dUp],
        [args.down, g.dDown],
      ] as const) {
        expect(finiteDifferences(values, gradient, d.dout, f)).toBeLessThan(1e-8);
      }
    }
  });

  for (const variant of variants) {
    test(`${JSON.stringify(variant)}: against the reference, tiles of 1, 5, 16 and all`, () => {
      for (const shape of shapes) {
        // The norm of a single feature is its sign: its gradient is only eps against rounding.
        if (shape.hidden === 1 && variant.norm && variant.residual === false) continue;
        const want = referenceOf(shape, variant);
        const whole = run(shape, variant, shape.tokens);
        for (const key of keys) expect(relativeError(whole[key], want[key]), `${key} of ${JSON.stringify(shape)}`).toBeLessThan(2e-6);
        for (const tile of [1, 5, 16]) {
          const tiled = run(shape, variant, tile);
          for (const key of ['out', 'dx'] as const) expect(tiled[key], key).toEqual(whole[key]); // each token on its own: the same bits
          for (const key of keys) expect(relativeError(tiled[key], whole[key]), key).toBeLessThan(2e-6);
        }
        expect(run(shape, variant, 16, { alias: true }).dx).toEqual(whole.dx);
        expect(run(shape, variant, 16, { open: true })).toEqual(run(shape, variant, 16));
      }
    });
  }

  test('large and tiny inputs stay finite and exact', () => {
    const shape = { tokens: 7, hidden: 16, intermediate: 37 };
    for (const activation of ['silu', 'gelu', 'gelu_pytorch_tanh'] as const) {
      for (const scale of [1e-4, 30, 1e3]) {
        const want = referenceOf(shape, { activation }, scale);
        const got = run(shape, { activation }, 5, { scale });
        for (const key of keys) expect(relativeError(got[key], want[key]), `${activation} ${key} x ${scale}`).toBeLessThan(5e-6);
      }
    }
  });

  test('memory is that of a tile', () => {
    const [hidden, intermediate, tile] = [64, 128, 16];
    const peaks = [64, 1024].map((tokens) => {
      const ws = new Workspace();
      const d = data({ tokens, hidden, intermediate });
      const linears = [
        tensorOf(d.gate, [intermediate, hidden]),
        tensorOf(d.up, [intermediate, hidden]),
        tensorOf(d.down, [hidden, intermediate]),
      ].map((w) => new TrainedLinear(w)) as [TrainedLinear, TrainedLinear, TrainedLinear];
      const weight = tensorOf(d.normWeight, [hidden]);
      const mlp = new TiledMLP({
        gateProj: linears[0],
        upProj: linears[1],
        downProj: linears[2],
        activation: 'silu',
        tile,
        norm: { weight, eps: 1e-5 },
      });
      const [x, out, dout] = [tensorOf(d.x, [tokens, hidden]), tensorOf(d.x, [tokens, hidden]), tensorOf(d.dout, [tokens, hidden])];
      const step = (): void => {
        mlp.forward(x, out, span(tokens), ws);
        mlp.backward(x, dout, dout, span(tokens), ws);
      };
      step();
      const before = deviceMemory('cpu').allocations;
      step();
      expect(deviceMemory('cpu').allocations).toBe(before);
      const peak = ws.peakBytes;
      for (const t of [x, out, dout, weight, ...linears.flatMap((l) => [l.value, l.grad])]) t.dispose();
      ws.dispose();
      return peak;
    });
    expect(peaks[1]).toBe(peaks[0]);
    expect(peaks[0]).toBe(4 * tile * (4 * intermediate + 2 * hidden));
    expect(memory().devices.cpu).toBeDefined();
  });

  test('bad input is refused with a code', () => {
    const linear = (outputs: number, inputs: number): TrainedLinear =>
      new TrainedLinear(tensorOf(new Float32Array(inputs * outputs), [outputs, inputs]));
    const all = [linear(6, 4), linear(6, 4), linear(4, 6), linear(5, 4), linear(4, 5)] as const;
    const base = { gateProj: all[0], upProj: all[1], downProj: all[2], activation: 'silu' };
    const norm = tensorOf([1, 1, 1, 1], [4]);
    const code = (over: object): string => {
      try {
        new TiledMLP({ ...base, ...over } as ConstructorParameters<typeof TiledMLP>[0]);
        return 'none';
      } catch (error) {
        return (error as LcError).code;
      }
    };
    expect(code({})).toBe('none');
    expect(code({ upProj: all[3] })).toBe('ERR_LC_SHAPE');
    expect(code({ downProj: all[4] })).toBe('ERR_LC_SHAPE');
    expect(code({ tile: 0 })).toBe('ERR_LC_ARGUMENT');
    expect(code({ tile: Number.NaN })).toBe('ERR_LC_ARGUMENT');
    expect(code({ activation: 'relu' })).toBe('ERR_LC_ARGUMENT');
    expect(code({ activation: 'gptOss' })).toBe('ERR_LC_ARGUMENT');
    expect(code({ norm: { weight: norm, eps: Number.NaN } })).toBe('ERR_LC_ARGUMENT');
    expect(code({ norm: { weight: norm.rows(0, 3), eps: 1 } })).toBe('ERR_LC_SHAPE');
    const mlp = new TiledMLP({ ...base, activation: 'silu' });
    using ws = new Workspace();
    const x = tensorOf(new Float32Array(8), [2, 4]);
    expect(() => mlp.forward(x, x.rows(0, 1), span(2), ws)).toThrow(/TiledMLP.forward: out must be \[2,4\]/);
    for (const t of [norm, x, ...all.flatMap((l) => [l.value, l.grad])]) t.dispose();
  });
});
