/** Plain f64 loops, sharing nothing with native/: what the kernels are held against. Matrices are row-major arrays. */

type Numbers = ArrayLike<number>;
const at = (x: Numbers, i: number): number => x[i] as number;

/** NF4's levels from their definition (QLoRA, appendix E), to 16 digits: normalised quantiles of N(0, 1), seven below zero, zero, eight above. */
export const nf4Levels: readonly number[] = (() => {
  const offset = 0.5 * (1 - 1 / 32 + (1 - 1 / 30)); // 0.9677083...: the outermost probability
  const above = Array.from({ length: 8 }, (_, i) => normalQuantile(offset + ((0.5 - offset) * i) / 8));
  const below = Array.from({ length: 7 }, (_, i) => -normalQuantile(offset + ((0.5 - offset) * i) / 7));
  const levels = [...above, 0, ...below].sort((a, b) => a - b);
  const largest = levels.at(-1) as number;
  return levels.map((level) => level / largest);
})();

/** Inverse of the normal distribution function, by bisection on its integral. */
function normalQuantile(p: number): number {
  const cdf = (x: number): number => {
    // Series of erf, exact enough for |x| < 3.
    let term = x;
    let sum = x;
    for (let k = 1; k < 200; k++) {
      term *= (-x * x) / (2 * k);
      sum += term / (2 * k + 1);
    }
    return 0.5 + sum / Math.sqrt(2 * Math.PI);
  };
  let low = -4;
  let high = 4;
  for (let i = 0; i < 200; i++) {
    const middle = (low + high) / 2;
    if (cdf(middle) < p) low = middle;
    else high = middle;
  }
  return (low + high) / 2;
}

/** E2M1 from its definition: sign, 2 exponent bits (bias 1), 1 mantissa bit. */
export const e2m1 = (code: number): number => {
  const exponent = (code >> 1) & 3;
  const mantissa = code & 1;
  const magnitude = exponent === 0 ? mantissa / 2 : 2 ** (exponent - 1) * (1 + mantissa / 2);
  return code & 8 ? -magnitude : magnitude;
};

/** Signed or unsigned 8-bit dynamic data type: decades 10^-6 .. 1, each with twice as many linear steps as the one below, and 0 and 1. */
export function dynamicMap(signed: boolean): number[] {
  const values = [0, 1];
  for (let decade = 0; decade < 7; decade++) {
    const count = 2 ** (signed ? decade : decade + 1);
    for (let i = 0; i < count; i++) {
      const middle = 10 ** (decade - 6) * (0.1 + (0.9 * (i + 0.5)) / count);
      values.push(middle);
      if (signed) values.push(-middle);
    }
  }
  return values.sort((a, b) => a - b);
}

const nearest = (levels: readonly number[], x: number): number => {
  let best = 0;
  for (let i = 1; i < levels.length; i++) if (Math.abs(at(levels, i) - x) < Math.abs(at(levels, best) - x)) best = i;
  return best;
};

/** Values after NF4 and back, with unrounded scales (`doubleQuant` false) or with scales quantised by blocks of 256. */
export function nf4RoundTrip(x: Numbers, blockSize = 64, doubleQuant = true): { values: Float64Array; codes: Uint8Array } {
  const blocks = Math.ceil(x.length / blockSize);
  let absmax = new Float64Array(blocks);
  for (let i = 0; i < x.length; i++)
    absmax[Math.floor(i / blockSize)] = Math.max(at(absmax, Math.floor(i / blockSize)), Math.abs(at(x, i)));
  const codes = Uint8Array.from(x, (v, i) => {
    const scale = at(absmax, Math.floor(i / blockSize));
    return scale === 0 ? 7 : nearest(nf4Levels, v / scale);
  });
  if (doubleQuant) absmax = quantizeScales(absmax);
  return { values: Float64Array.from(codes, (code, i) => at(nf4Levels, code) * at(absmax, Math.floor(i / blockSize))), codes };
}

