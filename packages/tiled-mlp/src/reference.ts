/** Plain f64 loops over flat row-major arrays, sharing nothing with native/ or the tiled blocks. Slow on purpose. */

type Numbers = ArrayLike<number>;
const at = (a: Numbers, i: number): number => a[i] as number;
const sigmoid = (x: number): number => 1 / (1 + Math.exp(-x));

/** erf by its power series (small arguments) or continued fraction. */
function erf(x: number): number {
  const z = Math.abs(x);
  if (z < 3) {
    let term = z;
    let sum = z;
    for (let n = 1; n < 120; n++) {
      term *= (-z * z) / n;
      sum += term / (2 * n + 1);
    }
    return (Math.sign(x) * 2 * sum) / Math.sqrt(Math.PI);
  }
  let fraction = 0;
  for (let k = 80; k > 0; k--) fraction = k / 2 / (z + fraction);
  return Math.sign(x) * (1 - Math.exp(-z * z) / Math.sqrt(Math.PI) / (z + fraction));
}

const activations = {
  silu: (g: number): [number, number] => [g * sigmoid(g), sigmoid(g) * (1 + g * (1 - sigmoid(g)))],
  gelu: (g: number): [number, number] => {
    const cdf = 0.5 * (1 + erf(g / Math.SQRT2));
    return [g * cdf, cdf + (g * Math.exp((-g * g) / 2)) / Math.sqrt(2 * Math.PI)];
  },
  gelu_pytorch_tanh: (g: number): [number, number] => {
    const c = Math.sqrt(2 / Math.PI);
    const t = Math.tanh(c * (g + 0.044715 * g ** 3));
    return [0.5 * g * (1 + t), 0.5 * (1 + t) + 0.5 * g * (1 - t * t) * c * (1 + 3 * 0.044715 * g * g)];
  },
};

/** y[n, out] = x[n, in] W[out, in]^T, W starting at `offset`. */
function linear(x: Numbers, w: Numbers, n: number, inputs: number, outputs: number, offset = 0): Float64Array {
  const y = new Float64Array(n * outputs);
  for (let t = 0; t < n; t++) {
    for (let o = 0; o < outputs; o++) {
      let sum = 0;
      for (let i = 0; i < inputs; i++) sum += at(x, t * inputs + i) * at(w, offset + o * inputs + i);
      y[t * outputs + o] = sum;
    }
  }
  return y;
}
/** dx = dy W, and dW += dy^T x. */
function linearBackward(
  x: Numbers,
  dy: Numbers,
  w: Numbers,
  dw: Float64Array,
  n: number,
  inputs: number,
  outputs: number,
  offset = 0,
): Float64Array {
  const dx = new Float64Array(n * inputs);
  for (let t = 0; t < n; t++) {
    for (let o = 0; o < outputs; o++) {
      for (let i = 0; i < inputs; i++) {
        const d = at(dy, t * outputs + o);
        dx[t * inputs + i] = at(dx, t * inputs + i) + d * at(w, offset + o * inputs + i);
        dw[offset + o * inputs + i] = at(dw, offset + o * inputs + i) + d * at(x, t * inputs + i);
      }
    }
  }
  return dx;
}

/** RMSNorm: weight [hidden]. */
export interface Norm {
  weight: Numbers;
  eps: number;
}
function rmsNorm(x: Numbers, norm: Norm | null, n: number, hidden: number): Float64Array {
  const h = Float64Array.from(x);
  if (!norm) return h;
  for (let t = 0; t < n; t++) {
    let square = 0;
    for (let i = 0; i < hidden; i++) square += at(x, t * hidden + i) ** 2;
    const inverse = 1 / Math.sqrt(square / hidden + norm.eps);
    for (let i = 0; i < hidden; i++) h[t * hidden + i] = at(x, t * hidden + i) * inverse * at(norm.weight, i);
  }
  return h;
}
function rmsNormBackward(x: Numbers, dh: Numbers, norm: Norm | null, n: number, hidden: number): Float64Array {
  const dx = Float64Array.from(dh);
  if (!norm) return dx;
  for (let t = 0; t < n; t++) {
    let square = 0;
    let inner = 0;
    for (let i = 0; i < hidden; i++) {
      square += at(x, t * hidden + i) ** 2;
      inner += at(x, t * hidden + i) * at(dh, t * hidden + i) * at(norm.weight, i);
    }
    const inverse = 1 / Math.sqrt(square / hidden + norm.eps);
    for (let i = 0; i < hidden; i++) {
      const k = t * hidden + i;
      dx[k] = inverse * (at(dh, k) * at(norm.weight, i) - (at(x, k) * inverse ** 2 * inner) / hidden);
    }
  }
  return dx;
}
const plus = (a: Numbers, b: Numbers | null): Float64Array => Float64Array.from(a, (v, i) => v + (b ? at(b, i) : 0));

