import type { DType, TypedArray } from '@lc/tensor';

/** Whether an f32, bf16 or f16 array holds NaN or infinity: an exponent of all ones, read from the bits, which is the same loop for each. */
export function nonFinite(array: TypedArray, dtype: DType): boolean {
  if (dtype === 'f32') {
    const bits = new Uint32Array(array.buffer, array.byteOffset, array.length);
    for (let i = 0; i < bits.length; i++) if (((bits[i] as number) & 0x7f800000) === 0x7f800000) return true;
    return false;
  }
  const mask = dtype === 'bf16' ? 0x7f80 : 0x7c00;
  for (let i = 0; i < array.length; i++) if (((array[i] as number) & mask) === mask) return true;
  return false;
}

/** out [cols, rows] = transpose of x [rows, cols], in tiles that stay in cache. */
export function transposeInto(out: TypedArray, x: TypedArray, rows: number, cols: number): void {
  const tile = 32;
  for (let r0 = 0; r0 < rows; r0 += tile) {
    for (let c0 = 0; c0 < cols; c0 += tile) {
      for (let r = r0; r < Math.min(rows, r0 + tile); r++) {
        for (let c = c0; c < Math.min(cols, c0 + tile); c++) out[c * rows + r] = x[r * cols + c] as number;
      }
    }
  }
}
