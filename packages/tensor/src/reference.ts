/** f64 loops that say what each op computes. They share nothing with the native code; tests hold one against the other. */

type Numbers = ArrayLike<number>;

/** c[m,n] = alpha op(a) op(b) + beta c */
export function gemm(o: {
  a: Numbers;
  b: Numbers;
  c?: Numbers;
  m: number;
  n: number;
  k: number;
  transA?: boolean;
  transB?: boolean;
  alpha?: number;
  beta?: number;
}): Float64Array {
  const { a, b, c, m, n, k, transA = false, transB = false, alpha = 1, beta = 0 } = o;
  const out = new Float64Array(m * n);
  for (let i = 0; i < m; i++) {
    for (let j = 0; j < n; j++) {
      let sum = 0;
      for (let p = 0; p < k; p++) sum += (a[transA ? p * m + i : i * k + p] as number) * (b[transB ? j * k + p : p * n + j] as number);
      out[i * n + j] = alpha * sum + (beta !== 0 && c ? beta * (c[i * n + j] as number) : 0);
    }
  }
  return out;
}

/** out = x / sqrt(mean(x^2) + eps) * w */
export function rmsNorm(o: { x: Numbers; weight: Numbers; rows: number; width: number; eps: number }): Float64Array {
  const { x, weight, rows, width, eps } = o;
  const out = new Float64Array(rows * width);
  for (let r = 0; r < rows; r++) {
    let squares = 0;
    for (let j = 0; j < width; j++) squares += (x[r * width + j] as number) ** 2;
    const inverse = 1 / Math.sqrt(squares / width + eps);
    for (let j = 0; j < width; j++) out[r * width + j] = (x[r * width + j] as number) * inverse * (weight[j] as number);
  }
  return out;
}

/** Gradients of sum(dout * rmsNorm(x)). */
export function rmsNormBackward(o: { x: Numbers; weight: Numbers; dout: Numbers; rows: number; width: number; eps: number }): {
  dx: Float64Array;
  dWeight: Float64Array;
} {
  const { x, weight, dout, rows, width, eps } = o;
  const dx = new Float64Array(rows * width);
  const dWeight = new Float64Array(width);
  for (let r = 0; r < rows; r++) {
    let squares = 0;
    let projection = 0;
    for (let j = 0; j < width; j++) {
      const at = r * width + j;
      squares += (x[at] as number) ** 2;
      projection += (dout[at] as number) * (weight[j] as number) * (x[at] as number);
    }
    const variance = squares / width + eps;
    for (let j = 0; j < width; j++) {
      const at = r * width + j;
      dx[at] =
        ((dout[at] as number) * (weight[j] as number)) / Math.sqrt(variance) - ((x[at] as number) * projection) / (width * variance ** 1.5);
      dWeight[j] = (dWeight[j] as number) + ((dout[at] as number) * (x[at] as number)) / Math.sqrt(variance);
    }
  }
  return { dx, dWeight };
}

/** One `gemm` per expert over rows offsets[e] .. offsets[e+1]; b [experts, k, n] or [experts, n, k]. Rows of no expert are 0, or beta c. */
export function groupedGemm(o: {
  a: Numbers;
  b: Numbers;
  c?: Numbers;
  offsets: Numbers;
  rows: number;
  n: number;
  k: number;
  transB?: boolean;
  alpha?: number;
  beta?: number;
}): Float64Array {
  const { a, b, c, offsets, rows, n, k, transB = false, alpha = 1, beta = 0 } = o;
  const out = new Float64Array(rows * n);
  for (let e = 0; e + 1 < offsets.length; e++) {
    for (let r = offsets[e] as number; r < (offsets[e + 1] as number); r++) {
      for (let j = 0; j < n; j++) {
        let sum = 0;
        for (let p = 0; p < k; p++) sum += (a[r * k + p] as number) * (b[e * k * n + (transB ? j * k + p : p * n + j)] as number);
        out[r * n + j] = alpha * sum + (beta !== 0 && c ? beta * (c[r * n + j] as number) : 0);
      }
    }
  }
  return out;
}

