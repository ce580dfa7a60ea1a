/**
 * @lc/attention on a GPU against its f64 reference, on inputs that bf16 holds exactly. Allowed: twice the error of the plain bf16 computation, here its
 * strictest form: everything exact except that P and dS (operands of tensor cores), O and dQ are rounded to bf16.
 */
import { attentionBackward, attentionForward, type RopeTable, reference, ropeBackward, ropeForward, ropeInit } from '@lc/attention';
import { copy, type DType, devices, empty, fill, fromTypedArray, Scope, type Tensor, Workspace, zeros } from '@lc/tensor';
import { randomNormal as random } from '../../packages/tensor/src/seeded.js';
import { chooseKernels } from '../../packages/trainer/src/bench/kernels.js';
import { assert, largeTest, test, thin } from './harness.js';
import { values } from './numbers.js';

const bits = new Float32Array(1);
const word = new Uint32Array(bits.buffer);
/** To bf16 and back, ties to even. */
function round(x: number): number {
  bits[0] = x;
  const u = word[0] as number;
  word[0] = (u + 0x7fff + ((u >>> 16) & 1)) & 0xffff0000;
  return bits[0] as number;
}
const lowRandom = (n: number, seed: number, scale = 1): Float32Array => random(n, seed).map((x) => round(x * scale));

interface Case {
  n: number;
  heads: number;
  kvHeads: number;
  headDim: number;
  start?: number;
  window?: number;
  sinks?: boolean;
  documents?: number[];
  scale?: number;
  spread?: number;
}
type Problem = Parameters<typeof reference.backward>[0] & { keys: number };

function makeProblem(c: Case): Problem {
  const { n, heads, kvHeads, headDim, start = 0 } = c;
  const keys = start + n + 3;
  return {
    ...{ n, heads, kvHeads, headDim, start, keys },
    q: lowRandom(n * heads * headDim, 1, c.spread ?? 1),
    k: lowRandom(keys * kvHeads * headDim, 2),
    v: lowRandom(keys * kvHeads * headDim, 3),
    dout: lowRandom(n * heads * headDim, 4),
    window: c.window ?? null,
    sinks: c.sinks ? random(heads, 5).map((x) => x * 2) : null,
    docStart: c.documents
      ? Int32Array.from({ length: n }, (_, i) =>
          (c.documents as number[]).reduce((found, first) => (first <= start + i ? first : found), 0),
        )
      : null,
    ...(c.scale === undefined ? {} : { scale: c.scale }),
  };
}

type Results = Record<'out' | 'lse' | 'dq' | 'dk' | 'dv' | 'dSinks', Float32Array | Float64Array>;
/** `sinkError`: expected error of dSinks, root mean square over the heads. */
type Plain = Results & { sinkError: number };

/**
 * The reference's loops, from its lse, with bf16 rounding of P, dS, O and dQ. `given`: backward starts from this O instead, as a backward pass does; `to`:
 * another rounding, or none.
 */
