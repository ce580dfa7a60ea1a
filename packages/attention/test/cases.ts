import { empty, fromTypedArray, type Tensor, Workspace, zeros } from '@lc/tensor';
import { randomNormal } from '@lc/tensor/testing';
import { attentionBackward, attentionForward, type reference } from '../src/index.js';

export interface Case {
  n: number;
  heads: number;
  kvHeads: number;
  headDim: number;
  start?: number;
  window?: number | null;
  sinks?: boolean;
  /** Index of the first token of every document. */
  documents?: number[];
  scale?: number;
  /** Standard deviation of q. */
  spread?: number;
  /** Keys beyond the last visible one. */
  extraKeys?: number;
}

export type Problem = Parameters<typeof reference.backward>[0] & {
  q: Float32Array;
  k: Float32Array;
  v: Float32Array;
  dout: Float32Array;
  keys: number;
};

export function docStartOf(documents: readonly number[], start: number, n: number): Int32Array {
  return Int32Array.from({ length: n }, (_, i) => documents.reduce((found, first) => (first <= start + i ? first : found), 0));
}

export function makeProblem(c: Case, seed = 1): Problem {
  const { n, heads, kvHeads, headDim, start = 0 } = c;
  const keys = start + n + (c.extraKeys ?? 0);
  return {
    ...{ n, heads, kvHeads, headDim, start, keys },
    q: randomNormal(n * heads * headDim, seed, c.spread ?? 1),
    k: randomNormal(keys * kvHeads * headDim, seed + 1),
    v: randomNormal(keys * kvHeads * headDim, seed + 2),
    dout: randomNormal(n * heads * headDim, seed + 3),
    window: c.window ?? null,
    sinks: c.sinks ? randomNormal(heads, seed + 4, 2) : null,
    docStart: c.documents ? docStartOf(c.documents, start, n) : null,
    ...(c.scale === undefined ? {} : { scale: c.scale }),
  };
}

export interface Result {
  out: Float32Array;
  lse: Float32Array;
  dq: Float32Array;
  dk: Float32Array;
  dv: Float32Array;
  dSinks: Float32Array;
}

/** Runs the op over the queries in chunks: forward left to right, backward right to left. */
export function run(p: Problem, chunks: readonly number[] = [p.n]): Result {
  using ws = new Workspace();
  const owned: Tensor[] = [];
  const own = (t: Tensor): Tensor => {
    owned.push(t);
    return t;
  };
  try {
    const rows = [p.n, p.heads, p.headDim];
    const kv = [p.keys, p.kvHeads, p.headDim];
    const given = (x: ArrayLike<number>, shape: number[]): Tensor => own(fromTypedArray(Float32Array.from(x), shape));
    const q = given(p.q, rows);
    const k = given(p.k, kv);
    const v = given(p.v, kv);
    const dout = given(p.dout, rows);
    const sinks = p.sinks ? given(p.sinks, [p.heads]) : null;
    const docs = p.docStart ? own(fromTypedArray(Int32Array.from(p.docStart), [p.n])) : null;
    const [out, dq] = [own(empty(rows)), own(empty(rows))];
    const lse = own(empty([p.n, p.heads]));
    const [dk, dv, dSinks] = [own(zeros(kv)), own(zeros(kv)), own(zeros([p.heads]))];
    const spans: [number, number][] = [];
    for (let at = 0, i = 0; at < p.n; at += chunks[i++ % chunks.length] as number) {
      spans.push([at, Math.min(chunks[i % chunks.length] as number, p.n - at)]);
    }
    const span = ([at, count]: [number, number]) => ({
      ...{ q: q.rows(at, count), k, v, out: out.rows(at, count), lse: lse.rows(at, count), start: p.start + at },
      ...{
        window: p.window ?? null,
        sinks,
        docStart: docs?.rows(at, count) ?? null,
        ws,
        ...(p.scale === undefined ? {} : { scale: p.scale }),
      },
    });
    for (const s of spans) attentionForward(span(s));
    for (const s of spans.reverse()) {
      attentionBackward({ ...span(s), dout: dout.rows(...s), dq: dq.rows(...s), dk, dv, dSinks: sinks ? dSinks : null });
    }
    const array = (t: Tensor): Float32Array => Float32Array.from(t.data() as Float32Array);
    return { out: array(out), lse: array(lse), dq: array(dq), dk: array(dk), dv: array(dv), dSinks: array(dSinks) };
  } finally {
    for (const t of owned) t.dispose();
  }
}
