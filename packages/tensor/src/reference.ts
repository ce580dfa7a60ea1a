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