function plainBf16(p: Problem, lse: ArrayLike<number>, given: ArrayLike<number> | null = null, to = round): Plain {
  const { n, heads, kvHeads, headDim: d, start } = p;
  const scale = p.scale ?? 1 / Math.sqrt(d);
  const group = heads / kvHeads;
  const out = new Float64Array(n * heads * d);
  const dq = new Float64Array(n * heads * d);
  const dk = new Float64Array(p.k.length);
  const dv = new Float64Array(p.v.length);
  const dSinks = new Float64Array(heads);
  let sinkVariance = 0;
  const at = (x: ArrayLike<number>, i: number): number => x[i] as number;
  for (let i = 0; i < n; i++) {
    for (let h = 0; h < heads; h++) {
      const row = (i * heads + h) * d;
      const low = Math.max(p.docStart ? at(p.docStart, i) : 0, p.window ? start + i - p.window + 1 : 0);
      const probs: number[] = [];
      const o = new Float64Array(d);
      for (let j = low; j <= start + i; j++) {
        const key = (j * kvHeads + Math.floor(h / group)) * d;
        let s = 0;
        for (let x = 0; x < d; x++) s += at(p.q, row + x) * at(p.k, key + x);
        const prob = Math.exp(s * scale - at(lse, i * heads + h));
        probs.push(prob);
        const rounded = to(prob);
        for (let x = 0; x < d; x++) o[x] = at(o, x) + rounded * at(p.v, key + x);
      }
      let delta = 0;
      let variance = 0;
      for (let x = 0; x < d; x++) {
        out[row + x] = to(at(o, x));
        variance += (at(o, x) * at(p.dout, row + x) * 2 ** -9) ** 2;
        delta += at(given ?? out, row + x) * at(p.dout, row + x);
      }
      const g = new Float64Array(d);
      for (let j = low; j <= start + i; j++) {
        const key = (j * kvHeads + Math.floor(h / group)) * d;
        let dp = 0;
        for (let x = 0; x < d; x++) dp += at(p.dout, row + x) * at(p.v, key + x);
        const prob = probs[j - low] as number;
        variance += (prob * dp * 2 ** -9) ** 2;
        const ds = to(prob * (dp - delta));
        const rounded = to(prob);
        for (let x = 0; x < d; x++) {
          dv[key + x] = at(dv, key + x) + rounded * at(p.dout, row + x);
          dk[key + x] = at(dk, key + x) + ds * at(p.q, row + x) * scale;
          g[x] = at(g, x) + ds * at(p.k, key + x);
        }
      }
      for (let x = 0; x < d; x++) dq[row + x] = to(at(g, x) * scale);
      if (p.sinks) {
        const share = Math.exp(at(p.sinks, h) - at(lse, i * heads + h));
        dSinks[h] = at(dSinks, h) - share * delta;
        sinkVariance += share * share * variance;
      }
    }
  }
  return { out, lse: Float64Array.from(lse), dq, dk, dv, dSinks, sinkError: Math.sqrt(sinkVariance / heads) };
}

function onGpu(scope: Scope, data: ArrayLike<number>, shape: number[], dtype: DType): Tensor {
  using source = dtype === 'i32' ? fromTypedArray(Int32Array.from(data), shape) : fromTypedArray(Float32Array.from(data), shape);
  const out = scope.own(empty(shape, { dtype, device: 'cuda' }));
  if (dtype === 'bf16') {
    using low = empty(shape, { dtype });
    copy(low, source);
    copy(out, low);
  } else copy(out, source);
  return out;
}

/** Forward over chunks left to right, backward right to left; dk and dv begin as ones. */
async function run(p: Problem, chunks = [p.n], deterministic = true): Promise<Results> {
  using scope = new Scope();
  using ws = new Workspace({ device: 'cuda' });
  const rows = [p.n, p.heads, p.headDim];
  const kv = [p.keys, p.kvHeads, p.headDim];
  const bf16 = (x: ArrayLike<number>, shape: number[]): Tensor => onGpu(scope, x, shape, 'bf16');
  const [q, k, v, dout] = [bf16(p.q, rows), bf16(p.k, kv), bf16(p.v, kv), bf16(p.dout, rows)];
  const sinks = p.sinks ? onGpu(scope, p.sinks, [p.heads], 'f32') : null;
  const docs = p.docStart ? onGpu(scope, p.docStart, [p.n], 'i32') : null;
  const out = scope.own(empty(rows, { dtype: 'bf16', device: 'cuda' }));
  const dq = scope.own(empty(rows, { dtype: 'bf16', device: 'cuda' }));
  const lse = scope.own(empty([p.n, p.heads], { device: 'cuda' }));
  const [dk, dv] = [scope.own(empty(kv, { device: 'cuda' })), scope.own(empty(kv, { device: 'cuda' }))];
  const dSinks = scope.own(zeros([p.heads], { device: 'cuda' }));
  for (const t of [out, dq, lse]) fill(t, Number.NaN);
  for (const t of [dk, dv]) fill(t, 1);
  const spans: [number, number][] = [];
  for (let at = 0, i = 0; at < p.n; i++) {
    const count = Math.min(chunks[i % chunks.length] as number, p.n - at);
    spans.push([at, count]);
    at += count;
  }
  const span = ([at, count]: [number, number]) => ({
    ...{ q: q.rows(at, count), k, v, out: out.rows(at, count), lse: lse.rows(at, count), start: p.start + at },
    ...{ window: p.window ?? null, sinks, docStart: docs?.rows(at, count) ?? null, ws },
    ...(p.scale === undefined ? {} : { scale: p.scale }),
  });
  for (const s of spans) attentionForward(span(s));
  for (const s of spans.reverse())
    attentionBackward({ ...span(s), dout: dout.rows(...s), dq: dq.rows(...s), dk, dv, dSinks: sinks ? dSinks : null, deterministic });
  const minusOne = (x: Float32Array): Float32Array => x.map((y) => y - 1);
  return {
    ...{ out: await values(out), lse: await values(lse), dq: await values(dq) },
    ...{ dk: minusOne(await values(dk)), dv: minusOne(await values(dv)), dSinks: await values(dSinks) },
  };
}

