/**
 * MLPs, experts and LoRA on odd shapes (1, 7 and 131 tokens, widths that are no multiple of 8) against f64, on inputs that bf16 holds exactly. Allowed: twice
 * the error of the plain bf16 computation, which is the same f64 loops with every tensor that is stored between two products rounded to bf16. Errors of several
 * draws are pooled, so that a few numbers' luck does not decide.
 */
import { LoraLinear } from '@lc/qlora';
import { copy, type DType, empty, fill, fromTypedArray, PlainExpertLinear, PlainLinear, Scope, type Tensor, Workspace } from '@lc/tensor';
import { TiledMLP, TiledMoE } from '@lc/tiled-mlp';
import { randomNormal } from '../../packages/tensor/src/seeded.js';
import { assert, small, test, thin } from './harness.js';
import { values } from './numbers.js';

type Numbers = ArrayLike<number>;
type Round = (x: number) => number;
const at = (x: Numbers, i: number): number => x[i] as number;
const exact: Round = (x) => x;
const word = new Uint32Array(1);
const float = new Float32Array(word.buffer);
/** To bf16 and back, ties to even. */
const bf16: Round = (x) => {
  float[0] = x;
  const u = word[0] as number;
  word[0] = (u + 0x7fff + ((u >>> 16) & 1)) & 0xffff0000;
  return float[0] as number;
};
const draw = (n: number, seed: number, std = 1): Float32Array => randomNormal(n, seed, std).map(bf16);

/** a [m, k] by b [n, k] (or [k, n] with `plain`), each sum rounded by `r`. */
function product(a: Numbers, b: Numbers, m: number, n: number, k: number, r: Round, plain = false): Float64Array {
  return Float64Array.from({ length: m * n }, (_, i) => {
    const [row, column] = [Math.floor(i / n), i % n];
    let sum = 0;
    for (let p = 0; p < k; p++) sum += at(a, row * k + p) * at(b, plain ? p * n + column : column * k + p);
    return r(sum);
  });
}
const transposed = (a: Numbers, rows: number, columns: number): Float64Array =>
  Float64Array.from({ length: rows * columns }, (_, i) => at(a, (i % rows) * columns + Math.floor(i / rows)));
const sigmoid = (x: number): number => 1 / (1 + Math.exp(-x));

type Results = Record<string, Numbers>;

function denseMlp(
  p: Record<'x' | 'dout' | 'gate' | 'up' | 'down', Float32Array>,
  n: number,
  hidden: number,
  inner: number,
  r: Round,
): Results {
  const g = product(p.x, p.gate, n, inner, hidden, r);
  const u = product(p.x, p.up, n, inner, hidden, r);
  const act = g.map((v, i) => r(v * sigmoid(v) * at(u, i)));
  const dact = product(p.dout, p.down, n, inner, hidden, r, true);
  const dg = dact.map((d, i) => r(d * at(u, i) * sigmoid(at(g, i)) * (1 + at(g, i) * (1 - sigmoid(at(g, i))))));
  const du = dact.map((d, i) => r(d * at(g, i) * sigmoid(at(g, i))));
  const fromGate = product(dg, p.gate, n, hidden, inner, r, true);
  const fromUp = product(du, p.up, n, hidden, inner, exact, true);
  return { out: product(act, p.down, n, hidden, inner, r), dx: fromGate.map((v, i) => r(v + at(fromUp, i))) };
}

function lora(
  p: Record<'x' | 'dout' | 'w' | 'a' | 'b', Float32Array>,
  n: number,
  inner: number,
  outer: number,
  rank: number,
  r: Round,
): Results {
  const scale = 2;
  const [a, b] = [p.a.map(r), p.b.map(r)]; // the parameters' compute copies
  const h = product(p.x, a, n, rank, inner, r);
  const base = product(p.x, p.w, n, outer, inner, r);
  const update = product(h, b, n, outer, rank, exact);
  const dh = product(p.dout, b, n, rank, outer, exact, true).map((v) => r(scale * v));
  const through = product(p.dout, p.w, n, inner, outer, r, true);
  const extra = product(dh, a, n, inner, rank, exact, true);
  return {
    out: base.map((v, i) => r(v + scale * at(update, i))),
    dx: through.map((v, i) => r(v + at(extra, i))),
    da: product(transposed(dh, n, rank), transposed(p.x, n, inner), rank, inner, n, exact),
    db: product(transposed(p.dout, n, outer), transposed(h, n, rank), outer, rank, n, exact).map((v) => scale * v),
  };
}

