import { LcTypeError } from './errors.js';
import { core } from './native.js';
import type { Tensor } from './tensor.js';

export interface GemmArgs {
  /** [m, k], or [k, m] with transA. */
  a: Tensor;
  /** [k, n], or [n, k] with transB. */
  b: Tensor;
  /** [m, n]; may not overlap a or b. */
  c: Tensor;
  transA?: boolean;
  transB?: boolean;
  /** Default 1. */
  alpha?: number;
  /** Default 0: c is not read. */
  beta?: number;
  /** CUDA only: 0 = best there is (default), 1 = lc's own kernel, 2 = cuBLASLt. */
  backend?: 0 | 1 | 2;
}

export interface GroupedGemmArgs {
  /** [rows, k], rows sorted by expert. */
  a: Tensor;
  /** [experts, k, n], or [experts, n, k] with transB. */
  b: Tensor;
  /** [rows, n]. */
  c: Tensor;
  /** i32 [experts + 1], on the device: rows offsets[e] .. offsets[e+1] belong to expert e. */
  offsets: Tensor;
  transB?: boolean;
  alpha?: number;
  beta?: number;
}

interface GemmNative {
  gemm(args: GemmArgs): void;
  groupedGemm(args: GroupedGemmArgs): void;
  groupedGemmWeightGrad(args: Omit<GroupedGemmArgs, 'transB'>): void;
}

function checkScalars(op: string, { alpha = 1, beta = 0 }: { alpha?: number; beta?: number }): void {
  if (!Number.isFinite(alpha) || !Number.isFinite(beta))
    throw new LcTypeError('ERR_LC_ARGUMENT', `${op}: alpha and beta must be finite, got ${alpha} and ${beta}`);
}

/** All operands on one device; c apart from a and b. */
function checkOperands(op: string, a: Tensor, b: Tensor, c: Tensor): void {
  if (a.device !== c.device || b.device !== c.device) {
    const devices = [a, b, c].map((t) => (t.device === 'host' ? 'cpu' : t.device));
    if (new Set(devices).size > 1)
      throw new LcTypeError('ERR_LC_DEVICE', `${op}: a is on ${a.device}, b on ${b.device}, c on ${c.device}; copy them to one device`);
  }
}

/**
 * c = alpha op(a) op(b) + beta c. Row-major; rows may be strided views. On the CPU f32; on CUDA bf16 (f32 accumulation) or f32.
 * An element's bits depend on neither the number of threads nor on m and n.
 * @throws ERR_LC_SHAPE, ERR_LC_DTYPE, ERR_LC_DEVICE, ERR_LC_STRIDES
 */
export function gemm(args: GemmArgs): void {
  checkScalars('gemm', args);
  checkOperands('gemm', args.a, args.b, args.c);
  core<GemmNative>().gemm(args);
}

/** One GEMM per expert over its rows: c_e = alpha a_e op(b_e) + beta c_e. Experts without rows are fine. Rows beyond offsets[experts] stay as they are. */
export function groupedGemm(args: GroupedGemmArgs): void {
  checkScalars('groupedGemm', args);
  checkOperands('groupedGemm', args.a, args.b, args.c);
  core<GemmNative>().groupedGemm(args);
}

/** The gradient of the experts' weights: c [experts, m, n], c_e = alpha a_e^T b_e + beta c_e with a [rows, m], b [rows, n]. */
export function groupedGemmWeightGrad(args: Omit<GroupedGemmArgs, 'transB'>): void {
  checkScalars('groupedGemmWeightGrad', args);
  checkOperands('groupedGemmWeightGrad', args.a, args.b, args.c);
  core<GemmNative>().groupedGemmWeightGrad(args);
}
