import { copy, type DType, LcTypeError, type Tensor } from '@lc/tensor';

/** A frozen weight in some storage format, row-major `[..., out, in]`. It owns its tensors. */
export interface WeightStorage extends Disposable {
  readonly format: 'nf4' | 'mxfp4' | 'dense';
  readonly shape: readonly number[];
  /** Bytes it takes, scales included. */
  readonly nbytes: number;
  /** The weight itself when no dequantization is needed for that dtype, else null. */
  plain(dtype: DType): Tensor | null;
  /** Writes the values to `out` (f32 or bf16, contiguous, of this shape). */
  dequantize(out: Tensor): void;
  /** Gives the tensors back. */
  dispose(): void;
}

/** Bytes of `shape` in a format, scales included. */
export function weightBytes(format: 'nf4' | 'nf4-double' | 'mxfp4' | 'bf16' | 'f32', shape: readonly number[]): number {
  const n = shape.reduce((a, b) => a * b, 1);
  const blocks = Math.ceil(n / 64);
  if (format === 'f32') return 4 * n;
  if (format === 'bf16') return 2 * n;
  if (format === 'mxfp4') return n / 2 + n / 32;
  if (format === 'nf4') return Math.ceil(n / 2) + 4 * blocks;
  return Math.ceil(n / 2) + blocks + 4 * Math.ceil(blocks / 256) + 4;
}

export function checkOut(op: string, shape: readonly number[], out: Tensor): void {
  if (out.shape.length !== shape.length || !out.shape.every((size, i) => size === shape[i])) {
    throw new LcTypeError('ERR_LC_SHAPE', `${op}: out must be [${shape.join(',')}], got ${out}; allocate it with that shape`);
  }
}

/** A weight that is stored as it is (f32, bf16 or f16). Owns `data`. */
export class DenseWeight implements WeightStorage {
  readonly format = 'dense';
  readonly shape: readonly number[];
  readonly nbytes: number;

  constructor(readonly data: Tensor) {
    if (!['f32', 'bf16', 'f16'].includes(data.dtype))
      throw new LcTypeError('ERR_LC_DTYPE', `DenseWeight: expected f32, bf16 or f16, got ${data}`);
    this.shape = data.shape;
    this.nbytes = data.nbytes;
  }
  plain(dtype: DType): Tensor | null {
    return dtype === this.data.dtype ? this.data : null;
  }
  dequantize(out: Tensor): void {
    checkOut('DenseWeight.dequantize', this.shape, out);
    copy(out, this.data);
  }
  /** Gives the tensors back. */
  dispose(): void {
    this.data.dispose();
  }
  /** For `using`: `dispose()`. */
  [Symbol.dispose](): void {
    this.dispose();
  }
}
