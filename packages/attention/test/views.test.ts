import { empty, fromTypedArray, memory, Workspace, zeros } from '@lc/tensor';
import { expectNoLeaks, randomNormal } from '@lc/tensor/testing';
import { expect, test } from 'vitest';
import { attentionBackward, attentionForward, attentionWorkspaceBytes, ropeForward, ropeInit } from '../src/index.js';
import { native } from '../src/native.js';
import { dqSumFloats, hopperFloats } from '../src/plan.js';
import { makeProblem, run } from './cases.js';

expectNoLeaks();

const [n, heads, kvHeads, headDim] = [150, 4, 2, 16];
const width = (heads + 2 * kvHeads) * headDim;

test('q, k, v, out and their gradients may be slices of fused buffers, with the same bits', () => {
  const p = makeProblem({ n, heads, kvHeads, headDim });
  const want = run(p);
  const fused = new Float32Array(n * width);
  for (let i = 0; i < n; i++) {
    fused.set(p.q.subarray(i * heads * headDim, (i + 1) * heads * headDim), i * width);
    fused.set(p.k.subarray(i * kvHeads * headDim, (i + 1) * kvHeads * headDim), i * width + heads * headDim);
    fused.set(p.v.subarray(i * kvHeads * headDim, (i + 1) * kvHeads * headDim), i * width + (heads + kvHeads) * headDim);
  }
  using ws = new Workspace();
  using qkv = fromTypedArray(fused, [n, width]);
  using dqkv = zeros([n, width]);
  using wide = empty([n, 2 * heads * headDim]);
  using lse = empty([n, heads]);
  const split = (t: typeof qkv) =>
    [
      t.slice(1, 0, heads * headDim).view([n, heads, headDim]),
      t.slice(1, heads * headDim, kvHeads * headDim).view([n, kvHeads, headDim]),
      t.slice(1, (heads + kvHeads) * headDim, kvHeads * headDim).view([n, kvHeads, headDim]),
    ] as const;
  const [q, k, v] = split(qkv);
  const [dq, dk, dv] = split(dqkv);
  const out = wide.slice(1, 0, heads * headDim).view([n, heads, headDim]);
  const dout = wide.slice(1, heads * headDim, heads * headDim).view([n, heads, headDim]);
  const wideData = wide.data() as Float32Array;
  for (let i = 0; i < n; i++) wideData.set(p.dout.subarray(i * heads * headDim, (i + 1) * heads * headDim), (2 * i + 1) * heads * headDim);
  attentionForward({ q, k, v, out, lse, start: 0, ws });
  attentionBackward({ q, k, v, out, lse, dout, dq, dk, dv, start: 0, ws });
  const rows = (data: Float32Array, rowWidth: number, from: number, count: number): Float32Array => {
    const got = new Float32Array(n * count);
    for (let i = 0; i < n; i++) got.set(data.subarray(i * rowWidth + from, i * rowWidth + from + count), i * count);
    return got;
  };
  const d = dqkv.data() as Float32Array;
  expect(rows(wideData, 2 * heads * headDim, 0, heads * headDim)).toEqual(want.out);
  expect(rows(d, width, 0, heads * headDim)).toEqual(want.dq);
  expect(rows(d, width, heads * headDim, kvHeads * headDim)).toEqual(want.dk);
  expect(rows(d, width, (heads + kvHeads) * headDim, kvHeads * headDim)).toEqual(want.dv);
});

test('dk, dv and dSinks are added to, dq is overwritten, keys beyond the chunk are left alone', () => {
  const p = makeProblem({ n: 20, heads: 2, kvHeads: 1, headDim: 16, start: 3, extraKeys: 2, sinks: true });
  const want = run(p);
  using ws = new Workspace();
  const given = (x: ArrayLike<number>, shape: number[]) => fromTypedArray(Float32Array.from(x), shape);
  using q = given(p.q, [20, 2, 16]);
  using k = given(p.k, [25, 1, 16]);
  using v = given(p.v, [25, 1, 16]);
  using dout = given(p.dout, [20, 2, 16]);
  using out = given(want.out, [20, 2, 16]);
  using lse = given(want.lse, [20, 2]);
  using sinks = given(p.sinks as ArrayLike<number>, [2]);
  const filled = (shape: number[], value: number) => given(new Float32Array(shape.reduce((a, b) => a * b)).fill(value), shape);
  using dq = filled([20, 2, 16], Number.NaN);
  using dk = filled([25, 1, 16], 1);
  using dv = filled([25, 1, 16], 2);
  using dSinks = filled([2], 3);
  attentionBackward({ q, k, v, out, lse, dout, dq, dk, dv, dSinks, sinks, start: 3, ws });
  expect(dq.data()).toEqual(want.dq);
  const close = (got: ArrayLike<number>, base: ArrayLike<number>, add: number) =>
    Array.from(got).forEach((g, i) => expect(Math.abs(g - add - (base[i] as number))).toBeLessThan(1e-5));
  close(dk.data() as Float32Array, want.dk, 1);
  close(dv.data() as Float32Array, want.dv, 2);
  close(dSinks.data() as Float32Array, want.dSinks, 3);
  expect(Array.from((dk.data() as Float32Array).subarray(23 * 16))).toEqual(new Array(32).fill(1));
});