/** c_e [m, n] = alpha sum over the rows r of expert e of a_r^T b_r, + beta c_e. */
export function groupedGemmWeightGrad(o: {
  a: Numbers;
  b: Numbers;
  c?: Numbers;
  offsets: Numbers;
  m: number;
  n: number;
  alpha?: number;
  beta?: number;
}): Float64Array {
  const { a, b, c, offsets, m, n, alpha = 1, beta = 0 } = o;
  const experts = offsets.length - 1;
  const out = new Float64Array(experts * m * n);
  for (let e = 0; e < experts; e++) {
    for (let i = 0; i < m; i++) {
      for (let j = 0; j < n; j++) {
        const at = (e * m + i) * n + j;
        let sum = 0;
        for (let r = offsets[e] as number; r < (offsets[e + 1] as number); r++) sum += (a[r * m + i] as number) * (b[r * n + j] as number);
        out[at] = alpha * sum + (beta !== 0 && c ? beta * (c[at] as number) : 0);
      }
    }
  }
  return out;
}

/** out = a + b */
export function add(a: Numbers, b: Numbers): Float64Array {
  return Float64Array.from(a, (v, i) => v + (b[i] as number));
}

/** x + bias, for every row. */
export function addBias(x: Numbers, bias: Numbers): Float64Array {
  return Float64Array.from(x, (v, i) => v + (bias[i % bias.length] as number));
}

/** Sum over the rows of x [rows, width]. */
export function sumRows(x: Numbers, width: number): Float64Array {
  const out = new Float64Array(width);
  for (let i = 0; i < x.length; i++) out[i % width] = (out[i % width] as number) + (x[i] as number);
  return out;
}

/** factor x */
export function scale(x: Numbers, factor: number): Float64Array {
  return Float64Array.from(x, (v) => factor * v);
}

/** y + alpha x */
export function axpy(x: Numbers, y: Numbers, alpha = 1): Float64Array {
  return Float64Array.from(y, (v, i) => v + alpha * (x[i] as number));
}

/** Rows ids[i] of table [vocab, width]. */
export function embeddingGather(table: Numbers, ids: Numbers, width: number): Float64Array {
  return Float64Array.from(
    { length: ids.length * width },
    (_, i) => table[(ids[Math.floor(i / width)] as number) * width + (i % width)] as number,
  );
}

/** dTable with dout[i] added to row ids[i]. */
export function embeddingScatterAdd(dout: Numbers, ids: Numbers, dTable: Numbers, width: number): Float64Array {
  const out = Float64Array.from(dTable);
  for (let i = 0; i < ids.length; i++) {
    for (let j = 0; j < width; j++) {
      const at = (ids[i] as number) * width + j;
      out[at] = (out[at] as number) + (dout[i * width + j] as number);
    }
  }
  return out;
}

/** The nearest bf16 or f16 value, ties to even; overflow is infinite. */
export function round(value: number, dtype: 'bf16' | 'f16'): number {
  if (value === 0 || !Number.isFinite(value)) return value;
  const { digits, smallest, largest } =
    dtype === 'bf16' ? { digits: 8, smallest: -126, largest: 127 } : { digits: 11, smallest: -14, largest: 15 };
  let exponent = Math.floor(Math.log2(Math.abs(value)));
  while (2 ** exponent > Math.abs(value)) exponent--; // log2 rounds
  while (2 ** (exponent + 1) <= Math.abs(value)) exponent++;
  const quantum = 2 ** (Math.max(exponent, smallest) - digits + 1);
  const steps = Math.abs(value) / quantum; // exact: a power of two
  const below = Math.floor(steps);
  const rest = steps - below;
  const up = rest > 0.5 || (rest === 0.5 && below % 2 === 1);
  const magnitude = (below + (up ? 1 : 0)) * quantum;
  return Math.sign(value) * (magnitude >= 2 ** (largest + 1) ? Number.POSITIVE_INFINITY : magnitude);
}