function distance(a: ArrayLike<number>, b: ArrayLike<number>): number {
  let sum = 0;
  for (let i = 0; i < b.length; i++) sum += ((a[i] as number) - (b[i] as number)) ** 2;
  return Math.sqrt(sum / Math.max(1, b.length));
}
const norm = (a: ArrayLike<number>): number => distance(a, new Float64Array(a.length));

let worst = { ratio: 0, where: '' };
const expectations = new WeakMap<Problem, { want: Results; plain: Plain }>();
function expectation(p: Problem): { want: Results; plain: Plain } {
  let found = expectations.get(p);
  if (!found) {
    const { out, lse } = reference.forward(p);
    found = { want: { out, lse, ...reference.backward(p) } as Results, plain: plainBf16(p, lse) };
    expectations.set(p, found);
  }
  return found;
}

/** A Hopper card runs its own kernels where it can; there everything is tested on the portable ones too. */
const onHopper = devices().some((d) => d.device === 'cuda:0' && d.computeCapability === '9.0') && !process.env.LCTX_SMEM_LIMIT;
const paths = onHopper ? ['', 'portable'] : [''];
async function onPath<T>(path: string, fn: () => Promise<T>): Promise<T> {
  using _ = chooseKernels(path ? { LCTX_ATTENTION: path } : {});
  return await fn();
}

/** f32 sums in another order (and dk, dv that begin at 1) are off by some 1e-6 of what they add. */
function check(name: string, p: Problem, got: Results): void {
  const { want, plain } = expectation(p);
  for (const key of Object.keys(want) as (keyof Results)[]) {
    if (key === 'dSinks' && !p.sinks) continue;
    const error = distance(got[key], want[key]);
    const floor = (key === 'lse' ? 2e-6 : 1e-5) * Math.max(1, norm(want[key]));
    // A few heads' dSinks are too few numbers to compare one computation's luck with another's: the expected error, roundings of P and O being independent.
    const allowed = 2 * (key === 'dSinks' ? plain.sinkError : distance(plain[key], want[key])) + floor;
    if (error / allowed > worst.ratio) worst = { ratio: error / allowed, where: `${name}: ${key}` };
    assert(error <= allowed, `${name}: ${key} is off by ${error.toExponential(2)}, allowed ${allowed.toExponential(2)}`);
  }
}

