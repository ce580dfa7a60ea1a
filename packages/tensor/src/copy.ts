import type { TypedArray } from './dtype.js';
import { core } from './native.js';
import { fromTypedArray, type Tensor } from './tensor.js';

interface CopyNative {
  copy(args: { dst: Tensor; src: Tensor }): void;
  fill(args: { dst: Tensor; value: number }): void;
}

/**
 * dst = src, with a cast where the dtypes differ: f32 to bf16 or f16 rounds to nearest even; to integers it truncates and saturates. Same shape, any
 * strides. Between devices, the device's default stream carries it.
 * @throws ERR_LC_SHAPE
 */
export function copy(dst: Tensor, src: Tensor): void {
  core<CopyNative>().copy({ dst, src });
}

/** Sets every element. */
export function fill(t: Tensor, value: number): void {
  core<CopyNative>().fill({ dst: t, value });
}

/** Writes host values (of the tensor's own dtype; bf16 and f16 as bits) into a contiguous tensor, wherever it lies. @throws ERR_LC_SHAPE, ERR_LC_DTYPE */
export function upload(to: Tensor, values: TypedArray): void {
  // On a GPU the driver has taken pageable memory when the call returns, so `values` may be reused at once.
  using source = fromTypedArray(values, to.shape, { dtype: to.dtype, label: 'upload' });
  copy(to, source);
}