/** A dense MLP, its input and its weights. */
export interface DenseArgs {
  tokens: number;
  hidden: number;
  intermediate: number;
  /** [tokens, hidden] */
  x: Numbers;
  /** [intermediate, hidden] */
  gate: Numbers;
  up: Numbers;
  /** [hidden, intermediate] */
  down: Numbers;
  activation: keyof typeof activations;
  norm?: Norm | null;
  residual?: boolean;
}

function denseInner(p: DenseArgs) {
  const h = rmsNorm(p.x, p.norm ?? null, p.tokens, p.hidden);
  const gate = linear(h, p.gate, p.tokens, p.hidden, p.intermediate);
  const up = linear(h, p.up, p.tokens, p.hidden, p.intermediate);
  const act = gate.map((g, i) => activations[p.activation](g)[0] * at(up, i));
  return { h, gate, up, act };
}

/** Dense gated MLP. */
export const dense = {
  /** The output, [tokens, hidden]. */
  forward(p: DenseArgs): Float64Array {
    return plus(linear(denseInner(p).act, p.down, p.tokens, p.intermediate, p.hidden), p.residual ? p.x : null);
  },
  /** Gradients of input and weights for dout [tokens, hidden]. */
  backward(p: DenseArgs, dout: Numbers) {
    const { h, gate, up, act } = denseInner(p);
    const [dGate, dUp, dDown] = [new Float64Array(p.gate.length), new Float64Array(p.up.length), new Float64Array(p.down.length)];
    const dact = linearBackward(act, dout, p.down, dDown, p.tokens, p.intermediate, p.hidden);
    const dg = gate.map((g, i) => at(dact, i) * at(up, i) * activations[p.activation](g)[1]);
    const du = gate.map((g, i) => at(dact, i) * activations[p.activation](g)[0]);
    const dh = plus(
      linearBackward(h, dg, p.gate, dGate, p.tokens, p.hidden, p.intermediate),
      linearBackward(h, du, p.up, dUp, p.tokens, p.hidden, p.intermediate),
    );
    return { dx: plus(rmsNormBackward(p.x, dh, p.norm ?? null, p.tokens, p.hidden), p.residual ? dout : null), dGate, dUp, dDown };
  },
};

/** A mixture of experts, its input and its weights. */
export interface MoeArgs {
  kind: 'gpt-oss' | 'qwen3-moe';
  tokens: number;
  hidden: number;
  intermediate: number;
  experts: number;
  topK: number;
  /** [tokens, hidden] */
  x: Numbers;
  /** [experts, hidden] */
  router: Numbers;
  routerBias?: Numbers | null;
  /** [experts, 2 * intermediate, hidden] */
  gateUp: Numbers;
  gateUpBias?: Numbers | null;
  /** [experts, hidden, intermediate] */
  down: Numbers;
  downBias?: Numbers | null;
  normTopkProb?: boolean;
  limit?: number;
  alpha?: number;
  norm?: Norm | null;
  residual?: boolean;
}

const softmax = (x: number[]): number[] => {
  const largest = Math.max(...x);
  const e = x.map((v) => Math.exp(v - largest));
  const sum = e.reduce((a, b) => a + b, 0);
  return e.map((v) => v / sum);
};

/** One token's experts, best first (ties: lower index), their weights, and the softmax over all experts. */
export function route(p: MoeArgs, h: Numbers, t: number): { ids: number[]; weights: number[]; all: number[] } {
  const row = Array.from({ length: p.hidden }, (_, i) => at(h, t * p.hidden + i));
  const logits = Array.from(linear(row, p.router, 1, p.hidden, p.experts), (v, e) => v + (p.routerBias ? at(p.routerBias, e) : 0));
  const all = softmax(logits);
  const ids = logits
    .map((_, e) => e)
    .sort((a, b) => at(logits, b) - at(logits, a) || a - b)
    .slice(0, p.topK);
  if (p.kind === 'gpt-oss') return { ids, all, weights: softmax(ids.map((e) => at(logits, e))) };
  const picked = ids.map((e) => at(all, e));
  const sum = (p.normTopkProb ?? true) ? picked.reduce((a, b) => a + b, 0) : 1;
  return { ids, all, weights: picked.map((v) => v / sum) };
}