interface Experts {
  count: number;
  topK: number;
  kind: 'gpt-oss' | 'qwen3-moe';
}
type ExpertInputs = Record<'x' | 'dout' | 'router' | 'routerBias' | 'gateUp' | 'gateUpBias' | 'down' | 'downBias', Float32Array>;

function experts(p: ExpertInputs, n: number, hidden: number, inner: number, { count, topK, kind }: Experts, r: Round): Results {
  const gpt = kind === 'gpt-oss';
  const [out, dx] = [new Float64Array(n * hidden), new Float64Array(n * hidden)];
  for (let t = 0; t < n; t++) {
    const x = p.x.subarray(t * hidden, (t + 1) * hidden);
    const dout = p.dout.subarray(t * hidden, (t + 1) * hidden);
    const logits = product(x, p.router, 1, count, hidden, exact).map((v, e) => v + (gpt ? at(p.routerBias, e) : 0)); // f32 on both sides
    const ids = [...logits.keys()].sort((a, b) => at(logits, b) - at(logits, a)).slice(0, topK);
    const top = ids.map((e) => Math.exp(at(logits, e) - at(logits, ids[0] as number)));
    const sum = top.reduce((s, v) => s + v, 0);
    const weights = top.map((v) => v / sum);
    const shares: number[] = [];
    const [y, dh] = [new Float64Array(hidden), new Float64Array(hidden)];
    ids.forEach((e, k) => {
      const w = at(weights, k);
      const gateUp = p.gateUp.subarray(e * 2 * inner * hidden, (e + 1) * 2 * inner * hidden);
      const down = p.down.subarray(e * hidden * inner, (e + 1) * hidden * inner);
      const both = product(x, gateUp, 1, 2 * inner, hidden, r).map((v, i) => (gpt ? r(v + at(p.gateUpBias, e * 2 * inner + i)) : v));
      const gate = (j: number): number => at(both, gpt ? 2 * j : j);
      const up = (j: number): number => at(both, gpt ? 2 * j + 1 : inner + j);
      const act = new Float64Array(inner);
      const dBoth = new Float64Array(2 * inner);
      const dy = dout.map((v) => r(w * v));
      const dact = product(dy, down, 1, inner, hidden, r, true);
      for (let j = 0; j < inner; j++) {
        let [g, u] = [gate(j), up(j)];
        if (gpt) {
          const [dg, du] = [g < 7 ? 1 : 0, Math.abs(u) < 7 ? 1 : 0];
          g = Math.min(g, 7);
          u = Math.max(-7, Math.min(7, u));
          const s = sigmoid(1.702 * g);
          act[j] = r((u + 1) * g * s);
          dBoth[2 * j] = r(at(dact, j) * (u + 1) * s * (1 + 1.702 * g * (1 - s)) * dg);
          dBoth[2 * j + 1] = r(at(dact, j) * g * s * du);
        } else {
          const s = sigmoid(g);
          act[j] = r(g * s * u);
          dBoth[j] = r(at(dact, j) * u * s * (1 + g * (1 - s)));
          dBoth[inner + j] = r(at(dact, j) * g * s);
        }
      }
      const rows = product(act, down, 1, hidden, inner, r);
      const back = product(dBoth, gateUp, 1, hidden, 2 * inner, r, true);
      let share = 0;
      for (let j = 0; j < inner; j++) share += at(dact, j) * at(act, j);
      for (let j = 0; j < hidden; j++) {
        const bias = gpt ? at(p.downBias, e * hidden + j) : 0;
        y[j] = at(y, j) + w * (at(rows, j) + bias);
        share += at(dy, j) * bias;
        dh[j] = at(dh, j) + at(back, j);
      }
      shares.push(share);
    });
    const total = shares.reduce((s, v) => s + v, 0);
    for (let j = 0; j < hidden; j++) {
      let viaRouter = 0;
      ids.forEach((e, k) => {
        viaRouter += (at(shares, k) - at(weights, k) * total) * at(p.router, e * hidden + j);
      });
      out[t * hidden + j] = r(at(y, j));
      dx[t * hidden + j] = r(r(at(dh, j)) + viaRouter);
    }
  }
  return { out, dx };
}