function quantizeScales(absmax: Float64Array): Float64Array<ArrayBuffer> {
  const map = dynamicMap(true);
  const mean = absmax.reduce((a, b) => a + b, 0) / Math.max(1, absmax.length);
  const out = new Float64Array(absmax.length);
  for (let first = 0; first < absmax.length; first += 256) {
    const block = absmax.slice(first, first + 256).map((v) => v - mean);
    const scale = block.reduce((a, b) => Math.max(a, Math.abs(b)), 0);
    block.forEach((v, i) => {
      out[first + i] = mean + (scale === 0 ? 0 : at(map, nearest(map, v / scale)) * scale);
    });
  }
  return out;
}

/** MXFP4 of blocks [.., 16] and scales, as values; 32 a scale. */
export function mxfp4Dequantize(blocks: Numbers, scales: Numbers): Float64Array {
  return Float64Array.from({ length: scales.length * 32 }, (_, i) => {
    const byte = at(blocks, i >> 1);
    const scale = at(scales, i >> 5);
    return e2m1(i & 1 ? byte >> 4 : byte & 15) * (scale === 255 ? Number.NaN : 2 ** (scale - 127));
  });
}

/** 32 words are four per counter: Philox4x32-10 on BigInts. */
export function philox(counter: readonly [number, number, number, number], seed: number): [number, number, number, number] {
  const mask = 0xffffffffn;
  let [a, b, c, d] = counter.map(BigInt) as [bigint, bigint, bigint, bigint];
  let k0 = BigInt(seed) & mask;
  let k1 = BigInt(seed) >> 32n;
  for (let round = 0; round < 10; round++) {
    const x = 0xd2511f53n * a;
    const y = 0xcd9e8d57n * c;
    [a, b, c, d] = [(y >> 32n) ^ b ^ k0, y & mask, (x >> 32n) ^ d ^ k1, x & mask];
    k0 = (k0 + 0x9e3779b9n) & mask;
    k1 = (k1 + 0xbb67ae85n) & mask;
  }
  return [Number(a), Number(b), Number(c), Number(d)];
}

/** Factor 0 or 1 / (1 - p) of dropout for a token and feature. */
export function dropoutFactor(p: number, seed: number, site: number, token: number, feature: number): number {
  const words = philox([feature >> 2, token % 2 ** 32, Math.floor(token / 2 ** 32), site], seed);
  return at(words, feature & 3) >= Math.floor(p * 2 ** 32) ? 1 / (1 - p) : 0;
}

/** A linear with LoRA, and its shapes. */
export interface LoraProblem {
  tokens: number;
  inFeatures: number;
  outFeatures: number;
  r: number;
  scale: number;
  /** [tokens, in], [out, in], [r, in], [out, r]. */
  x: Numbers;
  w: Numbers;
  a: Numbers;
  b: Numbers;
  bias?: Numbers | null;
  /** Dropout factors [tokens, in]; default all 1. */
  mask?: Numbers | null;
}

/** y = x W^T + bias + scale (mask x) A^T B^T, [tokens, out]. */
export function forward(p: LoraProblem): Float64Array {
  const y = new Float64Array(p.tokens * p.outFeatures);
  for (let t = 0; t < p.tokens; t++) {
    const h = hidden(p, t);
    for (let o = 0; o < p.outFeatures; o++) {
      let sum = p.bias ? at(p.bias, o) : 0;
      for (let i = 0; i < p.inFeatures; i++) sum += at(p.x, t * p.inFeatures + i) * at(p.w, o * p.inFeatures + i);
      for (let k = 0; k < p.r; k++) sum += p.scale * at(h, k) * at(p.b, o * p.r + k);
      y[t * p.outFeatures + o] = sum;
    }
  }
  return y;
}