test('a second call makes no allocation, and the workspace takes what attentionWorkspaceBytes says', () => {
  const shape = { tokens: 700, heads: 4, kvHeads: 2, headDim: 32, start: 600 };
  const bytes = attentionWorkspaceBytes(shape);
  using ws = new Workspace({ bytes: bytes.backward, fixed: true });
  const [rows, kv] = [
    [700, 4, 32],
    [1300, 2, 32],
  ];
  using q = fromTypedArray(randomNormal(700 * 4 * 32, 1), rows);
  using k = fromTypedArray(randomNormal(1300 * 2 * 32, 2), kv);
  using v = fromTypedArray(randomNormal(1300 * 2 * 32, 3), kv);
  using out = empty(rows);
  using dq = empty(rows);
  using lse = empty([700, 4]);
  using dk = zeros(kv);
  using dv = zeros(kv);
  attentionForward({ q, k, v, out, lse, start: 600, ws });
  expect(ws.peakBytes).toBe(bytes.forward);
  const before = memory().devices.cpu?.allocations;
  attentionBackward({ q, k, v, out, lse, dout: out, dq, dk, dv, start: 600, ws });
  attentionForward({ q, k, v, out, lse, start: 600, ws });
  expect(memory().devices.cpu?.allocations).toBe(before);
  expect(ws.peakBytes).toBe(bytes.backward);
  expect(ws.usedBytes).toBe(0);
});

test('the workspace does not grow with the prefix', () => {
  const shape = { tokens: 4096, heads: 64, kvHeads: 8, headDim: 64 };
  expect(attentionWorkspaceBytes({ ...shape, start: 500_000 })).toEqual(attentionWorkspaceBytes({ ...shape, start: 50_000 }));
});

const code = (fn: () => void): string => {
  try {
    fn();
  } catch (e) {
    expect(e).toBeInstanceOf(TypeError);
    return `${(e as { code: string }).code}: ${(e as Error).message}`;
  }
  return 'no error';
};

test('on a GPU dQ without a fixed order takes f32 scratch for all of it, in whole tiles', () => {
  const base = { tokens: 1000, heads: 64, kvHeads: 8, headDim: 64, start: 0, device: 'cuda' as const };
  expect(dqSumFloats(base)).toBe(0);
  const any = { ...base, deterministic: false };
  expect(dqSumFloats(any)).toBe(1000 * 64 * 64);
  expect(dqSumFloats({ ...any, headDim: 40 })).toBe(1000 * 64 * 64);
  expect(dqSumFloats({ ...any, tokens: 7, heads: 6, kvHeads: 2, headDim: 32 })).toBe(2 * 64 * 32);
  for (const changes of [{ window: 128 }, { headDim: 128 }]) expect(dqSumFloats({ ...any, ...changes })).toBe(0);
  const cpu = { tokens: 1000, heads: 4, kvHeads: 2, headDim: 64, start: 0 };
  expect(attentionWorkspaceBytes({ ...cpu, deterministic: false })).toEqual(attentionWorkspaceBytes(cpu));
});

test('Hopper cards sum dQ in f32 scratch whatever the order; without a card the larger scratch is planned', () => {
  const base = { tokens: 1000, heads: 64, kvHeads: 8, headDim: 64, start: 0, device: 'cuda' as const };
  expect(hopperFloats(base, true)).toBe(64 * 1024 * (64 + 2) + 8 + 64 * 8 + 1);
  expect(hopperFloats({ ...base, tokens: 1, heads: 3, headDim: 80 }, true)).toBe(3 * 64 * (128 + 2) + 4 + 3 + 1);
  expect(hopperFloats(base, false)).toBe(0);
  expect(hopperFloats({ ...base, headDim: 136 }, true)).toBe(0);
  for (const few of [{ window: 129 }, { tokens: 129 }, { tokens: 9, start: 120, window: 1000 }])
    expect(hopperFloats({ ...base, ...few }, true)).toBe(0);
  const more = [{ window: 130 }, { tokens: 130 }, { window: 128, headDim: 72 }, { window: 128, heads: 65, kvHeads: 1 }];
  for (const changes of more) expect(hopperFloats({ ...base, ...changes }, true)).toBeGreaterThan(0);
  if (native().hopper() !== null) return;
  for (const deterministic of [true, false])
    expect(attentionWorkspaceBytes({ ...base, deterministic }).backward).toBeGreaterThan(hopperFloats(base, true) * 4);
});