const cases: [string, Case][] = [];
for (const headDim of [32, 64, 96, 128, 192, 256]) {
  for (const n of [1, 7]) cases.push([`${n} tokens, 4/2 heads x ${headDim}`, { n, heads: 4, kvHeads: 2, headDim }]);
  cases.push([`131 tokens, 2 heads x ${headDim}`, { n: 131, heads: 2, kvHeads: 2, headDim }]);
  cases.push([`300 tokens, 1 head x ${headDim}`, { n: 300, heads: 1, kvHeads: 1, headDim }]);
  cases.push(
    [`61 tokens after 190, sinks, 8/2 heads x ${headDim}`, { n: 61, heads: 8, kvHeads: 2, headDim, start: 190, sinks: true }],
    [
      `window 11, documents, sinks, x ${headDim}`,
      { n: 131, heads: 4, kvHeads: 2, headDim, start: 201, window: 11, documents: [0, 150, 201, 202, 240, 241, 300], sinks: true },
    ],
    [`scores beyond 80, x ${headDim}`, { n: 131, heads: 2, kvHeads: 1, headDim, spread: 25, sinks: true }],
  );
}
for (const window of [1, 128, 1000]) {
  cases.push([`window ${window}`, { n: 160, heads: 8, kvHeads: 1, headDim: 64, window, sinks: true, start: 70 }]);
  cases.push([`window ${window}, no groups`, { n: 300, heads: 2, kvHeads: 2, headDim: 64, window, documents: [0, 100, 257] }]);
}
cases.push(
  // Many heads for few tokens: on large cards a block of the windowed backward goes over several blocks of keys.
  [
    'window 40, 72 K/V heads',
    { n: 420, heads: 144, kvHeads: 72, headDim: 16, window: 40, start: 33, documents: [0, 40, 163, 164, 320, 449], sinks: true },
  ],
  ['window 129, group 7', { n: 200, heads: 7, kvHeads: 1, headDim: 64, window: 129, start: 20, sinks: true }],
  ['window 130, group 7', { n: 200, heads: 7, kvHeads: 1, headDim: 64, window: 130, start: 20, sinks: true }],
  ['several documents', { n: 300, heads: 3, kvHeads: 1, headDim: 64, documents: [0, 1, 2, 64, 65, 130, 199], sinks: true }],
  ['documents in the prefix', { n: 130, heads: 7, kvHeads: 1, headDim: 128, start: 300, documents: [0, 37, 301, 364] }],
  ['every token its own document', { n: 70, heads: 2, kvHeads: 1, headDim: 64, documents: Array.from({ length: 70 }, (_, i) => i) }],
  ['3 tokens after 4,100', { n: 3, heads: 2, kvHeads: 1, headDim: 64, start: 4100, documents: [0, 77, 4101], sinks: true }],
  ['one token after 1,000', { n: 1, heads: 16, kvHeads: 2, headDim: 64, start: 1000, sinks: true }],
  ['71 heads on one K/V head', { n: 9, heads: 71, kvHeads: 1, headDim: 32, start: 70, sinks: true }],
  ['head dim 136', { n: 77, heads: 4, kvHeads: 2, headDim: 136, start: 40, sinks: true }],
  ['head dim 208', { n: 77, heads: 4, kvHeads: 1, headDim: 208, window: 20 }],
  ['head dim 80', { n: 77, heads: 4, kvHeads: 2, headDim: 80, sinks: true }],
  ['head dim 8', { n: 77, heads: 4, kvHeads: 2, headDim: 8, start: 33 }],
  ['few keys carry a row', { n: 40, heads: 8, kvHeads: 1, headDim: 64, start: 1000, spread: 6, sinks: true }],
  // Beyond the keys whose maximum is always taken: the reference follows; some rows overflow and are computed again.
  ['few far keys carry a row', { n: 20, heads: 8, kvHeads: 1, headDim: 64, start: 2500, spread: 6, sinks: true }],
  ['few far keys carry a row, x 128', { n: 20, heads: 4, kvHeads: 1, headDim: 128, start: 2500, spread: 6 }],
  ['large scores beyond f32, far', { n: 20, heads: 8, kvHeads: 1, headDim: 64, start: 2500, spread: 250, sinks: true }],
  ['large scores beyond f32 from tile to tile', { n: 500, heads: 8, kvHeads: 1, headDim: 64, spread: 250, sinks: true }],
  ['large scores beyond f32 from tile to tile, x 128', { n: 500, heads: 4, kvHeads: 1, headDim: 128, spread: 250 }],
  // Few scores carry a gradient. Fewer yet (one token's) only below, given O: here one draw of O's rounding would be held against another.
  ['7 tokens, window 1', { n: 7, heads: 4, kvHeads: 2, headDim: 64, window: 1, sinks: true }],
  ['3 tokens, window 2', { n: 3, heads: 8, kvHeads: 1, headDim: 64, window: 2, start: 5, sinks: true }],
  ['scale 0', { n: 140, heads: 2, kvHeads: 2, headDim: 64, scale: 0 }],
  ['negative scale', { n: 140, heads: 2, kvHeads: 2, headDim: 64, scale: -0.3, sinks: true }],
);