/** gate and up of one row of an expert, the activation, and its derivatives to gate and up. */
function expertRow(p: MoeArgs, row: Numbers, e: number) {
  const width = p.intermediate;
  const both = linear(row, p.gateUp, 1, p.hidden, 2 * width, e * 2 * width * p.hidden).map(
    (v, i) => v + (p.gateUpBias ? at(p.gateUpBias, e * 2 * width + i) : 0),
  );
  const [act, dGate, dUp] = [new Float64Array(width), new Float64Array(width), new Float64Array(width)];
  const { limit = 7, alpha = 1.702 } = p;
  for (let i = 0; i < width; i++) {
    if (p.kind === 'gpt-oss') {
      const [g, u] = [at(both, 2 * i), at(both, 2 * i + 1)];
      const gate = Math.min(g, limit);
      const up = Math.max(-limit, Math.min(limit, u));
      const s = sigmoid(alpha * gate);
      act[i] = (up + 1) * gate * s;
      dGate[i] = g > limit ? 0 : (up + 1) * (s + gate * alpha * s * (1 - s));
      dUp[i] = Math.abs(u) > limit ? 0 : gate * s;
    } else {
      const [value, slope] = activations.silu(at(both, i));
      act[i] = value * at(both, width + i);
      dGate[i] = slope * at(both, width + i);
      dUp[i] = value;
    }
  }
  return { act, dGate, dUp };
}
const expertOut = (p: MoeArgs, act: Numbers, e: number): Float64Array =>
  linear(act, p.down, 1, p.intermediate, p.hidden, e * p.hidden * p.intermediate).map(
    (v, i) => v + (p.downBias ? at(p.downBias, e * p.hidden + i) : 0),
  );

/** Mixture of experts. The routing weights' gradient is taken from the recomputed output of the down projection, unlike in the op. */
export const moe = {
  /** The output, [tokens, hidden]. */
  forward(p: MoeArgs): Float64Array {
    const h = rmsNorm(p.x, p.norm ?? null, p.tokens, p.hidden);
    const out = p.residual ? Float64Array.from(p.x) : new Float64Array(p.tokens * p.hidden);
    for (let t = 0; t < p.tokens; t++) {
      const { ids, weights } = route(p, h, t);
      ids.forEach((e, j) => {
        const y = expertOut(p, expertRow(p, h.subarray(t * p.hidden, (t + 1) * p.hidden), e).act, e);
        for (let i = 0; i < p.hidden; i++) out[t * p.hidden + i] = at(out, t * p.hidden + i) + at(weights, j) * at(y, i);
      });
    }
    return out;
  },
  /** Gradients of input and weights for dout [tokens, hidden]. */
  backward(p: MoeArgs, dout: Numbers) {
    const h = rmsNorm(p.x, p.norm ?? null, p.tokens, p.hidden);
    const dh = new Float64Array(h.length);
    const [dGateUp, dDown] = [new Float64Array(p.gateUp.length), new Float64Array(p.down.length)];
    const width = p.intermediate;
    for (let t = 0; t < p.tokens; t++) {
      const row = h.subarray(t * p.hidden, (t + 1) * p.hidden);
      const d = Array.from({ length: p.hidden }, (_, i) => at(dout, t * p.hidden + i));
      const { ids, weights, all } = route(p, h, t);
      const addTo = (part: Numbers): void => {
        for (let i = 0; i < p.hidden; i++) dh[t * p.hidden + i] = at(dh, t * p.hidden + i) + at(part, i);
      };
      const dWeights = ids.map((e, j) => {
        const { act, dGate, dUp } = expertRow(p, row, e);
        const dy = d.map((v) => v * at(weights, j));
        const dact = linearBackward(act, dy, p.down, dDown, 1, width, p.hidden, e * p.hidden * width);
        const dBoth = new Float64Array(2 * width);
        for (let i = 0; i < width; i++) {
          dBoth[p.kind === 'gpt-oss' ? 2 * i : i] = at(dact, i) * at(dGate, i);
          dBoth[p.kind === 'gpt-oss' ? 2 * i + 1 : width + i] = at(dact, i) * at(dUp, i);
        }
        addTo(linearBackward(row, dBoth, p.gateUp, dGateUp, 1, p.hidden, 2 * width, e * 2 * width * p.hidden));
        return expertOut(p, act, e).reduce((sum, v, i) => sum + v * at(d, i), 0);
      });
      const dLogits = new Array<number>(p.experts).fill(0);
      if (p.kind === 'qwen3-moe' && !(p.normTopkProb ?? true)) {
        const inner = ids.reduce((sum, e, j) => sum + at(all, e) * at(dWeights, j), 0);
        for (let e = 0; e < p.experts; e++) dLogits[e] = at(all, e) * ((ids.includes(e) ? at(dWeights, ids.indexOf(e)) : 0) - inner);
      } else {
        const inner = ids.reduce((sum, _, j) => sum + at(weights, j) * at(dWeights, j), 0);
        ids.forEach((e, j) => {
          dLogits[e] = at(weights, j) * (at(dWeights, j) - inner);
        });
      }
      addTo(linearBackward(row, dLogits, p.router, new Float64Array(p.router.length), 1, p.hidden, p.experts));
    }
    return { dx: plus(rmsNormBackward(p.x, dh, p.norm ?? null, p.tokens, p.hidden), p.residual ? dout : null), dGateUp, dDown };
  },
};
