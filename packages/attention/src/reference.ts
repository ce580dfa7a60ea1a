/** The definitions as plain f64 loops, sharing nothing with native/: slow, and for tests. */

export interface ReferenceProblem {
  q: ArrayLike<number>;
  k: ArrayLike<number>;
  v: ArrayLike<number>;
  /** Queries. */
  n: number;
  heads: number;
  kvHeads: number;
  headDim: number;
  start: number;
  window?: number | null;
  sinks?: ArrayLike<number> | null;
  docStart?: ArrayLike<number> | null;
  scale?: number;
}

const at = (x: ArrayLike<number>, i: number): number => x[i] as number;

/** Probabilities of query i, head h over its keys `from`..start+i, and its log-sum-exp (sink included). */
function softmaxRow(p: ReferenceProblem, i: number, h: number): { from: number; probs: number[]; lse: number } {
  const { headDim, heads, kvHeads, start } = p;
  const scale = p.scale ?? 1 / Math.sqrt(headDim);
  const g = Math.floor(h / (heads / kvHeads));
  const from = Math.max(p.docStart ? at(p.docStart, i) : 0, p.window ? start + i - p.window + 1 : 0);
  const scores: number[] = [];
  for (let j = from; j <= start + i; j++) {
    let dot = 0;
    for (let d = 0; d < headDim; d++) dot += at(p.q, (i * heads + h) * headDim + d) * at(p.k, (j * kvHeads + g) * headDim + d);
    scores.push(dot * scale);
  }
  const terms = p.sinks ? [...scores, at(p.sinks, h)] : scores;
  const top = terms.reduce((a, b) => Math.max(a, b));
  const lse = top + Math.log(terms.reduce((sum, s) => sum + Math.exp(s - top), 0));
  return { from, probs: scores.map((s) => Math.exp(s - lse)), lse };
}

/** out [n, heads, headDim], lse [n, heads]. */
export function forward(p: ReferenceProblem): { out: Float64Array; lse: Float64Array } {
  const { n, heads, kvHeads, headDim } = p;
  const out = new Float64Array(n * heads * headDim);
  const lse = new Float64Array(n * heads);
  for (let i = 0; i < n; i++) {
    for (let h = 0; h < heads; h++) {
      const row = softmaxRow(p, i, h);
      const g = Math.floor(h / (heads / kvHeads));
      lse[i * heads + h] = row.lse;
      row.probs.forEach((prob, x) => {
        for (let d = 0; d < headDim; d++) {
          const o = (i * heads + h) * headDim + d;
          out[o] = at(out, o) + prob * at(p.v, ((row.from + x) * kvHeads + g) * headDim + d);
        }
      });
    }
  }
  return { out, lse };
}

/** Gradients, by the softmax's Jacobian row by row. dk and dv have the length of k and v. */
export function backward(p: ReferenceProblem & { dout: ArrayLike<number> }): {
  dq: Float64Array;
  dk: Float64Array;
  dv: Float64Array;
  dSinks: Float64Array;
} {
  const { n, heads, kvHeads, headDim, dout } = p;
  const scale = p.scale ?? 1 / Math.sqrt(headDim);
  const dq = new Float64Array(p.q.length);
  const dk = new Float64Array(p.k.length);
  const dv = new Float64Array(p.v.length);
  const dSinks = new Float64Array(heads);
  for (let i = 0; i < n; i++) {
    for (let h = 0; h < heads; h++) {
      const { from, probs, lse } = softmaxRow(p, i, h);
      const g = Math.floor(h / (heads / kvHeads));
      const q0 = (i * heads + h) * headDim;
      const dprobs = probs.map((prob, x) => {
        let sum = 0;
        for (let d = 0; d < headDim; d++) {
          const kv = ((from + x) * kvHeads + g) * headDim + d;
          sum += at(dout, q0 + d) * at(p.v, kv);
          dv[kv] = at(dv, kv) + prob * at(dout, q0 + d);
        }
        return sum;
      });
      const mean = probs.reduce((sum, prob, x) => sum + prob * (dprobs[x] as number), 0);
      probs.forEach((prob, x) => {
        const dscore = prob * ((dprobs[x] as number) - mean) * scale;
        for (let d = 0; d < headDim; d++) {
          const kv = ((from + x) * kvHeads + g) * headDim + d;
          dq[q0 + d] = at(dq, q0 + d) + dscore * at(p.k, kv);
          dk[kv] = at(dk, kv) + dscore * at(p.q, q0 + d);
        }
      });
      if (p.sinks) dSinks[h] = at(dSinks, h) - Math.exp(at(p.sinks, h) - lse) * mean; // its own value is 0, so d(score) = prob * (0 - mean)
    }
  }
  return { dq, dk, dv, dSinks };
}

/** x [n, heads, headDim]; docStart [n]. */
export interface RopeProblem {
  x: ArrayLike<number>;
  n: number;
  heads: number;
  headDim: number;
  start: number;
  docStart?: ArrayLike<number> | null;
  rope: { invFreq: ArrayLike<number>; attentionFactor: number; rotaryDim: number };
}

/** Rotate-half of x [n, heads, headDim]; `sign` -1 is the transposed map. */
function rotate(p: RopeProblem, sign: number): Float64Array {
  const { n, heads, headDim, rope } = p;
  const out = Float64Array.from(p.x);
  const half = rope.rotaryDim / 2;
  for (let i = 0; i < n; i++) {
    const position = p.start + i - (p.docStart ? at(p.docStart, i) : 0);
    for (let h = 0; h < heads; h++) {
      for (let j = 0; j < half; j++) {
        const angle = position * at(rope.invFreq, j);
        const c = Math.cos(angle) * rope.attentionFactor;
        const s = sign * Math.sin(angle) * rope.attentionFactor;
        const a = (i * heads + h) * headDim + j;
        out[a] = at(p.x, a) * c - at(p.x, a + half) * s;
        out[a + half] = at(p.x, a + half) * c + at(p.x, a) * s;
      }
    }
  }
  return out;
}

/** x rotated, as a new array [n, heads, headDim]. */
export const ropeForward = (p: RopeProblem): Float64Array => rotate(p, 1);
/** The transposed map: a gradient rotated back, as a new array [n, heads, headDim]. */
export const ropeBackward = (p: RopeProblem): Float64Array => rotate(p, -1);