test('attention: forward and backward against f64, twice the plain bf16 error; the same bits again', async () => {
  const failures: string[] = [];
  for (const [name, c] of thin(cases, 3)) {
    const p = makeProblem(c);
    for (const path of paths) {
      const what = `${name} ${path}`;
      const got = await onPath(path, () => run(p));
      try {
        check(what, p, got);
        const again = await onPath(path, () => run(p));
        for (const key of Object.keys(got) as (keyof Results)[])
          assert(
            got[key].every((x, i) => Object.is(x, again[key][i])),
            `${what}: ${key} has other bits the second time`,
          );
      } catch (error) {
        failures.push((error as Error).message);
      }
    }
  }
  console.log(`     ${thin(cases, 3).length} cases; largest error over allowed: ${worst.ratio.toFixed(2)} (${worst.where})`);
  assert(failures.length === 0, failures.join('\n'));
});

// From the O that forward wrote: with an exact one, what O's rounding does to delta hides what backward's own does. The more so where few scores are seen.
test('attention: backward is as exact as rounding P, dS and dQ to bf16 alone', async () => {
  const some: Case[] = [];
  for (const headDim of [64, 128]) some.push({ n: 130, heads: 4, kvHeads: 2, headDim, start: 65, sinks: true });
  for (const n of [1, 2, 3, 7]) for (const window of [1, 2]) some.push({ n, heads: 4, kvHeads: 2, headDim: 64, window, sinks: true });
  for (const headDim of [32, 96, 128, 192, 256]) some.push({ n: 7, heads: 4, kvHeads: 2, headDim, window: 1, sinks: true });
  some.push(
    { n: 7, heads: 4, kvHeads: 2, headDim: 64, sinks: true },
    { n: 5, heads: 4, kvHeads: 2, headDim: 64, start: 4100, sinks: true },
  );
  const failures: string[] = [];
  let most = { ratio: 0, where: '' };
  for (const c of some) {
    const p = makeProblem(c);
    for (const path of paths)
      for (const deterministic of c.window ? [true] : [true, false]) {
        const got = await onPath(path, () => run(p, [p.n], deterministic));
        const [want, plain] = [plainBf16(p, got.lse, got.out, (x) => x), plainBf16(p, got.lse, got.out)];
        for (const key of ['dq', 'dk', 'dv'] as const) {
          const [error, alone] = [distance(got[key], want[key]), distance(plain[key], want[key])];
          const where = `${JSON.stringify(c)} ${path}${deterministic ? '' : ' in no order'}: ${key}`;
          const allowed = 1.1 * alone + 1e-6 * Math.max(1, norm(want[key]));
          if (error / allowed > most.ratio) most = { ratio: error / allowed, where };
          if (!(error <= allowed))
            failures.push(`${where} is off by ${error.toExponential(3)}, rounding alone by ${alone.toExponential(3)}`);
        }
      }
  }
  console.log(`     ${some.length} cases; largest error over allowed: ${most.ratio.toFixed(2)} (${most.where})`);
  assert(failures.length === 0, failures.join('\n'));
});

test('attention: backward in no fixed order is as exact; all but dQ keeps its bits', async () => {
  const failures: string[] = [];
  const some = thin(
    cases.filter(([, c]) => c.headDim <= 64 && !c.window),
    3,
  );
  worst = { ratio: 0, where: '' };
  for (const [name, c] of some) {
    const p = makeProblem(c);
    const chunks = c.n > 100 ? [c.n - 61, 61] : [c.n];
    const got = await run(p, chunks, false);
    try {
      check(name, p, got);
      const again = await run(p, chunks, false);
      for (const key of ['dk', 'dv', 'dSinks'] as const)
        assert(
          got[key].every((x, i) => Object.is(x, again[key][i])),
          `${name}: ${key} has other bits the second time`,
        );
    } catch (error) {
      failures.push((error as Error).message);
    }
  }
  console.log(`     ${some.length} cases; largest error over allowed: ${worst.ratio.toFixed(2)} (${worst.where})`);
  assert(failures.length === 0, failures.join('\n'));
});

