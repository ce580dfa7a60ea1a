/**
 * Small dense ops over rows of tokens, [tokens, width]; rows may be strided. f32 on the CPU, with sums in an order that the shape alone fixes: the bits do
 * not depend on the number of threads. An output may be exactly one of the inputs where that is said, and never overlaps one partly.
 */
import type { Stream } from './cuda.js';
import { LcTypeError } from './errors.js';
import { core } from './native.js';
import type { Tensor } from './tensor.js';

interface OnStream {
  /** CUDA only; default: the device's default stream. */
  stream?: Stream | null;
}
/** Arguments of `rmsNorm`; x and out [n, width], weight [width]. */
export interface RmsNormArgs extends OnStream {
  /** [rows, width], or [rows, heads, headDim]: the last dimension is normalised. */
  x: Tensor;
  /** [width] (or [headDim]). */
  weight: Tensor;
  /** As x; may be x. */
  out: Tensor;
  eps: number;
}
/** Arguments of `rmsNormBackward`; x, dout and dx [n, width], weight [width]. */
export interface RmsNormBackwardArgs extends OnStream {
  x: Tensor;
  weight: Tensor;
  dout: Tensor;
  /** As x; may be dout or x. */
  dx: Tensor;
  eps: number;
  /** dx += instead of dx =. */
  accumulate?: boolean;
  /** f32 [width]; added to. */
  dWeight?: Tensor | null;
}
/** Arguments of `add`: out = a + b, all of one shape. */
export interface AddArgs extends OnStream {
  a: Tensor;
  b: Tensor;
  /** May be a or b. */
  out: Tensor;
}
/** Arguments of `addBias`: x [n, width] += bias [width]. */
export interface AddBiasArgs extends OnStream {
  /** [rows, width]; changed in place. */
  x: Tensor;
  /** [width]. */
  bias: Tensor;
}
/** Arguments of `sumRows`: the sum of the rows of x [n, width], as a bias's gradient needs it. */
export interface SumRowsArgs extends OnStream {
  /** [rows, width]. */
  x: Tensor;
  /** [width]. */
  out: Tensor;
  /** out += instead of out =. */
  accumulate?: boolean;
}
/** Arguments of `scale`: x *= alpha. */
export interface ScaleArgs extends OnStream {
  x: Tensor;
  factor: number;
}
/** Arguments of `axpy`: y += alpha x, both of one shape. */
export interface AxpyArgs extends OnStream {
  x: Tensor;
  y: Tensor;
  /** Default 1. */
  alpha?: number;
}
/** Arguments of `embeddingGather`: out[i] = table[ids[i]]. */
export interface EmbeddingGatherArgs extends OnStream {
  /** `[vocab, width]`, f32, bf16 or f16. */
  table: Tensor;
  /** i32 [n]. */
  ids: Tensor;
  /** [n, width]. */
  out: Tensor;
}
/** Arguments of `embeddingScatterAdd`: dTable[ids[i]] += dout[i]. */
export interface EmbeddingScatterAddArgs extends OnStream {
  /** [n, width]. */
  dout: Tensor;
  /** i32 [n]. */
  ids: Tensor;
  /** f32 [vocab, width]; added to. */
  dTable: Tensor;
}
interface RowNative {
  rmsNorm(args: RmsNormArgs): void;
  rmsNormBackward(args: RmsNormBackwardArgs): void;
  add(args: AddArgs): void;
  addBias(args: AddBiasArgs): void;
  sumRows(args: SumRowsArgs): void;
  scale(args: ScaleArgs): void;
  axpy(args: AxpyArgs): void;
  embeddingGather(args: EmbeddingGatherArgs): void;
  embeddingScatterAdd(args: EmbeddingScatterAddArgs): void;
}
const native = (): RowNative => core<RowNative>();

/** A NaN factor would spread through every later value without a trace of where it came from. */
function checkFinite(op: string, name: string, value: number | undefined): void {
  if (value !== undefined && !Number.isFinite(value))
    throw new LcTypeError('ERR_LC_ARGUMENT', `${op}: ${name} must be a finite number, got ${value}`);
}
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
export function add(args: AddArgs): void {
  native().add(args);
}

/** x += bias for every row. x [rows, width], bias [width]. */
export function addBias(args: AddBiasArgs): void {
  native().addBias(args);
}

/** out [width] = (or with `accumulate` +=) the sum over the rows of x: the gradient of a bias. */
export function sumRows(args: SumRowsArgs): void {
  native().sumRows(args);
}

/** x *= factor. */
export function scale(args: ScaleArgs): void {
  checkFinite('scale', 'factor', args.factor);
  native().scale(args);
}

/** y += alpha x. */
export function axpy(args: AxpyArgs): void {
  checkFinite('axpy', 'alpha', args.alpha);
  native().axpy(args);
}

/** out[i] = table[ids[i]]. table [vocab, width] (f32, bf16 or f16), ids i32 [n], out [n, width]. @throws ERR_LC_ARGUMENT for an id outside the table */
export function embeddingGather(args: EmbeddingGatherArgs): void {
  native().embeddingGather(args);
}

/** dTable[ids[i]] += dout[i], in token order. dTable f32 [vocab, width]. */
export function embeddingScatterAdd(args: EmbeddingScatterAddArgs): void {
  native().embeddingScatterAdd(args);
}