test('bad input is a typed error that says what was expected', () => {
  using ws = new Workspace();
  using q = zeros([5, 4, 16]);
  using k = zeros([8, 2, 16]);
  using out = empty([5, 4, 16]);
  using lse = empty([5, 4]);
  using odd = zeros([8, 3, 16]);
  using bytes = zeros([5, 4, 16], { dtype: 'u8' });
  using sinks = zeros([3]);
  const base = { q, k, v: k, out, lse, start: 3, ws };
  const bad = (change: object): string => code(() => attentionForward({ ...base, ...change }));
  expect(code(() => attentionForward(base))).toBe('no error');
  expect(bad({ start: 4 })).toMatch(/ERR_LC_SHAPE.*queries 4\.\.9 need as many keys, but k holds 8/);
  expect(bad({ start: -1 })).toMatch(/ERR_LC_ARGUMENT.*start/);
  expect(bad({ start: Number.NaN })).toMatch(/ERR_LC_ARGUMENT.*start/);
  expect(bad({ k: odd, v: odd })).toMatch(/ERR_LC_SHAPE.*multiple/);
  expect(bad({ v: odd })).toMatch(/ERR_LC_SHAPE: attentionForward: v must be/);
  expect(bad({ q: bytes })).toMatch(/ERR_LC_DTYPE.*q must be f32/);
  expect(bad({ sinks })).toMatch(/ERR_LC_SHAPE.*sinks must be f32\[4\]/);
  expect(bad({ window: 0 })).toMatch(/ERR_LC_ARGUMENT.*window/);
  expect(bad({ window: 2.5 })).toMatch(/ERR_LC_ARGUMENT.*window/);
  expect(bad({ scale: Number.NaN })).toMatch(/ERR_LC_ARGUMENT.*scale/);
  expect(bad({ lse: out })).toMatch(/ERR_LC_SHAPE.*lse/);
  for (const [docs, at] of [
    [[0, 0, 2, 1, 1], 3],
    [[0, 0, 6, 6, 6], 2],
    [[-1, 0, 0, 0, 0], 0],
  ] as const) {
    using docStart = fromTypedArray(Int32Array.from(docs), [5]);
    expect(bad({ docStart })).toMatch(new RegExp(`ERR_LC_ARGUMENT.*docStart\\[${at}\\]`));
    expect(
      code(() =>
        ropeForward({
          x: q,
          start: 3,
          docStart,
          rope: ropeInit({ ropeType: 'default', ropeTheta: 1e4 }, { headDim: 16, maxPositionEmbeddings: 64 }),
        }),
      ),
    ).toMatch(/docStart/);
  }
  using strided = zeros([5, 8, 16]);
  expect(bad({ q: strided.slice(1, 0, 4) })).toBe('no error');
  using wrong = zeros([5, 4, 32]);
  expect(bad({ q: wrong.slice(2, 0, 16) })).toMatch(/ERR_LC_STRIDES/);
  using dSinks = zeros([4]);
  const backward = { ...base, dout: out, dq: empty([5, 4, 16]), dk: k, dv: k };
  expect(code(() => attentionBackward({ ...backward, dSinks }))).toMatch(/ERR_LC_ARGUMENT.*dSinks was given without sinks/);
  backward.dq.dispose();
  expect(code(() => attentionBackward(backward))).toMatch(/ERR_LC_DISPOSED/);
});

test('an empty chunk is no error', () => {
  using ws = new Workspace();
  using x = empty([0, 2, 16]);
  using lse = empty([0, 2]);
  using k = zeros([4, 1, 16]);
  attentionForward({ q: x, k, v: k, out: x, lse, start: 4, ws });
  attentionBackward({ q: x, k, v: k, out: x, lse, dout: x, dq: x, dk: k, dv: k, start: 4, ws });
  ropeForward({ x, start: 4, rope: ropeInit({ ropeType: 'default', ropeTheta: 1e4 }, { headDim: 16, maxPositionEmbeddings: 64 }) });
});