test('attention: chunks', async () => {
  const p = makeProblem({ n: 300, heads: 4, kvHeads: 2, headDim: 64, window: 90, documents: [0, 111, 112, 250], sinks: true });
  const q = makeProblem({ n: 300, heads: 2, kvHeads: 1, headDim: 64, sinks: true });
  for (const path of paths) {
    check(`chunks ${path}`, p, await onPath(path, () => run(p, [1, 7, 131])));
    check(`long chunks ${path}`, q, await onPath(path, () => run(q, [128])));
  }
});

// Hopper's forward then takes few K/V heads at a time and its blocks keep pace: an order of work, which no sum may notice.
largeTest('attention: where K and V of all heads pass out of the L2 cache, every head has the bits it has alone', async () => {
  for (const [heads, kvHeads, d] of [
    [64, 8, 64],
    [32, 8, 128],
  ] as const) {
    using scope = new Scope();
    using ws = new Workspace({ device: 'cuda' });
    const [n, start] = [3200, 10_000];
    const keys = start + n;
    const noise = lowRandom(999_983, 12);
    const make = (tokens: number, width: number, first: number): Float32Array => {
      const x = new Float32Array(tokens * width);
      for (let at = 0, from = first; at < x.length; at += noise.length - from, from = 0)
        x.set(noise.subarray(from, from + x.length - at), at);
      return x;
    };
    const [q, k, v] = [make(n, heads * d, 0), make(keys, kvHeads * d, 77), make(keys, kvHeads * d, 555_555)];
    const forward = async (x: Float32Array[], heads: number, kvHeads: number): Promise<[Float32Array, Float32Array]> => {
      const [qq, kk, vv] = [
        [n, heads, d],
        [keys, kvHeads, d],
        [keys, kvHeads, d],
      ].map((shape, i) => onGpu(scope, x[i] as Float32Array, shape, 'bf16')) as [Tensor, Tensor, Tensor];
      const [out, lse] = [
        scope.own(empty([n, heads, d], { dtype: 'bf16', device: 'cuda' })),
        scope.own(empty([n, heads], { device: 'cuda' })),
      ];
      for (const t of [out, lse]) fill(t, Number.NaN);
      attentionForward({ q: qq, k: kk, v: vv, out, lse, start, ws });
      return [await values(out), await values(lse)];
    };
    const columns = (x: Float32Array, width: number, from: number, count: number): Float32Array => {
      const y = new Float32Array((x.length / width) * count);
      for (let row = 0; row * width < x.length; row++) y.set(x.subarray(row * width + from, row * width + from + count), row * count);
      return y;
    };
    const [out, lse] = await forward([q, k, v], heads, kvHeads);
    const group = heads / kvHeads;
    for (const head of [0, 3, kvHeads - 1]) {
      const alone = await forward(
        [columns(q, heads * d, head * group * d, group * d), ...[k, v].map((x) => columns(x, kvHeads * d, head * d, d))],
        group,
        1,
      );
      const here = [columns(out, heads * d, head * group * d, group * d), columns(lse, heads, head * group, group)];
      for (const [i, name] of ['out', 'lse'].entries())
        assert(
          (here[i] as Float32Array).every((x, j) => x === (alone[i] as Float32Array)[j]),
          `head dim ${d}, K/V head ${head}: ${name} has other bits`,
        );
    }
  }
});

test('attention: NaN comes out as NaN in its own row; a sink of minus infinity is none', async () => {
  const p = makeProblem({ n: 70, heads: 1, kvHeads: 1, headDim: 64 });
  (p.q as Float32Array)[5 * 64 + 3] = Number.NaN;
  const { out } = await run(p);
  for (let i = 0; i < 70; i++) assert(Number.isNaN(out[i * 64]) === (i === 5), `row ${i}`);
  const a = makeProblem({ n: 70, heads: 2, kvHeads: 1, headDim: 64 });
  const b: Problem = { ...a, sinks: [Number.NEGATIVE_INFINITY, Number.NEGATIVE_INFINITY] };
  const [none, minus] = [await run(a), await run(b)];
  for (const key of ['out', 'lse', 'dq', 'dk', 'dv', 'dSinks'] as const)
    assert(
      none[key].every((x, i) => x === minus[key][i]),
      key,
    );
});

