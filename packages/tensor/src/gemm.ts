import type { Stream } from './cuda.js';
import { LcTypeError } from './errors.js';
import { core } from './native.js';
import type { Tensor } from './tensor.js';

/**
 * Arguments of `gemm`: c = alpha op(a) op(b) + beta c + bias; one device. Rows may be strided. On the CPU all f32, on a GPU f32 or bf16 with f32
 * accumulation.
 */
export interface GemmArgs {
  /** [m, k], or [k, m] with transA. */
  a: Tensor;
  /** [k, n], or [n, k] with transB. */
  b: Tensor;
  /** [m, n]; may not overlap a, b or bias. */
  c: Tensor;
  transA?: boolean;
  transB?: boolean;
  /** Default 1. */
  alpha?: number;
  /** Default 0: c is not read. */
  beta?: number;
  /**
   * [n], contiguous, added to every row. f32 or c's dtype. cuBLASLt adds one of c's dtype (at a multiple of 16 bytes) before c is rounded; elsewhere a pass of its own does, after it.
   * Default none.
   */
  bias?: Tensor | null;
  /** CUDA only: 0 = best there is (default), 1 = lc's own kernel, 2 = cuBLASLt. */
  backend?: 0 | 1 | 2;
  /** CUDA only; default: the device's default stream. */
  stream?: Stream | null;
}

/** Arguments of `groupedGemm`: one product per expert over rows that are sorted by expert. */
export interface GroupedGemmArgs {
  /** [rows, k], rows sorted by expert. */
  a: Tensor;
  /** [experts, k, n], or [experts, n, k] with transB. */
  b: Tensor;
  /** [rows, n]; may not overlap a or b. */
  c: Tensor;
  /** i32 [experts + 1], on the device: rows offsets[e] .. offsets[e+1] belong to expert e. */
  offsets: Tensor;
  transB?: boolean;
  /** Default 1. */
  alpha?: number;
  /** Default 0: c is not read. */
  beta?: number;
  /** CUDA only; default: the device's default stream. */
  stream?: Stream | null;
}

interface GemmNative {
  gemm(args: GemmArgs): void;
  groupedGemm(args: GroupedGemmArgs): void;
  groupedGemmWeightGrad(args: Omit<GroupedGemmArgs, 'transB'>): void;
}

/** Everything about tensors is checked natively, where it is also what memory safety needs. */
function checkScalars(op: string, { alpha = 1, beta = 0 }: { alpha?: number; beta?: number }): void {
  if (!Number.isFinite(alpha) || !Number.isFinite(beta))
    throw new LcTypeError('ERR_LC_ARGUMENT', `${op}: alpha and beta must be finite, got ${alpha} and ${beta}`);
}

/**
 * c = alpha op(a) op(b) + beta c + bias. Row-major; rows may be strided views. On the CPU f32; on CUDA bf16 (f32 accumulation) or f32.
 * On the CPU an element's bits depend on its row of op(a), its column of op(b) and k alone: not on the number of threads, m, n or the storage order.
 * @throws ERR_LC_SHAPE, ERR_LC_DTYPE, ERR_LC_DEVICE, ERR_LC_STRIDES; ERR_LC_ARGUMENT where c overlaps a, b or bias
 */
export function gemm(args: GemmArgs): void {
  checkScalars('gemm', args);
  core<GemmNative>().gemm(args);
}

/**
 * One GEMM per expert over its rows: c_e = alpha a_e op(b_e) + beta c_e. Experts without rows are fine; rows beyond offsets[experts] stay as they are.
 * b may be a view: `weights.slice(1, 0, n)` is one half of a fused [experts, 2n, k].
 * @throws as `gemm`; ERR_LC_ARGUMENT for offsets that decrease or leave the rows of a (on the CPU; on CUDA they are not read by the host)
 */
export function groupedGemm(args: GroupedGemmArgs): void {
  checkScalars('groupedGemm', args);
  core<GemmNative>().groupedGemm(args);
}

/**
 * The gradient of the experts' weights: c [experts, m, n], c_e = alpha a_e^T b_e + beta c_e with a [rows, m], b [rows, n]. An expert without rows has
 * gradient zero: c_e = beta c_e.
 * @throws as `groupedGemm`
 */
export function groupedGemmWeightGrad(args: Omit<GroupedGemmArgs, 'transB'>): void {
  checkScalars('groupedGemmWeightGrad', args);
  core<GemmNative>().groupedGemmWeightGrad(args);
}
