/** Small dense ops over rows of tokens. Shapes are checked natively; rows may be strided. */
import { LcTypeError } from './errors.js';
import { core } from './native.js';
import type { Tensor } from './tensor.js';

interface RmsNormArgs {
  /** [rows, width], or [rows, heads, headDim]: the last dimension is normalised. */
  x: Tensor;
  /** [width] (or [headDim]). */
  weight: Tensor;
  /** As x; may be x. */
  out: Tensor;
  eps: number;
}
interface RmsNormBackwardArgs {
  x: Tensor;
  weight: Tensor;
  dout: Tensor;
  /** As x; may be dout. */
  dx: Tensor;
  eps: number;
  /** dx += instead of dx =. */
  accumulate?: boolean;
  /** f32 [width]; added to. */
  dWeight?: Tensor | null;
}
interface RowNative {
  rmsNorm(args: RmsNormArgs): void;
  rmsNormBackward(args: RmsNormBackwardArgs): void;
  add(args: { a: Tensor; b: Tensor; out: Tensor }): void;
  addBias(args: { x: Tensor; bias: Tensor }): void;
  sumRows(args: { x: Tensor; out: Tensor; accumulate?: boolean }): void;
  scale(args: { x: Tensor; factor: number }): void;
  axpy(args: { x: Tensor; y: Tensor; alpha?: number }): void;
  embeddingGather(args: { table: Tensor; ids: Tensor; out: Tensor }): void;
  embeddingScatterAdd(args: { dout: Tensor; ids: Tensor; dTable: Tensor }): void;
}
const native = (): RowNative => core<RowNative>();

function checkEps(op: string, eps: number): void {
  if (!(eps >= 0) || !Number.isFinite(eps)) throw new LcTypeError('ERR_LC_ARGUMENT', `${op}: eps must be a finite number >= 0, got ${eps}`);
}

/** out = x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich, 2019), the mean in f32. @throws ERR_LC_SHAPE, ERR_LC_DTYPE */
export function rmsNorm(args: RmsNormArgs): void {
  checkEps('rmsNorm', args.eps);
  native().rmsNorm(args);
}

/** Gradient of `rmsNorm` to x, and with `dWeight` to the weight; needs only x. */
export function rmsNormBackward(args: RmsNormBackwardArgs): void {
  checkEps('rmsNormBackward', args.eps);
  native().rmsNormBackward(args);
}

/** out = a + b, all [rows, width]; out may be a or b. */
export function add(args: { a: Tensor; b: Tensor; out: Tensor }): void {
  native().add(args);
}

/** x += bias for every row. x [rows, width], bias [width]. */
export function addBias(args: { x: Tensor; bias: Tensor }): void {
  native().addBias(args);
}

/** out [width] = (or with `accumulate` +=) the sum over the rows of x: the gradient of a bias. */
export function sumRows(args: { x: Tensor; out: Tensor; accumulate?: boolean }): void {
  native().sumRows(args);
}

/** x *= factor. */
export function scale(args: { x: Tensor; factor: number }): void {
  native().scale(args);
}

/** y += alpha x. */
export function axpy(args: { x: Tensor; y: Tensor; alpha?: number }): void {
  native().axpy(args);
}

/** out[i] = table[ids[i]]. table [vocab, width] (f32, bf16 or f16), ids i32 [n], out [n, width]. @throws ERR_LC_ARGUMENT for an id outside the table */
export function embeddingGather(args: { table: Tensor; ids: Tensor; out: Tensor }): void {
  native().embeddingGather(args);
}

/** dTable[ids[i]] += dout[i], in token order. dTable f32 [vocab, width]. */
export function embeddingScatterAdd(args: { dout: Tensor; ids: Tensor; dTable: Tensor }): void {
  native().embeddingScatterAdd(args);
}
