/** What GPU tests compare results with. */
import { copy, empty, type Tensor } from '@lc/tensor';

/** A tensor's values, as f32. */
export async function values(t: Tensor): Promise<Float32Array> {
  if (t.dtype === 'f32') return await t.read();
  using wide = empty(t.shape, { device: t.device });
  copy(wide, t);
  return await wide.read();
}

/** Relative Frobenius error; the absolute one where all of `want` is 0. */
export function difference(got: ArrayLike<number>, want: ArrayLike<number>): number {
  let error = 0;
  let norm = 0;
  for (let i = 0; i < want.length; i++) {
    error += ((got[i] as number) - (want[i] as number)) ** 2;
    norm += (want[i] as number) ** 2;
  }
  return Math.sqrt(error / (norm || 1));
}