function onGpu(scope: Scope, data: Float32Array, shape: number[], dtype: DType = 'bf16'): Tensor {
  using source = fromTypedArray(data, shape);
  using low = empty(shape, { dtype });
  copy(low, source);
  const out = scope.own(empty(shape, { dtype, device: 'cuda' }));
  copy(out, low);
  return out;
}
/** Sums of squares over all draws of one shape: ours and the plain computation's distance to f64, and f64's size. */
type Pool = Map<string, { ours: number; plain: number; size: number }>;
function pool(into: Pool, got: Results, want: Results, plain: Results): void {
  for (const [key, w] of Object.entries(want)) {
    const sums = into.get(key) ?? { ours: 0, plain: 0, size: 0 };
    for (let i = 0; i < w.length; i++) {
      sums.ours += (at(got[key] as Numbers, i) - at(w, i)) ** 2;
      sums.plain += (at(plain[key] as Numbers, i) - at(w, i)) ** 2;
      sums.size += at(w, i) ** 2;
    }
    into.set(key, sums);
  }
}
let worst = 0;
function check(what: string, sums: Pool): void {
  for (const [key, { ours, plain, size }] of sums) {
    const [error, allowed] = [Math.sqrt(ours / size), 2 * Math.sqrt(plain / size) + 1e-6]; // 1e-6: f32 sums in another order
    worst = Math.max(worst, error / allowed);
    assert(
      error <= allowed,
      `${what}: ${key} is off by ${error.toExponential(2)}, twice the plain bf16 error is ${allowed.toExponential(2)}`,
    );
  }
}

const span = (n: number) => ({ start: 0, length: n, docStart: null });
const DRAWS = small ? 3 : 6;
const shapes: [number, number, number][] = [1, 7, 131].flatMap((n) => [
  [n, 20, 36],
  [n, 33, 13],
  [n, 64, 96],
]);

test('odd shapes, twice the plain bf16 error: dense MLP', async () => {
  worst = 0;
  for (const [n, hidden, inner] of thin(shapes, 2)) {
    const sums: Pool = new Map();
    for (let seed = 0; seed < DRAWS; seed++) {
      using scope = new Scope();
      using ws = new Workspace({ device: 'cuda' });
      const p = {
        x: draw(n * hidden, seed),
        dout: draw(n * hidden, seed + 100),
        gate: draw(inner * hidden, seed + 200, hidden ** -0.5),
        up: draw(inner * hidden, seed + 300, hidden ** -0.5),
        down: draw(inner * hidden, seed + 400, inner ** -0.5),
      };
      const linear = (w: Float32Array, o: number, i: number): PlainLinear => new PlainLinear({ weight: onGpu(scope, w, [o, i]) });
      const mlp = new TiledMLP({
        gateProj: linear(p.gate, inner, hidden),
        upProj: linear(p.up, inner, hidden),
        downProj: linear(p.down, hidden, inner),
        activation: 'silu',
        tile: 50,
      });
      const [out, dx] = [onGpu(scope, p.x, [n, hidden]), onGpu(scope, p.x, [n, hidden])];
      for (const t of [out, dx]) fill(t, Number.NaN);
      const x = onGpu(scope, p.x, [n, hidden]);
      mlp.forward(x, out, span(n), ws);
      mlp.backward(x, onGpu(scope, p.dout, [n, hidden]), dx, span(n), ws);
      const got = { out: await values(out), dx: await values(dx) };
      pool(sums, got, denseMlp(p, n, hidden, inner, exact), denseMlp(p, n, hidden, inner, bf16));
    }
    check(`${n} tokens, ${hidden} x ${inner}`, sums);
  }
  console.log(`     largest error over allowed: ${worst.toFixed(2)}`);
});