function hidden(p: LoraProblem, t: number): Float64Array {
  const h = new Float64Array(p.r);
  for (let k = 0; k < p.r; k++) {
    let sum = 0;
    for (let i = 0; i < p.inFeatures; i++)
      sum += at(p.x, t * p.inFeatures + i) * (p.mask ? at(p.mask, t * p.inFeatures + i) : 1) * at(p.a, k * p.inFeatures + i);
    h[k] = sum;
  }
  return h;
}

/** Gradients of `forward` to x, A and B for dy [tokens, out]. */
export function backward(p: LoraProblem, dy: Numbers): { dx: Float64Array; da: Float64Array; db: Float64Array } {
  const dx = new Float64Array(p.tokens * p.inFeatures);
  const da = new Float64Array(p.r * p.inFeatures);
  const db = new Float64Array(p.outFeatures * p.r);
  for (let t = 0; t < p.tokens; t++) {
    const h = hidden(p, t);
    for (let k = 0; k < p.r; k++) {
      let dh = 0;
      for (let o = 0; o < p.outFeatures; o++) {
        dh += p.scale * at(dy, t * p.outFeatures + o) * at(p.b, o * p.r + k);
        db[o * p.r + k] = at(db, o * p.r + k) + p.scale * at(dy, t * p.outFeatures + o) * at(h, k);
      }
      for (let i = 0; i < p.inFeatures; i++) {
        const factor = p.mask ? at(p.mask, t * p.inFeatures + i) : 1;
        da[k * p.inFeatures + i] = at(da, k * p.inFeatures + i) + dh * factor * at(p.x, t * p.inFeatures + i);
        dx[t * p.inFeatures + i] = at(dx, t * p.inFeatures + i) + dh * factor * at(p.a, k * p.inFeatures + i);
      }
    }
    for (let o = 0; o < p.outFeatures; o++) {
      for (let i = 0; i < p.inFeatures; i++) {
        dx[t * p.inFeatures + i] = at(dx, t * p.inFeatures + i) + at(dy, t * p.outFeatures + o) * at(p.w, o * p.inFeatures + i);
      }
    }
  }
  return { dx, da, db };
}

/** PEFT's dense update of fused experts, [experts, in, out]: scale * sum_k B[o, k, e] A[e, k, i]. */
export function expertDelta(
  a: Numbers,
  b: Numbers,
  experts: number,
  r: number,
  inFeatures: number,
  outFeatures: number,
  scale: number,
): Float64Array {
  const delta = new Float64Array(experts * inFeatures * outFeatures);
  for (let e = 0; e < experts; e++) {
    for (let i = 0; i < inFeatures; i++) {
      for (let o = 0; o < outFeatures; o++) {
        let sum = 0;
        for (let k = 0; k < r; k++) sum += at(b, (o * r + k) * experts + e) * at(a, (e * r + k) * inFeatures + i);
        delta[(e * inFeatures + i) * outFeatures + o] = scale * sum;
      }
    }
  }
  return delta;
}

/** One parameter and its two moments. */
export interface AdamState {
  value: Float64Array;
  m: Float64Array;
  v: Float64Array;
}
/** Step `t` (from 1) of AdamW as torch has it, in place. */
export function adamw(
  s: AdamState,
  grad: Numbers,
  t: number,
  o: { lr: number; beta1: number; beta2: number; eps: number; weightDecay: number },
): void {
  for (let i = 0; i < s.value.length; i++) {
    const g = at(grad, i);
    const m = o.beta1 * at(s.m, i) + (1 - o.beta1) * g;
    const v = o.beta2 * at(s.v, i) + (1 - o.beta2) * g * g;
    const root = Math.sqrt(v / (1 - o.beta2 ** t));
    s.m[i] = m;
    s.v[i] = v;
    s.value[i] = at(s.value, i) * (1 - o.lr * o.weightDecay) - (o.lr * m) / (1 - o.beta1 ** t) / (root + o.eps);
  }
}