test('attention: LCTX_ATTENTION picks the kernels, or says why not', async () => {
  const forward = (headDim: number, path: string): Promise<string> =>
    onPath(path, async () => {
      using scope = new Scope();
      using ws = new Workspace({ device: 'cuda' });
      const make = (shape: number[], dtype: DType): Tensor => scope.own(zeros(shape, { dtype, device: 'cuda' }));
      const [q, k, v, out] = [5, 5, 5, 5].map((n) => make([n, 2, headDim], 'bf16')) as [Tensor, Tensor, Tensor, Tensor];
      try {
        attentionForward({ q, k, v, out, lse: make([5, 2], 'f32'), start: 0, ws });
        return 'runs';
      } catch (error) {
        return `${(error as { code?: string }).code}: ${(error as Error).message}`;
      }
    });
  for (const headDim of [32, 64, 128]) assert((await forward(headDim, 'portable')) === 'runs', 'portable');
  for (const [got, want] of [
    [await forward(64, 'hopper'), onHopper ? /^runs$/ : /^ERR_LC_DEVICE.*(compute capability 9\.0|no code for Hopper|LCTX_SMEM_LIMIT)/],
    [await forward(128, 'hopper'), onHopper ? /^runs$/ : /^ERR_LC_DEVICE/],
    [await forward(32, 'hopper'), /^ERR_LC_DEVICE.*LCTX_ATTENTION=hopper: .*unset it/],
    [await forward(64, 'fast'), /^ERR_LC_ARGUMENT.*'portable' or 'hopper'/],
  ] as const)
    assert(want.test(got), got);
});

test('attention: what a GPU does not take is refused', () => {
  using scope = new Scope();
  using ws = new Workspace({ device: 'cuda' });
  const make = (shape: number[], dtype: DType = 'bf16', device: 'cpu' | 'cuda' = 'cuda'): Tensor =>
    scope.own(empty(shape, { dtype, device }));
  const call = (d: number, changes: Record<string, unknown> = {}): string => {
    const [q, k, v, out] = [make([3, 2, d]), make([3, 2, d]), make([3, 2, d]), make([3, 2, d])];
    try {
      attentionForward({ q, k, v, out, lse: make([3, 2], 'f32'), start: 0, ws, ...changes });
      return 'nothing';
    } catch (error) {
      return `${(error as { code?: string }).code}: ${(error as Error).message}`;
    }
  };
  for (const [got, want] of [
    [call(264), /^ERR_LC_SHAPE.*multiple of 8 up to 256, got 264/],
    [call(20), /^ERR_LC_SHAPE.*multiple of 8/],
    [call(64, { q: make([3, 2, 64], 'f32') }), /^ERR_LC_DTYPE.*bf16 on a GPU/],
    [call(64, { docStart: make([3], 'i32', 'cpu') }), /^ERR_LC_DEVICE/],
    [call(64, { k: make([3, 3, 44]).view([396]).rows(4, 384).view([3, 2, 64]) }), /^ERR_LC_STRIDES.*multiples of 16/],
  ] as const)
    assert(want.test(got), got);
});

