import { core } from './native.js';
import type { Tensor } from './tensor.js';

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
