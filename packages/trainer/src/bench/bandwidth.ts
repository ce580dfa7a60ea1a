/** The yardstick of memory-bound ops: a copy on the device in the same run. */
import { fillRandom } from '@lc/models';
import { copy, type DeviceLike, type DType, empty, Scope, type Tensor } from '@lc/tensor';
import type { Clock } from './clock.js';

/** GB/s, read and written, of copying `bytes`. */
export async function copyRate(clock: Clock, device: DeviceLike, bytes: number): Promise<number> {
  using scope = new Scope();
  const [from, to] = [0, 1].map(() => scope.own(empty([bytes], { dtype: 'u8', device, label: 'bench' }))) as [Tensor, Tensor];
  fillRandom(from);
  return (2 * bytes) / (await clock.time(() => copy(to, from), { times: 5 })) / 1e6;
}

/** A random tensor that `scope` owns. */
export function noise(
  scope: Scope,
  device: DeviceLike,
  shape: readonly number[],
  options: { dtype?: DType; seed?: number; std?: number } = {},
): Tensor {
  const { dtype = device === 'cpu' ? 'f32' : 'bf16', seed = 1, std = 1 } = options;
  const out = scope.own(empty(shape, { dtype, device, label: 'bench' }));
  fillRandom(out, { seed, std });
  return out;
}