largeTest('attention: keys and queries beyond 2^31 elements', async () => {
  using scope = new Scope();
  using ws = new Workspace({ device: 'cuda' });
  const [heads, kvHeads, d, n] = [8, 8, 64, 70];
  const make = (shape: number[], dtype: DType): Tensor => scope.own(empty(shape, { dtype, device: 'cuda' }));
  const small = 128;
  const far = 4_300_800 + small; // a multiple of every tile further on: the same sums in the same order
  const bf16 = (x: ArrayLike<number>, shape: number[]): Tensor => onGpu(scope, x, shape, 'bf16');
  const tail = [small + n, kvHeads, d];
  const [k, v] = [bf16(lowRandom((tail[0] as number) * kvHeads * d, 6), tail), bf16(lowRandom((tail[0] as number) * kvHeads * d, 7), tail)];
  const [q, dout] = [bf16(lowRandom(n * heads * d, 8), [n, heads, d]), bf16(lowRandom(n * heads * d, 9), [n, heads, d])];
  const results: Float32Array[][] = [];
  for (const start of [small, far]) {
    const shape = [start + n, kvHeads, d];
    const [kk, vv, dk, dv] = [make(shape, 'bf16'), make(shape, 'bf16'), make(shape, 'f32'), make(shape, 'f32')];
    const last = (t: Tensor): Tensor => t.rows(start - small, small + n);
    copy(last(kk), k);
    copy(last(vv), v);
    for (const t of [dk, dv]) fill(last(t), 0);
    const [out, dq, lse] = [make([n, heads, d], 'bf16'), make([n, heads, d], 'bf16'), make([n, heads], 'f32')];
    const common = { q, k: kk, v: vv, out, lse, start, window: 100, ws };
    attentionForward(common);
    attentionBackward({ ...common, dout, dq, dk, dv });
    results.push([await values(out), await values(lse), await values(dq), await values(last(dk)), await values(last(dv))]);
    for (const t of [kk, vv, dk, dv]) t.dispose();
  }
  const [near, there] = results as [Float32Array[], Float32Array[]];
  near.forEach((x, i) => {
    assert(
      x.every((y, j) => Object.is(y, there[i]?.[j])),
      `result ${i} differs at start ${far}`,
    );
  });

  const tokens = 540_000; // x 64 heads x 64: window 1 makes out = v
  const big = make([tokens, 64, d], 'bf16');
  fill(big, 0);
  const one = make([tokens, 1, d], 'bf16');
  fill(one, 0.5);
  copy(one.rows(tokens - 3, 3), bf16(lowRandom(3 * d, 10), [3, 1, d]));
  attentionForward({ q: big, k: one, v: one, out: big, lse: make([tokens, 64], 'f32'), start: 0, window: 1, ws });
  const want = await values(one.rows(tokens - 3, 3));
  const got = await values(big.rows(tokens - 3, 3));
  for (let i = 0; i < got.length; i++)
    assert(got[i] === want[Math.floor(i / (64 * d)) * d + (i % d)], `element ${i} of the last rows: ${got[i]}`);
});

test('RoPE: rows at any position, partial, both directions', async () => {
  const tables: [RopeTable, number][] = [
    [ropeInit({ ropeType: 'default', ropeTheta: 10000 }, { headDim: 64, maxPositionEmbeddings: 4096 }), 64],
    [ropeInit({ ropeType: 'default', ropeTheta: 10000, partialRotaryFactor: 0.25 }, { headDim: 96, maxPositionEmbeddings: 4096 }), 96],
    [
      ropeInit(
        { ropeType: 'yarn', ropeTheta: 150000, factor: 32, originalMaxPositionEmbeddings: 4096, truncate: false },
        { headDim: 64, maxPositionEmbeddings: 131072 },
      ),
      64,
    ],
    [ropeInit({ ropeType: 'default', ropeTheta: 10000, partialRotaryFactor: 0.5 }, { headDim: 20, maxPositionEmbeddings: 4096 }), 20],
  ];
  for (const [rope, headDim] of tables)
    for (const start of [0, 1_000_003, 16_000_000])
      for (const dtype of ['bf16', 'f32'] as const)
        for (const docs of [null, Int32Array.from({ length: 37 }, (_, i) => start + (i < 11 ? -Math.min(start, 7) : 11))]) {
          using scope = new Scope();
          const [n, heads] = [37, 3];
          const x = lowRandom(n * heads * headDim, 11);
          const docStart = docs ? onGpu(scope, docs, [n], 'i32') : null;
          const p = { x, n, heads, headDim, start, docStart: docs, rope };
          for (const [op, want] of [
            [ropeForward, reference.ropeForward(p)],
            [ropeBackward, reference.ropeBackward(p)],
          ] as const) {
            const t = onGpu(scope, x, [n, heads, headDim], dtype);
            op({ x: t, start, docStart, rope });
            const got = await values(t);
            for (let i = 0; i < want.length; i++) {
              const w = want[i] as number;
              // One rounding; f32: of sums of two products. Twice 2^-9 where the result is near a tie is not needed: the f32 error moves it by one ulp at most.
              const allowed = dtype === 'bf16' ? Math.abs(w) * 2 ** -8 + 1e-6 : 3e-6;
              assert(Math.abs((got[i] as number) - w) <= allowed, `${dtype}, start ${start}: element ${i} is ${got[i]}, expected ${w}`);
            }
          }
        }
});