test('odd shapes, twice the plain bf16 error: LoRA', async () => {
  worst = 0;
  for (const [n, inner, outer] of thin(shapes, 2)) {
    const sums: Pool = new Map();
    for (let seed = 0; seed < DRAWS; seed++) {
      using scope = new Scope();
      using ws = new Workspace({ device: 'cuda' });
      const rank = 3 + (seed % 3) * 5; // 3, 8, 13
      const p = {
        x: draw(n * inner, seed),
        dout: draw(n * outer, seed + 100),
        w: draw(outer * inner, seed + 200, inner ** -0.5),
        a: randomNormal(rank * inner, seed + 300, inner ** -0.5),
        b: randomNormal(outer * rank, seed + 400, rank ** -0.5),
      };
      const base = new PlainLinear({ weight: onGpu(scope, p.w, [outer, inner]) });
      const linear = scope.own(new LoraLinear({ base, r: rank, loraAlpha: 2 * rank, name: 'probe', device: 'cuda' }));
      copy(linear.a.value, onGpu(scope, p.a, [rank, inner], 'f32'));
      copy(linear.b.value, onGpu(scope, p.b, [outer, rank], 'f32'));
      const [x, dout] = [onGpu(scope, p.x, [n, inner]), onGpu(scope, p.dout, [n, outer])];
      const [out, dx] = [onGpu(scope, p.dout, [n, outer]), onGpu(scope, p.x, [n, inner])];
      for (const t of [out, dx]) fill(t, Number.NaN);
      linear.forward(x, out, span(n), ws);
      linear.backward(x, dout, dx, span(n), ws);
      const got = { out: await values(out), dx: await values(dx), da: await values(linear.a.grad), db: await values(linear.b.grad) };
      pool(sums, got, lora(p, n, inner, outer, rank, exact), lora(p, n, inner, outer, rank, bf16));
    }
    check(`${n} tokens, ${inner} to ${outer}`, sums);
  }
  console.log(`     largest error over allowed: ${worst.toFixed(2)}`);
});

for (const kind of ['gpt-oss', 'qwen3-moe'] as const) {
  test(`odd shapes, twice the plain bf16 error: experts, ${kind}`, async () => {
    worst = 0;
    for (const [n, hidden, inner] of thin(shapes, 2)) {
      const sums: Pool = new Map();
      for (let seed = 0; seed < DRAWS; seed++) {
        using scope = new Scope();
        using ws = new Workspace({ device: 'cuda' });
        const [count, topK] = seed % 2 ? [5, 2] : [8, 3];
        const gpt = kind === 'gpt-oss';
        const p: ExpertInputs = {
          x: draw(n * hidden, seed),
          dout: draw(n * hidden, seed + 100),
          router: draw(count * hidden, seed + 200, hidden ** -0.5),
          routerBias: draw(count, seed + 300, 0.3),
          gateUp: draw(count * 2 * inner * hidden, seed + 400, hidden ** -0.5),
          gateUpBias: draw(count * 2 * inner, seed + 500, 0.3),
          down: draw(count * hidden * inner, seed + 600, inner ** -0.5),
          downBias: draw(count * hidden, seed + 700, 0.3),
        };
        const expert = (w: Float32Array, o: number, i: number): PlainExpertLinear =>
          new PlainExpertLinear({ weight: onGpu(scope, w, [count, o, i]) });
        const moe = new TiledMoE({
          kind,
          router: {
            weight: onGpu(scope, p.router, [count, hidden], 'f32'),
            bias: gpt ? onGpu(scope, p.routerBias, [count], 'f32') : null,
          },
          gateUp: expert(p.gateUp, 2 * inner, hidden),
          gateUpBias: gpt ? onGpu(scope, p.gateUpBias, [count, 2 * inner]) : null,
          down: expert(p.down, hidden, inner),
          downBias: gpt ? onGpu(scope, p.downBias, [count, hidden]) : null,
          topK,
          tile: 50,
        });
        const [x, dout] = [onGpu(scope, p.x, [n, hidden]), onGpu(scope, p.dout, [n, hidden])];
        const [out, dx] = [onGpu(scope, p.x, [n, hidden]), onGpu(scope, p.x, [n, hidden])];
        for (const t of [out, dx]) fill(t, Number.NaN);
        moe.forward(x, out, span(n), ws);
        moe.backward(x, dout, dx, span(n), ws);
        const e = { count, topK, kind };
        pool(
          sums,
          { out: await values(out), dx: await values(dx) },
          experts(p, n, hidden, inner, e, exact),
          experts(p, n, hidden, inner, e, bf16),
        );
      }
      check(`${n} tokens, ${hidden} x ${inner}`, sums);
    }
    console.log(`     largest error over allowed: ${worst.toFixed(2)}`);
  });
}
